"""The command line as a person meets it: help that reads, one line for bad input, runs that go on after Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import espalier
from espalier.cli.commands import COMMANDS
from espalier.cli.main import main
from espalier.data import SOURCES
from espalier.models import MODELS, VisionTransformer
from espalier.recipes import ARMS, INITS, get_recipe, recipe_functions
from espalier.recipes.files import open_recipe
from espalier.recipes.validation import resolve_recipe
from espalier.train import load_run, save_recipe

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
    assert not [odd for odd in ("{None}", "(default: )", "(default: None)", "``") if odd in text]
    assert " ".join(str(COMMANDS[name].__doc__).split("\n")[0].split()) in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian", "digits_vit"], "unknown command 'trian': did you mean 'train'"),
        (["report", "~no-such-user/a"], "nobody's home is known as ~no-such-user: write the path out"),
        (["report", "runs/a", "--out=~no-such-user/a.html"], "nobody's home is known as ~no-such-user"),
        (["train", "digit_vit"], "unknown recipe 'digit_vit': did you mean 'digits_vit'"),
        (["train"], "espalier: train needs a recipe: name a file, or one of"),
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
        (["train", "digits_vit", "--learning-rate", "1"], "option --learning-rate of train: did you mean --lr?"),
        (["train", "digits_vit", "--epoch=3"], "unknown option of train '--epoch': did you mean '--epochs'"),
        (["compare", "digits_vit", "--num_workers", "1"], "option --num-workers of compare: did you mean --wor"),
        (["audit"], "audit needs MODEL"),
        (["report"], "report needs FOLDERS"),
        (["audit", "transformer:bert"], "unknown library 'transformer': did you mean 'transformers'"),
        (["audit", "C:/models/net"], "model 'C:/models/net': no such file or folder"),
        (["audit", "a", "b"], "audit: 'b' is one word too many"),
        (["train", "digits_vit", "--lr", "two"], "--lr: could not convert string to float: 'two'"),
        (["train", "nowhere.yaml"], "recipe file 'nowhere.yaml' cannot be read: No such file"),
        (["recipes", "digit_vit"], "unknown recipe 'digit_vit': did you mean 'digits_vit'"),
        (["completion", "tcsh"], "invalid choice 'tcsh'"),
        (["audit", "espalier:vit", "--heads", "3"], "heads 3: give a number from 1, and only with a file of weights"),
        (["doctor", "espalier:vit", "--probe", "--heads", "7"], "heads 7: give a number from 1, and only with a file"),
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
    assert other.read_bytes() == out.read_bytes()


def test_a_seed_decides_every_weight_of_a_model_built_by_name(tmp_path: Path) -> None:
    state, written = torch.random.get_rng_state(), []
    for count, seed in enumerate("001"):
        torch.manual_seed(count)  # whatever was drawn before
        before = torch.random.get_rng_state()
        assert main(["structure", "espalier:sequence", "--out", str(tmp_path / "a"), "--seed", seed]) == 0
        assert torch.equal(torch.random.get_rng_state(), before)
        written.append(load_file(tmp_path / "a"))
    torch.random.set_rng_state(state)
    one, same, other = written
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])


@pytest.mark.parametrize(
    ("command", "names"),
    [("recipes", recipe_functions()), ("models", MODELS), ("datasets", SOURCES), ("arms", ARMS), ("inits", INITS)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_everything_that_has_a_name_is_listed(
    command: str, names: Mapping[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == set(names)
    assert all(len(line.split()) > 1 for line in lines), "a name without a word about it"


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
@pytest.mark.parametrize("name", sorted(recipe_functions()))
def test_a_printed_recipe_is_a_recipe_file(
    name: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"mine{suffix}"
    if suffix == ".yaml":
        assert main(["recipes", name]) == 0
        file.write_text(capsys.readouterr().out)
    else:
        save_recipe(get_recipe(name), file)
    assert open_recipe(str(file)) == resolve_recipe(get_recipe(name))


def test_a_recipe_file_changes_fields_of_its_base(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: digits_vit  # and then\nlr: 1e-4\nbetas: [0.9, 0.99]\nmodel_args: {depth: 2}\n")
    base = get_recipe("digits_vit")
    expected = replace(base, name="mine", lr=1e-4, betas=(0.9, 0.99), model_args={"depth": 2})
    assert open_recipe(str(file)) == resolve_recipe(expected)


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".yaml", b"lr: [", "is no YAML"),
        (".yaml", b"!!python/object/apply:os.getcwd []", "is no YAML"),
        (".yaml", b"\xff\xfe\x00", "cannot be read"),
        (".yaml", b"- 1", "holds no fields"),
        (".yaml", b"1: 2", "holds no fields"),
        (".yaml", b"", "holds no fields"),
        (".yaml", b"base: digits_vt", "did you mean 'digits_vit'"),
        (".yaml", b"lerning_rate: 1", "unknown field 'lerning_rate'"),
        (".yaml", b"lr: fast", "field 'lr' is 'fast'"),
        (".yaml", b"lr: .nan", "field 'lr' is nan"),
        (".json", b"{", "is no JSON"),
        (".json", b"[" * 100_000, "is no JSON"),
        (".json", b"[1]", "holds no fields"),
        (".json", b'{"epochs": "two"}', "field 'epochs' is 'two'"),
    ],
)
def test_a_damaged_recipe_file_is_one_line(
    suffix: str, content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"mine{suffix}"
    file.write_bytes(content)
    assert main(["train", str(file), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_version_and_help_answer_without_torch(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--version"], ["-V"], ["--help"], ["-h"], ["help"], []):
        probe = f"import sys; from espalier.cli.main import main; main({argv!r}); assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["espalier", espalier.__version__]
    with pytest.raises(SystemExit) as stop:
        main(["help", "train"])
    assert stop.value.code == 0
    assert "usage: espalier train RECIPE" in capsys.readouterr().out


# Each shell's own way of being asked: the last of the words is completed, and what is offered is printed.
SHELLS = {
    "bash": """source ./script; COMP_WORDS=(LINE); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _tyro_espalier
        printf '%s\\n' "${COMPREPLY[@]}" """,
    "zsh": """words=(LINE); CURRENT=${#words}; _describe() { print -l -- "${(P@)2}" }; source ./script""",
    "fish": """source ./script; complete -C "LINE" """,
}


@pytest.mark.parametrize("shell", SHELLS)
def test_shells_complete_commands_options_and_choices(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}: apt-get install {shell}")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "{None}" not in script
    (tmp_path / "script").write_text(script)
    for words, expected in {
        "espalier tr": "train",
        "espalier train digits_vit --sched": "--schedule",
        "espalier train digits_vit --schedule const": "constant",
        "espalier certify run --arith": "--arithmetic",
    }.items():
        command = [shell, *(["-f"] if shell == "zsh" else []), "-c", SHELLS[shell].replace("LINE", words)]
        told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert [re.split(r"[\t:]", line)[0] for line in told.stdout.splitlines()] == [expected], words


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


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_results_are_printed_whatever_the_encoding_of_the_terminal(tmp_path: Path, encoding: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "espalier", "help"], capture_output=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, b"")
    assert run.stdout.decode(encoding).startswith("usage: espalier COMMAND")


@pytest.mark.parametrize("closed", ["1", "2", "0 1 2"])
def test_closed_streams_are_no_error_and_no_file_takes_their_place(tmp_path: Path, closed: str) -> None:
    shut = " ".join(f"{number}>&-" for number in closed.split())
    script = (
        "import os, sys; from espalier.cli.main import main; status = main(['recipes']); "
        "os._exit(status if os.open(sys.executable, os.O_RDONLY) > 2 else 99)"
    )
    command = f'"{sys.executable}" -c "{script}" {shut}'
    run = subprocess.run(["sh", "-c", command], capture_output=True, check=False)
    assert (run.returncode, run.stderr) == (0, b"")


def test_a_process_group_does_not_outlive_the_command(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    assert main(["recipes"]) == 0
    assert not torch.distributed.is_initialized()


def test_a_worker_of_gloo_that_still_holds_a_tensor_does_not_abort_a_finished_process(tmp_path: Path) -> None:
    script = f"""
import time, weakref
import torch
from torch import distributed
from espalier.cli.main import leave_process_group

store = distributed.FileStore({str(tmp_path / "store")!r}, 1)
distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
import torch.distributed.fsdp  # from here on something in torch refers to the group until the end
tensor = torch.ones(2**24)
weakref.finalize(tensor, time.sleep, 0.05).atexit = False  # runs in the thread that lets go last
distributed.all_reduce(tensor, async_op=True)
del tensor
leave_process_group()
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
