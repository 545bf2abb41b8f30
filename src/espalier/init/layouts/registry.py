"""Views into a module's weights, and the register of functions that make them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from espalier.init.sharded import whole


@dataclass(frozen=True)
class AttentionWeights:
    """One self-attention layer's projections, as views that share storage with its parameters.

    Every weight acts as ``y = x Wᵀ``: q is (H·k, d), k and v are (H_kv·k, d), out is (d, H·k); hosts that store the
    transpose hand out transposed views, and hosts that keep each head's q, k and v together hand them out as
    (H, k, d). ``biases`` are those of the four projections that exist. ``causal`` says whether a token sees only those
    before it, where that is known.
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


@dataclass(frozen=True)
class DepthwiseWeights:
    """One depthwise convolution's filters, (channels, 1, *kernel), as a view."""

    kind: ClassVar[str] = "depthwise"
    weight: Tensor
    note: str = ""


@dataclass(frozen=True)
class SSMWeights:
    """One state-space layer's selection parameters, as views that share storage with its parameters.

    Maps act as ``y = x Wᵀ``. ``w_b`` and ``w_c`` are (G·N, width) with N the state size and G ``groups``; ``w_delta``
    is (channels or heads, its fan-in); ``a_log`` is (channels, N) in Mamba-1 and (heads,) in Mamba-2; ``conv_weight``
    is (channels, 1, K) with the newest tap last. ``map_biases`` are biases of W_B and W_C, ``delta_shifts`` what is
    added to Δ beside ``delta_bias``: both hosts that have them and those that do not start at zero there.
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


@dataclass(frozen=True)
class Layer:
    """Where a layer is, and how to get at its weights.

    Attributes:
        name: its dotted name in the model.
        host: the class of the module that holds it.
        module: that module.
        child: the layer's name inside the module, where a module holds several; else empty.
        found: its weights, or why it is left alone. Of a sharded layer only the shapes: its views are on the meta
            device, and ``open`` gathers them.
    """

    name: str
    host: str
    module: nn.Module
    child: str
    found: Found

    @contextmanager
    def open(self) -> Iterator[Found]:
        """Give fresh views of the layer's whole weights for the length of a ``with`` block.

        What is written to the views of a sharded layer reaches the shards when the block is left, from rank 0's values
        on every rank; after an exception nothing is written. Every rank must enter.
        """
        with whole(self.module):
            found = _read(self.module)
            layers = found if isinstance(found, Mapping) else {"": found}
            weights = layers.get(self.child)
            if weights is None:
                raise RuntimeError(f"layer {self.name!r} is no longer what its layout found: it changed meanwhile")
            yield _unless_crossed(self.name, weights)


def locate_layers(model: nn.Module) -> list[Layer]:
    """Return every layer that a layout knows, in module order, each module once, without gathering any weights.

    Modules inside a recognised one are not looked at again. A module that its layout cannot read becomes one
    ``Skipped`` layer with the reason, and the others go on.
    """
    inside: list[str] = []
    located = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        with whole(module, shapes=True):
            found = _read(module)
        if found is None:
            continue
        prefix = f"{name}." if name else ""
        inside.append(prefix)
        for child, weights in (found if isinstance(found, Mapping) else {"": found}).items():
            full = prefix + child if child else name
            located.append(Layer(full, type(module).__name__, module, child, _unless_crossed(full, weights)))
    return located


def find_layers(model: nn.Module) -> Iterator[tuple[str, str, Found]]:
    """Yield ``(name, host class, weights)`` of every layer of ``locate_layers``, each opened while it is looked at."""
    for layer in locate_layers(model):
        with layer.open() as weights:
            yield layer.name, layer.host, weights


class Refused(Exception):
    """Raised inside a layout for a part that it cannot read: the layer becomes ``Skipped(kind, reason)``."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.skipped = Skipped(kind, reason)


def _read(module: nn.Module) -> Found | Mapping[str, Found] | None:
    """Ask the layout of a module's class, or the guesses; what a layout raises becomes ``Skipped`` with the reason."""
    host = next((path for path in map(_path, type(module).__mro__) if path in _LAYOUTS), None)
    layouts = _GUESSES if host is None else [_LAYOUTS[host]]
    try:
        found = next((found for layout in layouts if (found := layout(module)) is not None), None)
    except Exception as error:  # a layout may be anyone's, and one layer that it cannot read must not stop the others
        if any(parameter.numel() == 0 for parameter in module.parameters()):
            return Skipped(_kind_of(module), _EMPTY)
        if isinstance(error, Refused):
            return error.skipped
        words = str(error).strip().splitlines() or ["no message"]
        reason = f"{host or type(module).__name__} cannot be read ({type(error).__name__}: {words[0]})"
        return Skipped(_kind_of(module), f"{reason}: register a layout for this class")
    if isinstance(found, Mapping):
        return {child: _unless_unusable(weights) for child, weights in found.items()}
    return None if found is None else _unless_unusable(found)


_EMPTY = "its weights hold no values here (ZeRO-3 keeps them elsewhere): gather them, or write before sharding"
_QUANTISED = "its weights are quantised: write the full-precision model, then quantise it"


def _unless_unusable(weights: Found) -> Found:
    """Return views that hold numbers of at least two bytes, or else why they cannot be written."""
    if isinstance(weights, Skipped):
        return weights
    values = [value for value in vars(weights).values() if isinstance(value, Tensor)]
    if any(value.numel() == 0 for value in values):
        return Skipped(weights.kind, _EMPTY)
    if any(not value.is_floating_point() or value.element_size() < 2 for value in values):
        return Skipped(weights.kind, _QUANTISED)
    return weights


def _kind_of(module: nn.Module) -> str:
    """Return the family of a layer whose layout failed, by what only that family has."""
    if hasattr(module, "A_log"):
        return "ssm"
    return "depthwise" if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else "attention"


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
