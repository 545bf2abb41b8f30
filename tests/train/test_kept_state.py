"""What a model keeps beside its weights: a resumed run has it, or the run is refused before its first step."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from standins import BlobSource, TinyNet, recipe
from torch import Tensor, nn

from espalier import data, models
from espalier.errors import EspalierError
from espalier.train import RunInterrupted, train

pytestmark = pytest.mark.usefixtures("stand_ins")


class Remembering(TinyNet):
    """A net with buffers that are no part of its state: changed in place, replaced, growing, and first not there."""

    total: Tensor
    mean: Tensor
    history: Tensor
    last: Tensor | None

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        for name, value in (("total", torch.zeros(())), ("mean", torch.zeros(3)), ("history", torch.zeros(0))):
            self.register_buffer(name, value, persistent=False)
        self.head.register_buffer("last", None, persistent=False)
        self.register_buffer("again", self.total, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = super().forward(images - self.mean[:, None, None])
        if self.training:
            if self.head.last is not None:
                scores = scores + self.head.last.real
            self.total += images.mean()
            self.mean = 0.9 * self.mean + 0.1 * images.mean((0, 2, 3))
            self.history = torch.cat([self.history, images.amax().view(1)])
            self.head.last = images.mean() * torch.ones((), dtype=torch.complex64)
        return scores + self.total + self.history.sum()


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_buffers_outside_of_the_state_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema_decay: float) -> None:
    monkeypatch.setattr(models, "build_model", lambda name, num_classes: Remembering(num_classes))
    asked = recipe(ema_decay=ema_decay)
    whole = train(asked, tmp_path / "whole")
    for stop in ((0, 1), (2, 4)):
        with monkeypatch.context() as patch:
            patch.setattr(data, "build_source", lambda _, stop=stop: BlobSource(signal_at=(*stop, signal.SIGTERM)))
            with pytest.raises(RunInterrupted):
                train(asked, tmp_path / "cut")
    cut = train(asked, tmp_path / "cut")
    assert (cut.path / "final.safetensors").read_bytes() == (whole.path / "final.safetensors").read_bytes()
    timed = {"seconds", "step_seconds"}
    for one, other in zip(cut.rows, whole.rows, strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


class Counting(nn.Dropout):
    def get_extra_state(self) -> Any:
        return {"passes": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


def counting() -> nn.Module:
    net = TinyNet(4)
    net.dropout = Counting()
    return net


def doubly_exact() -> nn.Module:
    net = TinyNet(4)
    net.head.register_parameter("turn", nn.Parameter(torch.ones(2, dtype=torch.complex128)))
    return net


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (counting, "model tiny: layer 'dropout' has a get_extra_state, which no run keeps: keep its state in buffers"),
        (doubly_exact, r"model tiny: head\.turn is of torch\.complex128, which no file of weights holds: "),
    ],
)
def test_what_no_file_holds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Any, words: str) -> None:
    monkeypatch.setattr(models, "build_model", lambda name, **_: build())
    with pytest.raises(EspalierError, match=words) as caught:
        train(recipe(), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
