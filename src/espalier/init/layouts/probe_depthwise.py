"""Which tap of a depthwise convolution meets the output's own position: the middle one, or the last of a causal one."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from espalier.init.filters.closed_form import Convolution
from espalier.init.layouts.arguments import arguments
from espalier.init.layouts.keys import module_key
from espalier.init.layouts.prove import cached, token_widths
from espalier.init.layouts.registry import DepthwiseWeights, Found, Skipped
from espalier.init.layouts.scratch import Call, CannotRunError, copy_for_probe, owner_of, run, untraced

_UNKNOWN = "which of its taps meets the present is unknown"
_CACHE = re.compile(r"cache|past|state|stream|inference_params")
# Input position minus output position that a tap connects, axis by axis.
Offset = tuple[int, ...]
Centre = Literal["middle", "last", "other"]
# How far above the median move of all outputs one must stand that the moved input reaches through a tap.
_ABOVE_MIXING = 5.0


class _MixedError(CannotRunError):
    """A module runs, and moves all positions with each as much as by any tap."""


def align(names: Mapping[str, nn.Module], name: str, found: DepthwiseWeights, *, own_code: bool) -> Found:
    """Return a depthwise layer's view with its centre and a note, or why the centre cannot be known.

    A convolution padded alike on both sides keeps positions, so that its centre is the middle. One over time may be
    causal whatever its padding says (a crop, a shift, a cache), so its owner is run: with all weight on the first tap,
    then on the last, the outputs that move tell which tap is the present. What cannot be run is read from its padding.

    Args:
        names: all modules of the model, to find the one that calls this one.
        name: of the convolution.
        found: its view.
        own_code: it is a subclass that may pad by itself.
    """
    module = names[name]
    assert isinstance(module, Convolution)
    owner = (name, module) if own_code else owner_of(names, name)
    over_time, centre = len(module.kernel_size) == 1, _centre_by_padding(module)
    if owner is None and centre == "other":
        centre = "middle"
    if owner is not None and (own_code or over_time or centre == "other"):
        path = name[len(owner[0]) :].lstrip(".")
        try:
            centre = cached((module_key(owner[1]), path, "centre"), lambda: _centre(owner[1], path, module))
        except CannotRunError as error:
            streams = over_time and any(_CACHE.search(argument.name) for argument in arguments(owner[1]))
            if own_code or centre == "other" or (centre == "middle" and streams):
                return Skipped("depthwise", f"{_UNKNOWN}: {error}")
    if centre == "other":
        return Skipped("depthwise", f"{_UNKNOWN}: it is neither the middle one nor the last")
    return replace(found, centre=centre, note="causal: the newest tap is its centre" if centre == "last" else "")


def _centre_by_padding(module: Convolution) -> Centre:
    """Return the centre of a convolution whose result is taken as it is, as far as its padding tells."""
    middle = tuple(step * (taps - 1) // 2 for step, taps in zip(module.dilation, module.kernel_size, strict=True))
    named = {"same": middle, "valid": (0,) * len(middle)}
    padded = named[module.padding] if isinstance(module.padding, str) else tuple(module.padding)
    if len(padded) == 1 and padded[0] >= module.dilation[0] * (module.kernel_size[0] - 1):
        return "last"
    return "middle" if padded == middle and all(taps % 2 for taps in module.kernel_size) else "other"


@untraced()
def _centre(owner: nn.Module, path: str, module: Convolution) -> Centre:
    """Return which tap is the centre, from runs of a copy of the owner with weight on one tap alone.

    A convolution with code of its own is its own owner. There every tap is tried: a mask, for one, lets some do
    nothing, and what is written there would not be used.

    Raises:
        CannotRunError: it runs on no made-up input, or mixes positions in other ways too.
    """
    steps = module.dilation
    taps = list(itertools.product(*map(range, module.kernel_size)))
    why = "nothing is known of its inputs"
    twin = copy_for_probe(owner)
    filters = (twin.get_submodule(path) if path else twin).get_parameter("weight")
    for call, axes in _inputs(owner, module):
        look = functools.partial(_offsets, twin, call, axes, filters)
        try:
            # The offset 0, which all else shares, is not told.
            still = look(None) | {(0,) * len(steps)}
            first, last = look(0) - still, look(-1) - still
        except _MixedError:
            raise
        except CannotRunError as error:
            why = str(error)
            continue
        if not first | last and len(still) == 1:
            return "other"  # every tap looks past the input's ends
        if len(first) > 1 or len(last) > 1 or not first | last:
            raise CannotRunError(f"{type(owner).__name__}, which calls it, mixes positions in other ways too")
        # Tap c looks (c − c*)·dilation far. Here c*·dilation, as either end has it.
        ends = [(taps[0], offset) for offset in first] + [(taps[-1], offset) for offset in last]
        reach = [tuple(c * step - o for c, step, o in zip(tap, steps, seen, strict=True)) for tap, seen in ends]
        if len(set(reach)) > 1:
            return "other"
        for place, tap in enumerate(taps if not path else ()):
            if look(place) != {tuple(c * step - f for c, step, f in zip(tap, steps, reach[0], strict=True))}:
                raise CannotRunError(f"{type(module).__name__} does not use its weights as they are (tap {tap})")
        return _name(module, reach[0])
    raise CannotRunError(f"{type(owner).__name__}, which calls it, does not run on made-up inputs ({why})")


def _name(module: Convolution, far: tuple[int, ...]) -> Centre:
    """Return the centre's name, given how far before its own tap c* the filter starts: c* times the dilation."""
    if any(f % step for f, step in zip(far, module.dilation, strict=True)):
        return "other"
    present = [f // step for f, step in zip(far, module.dilation, strict=True)]
    # A strided output covers several positions; the middle tap may meet any of them.
    sizes = module.kernel_size
    if all(0 <= taps // 2 - tap < span for taps, tap, span in zip(sizes, present, module.stride, strict=True)):
        return "middle"
    return "last" if len(sizes) == 1 and present[0] == sizes[0] - 1 else "other"


def _inputs(owner: nn.Module, module: Convolution) -> Iterator[tuple[Call, tuple[int, ...]]]:
    """Yield inputs for the owner, larger than the kernel and of different sizes, and their axes of position."""
    reach = [step * (taps - 1) + 1 for taps, step in zip(module.kernel_size, module.dilation, strict=True)]
    # Multiples of the stride, so that padding that depends on the size is the same on both sides of it.
    sizes = [stride * (2 * (n + axis) + 9) for axis, (n, stride) in enumerate(zip(reach, module.stride, strict=True))]
    needs = [p for p in arguments(owner)[1:] if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    others: dict[str, Any] = {p.name: None for p in needs}
    generator = torch.Generator().manual_seed(3)
    for width in dict.fromkeys([*token_widths(owner), module.in_channels]):
        # Channels first, channels last, without a batch, time first.
        forms = (((1, width, *sizes), 2), ((1, *sizes, width), 1), ((width, *sizes), 1), ((*sizes, 1, width), 0))
        for shape, start in forms:
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            yield Call((x,), dict(others), sizes[0]), tuple(range(start, start + len(sizes)))


def _offsets(twin: nn.Module, call: Call, axes: tuple[int, ...], filters: Tensor, tap: int | None) -> set[Offset]:
    """Return input minus output position of all outputs that move when one input does, with weight on one tap."""
    filters.zero_()
    if tap is not None:
        filters.flatten(1)[:, tap] = 1.0
    x, front = call.args[0], tuple(range(len(axes)))
    base = run(twin, call)[0]
    if base.ndim != x.ndim or any(base.shape[axis] < 2 for axis in axes):
        raise CannotRunError("its output has no such axis of positions")
    strides = [max(1, round(x.shape[axis] / base.shape[axis])) for axis in axes]
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
    return found
