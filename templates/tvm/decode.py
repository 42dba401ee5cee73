"""``tvm-decode``: paged decode on CPUs, TIR for TVM's LLVM backend.

The kernel is a plain C function over the tiles of one (sequence, KV head); the launcher owns threads, the
split of the batch and the merge. The method is online softmax (Milakov and Gimelshein, 2018) with split-KV
merging (Flash-Decoding, 2023); what is particular to CPUs is said in the template and at the fields below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pagedgen.templates.family import TEMPLATES, Constraint, Cost, Family, Field
from pagedgen.templates.tvm.vectors import (
    LEVELS,
    NOMINAL_GBS,
    NOMINAL_GHZ,
    STORAGE,
    bf16_table,
    check_arch,
    divisors,
    horner,
    interleave,
    largest,
    nearest,
    powers,
    sum_tree,
    symbol_of,
    token_inner,
)
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import DType, KernelSpec
from pagedgen.values.target import Target
from pagedgen.values.workload import Workload

LINE_BYTES = 64
PREFETCH_LEVELS = {"l1": 3, "l2": 2}


def dot_allowed(spec: KernelSpec, target: Target, lanes: int) -> bool:
    """Whether bf16 dot products compute this spec: q is bf16 (a wider one loses bits), vectors fill up."""
    if not LEVELS[target.arch].bf16_dot or spec.q_dtype is not DType.BF16:
        return False
    if spec.kv_dtype.is_fp8:  # two rows of V are widened 32 elements at a time
        return lanes == 16 and spec.head_dim % (32 if token_inner(spec) else 64) == 0 == spec.v_dim % 32
    return token_inner(spec) or spec.head_dim % (2 * lanes) == 0


class TvmDecode(Family):
    """One query token a sequence, on a CPU."""

    name = "tvm-decode"
    kind = "cpu"
    source = TEMPLATES / "tvm" / "decode.py.j2"
    masks = ("window", "logits_soft_cap", "sinks", "alibi", "attention_chunk")
    v_dims = True
    invariant = True  # with sequences cut into parts by their own length
    shared: tuple[Path, ...] = (
        TEMPLATES / "tvm" / "vectors.py",
        TEMPLATES / "tvm" / "vectors.j2",
        TEMPLATES / "tvm" / "functions.ll.j2",
        TEMPLATES / "launcher" / "cpu_decode.cc.j2",
    )

    def check(self, spec: KernelSpec, target: Target) -> None:
        """Every decode spec is covered; the target has to be an instruction-set level that is known."""
        check_arch(target)

    def fields(self, spec: KernelSpec, target: Target) -> tuple[Field, ...]:
        """Tile, register blocks, prefetching, and the way products are formed."""
        level, group, inner = LEVELS[target.arch], spec.group_size, token_inner(spec)
        widest = max(4, level.bits // 32)
        lanes = tuple(n for n in powers(4, widest) if spec.head_dim % n == 0)[-1:]
        if inner and lanes[0] < widest:  # K is read along tokens, where wide vectors always fit
            lanes = (*lanes, widest)
        dots = ("f32", "bf16") if any(dot_allowed(spec, target, n) for n in lanes) else ("f32",)
        heads = divisors(group, 16)
        k_heads = heads if inner else powers(1, min(lanes[-1], group))
        k_vectors = (1, 2, 4) if inner else (1,)
        row = spec.v_dim // math.gcd(lanes[-1], spec.v_dim)  # vectors in a row of V
        v_vectors = divisors(row, 16)
        # The defaults are what was fastest on Zen 4. K is decoded once, for all heads of the group. V is read
        # in whole rows, as it lies in memory, though it is decoded again for every two heads: 1.1x half rows.
        # fp8 and wide groups are bound by compute: four heads at once, all of a group of 16, where V then is
        # decoded once.
        # What a sequence's last tile has too many is computed with nothing left to read beside it: 64 tokens
        # instead of 128 gained 5 to 7% at 1,057 tokens (minima), and lost nothing at 1,152, with 4 streams.
        half, short = level.registers // 2, inner and level.bits == 512
        k_head = nearest(k_heads, half if inner else 4)
        fp8 = spec.kv_dtype.is_fp8
        v_wanted = max(4 if fp8 else 1, half // v_vectors[-1], group // 4)
        v_most = level.registers - 3  # heads of which one vector each, and an operand, fit
        v_head = largest(heads, v_most) if group >= 16 and not fp8 else nearest(heads, v_wanted)
        parts = (
            Field("part", (256, 512, 1024), 512, "tokens of a part of a sequence, at least"),
            Field("max_parts", (16, 64), 16, "parts of a sequence, at most"),
        )
        return (
            Field("lanes", lanes, lanes[-1], "float32 lanes of a vector"),
            Field("tile", (16, 32, 64, 128), 64 if fp8 or short else 128, "tokens processed together"),
            Field("dot", dots, dots[-1], "products in float32 (FMA) or on bf16 pairs (vdpbf16ps)"),
            Field("k_heads", k_heads, k_head, "query heads of the register block of q @ K^T"),
            Field(
                "k_vectors", k_vectors, largest(k_vectors, half // k_head), "vectors of tokens of that block"
            ),
            Field("v_heads", heads, v_head, "query heads of the register block of p @ V"),
            Field(
                "v_vectors",
                v_vectors,
                largest(v_vectors, half // v_head),
                "vectors of head_dim of that block",
            ),
            Field(
                "streams",
                (2, 4, 8),
                4 if short and not fp8 else 8,
                "places of the tile from which rows of V are read in turn",
            ),
            Field("ahead", (0, 1, 2), 1, "tiles between a read and its prefetch; 0: no prefetching"),
            Field("into", ("l1", "l2"), "l2", "the cache that is prefetched into"),
            *(parts if spec.batch_invariant else ()),
        )

    def constraints(self) -> tuple[Constraint, ...]:
        """Blocks must divide what they tile and fit in the vector registers."""
        import sympy
        from sympy import Eq, Le, Mod, Or

        s = sympy.Symbol
        return (
            Constraint("dim_lanes", Eq(Mod(s("v_dim"), s("v_block")), 0), "V blocks divide a row of V"),
            Constraint("tile_lanes", Eq(Mod(s("tile"), s("k_block")), 0), "K blocks divide the tile"),
            Constraint(
                "k_registers",
                Le(s("k_accumulators") + s("k_operands"), s("registers")),
                "the register block of q @ K^T does not spill",
            ),
            Constraint(
                "v_registers",
                Le(s("v_accumulators") + s("v_operands"), s("registers")),
                "the register block of p @ V does not spill",
            ),
            Constraint("dot", Le(s("dot"), s("dot_allowed")), "bf16 products only where they lose nothing"),
            Constraint(
                "pairs",
                Or(Eq(s("dot"), 0), Eq(Mod(s("v_vectors"), s("v_chunk")), 0)),
                "fp8 V is widened two at a time",
            ),
            Constraint(
                "one_off", Or(Le(1, s("ahead")), Eq(s("into_l1"), 0)), "without prefetching its level is moot"
            ),
        )

    def costs(self) -> tuple[Cost, ...]:
        """Bytes over bandwidth against vector instructions over their rate; estimates, never measurements."""
        import sympy
        from sympy import Max, Min

        s = sympy.Symbol
        rows = s("num_tokens") * s("num_kv_heads") / s("lanes")
        of_k, of_v = rows * s("head_dim"), rows * s("v_dim")  # vectors
        loads = s("convert") * s("group") * (of_k / s("k_heads") + of_v / s("v_heads"))
        products = (of_k + of_v) * s("group") / (1 + s("dot"))
        broadcasts = products / 2 * (1 / s("k_vectors") + 1 / s("v_vectors")) / 2
        softmax = 20 * s("num_tokens") * s("num_kv_heads") * s("group") / s("lanes")
        rescale = 2 * s("group") * of_v / s("tile")
        partials = 4 * s("partials") * s("group") * s("v_dim") / s("lanes")
        lookahead = Min(1, sympy.Rational(1, 2) + s("ahead") * s("tile") * s("row_bytes") / 16384)
        return (
            Cost("bytes", "B", s("kv_bytes"), "K and V read once"),
            Cost(
                "instructions",
                "vector instructions",
                loads + products + broadcasts + softmax + rescale + partials,
                "loads and conversions, products, broadcasts, softmax, rescaling of the sums, merges",
            ),
            Cost(
                "memory_us",
                "us",
                s("bytes") / (s("bandwidth_gbs") * lookahead) / 1000,
                "late prefetches halve it",
            ),
            Cost(
                "compute_us",
                "us",
                s("instructions") * s("lanes") * 32 / s("vector_bits") / (s("num_cores") * s("ghz") * 1000),
                "one full vector instruction a cycle and core",
            ),
            Cost(
                "time_us",
                "us",
                Max(s("memory_us"), s("compute_us")) + 5,
                "the slower of the two, and the call",
            ),
        )

    def symbols(
        self, spec: KernelSpec, target: Target, schedule: Schedule, workload: Workload
    ) -> Mapping[str, float]:
        """The number behind every symbol."""
        level, shape = LEVELS[target.arch], Shape.of(spec, target, schedule)
        wide = max(1, 32 * shape.lanes // level.bits)  # registers a vector takes
        inner, dot, fp8 = token_inner(spec), shape.dot, spec.kv_dtype.is_fp8
        accumulators = shape.k_heads * shape.k_vectors if inner else shape.lanes
        if dot:
            convert = 0.8 if fp8 else 1.0
        else:
            convert = {"f32": 1.0, "f16": 1.0, "bf16": 2.0}.get(spec.kv_dtype.value, 3.0)
        return {
            "num_tokens": workload.num_tokens,
            "kv_bytes": workload.kv_bytes(spec),
            "num_kv_heads": spec.num_kv_heads,
            "head_dim": spec.head_dim,
            "v_dim": spec.v_dim,
            "partials": num_parts(spec, schedule, workload) * spec.num_kv_heads,
            "group": spec.group_size,
            "row_bytes": spec.head_dim * spec.kv_dtype.size,
            "unit": shape.unit,
            "lanes": shape.lanes,
            "tile": shape.tile,
            "dot": int(dot),
            "dot_allowed": int(dot_allowed(spec, target, shape.lanes)),
            "k_heads": shape.k_heads,
            "k_vectors": shape.k_vectors,
            "v_heads": shape.v_heads,
            "v_vectors": shape.v_vectors,
            "v_block": shape.v_vectors * shape.v_lanes,
            "v_chunk": 2 if fp8 else 1,
            "k_block": shape.k_vectors * shape.lanes,
            "ahead": schedule.int("ahead"),
            "streams": schedule.int("streams"),
            "token_inner": int(inner),
            "into_l1": int(schedule["into"] == "l1"),
            "registers": level.registers,
            "vector_bits": level.bits,
            "k_accumulators": accumulators * wide,
            "k_operands": (shape.k_vectors if inner else 1) * wide + 1 + 5 * int(dot and fp8),
            "v_accumulators": shape.v_heads * shape.v_vectors * wide,
            "v_operands": wide + 1 + 5 * int(dot and fp8),
            "convert": convert,
            "num_cores": target.num_sms,
            "bandwidth_gbs": target.bandwidth_gbs or NOMINAL_GBS * target.num_sms,
            "ghz": NOMINAL_GHZ,
        }

    def context(self, spec: KernelSpec, target: Target, schedule: Schedule) -> Mapping[str, object]:
        """Names of the template: capitals are numbers that are rendered as literals."""
        shape = Shape.of(spec, target, schedule)
        inner, fp8, lanes, element = token_inner(spec), spec.kv_dtype.is_fp8, shape.lanes, spec.kv_dtype.size
        rows = (4 if fp8 else 2) if shape.dot else 1
        step = max(rows, min(8, LINE_BYTES // (shape.unit * element))) if inner else 1
        # Lines of a unit of K along tokens: several rows share one, or a row has several.
        line_rows = 1 << min(3, max(1, LINE_BYTES // (spec.block_size * element)).bit_length() - 1)
        line_cols = max(1, shape.unit * element // LINE_BYTES)
        low, high = bf16_table(spec.kv_dtype) if fp8 else ([], [])
        if fp8:
            storage = "uint8" if shape.dot else "int8" if spec.kv_dtype is DType.FP8_E4M3 else "uint8"
        else:
            storage = STORAGE[spec.kv_dtype]
        octets = [(x, o, y, j) for x in range(4) for o in range(2) for y in range(4) for j in range(2)]
        return {
            "spec": spec,
            "schedule": schedule,
            "target": target,
            "symbol": symbol_of(spec, schedule),
            "token_inner": inner,
            "fp8": fp8,
            "dot": shape.dot,
            "Q": STORAGE[spec.q_dtype],
            "KV": storage,
            "GAIN": 256.0 if spec.kv_dtype is DType.FP8_E4M3 and not shape.dot else 1.0,
            "G": spec.group_size,
            "bounded": spec.window is not None or spec.attention_chunk is not None,
            "D": spec.head_dim,
            "DV": spec.v_dim,
            "L": lanes,
            "QL": math.gcd(lanes, spec.head_dim),
            "VL": shape.v_lanes,
            "PL": min(lanes, shape.tile // 2),
            "TILE": shape.tile,
            "U": shape.unit,
            "N": shape.tile // shape.unit,
            "A": schedule.int("ahead") * shape.tile // shape.unit,
            "KH": shape.k_heads,
            "KB": shape.k_vectors,
            "VH": shape.v_heads,
            "VB": shape.v_vectors,
            "S": schedule.int("streams"),
            "W": min(shape.unit, lanes),
            "ROWS": rows,
            "STEP": step,
            "LINE_ROWS": line_rows,
            "LINE_COLS": line_cols,
            "UNIT_LINES": spec.head_dim // line_rows * line_cols,
            "LINE": LINE_BYTES // element,
            "CHUNK": 64 if fp8 else 2 * lanes,
            "level": PREFETCH_LEVELS[str(schedule["into"])],
            "poly": horner("x[i]"),
            "interleave": interleave,
            "mix_k": [(2 * o + j) * 16 + 4 * x + y for x, o, y, j in octets]
            if fp8
            else interleave(0, lanes, lanes),
            "mix_v": [j * 32 + o * 16 + 4 * x + y for x, o, y, j in octets],
            "dot_lanes": sorted({lanes, shape.v_lanes}),
            "tree": [] if inner else sum_tree(lanes),
            "table": {"low": low, "high": high} if fp8 else {},
            "unpack_low": [64 * b + 16 * x + y for x in range(4) for y in range(8) for b in range(2)],
            "unpack_high": [64 * b + 16 * x + 8 + y for x in range(4) for y in range(8) for b in range(2)],
        }


def num_parts(spec: KernelSpec, schedule: Schedule, workload: Workload) -> int:
    """The parts that a batch-invariant kernel cuts all sequences into, for each KV head; 0 of another."""
    if not spec.batch_invariant:
        return 0
    tile, parts = schedule.int("tile"), 0
    for length in workload.seq_lens:
        tiles = -(-(length - spec.visible(length - 1, length).start) // tile) if length else 0
        part = max(schedule.int("part") // tile, -(-tiles // schedule.int("max_parts")))
        parts += -(-tiles // part)
    return parts


@dataclass(frozen=True, slots=True)
class Shape:
    """The geometry that a schedule gives a kernel; see the glossary of the template."""

    lanes: int
    v_lanes: int  # the widest vector that divides a row of V
    tile: int
    unit: int  # contiguous tokens: as much of a block as a tile can take
    k_heads: int
    k_vectors: int
    v_heads: int
    v_vectors: int
    dot: bool

    @classmethod
    def of(cls, spec: KernelSpec, target: Target, schedule: Schedule) -> Shape:
        """Derived from the schedule's fields; the target is not needed beyond them."""
        lanes, tile = schedule.int("lanes"), schedule.int("tile")
        return cls(
            lanes=lanes,
            v_lanes=math.gcd(lanes, spec.v_dim),
            tile=tile,
            unit=math.gcd(spec.block_size, tile),
            k_heads=schedule.int("k_heads"),
            k_vectors=schedule.int("k_vectors"),
            v_heads=schedule.int("v_heads"),
            v_vectors=schedule.int("v_vectors"),
            dot=schedule["dot"] == "bf16",
        )


FAMILY = TvmDecode()
