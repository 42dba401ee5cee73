"""Setting the scales of an FP8 pool on GPUs: the schedule space, legality and cost of ``kv_scales.py.j2``."""

from __future__ import annotations

from collections.abc import Mapping

from pagedgen.errors import Unsupported
from pagedgen.templates.family import TEMPLATES, Field
from pagedgen.templates.triton.write_kv import TritonWriteKV
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import LEAST_SCALE, KernelSpec, Op
from pagedgen.values.target import Target


class TritonKVScales(TritonWriteKV):
    """The largest of some rows, read once in a cache's life: one program a scale, and no workspace."""

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
            Field("tile_m", (4, 8, 16, 32, 64), 32, "rows that a program looks at at a time"),
            Field("num_warps", (1, 2, 4, 8), 8, "warps of a program"),
            Field("num_stages", (1,), 1, "loads of rows do not wait for those of the ones before"),
        )

    def context(self, spec: KernelSpec, target: Target, schedule: Schedule) -> Mapping[str, object]:
        """Literals for the Jinja source."""
        return {**super().context(spec, target, schedule), "entry": "paged_kv_scales", "least": LEAST_SCALE}


FAMILY = TritonKVScales()
