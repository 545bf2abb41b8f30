"""What is handed to package indexes: names, extras, the source distribution, and the word about the namesake."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tarfile
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import espalier

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
SOURCE = Path(espalier.__file__).parent


def install(folder: Path, name: str, command: str) -> None:
    """Lay down what pip leaves of a package that brings one command."""
    info = folder / f"{name}-0.1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.2\n")
    (info / "entry_points.txt").write_text(f"[console_scripts]\n{command}\n")


@pytest.mark.parametrize(
    ("name", "command", "told"),
    [
        ("Espalier", "espalier = Espalier.espalier:main", True),
        ("espalier", "espalier = espalier_trees:run", True),
        ("espalier", "espalier = espalier.cli.main:main", False),  # a build of ours from before it had its name
        ("espalier", "trees = Espalier.espalier:main", False),
        ("espalier_trees", "espalier = Espalier.espalier:main", False),
    ],
)
def test_namesake_is_told_in_one_line(tmp_path: Path, name: str, command: str, told: bool) -> None:
    install(tmp_path, name, command)
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(SOURCE.parent)!r}]; import espalier"
    run = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True)
    lines = [line for line in run.stderr.splitlines() if "phylogenetic" in line]
    assert len(lines) == told
    if told:
        assert "pip uninstall espalier" in lines[0]


def brought(extra: str) -> tuple[set[str], set[str], list[str]]:
    """Return the packages that an extra brings, those of them that are not installed, and what contradicts what."""
    names: set[str] = set()
    missing: set[str] = set()
    wrong: list[str] = []
    waiting = [("torch-espalier", extra, Requirement(text)) for text in PROJECT["dependencies"] + EXTRAS[extra]]
    seen = set()
    while waiting:
        asking, asked_extra, need = waiting.pop()
        if need.marker and not need.marker.evaluate({"extra": asked_extra}):
            continue
        name = canonicalize_name(need.name)
        names.add(name)
        try:
            version, needs = metadata.version(name), metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            missing.add(name)
            continue
        if name == "torch-espalier":  # as the project file says today, whatever was installed here
            waiting += [(name, "", Requirement(text)) for inner in need.extras for text in EXTRAS[inner]]
            continue
        if not need.specifier.contains(version, prereleases=True):
            wrong.append(f"{asking} needs {need}, and {version} is here")
        for inner in {"", *need.extras}:
            if (name, inner) not in seen:
                seen.add((name, inner))
                waiting += [(name, inner, Requirement(text)) for text in needs]
    return names, missing, wrong


@pytest.mark.parametrize("extra", EXTRAS)
def test_no_two_packages_of_an_extra_ask_for_versions_that_exclude_each_other(extra: str) -> None:
    # One set of versions that fits them all is the one that is installed here.
    _, missing, wrong = brought(extra)
    assert not wrong
    # These two have environments of their own; of sphinx-mathjax-offline MathJax alone is used.
    assert extra in ("timm", "loggers") or missing <= {"sphinx"}


def test_every_extra_that_an_error_names_brings_the_library() -> None:
    owners = metadata.packages_distributions()
    named: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        for extra in re.findall(r"torch-espalier\[(\w+)\]", text):
            named.setdefault(extra, set())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
                library, extra = (getattr(argument, "value", None) for argument in node.args)
                if isinstance(extra, str):
                    libraries = {library.partition(".")[0]} if isinstance(library, str) else set()
                    named.setdefault(extra, set()).update(libraries)
    assert {"train", "timm", "transformers"} <= named.keys() <= EXTRAS.keys()
    for extra, libraries in named.items():
        found = brought(extra)[0]
        for library in libraries:
            assert found & {canonicalize_name(owner) for owner in owners.get(library, [library])}, (extra, library)


def test_installation_page_names_every_extra() -> None:
    page = (ROOT / "docs" / "installation.md").read_text()
    _, _, after = page.partition("| extra |")
    assert set(re.findall(r"^\| `(\w+)` \|", after.partition("\n\n")[0], re.MULTILINE)) == EXTRAS.keys()


def test_conda_recipe_needs_what_the_project_needs() -> None:
    run = (ROOT / "conda" / "meta.yaml").read_text().partition("  run:\n")[2].partition("\n\n")[0]
    needs = {line.strip(" -").replace(" ", "").replace("pytorch", "torch") for line in run.splitlines()}
    assert needs == {*PROJECT["dependencies"], f"python{PROJECT['requires-python']}"}


def test_old_distribution_name_is_gone() -> None:
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *SOURCE.rglob("*.py")):
        wrong = re.search(r"pip install '?espalier|(?<!torch-)espalier\[\w", path.read_text())
        assert not wrong, f"{path}: {wrong}"


def test_readme_renders_on_a_package_index() -> None:
    renderer = pytest.importorskip("readme_renderer.markdown")
    warnings = io.StringIO()
    html = renderer.render((ROOT / "README.md").read_text(), stream=warnings)
    assert html, warnings.getvalue()
    # A package index shows the page alone: links and pictures must not be relative.
    links = re.findall(r'(?:href|src)="([^"#]+)', html)
    assert links
    assert not [link for link in links if not link.startswith(("https://", "mailto:"))]


@pytest.mark.slow
def test_source_distribution_holds_tests_and_pages_and_builds_nothing_in(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (archive,) = tmp_path.glob("torch_espalier-*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:  # the test itself runs from a source distribution
        tracked = ["tests/test_distribution.py", "docs/index.md", "mkdocs.yml", "setup.py"]
    left_out = (".github/", ".ci/", ".git", ".pre-commit")
    assert not {name for name in tracked if not name.startswith(left_out)} - names
    assert not [name for name in names if name.endswith((".so", ".sha256", ".pyc"))]
