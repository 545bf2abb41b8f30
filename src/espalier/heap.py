"""What a process of ours does with memory that is freed."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Have glibc's malloc keep what this process frees, for its next allocations; elsewhere nothing happens.

    A training step frees its activations and asks for the same sizes again. By default large blocks go back to the
    system each time, which hands out zeroed pages anew: thousands of page faults a step (docs/results/speed.md). The
    process then holds on to the most that it ever used. Settings that the user made in the environment stay. It cannot
    be undone, so it is for programs, and not for a function of a library.
    """
    names = getattr(os, "confstr_names", ())
    glibc = "CS_GNU_LIBC_VERSION" in names and (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if glibc and not chosen:
        malloc = ctypes.CDLL(None)
        malloc.mallopt(_TRIM_THRESHOLD, -1)  # the heap never shrinks
        malloc.mallopt(_MMAP_MAX, 0)  # and large blocks come from it, too
