"""``KernelTimings``: measured kernel times by block size and run coverage; the file of a benchmark suite."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pagedgen.autotune.paths import publish
from pagedgen.autotune.suites.report import Environment
from pagedgen.errors import InvalidValue, MalformedFile
from pagedgen.values import codec
from pagedgen.values.spec import DType, KernelSpec
from pagedgen.values.target import Target
from pagedgen.values.workload import Workload


@dataclass(frozen=True, slots=True)
class KernelTiming:
    """One kernel on one batch of equal lengths: of decode, or of extend with ``num_queries`` new tokens.

    ``coverage`` is the share (0 to 1) of the KV tokens that lie in runs of blocks side by side, of 64 tokens
    or more. Times are microseconds of one call; a kernel that failed has none.

    Raises:
        InvalidValue: naming the field.
    """

    spec: KernelSpec
    num_seqs: int
    num_tokens: int  # KV tokens of all sequences
    coverage: float
    samples_us: tuple[float, ...]
    detail: str = ""  # the schedule, and where it comes from
    failure: str = ""
    num_queries: int = 0  # query tokens of all sequences; 0: one each, a decode step

    def __post_init__(self) -> None:
        if not 1 <= self.num_seqs <= self.num_tokens:
            raise InvalidValue("num_seqs", self.num_seqs, f"1 to num_tokens ({self.num_tokens}) is allowed")
        if not 0 <= self.num_queries <= self.num_tokens:
            allowed = f"0 to num_tokens ({self.num_tokens}) is allowed"
            raise InvalidValue("num_queries", self.num_queries, allowed)
        if not 0 <= self.coverage <= 1:
            raise InvalidValue("coverage", self.coverage, "a share from 0 to 1 is allowed")
        if any(not sample > 0 for sample in self.samples_us) or bool(self.samples_us) == bool(self.failure):
            raise InvalidValue("samples_us", self.samples_us, "times above 0, or a failure, are expected")

    @property
    def median_us(self) -> float:
        """Of the samples; there have to be some."""
        return statistics.median(self.samples_us)

    @property
    def workload(self) -> Workload:
        """The batch."""
        length = self.num_tokens // self.num_seqs
        if not self.num_queries:
            return Workload.uniform(self.num_seqs, length)
        return Workload.chunks(self.num_seqs, self.num_queries // self.num_seqs, length)


@dataclass(frozen=True, slots=True)
class KernelTimings:
    """What ``pagedgen bench --suite block-sizes-gpu`` measured.

    Where it was cut off, ``complete`` is false and ``done`` of ``planned`` groups of kernels are there.
    (Files from before these fields are complete: they were written at the end.)
    """

    suite: str
    environment: Environment
    rows: tuple[KernelTiming, ...]
    read_gbs: float = 0.0  # read bandwidth measured in the same run
    notes: tuple[str, ...] = ()
    complete: bool = True
    done: int = 0
    planned: int = 0

    @classmethod
    def load(cls, path: Path) -> KernelTimings:
        """Read a file of the suite.

        Raises:
            MalformedFile: it is none; names the place.
        """
        try:
            return codec.load_file(cls, path)
        except OSError as error:
            raise MalformedFile(path, "file", error.strerror or str(error)) from error

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            CacheUnwritable: the folder cannot be written.
        """
        publish(path, codec.dumps(self).encode())

    def of(self, spec: KernelSpec) -> tuple[KernelTiming, ...]:
        """Rows that hold for a spec: those of a kernel that reads the same bytes in the same way.

        f16 and bf16 stand for each other, as they are equally wide (on an H100 they differed by 0 to 6%).
        """
        return tuple(row for row in self.rows if row.samples_us and _shape(row.spec) == _shape(spec))

    def matmul_share(self, spec: KernelSpec, target: Target) -> float | None:
        """FLOP/s of an extend kernel as a share of the target's 16-bit matrix rate; None where not measured.

        The geometric mean over batches, at the least run coverage.
        """
        rows = self.of(spec)
        least = min((row.coverage for row in rows), default=0.0)
        rates = [row.workload.flops(spec) / row.median_us * 1e-6 for row in rows if row.coverage == least]
        return statistics.geometric_mean(rates) / target.f16_tflops if rates else None

    def lines(self) -> list[str]:
        """A table for a terminal: a line a spec and batch, a column a coverage."""
        coverages = sorted({row.coverage for row in self.rows})
        lines = [f"{'':44}" + "".join(f"{c:>10.0%}" for c in coverages) + "  of tokens in runs of 64"]
        cases: dict[tuple[KernelSpec, Workload], list[KernelTiming]] = {}
        for row in self.rows:
            cases.setdefault((row.spec, row.workload), []).append(row)
        for (spec, workload), rows in cases.items():
            cells = {row.coverage: f"{row.median_us:,.1f}" if row.samples_us else "failed" for row in rows}
            lines.append(
                f"{f'{spec.name} {workload.name}':44}"
                + "".join(f"{cells.get(c, '-'):>10}" for c in coverages)
            )
        failed = [f"{row.spec.name}: {row.failure}" for row in self.rows if row.failure]
        return [*lines, *_distinct(failed), *self.notes]


def _distinct(lines: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(lines))


def _shape(spec: KernelSpec) -> KernelSpec:
    """The spec with f16 in the place of bf16."""
    kv = DType.F16 if spec.kv_dtype is DType.BF16 else spec.kv_dtype
    return replace(spec, q_dtype=DType.F16 if spec.q_dtype is DType.BF16 else spec.q_dtype, kv_dtype=kv)
