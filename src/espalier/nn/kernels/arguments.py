"""What the kernels are called with: each structure here is one of the C++ sources, field by field.

The library tells the size of its own structures when it is opened, and every call carries the size of ours. Beside each
structure stands how many numbers its pointers lead to, so that no kernel is started on less memory than it reads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar

_Counts = Callable[..., dict[str, int]]


class Arguments(ctypes.Structure):
    """The base of all: its subclasses begin with their own size and the number of threads."""

    kernel: ClassVar[str]
    names: ClassVar[frozenset[str]]
    sizes: ClassVar[tuple[str, ...]]
    """The integers among them."""
    maps: ClassVar[frozenset[str]]
    """The pointers to numbers of the kernel's own precision; where that is bfloat16 the others are float32."""
    counts: ClassVar[_Counts]
    """From the sizes by name, and ``lanes`` (numbers in a block of vectors), how many numbers each pointer leads to."""


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
    return kind.counts(lanes=lanes, **dict(zip(kind.sizes, sizes, strict=True)))


def _named(counts: dict[str, int]) -> dict[str, int]:
    """Return a count for every name; keys hold several."""
    return {name: count for names, count in counts.items() for name in names.split()}


def _span(*axes: tuple[int, int]) -> int:
    """Return how many numbers lie from the first to the last of a grid with these (size, stride)."""
    return 1 + sum((size - 1) * stride for size, stride in axes) if all(size for size, _ in axes) else 0


def _scan(
    *, batch: int, length: int, channels: int, states: int, piece: int, groups: int, gate_stride: int, lanes: int,
    **_: Any,
) -> dict[str, int]:  # fmt: skip
    steps, cells = batch * length, channels * states
    every, maps = steps * channels, steps * states
    blocks = -(-length // piece) * -(-channels // lanes)
    return _named(
        {
            "x delta y dy dx ddelta dgate": every,
            "gate": _span((steps, gate_stride), (channels, 1)),
            "b c": maps,
            "db dc": groups * maps,
            "bias d": channels,
            "dbias dd": batch * channels,
            "a": cells,
            "initial final dfinal da dinitial": batch * cells,
            "starts": batch * blocks * states * lanes,
        }
    )


_SCAN = "batch length channels states piece groups gate_stride softplus"
SCAN_FORWARD = _arguments("scan_forward", "x delta bias a b c d gate initial y final starts", _SCAN, _scan)
SCAN_BACKWARD = _arguments(
    "scan_backward",
    "x delta bias a b c d gate starts dy dfinal dx ddelta dbias da db dc dd dgate dinitial",
    _SCAN,
    _scan,
)


def _ssd(
    *, batch: int, length: int, groups: int, share: int, width: int, states: int, chunk: int, parts: int,
    x_stride: int, b_stride: int, c_stride: int, lanes: int, **_: Any,
) -> dict[str, int]:  # fmt: skip
    steps, heads, maps = batch * length, groups * share, groups * states
    cells, between = batch * heads * states, -(-length // chunk) - 1
    return _named(
        {
            "x": _span((steps, x_stride), (heads * width, 1)),
            "y dy dx": steps * heads * width,
            "b": _span((steps, b_stride), (maps, 1)),
            "c": _span((steps, c_stride), (maps, 1)),
            "db dc": parts * steps * maps,
            "delta ddelta": steps * heads,
            "a d": heads,
            "da dd": batch * heads,
            "initial final dfinal dinitial": cells * width,
            "kept": cells * between * -(-width // lanes) * lanes,
        }
    )


_SSD = "batch length groups share width states chunk parts x_stride b_stride c_stride"
SSD_FORWARD = _arguments("ssd_forward", "x delta a b c d initial y final kept", _SSD, _ssd)
SSD_BACKWARD = _arguments(
    "ssd_backward", "x delta a b c d initial y final kept dy dfinal dx ddelta da db dc dd dinitial", _SSD, _ssd
)


def _conv(*, batch: int, length: int, channels: int, taps: int, stride: int, **_: Any) -> dict[str, int]:
    steps = batch * length
    return _named(
        {
            "x": _span((steps, stride), (channels, 1)),
            "y dy dx": steps * channels,
            "weight": channels * taps,
            "bias": channels,
            "dweight": batch * channels * taps,
            "dbias": batch * channels,
        }
    )


_CONV = "batch length channels taps stride"
CONV_FORWARD = _arguments("conv_forward", "x weight bias y", _CONV, _conv)
CONV_BACKWARD = _arguments("conv_backward", "x weight bias dy dx dweight dbias", _CONV, _conv)


def _norm(*, rows: int, groups: int, width: int, stride: int, items: int, **_: Any) -> dict[str, int]:
    channels, gate = groups * width, _span((rows, stride), (groups * width, 1))
    return _named({"y out dout dy dz": rows * channels, "z": gate, "weight": channels, "dweight": items * channels})


_NORM = "rows groups width stride items"
NORM_FORWARD = _arguments("norm_forward", "y z weight out", _NORM, _norm, "eps")
NORM_BACKWARD = _arguments("norm_backward", "y z weight dout dy dz dweight", _NORM, _norm, "eps")


def _both(**counts: int) -> dict[str, int]:
    """Return the counts of real and imaginary parts."""
    return {f"{name}_{part}": count for name, count in counts.items() for part in ("re", "im")}


def _product(*, count: int, m: int, k: int, n: int, **s: Any) -> dict[str, int]:
    return _both(
        a=_span((count, s["a_batch"]), (m, s["a_row"]), (k, s["a_column"])),
        b=_span((count, s["b_batch"]), (k, s["b_row"]), (n, s["b_column"])),
        c=_span((count, s["c_batch"]), (m, s["c_row"]), (n, 1)),
    )


PLANES_PRODUCT = _arguments(
    "planes_product",
    "a_re a_im b_re b_im c_re c_im",
    "count m k n a_batch a_row a_column b_batch b_row b_column c_batch c_row conj_a conj_b add alpha",
    _product,
)


def _factor(*, count: int, n: int, batch: int, row: int, **_: Any) -> dict[str, int]:
    return _named({"re im": _span((count, batch), (n, row), (n, 1))})


PLANES_FACTOR = _arguments("planes_factor", "re im", "count n batch row width", _factor)


def _solve(*, count: int, rows: int, n: int, **s: Any) -> dict[str, int]:
    lines = {"f": n, "x": rows, "less": rows, "z": rows, "y": rows}
    return _both(**{p: _span((count, s[f"{p}_batch"]), (r, s[f"{p}_row"]), (n, 1)) for p, r in lines.items()})


_STEPS = "f_batch f_row x_batch x_row less_batch less_row z_batch z_row y_batch y_row"
PLANES_SOLVE = _arguments(
    "planes_solve",
    "f_re f_im x_re x_im less_re less_im z_re z_im y_re y_im",
    f"count rows n width {_STEPS} transposed conj",
    _solve,
)


def _dft(
    *, lead: int, width: int, rows: int, columns: int, size_0: int, size_1: int, channels: int, **_: Any
) -> dict[str, int]:
    # How many frequencies are kept stands in the tables alone: the caller makes room for as many.
    tables = rows * (width // 2 + 1)
    for size in (width, size_0, size_1)[: 1 + lead]:
        odd = size // (size & -size)
        tables += size // 2 * 2
        if odd > 1:
            tables += sum(-(-few // 6) * 6 * few for few in (odd // 2, odd // 2 + 1))
    return {"x": rows * width * columns, "tables": tables, "bias": channels}


_DFT = "lead width rows columns columns_first size_0 size_1 channels together"
DFT_FORWARD = _arguments("dft_analyse", "x tables re im", _DFT, _dft)
DFT_INVERSE = _arguments("dft_synthesise", "re im tables bias x", _DFT, _dft)


def _blocks(*, images: int, height: int, width: int, stride: int, **_: Any) -> dict[str, int]:
    return _named({"source target": images * height * width * stride**2})


BLOCKS = _arguments("blocks", "source target", "images height width stride back", _blocks)


def _depthwise(
    *, batch: int, height: int, width: int, channels: int, rows: int, columns: int, out_height: int, out_width: int,
    shares: int = 0, **_: Any,
) -> dict[str, int]:  # fmt: skip
    pixels, results, taps = batch * height * width, batch * out_height * out_width, rows * columns
    return _named(
        {
            "x dx add": pixels * channels,
            "y dy": results * channels,
            "taps": taps * channels,
            "bias scale shift": channels,
            "dtaps": shares * taps * channels,
            "dbias": shares * channels,
        }
    )


_DEPTHWISE = "batch height width channels rows columns top left out_height out_width"
DEPTHWISE_FORWARD = _arguments("depthwise_forward", "x taps bias scale shift y", _DEPTHWISE, _depthwise, maps="x y")
DEPTHWISE_BACKWARD = _arguments(
    "depthwise_backward", "x dy add taps dx dtaps dbias", f"{_DEPTHWISE} shares", _depthwise, maps="x dy add dx"
)


def _gelu_norm(*, rows: int, channels: int, **_: Any) -> dict[str, int]:
    sums = "bias weight shift mean variance dbias dweight dshift"
    return _named({"u residual y dy du": rows * channels, sums: channels})


_GELU_NORM = "rows channels fixed"
GELU_NORM_FORWARD = _arguments(
    "gelu_norm_forward",
    "u residual bias weight shift y mean variance",
    _GELU_NORM,
    _gelu_norm,
    "eps",
    maps="u residual y",
)
GELU_NORM_BACKWARD = _arguments(
    "gelu_norm_backward",
    "u dy bias weight mean variance du dbias dweight dshift",
    _GELU_NORM,
    _gelu_norm,
    "eps",
    maps="u dy du",
)
