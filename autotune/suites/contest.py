"""Contenders timed in interleaved rounds: ours, proved first, beside whatever peers are installed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pagedgen.autotune import database
from pagedgen.autotune.binaries import compile_one
from pagedgen.autotune.measure import Clock, Verified, clock_of, device_works, gate_variant
from pagedgen.autotune.paths import publish
from pagedgen.autotune.select import Selection
from pagedgen.autotune.suites.report import Row
from pagedgen.autotune.worker import Pool
from pagedgen.compiler.link import link
from pagedgen.compiler.space import near_default
from pagedgen.errors import CompileError
from pagedgen.runtime.library import Library
from pagedgen.values import codec
from pagedgen.values.record import Verdict
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec, Op
from pagedgen.values.target import Target
from pagedgen.values.workload import Workload

NEAREST = 16  # schedules tried in place of a default that spills
PROVERS = 6  # processes that gate kernels: most of it is their own time, not the GPU's
PROVE_S = 180.0  # limit for one kernel, the first one's CUDA context included


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
    origin: str  # "measured", "predicted", "default", or "candidate" where a suite names the schedule

    @classmethod
    def of(cls, selection: Selection, workload: Workload) -> Pick:
        """What a recorded selection has for a workload."""
        return cls(selection.pick_for(workload), selection.status.value)


def recorded_selection(
    spec: KernelSpec, target: Target, records: database.Database | None = None
) -> Selection | None:
    """What is on record for a spec, if anything; reading it takes some 0.2 s."""
    found = database.recorded(spec, target, records)
    return None if found is None else found.entry.selection


def pick(
    spec: KernelSpec, target: Target, workload: Workload, records: database.Database | None = None
) -> Pick:
    """The recorded schedule, or the one nearest the family's default that compiles without spilling.

    Raises:
        CompileError: none of the nearest does.
    """
    selection = recorded_selection(spec, target, records)
    if selection is not None:
        return Pick.of(selection, workload)
    for schedule in near_default(spec, target, NEAREST):
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
    chosen: Pick | None = None,
) -> Contender:
    """Our kernel for a workload: picked unless given, proved by :func:`prove_all` or else now.

    Raises:
        GateFailure: the kernel is wrong.
        CompileError: it does not compile.
    """
    chosen = chosen or pick(spec, target, workload)
    library, verdict = proved(spec, target, chosen.schedule, device, folder)
    clock = clock_of(Library(library), spec, workload, Verified(0, chosen.schedule, verdict), device)
    flops = 0 if spec.op is Op.DECODE else workload.flops(spec)
    return Contender(name, clock, workload.kv_bytes(spec), f"{chosen.origin}: {chosen.schedule.name}", flops)


@lru_cache(maxsize=256)
def proved(
    spec: KernelSpec, target: Target, schedule: Schedule, device: str, folder: Path
) -> tuple[Path, Verdict]:
    """A kernel's library in the run's folder and its verdict, beside it; made once in a run.

    Raises:
        CompileError: it does not compile.
    """
    library = folder / f"{spec.name}-{schedule.hash}.so"
    kept = library.with_suffix(".json")
    if kept.exists():
        return library, codec.load_file(Verdict, kept)
    link([compile_one(spec, target, schedule)], (), library)
    verdict = gate_variant(library, spec, 0, device, 0)
    publish(kept, codec.dumps(verdict).encode())
    return library, verdict


def prove_all(
    kernels: Iterable[tuple[KernelSpec, Schedule]], target: Target, device: str, folder: Path
) -> None:
    """Link and gate kernels side by side, before anything is timed; a failure shows up in its case."""
    with Pool(min(PROVERS, os.cpu_count() or 1), {"OMP_NUM_THREADS": "1"}) as pool:
        calls = [(spec, target, schedule, device, folder) for spec, schedule in dict.fromkeys(kernels)]
        for _ in pool.map(_prove, calls, PROVE_S):
            pass


def _prove(call: tuple[KernelSpec, Target, Schedule, str, Path]) -> None:
    """One kernel, in a worker of a pool."""
    device = call[3]
    _, verdict = proved(*call)
    if not verdict.passed and device != "cpu":
        try:
            device_works(device)
        except RuntimeError:
            os._exit(70)  # a broken context would fail every kernel after this one


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
