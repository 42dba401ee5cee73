"""The ``decode-cpu`` suite: our decode kernels on this CPU beside their peers, in interleaved rounds.

Three questions, one case each: how fast against peers, by dtype; what a wider head group costs; what ragged
lengths cost at equal bytes. The ceiling beside every round is reading random blocks, prefetched.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pagedgen.autotune.roofline_cpu import random_reader
from pagedgen.autotune.suites import peers_cpu
from pagedgen.autotune.suites.contest import contest, ours
from pagedgen.autotune.suites.output import Output
from pagedgen.autotune.suites.report import Case, Draft, Report
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


@dataclass(frozen=True, slots=True)
class Job:
    """One case: ours on specs and batches of as many bytes, each by its own name; with or without peers."""

    name: str
    spec: KernelSpec
    workload: Workload
    ours: tuple[tuple[str, KernelSpec, Workload], ...]
    with_peers: bool = False


def jobs() -> tuple[Job, ...]:
    """All cases."""
    found = []
    for kv in (DType.BF16, DType.F16, DType.FP8_E4M3, DType.F32):
        spec = spec_of(kv)
        alone = (("pagedgen", spec, UNIFORM),)
        found.append(Job(f"peers, {kv.value}", spec, UNIFORM, alone, with_peers=True))
    spec = spec_of(DType.BF16)
    groups = tuple((f"group of {group}", spec_of(DType.BF16, group), UNIFORM) for group in GROUPS)
    found.append(Job("head groups, bf16", groups[0][1], UNIFORM, groups))
    ragged = tuple((workload.name, spec, workload) for workload in (UNIFORM, RAGGED))
    found.append(Job("ragged lengths, bf16", spec, replace(UNIFORM, name="equal tokens"), ragged))
    return tuple(found)


def run(output: Output) -> Report:
    """All cases that are wanted, on all cores this process may use."""
    cpu, todo = target("cpu"), output.chosen(jobs())
    draft = Draft("decode-cpu", cpu, len(todo), output)
    with tempfile.TemporaryDirectory(prefix="pagedgen-bench-") as folder:
        for job in todo:
            output.note(f"decode-cpu: {job.name}")
            contenders = [ours(s, cpu, w, DEVICE, Path(folder), name) for name, s, w in job.ours]
            if job.with_peers:
                contenders += peers_cpu.peers(job.spec, job.workload)
            rows, read_gbs = contest(contenders, ROUNDS, ceiling(job.spec))
            draft.add(Case(job.name, job.spec, job.workload, rows, read_gbs))
    return draft.finish(peers_cpu.missing())
