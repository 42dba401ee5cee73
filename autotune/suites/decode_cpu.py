"""The ``decode-cpu`` suite: our decode kernels on this CPU beside their peers, in interleaved rounds.

Three questions, one case each: how fast against peers, by dtype; what a wider head group costs; what ragged
lengths cost at equal bytes. The ceiling beside every round is reading random blocks, prefetched.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from pagedgen.autotune.roofline_cpu import random_reader
from pagedgen.autotune.suites import Note, peers_cpu
from pagedgen.autotune.suites.contest import Contender, contest, ours
from pagedgen.autotune.suites.report import Case, Report
from pagedgen.values.spec import DType, KernelSpec, KInner, KVScale, Op
from pagedgen.values.target_table import target
from pagedgen.values.workload import Workload

ROUNDS = 15
DEVICE = "cpu"
UNIFORM = Workload.uniform(16, 2048)
RAGGED = Workload("1x16384+64x256", (16384,) + (256,) * 64)  # as many tokens
READ_BYTES = 1 << 28  # of the ceiling, well past the caches
GROUPS = (4, 8, 16)


def spec_of(kv: DType, group: int = 4) -> KernelSpec:
    """32/8 heads (by default), head_dim 128, block 16, in the layout of the project's own CPU cache."""
    q = DType.BF16 if kv.is_fp8 else kv
    scale = KVScale.TENSOR if kv.is_fp8 else KVScale.NONE
    return KernelSpec(Op.DECODE, 128, 8 * group, 8, 16, q, kv, scale, KInner.TOKEN)


def ceiling(spec: KernelSpec) -> Callable[[], float]:
    """Measures the rate of reading random blocks of the spec's size, GB/s."""
    memory = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    reader = random_reader(memory, spec.block_size * spec.head_dim * spec.kv_dtype.size)
    return reader.best_gbs


def run(note: Note) -> Report:
    """All cases, on all cores this process may use."""
    cpu = target("cpu")
    cases = []
    with tempfile.TemporaryDirectory(prefix="pagedgen-bench-") as name:
        folder = Path(name)
        for kv in (DType.BF16, DType.F16, DType.FP8_E4M3, DType.F32):
            spec = spec_of(kv)
            note(f"decode-cpu: {spec.name}, {UNIFORM.name}")
            contenders = [ours(spec, cpu, UNIFORM, DEVICE, folder), *peers_cpu.peers(spec, UNIFORM)]
            cases.append(_case(f"peers, {kv.value}", spec, UNIFORM, contenders))
        note("decode-cpu: head groups")
        specs = [spec_of(DType.BF16, group) for group in GROUPS]
        contenders = [
            ours(spec, cpu, UNIFORM, DEVICE, folder, f"group of {group}")
            for group, spec in zip(GROUPS, specs, strict=True)
        ]
        cases.append(_case("head groups, bf16", specs[0], UNIFORM, contenders))
        note("decode-cpu: ragged lengths")
        spec = spec_of(DType.BF16)
        contenders = [
            ours(spec, cpu, workload, DEVICE, folder, workload.name) for workload in (UNIFORM, RAGGED)
        ]
        cases.append(_case("ragged lengths, bf16", spec, replace(UNIFORM, name="equal tokens"), contenders))
    return Report.of("decode-cpu", cpu, cases, peers_cpu.missing())


def _case(name: str, spec: KernelSpec, workload: Workload, contenders: list[Contender]) -> Case:
    rows, read_gbs = contest(contenders, ROUNDS, ceiling(spec))
    return Case(name, spec, workload, rows, read_gbs)
