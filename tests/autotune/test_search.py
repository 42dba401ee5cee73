"""Search on timing tables: it converges, stays legal, never repeats itself, and stops on time."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from pagedgen.autotune import search as module
from pagedgen.autotune.grid import Grid
from pagedgen.autotune.ledger import Ledger, Place
from pagedgen.autotune.outcome import Outcome
from pagedgen.autotune.search import Found, Stop, search
from pagedgen.errors import InvalidValue
from pagedgen.values.schedule import Schedule


def table(seed: int = 0, noise: float = 0.0) -> dict[Schedule, float | None]:
    """A made-up kernel on a made-up GPU: interacting fields, a cliff, holes, and some that spill."""
    draw = random.Random(seed)
    times: dict[Schedule, float | None] = {}
    for tile, warps, stages, split, loads, unroll in itertools.product(
        (16, 32, 64, 128, 256),
        (1, 2, 4, 8),
        (1, 2, 3, 4, 5),
        (1, 2, 4, 8, 16, 32),
        ("gather", "page"),
        (1, 2),
    ):
        smem = tile * 256 * stages * 2
        if smem > 227 * 1024 or tile < warps * 16:
            continue  # illegal: not in the space at all
        schedule = Schedule.of(
            "t", tile=tile, num_warps=warps, num_stages=stages, split=split, loads=loads, unroll=unroll
        )
        if unroll == 2 and tile // warps >= 128:
            times[schedule] = None  # spills: found out by compiling
            continue
        occupancy = min(8, 227 * 1024 // smem, 64 // warps)
        latency = 3.0 / min(occupancy * stages * math.log2(tile), 40) * 8
        waves = 1 + 0.25 * abs(math.log2(split) - 3) + (0.4 if split > 16 else 0)
        overhead = 1.15 if loads == "gather" and tile < 64 else 1.0 if loads == "page" else 1.06
        shape = 1 + 0.06 * abs(math.log2(tile) - 6) + 0.05 * abs(math.log2(warps) - 1 - (tile > 64))
        time = 100 * (0.6 + latency) * waves * overhead * shape * (0.97 if unroll == 2 else 1.0)
        times[schedule] = time * (1 + noise * draw.gauss(0, 1))
    return times


class Replay:
    """Answers from a table as the tuner would answer from a device, and counts."""

    def __init__(self, times: dict[Schedule, float | None]) -> None:
        self.times = times
        self.asked: list[Schedule] = []
        self.batches: list[int] = []

    def __call__(self, batch: tuple[Schedule, ...]) -> list[Outcome]:
        self.asked += batch
        self.batches.append(len(batch))
        times = [(s, self.times[s]) for s in batch]
        return [Outcome(s, t, "" if t is not None else "spills 64 B") for s, t in times]


def regret(times: dict[Schedule, float | None], found: Found) -> float:
    assert found.best is not None
    truth = times[found.best.schedule]
    assert truth is not None
    return truth / min(t for t in times.values() if t is not None) - 1


@pytest.mark.parametrize("seed", range(10))
def test_within_1_percent_of_the_best_in_15_percent_of_the_space(seed: int) -> None:
    times = table()
    replay = Replay(times)
    found = search(tuple(times), replay, trials=len(times) * 15 // 100, batch=8, seed=seed)
    assert regret(times, found) <= 0.01
    assert len(replay.asked) == len(set(replay.asked)) == len(times) * 15 // 100
    assert set(replay.asked) <= set(times)
    assert found.stop is Stop.TRIALS


def test_it_beats_random_search_of_the_same_size() -> None:
    times = table()
    guided, blind = [], []
    for seed in range(3):
        guided.append(regret(times, search(tuple(times), Replay(times), trials=64, batch=8, seed=seed)))
        sample = random.Random(seed).sample(sorted(times), 64)
        fastest = min(t for s in sample if (t := times[s]) is not None)
        blind.append(fastest / min(t for t in times.values() if t is not None) - 1)
    assert sum(guided) < 0.5 * sum(blind)


def test_the_same_seed_asks_the_same_schedules() -> None:
    times = table()
    runs = [Replay(times) for _ in range(3)]
    for replay, seed in zip(runs, (1, 1, 2), strict=True):
        search(tuple(times), replay, trials=40, batch=8, seed=seed)
    assert runs[0].asked == runs[1].asked != runs[2].asked


def test_known_outcomes_are_never_evaluated_again_and_guide_the_search() -> None:
    times = table()
    first = Replay(times)
    found = search(tuple(times), first, trials=60, batch=8, seed=3)
    second = Replay(times)
    resumed = search(
        tuple(times), second, trials=40, batch=8, seed=4, known=found.outcomes, start=first.asked
    )
    assert not set(first.asked) & set(second.asked)
    assert resumed.outcomes[: len(found.outcomes)] == found.outcomes
    assert regret(times, resumed) <= regret(times, found)
    assert len(second.asked) == 40


def test_the_start_comes_first_and_once() -> None:
    times = table()
    start = sorted(times)[100:105]
    replay = Replay(times)
    search(tuple(times), replay, trials=13, batch=4, start=(*start, start[0]))
    assert replay.asked[:5] == start
    assert replay.batches == [4, 4, 4, 1]


def test_it_stops_at_the_roofline() -> None:
    times = table()
    best = min(t for t in times.values() if t is not None)
    replay = Replay(times)
    found = search(tuple(times), replay, trials=len(times), batch=8, enough_us=best * 1.03)
    assert found.stop is Stop.ROOFLINE
    assert found.best is not None and found.best.time_us is not None
    assert found.best.time_us <= best * 1.03
    assert len(replay.asked) < len(times) // 2


def test_it_stops_at_the_deadline_between_batches() -> None:
    times = table()
    replay = Replay(times)
    now = iter(range(100))
    found = search(tuple(times), replay, trials=500, batch=8, deadline=5, clock=lambda: float(next(now)))
    assert found.stop is Stop.BUDGET
    assert replay.batches == [8] * 6  # the first batch asks for no time


def test_out_of_time_it_waits_for_what_others_are_timing(tmp_path: Path, monkeypatch) -> None:
    space = tuple(Schedule.of("t", tile=t, mode=m) for t in (16, 32, 64) for m in "ab")
    place = Place(str(tmp_path / "study.log"), "s")
    with Ledger(Grid(space), place) as ours, Ledger(Grid(space), place) as theirs:
        theirs.claim(space[:2])
        slept = []

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            theirs.tell(Outcome(space[len(slept) - 1], 2.0))

        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=sleep))
        known = [Outcome(space[5], 9.0)]
        found = search(
            space,
            lambda batch: [],
            trials=9,
            batch=2,
            known=known,
            deadline=1.0,
            clock=lambda: 1.0,
            ledger=ours,
        )
    assert found.stop is Stop.BUDGET and slept == [module.POLL_S] * 2
    assert {o.schedule for o in found.outcomes} == {*space[:2], space[5]}


def test_a_small_space_is_tried_whole() -> None:
    space = tuple(Schedule.of("t", tile=t, mode=m) for t in (16, 32, 64) for m in "ab")
    replay = Replay({s: 1.0 + i for i, s in enumerate(space)})
    found = search(space, replay, trials=100, batch=4)
    assert found.stop is Stop.EXHAUSTED
    assert sorted(replay.asked) == sorted(space)


def test_a_space_of_one() -> None:
    only = Schedule.of("t", tile=16)
    found = search((only,), Replay({only: 3.0}), trials=5, batch=4)
    assert found.best == Outcome(only, 3.0)


def test_when_nothing_works_nothing_is_best() -> None:
    space = tuple(Schedule.of("t", tile=2**t) for t in range(8))
    found = search(space, Replay(dict.fromkeys(space)), trials=100, batch=3)
    assert found.best is None and found.stop is Stop.EXHAUSTED


def test_misuse_is_named() -> None:
    space = (Schedule.of("t", tile=16), Schedule.of("t", tile=32))
    replay = Replay(dict.fromkeys(space, 1.0))
    with pytest.raises(InvalidValue, match="space"):
        search((), replay, trials=1, batch=1)
    with pytest.raises(InvalidValue, match="trials"):
        search(space, replay, trials=0, batch=1)
    with pytest.raises(InvalidValue, match="trials"):
        search(space, replay, trials=1, batch=0)
    with pytest.raises(InvalidValue, match="schedule of the space"):
        search(space, replay, trials=1, batch=1, ledger=Ledger(Grid(space[:1])))
    with pytest.raises(InvalidValue, match="schedule of the space"):
        search(space, replay, trials=1, batch=1, start=(Schedule.of("t", tile=64),))
    with pytest.raises(InvalidValue, match="one outcome for each"):
        search(space, lambda batch: [], trials=2, batch=2)
    with pytest.raises(InvalidValue, match="says why"):
        Outcome(space[0], None)
    with pytest.raises(InvalidValue, match="positive time"):
        Outcome(space[0], math.nan)
