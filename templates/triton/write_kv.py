"""Writing K and V on GPUs: the schedule space, legality and cost of ``write_kv.py.j2``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pagedgen.errors import Unsupported
from pagedgen.templates.family import TEMPLATES, Constraint, Cost, Family, Field
from pagedgen.templates.fp8 import FORMATS
from pagedgen.templates.triton.decode import cdiv, next_power_of_two
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import DType, KernelSpec, KInner, KVScale, Op, Rope
from pagedgen.values.target import Target
from pagedgen.values.workload import Workload


class TritonWriteKV(Family):
    """A scatter of rows by slot, bound by memory."""

    name = "triton-write-kv"
    kind = "cuda"
    source = TEMPLATES / "triton" / "write_kv.py.j2"
    masks: tuple[str, ...] = ("rope", "checked")
    shared: tuple[Path, ...] = (
        TEMPLATES / "fp8.py",
        *(TEMPLATES / "triton" / name for name in ("quantise.j2", "checked.j2")),
    )

    def check(self, spec: KernelSpec, target: Target) -> None:
        """Raise ``Unsupported`` for what this template cannot do."""
        if target.kind not in ("cuda", "hip"):
            raise Unsupported(f"target {target.name}: {self.name} renders for GPUs")
        if spec.op is not Op.WRITE_KV:
            raise Unsupported(f"op {spec.op}: {self.name} is for write_kv")
        if spec.k_inner is not KInner.DIM:
            raise Unsupported("k_inner token: GPU write_kv stores K with head_dim innermost (k_inner dim)")

    def fields(self, spec: KernelSpec, target: Target) -> tuple[Field, ...]:
        """Rows and warps of a program.

        Turning K, small programs took 0.4 us less for 64 tokens on an H100, and 2% less for 8,192.
        """
        tile_m, warps = (8, 4) if spec.rope is Rope.NONE else (4, 1)
        return (
            Field("tile_m", (4, 8, 16, 32, 64), tile_m, "rows of a program, a row being a token's head"),
            Field("num_warps", (1, 2, 4, 8), warps, "warps of a program"),
            Field("num_stages", (1,), 1, "there is no loop to pipeline"),
        )

    def constraints(self) -> tuple[Constraint, ...]:
        """Legality over the symbols."""
        import sympy

        elements = sympy.Symbol("elements")
        return (
            Constraint("registers", elements <= 64, "a thread holds its part of K and V in registers"),
            Constraint("threads", elements >= 4, "every thread has something to move"),
        )

    def costs(self) -> tuple[Cost, ...]:
        """Bytes and time."""
        import sympy

        s = sympy.Symbol
        return (
            Cost("bytes", "B", s("read_bytes") + s("written_bytes"), "new K and V read, the pool written"),
            Cost(
                "time_us",
                "µs",
                s("launch_us")
                + s("bytes") / (s("bandwidth_gbs") * 1000)
                + s("program_us") * sympy.ceiling(s("programs") / (s("num_sms") * 16)),
                "a launch, the bytes, and a memory latency for each round of programs",
            ),
        )

    def symbols(
        self, spec: KernelSpec, target: Target, schedule: Schedule, workload: Workload
    ) -> Mapping[str, float]:
        """Numbers behind the symbols; rates are estimates."""
        rows = sum(workload.lens_of_queries) * spec.num_kv_heads
        width = next_power_of_two(spec.head_dim)
        return {
            "elements": schedule.int("tile_m") * width / (32 * schedule.int("num_warps")),
            "read_bytes": 2 * rows * spec.head_dim * spec.q_dtype.size,
            "written_bytes": 2 * rows * spec.head_dim * spec.kv_dtype.size,
            "bandwidth_gbs": max(1.0, target.bandwidth_gbs) * 0.8,
            "programs": max(1, cdiv(rows, schedule.int("tile_m"))),
            "num_sms": target.num_sms,
            "launch_us": 3.0,
            "program_us": 1.5,
        }

    def context(self, spec: KernelSpec, target: Target, schedule: Schedule) -> Mapping[str, object]:
        """Literals for the Jinja source."""
        half = (spec.rotary_dim or spec.head_dim) // 2
        width = next_power_of_two(spec.head_dim)
        return {
            "spec": spec,
            "target": target,
            "schedule": schedule,
            "entry": "paged_write_kv",
            "rope": "" if spec.rope is Rope.NONE else spec.rope.value,
            "half": half,
            "half_width": next_power_of_two(half) if spec.rope is Rope.NEOX else width // 2,
            "rest_width": next_power_of_two(max(1, spec.head_dim - 2 * half)),
            "is_fp8": spec.kv_dtype.is_fp8,
            "kv_dtype": spec.kv_dtype.value,
            "fp8": FORMATS.get(spec.kv_dtype),
            "fp8_by": "cvt" if target.fp8_convert and target.kind == "cuda" else "bits",
            "pair": "e4m3x2" if spec.kv_dtype is DType.FP8_E4M3 else "e5m2x2",
            "by_reciprocal": spec.kv_dtype.is_fp8 and spec.q_dtype.size == 2,
            "scale_per_head": spec.kv_scale is KVScale.HEAD,
            "num_kv_heads": spec.num_kv_heads,
            "block_size": spec.block_size,
            "width": width,
            "tile_m": schedule.int("tile_m"),
        }


FAMILY = TritonWriteKV()
