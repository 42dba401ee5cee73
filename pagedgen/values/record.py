"""``Record``: what is known of one schedule for one spec on one target and workload."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from pagedgen.errors import InvalidValue
from pagedgen.values import codec
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec
from pagedgen.values.workload import Workload


class Status(StrEnum):
    """How a record's time came about. A predicted time is never shown as a measured one."""

    MEASURED = "measured"
    PREDICTED = "predicted"


@dataclass(frozen=True, order=True, slots=True)
class Stamp:
    """The versions and the device behind a record; a mismatch makes it unusable here."""

    pagedgen: str
    compiler: str  # "triton 3.7.1" or "tvm 0.27.0"
    device: str  # "NVIDIA H100 80GB HBM3", "AMD EPYC …", or "none" for a prediction
    driver: str  # CUDA driver version, kernel version for CPUs, or "none"
    date: str  # ISO 8601, UTC


@dataclass(frozen=True, order=True, slots=True)
class Resources:
    """What a binary uses, read back from it, not estimated. Zero where the notion does not apply."""

    registers: int = 0  # a thread
    spill_bytes: int = 0  # a thread
    smem_bytes: int = 0  # a block, static and dynamic
    code_bytes: int = 0


@dataclass(frozen=True, order=True, slots=True)
class Verdict:
    """The outcome of the correctness gate.

    ``max_error`` is the largest absolute error against the float64 reference and ``tolerance`` what was
    allowed at that element's case; ``cases`` counts the inputs tried; ``reason`` is empty on a pass.
    """

    passed: bool
    cases: int
    max_error: float
    tolerance: float
    seed: int
    reason: str = ""


@dataclass(frozen=True, order=True, slots=True)
class Timing:
    """Time of one call in microseconds: median and spread of the interleaved rounds."""

    median_us: float
    low_us: float  # 10th percentile of the rounds
    high_us: float  # 90th percentile
    rounds: int


@dataclass(frozen=True, order=True, slots=True)
class Record:
    """spec × target × workload × schedule → time, with its prediction beside it.

    ``kernel`` is the hash of the rendered kernel and launcher that the time is of (``compiler.kernel_hash``):
    a record of another than what is rendered now is not used.

    Raises:
        InvalidValue: a measured record without timing, roofline or a passed verdict.
    """

    status: Status
    spec: KernelSpec
    target: str
    workload: Workload
    schedule: Schedule
    kernel: str
    stamp: Stamp
    resources: Resources
    predicted_us: float
    timing: Timing | None = None
    roofline_gbs: float = 0.0  # read bandwidth measured in the same run; 0 in a prediction
    verdict: Verdict | None = None
    # Of a large matrix product in the same run; 0 in a prediction, and of decode, which memory bounds.
    roofline_tflops: float = field(default=0.0, metadata=codec.OMIT_DEFAULT)

    def __post_init__(self) -> None:
        if self.status is Status.MEASURED:
            if self.timing is None or self.roofline_gbs <= 0:
                raise InvalidValue("timing", self.timing, "a measured record has a timing and a roofline")
            if self.verdict is None or not self.verdict.passed:
                raise InvalidValue("verdict", self.verdict, "only a kernel that passed the gate is recorded")
        elif self.timing is not None:
            raise InvalidValue("timing", self.timing, "a predicted record has none")

    @property
    def time_us(self) -> float:
        """Measured median, or the prediction of a predicted record."""
        return self.timing.median_us if self.timing else self.predicted_us

    @property
    def gbs(self) -> float:
        """GB/s of KV bytes at ``time_us``."""
        return self.workload.kv_bytes(self.spec) / self.time_us / 1e3

    @property
    def tflops(self) -> float:
        """TFLOP/s of both matrix products at ``time_us``."""
        return self.workload.flops(self.spec) / self.time_us / 1e6

    @property
    def roofline_share(self) -> float:
        """Share of what bandwidth and matrix products measured in the same run allow; 0 for a prediction."""
        if not self.roofline_gbs:
            return 0.0
        return self.workload.floor_us(self.spec, self.roofline_gbs, self.roofline_tflops) / self.time_us
