"""The callback inside the ``Trainer`` of transformers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import lose_structure
from torch import Tensor
from torch.utils.data import Dataset

import espalier
from espalier.errors import EspalierError
from espalier.integrations import UnhealthyModelError
from needs import needs_library

pytestmark = needs_library("accelerate", "accelerate")
transformers = pytest.importorskip("transformers", reason="no transformers: pip install transformers")


class Tokens(Dataset[dict[str, Any]]):
    """Sixteen sequences of random tokens."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = torch.randint(50, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def llama(seed: int = 0) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config)


def trainer(folder: Path, model: Any, *callbacks: Any, **settings: Any) -> Any:
    settings = {"max_steps": 4, "save_strategy": "no", "learning_rate": 1e-3, **settings}
    args = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, report_to=[], disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False, **settings,
    )  # fmt: skip
    return transformers.Trainer(
        model=model, args=args, train_dataset=Tokens(), eval_dataset=Tokens(), callbacks=[*callbacks]
    )


def callback(**options: Any) -> Any:
    return espalier.integrations.transformers.StructureCallback(**options)


def test_clean_training_prints_one_line_and_keeps_the_first_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = llama()
    before = copy.deepcopy(model.state_dict())
    watch = callback(initial_weights=tmp_path / "init.safetensors")
    trainer(tmp_path, model, watch).train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("espalier")]
    assert len(lines) == 1
    assert [check.stage for check in watch.watch.checks] == ["start", "end"]
    kept = watch.watch.initial_weights
    assert kept.keys() == before.keys()
    assert all(torch.equal(kept[name], before[name]) for name in before)
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_planted_fault_stops_before_the_first_step(tmp_path: Path) -> None:
    model = llama()
    torch.nn.init.zeros_(model.model.layers[0].self_attn.q_proj.weight)
    held = trainer(tmp_path, model, callback())
    with pytest.raises(UnhealthyModelError, match="start: "):
        held.train()
    assert held.state.global_step == 0


def test_structure_is_written_at_the_start_and_not_on_resuming(tmp_path: Path) -> None:
    reference = llama()
    espalier.structure_(reference, generator=torch.Generator().manual_seed(2))
    watch = callback(structure=True, seed=2)
    trainer(tmp_path, llama(), watch, save_strategy="steps", save_steps=4).train()
    kept = watch.watch.initial_weights
    assert all(torch.equal(kept[name], value) for name, value in reference.state_dict().items())

    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    model, watch = llama(seed=5), callback(structure=True, seed=2)
    trainer(tmp_path, model, watch).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [check.stage for check in watch.watch.checks] == ["checkpoint loaded", "end"]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in saved.items())
    with pytest.raises(EspalierError, match="none kept"):
        _ = watch.watch.initial_weights


def test_training_again_writes_nothing_over_what_was_trained(tmp_path: Path) -> None:
    model, watch = llama(), callback(structure=True)
    training = trainer(tmp_path, model, watch)
    training.train()
    first, weight = watch.watch.initial_weights, model.model.layers[0].self_attn.q_proj.weight
    written = first["model.layers.0.self_attn.q_proj.weight"].clone()
    with torch.no_grad():
        weight.add_(0.1)
    trained = weight.clone()
    training.args.learning_rate = 0.0
    training.optimizer = None
    training.train()
    assert torch.equal(weight, trained)
    assert watch.watch.initial_weights is first
    assert [check.stage for check in watch.watch.checks] == ["start", "end", "start", "end"]
    trainer(tmp_path, model, watch, learning_rate=0.0).train()  # so does another Trainer
    assert torch.equal(weight, trained)
    assert watch.watch.initial_weights is first
    trainer(tmp_path, llama(seed=5), watch).train()  # another model is begun with
    assert watch.watch.initial_weights is not first
    assert torch.equal(first["model.layers.0.self_attn.q_proj.weight"], written)


def saver(event: str) -> Any:
    """Return a callback that asks for a checkpoint at an event of step 2."""

    def ask(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = control.should_save or state.global_step == 2

    return type("Saver", (transformers.TrainerCallback,), {event: ask})()


@pytest.mark.parametrize("event", ["on_step_end", "on_evaluate", "on_log"])
@pytest.mark.parametrize("ours_first", [True, False])
def test_whoever_asks_for_a_checkpoint_it_carries_its_own_measurement(
    tmp_path: Path, event: str, ours_first: bool
) -> None:
    watch, other = callback(structure=True), saver(event)
    order = (watch, other) if ours_first else (other, watch)
    trainer(
        tmp_path, llama(), *order, max_steps=3, save_strategy="steps", save_steps=3, eval_strategy="steps",
        eval_steps=1, logging_steps=1,
    ).train()  # fmt: skip
    for step in (2, 3):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        measured = state["stateful_callbacks"]["StructureCallback"]["attributes"]["measured"]
        assert measured["step"] == step
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}")
        found = espalier.audit(model)
        assert [row["measured"] for row in measured["structure"]["layers"]] == [row.measured for row in found.layers]
    lose_in(tmp_path / "checkpoint-2")
    held = trainer(tmp_path, llama(), callback())
    with pytest.raises(UnhealthyModelError, match=r"checkpoint loaded: .*structure lost"):
        held.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("stale", ["none", "other step", "no step", "no callback"])
def test_a_checkpoint_without_its_own_measurement_is_not_called_healthy(
    tmp_path: Path, stale: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path, llama(), callback(), save_strategy="steps", save_steps=4).train()
    path = tmp_path / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    attributes = state["stateful_callbacks"]["StructureCallback"]["attributes"]
    if stale == "none":
        attributes["measured"] = None
    elif stale == "other step":
        attributes["measured"]["step"] = 2
    elif stale == "no step":
        del attributes["measured"]["step"]
    else:
        del state["stateful_callbacks"]["StructureCallback"]
    path.write_text(json.dumps(state))
    capsys.readouterr()
    watch = callback()
    trainer(tmp_path, llama(), watch, max_steps=5).train(resume_from_checkpoint=str(path.parent))
    assert [check.stage for check in watch.watch.checks] == ["checkpoint loaded", "end"]
    told = capsys.readouterr().out
    assert "nothing was measured at this checkpoint" in told
    assert "healthy" not in told


@pytest.mark.parametrize("restored", [False, True])
def test_structure_lost_in_a_checkpoint_stops_the_resumed_run(tmp_path: Path, restored: bool) -> None:
    trainer(tmp_path, llama(), callback(structure=True), save_strategy="steps", save_steps=4).train()
    lose_in(tmp_path / "checkpoint-4")
    settings = {"max_steps": 8, "restore_callback_states_from_checkpoint": restored}
    held = trainer(tmp_path, llama(), callback(), **settings)
    with pytest.raises(UnhealthyModelError, match=r"checkpoint loaded: .*structure lost"):
        held.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert held.state.global_step == 4


def test_resuming_from_a_run_without_the_callback_saves_again(tmp_path: Path) -> None:
    class Other(transformers.TrainerCallback):
        """Does nothing."""

    trainer(tmp_path, llama(), Other(), save_strategy="steps", save_steps=4).train()
    again = trainer(tmp_path, llama(), callback(), max_steps=8, save_strategy="steps", save_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["StructureCallback"]["attributes"]["measured"]["structure"]["layers"]


def test_best_model_loaded_at_the_end_is_checked(tmp_path: Path) -> None:
    watch = callback(structure=True)
    trainer(
        tmp_path, llama(), watch, eval_strategy="steps", eval_steps=2, save_strategy="best",
        metric_for_best_model="loss", load_best_model_at_end=True,
    ).train()  # fmt: skip
    assert [check.stage for check in watch.watch.checks] == ["start", "checkpoint loaded", "end"]


def lose_in(folder: Path) -> None:
    """Draw one attention layer of a saved checkpoint again."""
    path = folder / "model.safetensors"
    model = llama()
    model.load_state_dict(load_file(path))
    lose_structure(model.model.layers[1].self_attn)
    state: dict[str, Tensor] = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(state, path, metadata={"format": "pt"})
