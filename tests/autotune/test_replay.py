"""The search on timings recorded on an H100: it converges in a small part of the space, noise or not."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from recorded import Recording, Replay, combined, nearest, neighbours, recordings, repeated, tried

from pagedgen.autotune.grid import Grid
from pagedgen.autotune.ledger import Ledger
from pagedgen.autotune.outcome import Outcome
from pagedgen.autotune.search import Found, Stop, search
from pagedgen.autotune.tune import pruned
from pagedgen.values.schedule import Schedule

CASES = (*recordings(), *combined(), *repeated(), *tried())


@cache
def timed_there(at: int) -> Mapping[Schedule, float]:
    """What a search of the nearest spec, one that began with guesses alone, left on record."""
    other = nearest(CASES[at])[0]
    predicted = dict(other.predicted)
    trials = len(predicted) * 15 // 100
    found = search(
        tuple(predicted),
        Replay(other),
        trials=trials,
        batch=max(4, trials // 10),
        start=list(dict.fromkeys([*neighbours(other, 2), min(predicted, key=predicted.__getitem__)])),
        predicted=predicted,
    )
    return {o.schedule: o.time_us for o in found.outcomes if o.time_us is not None}


def run(
    recording: Recording, replay: Replay, seed: int, trials: int | None = None, **options: object
) -> Found:
    """As the tuner searches: first what neighbouring specs chose, the model's favourite and a random one;
    what the nearest spec's search timed is a belief."""
    predicted = dict(recording.predicted)
    favourite = min(predicted, key=predicted.__getitem__)
    drawn = random.Random(0).sample(sorted(predicted), 10)[seed]  # another one for each seed
    trials = len(predicted) * 15 // 100 if trials is None else trials
    return search(
        tuple(predicted),
        replay,
        trials=trials,
        batch=max(4, trials // 10),
        seed=seed,
        start=list(dict.fromkeys([*neighbours(recording), favourite, drawn])),
        predicted=predicted,
        elsewhere=[timed_there(CASES.index(recording))],
        **options,
    )


def regret_of_finalists(recording: Recording, found: Found) -> float:
    """Of the best of the eight that would be timed again at the end."""
    timed = sorted(found.outcomes, key=lambda o: o.time_us or math.inf)
    return min(recording.regret(o.schedule) for o in timed[:8])


@pytest.mark.parametrize(
    "recording",
    [pytest.param(r, id=f"{i}-{r.name}") for i, r in enumerate(CASES)],
)
def test_within_1_percent_of_the_exhaustive_best_in_15_percent_of_the_space(recording: Recording) -> None:
    ways, ends = set(), []
    for seed in range(10):
        replay = Replay(recording)
        found = run(recording, replay, seed)
        ways.add(tuple(replay.asked))
        assert found.best is not None
        ends.append(recording.regret(found.best.schedule))
        assert len(replay.asked) == len(set(replay.asked)) == len(recording.predicted) * 15 // 100
        assert found.stop is Stop.TRIALS
    assert sum(end <= 0.01 for end in ends) == 10, ends
    assert len(ways) == 10  # ten searches, not one that ten seeds repeat


@pytest.mark.parametrize("recording", CASES, ids=lambda r: r.name)
def test_no_case_ends_far_from_its_best(recording: Recording) -> None:
    found = run(recording, Replay(recording), seed=1)
    assert found.best is not None and recording.regret(found.best.schedule) <= 0.04


@pytest.mark.parametrize("recording", CASES[:3], ids=lambda r: r.name)
def test_noise_of_a_measurement_does_not_mislead_it(recording: Recording) -> None:
    ends = [
        regret_of_finalists(recording, run(recording, Replay(recording, noise=0.005, seed=seed), seed))
        for seed in range(3)
    ]
    assert sum(end <= 0.01 for end in ends) >= 2 and max(ends) <= 0.03


def test_a_search_that_is_cut_off_goes_on_where_it_was() -> None:
    recording = CASES[1]
    first, second = Replay(recording), Replay(recording)
    half = run(recording, first, seed=2, trials=12)
    whole = run(recording, second, seed=3, trials=13, known=half.outcomes)
    assert not set(first.asked) & set(second.asked)
    assert set(first.asked) | set(second.asked) == {o.schedule for o in whole.outcomes}
    assert whole.best is not None and half.best is not None
    assert whole.best.time_us <= half.best.time_us


def test_duplicates_are_answered_from_what_is_known() -> None:
    recording = CASES[1]
    replay = Replay(recording)
    schedules = sorted(recording.times)[:6]
    known = [Outcome(s, recording.times[s]) for s in (*schedules[:3], *schedules[:3])]
    space = Grid(tuple(recording.times))
    search(
        tuple(recording.times),
        replay,
        trials=8,
        batch=4,
        start=(*schedules, *schedules),
        known=known,
        ledger=Ledger(space),
    )
    assert replay.asked[:3] == schedules[3:]
    assert len(replay.asked) == len(set(replay.asked)) == 8 and not set(replay.asked) & set(schedules[:3])


@pytest.mark.parametrize("recording", CASES, ids=lambda r: r.name)
def test_what_the_model_leaves_is_audited_and_near_the_best(recording: Recording) -> None:
    predicted = dict(recording.predicted)
    ranked = dict(sorted(predicted.items(), key=lambda item: item[1]))
    kept = pruned(ranked, 10, recording.name)
    assert kept == pruned(ranked, 10, recording.name)  # the same in every worker
    order, half = list(ranked), math.ceil(len(ranked) / 2)
    assert list(kept[:half]) == order[:half]
    audit = kept[half:]
    assert set(audit) <= set(order[half:]) and len(audit) == math.ceil((len(order) - half) / 10)
    assert min(recording.regret(s) for s in kept) <= 0.025
    assert pruned(ranked, len(ranked), "all") == tuple(ranked)  # never fewer than can be tried
