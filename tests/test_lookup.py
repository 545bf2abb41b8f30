"""References to the user's own code: what they name, what pins them, and one line for everything that is wrong."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.errors import EspalierError
from espalier.lookup import TRUST, is_reference, load, pin


@pytest.fixture(autouse=True)
def paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = before[0]
    # Only what came from here: torch, which the first of these tests may bring, must not be imported twice.
    for name in set(sys.modules) - before[1]:
        if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def test_a_file_is_pinned_to_its_content_and_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "nets.py"
    file.write_text("import beside\ndef net(): return beside.VALUE\n")
    (tmp_path / "beside.py").write_text("VALUE = 1\n")
    pinned = pin("model", "nets.py:net")
    assert Path(pinned.partition(":net#")[0]) == file.resolve()
    assert pin("model", pinned) == pinned
    monkeypatch.chdir("/")
    assert load("model", pinned)() == 1
    (tmp_path / "beside.py").write_text("VALUE = 3\n")
    with pytest.raises(EspalierError, match=r"or a file that it imports is not: put that version back"):
        load("model", pinned)
    (tmp_path / "beside.py").write_text("VALUE = 1\n")
    assert load("model", pinned)() == 1
    file.write_text("def net(): return 2\n")
    with pytest.raises(EspalierError, match=r"nets.py is not the code that this was planned or trained with"):
        load("model", pinned)
    assert load("model", f"{file}:net")() == 2
    assert pin("model", f"{file}:net") != pinned


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "torch.py").write_text(f"def f(): return {folder!r}\n")  # a name that is taken, too
    assert [load("init", f"{folder}/torch.py:f")() for folder in ("a", "b")] == ["a", "b"]
    assert importlib.import_module("torch").__version__


def test_a_module_of_the_present_folder_and_an_installed_one(tmp_path: Path) -> None:
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "__init__.py").touch()
    (tmp_path / "mypackage" / "nets.py").write_text("class Net: pass\n")
    pinned = pin("model", "mypackage.nets:Net")
    assert pinned.startswith("mypackage.nets:Net#")
    assert load("model", pinned).__name__ == "Net"
    assert load("model", "collections:Counter")("aa") == {"a": 2}


def test_code_that_only_a_file_names_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets.py").write_text("open('ran', 'w').close()\nclass Net: pass\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("open('ran', 'w').close()\n")
    (tmp_path / "package" / "nets.py").write_text("class Net: pass\n")
    for reference in ("nets.py:Net", "package.nets:Net", "subprocess:getoutput"):
        monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "mine"))
        pinned = pin("model", reference)
        (tmp_path / "ran").unlink(missing_ok=True)  # a parent package is imported to find its module
        monkeypatch.delenv(TRUST)
        monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "theirs"))
        for name in [name for name in sys.modules if name.startswith("package")]:
            del sys.modules[name]
        with pytest.raises(EspalierError, match=f"you have not named here.*{TRUST}=") as caught:
            load("model", pinned)
        assert not (tmp_path / "ran").exists()
        monkeypatch.setenv(TRUST, "0123," + str(caught.value).rpartition("=")[2])
        assert callable(load("model", pinned))
        monkeypatch.delenv(TRUST)
        monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "mine"))  # named before, in another process
        assert callable(load("model", pinned))


@pytest.mark.parametrize(
    ("reference", "content", "message"),
    [
        ("nets.py:Nat", "class Net: pass", "unknown model in .*nets.py 'Nat': did you mean 'Net'"),
        ("nets.py:size", "size = 3\nclass Net: pass", "unknown model in .*nets.py 'size': choose one of Net"),
        ("nets.py:Net", "def net(:", "model .*nets.py:Net fails with SyntaxError: .*line 1\\)$"),
        ("nets.py:Net", "\nimport nowhere_at_all", "ModuleNotFoundError: .*nowhere_at_all.*nets.py, line 2"),
        ("nets.py:Net", "raise SystemError('a\\nb')", "SystemError: a b .*nets.py, line 1"),
        ("nets.py:Net", "import sys; sys.exit(3)", "SystemExit: 3"),
        ("other.py:Net", "", "there is no file .*other.py"),
        (".:Net", "", "write FILE.py:NAME"),
        ("nets:Net", "1 / 0", "ZeroDivisionError"),
        ("no.such.module:Net", "", "there is no module 'no.such.module'"),
        ("time:sleep", "", "module 'time' is built in"),
        ("timm/nets:Net", "", "write FILE.py:NAME"),
        ("nets.py:", "", "write FILE.py:NAME"),
        (":Net", "", "write FILE.py:NAME"),
        ("nets.py:Net.inner", "class Net: inner = print", "write FILE.py:NAME"),
        ("nets.py:Net#", "", "write FILE.py:NAME"),
        ("nets.py:Net#0123", "", "write FILE.py:NAME"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(
    tmp_path: Path, reference: str, content: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of tests before this one: their module of the same name, and the folders that they left on the path.
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if not (Path(place) / "nets.py").exists()])
    (tmp_path / "nets.py").write_text(content)
    with pytest.raises(EspalierError, match=message) as caught:
        load("model", pin("model", reference))
    assert "\n" not in str(caught.value)
    assert "model" in str(caught.value)


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=30), st.text(max_size=10))
def test_no_text_gives_anything_but_an_object_or_one_error(place: str, name: str) -> None:
    reference = f"{place}:{name}"
    assert is_reference(reference)
    with suppress(EspalierError):
        assert callable(load("model", pin("model", reference)))


def test_the_present_folder_is_searched_after_what_is_installed(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("def dumps(): return 'mine'")
    assert load("model", "json:dumps")([]) == "[]"
    assert os.getcwd() in sys.path
