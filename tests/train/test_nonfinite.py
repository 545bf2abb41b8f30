"""A loss that is not finite: the step, the tensor and the layer are named, and the last good checkpoint stays."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file
from standins import BlobSource, TinyNet, recipe
from torch import nn

from espalier import data, models
from espalier.cli.main import main
from espalier.errors import EspalierError
from espalier.recipes.base import Recipe
from espalier.train import RunInterrupted, load_run, train
from espalier.train.build import build_optimizer
from espalier.train.losses import build_loss
from espalier.train.nonfinite import LossGuard, find_nonfinite

pytestmark = pytest.mark.usefixtures("stand_ins")


def test_a_diverged_run_is_finished_and_says_where(tmp_path: Path) -> None:
    run = train(recipe(data_args={"poison_at": (2, 1)}), tmp_path / "run")
    assert run.result is not None
    assert run.result["diverged"] is True
    assert run.result["diverged_at"] == "step 12: the inputs of the batch"
    assert run.result["score"] is None
    assert run.result["epochs"] == 3
    assert run.rows[-1]["train_loss"] is None
    assert not (run.path / "final.safetensors").exists()
    with pytest.raises(EspalierError, match="diverged"):
        run.model()
    assert (run.path / "checkpoint" / "state.json").exists()
    again = train(recipe(data_args={"poison_at": (2, 1)}), tmp_path / "run")
    assert again.result == run.result
    assert (run.path / "checkpoint" / "state.json").exists()
    healthy = train(recipe(), tmp_path / "healthy")
    assert healthy.result is not None
    assert healthy.result["diverged"] is False


class Explodes(TinyNet):
    """A net whose layer gives what is not finite from the 13th training pass on: its output, or its gradient."""

    layer, gradient = "depthwise", False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.passes = 0
        layer = getattr(self, self.layer)
        if self.gradient:
            layer.weight.register_hook(lambda gradient: self.spoilt(gradient))
        else:
            layer.register_forward_hook(lambda module, inputs, output: self.spoilt(output))

    def spoilt(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor / 0 if self.training and self.passes >= 13 else tensor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.passes += self.training
        return super().forward(images)


@pytest.mark.parametrize("layer", ["stem", "depthwise", "norm", "head"])
@pytest.mark.parametrize("gradient", [False, True])
def test_the_layer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: str, gradient: bool) -> None:
    net = type("Explodes", (Explodes,), {"layer": layer, "gradient": gradient})
    monkeypatch.setattr(models, "build_model", lambda name, **_: net(4))
    run = train(recipe(), tmp_path / "run")
    assert run.result is not None
    where = run.result["diverged_at"]
    assert f"layer {layer!r} (" in where
    # Weights that a gradient has spoilt are seen by the next step.
    assert where.startswith(f"step {14 if gradient else 13}:")
    assert ("'weight' of" in where) == gradient


class Numbing(Explodes):
    """A net that makes numbers of what is none."""

    gradient = True

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images).nan_to_num(0.0)


class Overwritten(TinyNet):
    """A net whose buffer, which nobody reads, is no number from the 13th training pass on; a mask of −∞ beside it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("mask", torch.full((3,), -torch.inf))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.passes += torch.nan if self.training and self.passes >= 12 else float(self.training)
        return super().forward(images)


@pytest.mark.parametrize(
    ("net", "changes", "where"),
    [
        (Explodes, {"loss": "multi_margin"}, "step 13: the output of layer 'depthwise' "),
        (Numbing, {}, "the evaluation: 'weight' of layer "),
        (Numbing, {"ema_decay": 0.9}, "the evaluation: 'weight' of layer "),
        (Overwritten, {"ema_decay": 0.9}, "the evaluation: 'passes' of the model"),
    ],
)
@pytest.mark.parametrize("stop", [False, True])
def test_a_loss_that_hides_it_ends_no_run_as_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, net: Any, changes: dict[str, Any], where: str, stop: bool
) -> None:
    """max(0, NaN) is 0, and so the loss of a margin; and a net may have a number in place of what is none."""
    monkeypatch.setattr(models, "build_model", lambda name, **_: net(4))
    if stop:  # as a signal asks for a checkpoint of it
        monkeypatch.setattr(data, "build_source", lambda _: BlobSource(signal_at=(2, 2, signal.SIGTERM)))
    if stop:
        with pytest.raises(RunInterrupted, match="is finished"):
            train(recipe(**changes), tmp_path / "run")
        run = load_run(tmp_path / "run")
    else:
        run = train(recipe(**changes), tmp_path / "run")
    assert run.result is not None
    assert run.result["diverged"] is True
    assert run.result["score"] is None
    assert run.result["diverged_at"].startswith(where)
    assert not (run.path / "final.safetensors").exists()
    *healthy, last = run.rows
    assert all(row["test/accuracy"] > 0 for row in healthy)
    assert {value for name, value in last.items() if "/" in name} == {None} or net is Explodes
    for file in run.path.glob("checkpoint*/*.safetensors"):
        for name, tensor in load_file(file).items():
            assert tensor.isfinite().all() or name.endswith("/mask"), name


def test_scores_of_masked_classes_and_places_without_a_target_do_not_end_a_run() -> None:
    scores = torch.tensor([[-torch.inf, 2.0, 1.0], [torch.nan] * 3])
    targets = torch.tensor([1, -100])
    for loss in ("cross_entropy", "multi_margin"):
        assert build_loss(recipe(loss=loss))(scores, targets).isfinite()
        assert build_loss(recipe(loss=loss))(scores, targets.flip(0)).isnan()


@pytest.mark.parametrize("name", get_args(get_type_hints(Recipe)["optimizer"]))
def test_the_step_is_exact_however_late_somebody_looks(name: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, recipe(optimizer=name, lr=0.1))
    guard = LossGuard(optimizer, torch.device("cpu"))
    before: list[torch.Tensor] = []
    for step in range(20):
        loss = model(torch.ones(4, 3)).sum() * (float("nan") if step == 7 else 1.0)
        loss.backward()
        guard.note(loss.detach())
        before.append(model.weight.detach().clone())
        optimizer.step()
        optimizer.zero_grad()
    assert guard.healthy_steps() == 7
    assert not torch.equal(before[6], before[7])
    assert torch.equal(model.weight, before[7])  # the weights that the bad step saw


def test_healthy_passes_find_nothing_and_leave_no_hook() -> None:
    model = TinyNet(4)
    assert find_nonfinite(model, torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))) is None
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("epoch", [0, 1])
def test_the_command_ends_with_status_1_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], epoch: int
) -> None:
    monkeypatch.setattr(data, "build_source", lambda _: BlobSource(poison_at=(epoch, 2)))
    monkeypatch.setattr(models, "build_model", lambda name, **_: TinyNet(4))
    arguments = ["train", "digits_vit", "--epochs", "2", "--batch-size", "8", "--out", str(tmp_path / "run"), "--quiet"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--crop-padding", "0"])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("espalier: ")
    assert f"diverged in epoch {epoch + 1}, at step {5 * epoch + 3}: the inputs of the batch:" in line
    assert line.endswith("its last checkpoint is kept") == (tmp_path / "run/checkpoint").exists() == (epoch == 1)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_is_one_line_with_a_batch_to_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    class Hungry(BlobSource):
        def train_batch(self, *_: Any) -> Any:
            raise error

    monkeypatch.setattr(data, "build_source", lambda _: Hungry())
    with pytest.raises(EspalierError, match=r"batch_size 8 in 2 parts: try --accumulate 4 \(parts of 2") as caught:
        train(recipe(accumulate=2), tmp_path / "run")
    assert "\n" not in str(caught.value)
    with pytest.raises(EspalierError, match="choose a smaller model"):
        train(recipe(accumulate=8), tmp_path / "other")


def test_real_memory_that_runs_out_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Huge(BlobSource):
        def train_batch(self, *_: Any) -> Any:
            return torch.empty(os.sysconf("SC_PHYS_PAGES") * 4096 * 2**14), None

    monkeypatch.setattr(data, "build_source", lambda _: Huge())
    with pytest.raises(EspalierError, match="out of memory with batch_size 8 in 1 part: try --accumulate 2"):
        train(recipe(), tmp_path / "run")


def test_other_errors_pass_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(BlobSource):
        def train_batch(self, *_: Any) -> Any:
            raise RuntimeError("a defect")

    monkeypatch.setattr(data, "build_source", lambda _: Broken())
    with pytest.raises(RuntimeError, match="a defect"):
        train(recipe(), tmp_path / "run")
