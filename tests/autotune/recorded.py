"""Timings recorded on a device, replayed: medians of 3,700 schedules of 3 specs on 5 batches from an H100.

They are ``docs/benchmarks/decode-gpu-schedules-h100.json``. Its kernels read 96 values at a time while
merging and cut batches into pieces; the two fields that say so came later and are filled in here.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pagedgen.autotune.outcome import Outcome
from pagedgen.compiler.cost import predict
from pagedgen.compiler.families import family_for
from pagedgen.values.record import Record, Resources, Stamp, Status, Timing, Verdict
from pagedgen.values.schedule import Choice, Schedule
from pagedgen.values.spec import DType, KernelSpec, KVScale, Op
from pagedgen.values.target_table import target
from pagedgen.values.workload import Workload

FILE = Path(__file__).parents[2] / "docs" / "benchmarks" / "decode-gpu-schedules-h100.json"
FIXED: Mapping[str, Choice] = {"merge": 96, "split": "pieces"}  # in every recorded kernel
H100 = target("h100")
SPECS = tuple(
    KernelSpec(Op.DECODE, 128, 32, 8, block, DType.F16, kv, scale)
    for block, kv, scale in (
        (16, DType.F16, KVScale.NONE),
        (16, DType.FP8_E4M3, KVScale.TENSOR),
        (64, DType.FP8_E4M3, KVScale.TENSOR),
    )
)


@dataclass(frozen=True)
class Recording:
    """Microseconds of every schedule of a spec, over one workload or the geometric mean of several."""

    spec: KernelSpec
    workloads: tuple[Workload, ...]
    times: Mapping[Schedule, float]

    @property
    def name(self) -> str:
        return f"{self.spec.name} on {'+'.join(w.name for w in self.workloads)}"

    def predicted(self, schedule: Schedule) -> float:
        """The model's geometric mean over the workloads."""
        logs = [math.log(predict(self.spec, H100, schedule, w).time_us) for w in self.workloads]
        return math.exp(sum(logs) / len(logs))

    def regret(self, schedule: Schedule) -> float:
        """How much slower than the fastest of all a schedule is: 0.01 is 1%."""
        return self.times[schedule] / min(self.times.values()) - 1


class Replay:
    """Answers from a recording as the tuner would answer from a device, and remembers what was asked.

    ``noise`` is the relative standard deviation of an answer against the recorded median.
    """

    def __init__(self, recording: Recording, noise: float = 0.0, seed: int = 0) -> None:
        self.recording, self.noise, self._draw = recording, noise, random.Random(seed)
        self.asked: list[Schedule] = []

    def __call__(self, batch: tuple[Schedule, ...]) -> list[Outcome]:
        self.asked += batch
        return [
            Outcome(s, self.recording.times[s] * math.exp(self.noise * self._draw.gauss(0, 1))) for s in batch
        ]


@cache
def recordings() -> tuple[Recording, ...]:
    """Every case of the file, fifteen in all."""
    specs = {spec.name: spec for spec in SPECS}
    found = []
    for case in json.loads(FILE.read_text(encoding="utf-8"))["cases"]:
        spec = specs[case["spec"]]
        count, length = map(int, case["workload"].split("x"))
        times = {_schedule(spec, name): us for name, us in case["us"].items()}
        found.append(Recording(spec, (Workload.uniform(count, length),), times))
    return tuple(found)


@cache
def combined() -> tuple[Recording, ...]:
    """Each spec over the geometric mean of its five workloads, of the schedules that met them all."""
    found = []
    for spec in SPECS:
        cases = [r for r in recordings() if r.spec == spec]
        shared = set.intersection(*(set(r.times) for r in cases))
        times = {
            s: math.exp(sum(math.log(r.times[s]) for r in cases) / len(cases))
            for s in cases[0].times
            if s in shared
        }
        found.append(Recording(spec, tuple(w for r in cases for w in r.workloads), times))
    return tuple(found)


def _schedule(spec: KernelSpec, name: str) -> Schedule:
    family = family_for(spec, H100)
    choices: dict[str, Choice] = {}
    for field in family.fields(spec, H100):
        found = re.search(rf"(?:^|-){field.name}([^-]+)", name)
        if found:
            choices[field.name] = next(v for v in field.values if str(v) == found[1])
        else:
            choices[field.name] = FIXED.get(field.name, field.default)
    return Schedule.of(family.name, **choices)


def record(recording: Recording, schedule: Schedule) -> Record:
    """A schedule of a recording as a record."""
    us = recording.times[schedule]
    return Record(
        Status.MEASURED,
        recording.spec,
        H100.name,
        recording.workloads[0],
        schedule,
        Stamp("0.1.0", "recorded", "triton 3.6.0", "NVIDIA H100 80GB HBM3", "580.159.04", "2026-11-24"),
        Resources(),
        recording.predicted(schedule),
        Timing(us, us, us, 3),
        3091.5,
        Verdict(True, 4, 1e-4, 1e-3, 0),
    )


def record_of(recording: Recording) -> Record:
    """The best schedule of a recording as a record."""
    return record(recording, min(recording.times, key=lambda s: recording.times[s]))
