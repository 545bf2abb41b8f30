from __future__ import annotations

import math

import pytest
import torch
from standins import recipe
from torch import Tensor

from espalier.errors import EspalierError
from espalier.train.losses import build_loss, target_count

N, C = 7, 5


def scores(dtype: torch.dtype = torch.float32) -> Tensor:
    return 3 * torch.randn(N, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def plain_cross_entropy(logits: Tensor, targets: Tensor) -> float:
    """Σ −p log q in float64, written out."""
    total = 0.0
    for row, wanted in zip(logits.double().tolist(), targets.double().tolist(), strict=True):
        log_sum = math.log(sum(math.exp(value) for value in row))
        total -= sum(p * (value - log_sum) for p, value in zip(wanted, row, strict=True))
    return total


LABELS = torch.tensor([0, 4, 2, 2, 1, 3, 0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_hard_and_soft_agree_with_the_formula(smoothing: float) -> None:
    loss = build_loss(recipe(label_smoothing=smoothing))
    hard = torch.eye(C)[LABELS]
    soft = 0.6 * hard + 0.4 * hard.roll(1, 0)
    for targets, truth in ((LABELS, hard), (soft, soft)):
        smooth = (1 - smoothing) * truth + smoothing / C
        assert loss(scores(), targets).item() == pytest.approx(plain_cross_entropy(scores(), smooth), rel=1e-6)


def test_evaluation_does_not_smooth() -> None:
    loss = build_loss(recipe(label_smoothing=0.3), smoothing=False)
    assert loss(scores(), LABELS).item() == pytest.approx(plain_cross_entropy(scores(), torch.eye(C)[LABELS]), rel=1e-6)


@pytest.mark.parametrize("name", ["cross_entropy", "multi_margin", "tempered_cross_entropy", "logit_annealing"])
def test_ignored_tokens_carry_no_loss(name: str) -> None:
    loss = build_loss(recipe(loss=name))
    tokens = torch.stack([LABELS, LABELS.flip(0)])
    logits = torch.stack([scores(), scores() - 1.0]).requires_grad_()
    tokens[0, 2] = tokens[1, 5] = -100
    kept = tokens.flatten() != -100
    alone = loss(logits.flatten(0, 1)[kept], tokens.flatten()[kept])
    together = loss(logits, tokens)
    assert together.item() == pytest.approx(alone.item(), rel=1e-6)
    together.backward()
    assert logits.grad is not None
    assert not logits.grad.flatten(0, 1)[~kept].any()
    assert logits.grad.flatten(0, 1)[kept].any()
    assert int(target_count(tokens)) == 12


def test_multi_margin_against_the_formula() -> None:
    total = 0.0
    for row, label in zip(scores().tolist(), LABELS.tolist(), strict=True):
        total += sum(max(0.0, 0.8 - row[label] + row[j]) for j in range(C) if j != label) / C
    loss = build_loss(recipe(loss="multi_margin", loss_args={"margin": 0.8}))
    assert loss(scores(), LABELS).item() == pytest.approx(total, rel=1e-6)


def test_tempered_cross_entropy_against_the_formula() -> None:
    loss = build_loss(recipe(loss="tempered_cross_entropy", loss_args={"temperature": 0.5, "offset": 1.25}))
    hard = torch.eye(C)[LABELS]
    expected = 0.5 * plain_cross_entropy((scores() - 1.25 * hard) / 0.5, hard)
    assert loss(scores(), LABELS).item() == pytest.approx(expected, rel=1e-6)
    assert loss(scores(), hard).item() == pytest.approx(expected, rel=1e-6)


def test_logit_annealing_against_the_formula() -> None:
    t, offset, beta = 0.5, 1.25, 3.0
    total = 0.0
    for row, label in zip(scores().tolist(), LABELS.tolist(), strict=True):
        tempered = [(value - offset * (j == label)) / t for j, value in enumerate(row)]
        p = math.exp(tempered[label]) / sum(math.exp(value) for value in tempered)
        total -= t * (1 - p) ** beta * math.log(p)
    arguments = {"temperature": t, "offset": offset, "beta": beta}
    loss = build_loss(recipe(loss="logit_annealing", loss_args=arguments))
    assert loss(scores(), LABELS).item() == pytest.approx(total, rel=1e-6)
    plain, tempered_loss = (
        build_loss(recipe(loss=name, loss_args={"temperature": t, "offset": offset, **more}))(scores(), LABELS).item()
        for name, more in (("logit_annealing", {"beta": 0.0}), ("tempered_cross_entropy", {}))
    )
    assert plain == pytest.approx(tempered_loss, rel=1e-6)


def test_logit_annealing_has_finite_gradients_at_every_margin() -> None:
    logits = torch.tensor([[-200.0, 0.0], [0.0, 0.0], [200.0, 0.0]], requires_grad=True)
    build_loss(recipe(loss="logit_annealing"))(logits, torch.zeros(3, dtype=torch.long)).backward()
    assert logits.grad is not None
    assert logits.grad[:, 0].tolist()[0] == pytest.approx(-1.0)
    assert logits.grad[1, 0] < -0.1
    assert logits.grad[2].abs().max() == 0


def test_half_precision_scores_are_summed_in_float32() -> None:
    logits = scores(torch.bfloat16)
    loss = build_loss(recipe())(logits, LABELS)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain_cross_entropy(logits, torch.eye(C)[LABELS]), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "cross_entropy", "loss_args": {"margin": 1.0}}, "margin"),
        ({"loss": "multi_margin", "loss_args": {"margn": 1.0}}, "did you mean 'margin'"),
        ({"loss": "multi_margin", "label_smoothing": 0.1}, "label_smoothing"),
        ({"loss": "multi_margin", "loss_args": {"margin": -1}}, "margin is -1: give a number above 0"),
        ({"loss": "multi_margin", "loss_args": {"margin": 0}}, "margin is 0: give a number above 0"),
        ({"loss": "tempered_cross_entropy", "loss_args": {"temperature": 0.0}}, "temperature is 0.0: give a number"),
        ({"loss": "logit_annealing", "loss_args": {"beta": 0.5}}, "beta is 0.5: give a number from 1, or 0"),
        ({"loss": "hinge"}, "unknown loss 'hinge'"),
    ],
)
def test_bad_losses_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(EspalierError, match=message):
        build_loss(recipe(**changes))


@pytest.mark.parametrize("name", ["multi_margin", "logit_annealing"])
def test_losses_of_margins_refuse_soft_targets(name: str) -> None:
    with pytest.raises(EspalierError, match="class indices"):
        build_loss(recipe(loss=name))(scores(), torch.eye(C)[LABELS])
