"""``SwapSpace``: host blocks that sequences are swapped out to, and what went where."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pagedgen.errors import InvalidPool, OutOfHostBlocks
from pagedgen.runtime.arrays import I32, I64, U64, Bool


@dataclass(frozen=True, slots=True)
class SwappedBlocks:
    """Blocks of one sequence and one group that are in host memory.

    ``columns`` int32 ``[n]`` of the block table; ``host`` int32 ``[n]``; ``device``, ``lanes`` and
    ``identities``: where the content was and under which fingerprint it was cached there (0: it was not), so
    that what is not evicted until the sequence returns need not be copied back.
    """

    columns: I64
    host: I32
    device: I32
    lanes: tuple[U64, U64]
    identities: I64

    def joined(self, other: SwappedBlocks) -> SwappedBlocks:
        """Both, of the same sequence and group."""
        a, b = (np.concatenate(pair) for pair in zip(self.lanes, other.lanes, strict=True))
        return SwappedBlocks(
            np.concatenate((self.columns, other.columns)),
            np.concatenate((self.host, other.host)),
            np.concatenate((self.device, other.device)),
            (a, b),
            np.concatenate((self.identities, other.identities)),
        )


class SwapSpace:
    """A pool of ``num_blocks`` host blocks (0: no swapping), lowest first so that copies come in runs."""

    def __init__(self, num_blocks: int) -> None:
        if type(num_blocks) is not int or not 0 <= num_blocks < 1 << 24:
            raise InvalidPool("num_host_blocks", num_blocks, "0 to 16777215 blocks are allowed")
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._free: Bool = np.ones(num_blocks, np.bool_)
        self.records: dict[int, list[SwappedBlocks]] = {}  # by row; one entry a group

    def check_room(self, n: int) -> None:
        """Raise OutOfHostBlocks unless ``n`` host blocks are free."""
        if n > self.num_free:
            raise OutOfHostBlocks(n, self.num_free)

    def take(self, n: int) -> I32:
        """``n`` host blocks, ascending.

        Raises:
            OutOfHostBlocks: fewer are free; nothing was taken.
        """
        self.check_room(n)
        blocks = np.flatnonzero(self._free)[:n].astype(np.int32)
        self._free[blocks] = False
        self.num_free -= n
        return blocks

    def give(self, blocks: I32) -> None:
        """Host blocks are free again."""
        self._free[blocks] = True
        self.num_free += blocks.size
