"""What compaction may move: where the blocks of resident sequences lie, and which stretches are scattered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pagedgen.runtime.arrays import I32, I64, Bool


@dataclass(frozen=True, slots=True)
class Stretch:
    """Columns ``first`` to ``last - 1`` of a row: places ``begin`` to ``end - 1`` of a :class:`Residents`."""

    row: int
    first: int
    last: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Residents:
    """Blocks of a group's resident sequences by (row, column).

    ``rows`` and ``columns`` int64 ``[n]``, ``blocks`` int32 ``[n]``; ``movable`` bool ``[n]``: one sequence
    alone has it and nothing waits for it; ``short`` bool ``[n]``: it lies in a run of fewer than a quarter of
    the largest.
    """

    rows: I64
    columns: I64
    blocks: I32
    movable: Bool
    short: Bool

    @classmethod
    def of(cls, table: I32, rows: I64, counts: I64, movable: Bool, run_blocks: int) -> Residents:
        """Of the first ``counts[i]`` columns of ``rows[i]``; ``movable`` is by block, ``[num_blocks]``."""
        all_rows = np.repeat(rows, counts)
        columns = np.arange(all_rows.size) - np.repeat(counts.cumsum() - counts, counts)
        blocks: I32 = table[all_rows, columns]
        begins = np.flatnonzero((np.diff(blocks, prepend=-2) != 1) | (columns == 0))
        lengths = np.diff(begins, append=blocks.size)
        short = np.repeat(lengths < max(2, run_blocks // 4), lengths)
        return cls(all_rows, columns, blocks, movable.take(blocks), short)

    def stretches(self, run_blocks: int) -> Iterator[Stretch]:
        """Those that may fill one run, the most scattered first: aligned, movable, half of them short."""
        if not self.blocks.size:
            return
        begins = np.flatnonzero(self.columns % run_blocks == 0)
        sizes = np.diff(begins, append=self.blocks.size)
        worth = np.add.reduceat(self.short, begins, dtype=np.int64)
        good = (
            np.logical_and.reduceat(self.movable, begins) & (2 * worth >= sizes) & (sizes > 1) & (worth > 0)
        )
        for i in np.flatnonzero(good)[np.argsort(-worth[good], kind="stable")].tolist():
            begin, size = int(begins[i]), int(sizes[i])
            first = int(self.columns[begin])
            yield Stretch(int(self.rows[begin]), first, first + size, begin, begin + size)
