"""Selection: the smallest set within the bound, and a dispatch table that keeps its word."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedgen.autotune.select import ANY, Selection, lookup, select
from pagedgen.errors import InvalidValue
from pagedgen.values import codec
from pagedgen.values.manifest import Rule
from pagedgen.values.record import Status
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import Op
from pagedgen.values.workload import Workload

Matrix = dict[Schedule, dict[Workload, float]]


def schedule(index: int) -> Schedule:
    return Schedule.of("t", index=index)


@st.composite
def matrices(draw: st.DrawFn) -> Matrix:
    lengths = st.lists(st.integers(1, 1 << 17), min_size=1, max_size=6).map(tuple)
    batches = draw(st.lists(lengths, min_size=1, max_size=7, unique=True))
    workloads = [Workload(f"w{i}", batch) for i, batch in enumerate(batches)]
    if draw(st.booleans()):  # of an operator with queries
        queries = [tuple(draw(st.integers(1, n)) for n in batch) for batch in batches]
        workloads = [replace(w, query_lens=q) for w, q in zip(workloads, queries, strict=True)]
    times = st.floats(1.0, 1.2) | st.floats(1.0, 1000.0)
    count = draw(st.integers(1, 6))
    return {schedule(i): {w: draw(times) for w in workloads} for i in range(count)}


def cells_of(times: Matrix) -> dict[tuple[int, int, int], list[Workload]]:
    """Batches by what a call tells of itself: num_seqs, a bound on seq_len, rows of q where they vary."""
    cells: dict[tuple[int, int, int], list[Workload]] = {}
    for w in next(iter(times.values())):
        cells.setdefault((w.num_seqs, w.max_seq_len, sum(w.query_lens)), []).append(w)
    return cells


def bounds(times: Matrix, bound: float) -> dict[tuple[int, int, int], float]:
    """What each cell must reach: the bound, or the best that any one schedule can do there."""
    found = {}
    for cell, workloads in cells_of(times).items():
        best = {w: min(row[w] for row in times.values()) for w in workloads}
        found[cell] = max(bound, min(max(row[w] / best[w] - 1 for w in workloads) for row in times.values()))
    return found


@given(matrices(), st.sampled_from([0.0, 0.02, 0.1]))
def test_the_table_keeps_the_bound_with_the_fewest_schedules(times: Matrix, bound: float) -> None:
    chosen = select(times, worst_regret=bound)
    allowed = bounds(times, bound)
    worst = 0.0
    for cell, workloads in cells_of(times).items():
        pick = chosen.pick(*cell)
        assert {chosen.pick_for(w) for w in workloads} == {pick}
        for w in workloads:
            regret = times[pick][w] / min(row[w] for row in times.values()) - 1
            worst = max(worst, regret)
            assert regret <= allowed[cell] + 1e-12
    assert math.isclose(worst, chosen.worst_regret, abs_tol=1e-12)
    for smaller in itertools.combinations(times, len(chosen.variants) - 1):
        assert not all(
            any(
                max(times[s][w] / min(row[w] for row in times.values()) - 1 for w in workloads)
                <= allowed[cell]
                for s in smaller
            )
            for cell, workloads in cells_of(times).items()
        ), "a smaller set would have done"


@given(matrices(), st.integers(0, ANY), st.integers(0, ANY), st.integers(0, ANY))
def test_the_table_is_complete_and_has_no_dead_row(
    times: Matrix, num_seqs: int, max_seq_len: int, num_tokens: int
) -> None:
    chosen = select(times)
    assert 0 <= lookup(chosen.dispatch, num_seqs, max_seq_len, num_tokens) < len(chosen.variants)
    assert {rule.variant for rule in chosen.dispatch} == set(range(len(chosen.variants)))
    for i, rule in enumerate(chosen.dispatch):
        reached = (rule.max_num_seqs, rule.max_seq_len, rule.max_num_tokens)
        assert not any(earlier.fits(*reached) for earlier in chosen.dispatch[:i])


def test_a_prompt_and_decodes_of_as_many_sequences_are_told_apart_by_their_queries() -> None:
    decodes = Workload.parse("64x1of4096", Op.EXTEND)
    prompts = Workload.parse("63x1of4096+1x4096", Op.EXTEND)
    times = {schedule(0): {decodes: 10.0, prompts: 130.0}, schedule(1): {decodes: 12.0, prompts: 100.0}}
    chosen = select(times)
    assert chosen.dispatch == (Rule(ANY, ANY, 0, 515), Rule(ANY, ANY, 1))  # the root of 64 x 4159
    assert chosen.pick_for(decodes) == chosen.pick(64, 4096, 515) == schedule(0)
    assert chosen.pick_for(prompts) == chosen.pick(64, 4096, 516) == schedule(1)


def test_a_table_of_decode_says_nothing_of_queries() -> None:
    one, many = Workload.uniform(1, 1024), Workload.uniform(64, 1024)
    times = {schedule(0): {one: 10.0, many: 130.0}, schedule(1): {one: 12.0, many: 100.0}}
    rules = codec.encode(select(times).dispatch)
    assert [sorted(rule) for rule in rules] == [["max_num_seqs", "max_seq_len", "variant"]] * 2


def test_one_schedule_when_one_is_good_enough() -> None:
    short, long = Workload.uniform(1, 1024), Workload.uniform(1, 65536)
    times = {schedule(0): {short: 10.0, long: 101.9}, schedule(1): {short: 12.0, long: 100.0}}
    chosen = select(times)
    assert chosen.variants == (schedule(0),)
    assert chosen.dispatch == (Rule(ANY, ANY, 0),)
    assert chosen.worst_regret == pytest.approx(0.019)


def test_two_when_two_are_needed_and_the_border_is_the_geometric_mean() -> None:
    short, long = Workload.uniform(8, 1024), Workload.uniform(8, 16384)
    times = {schedule(0): {short: 10.0, long: 130.0}, schedule(1): {short: 12.0, long: 100.0}}
    chosen = select(times)
    assert set(chosen.variants) == {schedule(0), schedule(1)}
    assert chosen.pick(8, 4096) == chosen.pick(1000, 1) == schedule(0)
    assert chosen.pick(8, 4097) == chosen.pick(1, ANY) == schedule(1)
    assert chosen.worst_regret == 0.0


def test_of_equals_the_one_nearest_the_defaults() -> None:
    short, skewed = Workload.uniform(4, 128), Workload("skewed", (4096, 16, 16, 16))
    fancy = Schedule.of("t", tile=128, warps=8, lanes=32)
    plain = Schedule.of("t", tile=64, warps=8, lanes=128)
    defaults = {"tile": 64, "warps": 4, "lanes": 128}
    even = {fancy: {short: 10.0, skewed: 50.0}, plain: {short: 10.02, skewed: 50.1}}
    assert select(even, defaults=defaults).variants == (plain,)
    assert select(even).variants == (fancy,)
    better = {fancy: {short: 10.0, skewed: 50.0}, plain: {short: 10.1, skewed: 50.5}}  # 1%: within the bound
    assert select(better, defaults=defaults).variants == (fancy,)


def test_a_skewed_batch_has_a_row_of_its_own_where_it_needs_one() -> None:
    uniform, ragged = Workload.uniform(64, 1024), Workload("ragged", (128, 512, 900, 1024) * 16)
    skewed = Workload("skewed", (131072, *(1024,) * 63))
    cut, whole = schedule(0), schedule(1)
    times = {
        cut: {uniform: 103.0, ragged: 60.0, skewed: 200.0},
        whole: {uniform: 100.0, ragged: 59.5, skewed: 900.0},
    }
    chosen = select(times)
    assert chosen.pick(64, 1024) == whole and chosen.pick(64, 131072) == cut
    assert chosen.worst_regret <= 0.02 and len(chosen.variants) == 2


def test_one_kernel_for_all_is_the_best_mean_of_each_s_own_best() -> None:
    """A kernel is known here by the tens of its number; what is left is how it is launched."""
    short, long = Workload.uniform(1, 1024), Workload.uniform(64, 8192)
    times = {
        schedule(10): {short: 10.0, long: 100.0},
        schedule(20): {short: 11.0, long: 96.0},
        schedule(21): {short: 20.0, long: 75.0},
        schedule(30): {short: 12.0, long: 80.0},
        schedule(31): {short: 12.1, long: 70.0},
    }

    def kernel_of(each: Schedule) -> Schedule:
        return schedule(each.int("index") // 10)

    assert len(select(times).variants) == 2
    chosen = select(times, kernel_of=kernel_of)
    assert set(chosen.variants) == {schedule(20), schedule(21)}
    assert chosen.pick(1, 1024) == schedule(20) and chosen.pick(64, 8192) == schedule(21)
    assert chosen.worst_regret == pytest.approx(0.1)  # against the best of all kernels
    chosen = select(times, kernel_of=lambda each: each)
    assert chosen.variants == (schedule(31),) and len(chosen.dispatch) == 1


def rows(*rows: tuple[float, ...]) -> Matrix:
    """A schedule a row, a batch a column."""
    batches = [Workload.uniform(1, 16 << i) for i in range(len(rows[0]))]
    return {schedule(i): dict(zip(batches, row, strict=True)) for i, row in enumerate(rows)}


def test_of_two_that_will_do_the_least_mean_regret() -> None:
    times = rows(
        (1.0, 1.5, 2.0), (1.5, 1.015, 1.0), (3.0, 1.0, 1.0)
    )  # the last is bad, but not where it is used
    assert set(select(times).variants) == {schedule(0), schedule(2)}


def test_the_kernel_of_most_batches_is_the_first() -> None:
    chosen = select(rows((1.0, 2.0, 2.0), (2.0, 1.0, 1.0)))
    assert chosen.variants == (schedule(1), schedule(0))
    assert chosen.pick(1, 16) == schedule(0) and chosen.pick(1, 64) == schedule(1)


def test_the_greedy_cover_takes_over_on_large_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    halves = ((1.01,) * 3 + (2.0,) * 3, (2.0,) * 3 + (1.01,) * 3)
    middle, useless = (1.0, 1.0, 2.0, 2.0, 1.0, 1.0), (2.0,) * 6
    times = rows(*halves, middle, useless)
    assert set(select(times).variants) == {schedule(0), schedule(1)}
    monkeypatch.setattr("pagedgen.autotune.select.EXHAUSTIVE", 3)  # one of three, two of three: all are tried
    assert set(select(times).variants) == {schedule(0), schedule(1)}
    monkeypatch.setattr("pagedgen.autotune.select.EXHAUSTIVE", 2)
    # begins with what covers the most
    assert set(select(times).variants) == {schedule(0), schedule(1), schedule(2)}


def test_bad_matrices_are_refused() -> None:
    w = Workload.uniform(1, 16)
    with pytest.raises(InvalidValue, match="at least one schedule"):
        select({})
    with pytest.raises(InvalidValue, match="at least one schedule"):
        select({schedule(0): {}})
    with pytest.raises(InvalidValue, match="every schedule is timed"):
        select({schedule(0): {w: 1.0}, schedule(1): {}})
    for time in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidValue, match="positive time"):
            select({schedule(0): {w: time}})


def test_a_table_that_does_not_cover_everything_is_refused() -> None:
    with pytest.raises(InvalidValue, match="covers everything"):
        Selection(Status.MEASURED, (schedule(0),), (Rule(8, 4096, 0),), 0.0)
    with pytest.raises(InvalidValue, match="variant"):
        Selection(Status.MEASURED, (schedule(0),), (Rule(ANY, ANY, 1),), 0.0)
    with pytest.raises(InvalidValue, match="variant"):
        Selection(Status.MEASURED, (schedule(0),), (Rule(8, 4096, -1), Rule(ANY, ANY, 0)), 0.0)
    with pytest.raises(InvalidValue, match="covers everything"):
        Selection(Status.MEASURED, (schedule(0),), (), 0.0)
    with pytest.raises(InvalidValue, match="at least one"):
        Selection(Status.MEASURED, (), (Rule(ANY, ANY, 0),), 0.0)
    with pytest.raises(InvalidValue, match="no row covers"):
        lookup((Rule(8, 4096, 0),), 9, 1)


def test_an_expected_regret_is_a_predictions() -> None:
    table = (Rule(ANY, ANY, 0),)
    assert Selection(Status.PREDICTED, (schedule(0),), table, 0.0, 0.09).expected_regret == 0.09
    with pytest.raises(InvalidValue, match="expected_regret"):
        Selection(Status.MEASURED, (schedule(0),), table, 0.0, 0.09)
