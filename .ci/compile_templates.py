"""Compiles every Triton template for every architecture of the table, and prints what the binaries use."""

from __future__ import annotations

import sys

import triton

from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.render import render
from pagedgen.compiler.space import default_schedule, feasible
from pagedgen.errors import CompileError, Unsupported
from pagedgen.values.spec import DType, KernelSpec, KVScale, Op, Rope
from pagedgen.values.target_table import table

F16, BF16, E4M3, E5M2 = DType.F16, DType.BF16, DType.FP8_E4M3, DType.FP8_E5M2
SPECS = (
    KernelSpec(Op.DECODE, 128, 32, 8, 16, BF16, BF16),
    KernelSpec(Op.DECODE, 128, 32, 8, 16, F16, E4M3, KVScale.TENSOR),
    KernelSpec(Op.DECODE, 80, 32, 32, 1, F16, F16),
    KernelSpec(Op.DECODE, 96, 16, 1, 544, BF16, E5M2, KVScale.HEAD, return_lse=True),
    KernelSpec(Op.EXTEND, 128, 32, 8, 16, BF16, BF16),
    KernelSpec(Op.WRITE_KV, 128, 8, 8, 16, BF16, E4M3, KVScale.HEAD),
    KernelSpec(Op.WRITE_KV, 128, 8, 8, 16, F16, E5M2, KVScale.TENSOR, rope=Rope.GPTJ, rotary_dim=64),
    KernelSpec(Op.KV_SCALES, 128, 8, 8, 1, BF16, E4M3, KVScale.HEAD),
    KernelSpec(Op.MERGE, 128, 32, 32, 1, BF16, BF16, sinks=True),
    KernelSpec(Op.COPY_BLOCKS, 128, 8, 8, 16, BF16, BF16),
    KernelSpec(Op.GATHER, 128, 8, 8, 16, BF16, E5M2, KVScale.HEAD),
    KernelSpec(Op.GATHER, 80, 8, 8, 1, E4M3, E4M3),
    KernelSpec(
        Op.EXTEND, 128, 32, 8, 16, F16, E4M3, KVScale.TENSOR, window=1024, logits_soft_cap=50.0, sinks=True
    ),
)


def main() -> int:
    """One line a (target, spec, schedule); the exit status counts what did not compile."""
    print(f"triton {triton.__version__}, Python {sys.version.split()[0]}")
    failures, archs = 0, set()
    for target in (row.target for row in table()):
        if target.arch in archs:
            continue
        archs.add(target.arch)
        for spec in SPECS:
            try:
                space = feasible(spec, target)
            except Unsupported as error:
                print(f"{target.arch:8} {spec.name:44} not supported: {error}")
                continue
            for schedule in dict.fromkeys((default_schedule(spec, target), space[0], space[-1])):
                try:
                    use = compile_source(render(spec, target, schedule)).resources
                    print(
                        f"{target.arch:8} {spec.name:44} {use.registers:3} registers, "
                        f"{use.spill_bytes} B spilled, {use.smem_bytes} B shared, {schedule.name}"
                    )
                except CompileError as error:
                    failures += 1
                    print(f"{target.arch:8} {spec.name:44} FAILED {error}")
    return failures


if __name__ == "__main__":
    sys.exit(main())
