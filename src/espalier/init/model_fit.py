"""Read strengths off a trained model: the arguments with which ``structure_`` starts another model like this one."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from espalier.errors import EspalierError
from espalier.init.attention.mimetic import as_tuples
from espalier.init.attention.near_identity import full_precision
from espalier.init.families import FAMILIES, LayerFit, Specs, family_of
from espalier.init.families.base import nowhere
from espalier.init.layouts import Skipped, locate_layers
from espalier.init.layouts.outside import leaves_outside_alone


@dataclass(frozen=True)
class StructureFit:
    """The fits of a model's layers, in module order and family by family; prints as a table.

    Attributes:
        rows: the fits of every family that the model has, by the keyword of ``structure_``.
    """

    rows: Mapping[str, tuple[LayerFit, ...]]

    def specs(self) -> Specs:
        """Return the arguments of ``structure_``; ``None`` for a family that the model had none of."""
        # One entry a family, and Specs names them.
        return {kind: family.spec(self.rows.get(kind, ())) for kind, family in FAMILIES.items()}  # type: ignore[return-value]

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and dictionaries for JSON, without rows that ask for nothing (filters all equal)."""
        rows = {kind: [asdict(row) for row in rows] for kind, rows in self.rows.items()}  # type: ignore[call-overload]
        return {kind: [row for row in found if all(map(_is_fitted, row.values()))] for kind, found in rows.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StructureFit:
        """Return the fit that ``to_dict`` gave.

        Raises:
            KeyError: a family that is not known.
            AttributeError, TypeError, ValueError: rows with other fields, or with values that no fit has.
        """
        rows: dict[str, tuple[LayerFit, ...]] = {}
        for kind, given in data.items():
            found = [{key: as_tuples(value) for key, value in row.items()} for row in given]
            if not all(_is_fitted(value) for row in found for value in row.values()):
                raise ValueError(f"{kind}: a value that is no finite number")
            rows[kind] = tuple(FAMILIES[kind].row(**row) for row in found)
        whole = cls(rows)
        _ = str(whole), whole.specs()  # a number where a name or a pair should be shows here
        return whole

    def __str__(self) -> str:
        return "\n".join(line for kind, rows in self.rows.items() for line in FAMILIES[kind].lines(rows))


def _is_fitted(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_fitted, value))
    return isinstance(value, str) or (type(value) in (int, float) and abs(value) <= sys.float_info.max)


@torch.no_grad()
@full_precision()
@leaves_outside_alone
def fit(model: nn.Module) -> StructureFit:
    """Fit every layer that a layout recognises and say what to ask ``structure_`` for.

    Attention: both products to αZ + βI. State-space layers: Ā, Δ, the correlation of W_C and W_B, the convolution.
    Depthwise filters: σ of the closed form. ``structure_(other, **fit(trained).specs())`` starts another model, of any
    width and depth, with this one's strengths: the noise is fresh, only its size and the identity's are taken over.

    Args:
        model: a trained model, or what ``skeleton`` makes of a checkpoint.

    Raises:
        EspalierError: the model has no layer that a layout recognises, or a layer's weights are damaged (NaN), or
            have no numbers (on the meta device, fake tensors).
    """
    rows: dict[str, list[LayerFit]] = {kind: [] for kind in FAMILIES}
    why = "register a layout for its layers"
    for layer in locate_layers(model):
        with layer.open() as weights:
            if isinstance(weights, Skipped):
                why = f"{layer.name or 'it'}: {weights.reason}"
                continue
            if place := nowhere(weights):
                raise EspalierError(f"layer {layer.name!r} is {place}: load its weights, then fit")
            family = family_of(weights)
            damage = family.damage(weights, family.sums(weights)) or family.excess(family.measure(weights))
            if damage:
                raise EspalierError(f"layer {layer.name!r} cannot be fitted: {damage}: fit a model that trained well")
            rows[family.kind].append(family.placed(family.fit(layer.name, weights), layer.place))
    if not any(rows.values()):
        raise EspalierError(f"model {type(model).__name__} has no structure to fit: {why}")
    return StructureFit({kind: tuple(found) for kind, found in rows.items() if found})
