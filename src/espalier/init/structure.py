"""``structure_`` and ``audit``: find the layers of a model, write structure into them, measure what is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch import nn

from espalier.contents import without_numbers
from espalier.errors import EspalierError, unknown_name
from espalier.init.adapters import ADAPTED, without_adapters
from espalier.init.attention.near_identity import full_precision
from espalier.init.families import FAMILIES, Family, Specs, family_of
from espalier.init.families.base import nowhere, tensors
from espalier.init.layouts import Layer, Skipped, locate_layers
from espalier.init.layouts.hooks import refuse_hooked
from espalier.init.layouts.outside import leaves_outside_alone
from espalier.init.matching import match_rows
from espalier.init.report import LayerReport, StructureReport
from espalier.init.sharded import agree, reshard
from espalier.init.ties import Span, memory_of, others_of, overlap, spans_of
from espalier.init.trained import warn_if_trained
from espalier.randomness import cpu_generator

_INFERENCE = "its weights were made under inference_mode, and nothing outside of it may write them: clone them first"
_FROZEN = "some or all of it is frozen (requires_grad=False) in a model that trains: write first, then freeze"
# Statuses of layers that carried structure when their report was made.
_CARRIED = ("written", "present", "changed")
# A part that stood out (a score of 1) is lost when less than this is left of the score.
_LEFT = 0.5


class VerificationError(RuntimeError):
    """A layer's weights do not show what was just written: something shares or computes them."""


# Where something is written, the first speaks of the arguments and the second of the whole model: both end the call.
_FATAL = (EspalierError, VerificationError)


@dataclass(frozen=True)
class _Site:
    """A located layer.

    Attributes:
        layer: its weights, and how to get at them.
        family: what can be done with them.
        spans: where its numbers lie.
        first: name of the first layer with any of the same weights: its own, unless modules are tied.
        whole: whether all its weights are those of the first layer, and not some.
    """

    layer: Layer
    family: Family
    spans: frozenset[Span]
    first: str
    whole: bool

    def row(self, status: str, note: str = "") -> LayerReport:
        return LayerReport(self.layer.name, self.family.kind, self.layer.host, status, note=note)  # type: ignore[arg-type]


@torch.no_grad()
@full_precision()
@leaves_outside_alone
def structure_(
    model: nn.Module,
    *,
    generator: torch.Generator | None = None,
    guard: bool = False,
    **specs: Unpack[Specs],
) -> StructureReport:
    """Write structure into every layer that a layout recognises, in place, then measure it and report.

    Self-attention gets mimetic products, state-space layers start as causal linear attention, depthwise convolutions
    get covariance-structured filters. On the meta device nothing is written: call it again after ``to_empty()``. Call
    it **last**, after anything that draws weights (``post_init``, ``reset_parameters``), and ``audit`` after anything
    that touches them.

    A seed gives the same structure on every device and number of threads, up to rounding (Note [The same draw
    everywhere] in ``near_identity``). On a model that is sharded (FSDP2, DTensor) or wrapped by DDP every rank calls
    it and rank 0's generator counts; a model that is not wrapped yet is each rank's own.

    Args:
        model: any module; the library it comes from need not be known as long as a layout covers its classes.
        generator: source of all noise; each layer draws from a stream of its own.
        guard: keep a fingerprint of every written layer's bits in the report, so that ``audit(model, against=report)``
            tells touched weights from untouched ones. Nothing is left in the model.
        specs: ``attention=Mimetic(…)``, ``ssm=MimeticSSM(…)``, ``depthwise=FilterCovariance(…)``. Left out: the
            published defaults. ``None`` leaves the layers of a family alone.

    Returns:
        One row a layer; ``print`` shows it as a table. A layer that cannot be read, written or measured is ``skipped``
        or ``failed`` with the reason, and the others go on.

    Raises:
        EspalierError: the model holds nothing that was asked for, no layer could be written, a spec does not fit, or
            torch's FakeTensorMode is on.
        VerificationError: a layer does not show what was written into it. It has its own weights again; the layers
            before it keep what they were given.
    """
    for name in specs.keys() - FAMILIES.keys():
        raise unknown_name("argument of structure_", name, [*FAMILIES, "generator", "guard"])
    asked = _asked(specs)
    reshard(model)
    sites = _leave_tied([_unless_refused(site, model) for site in _sites(model) if asked[site.family.kind] is not None])
    if all(isinstance(site.layer.found, Skipped) for site in sites):
        raise _nothing_written(model, asked, [site.row("skipped", site.layer.found.reason) for site in sites])  # type: ignore[union-attr]
    warn_if_trained(model)
    draws = _seeds(len(sites), cpu_generator(generator))
    for site in sites:  # what a spec refuses, it refuses before anything is written
        _attempt(_rehearse, site, asked[site.family.kind], fatal=_FATAL)
    rows, sums, remarks = list[LayerReport](), [dict[str, float]() for _ in sites], dict[str, None]()
    for site, seed, taken in zip(sites, agree(draws, model), sums, strict=True):
        spec, stream = asked[site.family.kind], torch.Generator(device="cpu").manual_seed(seed)
        rows.append(_attempt(_write, site, spec, stream, taken, rows, fatal=_FATAL))
        if rows[-1].status == "written":
            remarks[site.family.remark(site.layer.found, spec, site.layer.part, model)] = None
    if "written" not in (statuses := {row.status for row in rows}) and "failed" in statuses:
        raise _nothing_written(model, asked, rows)
    for index, site in enumerate(sites):
        if rows[index].status == "written":
            rows[index] = _attempt(_confirm, site, rows[index], sums[index], guard, fatal=_FATAL)
    return StructureReport(tuple(rows), tuple(filter(None, remarks)))


def _asked(specs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the spec of every family, or refuse what is none of its class."""
    asked: dict[str, Any] = {kind: family.default for kind, family in FAMILIES.items()} | dict(specs)
    for kind, spec in asked.items():
        if spec is not None and not isinstance(spec, wanted := type(FAMILIES[kind].default)):
            raise EspalierError(f"{kind} is {spec!r}: give a {wanted.__name__}, or None to leave these layers alone")
    return asked


@torch.no_grad()
@full_precision()
@leaves_outside_alone
def audit(model: nn.Module, against: StructureReport | None = None) -> StructureReport:
    """Measure how much structure a model's weights carry now, layer by layer.

    Below an adapter (LoRA) the base layer's weights are measured.

    Args:
        model: any module, before or after wrapping, sharding, loading or training.
        against: an earlier report; layers that carried structure in it and do not now are called ``lost``, also when
            the layer itself is gone. A layer is found again through wrappers and prefixes, and by its bits where the
            report is guarded.

    Returns:
        One row a layer: ``present`` when the structure stands out from chance, else ``absent`` or ``lost``. A layer
        that lost one of several parts (one of two products, or its sign) is ``lost``, and its note names them;
        ``changed`` is one whose structure stands out and whose bits are not those that ``guard=True`` recorded;
        ``failed`` is one whose weights cannot work (NaN, rates out of range), and its note says why.

    Raises:
        EspalierError: no layer of the model is recognised.
    """
    reshard(model)
    sites = list(_sites(model))
    before = [] if against is None else list(against.layers)
    names = [(site.layer.name, site.family.kind) for site in sites]
    earlier = match_rows(before, names, lambda index: _bits(sites[index]))
    rows = [_attempt(_measure, site, earlier.get(index)) for index, site in enumerate(sites)]
    met = {id(row) for row in earlier.values()}
    gone = [row for row in before if id(row) not in met and row.status in _CARRIED]
    rows += [replace(row, status="lost", measured={}, note="the layer is gone") for row in gone]
    if not rows:
        raise EspalierError(
            f"model {type(model).__name__} has no layer that carries structure: register a layout for its classes"
        )
    return StructureReport(tuple(rows))


def _sites(model: nn.Module) -> Sequence[_Site]:
    sites: list[_Site] = []
    for layer in locate_layers(model):
        spans = memory_of(layer)
        tied = (site for site in sites if not isinstance(site.layer.found, Skipped) and overlap(spans, site.spans))
        first = next(tied, None)
        name, whole = (layer.name, True) if first is None else (first.first, first.spans == spans)
        sites.append(_Site(layer, family_of(layer.found), spans, name, whole))
    return sites


def _attempt(
    step: Callable[..., LayerReport], site: _Site, *args: Any, fatal: tuple[type[Exception], ...] = ()
) -> LayerReport:
    """Return the row that a step makes: the one place where what a layer raises becomes a ``failed`` row."""
    try:
        return step(site, *args)
    except Exception as error:
        if isinstance(error, fatal):
            raise type(error)(f"layer {site.layer.name!r}: {error}") from error
        words = str(error).strip().splitlines() or ["no message"]
        return site.row("failed", f"{type(error).__name__}: {words[0]}")


def _unless_refused(site: _Site, model: nn.Module) -> _Site:
    """Return a site that may be written; ``audit`` measures any layer all the same."""
    if isinstance(site.layer.found, Skipped):
        return site
    refused = refuse_hooked(site.layer.part, site.family.kind)
    weights = [view for _, view in tensors(site.layer.found)]
    # Where all of a model is frozen, that says nothing of a layer.
    frozen = spans_of(parameter for parameter in site.layer.part.parameters() if not parameter.requires_grad)
    if overlap(site.spans, frozen) and any(parameter.requires_grad for parameter in model.parameters()):
        refused = Skipped(site.family.kind, _FROZEN)
    elif "base_layer" in site.layer.name.split("."):
        refused = Skipped(site.family.kind, f"it {ADAPTED}")
    elif any(view.is_inference() for view in weights) and not torch.is_inference_mode_enabled():
        refused = Skipped(site.family.kind, _INFERENCE)
    elif reason := site.family.set_by_hand(site.layer.found):
        refused = Skipped(site.family.kind, reason)
    return site if refused is None else replace(site, layer=replace(site.layer, found=refused))


def _leave_tied(sites: list[_Site]) -> list[_Site]:
    """Leave alone, too, what has weights in common with a layer that is left alone, which would change with it."""
    queue = [site for site in sites if isinstance(site.layer.found, Skipped)]
    while queue:
        other = queue.pop()
        for index, site in enumerate(sites):
            if isinstance(site.layer.found, Skipped) or not overlap(site.spans, other.spans):
                continue
            if not _nested(site.layer.part, other.layer.part):
                reason = f"some of its weights are those of {other.layer.name}, which is left alone: untie them first"
                found = Skipped(site.family.kind, reason)
                sites[index] = replace(site, layer=replace(site.layer, found=found))
                queue.append(sites[index])
    return sites


def _nested(one: nn.Module, other: nn.Module) -> bool:
    """Return whether one of two modules is inside the other, under whatever name: CoaT's blocks share theirs."""
    return any(part is one for part in other.modules()) or any(part is other for part in one.modules())


def _nothing_written(model: nn.Module, asked: Mapping[str, object], rows: Sequence[LayerReport]) -> EspalierError:
    wanted = " or ".join(kind for kind, spec in asked.items() if spec is not None) or "anything"
    reasons = "".join(f"; {row.layer}: {row.note}" for row in rows[:3])
    return EspalierError(
        f"model {type(model).__name__} has no {wanted} layer to structure{reasons}: "
        "register a layout for its classes (espalier.init.register_layout)"
    )


def _seeds(count: int, generator: torch.Generator | None) -> list[int]:
    """Draw one seed a layer, whose weights then do not depend on how many numbers the one before it drew."""
    if without_numbers(torch.empty(0, device="cpu")):
        raise EspalierError("structure_ draws nothing inside of torch's FakeTensorMode: call it outside")
    return [int(torch.randint(2**62, (), generator=generator, dtype=torch.int64, device="cpu")) for _ in range(count)]


def _rehearse(site: _Site, spec: object) -> LayerReport:
    """Write one layer on the meta device, where arguments are checked and nothing is kept."""
    if not isinstance(found := site.layer.found, Skipped) and site.family.selects(spec, site.layer.place):
        views = {name: _to_meta(value) for name, value in vars(found).items()}
        site.family.write(replace(found, **views), spec, site.layer.place, torch.Generator(device="cpu"))
    return site.row("skipped")


def _to_meta(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_to_meta, value))
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _write(
    site: _Site, spec: object, stream: torch.Generator, sums: dict[str, float], rows: Sequence[LayerReport]
) -> LayerReport:
    """Write one layer unless one that is written has its weights, and put the sums of its views into ``sums``."""
    family, found = site.family, site.layer.found
    if isinstance(found, Skipped):
        return site.row("skipped", found.reason)
    if not family.selects(spec, site.layer.place):
        return site.row("skipped", "not among the layers asked for")
    if site.first != site.layer.name and (site.first, "written") in [(row.layer, row.status) for row in rows]:
        some = "its weights are" if site.whole else "some of its weights are"
        return site.row("skipped", f"{some} those of {site.first}, which is written")
    with site.layer.open() as weights:
        if isinstance(weights, Skipped):
            return site.row("skipped", weights.reason)
        if place := nowhere(weights):
            return site.row("skipped", f"{place}: run again later")
        with _kept_on_error(weights):
            text = family.write(weights, spec, site.layer.place, stream)
            sums.update(family.sums(weights))
            damaged = bool(family.damage(weights, sums))  # which ``_confirm`` tells
            measured = {} if damaged else family.measure(weights)
            if not damaged and (wrong := family.verify(weights, spec, site.layer.place, measured)):
                raise VerificationError(wrong)
        note = "; ".join(filter(None, (family.note(weights, site.layer.part), others_of(site.layer, site.spans))))
    return replace(site.row("written", note), asked=text, measured=measured)


@contextmanager
def _kept_on_error(weights: Any) -> Iterator[None]:
    """Put a layer's weights back if the ``with`` block raises, Ctrl-C included; no more than one layer is copied."""
    kept = [(view, view.clone()) for _, view in tensors(weights)]
    try:
        yield
    except BaseException:
        for view, values in kept:
            with suppress(RuntimeError):  # what cannot be written was not
                view.copy_(values)
        raise


def _confirm(site: _Site, row: LayerReport, sums: Mapping[str, float], guard: bool) -> LayerReport:
    """Look at a written layer through fresh views, and raise if it shows something else than after it was written."""
    family = site.family
    with site.layer.open() as weights:
        if isinstance(weights, Skipped):
            raise VerificationError(f"it can no longer be read: {weights.reason}")
        now = family.sums(weights)
        if damage := family.damage(weights, now):
            return replace(row, status="failed", note=damage)
        if now != sums:
            raise VerificationError("it changed after it was written: it shares its weight with another")
        return replace(row, mark=family.bits(weights) if guard else "")


def _measure(site: _Site, earlier: LayerReport | None) -> LayerReport:
    """Return the row of a layer as it is now; below adapters where it has some."""
    with without_adapters(site.layer.module) as adapted:
        if isinstance(site.layer.found, Skipped) and not adapted:
            return site.row("skipped", site.layer.found.reason)
        with site.layer.open() as weights:
            return _judge(site, weights, earlier, adapted=adapted)


def _judge(site: _Site, weights: Any, earlier: LayerReport | None, *, adapted: bool) -> LayerReport:
    """Measure a layer's open weights and hold them against an earlier row."""
    family = site.family
    if place := weights.reason if isinstance(weights, Skipped) else nowhere(weights):
        return site.row("skipped", place)
    earlier = earlier or site.row("absent")
    below = "measured below its adapter" if adapted or "base_layer" in site.layer.name.split(".") else ""
    note = "; ".join(filter(None, (family.note(weights, site.layer.part), below)))
    row = replace(site.row("present", note), asked=earlier.asked, mark=earlier.mark)
    if damage := family.damage(weights, family.sums(weights)):
        return replace(row, status="failed", note=damage)
    row = replace(row, measured=family.measure(weights))
    if excess := family.excess(row.measured):
        return replace(row, status="failed", note=excess)
    scores = family.scores(row.measured)
    before: dict[str, float] = {}
    if earlier.status in _CARRIED and earlier.measured:
        before = {part: score for part, score in family.scores(earlier.measured).items() if abs(score) >= 1}
    losses = {part: loss for part, score in before.items() if (loss := _loss(part, score, scores.get(part, 0.0)))}
    # A product that is lost altogether needs no word on its heads.
    if lost := [loss for part, loss in losses.items() if part.partition(" of ")[0] not in losses.keys() - {part}]:
        return replace(row, status="lost", note="; ".join(filter(None, (row.note, f"lost: {', '.join(lost)}"))))
    telling = [score for part, score in scores.items() if part in before or part not in family.unspecific]
    if not any(abs(score) >= 1 for score in telling):
        return replace(row, status="absent")
    changed = before and earlier.mark and earlier.mark != family.bits(weights)
    return replace(row, status="changed" if changed else "present")


def _loss(part: str, before: float, now: float) -> str:
    """Return a part's name if it no longer stands out as it did, saying so if only its sign is another."""
    if now * before > 0 and abs(now) >= _LEFT:
        return ""
    return f"{part} (its sign is the other)" if now * before < 0 and abs(now) >= 1 else part


def _bits(site: _Site) -> str:
    """Return the digest of a layer's weights, below adapters where it has some; empty where it cannot be read."""
    with without_adapters(site.layer.module), site.layer.open() as weights:
        return "" if isinstance(weights, Skipped) or nowhere(weights) else site.family.bits(weights)
