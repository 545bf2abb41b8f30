"""Which tap of a depthwise convolution meets the output's own position: that of a run of the code that calls it."""

from __future__ import annotations

import dis
import functools
import inspect
import re
from collections.abc import Mapping
from dataclasses import replace
from types import CodeType, FunctionType

from torch import nn

from espalier.init.filters.closed_form import Convolution
from espalier.init.layouts.arguments import arguments
from espalier.init.layouts.kernel_use import OtherUseError, prove_kernel
from espalier.init.layouts.keys import module_key
from espalier.init.layouts.maps import maps
from espalier.init.layouts.moves import Offset, moves
from espalier.init.layouts.prove import cached
from espalier.init.layouts.registry import BareCheckpoint, DepthwiseWeights, Found, Skipped
from espalier.init.layouts.scratch import CannotRunError, copy_for_probe, owner_of, untraced

_UNKNOWN = "which of its taps meets the present is unknown"
_CACHE = re.compile(r"cache|past|state|stream|inference_params")
# Names in code that may put positions in front or take some away.
_MOVES = re.compile(r"pad|crop|chomp|trim|narrow|roll|shift|unfold|slice|^(cat|concat|split|chunk|index_select)$", re.I)
# A tap, by its number on every axis.
Tap = tuple[int, ...]
# Modules that call one inside them, by name.
Callers = list[tuple[str, nn.Module]]


class _MixedError(CannotRunError):
    """A module runs, and mixes positions in more ways than by the taps, so that none is told."""


class _ResizedError(CannotRunError):
    """A module runs, and gives more positions or fewer than it takes: which is which, whoever calls it decides."""


class _NoTapError(CannotRunError):
    """A module runs, and no tap meets the position of the output."""


def align(names: Mapping[str, nn.Module], name: str, found: DepthwiseWeights, *, own_code: bool) -> Found:
    """Return a depthwise layer's view with its centre and a note, or why the centre cannot be known.

    Whatever its own padding says, what calls a convolution may pad, crop, shift or cache. So its caller is run: with
    all weight on the first tap, then on the last, the outputs that move tell which tap is the present.

    Args:
        names: all modules of the model, to find the one that calls this one.
        name: of the convolution.
        found: its view.
        own_code: it is a subclass that may pad by itself.
    """
    module = names[name]
    assert isinstance(module, Convolution)
    try:
        tap = _present(names, name, module, own_code)
    except OtherUseError as error:
        return Skipped("depthwise", f"its weight is not the kernel: {error}")
    except CannotRunError as error:
        return Skipped("depthwise", f"{_UNKNOWN}: {error}")
    return replace(found, centre=tap, note=_note(module, tap))


def _note(module: Convolution, tap: Tap) -> str:
    """Say which tap is the centre where it is not the middle one."""
    sizes = module.kernel_size
    if tap == tuple(taps // 2 for taps in sizes):
        return ""
    if sum(taps > 1 for taps in sizes) == 1 and tap == tuple(taps - 1 for taps in sizes):
        return "causal: the newest tap is its centre"
    return f"its centre is the tap that meets the present, {tap} of {sizes} from 0"


def _present(names: Mapping[str, nn.Module], name: str, module: Convolution, own_code: bool) -> Tap:
    """Return the tap that meets the present.

    The nearest code around it that keeps positions is run. A caller that gives more positions than it takes, or fewer,
    leaves the rest to its own caller. Where code cannot be run, or hides its taps, padding that keeps positions is
    taken at its word, but never against what a run shows.

    Raises:
        CannotRunError: it cannot be known, or no tap meets the present.
    """
    if isinstance(names[""], BareCheckpoint):
        return _middle(module)  # nothing else is known of it
    within, outward = _callers(names, name)
    # What others convolve with its weight, they pad as they like.
    own = [(name, module)] if own_code else []
    if not (by_itself := prove_kernel([*own, *outward], name, module)):
        within = []
    elif own_code:
        within, outward = [], [*own, *within, *outward]
    front = _by_padding(module) if by_itself and not own_code else None
    over_time = len(module.kernel_size) == 1
    # Images are seldom shifted: code that neither pads nor crops need not be run, which takes long for large blocks.
    believed = front is not None and not over_time and not any(_may_move(c) for _, c in outward[:1])
    within = [each for each in within if _may_move(each[1]) or (outward and front is None)]
    why: CannotRunError | None = None
    stuck = False
    for place, caller in [*([] if believed else outward), *within]:
        # Beyond a caller that cannot be run whole models would be copied, once a layer; what is nearer is still tried.
        if stuck and (place, caller) in outward:
            continue
        try:
            return _by_run(caller, name[len(place) :].lstrip("."), module, front)
        except _NoTapError:
            raise
        except CannotRunError as error:
            why = why if isinstance(why, _ResizedError) else error
            stuck = stuck or not isinstance(error, _ResizedError)
    streams = over_time and any(_CACHE.search(each.name) for _, caller in outward[:1] for each in arguments(caller))
    if by_itself and not own_code and not isinstance(why, _ResizedError | _MixedError):
        if front is not None and not (streams and why):
            return _tap(module, front)
        # Code that keeps a past sees no future: of a full padding it drops what lies behind.
        if streams and why and module.padding == (module.dilation[0] * (module.kernel_size[0] - 1),):
            return (module.kernel_size[0] - 1,)
    # Without padding, both sides lose alike: what is left stands above the middle.
    if why is None and not outward and _unpadded(module) and all(taps % 2 for taps in module.kernel_size):
        return _middle(module)
    raise why or CannotRunError("its padding keeps no positions, and no code around it says what else pads or crops")


def _callers(names: Mapping[str, nn.Module], name: str) -> tuple[Callers, Callers]:
    """Return what runs a layer, innermost first: plain sequences within the first code, and from that code outward."""
    owners, place = set[str](), name
    while (owner := owner_of(names, place)) is not None:
        place = owner[0]
        owners.add(place)
    around: Callers = []
    while name:
        name = name.rpartition(".")[0]
        part = names.get(name)
        if part is not None and (name in owners or isinstance(part, nn.Sequential)):
            around.append((name, part))
    plain = [name not in owners and type(part).forward is nn.Sequential.forward for name, part in around]
    first = plain.index(False) if False in plain else len(around)
    return around[:first], around[first:]


def _may_move(caller: nn.Module) -> bool:
    """Return whether a caller may pad or crop, as far as its code and what stands beside the layer in it tell."""
    if any("Pad" in type(part).__name__ for part in caller.children()):
        return True
    plain = type(caller).forward is nn.Sequential.forward
    return any(_code_moves(type(part)) for part in (caller.modules() if plain else [caller]))


def _code_moves(cls: type) -> bool:
    """Return whether a class's methods have slices, or names that speak of padding and cropping."""
    if cls.__module__.startswith("torch.nn."):
        return "Pad" in cls.__name__
    theirs = [vars(parent) for parent in cls.__mro__ if not parent.__module__.startswith(("torch.nn.", "builtins"))]
    functions = [inspect.unwrap(each) for held in theirs for each in held.values() if inspect.isfunction(each)]
    return any(_moves(each, 3) for each in functions if each.__name__ != "__init__")


@functools.lru_cache(4096)
def _moves(function: FunctionType, deep: int) -> bool:
    """Return whether a function may move positions, or one that it calls by name."""
    code, known = function.__code__, function.__globals__
    called = [known[name] for name in code.co_names if isinstance(known.get(name), FunctionType)]
    return _code_slices(code) or any(deep == 0 or _moves(each, deep - 1) for each in called)


def _code_slices(code: CodeType) -> bool:
    named = any(map(_MOVES.search, code.co_names)) or any("SLICE" in each.opname for each in dis.get_instructions(code))
    held = [each for each in code.co_consts if isinstance(each, CodeType | slice)]
    return named or any(isinstance(each, slice) or _code_slices(each) for each in held)


def _by_padding(module: Convolution) -> Offset | None:
    """Return how far before the output the filter starts if its own padding keeps positions, else ``None``."""
    steps, strides = module.dilation, module.stride
    reach = [step * (taps - 1) for step, taps in zip(steps, module.kernel_size, strict=True)]
    if module.padding == "same":
        front = tuple(far // 2 for far in reach)
    else:
        front = (0,) * len(reach) if isinstance(module.padding, str) else tuple(module.padding)
        # Every stride inputs give one output.
        if not all(1 - stride <= 2 * f - far <= 0 for f, far, stride in zip(front, reach, strides, strict=True)):
            return None
    try:
        _tap(module, front)
    except _NoTapError:
        return None
    return front


def _unpadded(module: Convolution) -> bool:
    return module.padding == "valid" or not any(module.padding)


def _middle(module: Convolution) -> Tap:
    """Return the middle tap: of an even number the one that "same" padding puts over the present."""
    return tuple((taps - 1) // 2 for taps in module.kernel_size)


def _tap(module: Convolution, far: Offset) -> Tap:
    """Return the tap that meets the present, given how far before the output's position the filter starts.

    A strided output covers several positions: of the taps that meet one of them it is the one nearest to the middle.
    """
    found = []
    for taps, step, span, start in zip(module.kernel_size, module.dilation, module.stride, far, strict=True):
        met = range(max(0, -(-start // step)), min(taps - 1, (start + span - 1) // step) + 1)
        if not met:
            raise _NoTapError("none of them does")
        found.append(min(met, key=lambda tap: abs(tap - taps // 2)))
    return tuple(found)


def _by_run(caller: nn.Module, path: str, module: Convolution, front: Offset | None) -> Tap:
    """Return the tap that meets the present in a run of a caller; once for all that are alike."""
    key = (module_key(caller), path, front, "centre")
    found: Tap = cached(key, lambda: _centre(caller, path, module, front))
    return found


@untraced()
def _centre(owner: nn.Module, path: str, module: Convolution, front: Offset | None) -> Tap:
    """Return the tap that meets the present, from runs of a copy of the owner with weight on one tap alone.

    Where other mixing hides it, it is that of the padding, given as ``front``, if outputs move where that has them.

    Raises:
        CannotRunError: it runs on no made-up input, gives another number of positions, or mixes them in other ways too.
    """
    steps, zero = module.dilation, (0,) * len(module.dilation)
    corners = (zero, tuple(taps - 1 for taps in module.kernel_size))
    why = CannotRunError("nothing is known of its inputs")
    twin = copy_for_probe(owner)
    filters = (twin.get_submodule(path) if path else twin).get_parameter("weight")
    for call, axes in maps(owner, module):
        try:
            still, *ends = (moves(twin, call, axes, filters, module.stride, tap) for tap in (None, 0, -1))
        except CannotRunError as error:
            why = error
            continue
        who = f"{type(owner).__name__}, which calls it,"
        if not still.keeps:
            raise _ResizedError(f"{who} gives more positions than it takes, or fewer")
        # The offset 0, which all else shares, is not told.
        shared, alone = still.offsets() | {zero}, [each.less(still) for each in ends]
        told = [each.offsets() - shared for each in ends]
        if not any(told):  # a path beside it may have the same
            told = [each.offsets() - {zero} for each in alone]
        mixed = len(shared) > 1 or any(each.mixed for each in (still, *ends))
        if max(map(len, told)) > 1 or (mixed and not any(told)):
            if front is None:
                raise _MixedError(f"{who} mixes positions in other ways too")
            ways = [tuple(c * step - f for c, step, f in zip(tap, steps, front, strict=True)) for tap in corners]
            if all(way in each.offsets(0.0) for way, each in zip(ways, alone, strict=True)):
                return _tap(module, front)
            raise _NoTapError(f"{who} mixes positions in other ways too, and not where its padding says")
        if not any(told):
            raise _NoTapError("all of them look past the input's ends")
        # Tap c looks (c − c*)·dilation far. Here c*·dilation, as either end has it.
        reach = {
            tuple(c * step - o for c, step, o in zip(tap, steps, offset, strict=True))
            for tap, offsets in zip(corners, told, strict=True)
            for offset in offsets
        }
        if len(reach) > 1:
            raise _NoTapError("they are not as far apart as its dilation says")
        return _tap(module, reach.pop())
    raise CannotRunError(f"{type(owner).__name__}, which calls it, does not run on made-up inputs ({why})")
