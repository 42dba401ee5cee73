"""The ``extend-cpu`` suite: our extend kernels on this CPU beside their peers, in interleaved rounds.

A prompt in every type, chunks, a prompt's chunk among decodes, a window; 32/8 heads, head_dim 128, blocks of
16 tokens in the layout of the project's own CPU cache. What rates are a share of is torch's product of two
large float32 matrices, on the same cores in the same run.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from pagedgen.autotune.roofline import cpu_matmul_tflops
from pagedgen.autotune.suites import peers_cpu, peers_extend_cpu
from pagedgen.autotune.suites.contest import contest, ours
from pagedgen.autotune.suites.output import Output
from pagedgen.autotune.suites.report import Case, Draft, Report
from pagedgen.values.spec import DType, KernelSpec, KInner, KVScale, Op
from pagedgen.values.target_table import target
from pagedgen.values.workload import Workload

ROUNDS = 7
PROMPT = Workload.chunks(1, 1024, 1024)
CHUNKS = Workload.chunks(4, 128, 1024)
MIXED = Workload.parse("1x256of1024+15x1of1024", Op.EXTEND)


def spec_of(kv: DType, window: int | None = None) -> KernelSpec:
    """32/8 heads, head_dim 128, block 16, in the layout of the project's own CPU cache."""
    q = DType.BF16 if kv.is_fp8 else kv
    scale = KVScale.TENSOR if kv.is_fp8 else KVScale.NONE
    return KernelSpec(Op.EXTEND, 128, 32, 8, 16, q, kv, scale, KInner.TOKEN, window=window)


@dataclass(frozen=True, slots=True)
class Job:
    """One case."""

    name: str
    spec: KernelSpec
    workload: Workload


def jobs() -> tuple[Job, ...]:
    """All cases."""
    found = [
        Job(f"prompt, {kv.value}", spec_of(kv), PROMPT)
        for kv in (DType.F32, DType.BF16, DType.F16, DType.FP8_E4M3)
    ]
    for kv in (DType.F32, DType.BF16):
        found.append(Job(f"chunks, {kv.value}", spec_of(kv), CHUNKS))
        found.append(Job(f"a chunk among decodes, {kv.value}", spec_of(kv), MIXED))
    found.append(Job("prompt in a window, f32", spec_of(DType.F32, window=256), PROMPT))
    return tuple(found)


def run(output: Output) -> Report:
    """All cases that are wanted, on all cores this process may use."""
    cpu, todo = target("cpu"), output.chosen(jobs())
    draft = Draft("extend-cpu", cpu, len(todo), output)
    with tempfile.TemporaryDirectory(prefix="pagedgen-bench-") as folder:
        for job in todo:
            output.note(f"extend-cpu: {job.name}")
            contenders = [ours(job.spec, cpu, job.workload, "cpu", Path(folder))]
            rows, _ = contest([*contenders, *peers_extend_cpu.peers(job.spec, job.workload)], ROUNDS)
            draft.add(Case(job.name, job.spec, job.workload, rows, (), cpu_matmul_tflops()))
    return draft.finish(peers_cpu.missing())
