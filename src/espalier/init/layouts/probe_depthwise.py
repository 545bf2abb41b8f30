"""Which tap of a depthwise convolution meets the output's own position: that of a run of the code that calls it."""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import re
from collections.abc import Mapping
from dataclasses import replace
from types import CodeType, FunctionType

import torch
from torch import Tensor, nn

from espalier.init.filters.closed_form import Convolution
from espalier.init.layouts.arguments import arguments
from espalier.init.layouts.kernel_use import OtherUseError, prove_kernel
from espalier.init.layouts.keys import module_key
from espalier.init.layouts.maps import maps
from espalier.init.layouts.prove import cached
from espalier.init.layouts.registry import BareCheckpoint, DepthwiseWeights, Found, Skipped
from espalier.init.layouts.scratch import Call, CannotRunError, copy_for_probe, owner_of, run, untraced

_UNKNOWN = "which of its taps meets the present is unknown"
_CACHE = re.compile(r"cache|past|state|stream|inference_params")
# Names in code that may put positions in front or take some away.
_MOVES = re.compile(r"pad|crop|chomp|trim|narrow|roll|shift|unfold|slice|^(cat|concat|split|chunk|index_select)$", re.I)
# Input position minus output position that a tap connects, axis by axis.
Offset = tuple[int, ...]
# A tap, by its number on every axis.
Tap = tuple[int, ...]
# Modules that call one inside them, by name.
Callers = list[tuple[str, nn.Module]]
# How far above the median move of all outputs one must stand that the moved input reaches through a tap.
_ABOVE_MIXING = 5.0


class _MixedError(CannotRunError):
    """A module runs, and moves all positions with each as much as by any tap."""


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
    leaves the rest to its own caller. Where code cannot be run, padding that keeps positions is taken at its word.

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
    padded = _by_padding(module) if by_itself and not own_code else None
    over_time = len(module.kernel_size) == 1
    # Images are seldom shifted: code that neither pads nor crops need not be run, which takes long for large blocks.
    believed = padded is not None and not over_time and not any(_may_move(c) for _, c in outward[:1])
    within = [each for each in within if _may_move(each[1]) or (outward and padded is None)]
    why: CannotRunError | None = None
    stuck = False
    for place, caller in [*([] if believed else outward), *within]:
        # Beyond a caller that cannot be run whole models would be copied, once a layer; what is nearer is still tried.
        if stuck and (place, caller) in outward:
            continue
        try:
            return _by_run(caller, name[len(place) :].lstrip("."), module)
        except _NoTapError:
            raise
        except CannotRunError as error:
            why = why if isinstance(why, _ResizedError) else error
            stuck = stuck or not isinstance(error, _ResizedError)
    streams = over_time and any(_CACHE.search(each.name) for _, caller in outward[:1] for each in arguments(caller))
    if by_itself and not own_code and not isinstance(why, _ResizedError):
        if padded is not None and not (streams and why):
            return padded
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


def _by_padding(module: Convolution) -> Tap | None:
    """Return the tap that meets the present if the convolution's own padding keeps positions, else ``None``."""
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
        return _tap(module, front)
    except _NoTapError:
        return None


def _unpadded(module: Convolution) -> bool:
    return module.padding == "valid" or not any(module.padding)


def _middle(module: Convolution) -> Tap:
    """Return the middle tap: of an even number the one that "same" padding puts over the present."""
    return tuple((taps - 1) // 2 for taps in module.kernel_size)


def _tap(module: Convolution, far: tuple[int, ...]) -> Tap:
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


def _by_run(caller: nn.Module, path: str, module: Convolution) -> Tap:
    """Return the tap that meets the present in a run of a caller; once for all that are alike."""
    key = (module_key(caller), path, "centre")
    found: Tap = cached(key, lambda: _centre(caller, path, module))
    return found


@untraced()
def _centre(owner: nn.Module, path: str, module: Convolution) -> Tap:
    """Return the tap that meets the present, from runs of a copy of the owner with weight on one tap alone.

    Raises:
        CannotRunError: it runs on no made-up input, gives another number of positions, or mixes them in other ways too.
    """
    steps = module.dilation
    taps = list(itertools.product(*map(range, module.kernel_size)))
    why = CannotRunError("nothing is known of its inputs")
    twin = copy_for_probe(owner)
    filters = (twin.get_submodule(path) if path else twin).get_parameter("weight")
    for call, axes in maps(owner, module):
        look = functools.partial(_offsets, twin, call, axes, filters, module.stride)
        try:
            # The offset 0, which all else shares, is not told.
            (still, keeps, mixed), zero = look(None), (0,) * len(steps)
            still |= {zero}
            first, last = look(0)[0] - still, look(-1)[0] - still
        except _MixedError:
            raise
        except CannotRunError as error:
            why = error
            continue
        who = f"{type(owner).__name__}, which calls it,"
        if len(first) > 1 or len(last) > 1 or not (first | last or len(still) == 1):
            raise CannotRunError(f"{who} mixes positions in other ways too")
        if not keeps:
            raise _ResizedError(f"{who} gives more positions than it takes, or fewer")
        if not first | last and mixed:
            raise _MixedError("what else mixes its positions hides what its taps do")
        if not first | last:
            raise _NoTapError("all of them look past the input's ends")
        # Tap c looks (c − c*)·dilation far. Here c*·dilation, as either end has it.
        ends = [(taps[0], offset) for offset in first] + [(taps[-1], offset) for offset in last]
        reach = [tuple(c * step - o for c, step, o in zip(tap, steps, seen, strict=True)) for tap, seen in ends]
        if len(set(reach)) > 1:
            raise _NoTapError("they are not as far apart as its dilation says")
        return _tap(module, reach[0])
    raise CannotRunError(f"{type(owner).__name__}, which calls it, does not run on made-up inputs ({why})")


def _offsets(
    twin: nn.Module, call: Call, axes: tuple[int, ...], filters: Tensor, strides: tuple[int, ...], tap: int | None
) -> tuple[set[Offset], bool, bool]:
    """Return input minus output position of all outputs that move when one input does, with weight on one tap.

    And whether there is one output for every ``strides`` inputs, and whether most others move a little, too.
    """
    filters.zero_()
    if tap is not None:
        filters.flatten(1)[:, tap] = 1.0
    x, front = call.args[0], tuple(range(len(axes)))
    base = run(twin, call)[0]
    if base.ndim != x.ndim or any(base.shape[axis] < 2 for axis in axes):
        raise CannotRunError("its output has no such axis of positions")
    sizes = [(x.shape[axis], base.shape[axis]) for axis in axes]
    # A kernel without padding leaves more than half of what ``maps`` makes.
    bounds = [
        (taken // (2 * stride) + 1, 2 * taken // stride) for (taken, _), stride in zip(sizes, strides, strict=True)
    ]
    if not all(least < given < most for (_, given), (least, most) in zip(sizes, bounds, strict=True)):
        raise CannotRunError("its output has positions of another resolution")
    keeps = all(taken == given * stride for (taken, given), stride in zip(sizes, strides, strict=True))
    at = [x.shape[axis] // 2 // stride * stride for axis, stride in zip(axes, strides, strict=True)]
    found, mixed, noise = set[Offset](), False, 1e-9 * float(base.abs().max())
    # With a stride, only some inputs are met by this tap: all of one cell are tried.
    for inside in itertools.product(*(range(stride) for stride in strides)):
        place = [start + step for start, step in zip(at, inside, strict=True)]
        moved = x.clone()
        # Every channel by another amount: a norm before the convolution takes away what all have in common.
        features = moved.movedim(axes, front)[tuple(place)]
        features += torch.randn(features.shape, generator=torch.Generator().manual_seed(4), dtype=x.dtype)
        change = (run(twin, replace(call, args=(moved,)))[0] - base).abs()
        seen = change.movedim(axes, front).flatten(len(axes)).amax(-1)
        # What mixes all positions (a norm over them, a pooled gate) moves each a little.
        median = float(seen.median())
        mixed, least = mixed or median > noise, max(noise, _ABOVE_MIXING * median)
        for hit in (seen > least).nonzero().tolist():
            found.add(tuple(p - stride * o for p, stride, o in zip(place, strides, hit, strict=True)))
    if mixed and not found and tap is not None:
        raise _MixedError("what else mixes its positions is as strong as its taps")
    return found, keeps, mixed
