"""One worker of a shared study, as a process: replays a recording, slowly, and logs what it timed.

Each schedule that was timed is a line of LOG, written before its time is told: what the log holds was done.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from recorded import Replay, record_of, recordings

from pagedgen.autotune.grid import Grid
from pagedgen.autotune.ledger import Ledger, Place
from pagedgen.autotune.outcome import Outcome
from pagedgen.autotune.search import search
from pagedgen.values.record import Record
from pagedgen.values.schedule import Schedule

CASE = recordings()[1]
NAME = "replayed"
MEASURE_S = 0.02  # a schedule


def main(storage: str, log: str, seed: int, trials: int) -> None:
    """Work until the study is done; what came out goes to LOG.<process>."""
    replay = Replay(CASE)

    def evaluate(batch: tuple[Schedule, ...]) -> list[Outcome]:
        outcomes = []
        for schedule in batch:
            time.sleep(MEASURE_S)
            outcomes += replay((schedule,))
            with Path(log).open("a", encoding="utf-8") as file:
                file.write(f"{os.getpid()} {schedule.name}\n")
        return outcomes

    space = tuple(CASE.times)
    with Ledger(Grid(space), Place(storage, NAME), {"spec": CASE.spec.name}) as ledger:
        found = search(space, evaluate, trials=trials, batch=4, seed=seed, ledger=ledger)
        with ledger.last_act(pause_s=0.1) as act:
            if act.mine:
                act.result = finals(log)
    assert found.best is not None
    said = f"{len(found.outcomes)} {found.best.schedule.name} {len(act.result)}"
    Path(f"{log}.{os.getpid()}").write_text(said, encoding="utf-8")


def finals(log: str) -> tuple[Record, ...]:
    with Path(log).open("a", encoding="utf-8") as file:
        file.write(f"{os.getpid()} finals\n")
    return (record_of(CASE),)
