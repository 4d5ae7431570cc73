"""Lists for people, on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

import click

_UNITS = ((86400, "d"), (3600, "h"), (60, "m"))


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns; the last one is as wide as it is."""
    columns = len(rows[0])
    widths = [max(len(row[column]) for row in rows) for column in range(columns - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*cells, row[-1]]))


def duration(seconds: float) -> str:
    """A time in its largest unit: ``3h``."""
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"
