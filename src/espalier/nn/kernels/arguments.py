"""What the kernels are called with: each structure here is one of the C++ sources, field by field.

The library tells the size of its own structures when it is opened, and every call carries the size of ours. Beside each
structure stands how many numbers its pointers lead to, so that no kernel is started on less memory than it reads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, ClassVar

_Counts = Callable[[Any], dict[str, int]]


class Arguments(ctypes.Structure):
    """The base of all: its subclasses begin with their own size and the number of threads."""

    kernel: ClassVar[str]
    names: ClassVar[frozenset[str]]
    pointers: ClassVar[tuple[str, ...]]
    """Those of them that lead to numbers."""
    sizes: ClassVar[tuple[str, ...]]
    """The integers among them."""
    maps: ClassVar[frozenset[str]]
    """The pointers to numbers of the kernel's own precision; where that is bfloat16 the others are float32."""
    counts: ClassVar[_Counts]
    """From the sizes, and ``lanes`` (numbers in a block of vectors), how many numbers each pointer leads to.

    Pointers that lead to as many share an entry.
    """


KINDS: list[type[Arguments]] = []


def _arguments(
    kernel: str, pointers: str, integers: str, counts: _Counts, reals: str = "", maps: str = ""
) -> type[Arguments]:
    """Return the structure of a kernel: pointers to tensors first, then sizes and flags, then numbers."""
    names = [(name, ctypes.c_void_p) for name in pointers.split()]
    fields: list[tuple[str, Any]] = [("size", ctypes.c_int64), ("threads", ctypes.c_int64), *names]
    fields += [(name, ctypes.c_int64) for name in integers.split()]
    fields += [(name, ctypes.c_double) for name in reals.split()]
    body = {
        "_fields_": fields,
        "kernel": kernel,
        "names": frozenset(name for name, _ in fields[2:]),
        "pointers": tuple(pointers.split()),
        "sizes": tuple(integers.split()),
        "maps": frozenset((maps or pointers).split()),
        "counts": staticmethod(counts),
    }
    kind = type(kernel, (Arguments,), body)
    KINDS.append(kind)
    return kind


@lru_cache(maxsize=1 << 10)
def counts(kind: type[Arguments], lanes: int, *sizes: int) -> dict[str, int]:
    """Return how many numbers the kernel's pointers lead to, by name; kept, as networks repeat their sizes."""
    by_names = kind.counts(SimpleNamespace(lanes=lanes, **dict(zip(kind.sizes, sizes, strict=True))))
    return {name: count for names, count in by_names.items() for name in names.split()}


def _span(*axes: tuple[int, int]) -> int:
    """Return how many numbers lie from the first to the last of a grid with these (size, stride)."""
    return 1 + sum((size - 1) * stride for size, stride in axes) if all(size for size, _ in axes) else 0


def _scan(s: Any) -> dict[str, int]:
    steps, cells = s.batch * s.length, s.channels * s.states
    blocks = -(-s.length // s.piece) * -(-s.channels // s.lanes)
    return {
        "x delta y dy dx ddelta dgate": steps * s.channels,
        "gate": _span((steps, s.gate_stride), (s.channels, 1)),
        "b c": steps * s.states,
        "db dc": s.groups * steps * s.states,
        "bias d": s.channels,
        "dbias dd": s.batch * s.channels,
        "a": cells,
        "initial final dfinal da dinitial": s.batch * cells,
        "starts": s.batch * blocks * s.states * s.lanes,
    }


_SCAN = "batch length channels states piece groups gate_stride softplus"
SCAN_FORWARD = _arguments("scan_forward", "x delta bias a b c d gate initial y final starts", _SCAN, _scan)
SCAN_BACKWARD = _arguments(
    "scan_backward",
    "x delta bias a b c d gate starts dy dfinal dx ddelta dbias da db dc dd dgate dinitial",
    _SCAN,
    _scan,
)


def _ssd(s: Any) -> dict[str, int]:
    steps, heads, maps = s.batch * s.length, s.groups * s.share, s.groups * s.states
    cells, between = s.batch * heads * s.states, -(-s.length // s.chunk) - 1
    return {
        "x": _span((steps, s.x_stride), (heads * s.width, 1)),
        "y dy dx": steps * heads * s.width,
        "b": _span((steps, s.b_stride), (maps, 1)),
        "c": _span((steps, s.c_stride), (maps, 1)),
        "db dc": s.parts * steps * maps,
        "delta ddelta": steps * heads,
        "a d": heads,
        "da dd": s.batch * heads,
        "initial final dfinal dinitial": cells * s.width,
        "kept": cells * between * -(-s.width // s.lanes) * s.lanes,
    }


_SSD = "batch length groups share width states chunk parts x_stride b_stride c_stride"
SSD_FORWARD = _arguments("ssd_forward", "x delta a b c d initial y final kept", _SSD, _ssd)
SSD_BACKWARD = _arguments(
    "ssd_backward", "x delta a b c d initial kept dy dfinal dx ddelta da db dc dd dinitial", _SSD, _ssd
)


def _conv(s: Any) -> dict[str, int]:
    steps = s.batch * s.length
    return {
        "x": _span((steps, s.stride), (s.channels, 1)),
        "y dy dx": steps * s.channels,
        "weight": s.channels * s.taps,
        "bias": s.channels,
        "dweight": s.batch * s.channels * s.taps,
        "dbias": s.batch * s.channels,
    }


_CONV = "batch length channels taps stride"
CONV_FORWARD = _arguments("conv_forward", "x weight bias y", _CONV, _conv)
CONV_BACKWARD = _arguments("conv_backward", "x weight bias dy dx dweight dbias", _CONV, _conv)


def _norm(s: Any) -> dict[str, int]:
    channels = s.groups * s.width
    gate = _span((s.rows, s.stride), (channels, 1))
    return {"y out dout dy dz": s.rows * channels, "z": gate, "weight": channels, "dweight": s.items * channels}


_NORM = "rows groups width stride items"
NORM_FORWARD = _arguments("norm_forward", "y z weight out", _NORM, _norm, "eps")
NORM_BACKWARD = _arguments("norm_backward", "y z weight dout dy dz dweight", _NORM, _norm, "eps")


def _product(s: Any) -> dict[str, int]:
    return {
        "a_re a_im": _span((s.count, s.a_batch), (s.m, s.a_row), (s.k, s.a_column)),
        "b_re b_im": _span((s.count, s.b_batch), (s.k, s.b_row), (s.n, s.b_column)),
        "c_re c_im": _span((s.count, s.c_batch), (s.m, s.c_row), (s.n, 1)),
    }


PLANES_PRODUCT = _arguments(
    "planes_product",
    "a_re a_im b_re b_im c_re c_im",
    "count m k n a_batch a_row a_column b_batch b_row b_column c_batch c_row conj_a conj_b add alpha",
    _product,
)


PLANES_FACTOR = _arguments(
    "planes_factor",
    "re im",
    "count n batch row width",
    lambda s: {"re im": _span((s.count, s.batch), (s.n, s.row), (s.n, 1))},
)


def _solve(s: Any) -> dict[str, int]:
    return {
        "f_re f_im": _span((s.count, s.f_batch), (s.n, s.f_row), (s.n, 1)),
        "x_re x_im": _span((s.count, s.x_batch), (s.rows, s.x_row), (s.n, 1)),
        "less_re less_im": _span((s.count, s.less_batch), (s.rows, s.less_row), (s.n, 1)),
        "z_re z_im": _span((s.count, s.z_batch), (s.rows, s.z_row), (s.n, 1)),
        "y_re y_im": _span((s.count, s.y_batch), (s.rows, s.y_row), (s.n, 1)),
    }


_STEPS = "f_batch f_row x_batch x_row less_batch less_row z_batch z_row y_batch y_row"
PLANES_SOLVE = _arguments(
    "planes_solve",
    "f_re f_im x_re x_im less_re less_im z_re z_im y_re y_im",
    f"count rows n width {_STEPS} transposed conj",
    _solve,
)


def _dft(s: Any) -> dict[str, int]:
    # How many frequencies are kept stands in the tables alone: the caller makes room for as many.
    tables = s.rows * (s.width // 2 + 1)
    for size in (s.width, s.size_0, s.size_1)[: 1 + s.lead]:
        odd = size // (size & -size)
        tables += size // 2 * 2
        if odd > 1:
            tables += sum(-(-few // 6) * 6 * few for few in (odd // 2, odd // 2 + 1))
    return {"x": s.rows * s.width * s.columns, "tables": tables, "bias": s.channels}


_DFT = "lead width rows columns columns_first size_0 size_1 channels together"
DFT_FORWARD = _arguments("dft_analyse", "x tables re im", _DFT, _dft)
DFT_INVERSE = _arguments("dft_synthesise", "re im tables bias x", _DFT, _dft)


BLOCKS = _arguments(
    "blocks",
    "source target",
    "images height width stride back",
    lambda s: {"source target": s.images * s.height * s.width * s.stride**2},
)


def _depthwise(s: Any) -> dict[str, int]:
    return {
        "x dx": s.batch * s.height * s.width * s.channels,
        "y dy u": s.batch * s.out_height * s.out_width * s.channels,
        "filters dfilters": s.channels * s.rows * s.columns,
        "bias dbias weight shift mean variance dweight dshift": s.channels,
        "moments": s.batch * 2 * s.channels,
    }


_DEPTHWISE = "batch height width channels rows columns top left out_height out_width"
DEPTHWISE_FORWARD = _arguments(
    "depthwise_forward",
    "x filters bias weight shift mean variance y moments",
    _DEPTHWISE,
    _depthwise,
    "eps",
    maps="x y",
)
DEPTHWISE_BACKWARD = _arguments(
    "depthwise_backward",
    "x dy u weight mean variance dweight dshift filters dx dfilters dbias",
    f"{_DEPTHWISE} fixed",
    _depthwise,
    "eps",
    maps="x dy u dx",
)


def _gelu_norm(s: Any) -> dict[str, int]:
    sums = "bias weight shift mean variance dbias dweight dshift"
    moments = getattr(s, "parts", 0) * 2 * s.channels
    return {"u residual y dy du": s.rows * s.channels, sums: s.channels, "moments": moments}


GELU_NORM_FORWARD = _arguments(
    "gelu_norm_forward",
    "u residual bias weight shift moments y mean variance",
    "rows channels fixed parts",
    _gelu_norm,
    "eps",
    maps="u residual y",
)
GELU_NORM_BACKWARD = _arguments(
    "gelu_norm_backward",
    "u dy bias weight mean variance du dbias dweight dshift",
    "rows channels fixed",
    _gelu_norm,
    "eps",
    maps="u dy du",
)
