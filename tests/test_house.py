"""The rules of the house: imports go down only, importing is cheap, the public surface is frozen, rooms stay small."""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import espalier

SOURCE = Path(espalier.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
MODULES = {
    ".".join(("espalier", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in FILES
}

# Floors of the house, the ground last: a file imports its own floor's rooms or floors below.
FLOORS = [
    {"cli"},
    {"integrations"},
    {"report"},
    {"study"},
    {"train"},
    {"certify", "checkpoints"},
    {"models", "data", "recipes"},
    {"doctor"},
    {"init", "nn"},
    {"annotations", "lookup"},
    {"files"},
    {"errors", "randomness", "sizes", "tables"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
# What `import espalier` must not load.
LATER = {"train", "data", "recipes", "study", "report", "cli", "checkpoints"}


def room_of(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Return the rooms of the house that a file imports, at its top or inside a function."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import: write the full name"
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "espalier" and len(parts) > 1 and parts[1] in LEVEL:
                rooms.add(parts[1])
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_down_only(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    # Rooms of one floor may visit each other, as long as no circle forms (the next test).
    wrong = {other for other in imported_rooms(path) if LEVEL[other] < LEVEL[room]}
    assert not wrong, f"{path.relative_to(SOURCE)} imports upwards: {wrong}"


def modules_of(path: Path) -> set[str]:
    """Return the modules of this package that a file imports anywhere, for type checking too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # A name is a module of the package, or stands in the module before it.
            names |= {
                full if (full := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names
            }
    return names & MODULES.keys()


def test_rooms_form_no_circle() -> None:
    edges: dict[str, set[str]] = {}
    for path in FILES:
        room = room_of(path)
        if room in LEVEL:
            edges.setdefault(room, set()).update(imported_rooms(path) - {room})
    assert not circle_in(edges), f"rooms import each other in a circle: {circle_in(edges)}"


def test_modules_form_no_circle() -> None:
    # A package's list of public names imports its modules; those that import the list back would form a circle.
    edges = {name: modules_of(path) - {name} for name, path in MODULES.items()}
    assert not circle_in(edges), f"modules import each other in a circle: {circle_in(edges)}"


def circle_in(edges: dict[str, set[str]]) -> set[str]:
    """Return the nodes that lie on a circle or lead to one."""
    done: set[str] = set()
    while ready := {node for node in edges if node not in done and not (edges[node] & edges.keys()) - done}:
        done |= ready
    return edges.keys() - done


def test_no_module_is_shadowed() -> None:
    for package in [name for name, path in MODULES.items() if path.name == "__init__.py"]:
        for node in ast.walk(ast.parse(MODULES[package].read_text())):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    bound = f"{package}.{alias.asname or alias.name}"
                    module = f"{node.module}.{alias.name}" in MODULES
                    assert module or bound not in MODULES, f"{package} binds {alias.name}, the name of its module"


def test_import_loads_no_later_room() -> None:
    # ``compare`` is the one name of a later room, so that it loads it when it is asked for.
    probe = (
        "import sys, espalier; [getattr(espalier, name) for name in espalier.__all__ if name != 'compare']; "
        "print(*[m.split('.')[1] for m in sys.modules if m[:9] == 'espalier.'])"
    )
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert not LATER & set(out.split())


def test_import_alone_loads_no_library() -> None:
    probe = "import sys, espalier; print('torch' in sys.modules, 'numpy' in sys.modules, espalier.__version__)"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False", espalier.__version__]


def test_import_pulls_torch_and_nothing_else() -> None:
    probe = (
        "import json, sys, torch, numpy; before = set(sys.modules); from espalier import *; "
        "print(json.dumps(sorted({m.partition('.')[0] for m in set(sys.modules) - before})))"
    )
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    pulled = {m for m in json.loads(out) if m not in sys.stdlib_module_names and not m.startswith("_")}
    assert pulled <= {"espalier", "torch"}, f"import espalier also imports {sorted(pulled - {'espalier', 'torch'})}"


def test_importtime_names_no_optional_library() -> None:
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "from espalier import *"], capture_output=True, text=True, check=True
    )
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in run.stderr.splitlines()}
    assert "espalier" in imported
    heavy = {"lightning_fabric", "transformers", "timm", "plotly", "kornia", "sklearn", "scipy", "tyro", "rich"}
    assert not imported & heavy


def test_architecture_page_shows_the_tree_as_it_is() -> None:
    writer = runpy.run_path(str(SOURCE.parent.parent / "docs" / "write_tree.py"))
    assert writer["PAGE"].read_text() == writer["page"](), "run: python docs/write_tree.py"


def test_files_beside_the_library_stay_short_too() -> None:
    root = SOURCE.parent.parent
    paths = [path for room in ("tests", "experiments", "benchmarks") for path in (root / room).rglob("*.py")]
    assert not [str(path) for path in paths if path.read_text().count("\n") > 400]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400, f"{path} has more than 400 lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{path}:{node.lineno} {node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_public_functions_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}:{node.lineno} {node.name} has no docstring"


def test_files_that_pages_and_docstrings_name_exist() -> None:
    root = SOURCE.parent.parent
    named = re.compile(r"`((?:tests|experiments|benchmarks|docs|src|requirements)/[\w/.-]+)`")
    texts = [*root.glob("*.md"), *(root / "docs").rglob("*.md"), *FILES, *(root / "experiments").rglob("*.py")]
    wrong = [
        f"{text.relative_to(root)}: {path}"
        for text in texts
        for path in named.findall(text.read_text())
        if not (root / path).exists()
    ]
    assert not wrong, f"these files are named and not there: {wrong}"
