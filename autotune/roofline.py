"""What bounds a kernel on the device, measured in the run whose kernels are held against it.

The read bandwidth, and for operators of many queries the rate of a large matrix product.

GPU: a Triton kernel that only reads and sums; ``copy_`` counts writes too and reaches less (2.4-3.0 TB/s
where reading alone reaches 3.1 on an H100). CPU: :mod:`pagedgen.autotune.roofline_cpu`.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from pagedgen.values.spec import DType, KernelSpec, Op

GPU_BYTES = 2 << 30
GPU_CONFIGS = (
    (2048, 4, 8),
    (4096, 8, 4),
    (8192, 8, 4),
    (4096, 4, 16),
    (8192, 16, 2),
)  # elements, warps, per SM
ROUNDS = 7
CPU_SIZE = 2048  # of the matrices


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """GB/s. ``read_gbs`` is what a kernel's rate is stated against: on a CPU, random prefetched blocks.

    ``limit_gbs`` is what nothing can exceed: on a CPU the best sequential rate, on a GPU the same figure.
    """

    read_gbs: float
    limit_gbs: float


def bandwidth(spec: KernelSpec, device: str) -> Bandwidth:
    """Measure now; the block size of ``spec`` sets what a CPU reads at a time."""
    if device == "cpu":
        from pagedgen.autotune.roofline_cpu import measure_roofline

        contiguous = spec.block_size * spec.head_dim * spec.kv_dtype.size
        found = measure_roofline(max(64, contiguous // 64 * 64))
        return Bandwidth(found.random_median_gbs, max(found.sequential_gbs, found.random_gbs))
    best = gpu_read_gbs()
    return Bandwidth(best, best)


def gpu_read_gbs() -> float:
    """The best median rate, over a few launch configurations, of a kernel that only reads: GB/s."""
    import torch

    memory = torch.ones(GPU_BYTES // 4, dtype=torch.int32, device="cuda")
    sums = torch.empty(1 << 16, dtype=torch.int32, device="cuda")
    num_sms = torch.cuda.get_device_properties("cuda").multi_processor_count
    from pagedgen.autotune.roofline_kernel import read_and_sum

    best = 0.0
    for block, warps, per_sm in GPU_CONFIGS:
        grid = (num_sms * per_sm,)

        def launch(grid: tuple[int] = grid, block: int = block, warps: int = warps) -> None:
            read_and_sum[grid](memory, sums, memory.numel(), BLOCK=block, num_warps=warps)

        launch()
        times = []
        for _ in range(ROUNDS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            launch()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        if int(sums[: grid[0]].sum()) != memory.numel():
            raise RuntimeError("the roofline kernel did not read everything")
        best = max(best, GPU_BYTES / statistics.median(times) / 1e6)
    return best


def matmul_tflops(spec: KernelSpec, device: str) -> float:
    """The rate of a large matrix product that kernels of a spec are held against: TFLOP/s.

    0 for decode, whose products with one query are bound by reading. On a CPU it is the better one of
    float32's and the queries' type's: kernels form products in either.
    """
    if spec.op is Op.DECODE:
        return 0.0
    if device != "cpu":
        return gpu_matmul_tflops()
    kinds = {DType.F32, DType.F32 if spec.q_dtype is DType.F16 else spec.q_dtype}
    return max(cpu_matmul_tflops(kind) for kind in kinds)


def cpu_matmul_tflops(kind: DType = DType.F32) -> float:
    """The best rate of torch's product of two matrices of 2048 x 2048 on this CPU: TFLOP/s."""
    import torch

    dtype = {DType.F32: torch.float32, DType.BF16: torch.bfloat16}[kind]
    a, b = (torch.randn(CPU_SIZE, CPU_SIZE).to(dtype) for _ in range(2))
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return float(2 * CPU_SIZE**3 / min(times) / 1e12)


def gpu_matmul_tflops() -> float:
    """The best median rate of torch's product of two bfloat16 matrices of 8192 x 8192: TFLOP/s."""
    import torch

    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    a @ b
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(4):
            a @ b
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) / 4)
    return float(2 * 8192**3) / statistics.median(times) / 1e9
