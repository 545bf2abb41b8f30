"""Every layer and model with an input for it, and what it must agree with: itself in float64 on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from espalier import models
from espalier.models.sequence import CausalSelfAttention
from espalier.models.vit import Attention
from espalier.nn import (
    CayleyConv1d,
    CayleyConv2d,
    CayleyConv3d,
    CayleyConvTranspose2d,
    CayleyLinear,
    GatedRMSNorm,
    Mamba1,
    Mamba2,
    parametrize_cayley,
    use_backend,
)
from espalier.nn.lipschitz.activations import GroupSort, MaxMin
from espalier.nn.lipschitz.normalisation import Normalize, NormalizedLinear
from espalier.nn.lipschitz.pooling import InvertibleDownsampling, ScaledAvgPool2d
from espalier.nn.lipschitz.residual import ConvexSum


class Case(NamedTuple):
    """A module and the shape of its input; ``tokens`` is the vocabulary where the input is a sequence of them."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: int = 0

    def seeded(self) -> tuple[nn.Module, Tensor]:
        """Return the module with seeded weights, on the CPU in float32, and its input."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(sum(self.shape))
            module = self.build()
            if self.tokens:
                return module, torch.randint(self.tokens, self.shape)
            return module, torch.rand(self.shape)


class Gated(nn.Module):
    """The gated norm on one input: its halves are the values and the gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = GatedRMSNorm(width, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        """Split and norm."""
        return self.norm(*x.chunk(2, dim=-1))


ORTHOGONAL: dict[str, Case] = {
    "conv1d": Case(lambda: CayleyConv1d(4, 6, 3), (2, 4, 10)),
    "conv2d": Case(lambda: CayleyConv2d(8, 8, 3), (2, 8, 8, 8)),
    "conv2d-large-map": Case(lambda: CayleyConv2d(4, 4, 3), (2, 4, 40, 33)),
    "conv2d-one-tap": Case(lambda: CayleyConv2d(6, 9, 1), (2, 6, 5, 7)),
    "conv2d-strided-wide": Case(lambda: CayleyConv2d(4, 8, 3, stride=2), (2, 4, 12, 8)),
    "conv2d-groups-dilated-even": Case(lambda: CayleyConv2d(6, 12, 4, groups=3, dilation=2), (2, 6, 11, 9)),
    "conv2d-zeros": Case(lambda: CayleyConv2d(5, 3, 3, padding_mode="zeros"), (2, 5, 7, 6)),
    "conv2d-many-images": Case(lambda: CayleyConv2d(4, 4, 3), (64, 4, 8, 8)),
    "conv2d-many-channels": Case(lambda: CayleyConv2d(160, 160, 3), (2, 160, 4, 4)),
    "conv3d": Case(lambda: CayleyConv3d(3, 5, 3), (2, 3, 4, 5, 6)),
    "transpose2d": Case(lambda: CayleyConvTranspose2d(8, 4, 3, stride=2), (2, 8, 4, 6)),
    "linear-wide": Case(lambda: CayleyLinear(12, 20), (5, 12)),
    "linear-tall": Case(lambda: CayleyLinear(200, 160), (5, 200)),
    "parametrized": Case(lambda: parametrize_cayley(nn.Linear(12, 8)), (5, 12)),
}
LIPSCHITZ: dict[str, Case] = {
    "maxmin": Case(MaxMin, (2, 6, 4, 4)),
    "groupsort": Case(lambda: GroupSort(3), (2, 6, 4, 4)),
    "convex-sum": Case(lambda: ConvexSum(CayleyConv2d(4, 4, 3)), (2, 4, 6, 6)),
    "invertible-downsampling": Case(lambda: InvertibleDownsampling(2), (2, 4, 6, 6)),
    "scaled-pool": Case(lambda: ScaledAvgPool2d(2), (2, 4, 6, 6)),
    "scaled-pool-all": Case(ScaledAvgPool2d, (2, 4, 6, 5)),
    "normalized-linear": Case(lambda: NormalizedLinear(6, 4), (5, 6)),
    "normalize": Case(lambda: Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]), (2, 3, 4, 4)),
}
SEQUENCE: dict[str, Case] = {
    "mamba1": Case(lambda: Mamba1(16, 8), (2, 37, 16)),
    "mamba1-long": Case(lambda: Mamba1(8, 4), (1, 700, 8)),
    "mamba2": Case(lambda: Mamba2(16, 8, head_dim=8, groups=2), (2, 37, 16)),
    "mamba2-long": Case(lambda: Mamba2(16, 8, head_dim=16), (1, 700, 16)),
    "gated-norm": Case(lambda: Gated(8), (2, 5, 16)),
    "attention": Case(lambda: Attention(16, 4), (2, 9, 16)),
    "causal-attention": Case(lambda: CausalSelfAttention(16, 4, num_kv_heads=2), (2, 9, 16)),
}
NETWORKS: dict[str, Case] = {
    "vit": Case(lambda: models.VisionTransformer(16, 4, embed_dim=32, depth=2, num_heads=2), (3, 3, 16, 16)),
    "vit-learned-cls": Case(
        lambda: models.VisionTransformer(16, 4, embed_dim=32, depth=2, num_heads=2, positions="learned", pool="cls"),
        (3, 3, 16, 16),
    ),
    "convmixer": Case(lambda: models.ConvMixer(16, 2, kernel_size=5, patch_size=2, num_classes=10), (4, 3, 16, 16)),
    "sequence": Case(
        lambda: models.SequenceModel(12, dim=16, pattern="mamba1 mamba2 attention", state_size=8, head_dim=8),
        (2, 21),
        tokens=12,
    ),
    "kwlarge": Case(lambda: models.KWLarge(width=8, hidden=32), (4, 3, 32, 32)),
    "orthogonal-convnet": Case(lambda: models.OrthogonalConvNet(widths=(16,), depths=(2,), hidden=32), (4, 3, 32, 32)),
}
CASES = {**ORTHOGONAL, **LIPSCHITZ, **SEQUENCE, **NETWORKS}


def run(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the output and the gradients of ⟨output, ramp⟩ with respect to the input and every parameter, by name."""
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    y = module(x)
    # A ramp, not ones: sums would hide permuted outputs.
    ramp = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.device, y.dtype)
    wanted = {"input": x} if x.requires_grad else {}
    wanted |= {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not wanted:
        return {"output": y.detach()}
    gradients = torch.autograd.grad((y * ramp).sum(), list(wanted.values()), allow_unused=True)
    found = {name: g.detach() for name, g in zip(wanted, gradients, strict=True) if g is not None}
    return {"output": y.detach(), **found}


def oracle(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return what ``run`` gives for a float64 copy of the module on the CPU, in plain torch."""
    with use_backend("torch"):
        return run(copy.deepcopy(module).cpu().double(), x.cpu().double() if x.is_floating_point() else x.cpu())


def with_decisions(compute: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return what ``compute`` gives, and which of each pair every MaxMin met was the smaller."""
    found: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, MaxMin):
            a, b = inputs[0].detach().chunk(2, dim=1)
            found.append((a < b).cpu())

    handle = register_module_forward_pre_hook(note)
    try:
        return compute(), found
    finally:
        handle.remove()


def worst_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest ‖found − exact‖ / (‖exact‖ + 1e-3 · the largest gradient's norm), and whose it is."""
    assert found.keys() == exact.keys()
    # A gradient that cancels to nothing (a bias before a batch norm) is rounding alone: it is held to the others' size.
    scale = max(float(value.norm()) for name, value in exact.items() if name != "output" or len(exact) == 1)
    errors = {}
    for name, value in found.items():
        distance = float((value.cpu().double() - exact[name]).norm())
        errors[name] = distance / (float(exact[name].norm()) + (0.0 if name == "output" else 1e-3 * scale))
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    return errors[worst], worst
