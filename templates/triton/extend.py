"""Extend on GPUs: the schedule space, legality and cost of ``extend.py.j2``."""

from __future__ import annotations

from collections.abc import Mapping

from pagedgen.errors import Unsupported
from pagedgen.templates.family import TEMPLATES, Constraint, Cost, Family, Field
from pagedgen.templates.triton.decode import (
    TRITON_TYPES,
    Load,
    bounded,
    cdiv,
    kv_align,
    loads_of,
    width_of,
)
from pagedgen.templates.triton.tile_cost import call_costs, reads_smem, tile_costs, tile_symbols
from pagedgen.values.schedule import Choice, Schedule
from pagedgen.values.spec import Causality, DType, KernelSpec, KInner, KVScale, Op
from pagedgen.values.target import Target
from pagedgen.values.workload import Workload, visible_pairs

LEVELS = 16  # of reach that tiles are sorted into: programs that end a call are within 1/16 of the longest


def operands(spec: KernelSpec, loads: tuple[Load, ...]) -> tuple[tuple[str, int], ...]:
    """The matrix products' operands, (name, width), in their order: a load's columns or their halves."""
    halves = ("_even", "_odd") if spec.kv_dtype.is_fp8 else ("",)
    return tuple((f"{i}{half}", load.width) for i, load in enumerate(loads) for half in halves)


def sees(spec: KernelSpec) -> str:
    """What queries see, in words for a kernel's head."""
    words = {
        Causality.CAUSAL: "causal",
        Causality.FULL: "not causal",
        Causality.PER_SEQUENCE: "causal where the call says so",
    }[spec.causality]
    words += f", a window of {spec.window}" if spec.window else ""
    return words + (f", chunks of {spec.attention_chunk}" if spec.attention_chunk else "")


def distance(spec: KernelSpec) -> str:
    """Source text of how far a tile's tokens are from the rows' own, for ALiBi."""
    ahead = (
        spec.causality is not Causality.CAUSAL or spec.tree_mask
    )  # tokens behind a row's own are seen, too
    away = "positions[:, None] - pos - tokens[None, :]"
    return f"tl.abs({away})" if ahead else away


def rows_context(
    spec: KernelSpec, loads: tuple[Load, ...], v_loads: tuple[Load, ...]
) -> Mapping[str, object]:
    """What extend's and verify's templates share beside the tile: masks, columns of K and of V."""
    own = "" if spec.head_dim_v is None else "v_"  # names of V's columns, where they are not K's
    return {
        "bounded": bounded(spec),
        "per_sequence": spec.causality is Causality.PER_SEQUENCE,
        "sees": sees(spec),
        "distance": distance(spec),
        "loads": loads,
        "v_loads": v_loads,
        "v_col": f"{own}col",
        "v_dims": f"{own}dim",
        "parts": operands(spec, loads),
        "v_parts": operands(spec, v_loads),
    }


class TritonExtend(Family):
    """Attention of ragged query runs, rows of a GQA group packed into the tile.

    Tiled online softmax with the unmasked loop apart from the causal diagonal follows FlashAttention-2 (Dao,
    2023).
    """

    name = "triton-extend"
    kind = "cuda"
    source = TEMPLATES / "triton" / "extend.py.j2"
    shared = tuple(TEMPLATES / "triton" / n for n in ("extend_tiles.j2", "pages.j2", "fp8.j2", "masks.j2"))
    masks = ("window", "logits_soft_cap", "sinks", "alibi", "attention_chunk", "causality")
    v_dims = True
    # A tile's row computes what it would alone: KV tiles begin at multiples of their length, and those that
    # it does not see add nothing.
    invariant = True
    # ptxas keeps the shared-memory addresses of Q in registers that it then spills: 352 B are 59 of the 875
    # instructions of a 128 x 64 tile of 4 warps, and two such programs fit on an SM, where 8 warps are one.
    spill_bytes = 512

    def check(self, spec: KernelSpec, target: Target) -> None:
        """Raise ``Unsupported`` for what this template cannot do."""
        if target.kind not in ("cuda", "hip"):
            raise Unsupported(f"target {target.name}: {self.name} renders for GPUs")
        if spec.op is not Op.EXTEND:
            raise Unsupported(f"op {spec.op}: {self.name} is for extend")
        if spec.q_dtype is DType.F32:
            raise Unsupported("q_dtype f32: GPU extend takes f16 or bf16 queries")
        if spec.k_inner is not KInner.DIM:
            raise Unsupported("k_inner token: GPU extend reads K with head_dim innermost (k_inner dim)")

    def fields(self, spec: KernelSpec, target: Target) -> tuple[Field, ...]:
        """Tile, warps, stages, how page ids are loaded, and how FP8 is decoded.

        The defaults on sm_90 were the fastest of 78 (16 bits) and 50 (fp8) schedules on an H100 for most of
        five batches at head_dim 128; elsewhere they issue the fewest instructions for a pair of a query and
        a key among the tiles that do not spill.
        """
        decodes: tuple[Choice, ...] = ("none",)
        if spec.kv_dtype.is_fp8:
            decodes = ("cvt", "bits") if target.fp8_convert and target.kind == "cuda" else ("bits",)
            if target.kind == "hip":
                decodes = ("plain",)
        width = max(width_of(spec, loads_of(spec, 1, 16, of_v=v)) for v in (False, True))
        # Where matrix products read K and V from shared memory, registers are left for a longer tile.
        from_smem = reads_smem(target)
        tile = 64 if width <= 128 or from_smem else 32
        tile_m, warps, stages = 128, 8, 2
        measured = from_smem and width <= 128
        if measured:
            tile_m, warps = 64, 4
            tile, stages = (128, 2) if spec.kv_dtype.is_fp8 else (64, 3)
        return (
            Field("tile_m", (16, 32, 64, 128, 256), tile_m, "rows of a query tile"),
            Field("tile", (16, 32, 64, 128), tile, "KV tokens worked on at a time"),
            Field("num_warps", (1, 2, 4, 8), warps, "warps of a program"),
            Field("num_stages", (1, 2, 3, 4), stages, "depth of the load pipeline"),
            Field("ids", ("gather", "page", "scalar"), self._ids(spec, tile), "how block ids are loaded"),
            Field("prefetch_ids", (0, 1), int(measured), "load block ids one tile ahead of K and V"),
            Field("seq_lanes", (32, 128), 32, "sequences whose lengths are scanned at a time"),
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

        tile, bs, warps = sympy.symbols("tile block_size num_warps", integer=True)
        is_scalar, is_page, tile_m = sympy.symbols("is_scalar is_page tile_m", integer=True)
        smem, smem_limit, regs = sympy.symbols("smem_bytes smem_per_block tile_regs")
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
            Constraint(
                "smem", smem <= smem_limit, "Q, and K and V tiles of all stages, fit in shared memory"
            ),
            Constraint("registers", regs <= 232, "accumulators and scores fit in registers"),
            Constraint("warps", 16 * warps <= tile_m, "warps share a tile's rows, 16 each"),
        )

    def costs(self) -> tuple[Cost, ...]:
        """What a tile takes, what all of them do, and what bounds a call."""
        import sympy

        s = sympy.Symbol
        return (
            *tile_costs(),
            *call_costs(),
            Cost("flops", "FLOP", s("tiles") * s("tile_flops"), "products, masked and padded rows included"),
            Cost(
                "time_us",
                "µs",
                s("launch_us")
                + sympy.Max(
                    s("issue_us"), sympy.sqrt(s("mma_us") ** 2 + s("chain_us") ** 2 + s("memory_us") ** 2)
                ),
                "products, waiting and reading overlap as chance has it, so their squares add up; "
                "instructions are issued meanwhile",
            ),
        )

    def symbols(
        self, spec: KernelSpec, target: Target, schedule: Schedule, workload: Workload
    ) -> Mapping[str, float]:
        """Numbers behind the symbols: those of a tile, and how many of them a batch makes."""
        tile, tile_m = schedule.int("tile"), schedule.int("tile_m")
        warps, stages = schedule.int("num_warps"), schedule.int("num_stages")
        ids, group = str(schedule["ids"]), spec.group_size
        width, v_width = (width_of(spec, loads_of(spec, 1, 16, of_v=v)) for v in (False, True))
        rows = max(1.0, tile_m / group)  # query tokens of a tile
        programs, tiles, longest, memory = 0, 0.0, 1, 0
        for seq_len, q_len in zip(workload.seq_lens, workload.lens_of_queries, strict=True):
            if not q_len:
                continue
            mine = cdiv(q_len * group, tile_m)
            # A tile's rows see all that its last row sees; tiles of KV are begun whole.
            seen = visible_pairs(spec, q_len, seq_len) / q_len + (rows - 1) / 2
            programs += mine
            tiles += mine * (min(seen, seq_len) / tile + 0.5)
            last = spec.visible(seq_len - 1, seq_len)
            longest = max(longest, cdiv(len(last), tile))
            memory += seq_len - spec.visible(seq_len - q_len, seq_len).start
        # Without ids ahead, two tiles have room however many stages there are (compiled, sm_90). mma.sync
        # takes its operands to registers, and a stage less.
        buffers: float = max(1, stages if schedule.int("prefetch_ids") else min(2, stages))
        if not (reads_smem(target) and warps % 4 == 0 and tile_m >= 64):
            buffers = max(1, stages - 1)
        if stages == 1 and not spec.kv_dtype.is_fp8:
            buffers = 0.5  # V's place is K's
        return {
            **tile_symbols(
                spec,
                target,
                tile_m=tile_m,
                tile=tile,
                warps=warps,
                buffers=buffers,
                widths=(width, v_width),
                decode=str(schedule["fp8_decode"]),
                addresses=ids,
                other_regs=0,
            ),
            "block_size": spec.block_size,
            "is_scalar": int(ids == "scalar"),
            "is_page": int(ids == "page"),
            "tile_regs": tile_m * (v_width + tile) / (32 * warps),
            "kv_bytes": float(memory * spec.kv_bytes_per_token),
            "programs": max(1, programs * spec.num_kv_heads),
            "tiles": max(1.0, tiles * spec.num_kv_heads),
            "longest": longest,
            "launch_us": 5.3,
            # finding a tile scans all sequences' lengths twice, the loads of each pass waited for
            "program_us": 4.5 + 0.8 * cdiv(workload.num_seqs, schedule.int("seq_lanes")),
            "program_slots": 12.0,
        }

    def context(
        self,
        spec: KernelSpec,
        target: Target,
        schedule: Schedule,
    ) -> Mapping[str, object]:
        """Literals for the Jinja source."""
        is_fp8 = spec.kv_dtype.is_fp8
        decode = str(schedule["fp8_decode"])
        tile = schedule.int("tile")
        return {
            "spec": spec,
            "target": target,
            "schedule": schedule,
            "entry": "paged_extend",
            "is_fp8": is_fp8,
            "kv_dtype": spec.kv_dtype.value,
            "scale_per_head": spec.kv_scale is KVScale.HEAD,
            "fp8_decode": decode,
            "decode_factor": 256 if decode != "cvt" and spec.kv_dtype is DType.FP8_E4M3 else 1,
            "compute_type": "tl.float16" if is_fp8 else TRITON_TYPES[spec.kv_dtype],
            "out_type": TRITON_TYPES[spec.q_dtype],
            "row_scaled": is_fp8 and spec.q_dtype is DType.BF16,
            "block_size": spec.block_size,
            "group_size": spec.group_size,
            "num_kv_heads": spec.num_kv_heads,
            "align": kv_align(spec) // (2 if is_fp8 else spec.kv_dtype.size),
            **rows_context(spec, loads_of(spec, 1, 16), loads_of(spec, 1, 16, of_v=True)),
            "per_word": 2 if is_fp8 else 1,  # elements
            "tile_m": schedule.int("tile_m"),
            "tile": tile,
            "num_stages": schedule.int("num_stages"),
            "addressing": str(schedule["ids"]),
            "pages_per_tile": max(1, tile // spec.block_size),
            "prefetch_ids": bool(schedule.int("prefetch_ids")),
            "seq_lanes": schedule.int("seq_lanes"),
            "levels": LEVELS,
        }


FAMILY = TritonExtend()
