"""Copying whole blocks on GPUs: the schedule space, legality and cost of ``copy_blocks.py.j2``."""

from __future__ import annotations

from collections.abc import Mapping

from pagedgen.errors import Unsupported
from pagedgen.templates.family import TEMPLATES, Constraint, Cost, Family, Field
from pagedgen.templates.triton.decode import cdiv
from pagedgen.values.schedule import Choice, Schedule
from pagedgen.values.spec import KernelSpec, Op
from pagedgen.values.target import Target
from pagedgen.values.workload import Workload


class TritonCopyBlocks(Family):
    """Pages from pool to pool, bound by memory."""

    name = "triton-copy-blocks"
    kind = "cuda"
    source = TEMPLATES / "triton" / "copy_blocks.py.j2"
    v_dims = True

    def check(self, spec: KernelSpec, target: Target) -> None:
        """Raise ``Unsupported`` for what this template cannot do."""
        if target.kind not in ("cuda", "hip"):
            raise Unsupported(f"target {target.name}: {self.name} renders for GPUs")
        if spec.op is not Op.COPY_BLOCKS:
            raise Unsupported(f"op {spec.op}: {self.name} is for copy_blocks")

    def fields(self, spec: KernelSpec, target: Target) -> tuple[Field, ...]:
        """Bytes and warps of a program."""
        # griddepcontrol came with sm_90
        pdl: tuple[Choice, ...] = (0, 1) if target.kind == "cuda" and target.capability >= 90 else (0,)
        return (
            Field("tile_m", (128, 256, 512, 1024, 2048), 128, f"pieces of {spec.page_align} B of a program"),
            Field("num_warps", (1, 2, 4, 8), 1, "warps of a program"),
            Field("num_stages", (1,), 1, "there is no loop to pipeline"),
            Field("pdl", pdl, pdl[-1], "launched while the kernel before it drains, or after it"),
        )

    def constraints(self) -> tuple[Constraint, ...]:
        """Legality over the symbols."""
        import sympy

        pieces = sympy.Symbol("pieces")
        return (
            Constraint("registers", pieces <= 16, "a thread holds what it copies in registers"),
            Constraint("threads", pieces >= 1, "every thread has something to copy"),
        )

    def costs(self) -> tuple[Cost, ...]:
        """Bytes and time."""
        import sympy

        s = sympy.Symbol
        return (
            Cost(
                "bytes",
                "B",
                2 * s("block_bytes") * s("num_blocks"),
                "K and V of each block, read and written",
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
        """Numbers behind the symbols, for the blocks of one layer that hold the queries' tokens."""
        blocks = sum(cdiv(n, spec.block_size) for n in workload.lens_of_queries)
        block_bytes = spec.block_size * spec.kv_bytes_per_token
        tile = schedule.int("tile_m") * spec.page_align
        return {
            "pieces": schedule.int("tile_m") / (32 * schedule.int("num_warps")),
            "block_bytes": block_bytes,
            "num_blocks": blocks,
            "bandwidth_gbs": max(1.0, target.bandwidth_gbs) * 0.8,
            "programs": max(1, blocks * 2 * cdiv(block_bytes // 2, tile)),
            "num_sms": target.num_sms,
            "launch_us": 3.0,
            "program_us": 1.5,
        }

    def context(self, spec: KernelSpec, target: Target, schedule: Schedule) -> Mapping[str, object]:
        """Literals for the Jinja source."""
        unit = spec.page_align
        return {
            "spec": spec,
            "target": target,
            "schedule": schedule,
            "entry": "paged_copy_blocks",
            "unit": unit,
            "words": unit // 4,
            "tile_m": schedule.int("tile_m"),
            "pdl": bool(schedule.int("pdl")),
        }


FAMILY = TritonCopyBlocks()
