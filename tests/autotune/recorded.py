"""Timings recorded on a device, replayed: medians of 3,700 schedules of 3 specs on 5 batches from an H100.

They are ``docs/benchmarks/decode-gpu-schedules-h100.json``, of kernels whose fields have changed since: their
schedules are a template's of their own, and what the cost model of that day predicted for them is kept beside
this file. ``decode-gpu-max-h100.json`` beside it holds every trial of two runs of ``max``, those that did not
compile among them. `modelled` makes records of the present template.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from pagedgen.autotune import warm
from pagedgen.autotune.outcome import Outcome
from pagedgen.compiler.cost import predict
from pagedgen.compiler.kernel_hash import kernel_hash
from pagedgen.compiler.space import feasible
from pagedgen.values import codec
from pagedgen.values.record import Record, Resources, Stamp, Status, Timing, Verdict
from pagedgen.values.schedule import Choice, Schedule
from pagedgen.values.spec import DType, KernelSpec, KVScale, Op
from pagedgen.values.target_table import target
from pagedgen.values.workload import Workload

TIMES = Path(__file__).parents[2] / "docs" / "benchmarks" / "decode-gpu-schedules-h100.json"
REPEATED = TIMES.with_name("decode-gpu-repeat-h100.json")
TRIED = TIMES.with_name("decode-gpu-max-h100.json")
PREDICTED = Path(__file__).parent / "predicted_h100.json"
FIELDS = ("fp8_decode", "ids", "num_stages", "num_warps", "prefetch_ids", "seq_lanes", "tile", "waves")
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
    """Microseconds of every schedule of a spec, over one workload or the geometric mean of several.

    ``predicted`` are the cost model's, of every schedule; ``chosen`` is what a neighbour's search would take
    for guesses: of several workloads what a dispatch table would hold, the fastest in the mean and on each;
    of one, the fastest few.
    """

    spec: KernelSpec
    workloads: tuple[Workload, ...]
    times: Mapping[Schedule, float]
    predicted: Mapping[Schedule, float]
    chosen: tuple[Schedule, ...]
    rejected: Mapping[Schedule, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.spec.name} on {'+'.join(w.name for w in self.workloads)}"

    def regret(self, schedule: Schedule) -> float:
        """How much slower than the fastest of all a schedule is: 0.01 is 1%."""
        return self.times.get(schedule, math.inf) / min(self.times.values()) - 1


class Replay:
    """Answers from a recording as the tuner would answer from a device, and remembers what was asked.

    ``noise`` is the relative standard deviation of an answer against the recorded median.
    """

    def __init__(self, recording: Recording, noise: float = 0.0, seed: int = 0) -> None:
        self.recording, self.noise, self._draw = recording, noise, random.Random(seed)
        self.asked: list[Schedule] = []

    def __call__(self, batch: tuple[Schedule, ...]) -> list[Outcome]:
        self.asked += batch
        return [self._outcome(schedule) for schedule in batch]

    def _outcome(self, schedule: Schedule) -> Outcome:
        reason = self.recording.rejected.get(schedule, "")
        if reason:
            return Outcome(schedule, None, reason)
        return Outcome(
            schedule, self.recording.times[schedule] * math.exp(self.noise * self._draw.gauss(0, 1))
        )


@cache
def recordings() -> tuple[Recording, ...]:
    """Every case of the file, fifteen in all."""
    specs = {spec.name: spec for spec in SPECS}
    found = []
    timed = json.loads(TIMES.read_text(encoding="utf-8"))["cases"]
    modelled = json.loads(PREDICTED.read_text(encoding="utf-8"))["cases"]
    for case, model in zip(timed, modelled, strict=True):
        assert (case["spec"], case["workload"]) == (model["spec"], model["workload"])
        # The file lists the fastest first: left so, every tie would be broken by the answer.
        rows = sorted(
            (_schedule(name), us, predicted)
            for (name, us), predicted in zip(case["us"].items(), model["predicted_us"], strict=True)
        )
        times = {schedule: us for schedule, us, _ in rows}
        found.append(
            Recording(
                specs[case["spec"]],
                (_uniform(case["workload"]),),
                times,
                {schedule: predicted for schedule, _, predicted in rows},
                _fastest(times),
            )
        )
    return tuple(found)


def _fastest(times: Mapping[Schedule, float]) -> tuple[Schedule, ...]:
    """Of one batch: the fastest and as many behind it as a search takes for guesses."""
    return tuple(sorted(times, key=lambda s: times[s])[: warm.GUESSES])


@cache
def combined() -> tuple[Recording, ...]:
    """Each spec over the geometric mean of its five workloads, of the schedules that met them all."""
    found = []
    for spec in SPECS:
        cases = [r for r in recordings() if r.spec == spec]
        shared = [s for s in cases[0].times if all(s in r.times for r in cases)]
        predicted = {s: _mean([r.predicted[s] for r in cases]) for s in shared}
        found.append(
            _over(spec, tuple(w for r in cases for w in r.workloads), [r.times for r in cases], predicted)
        )
    return tuple(found)


@cache
def tried() -> tuple[Recording, ...]:
    """Two runs of ``max``, all 480 trials of each: fp16 and fp8 KV on seven batches, by the template of
    2026-11-27. They are a part of the space, some 10,500 schedules; the best of them is what to find."""
    found = []
    for case in json.loads(TRIED.read_text(encoding="utf-8"))["cases"]:
        times: dict[Schedule, list[float]] = {}
        predicted, rejected = dict[Schedule, float](), dict[Schedule, str]()
        for *choices, answer, _registers, _smem, model in sorted(case["trials"], key=str):
            schedule = Schedule.of("tried", **dict(zip(case["fields"], choices, strict=True)))
            predicted[schedule] = model
            if isinstance(answer, str):
                rejected[schedule] = answer
            else:
                times[schedule] = answer
        workloads = tuple(codec.decode(Workload, w) for w in case["workloads"])
        rows = [{s: row[i] for s, row in times.items()} for i in range(len(workloads))]
        spec = codec.decode(KernelSpec, case["spec"])
        found.append(replace(_over(spec, workloads, rows, predicted), rejected=rejected))
    return tuple(found)


def _over(
    spec: KernelSpec,
    workloads: tuple[Workload, ...],
    rows: Sequence[Mapping[Schedule, float]],
    predicted: Mapping[Schedule, float],
) -> Recording:
    """The geometric mean over workloads, of schedules with a time in each of ``rows``."""
    shared = [s for s in rows[0] if all(s in row for row in rows)]
    times = {s: _mean([row[s] for row in rows]) for s in shared}
    chosen = [min(shared, key=lambda s, row=row: row[s]) for row in (times, *rows)]
    return Recording(spec, workloads, times, predicted, tuple(dict.fromkeys(chosen)))


def nearest(recording: Recording) -> list[Recording]:
    """The same batches for other specs, the nearest first."""
    others = [r for r in (*recordings(), *combined(), *tried()) if r.workloads == recording.workloads]
    others = [r for r in others if r.spec != recording.spec]
    return sorted(others, key=lambda r: warm._distance(r.spec, recording.spec))


def neighbours(recording: Recording, count: int = warm.GUESSES) -> list[Schedule]:
    """What was chosen on the same batches for the nearest other specs: as `warm.guesses` would guess."""
    space = tuple(recording.predicted)
    found = [
        warm._legal(schedule, dict(schedule.choices), set(space), space)
        for other in nearest(recording)
        for schedule in other.chosen
    ]
    return list(dict.fromkeys(found))[:count]


@cache
def repeated() -> tuple[Recording, ...]:
    """fp16 8x4096 timed again, 80 samples a schedule instead of 2 or 3: the kernels that were recorded, and
    those of the next change of the template, which merges parts faster.

    The recording is no accident: against the first of these its times err by 0.5% (standard deviation over
    schedules) and the lone best one is alone again, 1.5% ahead. Of the second, five are within 1%.
    """
    found = []
    for case in json.loads(REPEATED.read_text(encoding="utf-8"))["cases"]:
        first = next(
            r
            for r in recordings()
            if r.spec.name == case["spec"] and r.workloads == (_uniform(case["workload"]),)
        )
        times = {_schedule(name): us for name, us in case["us"].items()}
        again = {s: times[s] for s in first.times}
        found.append(replace(first, times=again, chosen=_fastest(again)))
    return tuple(found)


def _mean(values: list[float]) -> float:
    return math.exp(sum(math.log(v) for v in values) / len(values))


def _uniform(name: str) -> Workload:
    count, length = map(int, name.split("x"))
    return Workload.uniform(count, length)


def _schedule(name: str) -> Schedule:
    choices: dict[str, Choice] = {}
    for part, name_of in zip(name.split("-"), FIELDS, strict=True):
        value = part.removeprefix(name_of)
        choices[name_of] = int(value) if value.isdigit() else value
    return Schedule.of("recorded", **choices)


def record_of(recording: Recording) -> Record:
    """The best schedule of a recording as a record."""
    best = min(recording.times, key=lambda s: recording.times[s])
    return _record(
        recording.spec, recording.workloads[0], best, recording.times[best], recording.predicted[best]
    )


@cache
def modelled(spec: KernelSpec, workload: Workload, count: int = 60, seed: int = 0) -> tuple[Record, ...]:
    """Records of legal schedules of the present template, as an H100 might have given them.

    Their times are the model's, times what it leaves out of each schedule: a factor of 5%, spread normally.
    """
    rows = []
    for schedule in sorted(random.Random(seed).sample(feasible(spec, H100), count)):
        us = predict(spec, H100, schedule, workload).time_us
        left_out = math.exp(0.05 * random.Random(schedule.name).gauss(0, 1))
        kernel = kernel_hash(spec, H100, schedule)
        rows.append(_record(spec, workload, schedule, us * left_out, us, kernel))
    return tuple(rows)


def _record(
    spec: KernelSpec,
    workload: Workload,
    schedule: Schedule,
    us: float,
    predicted_us: float,
    kernel: str = "recorded",
) -> Record:
    return Record(
        Status.MEASURED,
        spec,
        H100.name,
        workload,
        schedule,
        kernel,
        Stamp("0.1.0", "triton 3.6.0", "NVIDIA H100 80GB HBM3", "580.159.04", "2026-11-24"),
        Resources(),
        predicted_us,
        Timing(us, us, us, 3),
        3091.5,
        Verdict(True, 4, 1e-4, 1e-3, 0),
    )
