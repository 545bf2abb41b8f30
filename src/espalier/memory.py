"""How much memory a machine has left: what would not fit is refused before it is begun."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path


def is_exhausted(error: BaseException) -> bool:
    """Return whether an error says that there is too little memory, on whatever device."""
    return isinstance(error, MemoryError) or any(t in str(error) for t in ("out of memory", "allocate memory"))


def free_memory() -> float:
    """Return how many bytes of memory are free; infinity where the system does not say."""
    free = math.inf  # where nothing says how much there is, nothing is refused
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        # A container's limit, where there is one; else the word "max".
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return free
