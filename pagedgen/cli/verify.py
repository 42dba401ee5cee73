"""``pagedgen verify``: files against their hashes, kernels against a float64 reference."""

from __future__ import annotations

from pathlib import Path

import typer

from pagedgen.autotune.gating import verdict_on
from pagedgen.autotune.measure import device_name
from pagedgen.autotune.worker import Worker
from pagedgen.cli import console
from pagedgen.errors import PackForeign
from pagedgen.runtime.pack import check_machine, open_pack
from pagedgen.values import codec
from pagedgen.values.record import Verdict

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
