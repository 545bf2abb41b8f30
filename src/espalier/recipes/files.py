"""Recipes by name or as a file of a few lines: YAML or JSON, a base and the fields that differ from it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from espalier.errors import EspalierError, require, told
from espalier.files import read_regular
from espalier.lookup import is_reference
from espalier.recipes.base import Recipe, get_recipe
from espalier.recipes.validation import from_values, read_json, recipe_to_dict, refuse_repeated

_YAML = (".yaml", ".yml")
_INT = "tag:yaml.org,2002:int"
# Of the core schema of YAML 1.2; what is an integer is not a float.
_NUMBERS = {
    _INT: r"^([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$",
    "tag:yaml.org,2002:float": (
        r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
}


def open_recipe(spec: str) -> Recipe:
    """Return the recipe that ``spec`` names: a registered one, ``FILE.py:NAME``, or a file in .yaml, .yml or .json.

    The file holds fields of ``Recipe``; ``base`` names the registered recipe from which the other fields come, else
    they have their defaults. Without a ``name`` it bears the file's.

    Args:
        spec: a name, or the path of a file.

    Raises:
        EspalierError: no such recipe or file, a file that is damaged, a function that fails, an unknown or ill-typed
            field.
    """
    path = Path(spec)
    if path.suffix not in (*_YAML, ".json"):
        recipe = get_recipe(spec)
        # What a function of the user's own puts into the fields nobody has looked at.
        return from_values(Recipe, recipe_to_dict(recipe), where=f"recipe {spec}") if is_reference(spec) else recipe
    try:
        text = read_regular(path).decode()
    except (OSError, ValueError) as error:
        raise EspalierError(f"recipe file {spec!r} cannot be read: {getattr(error, 'strerror', error)}") from None
    values = read_yaml(text, spec) if path.suffix in _YAML else read_json(text, spec)
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise EspalierError(f"recipe file {spec!r} holds no fields: write lines such as base: digits_vit and lr: 1e-3")
    values = dict(values)
    base = values.pop("base", None)
    if base is not None:
        values = {**recipe_to_dict(get_recipe(str(base))), "name": path.stem, **values}
    return from_values(Recipe, {"name": path.stem, **values}, where=f"recipe file {spec!r}")


def show_recipe(recipe: Recipe) -> str:
    """Return a recipe as YAML that ``open_recipe`` reads back; values are written as JSON, which YAML contains."""
    return "\n".join(f"{name}: {json.dumps(value)}" for name, value in recipe_to_dict(recipe).items())


def read_yaml(text: str, where: str) -> Any:
    """Return what a YAML text says, without running code that is in it; numbers are those of YAML 1.2.

    Raises:
        EspalierError: it is no YAML; the message begins with ``where``.
        MissingExtraError: PyYAML is not installed.
    """
    yaml = require("yaml", "train")

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]
        """To YAML 1.1, which PyYAML reads, 1e-3 is text, 0100 is 64 and 1:30 is 90; here they are as in YAML 1.2."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            """Return the mapping of a node; a key that stands there twice is refused (ValueError)."""
            keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            refuse_repeated([(key, None) for key in keys if isinstance(key, str)])
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag not in _NUMBERS]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for tag, pattern in _NUMBERS.items():
        Loader.add_implicit_resolver(tag, re.compile(pattern), list("-+.0123456789"))
    Loader.add_constructor(_INT, lambda loader, node: _whole(loader.construct_scalar(node)))
    try:
        return yaml.load(text, Loader)  # a SafeLoader: it builds plain values alone
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise EspalierError(f"recipe file {where!r} is no YAML: {told(error)}") from None


def _whole(text: str) -> int:
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text if base == 10 else text[2:], base)
