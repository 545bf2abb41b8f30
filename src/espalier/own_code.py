"""Which code is the user's own, no library's and not this one's; and a digest of a file with what it imports."""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

DIGITS = 12
_LIBRARIES = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
_LONGEST = 200  # characters of a word that may be a name
# Code that asks for these imports what it has as text.
IMPORTERS = {"import_module", "__import__", "run_module", "run_path", "find_spec", "spec_from_file_location"}
_ABOVE = 4  # folders above a file where what it imports is looked for


@lru_cache(maxsize=1 << 14)  # all that is loaded is asked about
def is_own_file(file: str | Path) -> bool:
    """Return whether a file of Python code is the user's."""
    path = Path(file)
    if path.suffix != ".py" or {"site-packages", "dist-packages"} & set(path.parts):
        return False
    roots = (*_LIBRARIES, str(Path(__file__).parent))  # the last is this library, which may be installed in place
    return not any(path.is_relative_to(root) for root in roots if root)


def digest(data: bytes) -> str:
    """Return the first hexadecimal digits of a SHA-256."""
    return hashlib.sha256(data).hexdigest()[:DIGITS]


def code_digest(file: Path) -> str:
    """Return a digest of a file of code, and of the files of the user's own that it imports and those import in turn.

    They are looked for beside it and in the folders above it, whatever ``sys.path`` is: every process finds the same.
    """
    files = [file]
    for each in files if is_own_file(file) else ():  # it grows
        files += [found for found in _imported(each, _stamp(each)) if found not in files]
    if len(files) == 1:
        return digest(file.read_bytes())
    parts = sorted((os.path.relpath(each, file.parent), digest(each.read_bytes())) for each in files)
    return digest(repr(parts).encode())


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=1 << 10)
def _imported(file: Path, _as_it_is: tuple[int, int]) -> tuple[Path, ...]:
    """Return the files of the user's own that one imports, at its top or anywhere inside."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # importing it will say so
        return ()
    places = list(file.parents)[: 1 + _ABOVE]
    found: list[Path] = []
    words: list[str] = []
    by_name = False
    for node in ast.walk(tree):
        here, names = places, []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names]
            here = [file.parents[node.level - 1]] if node.level else places
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < _LONGEST:
            words.append(node.value)
        by_name |= {getattr(node, "id", ""), getattr(node, "attr", "")} & IMPORTERS != set()
        for name in names:
            found += next((files for place in here if (files := list(files_of(place, name)))), [])
    for word in words:
        if word.endswith(".py") and (beside := file.parent / word).is_file():
            found.append(beside.resolve())
        elif by_name and is_dotted(word):
            found += next((files for place in places if (files := list(files_of(place, word.strip("."), True)))), [])
    return tuple(dict.fromkeys(each for each in found if each != file and is_own_file(each)))


def is_dotted(word: str) -> bool:
    """Return whether a word may be the name of a module, or the beginning or the end of one."""
    return word.strip(".").replace(".", "").isidentifier()


def files_of(place: Path, name: str, inside: bool = False) -> Iterator[Path]:
    """Yield the files that run when ``name`` is imported from a folder; its last part may be no module.

    ``inside`` a package that is named, any module may be asked for, by a name that is put together.
    """
    for part in name.split("."):
        package, alone = place / part / "__init__.py", place / f"{part}.py"
        if package.is_file() or not alone.is_file():
            place /= part
            if package.is_file():
                yield package.resolve()
            elif not place.is_dir():
                return
        else:
            yield alone.resolve()
            return
    if inside and is_own_file(place / "__init__.py"):
        yield from (each.resolve() for each in sorted(place.rglob("*.py")))
