"""What was proved about a run, and what attacks found: curves over the radius, spectra of its layers, a few images."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from espalier.certify.certificate import Certificate
from espalier.errors import EspalierError, require
from espalier.nn.orthogonal.conv import CayleyConv1d, CayleyConv2d, CayleyConv3d, CayleyConvTranspose2d
from espalier.nn.orthogonal.linear import CayleyLinear
from espalier.report.raster import photograph
from espalier.report.section import Context, Markup, Plot, Section, paragraph, table
from espalier.train import Run
from espalier.train.certify_runs import attack_path, certificate_path, pixel_net

_ORTHOGONAL = (CayleyConv1d, CayleyConv2d, CayleyConv3d, CayleyConvTranspose2d, CayleyLinear)
_DIRECTIONS = 64


def robustness(run: Run, context: Context) -> Section | None:
    """Show the certificate of a run, and its attack report, where ``espalier certify`` and ``attack`` left them."""
    if not certificate_path(run.path).exists():
        return None
    certificate = Certificate.load(certificate_path(run.path))
    distances = None
    if attack_path(run.path).exists():
        distances = [math.inf if d is None else d for d in json.loads(attack_path(run.path).read_text())["distances"]]
    parts: list[Markup | Plot] = [_curves(certificate, distances), paragraph(certificate.assumptions[0], "note")]
    try:
        net, images, _ = pixel_net(run, len(certificate))
    except EspalierError as error:  # the data may have moved since: the numbers above do not need them
        parts.append(paragraph(f"No spectra and images: {error}", "note"))
    else:
        parts += [_spectra(net, images[:1]), *_examples(certificate, images)]
    return Section("What is proved", tuple(parts))


def layer_spectra(net: nn.Module, image: Tensor) -> list[tuple[str, str, float, float]]:
    """Return (path, class, smallest, largest singular value) of every orthogonal layer, seen from outside.

    Each layer is probed at the size at which it sees ``image``: its differential is applied to random orthonormal
    directions (of the output, through the transpose, where it has fewer outputs than inputs). All singular values of
    the result are 1 if the layer is what it should be.

    Args:
        net: the network, in evaluation mode.
        image: one image (1, C, H, W), in the network's precision.
    """
    seen: dict[str, tuple[nn.Module, Tensor]] = {}
    names = {module: name for name, module in net.named_modules() if isinstance(module, _ORTHOGONAL)}
    handles = [
        module.register_forward_pre_hook(lambda m, args: seen.update({names[m]: (m, args[0].detach())}))
        for module in names
    ]
    try:
        with torch.no_grad():
            net(image)
    finally:
        for handle in handles:
            handle.remove()
    return [(name, type(module).__name__, *_extremes(module, x)) for name, (module, x) in seen.items()]


def _extremes(module: nn.Module, x: Tensor) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        origin = module(torch.zeros_like(x))
    forward = origin.numel() >= x.numel()
    size = x.numel() if forward else origin.numel()
    noise = torch.randn(size, min(_DIRECTIONS, size), generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(noise).Q.mT.to(x.dtype)
    if forward:
        with torch.no_grad():
            image = module(directions.view(-1, *x.shape[1:])) - origin
    else:
        start = torch.zeros(len(directions), *x.shape[1:], dtype=x.dtype, requires_grad=True)
        (image,) = torch.autograd.grad(module(start), start, directions.view(-1, *origin.shape[1:]))
    values = torch.linalg.svdvals(image.flatten(1).double())
    return values.min().item(), values.max().item()


def _curves(certificate: Certificate, distances: Sequence[float] | None) -> Plot:
    go = require("plotly.graph_objects", "train")
    figure = go.Figure()
    top = 1.1 * max((r for r in certificate.radii if math.isfinite(r)), default=1.0)
    lines: list[tuple[str, str, Sequence[float]]] = [("certified", "#0072b2", certificate.radii)]
    if distances is not None:
        lines.insert(0, ("under attack", "#d55e00", distances))
    for name, colour, values in lines:
        x, y = _survival(values, top)
        line = {"color": colour, "shape": "hv"}
        figure.add_trace(go.Scatter(x=x, y=y, mode="lines", name=name, line=line))
    figure.update_layout(template="none", margin={"t": 10, "r": 10}, paper_bgcolor="rgba(0,0,0,0)",
                         plot_bgcolor="rgba(0,0,0,0)")  # fmt: skip
    figure.update_xaxes(title="ℓ2 radius ε, pixels in [0, 1]", range=[0, top])
    figure.update_yaxes(title="share of images, %", range=[0, 101])
    behind = f"certified: {len(certificate)} test images"
    if distances is not None:
        behind += f"; attacked: {len(distances)} of them"
    caption = (
        "Share of test images that provably keep their right class within ε, under the share that attacks left "
        f"standing there: the truth lies between the two. One run; {behind}."
    )
    return Plot(figure, caption)


def _survival(values: Sequence[float], top: float) -> tuple[list[float], list[float]]:
    """Return the steps of ε ↦ share of values above ε, in per cent."""
    ordered = sorted(value for value in values if value <= top)
    steps = [(value, 100 * (len(values) - rank) / len(values)) for rank, value in enumerate(ordered, start=1)]
    start = [] if ordered and ordered[0] == 0.0 else [(0.0, 100.0)]
    points = [*start, *steps, (top, steps[-1][1] if steps else 100.0)]
    return [x for x, _ in points], [y for _, y in points]


def _spectra(net: nn.Module, image: Tensor) -> Markup:
    rows = [(path, kind, f"{low:.7f}", f"{high:.7f}") for path, kind, low, high in layer_spectra(net, image)]
    if not rows:
        return paragraph("No orthogonal layers.")
    return table(("layer", "kind", "smallest singular value", "largest"), rows, "numbers")


def _examples(certificate: Certificate, images: Tensor) -> list[Markup]:
    """Return the images with the largest, the middle and the smallest radius, and one that is wrong."""
    right = sorted((i for i, radius in enumerate(certificate.radii) if radius > 0), key=certificate.radii.__getitem__)
    wrong = [
        i for i, pair in enumerate(zip(certificate.labels, certificate.predictions, strict=True)) if len({*pair}) > 1
    ]
    chosen = [right[-1], right[len(right) // 2], right[0]] if right else []
    return [photograph(images[i], _in_words(certificate, i)) for i in [*dict.fromkeys(chosen), *wrong[:1]]]


def _in_words(certificate: Certificate, index: int) -> str:
    label, prediction, radius = certificate.labels[index], certificate.predictions[index], certificate.radii[index]
    said = f"right (class {label})" if label == prediction else f"class {label}, taken for {prediction}"
    return f"test image {index}: {said}, certified radius {radius:.3f}"
