"""``Source`` and ``Binary``: a kernel as text, and compiled."""

from __future__ import annotations

from dataclasses import dataclass

from pagedgen.values.record import Resources
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target import Target


@dataclass(frozen=True, slots=True)
class Source:
    """A rendered kernel: readable, specialised, with every number a literal."""

    spec: KernelSpec
    target: Target
    schedule: Schedule
    text: str


@dataclass(frozen=True, slots=True)
class Binary:
    """A compiled kernel.

    ``files`` holds (name, bytes): ``kernel.cubin`` and ``kernel.ptx`` for a GPU, ``kernel.o`` for a CPU.
    ``symbol`` is the name of the kernel in them. ``num_warps`` is 0 for a CPU.
    """

    source: Source
    symbol: str
    files: tuple[tuple[str, bytes], ...]
    resources: Resources
    compiler: str  # "triton 3.7.1"
    num_warps: int = 0

    def file(self, name: str) -> bytes:
        """The bytes of one file."""
        return dict(self.files)[name]
