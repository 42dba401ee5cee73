"""Where output goes: results to stdout, everything else to stderr; with ``--json``, stdout is JSON alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

WIDE = 160  # columns of output that is piped: tables are not folded for a terminal that is not there


def out() -> Console:
    """Standard output, for results."""
    return Console(width=None if sys.stdout.isatty() else WIDE, highlight=False)


def err() -> Console:
    """Standard error, for progress, warnings and errors."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else WIDE, highlight=False)


def emit(data: Any) -> None:
    """JSON on standard output."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


def warn(message: str) -> None:
    """A line on standard error that begins with ``warning:``."""
    err().print(f"[yellow]warning:[/] {escape(message)}", soft_wrap=True)


def fail(message: str) -> None:
    """A line on standard error that begins with ``error:``."""
    err().print(f"[red]error:[/] {escape(message)}", soft_wrap=True)


def note(message: str) -> None:
    """A line of progress on standard error."""
    err().print(escape(message), soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A result table; columns whose name begins with ``>`` are right-aligned."""
    grid = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        right = column.startswith(">")
        grid.add_column(column.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(escape(str(cell)) for cell in row))
    out().print(grid)


@contextmanager
def progress() -> Iterator[Progress]:
    """Progress bars on standard error; plain silence where that is not a terminal."""
    console = err()
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as bars:
        yield bars
