"""Views into a module's weights, and the register of functions that make them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize


@dataclass(frozen=True)
class AttentionWeights:
    """One self-attention layer's projections, as views that share storage with its parameters.

    Every weight acts as ``y = x Wᵀ``: q is (H·k, d), k and v are (H_kv·k, d), out is (d, H·k); libraries that store the
    transpose hand out transposed views, and those that keep each head's q, k and v together hand them out as
    (H, k, d). ``biases`` are those of the four projections that exist. ``causal`` says whether a token sees only those
    before it, where that is known; ``score_scale`` is what stands before q·k in place of 1/√k, divided by that.
    ``apart`` names the weights of maps that each head has for itself: ``Layer.open`` gives them together.
    """

    kind: ClassVar[str] = "attention"
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    num_heads: int
    num_kv_heads: int
    biases: tuple[Tensor, ...] = ()
    note: str = ""
    causal: bool | None = None
    score_scale: float = 1.0
    apart: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class LatentAttentionWeights:
    """One multi-head latent attention's projections, as views that share storage with its parameters.

    Keys and values of all heads come out of one latent of r features: ``kv_down`` is (r, d), a norm with ``kv_gain``
    (r,) follows, and then ``k`` (H, n, r) and ``v`` (H, m, r). Queries have a latent of their own, ``q_down``,
    ``q_gain`` and ``q`` (H, n, r_q), or none, and then ``q`` is (H, n, d). ``out`` is (d, H·m). Rows that carry
    positions are in none of the views. ``scales`` are what a host multiplies its normalised query and key-value
    latents by.
    """

    kind: ClassVar[str] = "attention"
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    kv_down: Tensor
    kv_gain: Tensor
    num_heads: int
    q_down: Tensor | None = None
    q_gain: Tensor | None = None
    scales: tuple[float, float] = (1.0, 1.0)
    note: str = ""
    causal: bool | None = None

    def composed(self) -> AttentionWeights:
        """Return the layer as one without latents, each projection multiplied by its ``latent_map``: copies."""
        kv_RD = latent_map(self.kv_down, self.kv_gain, self.scales[1])
        q = self.q.to(kv_RD)
        if self.q_down is not None and self.q_gain is not None:
            q = q @ latent_map(self.q_down, self.q_gain, self.scales[0])
        k, v = self.k.to(kv_RD) @ kv_RD, self.v.to(kv_RD) @ kv_RD
        return AttentionWeights(q, k, v, self.out, self.num_heads, self.num_heads, (), self.note, self.causal)


def latent_map(down: Tensor, gain: Tensor, scale: float) -> Tensor:
    """Return the linear map that stands for a latent and its norm: ``G = s · diag(g) A · √r / ‖A‖_F``, (r, d).

    The norm makes ``s · g ⊙ A x / rms(A x)`` of a token x. Over tokens whose features are independent and of variance
    1, as a norm before the layer leaves them, the mean square of A x is ‖A‖²_F / r. A token's own share of it differs
    from that mean, so products hold up to one factor a token; like the layer, G does not depend on the size of A.

    Args:
        down: A.
        gain: g.
        scale: s.
    """
    down_RD = down.to(torch.promote_types(down.dtype, torch.float32))
    size = down_RD.norm().clamp_min(torch.finfo(down_RD.dtype).tiny)
    return gain.to(down_RD)[:, None] * down_RD * (scale * len(down_RD) ** 0.5 / size)


@dataclass(frozen=True)
class DepthwiseWeights:
    """One depthwise convolution's filters, (channels, 1, *kernel), as a view.

    ``centre`` is the tap that meets the output's own position: its number from 0 on every axis, or the middle one, or
    the last one of a causal convolution, as ``filter_covariance`` names them.
    """

    kind: ClassVar[str] = "depthwise"
    weight: Tensor
    note: str = ""
    centre: Literal["middle", "last"] | tuple[int, ...] = "middle"


@dataclass(frozen=True)
class SSMWeights:
    """One state-space layer's selection parameters, as views that share storage with its parameters.

    Maps act as ``y = x Wᵀ``. ``w_b`` and ``w_c`` are (G·N, width) with N the state size and G ``groups``; ``w_delta``
    is (channels or heads, its fan-in); ``a_log`` is (channels, N) in Mamba-1 and (heads,) in Mamba-2; ``conv_weight``
    is (channels, 1, K) with the newest tap last. ``map_biases`` are biases of W_B and W_C, ``delta_shifts`` what is
    added to Δ beside ``delta_bias``: both libraries that have them and those that do not start at zero there.
    ``step_limits`` are what Δ is held within, whatever its bias says.
    """

    kind: ClassVar[str] = "ssm"
    family: Literal["mamba1", "mamba2"]
    w_b: Tensor
    w_c: Tensor
    w_delta: Tensor
    delta_bias: Tensor
    a_log: Tensor
    conv_weight: Tensor
    conv_bias: Tensor | None = None
    groups: int = 1
    map_biases: tuple[Tensor, ...] = ()
    delta_shifts: tuple[Tensor, ...] = ()
    note: str = ""
    step_limits: tuple[float, float] = (0.0, math.inf)


@dataclass(frozen=True)
class Skipped:
    """A layer that was recognised and must be left alone, and why."""

    kind: str
    reason: str


Weights = AttentionWeights | LatentAttentionWeights | DepthwiseWeights | SSMWeights
Found = Weights | Skipped
Layout = Callable[[nn.Module], Found | Mapping[str, Found] | None]
AnyLayout = TypeVar("AnyLayout", bound=Layout)


class BareCheckpoint(nn.Module):
    """The root of modules that hold a checkpoint without its code: nothing in it can be run."""


LAZY = "its weights have no shape before its first call: run a batch, then write"
CROSS = "cross-attention compares two sequences: left alone"
ROTARY = "rotary positions: the QK product holds at distance zero"
COMPUTED = "its weights are computed by a hook before each call: remove the hook, write, put it back"

# By the class's dotted path.
LAYOUTS: dict[str, Layout] = {}
# Layouts for classes that nobody registered.
GUESSES: list[Layout] = []


def register_layout(host: str | type[nn.Module]) -> Callable[[AnyLayout], AnyLayout]:
    """Teach Espalier where a module class keeps its weights (decorator).

    The function takes a module and returns views of its weights (``AttentionWeights``, ``LatentAttentionWeights``,
    ``SSMWeights``, ``DepthwiseWeights``), ``Skipped`` with a reason, a mapping of these by the names of its children
    (for a module that holds several layers), or ``None`` when this instance is none of its business. It serves
    subclasses too, unless they have their own; what it reads in a subclass with code of its own is written only if a
    run of that code proves it. A class may be named by its dotted path, so that no library need be imported.

    Args:
        host: the class, or its dotted path such as ``"transformers.models.vit.modeling_vit.ViTAttention"``.
    """
    path = host if isinstance(host, str) else class_path(host)

    def register(layout: AnyLayout) -> AnyLayout:
        LAYOUTS[path] = layout
        return layout

    return register


def register_guess(layout: AnyLayout) -> AnyLayout:
    """Ask this layout about modules of classes that nobody registered (decorator).

    What it returns is written only if a run of the module proves it. Guesses are tried in the order of registration:
    each may be one reading of weights that could be read in several ways.
    """
    GUESSES.append(layout)
    return layout


class Refused(Exception):
    """Raised with a kind and a reason inside a layout that cannot read a layer, which becomes ``Skipped`` with both."""


def refuse_computed(module: nn.Module, kind: str) -> Skipped | None:
    """Return why a layer cannot be written when any of its weights is computed from others, else ``None``.

    Parametrisations say so of themselves. Hooks of the older kind (``weight_norm``, ``spectral_norm``, ``prune`` and
    what users write after their model) keep what they compute from beside the weight, under the weight's name and more.
    """
    if holds_lazy(module):
        return Skipped(kind, LAZY)
    if any(parametrize.is_parametrized(part) for part in module.modules()):
        return Skipped(kind, "its weights are parametrised: remove the parametrisation, write, register it again")
    for part in module.modules():
        kept = {*part._parameters.keys(), *part._buffers.keys()}  # a scripted module has no plain dictionaries
        for name in ("weight", "bias", "in_proj_weight", "in_proj_bias"):
            sources = [other for other in kept if other.startswith(f"{name}_")]
            # No bias is None there for some, and a bias may be a flag.
            held = isinstance(vars(part).get(name), Tensor)
            if held or (part._forward_pre_hooks and name in kept and sources):
                return Skipped(kind, COMPUTED)
    return None


def holds_lazy(module: nn.Module) -> bool:
    """Return whether a module holds parameters or buffers that its first call will make."""
    return any(map(is_lazy, itertools.chain(module.parameters(), module.buffers())))


def attribute(owner: Any, name: str, default: Any = None) -> Any:
    """Return an attribute that an object of anyone's may have, or ``default`` where it has none or asking raises."""
    try:
        return getattr(owner, name, default)
    except Exception:  # whatever a property of the user's own raises while nothing is attached
        return default


def class_path(cls: type) -> str:
    """Return a class's dotted path."""
    return f"{cls.__module__}.{cls.__qualname__}"


def transformers_path(name: str) -> str:
    """Return the dotted path of a class of transformers: that of ``vit.ViTAttention`` is in ``modeling_vit``."""
    folder, _, cls = name.partition(".")
    return f"transformers.models.{folder}.modeling_{folder}.{cls}"
