"""The digest of a file of code changes with every file of the user's own that importing it runs, and with no other."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.own_code import code_digest, is_own_file

# Imports that may stand in main.py, main/… or inside a package, by what a real interpreter makes of them.
PLACES = ("a.py", "b.py", "pack/__init__.py", "pack/c.py", "pack/inner/__init__.py", "pack/inner/d.py", "bare/e.py")
IMPORTS = (
    "import a",
    "import b as other",
    "from a import *",
    "import pack",
    "import pack.c",
    "from pack import c",
    "from pack.c import X",
    "from pack.inner.d import X",
    "import pack.inner",
    "from pack import inner",
    "import bare.e",
    "from bare import e",
    "def late():\n    import b\nlate()",
    "import json, os.path",
    "import importlib\nimportlib.import_module('pack.c')",
    "__import__('b')",
    "import importlib\nname = 'd'\nimportlib.import_module(f'pack.inner.{name}')",
    "import runpy\nrunpy.run_path(__file__.rpartition('/')[0] + '/' + 'bare/e.py')",
    "try:\n    import no_such_module\nexcept ImportError:\n    import a",
)
RELATIVE = (
    "from . import c",
    "from .c import X",
    "from .inner import d",
    "from .inner.d import X",
    "from . import inner",
)


def executed(folder: Path) -> set[str]:
    """Return which of the project's files Python itself runs for main.py."""
    hear = "sys.addaudithook(lambda event, what: event == 'exec' and ran.add(getattr(what[0], 'co_filename', '')))"
    code = f"import sys; ran = set(); sys.path.insert(0, {str(folder)!r}); {hear}; import main; print(*ran, sep='\\n')"
    run = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    return {str(Path(f).relative_to(folder)) for f in run.stdout.splitlines() if f.startswith(str(folder))}


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_files_that_are_run_are_in_the_digest_and_others_are_not(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for place in ("main.py", *PLACES):
            known = RELATIVE if place == "pack/__init__.py" else IMPORTS if place in ("main.py", "a.py") else ()
            lines = data.draw(st.lists(st.sampled_from(known), max_size=3)) if known else []
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_text("\n".join(["X = 1", *lines]))
        before, ran = code_digest(folder / "main.py"), executed(folder)
        for place in PLACES:
            text = (folder / place).read_text()
            (folder / place).write_text(f"{text}\n# changed")
            assert (code_digest(folder / "main.py") != before) is (place in ran), (place, ran)
            (folder / place).write_text(text)
        moved = folder / "else" / "where"
        shutil.copytree(folder, moved, ignore=shutil.ignore_patterns("else"))
        assert code_digest(moved / "main.py") == before


def test_a_file_in_a_folder_of_a_project_imports_from_the_project(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "nets.py").write_text("from models.blocks import Block\nfrom tools import helper\n")
    (tmp_path / "models" / "blocks.py").write_text("Block = 1\n")
    (tmp_path / "tools.py").write_text("helper = 1\n")
    found = {code_digest(tmp_path / "models" / "nets.py")}
    for name in ("models/blocks.py", "tools.py"):
        (tmp_path / name).write_text("Block = helper = 2\n")
        found.add(code_digest(tmp_path / "models" / "nets.py"))
    assert len(found) == 3


@pytest.mark.parametrize("text", ["import torch\nimport numpy as np\n", "x = (", "\0", ""])
def test_a_file_alone_has_the_digest_of_its_bytes(tmp_path: Path, text: str) -> None:
    (tmp_path / "alone.py").write_text(text)
    assert code_digest(tmp_path / "alone.py") == hashlib.sha256(text.encode()).hexdigest()[:12]


@pytest.mark.parametrize("module", [torch, numpy, subprocess, sys.modules["espalier"]])
def test_libraries_are_not_ones_own(module: object) -> None:
    assert not is_own_file(str(module.__file__))  # type: ignore[attr-defined]
    assert is_own_file(__file__)
