"""Merging partial results on GPUs: the schedule space, legality and cost of ``merge.py.j2``."""

from __future__ import annotations

from collections.abc import Mapping

from pagedgen.errors import Unsupported
from pagedgen.templates.family import TEMPLATES, Constraint, Cost, Family, Field
from pagedgen.templates.triton.decode import cdiv, next_power_of_two
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec, Op
from pagedgen.values.target import Target
from pagedgen.values.workload import Workload

PARTS = 2  # that the cost model reckons with: a shared prefix, and the rest


class TritonMerge(Family):
    """A weighted sum of parts, bound by memory."""

    name = "triton-merge"
    kind = "cuda"
    source = TEMPLATES / "triton" / "merge.py.j2"
    masks = ("sinks",)

    def check(self, spec: KernelSpec, target: Target) -> None:
        """Raise ``Unsupported`` for what this template cannot do."""
        if target.kind not in ("cuda", "hip"):
            raise Unsupported(f"target {target.name}: {self.name} renders for GPUs")
        if spec.op is not Op.MERGE:
            raise Unsupported(f"op {spec.op}: {self.name} is for merge")

    def fields(self, spec: KernelSpec, target: Target) -> tuple[Field, ...]:
        """Rows and warps of a program."""
        return (
            Field("tile_m", (1, 2, 4, 8, 16, 32), 8, "rows of a program, a row being a token's head"),
            Field("num_warps", (1, 2, 4, 8), 4, "warps of a program"),
            Field("num_stages", (1,), 1, "loads of a part do not wait for those of the one before"),
        )

    def constraints(self) -> tuple[Constraint, ...]:
        """Legality over the symbols."""
        import sympy

        elements = sympy.Symbol("elements")
        return (
            Constraint("registers", elements <= 32, "a thread holds its part of the sums in registers"),
            Constraint("threads", elements >= 4, "every thread has something to sum"),
        )

    def costs(self) -> tuple[Cost, ...]:
        """Bytes and time."""
        import sympy

        s = sympy.Symbol
        return (
            Cost(
                "bytes", "B", s("rows") * s("row_bytes") * (PARTS + 1), "two parts read, the result written"
            ),
            Cost(
                "time_us",
                "µs",
                s("launch_us")
                + s("bytes") / (s("bandwidth_gbs") * 1000)
                + s("program_us") * sympy.ceiling(s("programs") / (s("num_sms") * 16)),
                "a launch, the bytes, and two memory latencies for each round of programs",
            ),
        )

    def symbols(
        self, spec: KernelSpec, target: Target, schedule: Schedule, workload: Workload
    ) -> Mapping[str, float]:
        """Numbers behind the symbols; rates are estimates."""
        rows = sum(workload.lens_of_queries) * spec.num_q_heads
        width = next_power_of_two(spec.head_dim)
        return {
            "elements": schedule.int("tile_m") * width / (32 * schedule.int("num_warps")),
            "rows": rows,
            "row_bytes": spec.head_dim * spec.q_dtype.size + 4,
            "bandwidth_gbs": max(1.0, target.bandwidth_gbs) * 0.8,
            "programs": max(1, cdiv(rows, schedule.int("tile_m"))),
            "num_sms": target.num_sms,
            "launch_us": 3.0,
            "program_us": 1.5,
        }

    def context(self, spec: KernelSpec, target: Target, schedule: Schedule) -> Mapping[str, object]:
        """Literals for the Jinja source."""
        return {
            "spec": spec,
            "target": target,
            "schedule": schedule,
            "entry": "paged_merge",
            "num_heads": spec.num_q_heads,
            "width": next_power_of_two(spec.head_dim),
            "tile_m": schedule.int("tile_m"),
        }


FAMILY = TritonMerge()
