"""Decode on GPUs: the schedule space, legality and cost of ``decode.py.j2``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pagedgen.errors import Unsupported
from pagedgen.templates.family import TEMPLATES, Constraint, Cost, Family, Field
from pagedgen.values.schedule import Choice, Schedule
from pagedgen.values.spec import DType, KernelSpec, KInner, KVScale, Op
from pagedgen.values.target import Target
from pagedgen.values.workload import Workload

TRITON_TYPES = {DType.F16: "tl.float16", DType.BF16: "tl.bfloat16", DType.F32: "tl.float32"}


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def block_h(spec: KernelSpec) -> int:
    """Query-head rows of a tile: the group padded to the matrix instruction's 16 rows, at most 64."""
    return min(64, max(16, next_power_of_two(spec.group_size)))


def head_blocks(spec: KernelSpec) -> int:
    """Programs that share the query heads of one KV head."""
    return cdiv(spec.group_size, block_h(spec))


def kv_align(spec: KernelSpec) -> int:
    """Bytes that K's and V's pointers and strides must be multiples of: 16 where head_dim allows it."""
    row = spec.head_dim * spec.kv_dtype.size
    return min(16, row & -row)


@dataclass(frozen=True, slots=True)
class Load:
    """One load of a K or V row's columns, in words: power-of-two width, ``valid`` of them real."""

    base: int
    width: int
    valid: int

    @property
    def full(self) -> bool:
        """Whether no column is padding."""
        return self.width == self.valid


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix-product operand cut from a load: all its columns, or the even or odd half of its words."""

    name: str
    load: int
    width: int
    full: bool
    dims: str  # its columns of q and out, as source text

    @property
    def mask(self) -> str:
        """Source text of which elements of a [block_h, width] tile are real."""
        return "row_ok[:, None]" if self.full else f"row_ok[:, None] & col{self.load}_ok[None, :]"


def loads_of(spec: KernelSpec) -> tuple[Load, ...]:
    """Cover head_dim by power-of-two loads without reading the next power of two.

    80 halves are 64 + 16, not 128. Where the padded rest is as wide as the first piece, one masked load
    costs the same and is simpler.
    """
    columns = spec.head_dim // 2 if spec.kv_dtype.is_fp8 else spec.head_dim
    first = 1 << (columns.bit_length() - 1)
    rest = columns - first
    if not rest:
        return (Load(0, first, first),)
    padded = max(16, next_power_of_two(rest))
    if padded >= first:
        return (Load(0, 2 * first, columns),)
    return (Load(0, first, first), Load(first, padded, rest))


def parts_of(spec: KernelSpec) -> tuple[Part, ...]:
    """The matrix-product operands of the loads, in accumulation order."""
    parts = []
    for i, load in enumerate(loads_of(spec)):
        if spec.kv_dtype.is_fp8:
            parts.append(Part(f"{i}_even", i, load.width, load.full, f"2 * col{i}"))
            parts.append(Part(f"{i}_odd", i, load.width, load.full, f"2 * col{i} + 1"))
        else:
            parts.append(Part(f"{i}", i, load.width, load.full, f"col{i}"))
    return tuple(parts)


class TritonDecode(Family):
    """Split-KV decode with balanced pieces found on the device and the merge fused into the last arrival.

    Splitting the KV length and merging by LSE follows Flash-Decoding (Dao et al., 2023).
    """

    name = "triton-decode"
    kind = "cuda"
    source = TEMPLATES / "triton" / "decode.py.j2"
    shared = tuple(TEMPLATES / "triton" / n for n in ("worklist.j2", "pages.j2", "fp8.j2", "merge.j2"))

    def check(self, spec: KernelSpec, target: Target) -> None:
        """Raise ``Unsupported`` for what this template cannot do."""
        if target.kind not in ("cuda", "hip"):
            raise Unsupported(f"target {target.name}: {self.name} renders for GPUs")
        if spec.op is not Op.DECODE:
            raise Unsupported(f"op {spec.op}: {self.name} is for decode")
        if spec.q_dtype is DType.F32:
            raise Unsupported("q_dtype f32: GPU decode takes f16 or bf16 queries")
        if spec.k_inner is not KInner.DIM:
            raise Unsupported("k_inner token: GPU decode reads K with head_dim innermost (k_inner dim)")

    def fields(self, spec: KernelSpec, target: Target) -> tuple[Field, ...]:
        """Tile, warps, stages, waves, how page ids are loaded, and how FP8 is decoded."""
        decodes: tuple[Choice, ...] = ("none",)
        if spec.kv_dtype.is_fp8:
            decodes = ("cvt", "bits") if target.fp8_convert and target.kind == "cuda" else ("bits",)
            if target.kind == "hip":
                decodes = ("plain",)
        return (
            Field("tile", (16, 32, 64, 128, 256), 64, "tokens worked on at a time"),
            Field("num_warps", (1, 2, 4, 8), 4, "warps of a program"),
            Field("num_stages", (1, 2, 3, 4, 5), 3, "depth of the load pipeline"),
            Field("waves", (1, 2, 3, 4, 6, 8), 4, "pieces aimed at for each SM"),
            Field("ids", ("gather", "page", "scalar"), self._ids(spec, 64), "how block ids are loaded"),
            Field("prefetch_ids", (0, 1), 1, "load block ids one tile ahead of K and V"),
            Field("seq_lanes", (32, 128, 1024), 128, "sequences whose lengths are scanned at a time"),
            Field("fp8_decode", decodes, decodes[0], "how FP8 becomes float16"),
        )

    @staticmethod
    def _ids(spec: KernelSpec, tile: int) -> str:
        if spec.block_size % tile == 0:
            return "scalar"
        if tile % spec.block_size == 0 and spec.block_size >= 8:
            return "page"
        return "gather"

    def constraints(self) -> tuple[Constraint, ...]:
        """Legality over the symbols: addressing, shared memory, registers, warps."""
        import sympy

        tile, bs, warps, stages = sympy.symbols("tile block_size num_warps num_stages", integer=True)
        is_scalar, is_page, prefetch = sympy.symbols("is_scalar is_page prefetch_ids", integer=True)
        smem, smem_limit, acc_regs = sympy.symbols("smem_bytes smem_per_block acc_regs")
        return (
            Constraint(
                "scalar-ids",
                sympy.Or(sympy.Eq(is_scalar, 0), sympy.Eq(sympy.Mod(bs, tile), 0)),
                "one block id a tile needs tiles that lie inside one block",
            ),
            Constraint(
                "page-ids",
                sympy.Or(
                    sympy.Eq(is_page, 0), sympy.And(sympy.Eq(sympy.Mod(tile, bs), 0), bs >= 2, tile > bs)
                ),
                "one id a block needs tiles that span whole blocks",
            ),
            Constraint(
                "gather-ids",
                sympy.Or(sympy.Eq(is_scalar + is_page, 1), sympy.Ne(sympy.Mod(bs, tile), 0)),
                "one id a token is never better where one id a tile is possible",
            ),
            Constraint("smem", smem <= smem_limit, "K and V tiles of all stages fit in shared memory"),
            Constraint("registers", acc_regs <= 160, "accumulators and a decoded tile fit in registers"),
            Constraint("warps", 16 * warps <= tile, "every warp has at least 16 tokens of a tile"),
            Constraint("stages", sympy.Or(sympy.Eq(prefetch, 1), stages >= 1), "stages count from 1"),
        )

    def costs(self) -> tuple[Cost, ...]:
        """Bytes, FLOPs, shared memory, occupancy, instruction slots and time."""
        import sympy

        s = sympy.Symbol
        kv_bytes, bandwidth, sms = s("kv_bytes"), s("bandwidth_gbs"), s("num_sms")
        tiles, pieces, warps = s("tiles"), s("pieces"), s("num_warps")
        regs = s("acc_regs") + s("address_regs") + 48
        blocks_by_smem = sympy.floor(s("smem_per_sm") / (s("smem_bytes") + 1024))
        blocks_by_regs = sympy.floor(s("regs_per_sm") / (regs * 32 * warps))
        blocks_by_threads = sympy.floor(s("max_threads_per_sm") / (32 * warps))
        occupancy = s("occupancy")
        inflight = s("inflight_bytes")
        return (
            Cost("regs", "a thread", regs, "estimated registers: accumulators, addresses, the rest"),
            Cost(
                "occupancy",
                "blocks/SM",
                sympy.Max(1, sympy.Min(blocks_by_smem, blocks_by_regs, blocks_by_threads, 32)),
                "resident programs an SM",
            ),
            Cost("flops", "FLOP", s("mma_flops"), "matrix products on padded rows"),
            Cost(
                "inflight_bytes",
                "B/SM",
                occupancy * sympy.Max(s("stages_in_flight"), sympy.Rational(1, 2)) * s("tile_bytes"),
                "bytes in flight an SM, which the latency must be covered with",
            ),
            Cost(
                "memory_us",
                "µs",
                kv_bytes / (bandwidth * 1000) * (1 + s("latency_bytes") / (4 * inflight)),
                "reading K and V once, slower when too little is in flight (Little's law)",
            ),
            Cost(
                "issue_us",
                "µs",
                tiles * s("slots_per_tile") / (sms * 4 * s("clock_mhz")),
                "instruction issue at four slots an SM and cycle",
            ),
            Cost(
                "tail",
                "ratio",
                sympy.Max(1, sympy.ceiling(pieces / (sms * occupancy)) * sms * occupancy / pieces)
                ** sympy.Rational(1, 4),
                "uneven last wave, softened because the running programs share the bandwidth",
            ),
            Cost(
                "time_us",
                "µs",
                sympy.Max(s("memory_us"), s("issue_us")) * s("tail")
                + s("piece_us") * sympy.ceiling(pieces / (sms * occupancy))
                + s("launch_us"),
                "the slower of memory and issue, plus what every piece and launch costs",
            ),
        )

    def symbols(
        self, spec: KernelSpec, target: Target, schedule: Schedule, workload: Workload
    ) -> Mapping[str, float]:
        """Numbers behind the symbols. Instruction counts were read off compiled loops (docs/kernels.md)."""
        tile, warps, stages = schedule.int("tile"), schedule.int("num_warps"), schedule.int("num_stages")
        prefetch, ids = schedule.int("prefetch_ids"), str(schedule["ids"])
        width = sum(load.width for load in loads_of(spec)) * (2 if spec.kv_dtype.is_fp8 else 1)
        tile_bytes = 2 * tile * spec.head_dim * spec.kv_dtype.size
        padded_bytes = 2 * tile * width * spec.kv_dtype.size
        programs = spec.num_kv_heads * head_blocks(spec)
        partitions = max(1, cdiv(target.num_sms * schedule.int("waves"), programs))
        total = max(1, workload.num_tokens)
        chunk = max(cdiv(cdiv(total, partitions), tile) * tile, self._min_chunk(tile))
        pieces = sum(cdiv(n, chunk) for n in workload.seq_lens) * programs
        tiles = sum(cdiv(n, tile) for n in workload.seq_lens) * programs
        # Buffers that the pipeline really holds: block ids loaded in the same iteration eat a stage.
        buffers = max(1, stages - 1) if prefetch else max(1, stages - 2)
        stages_in_flight = 0 if stages == 1 else (stages - 1 if prefetch else max(1, stages - 3))
        rows = block_h(spec)
        # Issue slots of one 64-token tile of 128 columns on 4 warps, scaled by the tile's size.
        base = {"none": 1100.0, "cvt": 1200.0, "bits": 1300.0, "plain": 2900.0}[str(schedule["fp8_decode"])]
        per_id = {"gather": 0.0, "page": -130.0, "scalar": -220.0}[ids]
        slots = (base + per_id) * (tile / 64) * (0.35 + 0.65 * width / 128) + 110.0 * warps
        slots *= 1 + 0.4 * (rows / 16 - 1)
        return {
            "tile": tile,
            "block_size": spec.block_size,
            "num_warps": warps,
            "num_stages": stages,
            "prefetch_ids": prefetch,
            "is_scalar": int(ids == "scalar"),
            "is_page": int(ids == "page"),
            "smem_bytes": padded_bytes * buffers + rows * tile * 2 + 2048,
            "smem_per_block": target.smem_per_block,
            "smem_per_sm": target.smem_per_sm,
            "regs_per_sm": target.regs_per_sm,
            "max_threads_per_sm": target.max_threads_per_sm,
            "acc_regs": rows * width / (32 * warps)
            + padded_bytes / spec.kv_dtype.size / (2 * 32 * warps) / 2,
            "address_regs": tile * width * spec.kv_dtype.size / 16 * 2 / (32 * warps) * 2,
            "kv_bytes": workload.kv_bytes(spec),
            "bandwidth_gbs": target.bandwidth_gbs * 0.92,  # reads reach 92% of the published DRAM rate
            "num_sms": target.num_sms,
            "tiles": tiles,
            "pieces": max(1, pieces),
            "stages_in_flight": stages_in_flight,
            "tile_bytes": tile_bytes,
            "latency_bytes": target.bandwidth_gbs * 700 / target.num_sms,  # GB/s x 700 ns an SM
            "mma_flops": 4.0 * rows * width * tiles * tile,
            "slots_per_tile": slots,
            "clock_mhz": 1700,
            # finding a piece scans seq_lens twice, at a memory latency (0.7 us) for every seq_lanes of them
            "piece_us": 0.8
            + 1.4
            * cdiv(workload.num_seqs, schedule.int("seq_lanes"))
            * (1.0 if schedule.int("seq_lanes") > 32 else 0.7),
            "launch_us": 2.5,
        }

    @staticmethod
    def _min_chunk(tile: int) -> int:
        return max(256, tile)  # shorter pieces cost more in merging than they gain in balance

    def context(
        self,
        spec: KernelSpec,
        target: Target,
        schedule: Schedule,
    ) -> Mapping[str, object]:
        """Literals for the Jinja source."""
        is_fp8 = spec.kv_dtype.is_fp8
        parts = parts_of(spec)
        decode = str(schedule["fp8_decode"])
        row_scaled = is_fp8 and spec.q_dtype is DType.BF16
        tile = schedule.int("tile")
        rows = min(block_h(spec), spec.group_size)
        merge_rows, merge_dims = next_power_of_two(rows), next_power_of_two(spec.head_dim)
        # 96 values a thread in flight while merging: measured on an H100, 16 pieces read 4 at a time took 3 us
        at_once = 96 * 32 * schedule.int("num_warps") // (merge_rows * merge_dims)
        return {
            "spec": spec,
            "target": target,
            "schedule": schedule,
            "entry": "paged_decode",
            "is_fp8": is_fp8,
            "kv_dtype": spec.kv_dtype.value,
            "scale_per_head": spec.kv_scale is KVScale.HEAD,
            "fp8_decode": decode,
            "decode_factor": 256 if decode != "cvt" and spec.kv_dtype is DType.FP8_E4M3 else 1,
            "compute_type": "tl.float16" if is_fp8 else TRITON_TYPES[spec.kv_dtype],
            "out_type": TRITON_TYPES[spec.q_dtype],
            "row_scaled": row_scaled,
            "head_dim": spec.head_dim,
            "block_size": spec.block_size,
            "group_size": spec.group_size,
            "block_h": block_h(spec),
            "head_blocks": head_blocks(spec),
            "rows": rows,
            "merge_rows": merge_rows,
            "merge_dims": merge_dims,
            "merge_pieces_at_once": min(32, 1 << max(0, at_once.bit_length() - 1)),
            "merge_lse_pieces": 32,
            "align": kv_align(spec) // (2 if is_fp8 else spec.kv_dtype.size),
            "loads": loads_of(spec),
            "parts": parts,
            "tile": tile,
            "num_stages": schedule.int("num_stages"),
            "addressing": str(schedule["ids"]),
            "pages_per_tile": max(1, tile // spec.block_size),
            "prefetch_ids": bool(schedule.int("prefetch_ids")),
            "seq_lanes": schedule.int("seq_lanes"),
            "min_chunk": self._min_chunk(tile),
        }


FAMILY = TritonDecode()
