"""Decode on GPUs: the schedule space, legality and cost of ``decode.py.j2``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pagedgen.errors import Unsupported
from pagedgen.templates.family import TEMPLATES, Constraint, Cost, Family, Field
from pagedgen.values.schedule import Choice, Schedule
from pagedgen.values.spec import DType, KernelSpec, KInner, KVScale, Op
from pagedgen.values.target import Target
from pagedgen.values.workload import Workload

# Programs that share a sequence. An H100 has room for too few clusters of 16 at once (1 x 8k took 24 us in
# fp16, not 18); of 2 and 4, a long sequence among short ones would be left to that many programs a KV head.
CLUSTER = 8
CLUSTER_MERGES = 6  # parts whose merging through global memory takes as long as a cluster's: a guess
TURNED = 8  # query heads of a tile where they are a product's columns, which come in eights
TRITON_TYPES = {DType.F16: "tl.float16", DType.BF16: "tl.bfloat16", DType.F32: "tl.float32"}


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def block_h(spec: KernelSpec) -> int:
    """Query-head rows of a tile: the group padded to the matrix instruction's 16 rows.

    At most 128, and no more than leave rows x head_dim accumulators in the registers of 8 warps; a larger
    group takes several programs, which read the same K and V.
    """
    most = min(128, 16384 // next_power_of_two(max(spec.head_dim, spec.v_dim)))
    return min(most, max(16, next_power_of_two(spec.group_size)))


def head_blocks(spec: KernelSpec) -> int:
    """Programs that share the query heads of one KV head."""
    return cdiv(spec.group_size, block_h(spec))


def kv_align(spec: KernelSpec) -> int:
    """Bytes that K's and V's pointers and strides are multiples of: 16 where the lengths of rows allow it."""
    rows = (spec.head_dim | spec.v_dim) * spec.kv_dtype.size
    return min(16, rows & -rows)


def bounded(spec: KernelSpec) -> bool:
    """Whether a window or a chunk bounds what a query sees: tiles before it are skipped."""
    return spec.window is not None or spec.attention_chunk is not None


def addressing(spec: KernelSpec, tile: int, shares: int = 1) -> str:
    """A tile's block ids: one for all of it (scalar), one a block (page), or one a token (gather).

    ``shares``: equal ones that the tile's tokens are dealt out in, whole blocks each for ``page``.
    """
    if spec.block_size % tile == 0:
        return "scalar"
    if tile // shares % spec.block_size == 0 and spec.block_size > 1:
        return "page"
    return "gather"


def cluster_of(schedule: Schedule) -> int:
    """Programs of a cluster, which share a sequence and merge among themselves; 0 where none do."""
    return CLUSTER if schedule["split"] == "cluster" else 0


def box_bytes(spec: KernelSpec, schedule: Schedule) -> int:
    """Shared memory into which a program of a cluster is sent partial results (``cluster.j2``), whole KB."""
    cluster = cluster_of(schedule)
    if not cluster:
        return 0
    sources = cluster * schedule.int("num_warps") * min(block_h(spec), spec.group_size)
    return cdiv(4 * sources * (spec.v_dim // cluster + 2), 1024) * 1024


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

    def mask(self, columns: str) -> str:
        """Source text of which elements of a tile of q or out are real, in the columns of that name."""
        return "row_ok[:, None]" if self.full else f"row_ok[:, None] & {columns}_ok[None, :]"


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix-product operand cut from a load: all its columns, or the even or odd half of its words."""

    name: str
    width: int


def loads_of(
    spec: KernelSpec, num_warps: int, rows: int, *, whole: bool = False, of_v: bool = False
) -> tuple[Load, ...]:
    """Cover head_dim by power-of-two loads; columns that are padding are masked and cost no memory traffic.

    Of a row of K, or ``of_v``; one load of the ``whole`` row, or pieces that pad less.

    80 halves are 64 + 32, not 128. Where the padded rest is as wide as the first piece, one masked load costs
    the same and is simpler. With several warps, no piece is as narrow as the tile has rows: Triton spreads
    warps over the longer side of a product, and 16 rows on 4 warps would repeat the whole tile in each of
    them (counted: 4 x the HMMAs).
    """
    dim = spec.v_dim if of_v else spec.head_dim
    columns = dim // 2 if spec.kv_dtype.is_fp8 else dim
    narrowest = 2 * rows if rows < 64 and num_warps > 1 else 16
    if columns <= narrowest:
        return (Load(0, narrowest, columns),)
    if whole:
        return (Load(0, next_power_of_two(columns), columns),)
    first = 1 << (columns.bit_length() - 1)
    rest = columns - first
    if not rest:
        return (Load(0, first, first),)
    padded = max(narrowest, next_power_of_two(rest))
    if padded >= first:
        return (Load(0, 2 * first, columns),)
    return (Load(0, first, first), Load(first, padded, rest))


def width_of(spec: KernelSpec, loads: Sequence[Load]) -> int:
    """Elements that the loads of a row cover, padding included."""
    return sum(load.width for load in loads) * (2 if spec.kv_dtype.is_fp8 else 1)


def parts_of(spec: KernelSpec, loads: Sequence[Load]) -> tuple[Part, ...]:
    """The matrix-product operands of the loads, in accumulation order."""
    parts = []
    for i, load in enumerate(loads):
        if spec.kv_dtype.is_fp8:
            parts.append(Part(f"{i}_even", load.width))
            parts.append(Part(f"{i}_odd", load.width))
        else:
            parts.append(Part(f"{i}", load.width))
    return tuple(parts)


class TritonDecode(Family):
    """Split-KV decode with balanced pieces found on the device and the merge fused into the last arrival.

    Splitting the KV length and merging by LSE follows Flash-Decoding (Dao et al., 2023).
    """

    name = "triton-decode"
    kind = "cuda"
    source = TEMPLATES / "triton" / "decode.py.j2"
    shared = tuple(
        TEMPLATES / "triton" / n
        for n in ("worklist.j2", "pages.j2", "fp8.j2", "ahead.j2", "merge.j2", "cluster.j2", "masks.j2")
    )
    masks = ("window", "logits_soft_cap", "sinks", "alibi", "attention_chunk")
    v_dims = True
    invariant = True
    launch_fields = ("waves",)

    def spills(self, spec: KernelSpec) -> int:
        """None; of a batch-invariant kernel 32 B, of what it uses between parts, each some tiles long."""
        return 32 if spec.batch_invariant else 0

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
        """Tile, warps, stages, waves, how the work is shared out, and how a tile is computed.

        The defaults were within 6% of the fastest for most specs at 32 x 8k on an H100.
        """
        decodes: tuple[Choice, ...] = ("none",)
        if spec.kv_dtype.is_fp8:
            decodes = ("cvt",) if target.fp8_convert and target.kind == "cuda" else ("bits",)
            if target.kind == "hip":
                decodes = ("plain",)
        # griddepcontrol came with sm_90
        pdl: tuple[Choice, ...] = (0, 1, 2) if target.kind == "cuda" and target.capability >= 90 else (0,)
        rows: tuple[Choice, ...] = (block_h(spec),)
        if target.kind == "cuda" and target.arch == "sm_90" and block_h(spec) == 32:
            rows = (32, 64)  # never the faster for 16
        if target.kind == "cuda" and spec.group_size <= TURNED:
            rows = (block_h(spec), TURNED)
        several = any(len(loads_of(spec, 1, block_h(spec), of_v=v)) > 1 for v in (False, True))
        columns: tuple[Choice, ...] = ("pieces", "whole") if several else ("pieces",)
        # Tiles of narrow heads are soon done: one warp needs no barriers, and many hide each other's waits.
        narrow = max(spec.head_dim, spec.v_dim) <= 64 and block_h(spec) == 16
        # A product sums the weights as they are rounded for V's. Outputs gain, since both err alike, but an
        # LSE of bfloat16's weights errs by 2^-9 where few tokens count: 0.0015 with ALiBi on an H100.
        sums: tuple[Choice, ...] = ("reduce", "dot")
        if spec.return_lse and spec.kv_dtype is DType.BF16:
            sums = ("reduce",)
        return (
            Field(
                "rows",
                rows,
                rows[0],
                "query heads of a tile: rows of its products; 8: columns, which come in eights; 64: wgmma, "
                "which reads shared memory",
            ),
            Field("columns", columns, columns[0], "head_dim as power-of-two pieces, or as one padded row"),
            Field(
                "tile",
                (16, 32, 64, 128),
                32 if narrow and spec.head_dim <= 32 else 64,
                "tokens worked on at a time",
            ),
            Field(
                "num_warps",
                (1, 2, 4, 8),
                1 if narrow else 4 if block_h(spec) > 16 else 2,
                "warps of a program",
            ),
            Field("num_stages", (2, 3, 4), 3 if narrow else 2, "depth of the load pipeline"),
            Field("waves", (1, 2, 3, 4, 6, 8), 3 if narrow else 2, "pieces aimed at for each SM"),
            *(self._split_fields(spec, target)),
            # 96 merge 16 parts 1.5 us sooner; 32 leave registers for a fifth program on an SM (184, not 254);
            # 128 read 16 parts of 8 heads at once, not 8: 1 x 8k in fp16 18.6 us, not 21.9
            Field("merge", (32, 96, 128), 32, "values a thread reads at once while merging"),
            Field("seq_lanes", (128, 1024), 128, "sequences whose lengths are scanned at a time"),
            Field("fp8_decode", decodes, decodes[0], "how FP8 becomes float16"),
            Field(
                "sums",
                sums,
                "dot" if spec.kv_dtype.is_fp8 else "reduce",
                "row sums: added, or p times ones",
            ),
            Field("max_regs", (0, 168), 0, "registers of a thread at most; 0: what the compiler likes"),
            Field(
                "pdl",
                pdl,
                0,
                "launched while the kernel before it drains (1), and looking for its work (2)",
            ),
        )

    @staticmethod
    def _split_fields(spec: KernelSpec, target: Target) -> tuple[Field, ...]:
        """How a batch is shared out; where bits may not follow from it, how a sequence is split."""
        meaning = "how a batch is shared out among programs"
        splits: tuple[Choice, ...] = ("pieces", "even", "walk")
        # clusters came with sm_90 and were run nowhere else; a warp has 32 rows of accumulators at most
        if target.kind == "cuda" and target.capability == 90 and block_h(spec) <= 32:
            splits += ("cluster",)
        if not spec.batch_invariant:
            return (Field("split", splits, "pieces", meaning),)
        return (
            Field("split", ("fixed",), "fixed", meaning),
            # two tiles at least: the masked one at a window's edge must not be a whole part
            Field(
                "part",
                (256, 512, 1024),
                512,
                "tokens of a part of a sequence at least; up to two are left whole",
            ),
            Field(
                "max_parts", (16, 32, 64), 32, "parts of a sequence at most; longer ones have longer parts"
            ),
        )

    def meaningless(self, choices: Mapping[str, Choice]) -> bool:
        """What ``walk``, ``ahead``, ``many_parts`` and ``cluster`` say of the choices alone."""
        if choices["split"] == "cluster":
            needless = choices["waves"] != 1 or choices["seq_lanes"] != 128 or choices["merge"] != 32
            return needless or choices["num_warps"] == 1
        if choices["split"] == "walk":
            return choices["seq_lanes"] != 128
        return choices["pdl"] == 2 or choices["merge"] == 128

    def constraints(self) -> tuple[Constraint, ...]:
        """Legality over the symbols: addressing, shared memory, registers, warps."""
        import sympy

        tile, warps = sympy.symbols("tile num_warps", integer=True)
        rows, waves = sympy.symbols("rows waves", integer=True)
        cluster = sympy.Symbol("cluster", integer=True)
        smem, smem_limit, acc_regs = sympy.symbols("smem_bytes smem_per_block acc_regs")
        return (
            Constraint("smem", smem <= smem_limit, "K and V tiles of all stages fit in shared memory"),
            Constraint(
                "registers",
                sympy.Symbol("base_regs") + acc_regs <= 232,
                "what every kernel needs, accumulators and a decoded tile fit in registers",
            ),
            Constraint(
                "walk",
                sympy.Or(sympy.Eq(sympy.Symbol("is_walk"), 0), sympy.Symbol("seq_lanes") <= 128),
                "walking from one sequence to the next has no lanes to choose",
            ),
            Constraint(
                "ahead",
                sympy.Or(
                    sympy.Symbol("pdl") <= 1,
                    sympy.And(sympy.Eq(sympy.Symbol("is_walk"), 1), waves <= 2),
                    cluster >= 1,
                ),
                "looking ahead is for few sequences, walked along, and for programs that run at once",
            ),
            Constraint(
                "many_parts",
                sympy.Or(sympy.Symbol("merge") <= 96, sympy.Eq(sympy.Symbol("is_walk"), 1)),
                "few sequences, walked along, have parts enough to read more of them at once",
            ),
            Constraint(
                "cluster",
                sympy.Or(
                    cluster < 1,
                    sympy.And(
                        sympy.Symbol("box_bytes") <= 49152,
                        sympy.Max(waves, sympy.Symbol("seq_lanes") / 128, sympy.Symbol("merge") / 32) <= 1,
                    ),
                ),
                "programs of a cluster merge equal shares of head_dim, sent to them in static shared memory; "
                "waves, seq_lanes and merge mean nothing to them",
            ),
            Constraint(
                "own_tokens",
                sympy.Or(
                    cluster < 1,
                    sympy.And(warps >= 2, rows <= 32, tile * sympy.Symbol("row_bytes") > 512 * warps**2),
                ),
                "several warps have tokens of their own, and products of one warp 32 rows at most; a warp "
                "has more tokens than all copy at once, else Triton lays the rows it reads in the same banks",
            ),
            Constraint(
                "turned",
                sympy.Or(rows > TURNED, cluster >= 1, 32 * warps <= sympy.Symbol("row_bytes")),
                "where query heads are columns, warps share the dims of V, 16 each",
            ),
            Constraint(
                "wgmma",
                sympy.Or(rows <= sympy.Symbol("least_rows"), warps >= 4),
                "rows are padded to 64 for wgmma alone, which four warps issue together",
            ),
            Constraint(
                "warps",
                sympy.Or(rows >= 64, 16 * warps <= tile),
                "warps share a tile's tokens, 16 each, unless the query heads are enough to share",
            ),
        )

    def costs(self) -> tuple[Cost, ...]:
        """Bytes, FLOPs, occupancy, and the times that bound a call; constants fitted as ``symbols`` says."""
        import sympy

        s = sympy.Symbol
        sms, warps, occupancy = s("num_sms"), s("num_warps"), s("occupancy")
        tiles, pieces, slots, clock = s("tiles"), s("pieces"), s("slots_per_tile"), s("clock_mhz")
        times = (s("memory_us"), s("issue_us"), s("chain_us"))
        return (
            Cost(
                "regs",
                "a thread",
                sympy.Min(s("max_regs"), s("base_regs") + 1.27 * s("acc_regs") + 0.2 * (s("merge") - 32)),
                "estimated registers: what every kernel needs, accumulators and a decoded tile, merging",
            ),
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
            Cost("flops", "FLOP", s("mma_flops"), "matrix products, padded rows included"),
            Cost(
                "memory_us",
                "µs",
                s("kv_bytes") / (s("bandwidth_gbs") * 1000),
                "reading K and V once at the bandwidth that reads reach",
            ),
            Cost(
                "issue_us",
                "µs",
                tiles * slots / (sms * 4 * clock * s("issue_rate")),
                "issuing all instructions on four schedulers an SM",
            ),
            Cost(
                "tile_us",
                "µs",
                sympy.Max(
                    s("sync_us") + slots / (sympy.Min(warps, 4) * clock * s("warp_rate")),
                    s("latency_us") / s("buffers"),
                ),
                "a tile of one program: its instructions, or a memory latency shared by the tiles in flight",
            ),
            Cost(
                "chain_us",
                "µs",
                sympy.ceiling(pieces / (sms * occupancy)) * tiles / pieces * s("tile_us"),
                "a program's tiles one after the other, times the rounds of programs an SM runs",
            ),
            Cost(
                "merge_us",
                "µs",
                s("merge_piece_us") * s("merged_pieces"),
                "the last program of a sequence reads what the others left",
            ),
            Cost(
                "time_us",
                "µs",
                s("launch_us")
                + s("scan_us") * sympy.sqrt(sympy.ceiling(pieces / (sms * occupancy)))
                + sum(t**4 for t in times) ** sympy.Rational(1, 4)
                + s("merge_us"),
                "what a call and its programs cost before and after, and the bounds joined by a 4-norm",
            ),
        )

    def symbols(
        self, spec: KernelSpec, target: Target, schedule: Schedule, workload: Workload
    ) -> Mapping[str, float]:
        """Numbers behind the symbols.

        Instruction slots of a 64-token tile were counted in compiled loops; rates, latency and fixed costs
        were fitted to 742 timings on an H100 (10 specs on 1 to 4 workloads, 2026-11-25): over them the
        predicted best is a median 3.2% slower than the measured best, at worst 34%.
        """
        tile, warps, stages = schedule.int("tile"), schedule.int("num_warps"), schedule.int("num_stages")
        ids, lanes = addressing(spec, schedule.int("tile")), schedule.int("seq_lanes")
        rows, whole = schedule.int("rows"), schedule["columns"] == "whole"
        loads, v_loads = (loads_of(spec, warps, rows, whole=whole, of_v=of_v) for of_v in (False, True))
        width, v_width = width_of(spec, loads), width_of(spec, v_loads)
        tile_bytes = tile * (width + v_width) * spec.kv_dtype.size
        programs = spec.num_kv_heads * head_blocks(spec)
        partitions = max(1, cdiv(target.num_sms * schedule.int("waves"), programs))
        lens = workload.seq_lens
        if bounded(spec):  # tiles before what the query sees are skipped
            lens = tuple(n - spec.visible(n - 1, n).start // tile * tile for n in lens)
        tiles = sum(cdiv(n, tile) for n in lens)  # of one KV head
        partial_bytes = 0
        if schedule["split"] == "even":
            share = max(1, cdiv(tiles, partitions))
            pieces, splits = cdiv(tiles, share), cdiv(cdiv(max(lens), tile), share) + 1
        elif cluster_of(schedule):
            pieces, splits = cluster_of(schedule) * len(lens), CLUSTER_MERGES
        elif schedule["split"] == "fixed":
            parts = [cdiv(n, self._part(schedule, n)) for n in lens]
            chunk = max(cdiv(cdiv(max(1, sum(lens)), partitions), tile) * tile, self._min_chunk(tile))
            pieces = sum(min(p, cdiv(n, chunk)) for p, n in zip(parts, lens, strict=True))
            splits = max(parts)
            partial_bytes = 8 * sum(parts) * spec.num_q_heads * spec.v_dim  # written, and read again
        else:
            chunk = cdiv(cdiv(max(1, sum(lens)), partitions), tile) * tile
            chunk = max(chunk, self._min_chunk(tile))
            pieces = sum(cdiv(n, chunk) for n in lens)
            splits = cdiv(max(lens), chunk)
        tiles, pieces = tiles * programs, pieces * programs
        buffers = max(1, stages - 1)  # tiles in flight, as compiled
        per_tile = {"none": 1000.0, "cvt": 1330.0, "bits": 1720.0, "plain": 2900.0}[
            str(schedule["fp8_decode"])
        ]
        per_tile += {"gather": 400.0, "page": 0.0, "scalar": -100.0}[ids] + (180.0 if warps >= 4 else 0.0)
        slots = per_tile * tile / 64 * (width + v_width) / 256 * (1 + 0.4 * (rows / 16 - 1)) + 100.0 * warps
        return {
            "tile": tile,
            "num_warps": warps,
            "rows": rows,
            "least_rows": block_h(spec),
            "pdl": schedule.int("pdl"),
            "waves": schedule.int("waves"),
            "is_walk": int(schedule["split"] == "walk"),
            "cluster": cluster_of(schedule),
            "row_bytes": 2 * min(load.width for load in (*loads, *v_loads)),
            "box_bytes": box_bytes(spec, schedule),
            "seq_lanes": lanes,
            "merge": schedule.int("merge"),
            "max_regs": schedule.int("max_regs") or 255,
            "base_regs": 66 if rows == TURNED else 104,  # queries and weights of 8 rows, not of 16
            "smem_bytes": tile_bytes * buffers + rows * tile * 2 + 2048 + box_bytes(spec, schedule),
            "smem_per_block": target.smem_per_block,
            "smem_per_sm": target.smem_per_sm,
            "regs_per_sm": target.regs_per_sm,
            "max_threads_per_sm": target.max_threads_per_sm,
            "acc_regs": rows * v_width / (32 * (1 if cluster_of(schedule) else warps))
            + tile_bytes / spec.kv_dtype.size / (2 * 32 * warps) / 2,
            "kv_bytes": sum(lens) * spec.kv_bytes_per_token + partial_bytes,
            "bandwidth_gbs": target.bandwidth_gbs
            * 0.88,  # reads reach 92% of the published rate, kernels 95%
            "num_sms": target.num_sms,
            "tiles": max(1, tiles),
            "pieces": max(1, pieces),
            "buffers": buffers,
            "mma_flops": 2.0 * rows * (width + v_width) * tiles * tile,
            "slots_per_tile": slots,
            "clock_mhz": 1755,
            "issue_rate": 0.38,  # instructions a scheduler and cycle
            "warp_rate": 0.39,  # instructions a warp and cycle
            "sync_us": 0.045,
            "latency_us": 1.15,
            "launch_us": 7.8,  # from 1 x 8k up, where ramping up the memory system counts in
            # walking: 1.1 us less than lanes for one sequence (measured), and for each more two loads from L1
            "scan_us": 0.9 + 0.08 * workload.num_seqs
            if schedule["split"] == "walk"
            # clusters wait for room together: 8 x 4k takes 6% (fp16) and 12% (fp8) longer than walking
            else 0.6 + 0.45 * workload.num_seqs
            if cluster_of(schedule)
            else 1.7 * cdiv(workload.num_seqs, lanes) * (1.2 if lanes > 32 else 1.0),
            "merge_piece_us": 0.133,
            "merged_pieces": splits if splits > 1 else 0,
        }

    @staticmethod
    def _ahead(spec: KernelSpec, schedule: Schedule) -> Mapping[str, object]:
        """Literals of looking ahead: tiles fetched, and the 128-byte lines of a row as a power of two.

        Of 16-bit rows two tiles, of fp8 none: in a first form of the kernel, 1 x 8k took 17.0 us with two and
        18.8 with none, in fp8 14.9 and 14.4.
        """
        size = spec.kv_dtype.size
        row_bytes = {spec.head_dim * size, spec.v_dim * size}
        return {
            "ahead": schedule.int("pdl") == 2,
            "tiles_ahead": 0 if size == 1 else 2,
            "kv_size": size,
            "lines_ahead": {n: next_power_of_two(cdiv(n, 128) + (n % 128 > 0)) for n in row_bytes},
        }

    @staticmethod
    def _shapes(tile: int, block_size: int, apart: int, turned: bool) -> Mapping[str, object]:
        """Literals of how a tile's tokens lie: in one row, or with ``apart`` warps in a row for each.

        Tensors of the loop then have one dimension more, the first, along which Triton lays out the warps.
        ``turned``: scores are [tokens, query heads] and results [dims, query heads].
        """
        # a vector as rows or columns: one that each warp has of its own, and one that is the same for all
        own, same = ("[:, :, None]", "[:, None, :]"), ("[None, :, None]", "[None, None, :]")
        if not apart:
            own = same = ("[:, None]", "[None, :]")
        heads, others = (1, 0) if turned else (0, 1)  # dimensions of scores, and of results

        def dealt(count: int) -> str:
            if not apart:
                return f"tl.arange(0, {count})"
            return f"(tl.arange(0, {apart})[:, None] * {count} + tl.arange(0, {count})[None, :])"

        share = tile // (apart or 1)
        return {
            "apart": apart,
            "own": f"{apart}, " if apart else "",
            "last_axis": others + (apart > 0),
            "of_rows": own[0],
            "of_dims": same[1],
            "of_heads": own[heads],
            "heads_of": same[heads],
            "k_row": own[others],
            "k_dim": same[heads],
            "v_row": own[heads],
            "v_across": same[others],
            "tile_shape": [apart, share] if apart else [tile],
            "tokens_of": dealt(share),
            "pages_of": dealt(max(1, share // block_size)),
        }

    @staticmethod
    def _sums_width(schedule: Schedule, turned: bool, apart: int) -> int:
        """Columns, or turned rows, of the ones that weights are multiplied with: enough for all warps."""
        warps, rows = schedule.int("num_warps"), schedule.int("rows")
        if apart or warps == 1 or rows >= 64:
            return 16
        return 16 * warps if turned else 2 * rows

    @staticmethod
    def _part(schedule: Schedule, tokens: int) -> int:
        """Tokens of a part of a sequence with ``fixed`` splits: what the kernel computes, too."""
        tile, part = schedule.int("tile"), schedule.int("part")
        if cdiv(tokens, tile) * tile <= 2 * part:
            return 2 * part
        return max(part, cdiv(cdiv(tokens, tile), schedule.int("max_parts")) * tile)

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
        loads, v_loads = (
            loads_of(
                spec,
                schedule.int("num_warps"),
                schedule.int("rows"),
                whole=schedule["columns"] == "whole",
                of_v=of_v,
            )
            for of_v in (False, True)
        )
        own = "" if spec.head_dim_v is None else "v_"  # names of V's columns, where they are not K's
        decode = str(schedule["fp8_decode"])
        row_scaled = is_fp8 and spec.q_dtype is DType.BF16
        tile = schedule.int("tile")
        rows = min(block_h(spec), spec.group_size)
        merge_rows, merge_dims = next_power_of_two(rows), next_power_of_two(spec.v_dim)
        cluster = cluster_of(schedule)
        turned = schedule.int("rows") == TURNED
        apart = schedule.int("num_warps") if cluster else 0  # warps with tokens and a softmax of their own
        cut = spec.v_dim // (cluster or 1)  # columns that a program of a cluster merges
        at_once = schedule.int("merge") * 32 * schedule.int("num_warps") // (merge_rows * merge_dims)
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
            "v_dim": spec.v_dim,
            "bounded": bounded(spec),
            "block_size": spec.block_size,
            "group_size": spec.group_size,
            "block_h": schedule.int("rows"),
            "head_blocks": head_blocks(spec),
            "programs": spec.num_kv_heads * head_blocks(spec),
            "rows": rows,
            "merge_rows": merge_rows,
            "merge_dims": merge_dims,
            "parts_across_lanes": False,
            "cluster": cluster,
            "sources": cluster * apart,
            "cut": cut,
            "cut_width": next_power_of_two(cut),
            "box_bytes": box_bytes(spec, schedule),
            "merge_parts_at_once": min(32, 1 << max(0, at_once.bit_length() - 1)),
            "kv_bytes": kv_align(spec),
            "align": kv_align(spec) // (2 if is_fp8 else spec.kv_dtype.size),
            "loads": loads,
            "v_loads": v_loads,
            "v_col": f"{own}col",
            "dims": "dim" if is_fp8 else "col",  # names of the columns of q, and of out
            "v_dims": f"{own}dim" if is_fp8 else f"{own}col",
            "words": 2 if is_fp8 else 1,  # elements in one
            "parts": parts_of(spec, loads),
            "v_parts": parts_of(spec, v_loads),
            "tile": tile,
            "num_stages": schedule.int("num_stages"),
            "split": str(schedule["split"]),
            "addressing": addressing(spec, tile, apart or 1),
            "pages_per_tile": max(1, tile // spec.block_size),
            **self._shapes(tile, spec.block_size, apart, turned),
            "turned": turned,
            "sums": str(schedule["sums"]),
            "sums_width": self._sums_width(schedule, turned, apart),
            "pdl": bool(schedule.int("pdl")),
            **self._ahead(spec, schedule),
            "seq_lanes": schedule.int("seq_lanes"),
            "min_chunk": self._min_chunk(tile),
            "part_tiles": schedule.int("part") // tile if spec.batch_invariant else 0,
            "max_parts": schedule.int("max_parts") if spec.batch_invariant else 0,
        }


FAMILY = TritonDecode()
