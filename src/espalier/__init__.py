"""Espalier: networks whose weights carry structure from the first step."""

from espalier import certify, doctor, init, integrations, models, nn
from espalier.doctor import Diagnosis, diagnose
from espalier.errors import warn_of_namesake
from espalier.init import FilterCovariance, Mimetic, MimeticSSM, StructureReport, audit, structure_

__version__ = "0.1.0"

__all__ = [
    "Diagnosis",
    "FilterCovariance",
    "Mimetic",
    "MimeticSSM",
    "StructureReport",
    "audit",
    "certify",
    "diagnose",
    "doctor",
    "init",
    "integrations",
    "models",
    "nn",
    "structure_",
]

warn_of_namesake()
del warn_of_namesake
