"""``pagedgen verify``: files against hashes, kernels against a float64 reference, records against now."""

from __future__ import annotations

from pathlib import Path

import typer

from pagedgen.autotune.database import Database, Found
from pagedgen.autotune.device import device_of, stamp_here
from pagedgen.autotune.gating import verdict_on
from pagedgen.autotune.measure import device_name
from pagedgen.autotune.recheck import Recheck, recheck
from pagedgen.autotune.tune import Workshop
from pagedgen.autotune.worker import Worker
from pagedgen.cli import console
from pagedgen.errors import DeviceMissing, InvalidValue, NoCandidate, PackForeign
from pagedgen.runtime.pack import check_machine, open_pack
from pagedgen.values import codec
from pagedgen.values.record import Status, Verdict
from pagedgen.values.target import Target
from pagedgen.values.target_table import cpu_target, detect, target

DISPATCH = -1  # the variant index with which a library's own table picks


def run(path: Path, *, seed: int, as_json: bool) -> None:
    """Check the pack; exit status 1 when a kernel is wrong.

    Raises:
        PackDamaged: a file is missing, truncated or altered.
        PackForeign: another format or major version.
    """
    pack = open_pack(path)
    console.note(f"{path}: {len(pack.manifest.files)} files are intact; built for {pack.manifest.target}")
    try:
        check_machine(pack)
    except PackForeign as error:
        console.warn(f"kernels were not run: {error}")
        if as_json:
            console.emit({"pack": str(path), "intact": True, "run": False, "why": str(error), "verdicts": []})
        return
    device = device_name(pack.manifest.kind)
    rows: list[tuple[str, str, Verdict]] = []
    with console.progress() as bars, Worker() as worker:
        task = bars.add_task("verify", total=sum(len(k.variants) + 1 for k in pack.manifest.kernels))
        for entry in pack.manifest.kernels:
            library = pack.file(entry.library)
            for variant in range(DISPATCH, len(entry.variants)):
                name = "dispatch table" if variant == DISPATCH else entry.variants[variant].name
                rows.append(
                    (entry.spec.name, name, verdict_on(worker, library, entry.spec, variant, device, seed))
                )
                bars.advance(task)
    failed = sum(not verdict.passed for _, _, verdict in rows)
    if as_json:
        verdicts = [{"spec": s, "kernel": name, **codec.encode(verdict)} for s, name, verdict in rows]
        console.emit({"pack": str(path), "intact": True, "run": True, "verdicts": verdicts})
    else:
        console.table(
            f"Correctness gate, seed {seed}: {len(rows) - failed} of {len(rows)} passed",
            ("spec", "kernel", "verdict", ">cases", ">largest error", ">allowed there"),
            (
                (spec, name, v.reason or "passed", v.cases, f"{v.max_error:.2g}", f"{v.tolerance:.2g}")
                for spec, name, v in rows
            ),
        )
    if failed:
        raise typer.Exit(1)


def run_records(gpu: str | None, cpu: bool, *, seed: int, as_json: bool) -> None:
    """Check what is on record for this machine's device; exit status 1 when a kernel is wrong or has slipped.

    Raises:
        InvalidValue: both a GPU and the CPU are named.
        DeviceMissing: the processor is not here.
        NoCandidate: nothing that was measured is on record for it.
    """
    if cpu and gpu:
        raise InvalidValue("gpu", gpu, "not together with --cpu")
    where = cpu_target() if cpu else target(gpu) if gpu else detect()
    if not device_of(where).present:
        raise DeviceMissing(f"records of {where.name} can be checked on such a device alone")
    entries = _recorded(where)
    rows: list[Recheck] = []
    with console.progress() as bars, Workshop(where) as workshop:
        task = bars.add_task("verify", total=len(entries))
        for found in entries:
            rows += recheck(found.entry, where, workshop, seed=seed)
            bars.advance(task)
    bad = [row for row in rows if row.slipped or row.reason]
    if as_json:
        data = [
            {
                **codec.encode(row),
                "name": row.spec.name,
                "slipped": row.slipped,
                "workload": row.workload.name,
            }
            for row in rows
        ]
        console.emit({"target": where.name, "records": data})
    else:
        console.table(
            f"Records of {where.name}: {len(rows) - len(bad)} of {len(rows)} hold",
            ("spec", "batch", ">µs on record", ">µs now", ">share on record", ">share now", "state"),
            (
                (
                    row.spec.name,
                    row.workload.name,
                    f"{row.recorded_us:,.1f}",
                    f"{row.timing.median_us:,.1f}" if row.timing else "-",
                    f"{row.recorded_share:.0%}",
                    f"{row.share:.0%}" if row.timing else "-",
                    row.reason or ("slipped" if row.slipped else "holds"),
                )
                for row in rows
            ),
        )
    if bad:
        raise typer.Exit(1)


def _recorded(where: Target) -> list[Found]:
    """Per spec the entry that would be used here, where its choice was measured; others are named."""
    database = Database()
    kept = []
    for spec in dict.fromkeys(found.entry.spec for found in database.entries(where.name)):
        found = database.find(spec, where.name, stamp_here(spec, where))
        if found is None:
            console.note(f"not checked: {spec.name}: records of other kernels, another device or version")
        elif found.entry.selection is None or found.entry.selection.status is not Status.MEASURED:
            console.note(f"not checked: {spec.name}: nothing measured was chosen")
        else:
            kept.append(found)
    if not kept:
        raise NoCandidate(f"nothing that was measured on this machine's {where.name} is on record")
    return kept
