"""Self-attention whose maps have any names: a run shows what each of them moves, and the probe must agree.

A map that moves the scores makes queries, keys or both; one that moves the output alone makes values or the output. Of
the readings that this leaves, the probe proves one, or none.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice, permutations, product
from types import FunctionType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from espalier.init.filters.closed_form import Convolution
from espalier.init.layouts.arguments import sequences
from espalier.init.layouts.by_name import NO_OUTPUT, guess_attention
from espalier.init.layouts.compare import by_query, is_close, is_near
from espalier.init.layouts.heads_apart import Group, head_maps, is_its_own, is_linear, put_together, together
from espalier.init.layouts.keys import module_key
from espalier.init.layouts.linears import assemble, matrices
from espalier.init.layouts.made_up import calls
from espalier.init.layouts.names import looks_like_attention
from espalier.init.layouts.probe_attention import BESIDE, prove_attention
from espalier.init.layouts.prove import cached_calls_in_model, calls_in_use
from espalier.init.layouts.registry import (
    LAYOUTS,
    AttentionWeights,
    BareCheckpoint,
    Layout,
    Refused,
    Skipped,
    attribute,
    class_path,
    holds_lazy,
)
from espalier.init.layouts.scratch import Call, CannotRunError, copy_for_probe, is_bias, leaves, run, untraced
from espalier.init.layouts.trial import Softmaxes, Unproven
from espalier.init.layouts.verdicts import cached
from espalier.init.layouts.whole_model import one_sequence

# A module with more maps than that holds more than one layer.
_MOST_MAPS = 8
_MOST_READINGS, _MOST_WIDTHS = 24, 3
_SOFTMAX = {"softmax", "Softmax", "scaled_dot_product_attention"}


Name = str | Group
"""Of a map, or of the weights of one that each head has for itself."""


class _Map(NamedTuple):
    """How many features a map gives and takes; one that holds a matrix a head, also where it makes the output.

    Read backwards, they are those of the transposed map.
    """

    gives: int
    takes: int
    out_gives: int
    out_takes: int


class _Roles(NamedTuple):
    """Maps by what they move, and the number of heads."""

    scores: list[Name]
    out: list[Name]
    heads: int


def reading_by_run(names: Mapping[str, nn.Module], name: str, least: int) -> Layout | None:
    """Return the reading of a module's maps as attention that a run of it proves, if there is one.

    Args:
        names: all modules of the model.
        name: of the module.
        least: maps that it must have.
    """
    module = names[name]
    if isinstance(names[""], BareCheckpoint) or holds_lazy(module):
        return None
    groups, parts = head_maps(module)
    if not _may_attend(module) and not any(_takes_softmax(type(part)) for part in parts):
        return None
    heads = {id(part) for part in parts}
    if any(_is_whole(part, id(part) in heads) for part in [*module.modules()][1:]):
        return None
    maps = dict[Name, _Map](_maps(module).items())
    if least <= len(maps) <= _MOST_MAPS and (found := _reading(names, name, maps)) is not None:
        return found
    grouped = {weight for group in groups for weight in group}
    maps = {each: maps[each] for each in maps if not {each, f"{each}.weight"} & grouped}
    with together(module, groups, shapes=True):
        for group in groups:
            count, rows, columns = matrices(module, [group])[0].shape
            maps[group] = _Map(count * rows, columns, rows, count * columns)
    return _reading(names, name, maps) if groups and least <= len(maps) <= _MOST_MAPS else None


def _reading(names: Mapping[str, nn.Module], name: str, maps: Mapping[Name, _Map]) -> Layout | None:
    """Return the reading that a run of a module on tokens proves, or of whoever calls it."""
    module = names[name]
    key, widths = module_key(module, signs=True), [*dict.fromkeys(each.takes for each in maps.values())][:_MOST_WIDTHS]
    found: Layout | None = None
    with suppress(CannotRunError):
        try:
            # Of two sequences the module that calls it says whether they are one.
            alone = (call for width in widths for call in calls(module, width) if not sequences(module, needed=True))
            found = cached(("reading", key, *maps), partial(_proven, module, maps, alone))
        except CannotRunError:
            root = module_key(names[""], signs=True)
            given = _calls_given(names, name, widths, root)
            found = cached(("reading", key, *maps, root, name), partial(_proven, module, maps, given))
    return found


def _may_attend(module: nn.Module) -> bool:
    return looks_like_attention(module) or _takes_softmax(type(module))


def _is_whole(part: nn.Module, may_be_head: bool) -> bool:
    """Return whether a part may be attention by itself, so that it, and not what holds it, is the layer."""
    if any(class_path(cls) in LAYOUTS and not issubclass(cls, Convolution) for cls in type(part).__mro__):
        return True
    if not _may_attend(part) or len(_maps(part)) < 2:
        return False
    with suppress(Exception):  # of any kind: it is then a whole one that cannot be read
        found = guess_attention(part)
        return not ((isinstance(found, Skipped) and found.reason == NO_OUTPUT) or (found is None and may_be_head))
    return True


def _takes_softmax(cls: type) -> bool:
    """Return whether code of a class that is not torch's, or a function that it calls by name, names a softmax."""
    methods = [value for base in cls.__mro__ if not _is_torch(base.__module__) for value in vars(base).values()]
    queue, met = [each for each in methods if isinstance(each, FunctionType)], set[FunctionType]()
    while queue:
        function = queue.pop()
        if _SOFTMAX & set(function.__code__.co_names):
            return True
        met.add(function)
        called = (function.__globals__.get(name) for name in function.__code__.co_names)
        queue += [
            each
            for each in called
            if isinstance(each, FunctionType) and each not in met and not _is_torch(each.__module__)
        ]
    return False


def _is_torch(module: str | None) -> bool:
    return str(module).partition(".")[0] in ("torch", "builtins")


def _maps(module: nn.Module) -> dict[str, _Map]:
    """Return the linear maps of a module and its parts by name."""
    found: dict[str, _Map] = {}
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    for name in [name for name, part in module.named_modules() if isinstance(part, kinds) or attribute(part, "nf")]:
        with suppress(Exception):  # a layer of anybody's, that cannot be read as a map
            [matrix] = matrices(module, [name])
            found[name] = _Map(len(matrix), matrix.shape[-1], len(matrix), matrix.shape[-1])
    matrices_of_its_own = ((n, p) for n, p in module.named_parameters(recurse=False) if not is_bias(module, n))
    for name, parameter in matrices_of_its_own:
        if parameter.ndim == 2:
            found[name] = _Map(parameter.shape[1], len(parameter), parameter.shape[1], len(parameter))
        elif parameter.ndim == 3:
            count, first, last = parameter.shape
            found[name] = _Map(count * last, first, last, count * first)
    return found


@untraced()
def _proven(module: nn.Module, maps: Mapping[Name, _Map], made: Iterator[Call]) -> Layout | None:
    """Return the reading that a run on the first fitting of some inputs proves.

    Raises:
        CannotRunError: it runs on none of them, or takes no softmax over their tokens, or several.
    """
    twin = copy_for_probe(module)
    put_together(twin, [each for each in maps if isinstance(each, tuple)])
    for call in made:
        with suppress(CannotRunError):
            roles = _roles(twin, call, [*maps])
            for each in islice(_fitting(module, maps, roles), _MOST_READINGS):
                # Most readings fail at once, some because their shapes do not even fit.
                with suppress(Unproven, CannotRunError, Refused, RuntimeError, ValueError):
                    views = each(twin)
                    # Names may speak for a layer whose products something else stands beside; here nothing does.
                    if BESIDE not in prove_attention(twin, views, call) and _share_inputs(twin, each, call):
                        return each
            if not call.supposed:
                return None
    raise CannotRunError("it takes no softmax over its tokens on made-up inputs")


def _share_inputs(twin: nn.Module, reading: Reading, call: Call) -> bool:
    """Return whether maps to queries, keys and values take the same, where the proof sees token ids and no tokens."""
    seen, first = list[Tensor](), next(leaves((call.args, call.kwargs)), None)
    if first is None or first.is_floating_point():
        return True
    names = [n for name in reading.names[:-1] for n in ([name] if isinstance(name, str) else name)]
    layers = {n.removesuffix(".weight") for n in names} & {n for n, part in twin.named_modules() if is_linear(part)}
    hooks = [
        twin.get_submodule(n).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone())) for n in layers
    ]
    run(twin, call)
    for hook in hooks:
        hook.remove()
    return all(torch.equal(each, seen[0]) for each in seen)


def _roles(twin: nn.Module, call: Call, maps: list[Name]) -> _Roles:
    """Return what each map of a copy moves."""
    scores, out = _look(twin, call)
    moved: dict[Name, tuple[bool, bool]] = {}
    generator = torch.Generator().manual_seed(3)
    for each in maps:
        [matrix] = matrices(twin, [each])
        kept = matrix.clone()
        matrix.copy_(torch.randn(matrix.shape, generator=generator) * matrix.shape[-1] ** -0.5)
        then, after = _look(twin, call)
        matrix.copy_(kept)
        moved[each] = not is_close(then, scores, scores), not is_near(after, out)
    by_scores = [each for each, (in_scores, _) in moved.items() if in_scores]
    by_out = [each for each, (in_scores, in_out) in moved.items() if in_out and not in_scores]
    return _Roles(by_scores, by_out, len(scores))


def _calls_given(names: Mapping[str, nn.Module], name: str, widths: list[int], root: Hashable) -> Iterator[Call]:
    """Yield what a module is handed by its owner, and in a run of the whole model."""
    with suppress(CannotRunError):
        yield from calls_in_use(names, name, widths[0], 0)
    with suppress(CannotRunError):
        for call in cached_calls_in_model(names[""], type(names[name]), root).get(name, []):
            yield from (one_sequence(names[name], call, width) for width in widths)


def _look(twin: nn.Module, call: Call) -> tuple[Tensor, Tensor]:
    """Return the scores (H, L, L) of the one softmax over the tokens, and all outputs."""
    with Softmaxes() as seen:
        outputs = run(twin, call)
    length = call.length
    square = [s for s in map(by_query, seen.inputs) if s.shape[-2:] == (length, length) and s.isfinite().any()]
    for_each_head = len(square) > 1 and all(scores.numel() == length**2 for scores in square)
    if length < 2 or (len(square) != 1 and not for_each_head):
        raise CannotRunError("it takes no softmax over its tokens, or several")
    scores_HLL = torch.cat([scores.reshape(-1, length, length) for scores in square]).double()
    return scores_HLL, torch.cat([part.flatten().double() for part in outputs])


def _fitting(module: nn.Module, maps: Mapping[Name, _Map], roles: _Roles) -> Iterator[Reading]:
    """Yield readings whose shapes fit, in the order of the maps."""
    yield from (Reading(each, order, roles.heads, False) for each, order in _orders(maps, roles))
    # A module's own matrices may stand on either side of its tokens.
    own = {n for n in maps if (n in module._parameters if isinstance(n, str) else is_its_own(module, n))}
    if own:
        turned = {n: _Map(*reversed(each)) if n in own else each for n, each in maps.items()}
        yield from (Reading(each, order, roles.heads, True) for each, order in _orders(turned, roles))


def _orders(maps: Mapping[Name, _Map], roles: _Roles) -> Iterator[tuple[tuple[Name, ...], str]]:
    """Yield the names and the order of readings whose shapes fit."""
    ends = [(each, maps[each].out_gives) for each in roles.out]
    pairs = [(v, out) for (v, _), (out, width) in permutations(ends, 2) if maps[v].takes == width]
    for (q, k), (v, out) in product(permutations(roles.scores, 2), pairs):
        if maps[q].takes == maps[k].takes == maps[v].takes:
            yield (q, k, v, out), ""
    for fused, (out, width) in product(roles.scores, ends):
        if maps[fused].takes == width and maps[fused].gives > maps[out].out_takes:
            yield from (((fused, out), order) for order in (*map("".join, permutations("qkv")), "heads"))
    for (q, kv), (out, width) in product(permutations(roles.scores, 2), ends):
        if maps[q].takes == maps[kv].takes == width and maps[kv].gives % 2 == 0:
            yield from (((q, kv, out), order) for order in ("kv", "vk"))
    for qk, (v, out) in product(roles.scores, pairs):
        if maps[qk].takes == maps[v].takes and maps[qk].gives % 2 == 0:
            yield (qk, v, out), "qk"


@dataclass(frozen=True)
class Reading:
    """The layout of these maps.

    Attributes:
        names: of queries, keys, values and output; or of fewer maps, of which one is cut.
        order: what the rows of that one are, ``"heads"`` for (q, k, v) within each head.
        heads: query heads.
        turned: whether a module's own matrices are (out, in).
    """

    names: tuple[Name, ...]
    order: str
    heads: int
    turned: bool

    @property
    def apart(self) -> tuple[Group, ...]:
        """Maps that each head has for itself."""
        return tuple(name for name in self.names if isinstance(name, tuple))

    def __call__(self, module: nn.Module) -> AttentionWeights:
        """Return the weights of a module."""
        names, order = self.names, self.order
        parts = matrices(module, names)
        if self.turned:
            own = [n in module._parameters if isinstance(n, str) else is_its_own(module, n) for n in names]
            parts = [part.mT if turned else part for part, turned in zip(parts, own, strict=True)]
        out = parts[-1] if parts[-1].ndim == 2 else parts[-1].mT.flatten(0, 1).mT
        if len(names) == 4:
            q, k, v = parts[:3]
        elif order == "heads":
            q, k, v = parts[0].unflatten(0, (self.heads, 3, -1)).unbind(1)
        elif len(names) == 2:
            shared = (parts[0][..., 0].numel() - out.shape[1]) // 2
            rows = [out.shape[1] if part == "q" else shared for part in order]
            # Of a fused map for each head: the rows of one.
            count = len(parts[0]) if parts[0].ndim == 3 else 1
            cut = dict(zip(order, parts[0].split([size // count for size in rows], -2), strict=True))
            q, k, v = (cut[part] for part in "qkv")
        elif order == "qk":
            (q, k), v = parts[0].chunk(2, -2), parts[1]
        else:
            cut = dict(zip(order, parts[1].chunk(2, -2), strict=True))
            q, k, v = parts[0], cut["k"], cut["v"]
        return assemble(module, [q, k, v, out], names, heads=self.heads)
