"""Changes of a recipe's keyword fields as they are typed: ``--model-args.embed-dim 64``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from espalier.errors import EspalierError, unknown_name
from espalier.recipes.base import Recipe

KEYWORD_FIELDS = ("data_args", "init_args", "loss_args", "model_args")


def split_keyword_fields(tokens: Sequence[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Take ``--FIELD.KEY VALUE`` pairs out of ``tokens``; values are JSON where they parse as such, else text.

    These fields are open dictionaries (their keys belong to the model or the data), so no fixed parser knows them.

    Args:
        tokens: command-line arguments.

    Returns:
        The other tokens in order, and the values by field and key.

    Raises:
        EspalierError: an unknown field, or a key without a value.
    """
    rest: list[str] = []
    found: dict[str, dict[str, Any]] = {}
    stream = iter(tokens)
    for token in stream:
        head, dot, tail = token.partition(".")
        if not (head.startswith("--") and dot and head[2:].replace("-", "").replace("_", "").isalpha()):
            rest.append(token)
            continue
        field = head[2:].replace("-", "_")
        if field not in KEYWORD_FIELDS:
            raise unknown_name("keyword field", field, KEYWORD_FIELDS)
        key, equals, text = tail.partition("=")
        if not equals:
            value = next(stream, None)
            if value is None:
                raise EspalierError(f"{token} has no value: write {token} VALUE")
            text = value
        found.setdefault(field, {})[key.replace("-", "_")] = _json_or_text(text)
    return rest, found


def merge_keyword_fields(recipe: Recipe, found: dict[str, dict[str, Any]]) -> Recipe:
    """Return ``recipe`` with the keyword fields of ``found`` laid over its own."""
    changes: dict[str, Any] = {field: {**getattr(recipe, field), **values} for field, values in found.items()}
    return replace(recipe, **changes)


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
