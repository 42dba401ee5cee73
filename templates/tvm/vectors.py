"""What the CPU templates share: instruction-set levels, names of types, tables and indices of shuffles."""

from __future__ import annotations

from dataclasses import dataclass

from pagedgen.errors import Unsupported
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import DType, KernelSpec, KInner
from pagedgen.values.target import Target


@dataclass(frozen=True, slots=True)
class Level:
    """An instruction-set level: vector registers and what they can do."""

    bits: int  # of a vector register
    registers: int
    bf16_dot: bool = False  # vdpbf16ps, and byte-table lookups for fp8


LEVELS = {
    "x86_64-avx512bf16": Level(512, 32, bf16_dot=True),
    "x86_64-avx512": Level(512, 32),
    "x86_64-avx2": Level(256, 16),
    "aarch64-neon": Level(128, 32),
}
STORAGE = {DType.F32: "float32", DType.F16: "float16", DType.BF16: "uint16"}
NOMINAL_GBS = 12.0  # a core's share of memory bandwidth where none is published; predictions only
NOMINAL_GHZ = 3.0


def check_arch(target: Target) -> None:
    """Raise ``Unsupported`` for an instruction-set level that is not known."""
    if target.arch not in LEVELS:
        raise Unsupported(f"arch {target.arch} of target {target.name}: {', '.join(LEVELS)} are covered")


def divisors(n: int, at_most: int) -> tuple[int, ...]:
    """The divisors of ``n`` up to ``at_most``, ascending."""
    return tuple(d for d in range(1, min(n, at_most) + 1) if n % d == 0)


def powers(low: int, high: int) -> tuple[int, ...]:
    """The powers of two from ``low`` to ``high``, both included."""
    return tuple(1 << e for e in range(low.bit_length() - 1, high.bit_length()))


def token_inner(spec: KernelSpec) -> bool:
    """Whether K is read along tokens; at block_size 1 both layouts are the same memory."""
    return spec.k_inner is KInner.TOKEN and spec.block_size > 1


def interleave(first: int, second: int, count: int) -> list[int]:
    """Shuffle indices that take elements from ``first`` and ``second`` on in turn, ``count`` of each."""
    return [start + i for i in range(count) for start in (first, second)]


def low_of(distance: int, lanes: int) -> list[int]:
    """Shuffle indices of a stage of turning ``lanes`` x ``lanes`` elements: row r, of it and r + distance."""
    return [i if i & distance == 0 else lanes + i - distance for i in range(lanes)]


def high_of(distance: int, lanes: int) -> list[int]:
    """The same stage's row r + distance."""
    return [i + distance if i & distance == 0 else lanes + i for i in range(lanes)]


def sum_tree(lanes: int) -> list[tuple[list[int], list[int]]]:
    """Shuffle indices, low and high, of every level of the tree that sums ``lanes`` vectors of ``lanes``.

    Lanes are crossed within 128 bits first, where a shuffle costs one cycle.
    """
    tree = []
    for low in ([0, lanes, 1, lanes + 1], [0, 1, lanes, lanes + 1]):
        indices = [g + x for g in range(0, lanes, 4) for x in low]
        tree.append((indices, [x + 2 for x in indices]))
    groups = lanes // 4  # what is left is to sum the 4-lane groups
    while groups > 1:
        picked = [0, 2, 4, 6] if lanes == 16 else [0, 2]
        indices = [4 * g + x for g in picked for x in range(4)]
        tree.append((indices, [x + 4 for x in indices]))
        groups //= 2
    return tree


def bf16_table(kind: DType) -> tuple[list[int], list[int]]:
    """Low and high byte of the bf16 of each of the 128 fp8 codes without sign."""
    mantissa_bits, bias = (3, 7) if kind is DType.FP8_E4M3 else (2, 15)
    low, high = [], []
    for code in range(128):
        exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        infinite = kind is DType.FP8_E5M2 and exponent == 31
        if code == 127 or (infinite and mantissa):
            bits = 0x7FC0
        elif infinite:
            bits = 0x7F80
        elif code == 0:
            bits = 0
        else:
            if exponent == 0:  # subnormal in fp8, normal in bf16
                shift = mantissa_bits - mantissa.bit_length() + 1
                exponent, mantissa = 1 - shift, (mantissa << shift) & ((1 << mantissa_bits) - 1)
            bits = (exponent - bias + 127) << 7 | mantissa << (7 - mantissa_bits)
        low.append(bits & 255)
        high.append(bits >> 8)
    return low, high


# 2^x on [-0.5, 0.5], least maximal relative error (1.3e-7); highest power first.
EXP2 = (0.00134404927, 0.00967211641, 0.0555017106, 0.240222294, 0.693147348, 1.0)


def symbol_of(spec: KernelSpec, schedule: Schedule) -> str:
    """What the kernel's functions start with; distinct for every spec and schedule."""
    return f"{spec.op.value}_{spec.hash[:8]}_{schedule.hash[:8]}"


def horner(x: str) -> str:
    """The polynomial of :data:`EXP2` in ``x``, as a TIR expression."""
    text = f"T.float32({EXP2[0]!r})"
    for coefficient in EXP2[1:]:
        text = f"({text} * {x} + T.float32({coefficient!r}))"
    return text


def nearest(values: tuple[int, ...], wanted: int) -> int:
    """The value closest to ``wanted``, the larger of two."""
    return min(values, key=lambda value: (abs(value - wanted), -value))


def largest(values: tuple[int, ...], at_most: int) -> int:
    """The largest value up to ``at_most``; the first where none is."""
    return max((value for value in values if value <= at_most), default=values[0])
