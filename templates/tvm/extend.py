"""``tvm-extend``: prompts, chunks and decodes over paged KV on CPUs, TIR for TVM's LLVM backend.

A query tile holds rows of one sequence and one KV head, a row being a query token and one head of the GQA
group. Tiles of K and V are converted once for a query tile and met by its rows in blocks that stay in the L1
cache; the method is FlashAttention-2's (Dao, 2023). What is particular to CPUs is said in the template.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pagedgen.templates.family import TEMPLATES, Constraint, Cost, Family, Field
from pagedgen.templates.tvm.vectors import (
    LEVELS,
    NOMINAL_GHZ,
    STORAGE,
    check_arch,
    high_of,
    horner,
    interleave,
    largest,
    low_of,
    symbol_of,
    token_inner,
)
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import Causality, DType, KernelSpec
from pagedgen.values.target import Target
from pagedgen.values.workload import Workload


class TvmExtend(Family):
    """Any number of queries a sequence, on a CPU."""

    name = "tvm-extend"
    kind = "cpu"
    source = TEMPLATES / "tvm" / "extend.py.j2"
    masks: tuple[str, ...] = ("window", "logits_soft_cap", "sinks", "alibi", "attention_chunk", "causality")
    v_dims = True
    # A query tile is one thread's, tiles of K and V begin at multiples of their length, and what a row does
    # not see adds nothing to it.
    invariant = True
    shared: tuple[Path, ...] = (
        TEMPLATES / "tvm" / "vectors.py",
        TEMPLATES / "tvm" / "vectors.j2",
        TEMPLATES / "tvm" / "functions.ll.j2",
        TEMPLATES / "launcher" / "cpu_ragged.h.j2",
        TEMPLATES / "launcher" / "cpu_extend.cc.j2",
    )

    def check(self, spec: KernelSpec, target: Target) -> None:
        """Every extend spec is covered; the target has to be an instruction-set level that is known."""
        check_arch(target)

    def fields(self, spec: KernelSpec, target: Target) -> tuple[Field, ...]:
        """Tiles, register blocks, and the way products are formed."""
        level = LEVELS[target.arch]
        dots = ("f32", "bf16") if dot_allowed(spec, target) else ("f32",)
        # Pairs double the products of an instruction, but not everywhere their rate.
        vectors = (1, 2, 3, 4)
        panels = tuple(n for n in (4, 8) if n < level.registers // 2)
        return (
            Field("tile", (32, 64, 128), 64, "tokens of K and V that are converted together"),
            Field("blocks", (1, 2, 4, 8), 8, "blocks of rows of a query tile, at most"),
            Field(
                "dot",
                dots,
                dots[-1] if target.fast_bf16_dots else "f32",
                "products in float32 (FMA) or on bf16 pairs (vdpbf16ps)",
            ),
            Field("vectors", vectors, 3, "vectors of rows of a block"),
            Field(
                "k_rows",
                panels,
                largest(panels, level.registers // 4),
                "tokens of the register block of K @ Q^T",
            ),
            Field(
                "v_rows",
                panels,
                largest(panels, level.registers // 4),
                "dims of the register block of V^T @ p",
            ),
        )

    def constraints(self) -> tuple[Constraint, ...]:
        """Register blocks fit in the registers and hide their latency, scratch fits in the cache."""
        import sympy
        from sympy import Le

        s = sympy.Symbol
        spare = s("vectors") + 1  # operands
        return (
            Constraint(
                "k_registers",
                Le(s("k_rows") * s("vectors") + spare, s("registers")),
                "the register block of K @ Q^T does not spill",
            ),
            Constraint(
                "v_registers",
                Le(s("v_rows") * s("vectors") + spare, s("registers")),
                "the register block of V^T @ p does not spill",
            ),
            Constraint("latency", Le(6, s("k_rows") * s("vectors")), "products enough to hide their latency"),
            Constraint("cache", Le(s("scratch_bytes"), 1 << 20), "a thread's scratch stays in its L2 cache"),
        )

    def costs(self) -> tuple[Cost, ...]:
        """Vector instructions over their rate; estimates, never measurements."""
        import sympy
        from sympy import Max

        s = sympy.Symbol
        pairs = s("pairs") * s("num_q_heads")  # of rows and tokens
        per_tile = s("tokens_met") * s("num_kv_heads")  # tokens of K and V that query tiles convert
        return (
            Cost(
                "products",
                "vector instructions",
                pairs * (s("head_dim") + s("v_dim")) / s("lanes") / (1 + s("dot")),
                "both matrix products",
            ),
            Cost(
                "operands",
                "vector loads",
                s("products") * ((1 / s("k_rows") + 1 / s("v_rows")) / 2 + 1 / s("vectors")),
                "rows, and elements of K and V that are broadcast",
            ),
            Cost("softmax", "vector instructions", 22 * pairs / s("lanes"), "exponentials, maxima and sums"),
            Cost(
                "conversion",
                "vector instructions",
                per_tile * (s("head_dim") + s("v_dim")) * s("convert") / 4,
                "K and V, once for a query tile",
            ),
            Cost(
                "transposes",
                "instructions",
                2 * s("rows") * (s("head_dim") + s("v_dim")),
                "Q and the output, whose rows become lanes",
            ),
            Cost(
                "compute_us",
                "us",
                (
                    Max(s("products"), s("operands")) / s("per_cycle") * s("lanes") * 32 / s("vector_bits")
                    + s("softmax") / 2
                    + s("conversion")
                    + s("transposes")
                )
                / (s("cores") * s("ghz") * 1000),
                "products at the rate of the units, the rest beside them",
            ),
            Cost("time_us", "us", s("compute_us") + 5, "and the call"),
        )

    def symbols(
        self, spec: KernelSpec, target: Target, schedule: Schedule, workload: Workload
    ) -> Mapping[str, float]:
        """The number behind every symbol."""
        level, shape = LEVELS[target.arch], Shape.of(spec, target, schedule)
        met, tiles = 0.0, 0
        for queries, tokens in zip(workload.lens_of_queries, workload.seq_lens, strict=True):
            count = -(-queries * spec.group_size // shape.rows)
            seen = tokens if spec.causality is Causality.FULL else tokens - queries / 2
            for reach in (spec.window, spec.attention_chunk):
                seen = seen if reach is None else min(tokens, reach)
            met, tiles = met + count * seen, tiles + count
        return {
            "pairs": workload.flops(spec) / (2 * (spec.head_dim + spec.v_dim) * spec.num_q_heads),
            "tokens_met": met,
            "rows": sum(workload.lens_of_queries) * spec.num_q_heads,
            "num_q_heads": spec.num_q_heads,
            "num_kv_heads": spec.num_kv_heads,
            "head_dim": spec.head_dim,
            "v_dim": spec.v_dim,
            "lanes": shape.lanes,
            "dot": int(shape.dot),
            "vectors": shape.vectors,
            "k_rows": shape.k_rows,
            "v_rows": shape.v_rows,
            "registers": level.registers,
            "vector_bits": level.bits,
            "per_cycle": 1 if level.bits == 512 else 2,
            "scratch_bytes": shape.scratch_bytes,
            "convert": {"f32": 1.0, "f16": 1.5, "bf16": 1.5}.get(spec.kv_dtype.value, 3.0),
            "cores": min(target.num_sms, max(1, tiles * spec.num_kv_heads)),
            "ghz": NOMINAL_GHZ,
        }

    def context(self, spec: KernelSpec, target: Target, schedule: Schedule) -> Mapping[str, object]:
        """Names of the template: capitals are numbers that are rendered as literals."""
        shape = Shape.of(spec, target, schedule)
        unit = math.gcd(spec.block_size, shape.tile)
        if spec.kv_dtype.is_fp8:
            storage = "int8" if spec.kv_dtype is DType.FP8_E4M3 else "uint8"
        else:
            storage = STORAGE[spec.kv_dtype]
        return {
            "spec": spec,
            "schedule": schedule,
            "target": target,
            "symbol": symbol_of(spec, schedule),
            "token_inner": token_inner(spec),
            "dot": shape.dot,
            "Q": STORAGE[spec.q_dtype],
            "KV": storage,
            "GAIN": 256.0 if spec.kv_dtype is DType.FP8_E4M3 else 1.0,
            "G": spec.group_size,
            "chunk": spec.attention_chunk,
            "ahead": spec.causality is not Causality.CAUSAL,
            "bounded": spec.window is not None or spec.attention_chunk is not None,
            "ends": spec.attention_chunk is not None or spec.causality is not Causality.CAUSAL,
            "D": spec.head_dim,
            "DV": spec.v_dim,
            "B": spec.block_size,
            "L": shape.lanes,
            "PL": shape.lanes,
            "C": shape.vectors,
            "CW": shape.vectors * shape.lanes,
            "M": shape.rows,
            "TILE": shape.tile,
            "R": shape.k_rows,
            "RV": shape.v_rows,
            "GRAIN": 2 * shape.k_rows,
            "U": unit,
            "W": math.gcd(unit, max(shape.k_rows, shape.lanes)),
            "KL": math.gcd((2 if shape.dot else 1) * shape.lanes, spec.head_dim),
            "VL": math.gcd(shape.v_dim, shape.lanes),
            "DL": math.gcd(shape.lanes, spec.v_dim),
            "poly": horner("x[i]"),
            "interleave": interleave,
            "turns": [1 << n for n in range(shape.lanes.bit_length() - 1)],
            "low_of": low_of,
            "high_of": high_of,
            "dot_lanes": [shape.lanes],
            "tree": [],
            "table": {},
            "A": False,
        }


@dataclass(frozen=True, slots=True)
class Shape:
    """The geometry that a schedule gives a kernel; see the glossary of the template."""

    lanes: int
    vectors: int  # of a block of rows
    rows: int  # of a query tile
    tile: int
    k_rows: int
    v_rows: int
    dot: bool
    head_dim: int
    v_dim: int

    @classmethod
    def of(cls, spec: KernelSpec, target: Target, schedule: Schedule) -> Shape:
        """Derived from the schedule's fields and the width of the target's vectors."""
        widest, vectors = LEVELS[target.arch].bits // 32, schedule.int("vectors")
        lanes = int(dict(schedule.choices).get("lanes", widest))  # verify chooses
        return cls(
            lanes=lanes,
            vectors=vectors,
            rows=schedule.int("blocks") * vectors * lanes,
            tile=schedule.int("tile"),
            k_rows=schedule.int("k_rows"),
            v_rows=schedule.int("v_rows"),
            dot=schedule["dot"] == "bf16",
            head_dim=spec.head_dim,
            v_dim=spec.v_dim,
        )

    @property
    def packed_bytes(self) -> tuple[int, int, int, int]:
        """Bytes of a thread's scratch: Q, a tile of K, a tile of V, the sums of p * V."""
        size = 2 if self.dot else 4
        q, k, v = self.rows * self.head_dim, self.tile * self.head_dim, self.tile * self.v_dim
        return q * size, k * size, v * size, self.rows * self.v_dim * 4

    @property
    def state(self) -> int:
        """Floats that verify keeps of a query tile: sums of p * V, maximal scores and sums of p."""
        return self.rows * (self.v_dim + 2)

    @property
    def scratch_bytes(self) -> int:
        """All of them."""
        return sum(self.packed_bytes)


def dot_allowed(spec: KernelSpec, target: Target) -> bool:
    """Whether bf16 dot products compute this spec: q is bf16, a wider one loses bits."""
    return LEVELS[target.arch].bf16_dot and spec.q_dtype is DType.BF16


FAMILY = TvmExtend()
