"""``tvm-verify``: a few drafted tokens a sequence over paged KV on CPUs, rendered from extend's template.

What differs from extend: a tree mask; a long context is cut into pieces, whose partial results are merged by
the last one to finish (Flash-Decoding, 2023); the next tile is prefetched, since few rows wait for memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from pagedgen.templates.family import TEMPLATES, Field
from pagedgen.templates.tvm.decode import LINE_BYTES
from pagedgen.templates.tvm.extend import Shape, TvmExtend, dot_allowed
from pagedgen.templates.tvm.vectors import LEVELS, powers
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target import Target


class TvmVerify(TvmExtend):
    """A few queries a sequence, on a CPU."""

    name = "tvm-verify"
    invariant = False  # where contexts are cut follows from the batch
    masks = (*TvmExtend.masks, "tree_mask")
    shared = (
        TEMPLATES / "tvm" / "extend.py",
        *TvmExtend.shared[:-1],
        TEMPLATES / "launcher" / "cpu_verify.cc.j2",
    )

    def fields(self, spec: KernelSpec, target: Target) -> tuple[Field, ...]:
        """Those of extend, and prefetching."""
        found = {field.name: field for field in super().fields(spec, target)}
        found["vectors"] = replace(found["vectors"], default=2)
        if dot_allowed(spec, target):
            found["dot"] = replace(found["dot"], default="bf16")
        widest = LEVELS[target.arch].bits // 32
        lanes = Field("lanes", powers(4, widest)[-2:], widest, "rows of a vector")
        ahead = Field("ahead", (0, 1), 1, "tiles between a read and its prefetch; 0: no prefetching")
        return (*found.values(), lanes, ahead)

    def context(self, spec: KernelSpec, target: Target, schedule: Schedule) -> Mapping[str, object]:
        """Extend's names, and those of states and prefetches."""
        shape, element = Shape.of(spec, target, schedule), spec.kv_dtype.size
        unit = math.gcd(spec.block_size, shape.tile)
        # Lines of a unit of K along tokens: several rows share one, or a row has several.
        line_rows = 1 << min(3, max(1, LINE_BYTES // (spec.block_size * element)).bit_length() - 1)
        line_cols = max(1, unit * element // LINE_BYTES)
        unit_lines = spec.head_dim // line_rows * line_cols
        return {
            **super().context(spec, target, schedule),
            "A": schedule.int("ahead") == 1,
            "STATE": shape.state,
            "LINE": LINE_BYTES // element,
            "LINES": -(-spec.head_dim * element // LINE_BYTES),
            "V_LINES": -(-spec.v_dim * element // LINE_BYTES),
            "LINE_ROWS": line_rows,
            "LINE_COLS": line_cols,
            "UNIT_LINES": unit_lines,
            "FETCHES": shape.tile // unit * unit_lines,
        }


FAMILY = TvmVerify()
