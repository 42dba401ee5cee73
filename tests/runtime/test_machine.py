"""What runs where."""

from __future__ import annotations

import platform
import sys

import pytest

from pagedgen.runtime.machine import cpu_arch, cpu_runs, gpu_runs, host
from pagedgen.values.cpu_level import CPU_LEVELS, cpu_flags

BF16, V4, V3 = (CPU_LEVELS[f"x86_64-{level}"] for level in ("avx512bf16", "avx512", "avx2"))


@pytest.mark.parametrize(
    ("arch", "capability", "machine_code", "ptx", "runs"),
    [
        ("sm_80", (8, 0), True, True, True),
        ("sm_80", (8, 6), True, False, True),  # a later minor of the same major
        ("sm_86", (8, 0), True, True, False),  # an earlier one
        ("sm_80", (9, 0), True, False, False),  # machine code stays within its major
        ("sm_80", (9, 0), True, True, True),
        ("sm_80", (7, 5), True, True, False),
        ("sm_90", (8, 9), True, True, False),
        ("sm_89", (9, 0), False, True, True),
        ("sm_90", (9, 0), False, False, False),
        ("sm_100", (10, 3), True, False, True),
        ("sm_100", (12, 0), True, False, False),
        ("sm_120", (10, 0), True, True, False),
    ],
)
def test_gpu_runs(arch, capability, machine_code, ptx, runs):
    assert gpu_runs(arch, capability, machine_code=machine_code, ptx=ptx) is runs


@pytest.mark.parametrize(
    ("flags", "best"),
    [
        (BF16 | {"sse2", "amx_tile"}, "x86_64-avx512bf16"),
        (BF16 - {"avx512vbmi"}, "x86_64-avx512"),  # Cooper Lake
        (V4, "x86_64-avx512"),
        (V4 - {"avx512bw"}, "x86_64-avx2"),  # Knights Landing
        (V3, "x86_64-avx2"),
        (V3 - {"fma"}, None),
        ({"asimd", "fphp", "asimdhp", "sve"}, "aarch64-neon"),
        ({"asimd"}, None),  # ARMv8.0 has no float16 arithmetic
        ({"rv64gcv"}, None),
    ],
)
def test_cpu_arch(flags, best):
    assert cpu_arch(flags) == best
    order = list(CPU_LEVELS)
    for arch in CPU_LEVELS:
        same_family = best is not None and arch.split("-")[0] == best.split("-")[0]
        assert cpu_runs(arch, flags) is (same_family and order.index(arch) >= order.index(best))


def test_an_unknown_level_never_runs():
    assert not cpu_runs("x86_64-avx1024", BF16)


def test_flags_of_this_and_made_up_machines(tmp_path):
    text = tmp_path / "cpuinfo"
    text.write_text("processor\t: 0\nFeatures\t: fp asimd fphp\n\nprocessor\t: 1\nFeatures\t: other\n")
    assert cpu_flags(str(text)) == {"fp", "asimd", "fphp"}
    assert cpu_flags(str(tmp_path / "absent")) == frozenset()
    if sys.platform == "linux" and platform.machine() == "x86_64":
        assert "sse2" in cpu_flags()
        assert host() == "linux-x86_64"
