"""The Gaussian process: its covariance, what it believes, and what it proposes."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import numpy as np
import pytest

from pagedgen.autotune.grid import Grid
from pagedgen.autotune.surrogate import LENGTH, Surrogate, _Posterior
from pagedgen.values.schedule import Schedule

SPACE = tuple(
    Schedule.of("t", ids=ids, stages=stages, tile=tile)
    for ids, stages, tile in itertools.product(("gather", "page", "scalar"), (2, 3, 4, 5), (16, 32, 64, 128))
)
GRID = Grid(SPACE)
ORDER = tuple(GRID.schedules.values())
EVERYTHING = np.arange(len(ORDER))


def index(ids: str, stages: int, tile: int) -> int:
    return ORDER.index(Schedule.of("t", ids=ids, stages=stages, tile=tile))


def surrogate(*beliefs: np.ndarray) -> Surrogate:
    return Surrogate(*GRID.features(), beliefs)


def covariance(a: int, b: int) -> float:
    """With the lengths one assumes, no belief."""
    return float(surrogate().kernel(np.array([a]), np.array([b]), np.array([LENGTH] * 3 + [-4.0]))[0, 0])


def proposals(
    times: dict[int, float], count: int, failed: tuple[int, ...] = (), **given: object
) -> list[int]:
    untried = [i for i in range(len(ORDER)) if i not in times and i not in failed]
    options = {"beliefs": (), "running": (), "untried": untried, **given}
    return surrogate(*options["beliefs"]).propose(
        times, failed, options["running"], options["untried"], count, random.Random(0)
    )


def bowl(i: int) -> float:
    """The logarithm of a time: 4 stages of 64 tokens, read by page, are the fastest."""
    s = ORDER[i]
    off = abs(int(s["stages"]) - 4) + abs(math.log2(int(s["tile"])) - 6)
    return 0.1 * off + 0.2 * (s["ids"] != "page")


def test_covariance_decays_field_by_field_and_exponentially() -> None:
    here = index("page", 3, 32)
    assert covariance(here, here) == pytest.approx(1.0)
    one, other = index("page", 4, 32), index("page", 3, 64)
    both = index("page", 4, 64)
    assert covariance(here, both) == pytest.approx(covariance(here, one) * covariance(here, other))
    assert covariance(here, one) == pytest.approx(math.exp(-(1 / 3) / math.exp(LENGTH)))
    # each step costs the same: a field that jumps back and forth does not surprise it
    assert covariance(here, index("page", 5, 32)) == pytest.approx(covariance(here, one) ** 2)


def test_categories_are_as_far_apart_as_a_field_is_long() -> None:
    names = ("gather", "page", "scalar")
    far = covariance(index("page", 2, 32), index("page", 5, 32))
    for a, b in itertools.combinations(names, 2):
        assert covariance(index(a, 3, 32), index(b, 3, 32)) == pytest.approx(far)


def test_expected_times_pass_near_what_was_timed_and_lie_between() -> None:
    seen = np.array([index("page", 2, 64), index("page", 4, 64)])
    expected = surrogate().expected(seen, np.array([1.0, 2.0]))
    assert expected[seen] == pytest.approx([1.0, 2.0], abs=0.05)
    assert 1.3 < expected[index("page", 3, 64)] < 1.7


def test_it_proposes_the_best_untried_and_none_twice() -> None:
    best = index("page", 4, 64)
    times = {i: bowl(i) for i in range(0, len(ORDER), 4) if i != best}
    picks = proposals(times, 6)
    assert best in picks[:3]
    assert len(set(picks)) == 6 and not set(picks) & set(times)
    assert proposals(times, 100) and len(proposals(times, 100)) == len(ORDER) - len(times)


def test_what_the_fields_do_not_explain_counts_as_a_chance_to_be_the_fastest() -> None:
    one = surrogate()
    times = {i: bowl(i) for i in range(1, len(ORDER), 2)}
    seen, observed = np.array(list(times)), np.array(list(times.values()))
    theta = np.array([LENGTH] * 3 + [math.log(0.2)])
    posterior = _Posterior(one, theta, seen, observed, EVERYTHING[::2], ())
    # as sure of what the fields say as one can be: what remains is what they do not say
    for _ in range(20):
        for i in range(len(EVERYTHING[::2])):
            posterior.believe(i)
    assert posterior._variance.max() < 0.01
    own = math.sqrt(0.2 * posterior._signal)
    normal = statistics.NormalDist()
    for mean, improvement in zip(posterior.mean, posterior.improvement(), strict=True):
        z = (posterior._best - mean) / own
        assert improvement >= 0.99 * own * (z * normal.cdf(z) + normal.pdf(z)) - 1e-9


@pytest.mark.parametrize("failing, other", [("page", "scalar"), ("scalar", "page")])
def test_what_fails_keeps_it_from_the_neighbours(failing: str, other: str) -> None:
    times = {
        i: bowl(i) for i in EVERYTHING.tolist() if ORDER[i]["ids"] == "gather"
    }  # says nothing of these two
    failed = tuple(index(failing, s, t) for s in (2, 3, 5) for t in (16, 32, 128))
    untried = [index(failing, 4, 64), index(other, 4, 64)]
    assert proposals(times, 1, failed, untried=untried) == [index(other, 4, 64)]


def test_what_others_are_timing_is_not_asked_for_next_door() -> None:
    times = {i: bowl(i) for i in range(0, len(ORDER), 5)}
    seen, observed = np.array(list(times)), np.array(list(times.values()))
    taken = proposals(times, 1)[0]
    untried = np.array([i for i in EVERYTHING if i not in times and i != taken])
    one = surrogate()
    alone, beside = (
        _Posterior(one, one._first, seen, observed, untried, running) for running in ((), (taken,))
    )
    # believed to come out as expected: it changes no mean, and its neighbours promise less
    assert np.array_equal(alone.mean, beside.mean[: len(untried)])
    lost = 1 - beside.improvement() / alone.improvement()
    near = one.kernel(np.array([taken]), untried, one._first)[0]
    assert lost.min() > -1e-9
    assert lost[near.argmax()] > 0.2 and lost[near.argmin()] < 0.01


def test_a_belief_that_misleads_loses_its_say() -> None:
    truth = np.array([bowl(i) for i in EVERYTHING])
    times = {i: bowl(i) for i in range(0, len(ORDER), 3)}
    right, wrong = surrogate(truth), surrogate(np.random.default_rng(0).permutation(truth))
    seen, observed = np.array(list(times)), np.array(list(times.values()))
    for one in (right, wrong):
        one._fit(seen, observed)
    assert right._fitted[-2] > wrong._fitted[-2] + 1.0


def test_nothing_is_proposed_where_nothing_is_left() -> None:
    times = {i: bowl(i) for i in range(4)}
    assert proposals(times, 3, untried=[], running=[7]) == []


def test_with_less_than_two_timings_it_draws() -> None:
    picks = proposals({0: 1.0}, 5)
    assert len(set(picks)) == 5 and 0 not in picks
