"""First guesses: the nearest spec's winners first, in this space's fields, whatever version they are from."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from recorded import H100, SPECS, modelled

from pagedgen.autotune.database import Database, Entry
from pagedgen.autotune.select import select
from pagedgen.autotune.warm import guesses, timings, untried_values
from pagedgen.compiler.space import default_schedule
from pagedgen.values.record import Status, Timing
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target_table import target
from pagedgen.values.workload import Workload

SPEC = SPECS[0]
ROWS = modelled(SPEC, Workload.uniform(32, 8192))
SPACE = tuple(r.schedule for r in ROWS)


def save(database: Database, spec: KernelSpec, schedule: Schedule, where: str = H100.name) -> None:
    row = replace(ROWS[0], spec=spec, schedule=schedule, target=where)
    database.save(Entry(spec, where, (row,), select({schedule: {row.workload: 1.0}})))


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "user", tmp_path / "shipped")


def test_neighbours_come_by_nearness(database: Database) -> None:
    wide, other_block = replace(SPEC, head_dim=256), replace(SPEC, block_size=32)
    save(database, wide, SPACE[1])
    save(database, other_block, SPACE[2])
    save(database, SPEC, SPACE[3], where="h200")
    assert guesses(database, SPEC, H100, SPACE) == [SPACE[2], SPACE[3], SPACE[1]]  # 0.5, 0.5 elsewhere, 1.0
    save(database, SPEC, SPACE[4])  # of another template than any there is: no result, but a good guess
    assert guesses(database, SPEC, H100, SPACE, count=2) == [SPACE[4], SPACE[2]]


def test_the_models_own_choices_for_elsewhere_come_last(database: Database) -> None:
    row = replace(ROWS[0], status=Status.PREDICTED, timing=None, target="a100-80g", schedule=SPACE[6])
    predicted = select({SPACE[6]: {row.workload: 1.0}}, Status.PREDICTED)
    database.save(Entry(SPEC, "a100-80g", (row,), predicted))
    save(database, replace(SPEC, head_dim=256), SPACE[1])
    assert guesses(database, SPEC, H100, SPACE) == [SPACE[1], SPACE[6]]  # 1.0, 2.5


def test_fields_that_are_new_since_take_their_defaults(database: Database) -> None:
    choices = dict(SPACE[5].choices)
    del choices["merge"]
    old = Schedule.of(SPACE[5].template, **choices)
    save(database, SPEC, old)
    default = default_schedule(SPEC, H100)["merge"]
    space = (*SPACE, replace(SPACE[5], choices=tuple(sorted({**choices, "merge": default}.items()))))
    assert guesses(database, SPEC, H100, space) == [space[-1]]


def test_what_is_not_legal_here_stands_for_what_is_nearest(database: Database) -> None:
    save(database, SPEC, replace(SPACE[5], choices=tuple({**dict(SPACE[5].choices), "tile": 256}.items())))
    (guess,) = guesses(database, SPEC, H100, SPACE)
    assert guess in SPACE
    assert sum(guess[name] != value for name, value in SPACE[5].choices) <= 1


def test_damaged_and_other_files_are_passed_over(database: Database) -> None:
    assert guesses(database, SPEC, H100, SPACE) == []
    folder = database.user / H100.name
    folder.mkdir(parents=True)
    (folder / "decode-damaged.json").write_text('{"template": "triton-dec')
    (folder / "decode-empty.json").write_text("[]")
    save(database, SPEC, SPACE[1])
    assert guesses(database, SPEC, target("h200"), SPACE) == [SPACE[1]]


def test_a_value_that_nothing_on_record_has_is_tried_with_what_won() -> None:
    def one(tile: int, split: str) -> Schedule:
        return Schedule.of("t", tile=tile, split=split)

    space = [one(tile, split) for tile in (16, 32, 64) for split in ("even", "walk")]
    space.remove(one(64, "walk"))  # not legal: the first legal one with walk stands for it
    won = [one(64, "even"), one(32, "even")]
    assert untried_values(won, [*won, one(16, "even")], space, 8) == [one(16, "walk"), one(32, "walk")]
    assert untried_values(won, won, space, 8) == [one(16, "walk"), one(16, "even"), one(32, "walk")]
    assert untried_values(won, won, space, 1) == [one(16, "walk")]
    assert untried_values(won, space, space, 8) == untried_values([], [], space, 8) == []


def test_times_of_the_nearest_spec_are_those_on_the_batches_that_most_met(database: Database) -> None:
    short = Workload.uniform(1, 1024)
    near, far = replace(SPEC, block_size=32), replace(SPEC, head_dim=256)
    for spec, scale in ((near, 1.0), (far, 2.0)):
        rows = [replace(r, spec=spec, timing=Timing(*[scale * r.time_us] * 3, 3)) for r in ROWS[:12]]
        rows += [replace(r, workload=short, timing=Timing(1.0, 1.0, 1.0, 3)) for r in rows[:9]]
        choice = select({ROWS[0].schedule: {ROWS[0].workload: 1.0}})
        database.save(Entry(spec, H100.name, tuple(rows), choice))
    (found,) = timings(database, SPEC, H100)
    assert found == pytest.approx({r.schedule: r.time_us for r in ROWS[:12]})
    assert len(timings(database, SPEC, H100, count=3)) == 2
    assert timings(database, far, H100) == [pytest.approx({r.schedule: 2 * r.time_us for r in ROWS[:12]})]


def test_times_on_several_batches_are_means_of_those_that_met_them_all(database: Database) -> None:
    short = Workload.uniform(1, 1024)
    rows = [replace(r, timing=Timing(2.0, 2.0, 2.0, 3)) for r in ROWS[:10]]
    both = [*rows[:9], *(replace(r, workload=short, timing=Timing(8.0, 8.0, 8.0, 3)) for r in rows[1:])]
    database.save(Entry(SPEC, H100.name, tuple(both), select({ROWS[0].schedule: {short: 1.0}})))
    assert timings(database, SPEC, H100) == [pytest.approx({r.schedule: 4.0 for r in rows[1:9]})]


def test_a_few_times_or_predicted_ones_say_nothing(database: Database) -> None:
    save(database, replace(SPEC, block_size=32), SPACE[1])
    assert timings(database, SPEC, H100) == []
    rows = [replace(r, status=Status.PREDICTED, timing=None, verdict=None) for r in ROWS[:12]]
    choice = select({ROWS[0].schedule: {ROWS[0].workload: 1.0}}, Status.PREDICTED)
    database.save(Entry(SPEC, H100.name, tuple(rows), choice))
    assert timings(database, SPEC, H100) == []
