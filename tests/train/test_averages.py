"""Averaged weights against an average that is written out, for whatever a model may keep beside its weights."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from standins import BlobSource, TinyNet, recipe
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from espalier import data, models
from espalier.train import RunInterrupted, train
from espalier.train.losses import build_loss

pytestmark = pytest.mark.usefixtures("stand_ins")


class Keeper(TinyNet):
    """A net with a statistic that it replaces, some that it changes in place, a count, and a mask of −∞."""

    mean: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, dropout=0.0)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.phase = nn.Parameter(torch.ones(num_classes, dtype=torch.complex64))

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * images.mean()
            self.count += 1
        scores: Tensor = super().forward(images - self.mean) * self.phase.real
        return scores + self.mask.softmax(0)[0] + self.count


@pytest.mark.parametrize(("stopped", "optimizer"), [(False, "adamw"), (True, "adam"), (True, "nadam")])
def test_averages_are_those_of_all_that_was_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool, optimizer: str
) -> None:
    nets: list[Keeper] = []
    seen: list[dict[str, Tensor]] = []

    def build(name: str, num_classes: int) -> Keeper:
        nets.append(Keeper(num_classes))
        return nets[-1]

    def note(stepped: torch.optim.Optimizer, *_: Any) -> None:
        trained = {id(p) for group in stepped.param_groups for p in group["params"]}
        net = next(net for net in nets if id(net.phase) in trained)
        seen.append({name: tensor.detach().clone() for name, tensor in net.state_dict().items()})

    monkeypatch.setattr(models, "build_model", build)
    asked: dict[str, Any] = {"ema_decay": 0.6, "optimizer": optimizer, "eval_batch_size": 30}
    hook = register_optimizer_step_post_hook(note)
    try:
        if stopped:
            with monkeypatch.context() as patch:
                patch.setattr(data, "build_source", lambda _: BlobSource(signal_at=(1, 2, signal.SIGTERM)))
                with pytest.raises(RunInterrupted):
                    train(recipe(**asked), tmp_path / "run")
        run = train(recipe(**asked), tmp_path / "run")
    finally:
        hook.remove()
    wanted = load_file(run.path / "start.safetensors")
    for updates, state in enumerate(seen, start=1):
        decay = min(0.6, (1 + updates) / (10 + updates))
        wanted = {name: decay * wanted[name] + (1 - decay) * tensor for name, tensor in state.items()}
    wanted |= {name: seen[-1][name] for name in ("count", "mask", "norm.num_batches_tracked")}
    final = load_file(run.path / "final.safetensors")
    assert final["count"] == len(seen) == 20
    assert final.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(final[name], tensor, msg=lambda text, name=name: f"{name}: {text}")
    inputs, labels = next(iter(BlobSource().eval_batches("test", 30)))
    with torch.no_grad():
        loss = build_loss(recipe())(run.model()(inputs), labels) / len(labels)
    assert run.rows[-1]["test/loss"] == pytest.approx(loss.item(), rel=1e-5)
