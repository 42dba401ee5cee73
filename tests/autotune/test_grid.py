"""Fields as Optuna's coordinates and as a surrogate's columns."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution

from pagedgen.autotune.grid import Axis, Grid
from pagedgen.errors import InvalidValue
from pagedgen.values.schedule import Schedule


@pytest.mark.parametrize(
    ("values", "codes", "distribution"),
    [
        ((64, 16, 256, 16), {16: 4, 64: 6, 256: 8}, IntDistribution(4, 8)),
        ((1, 2, 4), {1: 0, 2: 1, 4: 2}, IntDistribution(0, 2)),
        ((2, 1, 3), {1: 1, 2: 2, 3: 3}, IntDistribution(1, 3)),
        ((0, 2, 4), {0: 0, 2: 2, 4: 4}, IntDistribution(0, 4, step=2)),  # 0 is no power of two
        ((96, 32, 64), {32: 32, 64: 64, 96: 96}, IntDistribution(32, 96, step=32)),
        ((1, 5, 7), {1: 1, 5: 5, 7: 7}, CategoricalDistribution([1, 5, 7])),
        ((4, 2, 4), {2: 2, 4: 4}, CategoricalDistribution([2, 4])),  # of two there is none between
        (("b", 8, "a", 4), {4: 4, 8: 8, "a": "a", "b": "b"}, CategoricalDistribution([4, 8, "a", "b"])),
    ],
)
def test_powers_of_two_are_exponents_even_steps_themselves_the_rest_categories(
    values, codes, distribution
) -> None:
    axis = Axis.of("field", values)
    assert axis.codes == codes and list(axis.codes) == list(codes)
    assert axis.distribution == distribution


def test_columns_are_as_long_as_their_field() -> None:
    space = tuple(
        Schedule.of("t", tile=tile, loads=loads, fixed=1)
        for tile in (16, 32, 128)
        for loads in ("page", "one")
    )
    grid = Grid(space)
    assert list(grid.distributions) == ["loads", "tile"]  # a field of one value is none
    features, fields = grid.features()
    assert fields.tolist() == [0, 0, 1]
    expected = [
        (how == "one", how == "page", tile) for tile, how in itertools.product((0, 1 / 3, 1), ("page", "one"))
    ]
    assert features == pytest.approx(np.array(expected) / [2, 2, 1])
    features, fields = Grid(space[:1]).features()
    assert features.shape == (1, 0) and fields.shape == (0,)


def test_every_schedule_survives_the_grid() -> None:
    space = tuple(Schedule.of("t", tile=t, mode=m) for t in (16, 32, 64) for m in "ab")
    grid = Grid(space)
    assert tuple(grid.schedules.values()) == space
    assert all(grid.schedules[grid.key(grid.params(s))] == s for s in space)


def test_what_is_no_grid_is_refused() -> None:
    one = Schedule.of("t", tile=16)
    with pytest.raises(InvalidValue, match="at least one schedule"):
        Grid(())
    with pytest.raises(InvalidValue, match="one template"):
        Grid((one, Schedule.of("u", tile=16)))
    with pytest.raises(InvalidValue, match="1 distinct"):
        Grid((one, one))
