"""The families of layers that carry structure. A new one is a class here, its views, and an entry in this file."""

from __future__ import annotations

from typing import TypedDict

from espalier.init.attention.mimetic import Mimetic
from espalier.init.families.attention import AttentionFamily, AttentionFit
from espalier.init.families.base import Family, LayerFit
from espalier.init.families.depthwise import DepthwiseFamily, DepthwiseFit
from espalier.init.families.ssm import SSMFamily, SSMFit
from espalier.init.filters.spec import FilterCovariance
from espalier.init.layouts import Skipped
from espalier.init.layouts.registry import Weights
from espalier.init.ssm import MimeticSSM

__all__ = [
    "FAMILIES",
    "AttentionFit",
    "DepthwiseFit",
    "Family",
    "LayerFit",
    "SSMFit",
    "family_of",
]

FAMILIES: dict[str, Family] = {family.kind: family for family in (AttentionFamily(), SSMFamily(), DepthwiseFamily())}


class Specs(TypedDict, total=False):
    """What to write into each family, as keyword arguments; ``None`` leaves one alone."""

    attention: Mimetic | None
    ssm: MimeticSSM | None
    depthwise: FilterCovariance | None


def family_of(found: Weights | Skipped) -> Family:
    """Return the family of a layer's views, or of a layer that was skipped."""
    return FAMILIES[found.kind]
