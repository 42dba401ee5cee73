"""Contenders timed in interleaved rounds: ours, proved first, beside whatever peers are installed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pagedgen.autotune import database
from pagedgen.autotune.binaries import compile_one
from pagedgen.autotune.measure import Clock, Verified, clock_of, gate_variant
from pagedgen.autotune.suites.report import Row
from pagedgen.compiler.link import link
from pagedgen.compiler.space import near_default
from pagedgen.errors import CompileError
from pagedgen.runtime.library import Library
from pagedgen.values.record import Verdict
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec, Op
from pagedgen.values.target import Target
from pagedgen.values.workload import Workload

NEAREST = 16  # schedules tried in place of a default that spills


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that is timed. ``kv_bytes`` is what one call has to read."""

    name: str
    clock: Clock
    kv_bytes: int
    detail: str = ""
    flops: int = 0


@dataclass(frozen=True, slots=True)
class Pick:
    """The schedule that stands for us on a workload, and where it comes from."""

    schedule: Schedule
    origin: str  # "measured", "predicted" or "default"


def recorded(
    spec: KernelSpec, target: Target, workload: Workload, records: database.Database | None = None
) -> Pick | None:
    """The recorded selection's schedule for a workload; None where nothing is recorded."""
    found = database.recorded(spec, target, records)
    if found is None or found.entry.selection is None:
        return None
    selection = found.entry.selection
    return Pick(selection.pick_for(workload), selection.status.value)


def pick(
    spec: KernelSpec, target: Target, workload: Workload, records: database.Database | None = None
) -> Pick:
    """The recorded schedule, or the one nearest the family's default that compiles without spilling.

    Raises:
        CompileError: none of the nearest does.
    """
    known = recorded(spec, target, workload, records)
    if known is not None:
        return known
    for schedule in near_default(spec, target)[:NEAREST]:
        try:
            compile_one(spec, target, schedule)
        except CompileError as error:
            problem = error
        else:
            return Pick(schedule, "default")
    raise CompileError(f"the {NEAREST} schedules nearest the default do not compile; the last: {problem}")


def ours(
    spec: KernelSpec,
    target: Target,
    workload: Workload,
    device: str,
    folder: Path,
    name: str = "pagedgen",
    schedule: Schedule | None = None,
) -> Contender:
    """Our kernel for a workload: picked unless given, compiled, linked and gated in this process.

    Raises:
        GateFailure: the kernel is wrong.
        CompileError: it does not compile.
    """
    chosen = pick(spec, target, workload) if schedule is None else Pick(schedule, "candidate")
    library, verdict = _proved(spec, target, chosen.schedule, device, folder)
    clock = clock_of(Library(library), spec, workload, Verified(0, chosen.schedule, verdict), device)
    flops = 0 if spec.op is Op.DECODE else workload.flops(spec)
    return Contender(name, clock, workload.kv_bytes(spec), f"{chosen.origin}: {chosen.schedule.name}", flops)


@lru_cache(maxsize=256)
def _proved(
    spec: KernelSpec, target: Target, schedule: Schedule, device: str, folder: Path
) -> tuple[Path, Verdict]:
    """A kernel's library and verdict; once in a process, for all workloads that time it."""
    library = link([compile_one(spec, target, schedule)], (), folder / f"{spec.name}-{schedule.hash}.so")
    return library, gate_variant(library, spec, 0, device, 0)


def contest(
    contenders: Sequence[Contender], rounds: int, read_gbs: Callable[[], float] | None = None, seed: int = 0
) -> tuple[tuple[Row, ...], tuple[float, ...]]:
    """Time contenders in interleaved rounds, the read bandwidth in each round beside them.

    One that fails is a row with the reason.
    """
    failures: dict[str, str] = {}
    samples: dict[str, list[float]] = {c.name: [] for c in contenders}
    for contender in contenders:
        try:
            contender.clock.warm()
        except Exception as error:  # peers raise anything; it is their row that says so
            failures[contender.name] = f"{type(error).__name__}: {error}"
    order = [c for c in contenders if c.name not in failures]
    shuffle, bandwidths = random.Random(seed), []
    for _ in range(rounds):
        shuffle.shuffle(order)
        for contender in order:
            samples[contender.name].append(contender.clock.sample())
        if read_gbs is not None:
            bandwidths.append(read_gbs())
    rows = tuple(
        Row(c.name, tuple(samples[c.name]), c.kv_bytes, c.detail, failures.get(c.name, ""), c.flops)
        for c in contenders
    )
    return rows, tuple(bandwidths)
