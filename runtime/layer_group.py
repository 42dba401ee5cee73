"""``LayerGroup``: the block table of one group of layers that see the same tokens."""

from __future__ import annotations

import numpy as np

from pagedgen.runtime.arrays import I32, I64


class LayerGroup:
    """Persistent tables of a group, one row a sequence.

    Attributes: ``window``, tokens that a query sees including itself, or None for all; ``table`` int32
    ``[rows, max_blocks]``, 0 where no block is; ``tails`` int32 ``[rows]``, the block of each
    sequence's last token; ``starts`` int32 ``[rows]``, blocks before it were released behind the window.
    """

    def __init__(self, rows: int, max_blocks: int, window: int | None) -> None:
        self.window = window
        self.table: I32 = np.zeros((rows, max_blocks), np.int32)  # pages are touched only where it is used
        self.flat = self.table.reshape(-1)
        self.tails: I32 = np.zeros(rows, np.int32)
        self.starts: I32 = np.zeros(rows, np.int32)
        self._max_blocks = max_blocks
        self._changed: list[I64] | None = None

    def track(self) -> None:
        """Note every change from now on, for :meth:`take_changed`."""
        if self._changed is None:
            self._changed = [np.flatnonzero(self.flat)]

    def take_changed(self) -> I64:
        """Flat indices of the entries that changed since the last call; repeats are possible."""
        if not self._changed:
            return np.empty(0, np.int64)
        changed = np.concatenate(self._changed)
        self._changed = []
        return changed

    def set(self, rows: I64, columns: I32 | I64, blocks: I32) -> None:
        """Entries of several sequences."""
        where = rows * self._max_blocks + columns
        self.flat[where] = blocks
        if self._changed is not None:
            self._changed.append(where)

    def get(self, rows: I64, columns: I32 | I64) -> I32:
        """Entries of several sequences."""
        return self.flat.take(rows * self._max_blocks + columns)

    def set_row(self, row: int, first: int, blocks: I32) -> None:
        """Consecutive entries of one sequence."""
        self.table[row, first : first + blocks.size] = blocks
        if self._changed is not None:
            start = row * self._max_blocks + first
            self._changed.append(np.arange(start, start + blocks.size))
