"""The tune driver: spec × target × workloads → records and a selection.

Where the target's device is present: candidates are rendered, compiled in parallel, linked into one library a
batch, gated and timed in a worker process, searched by Optuna; the finalists are gated again on fresh inputs
and timed together on every workload, and from that matrix the selection is made. Where it is absent:
candidates are rendered, compiled for the architecture, filtered by what the binaries really use, and ranked
by the cost model; the records say ``predicted``.

A run that is killed continues from the records and binaries it left.
"""

from __future__ import annotations

import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from pagedgen.autotune.binaries import BinaryCache, Compiled, compile_all
from pagedgen.autotune.calibration import Calibration
from pagedgen.autotune.database import Database, Entry, Fit, Found, fit
from pagedgen.autotune.device import device_of, stamp_of
from pagedgen.autotune.events import Progress, Started, Step, Tried, Warned, silent
from pagedgen.autotune.gating import verdict_on
from pagedgen.autotune.grid import Grid
from pagedgen.autotune.ledger import Ledger, Place
from pagedgen.autotune.measure import Verified, device_name, device_works, measure, pin
from pagedgen.autotune.outcome import Outcome
from pagedgen.autotune.race import race
from pagedgen.autotune.roofline import Bandwidth, bandwidth, matmul_tflops
from pagedgen.autotune.search import Stop, search
from pagedgen.autotune.select import Selection, select
from pagedgen.autotune.warm import guesses, timings, untried_values
from pagedgen.autotune.worker import Pool, Worker, WorkerFailed, WorkerLost
from pagedgen.compiler.compile import compiler_version
from pagedgen.compiler.families import family_for, template_hash
from pagedgen.compiler.kernel_hash import kernel_hash
from pagedgen.compiler.link import link
from pagedgen.compiler.render import render
from pagedgen.compiler.space import default_schedule, feasible, near_default
from pagedgen.errors import CacheUnwritable, DeviceLost, InvalidValue, NoCandidate
from pagedgen.values.codec import content_hash
from pagedgen.values.record import Record, Resources, Stamp, Status, Timing, Verdict
from pagedgen.values.schedule import Choice, Schedule
from pagedgen.values.spec import KernelSpec, Op
from pagedgen.values.target import Target
from pagedgen.values.workload import Lens, Workload

DEVICE_S = 60.0  # for a device to answer anything at all
MEASURE_S = 300.0  # limit in a worker; a sampling rarely takes more than 10 s
RANKED = 16384  # schedules the model ranks at most, a random subset of larger spaces
PROMISING = 0.5  # share of the space that the model keeps: it ranks, it does not know
AUDIT = 0.1  # share of the rest that is kept whatever the model says, to find out where it is wrong
SKEWED = 4.0  # the longest sequence of a batch over the mean, from which on balance is what counts
REGIMES = 3  # workloads that tell bound by latency, by balance and by bytes from each other
# Workloads that candidates are timed on while searching; finalists meet all. A GPU times one in milliseconds
# and waits for compilers: on three, what is best for 1 x 8k and 8 x 4k was among no search's finalists.
SEARCHED = {"cpu": REGIMES, "gpu": 8}
SIMPLER = 4  # variants of the winner, each with one choice brought back to its default, among the finalists
FAVOURITES = 2  # of the model's, tried first
NEAREST = 3  # to the default, tried first: where the model's favourites all spill, some of these do not
UNTRIED = 12  # guesses with a value that nothing before them has, tried first: one batch
ENOUGH = 0.97  # share of what memory and matrix products allow at which the search ends
RESERVED = 0.25  # share of the budget that is kept for the finalists
TUNED = (Op.DECODE, Op.EXTEND, Op.VERIFY)  # operators whose batches are workloads
LOST = 0.05  # share of a shared study's trials in a batch at most: what a killed worker loses is done again

Rate = TypeVar("Rate", Bandwidth, float)


class Effort(StrEnum):
    """How hard to try."""

    QUICK = "quick"
    STANDARD = "standard"
    MAX = "max"


@dataclass(frozen=True, slots=True)
class Plan:
    """What an effort means."""

    trials: int  # schedules tried
    batch: int  # compiled, gated and timed together
    budget_s: float
    rungs: tuple[int, ...]  # rounds of the halving in the search
    final_rounds: int
    finalists: int


PLANS: Mapping[Effort, Plan] = {
    # After 96 schedules on an H100 what FP8 had found was 2.8% behind what 480 found, after 160 1.4%.
    Effort.QUICK: Plan(176, 16, 120.0, (3, 4, 6), 15, 8),
    Effort.STANDARD: Plan(240, 16, 900.0, (3, 4, 6, 10), 31, 8),
    Effort.MAX: Plan(480, 16, 3600.0, (5, 6, 10, 16), 51, 12),
}
# Trials and batch on a CPU, whose two cores compile and time in turn: with 176, quick took 123 s on a Xeon,
# and what it found was 1.2 and 2.0% faster (two runs) than the best of the first 96.
ON_CPU: Mapping[Effort, tuple[int, int]] = {Effort.QUICK: (96, 12), Effort.STANDARD: (120, 12)}


def plan_of(effort: Effort, target: Target) -> Plan:
    """What an effort means on a target."""
    plan = PLANS[effort]
    if target.kind != "cpu" or effort not in ON_CPU:
        return plan
    trials, batch = ON_CPU[effort]
    return replace(plan, trials=min(plan.trials, trials), batch=min(plan.batch, batch))


@dataclass(frozen=True, slots=True)
class Rejection:
    """A schedule that fell out, at which stage (compile, gate, time) and why."""

    schedule: Schedule
    stage: str
    reason: str


@dataclass(frozen=True, slots=True)
class Counts:
    """What the run did. ``known`` schedules came from records, ``cached`` binaries from an earlier run."""

    space: int
    known: int
    compiled: int
    cached: int
    passed: int
    timed: int
    rejected: tuple[Rejection, ...]


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of a run: in compilers, linking candidates into libraries and gating them, timing them.

    What is left of the run is ranking, proposing, keeping records, and starting workers.
    """

    compile_s: float = 0.0
    gate_s: float = 0.0
    time_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TuneResult:
    """Everything a run found. ``path`` is None when the records could not be kept."""

    spec: KernelSpec
    target: Target
    status: Status
    records: tuple[Record, ...]  # the finalists', on every workload
    selection: Selection
    counts: Counts
    stop: Stop
    roofline_gbs: float  # 0 in a prediction
    seconds: float
    path: Path | None
    roofline_tflops: float = 0.0  # 0 in a prediction, and of decode
    outcomes: tuple[Outcome, ...] = ()  # of every schedule tried, with what was known; none in a prediction
    spent: Spent = Spent()

    def chosen(self, workload: Workload) -> Record:
        """The record of the selection's pick for a workload that was tuned for."""
        pick = self.selection.pick_for(workload)
        for record in self.records:
            if record.schedule == pick and record.workload.lens == workload.lens:
                return record
        raise InvalidValue("workload", workload.name, "a workload of this run is expected")


class Workshop:
    """Processes that runs share: one that measures, several that compile. Started when needed."""

    def __init__(self, target: Target) -> None:
        threads = {"PAGEDGEN_NUM_THREADS": str(target.num_sms)} if target.kind == "cpu" else {}
        self.worker = Worker(threads, first=pin)
        self.pool = Pool(min(16, os.cpu_count() or 1), {"OMP_NUM_THREADS": "1"})
        self.cache = BinaryCache()
        self._folder = tempfile.TemporaryDirectory(prefix="pagedgen-tune-")

    @property
    def folder(self) -> Path:
        """Where candidate libraries go."""
        return Path(self._folder.name)

    def __enter__(self) -> Workshop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.worker.close()
        else:
            self.worker.kill()
        self.pool.__exit__(kind, error, trace)
        self._folder.cleanup()


def tune(
    spec: KernelSpec,
    target: Target,
    workloads: Sequence[Workload],
    *,
    effort: Effort | str = Effort.STANDARD,
    budget_s: float | None = None,
    seed: int = 0,
    database: Database | None = None,
    progress: Progress = silent,
    workshop: Workshop | None = None,
    storage: str | None = None,
    study: str | None = None,
) -> TuneResult:
    """Find, prove and record the fastest kernels of a spec on a target.

    Args:
        workloads: what to be fast on; the selection's dispatch table is made from these.
        effort: how many schedules are tried; ones on record for this device and these versions count, so a
            run that was killed continues, and one that was finished only times its finalists again.
        budget_s: seconds after which no further batch is started; the effort's own by default.
        seed: of the search and of the gate's inputs.
        database: where records are kept; the user's cache over the shipped one by default.
        progress: is given every event.
        workshop: processes to use and leave running; by default they last for this call.
        storage: a database's URL or a journal file's path: the search is shared with whoever was given the
            same, and continues what is there. A prediction has nothing to share.
        study: the study's name there; by default made of spec, target, device and versions.

    Raises:
        InvalidValue: no workload, an unknown effort, a budget that is not positive.
        Unsupported: no template covers the spec on this target.
        NoCandidate: nothing was legal, compiled and correct; says what happened to how many.
        ToolMissing, HostCompilerMissing: a compiler is not installed.
        DeviceLost: the device stopped answering; what was measured before is on record.
        CacheUnwritable: no room for the libraries of candidates; what was measured before is on record.
        StudyUnreachable, StudyForeign, MalformedFile: the shared study, see :class:`Ledger`.
    """
    begin = time.monotonic()
    if effort not in list(Effort):
        raise InvalidValue("effort", effort, f"allowed: {', '.join(Effort)}")
    plan = plan_of(Effort(effort), target)
    if not workloads:
        raise InvalidValue("workloads", (), "at least one is expected")
    budget_s = plan.budget_s if budget_s is None else budget_s
    if not budget_s > 0:
        raise InvalidValue("budget", budget_s, "a positive number of seconds is expected")
    if spec.op not in TUNED:
        raise InvalidValue("op", spec.op.value, f"allowed: {', '.join(TUNED)}")
    for workload in workloads:
        if workload.query_lens and spec.op is Op.DECODE:
            raise InvalidValue("workload", workload.name, "a batch of decode has no query lengths")
    distinct = tuple({w.lens: w for w in workloads if w.num_queries}.values())
    if not distinct:
        raise InvalidValue("workloads", [w.name for w in workloads], "at least one token to attend to")
    present = device_of(target).present
    run = _Run(spec, target, distinct, plan, seed, database or Database(), progress, present, storage, study)
    run.start(budget_s)
    if workshop is not None:
        return run.finish(workshop, begin, begin + budget_s)
    with Workshop(target) as own:
        return run.finish(own, begin, begin + budget_s)


class _Run:
    """The state of one call of :func:`tune`."""

    def __init__(
        self,
        spec: KernelSpec,
        target: Target,
        workloads: tuple[Workload, ...],
        plan: Plan,
        seed: int,
        database: Database,
        progress: Progress,
        present: bool,
        storage: str | None,
        study: str | None,
    ) -> None:
        self.spec, self.target, self.workloads, self.plan, self.seed = spec, target, workloads, plan, seed
        self.database, self.tell, self.present = database, progress, present
        self.space = feasible(spec, target)
        self.legal = frozenset(self.space)
        self.stamp: Stamp = stamp_of(target, compiler_version(target.kind), measured=present)
        self.found: Found | None = database.find(spec, target.name, self.stamp)
        gpu = present and target.kind != "cpu"
        self.searched = regimes(workloads, SEARCHED["gpu" if gpu else "cpu"])
        identity = self._identity()
        name = study or f"{spec.name} on {target.name}, {content_hash(tuple(identity.values()))[:8]}"
        self.place = Place(storage, name) if storage is not None else None
        self.batch = plan.batch
        if self.place is not None:
            self.batch = max(1, min(plan.batch, math.floor(LOST * plan.trials)))
        self.device = device_name(target.kind)
        self.bandwidth = Bandwidth(0.0, 0.0)
        self.tflops = 0.0
        self.rejected: list[Rejection] = []
        self.compiled = self.cached = self.passed = self.timed = 0
        self.records: dict[tuple[Schedule, Workload], Record] = {}
        self.anchor: tuple[Schedule, float] | None = None  # timed in every batch, and its time in the first
        self.binaries: dict[Schedule, Compiled] = {}
        self.verdicts: dict[Schedule, Verdict] = {}
        self.best_us: float | None = None
        self.done = 0
        self.path: Path | None = None
        self.simplify = False
        self.outcomes: tuple[Outcome, ...] = ()
        self.warned = False  # that records are not kept
        self.spent = Spent()
        self.known = tuple(self._known())
        self.calibration = Calibration()  # a measured record's prediction is the model's own
        if not present:
            self.calibration = Calibration.for_absent(database.of_spec(spec), target)
        self._predictions: dict[tuple[Schedule, Workload], float] = {}

    def start(self, budget_s: float) -> None:
        trials = min(self.plan.trials if self.present else self.plan.finalists, len(self.space))
        known = len(self.known)
        event = Started(self.spec, self.target.name, self.present, len(self.space), trials, known, budget_s)
        self.tell(event)

    def finish(self, workshop: Workshop, begin: float, deadline: float) -> TuneResult:
        self.workshop = workshop
        if self.present:
            status, (selection, records, stop) = Status.MEASURED, self._measured(begin, deadline)
        else:
            status, (selection, records, stop) = Status.PREDICTED, self._predicted(deadline)
        self._keep(records, selection)
        counts = Counts(
            len(self.space),
            len(self.known),
            self.compiled,
            self.cached,
            self.passed,
            self.timed,
            tuple(self.rejected),
        )
        return TuneResult(
            self.spec,
            self.target,
            status,
            records,
            selection,
            counts,
            stop,
            self.bandwidth.read_gbs,
            time.monotonic() - begin,
            self.path,
            self.tflops,
            self.outcomes,
            self.spent,
        )

    @contextmanager
    def _on(self, phase: str) -> Iterator[None]:
        """Count what is done inside as time of a phase, a field of :class:`Spent`."""
        begin = time.monotonic()
        try:
            yield
        finally:
            taken = getattr(self.spent, phase) + time.monotonic() - begin
            self.spent = replace(self.spent, **{phase: taken})

    # ---- the device is present ----

    def _measured(self, begin: float, deadline: float) -> tuple[Selection, tuple[Record, ...], Stop]:
        self._level_with(self.known)
        with Ledger(Grid(self.space), self.place, self._identity()) as ledger:
            with self._on("time_s"):
                self.bandwidth, self.tflops = self._read_rate(), self._product_rate()
            limit = self.bandwidth.limit_gbs
            floors = [w.floor_us(self.spec, limit, self.tflops) for w in self.searched]
            enough = geometric_mean(floors) / ENOUGH
            self.ledger = ledger
            ledger.preload(self.known)
            before = ledger.state()
            stop, outcomes = Stop.TRIALS, before.outcomes
            trials = self.plan.trials - before.known
            if trials > 0:
                ranked = self._ranked()
                found = search(
                    pruned(ranked, self.plan.trials, self.spec.name),
                    self._evaluate,
                    trials=trials,
                    batch=self.batch,
                    seed=self.seed,
                    start=self._start(ranked),
                    predicted=ranked,
                    elsewhere=timings(self.database, self.spec, self.target),
                    enough_us=enough,
                    deadline=begin + (deadline - begin) * (1 - RESERVED),
                    ledger=ledger,
                )
                stop, outcomes = found.stop, found.outcomes
            self.outcomes = outcomes
            self._adopt(outcomes)
            # a run that tried nothing new, or has no time, does not try simpler ones either
            self.simplify = trials > 0 and stop is not Stop.BUDGET
            records = self._finals(ledger, outcomes)
        if not records:
            raise NoCandidate(self._why_nothing())
        times: dict[Schedule, dict[Workload, float]] = {}
        for record in records:
            times.setdefault(record.schedule, {})[record.workload] = record.time_us
        return self._selected(times), records, stop

    def _selected(
        self, times: Mapping[Schedule, Mapping[Workload, float]], status: Status = Status.MEASURED
    ) -> Selection:
        if not self.spec.batch_invariant:
            return select(times, status, defaults=self._defaults())
        # Kernels differ in their bits, so that such a spec has one, not the batch's.
        fields = family_for(self.spec, self.target).launch_fields
        return select(
            times, status, defaults=self._defaults(), kernel_of=lambda schedule: schedule.without(fields)
        )

    def _identity(self) -> dict[str, str]:
        """What every worker of a study has to agree on."""
        return {
            "spec": self.spec.name,
            "target": self.target.name,
            "template": template_hash(family_for(self.spec, self.target)),
            "compiler": self.stamp.compiler,
            "device": self.stamp.device,
            "workloads": content_hash(self.searched),
        }

    def _level_with(self, outcomes: Iterable[Outcome]) -> None:
        """Put this device's clock on that of the best outcome so far: it is timed in every batch."""
        best = min(
            (o for o in outcomes if o.time_us is not None), key=lambda o: o.time_us or 0.0, default=None
        )
        if self.anchor is None and best is not None:
            self.anchor, self.best_us = (best.schedule, best.time_us or 0.0), best.time_us

    def _adopt(self, outcomes: Iterable[Outcome]) -> None:
        """Keep what other workers of the study measured, as if it had been measured here."""
        others = []
        for outcome in outcomes:
            for record in outcome.records:
                if (record.schedule, record.workload) not in self.records:
                    self.records[record.schedule, record.workload] = record
                    others.append(record)
        if self.place is not None:
            self._keep(others, None)

    def _finals(self, ledger: Ledger, outcomes: Sequence[Outcome]) -> tuple[Record, ...]:
        """The finalists' matrix, timed by one worker of the study and read by the others."""
        with ledger.last_act() as act:
            if act.mine:
                act.result = self._final(self._finalists(outcomes))
            elif act.result:
                first = act.result[0]
                self.bandwidth = Bandwidth(first.roofline_gbs, first.roofline_gbs)
                self.tflops = first.roofline_tflops
        return act.result

    def _known(self) -> Iterable[Outcome]:
        """Schedules on record for exactly this device and these versions, on the searched workloads."""
        if self.found is None or not self.present:
            return
        times: dict[Schedule, dict[Lens, Record]] = {}
        for record in self.found.entry.records:
            exact = record.status is Status.MEASURED and fit(record.stamp, self.stamp) is Fit.EXACT
            if exact and record.schedule in self.legal:
                times.setdefault(record.schedule, {})[record.workload.lens] = record
        for schedule, row in times.items():
            if all(w.lens in row for w in self.searched):
                found = tuple(row[w.lens] for w in self.searched)
                yield Outcome(schedule, geometric_mean([r.time_us for r in found]), records=found)

    def _start(self, ranked: Mapping[Schedule, float]) -> list[Schedule]:
        """Tried first: the default and its neighbours, what won before, the model's favourites, and what won,
        or the default where nothing did, with each value that none of these has, nor any schedule on record.

        From scratch, 480 trials on an H100 had not one of the 108 schedules of a cluster (of 10,524), the
        fastest by far where sequences are few: a rare value of a field is not found by likeness.
        """
        won = guesses(self.database, self.spec, self.target, self.space)
        start = [*near_default(self.spec, self.target, NEAREST), *won, *list(ranked)[:FAVOURITES]]
        seen = [*start, *(outcome.schedule for outcome in self.known)]
        start += untried_values(won or start[:1], seen, self.space, UNTRIED)
        return list(dict.fromkeys(start))

    def _ranked(self) -> dict[Schedule, float]:
        """Schedules and the model's time over three workloads, fastest first."""
        workloads = regimes(self.workloads)
        pool: Sequence[Schedule] = self.space
        if len(pool) > RANKED:  # the same ones in every worker of a study
            pool = random.Random(self.spec.name).sample(self.space, RANKED)
        times = {s: geometric_mean([self._predict(s, w) for w in workloads]) for s in pool}
        return dict(sorted(times.items(), key=lambda item: item[1]))

    def _predict(self, schedule: Schedule, workload: Workload) -> float:
        return self.calibration.time_us(self.target, self.spec, schedule, workload)

    def _defaults(self) -> dict[str, Choice]:
        """Each field's default: what a choice between equals comes down to."""
        return dict(default_schedule(self.spec, self.target).choices)

    def _evaluate(self, batch: tuple[Schedule, ...]) -> list[Outcome]:
        """One batch through compile, link, gate and the race."""
        if self.anchor is None and self.ledger.shared:
            self._level_with(self.ledger.outcomes())
        anchor = self.anchor[0] if self.anchor else None
        wanted = batch if anchor is None or anchor in batch else (anchor, *batch)
        reasons: dict[Schedule, str] = {}
        with self._on("compile_s"):
            usable = self._compile(wanted, reasons)
        with self._on("gate_s"):
            verified, library = self._gate(usable, self.seed, reasons)
        with self._on("time_s"):
            raced = self._race(library, verified, self.searched, self.plan.rungs, reasons, anchor, "time")
        outcomes = []
        scores = {s: geometric_mean([t.median_us for t in row.values()]) for s, row in raced.items()}
        level = 1.0  # puts this batch's clock on the first batch's
        if self.anchor is not None and self.anchor[0] in scores:
            level = self.anchor[1] / scores[self.anchor[0]]
        elif scores and self.anchor is None:
            best = min(scores, key=lambda s: scores[s])
            self.anchor = (best, scores[best])
        records: list[Record] = []
        for schedule in batch:
            if schedule in scores:
                row = tuple(
                    self._record(schedule, workload, timing, self.verdicts[schedule])
                    for workload, timing in raced[schedule].items()
                )
                outcomes.append(Outcome(schedule, scores[schedule] * level, records=row))
                records += row
            else:
                outcomes.append(Outcome(schedule, None, reasons[schedule]))
        self._keep(records, None)
        self.done = len(self.ledger.outcomes()) + len(batch)
        times = [o.time_us for o in outcomes if o.time_us is not None]
        self.best_us = min([*times, *([self.best_us] if self.best_us else [])], default=None)
        share = None
        if self.best_us:
            gbs = self.bandwidth.read_gbs
            floors = [w.floor_us(self.spec, gbs, self.tflops) for w in self.searched]
            share = geometric_mean(floors) / self.best_us
        self.tell(Tried(tuple(outcomes), self.done, self.best_us, share))
        return outcomes

    def _compile(self, schedules: Sequence[Schedule], reasons: dict[Schedule, str]) -> list[Schedule]:
        """Those that compile and do not spill."""
        new = [s for s in schedules if s not in self.binaries]
        sources = [render(self.spec, self.target, s) for s in new]
        for done, compiled in enumerate(compile_all(sources, self.workshop.pool, self.workshop.cache), 1):
            compiled = self._launchable(compiled)
            self.binaries[compiled.source.schedule] = compiled
            self.compiled += compiled.fresh
            self.cached += not compiled.fresh
            if compiled.binary is None:
                self._reject(compiled.source.schedule, "compile", compiled.reason, reasons)
            self.tell(Step("compile", done, len(new)))
        for schedule in schedules:  # a reason known from an earlier batch
            if self.binaries[schedule].binary is None:
                reasons.setdefault(schedule, self.binaries[schedule].reason)
        return [s for s in schedules if self.binaries[s].binary is not None]

    def _launchable(self, compiled: Compiled) -> Compiled:
        """A block whose registers do not fit one multiprocessor cannot be launched."""
        if compiled.binary is None or not self.target.regs_per_sm:
            return compiled
        needed = compiled.binary.resources.registers * 32 * compiled.binary.num_warps
        if needed <= self.target.regs_per_sm:
            return compiled
        reason = f"a block needs {needed} registers, {self.target.name} has {self.target.regs_per_sm}"
        return replace(compiled, binary=None, reason=reason)

    def _gate(
        self, schedules: Sequence[Schedule], seed: int, reasons: dict[Schedule, str], again: bool = False
    ) -> tuple[list[Verified], Path]:
        """Link into one library and gate what has not passed yet (or everything, ``again``)."""
        library = self.workshop.folder / f"{self.spec.name}-{time.monotonic_ns()}.so"
        binaries = [b for s in schedules if (b := self.binaries[s].binary) is not None]
        if not binaries:
            return [], library
        try:
            link(binaries, (), library)
        except OSError as error:  # a full disk, most likely
            raise CacheUnwritable(f"{library.parent}: {error.strerror or error}; {self._kept()}") from error
        verified = []
        for variant, schedule in enumerate(schedules):
            verdict = self.verdicts.get(schedule)
            if verdict is None or again:
                verdict = verdict_on(self.workshop.worker, library, self.spec, variant, self.device, seed)
                if verdict.passed and schedule not in self.verdicts:
                    self.passed += 1
                self.verdicts[schedule] = verdict
            if verdict.passed:
                verified.append(Verified(variant, schedule, verdict))
            else:
                self._check_device()
                self._reject(schedule, "gate", verdict.reason, reasons)
            self.tell(Step("gate", variant + 1, len(schedules)))
        return verified, library

    def _race(
        self,
        library: Path,
        verified: Sequence[Verified],
        workloads: Sequence[Workload],
        rungs: Sequence[int],
        reasons: dict[Schedule, str],
        always: Schedule | None,
        phase: str,
    ) -> dict[Schedule, dict[Workload, Timing]]:
        """Interleaved halving in the worker; a candidate that dies there is rejected and the rest go on."""
        by_schedule = {v.schedule: v for v in verified}
        steps = len(rungs) * len(workloads)
        taken = 0

        def sample(
            workload: Workload, racing: tuple[Schedule, ...], rounds: int
        ) -> dict[Schedule, tuple[float, ...]]:
            nonlocal taken
            alive = list(racing)
            result: dict[Schedule, tuple[float, ...]] = {}
            while alive:
                variants = [by_schedule[s] for s in alive]
                lost = self._sample(library, workload, variants, rounds, result)
                if not lost:
                    break
                for schedule, reason in lost.items():
                    self._reject(schedule, "time", reason, reasons)
                    alive.remove(schedule)
                if result:
                    break
            taken += 1
            self.tell(Step(phase, taken, steps))
            return result

        if not verified:
            return {}
        keep = (always,) if always in by_schedule else ()
        raced = race(
            list(by_schedule), workloads, sample, rungs=rungs, always=[s for s in keep if s is not None]
        )
        self.timed += len(raced) if phase == "time" else 0
        return raced

    def _sample(
        self,
        library: Path,
        workload: Workload,
        variants: Sequence[Verified],
        rounds: int,
        result: dict[Schedule, tuple[float, ...]],
    ) -> dict[Schedule, str]:
        """One call of ``measure``: fills ``result``, returns who failed and why."""
        names = {v.variant: v.schedule for v in variants}
        try:
            samples = self.workshop.worker.call(
                measure,
                library,
                self.spec,
                workload,
                tuple(variants),
                rounds,
                self.device,
                self.seed,
                timeout_s=MEASURE_S,
            )
        except WorkerLost as lost:
            self._check_device()
            if lost.last not in names:
                raise  # it died before any candidate ran: not theirs to pay for
            return {names[int(str(lost.last))]: lost.reason}
        result.update({names[v]: times for v, times in samples.times.items()})
        return {names[v]: reason for v, reason in samples.failed.items()}

    def _check_device(self) -> None:
        """After a candidate died: was it the candidate, or is the device gone?

        Raises:
            DeviceLost: a fresh process cannot use the device either; nobody is charged with that.
        """
        if self.device == "cpu":
            return
        try:
            self.workshop.worker.call(device_works, self.device, timeout_s=DEVICE_S)
        except WorkerFailed:
            self.workshop.worker.kill()  # the process may be what is broken: one more chance in a new one
            try:
                self.workshop.worker.call(device_works, self.device, timeout_s=DEVICE_S)
            except (WorkerFailed, WorkerLost) as error:
                raise self._lost(error) from error
        except WorkerLost as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> DeviceLost:
        return DeviceLost(f"{self.stamp.device} stopped answering ({error}); {self._kept()}")

    def _kept(self) -> str:
        kept = f"{len(self.records)} timings are kept in {self.path}" if self.path else "nothing was kept"
        return f"{kept}: the same command goes on from there"

    def _read_rate(self) -> Bandwidth:
        """The read bandwidth, now."""
        return self._now(bandwidth)

    def _product_rate(self) -> float:
        """The rate of a large matrix product, now."""
        return self._now(matmul_tflops)

    def _now(self, rate: Callable[[KernelSpec, str], Rate]) -> Rate:
        """A rate of the device, measured in the worker."""
        try:
            return self.workshop.worker.call(rate, self.spec, self.device, timeout_s=MEASURE_S)
        except (WorkerFailed, WorkerLost):
            self._check_device()
            raise

    def _finalists(self, outcomes: Sequence[Outcome]) -> list[Schedule]:
        """The fastest over all workloads, each workload's own fastest, what is chosen on record, the default.

        What was chosen before may be fastest on a workload that candidates are not timed on while searching:
        only where it is timed beside the others on all of them is the new choice no worse than the old one.
        And than the default, which is what is called where there are no records: it is timed with them, too.
        """
        timed = sorted((o for o in outcomes if o.time_us is not None), key=lambda o: o.time_us or 0.0)
        finalists = [o.schedule for o in timed[: self.plan.finalists]]
        known = {o.schedule for o in timed}
        for workload in self.searched:
            rows = [r for (s, w), r in self.records.items() if w == workload and s in known]
            finalists += [r.schedule for r in sorted(rows, key=lambda r: r.time_us)[:1]]
        if self.found is not None and self.found.entry.selection is not None:
            finalists += [v for v in self.found.entry.selection.variants if v in self.legal]
        finalists += [s for s in (default_schedule(self.spec, self.target),) if s in known]
        if self.simplify:
            finalists += self._simpler(finalists[:1])
        return list(dict.fromkeys(finalists))

    def _simpler(self, best: Sequence[Schedule]) -> list[Schedule]:
        """The best with one choice brought back to its default: as fast within the noise, it is preferred."""
        defaults = self._defaults()
        simpler = [
            replace(s, choices=tuple((n, defaults[n] if n == name else v) for n, v in s.choices))
            for s in best
            for name, value in s.choices
            if value != defaults[name]
        ]
        return [s for s in simpler if s in self.legal][:SIMPLER]

    def _final(self, finalists: Sequence[Schedule]) -> tuple[Record, ...]:
        """Gate again on fresh inputs, then time all together on every workload, no halving."""
        reasons: dict[Schedule, str] = {}
        with self._on("compile_s"):
            usable = self._compile(finalists, reasons)
        with self._on("gate_s"):
            verified, library = self._gate(usable, self.seed + 1, reasons, again=True)
        rounds = (self.plan.final_rounds,)
        with self._on("time_s"):
            before, tflops = self._read_rate(), self._product_rate()
            raced = self._race(library, verified, self.workloads, rounds, reasons, None, "retime")
            after, self.tflops = self._read_rate(), (tflops + self._product_rate()) / 2
        self.bandwidth = Bandwidth(
            (before.read_gbs + after.read_gbs) / 2, max(before.limit_gbs, after.limit_gbs)
        )
        return tuple(
            self._record(schedule, workload, timing, self.verdicts[schedule])
            for schedule, row in raced.items()
            for workload, timing in row.items()
        )

    def _record(self, schedule: Schedule, workload: Workload, timing: Timing, verdict: Verdict) -> Record:
        binary = self.binaries[schedule].binary
        record = Record(
            status=Status.MEASURED,
            spec=self.spec,
            target=self.target.name,
            workload=workload,
            schedule=schedule,
            kernel=kernel_hash(self.spec, self.target, schedule),
            stamp=self.stamp,
            resources=binary.resources if binary else Resources(),
            predicted_us=self._predict(schedule, workload),
            timing=timing,
            roofline_gbs=self.bandwidth.read_gbs,
            verdict=verdict,
            roofline_tflops=self.tflops,
        )
        self.records[schedule, workload] = record
        return record

    # ---- the device is absent ----

    def _predicted(self, deadline: float) -> tuple[Selection, tuple[Record, ...], Stop]:
        """The model's favourites that really compile for the architecture, as predictions."""
        ranked = list(self._ranked())
        usable: list[Schedule] = []
        stop = Stop.COMPILED
        tried = 0
        while len(usable) < min(self.plan.finalists, len(ranked)):
            if tried >= min(self.plan.trials, len(ranked)):
                stop = Stop.TRIALS if tried < len(ranked) else Stop.EXHAUSTED
                break
            if usable and time.monotonic() >= deadline:
                stop = Stop.BUDGET
                break
            batch = ranked[tried : tried + self.plan.finalists - len(usable)]
            reasons: dict[Schedule, str] = {}
            with self._on("compile_s"):
                usable += self._compile(batch, reasons)
            tried += len(batch)
            outcomes = []
            for schedule in batch:
                if schedule in reasons:
                    outcomes.append(Outcome(schedule, None, reasons[schedule]))
                else:
                    mean = geometric_mean([self._predict(schedule, w) for w in self.searched])
                    outcomes.append(Outcome(schedule, mean))
                    self.best_us = min(mean, self.best_us or math.inf)
            self.tell(Tried(tuple(outcomes), tried, self.best_us, None))
        if not usable:
            raise NoCandidate(self._why_nothing())
        records = tuple(
            Record(
                Status.PREDICTED,
                self.spec,
                self.target.name,
                workload,
                schedule,
                kernel_hash(self.spec, self.target, schedule),
                self.stamp,
                binary.resources,
                self._predict(schedule, workload),
            )
            for schedule in usable
            for workload in self.workloads
            if (binary := self.binaries[schedule].binary) is not None
        )
        times = {s: {w: self._predict(s, w) for w in self.workloads} for s in usable}
        selection = self._selected(times, Status.PREDICTED)
        if self.spec.op is Op.DECODE:  # whose picks were held against a device's own best
            selection = replace(selection, expected_regret=self.calibration.expected_regret)
        return selection, records, stop

    # ---- both ----

    def _reject(self, schedule: Schedule, stage: str, reason: str, reasons: dict[Schedule, str]) -> None:
        reasons[schedule] = reason
        self.rejected.append(Rejection(schedule, stage, reason))

    def _keep(self, records: Sequence[Record], selection: Selection | None) -> None:
        """Publish records as soon as there are some; without a writable cache the run goes on regardless."""
        if not records:
            return
        try:
            entry = Entry(self.spec, self.target.name, tuple(records), selection)
            self.path = self.database.save(entry)
        except CacheUnwritable as error:
            self.path = None
            if not self.warned:
                self.tell(Warned(f"records are not kept: {error}"))
            self.warned = True

    def _why_nothing(self) -> str:
        stages: dict[str, int] = {}
        for rejection in self.rejected:
            stages[rejection.stage] = stages.get(rejection.stage, 0) + 1
        counted = ", ".join(f"{count} at {stage}" for stage, count in stages.items()) or "none was tried"
        last = f"; the last: {self.rejected[-1].reason}" if self.rejected else ""
        return f"{self.spec.name} on {self.target.name}: no candidate is left ({counted}{last})"


def pruned(ranked: Mapping[Schedule, float], trials: int, seed: str) -> tuple[Schedule, ...]:
    """The promising part of a ranking, ``trials`` at least, and a random tenth of the rest that audits it."""
    order = list(ranked)
    cut = max(math.ceil(PROMISING * len(order)), trials)
    rest = order[cut:]
    return (*order[:cut], *random.Random(seed).sample(rest, math.ceil(AUDIT * len(rest))))


def spread(workloads: Sequence[Workload], count: int) -> tuple[Workload, ...]:
    """At most ``count`` workloads, evenly spaced among all by their number of tokens, ends included.

    Of equally many tokens, those of the fewest queries and sequences come first.
    """
    ordered = sorted(workloads, key=lambda w: (w.num_tokens, w.num_queries, w.num_seqs, w.name))
    if len(ordered) <= count:
        return tuple(ordered)
    return tuple(ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count))


def regimes(workloads: Sequence[Workload], count: int = REGIMES) -> tuple[Workload, ...]:
    """At most ``count``, 3 or more, to time candidates on: from the least to the most tokens, the most skewed
    among them.

    A short batch is bound by latency, a long one by bytes, and one with a long sequence among short ones by
    how it is shared out: a schedule that is good at two of them may be bad at the third.
    """
    chosen = spread(workloads, count)  # the first of them waits for latency the most
    skewed = max(workloads, key=_skew)
    if _skew(skewed) < SKEWED or skewed in chosen or len(chosen) < count:
        return chosen
    return (chosen[0], skewed, *chosen[2:])


def _skew(workload: Workload) -> float:
    return workload.max_seq_len * workload.num_seqs / workload.num_tokens


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(sum(math.log(v) for v in values) / len(values))
