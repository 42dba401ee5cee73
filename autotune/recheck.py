"""Records held against the device: are the chosen kernels still right, and still as fast as it says?

Speed is compared as a share of the roofline measured in the same run, the record's with its own: a neighbour
that takes bandwidth away slows both, a compiler that made the kernel worse slows the kernel.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from pagedgen.autotune.binaries import compile_all
from pagedgen.autotune.database import Entry
from pagedgen.autotune.gating import verdict_on
from pagedgen.autotune.measure import Verified, device_name, measure
from pagedgen.autotune.race import timing_of
from pagedgen.autotune.roofline import bandwidth, matmul_tflops
from pagedgen.autotune.tune import MEASURE_S, Workshop
from pagedgen.autotune.worker import WorkerLost
from pagedgen.compiler.link import link
from pagedgen.compiler.render import render
from pagedgen.errors import NoCandidate
from pagedgen.values.record import Record, Timing, Verdict
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target import Target
from pagedgen.values.workload import Workload

SLIP = 0.05  # of the share of the roofline that a kernel may lose; medians of good runs repeat to 1-3%
ROUNDS = 15


@dataclass(frozen=True, slots=True)
class Recheck:
    """A pick on the workload that it was picked for: what is on record, and what is found now.

    ``share`` is that of the roofline. ``timing`` is None, and ``reason`` says why, when there is none.
    """

    spec: KernelSpec
    schedule: Schedule
    workload: Workload
    recorded_us: float
    recorded_share: float
    timing: Timing | None
    share: float
    reason: str = ""

    @property
    def slipped(self) -> bool:
        """Whether it runs, but slower than it should."""
        return self.timing is not None and self.share < (1 - SLIP) * self.recorded_share


def recheck(
    entry: Entry,
    target: Target,
    workshop: Workshop,
    *,
    seed: int = 0,
    rounds: int = ROUNDS,
    progress: Callable[[Recheck], None] = lambda row: None,
) -> tuple[Recheck, ...]:
    """Compile, gate and time the picks of a measured selection, each on every workload it was picked for.

    Raises:
        NoCandidate: the entry has no measured selection.
        WorkerLost: the device stopped answering before any kernel ran.
    """
    picks = _picks(entry)
    if not picks:
        raise NoCandidate(f"{entry.spec.name} on {entry.target}: no measured choice is on record")
    device = device_name(target.kind)
    reasons: dict[Schedule, str] = {}
    verified: dict[Schedule, Verified] = {}
    library = workshop.folder / f"{entry.spec.name}-{time.monotonic_ns()}.so"
    sources = [render(entry.spec, target, s) for s in picks]
    binaries = []
    for compiled in compile_all(sources, workshop.pool, workshop.cache):
        if compiled.binary is None:
            reasons[compiled.source.schedule] = compiled.reason
        else:
            binaries.append(compiled.binary)
    if binaries:
        link(binaries, (), library)
    for variant, binary in enumerate(binaries):
        schedule = binary.source.schedule
        verdict: Verdict = verdict_on(workshop.worker, library, entry.spec, variant, device, seed)
        if verdict.passed:
            verified[schedule] = Verified(variant, schedule, verdict)
        else:
            reasons[schedule] = f"wrong: {verdict.reason}"
    limit = workshop.worker.call(bandwidth, entry.spec, device, timeout_s=MEASURE_S).read_gbs
    tflops = workshop.worker.call(matmul_tflops, entry.spec, device, timeout_s=MEASURE_S)
    rows = []
    for schedule, records in picks.items():
        for record in records:
            timing, reason = None, reasons.get(schedule, "")
            if schedule in verified:
                timing, reason = _timed(workshop, library, record, verified[schedule], rounds, device, seed)
            floor_us = record.workload.floor_us(entry.spec, limit, tflops)
            share = floor_us / timing.median_us if timing else 0.0
            row = Recheck(
                entry.spec,
                schedule,
                record.workload,
                record.time_us,
                record.roofline_share,
                timing,
                share,
                reason,
            )
            rows.append(row)
            progress(row)
    return tuple(rows)


def _picks(entry: Entry) -> dict[Schedule, list[Record]]:
    """Each chosen schedule, with its records of the workloads that the dispatch table gives it."""
    picks: dict[Schedule, list[Record]] = {}
    if entry.selection is None:
        return picks
    for record in entry.chosen():
        pick = entry.selection.pick_for(record.workload)
        if record.timing is not None and record.schedule == pick:
            picks.setdefault(record.schedule, []).append(record)
    return picks


def _timed(
    workshop: Workshop,
    library: object,
    record: Record,
    verified: Verified,
    rounds: int,
    device: str,
    seed: int,
) -> tuple[Timing | None, str]:
    arguments = (library, record.spec, record.workload, (verified,), rounds, device, seed)
    try:
        samples = workshop.worker.call(measure, *arguments, timeout_s=MEASURE_S)
    except WorkerLost as lost:
        if lost.last != verified.variant:
            raise
        return None, lost.reason
    times = samples.times.get(verified.variant)
    return (timing_of(times), "") if times else (None, samples.failed[verified.variant])
