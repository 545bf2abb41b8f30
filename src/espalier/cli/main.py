"""From the words on a command line to one call of a command, and from an error to an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from espalier.cli.commands import COMMANDS, compare, train
from espalier.cli.recipe_flags import merge_keyword_fields, split_keyword_fields
from espalier.errors import EspalierError, require, unknown_name
from espalier.recipes import Recipe, get_recipe, recipe_functions


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on ``argv`` and return the exit status: 0 done, 2 bad input, 130 stopped, 141 cut off."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _dispatch(arguments)
        sys.stdout.flush()
        _leave_process_group()
    except BrokenPipeError:  # who reads our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails again
        return 141
    except KeyboardInterrupt as stop:
        print(f"espalier: {stop or 'interrupted; the same command goes on where it stopped'}", file=sys.stderr)
        return 130
    except EspalierError as error:
        print(f"espalier: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"espalier: {error.filename or ''}: {error.strerror or error}: free some space or name another path",
              file=sys.stderr)  # fmt: skip
        return 2
    return 0


def _leave_process_group() -> None:
    """End what torchrun's processes share: left to the interpreter's end, its threads may abort a finished run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: espalier COMMAND …   (espalier COMMAND --help says more)\n")
        for name, command in COMMANDS.items():
            print(f"  {name:<10} {(command.__doc__ or '').splitlines()[0]}")
        return
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS)
    tyro = require("tyro", "train")
    if name in ("train", "compare"):
        _run_with_recipe(tyro, name, rest)
    else:
        tyro.cli(COMMANDS[name], prog=f"espalier {name}", args=rest, config=(tyro.conf.PositionalRequiredArgs,))


def _run_with_recipe(tyro: Any, command: str, tokens: list[str]) -> None:
    # The recipe comes first, because its values are the defaults that the help shows and that the rest changes.
    named = bool(tokens) and not tokens[0].startswith("-")
    if not named and not {"-h", "--help"} & set(tokens):
        raise EspalierError(f"espalier {command} needs a recipe: choose one of {', '.join(sorted(recipe_functions()))}")
    base = get_recipe(tokens[0] if named else "digits_vit")
    # --data is short for --data-path: the place of the data is what is typed most.
    tokens = ["--data-path" if token == "--data" else token for token in tokens]
    rest, keywords = split_keyword_fields(tokens[1:] if named else tokens)
    base = merge_keyword_fields(base, keywords)

    def train_command(
        recipe: Recipe = base, out: Path | None = None, resume: Literal["auto", "never"] = "auto", quiet: bool = False
    ) -> None:
        train(recipe, out or Path("runs") / recipe.name, resume, quiet)

    def compare_command(
        recipe: Recipe = base,
        arms: tuple[str, ...] = ("default", "structured"),
        out: Path | None = None,
        lrs: tuple[str, ...] = ("auto",),
        seeds: int = 3,
        workers: int = 2,
        cluster: Literal["local", "slurm"] = "local",
    ) -> None:
        compare(recipe, arms, out or Path("runs") / f"compare-{recipe.name}", lrs, seeds, workers, cluster)

    chosen: Callable[..., None] = train_command if command == "train" else compare_command
    chosen.__doc__ = COMMANDS[command].__doc__
    # Its fields become flags of the command itself (--lr), not of an argument (--recipe.lr).
    chosen.__annotations__["recipe"] = tyro.conf.OmitArgPrefixes[Recipe]
    tyro.cli(chosen, prog=f"espalier {command} RECIPE", args=rest)
