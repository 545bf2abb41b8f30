"""Which modules of a model are layers that can be written: registered ones, proven guesses, and why the rest is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from espalier.init.filters.closed_form import Convolution
from espalier.init.layouts.at_home import foreign_beside, foreign_part, is_at_home, is_ours
from espalier.init.layouts.by_name import NO_OUTPUT
from espalier.init.layouts.by_run import reading_by_run
from espalier.init.layouts.heads_apart import groups_of, together
from espalier.init.layouts.linears import NO_HEADS
from espalier.init.layouts.mamba import beside_the_scan
from espalier.init.layouts.names import looks_like_attention, reads_cross, says_cross
from espalier.init.layouts.outside import outside_kept
from espalier.init.layouts.probe_attention import BESIDE
from espalier.init.layouts.probe_depthwise import align
from espalier.init.layouts.prove import NOT_RUN, PROVEN, prove, prove_use, refuse_other_keys
from espalier.init.layouts.registry import (
    COMPUTED,
    CROSS,
    GUESSES,
    LAYOUTS,
    LAZY,
    AttentionWeights,
    DepthwiseWeights,
    Found,
    Layout,
    Refused,
    Skipped,
    SSMWeights,
    attribute,
    class_path,
    holds_lazy,
    refuse_computed,
)
from espalier.init.layouts.scratch import first_line, owner_of
from espalier.init.sharded import whole

_EMPTY = "its weights hold no values here (ZeRO-3 keeps them elsewhere): gather them, or write before sharding"
_EXPANDED = "its weights are fewer numbers seen many times (expanded, overlapping): clone them, then write"
_OVERLAPPING = "two of its projections are tied, or share memory: their products cannot both be set"
_QUANTISED = "its weights are quantised: write the full-precision model, then quantise it"
_SCRIPTED = "it is compiled by torch.jit, so that no run can prove it: write the plain model, then compile it"
# What a class has besides what it redefines.
_BOOKKEEPING = {
    "__module__", "__doc__", "__annotations__", "__constants__", "__parameters__", "__orig_bases__",
    "__static_attributes__", "__firstlineno__",
}  # fmt: skip

# Index of a layer and number of layers, among those of its kind, left alone or not.
Place = tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """Where a layer is, and how to get at its weights.

    Attributes:
        name: its dotted name in the model.
        host: the class of the module that holds it.
        module: that module.
        child: the layer's name inside the module, where a module holds several; else empty.
        names: every module of the model, to find what calls this one.
        found: its weights, or why it is left alone. Of a sharded layer only the shapes: its views are on the meta
            device, and ``open`` gathers them.
        place: its index and the number of layers, among those of its kind: what depth it has, to all who ask.
    """

    name: str
    host: str
    module: nn.Module
    child: str
    names: Mapping[str, nn.Module]
    found: Found
    place: Place = (0, 1)

    @property
    def part(self) -> nn.Module:
        """The layer's own module: ``module``, or its child."""
        return self.names.get(self.name, self.module)

    @contextmanager
    def open(self) -> Iterator[Found]:
        """Give fresh views of the layer's whole weights for the length of a ``with`` block.

        What is written to the views of a sharded layer reaches the shards when the block is left, from rank 0's values
        on every rank; after an exception nothing is written. Every rank must enter.
        """
        with whole(self.module), together(self.module, getattr(self.found, "apart", ())):
            place = self.name[: len(self.name) - len(self.child)].rstrip(".")
            weights = (_read(self.names, place) or {}).get(self.child, self.found)
            if weights is self.found and not isinstance(weights, Skipped):
                raise RuntimeError(f"layer {self.name!r} is no longer what its layout found: it changed meanwhile")
            yield weights


def locate_layers(model: nn.Module) -> list[Layer]:
    """Return every layer that a layout knows, in module order, each module once, without gathering any weights.

    Modules inside a recognised one are not looked at again, but for depthwise filters inside attention and for whole
    attention inside a class that nobody registered. Such a class gives weights only where a run of the module proves
    them (see ``probe_attention``). A module that its layout cannot read, or that looks like attention and is not
    understood, becomes one ``Skipped`` layer with the reason, and the others go on: no attention goes without a row.
    """
    with outside_kept(model):
        located = _located(model)
    counts, met, placed = Counter(layer.found.kind for layer in located), Counter[str](), []
    for layer in located:
        kind = layer.found.kind
        placed.append(replace(layer, place=(met[kind], counts[kind])))
        met[kind] += 1
    return placed


def _located(model: nn.Module) -> list[Layer]:
    names = dict(model.named_modules())
    registered = {n for n, m in names.items() if class_path(type(m)) in LAYOUTS and _kind_of(m) == "attention"}
    attention = registered | {name for name, module in names.items() if looks_like_attention(module)}
    # What has attention inside it is named for that: the innermost is the layer.
    attention -= {".".join(name.split(".")[:end]) for name in attention if name for end in range(name.count(".") + 1)}
    inside, refused, attending, apart = list[str](), list[str](), list[str](), set[str]()
    located = []
    for name, module in names.items():
        # Images have two axes or more; a kernel of one column runs over time, whatever its class.
        images = isinstance(module, nn.Conv2d | nn.Conv3d) and sum(taps > 1 for taps in module.kernel_size) > 1
        filters = name.startswith(tuple(attending if images else refused)) and isinstance(module, Convolution)
        if name.startswith(tuple(inside)) and not filters and name not in apart:
            continue
        host = type(module).__name__
        with whole(module, shapes=True):
            found = _read(names, name)
            if found is not None and not _is_registered(module):
                within = (part for part in attention if part.startswith(f"{name}.".lstrip(".")))
                apart |= {part for part in within if _stands_alone(names[part])}
        if found is None:
            if name in attention or _has_scripted_filters(module):
                located.append(Layer(name, host, module, "", names, _not_understood(module)))
            continue
        prefix = f"{name}." if name else ""
        inside.append(prefix)
        # Filters of images inside attention are layers beside it (positions of LePE). Those over time are its own, as a
        # state-space layer's are, unless it is left alone.
        attending += [prefix] * all(weights.kind == "attention" for weights in found.values())
        refused += [prefix] * (prefix in attending and all(isinstance(each, Skipped) for each in found.values()))
        for child, weights in found.items():
            located.append(Layer(prefix + child if child else name, host, module, child, names, weights))
    return located


def find_layers(model: nn.Module) -> Iterator[tuple[str, str, Found]]:
    """Yield ``(name, host class, weights)`` of every layer of ``locate_layers``, each opened while it is looked at."""
    for layer in locate_layers(model):
        with layer.open() as weights:
            yield layer.name, layer.host, weights


def _read(names: Mapping[str, nn.Module], name: str) -> Mapping[str, Found] | None:
    """Return what may be written of a module and its parts, or why it may not, or ``None`` if nothing is recognised.

    By the names of the parts: "" is the module itself.
    """
    module = names[name]
    if isinstance(module, torch.jit.ScriptModule):  # its code can neither be looked at nor run in float64
        return None
    host = next((cls for cls in type(module).__mro__ if class_path(cls) in LAYOUTS), None)
    if host is None:
        return {"": guessed} if (guessed := _guess(names, name)) else None
    layout, own_code = LAYOUTS[class_path(host)], _has_own_code(type(module), host)
    found = _apply(layout, module)
    if isinstance(found, Mapping):
        if own_code:  # it may call its parts as it likes: they are looked at one by one
            return None
        return {child: _vet(f"{name}.{child}".lstrip("."), module, part) for child, part in found.items()}
    if found is None:
        return None
    found = _vet(name, module, found)
    if isinstance(found, DepthwiseWeights) and host.__module__.startswith("torch."):
        found = align(names, name, found, own_code=own_code)
    elif own_code:
        found = prove(names, name, found, layout)
    elif isinstance(found, SSMWeights) and is_ours(layout) and (more := beside_the_scan(module)):
        found = prove(names, name, found, layout)
        if isinstance(found, Skipped):
            found = replace(found, reason=f"its class is not known to have {', '.join(more)}, and {found.reason}")
    elif foreign := foreign_part(module, host, layout, found):
        found = prove(names, name, found, layout) if isinstance(found, AttentionWeights | SSMWeights) else foreign
    elif isinstance(found, AttentionWeights):
        if beside := foreign_beside(module, host, layout):
            proven = prove(names, name, found, layout)
            # What cannot run here, such as a norm in a GPU's kernel, is noted.
            refused = isinstance(proven, Skipped) and not proven.reason.startswith(NOT_RUN)
            found = proven if refused else replace(found, note="; ".join(filter(None, (found.note, beside))))
            return {"": found}
        if host is nn.MultiheadAttention:
            found = prove_use(names, name, found)
        elif (owner := owner_of(names, name)) is not None and not is_at_home(owner[1], host):
            found = refuse_other_keys(names, name, found, layout) or found
    return {"": found}


def _guess(names: Mapping[str, nn.Module], name: str) -> Found | None:
    """Return the first reading that a run of the module proves, else why the first is not proven."""
    refused: Found | None = None
    for guess in GUESSES:
        found = _proven(names, name, guess)
        if found is not None and not isinstance(found, Skipped):
            return found
        refused = refused or found
    if refused is None or (isinstance(refused, Skipped) and refused.reason.startswith((NO_HEADS, NO_OUTPUT))):
        # Queries, keys and values of known names want a fourth map.
        without = isinstance(refused, Skipped) and refused.reason == NO_OUTPUT
        reading = reading_by_run(names, name, 4 if without else 2)
        found = None
        if reading is not None:
            with together(names[name], groups_of(reading), shapes=True):
                found = _proven(names, name, reading, "found by what its maps move")
        # Weights that no run of it, in its model, proves are not found in this way.
        sure = isinstance(found, AttentionWeights) and PROVEN in found.note and BESIDE not in found.note
        return found if sure else refused or (found if isinstance(found, Skipped) else None)
    return refused


def _proven(names: Mapping[str, nn.Module], name: str, reading: Layout, *how: str) -> Found | None:
    found = _apply(reading, names[name])
    assert not isinstance(found, Mapping)
    return None if found is None else prove(names, name, _vet(name, names[name], found), reading, *how)


def _apply(layout: Layout, module: nn.Module) -> Found | Mapping[str, Found] | None:
    """Ask a layout about a module; what it raises becomes ``Skipped`` with the reason."""
    try:
        with as_in_evaluation(module):
            return layout(module)
    except Exception as error:  # a layout may be anyone's, and one layer that it cannot read must not stop the others
        if holds_lazy(module):
            return Skipped(_kind_of(module), LAZY)
        if any(parameter.numel() == 0 for parameter in module.parameters()):
            return Skipped(_kind_of(module), _EMPTY)
        if isinstance(error, Refused):
            return Skipped(*error.args)
        reason = f"{class_path(type(module))} cannot be read ({first_line(error)}): register a layout for this class"
        return Skipped(_kind_of(module), reason)


def _stands_alone(module: nn.Module) -> bool:
    """Return whether a module within attention is attention of its own, and not the half of it that holds the keys."""
    return _is_registered(module) or any(isinstance(_apply(guess, module), AttentionWeights) for guess in GUESSES)


def _is_registered(module: nn.Module) -> bool:
    return any(class_path(cls) in LAYOUTS for cls in type(module).__mro__)


@contextmanager
def as_in_evaluation(module: nn.Module) -> Iterator[None]:
    """Keep parametrisations still while weights are read: in training, spectral norm moves its vectors each time."""
    owners = (part for part in module.modules() if parametrize.is_parametrized(part))
    moving = [part for owner in owners for part in owner.get_submodule("parametrizations").modules() if part.training]
    try:
        for part in moving:
            part.training = False
        yield
    finally:
        for part in moving:
            part.training = True


def _unusable(values: Sequence[Tensor]) -> str:
    """Return why views cannot be written that do not hold numbers of at least two bytes, each of its own; else ""."""
    if any(value.numel() == 0 for value in values):
        return _EMPTY
    if any(value.is_complex() for value in values):
        return "its weights are complex numbers, of which no structure is published"
    if any(not value.is_floating_point() or value.element_size() < 2 for value in values):
        return _QUANTISED
    if any(map(_repeats, values)):
        return _EXPANDED
    # Views of one head's rows are not dense: they lie between each other's rows, apart by construction.
    dense = [v for v in values if v.is_contiguous() or (v.ndim > 1 and v.mT.is_contiguous())]
    spans = sorted((v.untyped_storage()._cdata, v.storage_offset(), v.storage_offset() + v.numel()) for v in dense)
    overlap = any(first[0] == second[0] and second[1] < first[2] for first, second in pairwise(spans))
    return _OVERLAPPING if overlap else ""


def _repeats(value: Tensor) -> bool:
    """Return whether some entries of a view may be the same number: an axis that steps no farther than others reach."""
    reach = 0
    for step, size in sorted((step, size) for step, size in zip(value.stride(), value.shape, strict=True) if size > 1):
        if step <= reach:
            return True
        reach += (size - 1) * step
    return False


def _kind_of(module: nn.Module) -> str:
    """Return the family of a layer whose layout failed, by what only that family has."""
    if attribute(module, "A_log") is not None:
        return "ssm"
    return "depthwise" if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else "attention"


def _vet(name: str, module: nn.Module, found: Found) -> Found:
    """Return what a layout read, or why it must not be written whatever the module computes."""
    if isinstance(found, Skipped):
        return found
    if refused := refuse_computed(module, found.kind):
        return refused
    views = [view for view in vars(found).values() if isinstance(view, Tensor)]
    biases = [bias for part in vars(found).values() if isinstance(part, tuple) for bias in part]
    biases = [bias for bias in biases if isinstance(bias, Tensor)]
    if reason := _unusable(views) or (any(map(_repeats, biases)) and _EXPANDED):
        return Skipped(found.kind, reason)
    if found.kind == "attention" and (reads_cross(name) or says_cross(module)):
        return Skipped("attention", CROSS)
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    # A bias that stays zero is a buffer in some classes (BEiT's, EVA's keys).
    kept = own | {buffer.untyped_storage()._cdata for buffer in module.buffers()}
    held = [(view, own) for view in views] + [(bias, kept) for bias in biases]
    computed = any(part.untyped_storage()._cdata not in known for part, known in held)
    return Skipped(found.kind, COMPUTED) if computed else found


def _has_own_code(cls: type, host: type) -> bool:
    """Return whether a subclass of a registered class redefines anything of it."""
    bases = [base for base in host.__mro__ if base is not nn.Module and issubclass(base, nn.Module)]
    theirs = {"forward", "__init__"}.union(*map(vars, bases)) - _BOOKKEEPING
    between = cls.__mro__[: cls.__mro__.index(host)]
    return any(theirs & set(vars(base)) for base in between if base is not nn.Module)


def _has_scripted_filters(module: nn.Module) -> bool:
    """Return whether a module is a depthwise convolution, by its weight, that ``torch.jit`` compiled."""
    weight = attribute(module, "weight") if isinstance(module, torch.jit.ScriptModule) else None
    if not isinstance(weight, Tensor) or weight.ndim < 3 or attribute(module, "groups", len(weight)) != len(weight):
        return False  # a traced one has no groups
    return weight.shape[1] == 1 < len(weight) and weight[0].numel() > 2


def _not_understood(module: nn.Module) -> Skipped:
    """Return why a module that looks like attention, or is a scripted convolution, is left alone."""
    if isinstance(module, torch.jit.ScriptModule):
        return Skipped("depthwise" if _has_scripted_filters(module) else "attention", _SCRIPTED)
    children = {name for name, _ in module.named_children()}
    reason = "it looks like attention, in a form that no layout knows: register one for its class"
    if any(name.startswith(("kv_down", "kv_a")) for name in children):
        reason = "multi-head latent attention in a form that no layout knows: register one for its class"
    elif says_cross(module):
        reason = CROSS
    return Skipped("attention", reason)
