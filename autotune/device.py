"""Which device and driver this machine has for a target: half of a record's stamp."""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import pagedgen
from pagedgen.compiler.compile import compiler_version
from pagedgen.compiler.families import family_for
from pagedgen.errors import DeviceMissing, Unsupported
from pagedgen.runtime.machine import cpu_runs
from pagedgen.values.record import Stamp
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target import Target
from pagedgen.values.target_table import gpu_target, num_cores

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
    """This machine's device for ``target``; :data:`ABSENT` when it has no such device."""
    if target.kind == "cpu":
        if not cpu_runs(target.arch):
            return ABSENT
        # Virtual machines hide the model, so the instruction set is part of the name.
        name = f"{cpu_name()}, {target.arch} ({num_cores()} threads)"
        return Device(name, f"{platform.system()} {platform.release()}", True)
    try:
        here = gpu_target()
    except (DeviceMissing, Unsupported, ImportError):
        return ABSENT
    if here.name != target.name:
        return ABSENT
    import torch

    return Device(torch.cuda.get_device_name(), f"driver {_gpu_driver()}", True)


def stamp_of(target: Target, compiler: str, measured: bool) -> Stamp:
    """The stamp of records made here and now; a prediction names no device."""
    device = device_of(target) if measured else ABSENT
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return Stamp(pagedgen.__version__, compiler, device.name, device.driver, date)


def stamp_here(spec: KernelSpec, target: Target) -> Stamp:
    """The stamp of records of a spec made here and now, measured where the target's device is present.

    Raises:
        Unsupported: no template covers the spec on this target.
        ToolMissing: the target's compiler is not installed.
    """
    family_for(spec, target)
    return stamp_of(target, compiler_version(target.kind), measured=device_of(target).present)


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


def _gpu_driver() -> str:
    """The kernel module's version (580.65.06), or the CUDA version that the driver serves (13.0)."""
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="ascii").strip()
    except OSError:
        version = ctypes.c_int(0)
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
        return f"{version.value // 1000}.{version.value % 1000 // 10}"
