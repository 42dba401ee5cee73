"""Gathering K and V on GPUs: the schedule space, legality and cost of ``gather.py.j2``."""

from __future__ import annotations

from collections.abc import Mapping

from pagedgen.errors import Unsupported
from pagedgen.templates.family import TEMPLATES
from pagedgen.templates.triton.write_kv import TritonWriteKV
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec, KInner, KVScale, Op
from pagedgen.values.target import Target


class TritonGather(TritonWriteKV):
    """Rows from their slots: write_kv the other way round, with its space and its cost."""

    name = "triton-gather"
    masks = ("checked",)
    source = TEMPLATES / "triton" / "gather.py.j2"

    def check(self, spec: KernelSpec, target: Target) -> None:
        """Raise ``Unsupported`` for what this template cannot do."""
        if target.kind not in ("cuda", "hip"):
            raise Unsupported(f"target {target.name}: {self.name} renders for GPUs")
        if spec.op is not Op.GATHER:
            raise Unsupported(f"op {spec.op}: {self.name} is for gather")
        if spec.k_inner is not KInner.DIM:
            raise Unsupported("k_inner token: GPU gather reads K with head_dim innermost (k_inner dim)")

    def context(self, spec: KernelSpec, target: Target, schedule: Schedule) -> Mapping[str, object]:
        """Literals for the Jinja source."""
        return {
            **super().context(spec, target, schedule),
            "entry": "paged_gather",
            "has_scale": spec.kv_scale is not KVScale.NONE,
        }


FAMILY = TritonGather()
