"""A factor of −1 anywhere between products and scores or output: such a layer is left alone, head by head."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import espalier
from espalier.errors import EspalierError

DIM, HEADS, WIDTH = 16, 4, 4


class Factor(nn.Module):
    """Multiplies by a number a head, or one for all; held as a parameter or as a buffer."""

    def __init__(self, values: Tensor, learned: bool) -> None:
        super().__init__()
        if learned:
            self.gain = nn.Parameter(values)
        else:
            self.register_buffer("gain", values)

    def forward(self, x_BHLK: Tensor) -> Tensor:
        return x_BHLK * self.gain.view(-1, 1, 1)


class Signed(nn.Module):
    """Self-attention whose scores or values are multiplied by given numbers; ``crossed`` groups meet other outputs."""

    def __init__(self, place: str, values: Tensor, learned: bool, groups: int = HEADS, crossed: bool = False) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.place, self.crossed = HEADS, groups, place, crossed
        self.q_proj = nn.Linear(DIM, HEADS * WIDTH)
        self.k_proj = nn.Linear(DIM, groups * WIDTH)
        self.v_proj = nn.Linear(DIM, groups * WIDTH)
        self.o_proj = nn.Linear(HEADS * WIDTH, DIM)
        self.factor = Factor(values, learned)

    def scores(self, x: Tensor) -> Tensor:
        q, k = (layer(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for layer in (self.q_proj, self.k_proj))
        q = self.factor(q) if self.place == "queries" else q
        return q @ k.repeat_interleave(HEADS // self.num_kv_heads, 1).mT / WIDTH**0.5

    def forward(self, x: Tensor) -> Tensor:
        v = self.v_proj(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2)
        v = (v.flip(1) if self.crossed else v).repeat_interleave(HEADS // self.num_kv_heads, 1)
        v = self.factor(v) if self.place == "values" else v
        return self.o_proj((self.scores(x).softmax(-1) @ v).transpose(1, 2).flatten(2))


def signs(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("place", ["queries", "values"])
@pytest.mark.parametrize("values", [signs(-1.0), signs(1, -1, 1, -1), signs(1, 1, 1, -1), signs(-1e-5)])
def test_the_other_sign_is_refused_in_any_head(place: str, values: Tensor, learned: bool) -> None:
    module = Signed(place, values, learned)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(EspalierError, match="with the other sign"):
        espalier.structure_(module, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values(), strict=True))


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("values", [signs(1, 2, 0.5, 1), signs(0.3)])
def test_other_factors_are_written_and_every_head_agrees_by_its_own_scores(values: Tensor, learned: bool) -> None:
    module = Signed("queries", values, learned)
    [row] = espalier.structure_(module, generator=torch.Generator().manual_seed(0)).layers
    assert row.status == "written"
    basis = torch.eye(DIM, dtype=torch.float64)[None]
    with torch.no_grad():
        scores_HLL = module.double().scores(basis)[0]
    diagonals_H = scores_HLL.diagonal(0, 1, 2).mean(1)
    assert (diagonals_H > 3 * (scores_HLL.sum((1, 2)) / DIM - diagonals_H).abs() / DIM).all()
    assert (diagonals_H > 0).all()


def test_a_verdict_on_one_sign_is_not_taken_for_the_other() -> None:
    """Two layers of one class and shape, in one model."""
    model = nn.ModuleList([Signed("queries", signs(1.0), True), Signed("queries", signs(-1.0), True)])
    rows = espalier.structure_(model, generator=torch.Generator().manual_seed(0)).layers
    assert [row.status for row in rows] == ["written", "skipped"]


def test_groups_of_values_are_told_apart() -> None:
    with pytest.raises(EspalierError, match="do not meet"):
        espalier.structure_(Signed("queries", signs(1.0), False, groups=2, crossed=True))


def test_single_gains_of_a_norm_below_zero_are_no_sign_of_the_layer() -> None:
    module = Signed("queries", signs(1.0), False)
    module.factor = nn.RMSNorm(WIDTH)  # type: ignore[assignment]
    with torch.no_grad():
        module.factor.weight[0] = -0.1  # type: ignore[index]
    [row] = espalier.audit(module).layers
    assert row.status == "absent"
