"""Espalier: networks whose weights carry structure from the first step."""

from espalier import certify, init, models, nn
from espalier.init import FilterCovariance, Mimetic, MimeticSSM, StructureReport, audit, structure_

__version__ = "0.1.0"

__all__ = [
    "FilterCovariance",
    "Mimetic",
    "MimeticSSM",
    "StructureReport",
    "audit",
    "certify",
    "init",
    "models",
    "nn",
    "structure_",
]
