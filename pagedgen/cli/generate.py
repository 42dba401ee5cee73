"""``pagedgen generate``: the rendered source of one kernel."""

from __future__ import annotations

import sys
from pathlib import Path

from pagedgen.cli import console
from pagedgen.cli.options import Job, schedule_of
from pagedgen.compiler.render import render
from pagedgen.errors import OutputUnwritable
from pagedgen.values import codec


def run(job: Job, *, schedule: str | None, out: Path | None, as_json: bool) -> None:
    """Print the source, highlighted on a terminal, or write it to ``out``."""
    job.warn()
    spec = job.only
    chosen, origin = schedule_of(spec, job.target, schedule)
    source = render(spec, job.target, chosen)
    console.note(f"{spec.name} for {job.target.name} ({job.target.arch}); schedule {chosen.name} ({origin})")
    if out is not None:
        try:
            out.write_text(source.text, encoding="utf-8")
        except OSError as error:
            raise OutputUnwritable(f"{out}: {error.strerror or error}") from error
        console.note(f"wrote {out}")
    if as_json:
        console.emit(
            {
                "spec": codec.encode(spec),
                "target": job.target.name,
                "schedule": codec.encode(chosen),
                "origin": origin,
                "source": source.text,
            }
        )
    elif out is None:
        if sys.stdout.isatty():
            from rich.syntax import Syntax

            console.out().print(Syntax(source.text, "python", background_color="default"))
        else:
            sys.stdout.write(source.text)
