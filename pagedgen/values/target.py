"""``Target``: WHERE a kernel runs. The table of named targets is in ``targets.json`` beside this file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pagedgen.errors import InvalidValue


@dataclass(frozen=True, order=True, slots=True)
class Target:
    """A processor and its published figures.

    ``arch`` is what code is compiled for: ``sm_80``, ``gfx942``, or for a CPU an instruction-set level
    (``x86_64-avx512bf16``, ``x86_64-avx512``, ``x86_64-avx2``, ``aarch64-neon``). Figures are the
    vendor's, from ``source``; a bandwidth of 0 means that none is published (a CPU: it is measured).

    Raises:
        InvalidValue: naming the field, the value and what is allowed.
    """

    name: str
    kind: Literal["cuda", "hip", "cpu"]
    arch: str
    num_sms: int  # SMs, compute units or cores
    smem_per_block: int = 0  # bytes a block may use, opt-in limit
    smem_per_sm: int = 0  # bytes
    regs_per_sm: int = 0  # 32-bit registers
    max_threads_per_sm: int = 0
    l2_bytes: int = 0
    memory_bytes: int = 0
    bandwidth_gbs: float = 0.0  # DRAM, GB/s
    f16_tflops: float = 0.0  # dense, f16 and bf16 with float32 accumulation
    fp8_tflops: float = 0.0  # dense; 0 where there is no fp8 matrix instruction
    fp8_convert: bool = False  # has fp8 -> f16 conversion instructions (CUDA: sm_89 and newer)
    fast_bf16_dots: bool = False  # vdpbf16ps forms twice the products of float32 FMAs in the same time
    source: str = ""

    def __post_init__(self) -> None:
        if self.num_sms < 1:
            raise InvalidValue("num_sms", self.num_sms, "at least 1 is allowed")
        if self.kind == "cuda" and not (self.arch.startswith("sm_") and self.arch[3:].isdigit()):
            raise InvalidValue("arch", self.arch, "CUDA architectures look like sm_90")

    @property
    def capability(self) -> int:
        """CUDA compute capability as an integer: 80, 89, 90, 100…

        Raises:
            InvalidValue: not a CUDA target.
        """
        if self.kind != "cuda":
            raise InvalidValue("kind", self.kind, "only CUDA targets have a compute capability")
        return int(self.arch[3:])
