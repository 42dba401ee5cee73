"""Workers: a crash, a hang or an error costs one call."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # workers import the functions by name

import worker_functions as functions

from pagedgen.autotune.worker import Pool, Worker, WorkerFailed, WorkerLost, say
from pagedgen.errors import CompileError, PagedgenError


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker({"PAGEDGEN_TEST": "here"}) as started:
        yield started


def test_calls_share_a_process(worker: Worker) -> None:
    assert worker.call(functions.double, 21, timeout_s=60) == 42
    first = worker.call(functions.pid, timeout_s=60)
    assert first == worker.call(functions.pid, timeout_s=60) != os.getpid()
    assert worker.call(functions.variable, "PAGEDGEN_TEST", timeout_s=60) == "here"


def test_a_crash_is_named_and_the_next_call_works(worker: Worker) -> None:
    before = worker.call(functions.pid, timeout_s=60)
    with pytest.raises(WorkerLost, match=r"crashed \(SIGSEGV\)") as caught:
        worker.call(functions.segfault, ("variant", 3), timeout_s=60)
    assert caught.value.last == ("variant", 3)
    assert not worker.alive
    assert worker.call(functions.pid, timeout_s=60) != before


def test_every_process_is_set_up_replacements_too() -> None:
    with Worker(first=functions.set_up) as worker:
        for _ in range(2):
            assert worker.call(functions.variable, "PAGEDGEN_TEST", timeout_s=60) == "set up"
            with pytest.raises(WorkerLost):
                worker.call(functions.segfault, timeout_s=60)


def test_a_worker_that_cannot_be_set_up_takes_no_call() -> None:
    with Worker(first=functions.segfault) as worker:
        for _ in range(2):
            with pytest.raises(WorkerLost):
                worker.call(functions.pid, timeout_s=60)
            assert not worker.alive


def test_a_hang_is_killed_at_the_limit(worker: Worker) -> None:
    worker.call(functions.pid, timeout_s=60)
    start = time.monotonic()
    with pytest.raises(WorkerLost, match=r"timed out after 0\.3 s") as caught:
        worker.call(functions.hang, timeout_s=0.3)
    assert time.monotonic() - start < 5
    assert caught.value.last == "hanging"
    assert worker.call(functions.double, 1, timeout_s=60) == 2


def test_a_kill_takes_the_children_along(worker: Worker, tmp_path: Path) -> None:
    worker.call(functions.pid, timeout_s=60)
    with pytest.raises(WorkerLost):
        worker.call(functions.hang_with_child, str(tmp_path / "pid"), timeout_s=2)
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child outlived its worker")


def test_leaving_is_a_crash(worker: Worker) -> None:
    with pytest.raises(WorkerLost, match="exit status 7"):
        worker.call(functions.leave, 7, timeout_s=60)


def test_errors_travel_and_the_worker_stays(worker: Worker) -> None:
    before = worker.call(functions.pid, timeout_s=60)
    with pytest.raises(CompileError, match="tile64: out of registers"):
        worker.call(functions.fail, "ours", timeout_s=60)
    with pytest.raises(PagedgenError, match="tile = 3: a power of two"):
        worker.call(functions.fail, "fields", timeout_s=60)
    with pytest.raises(WorkerFailed, match="ZeroDivisionError: by zero") as caught:
        worker.call(functions.fail, "theirs", timeout_s=60)
    assert "worker_functions.py" in caught.value.trace
    with pytest.raises(WorkerFailed, match="pickle"):
        worker.call(functions.unpicklable, timeout_s=60)
    assert worker.call(functions.pid, timeout_s=60) == before


def test_a_pool_loses_only_what_went_wrong() -> None:
    with Pool(2) as pool:
        done = list(pool.map(functions.crash_on_three, range(10), timeout_s=5))
    assert [d.argument for d in done] == list(range(10))
    assert {d.argument: d.value for d in done if d.error is None} == {
        i: 10 * i for i in (0, 1, 2, 4, 6, 8, 9)
    }
    reasons = {d.argument: str(d.error) for d in done if d.error is not None}
    assert reasons == {3: "crashed (SIGSEGV)", 5: "timed out after 5 s", 7: "seven"}


def test_saying_outside_a_worker_is_silent() -> None:
    say("nobody listens")
