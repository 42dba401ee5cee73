"""Named targets, aliases and detection."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pagedgen.errors import UnknownTarget, Unsupported
from pagedgen.values.cpu_level import CPU_LEVELS, cpu_flags, fast_bf16_dots
from pagedgen.values.target_table import (
    best_level,
    cpu_target,
    num_cores,
    row_of_device,
    table,
    target,
    target_names,
    target_of_device,
)

EXPECTED = [
    "a100-40g",
    "a100-80g",
    "a10",
    "l4",
    "l40s",
    "rtx3090",
    "rtx4090",
    "rtx5090",
    "h100-sxm",
    "h100-pcie",
    "h200",
    "gh200",
    "b200",
    "mi300x",
    "cpu",
]


def test_every_target_is_there_with_its_figures():
    assert list(target_names()) == EXPECTED
    for row in table():
        chip = row.target
        assert chip.source and chip.bandwidth_gbs > 0 and chip.f16_tflops > 0
        assert chip.smem_per_block <= chip.smem_per_sm
        assert chip.memory_bytes > 2**34 and chip.l2_bytes >= 2**22
        if chip.kind == "cuda":
            assert chip.fp8_convert == (chip.capability >= 89) == (chip.fp8_tflops > 0)


def test_names_are_distinct_from_each_other_and_from_aliases():
    names = [name for row in table() for name in (row.target.name, *row.aliases)]
    assert len(names) == len(set(names))
    devices = [name for row in table() for name in row.devices]
    assert len(devices) == len(set(devices))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a100", "a100-80g"),
        ("A100_40G", "a100-40g"),
        ("h100", "h100-sxm"),
        ("NVIDIA H100", "h100-sxm"),
        (" RTX4090 ", "rtx4090"),
        ("4090", "rtx4090"),
        ("AMD MI300X", "mi300x"),
    ],
)
def test_aliases(name, found):
    assert target(name).name == found


def test_an_unknown_target_lists_the_known_ones():
    with pytest.raises(UnknownTarget, match=r"unknown target 'v100'; known: a100-40g, .*, cpu"):
        target("v100")


def test_published_figures_that_kernels_depend_on():
    assert (target("h100").arch, target("h100").num_sms, target("h100").smem_per_block) == (
        "sm_90",
        132,
        232448,
    )
    assert (target("a100").arch, target("a100").fp8_convert) == ("sm_80", False)
    assert target("l4").fp8_convert


def test_mi300x_says_that_it_never_ran():
    assert target("mi300x").kind == "hip" and "never run" in target("mi300x").source


def test_cpu_counts_the_cores_it_may_use():
    cpu = target("cpu")
    assert cpu.kind == "cpu" and cpu.num_sms == num_cores() >= 1
    assert cpu.arch in CPU_LEVELS
    assert cpu.bandwidth_gbs == 0  # measured, never published


@pytest.mark.parametrize(("level", "flags"), CPU_LEVELS.items())
def test_cpu_levels(level, flags):
    assert best_level(flags | {"fpu", "zzz"}) == level


def test_avx512_without_its_byte_permutes_is_the_lower_level():
    assert best_level(CPU_LEVELS["x86_64-avx512bf16"] - {"avx512vbmi"}) == "x86_64-avx512"


def test_bf16_dots_are_fast_on_processors_of_amd():
    flags = CPU_LEVELS["x86_64-avx512bf16"]
    assert fast_bf16_dots(flags | {"sse4a"}) and not fast_bf16_dots(flags)
    assert not fast_bf16_dots(CPU_LEVELS["x86_64-avx512"] | {"sse4a"})
    assert cpu_target().fast_bf16_dots == fast_bf16_dots(cpu_flags())


def test_a_cpu_of_no_level_says_what_it_lacks():
    with pytest.raises(Unsupported, match=r"lacks .*avx2.* fma"):
        best_level(frozenset({"fpu", "sse2", "avx"}))
    with pytest.raises(Unsupported, match="lacks asimdhp"):
        best_level(frozenset({"fp", "asimd"}))
    with pytest.raises(Unsupported, match="generated for Linux"):
        best_level(frozenset())


def _device(name: str, sms: int, major: int = 9, minor: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        major=major,
        minor=minor,
        multi_processor_count=sms,
        shared_memory_per_block_optin=101376,
        shared_memory_per_multiprocessor=102400,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=1536,
        L2_cache_size=1 << 25,
        total_memory=1 << 34,
    )


def test_a_present_gpu_is_its_row_of_the_table():
    assert row_of_device(_device("NVIDIA H100 80GB HBM3", 132)).target.name == "h100-sxm"
    assert row_of_device(_device("NVIDIA A100-SXM4-40GB", 108)).target.name == "a100-40g"


def test_a_slice_of_a_gpu_and_an_unlisted_one_are_targets_of_their_own():
    assert row_of_device(_device("NVIDIA H100 80GB HBM3", 60)) is None
    made = target_of_device(_device("NVIDIA GeForce RTX 4060 Ti", 34, 8, 9), 288.0)
    assert made.name == "geforce-rtx-4060-ti-34sm"
    assert (made.arch, made.fp8_convert, made.smem_per_block) == ("sm_89", True, 101376)
    assert made.bandwidth_gbs == 288.0
