"""``RunPool``: the block pool of the adaptive mode, which places blocks of a sequence side by side."""

from __future__ import annotations

from collections import deque

import numpy as np

from pagedgen.errors import OutOfBlocks
from pagedgen.runtime.arrays import EMPTY, I32, I64, Bool
from pagedgen.runtime.block_pool import BlockPool

RUN_BLOCKS = 16  # blocks of the largest run: 256 tokens at block 16
RESERVE_BELOW = 0.8  # share of the pool in use up to which every new run gets room to grow


def _largest_pieces() -> np.ndarray[tuple[int], np.dtype[np.int8]]:
    """For each free map of 16 blocks: log2 of its largest aligned free piece, or -1."""
    pieces = np.arange(1 << 16, dtype=np.uint32)
    orders = np.where(pieces, 0, -1).astype(np.int8)
    for shift, firsts in ((1, 0x5555), (2, 0x1111), (4, 0x0101), (8, 0x0001)):
        pieces = pieces & (pieces >> np.uint32(shift)) & np.uint32(firsts)
        orders += pieces > 0
    return orders


_ORDERS = _largest_pieces()


class RunPool(BlockPool):
    """A buddy allocator (Knowlton, 1965) on bit maps, whose reservations are wishes and cost nothing.

    The pool is cut into aligned runs of ``run_blocks`` blocks with a map of the free ones each. A sequence
    goes on in the block behind its last one while that is free. Otherwise it opens a run: a wholly free one
    while the pool is filled to less than ``RESERVE_BELOW`` or it wants all of it; above that, the tightest
    aligned piece. Others avoid a run in which somebody still grows as long as there is anything else,
    so that free blocks are never out of reach.

    Eviction follows placement: a run's cached blocks of priority 0 go when the run is opened, the runs that
    have been free for longest first. Content of higher priority goes last, as in :class:`BlockPool`.
    """

    def __init__(self, num_blocks: int, run_blocks: int = RUN_BLOCKS) -> None:
        super().__init__(num_blocks)
        self._fresh = num_blocks  # the maps know what is free
        self.run_blocks = run_blocks
        self._shift = run_blocks.bit_length() - 1  # also the order of a whole run
        num_runs = -(-num_blocks // run_blocks)
        self._maps = np.zeros(num_runs, np.uint16)  # a bit a block: free, and not of raised priority
        self._orders = np.full(num_runs, -1, np.int8)  # of the largest aligned free piece
        self._tips: I32 = np.full(num_runs, -1, np.int32)  # where the last sequence to open the run is
        self._stamps = np.zeros(num_runs, np.int64)  # times it became free as a whole
        self._whole: deque[tuple[int, int]] = deque()  # (run, stamp); stale unless it still holds
        self._open(np.arange(num_blocks, dtype=np.int32))

    @property
    def nbytes(self) -> int:
        """Host memory of all arrays, in bytes."""
        return super().nbytes + sum(a.nbytes for a in (self._maps, self._orders, self._tips, self._stamps))

    def take(self, n: int) -> tuple[I32, I32]:
        """As :meth:`BlockPool.take`; the blocks are for one sequence, in this order."""
        return self.take_after(np.array([-1], np.int32), np.array([n], np.int32))

    def take_after(self, previous: I32, counts: I32) -> tuple[I32, I32]:
        """Blocks for several sequences: ``counts[i]`` of them behind block ``previous[i]`` (-1: anywhere).

        Returns:
            (blocks, int32 ``[sum(counts)]``; those of them whose cached content is evicted by this).

        Raises:
            OutOfBlocks: fewer are free; nothing was taken.
        """
        total = int(counts.sum())
        if total > self.num_free:
            raise OutOfBlocks(total, self.num_free)
        if not total:
            return EMPTY, EMPTY
        ends = counts.cumsum()
        blocks: I32 = np.empty(total, np.int32)
        lasts = previous.copy()
        # First everybody's next block, if it is free: nobody opens a run in another's way.
        next_ones = previous + np.int32(1)
        inside = (previous >= 0) & (next_ones & (self.run_blocks - 1) != 0) & (counts > 0)
        inside &= self._is_open(np.minimum(next_ones, self.num_blocks - 1)) & (next_ones < self.num_blocks)
        at = np.flatnonzero(inside)
        if at.size:
            taken, first = np.unique(next_ones[at], return_index=True)  # forks may want the same one
            at = at[first]
            self._close(taken)
            self.refs[taken] = 1
            self._tips[taken >> self._shift] = taken
            blocks[ends[at] - counts[at]] = taken
            lasts[at] = taken
        left = counts.copy()
        left[at] -= 1
        for i in np.flatnonzero(left > 0).tolist():
            stop = int(ends[i])
            self._fill(blocks[stop - int(left[i]) : stop], int(lasts[i]))
        return blocks, self._settle(blocks)

    def take_piece(self, n: int) -> tuple[I32, I32] | None:
        """``n`` blocks at the head of an aligned piece where nobody grows, or None; as :meth:`take`."""
        order = (n - 1).bit_length()
        run = self._tightest(order, self._grows_on())
        if run < 0:
            return None
        blocks: I32 = np.empty(n, np.int32)
        self._claim(blocks, run, self._piece_in(run, order), n)
        return blocks, self._settle(blocks)

    def take_holes(self, scattered: I32, most: int) -> tuple[I64, I32, I32]:
        """Holes for the blocks of runs that hold nothing but ``scattered`` ones, which so become whole.

        The runs with the fewest blocks come first; nobody grows in them, nor where the holes are, and no hole
        is cut from a piece of half a run.

        Args:
            scattered: blocks that may move, int32 ``[n]``.
            most: how many may.

        Returns:
            (which of ``scattered`` move, int64 ``[m]``; the holes, int32 ``[m]``, taken; those of them whose
            cached content is evicted).
        """
        free = np.bitwise_count(self._maps)
        quiet = ~self._grows_on()
        held = np.bincount(scattered >> self._shift, minlength=self._maps.size)
        runs = np.flatnonzero((held > 0) & (held + free == self.run_blocks) & quiet)
        runs = runs[np.argsort(held[runs], kind="stable")]
        runs = runs[held[runs].cumsum() <= most]
        places = np.flatnonzero((self._orders >= 0) & (self._orders < self._shift - 1) & quiet)
        while True:
            others = np.setdiff1d(places, runs)
            others = others[np.argsort(free[others], kind="stable")]  # the fullest first
            count = int(held[runs].sum())
            if count <= int(free[others].sum()):
                break
            runs = runs[: runs.size // 2]
        if not count:
            return np.empty(0, np.int64), EMPTY, EMPTY
        bits = self._maps[others, None] >> np.arange(self.run_blocks, dtype=np.uint16) & np.uint16(1)
        at, slots = np.nonzero(bits)
        holes = (others[at] * self.run_blocks + slots)[:count].astype(np.int32)
        self._close(holes)
        self.refs[holes] = 1
        return np.flatnonzero(np.isin(scattered >> self._shift, runs)), holes, self._settle(holes)

    def share(self, blocks: I32, owners: I32 | int = 1) -> None:
        """As :meth:`BlockPool.share`."""
        self._close(blocks[(self.refs.take(blocks) == 0) & (self.priority.take(blocks) == 0)])
        super().share(blocks, owners)

    def retain(self, blocks: I32) -> None:
        """As :meth:`BlockPool.retain`."""
        super().retain(blocks)
        self._open(blocks[self.priority.take(blocks) == 0])

    def discard(self, blocks: I32) -> None:
        """As :meth:`BlockPool.discard`."""
        self.num_free += blocks.size
        self.priority[blocks] = 0
        self._open(blocks)

    def forget(self, blocks: I32) -> None:
        """As :meth:`BlockPool.forget`."""
        raised = blocks[self.priority.take(blocks) > 0]
        self._places[blocks] = -1
        self.num_cached_free -= blocks.size
        self.priority[raised] = 0
        self._open(raised)

    # Inside

    def _settle(self, blocks: I32) -> I32:
        """Count claimed blocks; returns those whose cached content is evicted."""
        evicted: I32 = blocks[self._places.take(blocks) >= 0]
        if evicted.size:
            self._places[evicted] = -1
            self.num_cached_free -= evicted.size
            self.priority[evicted] = 0
        self.num_free -= blocks.size
        return evicted

    def _bits(self, blocks: I32) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
        return np.uint16(1) << (blocks & (self.run_blocks - 1)).astype(np.uint16)

    def _is_open(self, blocks: I32) -> Bool:
        is_open: Bool = self._maps.take(blocks >> self._shift) & self._bits(blocks) != 0
        return is_open

    def _open(self, blocks: I32) -> None:
        """Free blocks enter the maps."""
        if not blocks.size:
            return
        runs = blocks >> self._shift
        np.bitwise_or.at(self._maps, runs, self._bits(blocks))
        self._orders[runs] = _ORDERS.take(self._maps.take(runs))
        whole = runs[self._orders.take(runs) == self._shift]
        if not whole.size:
            return
        whole = np.unique(whole)
        self._stamps[whole] += 1
        self._tips[whole] = -1
        self._whole.extend(zip(whole.tolist(), self._stamps.take(whole).tolist(), strict=True))
        if len(self._whole) > 2 * self._maps.size + 64:  # stale entries are dropped when they are too many
            self._whole = deque(entry for entry in self._whole if self._is_whole(*entry))

    def _close(self, blocks: I32) -> None:
        """Blocks leave the maps."""
        if not blocks.size:
            return
        runs = blocks >> self._shift
        np.bitwise_and.at(self._maps, runs, ~self._bits(blocks))
        self._orders[runs] = _ORDERS.take(self._maps.take(runs))

    def _fill(self, out: I32, last: int) -> None:
        """Claim ``out.size`` blocks behind ``last`` (-1: anywhere), in as few pieces as there are."""
        done = 0
        while done < out.size:
            run, at = divmod(last + 1, self.run_blocks)
            if last >= 0 and at:
                ahead = int(self._maps[run]) >> at
                length = min(out.size - done, (ahead ^ (ahead + 1)).bit_length() - 1)
                if length:
                    self._claim(out[done:], run, at, length)
                    done, last = done + length, last + length
                    continue
            length = self._begin(out[done:])
            done += length
            last = int(out[done - 1])

    def _begin(self, out: I32) -> int:
        """Claim the first blocks of ``out`` in the best place there is; returns how many."""
        n = out.size
        used = self.num_blocks - self.num_free
        run, order = -1, self._shift
        if n >= self.run_blocks or used < RESERVE_BELOW * self.num_blocks:
            run = self._oldest_whole()
        if run < 0:
            order = min((n - 1).bit_length(), self._shift)
            run = self._tightest(order, self._growing())
        if run < 0:
            run, order = self._largest()
        if run < 0:  # what is left has a raised priority
            for queue in self._queues[1:]:
                part = queue.pop(n)
                if part.size:
                    out[: part.size] = part
                    self.refs[part] = 1
                    self._places[part] = 0  # the caller counts what was evicted by its place
                    return part.size
        length = min(n, 1 << order)
        self._claim(out, run, self._piece_in(run, order), length)
        return length

    def _claim(self, out: I32, run: int, at: int, length: int) -> None:
        start = run * self.run_blocks + at
        out[:length] = np.arange(start, start + length)
        self._maps[run] &= np.uint16(~(((1 << length) - 1) << at) & 0xFFFF)
        self._orders[run] = _ORDERS[self._maps[run]]
        self.refs[start : start + length] = 1
        tip = self._tips[run]
        if tip < 0 or not self.refs[tip] or start <= tip + 1 < start + length:
            self._tips[run] = start + length - 1

    def _is_whole(self, run: int, stamp: int) -> bool:
        return bool(self._stamps[run] == stamp and self._orders[run] == self._shift)

    def _oldest_whole(self) -> int:
        while self._whole:
            run, stamp = self._whole.popleft()
            if self._is_whole(run, stamp):
                return run
        return -1

    def _growing(self) -> Bool:
        """Runs where the sequence that opened them last is still alive."""
        growing: Bool = (self._tips >= 0) & (self.refs.take(self._tips, mode="clip") > 0)
        return growing

    def _grows_on(self) -> Bool:
        """Those of them where the next block is free, too: what compaction leaves alone.

        Placement keeps away from the others as well: on the Azure conversation trace, in a pool 95% full, 98%
        of the blocks lie in runs of 64 tokens with that, 90% without.
        """
        behind = np.minimum(self._tips + np.int32(1), self.num_blocks - 1)
        inside: Bool = behind & (self.run_blocks - 1) != 0
        return self._growing() & inside & self._is_open(behind)

    def _tightest(self, order: int, busy: Bool) -> int:
        """The run with the smallest piece of at least 2^order free blocks that is not ``busy``, or -1."""
        fits = (self._orders >= order) & ~busy
        if not fits.any():
            return -1
        return int(np.where(fits, self._orders, np.int8(127)).argmin())

    def _largest(self) -> tuple[int, int]:
        """The run with the largest free piece, if need be in somebody's way, and its order; or -1."""
        for orders in (np.where(self._growing(), np.int8(-1), self._orders), self._orders):
            run = int(orders.argmax())
            if orders[run] >= 0:
                return run, int(orders[run])
        return -1, -1

    def _piece_in(self, run: int, order: int) -> int:
        """The first aligned free piece of 2^order blocks of a run that has one."""
        size, free = 1 << order, int(self._maps[run])
        wanted = (1 << size) - 1
        return next(at for at in range(0, self.run_blocks, size) if free >> at & wanted == wanted)
