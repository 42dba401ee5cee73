"""The ``extend-cpu`` suite: our extend kernels on this CPU beside their peers, in interleaved rounds.

A prompt in every type, chunks, a prompt's chunk among decodes, a window; 32/8 heads, head_dim 128, blocks of
16 tokens in the layout of the project's own CPU cache. What rates are a share of is torch's product of two
large float32 matrices, on the same cores in the same run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from pagedgen.autotune.roofline import cpu_matmul_tflops
from pagedgen.autotune.suites import Note, peers_cpu, peers_extend_cpu
from pagedgen.autotune.suites.contest import contest, ours
from pagedgen.autotune.suites.report import Case, Report
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


def jobs() -> Iterator[tuple[str, KernelSpec, Workload]]:
    """Name, spec and batch of each case."""
    for kv in (DType.F32, DType.BF16, DType.F16, DType.FP8_E4M3):
        yield f"prompt, {kv.value}", spec_of(kv), PROMPT
    for kv in (DType.F32, DType.BF16):
        yield f"chunks, {kv.value}", spec_of(kv), CHUNKS
        yield f"a chunk among decodes, {kv.value}", spec_of(kv), MIXED
    yield "prompt in a window, f32", spec_of(DType.F32, window=256), PROMPT


def run(note: Note) -> Report:
    """All cases, on all cores this process may use."""
    cpu, cases = target("cpu"), []
    with tempfile.TemporaryDirectory(prefix="pagedgen-bench-") as folder:
        for name, spec, workload in jobs():
            note(f"extend-cpu: {name}")
            contenders = [ours(spec, cpu, workload, "cpu", Path(folder))]
            rows, _ = contest([*contenders, *peers_extend_cpu.peers(spec, workload)], ROUNDS)
            cases.append(Case(name, spec, workload, rows, (), cpu_matmul_tflops()))
    return Report.of("extend-cpu", cpu, cases, peers_cpu.missing())
