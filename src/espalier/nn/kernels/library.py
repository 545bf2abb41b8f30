"""Find, check and open the compiled kernels that came with the package, and call them."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import math
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from espalier.nn.kernels.arguments import KINDS, Arguments, counts

FOLDER = Path(__file__).parent
_SUFFIX = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}
PRECISE = (torch.float32, torch.float64)
LARGE = 1 << 20  # bytes from which a tensor's pages count
_DLPACK = {torch.float32: 2, torch.float64: 2, torch.bfloat16: 4}  # the codes of its kinds of numbers
_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_CLASSES = (Tensor, torch.nn.Parameter)
# What espalier_processor_level() answers at least where a library can run; the fifth is the fourth with AVX512-BF16.
_X86_LEVELS = {"x86_64_v4_bf16": 5, "x86_64_v4": 4, "x86_64_v3": 3, "x86_64_v2": 2}


class KernelError(RuntimeError):
    """The kernels are not here or cannot be used; the message says why."""


def load() -> Path:
    """Open the best library for this processor, and return its path.

    Raises:
        KernelError: there is none, or it is damaged, or made for other sources; the message says why.
    """
    return _library()[0]


def candidates() -> list[Path]:
    """Return the libraries for this machine, the fastest first, whether or not they were built."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return [FOLDER / f"{name}.so" for name in _X86_LEVELS]
    return [FOLDER / "arm64.so"] if machine in ("arm64", "aarch64") else []


def open_library(path: Path) -> ctypes.CDLL:
    """Open one library, if it is what the build wrote and its structures are ours.

    The checksum comes first: a truncated or overwritten library can crash the process while it is opened.

    Raises:
        KernelError: it is missing or damaged, or a structure has another size there.
    """
    try:
        wanted = path.with_suffix(".sha256").read_text().split()[0]
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, UnicodeDecodeError, IndexError) as error:
        raise KernelError(f"{path.name} is not in the package: {error}") from error
    if found != wanted:
        raise KernelError(f"{path.name} is damaged: its SHA-256 is not the one noted when it was built")
    try:
        library = ctypes.CDLL(str(path))
        for kind in KINDS:
            size = getattr(library, f"{kind.kernel}_size")
            size.restype = ctypes.c_int64
            if size() != ctypes.sizeof(kind):
                raise KernelError(f"{path.name} was built from other sources: {kind.kernel} takes {size()} bytes there")
        library.espalier_set_team.argtypes = [ctypes.c_void_p]
        library.espalier_set_team(_team())
        library.espalier_same.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        library.espalier_new_numbers.argtypes = [ctypes.c_int64] * 3
        library.espalier_new_numbers.restype = ctypes.c_void_p
        library.espalier_empty_cache.restype = None
    except (OSError, AttributeError) as error:
        raise KernelError(f"cannot use {path.name}: {error}") from error
    return library


@cache
def _library() -> tuple[Path, ctypes.CDLL]:
    paths = candidates()
    if not paths:
        raise KernelError(f"there are none for {platform.machine()}")
    lowest = open_library(paths[-1])
    if len(paths) == 1:
        return paths[0], lowest
    level = lowest.espalier_processor_level()
    if level == _X86_LEVELS["x86_64_v4_bf16"] and not lowest.espalier_fast_pairs():
        level -= 1
    complaint = f"this processor is below {paths[-1].stem}"
    for path in paths:
        if _X86_LEVELS[path.stem] <= level:
            try:
                return path, open_library(path)
            except KernelError as error:
                complaint = str(error)
    raise KernelError(complaint)


def _team() -> int | None:
    """Return the address of GOMP_parallel in the OpenMP runtime that torch has loaded, None if it has another kind.

    GNU's and LLVM's runtimes have it. They are found among what is loaded already: nothing new is.
    """
    if os.name != "posix":
        return None
    beside = Path(torch.__file__).parent
    bundled = itertools.chain(*(beside.glob(f"{place}/lib*omp*") for place in ("lib", "../torch.libs", ".dylibs")))
    for name in (*map(str, bundled), "libgomp.so.1", "libiomp5.so", "libomp.so"):
        try:
            runtime = ctypes.CDLL(name, mode=os.RTLD_NOLOAD)
            return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def usable(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = PRECISE) -> bool:
    """Return whether kernels may read these tensors' memory: plain strided CPU tensors of one of ``dtypes``.

    What has no memory of its own, or means something else than its memory says, goes the torch way: subclasses, fake
    and functional tensors, those wrapped by ``torch.func``, tensors with the negative or conjugate bit; and while a
    mode watches every operation, so do all.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    keys = _plain_keys()
    for tensor in tensors:  # a loop, as small networks ask this at every layer of every pass
        if tensor is None:
            continue
        if tensor.dtype not in dtypes or type(tensor) not in _CLASSES:
            return False
        if torch._C._dispatch_keys(tensor).raw_repr() not in keys:
            return False
        if not tensor.untyped_storage().data_ptr() and tensor.numel():
            return False
    return True


@cache
def _plain_keys() -> frozenset[int]:
    """Return the sets of dispatch keys of tensors that are their memory: every other kind bears a key of its own."""
    with torch.inference_mode():
        of_inference = torch.empty(0, device="cpu")
    with torch.inference_mode(False):
        plain = torch.empty(0, device="cpu")
    return frozenset(torch._C._dispatch_keys(tensor).raw_repr() for tensor in (plain, of_inference))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two contiguous tensors of one dtype and shape, which are ``usable``, hold the same bits."""
    return bool(_library()[1].espalier_same(one.data_ptr(), other.data_ptr(), one.nbytes))


def fresh(like: Tensor, *size: int) -> Tensor:
    """Return a contiguous tensor of unwritten memory, in ``like``'s dtype on the CPU; the kernels must have been found.

    Where it is large, its memory is what an earlier one has left: see memory.cpp.
    """
    count = math.prod(size)
    if count * like.itemsize >= LARGE:
        pointer = _library()[1].espalier_new_numbers(count, _DLPACK[like.dtype], 8 * like.itemsize)
        if pointer:
            return from_dlpack(_capsule(pointer, b"dltensor", None)).view(size)
    return torch.empty(size, dtype=like.dtype, device="cpu")


def empty_cache() -> None:
    """Give the system the memory that waits for the next large results of the CPU's kernels, as ``fresh`` hands it out.

    Up to 256 MiB wait as they are. More, at most what was in use at once, waits lazily freed (``MADV_FREE``): it counts
    as the process's until the system needs it. What tensors hold stays theirs. Without compiled kernels, or on another
    system than Linux, nothing waits.
    """
    if _library.cache_info().currsize:
        _library()[1].espalier_empty_cache()


def call(kind: type[Arguments], dtype: torch.dtype, **values: Tensor | float | None) -> None:
    """Run a kernel on the tensors' memory; the caller has made contiguous what must be so.

    Args:
        kind: the kernel's structure, from ``arguments``.
        dtype: the precision that it runs in.
        values: every field of the structure by name but ``size`` and ``threads``.

    Raises:
        KernelError: a tensor has another dtype, lies elsewhere, or has less memory than the sizes say.
    """
    if values.keys() != kind.names:
        raise TypeError(f"{kind.kernel} takes {sorted(kind.names)}, got {sorted(values)}")
    needed = counts(kind, 64 // dtype.itemsize, *[values[name] for name in kind.sizes])
    sums = torch.float32 if dtype == torch.bfloat16 else dtype
    given: dict[str, Any] = values
    for name in kind.pointers:
        tensor = given[name]
        if tensor is not None:
            given[name] = _address(kind, name, tensor, dtype if name in kind.maps else sums, needed.get(name, 0))
    arguments = kind(size=ctypes.sizeof(kind), threads=torch.get_num_threads(), **given)
    status = getattr(_library()[1], f"{kind.kernel}_{_SUFFIX[dtype]}")(ctypes.byref(arguments))
    if status:
        raise MemoryError(f"no memory for {kind.kernel}") if status == 2 else KernelError(f"{kind.kernel}: {status}")


def _address(kind: type[Arguments], name: str, tensor: Tensor, dtype: torch.dtype, count: int) -> int:
    """Return where a tensor's numbers lie, if there are ``count`` of them that a kernel could read."""
    if tensor.dtype is not dtype or not tensor.is_cpu:
        raise KernelError(f"{kind.kernel}: {name} is {tensor.dtype} on {tensor.device}, it takes {dtype} on cpu")
    address = tensor.data_ptr()
    if not address and tensor.numel():
        raise KernelError(f"{kind.kernel}: {name} of {tuple(tensor.shape)} has no memory that a kernel could read")
    if tensor.numel() < count or not tensor.is_contiguous():  # or its rows lie apart, within a wider tensor
        room = tensor.untyped_storage().nbytes() // tensor.itemsize - tensor.storage_offset()
        if room < count:
            raise KernelError(f"{kind.kernel}: {name} leads to {room} numbers, the sizes ask for {count}")
    return address
