"""A tuner whose compiler and device are made up, for tests of the driver: its workers are real processes."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # workers import the functions by name

import worker_functions as functions

from pagedgen.autotune import binaries, calibration, gating, warm
from pagedgen.autotune import tune as module
from pagedgen.autotune.binaries import Compiled
from pagedgen.autotune.tune import Effort, Plan
from pagedgen.compiler.binary import Binary, Source
from pagedgen.values.record import Resources
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import DType, KernelSpec, KInner, Op
from pagedgen.values.target import Target
from pagedgen.values.workload import Workload

SPEC = KernelSpec(Op.DECODE, 64, 8, 2, 16, DType.F32, DType.F32, k_inner=KInner.TOKEN)
SHORT, LONG = Workload.uniform(4, 256), Workload.uniform(2, 4096)


def schedule(tile: int, warps: int, mood: str = "fine") -> Schedule:
    return Schedule.of("fake", tile=tile, warps=warps, mood=mood)


def fake_kernel(spec: KernelSpec, target: Target | str, one: Schedule) -> str:
    return f"fake {one.name}"


FINE = tuple(schedule(t, w) for t in (8, 16, 32, 64, 128) for w in (1, 2, 4, 8))


def install(space: list[Schedule], put: Callable[[object, str, object], None]) -> None:
    """Put fakes in the place of everything below the driver; ``space`` may change between runs."""

    class Family:
        name = "fake"

        def spills(self, spec: object) -> int:
            return 0

    def fake_compile(sources: Sequence[Source], pool: object, cache: object) -> Iterator[Compiled]:
        for source in sources:
            if source.schedule["mood"] == "refused":
                yield Compiled(source, None, "out of registers")
            else:
                spill = 64 if source.schedule["mood"] == "spills" else 0
                yield Compiled.of(Binary(source, "f", (), Resources(32, spill), "fake 1", 4), fresh=True)

    def fake_link(linked: Sequence[Binary], dispatch: object, out: Path) -> Path:
        out.write_bytes(pickle.dumps([b.source.schedule for b in linked]))
        return out

    def fake_predict(
        spec: KernelSpec, where: Target, one: Schedule, workload: Workload, factors: object
    ) -> object:
        class Prediction:
            time_us = 2 * functions.fake_time(one, workload)

        return Prediction

    for name, fake in {
        "feasible": lambda spec, where: tuple(space),
        "default_schedule": lambda spec, where: space[0],
        "near_default": lambda spec, where, count: tuple(space)[:count],
        "family_for": lambda spec, where: Family(),
        "template_hash": lambda family: "fakefakefake",
        "kernel_hash": fake_kernel,
        "render": lambda spec, where, one: Source(spec, where, one, one.name),
        "compile_all": fake_compile,
        "link": fake_link,
        "measure": functions.fake_measure,
        "bandwidth": functions.fake_bandwidth,
        "pin": functions.no_pin,
        "PLANS": {
            Effort.QUICK: Plan(8, 4, 60.0, (2, 2), 3, 4),
            Effort.STANDARD: Plan(20, 5, 60.0, (2, 2), 3, 6),
            Effort.MAX: Plan(400, 8, 60.0, (2, 2), 3, 6),
        },
    }.items():
        put(module, name, fake)
    put(calibration, "predict", fake_predict)
    put(binaries, "family_for", lambda spec, where: Family())
    put(warm, "family_for", lambda spec, where: Family())
    put(warm, "default_schedule", lambda spec, where: space[0])
    put(gating, "gate_variant", functions.fake_gate)
    put(gating, "GATE_S", 3.0)
