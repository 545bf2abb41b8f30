"""Views into a module's weights, and the register of functions that make them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from espalier.errors import EspalierError
from espalier.init.sharded import whole


@dataclass(frozen=True)
class AttentionWeights:
    """One self-attention layer's projections, as views that share storage with its parameters.

    Every weight acts as ``y = x Wᵀ``: q is (H·k, d), k and v are (H_kv·k, d), out is (d, H·k); hosts that store the
    transpose hand out transposed views, and hosts that keep each head's q, k and v together hand them out as
    (H, k, d). ``biases`` are those of the four projections that exist.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    num_heads: int
    num_kv_heads: int
    biases: tuple[Tensor, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class DepthwiseWeights:
    """One depthwise convolution's filters, (channels, 1, *kernel), as a view."""

    weight: Tensor


@dataclass(frozen=True)
class SSMWeights:
    """One state-space layer's selection parameters, as views that share storage with its parameters.

    Maps act as ``y = x Wᵀ``. ``w_b`` and ``w_c`` are (G·N, width) with N the state size and G ``groups``; ``w_delta``
    is (channels or heads, its fan-in); ``a_log`` is (channels, N) in Mamba-1 and (heads,) in Mamba-2; ``conv_weight``
    is (channels, 1, K) with the newest tap last. ``map_biases`` are biases of W_B and W_C, ``delta_shifts`` what is
    added to Δ beside ``delta_bias``: both hosts that have them and those that do not start at zero there.
    """

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


@dataclass(frozen=True)
class Skipped:
    """A layer that was recognised and must be left alone, and why."""

    kind: str
    reason: str


Weights = AttentionWeights | DepthwiseWeights | SSMWeights
Found = Weights | Skipped
Layout = Callable[[nn.Module], Found | Mapping[str, Found] | None]
AnyLayout = TypeVar("AnyLayout", bound=Layout)

_LAYOUTS: dict[str, Layout] = {}
_GUESSES: list[Layout] = []

# Decoders call the same class for both kinds of attention; only the name tells them apart.
_CROSS = re.compile(r"(^|\.)(cross_?att\w*|encoder_attn|enc_?dec_?att\w*)$", re.IGNORECASE)


def register_layout(host: str | type[nn.Module]) -> Callable[[AnyLayout], AnyLayout]:
    """Teach Espalier where a module class keeps its weights (decorator).

    The function takes a module and returns views of its weights (``AttentionWeights``, ``SSMWeights``,
    ``DepthwiseWeights``), ``Skipped`` with a reason, a mapping of these by the names of its children (for a module that
    holds several layers), or ``None`` when this instance is none of its business. It serves subclasses too, unless they
    have their own. A class may be named by its dotted path, so that no library need be imported.

    Args:
        host: the class, or its dotted path such as ``"transformers.models.vit.modeling_vit.ViTAttention"``.
    """
    path = host if isinstance(host, str) else _path(host)

    def register(layout: AnyLayout) -> AnyLayout:
        _LAYOUTS[path] = layout
        return layout

    return register


def register_guess(layout: AnyLayout) -> AnyLayout:
    """Ask this layout about modules of classes that nobody registered (decorator); its note says that it guessed."""
    _GUESSES.append(layout)
    return layout


def find_layers(model: nn.Module, *, shapes: bool = False) -> Iterator[tuple[str, str, Found]]:
    """Yield ``(name, host class, weights)`` for every layer that a layout knows, in module order, each module once.

    Modules inside a recognised one are not looked at again. The views of a sharded layer are of its whole weights,
    gathered when it is yielded; what was written to them reaches the shards when the next one is asked for.

    Args:
        model: any module.
        shapes: gather nothing; the views of sharded layers are then on the meta device.

    Raises:
        EspalierError: a module lacks an attribute that its layout reads (another version of the class).
    """
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        host = next((path for path in map(_path, type(module).__mro__) if path in _LAYOUTS), None)
        with whole(module, shapes=True):
            found = _read(name, module, host)
        if found is None:
            continue
        prefix = f"{name}." if name else ""
        inside.append(prefix)
        with whole(module, shapes=shapes) as sharded:
            if sharded:
                found = _read(name, module, host)
                assert found is not None
            layers = found if isinstance(found, Mapping) else {"": found}
            for child, weights in layers.items():
                full = prefix + child if child else name
                yield full, type(module).__name__, _unless_crossed(full, weights)


def _read(name: str, module: nn.Module, host: str | None) -> Found | Mapping[str, Found] | None:
    if host is None:
        return next((found for guess in _GUESSES if (found := guess(module)) is not None), None)
    try:
        return _LAYOUTS[host](module)
    except AttributeError as error:
        raise EspalierError(f"layer {name!r} is a {host}, but {error}: register a layout for this class") from error


def _unless_crossed(name: str, weights: Found) -> Found:
    if isinstance(weights, AttentionWeights) and _CROSS.search(name):
        return Skipped("attention", "cross-attention compares two sequences: left alone")
    return weights


def refuse_parametrized(module: nn.Module, kind: str) -> Skipped | None:
    """Return why a layer cannot be written when any of its weights is computed from others, else ``None``."""
    if any(parametrize.is_parametrized(part) for part in module.modules()):
        return Skipped(kind, "its weights are parametrised: remove the parametrisation, write, register it again")
    return None


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
