"""Every option of every command with values that nobody should give: a valid run, or one line and a status."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from espalier.cli.commands import COMMANDS
from espalier.cli.main import main
from espalier.cli.parse import takes_recipe
from espalier.cli.recipe_flags import KEYWORD_FIELDS
from espalier.recipes import Recipe

SMALL = [
    "--epochs", "1", "--batch-size", "8", "--warmup-epochs", "0", "--data-args.train-limit", "16",
    "--data-args.test-limit", "12", "--threads", "1",
]  # fmt: skip
VIT = [
    "digits_vit", *SMALL, "--model-args.embed-dim", "12", "--model-args.depth", "1", "--init", "mimetic", "--loss",
    "multi_margin",
]  # fmt: skip
ROBUST = ["digits_robust", *SMALL, "--model-args.width", "4", "--model-args.hidden", "8"]
# FILE, FOLDER, MISSING and NEW stand for paths of the test's own.
VALUES = (
    "", "nan", "inf", "-1", "0", "two", "1e999", "None", "1.5", "[", "{}", "é☃", "x" * 5000,
    ".", "/", "~no-such-user/x", "FILE", "FOLDER", "MISSING", "NEW/deep",
)  # fmt: skip
# Valid commands, as cheap as they come. A valid `demo` takes minutes: it is not among them.
BASES = {
    "train": [*VIT, "--out", "NEW"],
    "compare": [*VIT, "--out", "NEW", "--arms", "default", "--lrs", "1e-3", "--seeds", "1", "--workers", "0"],
    "audit": ["RUN"], "doctor": ["RUN"], "fit": ["RUN"], "structure": ["espalier:vit", "--out", "NEW"],
    "report": ["RUN", "--out", "NEW"], "records": ["merge", "RECORDS", "--to", "NEW"], "convert": ["FILE"],
    "statistics": ["RUN", "--out", "NEW"], "predict": ["RUN", "IMAGE"],
    "export": ["RUN", "--to", "safetensors", "--out", "NEW"],
    "certify": ["SAFE", "--limit", "2", "--out", "NEW"],
    "attack": ["SAFE", "--limit", "2", "--steps", "1", "--out", "NEW"],
    "recipes": ["digits_vit"], "completion": ["bash"], "models": [], "datasets": [], "arms": [], "inits": [],
}  # fmt: skip
KEYWORDS = (
    "model-args.depth", "model-args.num-heads", "model-args.num-classes", "model-args.img-size", "data-args.size",
    "data-args.train-limit", "init-args.qk", "loss-args.margin", "model-args.", "init-args.preset",
)  # fmt: skip


def cases() -> Iterator[tuple[str, ...]]:
    """Yield every command line: a valid one in which one argument is replaced, or one option added."""
    for command, base in BASES.items():
        parameters = inspect.signature(COMMANDS[command]).parameters
        names = [name for name in parameters if name != "recipe"]
        if command == "train":
            names += [field.name for field in fields(Recipe) if field.name not in KEYWORD_FIELDS]
        flags = [name.replace("_", "-") for name in names] + (list(KEYWORDS) if command == "train" else [])
        for value in VALUES:
            if takes_recipe(COMMANDS[command]):
                yield (command, value, *base[1:])
            else:
                yield from ((command, *base[:index], value, *base[index + 1 :]) for index in range(len(base)))
            yield from ((command, *base, f"--{flag}", value) for flag in flags)
            yield from ((command, *base, f"--{flag}={value}") for flag in flags[:2])


CASES = sorted(set(cases()))


@dataclass(frozen=True)
class Place:
    """Finished runs, and files of several kinds."""

    folder: Path

    def fill(self, argv: tuple[str, ...], new: Path) -> list[str]:
        """Return a command line with paths for names."""
        here = self.folder
        paths = {
            "FILE": here / "file.txt", "FOLDER": here / "folder", "MISSING": here / "missing", "NEW": new / "new",
            "RUN": here / "run", "SAFE": here / "safe", "IMAGE": here / "image.png", "RECORDS": here / "records.jsonl",
        }  # fmt: skip
        filled = []
        for word in argv:
            flag, equals, value = word.rpartition("=")
            head, slash, tail = value.partition("/")
            filled.append(f"{flag}{equals}{paths.get(head, head)}{slash}{tail}")
        return filled


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "file.txt").write_text("no weights\n")
    (folder / "records.jsonl").write_text("")
    (folder / "folder").mkdir()
    Image.new("L", (8, 8)).save(folder / "image.png")
    assert main(["train", *VIT, "--quiet", "--out", str(folder / "run")]) == 0
    assert main(["train", *ROBUST, "--quiet", "--out", str(folder / "safe")]) == 0
    return Place(folder)


def outcome(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command line and return what is wrong with how it ended; empty if nothing is."""
    threads = torch.get_num_threads()
    try:
        status = main(argv)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 99
    except BaseException as error:  # what a person would see as a traceback
        return f"raises {error!r}"
    told = capsys.readouterr()
    torch.set_num_threads(threads)
    if status == 2:
        if not told.err.startswith("espalier: ") or told.err.count("\n") != 1:
            return f"complains in other than one line: {told.err!r}"
        return "" if len(told.err) < 7000 else f"complains at length: {told.err[:200]}…"
    if status == 0 and argv[0] == "train":
        score = json.loads(told.out)["score"]
        return "" if 0 <= score <= 1 else f"scores {score}"
    return "" if status in (0, 1) else f"ends with {status}: {told.err!r}"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(("train", *VIT, "--out", "NEW", "--model-args.depth", "two"))
@example(("train", *VIT, "--out", "NEW", "--model-args.num-classes", "3"))
@example(("train", *VIT, "--out", "NEW", "--data", "FOLDER"))
@example(("train", *VIT, "--out", "FILE"))
@example(("train", *VIT, "--out", "NEW", "--model-args.embed-dim", "6000000"))
@example(("structure", "espalier:vit", "--out", "FOLDER"))
@example(("train", *VIT, "--out", "NEW", "--model-args.depth", "1000000"))
@example(("train", *VIT, "--out", "NEW", "--threads", "2147483648"))
@example(("train", *VIT, "--out", "NEW", "--mixup", "1e308"))
@example(("train", *VIT, "--out", "NEW", "--randaugment", "1000000", "12"))
@example(("train", *VIT, "--out", "NEW", "--model", "vit\0"))
@example(("train", *VIT, "--out", "NEW", "--model", "\ud800"))
@example(("train", *VIT, "--out", "NEW", "--model", "\ud800.py:Net"))
@example(("certify", "SAFE", "--eps", "1e999"))
@example(("certify", "SAFE", "--eps", "1e999999999"))
@example(("report", "two\nlines", "--out", "NEW"))
@example(("records", "merge", "two\nlines\u2028and more", "--to", "NEW"))
@example(("structure", "espalier:vit", "--out", "/"))
@example(("records", "merge", "RECORDS", "--to", "/"))
@example(("records", "merge", "x" * 5000, "--to", "NEW"))
@example(("demo", "--smallest", "--out", "FILE"))
@example(("demo", "--smallest", "--workers", "two"))
@given(argv=st.sampled_from(CASES))
def test_hostile_values_end_in_one_line(
    place: Place, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...]
) -> None:
    new = tmp_path_factory.mktemp("new")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(new)
        assert not outcome(place.fill(argv, new), capsys)
