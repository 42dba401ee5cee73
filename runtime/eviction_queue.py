"""``EvictionQueue``: free blocks that still hold cached content, oldest first."""

from __future__ import annotations

import numpy as np

from pagedgen.runtime.arrays import EMPTY, I32


class EvictionQueue:
    """First in, first out, with removal from anywhere by forgetting.

    ``places[block]`` says where the block's valid entry lies; a block that is taken back (a prefix hit) gets
    place -1 and its entry goes stale where it lies. Stale entries vanish when the front reaches them or
    when the buffer is full and the valid ones are moved down: a push costs a constant amount, amortised.
    A linked list would need one Python step a block to unlink; this needs one numpy call for all of them.
    """

    def __init__(self, places: I32, level: int = 0, levels: int = 1) -> None:
        # Queues that share ``places`` have a level each, which is part of the place: index * levels + level.
        self._places, self._level, self._levels = places, level, levels
        self._ring: I32 = np.empty(64, np.int32)
        self._head = 0
        self._tail = 0

    @property
    def nbytes(self) -> int:
        """Host memory of the buffer, in bytes."""
        return self._ring.nbytes

    def push(self, blocks: I32) -> None:
        """Append blocks that are in no queue, the first to be evicted first."""
        n = blocks.size
        if self._tail + n > self._ring.size:
            self._make_room(n)
        end = self._tail + n
        self._ring[self._tail : end] = blocks
        self._places[blocks] = self._range(self._tail, end)
        self._tail = end

    def pop(self, n: int) -> I32:
        """The ``n`` oldest blocks, or as many as there are; they are in the queue no more."""
        parts: list[I32] = []
        while n > 0 and self._head < self._tail:
            end = min(self._head + n, self._tail)
            part = self._ring[self._head : end]
            valid = self._places.take(part) == self._range(self._head, end)
            if not valid.all():
                part = part[valid]
            self._head = end
            if part.size:
                self._places[part] = -1
                parts.append(part)
                n -= part.size
        if not parts:
            return EMPTY
        return np.concatenate(parts)  # a copy also of a single part: the buffer is reused

    def _make_room(self, n: int) -> None:
        live = self._ring[self._head : self._tail]
        live = live[self._places.take(live) == self._range(self._head, self._tail)]
        size = self._ring.size
        if live.size + n > size // 2:  # half empty after the move, so that moves stay rare
            size = 1 << int(2 * (live.size + n) - 1).bit_length()
            size = min(size, max(2 * self._places.size, live.size + n))
        ring = np.empty(size, np.int32)
        ring[: live.size] = live
        self._places[live] = self._range(0, live.size)
        self._ring, self._head, self._tail = ring, 0, int(live.size)

    def _range(self, start: int, stop: int) -> I32:
        places = np.arange(start, stop, dtype=np.int32)
        if self._levels > 1:
            places *= np.int32(self._levels)
            places += np.int32(self._level)
        return places
