"""Changes of a recipe's keyword fields as they are typed: ``--model-args.embed-dim 64``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

from espalier.errors import EspalierError, path_of, require_known
from espalier.recipes import ARMS, Recipe

KEYWORD_FIELDS = ("data_args", "init_args", "loss_args", "model_args")

# Note [Short keywords]
# The keywords that a recipe gives are options without their field, too: ``--depth 2``. Their names belong to somebody
# else's functions, so one may be an option of the command as well, or stand in two fields. Such a keyword has its full
# name alone, ``--model-args.seed 1``; so has a mapping, whose keys would be options in turn.


def split_keyword_fields(tokens: Sequence[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Take ``--FIELD.KEY VALUE`` pairs out of ``tokens``; values are JSON where they parse as such, with true
    and false in any case, else text.

    ``--init FILE.safetensors`` is short for ``--init transferred --init-args.statistics FILE.safetensors``. These
    fields are open dictionaries (their keys belong to the model or the data), so no fixed parser knows them.

    Args:
        tokens: command-line arguments.

    Returns:
        The other tokens in order, and the values by field and key.

    Raises:
        EspalierError: an unknown field, or a key without a value.
    """
    rest: list[str] = []
    found: dict[str, dict[str, Any]] = {}
    stream = iter(_named_statistics(tokens))
    for token in stream:
        head, dot, tail = token.partition(".")
        if not (head.startswith("--") and dot and head[2:].replace("-", "").replace("_", "").isalpha()):
            rest.append(token)
            continue
        field = head[2:].replace("-", "_")
        require_known("keyword field", field, KEYWORD_FIELDS)
        key, equals, text = tail.partition("=")
        value: Any = text if equals else next(stream, None)
        if value is None:
            raise EspalierError(f"{token} has no value: write {token} VALUE")
        with suppress(json.JSONDecodeError):
            # As the switches of a recipe's own fields may be written.
            value = json.loads(value.lower() if value.lower() in ("true", "false") else value)
        found.setdefault(field, {})[key.replace("-", "_")] = value
    return rest, found


def merge_keyword_fields(recipe: Recipe, tokens: Sequence[str], found: dict[str, dict[str, Any]]) -> Recipe:
    """Return ``recipe`` with the keyword fields of ``found`` laid over its own.

    What ``tokens`` replace by another has lost its arguments before: a ViT's mean nothing to another net.
    """
    changes: dict[str, Any] = {}
    for arguments in KEYWORD_FIELDS:
        field = arguments.removesuffix("_args").replace("data", "dataset")
        typed = [after for token, after in pairwise(tokens) if token == f"--{field}"]
        typed += [token.partition("=")[2] for token in tokens if token.startswith(f"--{field}=")]
        replaced = typed and typed[-1] != getattr(recipe, field)
        changes[arguments] = {**({} if replaced else getattr(recipe, arguments)), **found.get(arguments, {})}
    return replace(recipe, **changes)


def with_short_keywords(recipe: Recipe, parameters: Iterable[str]) -> Recipe:
    """Return ``recipe`` with those keywords alone that have a name without their field (Note [Short keywords]).

    Args:
        recipe: the recipe.
        parameters: of the command.
    """
    taken = ["help", "data", *parameters, *(each.name for each in fields(Recipe))]
    flags = Counter(flag for name in taken for flag in _flags(name))
    flags.update(flag for field in KEYWORD_FIELDS for name in getattr(recipe, field) for flag in _flags(name))
    changes: dict[str, Any] = {
        field: {
            name: value
            for name, value in getattr(recipe, field).items()
            if name.isidentifier() and not isinstance(value, Mapping) and all(flags[flag] == 1 for flag in _flags(name))
        }
        for field in KEYWORD_FIELDS
    }
    return replace(recipe, **changes)


def with_keywords_of(base: Recipe, recipe: Recipe) -> Recipe:
    """Return ``recipe`` with the keywords of ``base`` that it does not have."""
    changes: dict[str, Any] = {field: {**getattr(base, field), **getattr(recipe, field)} for field in KEYWORD_FIELDS}
    return replace(recipe, **changes)


def full_names(recipe: Recipe, flag: str) -> list[str]:
    """Return the options that set a keyword of this name, with their fields: ``--model-args.depth``."""
    return [
        f"--{field.replace('_', '-')}.{flag}"
        for field in KEYWORD_FIELDS
        if any(_flags(name)[0] == flag for name in getattr(recipe, field))
    ]


def refuse_twice(tokens: Sequence[str], found: Mapping[str, Mapping[str, Any]], short: Recipe) -> None:
    """Refuse a keyword that is typed with its field and without.

    Args:
        tokens: the command-line arguments but for those with a field.
        found: the values of those, by field and key.
        short: the recipe with the keywords that have both names.

    Raises:
        EspalierError: which one.
    """
    typed = {token.partition("=")[0].replace("_", "-") for token in tokens if token.startswith("--")}
    for field, values in found.items():
        for name in values.keys() & getattr(short, field).keys():
            for flag in _flags(name):
                if f"--{flag}" in typed:
                    full = f"--{field.replace('_', '-')}.{_flags(name)[0]}"
                    raise EspalierError(f"--{flag} and {full} set the same argument: write one of them")


def _flags(name: str) -> tuple[str, str]:
    """Return the options that an argument of this name can be; a switch has the second to be turned off."""
    flag = name.replace("_", "-")
    return flag, f"no-{flag}"


def refuse_unused_fields(base: Recipe, recipe: Recipe, arms: Sequence[str], lrs: Sequence[str]) -> None:
    """Refuse changes of a recipe that no trial of a comparison would follow.

    Args:
        base: the recipe as it is named.
        recipe: the recipe as it was typed.
        arms: the arms, which set some fields themselves.
        lrs: the learning rates.

    Raises:
        EspalierError: a field that was changed and is not used; the message says what to write.
    """
    unused = dict.fromkeys(
        [name for name in ARMS["default"] if all(name in ARMS.get(arm, ARMS["default"]) for arm in arms)],
        "every arm sets its own: name arms with --arms, or your own initialisation there, FILE.py:NAME",
    )
    if recipe.init == "transferred" and "init_args" not in unused:  # the statistics of --init FILE.safetensors
        del unused["init"]
    unused["seed"] = "every arm gets the seeds 0, 1, …: say how many with --seeds"
    if list(lrs) != ["auto"]:
        unused["lr"] = "every arm gets the rates of --lrs"
    for field, reason in unused.items():
        if (value := getattr(recipe, field)) != getattr(base, field):
            shown = value if isinstance(value, str | int | float) else ""
            raise EspalierError(f"--{field.replace('_', '-')} {shown}".rstrip() + f" is not used by compare: {reason}")


def _named_statistics(tokens: Sequence[str]) -> list[str]:
    spelt: list[str] = []
    for token in tokens:
        flag, _, value = token.partition("=") if token.startswith("--init=") else ("", "", token)
        if value.endswith(".safetensors") and (flag or spelt[-1:] == ["--init"]):
            spelt = spelt if flag else spelt[:-1]
            # Absolute: the recipe that is saved beside the run must mean the same file from anywhere.
            spelt += ["--init", "transferred", "--init-args.statistics", str(path_of("--init", value).resolve())]
        else:
            spelt.append(token)
    return spelt
