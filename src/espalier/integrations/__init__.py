"""In other training loops: the doctor and the audit at the start, after a checkpoint is loaded, and at the end."""

from __future__ import annotations

import importlib
from types import ModuleType

from espalier.integrations.watch import StructureWatch, UnhealthyModelError, WatchCheck

__all__ = ["StructureWatch", "UnhealthyModelError", "WatchCheck"]

# Each imports its library when it is first named.
_LIBRARIES = ("hub", "lightning", "transformers")


def __getattr__(name: str) -> ModuleType:
    if name in _LIBRARIES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
