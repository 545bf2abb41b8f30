"""The command line as a person meets it: help that reads, one line for bad input, runs that go on after Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from espalier.cli.commands import COMMANDS
from espalier.cli.main import main
from espalier.models import VisionTransformer
from espalier.train import load_run

TINY = ["--epochs", "1", "--data-args.train-limit", "128", "--data-args.test-limit", "100", "--threads", "1"]


def test_no_argument_lists_every_command_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in COMMANDS.items():
        assert any(
            line.split() and line.split()[0] == name and command.__doc__.split("\n")[0] in line for line in lines
        )


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_of_every_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"usage: espalier {name}" in text
    assert " ".join(str(COMMANDS[name].__doc__).split("\n")[0].split()) in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian", "digits_vit"], "unknown command 'trian': did you mean 'train'"),
        (["train", "digit_vit"], "unknown recipe 'digit_vit': did you mean 'digits_vit'"),
        (["train"], "espalier train needs a recipe: choose one of"),
        (["compare", "digits_vit", "--arms", "default", "mimetc"], "unknown arm 'mimetc': did you mean 'mimetic'"),
        (["compare", "digits_vit", "--lrs", "fast"], "lrs 'fast': write numbers"),
        (["train", "digits_vit", "--modle-args.depth", "2"], "unknown keyword field 'modle_args'"),
        (["train", "digits_vit", "--model-args.depht", "2"], "argument of model 'vit' 'depht': did you mean 'depth'"),
        (["train", "digits_vit", "--model", "vitt"], "unknown model 'vitt': did you mean 'vit'"),
        (["train", "digits_vit", "--model-args.num-heads", "5"], "embed_dim 48 is not divisible by num_heads 5"),
        (["train", "cifar10_vit", "--data", "/nowhere"], "no dataset 'cifar10' at /nowhere"),
        (["train", "digits_vit", "--lr", "-1"], "lr -1.0 must be positive"),
        (["structure", "espalier:vitt"], "unknown model 'vitt': did you mean 'vit'"),
        (["structure", "vit"], "model 'vit': no such file or folder"),
        (["report", "/nowhere"], "/nowhere is neither a study"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_with_status_2(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("*")), "something half-written is left behind"


def test_train_then_audit_then_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = ["train", "digits_vit", "--init", "mimetic", *TINY, "--out", str(out), "--quiet"]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    run = load_run(out)
    assert printed == run.result
    assert run.recipe.init == "mimetic"
    assert run.recipe.data_args == {"train_limit": 128, "test_limit": 100}
    # A finished run is returned as it is; another recipe is refused.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert main(command) == 0
    assert main([*command, "--lr", "1e-4"]) == 2
    assert "holds a run of another recipe: lr is" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert main(["audit", str(out), "--picture", str(tmp_path / "weights.html")]) == 0
    table = capsys.readouterr().out
    assert table.count("attention") >= 4
    assert "qk_diagonal" in table
    assert main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").stat().st_size > 10_000
    assert (tmp_path / "weights.html").stat().st_size > 10_000


def test_compare_prints_the_table_and_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "study"
    command = ["compare", "digits_convmixer", "--arms", "default", "covariance", "--lrs", "1e-2", "--seeds", "2"]
    assert main([*command, "--workers", "0", *TINY, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "covariance against default" in printed or "covariance is" in printed
    assert "2 paired seeds" in printed
    assert (out / "report.html").exists()
    assert len(list((out / "trials").rglob("result.json"))) == 4


def test_structure_writes_weights_that_load_and_are_structured(tmp_path: Path) -> None:
    out = tmp_path / "init.safetensors"
    assert main(["structure", "espalier:vit", "--out", str(out), "--seed", "3"]) == 0
    net = VisionTransformer()
    net.load_state_dict(load_file(out))
    v = net.blocks[0].attn.qkv.weight.detach().chunk(3)[2]
    product = net.blocks[0].attn.proj.weight.detach() @ v
    assert float(product.diagonal().mean()) == pytest.approx(-0.4, abs=0.02)
    other = tmp_path / "again.safetensors"
    assert main(["structure", "espalier:vit", "--out", str(other), "--seed", "3"]) == 0
    again = load_file(other)["blocks.0.attn.qkv.weight"]
    assert torch.equal(again, net.blocks[0].attn.qkv.weight)


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    assert "digits_vit" in capsys.readouterr().out


def start(argv: list[str]) -> subprocess.Popen[str]:
    # A shell that runs the tests in the background makes its children ignore Ctrl-C.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, preexec_fn=listen)


def test_ctrl_c_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = [sys.executable, "-m", "espalier", "train", "digits_vit", "--quiet", "--threads", "1", "--out", str(out)]
    argv += ["--data-args.train-limit", "128", "--data-args.test-limit", "100", "--epochs"]
    process = start([*argv, "2000"])
    deadline = time.monotonic() + 180
    # Its second row stands for a first checkpoint.
    while time.monotonic() < deadline and (out / "metrics.jsonl").exists() is False:
        time.sleep(0.1)
    while time.monotonic() < deadline and len((out / "metrics.jsonl").read_text().splitlines()) < 3:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.count("\n") == 1
    assert "run the same command again" in error
    rows = len(load_run(out).rows)
    assert rows >= 3
    assert load_run(out).result is None
    # The same command goes on; stopped again, it has more rows and the old ones unchanged.
    again = start([*argv, "2000"])
    while time.monotonic() < deadline + 60 and len(load_run(out).rows) < rows + 2:
        time.sleep(0.1)
    again.send_signal(signal.SIGINT)
    again.communicate(timeout=60)
    later = load_run(out).rows
    assert len(later) > rows
    assert [row["epoch"] for row in later] == list(range(len(later)))


def test_a_reader_that_stops_reading_gets_no_complaint() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        run = subprocess.run(
            [sys.executable, "-m", "espalier", "recipes"], stdout=closed, stderr=subprocess.PIPE, check=False
        )
    assert (run.returncode, run.stderr) == (141, b"")


def test_a_process_group_does_not_outlive_the_command(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    assert main(["recipes"]) == 0
    assert not torch.distributed.is_initialized()
