"""From the words on a command line to one call of a command, and from an error to an exit status."""

from __future__ import annotations

import errno
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

from espalier import __version__
from espalier.cli.commands import COMMANDS
from espalier.cli.messages import say
from espalier.cli.outputs import spare_inputs
from espalier.errors import EspalierError, told, unknown_name
from espalier.heap import keep_freed_memory
from espalier.lookup import own_place
from espalier.memory import is_exhausted

_REMEDIES = {
    errno.ENOSPC: "free some space, or name another path",
    errno.EDQUOT: "free some space, or name another path",
    errno.ENOENT: "name a path that exists",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "name a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}

# Importing torch takes a second or two: not before a command that needs it.

INTERNAL_ERROR = 70
"""Exit status of an error that is ours (EX_SOFTWARE)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on ``argv`` and return the exit status.

    0 done, 1 done and bad news, 2 bad input, 70 an error in espalier, 75 stopped by a signal and
    resumable, 130 stopped by Ctrl-C, 141 cut off.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_streams()
    try:
        _dispatch(arguments)
        sys.stdout.flush()
        leave_process_group()
    except BrokenPipeError:  # who reads our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails again
        return 141
    except KeyboardInterrupt as stop:
        if hasattr(stop, "status"):  # all ranks stop at one step; a bare Ctrl-C may leave one waiting for another
            leave_process_group()
        return _complain(str(stop) or "interrupted: run the same command again to resume", getattr(stop, "status", 130))
    except EspalierError as error:
        _show_traceback()
        return _complain(error, 2)
    except OSError as error:
        return _complain(_os_error(error), 2)
    except Exception as error:
        _show_traceback()
        if is_exhausted(error):
            return _complain("out of memory: choose a smaller model or batch", 2)
        text = told(error)
        if place := own_place(error):  # in training, where the checks before it cannot see
            return _complain(f"your code fails with {text}{place}", 2)
        hint = "ESPALIER_TRACEBACK=1 shows where; please report it"
        return _complain(f"error in espalier itself ({text}): {hint}", INTERNAL_ERROR)
    return 0


def _open_streams() -> None:
    """Have somewhere to print, whoever started us with closed streams, and print whatever the encoding has no sign for.

    A result that cannot be shown in full, after hours of training, is no reason to end without its files.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # else the next file opened would be standard output
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 — as long as the process
        elif name == "stdout" and hasattr(stream, "reconfigure"):  # standard error writes such signs out already
            stream.reconfigure(errors="replace")


def _dispatch(arguments: list[str]) -> None:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("help", [])
    if name in ("help", "-h", "--help"):
        if not rest:
            return print(_overview())
        name, rest = rest[0], ["--help"]
    if name in ("--version", "-V", "version"):
        return print(f"espalier {__version__}")
    if name not in COMMANDS:
        raise unknown_name("command", name, [*COMMANDS, "help", "--version"])
    keep_freed_memory()
    from espalier.cli.parse import parse

    found = parse(name, COMMANDS[name], rest)
    spare_inputs(found)
    return COMMANDS[name](**found)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    usage = "espalier COMMAND --help   the arguments and options of a command"
    return "\n".join(["usage: espalier COMMAND …", "", *lines, "", usage, "espalier --version        the version"])


def _complain(message: object, status: int) -> int:
    # Under torchrun every process meets the same error: one line each, and it says whose.
    rank = os.environ.get("RANK", "0") if "TORCHELASTIC_RUN_ID" in os.environ else "0"
    say(f"espalier{'' if rank == '0' else f' (rank {rank})'}: {message}")
    return status


def _show_traceback() -> None:
    if os.environ.get("ESPALIER_TRACEBACK"):
        traceback.print_exc()


def _os_error(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}: {_REMEDIES.get(error.errno or 0, 'name another path')}"


def leave_process_group() -> None:
    """End what torchrun's processes share, as the last thing before the interpreter ends.

    A worker thread of gloo that lets go of a tensor while the interpreter ends aborts a process whose work is done.
    Destroying the group does not end those threads where something in torch still refers to it (default arguments of
    ``torch.distributed.nn``, caches of device meshes), so they get time to finish what they hold.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(0.2)
