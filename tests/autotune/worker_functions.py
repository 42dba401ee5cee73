"""What tests have workers do: good work, and every way of going wrong."""

from __future__ import annotations

import ctypes
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pagedgen.autotune.measure import Samples, Verified
from pagedgen.autotune.roofline import Bandwidth
from pagedgen.autotune.worker import say
from pagedgen.errors import CompileError, InvalidValue
from pagedgen.values.record import Verdict
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec
from pagedgen.values.workload import Workload


def double(value: int) -> int:
    print("noise on stdout must not reach the pipe")
    return 2 * value


def pid() -> int:
    return os.getpid()


def set_up() -> None:
    os.environ["PAGEDGEN_TEST"] = "set up"


def variable(name: str) -> str | None:
    return os.environ.get(name)


def segfault(word: object = None) -> None:
    say("starting")
    if word is not None:
        say(word)
    ctypes.string_at(0)


def crashing_gate(library: Path, spec: KernelSpec, variant: int, device: str, seed: int) -> Verdict:
    segfault()
    raise AssertionError("a segmentation fault was survived")


def hang(seconds: float = 3600) -> None:
    say("hanging")
    time.sleep(seconds)


def hang_with_child(path: str) -> None:
    code = f"import os, time; open({path!r}, 'w').write(str(os.getpid())); time.sleep(3600)"
    subprocess.Popen([sys.executable, "-c", code])
    time.sleep(3600)


def leave(status: int) -> None:
    os._exit(status)


def fail(kind: str) -> None:
    if kind == "ours":
        raise CompileError("tile64: out of registers")
    if kind == "fields":
        raise InvalidValue("tile", 3, "a power of two")
    raise ZeroDivisionError("by zero")


def crash_on_three(value: int) -> int:
    if value == 3:
        ctypes.string_at(0)
    if value == 5:
        time.sleep(3600)
    if value == 7:
        raise CompileError("seven")
    return 10 * value


def unpicklable() -> object:
    return lambda: None


# ---- what test_tune.py puts in place of compiler and device ----


def fake_time(schedule: Schedule, workload: Workload) -> float:
    """Best at tile 64 and 4 warps for long sequences, or many queries, at tile 16 for others."""
    best = 6 if (sum(workload.query_lens) or workload.max_seq_len) > 1024 else 4
    tile, warps = schedule.int("tile").bit_length() - 1, schedule.int("warps").bit_length() - 1
    return workload.num_tokens * (1 + 0.1 * abs(tile - best) + 0.05 * abs(warps - 2))


def fake_gate(library: Path, spec: KernelSpec, variant: int, device: str, seed: int) -> Verdict:
    """A schedule's ``mood`` says what becomes of it; fakes write the schedules into the library's place."""
    mood = _schedules(library)[variant]["mood"]
    if mood == "crash":
        ctypes.string_at(0)
    if mood == "hang":
        time.sleep(3600)
    if mood == "wrong":
        return Verdict(False, 1, 1.0, 1e-3, seed, "error 1 where 0.001 is allowed")
    return Verdict(True, 4, 1e-4, 1e-3, seed)


def fake_measure(
    library: Path,
    spec: KernelSpec,
    workload: Workload,
    variants: Sequence[Verified],
    rounds: int,
    device: str,
    seed: int = 0,
) -> Samples:
    """Times without noise; some schedules pass the gate and die here."""
    times: dict[int, tuple[float, ...]] = {}
    failed: dict[int, str] = {}
    for verified in variants:
        say(verified.variant)
        mood = verified.schedule["mood"]
        if mood == "late crash":
            ctypes.string_at(0)
        if mood == "late refusal":
            failed[verified.variant] = "call failed: too many resources"
            continue
        times[verified.variant] = (fake_time(verified.schedule, workload),) * rounds
    return Samples(times, failed)


_libraries: list[Path] = []


def drifting_measure(
    library: Path,
    spec: KernelSpec,
    workload: Workload,
    variants: Sequence[Verified],
    rounds: int,
    device: str,
    seed: int = 0,
) -> Samples:
    """As `fake_measure`, on a clock that takes half as long again from library to library."""
    if library not in _libraries:
        _libraries.append(library)
    scale = 1.5 ** len(_libraries)
    sampled = fake_measure(library, spec, workload, variants, rounds, device, seed)
    return Samples({v: tuple(scale * t for t in times) for v, times in sampled.times.items()}, sampled.failed)


def fake_bandwidth(spec: KernelSpec, device: str) -> Bandwidth:
    return Bandwidth(20.0, 40.0)


def other_bandwidth(spec: KernelSpec, device: str) -> Bandwidth:
    return Bandwidth(30.0, 40.0)


def fake_matmul_tflops(spec: KernelSpec, device: str) -> float:
    return 50.0


def no_pin() -> None:
    pass


def _schedules(library: Path) -> list[Schedule]:
    return list(pickle.loads(library.read_bytes()))


def gone(device: str) -> None:
    raise RuntimeError("CUDA error: device lost")


def fine(device: str) -> None:
    pass


def logged_measure(
    library: Path,
    spec: KernelSpec,
    workload: Workload,
    variants: Sequence[Verified],
    rounds: int,
    device: str,
    seed: int = 0,
) -> Samples:
    """As `fake_measure`, taking its time, with a line in $PAGEDGEN_TEST_LOG for everyone who is timed."""
    time.sleep(0.02)
    with Path(os.environ["PAGEDGEN_TEST_LOG"]).open("a", encoding="utf-8") as file:
        for verified in variants:
            file.write(f"{workload.name} {verified.schedule.name}\n")
    return fake_measure(library, spec, workload, variants, rounds, device, seed)
