"""``pagedgen build``: records → pack."""

from __future__ import annotations

from pathlib import Path

from pagedgen.autotune.database import Entry
from pagedgen.cli import console
from pagedgen.cli.options import Job, recorded
from pagedgen.compiler.build import Choice, build, check_replaceable
from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.render import render
from pagedgen.errors import NoCandidate
from pagedgen.values.record import Status
from pagedgen.values.target import Target


def run(job: Job, *, out: Path | None, as_json: bool) -> None:
    """Build a pack of the job's specs from the user's records and the shipped ones, and say what is in it."""
    job.warn()
    place = out or Path(f"{job.label}.{job.target.name}.pack")
    check_replaceable(place)
    entries = []
    for spec in job.specs:
        found = recorded(spec, job.target)
        if found is None or found.entry.selection is None:
            raise NoCandidate(
                f"{spec.name} on {job.target.name}: nothing is recorded; run pagedgen tune first"
            )
        entries.append(found.entry)
    report(write(job.target, entries, place), entries, as_json=as_json)


def write(target: Target, entries: list[Entry], place: Path) -> Path:
    """Compile what the entries selected, link it, publish the pack."""
    with console.progress() as bars:
        total = sum(len(entry.selection.variants) for entry in entries if entry.selection)
        task = bars.add_task("compile", total=total)
        choices = []
        for entry in entries:
            assert entry.selection is not None
            binaries = []
            for schedule in entry.selection.variants:
                binaries.append(compile_source(render(entry.spec, target, schedule)))
                bars.advance(task)
            choices.append(Choice(tuple(binaries), entry.selection.dispatch, entry.chosen()))
        bars.update(task, description="link")
        return build(choices, place)


def report(pack: Path, entries: list[Entry], *, as_json: bool) -> None:
    """What the pack holds, and whether its choices were measured or predicted."""
    size = sum(path.stat().st_size for path in pack.rglob("*") if path.is_file())
    statuses = {entry.selection.status for entry in entries if entry.selection}
    if Status.PREDICTED in statuses:
        console.warn(
            "schedules were chosen by the cost model: predicted, not measured and not run on the device"
        )
    if as_json:
        console.emit(summary(pack, entries))
        return
    console.table(
        f"{pack}: {size / 1e3:,.0f} kB",
        ("spec", ">kernels", ">rules", "chosen by"),
        (
            (e.spec.name, len(e.selection.variants), len(e.selection.dispatch), e.selection.status)
            for e in entries
            if e.selection
        ),
    )


def summary(pack: Path, entries: list[Entry]) -> dict[str, object]:
    """JSON data of a built pack."""
    return {
        "pack": str(pack),
        "bytes": sum(path.stat().st_size for path in pack.rglob("*") if path.is_file()),
        "kernels": [
            {
                "spec": e.spec.name,
                "status": e.selection.status.value,
                "variants": [schedule.name for schedule in e.selection.variants],
                "rules": len(e.selection.dispatch),
            }
            for e in entries
            if e.selection
        ],
    }
