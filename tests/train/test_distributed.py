"""One, two and four processes, whole models and shards: the same curves, and checkpoints that move between them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import standins
import torch
from safetensors.torch import load_file

from espalier.errors import EspalierError
from espalier.train import Run, load_run, train
from espalier.train.checkpoint import Counters, load_checkpoint, save_checkpoint

SCRIPT = str(Path(__file__).parent / "distributed_runs.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def launch(*words: object, by: tuple[str, ...] = ()) -> str:
    """Run the script of distributed runs, and return what it says."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *by, SCRIPT, *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def assert_same_run(found: Run, expected: Run) -> None:
    muon = expected.recipe.optimizer == "muon"  # it iterates in bf16, so that last digits grow
    half = muon or expected.recipe.precision == "bf16"
    weights, wanted = (load_file(run.path / "final.safetensors") for run in (found, expected))
    assert weights.keys() == wanted.keys()
    for name, weight in wanted.items():
        tolerance = {"rtol": 3e-2, "atol": 3e-2 if muon else 3e-3} if half else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(weights[name], weight, **tolerance)
    assert [row["step"] for row in found.rows] == [row["step"] for row in expected.rows]
    for left, right in zip(found.rows, expected.rows, strict=True):
        for key in ("train_loss", "test/loss", "test/accuracy"):
            assert (left[key] is None) == (right[key] is None)
            # An image on the border between two classes may fall to the other side.
            most = {"abs": 1.5 / 21} if key == "test/accuracy" else {"rel": 0.1 if half else 2e-5}
            assert (left[key] or 0.0) == pytest.approx(right[key] or 0.0, **most)
    assert found.result is not None
    assert expected.result is not None
    assert found.result["steps"] == expected.result["steps"]


@pytest.mark.slow
def test_every_strategy_and_number_of_processes_gives_the_same_run(tmp_path: Path) -> None:
    # Checkpoints move, too: a from one process to four shards to two copies, b from two shards to four copies to one.
    # A signal in the last step of an epoch is agreed on in the evaluation behind it (images-b, tokens-a).
    groups = """
        1:ddp images:whole ragged:whole tokens:whole blocks:whole matrices:whole orthogonal:whole images-a:stop=2.1
                tokens-a:stop=1.2 orthogonal-a:stop=1.2 --
        2:fsdp2 images-2f:whole tokens-2f:whole blocks-2f:whole matrices-2f:whole images-b:stop=1.4 blocks-b:stop=2.0
                ragged-2f:whole orthogonal-2f:whole orthogonal-a:stop=2.1 --
        4:fsdp2 images-4f:whole images-a:stop=3.2 tokens-a:stop=2.2 orthogonal-a:end --
        4:ddp tokens-4d:whole images-b:stop=3.0 blocks-b:stop=3.1 ragged-4d:whole --
        2:ddp images-a:end tokens-a:end blocks-2d:whole matrices-2d:whole ragged-2d:whole --
        1:ddp images-b:end blocks-b:end
    """
    launch(tmp_path, *groups.split())
    paths = sorted(path for path in tmp_path.iterdir() if "-" in path.name)
    assert len(paths) == 17
    for path in paths:
        assert_same_run(load_run(path), load_run(tmp_path / path.name.partition("-")[0]))
        assert not list(path.glob("checkpoint*"))


def test_a_parameter_without_a_gradient_is_named(tmp_path: Path) -> None:
    said = launch(tmp_path, "2:ddp", "idle:refused", "--", "2:fsdp2", "idle-f:whole")
    assert said.splitlines() == 2 * [
        "model idle: parameter 'idle.weight' takes no part in its output, and copies of a model on several processes "
        "need a gradient of all: call requires_grad_(False) on it, or choose strategy 'fsdp2'"
    ]
    assert (load_run(tmp_path / "idle-f").result or {})["steps"] == 20


def test_torchrun_starts_one_run(tmp_path: Path) -> None:
    launch(tmp_path, "fsdp2", "tokens:whole", by=TORCHRUN)
    assert (load_run(tmp_path / "tokens").result or {})["steps"] == 12


def test_slurm_tasks_form_one_run(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    slurm = {
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NNODES": "1",
        "SLURM_NODELIST": "localhost",
        "SLURM_JOB_NAME": "espalier",
        "SLURM_JOB_ID": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    tasks = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(tmp_path), "fsdp2", "tokens:whole"],
            env={**os.environ, **slurm, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [task.communicate()[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], errors
    assert (load_run(tmp_path / "tokens").result or {})["steps"] == 12


@pytest.mark.usefixtures("stand_ins")
def test_what_processes_cannot_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EspalierError, match=r"start them with torchrun"):
        train(standins.recipe(), tmp_path / "run", strategy="fsdp2")
    with pytest.raises(EspalierError, match="unknown strategy 'fsdp': did you mean 'fsdp2'"):
        train(standins.recipe(), tmp_path / "run", strategy="fsdp")  # type: ignore[arg-type]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(EspalierError, match=r"batch_size 8 cannot be shared evenly by 3 .* multiple of 3"):
        train(standins.recipe(), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_swa_utils_cannot_average_what_we_average() -> None:
    """The reason for averages of our own: torch's take the first update for the start, whatever the weights were."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    from espalier.train.ema import AveragedWeights

    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    theirs, ours = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)), AveragedWeights(model, 0.5)
    torch.nn.init.ones_(model.weight)
    theirs.update_parameters(model)
    ours.update()
    assert theirs.module.weight.item() == 1.0
    assert ours.tensors["weight"].item() == pytest.approx(1 - 2 / 11)


def test_a_checkpoint_of_another_model_is_named(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    save_checkpoint(tmp_path, model, torch.optim.AdamW(model.parameters()), {}, Counters(), [])
    other = torch.nn.Linear(3, 4)
    with pytest.raises(EspalierError, match=r"model/bias is \(2,\) there and \(4,\) here") as caught:
        load_checkpoint(tmp_path, other, torch.optim.AdamW(other.parameters()), {}, 5)
    assert "\n" not in str(caught.value)
