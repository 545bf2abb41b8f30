"""What the command line says besides results: one line each, whatever stands in the names that it repeats."""

from __future__ import annotations

import sys


def say(text: object) -> None:
    """Print one line on standard error; line breaks and other gaps inside the text become single spaces."""
    print(" ".join(str(text).split()), file=sys.stderr)
