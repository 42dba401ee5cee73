"""``pagedgen predict-check``: picks made from one device's records, held against another's measurements."""

from __future__ import annotations

import statistics

from pagedgen.autotune.calibration import median_regret, transfers
from pagedgen.autotune.database import Database
from pagedgen.cli import console
from pagedgen.errors import NoCandidate
from pagedgen.values import codec
from pagedgen.values.record import Record, Status
from pagedgen.values.spec import Op
from pagedgen.values.target import Target
from pagedgen.values.target_table import target


def run(source: str, goal: str, *, as_json: bool) -> None:
    """Print the regret of each spec's pick, and their median.

    Raises:
        UnknownTarget: no such processor.
        NoCandidate: nothing measured is on record for one of the two.
    """
    here, there = target(source), target(goal)
    found = transfers(_measured(here), here, _measured(there), there)
    median = median_regret(found)
    moved = [t.moved for t in found if t.moved is not None]
    if as_json:
        console.emit(
            {
                "from": here.name,
                "to": there.name,
                "specs": [{**codec.encode(t), "name": t.spec.name} for t in found],
                "median_regret": median,
                "median_uncalibrated": statistics.median(t.uncalibrated for t in found),
                "median_moved": statistics.median(moved) if moved else None,
            }
        )
        return
    console.table(
        f"Picked for {there.name} from records of {here.name}, held against {there.name}'s own best",
        ("spec", ">measured there", ">regret", ">uncalibrated", f">{here.name}'s best", "pick"),
        (
            (
                t.spec.name,
                t.candidates,
                f"{t.regret:.1%}",
                f"{t.uncalibrated:.1%}",
                "-" if t.moved is None else f"{t.moved:.1%}",
                t.pick.name,
            )
            for t in found
        ),
    )
    console.out().print(f"median regret {median:.1%} over {len(found)} specs")


def _measured(where: Target) -> list[Record]:
    entries = [e.entry for e in Database().entries(where.name) if e.entry.spec.op is Op.DECODE]
    records = [r for entry in entries for r in entry.records if r.status is Status.MEASURED]
    if not records:
        raise NoCandidate(f"nothing measured on {where.name} is on record: pagedgen tune, on such a device")
    return records
