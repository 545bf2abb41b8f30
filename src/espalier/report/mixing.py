"""Pictures of how tokens mix: where attention looks, and the matrices that state-space layers multiply by."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from espalier.models import VisionTransformer
from espalier.nn import Mamba1, Mamba2, mixing_matrix
from espalier.report.raster import Panel, photograph, shrink
from espalier.report.section import Markup, Section, paragraph
from espalier.report.views import HEADS, Found, View, first_examples, layer_pictures, left_out
from espalier.study.statistics import spread

# Side of the largest picture; tokens of the longest sequence that is mixed; tokens of the sequence that is repeated.
_SIDE, _LENGTH, _REPEATED = 96, 128, 24

Inputs = dict[str, Tensor]
"""What every mixer of a network is given, (1, L, D), by its name, in module order."""


@torch.no_grad()
def attention_maps(views: Sequence[View]) -> Section | None:
    """Draw where the tokens of one test image of their own runs look, for our own vision transformers."""
    views = [view for view in views if isinstance(view.net, VisionTransformer) and view.net.blocks and view.run]
    if not views:
        return None
    pairs, problems = first_examples(views)
    notes = [paragraph(f"No attention maps: {problem}", "note") for problem in problems]
    if not pairs:
        return Section("Attention maps", tuple(notes))
    found = []
    for view, image_1CHW in pairs:
        maps = view.net.attention_maps(image_1CHW)  # type: ignore[operator]
        found.append((view, [(f"blocks.{index}", map_1HLL[0]) for index, map_1HLL in enumerate(maps)]))
    table = layer_pictures(
        "Attention of every head", found, partial(_panels, "of a patch's look is at itself"),
        "Row i of a panel shows where patch i of the image looks, and sums to one: a diagonal is a patch that looks at "
        f"itself, lines beside it are its neighbours.{left_out(_most_heads(found), HEADS, 'heads')}",
        scale="sequential", shared=True,
    )  # fmt: skip
    return Section("Attention maps", (*notes, *_photographs(pairs), table))


def _most_heads(found: Found[Tensor]) -> int:
    return max(len(matrices_HLL) for _, layers in found for _, matrices_HLL in layers)


def _photographs(pairs: Sequence[tuple[View, Tensor | None]]) -> list[Markup]:
    """Return the images of the networks, each once, and where they differ with the arms that are shown it."""
    images: list[tuple[Tensor, dict[str, None]]] = []
    for view, image in pairs:
        if image is None:
            continue
        names = next((names for known, names in images if torch.equal(known, image)), None)
        if names is None:
            images.append((image, names := {}))
        names[view.name] = None
    return [
        photograph(image[0], "The first image of the test set" + (f" of {', '.join(names)}." if images[1:] else "."))
        for image, names in images
    ]


@torch.no_grad()
def mixing_matrices(views: Sequence[View]) -> Section | None:
    """Draw how the Mamba mixers of our own classes mix tokens: a test example of their run, or a repeated sequence."""
    views = [view for view in views if _mixers(view.net)]
    if not views:
        return None
    pairs, problems = first_examples(views)
    notes = [paragraph(f"No mixing matrices: {problem}", "note") for problem in problems]
    words = f"The input is the first example of the test set, its first {_LENGTH} tokens at most."
    if any(example is None for _, example in pairs):
        words = f"The input is {_REPEATED} random vectors, twice: a line beside the diagonal looks back at "
        words += "the same vector in the first copy."
    found = []
    for view, example in pairs:
        inputs = repeated_inputs(view.net) if example is None else inputs_of_mixers(view.net, example)
        mixers = _mixers(view.net)
        if inputs:  # else no mixer of it took part
            found.append((view, [(name, _matrices(mixers[name], x_1LD)) for name, x_1LD in inputs.items()]))
    if not found:
        return Section("Mixing matrices", tuple(notes)) if notes else None
    table = layer_pictures(
        "Mixing matrix of every head", found, partial(_panels, "of its weight is on the token itself"),
        "Row t of a panel shows with what weight every token s ≤ t enters the output at t, step size and decay "
        "included: what attention's map is to attention. A fading diagonal forgets, a full lower triangle keeps. "
        f"For Mamba-1 the mean over its channels. {words}{left_out(_most_heads(found), HEADS, 'heads')}",
    )  # fmt: skip
    return Section("Mixing matrices", (*notes, table))


def repeated_inputs(net: nn.Module) -> Inputs:
    """Return for every Mamba mixer the same few normal vectors twice, (1, 2·n, D): something to recall."""
    inputs = {}
    for name, mixer in _mixers(net).items():
        weight = mixer.out_proj.weight
        tokens_1LD = torch.randn(1, _REPEATED, mixer.dim, generator=torch.Generator().manual_seed(0))
        inputs[name] = tokens_1LD.repeat(1, 2, 1).to(weight.device, weight.dtype)
    return inputs


def inputs_of_mixers(net: nn.Module, example: Tensor) -> Inputs:
    """Return what every Mamba mixer is given while the network reads one example, at most its first 128 tokens."""
    caught: Inputs = {}
    hooks = [
        mixer.register_forward_pre_hook(
            lambda _, args, name=name: caught.__setitem__(name, args[0].detach()[:, :_LENGTH])
        )
        for name, mixer in _mixers(net).items()
    ]
    try:
        net(example)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: caught[name] for name in _mixers(net) if name in caught}


def _mixers(net: nn.Module) -> dict[str, Mamba1 | Mamba2]:
    return {name: module for name, module in net.named_modules() if isinstance(module, Mamba1 | Mamba2)}


def _matrices(mixer: Mamba1 | Mamba2, x_1LD: Tensor) -> Tensor:
    """Return the matrices to draw, (H, L, L); Mamba-1's channels are too many, so their mean stands for them."""
    matrices_HLL = mixing_matrix(mixer, x_1LD)[0]
    return matrices_HLL.mean(0, keepdim=True) if isinstance(mixer, Mamba1) else matrices_HLL


def _panels(own: str, name: str, matrices_HLL: Tensor) -> list[Panel]:
    """Return the pictures of some heads; ``own`` says what the share of a matrix on its diagonal is."""
    panels = []
    for head in spread(len(matrices_HLL), HEADS):
        matrix_LL = matrices_HLL[head]
        total = matrix_LL.abs().sum().clamp_min(torch.finfo(matrix_LL.dtype).tiny)
        share = float(matrix_LL.diagonal().abs().sum() / total)
        panels.append(Panel(shrink(matrix_LL, _SIDE), f"{name or '(model)'} head {head}: {share:.0%} {own}"))
    return panels
