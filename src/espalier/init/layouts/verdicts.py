"""Verdicts on modules, kept by all that decides them (``module_key``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from espalier.init.layouts.scratch import CannotRunError, first_line
from espalier.init.layouts.trial import Unproven

# A note, what a run needs, or a refusal.
KNOWN: dict[Any, Any] = {}
_KEPT = 4096


def cached(key: Any, compute: Callable[[], Any]) -> Any:
    """Return a verdict, or raise it again if it was a refusal."""
    if key not in KNOWN:
        if len(KNOWN) >= _KEPT:
            KNOWN.clear()
        try:
            KNOWN[key] = compute()
        except (Unproven, CannotRunError) as error:
            # Made anew: what was raised holds the frames of the run, and with them the module and its copy.
            KNOWN[key] = type(error)(*error.args)
        except Exception as error:  # of anybody's code, in whatever shape: one layer must not stop the others
            KNOWN[key] = CannotRunError(first_line(error))
    verdict = KNOWN[key]
    if isinstance(verdict, Exception):
        raise type(verdict)(*verdict.args)
    return verdict
