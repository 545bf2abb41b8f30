"""Which tap of a depthwise convolution meets the output's own position: the middle one, or the last of a causal one."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from espalier.init.filters.closed_form import Convolution
from espalier.init.layouts.keys import module_key
from espalier.init.layouts.prove import cached, token_widths
from espalier.init.layouts.registry import Codeless, DepthwiseWeights, Found, Skipped
from espalier.init.layouts.scratch import Call, CannotRunError, copy_for_probe, owner_of, run, untraced

_UNKNOWN = "which of its taps meets the present is unknown"
_CACHE = re.compile(r"cache|past|state|stream|inference_params")
# Output position minus input position that a tap connects, axis by axis.
Offset = tuple[int, ...]


def align(
    names: Mapping[str, nn.Module], name: str, module: nn.Module, found: DepthwiseWeights, *, own_code: bool
) -> Found:
    """Return a depthwise layer's view with its centre and a note, or why the centre cannot be known.

    A convolution padded alike on both sides keeps positions, so that its centre is the middle. One over time may be
    causal whatever its padding says (a crop, a shift, a cache), so its owner is run: with all weight on the first tap,
    then on the last, the outputs that move tell which tap is the present. What cannot be run is read from its padding.

    Args:
        names: all modules of the model, to find the one that calls this one.
        name, module: the convolution.
        found: its view.
        own_code: it is a subclass that may pad by itself.
    """
    assert isinstance(module, Convolution)
    notes = []
    if max(module.stride) > 1:
        notes.append("strided: its filters act on every other position")
    if max(module.kernel_size) == 3:
        notes.append("three taps an axis: hardly wider than one")
    owner = (name, module) if own_code else owner_of(names, name)
    padded = _padding(module)
    if (
        owner is not None
        and not isinstance(names[""], Codeless)
        and (own_code or len(padded) == 1 or padded != _even(module))
    ):
        path = name[len(owner[0]) :].lstrip(".")
        try:
            centre = cached((module_key(owner[1]), path, "centre"), lambda: _centre(owner[1], path, module))
        except CannotRunError as error:
            centre = _centre_by_padding(module, owner[1], padded, own_code)
            if centre is None:
                return Skipped("depthwise", f"{_UNKNOWN}: {error}")
    else:
        centre = "middle" if owner is None or padded == _even(module) else None
        if padded != _even(module) and _causal(module, padded):
            centre = "last"
    if centre not in ("middle", "last"):
        return Skipped("depthwise", f"{_UNKNOWN}: it is neither the middle one nor the last")
    if centre == "last":
        notes.insert(0, "causal: the newest tap is its centre")
    return replace(found, centre=centre, note="; ".join(notes))


def _padding(module: Convolution) -> tuple[int, ...]:
    """Return the zeros that the convolution adds in front along every axis."""
    if module.padding == "same":
        return tuple(step * (taps - 1) // 2 for step, taps in zip(module.dilation, module.kernel_size, strict=True))
    return (0,) * len(module.kernel_size) if module.padding == "valid" else tuple(map(int, module.padding))


def _even(module: Convolution) -> tuple[int, ...] | None:
    """Return the padding that keeps positions, or ``None`` where a kernel has no middle."""
    if any(taps % 2 == 0 for taps in module.kernel_size):
        return None
    return tuple(step * (taps - 1) // 2 for step, taps in zip(module.dilation, module.kernel_size, strict=True))


def _causal(module: Convolution, padded: tuple[int, ...]) -> bool:
    return len(padded) == 1 and padded[0] >= module.dilation[0] * (module.kernel_size[0] - 1)


def _centre_by_padding(module: Convolution, owner: nn.Module, padded: tuple[int, ...], own_code: bool) -> str | None:
    """Return the centre of a convolution whose owner cannot be run, as far as padding tells."""
    if own_code:
        return None
    if _causal(module, padded):
        return "last"
    streams = any(_CACHE.search(argument) for argument in inspect.signature(owner.forward).parameters)
    return "middle" if padded == _even(module) and not (streams and len(padded) == 1) else None


def _centre(owner: nn.Module, path: str, module: Convolution) -> str:
    """Return "middle", "last" or "other" from runs of a copy of the owner, with weight on one tap alone.

    Raises:
        CannotRunError: it runs on no made-up input, or mixes positions in other ways too.
    """
    sizes = _lengths(module)
    why = "nothing is known of its inputs"
    with untraced():
        twin = copy_for_probe(owner)
        filters = (twin.get_submodule(path) if path else twin).get_parameter("weight")
        for call, axes in _inputs(owner, module, sizes):
            try:
                offsets = [_offsets(twin, call, axes, filters, tap, module) for tap in (None, 0, -1)]
            except CannotRunError as error:
                why = str(error)
                continue
            still = offsets[0] | {(0,) * len(sizes)}
            first, last = offsets[1] - still, offsets[2] - still
            if not first | last and len(still) == 1:
                return "other"  # every tap looks past the input's ends
            if len(first) > 1 or len(last) > 1 or not first | last:
                raise CannotRunError(f"{type(owner).__name__}, which calls it, mixes positions in other ways too")
            ends = next(iter(first), None), next(iter(last), None)
            if not path:
                _prove_taps(twin, call, axes, filters, module, *ends)
            return _name(module, *ends)
    raise CannotRunError(f"{type(owner).__name__}, which calls it, does not run on made-up inputs ({why})")


def _prove_taps(
    twin: nn.Module,
    call: Call,
    axes: tuple[int, ...],
    filters: Tensor,
    module: Convolution,
    first: Offset | None,
    last: Offset | None,
) -> None:
    """Run a convolution with code of its own with weight on every tap alone, and raise if one is not where it belongs.

    A mask, for one, lets some taps do nothing: what is written there would not be used.
    """
    sizes, steps = module.kernel_size, module.dilation
    far = first or tuple(end - (n - 1) * step for end, n, step in zip(last or (), sizes, steps, strict=True))
    for tap, place in enumerate(itertools.product(*map(range, sizes))):
        expected = tuple(a + p * step for a, p, step in zip(far, place, steps, strict=True))
        if _offsets(twin, call, axes, filters, tap, module) != {expected}:
            raise CannotRunError(f"{type(module).__name__} does not use its weights as they are (tap {place})")


def _name(module: Convolution, first: Offset | None, last: Offset | None) -> str:
    """Return the centre's name, given how far the first and the last tap look (input minus output position).

    Tap c looks (c − c*)·dilation far, and the offset 0, which all else shares, is not told.
    """
    present = []
    for axis, (taps, step) in enumerate(zip(module.kernel_size, module.dilation, strict=True)):
        looks = -first[axis] if first is not None else (taps - 1) * step - last[axis] if last is not None else 0
        if last is not None and first is not None and last[axis] - first[axis] != (taps - 1) * step:
            return "other"
        if looks % step:
            return "other"
        present.append(looks // step)
    # A strided output covers several positions; the middle tap may meet any of them.
    sizes = module.kernel_size
    if all(0 <= taps // 2 - tap < span for taps, tap, span in zip(sizes, present, module.stride, strict=True)):
        return "middle"
    return "last" if len(sizes) == 1 and present[0] == sizes[0] - 1 else "other"


def _lengths(module: Convolution) -> tuple[int, ...]:
    """Return sizes of a made-up input, larger than the kernel and all different."""
    reach = [step * (taps - 1) + 1 for taps, step in zip(module.kernel_size, module.dilation, strict=True)]
    # Multiples of the stride, so that padding that depends on the size is the same on both sides of it.
    return tuple(
        stride * (2 * size + 3 + 2 * axis) for axis, (size, stride) in enumerate(zip(reach, module.stride, strict=True))
    )


def _inputs(owner: nn.Module, module: Convolution, sizes: tuple[int, ...]) -> Iterator[tuple[Call, tuple[int, ...]]]:
    """Yield inputs for the owner, and where their axes of position are."""
    parameters = list(inspect.signature(owner.forward).parameters.values())
    needs = [p for p in parameters[1:] if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    generator = torch.Generator().manual_seed(3)
    dims = len(sizes)
    widths = dict.fromkeys([*token_widths(owner), module.in_channels])
    for width, form in itertools.product(widths, ("first", "last", "unbatched", "time-first")):
        shape, axes = {
            "first": ((1, width, *sizes), range(2, 2 + dims)),
            "last": ((1, *sizes, width), range(1, 1 + dims)),
            "unbatched": ((width, *sizes), range(1, 1 + dims)),
            "time-first": ((*sizes, 1, width), range(dims)),
        }[form]
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        others: dict[str, Any] = {p.name: None for p in needs}
        yield Call((x,), others, sizes[0]), tuple(axes)


def _offsets(
    twin: nn.Module, call: Call, axes: tuple[int, ...], filters: Tensor, tap: int | None, module: Convolution
) -> set[Offset]:
    """Return input minus output position of all outputs that move when one input does, with weight on one tap."""
    filters.zero_()
    if tap is not None:
        filters.flatten(1)[:, tap] = 1.0
    x = call.args[0]
    base = run(twin, call)[0]
    if base.ndim != x.ndim or any(base.shape[axis] < 2 for axis in axes):
        raise CannotRunError("its output has no such axis of positions")
    strides = [max(1, round(x.shape[axis] / base.shape[axis])) for axis in axes]
    at = [x.shape[axis] // 2 // stride * stride for axis, stride in zip(axes, strides, strict=True)]
    found: set[Offset] = set()
    # With a stride, only some inputs are met by this tap: all of one cell are tried.
    for inside in itertools.product(*(range(stride) for stride in strides)):
        place = [start + step for start, step in zip(at, inside, strict=True)]
        moved = x.clone()
        index: list[Any] = [slice(None)] * x.ndim
        for axis, position in zip(axes, place, strict=True):
            index[axis] = position
        moved[tuple(index)] += 1.0
        change = (run(twin, replace(call, args=(moved,)))[0] - base).abs()
        other = [axis for axis in range(base.ndim) if axis not in axes]
        seen = change.amax(other) if other else change
        for hit in (seen > 1e-9 * float(base.abs().max())).nonzero().tolist():
            found.add(tuple(p - stride * o for p, stride, o in zip(place, strides, hit, strict=True)))
    return found
