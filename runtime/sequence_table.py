"""``SequenceTable``: handles of sequences, and the table row that each one occupies."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pagedgen.errors import (
    InvalidPool,
    SequenceFreed,
    SequenceSwapped,
    SequenceTwice,
    TooManySequences,
    UnknownSequence,
)
from pagedgen.runtime.arrays import I64


class SequenceTable:
    """Gives out handles ``generation * capacity + row``.

    A handle is never given twice, so a stale one is told from a live one without a dictionary, and a whole
    batch of handles is checked in one comparison. Rows are reused lowest first, so that the rows in use stay
    dense.
    """

    def __init__(self, max_num_seqs: int) -> None:
        if type(max_num_seqs) is not int or not 1 <= max_num_seqs <= 1 << 20:
            raise InvalidPool("max_num_seqs", max_num_seqs, "1 to 1048576 sequences are allowed")
        self.max_num_seqs = max_num_seqs
        self._bits = (max_num_seqs - 1).bit_length()
        self._mask = (1 << self._bits) - 1
        self._live: I64 = np.full(1 << self._bits, -1, np.int64)  # handle of each row
        self._ready: I64 = np.full(1 << self._bits, -1, np.int64)  # the same, unless it is swapped out
        self._given: I64 = np.zeros(1 << self._bits, np.int64)  # generations given out
        self._free = list(range(max_num_seqs))
        self._once: I64 = np.zeros(1 << self._bits, np.int64)
        # The batch that was checked last; forgotten when a sequence ends or is swapped out.
        self._last: tuple[I64, I64] = (np.empty(0, np.int64), np.empty(0, np.int64))

    @property
    def nbytes(self) -> int:
        """Host memory of all arrays, in bytes."""
        return 4 * self._live.nbytes

    def __len__(self) -> int:
        return self.max_num_seqs - len(self._free)

    @property
    def handles(self) -> list[int]:
        """All live sequences, by row."""
        return [int(seq) for seq in self._live[self._live >= 0]]

    def handle(self, row: int) -> int:
        """The sequence of a row in use."""
        return int(self._live[row])

    def check_room(self, n: int) -> None:
        """Raise TooManySequences unless ``n`` rows are free."""
        if n > len(self._free):
            raise TooManySequences(
                f"{n} more are wanted, {len(self._free)} of max_num_seqs = {self.max_num_seqs} rows are free"
            )

    def add(self) -> tuple[int, int]:
        """A new (handle, row)."""
        row = heapq.heappop(self._free)
        seq = (int(self._given[row]) << self._bits) | row
        self._given[row] += 1
        self._live[row] = self._ready[row] = seq
        return seq, row

    def remove(self, row: int) -> None:
        """The row is free again."""
        self._last = (np.empty(0, np.int64), np.empty(0, np.int64))
        self._live[row] = self._ready[row] = -1
        heapq.heappush(self._free, row)

    def suspend(self, row: int) -> None:
        """Calls that need a resident sequence refuse this one until :meth:`resume`."""
        self._ready[row] = -1
        self._last = (np.empty(0, np.int64), np.empty(0, np.int64))

    def resume(self, row: int) -> None:
        """Undo :meth:`suspend`."""
        self._ready[row] = self._live[row]

    def is_suspended(self, row: int) -> bool:
        """Whether the sequence of this row is swapped out."""
        return bool(self._ready[row] < 0)

    def row(self, seq: int, freed: type[SequenceFreed] = SequenceFreed) -> int:
        """The row of a live sequence, swapped out or not.

        Raises:
            UnknownSequence: the handle was never given out.
            SequenceFreed: it was, and the sequence is gone; ``freed`` is the class to raise.
        """
        if type(seq) is not int and not isinstance(seq, np.integer):
            raise UnknownSequence(seq, "is unknown: a handle is an integer that allocate or fork returned")
        row = int(seq) & self._mask
        if seq < 0 or row >= self.max_num_seqs or int(seq) >> self._bits >= self._given[row]:
            raise UnknownSequence(seq, "is unknown: allocate or fork never returned it")
        if self._live[row] != seq:
            raise freed(seq, "was freed")
        return row

    def resident_row(self, seq: int) -> int:
        """The row of a sequence that is not swapped out.

        Raises:
            UnknownSequence, SequenceFreed: see :meth:`row`.
            SequenceSwapped: it is swapped out.
        """
        row = self.row(seq)
        if self._ready[row] < 0:
            raise SequenceSwapped(seq, "is swapped out")
        return row

    def rows(self, seqs: Sequence[int] | I64) -> I64:
        """Rows of distinct resident sequences, int64 ``[n]``.

        Raises:
            UnknownSequence, SequenceFreed, SequenceSwapped: see :meth:`resident_row`.
            SequenceTwice: a sequence is named twice.
        """
        handles: npt.NDArray[np.int64] = np.asarray(seqs)
        if handles.ndim != 1 or (handles.size and handles.dtype.kind not in "iu"):
            raise UnknownSequence(seqs, "is not a one-dimensional sequence of handles")
        handles = handles.astype(np.int64, copy=False)
        last, rows = self._last  # the same batch as before, mostly: two comparisons instead of ten
        if last.size == handles.size and not np.count_nonzero(last != handles):
            return rows
        rows = handles & self._mask
        if np.count_nonzero(self._ready.take(rows) != handles):
            for seq in handles.tolist():
                self.resident_row(seq)
        order = np.arange(rows.size)
        self._once[rows] = order
        twice = self._once.take(rows) != order
        if np.count_nonzero(twice):
            raise SequenceTwice(int(handles[twice][0]), "is named twice in one call")
        rows.flags.writeable = False  # it is handed out again
        self._last = (handles.copy(), rows)
        return rows
