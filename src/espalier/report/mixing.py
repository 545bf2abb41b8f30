"""Pictures of how state-space layers mix tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.nn import Mamba1, Mamba2, mixing_matrix
from espalier.report.raster import Panel, picture_table, shrink
from espalier.report.section import Section, paragraph
from espalier.report.views import HEADS, LAYERS, View, lay_out, left_out, runs_behind, spread

# Side of the largest picture; tokens of the longest sequence that is mixed; tokens of the sequence that is repeated.
_SIDE, _LENGTH, _REPEATED = 96, 128, 24

Inputs = dict[str, Tensor]
"""What every mixer of a network is given, (1, L, D), by its name, in module order."""


def repeated_inputs(net: nn.Module, length: int = _REPEATED) -> Inputs:
    """Return for every Mamba mixer the same ``length`` normal vectors twice, (1, 2·length, D): something to recall."""
    inputs = {}
    for name, mixer in _mixers(net).items():
        weight = mixer.out_proj.weight
        tokens_1LD = torch.randn(1, length, mixer.dim, generator=torch.Generator().manual_seed(0))
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


@torch.no_grad()
def mixing_matrices(views: Sequence[View]) -> Section | None:
    """Draw how the Mamba mixers of our own classes mix tokens: one test example of the runs, or a repeated sequence."""
    views = [view for view in views if _mixers(view.net)]
    if not views:
        return None
    run, title = next((view.run for view in views if view.run is not None), None), "Mixing matrices"
    example, words = None, f"The input is {_REPEATED} random vectors, twice: a line beside the diagonal looks back at "
    words += "the same vector in the first copy."
    if run is not None:
        try:
            source = run.source()
            example = next(iter(source.eval_batches(source.eval_splits[0], 1)))[0]
        except (EspalierError, OSError) as error:
            return Section(title, (paragraph(f"No mixing matrices: {error}", "note"),))
        words = f"The input is the first example of the test set, its first {_LENGTH} tokens at most."
    found = []
    for view in views:
        inputs = repeated_inputs(view.net) if example is None else inputs_of_mixers(view.net, example)
        mixers = _mixers(view.net)
        found.append((view, [(name, _matrices(mixers[name], x_1LD)) for name, x_1LD in inputs.items()]))
    layers = found[0][1]
    if len(found) > 1:
        words += left_out(len(layers), LAYERS, "layers")
    words += left_out(max(len(matrices) for _, matrices in layers), HEADS, "heads")
    table = picture_table(
        "Mixing matrix of every head", *lay_out(found, _mixing_panels), scale="diverging", shared=False,
        caption="Row t of a panel shows with what weight every token s ≤ t enters the output at t, step size and decay "
        "included: what attention's map is to attention. A fading diagonal forgets, a full lower triangle keeps. "
        f"For Mamba-1 the mean over its channels. {words}{runs_behind(views)}",
    )  # fmt: skip
    return Section(title, (table,))


def _mixers(net: nn.Module) -> dict[str, Mamba1 | Mamba2]:
    return {name: module for name, module in net.named_modules() if isinstance(module, Mamba1 | Mamba2)}


def _matrices(mixer: Mamba1 | Mamba2, x_1LD: Tensor) -> Tensor:
    """Return the matrices to draw, (H, L, L); Mamba-1's channels are too many, so their mean stands for them."""
    matrices_HLL = mixing_matrix(mixer, x_1LD)[0]
    return matrices_HLL.mean(0, keepdim=True) if isinstance(mixer, Mamba1) else matrices_HLL


def _mixing_panels(name: str, matrices_HLL: Tensor) -> list[Panel]:
    panels = []
    for head in spread(len(matrices_HLL), HEADS):
        matrix_LL = matrices_HLL[head]
        total = matrix_LL.abs().sum().clamp_min(torch.finfo(matrix_LL.dtype).tiny)
        own = float(matrix_LL.diagonal().abs().sum() / total)
        words = f"{name or '(model)'} head {head}: {own:.0%} of its weight is on the token itself"
        panels.append(Panel(shrink(matrix_LL, _SIDE), words))
    return panels
