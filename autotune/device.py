"""Which device and driver this machine has for a target: half of a record's stamp."""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import pagedgen
from pagedgen.values.record import Stamp
from pagedgen.values.target import Target

NONE = "none"


@dataclass(frozen=True, slots=True)
class Device:
    """``name`` and ``driver`` as stamped; ``present`` says whether kernels of the target can run here."""

    name: str
    driver: str
    present: bool


ABSENT = Device(NONE, NONE, False)


@cache
def device_of(target: Target) -> Device:
    """This machine's device for ``target``; :data:`ABSENT` when it has none of that architecture."""
    if target.kind == "cpu":
        return Device(
            f"{cpu_name()} ({num_threads()} threads)", f"{platform.system()} {platform.release()}", True
        )
    import torch

    if not torch.cuda.is_available():
        return ABSENT
    if target.kind == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability()
        if target.arch == f"sm_{major}{minor}":
            return Device(torch.cuda.get_device_name(), f"CUDA driver {_cuda_driver()}", True)
    return ABSENT


def stamp_of(target: Target, template: str, compiler: str, measured: bool) -> Stamp:
    """The stamp of records made here and now; a prediction names no device."""
    device = device_of(target) if measured else ABSENT
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return Stamp(pagedgen.__version__, template, compiler, device.name, device.driver, date)


def num_threads() -> int:
    """Cores this process may run on, which is how many threads CPU kernels are tuned for."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def cpu_name() -> str:
    """The processor's own name: ``AMD EPYC 9V74``."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "Hardware", "cpu model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cuda_driver() -> str:
    """The kernel module's version (580.65.06), or the CUDA version that the driver serves (13.0)."""
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="ascii").strip()
    except OSError:
        version = ctypes.c_int(0)
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
        return f"{version.value // 1000}.{version.value % 1000 // 10}"
