"""``pagedgen inspect``: what is in a pack, with verdicts and provenance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pagedgen.cli import console
from pagedgen.integrations.serving_pack import ServingPack
from pagedgen.runtime.pack import Pack, open_pack
from pagedgen.values import codec
from pagedgen.values.manifest import MANIFEST, KernelEntry
from pagedgen.values.record import Status, Verdict


def run(path: Path, *, as_json: bool) -> None:
    """Check that the pack is intact and print what it holds; nothing of it is loaded or run.

    Raises:
        PackDamaged: a file is missing, truncated or altered.
        PackForeign: another format or major version.
    """
    pack = open_pack(path)
    data = describe(pack)
    if as_json:
        console.emit(data)
        return
    sizes = ", ".join(map(str, data["serves_block_sizes"])) or "none"
    console.table(
        f"{path}: {data['bytes'] / 1e3:,.0f} kB, intact",
        ("", ""),
        (
            ("target", f"{data['target']} ({data['kind']} {data['arch']}), host {data['host']}"),
            ("built by", f"pagedgen {data['pagedgen']}"),
            ("digest", data["digest"]),
            ("block sizes with decode, extend and write_kv", sizes),
        ),
    )
    columns = ("spec", ">kernels", ">rules", ">kB", "schedules", "gate", ">largest error", "measured on")
    console.table("Kernels", columns, (_row(kernel) for kernel in data["kernels"]))


def describe(pack: Pack) -> dict[str, Any]:
    """JSON data of a pack."""
    manifest = pack.manifest
    sizes = {file.path: file.size for file in manifest.files}
    total = sum(sizes.values()) + pack.file(MANIFEST).stat().st_size
    return {
        "pack": str(pack.path),
        "bytes": total,
        "pagedgen": manifest.pagedgen,
        "target": manifest.target,
        "kind": manifest.kind,
        "arch": manifest.arch,
        "host": manifest.host,
        "digest": manifest.digest,
        "serves_block_sizes": list(ServingPack(pack).block_sizes()),
        "kernels": [_kernel(entry, sizes[entry.library]) for entry in manifest.kernels],
    }


def _kernel(entry: KernelEntry, size: int) -> dict[str, Any]:
    statuses = {record.status for record in entry.records}
    measured = [record for record in entry.records if record.status is Status.MEASURED]
    origin = Status.MEASURED if measured else Status.PREDICTED if statuses else "default"
    verdicts, when = list(entry.verdicts), "build"
    if not verdicts:
        verdicts, when = [record.verdict for record in measured if record.verdict], "tuning"
    stamps = sorted({(r.stamp.device, r.stamp.compiler, r.stamp.date[:10]) for r in entry.records})
    return {
        "spec": codec.encode(entry.spec) | {"name": entry.spec.name},
        "library": entry.library,
        "library_bytes": size,
        "variants": [schedule.name for schedule in entry.variants],
        "dispatch": codec.encode(entry.dispatch),
        "schedules": str(origin),
        "gate": {"when": when if verdicts else None, "verdicts": [codec.encode(v) for v in verdicts]},
        "stamps": [{"device": d, "compiler": c, "date": date} for d, c, date in stamps],
        "timings": [
            {
                "workload": record.workload.name,
                "schedule": record.schedule.name,
                "time_us": record.time_us,
                "roofline_share": record.roofline_share or None,
                "status": record.status.value,
            }
            for record in entry.records
        ],
    }


def _row(kernel: dict[str, Any]) -> tuple[object, ...]:
    verdicts = [codec.decode(Verdict, verdict) for verdict in kernel["gate"]["verdicts"]]
    gate, error = "not run: no such device", ""
    if verdicts:
        worst = max(verdicts, key=lambda verdict: verdict.max_error)
        passed = sum(verdict.passed for verdict in verdicts)
        gate = f"{passed} of {len(verdicts)} passed, at {kernel['gate']['when']}"
        error = f"{worst.max_error:.2g} of {worst.tolerance:.2g}"
    devices = "; ".join(f"{s['device']}, {s['date']}" for s in kernel["stamps"] if s["device"] != "none")
    return (
        kernel["spec"]["name"],
        len(kernel["variants"]),
        len(kernel["dispatch"]),
        f"{kernel['library_bytes'] / 1e3:,.0f}",
        kernel["schedules"],
        gate,
        error,
        devices or "–",
    )
