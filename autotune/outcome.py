"""``Outcome``: what the search learns of one schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pagedgen.errors import InvalidValue
from pagedgen.values.record import Record
from pagedgen.values.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a schedule: a time (microseconds, over the workloads' geometric mean), or why not.

    ``records`` are the measurements behind the time, where there are any.
    """

    schedule: Schedule
    time_us: float | None
    reason: str = ""
    records: tuple[Record, ...] = ()

    def __post_init__(self) -> None:
        if self.time_us is None:
            if not self.reason:
                raise InvalidValue("reason", "", "a rejected schedule says why")
        elif not (self.time_us > 0 and math.isfinite(self.time_us)):
            raise InvalidValue("time_us", self.time_us, "a positive time is expected")
