"""``tvm-write-kv``: K and V of new tokens to their slots on CPUs, quantised where the pool is fp8."""

from __future__ import annotations

from collections.abc import Mapping

from pagedgen.templates.family import TEMPLATES, Constraint, Cost, Family, Field
from pagedgen.templates.fp8 import FORMATS
from pagedgen.templates.tvm.vectors import (
    LEVELS,
    NOMINAL_GBS,
    NOMINAL_GHZ,
    STORAGE,
    check_arch,
    powers,
    symbol_of,
    token_inner,
)
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import DType, KernelSpec, KVScale
from pagedgen.values.target import Target
from pagedgen.values.workload import Workload


class TvmWriteKV(Family):
    """A scatter of rows by slot, bound by memory."""

    name = "tvm-write-kv"
    kind = "cpu"
    source = TEMPLATES / "tvm" / "write_kv.py.j2"
    shared = (
        TEMPLATES / "fp8.py",
        TEMPLATES / "tvm" / "vectors.py",
        TEMPLATES / "tvm" / "vectors.j2",
        TEMPLATES / "tvm" / "quantise.j2",
        TEMPLATES / "launcher" / "cpu_write_kv.cc.j2",
    )

    def check(self, spec: KernelSpec, target: Target) -> None:
        """Every write_kv spec is covered; the target has to be an instruction-set level that is known."""
        check_arch(target)

    def fields(self, spec: KernelSpec, target: Target) -> tuple[Field, ...]:
        """Vectors, and how much of the batch a thread takes at once."""
        lanes = tuple(n for n in powers(4, LEVELS[target.arch].bits // 32) if spec.head_dim % n == 0)
        return (
            Field("lanes", lanes, lanes[-1], "elements of a vector, as float32 where they are converted"),
            Field("tokens", (16, 64, 256), 64, "tokens that a thread takes at a time"),
        )

    def constraints(self) -> tuple[Constraint, ...]:
        """A row is whole vectors."""
        import sympy
        from sympy import Eq, Mod

        s = sympy.Symbol
        return (Constraint("lanes", Eq(Mod(s("head_dim"), s("lanes")), 0), "a row is whole vectors"),)

    def costs(self) -> tuple[Cost, ...]:
        """Bytes over bandwidth, instructions over their rate; estimates, never measurements."""
        import sympy
        from sympy import Max

        s = sympy.Symbol
        return (
            Cost(
                "bytes",
                "B",
                s("read_bytes") + 2 * s("written_bytes"),
                "new K and V read, lines of the pool read and written",
            ),
            Cost("memory_us", "us", s("bytes") / s("bandwidth_gbs") / 1000, "the bytes"),
            Cost(
                "instructions",
                "instructions",
                s("elements") * (s("convert") / s("lanes") + s("scattered")) + s("rows") * 12,
                "conversions by vectors, K along tokens by elements, addresses",
            ),
            Cost(
                "compute_us",
                "us",
                s("instructions") / (s("num_cores") * s("ghz") * 1000),
                "one a cycle and core",
            ),
            Cost(
                "time_us",
                "us",
                Max(s("memory_us"), s("compute_us")) + 2,
                "the slower of the two, and the call",
            ),
        )

    def symbols(
        self, spec: KernelSpec, target: Target, schedule: Schedule, workload: Workload
    ) -> Mapping[str, float]:
        """The number behind every symbol."""
        rows = 2 * sum(workload.lens_of_queries) * spec.num_kv_heads
        return {
            "head_dim": spec.head_dim,
            "lanes": schedule.int("lanes"),
            "rows": rows,
            "elements": rows * spec.head_dim,
            "read_bytes": rows * spec.head_dim * spec.q_dtype.size,
            "written_bytes": rows * spec.head_dim * spec.kv_dtype.size,
            "convert": 24 if spec.kv_dtype.is_fp8 else 2,
            "scattered": 1.0 if token_inner(spec) else 0.0,
            "num_cores": target.num_sms,
            "bandwidth_gbs": target.bandwidth_gbs or NOMINAL_GBS * target.num_sms,
            "ghz": NOMINAL_GHZ,
        }

    def context(self, spec: KernelSpec, target: Target, schedule: Schedule) -> Mapping[str, object]:
        """Names of the template: capitals are numbers that are rendered as literals."""
        fp8 = spec.kv_dtype.is_fp8
        plain = "float32" if spec.q_dtype is DType.F32 else "uint16"  # moved as it is
        return {
            "spec": spec,
            "schedule": schedule,
            "target": target,
            "symbol": symbol_of(spec, schedule),
            "token_inner": token_inner(spec),
            "fp8": FORMATS.get(spec.kv_dtype),
            "scale_per_head": spec.kv_scale is KVScale.HEAD,
            "NEW": STORAGE[spec.q_dtype] if fp8 else plain,
            "KV": "uint8" if fp8 else plain,
            "D": spec.head_dim,
            "B": spec.block_size,
            "L": schedule.int("lanes"),
        }


FAMILY = TvmWriteKV()
