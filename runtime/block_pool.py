"""``BlockPool``: which blocks of the KV pool are in use, by how many owners, and which goes next."""

from __future__ import annotations

import numpy as np

from pagedgen.errors import InvalidPool, OutOfBlocks
from pagedgen.runtime.arrays import EMPTY, I32
from pagedgen.runtime.eviction_queue import EvictionQueue

PRIORITIES = 4  # classes of cached content; the lowest class is evicted first


class BlockPool:
    """Reference counts and free blocks of ``num_blocks`` blocks.

    A block is free when its count is 0. Free blocks without content are taken first; cached content is
    evicted only when those are used up: lowest priority first, least recently used first within a priority.

    Attributes: ``refs`` int32 ``[num_blocks]``, owners of each block; ``priority`` uint8
    ``[num_blocks]``; ``num_free``; ``num_cached_free``, free blocks that hold reusable content.
    """

    def __init__(self, num_blocks: int) -> None:
        if type(num_blocks) is not int or not 1 <= num_blocks < 1 << 24:
            raise InvalidPool("num_blocks", num_blocks, "1 to 16777215 blocks are allowed")
        self.num_blocks = num_blocks
        self.refs: I32 = np.zeros(num_blocks, np.int32)
        self.priority = np.zeros(num_blocks, np.uint8)
        self.num_free = num_blocks
        self.num_cached_free = 0
        self._fresh = 0  # blocks from here on were never used: no list of them is kept
        self._clean: I32 = np.empty(64, np.int32)  # a stack of free blocks without content
        self._num_clean = 0
        self._places: I32 = np.full(num_blocks, -1, np.int32)
        self._queues = [EvictionQueue(self._places, level, PRIORITIES) for level in range(PRIORITIES)]

    @property
    def nbytes(self) -> int:
        """Host memory of all arrays, in bytes."""
        arrays = (self.refs, self.priority, self._clean, self._places)
        return sum(a.nbytes for a in arrays) + sum(q.nbytes for q in self._queues)

    def take(self, n: int) -> tuple[I32, I32]:
        """``n`` blocks with one owner each: (blocks, those of them whose cached content is evicted by this).

        Raises:
            OutOfBlocks: fewer are free; nothing was taken.
        """
        if n > self.num_free:
            raise OutOfBlocks(n, self.num_free)
        if n == 0:
            return EMPTY, EMPTY
        parts: list[I32] = []
        evicted = EMPTY
        wanted = n
        if self._num_clean:
            keep = max(0, self._num_clean - wanted)
            parts.append(self._clean[keep : self._num_clean].copy())
            wanted -= self._num_clean - keep
            self._num_clean = keep
        if wanted and self._fresh < self.num_blocks:
            end = min(self._fresh + wanted, self.num_blocks)
            parts.append(np.arange(self._fresh, end, dtype=np.int32))
            wanted -= end - self._fresh
            self._fresh = end
        if wanted:
            popped = []
            for queue in self._queues:
                part = queue.pop(wanted)
                if part.size:
                    popped.append(part)
                    wanted -= part.size
                if not wanted:
                    break
            evicted = popped[0] if len(popped) == 1 else np.concatenate(popped)
            self.num_cached_free -= evicted.size
            self.priority[evicted] = 0
            parts.append(evicted)
        blocks = parts[0] if len(parts) == 1 else np.concatenate(parts)
        self.refs[blocks] = 1
        self.num_free -= n
        return blocks, evicted

    def share(self, blocks: I32, owners: I32 | int = 1) -> None:
        """Add owners to distinct blocks; free ones with content come back into use."""
        counts = self.refs.take(blocks)
        self.refs[blocks] = counts + owners
        revived = blocks[counts == 0]
        if revived.size:
            self._places[revived] = -1
            self.num_free -= revived.size
            self.num_cached_free -= revived.size

    def drop(self, blocks: I32, owners: I32 | int = 1) -> I32:
        """Take owners from distinct blocks; returns those that have none left, in the given order.

        The caller says at once where they go: :meth:`retain` or :meth:`discard`.
        """
        counts = self.refs.take(blocks) - owners
        self.refs[blocks] = counts
        gone: I32 = blocks if not counts.any() else blocks[counts == 0]
        return gone

    def retain(self, blocks: I32) -> None:
        """Ownerless blocks with reusable content join the eviction queues, in the given order."""
        if not blocks.size:
            return
        self.num_free += blocks.size
        self.num_cached_free += blocks.size
        classes = self.priority.take(blocks)
        if not classes.any():
            self._queues[0].push(blocks)
            return
        for level, queue in enumerate(self._queues):
            part = blocks[classes == level]
            if part.size:
                queue.push(part)

    def discard(self, blocks: I32) -> None:
        """Ownerless blocks without content become free."""
        if not blocks.size:
            return
        self.num_free += blocks.size
        end = self._num_clean + blocks.size
        if end > self._clean.size:
            size = min(self.num_blocks, max(end, 2 * self._clean.size))
            stack = np.empty(size, np.int32)
            stack[: self._num_clean] = self._clean[: self._num_clean]
            self._clean = stack
        self._clean[self._num_clean : end] = blocks
        self._num_clean = end
        self.priority[blocks] = 0

    def forget(self, blocks: I32) -> None:
        """Free blocks whose content became worthless move from the eviction queues to the plain free ones."""
        self._places[blocks] = -1
        self.num_free -= blocks.size
        self.num_cached_free -= blocks.size
        self.discard(blocks)
