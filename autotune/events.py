"""What a tuning run tells while it goes: typed events, for progress bars and logs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pagedgen.autotune.outcome import Outcome
from pagedgen.values.spec import KernelSpec


@dataclass(frozen=True, slots=True)
class Started:
    """A spec is up. ``trials`` schedules of ``space`` are to be tried, ``known`` of them are on record."""

    spec: KernelSpec
    target: str
    measured: bool  # False: the device is absent, times will be predictions
    space: int
    trials: int
    known: int
    budget_s: float


@dataclass(frozen=True, slots=True)
class Step:
    """``done`` of ``total`` of the present batch are through a phase: compile, gate, time, retime."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Tried:
    """A batch is through. ``best_us`` is the workloads' geometric mean, ``share`` that of the roofline."""

    outcomes: tuple[Outcome, ...]
    done: int  # schedules tried so far, known ones included
    best_us: float | None
    share: float | None


@dataclass(frozen=True, slots=True)
class Warned:
    """Something to know that stops nothing."""

    text: str


Event = Started | Step | Tried | Warned
Progress = Callable[[Event], None]


def silent(event: Event) -> None:
    """Progress that nobody watches."""
