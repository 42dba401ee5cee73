"""What runs where."""

from __future__ import annotations

import platform
import sys

import pytest

from pagedgen.runtime.machine import CPU_LEVELS, V3, V4, cpu_arch, cpu_flags, cpu_runs, gpu_runs, host

BF16 = CPU_LEVELS["x86_64-avx512bf16"]


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
    ("machine", "flags", "best"),
    [
        ("x86_64", BF16 | {"sse2", "amx_tile"}, "x86_64-avx512bf16"),
        ("x86_64", BF16 - {"avx512vbmi"}, "x86_64-avx512"),  # Cooper Lake
        ("x86_64", V4, "x86_64-avx512"),
        ("x86_64", V4 - {"avx512bw"}, "x86_64-avx2"),  # Knights Landing
        ("x86_64", V3, "x86_64-avx2"),
        ("x86_64", V3 - {"fma"}, None),
        ("aarch64", {"asimd", "fphp", "asimdhp", "sve"}, "aarch64-neon"),
        ("aarch64", {"asimd"}, None),  # ARMv8.0 has no float16 arithmetic
        ("riscv64", V4, None),
    ],
)
def test_cpu_arch(machine, flags, best):
    assert cpu_arch(machine, flags) == best
    order = list(CPU_LEVELS)
    for arch in CPU_LEVELS:
        expected = (
            best is not None and arch.split("-")[0] == machine and order.index(arch) >= order.index(best)
        )
        assert cpu_runs(arch, machine, flags) is expected


def test_an_unknown_level_never_runs():
    assert not cpu_runs("x86_64-avx1024", "x86_64", BF16)


def test_flags_of_this_and_made_up_machines(tmp_path):
    text = tmp_path / "cpuinfo"
    text.write_text("processor\t: 0\nFeatures\t: fp asimd fphp\n\nprocessor\t: 1\nFeatures\t: other\n")
    assert cpu_flags(str(text)) == {"fp", "asimd", "fphp"}
    assert cpu_flags(str(tmp_path / "absent")) == frozenset()
    if sys.platform == "linux" and platform.machine() == "x86_64":
        assert "sse2" in cpu_flags()
        assert host() == "linux-x86_64"
