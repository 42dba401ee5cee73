"""The numbers of the FP8 types, as rounding to them by integer arithmetic needs them."""

from __future__ import annotations

from dataclasses import dataclass

from pagedgen.values.spec import DType


@dataclass(frozen=True, slots=True)
class FP8:
    """Numbers of an FP8 type beside float32's, as both backends' ``quantise.j2`` use them."""

    shift: int  # mantissa bits that float32 has more
    bias: int  # by which float32's exponents are larger
    most: int  # the largest value
    magic: int  # 2^(23 - p), where 2^-p is the smallest subnormal

    @property
    def rebias(self) -> int:
        """``bias`` at the exponent's place."""
        return self.bias << 23

    @property
    def half(self) -> int:
        """Just under half a unit of the last bit that stays; with that bit added, ties go to even."""
        return (1 << (self.shift - 1)) - 1

    @property
    def least_normal(self) -> int:
        """Bits of the smallest normal value, as a float32."""
        return (self.bias + 1) << 23


FORMATS = {DType.FP8_E4M3: FP8(20, 120, 448, 1 << 14), DType.FP8_E5M2: FP8(21, 112, 57344, 1 << 7)}
