"""``BlockIndex``: fingerprint -> block, for many fingerprints in one call."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pagedgen.runtime.arrays import I32, I64, U32, U64, Bool

WAYS = 8  # entries a bucket: 32 bytes, half a cache line
_EMPTY = np.uint32(0)
_BLOCK = np.uint32((1 << 24) - 1)
_USED = np.uint32(0x80)
_TAG_BITS = np.uint64(7)
_TAG_SHIFT = np.uint32(24)
_ONES = np.uint64(0x0101010101010101)
_TOP_BYTE = np.uint64(56)


@dataclass(frozen=True, slots=True)
class Probe:
    """Where ``n`` fingerprints may lie.

    ``buckets`` int64 ``[n, 2]``; ``tags`` uint32 ``[n]``, in place above the block; ``entries`` uint32
    ``[n, 2 * WAYS]``, what the buckets hold.
    """

    buckets: I64
    tags: U32
    entries: U32

    def where(self, mask: Bool) -> Probe:
        """The part of it that ``mask`` selects."""
        return Probe(self.buckets[mask], self.tags[mask], self.entries[mask])


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

    def lookup(self, a: U64, b: U64) -> I32:
        """A block for each fingerprint, -1 where there is none: int32 ``[n]``."""
        return self._find(a, b, self._probe(a, b))

    def insert(self, blocks: I32, a: U64, b: U64) -> None:
        """Index distinct blocks that are not indexed yet, whether or not their fingerprints are."""
        self._place(blocks, a, b, self._probe(a, b))

    def insert_missing(self, blocks: I32, a: U64, b: U64) -> I32:
        """Index the blocks whose fingerprints are not indexed yet; returns the blocks that were, or -1."""
        probe = self._probe(a, b)
        known = self._find(a, b, probe)
        missing = known < 0
        if np.count_nonzero(missing) == known.size:
            self._place(blocks, a, b, probe)
        else:
            self._place(blocks[missing], a[missing], b[missing], probe.where(missing))
        return known

    def _probe(self, a: U64, b: U64) -> Probe:
        # Top bits: in a sum of products with random keys they are the best mixed (Lemire and Kaser,
        # "Strongly universal string hashing is fast", 2014). The tag is the next 7 bits, above the block.
        tags = (a >> (self._shift - _TAG_BITS)).astype(np.uint32)
        tags |= _USED
        tags <<= _TAG_SHIFT
        buckets = np.empty((a.size, 2), np.int64)
        buckets[:, 0] = a >> self._shift
        buckets[:, 1] = b >> self._shift
        return Probe(buckets, tags, self._table.take(buckets, axis=0).reshape(a.size, 2 * WAYS))

    def _find(self, a: U64, b: U64, probe: Probe) -> I32:
        found = np.full(a.size, -1, np.int32)
        # The tag's top bit is set in every used entry: xor leaves less than 2^24 only where the tags agree.
        near = ((probe.entries ^ probe.tags[:, None]) <= _BLOCK).reshape(-1).nonzero()[0]
        if near.size:
            wanted = near // (2 * WAYS)
            blocks = (probe.entries.reshape(-1).take(near) & _BLOCK).astype(np.int32)
            same = self.lane_a.take(blocks) == a.take(wanted)
            same &= self.lane_b.take(blocks) == b.take(wanted)
            found[wanted[same]] = blocks[same]
        return found

    def _place(self, blocks: I32, a: U64, b: U64, probe: Probe) -> None:
        self.lane_a[blocks] = a
        self.lane_b[blocks] = b
        while True:
            free = (probe.entries == _EMPTY).reshape(-1, WAYS)  # two rows a block
            # Free ways of each bucket: eight bytes of 0 or 1, added up by one multiplication.
            room = (free.view(np.uint64).reshape(-1, 2) * _ONES) >> _TOP_BYTE
            second = room[:, 1] > room[:, 0]  # the emptier bucket: that is what makes overflow so rare
            pick = np.arange(0, 2 * blocks.size, 2)
            pick += second
            slots = probe.buckets.reshape(-1).take(pick) * WAYS
            slots += free.take(pick, axis=0).argmax(axis=1)
            entries = probe.tags | blocks.astype(np.uint32)
            fits = room.reshape(-1).take(pick) != 0
            if np.count_nonzero(fits) != fits.size:
                self.overflows += int((~fits).sum())
                blocks, slots, entries, probe = blocks[fits], slots[fits], entries[fits], probe.where(fits)
            self._entries[slots] = entries
            lost = self._entries.take(slots) != entries  # two of this call may have wanted one slot
            if not np.count_nonzero(lost):
                self.place[blocks] = slots
                return
            self.place[blocks[~lost]] = slots[~lost]
            blocks, probe = blocks[lost], probe.where(lost)
            probe = replace(
                probe, entries=self._table.take(probe.buckets, axis=0).reshape(blocks.size, 2 * WAYS)
            )

    def remove(self, blocks: I32) -> None:
        """Take indexed blocks out."""
        self._entries[self.place.take(blocks)] = _EMPTY
        self.place[blocks] = -1

    def move(self, blocks: I32, to: I32) -> None:
        """Other blocks take over the fingerprints of indexed ones."""
        places = self.place.take(blocks)
        self._entries[places] = self._entries.take(places) & ~_BLOCK | to.astype(np.uint32)
        self.lane_a[to], self.lane_b[to] = self.lane_a.take(blocks), self.lane_b.take(blocks)
        self.place[blocks] = -1
        self.place[to] = places
