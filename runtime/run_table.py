"""``RunGroup``: a group's block tables, read as runs of blocks that lie side by side."""

from __future__ import annotations

import numpy as np

from pagedgen.runtime.arrays import I32, I64
from pagedgen.runtime.layer_group import LayerGroup


class RunGroup(LayerGroup):
    """A :class:`LayerGroup` without a window that also knows where each row's runs begin.

    Writes note the first column that they change; reading scans again from there, so it costs the changes
    since the last reading.
    """

    def __init__(self, rows: int, max_blocks: int, window: int | None) -> None:
        super().__init__(rows, max_blocks, window)
        self._known: I32 = np.zeros(rows, np.int32)  # columns before it are as they were at the last reading
        self._firsts: dict[int, I32] = {}  # row -> the first column of each run

    def set(self, rows: I64, columns: I32 | I64, blocks: I32) -> None:
        """As :meth:`LayerGroup.set`."""
        super().set(rows, columns, blocks)
        np.minimum.at(self._known, np.broadcast_to(rows, np.shape(columns)), np.asarray(columns, np.int32))

    def set_row(self, row: int, first: int, blocks: I32) -> None:
        """As :meth:`LayerGroup.set_row`."""
        super().set_row(row, first, blocks)
        self._known[row] = min(int(self._known[row]), first)

    def runs(self, row: int, count: int) -> I32:
        """(first block, blocks) of each run of the first ``count`` columns of a row: int32 ``[n, 2]``."""
        known = min(int(self._known[row]), count)
        firsts = self._firsts.get(row, np.empty(0, np.int32))
        firsts = firsts[
            : max(0, int(np.searchsorted(firsts, known)) - 1)
        ]  # the last may go on: it is scanned
        begin = 0
        if known and row in self._firsts:
            before = self._firsts[row]
            begin = int(before[int(np.searchsorted(before, known)) - 1])
        blocks = self.table[row, begin:count]
        breaks = np.flatnonzero(np.diff(blocks) != 1) + begin + 1
        start = np.array([begin] if count else [], np.int32)
        firsts = np.concatenate((firsts, start, breaks.astype(np.int32)))
        self._firsts[row] = firsts
        self._known[row] = count
        return np.stack((self.table[row, firsts], np.diff(firsts, append=np.int32(count))), axis=1)
