"""Search over the exactly feasible set: Optuna's TPE proposes, every trial is legal and none is repeated.

Optuna's samplers know boxes; a schedule space is a box with holes. :class:`FeasibleSampler` draws from TPE
until the draw is a legal, untried schedule and otherwise moves to the nearest one, so that no failed trial
ever teaches the sampler nothing (an unfiltered TPE spent 77 of 100 trials on illegal points). Powers of two
are searched as integer exponents. A schedule that does not compile, or is wrong, is told with a finite value
and a violated constraint. TPE: Bergstra et al., NeurIPS 2011; constraints: Watanabe and Hutter, IJCAI 2023.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from pagedgen.errors import InvalidValue
from pagedgen.values.schedule import Choice, Schedule

DRAWS = 16  # from TPE before the nearest untried schedule is taken instead
CONSTRAINT = "works"  # of a trial; above 0 when the schedule did not compile or was wrong


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a schedule: a time (microseconds, over the workloads' geometric mean), or why not."""

    schedule: Schedule
    time_us: float | None
    reason: str = ""

    def __post_init__(self) -> None:
        if self.time_us is None:
            if not self.reason:
                raise InvalidValue("reason", "", "a rejected schedule says why")
        elif not (self.time_us > 0 and math.isfinite(self.time_us)):
            raise InvalidValue("time_us", self.time_us, "a positive time is expected")


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


@dataclass(frozen=True, slots=True)
class Axis:
    """One varying field as Optuna sees it; ``codes`` maps a value to its parameter."""

    name: str
    distribution: BaseDistribution
    codes: Mapping[Choice, int | str]

    @classmethod
    def of(cls, name: str, values: Iterable[Choice]) -> Axis:
        """Powers of two become exponents, other evenly spaced integers themselves, the rest categories."""
        distinct = sorted(set(values), key=lambda v: (isinstance(v, str), v))
        numbers = [v for v in distinct if isinstance(v, int)]
        if len(numbers) == len(distinct) > 2:
            if all(v > 0 and v & (v - 1) == 0 for v in numbers):
                exponents = [v.bit_length() - 1 for v in numbers]
                return cls(
                    name,
                    IntDistribution(exponents[0], exponents[-1]),
                    dict(zip(numbers, exponents, strict=True)),
                )
            steps = {b - a for a, b in itertools.pairwise(numbers)}
            if len(steps) == 1:
                return cls(
                    name,
                    IntDistribution(numbers[0], numbers[-1], step=steps.pop()),
                    {v: v for v in numbers},
                )
        return cls(name, CategoricalDistribution(distinct), {v: v for v in distinct})

    def position(self, code: int | str) -> float:
        """A coordinate in [0, 1]; categories sit a full length apart from each other."""
        if isinstance(self.distribution, IntDistribution):
            low, high = int(self.distribution.low), int(self.distribution.high)
            return (int(code) - low) / (high - low)
        return float(list(self.codes.values()).index(code))

    def distance(self, a: int | str, b: int | str) -> float:
        """0 for equal codes, at most 1."""
        if isinstance(self.distribution, IntDistribution):
            return abs(self.position(a) - self.position(b))
        return float(a != b)


class Grid:
    """A feasible set in Optuna's coordinates."""

    def __init__(self, space: Sequence[Schedule]) -> None:
        if not space:
            raise InvalidValue("space", (), "at least one schedule is expected")
        if len({s.template for s in space}) != 1:
            raise InvalidValue("space", sorted({s.template for s in space}), "one template is expected")
        fields = [name for name, _ in space[0].choices]
        axes = [Axis.of(name, (s[name] for s in space)) for name in fields]
        self.axes = tuple(axis for axis in axes if len(axis.codes) > 1)
        self.schedules = {self.key(self.params(s)): s for s in space}
        if len(self.schedules) != len(space):
            raise InvalidValue("space", len(space), f"{len(self.schedules)} distinct schedules are expected")

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's search space."""
        return {axis.name: axis.distribution for axis in self.axes}

    def params(self, schedule: Schedule) -> dict[str, int | str]:
        """A schedule's parameters."""
        return {axis.name: axis.codes[schedule[axis.name]] for axis in self.axes}

    def key(self, params: Mapping[str, Any]) -> tuple[Any, ...]:
        """Parameters as a key of ``schedules``."""
        return tuple(params[axis.name] for axis in self.axes)

    def distance(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
        """Sum over the axes of the distance in each."""
        return sum(axis.distance(a[axis.name], b[axis.name]) for axis in self.axes)


class FeasibleSampler(BaseSampler):  # type: ignore[misc]
    """TPE restricted to the untried schedules of a grid."""

    def __init__(self, grid: Grid, seed: int, startup: int) -> None:
        self.grid = grid
        self.untried = dict(grid.schedules)
        self._random = random.Random(seed)
        self._tpe = TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True)

    def take(self, schedule: Schedule) -> bool:
        """Mark a schedule as tried; False when it was already."""
        return self.untried.pop(self.grid.key(self.grid.params(schedule)), None) is not None

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The whole grid, from the first trial on."""
        return self.grid.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The parameters of an untried legal schedule."""
        drawn: dict[str, Any] = {}
        for _ in range(DRAWS):
            drawn = self._tpe.sample_relative(study, trial, search_space)
            if not drawn or self.grid.key(drawn) in self.untried:
                break
        keys = list(self.untried)
        if not drawn:  # still in TPE's random start: uniform over the legal set, not over its box
            key = self._random.choice(keys)
        elif (key := self.grid.key(drawn)) not in self.untried:
            self._random.shuffle(keys)
            key = min(keys, key=lambda k: self.grid.distance(drawn, self.grid.params(self.untried[k])))
        return self.grid.params(self.untried.pop(key))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never asked: every parameter is sampled together with the others."""
        raise AssertionError(f"{param_name} was sampled on its own")

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """TPE's own hook."""
        self._tpe.before_trial(study, trial)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """TPE's own hook."""
        self._tpe.after_trial(study, trial, state, values)


def search(
    space: Sequence[Schedule],
    evaluate: Callable[[tuple[Schedule, ...]], Sequence[Outcome]],
    *,
    trials: int,
    batch: int,
    seed: int = 0,
    start: Sequence[Schedule] = (),
    known: Sequence[Outcome] = (),
    enough_us: float = 0.0,
    deadline: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """Minimise the time over ``space``, a batch of schedules at a time.

    Args:
        space: the feasible schedules, each once.
        evaluate: gives one outcome for each schedule of a batch, in any order.
        trials: how many schedules to evaluate at most; ``known`` ones cost nothing.
        batch: how many to evaluate together: timed interleaved, they are compared fairly.
        seed: of TPE and of the random start.
        start: evaluated first (defaults, the model's favourites, winners elsewhere).
        known: outcomes of earlier runs: they teach the sampler and are never evaluated again.
        enough_us: stop at this time (97% of the roofline, say).
        deadline: ``clock()`` at which no further batch is started; the first one always is.

    Raises:
        InvalidValue: an empty space, a schedule outside it, fewer than one trial, a missing outcome.
    """
    if trials < 1 or batch < 1:
        raise InvalidValue("trials", (trials, batch), "at least one trial and a batch of at least one")
    grid = Grid(space)
    legal = set(space)
    for schedule in (*start, *(o.schedule for o in known)):
        if schedule not in legal:
            raise InvalidValue("schedule", schedule.name, "a schedule of the space is expected")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = FeasibleSampler(grid, seed, startup=min(max(8, trials // 6), 24))
    study = optuna.create_study(sampler=sampler)
    outcomes: list[Outcome] = []

    def learn(outcome: Outcome, trial: optuna.Trial | None = None) -> None:
        slowest = max((o.time_us for o in outcomes if o.time_us is not None), default=outcome.time_us or 1.0)
        value = math.log(outcome.time_us if outcome.time_us is not None else 2 * slowest)
        violated = float(outcome.time_us is None)
        outcomes.append(outcome)
        if trial is None:
            frozen = create_trial(
                value=value,
                params=grid.params(outcome.schedule),
                distributions=grid.distributions,
                constraints={CONSTRAINT: violated},
            )
            study.add_trial(frozen)
        else:
            trial.set_constraint(CONSTRAINT, violated)
            study.tell(trial, value)

    for outcome in known:
        if sampler.take(outcome.schedule):
            learn(outcome)
    waiting = list(start) if grid.axes else list(space)
    done = 0
    while True:
        best = min((o.time_us for o in outcomes if o.time_us is not None), default=math.inf)
        if best <= enough_us:
            return Found(tuple(outcomes), Stop.ROOFLINE)
        if not sampler.untried:
            return Found(tuple(outcomes), Stop.EXHAUSTED)
        if done >= trials:
            return Found(tuple(outcomes), Stop.TRIALS)
        if outcomes and clock() >= deadline:
            return Found(tuple(outcomes), Stop.BUDGET)
        asked: dict[Schedule, optuna.Trial | None] = {}
        while len(asked) < min(batch, trials - done) and (waiting or sampler.untried):
            if waiting:
                schedule = waiting.pop(0)
                if sampler.take(schedule):
                    asked[schedule] = None
                continue
            trial = study.ask(grid.distributions)
            asked[grid.schedules[grid.key(trial.params)]] = trial
        told = {outcome.schedule: outcome for outcome in evaluate(tuple(asked))}
        if told.keys() != asked.keys():
            missing = sorted(s.name for s in asked.keys() ^ told.keys())
            raise InvalidValue("outcomes", missing, "one outcome for each schedule of the batch is expected")
        for schedule, trial_of in asked.items():
            learn(told[schedule], trial_of)
        done += len(asked)
