"""The cost model held against measurements: how well it ranks, and constants that fit them better.

A family's symbols are numbers of three kinds: of the spec, of the schedule, and of the machine: rates and
times, whose names end in ``_us``, ``_rate``, ``_gbs`` or ``ghz``. Calibration scales the last, one factor a
name for all specs of a target, so that predicted times come as near to the measured ones as they can. What
the formulas leave out (a layout that suits a compiler, a bank conflict) shows as a residual of each schedule,
and a schedule carries its residual from one target to another: the same kernel runs there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pagedgen.autotune.database import Entry
from pagedgen.compiler.cost import predict
from pagedgen.errors import InvalidValue
from pagedgen.values.record import Record, Status
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target import Target
from pagedgen.values.target_table import target as find_target
from pagedgen.values.target_table import target_names
from pagedgen.values.workload import Lens, Workload

MACHINE = ("_us", "_rate", "_gbs", "ghz")  # endings of the symbols that calibration may scale
RIDGE = 2e-4  # pull of each factor's logarithm towards 0: a factor that no timing speaks of stays 1
STEP, ROUNDS = 0.05, 6  # of the Gauss-Newton fit
FITTED = 1500  # timings that constants are fitted to, evenly drawn

# What picks for a device that was not measured cost against its own best, in the median over specs from an
# H100 to an H200 (docs/benchmarks/prediction.md): with the model calibrated on a device of the same
# architecture, and as it is, which stands for what is to be expected of other architectures.
REGRET_ALIKE, REGRET_OTHER = 0.013, 0.097

Point = tuple[KernelSpec, Schedule, Workload]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation, -1 to 1; equal values share their mean rank. 0 where one side is constant.

    Raises:
        InvalidValue: fewer than two pairs, or lists of different lengths.
    """
    if len(a) != len(b) or len(a) < 2:
        raise InvalidValue("ranks", (len(a), len(b)), "two lists of one length, two values at least")
    x, y = np.array(_ranks(a)), np.array(_ranks(b))
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / norm if norm else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for i in order[start : end + 1]:
            ranks[i] = (start + end) / 2
        start = end + 1
    return ranks


@dataclass(frozen=True, slots=True)
class RankError:
    """How the model ranked the measured schedules of a spec on a workload.

    ``regret`` is how much slower its favourite was than the fastest, 0.03 is 3%; ``correlation``, Spearman's.
    """

    spec: KernelSpec
    workload: Workload
    schedules: int
    correlation: float
    regret: float


def rank_errors(records: Iterable[Record]) -> tuple[RankError, ...]:
    """One for each (spec, workload) with at least three measured schedules, by the predictions on record."""
    groups: dict[tuple[KernelSpec, Workload], list[Record]] = {}
    for record in records:
        if record.status is Status.MEASURED:
            groups.setdefault((record.spec, record.workload), []).append(record)
    return tuple(
        RankError(
            spec,
            workload,
            len(group),
            spearman([r.predicted_us for r in group], [r.time_us for r in group]),
            min(group, key=lambda r: r.predicted_us).time_us / min(r.time_us for r in group) - 1,
        )
        for (spec, workload), group in groups.items()
        if len(group) >= 3
    )


@dataclass(frozen=True, slots=True)
class Calibration:
    """Factors on the model's machine constants, and what each schedule still deviates by, as a logarithm.

    Factors are 1 and residuals 0 where nothing is known. A schedule that was not measured beside others that
    were is taken to be as much worse than the model says as one in six of those: otherwise the schedule that
    the model flatters most would win over those that are known.
    """

    factors: Mapping[str, float] = field(default_factory=dict)
    residuals: Mapping[tuple[KernelSpec, Schedule, Lens], float] = field(default_factory=dict)
    unmeasured: Mapping[tuple[KernelSpec, Lens], float] = field(default_factory=dict)
    alike: bool = False  # whether they are of a device with the architecture that is predicted for

    @property
    def expected_regret(self) -> float:
        """What a pick by this model is expected to cost against the device's own best: 0.02 is 2%."""
        return REGRET_ALIKE if self.alike else REGRET_OTHER

    @classmethod
    def of(cls, records: Sequence[Record], target: Target) -> Calibration:
        """From records that were measured on ``target``.

        Raises:
            InvalidValue: none of them was.
        """
        measured = [r for r in records if r.status is Status.MEASURED and r.target == target.name]
        if not measured:
            raise InvalidValue("records", 0, f"measured ones of {target.name} are expected")
        factors = _fit(measured[:: max(1, math.ceil(len(measured) / FITTED))], target)
        constants = cls(factors)
        residuals = {
            (r.spec, r.schedule, r.workload.lens): math.log(
                r.time_us / constants.time_us(target, r.spec, r.schedule, r.workload)
            )
            for r in measured
        }
        cases: dict[tuple[KernelSpec, Lens], list[float]] = {}
        for (spec, _, batch), residual in residuals.items():
            cases.setdefault((spec, batch), []).append(residual)
        unmeasured = {case: statistics.mean(all_) + statistics.pstdev(all_) for case, all_ in cases.items()}
        return cls(factors, residuals, unmeasured)

    @classmethod
    def for_absent(cls, entries: Iterable[Entry], target: Target) -> Calibration:
        """From what other targets of the kind measured, the likest of them alone.

        Likest: of the same architecture, then the one with the most records. Nothing is calibrated where
        there are none.
        """
        sources: dict[str, list[Record]] = {}
        for entry in entries:
            rows = [r for r in entry.records if r.status is Status.MEASURED]
            if rows and entry.target != target.name:
                sources.setdefault(entry.target, []).extend(rows)
        known = {name: find_target(name) for name in sources if name in target_names()}
        alike = [name for name, one in known.items() if one.kind == target.kind]
        if not alike:
            return cls()
        source = max(alike, key=lambda name: (known[name].arch == target.arch, len(sources[name]), name))
        return replace(cls.of(sources[source], known[source]), alike=known[source].arch == target.arch)

    def time_us(self, target: Target, spec: KernelSpec, schedule: Schedule, workload: Workload) -> float:
        """The calibrated model's time of one call on ``target``, microseconds."""
        time = predict(spec, target, schedule, workload, self.factors).time_us
        beside = self.unmeasured.get((spec, workload.lens), 0.0)
        return time * math.exp(self.residuals.get((spec, schedule, workload.lens), beside))


def _fit(records: Sequence[Record], target: Target) -> dict[str, float]:
    """Least squares of log times: Gauss-Newton, with a ridge; a step is kept when it helps."""
    names = sorted(
        name
        for name in predict(records[0].spec, target, records[0].schedule, records[0].workload).inputs
        if name.endswith(MACHINE)
    )
    observed = np.array([math.log(r.time_us) for r in records])
    pull = RIDGE * len(records)

    def logs(theta: np.ndarray) -> np.ndarray:
        factors = {name: math.exp(t) for name, t in zip(names, theta, strict=True)}
        return np.array(
            [math.log(predict(r.spec, target, r.schedule, r.workload, factors).time_us) for r in records]
        )

    def loss(theta: np.ndarray, predicted: np.ndarray) -> float:
        # Fast schedules decide which one is picked; a slow one may be slow for a reason the model lacks.
        return float(
            (weights * (predicted - observed) ** 2).sum() + RIDGE * len(records) / 100 * (theta @ theta)
        )

    best: dict[tuple[KernelSpec, Workload], float] = {}
    for record in records:
        key = (record.spec, record.workload)
        best[key] = min(best.get(key, math.inf), record.time_us)
    weights = np.array([(best[r.spec, r.workload] / r.time_us) ** 4 for r in records])
    theta, now = np.zeros(len(names)), logs(np.zeros(len(names)))
    for _ in range(ROUNDS):
        slopes = np.stack(
            [(logs(theta + STEP * np.eye(len(names))[i]) - now) / STEP for i in range(len(names))], 1
        )
        ridge = pull * np.eye(len(names))
        step = np.linalg.solve(
            slopes.T @ (weights[:, None] * slopes) + ridge,
            slopes.T @ (weights * (observed - now)) - ridge @ theta,
        )
        step = np.clip(step, -0.7, 0.7)
        after = logs(theta + step)
        if not loss(theta + step, after) < loss(theta, now) - 1e-6:
            break
        theta, now = theta + step, after
    return {name: math.exp(t) for name, t in zip(names, theta, strict=True)}


@dataclass(frozen=True, slots=True)
class Transfer:
    """What a pick made for a target without measuring there cost, against the target's own best.

    ``regret`` is that of the calibrated model's pick, ``uncalibrated`` that of the model as it is, ``moved``
    that of the other target's own fastest schedule on the same batches: 0.02 is 2%. ``candidates`` were
    measured on the target.
    """

    spec: KernelSpec
    candidates: int
    pick: Schedule
    regret: float
    uncalibrated: float
    moved: float | None


def transfers(
    known: Sequence[Record], source: Target, truth: Sequence[Record], goal: Target
) -> tuple[Transfer, ...]:
    """Pick for ``goal`` with what was measured on ``source``, and hold the picks against ``truth``.

    A pick is the schedule with the least geometric mean over the workloads that were measured on ``goal``,
    among the schedules that met all of them there: the regret of one that was never run is not known. Nothing
    that was measured on ``goal`` goes into the choice. A spec that was measured on ``goal`` alone is picked
    for with the constants that the source's other specs gave.

    Raises:
        InvalidValue: nothing was measured on one of the two.
    """
    calibration, plain = Calibration.of(known, source), Calibration()
    measured = [r for r in truth if r.status is Status.MEASURED and r.target == goal.name]
    if not measured:
        raise InvalidValue("records", 0, f"measured ones of {goal.name} are expected")
    return tuple(
        _transfer(
            spec,
            goal,
            [r for r in known if r.spec == spec and r.status is Status.MEASURED],
            [r for r in measured if r.spec == spec],
            calibration,
            plain,
        )
        for spec in dict.fromkeys(r.spec for r in measured)
    )


def _transfer(
    spec: KernelSpec,
    goal: Target,
    known: Sequence[Record],
    truth: Sequence[Record],
    calibration: Calibration,
    plain: Calibration,
) -> Transfer:
    workloads, times = _matrix(truth)
    there = {s: _mean(row.values()) for s, row in times.items()}
    best = min(there.values())

    def favourite(model: Calibration) -> Schedule:
        return min(there, key=lambda s: (_mean([model.time_us(goal, spec, s, w) for w in workloads]), s))

    there_too = {workload.lens for workload in workloads}  # what is fastest follows from the batches
    _, here = _matrix([r for r in known if r.workload.lens in there_too])
    both = {s: _mean(row.values()) for s, row in here.items() if s in there}
    chosen = favourite(calibration)
    return Transfer(
        spec,
        len(there),
        chosen,
        there[chosen] / best - 1,
        there[favourite(plain)] / best - 1,
        there[min(both, key=lambda s: (both[s], s))] / best - 1 if both else None,
    )


def median_regret(found: Sequence[Transfer]) -> float:
    """Over the specs."""
    return statistics.median(t.regret for t in found)


def _matrix(
    records: Sequence[Record],
) -> tuple[tuple[Workload, ...], dict[Schedule, dict[Workload, float]]]:
    """The workloads, and the times of the schedules that met most of them: all of those same ones."""
    rows: dict[Schedule, dict[Lens, Record]] = {}
    for record in records:
        rows.setdefault(record.schedule, {})[record.workload.lens] = record
    if not rows:
        return (), {}
    # Search times candidates on some workloads, finalists on all: the larger group tells more of a ranking.
    sets = {frozenset(row) for row in rows.values()}
    covered = {key: sum(key <= set(row) for row in rows.values()) for key in sets}
    largest = max(sorted(covered, key=sorted), key=lambda key: covered[key] * len(key))
    chosen = sorted(largest)
    kept = {
        schedule: {row[key].workload: row[key].time_us for key in chosen}
        for schedule, row in rows.items()
        if set(chosen) <= set(row)
    }
    return tuple(next(iter(kept.values()))), kept


def _mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))
