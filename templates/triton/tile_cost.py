"""What a tile of extend or verify costs: the part of the model that both share.

A program works through KV tiles one after the other: it waits for K, multiplies, computes weights, multiplies
again. Within a program little of that overlaps, so how fast a multiprocessor is follows from how many
programs it has, and a tile's own length (``tile_us``) matters as much as what its products (``tile_mma_us``)
and its instructions (``slots``) take of the units that programs share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pagedgen.templates.family import Cost
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target import Target

CLOCK_MHZ = 1755


def reads_smem(target: Target) -> bool:
    """Whether matrix products of 64 rows read K and V from shared memory (wgmma, tcgen05)."""
    return target.kind == "cuda" and target.capability // 10 in (9, 10)


def tile_symbols(
    spec: KernelSpec,
    target: Target,
    *,
    tile_m: int,
    tile: int,
    warps: int,
    buffers: float,
    widths: tuple[int, int],
    decode: str,
    addresses: str,
    other_regs: int,
) -> Mapping[str, float]:
    """Numbers behind the symbols of :func:`tile_costs`.

    Instructions and registers were counted in compiled loops. Rates and times were fitted to timings on an
    H100, as ``docs/benchmarks/extend-gpu.md`` says.

    Args:
        buffers: tiles of K and V that have room in shared memory.
        widths: columns of K and of V that are computed with, padding included.
        decode: how FP8 becomes float16, or none.
        addresses: how block ids are loaded: gather, page or scalar.
        other_regs: registers beside accumulators, scores and what addresses and FP8 take.
    """
    threads, (width, v_width), is_fp8 = 32 * warps, widths, spec.kv_dtype.is_fp8
    wgmma = reads_smem(target) and warps % 4 == 0 and tile_m >= 64
    shared = not wgmma and warps > 1 and tile_m <= 16 * warps  # a row's tokens, by several warps
    values = tile * (width + v_width) / threads
    return {
        "tile": tile,
        "tile_m": tile_m,
        "num_warps": warps,
        "width": width,
        "v_width": v_width,
        "buffers": buffers,
        "is_wgmma": int(wgmma),
        "acc_regs": tile_m * v_width / threads,
        "score_regs": tile_m * tile / threads,
        "copies": values * spec.kv_dtype.size / 16,  # of 16 bytes, by a thread
        "values": values,  # of K and V, by a thread
        # With an id for each token, each copy of 16-bit rows has an address of its own; for the shorter rows
        # of FP8, addresses go through shared memory.
        "copy_slots": 19.5 if addresses == "gather" and not is_fp8 else 9.5,
        # Addresses, by the length of rows: 31 to 50 registers at head_dim 64, 45 to 70 at 128. mma.sync has
        # operands in them as well.
        "other_regs": other_regs
        + (max(24.0, 32 * math.log2(width / 32)) if wgmma else 64)
        + (30 if addresses == "gather" else 0)
        + (24 if is_fp8 else 0),
        "smem_bytes": tile_m * width * 2
        + tile * (width + v_width) * spec.kv_dtype.size * buffers
        + (tile_m * tile * 2 if shared else 0)  # weights, from warp to warp
        + 1024,
        "smem_per_block": target.smem_per_block,
        "smem_per_sm": target.smem_per_sm,
        "regs_per_sm": target.regs_per_sm,
        "max_threads_per_sm": target.max_threads_per_sm,
        "num_sms": target.num_sms,
        # mma.sync, 16 x 8 x 16 each; a warpgroup's instructions are few
        "mma_slots": 0.0 if wgmma else tile_m * tile * (width + v_width) / 2048 / warps,
        "decode_slots": {"none": 0.0, "cvt": 1.0, "bits": 1.5, "plain": 3.0}[decode],
        "cap_slots": 6.0 if spec.logits_soft_cap else 0.0,
        "f16_tflops": max(1.0, target.f16_tflops),
        # Of the published rate; mma.sync reaches less where wgmma is what the tensor cores are made for.
        "mma_rate": 0.57 if wgmma or not reads_smem(target) else 0.4,
        "clock_mhz": CLOCK_MHZ,
        "warp_rate": 0.85,  # instructions a warp and cycle
        "spill_slots": 10.0,  # of a spilled register and tile: reading it back is waited for
        "latency_us": 0.73,
        # Through shared memory, with two barriers each time: K and V decoded for wgmma; a row's maximum, sum
        # and weights where warps share its tokens.
        "decode_us": 0.22 if is_fp8 and wgmma else 0.0,
        "share_us": 0.3 if shared else 0.0,
        "in_step": 0.4,
        "bandwidth_gbs": max(1.0, target.bandwidth_gbs) * 0.88,  # as decode's
    }


def tile_costs() -> tuple[Cost, ...]:
    """Registers, occupancy, and what one tile takes of the tensor cores, of the schedulers, and of time."""
    import sympy

    s = sympy.Symbol
    warps, tile = s("num_warps"), s("tile")
    needed = s("acc_regs") + 2 * s("score_regs") + s("other_regs")
    compute = (
        s("tile_mma_us") * sympy.Max(4 / warps, s("in_step") + (1 - s("in_step")) * 4 / warps)
        + s("slots") / (s("clock_mhz") * s("warp_rate"))
        + s("decode_us")
        + s("share_us")
    )
    return (
        Cost("regs", "a thread", sympy.Min(255, needed), "accumulators, scores and their weights, addresses"),
        Cost("spilled", "a thread", sympy.Max(0, needed - 255), "registers that are kept in memory"),
        Cost(
            "occupancy",
            "programs/SM",
            sympy.Max(
                1,
                sympy.Min(
                    sympy.floor(s("smem_per_sm") / (s("smem_bytes") + 1024)),
                    sympy.floor(s("regs_per_sm") / (s("regs") * 32 * warps)),
                    sympy.floor(s("max_threads_per_sm") / (32 * warps)),
                    32,
                ),
            ),
            "programs resident on an SM: shared memory, registers, threads",
        ),
        Cost(
            "tile_flops",
            "FLOP",
            2
            * s("tile_m")
            * tile
            * (s("width") * sympy.Max(1, s("is_wgmma") * (sympy.Rational(1, 2) + 32 / tile)) + s("v_width")),
            "products of a tile; those with K wait for Q and K from shared memory where tiles are short",
        ),
        Cost(
            "tile_mma_us",
            "µs",
            s("tile_flops") * s("num_sms") / (s("f16_tflops") * s("mma_rate") * 1e6),
            "the tensor cores of one SM for a tile, at the share of the published rate that such tiles reach",
        ),
        Cost(
            "slots",
            "a warp",
            s("acc_regs")
            + (4.6 + s("cap_slots")) * s("score_regs")
            + s("copy_slots") * s("copies")
            + s("decode_slots") * s("values")
            + s("mma_slots")
            + s("spill_slots") * s("spilled")
            + 128,
            "instructions for a tile: rescaling, softmax, copies and their addresses, FP8, what is spilled",
        ),
        Cost(
            "tile_us",
            "µs",
            sympy.sqrt(compute**2 + (s("latency_us") / sympy.Max(s("buffers") - 1, 0.6)) ** 2),
            "a tile of a program that is alone: products, then the rest (8 warps are nearly in step), and a "
            "memory latency shared by the tiles in flight",
        ),
    )


def call_costs() -> tuple[Cost, ...]:
    """What the programs of a call take: ``programs`` with ``tiles`` in all, the longest with ``longest``."""
    import sympy

    s = sympy.Symbol
    sms, occupancy, programs = s("num_sms"), s("occupancy"), s("programs")
    together = sympy.Min(occupancy, sympy.ceiling(programs / sms))
    issue = s("slots") * s("num_warps") / (4 * s("clock_mhz"))
    return (
        Cost("mma_us", "µs", s("tiles") * s("tile_mma_us") / sms, "all products, shared evenly"),
        Cost("issue_us", "µs", s("tiles") * issue / sms, "all instructions, on four schedulers an SM"),
        Cost(
            "program_cost_us",
            "µs",
            s("program_us")
            + s("program_slots") * (s("acc_regs") + s("spill_slots") * s("spilled")) / s("clock_mhz"),
            "what a program does beside its tiles: finding its work, reading Q, writing the output",
        ),
        Cost(
            "chain_us",
            "µs",
            sympy.Max(
                (programs * s("program_cost_us") + s("tiles") * s("tile_us")) / (sms * occupancy),
                s("program_cost_us")
                + s("longest") * sympy.Max(s("tile_us"), together * s("tile_mma_us"), together * issue),
            ),
            "tiles one after the other in as many programs as run at once; the longest program at least",
        ),
        Cost("memory_us", "µs", s("kv_bytes") / (s("bandwidth_gbs") * 1000), "reading K and V once"),
    )
