"""records → variants and dispatch rules: the smallest set of kernels nearly as good as all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pagedgen.errors import InvalidValue
from pagedgen.values import codec
from pagedgen.values.manifest import ANY, Rule
from pagedgen.values.record import Status
from pagedgen.values.schedule import Choice, Schedule
from pagedgen.values.workload import Workload

WORST_REGRET = 0.02
NOISE = 0.003  # in mean regret, between equals: medians of a run's finalists repeat to about that
EXHAUSTIVE = 50_000  # subsets tried before the greedy cover takes over

# What a table tells batches apart by: num_seqs, query tokens (0: not told, as of decode), max_seq_len.
Cell = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Selection:
    """The kernels of one spec, and the table that picks one for a call.

    ``worst_regret`` is the largest slowdown, over the tuned workloads, of the table's pick against the
    fastest of all candidates: 0.013 is 1.3%. ``expected_regret``, of a predicted selection alone, is what
    such picks have cost against a device's own best where that was measured, in the median.
    """

    status: Status
    variants: tuple[Schedule, ...]
    dispatch: tuple[Rule, ...]
    worst_regret: float
    expected_regret: float | None = field(default=None, metadata=codec.OMIT_DEFAULT)

    def __post_init__(self) -> None:
        if not self.variants:
            raise InvalidValue("variants", (), "at least one is expected")
        if not self.dispatch or not self.dispatch[-1].fits(ANY, ANY, ANY):
            raise InvalidValue(
                "dispatch", self.dispatch[-1:], f"the last row covers everything (up to {ANY})"
            )
        if self.expected_regret is not None and self.status is not Status.PREDICTED:
            raise InvalidValue("expected_regret", self.expected_regret, "a measured selection has none")
        for rule in self.dispatch:
            if not 0 <= rule.variant < len(self.variants):
                raise InvalidValue("variant", rule.variant, f"0 to {len(self.variants) - 1} is allowed")

    def pick(self, num_seqs: int, max_seq_len: int, num_tokens: int = 0) -> Schedule:
        """The schedule that the table gives a call; ``num_tokens`` are its queries, no matter for decode."""
        return self.variants[lookup(self.dispatch, num_seqs, max_seq_len, num_tokens)]

    def pick_for(self, workload: Workload) -> Schedule:
        """The schedule that the table gives a batch."""
        num_seqs, num_tokens, max_seq_len = _cell(workload)
        return self.pick(num_seqs, max_seq_len, num_tokens)


def lookup(dispatch: Sequence[Rule], num_seqs: int, max_seq_len: int, num_tokens: int = 0) -> int:
    """Index of the variant of the first row that fits.

    Raises:
        InvalidValue: no row fits.
    """
    for rule in dispatch:
        if rule.fits(num_seqs, max_seq_len, num_tokens):
            return rule.variant
    raise InvalidValue("dispatch", (num_seqs, max_seq_len, num_tokens), "no row covers this call")


def _cell(workload: Workload) -> Cell:
    """Where a batch stands in a table."""
    return workload.num_seqs, sum(workload.query_lens), workload.max_seq_len


def select(
    times: Mapping[Schedule, Mapping[Workload, float]],
    status: Status = Status.MEASURED,
    worst_regret: float = WORST_REGRET,
    defaults: Mapping[str, Choice] | None = None,
    kernel_of: Callable[[Schedule], Schedule] | None = None,
) -> Selection:
    """The smallest set of schedules whose worst regret under its own dispatch table is at most the bound.

    A call is known by num_seqs, query tokens and a bound on seq_len alone, so workloads that share them share
    a pick; where such disagree by more than the bound, the best compromise stands in for it. Among equally
    small sets the one with the least mean regret wins, where several differ by no more than the noise the one
    with the fewest choices unlike ``defaults``, then the one that comes first in ``times``.

    With ``kernel_of`` the set holds schedules of one kernel alone, which they say by what the function gives:
    of the kernel whose own best for each workload have the least mean regret, whatever the worst of them.

    ``times[schedule][workload]`` is in microseconds; every schedule has every workload.

    Raises:
        InvalidValue: an empty or ragged matrix, or a time that is not positive.
    """
    schedules = tuple(times)
    workloads = tuple(next(iter(times.values()), ()))
    _check(times, workloads)
    best = {w: min(times[s][w] for s in schedules) for w in workloads}
    if kernel_of is not None:
        schedules = _of_one_kernel(times, best, kernel_of)
    cells: dict[Cell, list[Workload]] = {}
    for workload in workloads:
        cells.setdefault(_cell(workload), []).append(workload)

    # regret[s][c]: the worst of schedule s in cell c
    regret = [[max(times[s][w] / best[w] - 1 for w in cell) for cell in cells.values()] for s in schedules]
    allowed = [max(worst_regret, min(row[c] for row in regret)) for c in range(len(cells))]
    unlike = [sum((defaults or {}).get(k, v) != v for k, v in s.choices) for s in schedules]
    chosen = _smallest(regret, allowed, unlike)
    picks = {cell: min(chosen, key=lambda s: (regret[s][c], s)) for c, cell in enumerate(cells)}
    used = sorted(set(picks.values()), key=lambda s: (-sum(p == s for p in picks.values()), s))
    rules = _rules({cell: used.index(s) for cell, s in picks.items()})
    worst = max(regret[s][c] for c, s in enumerate(picks.values()))
    return Selection(status, tuple(schedules[s] for s in used), rules, worst)


def _of_one_kernel(
    times: Mapping[Schedule, Mapping[Workload, float]],
    best: Mapping[Workload, float],
    kernel_of: Callable[[Schedule], Schedule],
) -> tuple[Schedule, ...]:
    """The schedules of the kernel with the least mean regret."""
    kernels: dict[Schedule, list[Schedule]] = {}
    for schedule in times:
        kernels.setdefault(kernel_of(schedule), []).append(schedule)
    return tuple(
        min(kernels.values(), key=lambda own: sum(min(times[s][w] for s in own) / best[w] for w in best))
    )


def _check(times: Mapping[Schedule, Mapping[Workload, float]], workloads: tuple[Workload, ...]) -> None:
    if not workloads:  # nor is there a schedule without one
        raise InvalidValue("times", dict(times), "at least one schedule and one workload are expected")
    for schedule in times:
        if set(times[schedule]) != set(workloads):
            raise InvalidValue("times", schedule.name, "every schedule is timed on every workload")
        for workload, time in times[schedule].items():
            if not (time > 0 and math.isfinite(time)):
                raise InvalidValue(
                    "times", time, f"a positive time of {schedule.name} on {workload.name} is expected"
                )


def _smallest(
    regret: Sequence[Sequence[float]], allowed: Sequence[float], unlike: Sequence[int]
) -> tuple[int, ...]:
    """Indices of the smallest subset that keeps every cell within its bound."""
    cells = range(len(allowed))
    covers = [frozenset(c for c in cells if row[c] <= allowed[c]) for row in regret]
    candidates = [s for s, cover in enumerate(covers) if cover]

    def mean(subset: tuple[int, ...]) -> float:
        return sum(min(regret[s][c] for s in subset) for c in cells) / len(cells)

    for size in range(1, len(candidates) + 1):
        if math.comb(len(candidates), size) > EXHAUSTIVE:
            break
        valid = [
            subset
            for subset in itertools.combinations(candidates, size)
            if len(frozenset().union(*(covers[s] for s in subset))) == len(allowed)
        ]
        if valid:
            means = {subset: mean(subset) for subset in valid}
            level = min(means.values()) + NOISE
            even = [subset for subset in valid if means[subset] <= level]
            return min(even, key=lambda subset: (sum(unlike[s] for s in subset), means[subset]))
    chosen: tuple[int, ...] = ()
    missing = set(cells)
    while missing:  # greedy set cover: at most ln(cells) times larger than the smallest
        step = min(candidates, key=lambda s: (-len(covers[s] & missing), mean((*chosen, s))))
        chosen, missing = (*chosen, step), missing - covers[step]
    return chosen


def _rules(picks: Mapping[Cell, int]) -> tuple[Rule, ...]:
    """A complete table: every call gets the pick of the tuned cell nearest to it.

    Bands end at the geometric mean of neighbouring tuned values (batch sizes and lengths act by ratio), the
    last band holds the rest; a band is a run of rows, merged with its neighbour where they agree.
    """
    axes = [_bands(sorted(set(values))) for values in zip(*picks, strict=True)]
    return tuple(
        Rule(count, length, variant, tokens) for (count, tokens, length), variant in _rows(axes, (), picks)
    )


def _rows(
    axes: Sequence[Sequence[tuple[int, int]]], at: tuple[int, ...], picks: Mapping[Cell, int]
) -> list[tuple[tuple[int, ...], int]]:
    """Bounds on the remaining ``axes``, and the pick, where the axes before them are at ``at``."""
    if not axes:
        return [((), picks[min(picks, key=lambda cell: (_distance(cell, at), cell))])]
    bands: list[tuple[int, list[tuple[tuple[int, ...], int]]]] = []
    for value, bound in axes[0]:
        rows = _rows(axes[1:], (*at, value), picks)
        if bands and bands[-1][1] == rows:
            bands.pop()
        bands.append((bound, rows))
    return [((bound, *bounds), variant) for bound, rows in bands for bounds, variant in rows]


def _bands(values: Sequence[int]) -> list[tuple[int, int]]:
    bounds = [math.isqrt(a * b) for a, b in itertools.pairwise(values)]
    return list(zip(values, [*bounds, ANY], strict=True))


def _distance(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    return math.hypot(*(math.log2((x + 1) / (y + 1)) for x, y in zip(a, b, strict=True)))
