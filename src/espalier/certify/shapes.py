"""Rules of what moves numbers without changing them: views, copies, padding, joining. The batch stays in front."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from espalier.certify.arithmetic import cast_unit, root_up, up
from espalier.certify.bounded import Analysis, Bound, Term
from espalier.certify.operations import operation
from espalier.certify.refusal import UncertifiableError

_MEET = "it moves the batch from the front, so that images would meet"


def _same(analysis: Analysis, x: Bound, value: Tensor | None, factor: float = 1.0) -> Bound:
    """Return the bound of numbers of x in other places, image by image."""
    if value is not None and (value.ndim == 0 or len(value) != len(x.numbers)):
        raise UncertifiableError(_MEET)
    return analysis.exact(x, value, factor)


# -- what a network may ask about a tensor without looking at its numbers

_PROPERTIES = ("shape", "ndim", "dtype", "device", "layout", "is_cuda", "is_sparse", "is_quantized", "is_meta",
               "is_mkldnn", "is_nested", "is_mps", "is_xpu", "itemsize", "nbytes")  # fmt: skip
_METHODS = ("size", "dim", "numel", "nelement", "__len__", "is_floating_point", "is_complex", "get_device",
            "element_size", "is_contiguous", "stride", "ndimension")  # fmt: skip
_SIZELESS = ("dtype", "device", "layout", "is_floating_point", "is_complex", "is_cuda", "is_sparse", "is_quantized")


def _ask(name: str, ask: Callable[..., Any]) -> Callable[..., Any]:
    def rule(analysis: Analysis, input: Bound, *args: Any, **kwargs: Any) -> Any:
        if input.value is None and name in _SIZELESS:
            return ask(torch.empty(0, dtype=torch.float64), *args, **kwargs)
        return ask(input.numbers, *args, **kwargs)

    return rule


for _name in _PROPERTIES:
    operation(f"torch.Tensor.{_name}.__get__")(_ask(_name, lambda x, name=_name: getattr(x, name)))
for _name in _METHODS:
    operation(_name)(_ask(_name, lambda x, *args, name=_name, **kwargs: getattr(x, name)(*args, **kwargs)))


@operation("torch.Tensor.requires_grad.__get__", "torch.Tensor.is_leaf.__get__", "is_inference", "is_conj", "is_neg")
def no(analysis: Analysis, input: Bound) -> bool:
    """False: no gradient is taken."""
    return False


@operation("torch.Tensor.grad_fn.__get__", "torch.Tensor.grad.__get__")
def nothing(analysis: Analysis, input: Bound) -> None:
    """None: no gradient is taken."""


def _constants(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def rule(analysis: Analysis, input: Bound, *args: Any, **kwargs: Any) -> Tensor:
        return function(input.numbers, *args, **kwargs)

    return rule


for _name in ("zeros_like", "ones_like", "full_like", "empty_like"):
    if _name != "empty_like":  # what an empty tensor holds is anybody's guess
        operation(f"torch.{_name}")(_constants(getattr(torch, _name)))
for _name in ("new_zeros", "new_ones", "new_full", "new_tensor"):
    operation(f"torch.Tensor.{_name}")(_constants(getattr(Tensor, _name)))


# -- views and copies


@operation("detach", "contiguous", "torch.Tensor.data.__get__", "torch.Tensor.requires_grad_", "positive", "alias",
           "torch.Tensor.__pos__", "torch.Tensor.requires_grad", "retain_grad", alias=True)  # fmt: skip
def itself(analysis: Analysis, input: Bound, *args: Any, **kwargs: Any) -> Bound:
    """The same numbers."""
    return input


@operation("clone")
def copied(analysis: Analysis, input: Bound, *, memory_format: Any = None) -> Bound:
    """The same numbers, apart in memory."""
    return input


@operation("flatten", alias=True)
def flatten(analysis: Analysis, input: Bound, start_dim: int = 0, end_dim: int = -1) -> Bound:
    """The same numbers; the batch is left alone."""
    if input.value is None:
        if start_dim < 1:
            raise UncertifiableError("it may flatten the batch: flatten from dimension 1, or give an example=")
        return input
    if start_dim % input.value.ndim == 0 and end_dim % input.value.ndim != 0:
        raise UncertifiableError(_MEET)
    return _same(analysis, input, input.value.flatten(start_dim, end_dim))


@operation("unflatten", alias=True)
def unflatten(analysis: Analysis, input: Bound, dim: int, sizes: Any) -> Bound:
    """The same numbers; the batch is left alone."""
    if dim == 0 or (dim < 0 and dim % input.numbers.ndim == 0):
        raise UncertifiableError(_MEET)
    return _same(analysis, input, None if input.value is None else input.value.unflatten(dim, sizes))


@operation("reshape", "view", alias=True)
def reshape(analysis: Analysis, input: Bound, *shape: Any) -> Bound:
    """The same numbers in the same order, so that a batch of the same length holds the same images."""
    if any(isinstance(part, torch.dtype) for part in shape):
        raise UncertifiableError("reading numbers as another dtype has no rule")
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
    return _same(analysis, input, input.numbers.reshape(tuple(sizes)))


def _moved(compute: Callable[..., Tensor]) -> Callable[..., Bound]:
    def rule(analysis: Analysis, input: Bound, *args: Any, **kwargs: Any) -> Bound:
        """The same numbers along other axes; whether the batch stays in front is tried out."""
        # A tensor of the same shape whose elements name their image tells where every image went.
        images = torch.arange(len(input.numbers)).view(-1, *(1,) * (input.numbers.ndim - 1)).expand(input.numbers.shape)
        value, where = compute(input.numbers, *args, **kwargs), compute(images, *args, **kwargs)
        own = torch.arange(len(where)).view(-1, *(1,) * (where.ndim - 1)) if where.ndim else None
        if own is None or not bool((where == own).all()):
            raise UncertifiableError(_MEET)
        return _same(analysis, input, value)

    return rule


_MOVES: dict[str, Callable[..., Tensor]] = {
    name: getattr(Tensor, name)
    for name in ("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "squeeze", "unsqueeze")
}
for _name, _compute in _MOVES.items():
    operation(_name, alias=True)(_moved(_compute))
operation("torch.Tensor.mT.__get__", alias=True)(_moved(lambda x: x.mT))


def _image_axis(input: Bound, dim: int) -> int:
    """Return an axis counted from the front, the batch excepted."""
    axis = dim % input.numbers.ndim
    if axis == 0:
        raise UncertifiableError(_MEET)
    return axis


def _rearranged(compute: Callable[..., Tensor], least: int) -> Callable[..., Bound]:
    def rule(analysis: Analysis, input: Bound, *args: Any, **kwargs: Any) -> Bound:
        """The same numbers of every image in other places."""
        if input.value is not None and input.value.ndim < least:
            raise UncertifiableError("it takes the batch for channels: give (B, C, …)")
        return _same(analysis, input, None if input.value is None else compute(input.value, *args, **kwargs))

    return rule


for _name, _compute, _least in (
    ("pixel_shuffle", F.pixel_shuffle, 4), ("pixel_unshuffle", F.pixel_unshuffle, 4),
    ("channel_shuffle", F.channel_shuffle, 3),
):  # fmt: skip
    operation(f"F.{_name}", f"torch.{_name}", alias=True)(_rearranged(_compute, _least))


@operation("chunk", alias=True)
def chunk(analysis: Analysis, input: Bound, chunks: int, dim: int = 0) -> tuple[Bound, ...]:
    """Parts of every image."""
    return _parts(analysis, input, input.numbers.chunk(chunks, _image_axis(input, dim)))


@operation("split", "F.split", "split_with_sizes", alias=True)
def split(analysis: Analysis, input: Bound, split_size: Any, dim: int = 0) -> tuple[Bound, ...]:
    """Parts of every image."""
    return _parts(analysis, input, input.numbers.split(split_size, _image_axis(input, dim)))


@operation("unbind", alias=True)
def unbind(analysis: Analysis, input: Bound, dim: int = 0) -> tuple[Bound, ...]:
    """Parts of every image."""
    return _parts(analysis, input, input.numbers.unbind(_image_axis(input, dim)))


def _parts(analysis: Analysis, input: Bound, parts: Sequence[Tensor]) -> tuple[Bound, ...]:
    return tuple(_same(analysis, input, part) for part in parts)


@operation("narrow", alias=True)
def narrow(analysis: Analysis, input: Bound, dim: int, start: int, length: int) -> Bound:
    """A part of every image."""
    return _same(analysis, input, input.numbers.narrow(_image_axis(input, dim), start, length))


@operation("select", alias=True)
def select(analysis: Analysis, input: Bound, dim: int, index: int) -> Bound:
    """A part of every image."""
    return _same(analysis, input, input.numbers.select(_image_axis(input, dim), index))


@operation("torch.Tensor.__getitem__", alias=True)
def item(analysis: Analysis, input: Bound, index: Any) -> Bound:
    """A part of every image, by slices and numbers; the batch is taken whole."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is None or part is Ellipsis or type(part) in (int, slice) for part in parts):
        raise UncertifiableError("an index that is no number or slice has no rule: use index_select")
    first = parts[0] if parts else Ellipsis
    if not (first is Ellipsis or first == builtins.slice(None)):
        raise UncertifiableError("it takes a part of the batch: start the index with a colon")
    if first is Ellipsis and sum(part is not None and part is not Ellipsis for part in parts) >= input.numbers.ndim:
        raise UncertifiableError("it takes a part of the batch: start the index with a colon")
    return _same(analysis, input, input.numbers[index])


@operation("index_select")
def index_select(analysis: Analysis, input: Bound, dim: int, index: Tensor) -> Bound:
    """Parts of every image; √ of how often the same one is taken."""
    copies = torch.bincount(index.flatten()).max().item() if index.numel() else 0
    return _same(analysis, input, input.numbers.index_select(_image_axis(input, dim), index), root_up(copies))


@operation("flip")
def flip(analysis: Analysis, input: Bound, *dims: Any) -> Bound:
    """The same numbers in other places."""
    given = dims[0] if len(dims) == 1 and isinstance(dims[0], Sequence) else dims
    return _same(analysis, input, input.numbers.flip([_image_axis(input, dim) for dim in given]))


@operation("roll")
def roll(analysis: Analysis, input: Bound, shifts: Any, dims: Any = ()) -> Bound:
    """The same numbers in other places."""
    axes = [dims] if isinstance(dims, int) else list(dims)
    if not axes:
        raise UncertifiableError("it rolls images into each other: name the dims")
    return _same(analysis, input, input.numbers.roll(shifts, [_image_axis(input, axis) for axis in axes]))


@operation("expand", "broadcast_to", alias=True)
def expand(analysis: Analysis, input: Bound, *size: Any) -> Bound:
    """√ of the copies."""
    sizes = tuple(size[0] if len(size) == 1 and isinstance(size[0], Sequence) else size)
    if len(sizes) != input.numbers.ndim:
        raise UncertifiableError(_MEET)
    value = input.numbers.expand(sizes)
    return _same(analysis, input, value, root_up(value.numel() / max(1, input.numbers.numel())))


@operation("repeat", "tile")
def repeat(analysis: Analysis, input: Bound, *repeats: Any) -> Bound:
    """√ of the copies."""
    counts = tuple(repeats[0] if len(repeats) == 1 and isinstance(repeats[0], Sequence) else repeats)
    if len(counts) != input.numbers.ndim or counts[0] != 1:
        raise UncertifiableError(_MEET)
    return _same(analysis, input, input.numbers.repeat(counts), root_up(math.prod(counts)))


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
    """1 with a constant; see ``padding_factor``."""
    factor = padding_factor(pad, mode)
    if input.value is None:
        return Bound(None, up(factor, input.lipschitz))
    if len(pad) >= 2 * input.value.ndim or (mode != "constant" and len(pad) > 2 * (input.value.ndim - 2)):
        raise UncertifiableError("it pads the batch")
    padded = F.pad(input.value, pad, mode, value)
    if value:
        # The number is rounded to the network's precision, and counts in what follows.
        u = cast_unit(padded.dtype) * abs(value) * math.sqrt(padded[0].numel())
        return analysis.combine(padded, [Term(input, factor)], constant=abs(value), absolute=u)
    return _same(analysis, input, padded, factor)


def _joined(analysis: Analysis, tensors: Sequence[Any], dim: int, join: Callable[..., Tensor]) -> Bound:
    if any(isinstance(part, Bound) and part.value is None for part in tensors):
        raise UncertifiableError("whether it joins images depends on their size: give an example=")
    parts = [part.value if isinstance(part, Bound) else part.detach() for part in tensors]
    operands = [part for part in tensors if isinstance(part, Bound)]
    value = join(parts, dim)
    if dim % value.ndim == 0 or len(value) != len(operands[0].numbers):
        raise UncertifiableError("it joins along the batch")
    if any(len(part) != len(value) for part in parts if part is not None):
        raise UncertifiableError("it joins along the batch")
    return analysis.combine(value, [Term(operand, 1.0) for operand in operands], joint=True)


@operation("cat", "concat", "concatenate")
def concatenate(analysis: Analysis, tensors: Sequence[Any], dim: int = 0) -> Bound:
    """√ of the sum of the squares of the constants."""
    return _joined(analysis, tensors, dim, torch.cat)


@operation("stack")
def stack(analysis: Analysis, tensors: Sequence[Any], dim: int = 0) -> Bound:
    """√ of the sum of the squares of the constants."""
    return _joined(analysis, tensors, dim, torch.stack)


class Sorted(NamedTuple):
    """What ``torch.sort`` returns, without the places: they depend on the image."""

    values: Bound
    indices: None = None


@operation("sort")
def sort(analysis: Analysis, input: Bound, dim: int = -1, descending: bool = False, stable: bool = False) -> Sorted:
    """1: no two sorted lists are further apart than the lists."""
    return Sorted(_same(analysis, input, input.numbers.sort(_image_axis(input, dim), descending).values))


# -- conversions


def _converted(analysis: Analysis, input: Bound, dtype: torch.dtype | None) -> Bound:
    if input.value is None or dtype is None or dtype == input.value.dtype:
        return input
    if not dtype.is_floating_point:
        raise UncertifiableError(f"a conversion to {dtype} is a step function")
    value = input.value.to(dtype)
    finer = torch.finfo(dtype).eps <= torch.finfo(input.value.dtype).eps and dtype != torch.float16
    u = 0.0 if finer else cast_unit(dtype)
    return analysis.combine(value, [Term(input, 1.0, u)])


@operation("to", "type", "type_as", values=2, alias=True)
def to(analysis: Analysis, input: Bound, *args: Any, **kwargs: Any) -> Bound:
    """1, and the rounding of a conversion to fewer digits. Devices are left as they are."""
    targets = [*args, *kwargs.values()]
    dtypes = [target for target in targets if isinstance(target, torch.dtype)]
    dtypes += [target.dtype for target in targets if isinstance(target, Tensor)]
    dtypes += [target.numbers.dtype for target in targets if isinstance(target, Bound)]
    for target in targets:
        if isinstance(target, str | torch.device) and torch.device(target).type != input.numbers.device.type:
            raise UncertifiableError(f"it moves to {target}: put the network on one device")
    return _converted(analysis, input, dtypes[0] if dtypes else None)


for _name, _dtype in (("float", torch.float32), ("double", torch.float64), ("half", torch.float16),
                      ("bfloat16", torch.bfloat16)):  # fmt: skip

    @operation(f"torch.Tensor.{_name}", alias=True)
    def _to_precision(
        analysis: Analysis, input: Bound, memory_format: Any = None, *, dtype: torch.dtype = _dtype
    ) -> Bound:
        return _converted(analysis, input, dtype)
