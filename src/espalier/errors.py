"""The errors a user can cause: one line each, naming the argument, the value and the remedy."""

from __future__ import annotations

import difflib
import importlib
import warnings
from collections.abc import Collection, Iterable
from importlib import metadata
from pathlib import Path
from types import ModuleType


def shown(text: object) -> str:
    """Return text as it stands in a message of one line: line breaks, terminal codes and bytes that are no text are
    written out."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))


def told(error: BaseException) -> str:
    """Return an exception in one line: it may hold a whole file, or a library's page of advice."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class EspalierError(ValueError):
    """Bad input: the command line prints the one-line message and exits with status 2."""

    def __init__(self, message: object = "") -> None:
        # It repeats names from files of strangers.
        super().__init__(shown(message))


class MissingExtraError(EspalierError, ImportError):
    """An optional library is needed and not installed; the message names the extra that brings it."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> EspalierError:
    """Return the error for a name that is not known, suggesting the closest ones.

    Args:
        kind: what is named, in words ("recipe", "arm", "field", "model").
        name: the name as given.
        known: every accepted name.

    Returns:
        An ``EspalierError`` to raise, e.g. ``unknown recipe 'digit_vit': did you mean 'digits_vit'?``
    """
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    if close:
        return EspalierError(f"unknown {kind} {name!r}: did you mean {' or '.join(map(repr, close))}?")
    return EspalierError(f"unknown {kind} {name!r}: choose one of {', '.join(names)}")


def require_known(kind: str, name: str, known: Collection[str]) -> None:
    """Raise ``unknown_name`` for a name that is not ``known``."""
    if name not in known:
        raise unknown_name(kind, str(name), known)


def path_of(what: str, text: str) -> Path:
    """Return the path that a user wrote, with ``~`` in place.

    Args:
        what: it is, for the message.
        text: as written.

    Raises:
        EspalierError: it begins with the home of a user whom this machine does not know.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        home = Path(text).parts[0]
        raise EspalierError(f"{what} is {text}, and nobody's home is known as {home}: write the path out") from None


def require(module: str, extra: str) -> ModuleType:
    """Import an optional library, or raise ``MissingExtraError`` naming the extra to install.

    Args:
        module: dotted name of the module, e.g. ``"kornia.augmentation"``.
        extra: the extra of this package that brings it, e.g. ``"train"``.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # a library that is installed and broken may raise anything
        package = module.partition(".")[0]
        raise MissingExtraError(
            f"{package} is needed here and cannot be imported ({' '.join(str(error).split())[:200]}): "
            f"pip install 'torch-espalier[{extra}]'"
        ) from error


def warn_of_namesake() -> None:
    """Say in one line that PyPI's other ``espalier``, about phylogenetic trees, is installed beside this package.

    Both bring a command ``espalier``, and where file names ignore case a folder of one name: the last one wins.
    """
    try:
        commands = metadata.distribution("espalier").entry_points
    except metadata.PackageNotFoundError:
        return
    if any(command.name == "espalier" and not command.value.startswith("espalier.") for command in commands):
        warnings.warn(
            "the package 'espalier' (phylogenetic trees) is installed too and takes the command `espalier`: pip "
            "uninstall espalier; pip install --force-reinstall --no-deps torch-espalier (python -m espalier is ours)",
            stacklevel=3,
        )
