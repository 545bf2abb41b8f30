"""A new family is one entry: a class, its views and a layout, and then the whole of the library works on it."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import espalier
from espalier.errors import EspalierError
from espalier.init import AttentionWeights, Mimetic, StructureFit, fit, register_layout
from espalier.init.families import FAMILIES, Family
from espalier.init.families.base import Place


@dataclass(frozen=True)
class ScaleWeights:
    """Views of a family that the library does not know."""

    kind: ClassVar[str] = "scale"
    weight: Tensor
    note: str = ""


@dataclass(frozen=True)
class ScaleFit:
    """What a scale is near to."""

    layer: str
    value: float


class ScaleFamily(Family):
    """Scales, which are set to one number."""

    kind = "scale"
    default = 2.0
    row = ScaleFit

    def write(self, weights: ScaleWeights, spec: float, place: Place, generator: torch.Generator) -> str:
        weights.weight.fill_(spec + place[0])
        return f"scale {spec + place[0]}"

    def measure(self, weights: ScaleWeights) -> dict[str, float]:
        return {"mean": float(weights.weight.mean()), "spread": float(weights.weight.std())}

    def verify(self, weights: ScaleWeights, spec: float, place: Place, measured: Mapping[str, float]) -> str:
        return "" if measured["mean"] == spec + place[0] else "it is another"

    def scores(self, measured: Mapping[str, float]) -> dict[str, float]:
        return {"constant": 2.0 if measured["spread"] == 0 else 0.0}

    def fit(self, name: str, weights: ScaleWeights) -> ScaleFit:
        return ScaleFit(name, float(weights.weight.mean()))

    def spec(self, rows: Sequence[ScaleFit]) -> Any:
        return rows[0].value if rows else None


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(5))


@register_layout(Scale)
def scale(module: Scale) -> Any:
    return ScaleWeights(module.weight.detach())


def test_a_family_of_ones_own_is_written_audited_and_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "scale", ScaleFamily())
    model = nn.Sequential(Scale(), nn.MultiheadAttention(24, 3), Scale())
    specs: dict[str, Any] = {"scale": 3.0}
    report = espalier.structure_(model, **specs, guard=True)
    assert [(row.kind, row.status) for row in report.layers] == [
        ("scale", "written"), ("attention", "written"), ("scale", "written")
    ]  # fmt: skip
    assert model[2].weight.tolist() == [4.0] * 5
    assert espalier.audit(model, against=report).ok
    found = StructureFit.from_dict(fit(model).to_dict())
    assert found.specs()["scale"] == 3.0  # type: ignore[typeddict-item]
    model[0].weight.data[0] = 7.0
    after = espalier.audit(model, against=report)
    assert [row.status for row in after.layers] == ["lost", "present", "present"]
    assert "constant" in after.layers[0].note
    specs = {"scale": None}
    assert [row.kind for row in espalier.structure_(model, **specs).layers] == ["attention"]


def test_no_general_module_names_a_family() -> None:
    room = Path(espalier.init.__file__).parent
    for name in ("structure.py", "model_fit.py", "matching.py", "report.py"):
        tree = ast.parse((room / name).read_text())
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert not texts & set(FAMILIES), name
        known = {part for part in names | imported if part.startswith(("Attention", "SSM", "Depthwise", "Mimetic"))}
        assert not known, (name, known)


def test_an_unknown_family_is_refused_in_one_line() -> None:
    with pytest.raises(EspalierError, match="did you mean 'attention'"):
        espalier.structure_(nn.MultiheadAttention(24, 3), atention=None)  # type: ignore[call-arg]


@pytest.mark.parametrize("heads", [(3, 3, 64), (4, 4, 16), (12, 12, 32), (4, 2, 16), (8, 1, 24)])
@pytest.mark.parametrize("broken", ["qk", "vo"])
def test_products_that_were_not_written_do_not_pass_as_verified(heads: tuple[int, int, int], broken: str) -> None:
    count, groups, width = heads
    dim, generator = count * width, torch.Generator().manual_seed(0)

    def drawn(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    weights = AttentionWeights(
        drawn(dim, dim), drawn(groups * width, dim), drawn(groups * width, dim), drawn(dim, dim), count, groups
    )
    family, spec = FAMILIES["attention"], Mimetic()
    family.write(weights, spec, (0, 1), generator)
    assert family.verify(weights, spec, (0, 1), family.measure(weights)) == ""
    for change in (lambda t: drawn(*t.shape), torch.neg, torch.zeros_like):
        kept = weights.k.clone(), weights.out.clone()
        target = weights.k if broken == "qk" else weights.out
        target.copy_(change(target))
        assert family.verify(weights, spec, (0, 1), family.measure(weights)).startswith(broken)
        weights.k.copy_(kept[0])
        weights.out.copy_(kept[1])
