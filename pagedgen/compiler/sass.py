"""What ptxas made of a kernel, read back: matrix products on sm_90 whose operand's address it has lost.

``wgmma`` reads an operand from shared memory by a descriptor, whose low word holds the address / 16 in 14
bits. ptxas 12.8.93, that of Triton 3.6 and 3.7, gives some kernels with several products a step a descriptor
that begins with whatever its uniform register held before, the softmax scale for one: the product then reads
outside of shared memory (2 of 310 random kernels; ptxas 12.9.86 compiles the same PTX right). Every
descriptor is followed back to where it begins, which is a field of 14 bits or a register that was spilled.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

LINE = re.compile(r"/\*(?P<at>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(?P<name>[A-Z][\w.]*)\s+(?P<args>[^;]*);")
REGISTER = re.compile(r"(U?R)(\d+)")
# What a descriptor's low word is moved by and added to, one register to the next.
MOVES = re.compile(r"R2UR|U?MOV|U?IADD3(\.\w+)?|VIADD|IMAD(\.MOV)?\.U32")
BEGINS = ("SGXT", "USGXT", "LOP3", "ULOP3", "LDL")  # a field's last step; LDL: what was spilled


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of a listing: where, what, and its operands, the first of them written."""

    at: str
    name: str
    operands: tuple[str, ...]

    def writes(self, kind: str, number: int) -> bool:
        """Whether it writes a register, as one of two or four that it names by the first."""
        found = REGISTER.fullmatch(self.operands[0]) if self.operands else None
        if found is None or found[1] != kind:
            return False
        several = 4 if ".128" in self.name else 2 if ".64" in self.name or ".WIDE" in self.name else 1
        several = max(several, 2 if self.name.startswith("CS2R") else 1)
        return int(found[2]) <= number < int(found[2]) + several


def read(listing: str) -> tuple[Instruction, ...]:
    """The instructions of what ``cuobjdump -sass`` prints."""
    found = []
    for line in listing.splitlines():
        if match := LINE.search(line):
            operands = tuple(each.strip().removesuffix(".reuse") for each in match["args"].split(","))
            found.append(Instruction(match["at"], match["name"], operands))
    return tuple(found)


def lost_descriptors(listing: str) -> tuple[str, ...]:
    """The matrix products whose descriptor begins with something that is no address, with what that is."""
    program = read(listing)
    lost = []
    for place, product in enumerate(program):
        if not product.name.startswith("HGMMA"):
            continue
        first = next(
            int(found[1]) for each in product.operands if (found := re.match(r"gdesc\[UR(\d+)\]", each))
        )
        of_b, of_a = first + 2, first
        from_registers = REGISTER.fullmatch(product.operands[1]) is not None
        for number in (of_b,) if from_registers else (of_a, of_b):
            begin = _begin(program, place, "UR", number)
            if begin is None or begin.name.split(".")[0] not in BEGINS:
                where = "nothing" if begin is None else f"{begin.name} at {begin.at}"
                lost.append(f"{product.name} at {product.at} from {where}")
    return tuple(lost)


def _begin(program: Sequence[Instruction], place: int, kind: str, number: int) -> Instruction | None:
    """The instruction that a register's value at ``place`` begins with: the nearest above that writes it."""
    while True:
        above = range(place - 1, -1, -1)
        place = next((each for each in above if program[each].writes(kind, number)), -1)
        if place < 0:
            return None
        step = program[place]
        sources = [found for each in step.operands[1:] if (found := REGISTER.fullmatch(each))]
        if not MOVES.fullmatch(step.name) or len(sources) != 1:
            return step
        kind, number = sources[0][1], int(sources[0][2])
