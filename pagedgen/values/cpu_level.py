"""Instruction-set levels of CPUs: what code of each relies on, and what this processor has.

V3 and V4 are the levels of the x86-64 psABI; ``avx512bf16`` stands for the server cores that have VBMI beside
it (Zen 4, Sapphire Rapids and newer).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"})
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

# As /proc/cpuinfo spells them; the best level of an instruction set comes first.
CPU_LEVELS: dict[str, frozenset[str]] = {
    "x86_64-avx512bf16": V4 | {"avx512_bf16", "avx512vbmi", "avx512_vbmi2"},
    "x86_64-avx512": V4,
    "x86_64-avx2": V3,
    "aarch64-neon": frozenset({"asimd", "asimdhp"}),
}


def fast_bf16_dots(flags: frozenset[str]) -> bool:
    """Whether vdpbf16ps forms twice the products of float32 FMAs in the same time.

    A core of Zen 4 does: 235 against 118 GFLOP/s. On Sapphire Rapids it runs on one port where FMAs have two:
    295 against 509. ``sse4a`` is a flag of AMD's processors alone.
    """
    return {"avx512_bf16", "sse4a"} <= flags


@cache
def cpu_flags(cpuinfo: str = "/proc/cpuinfo") -> frozenset[str]:
    """Instruction-set flags of the first processor, as Linux names them; empty where they cannot be read."""
    try:
        text = Path(cpuinfo).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
