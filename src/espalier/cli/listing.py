"""Commands that list what there is: recipes, models, arms, initialisations."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any


def recipes(name: str | None = None) -> None:
    """List the recipes, or print one as a file that `espalier train FILE.yaml` takes.

    Args:
        name: the recipe to print, or a file.
    """
    from espalier.recipes import recipe_functions
    from espalier.recipes.files import open_recipe, show_recipe

    functions = recipe_functions()
    if name is None:
        return _print_first_lines(functions)
    recipe = open_recipe(name)
    for line in (getattr(functions.get(name), "__doc__", None) or "").strip().splitlines():
        print(f"# {line.strip()}".rstrip())
    return print(show_recipe(recipe))


def models() -> None:
    """List the models that `--model` and `espalier:NAME` name."""
    from espalier.models import MODELS

    _print_first_lines(MODELS)


def datasets() -> None:
    """List the data sets that `--dataset` names."""
    from espalier.data import SOURCES

    _print_first_lines(SOURCES)


def arms() -> None:
    """List the arms that `espalier compare --arms` names, with what each changes in a recipe."""
    from espalier.recipes import ARMS

    width = max(map(len, ARMS))
    for name, changes in ARMS.items():
        told = [f"{field} {json.dumps(value)}" for field, value in changes.items() if value not in ("", {})]
        print(f"{name:<{width}}  {', '.join(told)}")


def inits() -> None:
    """List the initialisations that `--init` names."""
    from espalier.recipes import INITS

    _print_first_lines(INITS)


def _print_first_lines(functions: Mapping[str, Callable[..., Any]]) -> None:
    width = max(map(len, functions))
    for name, function in sorted(functions.items()):
        if isinstance(function, partial):
            values = ", ".join(f"{key} {value}" for key, value in function.keywords.items())
            line = f"{function.func.__name__} with {values}"
        else:
            line = (function.__doc__ or "").strip().partition("\n")[0].removeprefix("Return ").replace("``", "`")
        print(f"{name:<{width}}  {line}")
