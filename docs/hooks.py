"""What mkdocs adds to the pages written by hand: a page a command, recipe, arm, notebook and room, and MathJax.

Nothing of it is kept in the repository: it is made from the code and the notebooks at every build, so it cannot be
stale. ``pages()`` is what the tests read.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import os
import pkgutil
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import espalier
from espalier.cli.commands import COMMANDS
from espalier.cli.main import main
from espalier.recipes import ARMS, INITS, Recipe, get_recipe, recipe_functions

NOTEBOOKS = Path(__file__).parent / "notebooks"
MATHJAX = "assets/mathjax.js"
# Where each initialisation is explained.
METHOD_PAGES = {
    "mimetic": "attention",
    "mimetic_ssm": "ssm",
    "covariance": "filters",
    "transferred": "filters",
}


def pages() -> dict[str, str]:
    """Return the Markdown of every generated page by its path below docs/."""
    made = {f"commands/{name}.md": command_page(name) for name in COMMANDS}
    made |= {f"recipes/{name}.md": recipe_page(name) for name in sorted(recipe_functions())}
    made |= {f"arms/{name}.md": arm_page(name) for name in sorted(ARMS)}
    made |= {f"reference/{name}.md": room_page(name, names) for name, names in rooms().items()}
    made |= {f"notebooks/{path.stem}.md": notebook_page(path) for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    for folder, title, says in (
        ("commands", "Commands", "Every command, from its own help."),
        ("recipes", "Recipes", "What can be trained: `espalier train NAME`. Every field can be changed: `--lr 1e-3`."),
        ("arms", "Arms", "What `espalier compare RECIPE --arms …` compares: each arm is a named change of a recipe."),
        ("reference", "Reference", "Every public name, by room."),
    ):
        rows = [f"| [{Path(path).stem}]({Path(path).name}) | {first_line(text)} |"
                for path, text in made.items() if path.startswith(f"{folder}/")]  # fmt: skip
        made[f"{folder}/index.md"] = (
            f"# {title}\n\n{says}\n\n| name | what it is |\n|---|---|\n" + "\n".join(rows) + "\n"
        )
    return made


def first_line(page: str) -> str:
    """Return the first paragraph after a page's title, its line breaks taken out."""
    return " ".join(page.partition("\n\n")[2].partition("\n\n")[0].split())


def printed(arguments: list[str]) -> str:
    """Return what the command prints, on a terminal so wide that no line is broken."""
    out = io.StringIO()
    kept = {name: os.environ.get(name) for name in ("COLUMNS", "NO_COLOR")}
    os.environ |= {"COLUMNS": "1000", "NO_COLOR": "1"}
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main(arguments)
    finally:
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return out.getvalue()


def options(helped: str) -> list[tuple[str, str]]:
    """Return the rows of a command's help: how an argument is typed, and what it does."""
    rows: list[tuple[str, str]] = []
    for line in helped.splitlines():
        inside = re.match(r"[│ ] (.*?)\s*│?$", line)  # boxes are drawn where the terminal can show them
        if not inside or set(inside[1]) <= {"─", "-", " "}:
            continue
        typed, _, does = inside[1].partition("  ")
        if not typed and rows:  # what a long flag does stands on the line below it
            rows[-1] = (rows[-1][0], f"{rows[-1][1]} {does.strip()}".strip())
        elif typed.startswith("-") or does:
            rows.append((typed, does.strip()))
    return rows


def command_page(name: str) -> str:
    """Return the page of a command: what it does, how it is called, its arguments."""
    helped = printed([name, "--help"])
    says = inspect.cleandoc(COMMANDS[name].__doc__ or "").partition("\n\nArgs:")[0]
    usage = re.search(r"usage: (espalier .*)", helped)
    table = "\n".join(f"| `{_cell(typed)}` | {_cell(does)} |" for typed, does in options(helped))
    return (
        f"# espalier {name}\n\n{says}\n\n```text\n{usage[1] if usage else f'espalier {name}'}\n```\n\n"
        f"| argument | what it does |\n|---|---|\n{table}\n"
    )


def recipe_page(name: str) -> str:
    """Return the page of a recipe: what it says of itself, the command, and the fields that are not the defaults."""
    recipe = get_recipe(name)
    changed = {
        field.name: getattr(recipe, field.name)
        for field in fields(Recipe)
        if field.name != "name" and getattr(recipe, field.name) != field_default(field)
    }
    rows = "\n".join(f"| `{field}` | `{_cell(json.dumps(value, default=str))}` |" for field, value in changed.items())
    return (
        f"# {name}\n\n{_docstring(recipe_functions()[name])}\n\n```\nespalier train {name}\n```\n\n"
        f"| field | value |\n|---|---|\n{rows}\n\nAll other fields have [their defaults](../reference/recipes.md).\n"
    )


def field_default(field: Any) -> Any:
    """Return the default of a dataclass's field."""
    return field.default_factory() if callable(field.default_factory) else field.default


def arm_page(name: str) -> str:
    """Return the page of an arm: the fields that it changes and what its initialisation does."""
    arm = ARMS[name]
    says = _docstring(INITS[arm["init"]])
    frozen = " Depthwise filters stay as they were drawn." if arm.get("freeze") else ""
    rows = "\n".join(f"| `{field}` | `{_cell(json.dumps(value))}` |" for field, value in arm.items())
    method = METHOD_PAGES.get(arm["init"])
    more = f"\nMore: [the method](../methods/{method}.md).\n" if method else ""
    first, _, rest = says.partition("\n\n")
    return (
        f"# {name}\n\n{first}{frozen}\n\n```\nespalier compare RECIPE --arms default {name}\n```\n\n"
        f"| field | value |\n|---|---|\n{rows}\n\n{rest}\n{more}"
    )


def rooms() -> dict[str, list[str]]:
    """Return the public names of every package, each name in the lowest package that lists it."""
    names = ["espalier", *(m.name for m in pkgutil.walk_packages(espalier.__path__, "espalier.") if m.ispkg)]
    listed: dict[str, list[str]] = {}
    for package in names:
        module = importlib.import_module(package)
        public = [n for n in getattr(module, "__all__", ()) if not inspect.ismodule(getattr(module, n))]
        if public:
            listed[package.removeprefix("espalier.")] = public
    return listed


def room_page(name: str, names: list[str]) -> str:
    """Return the reference of a package: every public name with its docstring."""
    package = "espalier" if name == "espalier" else f"espalier.{name}"
    says = _docstring(importlib.import_module(package))
    return f"# {package}\n\n{says}\n\n" + "\n\n".join(f"::: {package}.{public}" for public in names) + "\n"


def notebook_page(path: Path) -> str:
    """Return a notebook as a page: its text, its code, and what the code printed when it was last run."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            text = "".join(output.get("text", data.get("text/plain", "")))
            if "image/png" in data:
                parts.append(
                    f'<img alt="what the cell shows" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
                )
            elif text.strip():
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _docstring(thing: Callable[..., Any] | Any) -> str:
    """Return a docstring as Markdown: its list of arguments as a list."""
    text = inspect.cleandoc(thing.__doc__ or "").replace("``", "`")
    before, found, after = text.partition("\nArgs:\n")
    if not found:
        return text
    arguments, _, rest = after.partition("\n\n")
    listed = re.sub(r"^ {4}(\w+): ", r"- `\1`: ", arguments, flags=re.MULTILINE)
    return f"{before}\n{listed}" + (f"\n\n{rest}" if rest and not rest.startswith(("Raises:", "Returns:")) else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("``", "`")


def mathjax() -> Path:
    """Return MathJax as one file with its fonts inside, as the package sphinx-mathjax-offline brings it."""
    found = [f for f in metadata.files("sphinx-mathjax-offline") or () if f.name == "tex-svg.js"]
    return Path(str(found[0].locate()))


def on_config(config: Any) -> Any:
    """Put the generated pages into the navigation, where a section says ``NAME/*``."""

    def filled(entries: list[Any]) -> Iterator[Any]:
        for entry in entries:
            if isinstance(entry, str) and entry.endswith("/*"):
                yield from sorted(
                    (p for p in made if p.startswith(entry[:-1])), key=lambda p: (not p.endswith("index.md"), p)
                )
            elif isinstance(entry, dict):
                yield {
                    title: list(filled(inner)) if isinstance(inner, list) else inner for title, inner in entry.items()
                }
            else:
                yield entry

    made = pages()
    config.nav = list(filled(config.nav))
    config.extra["made"] = made
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages and MathJax to the site's files."""
    from mkdocs.structure.files import File

    for path, text in config.extra["made"].items():
        files.append(File.generated(config, path, content=text))
    files.append(File.generated(config, MATHJAX, abs_src_path=str(mathjax())))
    return files
