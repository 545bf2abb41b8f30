"""Plain-text tables, one look for all of them."""

from __future__ import annotations

from collections.abc import Sequence


def plain_table(rows: Sequence[Sequence[str]]) -> str:
    """Return ``table_lines`` as one text."""
    return "\n".join(table_lines(rows))


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the first row as a heading, a line under it and the other rows, every column as wide as its widest cell.

    Args:
        rows: cells as text, the same number in every row.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("─" * width for width in widths), *lines[1:]]
