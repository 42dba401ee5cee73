"""The named targets, and the one this machine has.

Figures are the vendors' (``targets.json``, each with its source); shared memory, registers and threads an SM
are those of the CUDA C++ Programming Guide's table of compute capabilities.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pagedgen.errors import DeviceMissing, UnknownTarget, Unsupported
from pagedgen.values import codec
from pagedgen.values.cpu_level import CPU_LEVELS, cpu_flags, fast_bf16_dots
from pagedgen.values.target import Target


@dataclass(frozen=True, slots=True)
class Row:
    """A named target, its other names, and the names its driver reports for such a device."""

    target: Target
    aliases: tuple[str, ...]
    devices: tuple[str, ...]


@cache
def table() -> tuple[Row, ...]:
    """The named targets but ``cpu``, which is whatever this machine has."""
    data = json.loads(Path(__file__).with_name("targets.json").read_text(encoding="utf-8"))
    return tuple(codec.decode(Row, row, f"targets.json[{i}]") for i, row in enumerate(data))


def target_names() -> tuple[str, ...]:
    """The names :func:`target` knows, aliases left out."""
    return (*(row.target.name for row in table()), "cpu")


def target(name: str) -> Target:
    """The target of that name or alias; ``cpu`` is this machine's. Case, blanks and underscores don't matter.

    >>> target("A100").name
    'a100-80g'

    Raises:
        UnknownTarget: lists the names.
        Unsupported: ``cpu``, on a processor that no kernel is generated for.
    """
    wanted = re.sub(r"[\s_]+", "-", name.strip().lower()).removeprefix("nvidia-").removeprefix("amd-")
    if wanted == "cpu":
        return cpu_target()
    for row in table():
        if wanted == row.target.name or wanted in row.aliases:
            return row.target
    raise UnknownTarget(name, target_names())


def num_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_target() -> Target:
    """This machine's CPU: its instruction-set level, and the cores this process may run on.

    Raises:
        Unsupported: none of the levels that kernels are generated for; names what is missing.
    """
    flags = cpu_flags()
    return Target(
        "cpu",
        "cpu",
        best_level(flags),
        num_cores(),
        fast_bf16_dots=fast_bf16_dots(flags),
        source="detected on this machine",
    )


def best_level(flags: frozenset[str]) -> str:
    """The best instruction-set level that a processor with these flags runs.

    Raises:
        Unsupported: none; names what is missing.
    """
    for level, needed in CPU_LEVELS.items():
        if needed <= flags:
            return level
    if not flags:
        raise Unsupported(f"platform {platform.system()}: CPU kernels are generated for Linux")
    least = "aarch64-neon" if "asimd" in flags else "x86_64-avx2"
    missing = " ".join(sorted(CPU_LEVELS[least] - flags))
    raise Unsupported(f"cpu: one of {', '.join(CPU_LEVELS)} is needed; this one lacks {missing}")


def gpu_target(index: int = 0) -> Target:
    """The GPU of that index: its row of the table, or a target made of what the driver reports of it.

    A card counts as the table's only with the same number of SMs, so a MIG slice is a target of its own.

    Raises:
        DeviceMissing: torch sees no such GPU.
        Unsupported: a GPU that is in no row, where the driver is not CUDA's.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        raise DeviceMissing(f"gpu {index}: torch {torch.__version__} sees {count} GPUs")
    device = torch.cuda.get_device_properties(index)
    if (row := row_of_device(device)) is not None:
        return row.target
    if torch.version.hip is not None:
        known = ", ".join(row.target.name for row in table() if row.target.kind == "hip")
        raise Unsupported(f"gpu {device.name}: the AMD targets are {known}")
    return target_of_device(device, dram_gbs(index))


def row_of_device(device: Any) -> Row | None:
    """The row of the table that a device of these properties is, if any."""
    for row in table():
        names = [name.lower() for name in row.devices]
        if device.name.strip().lower() in names and device.multi_processor_count == row.target.num_sms:
            return row
    return None


def target_of_device(device: Any, bandwidth_gbs: float) -> Target:
    """A CUDA target made of a device's properties, as ``torch.cuda.get_device_properties`` gives them."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.name.lower().removeprefix("nvidia ")).strip("-")
    capability = device.major * 10 + device.minor
    return Target(
        name=f"{slug}-{device.multi_processor_count}sm",
        kind="cuda",
        arch=f"sm_{capability}",
        num_sms=device.multi_processor_count,
        smem_per_block=device.shared_memory_per_block_optin,
        smem_per_sm=device.shared_memory_per_multiprocessor,
        regs_per_sm=device.regs_per_multiprocessor,
        max_threads_per_sm=device.max_threads_per_multi_processor,
        l2_bytes=device.L2_cache_size,
        memory_bytes=device.total_memory,
        bandwidth_gbs=bandwidth_gbs,
        fp8_convert=capability >= 89,
        source="reported by the driver of this machine",
    )


def detect() -> Target:
    """This machine's first GPU where torch sees one, else its CPU.

    Raises:
        Unsupported: no GPU, and a CPU that no kernel is generated for.
    """
    try:
        return gpu_target()
    except (DeviceMissing, ImportError):
        return cpu_target()


def dram_gbs(index: int) -> float:
    """GB/s that the CUDA driver's memory clock and bus width come to, at two transfers a clock and pin.

    Raises:
        DeviceMissing: the driver does not answer.
    """
    memory_clock_rate, bus_width = 36, 37  # CUdevice_attribute: kHz, bits
    values = []
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        device, value = ctypes.c_int(), ctypes.c_int()
        calls = [driver.cuInit(0), driver.cuDeviceGet(ctypes.byref(device), index)]
        for attribute in (memory_clock_rate, bus_width):
            calls.append(driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device))
            values.append(value.value)
    except OSError as error:
        raise DeviceMissing(f"gpu {index}: {error}") from error
    if any(calls) or not all(values):
        raise DeviceMissing(f"gpu {index}: the driver states no memory clock (codes {calls})")
    return 2 * values[0] * 1e3 * values[1] / 8 / 1e9
