"""``Policy``: how KV memory is handed out: blocks of a fixed size, or granules placed in runs."""

from __future__ import annotations

from dataclasses import dataclass

from pagedgen.errors import InvalidValue

GRANULE = 16  # tokens a block of the runtime's adaptive mode
RUN_TOKENS = 64  # KV tokens side by side that count as a run
COMPACT_STEPS = 64  # between two calls of compaction
COMPACT_SHARE = 0.004  # of the pool that one call may move


@dataclass(frozen=True, order=True, slots=True)
class Policy:
    """Blocks of ``block_size`` tokens; ``adaptive``: placed in runs by the runtime's buddy allocator.

    ``kernel_block_size`` is what the kernel's time is taken at; 0: the same. It makes the bound of adaptive
    blocks: the memory of granules, read as fast as if all of them lay in large blocks.

    Raises:
        InvalidValue: a block size that no manager takes, or an adaptive one other than 16.
    """

    block_size: int
    adaptive: bool = False
    kernel_block_size: int = 0

    def __post_init__(self) -> None:
        if type(self.block_size) is not int or not 1 <= self.block_size <= 1 << 16:
            raise InvalidValue("block_size", self.block_size, "1 to 65536 tokens is allowed")
        if self.adaptive and self.block_size != GRANULE:
            raise InvalidValue("block_size", self.block_size, f"{GRANULE} is allowed for adaptive blocks")

    @property
    def name(self) -> str:
        """``16``, ``adaptive`` or ``bound``."""
        return "adaptive" if self.adaptive else "bound" if self.kernel_block_size else str(self.block_size)

    @property
    def kernel(self) -> int:
        """The block size whose kernel it is timed with."""
        return self.kernel_block_size or self.block_size


ADAPTIVE = Policy(GRANULE, adaptive=True)
BOUND = Policy(GRANULE, kernel_block_size=128)
