"""``BlockIndex``: fingerprint -> block, for many fingerprints in one call."""

from __future__ import annotations

import numpy as np

from pagedgen.runtime.arrays import I32, I64, U32, U64

WAYS = 8  # entries a bucket: 32 bytes, half a cache line
_EMPTY = np.uint32(0)
_BLOCK = np.uint32((1 << 24) - 1)
_TAG_SHIFT = np.uint32(24)


class BlockIndex:
    """A hash table of two choices and eight ways, all arrays.

    Each fingerprint (two 64-bit lanes) may live in either of two buckets, named by the top bits of its
    lanes. At the load of at most one half that is kept here, two choices of eight ways overflow
    practically never (Azar et al., "Balanced allocations", 1999); an entry that would overflow is not
    indexed and counted in ``overflows``. There are no tombstones and there is no rebuild, so deletion
    is one store and no call ever pauses; linear probing would need a rebuild of 100 ms at a million blocks.

    An entry is 7 bits of tag and the block; a tag match is confirmed with both lanes, so that a hit means
    128 equal bits.
    """

    def __init__(self, num_blocks: int) -> None:
        self._bits = max(1, int((num_blocks + 3) // 4 - 1).bit_length())  # load <= 8 ways * buckets / 2
        self._shift = np.uint64(64 - self._bits)
        self._table = np.zeros((1 << self._bits, WAYS), np.uint32)
        self._entries = self._table.reshape(-1)
        self.lane_a: U64 = np.zeros(num_blocks, np.uint64)
        self.lane_b: U64 = np.zeros(num_blocks, np.uint64)
        self.place: I32 = np.full(num_blocks, -1, np.int32)  # where a block's entry lies; -1: not indexed
        self.overflows = 0

    @property
    def nbytes(self) -> int:
        """Host memory of all arrays, in bytes."""
        return sum(a.nbytes for a in (self._table, self.lane_a, self.lane_b, self.place))

    def _buckets(self, a: U64, b: U64) -> tuple[I64, I64, U32]:
        # Top bits: in a sum of products with random keys they are the best mixed (Lemire and Kaser,
        # "Strongly universal string hashing is fast", 2014). The tag is the next 7 bits, above the block.
        tag = ((a >> (self._shift - np.uint64(7))).astype(np.uint32) | np.uint32(0x80)) << _TAG_SHIFT
        return (a >> self._shift).astype(np.int64), (b >> self._shift).astype(np.int64), tag

    def _candidates(self, first: I64, second: I64) -> U32:
        """Entries of both buckets: uint32 ``[n, 2 * WAYS]``."""
        entries = np.empty((first.size, 2 * WAYS), np.uint32)
        entries[:, :WAYS] = self._table.take(first, axis=0)
        entries[:, WAYS:] = self._table.take(second, axis=0)
        return entries

    def lookup(self, a: U64, b: U64) -> I32:
        """A block for each fingerprint, -1 where there is none: int32 ``[n]``."""
        found = np.full(a.size, -1, np.int32)
        first, second, tag = self._buckets(a, b)
        entries = self._candidates(first, second)
        # The tag's top bit is set in every used entry: xor leaves less than 2^24 only where the tags agree.
        near = np.flatnonzero(((entries ^ tag[:, None]) <= _BLOCK).reshape(-1))
        if near.size:
            wanted = near // (2 * WAYS)
            blocks = (entries.reshape(-1).take(near) & _BLOCK).astype(np.int32)
            same = self.lane_a.take(blocks) == a.take(wanted)
            same &= self.lane_b.take(blocks) == b.take(wanted)
            found[wanted[same]] = blocks[same]
        return found

    def insert(self, blocks: I32, a: U64, b: U64) -> None:
        """Index distinct blocks that are not indexed yet under their fingerprints."""
        self.lane_a[blocks] = a
        self.lane_b[blocks] = b
        first, second, entry = self._buckets(a, b)
        entry |= blocks.astype(np.uint32)
        while True:
            free = self._candidates(first, second) == _EMPTY
            room = free.reshape(-1, 2, WAYS).sum(axis=2, dtype=np.int8)
            pick = room[:, 1] > room[:, 0]  # the emptier bucket: that is what makes overflow so rare
            ways = np.where(pick, free[:, WAYS:].argmax(axis=1), free[:, :WAYS].argmax(axis=1))
            slots = np.where(pick, second, first) * WAYS + ways
            full = ~room.any(axis=1)
            if full.any():
                self.overflows += int(full.sum())
                keep = ~full
                blocks, first, second, entry, slots = (x[keep] for x in (blocks, first, second, entry, slots))
            self._entries[slots] = entry
            won = self._entries.take(slots) == entry  # two of this call may have wanted one slot
            if won.all():
                self.place[blocks] = slots
                return
            self.place[blocks[won]] = slots[won]
            lost = ~won
            blocks, first, second, entry = blocks[lost], first[lost], second[lost], entry[lost]

    def remove(self, blocks: I32) -> None:
        """Take indexed blocks out."""
        self._entries[self.place.take(blocks)] = _EMPTY
        self.place[blocks] = -1
