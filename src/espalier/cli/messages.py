"""What the command line says besides results: one line each, whatever stands in the names that it repeats."""

from __future__ import annotations

import sys

from espalier.errors import shown


def say(text: object) -> None:
    """Print one line on standard error."""
    print(shown(text), file=sys.stderr)
