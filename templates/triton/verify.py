"""Verify on GPUs: the schedule space, legality and cost of ``verify.py.j2``."""

from __future__ import annotations

from collections.abc import Mapping

from pagedgen.errors import Unsupported
from pagedgen.templates.family import TEMPLATES, Constraint, Cost, Family, Field
from pagedgen.templates.triton.decode import (
    TRITON_TYPES,
    addressing,
    bounded,
    cdiv,
    kv_align,
    loads_of,
    next_power_of_two,
    width_of,
)
from pagedgen.templates.triton.extend import rows_context
from pagedgen.templates.triton.tile_cost import call_costs, reads_smem, tile_costs, tile_symbols
from pagedgen.values.schedule import Choice, Schedule
from pagedgen.values.spec import DType, KernelSpec, KInner, KVScale, Op
from pagedgen.values.target import Target
from pagedgen.values.workload import Workload

QUERIES = 8  # of a sequence, that the default tile holds the rows of


class TritonVerify(Family):
    """Split-KV attention of a few queries a sequence: decode's pieces, with extend's rows in the tile.

    Splitting the KV length and merging by LSE follows Flash-Decoding (Dao et al., 2023).
    """

    name = "triton-verify"
    kind = "cuda"
    source = TEMPLATES / "triton" / "verify.py.j2"
    shared = tuple(
        TEMPLATES / "triton" / n
        for n in ("verify_pieces.j2", "worklist.j2", "pages.j2", "fp8.j2", "merge.j2", "masks.j2")
    )
    masks = ("window", "logits_soft_cap", "sinks", "alibi", "attention_chunk", "causality", "tree_mask")
    v_dims = True

    def check(self, spec: KernelSpec, target: Target) -> None:
        """Raise ``Unsupported`` for what this template cannot do."""
        if target.kind not in ("cuda", "hip"):
            raise Unsupported(f"target {target.name}: {self.name} renders for GPUs")
        if spec.op is not Op.VERIFY:
            raise Unsupported(f"op {spec.op}: {self.name} is for verify")
        if spec.q_dtype is DType.F32:
            raise Unsupported("q_dtype f32: GPU verify takes f16 or bf16 queries")
        if spec.k_inner is not KInner.DIM:
            raise Unsupported("k_inner token: GPU verify reads K with head_dim innermost (k_inner dim)")

    def fields(self, spec: KernelSpec, target: Target) -> tuple[Field, ...]:
        """Tile, warps, stages, waves, and how a tile is computed.

        The defaults were the fastest of 11 (16 bits) and 8 (fp8) schedules on an H100 for 64 sequences of 8
        queries and 4096 tokens, 32/8 heads, head_dim 128; elsewhere they are estimates.
        """
        decodes: tuple[Choice, ...] = ("none",)
        if spec.kv_dtype.is_fp8:
            decodes = ("cvt",) if target.fp8_convert and target.kind == "cuda" else ("bits",)
            if target.kind == "hip":
                decodes = ("plain",)
        # More rows than these leave too few registers: accumulators of 4 warps take rows x head_dim / 128.
        most = 64 if max(spec.head_dim, spec.v_dim) <= 128 else 32
        rows = min(most, max(16, next_power_of_two(QUERIES * spec.group_size)))
        # The rows of 16 queries where wgmma takes 64 at once: on an H100 64 x 8 of 4096 takes 367 us with
        # either, 64 x 16 takes 372 for 497, 8 x 64 takes 109 for 230.
        if target.arch == "sm_90" and not spec.kv_dtype.is_fp8 and rows == 32 and most == 64:
            rows = 64
        # 202 us with two warps, 238 with four (on an H100, the batch above); 64 rows spill with two
        few = spec.kv_dtype.is_fp8 and rows <= 32 and max(spec.head_dim, spec.v_dim) <= 128
        return (
            Field("tile_m", (16, 32, 64, 128), rows, "rows of a query tile"),
            Field("tile", (16, 32, 64, 128), 64, "KV tokens worked on at a time"),
            Field("num_warps", (1, 2, 4, 8), 2 if few else 4, "warps of a program"),
            Field("num_stages", (2, 3, 4), 3, "depth of the load pipeline"),
            # 3 for two warps: 64 x 8 of 4096 takes 202 us with either, 16 x 4 takes 67 for 86
            Field("waves", (1, 2, 3, 4, 6, 8), 3 if few else 2, "pieces aimed at for each SM"),
            Field("merge", (32, 96), 32, "values a thread reads at once while merging"),
            Field("seq_lanes", (128, 1024), 128, "sequences whose lengths are scanned at a time"),
            Field("fp8_decode", decodes, decodes[0], "how FP8 becomes float16"),
        )

    def constraints(self) -> tuple[Constraint, ...]:
        """Legality over the symbols: shared memory, registers, warps."""
        import sympy

        tile, warps, tile_m = sympy.symbols("tile num_warps tile_m", integer=True)
        smem, smem_limit, regs = sympy.symbols("smem_bytes smem_per_block tile_regs")
        return (
            Constraint(
                "smem", smem <= smem_limit, "Q, and K and V tiles of all stages, fit in shared memory"
            ),
            Constraint("registers", regs <= 200, "accumulators, scores and a decoded tile fit in registers"),
            Constraint(
                "warps",
                sympy.Or(tile_m >= 64, 16 * warps <= tile),
                "warps share a tile's tokens, 16 each, unless the rows are enough to share",
            ),
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
                "merge_us",
                "µs",
                s("merge_turn_us") * s("merge_turns") + s("merge_kb_us") * s("merged_kb"),
                "the last program of a query tile reads what the others left",
            ),
            Cost(
                "time_us",
                "µs",
                s("launch_us")
                + sympy.Max(
                    s("issue_us"), sympy.sqrt(s("mma_us") ** 2 + s("chain_us") ** 2 + s("memory_us") ** 2)
                )
                + s("merge_us"),
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
        width, v_width = (width_of(spec, loads_of(spec, warps, tile_m, of_v=v)) for v in (False, True))
        partitions = max(1, cdiv(target.num_sms * schedule.int("waves"), spec.num_kv_heads))
        lens: list[tuple[int, int]] = []  # KV tokens worked on, query tiles that work on them
        for seq_len, q_len in zip(workload.seq_lens, workload.lens_of_queries, strict=True):
            skipped = spec.visible(seq_len - q_len, seq_len).start // tile * tile if bounded(spec) else 0
            lens.append((seq_len - skipped, cdiv(q_len * spec.group_size, tile_m)))
        total = sum(n * count for n, count in lens)
        chunk = max(cdiv(cdiv(max(1, total), partitions), tile) * tile, self._min_chunk(tile))
        pieces = sum(cdiv(n, chunk) * count for n, count in lens) * spec.num_kv_heads
        tiles = sum(cdiv(n, tile) * count for n, count in lens) * spec.num_kv_heads
        splits = cdiv(max(n for n, _ in lens), chunk)
        longest = max(cdiv(cdiv(n, max(1, cdiv(n, chunk))), tile) for n, _ in lens)
        wgmma = reads_smem(target) and warps % 4 == 0 and tile_m >= 64
        return {
            **tile_symbols(
                spec,
                target,
                tile_m=tile_m,
                tile=tile,
                warps=warps,
                buffers=stages if wgmma else max(1, stages - 1),
                widths=(width, v_width),
                decode=str(schedule["fp8_decode"]),
                addresses=addressing(spec, tile),
                other_regs=32 if wgmma else 62,
            ),
            "tile_regs": (tile_m * (v_width + tile) + tile * max(width, v_width) / 2) / (32 * warps),
            "kv_bytes": float(sum(n for n, count in lens if count) * spec.kv_bytes_per_token),
            "programs": max(1, pieces),
            "tiles": max(1, tiles),
            "longest": max(1, longest),
            "launch_us": 3.0,
            "program_us": 6.5 + 0.8 * cdiv(workload.num_seqs, schedule.int("seq_lanes")),
            "program_slots": 12.0,
            "merge_turn_us": 0.33,
            # two at a time, they are summed across warps: 50 us more for 32 parts of 32 rows
            "merge_turns": splits * (1 if self._parts_at_once(spec, schedule) == 1 else 5)
            if splits > 1
            else 0,
            "merge_kb_us": 0.016,  # 1 KB of one program
            "merged_kb": splits * tile_m * spec.v_dim * 4 / 1024 if splits > 1 else 0.0,
        }

    @staticmethod
    def _parts_at_once(spec: KernelSpec, schedule: Schedule) -> int:
        """Parts that are read at a time."""
        values = schedule.int("tile_m") * next_power_of_two(spec.v_dim)  # of one
        at_once = schedule.int("merge") * 32 * schedule.int("num_warps") // values
        return min(32, 1 << max(0, at_once.bit_length() - 1))

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
        decode = str(schedule["fp8_decode"])
        tile, tile_m = schedule.int("tile"), schedule.int("tile_m")
        loads, v_loads = (loads_of(spec, schedule.int("num_warps"), tile_m, of_v=v) for v in (False, True))
        merge_dims = next_power_of_two(spec.v_dim)
        return {
            "spec": spec,
            "target": target,
            "schedule": schedule,
            "entry": "paged_verify",
            "is_fp8": is_fp8,
            "kv_dtype": spec.kv_dtype.value,
            "scale_per_head": spec.kv_scale is KVScale.HEAD,
            "fp8_decode": decode,
            "decode_factor": 256 if decode != "cvt" and spec.kv_dtype is DType.FP8_E4M3 else 1,
            "compute_type": "tl.float16" if is_fp8 else TRITON_TYPES[spec.kv_dtype],
            "out_type": TRITON_TYPES[spec.q_dtype],
            "row_scaled": is_fp8 and spec.q_dtype is DType.BF16,
            "v_dim": spec.v_dim,
            "block_size": spec.block_size,
            "group_size": spec.group_size,
            "num_kv_heads": spec.num_kv_heads,
            "align": kv_align(spec) // (2 if is_fp8 else spec.kv_dtype.size),
            **rows_context(spec, loads, v_loads),
            "per_word": 2 if is_fp8 else 1,  # elements
            "tile_m": tile_m,
            "tile": tile,
            "num_stages": schedule.int("num_stages"),
            "addressing": addressing(spec, tile),
            "pages_per_tile": max(1, tile // spec.block_size),
            "seq_lanes": schedule.int("seq_lanes"),
            "min_chunk": self._min_chunk(tile),
            "split": "pieces",  # where the merge finds a tile's partial results
            "rows": tile_m,
            "merge_rows": tile_m,
            "merge_dims": merge_dims,
            "parts_across_lanes": merge_dims < 128,  # 32 lanes, 4 values each, take one part's row otherwise
            "merge_parts_at_once": self._parts_at_once(spec, schedule),
        }


FAMILY = TritonVerify()
