"""``pagedgen build``: records → pack."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pagedgen.autotune.binaries import compile_one
from pagedgen.autotune.database import Database, Entry, Found, recorded
from pagedgen.autotune.device import device_of
from pagedgen.autotune.gating import verdict_on
from pagedgen.autotune.measure import device_name
from pagedgen.autotune.worker import Worker
from pagedgen.cli import console
from pagedgen.cli.options import Job
from pagedgen.compiler.build import Choice, build, check_place
from pagedgen.compiler.link import link
from pagedgen.errors import GateFailure, NoCandidate
from pagedgen.values.record import Status
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target import Target


def run(job: Job, *, out: Path | None, as_json: bool) -> None:
    """Build a pack of the job's specs from the user's records and the shipped ones, and say what is in it.

    Where the target's device is present every kernel passes the gate first: its compiler or driver may be
    another one than the records were made with.

    Raises:
        NoCandidate: nothing is recorded for a spec.
        GateFailure: a recorded kernel is wrong when it is compiled here.
        PackExists, OutputUnwritable: the pack cannot be written there.
    """
    job.warn()
    place = out or Path(f"{job.label}.{job.target.name}.pack")
    check_place(place)
    entries = []
    for spec in job.specs:
        found = recorded(spec, job.target)
        if found is None or found.entry.selection is None:
            raise NoCandidate(_nothing(spec, job.target, found))
        entries.append(found.entry)
    write(job.target, entries, place, gate=device_of(job.target).present)
    report(place, entries, as_json=as_json)


def _nothing(spec: KernelSpec, target: Target, found: Found | None) -> str:
    """Why there is nothing to build from."""
    others = Database().files(spec, target.name)
    if found is not None:
        why = f"tuning did not finish, {found.path} holds no selection; run pagedgen tune again"
    elif others:
        why = f"{others[0]} is of other kernels, another version or device; run pagedgen tune"
    else:
        why = "nothing is recorded; run pagedgen tune first"
    return f"{spec.name} on {target.name}: {why}"


def write(target: Target, entries: list[Entry], place: Path, *, gate: bool) -> Path:
    """Compile what the entries selected, ``gate`` it on the device, publish the pack.

    Raises:
        CompileError: a kernel does not compile, or it spills, with the compiler that is here.
        GateFailure: a kernel is wrong.
    """
    with console.progress() as bars, tempfile.TemporaryDirectory(prefix="pagedgen-build-") as folder:
        total = sum(len(entry.selection.variants) for entry in entries if entry.selection)
        task = bars.add_task("compile", total=total)
        choices = []
        for entry in entries:
            assert entry.selection is not None
            binaries = []
            for schedule in entry.selection.variants:
                binaries.append(compile_one(entry.spec, target, schedule))
                bars.advance(task)
            choices.append(Choice(tuple(binaries), entry.selection.dispatch, entry.chosen()))
            if gate:
                bars.update(task, description="verify")
                _gate(choices[-1], Path(folder))
        bars.update(task, description="link")
        return build(choices, place)


def _gate(choice: Choice, folder: Path) -> None:
    library = link(choice.binaries, (), folder / f"{choice.spec.name}.so")
    with Worker() as worker:
        for variant, binary in enumerate(choice.binaries):
            device = device_name(choice.target.kind)
            verdict = verdict_on(worker, library, choice.spec, variant, device, seed=0)
            if not verdict.passed:
                name = binary.source.schedule.name
                raise GateFailure(f"{choice.spec.name}: {name}: {verdict.reason}; run pagedgen tune")


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
