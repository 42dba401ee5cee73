"""The Triton kernel of :mod:`pagedgen.autotune.roofline`. A module of its own: it needs Triton to import."""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def read_and_sum(memory, sums, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum ``count`` int32 (a multiple of nothing) in strides of the grid; one partial sum a program."""
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    lanes = tl.arange(0, BLOCK)
    step = tl.num_programs(0) * BLOCK
    for start in range(tl.program_id(0) * BLOCK, count, step):
        offsets = start + lanes
        total += tl.load(memory + offsets, mask=offsets < count, other=0)
    tl.store(sums + tl.program_id(0), tl.sum(total))
