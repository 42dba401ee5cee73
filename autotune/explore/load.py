"""``Load``: when the requests of a trace arrive: at its own times, at random, or as others finish."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum

from pagedgen.autotune.explore.request import Request
from pagedgen.errors import InvalidValue
from pagedgen.values.trace import Trace


class Arrivals(StrEnum):
    """Open loops do not wait for the server, the closed one does."""

    CLOSED = "closed"  # a fixed number of requests in the system: the next comes when one is finished
    TRACE = "trace"  # the trace's own times, so many times as fast
    POISSON = "poisson"  # requests a second, exponentially distributed gaps


@dataclass(frozen=True, slots=True)
class Load:
    """``amount`` is requests at a time (closed), a rate factor (trace), or requests a second (poisson).

    Raises:
        InvalidValue: ``amount`` is not above 0, or no whole number for the closed loop.
    """

    arrivals: Arrivals
    amount: float

    def __post_init__(self) -> None:
        if not self.amount > 0 or (self.arrivals is Arrivals.CLOSED and self.amount != int(self.amount)):
            allowed = "a whole number above 0" if self.arrivals is Arrivals.CLOSED else "above 0"
            raise InvalidValue(f"{self.arrivals} load", self.amount, f"{allowed} is allowed")

    @property
    def is_closed(self) -> bool:
        """Whether the next request waits for one to finish."""
        return self.arrivals is Arrivals.CLOSED

    @property
    def text(self) -> str:
        """``closed loop, 256 requests at a time``"""
        if self.arrivals is Arrivals.CLOSED:
            return f"closed loop, {self.amount:g} requests at a time"
        if self.arrivals is Arrivals.TRACE:
            return "open loop, times of the trace" + (
                "" if self.amount == 1 else f" at {self.amount:g} times its rate"
            )
        return f"open loop, {self.amount:g} requests a second (Poisson)"

    def requests(self, trace: Trace, seed: int) -> list[Request]:
        """The trace's requests in order, with their arrival times in seconds (0 in the closed loop).

        Raises:
            InvalidValue: the trace has no times, and they are wanted.
        """
        if self.arrivals is Arrivals.TRACE and not trace.has_times:
            raise InvalidValue("rate_factor", self.amount, f"{trace.name} has no arrival times: give a rate")
        draw, now, requests = random.Random(f"arrivals {seed}"), 0.0, []
        for index, lengths in enumerate(trace.requests):
            if self.arrivals is Arrivals.TRACE:
                now = (lengths.arrival - trace.requests[0].arrival) / self.amount
            elif self.arrivals is Arrivals.POISSON:
                now += draw.expovariate(self.amount)
            requests.append(Request(index, lengths, now))
        return requests
