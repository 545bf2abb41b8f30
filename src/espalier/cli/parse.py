"""From the words after a command to its arguments, by tyro; the recipe's fields are among them, errors are one line."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from espalier.cli.recipe_flags import (
    KEYWORD_FIELDS,
    full_names,
    merge_keyword_fields,
    refuse_twice,
    refuse_unused_fields,
    split_keyword_fields,
    with_keywords_of,
    with_short_keywords,
)
from espalier.errors import EspalierError, path_of, unknown_name
from espalier.files import named
from espalier.recipes import Recipe, get_recipe, recipe_functions
from espalier.recipes.files import open_recipe

Command = Callable[..., None]

_NARROWEST = 40

# What other tools call our options: where letters alone would suggest nothing, or something else.
_ELSEWHERE = {
    "accumulate": ("grad-accumulation-steps", "gradient-accumulation-steps"),
    "batch-size": ("bs", "device-batch-size"),
    "clip-norm": ("max-grad-norm",),
    "epochs": ("max-epochs", "num-epochs", "num-train-epochs"),
    "eval-every": ("val-every",),
    "label-smoothing": ("smoothing",),
    "lr": ("learning-rate",),
    "out": ("log-dir", "output", "output-dir"),
    "weight-decay": ("wd",),
    "workers": ("num-workers",),
}


def takes_recipe(command: Command) -> bool:
    """Whether a command has a recipe, whose fields are then options of the command itself."""
    return "recipe" in inspect.signature(command).parameters


def parse(name: str, command: Command, tokens: Sequence[str]) -> dict[str, Any]:
    """Return the arguments by name with which ``tokens`` call a command; ``--help`` prints its help and exits.

    Args:
        name: the command's name.
        command: a typed function; see ``takes_recipe``.
        tokens: what follows the command's name.

    Raises:
        EspalierError: an option that the command does not have (the message suggests one), a value of the wrong kind,
            or a missing argument.
        SystemExit: help was asked for.
    """
    for token in tokens:  # tyro has words of its own for what goes wrong inside a list of paths
        path_of("the path", token.partition("=")[2] if token.startswith("--") else token)
    base = named_recipe = None
    if takes_recipe(command):
        tokens = [re.sub(r"^--data(?==|\Z)", "--data-path", token) for token in tokens]  # what is typed most
        # The recipe comes first, because its values are the defaults that the help shows and that the rest changes.
        named = bool(tokens) and not tokens[0].startswith("-")
        if not named and not {"-h", "--help"} & set(tokens):
            raise EspalierError(
                f"{name} needs a recipe: name a file, or one of {', '.join(sorted(recipe_functions()))}"
            )
        base = named_recipe = open_recipe(tokens[0]) if named else get_recipe("digits_vit")
        tokens, keywords = split_keyword_fields(tokens[1:] if named else tokens)
        base = merge_keyword_fields(base, tokens, keywords)
        refuse_twice(tokens, keywords, with_short_keywords(base, inspect.signature(command).parameters))
    typed = typed_arguments(command, base)
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), _legible():
            found, unknown = tyro.cli(
                typed, prog=f"espalier {name}" + (" RECIPE" if base else ""), args=tokens, return_unknown_args=True,
                config=(tyro.conf.PositionalRequiredArgs,), registry=option_rules(tyro),
            )  # fmt: skip
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise _refusal(name, command, complaint.getvalue()) from None
    if unknown:
        raise _unknown(name, unknown[0], typed, base)
    if base is not None:
        found["recipe"] = with_keywords_of(base, found["recipe"])
    # To tyro, no words at all are a list of none.
    if any(found[each.name] in ((), []) for each in _required(command)):
        raise _missing(name, command)
    if named_recipe is not None and "arms" in found:
        refuse_unused_fields(named_recipe, found["recipe"], found["arms"], found["lrs"])
    return dict(found)


@contextlib.contextmanager
def _legible() -> Iterator[None]:
    """Have columns enough for the length of a ``with`` block: tyro's boxes do not end where a word has no place."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(max(_NARROWEST, shutil.get_terminal_size().columns))
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def typed_arguments(command: Command, base: Recipe | None) -> Callable[..., dict[str, Any]]:
    """Return a function with a command's signature, types for strings, that returns its arguments instead of acting.

    Args:
        command: the command.
        base: the default of its recipe, whose fields become options without a prefix (``--lr``), and its keywords where
            that is clear (``with_short_keywords``).
    """
    import tyro

    positional: Any = tyro.conf.Positional
    hints = get_type_hints(command, globalns={**command.__globals__, "Recipe": Recipe})
    parameters = list(inspect.signature(command).parameters.values())
    for index, each in enumerate(parameters):
        hint, default = hints[each.name], each.default
        if hint is Recipe:
            hint, default = tyro.conf.OmitArgPrefixes[Recipe], base and with_short_keywords(base, hints)
        elif default is inspect.Parameter.empty:
            hint = Annotated[hint, tyro.conf.arg(metavar=each.name.upper(), help_behavior_hint="(required)")]
        elif default is None:
            # What its default means stands in its description.
            alone = len(parameters) == 1
            told = tyro.conf.arg(help_behavior_hint="", metavar=f"[{each.name.upper()}]" if alone else None)
            hint = Annotated[hint, told]
            hint = positional[hint] if alone else hint
        parameters[index] = each.replace(annotation=hint, default=default)

    def arguments(**values: Any) -> dict[str, Any]:
        return values

    arguments.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    arguments.__annotations__ = {each.name: each.annotation for each in parameters}
    arguments.__doc__ = command.__doc__
    return arguments


def option_rules(tyro: Any) -> Any:
    """Return rules of our own: paths that name something, and options that may be left out shown as ``--out PATH``."""
    registry = tyro.constructors.ConstructorRegistry()
    spec = tyro.constructors.PrimitiveConstructorSpec

    def read_path(words: list[str]) -> Path:
        path = path_of("the path", words[0])
        if not words[0]:
            raise ValueError("an empty path: name a file or folder")
        return named(path)

    @registry.primitive_rule
    def paths(info: Any) -> Any:
        if info.type is not Path:
            return None
        return spec(
            nargs=1, metavar="PATH", instance_from_str=read_path, is_instance=lambda value: isinstance(value, Path),
            str_from_instance=lambda value: [str(value)],
        )  # fmt: skip

    @registry.primitive_rule
    def optional(info: Any) -> Any:
        kinds = get_args(info.type)
        if get_origin(info.type) not in (Union, UnionType) or NoneType not in kinds or len(kinds) != 2:
            return None
        kind = next(each for each in kinds if each is not NoneType)
        inner = registry.get_primitive_spec(tyro.constructors.PrimitiveTypeInfo.make(kind, info.markers))
        width = inner.nargs if isinstance(inner.nargs, tuple) else (inner.nargs,)
        return spec(
            nargs=inner.nargs if inner.nargs in (1, "*") else (1, *width),
            metavar=inner.metavar,
            instance_from_str=lambda words: None if words in (["None"], ["none"]) else inner.instance_from_str(words),
            is_instance=lambda value: value is None or inner.is_instance(value),
            str_from_instance=lambda value: ["none"] if value is None else inner.str_from_instance(value),
        )

    return registry


def _refusal(name: str, command: Command, box: str) -> EspalierError:
    """Return what tyro says in a box as one sentence, without the box and its hints."""
    lines = [line.strip("│╭╮╰╯─┌┐└┘|+- \t") for line in box.splitlines()]
    text = " ".join(line for line in lines[1:] if line and not line.startswith("For full helptext"))
    if text.startswith("Missing from"):
        return _missing(name, command)
    text = text.partition(" Argument helptext:")[0].removeprefix("Error parsing ")
    return EspalierError(f"{name}: {text or ' '.join(box.split())}")


def _required(command: Command) -> list[inspect.Parameter]:
    parameters = inspect.signature(command).parameters.values()
    return [each for each in parameters if each.default is inspect.Parameter.empty and each.name != "recipe"]


def _missing(name: str, command: Command) -> EspalierError:
    needed = " ".join(each.name.upper() for each in _required(command))
    return EspalierError(f"{name} needs {needed}: espalier {name} --help says what that is")


def _unknown(name: str, token: str, typed: Callable[..., Any], base: Recipe | None) -> EspalierError:
    if not token.startswith("-"):
        return EspalierError(f"{name}: {token!r} is one word too many: options begin with --")
    flag = token.partition("=")[0].lstrip("-").replace("_", "-")
    if base is not None and (full := full_names(base, flag)):
        return EspalierError(f"unknown option --{flag} of {name}: write {' or '.join(full)}")
    parameters = list(inspect.signature(typed).parameters.values())
    given = [each for each in parameters if each.default is not each.empty and each.name != "recipe"]
    known = ["help", *(each.name for each in given if len(parameters) > 1)]  # a single one stands without its name
    if base is not None:
        known += [each.name for each in fields(Recipe) if each.name not in KEYWORD_FIELDS] + ["data"]
    options = [each.replace("_", "-") for each in known]
    for ours, theirs in _ELSEWHERE.items():
        if flag in theirs and ours in options:
            return EspalierError(f"unknown option --{flag} of {name}: did you mean --{ours}?")
    return unknown_name(f"option of {name}", f"--{flag}", [f"--{each}" for each in options])
