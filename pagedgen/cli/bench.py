"""``pagedgen bench``: named benchmark suites."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pagedgen.autotune.suites import SUITES, run_suite
from pagedgen.cli import console


def run(
    suite: str | None, json_path: Path | None, traces: Sequence[Path] = (), cases: Sequence[str] = ()
) -> None:
    """Run a suite, or some of its cases, or list the suites."""
    if suite is None:
        console.table("Suites", ("name", "what it measures"), ((s.name, s.meaning) for s in SUITES.values()))
        return
    report = run_suite(suite, json_path, console.note, traces, cases)
    for line in report.lines():
        console.out().print(line, markup=False, soft_wrap=True)
