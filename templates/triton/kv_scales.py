"""Setting the scales of an FP8 pool on GPUs: the schedule space, legality and cost of ``kv_scales.py.j2``."""

from __future__ import annotations

from collections.abc import Mapping

from pagedgen.errors import Unsupported
from pagedgen.templates.family import TEMPLATES, Constraint, Field
from pagedgen.templates.triton.decode import next_power_of_two
from pagedgen.templates.triton.write_kv import TritonWriteKV
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import LEAST_SCALE, KernelSpec, Op
from pagedgen.values.target import Target
from pagedgen.values.workload import Workload


class TritonKVScales(TritonWriteKV):
    """The largest of some rows, read once in a cache's life: one program a scale, and no workspace.

    One program has to read fast: a tile at a time, each waiting for its slots, 8,192 tokens of 8 heads took
    2.8 ms on an H100.
    """

    name = "triton-kv-scales"
    source = TEMPLATES / "triton" / "kv_scales.py.j2"
    shared = (TEMPLATES / "fp8.py",)
    masks = ()

    def check(self, spec: KernelSpec, target: Target) -> None:
        """Raise ``Unsupported`` for what this template cannot do."""
        if target.kind not in ("cuda", "hip"):
            raise Unsupported(f"target {target.name}: {self.name} renders for GPUs")
        if spec.op is not Op.KV_SCALES:
            raise Unsupported(f"op {spec.op}: {self.name} is for kv_scales")

    def fields(self, spec: KernelSpec, target: Target) -> tuple[Field, ...]:
        """Rows and warps of a program."""
        return (
            Field("tile_m", (4, 8, 16, 32, 64), 64, "rows that a program looks at at a time"),
            Field("num_warps", (1, 2, 4, 8), 8, "warps of a program"),
            Field("num_stages", (1, 2, 4), 4, "depth of the load pipeline"),
        )

    def constraints(self) -> tuple[Constraint, ...]:
        """Legality over the symbols: write_kv's, and shared memory."""
        import sympy

        smem, most = sympy.symbols("smem_bytes smem_per_block")
        return (*super().constraints(), Constraint("smem", smem <= most, "tiles of all stages fit"))

    def symbols(
        self, spec: KernelSpec, target: Target, schedule: Schedule, workload: Workload
    ) -> Mapping[str, float]:
        """Numbers behind the symbols."""
        width, stages = next_power_of_two(spec.head_dim), schedule.int("num_stages")
        row_bytes = width * spec.q_dtype.size + 8  # and a slot
        return {
            **super().symbols(spec, target, schedule, workload),
            "smem_bytes": schedule.int("tile_m") * row_bytes * stages + 1024 if stages > 1 else 0,
            "smem_per_block": target.smem_per_block,
        }

    def context(self, spec: KernelSpec, target: Target, schedule: Schedule) -> Mapping[str, object]:
        """Literals for the Jinja source."""
        own = {"entry": "paged_kv_scales", "least": LEAST_SCALE, "num_stages": schedule.int("num_stages")}
        return {**super().context(spec, target, schedule), **own}


FAMILY = TritonKVScales()
