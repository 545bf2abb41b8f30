"""From a reading of a module's weights to a verdict, by running the module or its owner; once per class and shape."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from espalier.init.layouts.arguments import sequences, takes_more
from espalier.init.layouts.examples import MEET, examples_meet, owner_mixes_examples
from espalier.init.layouts.heads_apart import groups_of, put_together
from espalier.init.layouts.keys import NUMBERS, module_key
from espalier.init.layouts.made_up import calls
from espalier.init.layouts.names import denies_cross, reads_self
from espalier.init.layouts.owners import calls_of_part
from espalier.init.layouts.probe_attention import acts_alike, behaviour, meets_own_tokens, prove_attention
from espalier.init.layouts.probe_ssm import prove_ssm
from espalier.init.layouts.probe_training import refuse_other_training
from espalier.init.layouts.probe_use import meets_others
from espalier.init.layouts.registry import (
    AttentionWeights,
    BareCheckpoint,
    Found,
    Layout,
    Skipped,
    SSMWeights,
    attribute,
)
from espalier.init.layouts.scratch import (
    Call,
    CannotRunError,
    bound,
    copy_for_probe,
    has_numbers,
    owner_of,
    run,
    untraced,
)
from espalier.init.layouts.trial import Misfit, Unproven
from espalier.init.layouts.verdicts import KNOWN, cached
from espalier.init.layouts.whole_model import (
    calls_in_model,
    one_sequence,
    refuse_second_sequence,
    sequence_first,
)

PROVEN = "proven by a run"
NOT_RUN = "it cannot be run to prove its rows"
_OTHERS = "its keys or values come, or may come, from other tokens than its queries: cross-attention"
# Below a half, so that µ − (1 − µ) has the other sign.
_OTHER_NUMBERS = 0.3
_SUPPOSED = "what its arguments are is not known"


def prove(
    names: Mapping[str, nn.Module],
    name: str,
    found: Found,
    reading: Layout,
    how: str = "guessed from the names of its layers",
) -> Found:
    """Return the weights, with a note on what was found, if a run of the module proves them; else why not.

    Args:
        names: all modules of the model, to find the one that calls this one.
        name: of the layer.
        found: what ``reading`` returned for it.
        reading: the layout, applied to a scratch copy too.
        how: it came to be, for the note.
    """
    if isinstance(found, Skipped):
        return found
    module, guessed = names[name], f"{how}; {found.note}".rstrip("; ")
    if isinstance(names[""], BareCheckpoint) and found.kind != "depthwise":
        # A checkpoint without code: there is nothing to run, and nothing that would run what is written.
        return replace(found, note=guessed)
    if isinstance(found, SSMWeights):
        return _proven_mixer(module, replace(found, note=f"{guessed}; {PROVEN}"), reading)
    if not isinstance(found, AttentionWeights):
        return Skipped(found.kind, "its class is not registered: register a layout for it")
    if found.q.is_meta and any(buffer.is_meta for buffer in module.buffers()):
        return replace(found, note=guessed)
    why: str | None = None
    try:
        try:
            remarks = cached((key := module_key(module, signs=True), reading), partial(_prove_alone, module, reading))
        except CannotRunError as alone:
            why = str(alone)
            above = tuple((module_key(part, signs=True), name[len(place) :]) for place, part in _owners(names, name))
            try:
                remarks = cached((key, reading, above), partial(_prove_in_use, names, name, reading))
            except CannotRunError:
                root = module_key(names[""], signs=True)
                remarks = cached((key, reading, root, name), partial(_prove_in_model, names, name, reading, root))
    except Unproven as error:
        return Skipped("attention", f"not proven by a run of it: {error}")
    except CannotRunError as error:
        return Skipped("attention", f"{NOT_RUN}: {why}; {error}")
    if refused := refuse_other_keys(names, name, found, reading):
        return refused
    parts = [part for part in f"{guessed}; {PROVEN}; {remarks}".split("; ") if part]
    return replace(found, note="; ".join(dict.fromkeys(parts)))


def _proven_mixer(module: nn.Module, found: SSMWeights, reading: Layout) -> Found:
    """Return the weights of a state-space mixer if a run of it proves them; else why not."""

    @untraced()
    def compute() -> str:
        why: CannotRunError | None = None
        twin = copy_for_probe(module)
        if not isinstance(weight := getattr(twin.get_submodule("in_proj"), "weight", None), Tensor):
            raise CannotRunError("in_proj holds no weight of its own")
        views = reading(twin)
        assert isinstance(views, SSMWeights)
        # Scans by chunks may take whole chunks only, of 64 or 256 tokens as published.
        for call in calls(twin, weight.shape[-1], lengths=(64, 256)):
            try:
                prove_ssm(twin, views, call)
                if examples_meet(partial(run, twin), call):
                    raise Unproven("what it makes of an example depends on others of its batch")
                refuse_other_training(twin, call)
                return ""
            except CannotRunError as error:
                why = why or error  # of the most usual input
        raise why or CannotRunError("it takes no tokens")

    try:
        cached((module_key(module, signs=True), reading), compute)
    except Unproven as error:
        return Skipped("ssm", f"not proven by a run of it: {error}")
    except CannotRunError as error:
        return Skipped("ssm", f"{NOT_RUN}: {error}")
    return found


def prove_use(names: Mapping[str, nn.Module], name: str, found: AttentionWeights) -> Found:
    """Return the weights of ``nn.MultiheadAttention`` if whoever calls it hands it one sequence; else why not.

    A layer that is the model, or stands in containers only, is taken at its word.
    """
    owner = owner_of(names, name)
    if owner is None or type(owner[1]) is nn.TransformerEncoderLayer:
        return found
    try:
        crossed = _is_crossed(names, name, found, ("key", "value")) or _mixes_examples(names, name, found)
        return Skipped("attention", _OTHERS) if crossed else found
    except CannotRunError as error:
        return Skipped("attention", f"whose keys it gets cannot be proven: {error}")


@untraced()
def _prove_alone(module: nn.Module, reading: Layout) -> str:
    """Prove a layer on inputs made from its own signature."""
    group = ("alike", module_key(module, NUMBERS, signs=True), reading)
    twin, views = _copied(module, reading)
    if sequences(twin, needed=True):
        raise CannotRunError("it takes two sequences")
    why: CannotRunError | Unproven = CannotRunError("")
    for call in calls(twin, views.q.shape[-1], views.num_heads):
        try:
            known = KNOWN.get(group)
            if known is not None and acts_alike(twin, views, call, known[1]):
                return str(known[0])
            remarks = _proven(module, reading, twin, views, call)
            if examples_meet(partial(run, twin), call):
                raise Unproven(MEET)
            refuse_other_training(twin, call)
            KNOWN[group] = remarks, behaviour(twin, views, call)
            return remarks
        except Unproven as error:
            if call.supposed:  # an argument may be what was not thought of
                why = CannotRunError(_SUPPOSED) if not str(why) else why
                continue
            why = error
            if not isinstance(error, Misfit):
                break
        except CannotRunError as error:
            why = why if str(why) else error
    raise why


@untraced()
def _prove_in_use(names: Mapping[str, nn.Module], name: str, reading: Layout) -> str:
    """Prove a layer on the inputs that its owner gives it."""
    module = names[name]
    twin, views = _copied(module, reading)
    made = calls_in_use(names, name, views.q.shape[-1], views.num_heads)
    try:
        return [_proven(module, reading, twin, views, call) for call in made][0]  # noqa: RUF015 (every call must hold)
    except Unproven as error:
        if any(call.supposed for call in made):
            raise CannotRunError(_SUPPOSED) from error
        if not isinstance(error, Misfit):
            raise
        # An owner of sequences first takes others, too, and sees a batch where there are tokens.
        return [_proven(module, reading, twin, views, sequence_first(call)) for call in made][0]  # noqa: RUF015


@untraced()
def _prove_in_model(names: Mapping[str, nn.Module], name: str, reading: Layout, root: Hashable) -> str:
    """Prove a layer on the inputs that it is given where its whole model is run."""
    module = names[name]
    refuse_second_sequence(names, name)
    seen = cached_calls_in_model(names[""], type(module), root)
    if name not in seen:
        raise CannotRunError(f"nothing in {type(names['']).__name__} calls it")
    twin, views = _copied(module, reading)
    made = [one_sequence(module, call, views.q.shape[-1]) for call in seen[name]]
    return [_proven(module, reading, twin, views, call) for call in made][0]  # noqa: RUF015 (every call must hold)


def _proven(module: nn.Module, reading: Layout, twin: nn.Module, views: AttentionWeights, call: Call) -> str:
    """Prove a layer's copy, and one with other numbers: where those are 1, a mix x·µ + other·(1 − µ) is x alone."""
    remarks = prove_attention(twin, views, call)
    if has_numbers(module):
        prove_attention(*_copied(module, reading, _OTHER_NUMBERS), call)
    return remarks


def _copied(module: nn.Module, reading: Layout, vectors: float = 1.0) -> tuple[nn.Module, AttentionWeights]:
    twin = copy_for_probe(module, vectors)
    put_together(twin, groups_of(reading))
    views = reading(twin)
    assert isinstance(views, AttentionWeights)
    return twin, views


def refuse_other_keys(
    names: Mapping[str, nn.Module], name: str, found: AttentionWeights, reading: Layout
) -> Skipped | None:
    """Return why a layer that is handed another sequence's keys, or may be, must be taken to be, or ``None``."""
    module = names[name]
    if owner_of(names, name) is None:
        return None
    try:
        return Skipped("attention", _OTHERS) if _meets_others(names, name, found, reading) else None
    except Unproven as error:
        return Skipped("attention", f"not proven by a run of it: {error}")
    except CannotRunError as error:
        others = sequences(module)
        if unread := [each for each in sequences(module, any_name=True) if each not in others]:
            key = ("keys", module_key(module, signs=True), reading)
            others += cached(key, partial(_key_arguments, module, reading, unread))
        if not others or reads_self(name) or denies_cross(module):
            return None
        return Skipped("attention", f"it may be given other keys ({', '.join(others)}), and {error}")


def _meets_others(names: Mapping[str, nn.Module], name: str, found: AttentionWeights, reading: Layout) -> bool:
    """Return whether whoever calls a layer, under any of its names, lets it take keys or values from other tokens.

    The outermost module that decides is run; where it does not run, the next inside. One that could be handed second
    sequences is handed them all, or each alone.
    """
    module, width, heads = names[name], found.q.shape[-1], found.num_heads
    same = [place for place, part in names[""].named_modules(remove_duplicate=False) if part is module]
    why: CannotRunError | None = CannotRunError("nothing in the model calls it")
    for alias in same:
        for place, owner in reversed(_owners(names, alias)):
            path, ran, key = alias[len(place) :].lstrip("."), False, module_key(owner, signs=True)
            any_name = tuple(sequences(owner, any_name=True))
            for given in dict.fromkeys((any_name, *((each,) for each in any_name), ())):
                made = partial(meets_others, owner, path, reading, [width, *token_widths(owner)], heads, given)
                try:
                    if cached((key, path, reading, width, heads, given, "others"), made):
                        return True
                    ran, why = True, None
                except CannotRunError as error:
                    why = why and error
                if ran and given == any_name:
                    break
            if ran and not takes_more(owner):
                break
    if why is not None:
        raise why
    return False


@untraced()
def _key_arguments(module: nn.Module, reading: Layout, names: Sequence[str]) -> list[str]:
    """Return which of these optional arguments, whatever they are called, a layer takes its keys from."""
    try:
        twin, views = _copied(module, reading)
    except CannotRunError:
        return []
    found = []
    for name in names:
        for call in calls(twin, views.q.shape[-1], views.num_heads, (name,)):
            with suppress(Misfit, CannotRunError):
                given = isinstance(bound(twin, call).get(name), Tensor)
                found += [name] if given and not meets_own_tokens(twin, views, call) else []
                break
    return found


def _is_crossed(names: Mapping[str, nn.Module], name: str, found: AttentionWeights, others: Collection[str]) -> bool:
    """Return whether its model hands a layer other tokens through any of these arguments than through the first."""
    for call in calls_in_use(names, name, found.q.shape[-1], found.num_heads):
        given = bound(names[name], call)
        first = next(iter(given.values()))
        tensors = [value for other in others if isinstance(value := given.get(other), Tensor)]
        if any(value.shape != first.shape or not torch.equal(value, first) for value in tensors):
            return True
    return False


def _mixes_examples(names: Mapping[str, nn.Module], name: str, found: AttentionWeights) -> bool:
    """Return whether whoever calls a layer hands it keys of another example of the batch."""
    width, heads = found.q.shape[-1], found.num_heads
    for place, owner in reversed(_owners(names, name)):
        path = name[len(place) :].lstrip(".")
        made = partial(owner_mixes_examples, owner, path, [width, *token_widths(owner)], heads)
        with suppress(CannotRunError):
            if cached((module_key(owner, signs=True), path, width, heads, "examples"), made):
                return True
    return False


def _owners(names: Mapping[str, nn.Module], name: str) -> list[tuple[str, nn.Module]]:
    """Return the modules that decide what a layer is given, innermost first.

    One that is handed a second sequence, or may be, may hand it on, so that whoever calls it decides, too.
    """
    owners: list[tuple[str, nn.Module]] = []
    while (owner := owner_of(names, name)) is not None and (
        not owners
        or sequences(owners[-1][1], any_name=True)
        or sequences(owners[-1][1], needed=True)
        or (takes_more(owners[-1][1]) and any(sequences(part, any_name=True) for _, part in owners))
    ):
        owners.append(owner)
        name = owner[0]
    return owners


def calls_in_use(names: Mapping[str, nn.Module], name: str, width: int, heads: int) -> list[Call]:
    """Return what a layer is handed in its model, or raise why that cannot be seen.

    The outermost module that decides is run; where it does not run, the next inside. One that could be handed a second
    sequence is handed one: if that reaches the layer, its keys may be another's.
    """
    why, found = "nothing in the model calls it", list[Call]()
    for place, owner in reversed(_owners(names, name)):
        path, any_name, read = name[len(place) :].lstrip("."), sequences(owner, any_name=True), sequences(owner)
        key = module_key(owner, signs=True)
        for given in dict.fromkeys((tuple(any_name), tuple(read), ())):
            made = partial(calls_of_part, owner, path, [width, *token_widths(owner)], heads, given)
            try:
                found += cached((key, path, width, heads, given, "calls"), made)
                break
            except CannotRunError as error:
                why = str(error)
        if found and not takes_more(owner):
            break
    if not found:
        raise CannotRunError(why)
    return found


def token_widths(owner: nn.Module) -> list[int]:
    """Return the widths of token that the first layers of a module take."""
    names = ("in_features", "in_channels", "embed_dim", "normalized_shape")
    stated = [attribute(part, name) for part in owner.modules() for name in names]
    sizes = [size[-1] if isinstance(size, tuple) and size else size for size in stated]
    return list(dict.fromkeys(size for size in sizes if isinstance(size, int)))[:3]


def cached_calls_in_model(model: nn.Module, kind: type[nn.Module], root: Hashable) -> dict[str, list[Call]]:
    """Return ``calls_in_model``, or raise its refusal again; ``root`` is the model's key."""
    found: dict[str, list[Call]] = cached((root, kind, "in model"), partial(calls_in_model, model, kind))
    return found
