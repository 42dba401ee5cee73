"""The record database: round trip, precedence, stamps, damage, and writers that run at once or die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pagedgen.autotune.database import Database, Entry, Fit, fit, read
from pagedgen.autotune.select import ANY, Selection
from pagedgen.errors import CacheUnwritable, InvalidValue, MalformedFile
from pagedgen.values.manifest import Rule
from pagedgen.values.record import Record, Resources, Stamp, Status, Timing, Verdict
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import DType, KernelSpec, Op
from pagedgen.values.workload import Workload

SPEC = KernelSpec(Op.DECODE, 128, 32, 8, 16, DType.BF16, DType.BF16)
STAMP = Stamp("0.1.0", "tvm 0.27.0", "AMD EPYC (2 threads)", "Linux 6.1", "2026-11-24T00:00:00+00:00")
WORKLOAD = Workload.uniform(16, 2048)


def kernel(spec: KernelSpec, target: str, one: Schedule) -> str:
    return f"kernel of tile {one.int('tile')}"


def schedule(tile: int) -> Schedule:
    return Schedule.of("tvm-decode", tile=tile, policy="even")


def measured(tile: int, us: float = 100.0, stamp: Stamp = STAMP, workload: Workload = WORKLOAD) -> Record:
    verdict = Verdict(True, 6, 1e-3, 2e-3, seed=0)
    timing = Timing(us, us * 0.99, us * 1.02, 9)
    return Record(
        Status.MEASURED,
        SPEC,
        "cpu",
        workload,
        schedule(tile),
        kernel(SPEC, "cpu", schedule(tile)),
        stamp,
        Resources(),
        90.0,
        timing,
        30.0,
        verdict,
    )


def predicted(tile: int, us: float = 80.0, stamp: Stamp = STAMP) -> Record:
    stamp = replace(stamp, device="none", driver="none")
    now = kernel(SPEC, "cpu", schedule(tile))
    return Record(Status.PREDICTED, SPEC, "cpu", WORKLOAD, schedule(tile), now, stamp, Resources(32), us)


def choice(tile: int, status: Status = Status.MEASURED) -> Selection:
    return Selection(status, (schedule(tile),), (Rule(ANY, ANY, 0),), 0.0)


def entry(*records: Record, selection: Selection | None = None) -> Entry:
    return Entry(SPEC, "cpu", records, selection)


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "user", tmp_path / "shipped", kernel)


def test_what_is_saved_is_found_whole(database: Database) -> None:
    saved = entry(measured(1, 90.0), measured(2, 100.0), predicted(3), selection=choice(1))
    path = database.save(saved)
    assert path == database.user / "cpu" / f"{SPEC.name}.json"
    found = database.find(SPEC, "cpu", STAMP)
    assert found is not None
    assert found.fit is Fit.EXACT
    assert set(found.entry.records) == set(saved.records)
    assert found.entry.selection == saved.selection
    assert [r.schedule for r in found.entry.chosen()] == [schedule(1)]


def test_the_file_reads_well_and_is_what_the_readme_says(database: Database) -> None:
    path = database.save(entry(measured(1), selection=choice(1)))
    text = path.read_text()
    assert max(map(len, text.splitlines())) < 200
    keys = ["format", "target", "spec", "template", "stamps", "workloads", "selection", "records"]
    assert list(json.loads(text)) == keys
    readme = (Path(sys.modules["pagedgen.cache"].__file__).parent / "README.md").read_text()
    assert all(f"`{key}`" in readme for key in keys)


def test_nothing_stored_is_none(database: Database) -> None:
    assert database.find(SPEC, "cpu", STAMP) is None
    assert list(database.entries()) == []


def test_saving_merges_and_the_newest_measurement_wins(database: Database) -> None:
    database.save(entry(measured(1, 100.0), measured(2, 120.0), selection=choice(1)))
    later = replace(STAMP, date="2026-11-25T00:00:00+00:00")
    path = database.save(entry(measured(2, 80.0, later), measured(4, 85.0, later), selection=choice(2)))
    found = read(path)
    assert found is not None
    assert {r.schedule.int("tile"): r.time_us for r in found.records} == {1: 100.0, 2: 80.0, 4: 85.0}
    assert found.selection == choice(2)


def test_a_prediction_never_displaces_a_measurement(database: Database) -> None:
    database.save(entry(measured(1), selection=choice(1)))
    path = database.save(entry(predicted(1), predicted(2), selection=choice(2, Status.PREDICTED)))
    found = read(path)
    assert found is not None
    assert {r.schedule.int("tile"): r.status for r in found.records} == {
        1: Status.MEASURED,
        2: Status.PREDICTED,
    }
    assert found.selection == choice(1)
    assert path.name == f"{SPEC.name}.json"


def test_user_before_shipped_but_measured_before_predicted(database: Database) -> None:
    shipped = Database(database.shipped, database.shipped, kernel)
    shipped.save(entry(measured(1), selection=choice(1)))
    database.save(entry(predicted(2), selection=choice(2, Status.PREDICTED)))
    found = database.find(SPEC, "cpu", STAMP)
    assert found is not None and found.entry.selection == choice(1)
    database.save(entry(measured(3), selection=choice(3)))
    found = database.find(SPEC, "cpu", STAMP)
    assert found is not None and found.entry.selection == choice(3)
    assert len(list(database.entries("cpu"))) == 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, Fit.EXACT),
        ({"date": "2030-01-01T00:00:00+00:00"}, Fit.EXACT),
        ({"pagedgen": "0.9.3"}, Fit.EXACT),
        ({"compiler": "tvm 0.28.0"}, Fit.NEAR),
        ({"driver": "Linux 7.0"}, Fit.NEAR),
        ({"device": "none", "driver": "none"}, Fit.NEAR),
        ({"pagedgen": "1.0.0"}, Fit.FOREIGN),
        ({"device": "Intel Xeon (2 threads)"}, Fit.FOREIGN),
    ],
)
def test_fit(change: dict[str, str], expected: Fit) -> None:
    assert fit(replace(STAMP, **change), STAMP) is expected
    assert fit(STAMP, replace(STAMP, **change)) is expected


def test_foreign_records_are_neither_used_nor_overwritten(database: Database) -> None:
    first = database.save(entry(measured(1), selection=choice(1)))
    before = first.read_bytes()
    other = replace(STAMP, device="Intel Xeon (2 threads)")
    assert database.find(SPEC, "cpu", other) is None
    second = database.save(entry(measured(2, stamp=other), selection=choice(2)))
    assert (second.parent, second.name) == (first.parent, f"{SPEC.name}.2.json")
    assert first.read_bytes() == before
    for stamp, tile in ((STAMP, 1), (other, 2)):
        found = database.find(SPEC, "cpu", stamp)
        assert found is not None and found.entry.selection == choice(tile)
    third = replace(STAMP, device="AMD EPYC (4 threads)")
    assert database.save(entry(measured(3, stamp=third))).name == f"{SPEC.name}.3.json"
    assert database.save(entry(measured(4, stamp=other))) == second
    assert database.files(SPEC, "cpu") == (first, second, second.with_name(f"{SPEC.name}.3.json"))


def rendered(database: Database, *changed: int) -> Database:
    """The same folders after an edit that changed the kernels of some tiles."""

    def now(spec: KernelSpec, target: str, one: Schedule) -> str:
        return "after the edit" if one.int("tile") in changed else kernel(spec, target, one)

    return Database(database.user, database.shipped, now)


def test_records_of_kernels_that_are_rendered_otherwise_now_are_neither_used_nor_overwritten(
    database: Database,
) -> None:
    first = database.save(entry(measured(1), measured(2), selection=choice(1)))
    before = first.read_bytes()
    for changed, tiles, selection in (((3,), {1, 2}, choice(1)), ((2,), {1}, choice(1)), ((1,), {2}, None)):
        found = rendered(database, *changed).find(SPEC, "cpu", STAMP)
        assert found is not None and found.path == first
        assert {r.schedule.int("tile") for r in found.entry.records} == tiles
        assert found.entry.selection == selection, "a choice stands while all its kernels do"
    edited = rendered(database, 1, 2)
    assert edited.find(SPEC, "cpu", STAMP) is None and list(edited.of_spec(SPEC)) == []
    again = replace(measured(1, 70.0), kernel="after the edit")
    for partly in (rendered(database, 1), edited):
        second = partly.save(entry(again, selection=choice(1)))
        assert second.name == f"{SPEC.name}.2.json" and first.read_bytes() == before
        found = partly.find(SPEC, "cpu", STAMP)
        assert found is not None and (found.path, found.entry.records) == (second, (again,))
    found = database.find(SPEC, "cpu", STAMP)
    assert found is not None and found.path == first, "the edit is taken back: the old ones hold again"


def test_of_two_files_that_hold_the_newer_is_used(database: Database) -> None:
    old, new = measured(1), measured(2, stamp=replace(STAMP, date="2026-11-30T00:00:00+00:00"))
    database.save(entry(old, measured(3), selection=choice(1)))
    second = rendered(database, 3).save(entry(new, selection=choice(2)))
    found = rendered(database, 3).find(SPEC, "cpu", STAMP)
    assert found is not None and (found.path, found.entry.selection) == (second, choice(2))


@pytest.mark.parametrize("number", [1, 3])
def test_another_format_is_left_alone(database: Database, number: int) -> None:
    path = database.save(entry(measured(1)))
    other = path.read_text().replace('"format": 2', f'"format": {number}')
    path.write_text(other)
    assert database.find(SPEC, "cpu", STAMP) is None
    assert database.save(entry(measured(2))) != path
    assert path.read_text() == other


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        (lambda text: text[: len(text) // 2], "JSON"),
        (lambda text: "", "JSON"),
        (lambda text: "[]", "record file"),
        (lambda text: text.replace('"format": 2', '"format": 0'), "format"),
        (lambda text: text.replace('"num_q_heads": 32', '"num_q_heads": 24.5'), "num_q_heads"),
        (lambda text: text.replace('"num_kv_heads": 8', '"num_kv_heads": 4'), "spec"),
        (lambda text: text.replace('"target": "cpu"', '"target": "h200"'), "spec"),
        (lambda text: text.replace('"workload": 0', '"workload": 5'), "workload"),
        (lambda text: text.replace('"passed": true', '"passed": false'), "verdict"),
        (lambda text: text.replace('"median_us"', '"mean_us"'), "timing"),
    ],
)
def test_damage_is_named_and_left_alone(database: Database, damage, where: str) -> None:  # type: ignore[no-untyped-def]
    path = database.save(entry(measured(1)))
    damaged = damage(path.read_text())
    assert damaged != path.read_text()
    path.write_text(damaged)
    for action in (lambda: database.find(SPEC, "cpu", STAMP), lambda: database.save(entry(measured(2)))):
        with pytest.raises(MalformedFile, match=where) as caught:
            action()
        assert str(path) in str(caught.value)
    assert path.read_text() == damaged


def test_read_only_cache_is_read_and_named_when_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(tmp_path / "user", tmp_path / "shipped", kernel)
    database.save(entry(measured(1)))

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    # Permissions do not stop root, who runs containers; the system call is made to refuse instead.
    monkeypatch.setattr("tempfile.mkstemp", refuse)
    assert database.find(SPEC, "cpu", STAMP) is not None
    with pytest.raises(CacheUnwritable, match="Read-only file system"):
        database.save(entry(measured(2)))


def test_a_cache_below_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CacheUnwritable, match="file"):
        Database(tmp_path / "file" / "user", kernel=kernel).save(entry(measured(1)))


def test_records_of_another_spec_are_refused() -> None:
    with pytest.raises(InvalidValue, match="records"):
        Entry(replace(SPEC, block_size=32), "cpu", (measured(1),))
    with pytest.raises(InvalidValue, match="records"):
        Entry(SPEC, "cpu", ())


WRITER = """
import sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_database import SPEC, entry, kernel, measured
from pagedgen.autotune.database import Database
database = Database(Path(sys.argv[1]), Path(sys.argv[1]) / "none", kernel)
first, count = int(sys.argv[2]), int(sys.argv[3])
for tile in range(first, first + count):
    database.save(entry(measured(tile)))
    print(tile, flush=True)
"""


def writer(folder: Path, first: int, count: int) -> subprocess.Popen[str]:
    code = WRITER.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", code, str(folder), str(first), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)


def test_concurrent_writers_lose_nothing(database: Database) -> None:
    writers = [writer(database.user, first, 10) for first in (0, 100, 200)]
    assert [w.wait(60) for w in writers] == [0, 0, 0]
    found = database.find(SPEC, "cpu", STAMP)
    assert found is not None
    tiles = {r.schedule.int("tile") for r in found.entry.records}
    assert tiles == {first + i for first in (0, 100, 200) for i in range(10)}


def test_a_killed_writer_leaves_whole_files_and_no_lock(database: Database) -> None:
    process = writer(database.user, 0, 100_000)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    reported = [int(line) for line in process.stdout.read().split()]
    process.wait(10)
    found = database.find(SPEC, "cpu", STAMP)
    assert found is not None
    tiles = {r.schedule.int("tile") for r in found.entry.records}
    assert tiles >= {0, *reported}, "a save that returned was lost"
    database.save(entry(measured(-1)))
    found = database.find(SPEC, "cpu", STAMP)
    assert found is not None and len(found.entry.records) == len(tiles) + 1
