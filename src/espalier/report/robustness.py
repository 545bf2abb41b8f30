"""What was proved about a run, and what attacks found: curves over the radius, the modules' constants, a few images."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from espalier.certify.certificate import Certificate
from espalier.errors import EspalierError
from espalier.report.curves import figure_of, scatter
from espalier.report.raster import photograph
from espalier.report.section import Context, Markup, Plot, Section, paragraph, table
from espalier.train import Run
from espalier.train.certify_runs import kept_attack, kept_certificate, pixel_net


def robustness(run: Run, context: Context) -> Section | None:
    """Show the certificate of a run, and its attack report, where ``espalier certify`` and ``attack`` left them."""
    try:
        certificate, attacked = kept_certificate(run), kept_attack(run)
    except EspalierError as error:
        return Section("What is proved", (paragraph(f"Not shown: {error}", "note"),))
    if certificate is None:
        return None
    distances = None
    if attacked is not None:
        distances = [math.inf if distance is None else distance for distance in attacked.distances]
    rows = [(path, f"{constant:.9g}", f"{rounding:.2e}") for path, constant, rounding in certificate.slack]
    parts: list[Markup | Plot] = [
        _curves(certificate, distances),
        paragraph(certificate.assumptions[0], "note"),
        table(("module", "Lipschitz constant", "rounding that it adds"), rows, "numbers"),
    ]
    try:
        _, images, labels = pixel_net(run, len(certificate))
    except EspalierError as error:  # the data may have moved since: the numbers above do not need them
        parts.append(paragraph(f"No images: {error}", "note"))
    else:
        if tuple(labels.tolist()) != certificate.labels:  # one that does not say of which weights it is
            return Section("What is proved", (paragraph("Not shown: the certificate is of other images", "note"),))
        parts += _examples(certificate, images)
    return Section("What is proved", tuple(parts))


def _curves(certificate: Certificate, distances: Sequence[float] | None) -> Plot:
    top = 1.1 * max((r for r in certificate.radii if math.isfinite(r)), default=1.0)
    lines: list[tuple[str, str, Sequence[float]]] = [("certified", "#0072b2", certificate.radii)]
    if distances is not None:
        lines.insert(0, ("under attack", "#d55e00", distances))
    traces = [
        scatter(
            _survival(values, top), (), name, mode="lines", showlegend=True, hoverinfo="all",
            line={"color": colour, "shape": "hv"},
        )
        for name, colour, values in lines
    ]  # fmt: skip
    figure = figure_of(traces, "ℓ2 radius ε, pixels in [0, 1]", "share of images, %")
    figure.update_xaxes(range=[0, top])
    figure.update_yaxes(range=[0, 101])
    behind = f"certified: {len(certificate)} test images"
    if distances is not None:
        behind += f"; attacked: {len(distances)} of them"
    caption = (
        "Share of test images that provably keep their right class within ε, under the share that attacks left "
        f"standing there: the truth lies between the two. One run; {behind}."
    )
    return Plot(figure, caption)


def _survival(values: Sequence[float], top: float) -> list[tuple[float, float]]:
    """Return the steps of ε ↦ share of values above ε, in per cent."""
    ordered = sorted(value for value in values if value <= top)
    steps = [(value, 100 * (len(values) - rank) / len(values)) for rank, value in enumerate(ordered, start=1)]
    start = [] if ordered and ordered[0] == 0.0 else [(0.0, 100.0)]
    return [*start, *steps, (top, steps[-1][1] if steps else 100.0)]


def _examples(certificate: Certificate, images: Tensor) -> list[Markup]:
    """Return the images with the largest, the middle and the smallest radius, and one that is wrong."""
    right = sorted((i for i, radius in enumerate(certificate.radii) if radius > 0), key=certificate.radii.__getitem__)
    wrong = [
        i for i, pair in enumerate(zip(certificate.labels, certificate.predictions, strict=True)) if len({*pair}) > 1
    ]
    chosen = [right[-1], right[len(right) // 2], right[0]] if right else []
    return [photograph(images[i], _describe(certificate, i)) for i in [*dict.fromkeys(chosen), *wrong[:1]]]


def _describe(certificate: Certificate, index: int) -> str:
    label, prediction, radius = certificate.labels[index], certificate.predictions[index], certificate.radii[index]
    said = f"right (class {label})" if label == prediction else f"class {label}, taken for {prediction}"
    return f"test image {index}: {said}, certified radius {radius:.3f}"
