"""``ExactStore``: the tokens behind fingerprints, for hits that are right with certainty."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pagedgen.runtime.arrays import I32, I64, Bool
from pagedgen.runtime.fingerprint import ExtraKey


class ExactStore:
    """Tokens and a link to the predecessor for each registered block.

    A prefix gets an identity, a number that is never used again, when its last block is registered. A block
    continues a prefix when its link is that prefix's identity and its tokens are the same, so a walk from
    the root proves a hit whatever the fingerprints say. Identity 0 is the empty prefix of nobody.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._tokens: I32 = np.zeros((num_blocks, block_size), np.int32)
        self._identity: I64 = np.zeros(num_blocks, np.int64)
        self._link: I64 = np.zeros(num_blocks, np.int64)
        self._mark: I64 = np.zeros(num_blocks, np.int64)
        self._roots: dict[tuple[int, int], int] = {}
        self._marks: dict[tuple[tuple[int, bytes], ...], int] = {(): 0}
        self._next = 1

    @property
    def nbytes(self) -> int:
        """Host memory of all arrays, in bytes."""
        return sum(a.nbytes for a in (self._tokens, self._identity, self._link, self._mark))

    def root(self, root: tuple[int, int]) -> int:
        """The identity of no tokens under a salt."""
        if root not in self._roots:
            self._roots[root] = self._new(1)[0]
        return self._roots[root]

    def identity(self, block: int) -> int:
        """The prefix that a registered block ends."""
        return int(self._identity[block])

    def identity_of(self, blocks: I32) -> I64:
        """The prefix that each registered block ends, int64 ``[n]``."""
        return self._identity.take(blocks)

    def marks(self, start: int, num_blocks: int, extra: Sequence[ExtraKey]) -> I64:
        """A number a block for the extra content that begins inside it; 0 for none. ``start``: a token."""
        marks = np.zeros(num_blocks, np.int64)
        inside: dict[int, list[tuple[int, bytes]]] = {}
        for item in extra:
            block, offset = divmod(item.position - start, self._block_size)
            if 0 <= block < num_blocks:
                inside.setdefault(block, []).append((offset, item.content))
        for block, items in inside.items():
            marks[block] = self._marks.setdefault(tuple(sorted(items)), len(self._marks))
        return marks

    def prune(
        self, found: Sequence[I32], tokens: I32, marks: I64, root: int, windows: Sequence[int | None]
    ) -> None:
        """Set what is not proved to -1 in ``found`` (``[n]`` a group); ``tokens`` is ``[n, block_size]``."""
        identities: I64 | None = None
        for blocks, window in sorted(zip(found, windows, strict=True), key=lambda pair: pair[1] is not None):
            fine = blocks >= 0
            fine &= self._same(blocks, tokens, marks)
            mine = self._identity.take(blocks)
            if window is None or identities is None:
                fine &= self._link.take(blocks) == np.concatenate(([root], mine[:-1]))
                fine = np.logical_and.accumulate(fine)
            else:  # blocks behind the window may be gone: the full group proves what each one continues
                fine &= mine == identities
            blocks[~fine] = -1
            if identities is None:
                identities = np.where(fine, mine, -1)

    def confirm(self, known: I32, tokens: I32, marks: I64, links: I64, identities: I64 | None) -> I32:
        """``known`` with -1 where the block is not those tokens after that prefix.

        ``identities``: of the same prefixes in the first group of layers; they have to agree.
        """
        fine = (known >= 0) & self._same(known, tokens, marks) & (self._link.take(known) == links)
        if identities is not None:
            fine &= self._identity.take(known) == identities
        return np.where(fine, known, np.int32(-1))

    def follows(self, block: int, tokens: I32, link: int) -> bool:
        """Whether a registered block begins with ``tokens`` and continues the prefix ``link``."""
        same = bool((self._tokens[block, : tokens.size] == tokens).all())
        return same and int(self._link[block]) == link and int(self._mark[block]) == 0

    def identities(self, known: I32) -> I64:
        """The prefix that each block of ``known`` ends; a new one where it is -1."""
        identities: I64 = self._identity.take(known)
        fresh = known < 0
        identities[fresh] = self._new(int(fresh.sum()))
        return identities

    def store(self, blocks: I32, tokens: I32, marks: I64, links: I64, identities: I64) -> None:
        """Keep tokens, links and identities of blocks that are being registered."""
        self._tokens[blocks] = tokens
        self._mark[blocks], self._link[blocks], self._identity[blocks] = marks, links, identities

    def move(self, blocks: I32, to: I32) -> None:
        """Other blocks take over tokens, links and identities."""
        for array in (self._tokens, self._identity, self._link, self._mark):
            array[to] = array.take(blocks, axis=0)

    def _new(self, n: int) -> I64:
        self._next += n
        return np.arange(self._next - n, self._next, dtype=np.int64)

    def _same(self, blocks: I32, tokens: I32, marks: I64) -> Bool:
        same: Bool = (self._tokens.take(blocks, axis=0) == tokens).all(axis=1)
        same &= self._mark.take(blocks) == marks
        return same
