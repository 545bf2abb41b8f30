"""Write the tree of docs/architecture.md from the docstrings of the code: ``python docs/write_tree.py``."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- tree -->\n```\n", "```\n<!-- end of the tree -->\n"


def tree(folder: Path, indent: str = "") -> list[tuple[str, str]]:
    """Return one line a module and folder: its name, and the first line that it says of itself."""
    lines: list[tuple[str, str]] = []
    for path in sorted(folder.iterdir(), key=lambda p: (p.is_dir(), p.name)):
        if path.suffix == ".py" and path.name != "__init__.py":
            lines.append((indent + path.name, _says(path)))
        elif (path / "__init__.py").is_file():
            lines.append((f"{indent}{path.name}/", _says(path / "__init__.py")))
            lines += tree(path, indent + "    ")
    return lines


def _says(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    return docstring.splitlines()[0] if docstring else ""


def page() -> str:
    """Return the page with the tree as the code is now."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = [f"{name:<34} {says}".rstrip() for name, says in tree(ROOT / "src" / "espalier")]
    return before + BEGIN + "\n".join(lines) + "\n" + END + after


if __name__ == "__main__":
    PAGE.write_text(page())
