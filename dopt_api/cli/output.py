"""How commands print: tables for people, JSON for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from dopt_api.errors import OutputError
from dopt_api.files import staged

__all__ = ["as_json_option", "make_folder", "print_json", "print_table"]

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
"""The option ``--json``, the same for each command."""

NOT_A_TERMINAL = 10_000
"""Columns where there is no terminal to fit: nothing is cut in files and pipes."""


def make_folder(folder: Path) -> Path:
    """Make a folder and those above it, where they are not there.

    Raises:
        OutputError: It cannot be made, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with staged(folder):
            pass  # nothing is written: it can be
    except OSError as error:
        raise OutputError(
            f"The folder {str(folder)!r} cannot be made: {error.strerror or error}",
            where=str(folder.absolute()),
            expected="a folder that may be written to",
            fix="Pass another one.",
        ) from error
    return folder


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> None:
    """Print a table, with colours on a terminal alone.

    Args:
        columns: The headings.
        rows: What stands below; texts are shown as they are.
        right: The headings of those columns that are numbers.
    """
    from rich.console import Console  # noqa: PLC0415  # help does not need it
    from rich.table import Table  # noqa: PLC0415  # likewise
    from rich.text import Text  # noqa: PLC0415  # likewise

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else NOT_A_TERMINAL).print(table)
