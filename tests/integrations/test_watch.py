"""The watch in a loop of one's own: what it finds, what it raises, which weights it keeps."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_runs import broken_decay, lose_structure, train, vit
from torch import nn

import espalier
from espalier.errors import EspalierError
from espalier.integrations import StructureWatch, UnhealthyModelError


def test_clean_run_prints_one_line_and_keeps_the_weights_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = vit()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with StructureWatch(model, optimizer, initial_weights=tmp_path / "new" / "init.safetensors") as watch:
        train(model, optimizer)
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert [check.stage for check in watch.checks] == ["start", "end"]
    for kept in (watch.initial_weights, load_file(tmp_path / "new" / "init.safetensors")):
        assert kept.keys() == before.keys()
        assert all(torch.equal(kept[name], before[name]) for name in before)
    assert not torch.equal(model.head.weight, before["head.weight"])


def test_weights_kept_in_memory_are_copies() -> None:
    model = vit()
    before = model.head.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with StructureWatch(model, optimizer) as watch:
        train(model, optimizer)
    assert torch.equal(watch.initial_weights["head.weight"], before)
    assert not torch.equal(model.head.weight, before)
    with pytest.raises(EspalierError, match="none kept"):
        _ = StructureWatch(model, initial_weights=False).initial_weights


def test_structure_is_that_of_structure_with_the_same_seed() -> None:
    watched, written = vit(), vit()
    specs = {"attention": espalier.Mimetic(qk=(0.6, 0.5))}
    with StructureWatch(watched, structure=specs, seed=5) as watch:
        pass
    espalier.structure_(written, generator=torch.Generator().manual_seed(5), **specs)
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), written.parameters(), strict=True))
    assert watch.report is not None
    assert {row.status for row in watch.report.layers} == {"written"}
    assert torch.equal(watch.initial_weights["blocks.0.attn.qkv.weight"], written.blocks[0].attn.qkv.weight)


def test_fault_at_the_start_stops_before_the_loop(capsys: pytest.CaptureFixture[str]) -> None:
    entered = False
    with pytest.raises(UnhealthyModelError, match=r"start: .*A_log") as caught, StructureWatch(broken_decay()):
        entered = True
    assert not entered
    assert "\n" not in str(caught.value)
    assert "A_log" in capsys.readouterr().out


def test_warn_goes_on() -> None:
    with pytest.warns(UserWarning, match="A_log"):
        StructureWatch(broken_decay(), on_problem="warn").start()


def test_structure_lost_before_the_start_is_found_against_its_report() -> None:
    model = vit()
    report = espalier.structure_(model, generator=torch.Generator().manual_seed(0))
    lose_structure(model.blocks[1].attn)
    with pytest.raises(UnhealthyModelError, match=r"blocks\.1\.attn: structure lost"):
        StructureWatch(model, against=report).start()


@settings(max_examples=15)
@given(lost=st.sets(st.integers(0, 3)), resumed=st.booleans(), wrapped=st.booleans())
def test_every_layer_that_a_checkpoint_lost_is_named(lost: set[int], resumed: bool, wrapped: bool) -> None:
    model = vit(depth=4)
    espalier.structure_(model, generator=torch.Generator().manual_seed(0))
    watch = StructureWatch(nn.DataParallel(model) if wrapped else model, on_problem="warn")
    if not resumed:
        watch.start()
    other = copy.deepcopy(model)
    for index in lost:
        lose_structure(other.blocks[index].attn, seed=index)
    model.load_state_dict(other.state_dict())
    if lost:
        with pytest.warns(UserWarning, match="structure lost"):
            check = watch.loaded()
    else:
        check = watch.loaded()
    lines = [line for line in check.problems if "structure lost" in line]
    named = {index for index in range(4) if any(f"blocks.{index}.attn" in line for line in lines)}
    assert named == lost


def test_loss_by_training_is_no_problem_on_load_nor_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    model = vit()
    watch = StructureWatch(model, structure=True)
    watch.start()
    lose_structure(model.blocks[0].attn)  # stands for a long training
    stored = {"model": copy.deepcopy(model.state_dict()), "watch": watch.state_dict()}
    assert not watch.finish().problems
    assert "structure lost: blocks.0.attn" in capsys.readouterr().out
    # The next process builds and structures the model anew, and goes on from the checkpoint.
    resumed = vit()
    report = espalier.structure_(resumed, generator=torch.Generator().manual_seed(0))
    again = StructureWatch(resumed, against=report)
    resumed.load_state_dict(stored["model"])
    again.load_state_dict(stored["watch"])
    assert not again.checks[-1].problems
    lose_structure(resumed.blocks[1].attn)
    with pytest.raises(UnhealthyModelError, match=r"blocks\.1\.attn"):
        again.load_state_dict(stored["watch"])


def test_resumed_run_writes_nothing_and_leaves_the_first_run_s_weights(tmp_path: Path) -> None:
    path = tmp_path / "init.safetensors"
    model = vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with StructureWatch(model, optimizer, structure=True, initial_weights=path) as watch:
        train(model, optimizer)
    first, stored, measured = path.read_bytes(), copy.deepcopy(model.state_dict()), watch.state_dict()

    other = vit(seed=3)
    watch = StructureWatch(other, structure=True, initial_weights=path)
    other.load_state_dict(stored)
    watch.load_state_dict(measured)
    with watch:
        assert all(torch.equal(value, stored[name]) for name, value in other.state_dict().items())
    assert path.read_bytes() == first
    assert [check.stage for check in watch.checks] == ["checkpoint loaded", "end"]


def test_a_second_block_writes_nothing_over_what_was_trained() -> None:
    model = vit()
    watch = StructureWatch(model, structure=True)
    with watch:
        pass
    first, weight = watch.initial_weights, model.blocks[0].attn.qkv.weight
    for attached in (None, model, nn.DataParallel(model)):  # a stage may bring its own optimiser, or a wrapper
        with torch.no_grad():
            weight.add_(0.01)
        trained = weight.clone()
        if attached is not None:
            watch.attach(attached, torch.optim.SGD(model.parameters(), lr=0.1))
        with watch:
            assert torch.equal(weight, trained)
        assert torch.equal(weight, trained)
    assert watch.initial_weights is first
    assert [check.stage for check in watch.checks] == ["start", "end"] * 4


def test_a_loop_that_broke_off_goes_on_with_what_it_trained() -> None:
    model = vit()
    watch = StructureWatch(model, structure=True)

    def loop() -> None:
        with watch:
            lose_structure(model.blocks[0].attn)  # stands for a long training
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        loop()
    trained = copy.deepcopy(model.state_dict())
    with watch:
        assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())


def test_what_training_left_is_held_against_when_the_next_stage_begins() -> None:
    model = vit(depth=3)
    watch = StructureWatch(model, structure=True)
    with watch:
        lose_structure(model.blocks[0].attn)  # stands for a long training
    with watch:
        pass
    lose_structure(model.blocks[1].attn, seed=8)  # between the stages
    with pytest.raises(UnhealthyModelError, match=r"start: blocks\.1\.attn: structure lost"):
        watch.start()


@pytest.mark.parametrize("wait", [copy.copy, copy.deepcopy, lambda held: pickle.loads(pickle.dumps(held))])
def test_other_models_and_copies_of_the_watch_do_not_make_it_forget(wait: Any) -> None:
    models = [vit(seed) for seed in range(3)]
    watch = StructureWatch(structure=True)
    for model in models:
        watch.attach(model)
        with watch:
            pass
        assert torch.equal(model.blocks[0].attn.qkv.weight, watch.initial_weights["blocks.0.attn.qkv.weight"])
        lose_structure(model.blocks[0].attn)
    watch, models = wait((watch, models))
    for model in models:
        trained = model.blocks[0].attn.qkv.weight.clone()
        watch.attach(model)
        with watch:
            assert torch.equal(model.blocks[0].attn.qkv.weight, trained)


def test_fresh_weights_in_the_same_module_are_started_when_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    model = vit()
    watch = StructureWatch(model, structure=True)
    with watch:
        pass
    written = copy.deepcopy(model.state_dict())
    for seed, block in enumerate(model.blocks):
        lose_structure(block.attn, seed)
    with pytest.raises(UnhealthyModelError, match="structure lost"):
        watch.start()
    assert "attach(model, anew=True)" in capsys.readouterr().out
    watch.attach(model, anew=True)
    with watch:
        pass
    assert torch.equal(model.blocks[0].attn.qkv.weight, written["blocks.0.attn.qkv.weight"])


def test_a_start_that_was_refused_may_be_tried_again() -> None:
    model = vit()
    lose_structure(model.blocks[0].attn)
    watch = StructureWatch(model, structure=True)
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    with pytest.raises(UnhealthyModelError, match=r"start: head\.weight"):
        watch.start()
    torch.nn.init.normal_(model.head.weight, std=0.02)
    watch.start()
    assert torch.equal(watch.initial_weights["head.weight"], model.head.weight)


def plain() -> nn.Module:
    """Return a ViT of which no layer carries structure."""
    model = vit()
    for seed, block in enumerate(model.blocks):
        lose_structure(block.attn, seed)
    return model


@pytest.mark.parametrize("state", [None, {}, {"structure": None}])
def test_a_checkpoint_of_which_nothing_was_measured_is_not_called_healthy(
    state: dict[str, Any] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    check = StructureWatch(plain()).loaded(state)
    assert not check.clean
    assert [f.check for f in check.diagnosis.warnings] == ["structure"]
    told = capsys.readouterr().out
    assert "healthy" not in told
    assert "nothing was measured at this checkpoint" in told
    # What a model carried before, or a report, is something to hold it against.
    model = vit()
    report = espalier.structure_(model, generator=torch.Generator().manual_seed(0))
    assert StructureWatch(model).loaded().clean
    assert StructureWatch(model, against=report).loaded(state).clean


@pytest.mark.parametrize("specs", [True, {"attention": espalier.Mimetic()}])
@pytest.mark.parametrize("measured", [False, True])
def test_structure_that_was_asked_for_and_is_nowhere_is_told(
    specs: Any, measured: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = plain()
    watch = StructureWatch(model, structure=specs)
    check = watch.loaded(watch.state_dict() if measured else None)
    assert "structure was asked for, none was written" in capsys.readouterr().out
    assert len(check.diagnosis.warnings) == 2 - measured
    structured = vit()
    espalier.structure_(structured, generator=torch.Generator().manual_seed(0))
    watch = StructureWatch(structured, structure=specs)
    assert watch.loaded(watch.state_dict()).clean


def test_not_finite_after_training_is_a_problem() -> None:
    model = vit()
    with pytest.raises(UnhealthyModelError, match=r"end: head\.weight"), StructureWatch(model), torch.no_grad():
        model.head.weight[0, 0] = torch.nan


def test_an_error_of_the_loop_is_not_hidden_by_the_last_check() -> None:
    model = vit()
    watch = StructureWatch(model)

    def loop() -> None:
        with watch, torch.no_grad():
            model.head.weight.fill_(torch.nan)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        loop()
    assert [check.stage for check in watch.checks] == ["start"]


def test_optimizer_of_another_model_is_found() -> None:
    with pytest.raises(UnhealthyModelError, match="optimizer"):
        StructureWatch(vit(), torch.optim.SGD(vit().parameters(), lr=0.1)).start()


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_kept_names_are_those_of_the_unwrapped_model(wrap: type[nn.DataParallel[nn.Module]]) -> None:
    model = vit()
    watch = StructureWatch(wrap(model))
    watch.start()
    vit(seed=1).load_state_dict(watch.initial_weights)


def test_model_without_known_layers_is_watched_too() -> None:
    with StructureWatch(nn.Linear(8, 8)) as watch:
        pass
    assert watch.checks[0].structure is None
    assert watch.state_dict() == {"structure": None}
    with pytest.raises(EspalierError, match="no attention or ssm or depthwise layer"):
        StructureWatch(nn.Linear(8, 8), structure=True).start()


def test_options_that_do_not_fit_are_refused() -> None:
    report = espalier.structure_(vit())
    with pytest.raises(EspalierError, match="on_problem 'stop': choose"):
        StructureWatch(on_problem="stop")  # type: ignore[arg-type]
    with pytest.raises(EspalierError, match="give one"):
        StructureWatch(structure=True, against=report)
    with pytest.raises(EspalierError, match="attach"):
        StructureWatch().start()
    with pytest.raises(EspalierError, match=r"0\.weight has no shape yet"), pytest.warns(UserWarning, match="lazy"):
        StructureWatch(nn.Sequential(nn.LazyLinear(4)), on_problem="warn").start()


def test_two_ranks_print_once_and_fail_together(tmp_path: Path) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [sys.executable, *command, str(Path(__file__).parent / "watched_ranks.py"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert sum(line.startswith("espalier") for line in lines[: lines.index("second part")]) == 1, run.stdout
    # A fault on rank 1 alone ends both.
    raised = [(tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1)]
    assert all("head.bias" in text for text in raised)
    weights = load_file(tmp_path / "init.safetensors")
    assert weights.keys() == vit().state_dict().keys()


def test_import_of_the_library_loads_no_trainer() -> None:
    probe = (
        "import sys, espalier; espalier.integrations.StructureWatch; "
        "print(*{'lightning', 'pytorch_lightning', 'transformers', 'accelerate'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert not run.stdout.split()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"initial_weights": "init.pt"}, r"initial_weights 'init.pt': give a name that ends in .safetensors"),
        ({"initial_weights": "init"}, "ends in .safetensors"),
        ({"structure": "mimetic"}, "structure 'mimetic': give True"),
        ({"structure": None}, "structure None: give True"),
    ],
)
def test_what_could_not_be_read_or_written_later_is_refused_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(EspalierError, match=words):
        StructureWatch(vit(), **options)


def test_a_place_where_no_file_can_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    watch = StructureWatch(vit(), initial_weights=tmp_path / "file" / "init.safetensors")
    with pytest.raises(EspalierError, match=r"init\.safetensors: cannot be written"):
        watch.start()
