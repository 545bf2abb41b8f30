"""The callback inside Lightning's own ``Trainer``, of both of its packages."""

from __future__ import annotations

import copy
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import broken_decay, images, lose_structure, vit
from torch import Tensor, nn
from torch.utils.data import DataLoader

import espalier
from espalier.integrations import UnhealthyModelError
from needs import needs_library

pytestmark = [
    needs_library("lightning", "lightning"),
    # What Lightning says of loaders, checkpoints and its own dependencies is none of ours.
    pytest.mark.filterwarnings("ignore:.*:UserWarning:(lightning|pytorch_lightning)"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR")


def lightning() -> Any:
    return importlib.import_module("lightning.pytorch")


def callback(**options: Any) -> Any:
    return espalier.integrations.lightning.StructureCallback(**options)


def module(net: nn.Module) -> Any:
    """Return a module around a network; it counts its steps."""

    class Classifier(lightning().LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net
            self.steps = 0
            self.lr, self.batch_size = 0.1, 4

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            self.steps += 1
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: list[Tensor], index: int) -> None:
            self.steps += 1

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(images().dataset, batch_size=self.batch_size)

    return Classifier(net)


def unstructured() -> nn.Module:
    """Return a ViT without structure: ours starts with some."""
    net = vit(seed=3)
    for seed, block in enumerate(net.blocks):
        lose_structure(block.attn, seed)
    return net


def trainer(folder: Path, watch: Any, *others: Any, **settings: Any) -> Any:
    settings = {"max_epochs": 1, "devices": 1, "logger": False, "enable_checkpointing": False, **settings}
    return lightning().Trainer(
        accelerator="cpu", callbacks=[watch, *others], default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, **settings,
    )  # fmt: skip


def test_clean_fit_prints_one_line_and_keeps_the_first_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = module(vit())
    before = copy.deepcopy(net.state_dict())
    watch = callback(initial_weights=tmp_path / "init.safetensors")
    trainer(tmp_path, watch).fit(net, images(), images())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("espalier")]
    assert len(lines) == 1
    assert [check.stage for check in watch.watch.checks] == ["start", "end"]
    assert watch.watch.optimizer is not None
    kept = watch.watch.initial_weights
    assert kept.keys() == before.keys()
    assert all(torch.equal(kept[name], before[name]) for name in before)
    assert not torch.equal(net.net.head.weight, before["net.head.weight"])


def test_planted_fault_stops_before_any_batch(tmp_path: Path) -> None:
    net = module(broken_decay())
    with pytest.raises(UnhealthyModelError, match="A_log"):
        trainer(tmp_path, callback()).fit(net, images(), images())
    assert net.steps == 0


def test_structure_is_written_at_the_start_of_the_fit_only(tmp_path: Path) -> None:
    reference = vit()
    espalier.structure_(reference, generator=torch.Generator().manual_seed(2))
    net, watch = module(vit()), callback(structure=True, seed=2)
    first = trainer(tmp_path, watch)
    first.fit(net, images())
    first.save_checkpoint(tmp_path / "last.ckpt")
    kept = watch.watch.initial_weights
    assert all(torch.equal(kept[f"net.{name}"], value) for name, value in reference.state_dict().items())

    resumed, watch = module(vit(seed=5)), callback(structure=True, seed=2)
    trainer(tmp_path, watch, max_epochs=1).fit(resumed, images(), ckpt_path=tmp_path / "last.ckpt")
    assert [check.stage for check in watch.watch.checks] == ["checkpoint loaded"]  # and nothing left to train
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), net.parameters(), strict=True))


def test_a_second_fit_writes_nothing_over_what_was_trained(tmp_path: Path) -> None:
    net, watch = module(vit()), callback(structure=True)
    fitting = trainer(tmp_path, watch)
    fitting.fit(net, images())
    first = watch.watch.initial_weights
    with torch.no_grad():
        net.net.blocks[0].attn.qkv.weight.add_(0.1)
    trained = net.net.blocks[0].attn.qkv.weight.clone()
    fitting.fit_loop.max_epochs = 2
    net.configure_optimizers = lambda: torch.optim.SGD(net.parameters(), lr=0.0)
    fitting.fit(net, images())
    assert fitting.global_step == 8
    assert torch.equal(net.net.blocks[0].attn.qkv.weight, trained)
    assert watch.watch.initial_weights is first
    assert [check.stage for check in watch.watch.checks] == ["start", "end", "start", "end"]


def finders(*names: str) -> list[Any]:
    settings = {
        "LearningRateFinder": {"num_training_steps": 3},
        "BatchSizeFinder": {"max_trials": 1, "steps_per_trial": 1},
    }
    return [getattr(lightning().callbacks, name)(**settings[name]) for name in names]


@pytest.mark.parametrize(
    "names", [("LearningRateFinder",), ("BatchSizeFinder",), ("LearningRateFinder", "BatchSizeFinder")]
)
def test_what_a_finder_puts_back_is_no_resumed_run(tmp_path: Path, names: tuple[str, ...]) -> None:
    reference = unstructured()
    espalier.structure_(reference, generator=torch.Generator().manual_seed(2))
    net, watch = module(unstructured()), callback(structure=True, seed=2)
    net.val_dataloader = images
    fitting = trainer(tmp_path, watch, *finders(*names))
    fitting.fit(net)
    assert [check.stage for check in watch.watch.checks] == ["start", "end"]
    kept, written = watch.watch.initial_weights, reference.state_dict()
    assert all(torch.equal(kept[f"net.{name}"], value) for name, value in written.items())
    # One more fit, and its finders, go on with what was trained.
    net.lr, trained = 0.0, copy.deepcopy(net.state_dict())
    trainer(tmp_path, watch, *finders("BatchSizeFinder")).fit(net)
    assert all(torch.equal(value, trained[name]) for name, value in net.state_dict().items())
    assert [check.stage for check in watch.watch.checks] == ["start", "end", "start", "end"]


@pytest.mark.parametrize("whole", [True, False])
def test_a_finder_does_not_hide_that_a_run_goes_on_from_a_checkpoint(tmp_path: Path, whole: bool) -> None:
    net = module(vit())
    first = trainer(tmp_path, callback(structure=True))
    first.fit(net)
    first.save_checkpoint(tmp_path / "last.ckpt")
    damaged = torch.load(tmp_path / "last.ckpt", weights_only=True)
    lose_structure(net.net.blocks[1].attn)
    damaged["state_dict"] = net.state_dict()
    if not whole:  # then Lightning tells no callback of it
        del damaged["callbacks"]
    torch.save(damaged, tmp_path / "damaged.ckpt")
    model = vit()
    espalier.structure_(model, generator=torch.Generator().manual_seed(0))
    again, watch = module(model), callback(structure=True)
    with pytest.raises(UnhealthyModelError, match=r"checkpoint loaded: net\.blocks\.1\.attn: structure lost"):
        trainer(tmp_path, watch, *finders("LearningRateFinder"), max_epochs=3).fit(
            again, ckpt_path=tmp_path / "damaged.ckpt"
        )
    assert torch.equal(again.net.blocks[1].attn.qkv.weight, net.net.blocks[1].attn.qkv.weight)


def test_another_trainer_goes_on_with_what_was_trained(tmp_path: Path) -> None:
    net, watch = module(vit()), callback(structure=True)
    trainer(tmp_path, watch).fit(net, images())
    net.lr, first, trained = 0.0, watch.watch.initial_weights, copy.deepcopy(net.state_dict())
    trainer(tmp_path, watch).fit(net, images())
    assert all(torch.equal(value, trained[name]) for name, value in net.state_dict().items())
    assert watch.watch.initial_weights is first
    other = module(vit(seed=4))
    trainer(tmp_path, watch).fit(other, images())
    assert watch.watch.initial_weights is not first
    assert watch.watch.report.layers[0].status == "written"


def test_a_fit_that_broke_off_and_a_search_between_go_on(tmp_path: Path) -> None:
    class Interrupt(lightning().Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise KeyError("mine")

    net, watch = module(vit()), callback(structure=True)
    with pytest.raises(KeyError, match="mine"):
        trainer(tmp_path, watch, Interrupt()).fit(net)
    fitting = trainer(tmp_path, watch)
    lightning().tuner.Tuner(fitting).lr_find(net, num_training=3, update_attr=False)
    net.lr, trained = 0.0, copy.deepcopy(net.state_dict())
    fitting.fit(net)
    assert all(torch.equal(value, trained[name]) for name, value in net.state_dict().items())
    assert [check.stage for check in watch.watch.checks] == ["start", "start", "end"]


def test_structure_asked_for_and_not_in_the_checkpoint_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = trainer(tmp_path, lightning().Callback())
    plain.fit(module(unstructured()), images())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    watch = callback(structure=True)
    trainer(tmp_path, watch, max_epochs=2).fit(module(unstructured()), images(), ckpt_path=tmp_path / "plain.ckpt")
    told = capsys.readouterr().out
    assert "structure was asked for, none was written" in told
    assert "nothing was measured at this checkpoint" in told
    assert "healthy" not in told


def test_structure_lost_in_a_checkpoint_stops_the_resumed_run(tmp_path: Path) -> None:
    net = module(vit())
    first = trainer(tmp_path, callback(structure=True))
    first.fit(net, images())
    first.save_checkpoint(tmp_path / "last.ckpt")
    damaged = torch.load(tmp_path / "last.ckpt", weights_only=True)
    lose_structure(net.net.blocks[1].attn)
    damaged["state_dict"] = net.state_dict()
    torch.save(damaged, tmp_path / "damaged.ckpt")

    again = module(vit())
    with pytest.raises(UnhealthyModelError, match=r"checkpoint loaded: net\.blocks\.1\.attn: structure lost"):
        trainer(tmp_path, callback(), max_epochs=3).fit(again, images(), ckpt_path=tmp_path / "damaged.ckpt")
    assert again.steps == 0


def test_checkpoint_of_a_run_without_the_callback_is_held_against_the_model(tmp_path: Path) -> None:
    plain = trainer(tmp_path, lightning().Callback())
    plain.fit(module(unstructured()), images())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    net = module(vit())
    espalier.structure_(net, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UnhealthyModelError, match=r"checkpoint loaded: .*structure lost"):
        trainer(tmp_path, callback(), max_epochs=3).fit(net, images(), ckpt_path=tmp_path / "plain.ckpt")
    assert net.steps == 0


TWO_PROCESSES = """
import sys
from pathlib import Path
from test_lightning_callback import callback, images, module, trainer, vit
watch = callback(structure=True, initial_weights=Path(sys.argv[1]) / "init.safetensors")
trainer(Path(sys.argv[1]), watch, strategy="ddp_fork", devices=2).fit(module(vit()), images())
"""


def test_two_processes_write_the_same_and_print_once(tmp_path: Path) -> None:
    # In a process of its own, of one thread: OpenMP's threads do not live on in a fork, and what waits for them hangs.
    rooms = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(espalier.__file__).parents[1])]
    found = subprocess.run(
        [sys.executable, "-c", TWO_PROCESSES, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(rooms)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert sum(line.startswith("espalier, start") for line in found.stdout.splitlines()) == 1
    reference = vit()
    espalier.structure_(reference, generator=torch.Generator().manual_seed(0))
    kept = load_file(tmp_path / "init.safetensors")
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(kept[f"net.{name}"], value, msg=name)
