"""Rules of what moves numbers without changing them: views, copies, padding, joining. The batch stays in front."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from espalier.certify.arithmetic import cast_unit, root_up, up
from espalier.certify.bounded import Analysis
from espalier.certify.counts import another, has_count, repeated, with_count
from espalier.certify.operations import Call, operation
from espalier.certify.refusal import UncertifiableError
from espalier.certify.value import Bound, Term

_MEET = (
    "it moves, drops or repeats a part of the batch, so that images would meet, or fits one number of images alone: "
    "name it x.shape[0], or -1"
)


def _rearranged(
    analysis: Analysis, x: Bound, compute: Callable[[Tensor], Any], ids: Callable[[Tensor], Any] | None = None
) -> Any:
    """Return the bound of numbers of x in other places: √ of how often one of them is there, found by trying it out.

    Args:
        analysis: the analysis.
        x: the operand.
        compute: the operation; it returns a tensor, or a tuple of them.
        ids: the same with −1 for numbers that are not of x, if it adds some.
    """
    shape, size = x.numbers.shape, math.prod(x.numbers.shape[1:])
    # Of two or three, none can be moved, dropped or repeated unnoticed. What is written for as many as there are, with
    # a plain number, fails on others: it could do another thing there.
    images = another(len(x.numbers))
    every = torch.arange(images * size, dtype=torch.float64, device=x.numbers.device).view(images, *shape[1:])
    values = compute(x.numbers)
    try:
        places = (ids or compute)(every)
    except RuntimeError as error:
        raise UncertifiableError(_MEET) from error
    if isinstance(values, Tensor):
        return _placed(analysis, x, values, places, images, size)
    if len(values) != len(places):
        raise UncertifiableError(_MEET)
    return tuple(_placed(analysis, x, *pair, images, size) for pair in zip(values, places, strict=True))


def _placed(analysis: Analysis, x: Bound, value: Tensor, places: Tensor, images: int, size: int) -> Bound:
    if value.ndim == 0 or len(value) != len(x.numbers) or len(places) != images or value.shape[1:] != places.shape[1:]:
        raise UncertifiableError(_MEET)
    if not value.numel():
        return analysis.exact(x, value)
    own = size * torch.arange(images, dtype=torch.float64, device=places.device).view(-1, *(1,) * (places.ndim - 1))
    inside = torch.where(places < 0, -1.0, places - own)
    if not bool((inside == inside[:1]).all()) or inside[0].max() >= size:
        raise UncertifiableError(_MEET)
    return analysis.exact(
        x, value, root_up(torch.bincount(inside[0].flatten().long() + 1, minlength=2)[1:].max().item())
    )


# -- what a network may ask about a tensor without looking at its numbers, or at how many images there are

_PROPERTIES = ("ndim", "dtype", "device", "layout", "is_cuda", "is_sparse", "is_quantized", "is_meta", "is_mkldnn",
               "is_nested", "is_mps", "is_xpu", "itemsize")  # fmt: skip
_METHODS = ("dim", "is_floating_point", "is_complex", "get_device", "element_size")
_GRADIENT = ("is_leaf", "requires_grad")
_KINDS = ("is_inference",)
_SIZELESS = ("dtype", "device", "layout", "is_floating_point", "is_complex", "is_cuda", "is_sparse", "is_quantized")


@operation(*(f"torch.Tensor.{name}.__get__" for name in (*_PROPERTIES, *_GRADIENT)), *_METHODS, *_KINDS)
def ask(analysis: Analysis, name: str, input: Bound, *args: Any, **kwargs: Any) -> Any:
    """What the numbers answer, or every tensor without a gradient."""
    sizeless = input.value is None and name in _SIZELESS and not (name == "dtype" and analysis.converted)
    any_tensor = name in (*_GRADIENT, *_KINDS) or sizeless
    found = getattr(torch.empty(0, dtype=analysis.dtype) if any_tensor else input.numbers, name)
    return found(*args, **kwargs) if name in (*_METHODS, *_KINDS) else found


@operation("torch.Tensor.shape.__get__", "size")
def size(analysis: Analysis, input: Bound, dim: int | None = None) -> Any:
    """The shape, with a name in place of the number of images."""
    sizes: tuple[Any, ...] = (analysis.count, *input.numbers.shape[1:])
    shape = torch.Size(sizes)
    return shape if dim is None else shape[dim]


@operation("numel", "__len__", "torch.Tensor.nbytes.__get__")
def total_size(analysis: Analysis, name: str, input: Bound) -> Any:
    """Refused: the number of images is a factor of it."""
    raise analysis.count.refused(name)


@operation("is_contiguous")
def layout(analysis: Analysis, input: Bound, *args: Any, **kwargs: Any) -> Any:
    """The same as of the numbers; ``certify.plain_passes`` tries both answers."""
    return input.numbers.is_contiguous(*args, **kwargs)


@operation("stride", "storage_offset", "is_conj", "is_neg", "torch.Tensor.grad_fn.__get__")
def making(analysis: Analysis, name: str, input: Bound, *args: Any, **kwargs: Any) -> Any:
    """Refused: there is no end to what the answer can be."""
    raise UncertifiableError("where numbers lie in memory and what made them is up to whoever calls the network")


@operation("torch.zeros_like", "torch.ones_like", "torch.full_like")
def like(analysis: Analysis, name: str, input: Bound, *args: Any, **kwargs: Any) -> Bound:
    """0: a constant for every image."""
    return analysis.same_for_all(getattr(torch, name)(input.numbers, *args, **kwargs))


@operation(*(f"torch.Tensor.new_{kind}" for kind in ("zeros", "ones", "full", "tensor")), counted=True)
def new(analysis: Analysis, name: str, input: Bound, *args: Any, **kwargs: Any) -> Any:
    """A constant; 0 if it is one for every image."""
    call = Call(getattr(Tensor, name), (input.numbers, *args), kwargs)
    if not has_count(args, kwargs):
        return call.run()
    made = repeated(call, len(input.numbers))
    if made is None:
        raise analysis.count.refused(name)
    return analysis.same_for_all(made)


# -- views and copies


@operation("detach", "torch.Tensor.data.__get__", "torch.Tensor.requires_grad_", "positive", "alias",
           "torch.Tensor.__pos__", "torch.Tensor.requires_grad", "retain_grad", alias=True)  # fmt: skip
def itself(analysis: Analysis, input: Bound, *args: Any, **kwargs: Any) -> Bound:
    """The same numbers."""
    return input


def rewritten(analysis: Analysis, name: str, input: Bound, *, memory_format: Any = None) -> Bound:
    """The same numbers, in memory as asked."""
    usual = torch.contiguous_format if name == "contiguous" else torch.preserve_format
    return replace(input, value=input.apply(getattr(Tensor, name), memory_format=memory_format or usual))


operation("contiguous", alias=True)(rewritten)
operation("clone")(rewritten)


def move(analysis: Analysis, name: str, input: Bound, *args: Any, **kwargs: Any) -> Any:
    """The same numbers in other places: √ of the copies of one."""
    if any(isinstance(arg, torch.dtype) for arg in (*args, *kwargs.values())):
        raise UncertifiableError("reading numbers as another dtype has no rule")
    if input.value is None and _keeps_images(name, *args, **kwargs):
        return input
    compute = getattr(Tensor, name, None) or getattr(F, name)
    return _rearranged(analysis, input, lambda x: compute(x, *with_count(args, len(x)), **with_count(kwargs, len(x))))


def _keeps_images(name: str, *args: Any, **kwargs: Any) -> bool:
    """Return whether an operation leaves the batch alone and copies nothing, whatever the size of its input."""
    if name in ("flatten", "unflatten"):
        return (args[0] if args else kwargs.get("start_dim", kwargs.get("dim", 0))) >= 1
    return name in _CHANNELS


_CHANNELS = ("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")

operation(
    "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "squeeze", "unsqueeze", "flatten",
    "unflatten", "chunk", "unbind", "narrow", "select", "split", "F.split", "split_with_sizes",
    "torch.Tensor.__getitem__", *(f"{place}.{name}" for name in _CHANNELS for place in ("F", "torch")), alias=True,
)(move)  # fmt: skip
operation("reshape", "view", "expand", "broadcast_to", alias=True, counted=True)(move)  # torch refuses some views
operation("index_select", "flip", "repeat", "tile")(move)


@operation("torch.Tensor.mT.__get__", alias=True)
def transposed(analysis: Analysis, input: Bound) -> Any:
    """The same numbers in other places."""
    return _rearranged(analysis, input, lambda x: x.mT)


@operation("roll")
def roll(analysis: Analysis, input: Bound, shifts: Any, dims: Any = ()) -> Any:
    """The same numbers in other places."""
    axes = (dims,) if isinstance(dims, int) else tuple(dims)
    if not axes or any(
        axis % input.numbers.ndim == 0 for axis in axes
    ):  # by as many as there are, all would stay in place
        raise UncertifiableError(_MEET)
    return _rearranged(analysis, input, lambda x: x.roll(shifts, dims))


def padding_factor(pads: Sequence[int], mode: str) -> float:
    """Return √(how often one pixel can appear in the padded image) of a padding as ``F.pad`` takes it.

    A border pixel is replicated once for every pixel of padding; mirrored or wrapped around, a pixel appears once more
    for every padded side of an axis.
    """
    if mode == "constant":
        return 1.0
    sides = [max(0, pad) if mode == "replicate" else min(1, max(0, pad)) for pad in pads]
    return root_up(math.prod(1 + sides[i] + sides[i + 1] for i in range(0, len(sides), 2)))


@operation("F.pad")
def pad(analysis: Analysis, input: Bound, pad: Any, mode: str = "constant", value: float | None = None) -> Bound:
    """√ of how often one pixel is there; see ``padding_factor`` where the image size is not known."""
    if input.value is None:
        return Bound(None, up(padding_factor(pad, mode), input.lipschitz))
    fill = -1.0 if mode == "constant" else None
    padded: Bound = _rearranged(
        analysis, input, lambda x: F.pad(x, pad, mode, value), lambda x: F.pad(x, pad, mode, fill)
    )
    if not value:
        return padded
    # The number is rounded to the network's precision, and counts in what follows.
    u = cast_unit(padded.numbers.dtype) * abs(value) * math.sqrt(padded.numbers[0].numel())
    return analysis.combine(padded.numbers, [Term(input, 1.0)], constant=abs(value), absolute=u)


@operation("cat", "concat", "concatenate", "stack")
def join(analysis: Analysis, name: str, tensors: Sequence[Any], dim: int = 0) -> Bound:
    """√ of the sum of the squares of the constants."""
    if any(isinstance(part, Bound) and part.value is None for part in tensors):
        raise UncertifiableError("whether it joins images depends on their size: give an example=")
    parts = [part.numbers if isinstance(part, Bound) else part.detach() for part in tensors]
    operands = [part for part in tensors if isinstance(part, Bound)]
    value: Tensor = getattr(torch, name)(parts, dim)
    if dim % value.ndim == 0 or any(len(part) != len(value) for part in parts):
        raise UncertifiableError("it joins along the batch")
    return analysis.combine(value, [Term(operand, 1.0) for operand in operands], joint=True)


class Sorted(NamedTuple):
    """What ``torch.sort``, or ``max`` along an axis, returns, without the places: they depend on the image."""

    values: Bound
    indices: None = None


@operation("sort")
def sort(analysis: Analysis, input: Bound, dim: int = -1, descending: bool = False, stable: bool = False) -> Sorted:
    """1: no two sorted lists are further apart than the lists."""
    if dim % input.numbers.ndim == 0:
        raise UncertifiableError(_MEET)
    return Sorted(analysis.exact(input, input.numbers.sort(dim, descending).values))


# -- conversions


def _converted(analysis: Analysis, input: Bound, dtype: torch.dtype | None) -> Bound:
    if dtype is None or (input.value is not None and dtype == input.value.dtype):
        return input
    if not dtype.is_floating_point:
        what = "has no rule" if dtype.is_complex else "is a step function"
        raise UncertifiableError(f"a conversion to {dtype} {what}")
    if input.value is None:
        analysis.converted = analysis.converted or dtype != analysis.dtype
        return input
    value = input.value.to(dtype)
    finer = torch.finfo(dtype).eps <= torch.finfo(input.value.dtype).eps and dtype != torch.float16
    u = 0.0 if finer else cast_unit(dtype)
    return analysis.combine(value, [Term(input, 1.0, u)])


_TARGETS = (torch.dtype, Tensor, Bound, str, torch.device, int, torch.memory_format, type(None))
"""What the rule of conversions knows; an int is whether to copy, or the number of a device."""


@operation("to", "type", "type_as", values=2, alias=True)
def to(analysis: Analysis, input: Any, *args: Any, **kwargs: Any) -> Any:
    """1, and the rounding of a conversion to fewer digits. Devices are left as they are."""
    if not isinstance(input, Bound):  # a constant in the precision of a value
        like = next(target.numbers for target in (*args, *kwargs.values()) if isinstance(target, Bound))
        return input.to(like)
    targets = [*args, *kwargs.values()]
    dtypes = [target for target in targets if isinstance(target, torch.dtype)]
    dtypes += [target.dtype for target in targets if isinstance(target, Tensor)]
    dtypes += [target.numbers.dtype for target in targets if isinstance(target, Bound)]
    if not targets or not all(isinstance(target, _TARGETS) for target in targets):
        raise UncertifiableError("what it converts to is not known (torch.LongTensor, nothing): give a torch.dtype")
    for target in targets:
        if isinstance(target, str | torch.device) and torch.device(target).type != input.numbers.device.type:
            raise UncertifiableError(f"it moves to {target}: put the network on one device")
    if kwargs.get("memory_format") is not None and input.value is not None:
        input = replace(input, value=input.value.to(memory_format=kwargs["memory_format"]))
    return _converted(analysis, input, dtypes[0] if dtypes else None)


@operation(*(f"torch.Tensor.{name}" for name in ("float", "double", "half", "bfloat16")), alias=True)
def to_precision(analysis: Analysis, name: str, input: Bound, memory_format: Any = None) -> Bound:
    """1, and the rounding of a conversion to fewer digits."""
    return _converted(analysis, input, getattr(torch, name))
