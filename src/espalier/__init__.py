"""Espalier: networks whose weights carry structure from the first step."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from espalier.errors import warn_of_namesake

if TYPE_CHECKING:
    from espalier import certify, doctor, init, integrations, models, nn
    from espalier.doctor import Diagnosis, diagnose
    from espalier.init import FilterCovariance, Mimetic, MimeticSSM, StructureReport, audit, structure_
    from espalier.study import compare

__version__ = "0.1.0"

__all__ = [
    "Diagnosis",
    "FilterCovariance",
    "Mimetic",
    "MimeticSSM",
    "StructureReport",
    "audit",
    "certify",
    "compare",
    "diagnose",
    "doctor",
    "init",
    "integrations",
    "models",
    "nn",
    "structure_",
]

# Where names come from that are neither rooms of their own nor of the room ``init``.
_HOMES = {"Diagnosis": "doctor", "compare": "study", "diagnose": "doctor"}
_ROOMS = ("certify", "doctor", "init", "integrations", "models", "nn")


def __getattr__(name: str) -> Any:
    # A name is imported when it is first asked for, so that `espalier --help` does not wait for torch.
    if name not in __all__:
        raise AttributeError(f"module 'espalier' has no attribute {name!r}")
    room = import_module(f"espalier.{name if name in _ROOMS else _HOMES.get(name, 'init')}")
    value = globals()[name] = room if name in _ROOMS else getattr(room, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


warn_of_namesake()
del warn_of_namesake
