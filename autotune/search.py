"""Search over the exactly feasible set, a batch at a time: propose, claim, evaluate, tell.

An Optuna study keeps the trials (:mod:`pagedgen.autotune.ledger`), a Gaussian process over the legal untried
schedules proposes them (:mod:`pagedgen.autotune.surrogate`), starting from guesses of the caller and from the
cost model. Every trial is legal and none is repeated, however many workers take part. A schedule that does
not compile, or is wrong, is told with a finite value and a violated constraint: a FAIL teaches nobody.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from pagedgen.autotune.grid import Grid
from pagedgen.autotune.ledger import Ledger
from pagedgen.autotune.outcome import Outcome
from pagedgen.autotune.surrogate import Surrogate
from pagedgen.errors import InvalidValue
from pagedgen.values.schedule import Schedule

POLL_S = 1.0  # between looks at what other workers are still timing


class Stop(StrEnum):
    """Why a search ended."""

    ROOFLINE = "close to the roofline"
    BUDGET = "budget spent"
    TRIALS = "all trials done"
    EXHAUSTED = "whole space tried"
    COMPILED = "enough candidates compiled"  # where nothing can be timed


@dataclass(frozen=True, slots=True)
class Found:
    """Every outcome, those known beforehand first, and why the search ended."""

    outcomes: tuple[Outcome, ...]
    stop: Stop

    @property
    def best(self) -> Outcome | None:
        """The fastest outcome, or None when nothing worked."""
        timed = [o for o in self.outcomes if o.time_us is not None]
        return min(timed, key=lambda o: (o.time_us, o.schedule), default=None)


def search(
    space: Sequence[Schedule],
    evaluate: Callable[[tuple[Schedule, ...]], Sequence[Outcome]],
    *,
    trials: int,
    batch: int,
    seed: int = 0,
    start: Sequence[Schedule] = (),
    known: Sequence[Outcome] = (),
    predicted: Mapping[Schedule, float] | None = None,
    elsewhere: Sequence[Mapping[Schedule, float]] = (),
    enough_us: float = 0.0,
    deadline: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
    ledger: Ledger | None = None,
) -> Found:
    """Minimise the time over ``space``, a batch of schedules at a time.

    Args:
        space: the schedules to choose from, each once.
        evaluate: gives one outcome for each schedule of a batch, in any order.
        trials: how many schedules to evaluate at most, by all workers of the ledger together; ``known`` ones
            cost nothing.
        batch: how many to evaluate together: timed interleaved, they are compared fairly.
        seed: of the random start.
        start: evaluated first (defaults, the model's favourites, winners elsewhere).
        known: outcomes of earlier runs: they teach the search and are never evaluated again.
        predicted: the cost model's times in microseconds, as far as they are known.
        elsewhere: times of schedules of the template on neighbouring specs, legal here or not: how they
            compare there is a belief of how they compare here, trusted as far as timings bear it out.
        enough_us: stop at this time (97% of the roofline, say).
        deadline: ``clock()`` at which no further batch is started; the first one always is.
        ledger: where trials are kept and shared, its grid at least ``space``; in memory by default.

    Raises:
        InvalidValue: an empty space, a schedule outside it, fewer than one trial, a missing outcome.
        StudyUnreachable: the ledger's storage stopped answering.
    """
    if trials < 1 or batch < 1:
        raise InvalidValue("trials", (trials, batch), "at least one trial and a batch of at least one")
    ledger = ledger or Ledger(Grid(space))
    legal = set(ledger.grid.schedules.values())
    for schedule in (*space, *start, *(o.schedule for o in known)):
        if schedule not in legal:
            raise InvalidValue("schedule", schedule.name, "a schedule of the space is expected")
    ledger.preload(known)
    return _Search(space, evaluate, ledger, trials, batch, seed, start, predicted or {}, elsewhere).run(
        enough_us, deadline, clock
    )


class _Search:
    """The state of one call of :func:`search`."""

    def __init__(
        self,
        space: Sequence[Schedule],
        evaluate: Callable[[tuple[Schedule, ...]], Sequence[Outcome]],
        ledger: Ledger,
        trials: int,
        batch: int,
        seed: int,
        start: Sequence[Schedule],
        predicted: Mapping[Schedule, float],
        elsewhere: Sequence[Mapping[Schedule, float]],
    ) -> None:
        self.evaluate, self.ledger, self.trials, self.batch = evaluate, ledger, trials, batch
        self.schedules = tuple(ledger.grid.schedules.values())
        self.index = {s: i for i, s in enumerate(self.schedules)}
        self.space = {self.index[s] for s in space}
        self.waiting = list(start) if ledger.grid.axes else list(space)
        self.draw = random.Random(seed)
        beliefs = [self._logs(predicted)] if predicted else []
        beliefs += [self._carried(times) for times in elsewhere if times]
        self.surrogate = Surrogate(*ledger.grid.features(), beliefs)

    def _logs(self, predicted: Mapping[Schedule, float]) -> np.ndarray:
        """Logarithms of the predictions; where there is none, their mean, which says nothing."""
        logs = {s: math.log(us) for s, us in predicted.items()}
        mean = sum(logs.values()) / len(logs)
        return np.array([logs.get(s, mean) for s in self.schedules])

    def _carried(self, times: Mapping[Schedule, float]) -> np.ndarray:
        """What a neighbouring spec's times lead one to expect of each schedule."""
        both = Grid(tuple(dict.fromkeys((*self.schedules, *times))))
        row = {s: i for i, s in enumerate(both.schedules.values())}
        seen = np.array([row[s] for s in times])
        expected = Surrogate(*both.features()).expected(seen, np.log(list(times.values())))
        return np.asarray(expected[[row[s] for s in self.schedules]])

    def run(self, enough_us: float, deadline: float, clock: Callable[[], float]) -> Found:
        """Batch after batch, until one of the reasons to stop."""
        while True:
            self.waiting = [*self.ledger.take_up(), *self.waiting]
            state = self.ledger.state()  # one look: between two, a trial would be neither running nor told
            outcomes, running = state.outcomes, state.running
            best = min((o.time_us for o in outcomes if o.time_us is not None), default=math.inf)
            tried = {o.schedule for o in outcomes} | set(running)
            self.waiting = [s for s in dict.fromkeys(self.waiting) if s not in tried]
            untried = sorted(self.space - {self.index[s] for s in tried})
            room = self.trials - state.spent
            stop = None
            if best <= enough_us:
                stop = Stop.ROOFLINE
            elif not untried and not self.waiting:
                stop = Stop.EXHAUSTED
            elif room <= 0:
                stop = Stop.TRIALS
            elif outcomes and clock() >= deadline:
                stop = Stop.BUDGET
            if stop and not running:
                return Found(outcomes, stop)
            if stop:  # others are still timing theirs, and theirs are taken up if they die
                time.sleep(POLL_S)
                continue
            asked = self._claim(outcomes, running, untried, min(self.batch, room))
            if asked:
                self._tell(asked, self.evaluate(asked))

    def _claim(
        self, outcomes: Iterable[Outcome], running: Sequence[Schedule], untried: Sequence[int], count: int
    ) -> tuple[Schedule, ...]:
        wanted = self.waiting[:count]
        if len(wanted) < count:
            chosen = {self.index[s] for s in wanted}
            picks = self.surrogate.propose(
                {self.index[o.schedule]: math.log(o.time_us) for o in outcomes if o.time_us is not None},
                [self.index[o.schedule] for o in outcomes if o.time_us is None],
                [*(self.index[s] for s in running), *chosen],
                [i for i in untried if i not in chosen],
                count - len(wanted),
                self.draw,
            )
            wanted += [self.schedules[i] for i in picks]
        return self.ledger.claim(wanted, self.trials)

    def _tell(self, asked: tuple[Schedule, ...], outcomes: Sequence[Outcome]) -> None:
        told = {outcome.schedule: outcome for outcome in outcomes}
        if told.keys() != set(asked):
            missing = sorted(s.name for s in set(asked) ^ told.keys())
            raise InvalidValue("outcomes", missing, "one outcome for each schedule of the batch is expected")
        for schedule in asked:
            self.ledger.tell(told[schedule])
