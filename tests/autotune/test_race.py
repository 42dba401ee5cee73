"""Interleaved halving: drift cancels, the best survive, the dead are left out."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import pytest

from pagedgen.autotune.race import quantile, race, timing_of
from pagedgen.errors import InvalidValue


class Device:
    """Candidate i takes ``truth[workload][i]`` µs, on a clock that drifts 3x and jitters 1%."""

    def __init__(
        self, truth: Mapping[str, Sequence[float]], seed: int = 0, dies: Mapping[int, int] | None = None
    ):
        self.truth, self.random, self.drift = truth, random.Random(seed), 1.0
        self.dies = dict(dies or {})  # candidate: in which of its samplings
        self.rounds: dict[tuple[str, int], int] = {}

    def __call__(self, workload: str, racing: tuple[int, ...], rounds: int) -> dict[int, list[float]]:
        times: dict[int, list[float]] = {c: [] for c in racing}
        for _ in range(rounds):
            self.drift = min(max(self.drift * self.random.choice((0.8, 1.0, 1.25)), 0.6), 1.8)
            for c in racing:
                times[c].append(self.truth[workload][c] * self.drift * self.random.gauss(1, 0.01))
                self.rounds[workload, c] = self.rounds.get((workload, c), 0) + 1
        for c in racing:
            if c in self.dies:
                self.dies[c] -= 1
                if self.dies[c] < 0:
                    del times[c]
        return times


def test_the_fastest_wins_under_drift() -> None:
    draw = random.Random(7)
    wins = 0
    for seed in range(20):
        truth = {"w": [100 * draw.uniform(1.03, 2) for _ in range(16)]}
        truth["w"][5] = 100.0
        timed = race(range(16), ["w"], Device(truth, seed), rungs=(3, 4, 6, 10))
        wins += min(timed, key=lambda c: timed[c]["w"].median_us) == 5
    assert wins >= 19


def test_losers_are_timed_briefly_and_still_comparable() -> None:
    places = [(4 * c + 3) % 15 for c in range(15)]  # of each candidate among all
    truth = {"w": [100.0 + 10 * place for place in places]}
    device = Device(truth)
    timed = race(range(15), ["w"], device, rungs=(3, 4, 6, 10))
    for c, place in enumerate(places):  # 15 are timed at first, then 8, 4 and 2
        rounds = 3 if place >= 8 else 7 if place >= 4 else 13 if place >= 2 else 23
        assert device.rounds["w", c] == timed[c]["w"].rounds == rounds
        # the drift between their rounds and the winner's is gone
        winner = timed[places.index(0)]["w"]
        assert timed[c]["w"].median_us / winner.median_us == pytest.approx(truth["w"][c] / 100, rel=0.03)
        if rounds == 23:  # and those that stayed have their own clock's spread
            assert timed[c]["w"].low_us < timed[c]["w"].median_us < timed[c]["w"].high_us


def test_each_workloads_specialist_and_the_anchor_stay() -> None:
    truth = {"short": [100.0] * 7 + [300.0], "long": [100.0 + i for i in range(7)] + [90.0]}
    device = Device(truth)
    timed = race(range(8), list(truth), device, rungs=(3, 4, 5), always=(6,))
    assert timed[7]["long"].rounds == timed[6]["short"].rounds == 12
    assert min(timed, key=lambda c: timed[c]["long"].median_us) == 7


def test_the_dead_are_left_out_whenever_they_die() -> None:
    truth = {"a": [100.0, 101.0, 102.0, 103.0], "b": [100.0, 101.0, 102.0, 103.0]}
    timed = race(range(4), list(truth), Device(truth, dies={0: 0, 1: 1}), rungs=(3, 3))
    assert set(timed) == {2, 3}
    assert all(set(timed[c]) == {"a", "b"} for c in timed)
    device = Device(truth, dies={0: 0, 1: 0})
    assert race(range(2), list(truth), device, rungs=(3, 3)) == {}
    assert set(device.rounds) == {("a", 0), ("a", 1)}  # nothing is asked of nobody
    late = race(range(4), list(truth), Device(truth, dies={0: 2, 1: 2}), rungs=(3, 3))
    assert {c: {w: t.rounds for w, t in row.items()} for c, row in late.items()} == {
        2: {"a": 3, "b": 3},  # they lost against the two that died then, and are what is left
        3: {"a": 3, "b": 3},
    }


def test_a_race_of_nothing_is_refused() -> None:
    device = Device({"w": [1.0]})
    with pytest.raises(InvalidValue, match="at least one of each"):
        race([], ["w"], device, rungs=(3,))
    with pytest.raises(InvalidValue, match="at least one of each"):
        race([0], [], device, rungs=(3,))
    for rungs in ((), (3, 0)):
        with pytest.raises(InvalidValue, match="rung"):
            race([0], ["w"], device, rungs=rungs)
    assert race([0], ["w"], device, rungs=(1,))[0]["w"].rounds == 1


def test_percentiles_interpolate() -> None:
    timing = timing_of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (timing.median_us, timing.low_us, timing.high_us, timing.rounds) == (3.0, 1.4, 4.6, 5)
    assert quantile([7.0], 0.9) == 7.0
