"""Recipes as files, checked field by field."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from espalier.errors import EspalierError, path_of, require, unknown_name
from espalier.files import read_regular, write_json
from espalier.lookup import is_pinned, is_reference, pin, pin_file, with_texts
from espalier.recipes.base import Recipe

Kind = TypeVar("Kind")

FILE_FIELDS = ("model_args", "init_args")
"""Fields whose texts may name files that shape a run."""

# What a machine or its owner chooses: it changes where, how fast and in which order of rounding a run goes, not what it
# is. The rate and the seed stay in: they are part of what it is.
MACHINE_FIELDS = frozenset(
    {"name", "data_path", "logger", "threads", "compile", "channels_last", "eval_batch_size", "checkpoint_every"}
)
"""Recipe fields that a digest leaves out, and in which a run that goes on may differ from how it began."""

_MOST = " is too large: give at most"
_DEEPEST = 10_000
"""Blocks of the deepest nets that anybody trained (arXiv 1806.05393)."""
_DEPTHS = ("depth", "depths")
_SIZES = (
    "dim", "dims", "embed_dim", "head_dim", "img_size", "in_chans", "kernel_size", "num_classes", "num_heads",
    "patch_size", "vocab_size", "width", "widths",
)  # fmt: skip
"""Arguments of this library's models that count something of which there is at least one."""


def resolve_recipe(recipe: Recipe) -> Recipe:
    """Return ``recipe`` as it comes back from its file, every field checked: what a run is made from.

    Code of the user's own is pinned to its present version, and so is a file that an argument of the model or of the
    initialisation names (``espalier.lookup``).

    Raises:
        EspalierError: a field of the wrong type, a value that no run can have, or code that is not there.
    """
    resolved = from_values(Recipe, recipe_to_dict(recipe))
    _check_values(resolved)
    if resolved.data_path is not None:
        if not resolved.data_path:
            raise EspalierError("data_path is empty: name a file or folder")
        # A run folder must find its data from anywhere.
        resolved = replace(resolved, data_path=str(path_of("data_path", resolved.data_path).absolute()))
    pinned = {name: with_texts(getattr(resolved, name), pin_file) for name in FILE_FIELDS}
    for name, value in _own_code(resolved).items():
        try:
            value.encode()
        except UnicodeEncodeError:  # bytes of a path that are no text
            raise EspalierError(f"{name} {value!r} holds characters that are no text: rename the file") from None
        pinned[name] = pin(name, value)
    return replace(resolved, **pinned)


def _own_code(recipe: Recipe) -> dict[str, str]:
    own = {name: getattr(recipe, name) for name in ("dataset", "model", "init")}
    return {name: value for name, value in own.items() if is_reference(value)}


def refuse_unpinned(recipe: Recipe, where: str) -> None:
    """Refuse a recipe of a run or study whose code has no pin: no run writes that (Note [Trust] of ``lookup``).

    Raises:
        EspalierError: the field and what it names.
    """
    for name, value in _own_code(recipe).items():
        if not is_pinned(value):
            raise EspalierError(f"{where}: field {name!r} names code, {value!r}, and not which version: it was changed")


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain JSON values.

    Raises:
        EspalierError: a value that JSON cannot hold.
    """
    values = {}
    for name, value in asdict(recipe).items():
        try:
            values[name] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise EspalierError(f"recipe field {name!r} cannot be saved ({error}): use plain finite values") from error
    return values


def from_values(kind: type[Kind], values: Mapping[str, Any], where: str = "recipe") -> Kind:
    """Build a dataclass from plain values, each held to the type of its field.

    Lists become tuples, missing fields keep their defaults.

    Args:
        kind: the dataclass.
        values: values by field name.
        where: what the message of an error begins with.

    Raises:
        EspalierError: a field that is unknown or missing, or a value of the wrong type.
        MissingExtraError: tyro, which brings typeguard, is not installed.
    """
    types, found = _types(kind), {}  # type: ignore[arg-type]  # a type has a hash
    for name, value in values.items():
        if name not in types:
            raise EspalierError(f"{where}: {unknown_name('field', name, types)}")
        try:
            value = _tuples(value)
            if problem := _misfit(value, types[name]):
                raise EspalierError(f"{where}: field {name!r} is {value!r:.300}: {problem}")
        except RecursionError:
            raise EspalierError(f"{where}: field {name!r} is nested too deeply") from None
        found[name] = _convert(value, types[name])
    for each in fields(kind):  # type: ignore[arg-type]  # there is no type of dataclasses
        if each.name not in found and each.default is each.default_factory is MISSING:
            raise EspalierError(f"{where}: field {each.name!r} is missing")
    return kind(**found)


_types = cache(get_type_hints)


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the recipe as JSON, atomically."""
    write_json(path, recipe_to_dict(recipe))


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from its JSON file.

    Raises:
        EspalierError: missing file, not JSON, unknown or ill-typed fields.
    """
    try:
        values = read_json(read_regular(path), str(path))
    except OSError as error:
        raise EspalierError(f"recipe file {path} cannot be read ({error.strerror}): name a file of JSON") from error
    if not isinstance(values, dict):
        raise EspalierError(f"recipe file {path} does not hold an object of fields")
    recipe = from_values(Recipe, values, where=f"recipe file {path}")
    refuse_unpinned(recipe, f"recipe file {path}")
    return recipe


def first_difference(mine: Recipe, other: Recipe) -> str | None:
    """Return the name of the first field in which two recipes say different runs, None if they say the same."""
    names = (f.name for f in fields(Recipe) if f.name not in MACHINE_FIELDS)
    return next((name for name in names if getattr(mine, name) != getattr(other, name)), None)


def read_json(text: str | bytes, where: str) -> Any:
    """Return what the JSON of a recipe file says.

    Raises:
        EspalierError: it is no JSON; the message names the file ``where``.
    """
    try:
        return json.loads(text, object_pairs_hook=refuse_repeated)
    except (ValueError, RecursionError) as error:
        raise EspalierError(f"recipe file {where!r} is no JSON: {error}") from None


def refuse_repeated(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs, as ``object_pairs_hook`` of ``json``.

    Raises:
        ValueError: a key stands there twice, and which of its values counts would be chance.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found


# Fields, what must hold of their values, and what is said where it does not. Beyond the upper bounds a run does nothing
# new and does not end, or fails where nobody would look for the reason.
_RULES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("lr", "eps", "epochs", "batch_size", "accumulate"), lambda value: value > 0, " must be positive"),
    (("eval_every", "eval_batch_size", "checkpoint_every"), lambda value: value > 0, " must be positive"),
    (("weight_decay", "warmup_epochs", "clip_norm"), lambda value: value >= 0, " must not be negative"),
    (("threads", "crop_padding", "mixup", "cutmix"), lambda value: value >= 0, " must not be negative"),
    (("ema_decay", "label_smoothing", "erasing"), lambda value: 0 <= value < 1, " must lie in [0, 1)"),
    (("betas",), lambda betas: all(0 <= beta < 1 for beta in betas), " must lie in [0, 1)"),
    (("mixup",), lambda value: value <= 1000, f"{_MOST} 1000, beyond it every mixture is half and half"),
    (("cutmix",), lambda value: value <= 1000, f"{_MOST} 1000, beyond it every box is half of the image"),
    (("threads",), lambda value: value <= 1024, f"{_MOST} 1024, no machine runs more at once"),
    (("randaugment",), lambda value: not value or 1 <= value[0] <= 100, ": give 1 to 100 operations, one pass each"),
)


def _check_values(recipe: Recipe) -> None:
    if recipe.name in ("", ".", "..") or set(recipe.name) & set("/\\"):  # runs/NAME is where it trains by default
        raise EspalierError(f"name {recipe.name!r:.100}: choose one that a folder can bear")
    for names, holds, otherwise in _RULES:
        for name in names:
            if not holds(value := getattr(recipe, name)):
                raise EspalierError(f"{name} {value}{otherwise}")
    check_sizes(recipe.model, recipe.model_args)
    if recipe.batch_size % recipe.accumulate:
        raise EspalierError(f"batch_size {recipe.batch_size} is not divisible by accumulate {recipe.accumulate}")
    if recipe.warmup_epochs > recipe.epochs:
        raise EspalierError(f"warmup_epochs {recipe.warmup_epochs} is longer than the {recipe.epochs} epochs")
    if recipe.schedule == "piecewise" and recipe.warmup_epochs:
        raise EspalierError("schedule 'piecewise' begins with a warm-up of its own: set warmup_epochs to 0")


def check_sizes(model: str, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that name a size that no model of this library can have.

    Raises:
        EspalierError: the argument, its value, and what it can be.
    """
    if not is_reference(model):  # a net of the user's own gives the names meanings of its own
        for name, value in arguments.items():
            _check_size(name, value)


def _check_size(name: str, value: Any) -> None:
    """Refuse a size that no model of this library can have: each would build something, without end or of nothing."""
    if name == "pattern" and isinstance(value, str):
        if sum(int(count) for count in re.findall(r"\*\s*(\d{1,18})", value)) > _DEEPEST:
            raise EspalierError(f"model_args: pattern {value[:60]!r} is too deep: give at most {_DEEPEST} blocks")
        return
    least, most = (0, _DEEPEST) if name in _DEPTHS else (1, 10**18)
    for number in value if isinstance(value, tuple) else (value,):
        if name in (*_DEPTHS, *_SIZES) and isinstance(number, int) and not least <= number <= most:
            wanted = f"a whole number from {least}" + (f" to {most}" if name in _DEPTHS else "")
            raise EspalierError(f"model_args: {name} {value} is no size of a model: give {wanted}")


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _misfit(value: Any, kind: Any) -> str:
    """Return why a value is not of a type, by the checker that tyro brings; empty if it is."""
    guard = require("typeguard", "train")
    # To Python, and so to the checker, True is a number.
    if kind is not bool and any(isinstance(part, bool) for part in (value if isinstance(value, tuple) else (value,))):
        return "bool is not expected"
    for leaf in _leaves(value):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            return "a finite number is expected"
        if isinstance(leaf, int) and abs(leaf) >= 10**18:  # more than torch can count to
            return "a whole number of at most 18 digits is expected"
        if isinstance(leaf, str) and "\0" in leaf:  # which no name or path can hold
            return "text without NUL characters is expected"
    try:
        guard.check_type(value, kind, collection_check_strategy=guard.CollectionCheckStrategy.ALL_ITEMS)
    except guard.TypeCheckError as error:
        return " ".join(str(error).split())
    return ""


def _leaves(value: Any) -> Iterator[Any]:
    """Yield every plain value in it, however deep, and the keys of mappings."""
    if isinstance(value, Mapping):
        value = (*value, *value.values())
    if isinstance(value, tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _convert(value: Any, kind: Any) -> Any:
    # 1 and 1.0 must make the same run folder: a whole number in a float field becomes a float.
    if kind is float:
        return float(value)
    if get_origin(kind) is not tuple:
        return value
    parts = get_args(kind)
    return tuple(map(_convert, value, parts[:1] * len(value) if parts[-1] is ... else parts))
