"""What this machine can run: platform, instruction-set level of its CPU, compute capabilities of its GPUs."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable

from pagedgen.values.cpu_level import CPU_LEVELS, cpu_flags


def host() -> str:
    """The platform that a library's file format and calling convention are of: ``linux-x86_64``."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    return f"{sys.platform}-{machine}"


def cpu_runs(arch: str, flags: Iterable[str] | None = None) -> bool:
    """Whether a processor (by default this one) has all that code of level ``arch`` uses."""
    return arch in CPU_LEVELS and CPU_LEVELS[arch] <= (cpu_flags() if flags is None else frozenset(flags))


def cpu_arch(flags: Iterable[str] | None = None) -> str | None:
    """The best level that a processor (by default this one) runs; None if it runs none."""
    have = cpu_flags() if flags is None else frozenset(flags)
    return next((arch for arch in CPU_LEVELS if cpu_runs(arch, have)), None)


def gpu_runs(arch: str, capability: tuple[int, int], *, machine_code: bool = True, ptx: bool = True) -> bool:
    """Whether a GPU of a compute capability runs kernels compiled for ``arch`` (``sm_80``).

    Machine code runs within its major architecture, on the same or a later minor one; PTX, through the
    driver's compiler, on any later architecture (CUDA C++ Programming Guide, binary and PTX compatibility).
    """
    built = divmod(int(arch.removeprefix("sm_")), 10)
    if machine_code and capability[0] == built[0] and capability[1] >= built[1]:
        return True
    return ptx and capability >= built


def gpu_capabilities() -> tuple[tuple[int, int], ...]:
    """Compute capabilities of the CUDA GPUs that this process sees; empty without any."""
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
