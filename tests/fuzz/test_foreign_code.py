"""Runs, studies and checkpoints from strangers: a name of code in any of their strings, and none of it ever runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from espalier.cli.main import main
from espalier.errors import EspalierError
from espalier.files import read_tensors, write_json, write_sealed
from espalier.lookup import TRUST
from espalier.recipes import get_recipe
from espalier.study.trial import load_study, plan_study
from espalier.train import load_run, train
from espalier.train.manifest import MANIFEST, file_digest, read_manifest, write_manifest


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a run, a study and an image, and beside them the code that must not run."""
    place = tmp_path_factory.mktemp("strangers")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("ESPALIER_CACHE", str(place / "cache"))
        patch.delenv(TRUST, raising=False)
        small = {"depth": 1, "embed_dim": 12, "num_heads": 3}
        recipe = replace(get_recipe("digits_vit"), epochs=1, model_args=small)
        train(recipe, place / "run")
        plan_study(recipe, ["default", "mimetic"], [1e-3], [0], place / "study")
        evil = "open('ran', 'w').close()\nclass Net: __init__ = lambda self, *a, **k: open('ran', 'w').close()\n"
        (place / "evil.py").write_text(evil)
        (place / "package").mkdir()
        (place / "package" / "__init__.py").write_text("open('ran', 'w').close()\n")
        (place / "package" / "evil.py").write_text(evil)
        Image.new("L", (8, 8)).save(place / "image.png")
        before = list(sys.path)
        yield place
        sys.path[:] = before


def references(place: Path) -> st.SearchStrategy[str]:
    """Names of the code beside the run, in every form: with its pin, with another, without."""
    digests = {name: hashlib.sha256((place / name).read_bytes()).hexdigest() for name in ("evil.py", "package/evil.py")}
    names = ["evil.py:Net", f"{place}/evil.py:Net", f"{place}/run/../evil.py:Net", "evil:Net", "package.evil:Net",
             "os:mkdir", "subprocess:getoutput", "builtins:exec", "evil.py:__init__"]  # fmt: skip
    pins = ["", "#", "#000000000000", *(f"#{d[:12]}" for d in digests.values()), *(f"#{d}" for d in digests.values())]
    return st.builds(lambda name, pin: name + pin, st.sampled_from(names), st.sampled_from(pins))


def strings(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of every string, and of every empty value, within a JSON value."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from strings(inner, (*path, key))
    elif value is None or isinstance(value, str):
        yield path


def put(value: Any, path: tuple[Any, ...], text: str) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = text


def forge(folder: Path, draw: st.DataObject, place: Path) -> str:
    """Write a name of code into one string of one file of a folder, and make every digest fit."""
    files = [f for f in sorted(folder.rglob("*")) if f.suffix in (".json", ".safetensors") and f.name != MANIFEST]
    file = draw.draw(st.sampled_from(files), label="file")
    text = draw.draw(references(place), label="reference")
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as handle:
            notes = handle.metadata() or {}
        stated = {"name": text, "args": {"path": str(place / "made"), "command": f"touch {place}/ran"}}
        save_file(load_file(file), file, {**notes, "espalier": json.dumps(stated)})
    else:
        content = json.loads(file.read_text())
        where = draw.draw(st.sampled_from(sorted(strings(content), key=str)), label="string")
        put(content, where, text)
        sealed = content.pop("digest", None) is not None
        (write_sealed if sealed else write_json)(file, content)  # digests are no secret
    if (folder / MANIFEST).exists():
        known, notes = read_manifest(folder)
        write_manifest(folder, {name: [file_digest(folder / name)] for name in known}, notes)
    return text


def visit(folder: Path, image: Path) -> list[int]:
    """Do everything that one does with a folder of somebody else's, and return what the commands ended with."""
    with suppress(EspalierError):
        run = load_run(folder)
        for make in (run.model, lambda: run.model("start"), run.source, lambda: train(run.recipe, folder)):
            with suppress(EspalierError):
                make()
    for file in folder.rglob("*.safetensors"):
        with suppress(EspalierError):
            read_tensors(file)
    commands = [["predict", str(folder), str(image)], ["audit", str(folder)], ["doctor", str(folder)],
                ["export", str(folder), "--to", "safetensors", "--out", str(image.parent / "x.safetensors")],
                ["report", str(folder), "--out", str(image.parent / "x.html")], ["fit", str(folder)],
                ["audit", str(folder / "final.safetensors")], ["doctor", str(folder / "final.safetensors")],
                ["records", "export", str(folder), "--to", str(image.parent / "x.jsonl")]]  # fmt: skip
    return [main(command) for command in commands]


@pytest.mark.parametrize("kind", ["run", "study"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_name_of_code_in_a_strangers_folder_is_run(place: Path, kind: str, data: st.DataObject) -> None:
    shutil.rmtree(place / "copy", ignore_errors=True)
    for trace in ("ran", "made"):
        (place / trace).unlink(missing_ok=True)
    shutil.copytree(place / kind, place / "copy")
    forge(place / "copy", data, place)
    if kind == "study":
        with suppress(EspalierError):
            for trial in load_study(place / "copy").trials():
                train(trial.recipe, trial.path)  # type: ignore[arg-type]
    visit(place / "copy", place / "image.png")
    assert not (place / "ran").exists()
    assert not (place / "made").exists()
    assert not [name for name in sys.modules if name.startswith("evil_") or name in ("evil", "package")]
    assert TRUST not in os.environ


def test_the_same_folder_untouched_is_read(place: Path) -> None:
    shutil.rmtree(place / "copy", ignore_errors=True)
    shutil.copytree(place / "run", place / "copy")
    assert visit(place / "copy", place / "image.png")[:4] == [0, 0, 0, 0]
