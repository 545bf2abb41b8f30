"""What the kernels are called with: each structure here is one of the C++ sources, field by field.

The library tells the size of its own structures when it is opened, and every call carries the size of ours.
"""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar


class Arguments(ctypes.Structure):
    """The base of all: its subclasses begin with their own size and the number of threads."""

    kernel: ClassVar[str]
    names: ClassVar[frozenset[str]]


KINDS: list[type[Arguments]] = []


def _arguments(kernel: str, pointers: str, integers: str, reals: str = "") -> type[Arguments]:
    """Return the structure of a kernel: pointers to tensors first, then sizes and flags, then numbers."""
    names = [(name, ctypes.c_void_p) for name in pointers.split()]
    fields: list[tuple[str, Any]] = [("size", ctypes.c_int64), ("threads", ctypes.c_int64), *names]
    fields += [(name, ctypes.c_int64) for name in integers.split()]
    fields += [(name, ctypes.c_double) for name in reals.split()]
    values = frozenset(name for name, _ in fields[2:])
    kind = type(kernel, (Arguments,), {"_fields_": fields, "kernel": kernel, "names": values})
    KINDS.append(kind)
    return kind


_SCAN = "batch length channels states piece groups gate_stride softplus"
SCAN_FORWARD = _arguments("scan_forward", "x delta bias a b c d gate initial y final starts", _SCAN)
SCAN_BACKWARD = _arguments(
    "scan_backward",
    "x delta bias a b c d gate starts dy dfinal dx ddelta dbias da db dc dd dgate dinitial",
    _SCAN,
)

_SSD = "batch length groups share width states chunk parts x_stride b_stride c_stride"
SSD_FORWARD = _arguments("ssd_forward", "x delta a b c d initial y final kept", _SSD)
SSD_BACKWARD = _arguments(
    "ssd_backward", "x delta a b c d initial y final kept dy dfinal dx ddelta da db dc dd dinitial", _SSD
)

_CONV = "batch length channels taps stride"
CONV_FORWARD = _arguments("conv_forward", "x weight bias y", _CONV)
CONV_BACKWARD = _arguments("conv_backward", "x weight bias dy dx dweight dbias", _CONV)

_NORM = "rows groups width stride items"
NORM_FORWARD = _arguments("norm_forward", "y z weight out", _NORM, "eps")
NORM_BACKWARD = _arguments("norm_backward", "y z weight dout dy dz dweight", _NORM, "eps")

PLANES_PRODUCT = _arguments(
    "planes_product",
    "a_re a_im b_re b_im c_re c_im",
    "count m k n a_batch a_row a_column b_batch b_row b_column c_batch c_row conj_a conj_b add alpha",
)
PLANES_FACTOR = _arguments("planes_factor", "re im", "count n batch row width")
_STEPS = "f_batch f_row x_batch x_row less_batch less_row z_batch z_row y_batch y_row"
PLANES_SOLVE = _arguments(
    "planes_solve",
    "f_re f_im x_re x_im less_re less_im z_re z_im y_re y_im",
    f"count rows n width {_STEPS} transposed conj",
)

_DFT = "lead width rows columns columns_first size_0 size_1 channels together"
DFT_FORWARD = _arguments("dft_analyse", "x tables re im", _DFT)
DFT_INVERSE = _arguments("dft_synthesise", "re im tables bias x", _DFT)

BLOCKS = _arguments("blocks", "source target", "images height width stride back")

_DEPTHWISE = "batch height width channels rows columns top left out_height out_width"
DEPTHWISE_FORWARD = _arguments("depthwise_forward", "x taps bias scale shift y", _DEPTHWISE)
DEPTHWISE_BACKWARD = _arguments("depthwise_backward", "x dy add taps dx dtaps dbias", f"{_DEPTHWISE} shares")

_GELU_NORM = "rows channels fixed"
GELU_NORM_FORWARD = _arguments("gelu_norm_forward", "u residual bias weight shift y mean variance", _GELU_NORM, "eps")
GELU_NORM_BACKWARD = _arguments(
    "gelu_norm_backward", "u dy bias weight mean variance du dbias dweight dshift", _GELU_NORM, "eps"
)
