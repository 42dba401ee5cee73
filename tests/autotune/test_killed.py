"""kill -9 at random moments of a tuning run: it goes on; no record is lost, wrong or measured again."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import worker_functions as functions
from fake_tuner import FINE, LONG, SHORT, SPEC, fake_kernel, install, schedule

from pagedgen.autotune import tune as module
from pagedgen.autotune.database import Database, read
from pagedgen.values.schedule import Schedule
from pagedgen.values.target_table import target

KILLS = 10
FORK = multiprocessing.get_context("fork")  # a fresh interpreter would import torch for seconds each time


class InProcess:
    """A worker that dies with the run: what is killed here is the whole group."""

    def __init__(self, environment: object = None, first: object = None) -> None: ...

    def call(self, function, *arguments: object, timeout_s: float) -> object:
        return function(*arguments)

    def close(self) -> None: ...


def run(folder: Path) -> None:
    """A tuning run on made-up kernels, in a process of its own; its result is a file."""
    install([*FINE, *(schedule(t, w, "refused") for t in (8, 16) for w in (1, 2))], setattr)
    os.environ["PAGEDGEN_CACHE_DIR"] = str(folder / "cache")
    os.environ["PAGEDGEN_TEST_LOG"] = str(folder / "timed.log")
    module.measure, module.Worker = functions.logged_measure, InProcess
    module.PLANS = {effort: module.Plan(24, 4, 600.0, (2,), 3, 4) for effort in module.Effort}
    result = module.tune(
        SPEC,
        target("cpu"),
        [SHORT, LONG],
        database=Database(folder / "records", folder / "none", fake_kernel),
    )
    (folder / "result").write_text(result.selection.pick(2, 4096).name)


def recorded(folder: Path) -> dict[tuple[Schedule, str], float]:
    """Every time on record; reading a half-written file would raise."""
    times = {}
    for path in folder.glob("cpu/*.json"):
        entry = read(path)
        assert entry is not None and entry.spec == SPEC
        for record in entry.records:
            assert record.time_us == functions.fake_time(record.schedule, record.workload)
            times[record.schedule, record.workload.name] = record.time_us
    return times


def test_ten_kills_at_random_moments(tmp_path: Path) -> None:
    draw = random.Random(4)
    log, records = tmp_path / "timed.log", tmp_path / "records"
    log.touch()
    before: dict[tuple[Schedule, str], float] = {}
    for _ in range(KILLS):
        begun = len(log.read_text().splitlines())
        process = FORK.Process(target=run, args=(tmp_path,))
        process.start()
        # at any moment: while it starts, or up to its third batch
        until, extra = begun + draw.choice((0, 1, 8, 16)), draw.random() * 0.08
        while len(log.read_text().splitlines()) < until and process.is_alive():
            time.sleep(0.002)
        time.sleep(extra)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        after = recorded(records)
        assert before.items() <= after.items()  # nothing is lost
        timed = {line.split()[1] for line in log.read_text().splitlines()[begun:]}
        if {s for s, _ in after} < set(FINE):  # still searching: of what is finished, the anchor alone
            assert len(timed & {s.name for s, _ in before}) <= 1
        before = after
    assert before  # it got somewhere
    process = FORK.Process(target=run, args=(tmp_path,))
    process.start()
    process.join(60)
    best = min(FINE, key=lambda s: functions.fake_time(s, LONG))
    assert process.exitcode == 0 and (tmp_path / "result").read_text() == best.name
    assert before.items() <= recorded(records).items()
    assert {schedule for schedule, _ in recorded(records)} == set(FINE)
