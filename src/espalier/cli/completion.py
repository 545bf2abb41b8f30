"""Completion of commands, options and choices in a shell."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from typing import Literal

Shell = Literal["bash", "zsh", "fish"]


def completion_script(commands: Mapping[str, Callable[..., None]], shell: Shell) -> str:
    """Return a shell's script that completes ``espalier``: commands, their options and choices.

    Args:
        commands: the commands by name.
        shell: ``"bash"``, ``"zsh"`` or ``"fish"``.
    """
    import tyro

    from espalier.cli.parse import option_rules, takes_recipe, typed_arguments
    from espalier.recipes import get_recipe

    typed = {
        name: typed_arguments(command, get_recipe("digits_vit") if takes_recipe(command) else None)
        for name, command in commands.items()
    }
    script = io.StringIO()
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(
            typed, prog="espalier", args=["--tyro-print-completion", shell],
            config=(tyro.conf.PositionalRequiredArgs,), registry=option_rules(tyro),
        )  # fmt: skip
    return script.getvalue()
