"""Shared studies: nothing twice, the dead are found and replaced, results merge; journal and PostgreSQL."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import study_worker
from recorded import record_of

from pagedgen.autotune import ledger as module
from pagedgen.autotune.grid import Grid
from pagedgen.autotune.ledger import Ledger, Place, open_storage
from pagedgen.autotune.outcome import Outcome
from pagedgen.autotune.search import Stop, search
from pagedgen.errors import InvalidValue, MalformedFile, StudyForeign, StudyUnreachable
from pagedgen.values.schedule import Schedule

HERE = Path(__file__).parent
SPACE = tuple(Schedule.of("t", tile=2**t, mode=m) for t in range(4, 8) for m in "abc")
GRID = Grid(SPACE)
TRIALS = 96  # of 170 that were recorded
FORK = multiprocessing.get_context("fork")  # fresh interpreters would import torch for seconds each


@pytest.fixture
def journal(tmp_path: Path) -> str:
    return str(tmp_path / "study.log")


def ledgers(storage: str, count: int = 2) -> list[Ledger]:
    return [Ledger(GRID, Place(storage, "s"), {"spec": "x"}) for _ in range(count)]


def test_two_workers_never_hold_one_schedule(journal: str) -> None:
    first, second = ledgers(journal)
    assert first.claim(SPACE[:3]) == SPACE[:3]
    assert second.claim(SPACE[1:5]) == SPACE[3:5]
    assert set(second.running()) == set(SPACE[:3]) and set(first.running()) == set(SPACE[3:5])
    assert first.tell(Outcome(SPACE[0], 3.0)) and second.tell(Outcome(SPACE[3], None, "spills"))
    assert (
        set(first.outcomes())
        == set(second.outcomes())
        == {
            Outcome(SPACE[0], 3.0),
            Outcome(SPACE[3], None, "spills"),
        }
    )
    assert first.claim(SPACE[:1]) == second.claim(SPACE[3:4]) == ()
    assert first.spent() == 5
    first.close()  # gives back what it had not told
    assert second.claim(SPACE[1:3]) == SPACE[1:3]
    second.close()


def test_no_more_trials_than_agreed_whoever_claims(journal: str) -> None:
    first, second = ledgers(journal)
    first.preload([Outcome(SPACE[11], 9.0)])  # known beforehand: free
    assert first.claim(SPACE[:3], limit=5) == SPACE[:3]
    assert second.claim(SPACE[3:7], limit=5) == SPACE[3:5]
    second.preload([Outcome(SPACE[11], 8.0)])
    assert second.outcomes() == (Outcome(SPACE[11], 9.0),)
    for one in (first, second):
        one.close()


def test_a_worker_that_stops_counting_is_dead_by_the_onlookers_clock(journal: str, monkeypatch) -> None:
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    monkeypatch.setattr(module, "_machine", lambda: "elsewhere")
    (far,) = ledgers(journal, 1)
    monkeypatch.setattr(module, "_machine", lambda: "here")
    (near,) = ledgers(journal, 1)
    assert far.claim(SPACE[:2]) == SPACE[:2]
    assert near.take_up() == ()
    now += module.GRACE_S - 1
    assert near.take_up() == ()
    far._beat(1)
    now += module.GRACE_S - 1
    assert near.take_up() == ()  # it has counted since
    now += module.GRACE_S + 1
    assert near.take_up() == SPACE[:2]
    assert near.claim(SPACE[:2]) == SPACE[:2]
    assert not far.tell(Outcome(SPACE[0], 1.0))  # it was not dead after all: too late
    assert near.tell(Outcome(SPACE[0], 2.0))
    assert near.outcomes() == far.outcomes() == (Outcome(SPACE[0], 2.0),)
    for one in (far, near):
        one.close()


def test_a_schedule_that_takes_two_workers_along_is_given_up(journal: str) -> None:
    for i in range(module.MOST_LOST):
        (doomed,) = ledgers(journal, 1)
        doomed.worker = f"{module._machine()}/99999999-1/{i}"  # no such process
        assert doomed.take_up() == SPACE[:i]
        assert doomed.claim(SPACE[:1]) == SPACE[:1]
    (survivor,) = ledgers(journal, 1)
    assert survivor.take_up() == ()
    assert survivor.outcomes() == (Outcome(SPACE[0], None, "2 workers died over it"),)
    survivor.close()


def test_the_last_act_is_one_workers_and_everybodys_result(journal: str) -> None:
    record = record_of(study_worker.CASE)
    first, second = ledgers(journal)
    with first.last_act() as act:
        assert act.mine
        act.result = (record,)
    with second.last_act() as act:
        assert not act.mine and act.result == (record,)
    second.claim(SPACE[:1])
    second.tell(Outcome(SPACE[0], 1.0))
    with pytest.raises(RuntimeError, match="cut"), second.last_act() as act:
        assert act.mine  # more has been tried since: anew
        raise RuntimeError("cut off")
    with first.last_act() as act:
        assert act.mine
        act.result = (record,)
    for one in (first, second):
        one.close()


def test_records_travel_with_outcomes(journal: str) -> None:
    record = record_of(study_worker.CASE)
    first, second = ledgers(journal)
    first.claim(SPACE[:1])
    first.tell(Outcome(SPACE[0], record.time_us, records=(record,)))
    assert second.outcomes()[0].records == (record,)
    for one in (first, second):
        one.close()


def test_a_torn_line_of_a_journal_is_cut_off(journal: str) -> None:
    (first,) = ledgers(journal, 1)
    first.claim(SPACE[:1])
    with Path(journal).open("ab") as file:
        file.write(b'{"op_code":5,"half a line')  # a full disk, a kill
    assert first.tell(Outcome(SPACE[0], 1.0))
    (second,) = ledgers(journal, 1)
    assert second.outcomes() == (Outcome(SPACE[0], 1.0),)
    for one in (first, second):
        one.close()


def test_bad_storages_are_named(tmp_path: Path, journal: str) -> None:
    with pytest.raises(StudyUnreachable, match="unable to open database file"):
        open_storage("sqlite:////nowhere/at/all.db")
    with pytest.raises(InvalidValue, match="storage"):
        open_storage("postgresql+psycopg//typo://")
    for text in ("not\na journal\n", "a line\n", "a word", '{"a": 1}\n'):
        (tmp_path / "notes.txt").write_text(text)
        with pytest.raises(MalformedFile, match="journal"):
            open_storage(str(tmp_path / "notes.txt"))
        assert (tmp_path / "notes.txt").read_text() == text
    (tmp_path / "file").touch()
    with pytest.raises(StudyUnreachable, match=r"Not a directory|exists"):
        open_storage(str(tmp_path / "file" / "study.log"))
    Ledger(GRID, Place(journal, "s"), {"spec": "decode-h128"}).close()
    with pytest.raises(StudyForeign, match="decode-h128") as caught:
        Ledger(GRID, Place(journal, "s"), {"spec": "decode-h64"})
    assert (caught.value.field, caught.value.here) == ("spec", "decode-h64")


def test_a_database_that_does_not_answer_is_named_without_its_password() -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed (extra postgres)")
    with pytest.raises(StudyUnreachable, match="onnection") as caught:
        open_storage("postgresql+psycopg://me:secret@127.0.0.1:9/x")
    assert "secret" not in str(caught.value) and "127.0.0.1:9" in str(caught.value)


def test_a_full_disk_stops_it_with_its_name(journal: str, monkeypatch) -> None:
    (first,) = ledgers(journal, 1)
    first.claim(SPACE[:1])

    def full(self: object, logs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(module.JournalFileBackend, "append_logs", full)
    with pytest.raises(StudyUnreachable, match="No space left"):
        first.tell(Outcome(SPACE[0], 1.0))
    monkeypatch.undo()
    first.close()


# ---- processes ----


class Crew:
    """Workers of one study, each a process of its own."""

    def __init__(self, storage: str, folder: Path) -> None:
        self.storage, self.log = storage, folder / "timed.log"
        self.workers: list[multiprocessing.process.BaseProcess] = []

    def start(self) -> multiprocessing.process.BaseProcess:
        arguments = (self.storage, str(self.log), len(self.workers), TRIALS)
        worker = FORK.Process(target=study_worker.main, args=arguments)
        worker.start()
        self.workers.append(worker)
        return worker

    def timed(self) -> list[tuple[int, str]]:
        """(process, schedule or "finals") in the order of the log."""
        if not self.log.exists():
            return []
        return [(int(a), b) for a, b in (line.split() for line in self.log.read_text().splitlines())]

    def kill_one_that_works(self) -> int:
        """kill -9 a worker in the middle of a batch; its process."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            counts = Counter(pid for pid, _ in self.timed())
            for worker in self.workers:
                if counts[worker.pid] % 4 in (1, 2) and worker.is_alive():
                    worker.kill()  # SIGKILL
                    worker.join()
                    return worker.pid
            time.sleep(0.005)
        raise AssertionError("no worker began")

    def join(self) -> list[str]:
        """What the survivors say came out."""
        for worker in self.workers:
            worker.join(120)
        survivors = [w for w in self.workers if w.exitcode != -signal.SIGKILL]
        assert [w.exitcode for w in survivors] == [0] * len(survivors)
        return [Path(f"{self.log}.{w.pid}").read_text(encoding="utf-8") for w in survivors]


def check(crew: Crew, killed: int) -> None:
    said = crew.join()
    assert len(said) == len(crew.workers) - 1 and len(set(said)) == 1  # one result, the same for all
    assert said[0].split()[0] == str(TRIALS) and said[0].split()[2] == "1"
    timed = [name for _, name in crew.timed()]
    assert timed.count("finals") == 1
    schedules = [name for name in timed if name != "finals"]
    counts = Counter(schedules)
    assert len(counts) == TRIALS  # the study is complete
    lost = {name for pid, name in crew.timed() if pid == killed}
    again = {name for name, count in counts.items() if count > 1}
    assert again <= lost and len(again) <= 3  # only what the dead one had timed and not told
    assert len(schedules) <= TRIALS * 1.05


def test_three_workers_on_one_journal_one_killed(tmp_path: Path, journal: str) -> None:
    crew = Crew(journal, tmp_path)
    for _ in range(3):
        crew.start()
    check(crew, crew.kill_one_that_works())


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A PostgreSQL server of this test's own, on a socket in a folder of its own."""
    pytest.importorskip("psycopg", reason="psycopg is not installed (extra postgres)")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [
        Path(p) for p in [shutil.which("initdb")] if p
    ]
    if not found:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    binaries, data = found[-1].parent, Path(tempfile.mkdtemp(prefix="pagedgen-postgres-"))
    user = []
    if os.geteuid() == 0:  # the server refuses to run as root
        user = ["runuser", "-u", "postgres", "--"]
        shutil.chown(data, "postgres")

    def call(*command: str) -> None:
        done = subprocess.run([*user, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0, done.stderr

    call(str(binaries / "initdb"), "-D", f"{data}/db", "-U", "tuner", "-A", "trust")
    options = f"-k {data} -c listen_addresses='' -c fsync=off"
    call(str(binaries / "pg_ctl"), "-D", f"{data}/db", "-w", "-l", f"{data}/log", "-o", options, "start")
    try:
        yield f"postgresql+psycopg://tuner@/postgres?host={data}"
    finally:
        call(str(binaries / "pg_ctl"), "-D", f"{data}/db", "-m", "immediate", "stop")
        shutil.rmtree(data)


def test_four_workers_on_one_postgresql_study_one_killed(tmp_path: Path, postgres: str) -> None:
    crew = Crew(postgres, tmp_path)
    for _ in range(4):
        crew.start()
    check(crew, crew.kill_one_that_works())
    late = crew.start()  # the same command later finds everything done
    before = len(crew.timed())
    late.join(60)
    assert late.exitcode == 0 and len(crew.timed()) == before


def test_a_ledger_without_a_place_is_a_plain_search() -> None:
    found = search(SPACE, lambda batch: [Outcome(s, 1.0) for s in batch], trials=5, batch=2)
    assert found.stop is Stop.TRIALS and len(found.outcomes) == 5
