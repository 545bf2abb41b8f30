"""``structure_`` and ``audit``: find the layers of a model, write structure into them, measure what is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from espalier.errors import EspalierError
from espalier.init.attention.mimetic import Mimetic
from espalier.init.families import FAMILIES, Family, Place
from espalier.init.filters.spec import FilterCovariance
from espalier.init.layouts import Skipped, find_layers, locate_layers
from espalier.init.layouts.registry import Weights
from espalier.init.report import LayerReport, StructureReport
from espalier.init.sharded import agree, reshard
from espalier.init.ssm import MimeticSSM

# Statuses of layers that carried structure when their report was made.
_CARRIED = ("written", "present", "changed")

# Name, host, family, views (or why there are none), place among the layers of the family.
Layer = tuple[str, str, Family, Weights | Skipped, Place]


class VerificationError(RuntimeError):
    """A layer's weights do not show what was just written: something shares or computes them."""


@torch.no_grad()
def structure_(
    model: nn.Module,
    *,
    attention: Mimetic | None = Mimetic(),  # noqa: B008 (frozen)
    ssm: MimeticSSM | None = MimeticSSM(),  # noqa: B008 (frozen)
    depthwise: FilterCovariance | None = FilterCovariance(),  # noqa: B008 (frozen)
    generator: torch.Generator | None = None,
    guard: bool = False,
) -> StructureReport:
    """Write structure into every layer that a layout recognises, in place, then measure it and report.

    Self-attention gets mimetic products, state-space layers start as causal linear attention, depthwise convolutions
    get covariance-structured filters. On the meta device nothing is written and the rows say so: call it again after
    ``to_empty()``. Call it **last**, after anything that draws weights of its own (``post_init``,
    ``reset_parameters``), and ``audit`` after anything that touches weights. On a sharded model (FSDP2, DTensor) every
    rank calls it: one layer at a time is gathered, written and sharded again, and the weights are those of a single
    process with the same generator.

    Args:
        model: any module; the library it comes from need not be known as long as a layout covers its classes.
        attention: strengths for self-attention, or ``None`` to leave it alone.
        ssm: what to write into state-space layers, or ``None`` to leave them alone.
        depthwise: covariance for depthwise filters, or ``None`` to leave them alone.
        generator: source of all noise; each layer draws from a stream of its own.
        guard: keep a fingerprint of every written layer's bits in the report, so that ``audit(model, against=report)``
            tells weights that were touched from weights that were not. Nothing is left in the model.

    Returns:
        One row a layer; ``print`` shows it as a table.

    Raises:
        EspalierError: the model holds nothing that was asked for.
        VerificationError: a layer does not show what was written into it.
    """
    asked: dict[str, object] = {"attention": attention, "ssm": ssm, "depthwise": depthwise}
    reshard(model)
    layers = [found for found in _layers(model, shapes=True) if asked[found[2].kind] is not None]
    _refuse_nothing(model, layers, asked)
    # One stream a layer, so that a layer's weights do not depend on how many numbers the one before it drew.
    seeds = agree([int(torch.randint(2**62, (), generator=generator)) for _ in layers], model)
    opened = (found for found in _layers(model) if asked[found[2].kind] is not None)
    written: list[LayerReport] = []
    marks: dict[str, tuple[float, ...]] = {}
    for (name, host, family, weights, place), seed in zip(opened, seeds, strict=True):
        if isinstance(weights, Skipped) or (why := _left_alone(family, weights, asked[family.kind], place)):
            note = weights.reason if isinstance(weights, Skipped) else why
            written.append(LayerReport(name, family.kind, host, "skipped", note=note))
            continue
        stream = torch.Generator(device=family.device(weights)).manual_seed(seed)
        text = family.write(weights, asked[family.kind], place, stream)
        marks[name] = family.fingerprint(weights)
        written.append(LayerReport(name, family.kind, host, "written", text, note=family.note(weights)))
    return _verify(model, written, marks, asked, guard)


@torch.no_grad()
def audit(model: nn.Module, against: StructureReport | None = None) -> StructureReport:
    """Measure how much structure a model's weights carry now, layer by layer.

    Args:
        model: any module, before or after wrapping, sharding, loading or training.
        against: an earlier report; layers that carried structure in it and do not now are called ``lost``, also when
            the layer itself is gone.

    Returns:
        One row a layer: ``present`` when the structure stands out from chance, else ``absent`` or ``lost``. A layer
        that lost one of several parts is ``lost``, and its note names them; ``changed`` is one whose structure stands
        out and whose bits are not those that ``guard=True`` recorded.

    Raises:
        EspalierError: no layer of the model is recognised.
    """
    reshard(model)
    before = {} if against is None else {_plain(row.layer): row for row in against.layers}
    rows = []
    for name, host, family, weights, _ in _layers(model):
        earlier = before.pop(_plain(name), None)
        if isinstance(weights, Skipped) or family.on_meta(weights):
            note = weights.reason if isinstance(weights, Skipped) else "on the meta device"
            rows.append(LayerReport(name, family.kind, host, "skipped", note=note))
            continue
        measured = family.measure(weights)
        row = LayerReport(name, family.kind, host, "present", measured=measured, note=family.note(weights))
        rows.append(_judge(row, family, weights, earlier))
    gone = [row for row in before.values() if row.status in _CARRIED]
    rows += [replace(row, status="lost", measured={}, note="the layer is gone") for row in gone]
    if not rows:
        raise EspalierError(
            f"model {type(model).__name__} has no layer that carries structure: register a layout for its classes"
        )
    return StructureReport(tuple(rows))


def _refuse_nothing(model: nn.Module, layers: Sequence[Layer], asked: Mapping[str, object]) -> None:
    """Raise if no layer can be written."""
    if any(not isinstance(weights, Skipped) for _, _, _, weights, _ in layers):
        return
    wanted = " or ".join(kind for kind, spec in asked.items() if spec is not None) or "anything"
    reasons = "".join(f"; {name}: {w.reason}" for name, _, _, w, _ in layers[:3] if isinstance(w, Skipped))
    raise EspalierError(
        f"model {type(model).__name__} has no {wanted} layer to structure{reasons}: "
        "register a layout for its classes (espalier.init.register_layout)"
    )


def _left_alone(family: Family, weights: Weights, spec: object, place: Place) -> str:
    """Return why a layer that could be written is not, or the empty string."""
    if not family.chooses(spec, place):
        return "not among the layers asked for"
    return "on the meta device: run again later" if family.on_meta(weights) else ""


def _judge(row: LayerReport, family: Family, weights: Weights, earlier: LayerReport | None) -> LayerReport:
    """Return the row of a measured layer with its status, given what an earlier report says of it."""
    parts = family.parts(row.measured)
    if earlier is None or earlier.status not in _CARRIED:
        row = row if parts else replace(row, status="absent")
    elif gone := (family.parts(earlier.measured) if earlier.measured else frozenset()) - parts:
        note = f"lost: {', '.join(sorted(gone))}"
        row = replace(row, status="lost", note="; ".join(filter(None, (row.note, note))) if parts else row.note)
    elif not parts:
        row = replace(row, status="lost")
    elif earlier.mark and earlier.mark != family.bits(weights):
        row = replace(row, status="changed")
    return row if earlier is None else replace(row, asked=earlier.asked, mark=earlier.mark)


def _verify(
    model: nn.Module,
    written: list[LayerReport],
    marks: dict[str, tuple[float, ...]],
    asked: Mapping[str, object],
    guard: bool,
) -> StructureReport:
    """Measure every written layer through fresh views, and raise at the first that shows something else."""
    rows = {row.layer: row for row in written}
    for name, _, family, weights, place in _layers(model):
        if name not in marks or isinstance(weights, Skipped):
            continue
        if family.fingerprint(weights) != marks[name]:
            raise VerificationError(f"layer {name!r} changed after it was written: it shares its weight with another")
        measured = family.measure(weights)
        if wrong := family.contradiction(weights, asked[family.kind], place, measured):
            raise VerificationError(f"layer {name!r}: {wrong}")
        rows[name] = replace(rows[name], measured=measured, mark=family.bits(weights) if guard else "")
    return StructureReport(tuple(rows.values()))


def _layers(model: nn.Module, *, shapes: bool = False) -> Iterator[Layer]:
    """Yield every recognised layer with its family and its place (index, count) among the layers of that family."""
    located = locate_layers(model)
    kinds = [_kind(layer.found) for layer in located]
    seen = dict.fromkeys(kinds, 0)
    for name, host, weights in ((x.name, x.host, x.found) for x in located) if shapes else find_layers(model):
        kind = _kind(weights)
        family = next(family for family in FAMILIES if family.kind == kind)
        yield name, host, family, weights, (seen[kind], kinds.count(kind))
        seen[kind] += 1


def _kind(weights: Weights | Skipped) -> str:
    if isinstance(weights, Skipped):
        return weights.kind
    return next(family.kind for family in FAMILIES if isinstance(weights, family.weights))


def _plain(name: str) -> str:
    """Return a layer's name without what wrappers put into it (DDP, torch.compile, Fabric)."""
    wrappers = {"module", "_orig_mod", "_forward_module", "_original_module", "_fsdp_wrapped_module"}
    return ".".join(part for part in name.split(".") if part not in wrappers)
