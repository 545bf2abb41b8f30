"""Filters of nets that were trained properly: how structured they are, and the statistics that others start from.

``python experiments/measured.py trained-filters`` (needs ESPALIER_DATA with cifar-10) trains two nets for about a
quarter of an hour of one core each, and leaves the record and ``filters-source.safetensors`` in docs/results/records.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from espalier.init import FilterStatistics, depthwise_layers
from espalier.init.filters.closed_form import filter_covariance
from espalier.init.filters.fit import covariance_fit, fit_closed_form
from espalier.recipes import Recipe, get_recipe
from espalier.study.statistics import Interval, t_interval
from espalier.study.table import markdown_rows
from espalier.train import train

SOURCE = Path("docs") / "results" / "records" / "filters-source.safetensors"
"""From the root of the repository, so that a recipe that names it is the same everywhere."""
SEEDS = (0, 1)


def source_recipe() -> Recipe:
    """Return the recipe of the nets: ConvMixer-48/4, kernel 9, patch 2, on all images."""
    base = get_recipe("convmixer_filters")
    return replace(base, name="filters-source", data_args={}, epochs=15, batch_size=128, crop_padding=4, eval_every=5)


def trained_filters(model: Path | None) -> Mapping[str, Any]:
    """Train the nets, keep their statistics for others to start from, and return what their filters are like."""
    nets, scores = [], []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            run = train(replace(source_recipe(), seed=seed), Path(folder) / "run", progress=False)
            assert run.result is not None
            scores.append(run.result["score"])
            nets.append(run.model())
        print(f"seed {seed}: {scores[-1]:.4f}", flush=True)
    FilterStatistics.from_model(nets).save(SOURCE)
    return {"epochs": source_recipe().epochs, "accuracy": scores, **distances(nets)}


def distances(nets: Sequence[nn.Module]) -> Mapping[str, Any]:
    """Return how far every layer's filters are from the closed form and from white noise, and maps of all nets pooled.

    Args:
        nets: of one shape, one a seed.
    """
    rows = []
    for seed, net in enumerate(nets):
        for name, layer in depthwise_layers(net):
            found = covariance_fit(layer.weight)
            figures = {key: getattr(found, key) for key in ("sigma", "error", "white_error", "concentration")}
            rows.append({"seed": seed, "layer": name, **figures})
    maps = [
        {"layer": layer.name, "kernel": list(layer.kernel_size), **_maps(layer.covariance, layer.kernel_size)}
        for layer in FilterStatistics.from_model(nets).layers
    ]
    return {"rows": rows, "maps": maps}


def _maps(covariance: torch.Tensor, sizes: tuple[int, ...]) -> Mapping[str, Sequence[float]]:
    """Return the variance of every tap and its covariance with the middle one, measured and of the nearest closed form.

    All are in units of the largest measured variance, with three digits: they are drawn.
    """
    fit = fit_closed_form(covariance, sizes)
    nearest = fit.amplitude * filter_covariance(sizes, fit.sigma)
    middle, unit = len(covariance) // 2, float(covariance.diagonal().max())
    return {
        f"{what} {words}": [round(value / unit, 3) for value in values.tolist()]
        for words, matrix in (("measured", covariance), ("closed form", nearest))
        for what, values in (("variance", matrix.diagonal()), ("with the middle", matrix[middle]))
    }


def gains(rows: Sequence[Mapping[str, Any]]) -> Interval:
    """Return the interval, over layers and nets, of how much nearer filters are to the closed form than to noise."""
    return t_interval([row["white_error"] - row["error"] for row in rows])


def filter_rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table of the layers."""
    table = [("seed", "layer", "σ", "distance to the closed form", "distance to white noise", "concentration")]
    for row in rows:
        figures = (f"{row[key]:.2f}" for key in ("sigma", "error", "white_error", "concentration"))
        table.append((str(row["seed"]), row["layer"], *figures))
    return markdown_rows(table)


def filter_picture(maps: Sequence[Mapping[str, Any]]) -> str:
    """Return the maps as an SVG: a row a layer, measured beside the closed form; blue is negative."""
    kinds = [kind for kind in maps[0] if kind not in ("layer", "kernel")]
    kinds.sort(key=lambda kind: (not kind.startswith("variance"), kind.endswith("closed form")))
    side, cell, left, top = maps[0]["kernel"][0], 9, 70, 34
    step = side * cell + 22
    parts = []
    for column, kind in enumerate(kinds):
        words = "closed form" if kind.endswith("closed form") else "measured"
        for line, text in enumerate((kind.removesuffix(f" {words}"), words)):
            parts.append(f'<text x="{left + column * step}" y="{top - 18 + 11 * line}" font-size="9">{text}</text>')
    for row, layer in enumerate(maps):
        parts.append(f'<text x="4" y="{top + row * step + 40}" font-size="9">{layer["layer"].split(".fn")[0]}</text>')
        for column, kind in enumerate(kinds):
            for tap, value in enumerate(layer[kind]):
                x, y = left + column * step + tap % side * cell, top + row * step + tap // side * cell
                shade = round(255 * (1 - min(1.0, abs(value))))
                colour = f"rgb(255,{shade},{shade})" if value >= 0 else f"rgb({shade},{shade},255)"
                parts.append(f'<rect x="{x}" y="{y}" width="{cell}" height="{cell}" fill="{colour}"/>')
    width, height = left + len(kinds) * step, top + len(maps) * step
    inside = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n{inside}\n</svg>\n'
    )
