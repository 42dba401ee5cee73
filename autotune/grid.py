"""A feasible set in Optuna's coordinates, and as numbers that a surrogate learns from.

Powers of two are searched as integer exponents.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from pagedgen.errors import InvalidValue
from pagedgen.values.schedule import Choice, Schedule


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

    def columns(self, codes: Sequence[int | str]) -> list[list[float]]:
        """Codes as numbers in [0, 1]: one column, or one for each category, a full length apart."""
        if isinstance(self.distribution, IntDistribution):
            low, high = int(self.distribution.low), int(self.distribution.high)
            return [[(int(code) - low) / (high - low) for code in codes]]
        return [[float(code == value) / 2 for code in codes] for value in self.codes.values()]


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

    def features(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """[schedules, columns] in the order of ``schedules``, and the axis that each column belongs to.

        Numbers lie in [0, 1]; categories have a column each, and are as far apart as an axis is long.
        """
        columns: list[list[float]] = []
        owners: list[int] = []
        for i, axis in enumerate(self.axes):
            made = axis.columns([axis.codes[s[axis.name]] for s in self.schedules.values()])
            columns += made
            owners += [i] * len(made)
        matrix = np.array(columns).T if columns else np.zeros((len(self.schedules), 0))
        return matrix, np.array(owners, dtype=np.int64)
