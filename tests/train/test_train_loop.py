from __future__ import annotations

import copy
import errno
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import standins
import torch
from safetensors.torch import load_file
from standins import BlobSource, TinyNet, recipe
from torch import nn

from espalier import data, recipes
from espalier.errors import EspalierError
from espalier.recipes.validation import MACHINE_FIELDS
from espalier.train import RunInterrupted, load_run, train
from espalier.train.build import build_bare_model, build_optimizer, freeze_

pytestmark = pytest.mark.usefixtures("stand_ins")

PLAIN = {"model_args": {"dropout": 0.0}, "clip_norm": 0.5, "ema_decay": 0.6, "weight_decay": 0.3, "eps": 1e-4}


def test_rows_and_result(tmp_path: Path) -> None:
    run = train(recipe(eval_every=3), tmp_path / "run")
    assert [row["epoch"] for row in run.rows] == [0, 3, 4]
    assert [row["step"] for row in run.rows] == [0, 15, 20]
    assert run.rows[0]["train_loss"] is None
    assert run.rows[0]["seconds"] == 0
    assert 0 < run.rows[1]["step_seconds"] <= run.rows[1]["seconds"] <= run.rows[2]["seconds"]
    assert run.result is not None
    assert run.result["score"] == run.rows[-1]["test/accuracy"] > run.rows[0]["test/accuracy"]
    assert (run.result["metric"], run.result["epochs"], run.result["steps"]) == ("test/accuracy", 4, 20)
    # The headline score is that of the weights that were saved.
    inputs, labels = next(iter(BlobSource().eval_batches("test", 100)))
    with torch.no_grad():
        accuracy = (run.model()(inputs).argmax(1) == labels).double().mean().item()
    # In a batch of another size, an image on the border between two classes may fall to the other side.
    assert run.result["score"] == pytest.approx(accuracy, abs=1.5 / len(labels))
    assert not torch.equal(run.model("start").stem.weight, run.model().stem.weight)
    names = {"recipe.json", "environment.json", "model.json", "start.safetensors", "metrics.jsonl", "manifest.json"}
    assert {path.name for path in run.path.iterdir()} == names | {"final.safetensors", "result.json"}
    # The build after the + ("2.14.1+cu130") is named by torch alone, not by every wheel of it.
    recorded = json.loads((run.path / "environment.json").read_text())["packages"]["torch"]
    assert recorded.partition("+")[0] == torch.__version__.partition("+")[0]


@pytest.mark.parametrize("kind", ["blobs", "soft", "echo"])
def test_accumulation_equals_the_big_batch(tmp_path: Path, kind: str) -> None:
    changes: dict[str, Any] = {"eps": 1e-3, "clip_norm": 1.0}
    if kind == "echo":  # micro-batches here have different numbers of targets
        changes |= {"dataset": "echo", "model": "tied"}
    else:
        changes |= {"data_args": {"soft": kind == "soft"}, "model_args": {"dropout": 0.0, "norm": False}}
    whole = train(recipe(**changes), tmp_path / "whole")
    parts = train(recipe(**changes, accumulate=4), tmp_path / "parts")
    start, left, right = (
        load_file(folder / f"{name}.safetensors")
        for folder, name in ((whole.path, "start"), (whole.path, "final"), (parts.path, "final"))
    )
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-5)
    assert any((left[name] - start[name]).abs().max() > 1e-2 for name in left)
    assert whole.rows[-1]["train_loss"] == pytest.approx(parts.rows[-1]["train_loss"], rel=1e-4)


def test_token_scores(tmp_path: Path) -> None:
    run = train(recipe(dataset="echo", model="tied", epochs=1), tmp_path / "run")
    tokens, targets = next(iter(standins.EchoSource().eval_batches("test", 8)))
    with torch.no_grad():
        answers = run.model()(tokens).argmax(-1)
    right = total = strings = 0
    for answer, target in zip(answers.tolist(), targets.tolist(), strict=True):
        asked = [(a, t) for a, t in zip(answer, target, strict=True) if t != -100]
        right += sum(a == t for a, t in asked)
        total += len(asked)
        strings += all(a == t for a, t in asked)
    assert run.rows[-1]["test/accuracy"] == pytest.approx(right / total)
    assert run.rows[-1]["test/string_accuracy"] == pytest.approx(strings / 8)
    model = run.model()
    assert model.head.weight is model.embed.weight


def test_mixed_precision_and_channels_last_stay_close(tmp_path: Path) -> None:
    plain = train(recipe(**PLAIN), tmp_path / "plain")
    last = train(recipe(**PLAIN, channels_last=True), tmp_path / "last")
    half = train(recipe(**PLAIN, precision="bf16"), tmp_path / "half")
    losses = [run.rows[-1]["test/loss"] for run in (plain, last, half)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[2] == pytest.approx(losses[0], rel=0.1)
    assert losses[2] != losses[0]
    assert load_file(half.path / "final.safetensors")["stem.weight"].dtype == torch.float32


def test_the_same_recipe_gives_the_same_bits_whatever_the_global_stream(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = train(recipe(), tmp_path / "first")
    torch.manual_seed(2)
    before = torch.get_rng_state()
    threads = torch.get_num_threads()
    second = train(recipe(), tmp_path / "second")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    other = train(recipe(seed=1), tmp_path / "other")
    bits = [(run.path / "final.safetensors").read_bytes() for run in (first, second, other)]
    assert bits[0] == bits[1] != bits[2]


def test_nadam_takes_torch_s_own_steps() -> None:
    chosen = recipe(optimizer="nadam", lr=0.1, betas=(0.8, 0.9), weight_decay=0.01)
    ours, theirs = (build_bare_model(chosen, {"num_classes": 4}) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    mine = build_optimizer(ours, chosen)
    decayed = [p for name, p in theirs.named_parameters() if not name.startswith("norm")]
    groups = [{"params": decayed}, {"params": list(theirs.norm.parameters()), "weight_decay": 0.0}]
    reference = torch.optim.NAdam(groups, lr=0.1, betas=(0.8, 0.9), weight_decay=0.01)
    for _ in range(3):
        for model, optimizer in ((ours, mine), (theirs, reference)):
            sum(p.square().sum() for p in model.parameters()).backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


class _TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(7, 6), nn.LayerNorm(6)
        self.inner, self.conv, self.head = nn.Linear(6, 6), nn.Conv1d(6, 6, 3, padding=1), nn.Linear(6, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(self.norm(self.table(x)))
        logits: torch.Tensor = self.head(self.conv(hidden.mT).mT)
        return logits

    def get_classifier(self) -> nn.Module:
        return self.head


def test_muon_takes_the_matrices_inside_and_adamw_the_rest() -> None:
    chosen = recipe(optimizer="muon", lr=0.05, betas=(0.8, 0.9), weight_decay=0.1, eps=0.5)
    torch.manual_seed(0)
    ours = _TwoLayers()
    theirs = copy.deepcopy(ours)
    mine = build_optimizer(ours, chosen)
    others = [p for name, p in theirs.named_parameters() if name != "inner.weight"]
    reference = [
        torch.optim.Muon([theirs.inner.weight], lr=0.05, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.05, betas=(0.8, 0.9), weight_decay=0.1, eps=0.5),
    ]
    x = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(1))
    for step in range(6):
        if step == 2:  # a schedule
            for group in (*mine.param_groups, *(group for each in reference for group in each.param_groups)):
                group["lr"] = 0.01
        if step == 4:  # a restart, with the state as torch saves it
            fresh = build_optimizer(ours, chosen)
            fresh.load_state_dict(mine.state_dict())
            mine = fresh
        for model in (ours, theirs):
            model.zero_grad()
            nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
        mine.step()
        for each in reference:
            each.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_muon_refuses_a_model_without_matrices_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("espalier.models.build_model", lambda *_, **__: nn.Sequential(nn.Conv2d(3, 4, 6), nn.Flatten()))
    with pytest.raises(EspalierError, match="no linear layer inside: choose 'adamw'"):
        train(recipe(optimizer="muon"), tmp_path / "run")
    assert not list(tmp_path.glob("run/*"))


def test_a_model_with_nothing_to_train_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("espalier.models.build_model", lambda *_, **__: nn.Flatten())
    with pytest.raises(EspalierError, match="has no parameter that is trained: choose another"):
        train(recipe(), tmp_path / "run")
    assert not list(tmp_path.glob("run/*"))


def test_frozen_filters_stay_and_leave_the_optimiser(tmp_path: Path) -> None:
    run = train(recipe(freeze="depthwise", weight_decay=1.0), tmp_path / "run")
    start, final = (load_file(run.path / f"{name}.safetensors") for name in ("start", "final"))
    assert torch.equal(start["depthwise.weight"], final["depthwise.weight"])
    assert not torch.equal(start["depthwise.bias"], final["depthwise.bias"])
    model = build_bare_model(run.recipe, {"num_classes": 4})
    freeze_(model, run.recipe)
    optimizer = build_optimizer(model, run.recipe)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for name, p in model.named_parameters() if name != "depthwise.weight"}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[id(model.norm.weight)] == 0.0
    assert decay[id(model.stem.bias)] == 1.0


def test_arms_of_a_seed_share_what_the_structure_does_not_touch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def centred(model: TinyNet, generator: torch.Generator, gain: float = 1.0) -> None:
        torch.nn.init.normal_(model.depthwise.weight, std=gain, generator=generator)

    monkeypatch.setitem(recipes.INITS, "centred", centred)
    default = train(recipe(epochs=1), tmp_path / "default")
    arm = train(recipe(epochs=1, init="centred", init_args={"gain": 2.0}), tmp_path / "arm")
    one, two = (load_file(run.path / "start.safetensors") for run in (default, arm))
    assert [name for name in one if not torch.equal(one[name], two[name])] == ["depthwise.weight"]
    with pytest.raises(EspalierError, match="init_args"):
        train(recipe(init="centred", init_args={"gian": 2.0}), tmp_path / "bad")
    with pytest.raises(EspalierError, match="did you mean 'centred'"):
        train(recipe(init="centerd"), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_a_finished_run_is_returned_untouched(tmp_path: Path) -> None:
    run = train(recipe(), tmp_path / "run")
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.path.iterdir()}
    again = train(recipe(), tmp_path / "run", resume="never")
    assert again.result == run.result
    assert again.rows == run.rows
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.path.iterdir()} == before


def test_the_present_folder_is_a_run_folder_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = train(recipe(epochs=1), ".")
    assert load_run(tmp_path / "here").result == run.result
    assert run.path == tmp_path / "here"


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    train(recipe(epochs=1), tmp_path / "run")
    with pytest.raises(EspalierError, match=r"another recipe: lr is 0\.02 there and 0\.5 here"):
        train(recipe(epochs=1, lr=0.5), tmp_path / "run")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(EspalierError, match="not a run folder"):
        train(recipe(), tmp_path / "thesis")
    with pytest.raises(EspalierError, match="not a run folder"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(EspalierError, match="larger than the training set"):
        train(recipe(batch_size=64), tmp_path / "big")
    (tmp_path / "file").write_text("x")
    with pytest.raises(EspalierError, match="choose another folder"):
        train(recipe(), tmp_path / "file" / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run", "thesis"]


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(recipe(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(data, "build_source", lambda _: BlobSource(interrupt_at=(2, 3)))
        with pytest.raises(RunInterrupted, match="run the same command again"):
            train(recipe(), tmp_path / "cut")
    unfinished = load_run(tmp_path / "cut")
    assert unfinished.result is None
    assert len(unfinished.rows) == 3
    with pytest.raises(EspalierError, match="is not finished"):
        unfinished.model()
    with pytest.raises(EspalierError, match="unfinished run"):
        train(recipe(), tmp_path / "cut", resume="never")
    train(recipe(), tmp_path / "cut")
    assert (tmp_path / "cut/final.safetensors").read_bytes() == (whole.path / "final.safetensors").read_bytes()


def test_a_run_goes_on_as_its_machine_s_owner_likes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(recipe(**PLAIN), tmp_path / "whole")
    changes = {"name": "b", "data_path": "/b", "logger": "csv", "threads": 2, "channels_last": True, "compile": False}
    changes |= {"eval_batch_size": 7, "checkpoint_every": 3}
    assert changes.keys() == MACHINE_FIELDS

    def source(digest: str | None, stop: tuple[int, int] | None = None) -> Any:
        made = BlobSource(interrupt_at=stop)
        made.digest = digest  # type: ignore[attr-defined]
        return made

    for digest in (None, "of what they hold"):
        monkeypatch.setattr(data, "build_source", lambda _, digest=digest: source(digest, (2, 3)))
        with pytest.raises(RunInterrupted):
            train(recipe(**PLAIN, data_path="/a"), tmp_path / str(digest))
    monkeypatch.setattr(data, "build_source", lambda _: source("of what they hold"))
    for folder, other in (("None", {"data_path": "/b"}), ("of what they hold", {**changes, "epochs": 5})):
        with pytest.raises(EspalierError, match=f"another recipe: {'epochs' if 'epochs' in other else 'data_path'} is"):
            train(recipe(**PLAIN, **other), tmp_path / folder)
    run = train(recipe(**PLAIN, **changes), tmp_path / "of what they hold")
    assert load_run(run.path).recipe == recipe(**PLAIN, **changes)
    assert (run.path / "logs/csv/metrics.csv").exists()
    assert run.rows[-1]["test/loss"] == pytest.approx(whole.rows[-1]["test/loss"], rel=1e-3)
    monkeypatch.setattr(data, "build_source", lambda _: source("of something else"))
    assert train(recipe(**PLAIN), tmp_path / "of what they hold").result == run.result


@pytest.mark.parametrize("writes", [2, 9, 12, 14])
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    whole = train(recipe(), tmp_path / "whole")
    write, done = Path.write_bytes, 0

    def write_until_full(path: Path, content: bytes) -> int:
        nonlocal done
        done += 1
        if done > writes:
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_until_full)
        with pytest.raises(EspalierError, match="disk is full") as caught:
            train(recipe(), tmp_path / "run")
    assert "\n" not in str(caught.value)
    leftovers = [path.name for path in tmp_path.rglob("*") if path.name.startswith(".") or "partial" in path.name]
    assert leftovers == []
    assert train(recipe(), tmp_path / "run").result == {
        **(whole.result or {}),
        **{key: pytest.approx(value, abs=10) for key, value in (whole.result or {}).items() if "seconds" in key},
    }


def test_a_checkpoint_is_read_without_running_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "build_source", lambda _: BlobSource(interrupt_at=(2, 0)))
    with pytest.raises(RunInterrupted):
        train(recipe(ema_decay=0.9, channels_last=True), tmp_path / "run")
    folder = tmp_path / "run" / "checkpoint"
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    state = TinyNet(4).state_dict()
    assert {name.removeprefix("model/") for name in tensors if name.startswith("model/")} == set(state)
    assert {name.removeprefix("averages/") for name in tensors if name.startswith("averages/")} == {
        name for name, tensor in state.items() if tensor.is_floating_point()
    }
    assert tensors["optimizer/stem.weight/step"].item() == 10
    assert json.loads((folder / "state.json").read_text())["counters"]["step"] == 10


def test_the_bar_is_shown_only_when_wanted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    train(recipe(epochs=1, precision="bf16"), tmp_path / "quiet")
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []
    train(replace(recipe(epochs=1), name="watched"), tmp_path / "loud", progress=True)
    shown = capfd.readouterr().err
    assert "watched" in shown
    assert "5/5" in shown
    assert "steps/s" in shown
    assert "accuracy" in shown


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("model.stem = nn.Conv2d(3, model.stem.out_channels, 5)", "stem.weight"),
        ("model.extra = nn.Linear(2, 2)", "extra.bias"),
        ("model.register_buffer('mask', torch.ones(3))", "mask"),
        ("del model.head.bias; model.head.register_parameter('bias', None)", "head.bias"),
        ("model.bfloat16()", "depthwise.bias"),
        ("model.stem.weight = nn.Parameter(torch.ones_like(model.stem.weight))", None),
        ("nn.init.zeros_(model.head.weight)", None),
    ],
)
def test_an_init_that_changes_the_models_parts_is_refused(tmp_path: Path, body: str, words: str | None) -> None:
    """Its run could be trained, and not be read back."""
    head = "import torch\nfrom torch import nn\ndef mine(model, *, generator): "
    (tmp_path / "mine.py").write_text(f"{head}{body}\n")
    own = recipe(init=f"{tmp_path / 'mine.py'}:mine", epochs=1)
    if words is None:
        run = train(own, tmp_path / "run")
        assert all(
            value.equal(run.model().state_dict()[name])
            for name, value in load_file(run.path / "final.safetensors").items()
        )
        return
    with pytest.raises(EspalierError, match=rf"mine\.py:mine adds, removes or replaces {words}: "):
        train(own, tmp_path / "run")
    assert not (tmp_path / "run").exists()
