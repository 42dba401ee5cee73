"""``pagedgen build``: records → pack."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from pagedgen.compiler.families import family_for
from pagedgen.compiler.link import link
from pagedgen.compiler.space import default_schedule
from pagedgen.errors import GateFailure, NoCandidate
from pagedgen.values.manifest import ANY, Rule
from pagedgen.values.record import Record, Status, Verdict
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target import Target

DEFAULT = "default"  # where a part comes from that nothing is recorded for
EVERY_CALL = (Rule(ANY, ANY, 0),)


@dataclass(frozen=True, slots=True)
class Part:
    """What a pack will hold of one spec; ``origin`` is a :class:`Status`, or :data:`DEFAULT`."""

    spec: KernelSpec
    variants: tuple[Schedule, ...]
    dispatch: tuple[Rule, ...]
    records: tuple[Record, ...]
    origin: str

    @classmethod
    def of(cls, entry: Entry) -> Part:
        """What was tuned."""
        found = entry.selection
        assert found is not None
        return cls(entry.spec, found.variants, found.dispatch, entry.chosen(), found.status.value)

    @classmethod
    def untuned(cls, spec: KernelSpec, target: Target) -> Part:
        """The default schedule of the spec's family.

        Raises:
            Unsupported: no template covers the spec.
        """
        return cls(spec, (default_schedule(spec, target),), EVERY_CALL, (), DEFAULT)


def run(job: Job, *, out: Path | None, as_json: bool) -> None:
    """Build a pack of the job's specs from the user's records and the shipped ones, and say what is in it.

    Where the target's device is present every kernel passes the gate first: its compiler or driver may be
    another one than the records were made with. A pack to serve with takes default schedules where nothing
    is recorded, and says so.

    Raises:
        NoCandidate: nothing is recorded for a spec.
        Unsupported: there are no kernels for a layer of the model on the target.
        GateFailure: a recorded kernel is wrong when it is compiled here.
        PackExists, OutputUnwritable: the pack cannot be written there.
    """
    job.warn()
    place = out or Path(f"{job.label}.{job.target.name}.pack")
    check_place(place)
    parts = [_part(spec, job) for spec in job.specs]
    write(job.target, parts, place, gate=device_of(job.target).present)
    report(place, parts, as_json=as_json)


def _part(spec: KernelSpec, job: Job) -> Part:
    family_for(spec, job.target)
    found = recorded(spec, job.target)
    if found is not None and found.entry.selection is not None:
        return Part.of(found.entry)
    if job.serving:
        return Part.untuned(spec, job.target)
    raise NoCandidate(_nothing(spec, job.target, found))


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


def write(target: Target, parts: Sequence[Part], place: Path, *, gate: bool) -> Path:
    """Compile the parts, ``gate`` them on the device, publish the pack.

    Raises:
        CompileError: a kernel does not compile, or it spills, with the compiler that is here.
        GateFailure: a kernel is wrong.
    """
    with console.progress() as bars, tempfile.TemporaryDirectory(prefix="pagedgen-build-") as folder:
        task = bars.add_task("compile", total=sum(len(part.variants) for part in parts))
        choices = []
        for part in parts:
            binaries = []
            for schedule in part.variants:
                binaries.append(compile_one(part.spec, target, schedule))
                bars.advance(task)
            choice = Choice(tuple(binaries), part.dispatch, part.records)
            if gate:
                bars.update(task, description="verify")
                choice = replace(choice, verdicts=_gate(choice, Path(folder)))
            choices.append(choice)
        bars.update(task, description="link")
        return build(choices, place)


def _gate(choice: Choice, folder: Path) -> tuple[Verdict, ...]:
    library = link(choice.binaries, (), folder / f"{choice.spec.name}.so")
    verdicts = []
    with Worker() as worker:
        for variant, binary in enumerate(choice.binaries):
            device = device_name(choice.target.kind)
            verdict = verdict_on(worker, library, choice.spec, variant, device, seed=0)
            if not verdict.passed:
                name = binary.source.schedule.name
                raise GateFailure(f"{choice.spec.name}: {name}: {verdict.reason}; run pagedgen tune")
            verdicts.append(verdict)
    return tuple(verdicts)


def report(pack: Path, parts: Sequence[Part], *, as_json: bool) -> None:
    """What the pack holds, and whether its choices were measured or predicted."""
    size = sum(path.stat().st_size for path in pack.rglob("*") if path.is_file())
    if any(part.origin == Status.PREDICTED for part in parts):
        console.warn(
            "schedules were chosen by the cost model: predicted, not measured and not run on the device"
        )
    untuned = [part.spec.name for part in parts if part.origin == DEFAULT]
    if untuned:
        console.warn(f"nothing is recorded, default schedules were taken for {', '.join(untuned)}")
    if as_json:
        console.emit(summary(pack, parts))
        return
    console.table(
        f"{pack}: {size / 1e3:,.0f} kB",
        ("spec", ">kernels", ">rules", "chosen by"),
        ((part.spec.name, len(part.variants), len(part.dispatch), part.origin) for part in parts),
    )


def summary(pack: Path, parts: Sequence[Part]) -> dict[str, object]:
    """JSON data of a built pack."""
    return {
        "pack": str(pack),
        "bytes": sum(path.stat().st_size for path in pack.rglob("*") if path.is_file()),
        "kernels": [
            {
                "spec": part.spec.name,
                "status": part.origin,
                "variants": [schedule.name for schedule in part.variants],
                "rules": len(part.dispatch),
            }
            for part in parts
        ],
    }
