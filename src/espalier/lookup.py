"""Objects of the user's own by name: ``FILE.py:NAME`` or ``package.module:NAME``, pinned to the code that is there."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any

from espalier.errors import EspalierError, path_of, unknown_name
from espalier.own_code import DIGITS, code_digest

# Note [Pins]
# What a name means changes when its file is edited. A recipe that is saved beside a run therefore says
# ``/home/me/nets.py:Net#7c0f2ad19e35``: the first digits of the SHA-256 of the file, or of it and the files of the
# user's own that it imports. Workers, Slurm jobs, resumed runs and readers of the run get that very code or an error,
# and a digest of the recipe tells two versions apart. A file that an argument names, such as measured statistics, is
# pinned to its content in the same way: ``/home/me/s.safetensors#7c0f2ad19e35``.
_PIN = re.compile(f"#[0-9a-f]{{{DIGITS}}}$")

# Note [Trust]
# A run folder or a study may come from a stranger, and what it names as its model would be called with arguments of the
# stranger's choice. Code is therefore run on a file's word only if the user has named it before, that version of it:
# ``pin`` leaves a mark in the cache folder, and one in the environment for processes that start from here.
TRUST = "ESPALIER_TRUST"

_imported: set[str] = set()
"""Files of the user's own that were imported."""


def is_reference(name: str) -> bool:
    """Return whether a name is of this form, rather than one that is registered here."""
    return ":" in name


def is_pinned(reference: str) -> bool:
    """Return whether a reference says which version of the code it means (Note [Pins])."""
    return _PIN.search(reference) is not None


def without_pin(reference: str) -> str:
    """Return a reference as the user wrote it."""
    return _PIN.sub("", reference)


def pin(kind: str, reference: str) -> str:
    """Return a reference with an absolute path and its pin (Note [Pins]); one that has a pin keeps it.

    Args:
        kind: what is named, for messages: "model".
        reference: ``FILE.py:NAME`` or ``package.module:NAME``.

    Raises:
        EspalierError: no such file or module.
    """
    place, name, digest = _split(kind, reference)
    if digest:
        return reference
    file = _file_of(kind, place)
    pinned = f"{file if place.endswith('.py') else place}:{name}#{code_digest(file)}"
    mark = _mark(pinned)
    os.environ[TRUST] = ",".join({*filter(None, os.environ.get(TRUST, "").split(",")), mark})
    with suppress(OSError):  # a home that cannot be written to: then only the environment says it
        folder = _trusted()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / mark).touch()
    return pinned


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return arguments with every text in them changed, however deep it stands."""
    if isinstance(value, Mapping):
        return {key: with_texts(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(with_texts(part, change) for part in value)
    return change(value) if isinstance(value, str) else value


def pin_file(text: str) -> str:
    """Return a text with a pin of what the file holds that it names (Note [Pins]); any other as it is."""
    # A bare word is the name of something else, even where a file of that name lies in the present folder.
    return f"{text}#{_content_pin(text)}" if _is_path(text) and os.path.isfile(text) else text


def is_pinned_file(text: str) -> bool:
    """Return whether a text is one to which ``pin_file`` gave a pin."""
    return is_pinned(text) and _is_path(without_pin(text))


def without_file_pin(text: str) -> str:
    """Return a text as it was before ``pin_file``."""
    return without_pin(text) if is_pinned_file(text) else text


def held_files(kind: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments without pins of files, each file held to its own.

    Args:
        kind: what the arguments are, for messages: "init_args".
        arguments: by name.

    Raises:
        EspalierError: a file that is gone, or holds something else than when it was pinned.
    """

    def held(text: str) -> str:
        if not is_pinned_file(text):
            return text
        path = without_pin(text)
        if not os.path.isfile(path) or text != f"{path}#{_content_pin(path)}":
            raise EspalierError(
                f"{kind}: {path} is not the file that this was planned or trained with ({text[len(path) + 1 :]}): put "
                "it back, or start in another folder"
            )
        return path

    return {name: with_texts(value, held) for name, value in arguments.items()}


def _is_path(text: str) -> bool:
    path = PurePath(text)
    return bool(path.suffix) or len(path.parts) > 1


def _content_pin(path: str) -> str:
    from espalier.files import open_regular  # brings torch

    try:
        with open_regular(Path(path)) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]  # type: ignore[arg-type]  # as for manifests
    except OSError as error:
        raise EspalierError(f"file {path} cannot be read ({error.strerror}): name one that can") from error


def load(kind: str, reference: str) -> Callable[..., Any]:
    """Import and return what a reference names.

    Raises:
        EspalierError: no such file, module or name, code that fails on import or that is not what was pinned.
    """
    place, name, digest = _split(kind, reference)
    mark = _mark(reference)
    if digest and mark not in os.environ.get(TRUST, "").split(",") and not (_trusted() / mark).exists():
        raise EspalierError(
            f"{kind} {place}:{name} is code that a run or study names and you have not named here: look at it, "
            f"and if you trust it set {TRUST}={mark}"
        )
    file = _file_of(kind, place)
    if digest and code_digest(file) != digest:
        raise EspalierError(
            f"{kind} {place}:{name}: {file} is not the code that this was planned or trained with ({digest}), or a "
            "file that it imports is not: put that version back, or start in another folder"
        )
    with errors_of(kind, f"{place}:{name}"):
        module = _import_file(file) if place.endswith(".py") else importlib.import_module(place)
    if not callable(found := getattr(module, name, None)):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown_name(f"{kind} in {place}", name, known)
    _imported.add(getattr(module, "__file__", None) or "")
    return found


@contextmanager
def errors_of(kind: str, reference: str) -> Iterator[None]:
    """Turn errors of the user's code into one line that names it and the place where it failed.

    Raises:
        EspalierError: in place of any other exception.
    """
    try:
        yield
    except EspalierError:
        raise
    except (Exception, SystemExit) as error:
        foreign = ("site-packages", "<frozen", str(Path(__file__).parent))
        frames = traceback.extract_tb(error.__traceback__)
        where = _place([f for f in frames if not any(part in f.filename for part in foreign)])
        text = " ".join(str(error).split())[:300]
        raise EspalierError(
            f"{kind} {without_pin(reference)} fails with {type(error).__name__}: {text}{where}"
        ) from error


def own_place(error: BaseException) -> str:
    """Return where an error passed last through code that ``load`` imported, `` (FILE, line N)``; empty if nowhere."""
    return _place([f for f in traceback.extract_tb(error.__traceback__) if f.filename in _imported])


def _place(frames: Sequence[traceback.FrameSummary]) -> str:
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _split(kind: str, reference: str) -> tuple[str, str, str]:
    body = without_pin(reference)
    digest = reference[len(body) + 1 :]
    place, _, name = body.rpartition(":")
    if not name.isidentifier() or not (place.endswith(".py") or all(map(str.isidentifier, place.split(".")))):
        raise EspalierError(f"{kind} {reference!r}: write FILE.py:NAME or package.module:NAME")
    return place, name, digest


def _mark(reference: str) -> str:
    return hashlib.sha256(reference.encode()).hexdigest()[:16]


def _trusted() -> Path:
    from espalier.files import cache_folder  # brings torch, for which `espalier --help` does not wait

    return cache_folder() / "trusted"


def _file_of(kind: str, place: str) -> Path:
    """Return the file that holds the code."""
    if place.endswith(".py"):
        file = path_of(kind, place).resolve()
        if not file.is_file():
            raise EspalierError(f"{kind}: there is no file {file}: give the path of a file of Python code")
        return file
    # As for ``python -m``: a package in the present folder counts, after those that are installed.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    spec = None
    with errors_of(kind, place), suppress(ModuleNotFoundError):
        spec = importlib.util.find_spec(place)
    if spec is None:
        raise EspalierError(f"{kind}: there is no module {place!r}: install it, or name a file, FILE.py:NAME")
    if not spec.origin or not spec.has_location:
        raise EspalierError(f"{kind}: module {place!r} is built in: write a function of your own around it, in a file")
    return Path(spec.origin)


def _import_file(file: Path) -> ModuleType:
    # Two files of one name, or two versions of one file, are two modules.
    name = f"{file.stem}_{hashlib.sha256(bytes(file)).hexdigest()[:8]}_{code_digest(file)}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # its neighbours can be imported
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
