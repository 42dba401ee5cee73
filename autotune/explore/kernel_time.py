"""``KernelTime``: the time of one decode kernel against batch size, KV tokens and run coverage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from pagedgen.autotune import database
from pagedgen.autotune.explore.timings import KernelTiming, KernelTimings
from pagedgen.compiler.cost import predict
from pagedgen.compiler.families import family_for
from pagedgen.compiler.space import default_schedule, is_legal
from pagedgen.errors import InvalidValue
from pagedgen.values.record import Status
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target import Target
from pagedgen.values.workload import Workload

SHORTEST = 4  # log2 of the least mean length in the grid


@dataclass(frozen=True, slots=True)
class KernelTime:
    """Microseconds of one call on a grid: ``us[i][j]`` is for 2^i sequences of 2^(j + 4) tokens.

    Between grid points it is interpolated bilinearly in logarithms, which is exact for powers of both; beyond
    the last ones it goes on with their slope. ``factors`` are (coverage, factor), ascending.
    """

    spec: KernelSpec
    status: Status
    origin: str  # what it rests on, in words
    us: tuple[tuple[float, ...], ...]
    factors: tuple[tuple[float, float], ...] = ((0.0, 1.0),)

    def at(self, num_seqs: int, num_tokens: int, coverage: float = 0.0) -> float:
        """Microseconds of a call with ``num_seqs`` sequences of ``num_tokens`` KV tokens in all."""
        table = self.us
        x = math.log2(num_seqs)
        y = math.log2(num_tokens / num_seqs) - SHORTEST if num_tokens > num_seqs else 0.0
        i = min(int(x), len(table) - 2)
        j = max(0, min(int(y), len(table[0]) - 2))
        x, y = x - i, max(0.0, y - j)
        low, high = table[i], table[i + 1]
        first = math.log(low[j]) * (1 - y) + math.log(low[j + 1]) * y
        second = math.log(high[j]) * (1 - y) + math.log(high[j + 1]) * y
        return math.exp(first * (1 - x) + second * x) * self.factor(coverage)

    def factor(self, coverage: float) -> float:
        """Time at a coverage over time at the least one that is known; linear in between."""
        (before, value), *rest = self.factors
        for share, factor in rest:
            if coverage < share:
                return value + (factor - value) * max(0.0, coverage - before) / (share - before)
            before, value = share, factor
        return value


def kernel_time(
    spec: KernelSpec,
    target: Target,
    max_num_seqs: int,
    max_seq_len: int,
    timings: KernelTimings | None = None,
    records: database.Database | None = None,
) -> KernelTime:
    """What is known of a spec's kernels: the suite's file, else measured records, else the cost model.

    A file was asked for, and it gives every block size the same effort, which records need not.

    Measured times are interpolated along the model: what is interpolated is their ratio to it, by inverse
    squared distance over the logarithms of batch size and mean length (Shepard, 1968).

    Raises:
        InvalidValue: the file was measured on another target, or its run was cut off.
        Unsupported: no template covers the spec on this target.
        MalformedFile: a record file is damaged.
    """
    if timings is not None and not timings.complete:
        got = f"{timings.done} of {timings.planned} groups of kernels"
        allowed = f"all are expected: {timings.suite} was cut off (bench --case runs some of them)"
        raise InvalidValue("kernel_times", got, allowed)
    if timings is not None and timings.environment.target != target.name:
        allowed = f"a file measured on {target.name} is expected"
        raise InvalidValue("kernel_times", timings.environment.target, allowed)
    rows = 1 + max(1, (max_num_seqs - 1).bit_length())
    columns = 1 + max(1, (max_seq_len - 1).bit_length() - SHORTEST)
    grid = [[(1 << i, 1 << (i + j + SHORTEST)) for j in range(columns)] for i in range(rows)]
    model = [[_predicted(spec, target, *point) for point in row] for row in grid]
    factors: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    if timings is not None and (known := timings.of(spec)):
        origin = f"measured: {len(known)} rows of {timings.suite}, {timings.environment.device}"
        least = min(row.coverage for row in known)
        points = [(r.num_seqs, r.num_tokens, r.median_us) for r in known if r.coverage == least]
        factors = _factors(known)
    elif points := _recorded(spec, target, records):
        origin = f"measured: {len(points)} recorded batches"
    else:
        return KernelTime(spec, Status.PREDICTED, "predicted by the cost model", _frozen(model))
    ratios = [(n, tokens, us / _predicted(spec, target, n, tokens)) for n, tokens, us in points]
    us = [
        [time * _blend(ratios, *point) for time, point in zip(times, row, strict=True)]
        for times, row in zip(model, grid, strict=True)
    ]
    return KernelTime(spec, Status.MEASURED, origin, _frozen(us), factors)


def _frozen(table: Iterable[Iterable[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in table)


@cache
def _schedule(spec: KernelSpec, target: Target) -> Schedule:
    """The family's default for the block size, nearly always legal; on the model within 0.5% of the best."""
    family = family_for(spec, target)
    choices = {field.name: field.default for field in family.fields(spec, target)}
    schedule = Schedule.of(family.name, **choices)
    return schedule if is_legal(spec, target, schedule) else default_schedule(spec, target)


@cache
def _predicted(spec: KernelSpec, target: Target, num_seqs: int, num_tokens: int) -> float:
    """The prediction for a batch of (nearly) equal lengths, in microseconds."""
    length, longer = divmod(num_tokens, num_seqs)
    lengths = (length + 1,) * longer + (length,) * (num_seqs - longer)
    workload = Workload("uniform", lengths)
    return predict(spec, target, _schedule(spec, target), workload).time_us


def _recorded(
    spec: KernelSpec, target: Target, records: database.Database | None
) -> list[tuple[int, int, float]]:
    """(num_seqs, num_tokens, microseconds) of the measured selection's picks."""
    found = database.recorded(spec, target, records)
    if found is None or found.entry.selection is None or found.entry.selection.status is not Status.MEASURED:
        return []
    selection = found.entry.selection
    return [
        (record.workload.num_seqs, record.workload.num_tokens, record.time_us)
        for record in found.entry.chosen()
        if record.schedule == selection.pick(record.workload.num_seqs, record.workload.max_seq_len)
    ]


def _factors(rows: Sequence[KernelTiming]) -> tuple[tuple[float, float], ...]:
    """Geometric mean over batches of time at each coverage over time at the least."""
    times: dict[tuple[int, int], dict[float, float]] = {}
    for row in rows:
        times.setdefault((row.num_seqs, row.num_tokens), {})[row.coverage] = row.median_us
    coverages = sorted({row.coverage for row in rows})
    factors = []
    for coverage in coverages:
        logs = [
            math.log(case[coverage] / case[coverages[0]])
            for case in times.values()
            if coverage in case and coverages[0] in case
        ]
        if logs:
            factors.append((coverage, math.exp(sum(logs) / len(logs))))
    return tuple(factors)


def _blend(ratios: Sequence[tuple[int, int, float]], num_seqs: int, num_tokens: int) -> float:
    """The ratio at a point, by inverse squared distance in logarithms; that of a point itself where known."""
    total = weight = 0.0
    for seqs, tokens, ratio in ratios:
        dx = math.log2(seqs / num_seqs)
        dy = math.log2(tokens / seqs * num_seqs / num_tokens)
        distance = dx * dx + dy * dy
        if distance < 1e-12:
            return ratio
        total += ratio / distance
        weight += 1 / distance
    return total / weight
