"""``PrefixCache``: which block holds the KV of which prefix, down to a part of a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pagedgen.runtime.arrays import I32, I64, U64, Bool
from pagedgen.runtime.block_index import BlockIndex
from pagedgen.runtime.exact_store import ExactStore
from pagedgen.runtime.fingerprint import ExtraKey, Fingerprinter

TAIL_TOKENS = 1 << 20  # tokens kept for partial matches: 4 MiB, whatever the pool
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """What the cache holds of a prompt, and the fingerprints that found it.

    ``num_tokens`` tokens are cached: ``num_blocks`` whole blocks that can be shared, and ``partial``
    tokens at the head of a block that has to be copied. At least the last token of the prompt is left out:
    somebody has to compute its logits.
    """

    tokens: I32
    root: tuple[int, int]
    extra: tuple[ExtraKey, ...]
    sums: tuple[U64, U64]  # [n] each: fingerprint of tokens[:i + 1]
    found: tuple[I32, ...]  # a group: the block that holds each whole block of the prompt, or -1
    num_blocks: int  # whole blocks that can be shared
    firsts: tuple[int, ...]  # a group: the first of them that it still needs
    partial: int
    sources: tuple[int, ...]  # a group: the block to copy; empty without a partial match
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Proof:
    """What registering verified blocks needs beside their tokens.

    ``links``: identity of the prefix that each continues; with ``chain``, that of the first block only,
    int64 ``[1]``, and each other continues the one before. ``marks``: see :meth:`ExactStore.marks`.
    """

    links: I64
    marks: I64
    chain: bool = False


class PrefixCache:
    """Content-addressed blocks.

    A full block is known by the fingerprint of the whole prefix that it ends, so equal fingerprints mean
    equal KV. With ``verify_tokens`` a hit is also compared token by token and link by link up to the
    root: right with certainty, not just with probability 1 - 2^-92, for 4 * block_size + 24 more bytes of
    host memory a block.

    Partial matches: the block that most recently followed a prefix is remembered with its tokens in a
    direct-mapped table (losing an entry costs a partial hit, nothing else); its common head with the rest of
    a prompt is reused by copying. The owner of a block calls :meth:`forget` before the block is reused.

    Args:
        windows: for each group of layers, the sliding window in tokens, or None for full attention.
        match_unit: partial matches are rounded down to a multiple of this many tokens.
        secret: see :class:`Fingerprinter`.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_seq_len: int,
        windows: Sequence[int | None] = (None,),
        match_unit: int = 1,
        verify_tokens: bool = False,
        secret: bytes | None = None,
    ) -> None:
        self.block_size = block_size
        self.match_unit = match_unit
        self.windows = tuple(windows)
        self.fingerprinter = Fingerprinter(max_seq_len, secret)
        self.index = BlockIndex(num_blocks)
        self.exact = ExactStore(num_blocks, block_size) if verify_tokens else None
        # The same tokens give different KV in different groups of layers: each group has its own offset.
        self._group_keys = [self.fingerprinter.digest(bytes([g]), b"group") for g in range(len(windows))]
        rows = max(1, min(4 * num_blocks, TAIL_TOKENS // block_size))
        self._tail_bits = max(1, rows.bit_length() - 1)
        self._tail_block: I32 = np.full(1 << self._tail_bits, -1, np.int32)
        self._tail_fill: I32 = np.zeros(1 << self._tail_bits, np.int32)
        self._tail_tokens: I32 = np.zeros((1 << self._tail_bits, block_size), np.int32)
        self._unwritten: list[I32] = []  # registered since the last forward pass

    @property
    def nbytes(self) -> int:
        """Host memory of all arrays, in bytes."""
        arrays = (self._tail_block, self._tail_fill, self._tail_tokens)
        exact = self.exact.nbytes if self.exact else 0
        return sum(a.nbytes for a in arrays) + self.index.nbytes + self.fingerprinter.nbytes + exact

    def holds(self, blocks: I32) -> Bool:
        """Which blocks have content worth keeping: bool ``[n]``."""
        return self.index.place.take(blocks) >= 0

    def still_holds(self, match: PrefixMatch) -> bool:
        """Whether all that a match found is still there."""
        size = self.block_size
        for group, (blocks, (ka, kb)) in enumerate(zip(match.found, self._group_keys, strict=True)):
            first, last = match.firsts[group], match.num_blocks
            part = blocks[first:last]
            ends = slice(first * size + size - 1, last * size, size)
            if not (
                self.holds(part).all()
                and (self.index.lane_a.take(part) == match.sums[0][ends] + np.uint64(ka)).all()
                and (self.index.lane_b.take(part) == match.sums[1][ends] + np.uint64(kb)).all()
            ):
                return False
        if not match.sources:
            return True
        return self._match_tail(match) == (match.partial, match.sources)

    def match(self, tokens: I32, root: tuple[int, int], extra: tuple[ExtraKey, ...] = ()) -> PrefixMatch:
        """The longest cached prefix of a prompt. Changes nothing."""
        sums = self.prefix_sums(tokens, root, extra)
        size = self.block_size
        whole = tokens.size // size
        ends = [lane[size - 1 :: size] for lane in sums]
        found = [
            self.index.lookup(ends[0] + np.uint64(ka), ends[1] + np.uint64(kb)) for ka, kb in self._group_keys
        ]
        if self.exact and whole:
            grid = tokens[: whole * size].reshape(whole, size)
            self.exact.prune(
                found, grid, self.exact.marks(0, whole, extra), self.exact.root(root), self.windows
            )
        num_blocks = self._common_length(found, max(0, tokens.size - 1) // size)
        firsts = tuple(
            0 if w is None else min(num_blocks, max(0, num_blocks * size - w + 1) // size)
            for w in self.windows
        )
        whole_match = PrefixMatch(
            tokens, root, extra, sums, tuple(found), num_blocks, firsts, 0, (), num_blocks * size
        )
        partial, sources = self._match_tail(whole_match)
        if not partial:
            return whole_match
        return PrefixMatch(
            tokens, root, extra, sums, tuple(found), num_blocks, firsts, partial, sources,
            num_blocks * size + partial,
        )  # fmt: skip

    def prefix_sums(self, tokens: I32, root: tuple[int, int], extra: Sequence[ExtraKey]) -> tuple[U64, U64]:
        """Fingerprints of all prefixes of ``tokens``."""
        a, b = self.fingerprinter.terms(tokens, 0, extra)
        a[:1] += np.uint64(root[0])
        b[:1] += np.uint64(root[1])
        return a.cumsum(), b.cumsum()

    def register(
        self,
        blocks: Sequence[I32],
        sums: tuple[U64, U64],
        parents: tuple[U64, U64],
        tokens: I32,
        fill: int,
        *,
        fresh: bool = False,
        proof: Proof | None = None,
    ) -> I64 | None:
        """Enter ``n`` blocks of each group under their fingerprints.

        Args:
            blocks: int32 ``[n]`` a group, distinct, not registered.
            sums: fingerprint of the prefix that each ends.
            parents: the same at each one's first token.
            tokens: int32 ``[n, block_size]``, of which ``fill`` a row count (a last block may be part full).
            fresh: none of the contents is registered, so there is no need to look.
            proof: what verification needs; given exactly when tokens are verified.

        Returns:
            With ``proof``, the identity of the prefix that each block ends.
        """
        identities: I64 | None = None
        for mine, (ka, kb) in zip(blocks, self._group_keys, strict=True):
            a, b = sums[0] + np.uint64(ka), sums[1] + np.uint64(kb)
            standing = mine  # one block a content is enough: another with the same is not entered
            if self.exact is None and not fresh:
                known = self.index.insert_missing(mine, a, b)
                if np.count_nonzero(known < 0) != known.size:
                    standing = np.where(known < 0, mine, known)
            elif self.exact is None or proof is None or proof.chain:
                self.index.insert(mine, a, b)
                if self.exact is not None and proof is not None:
                    if identities is None:
                        identities = self.exact.identities(np.full(mine.size, -1, np.int32))
                    links = np.concatenate((proof.links, identities[:-1]))
                    self.exact.store(mine, tokens, proof.marks, links, identities)
            else:
                known = self.index.lookup(a, b)
                known = self.exact.confirm(known, tokens, proof.marks, proof.links, identities)
                if identities is None:
                    identities = self.exact.identities(known)
                self.exact.store(mine, tokens, proof.marks, proof.links, identities)
                new = known < 0
                self.index.insert(mine[new], a[new], b[new])
                standing = np.where(new, mine, known)
            if fill == self.block_size:  # a part of a block is entered when it is computed and its owner ends
                self._unwritten.append(mine)
            rows = ((parents[0] + np.uint64(ka)) >> np.uint64(64 - self._tail_bits)).astype(np.int64)
            self._tail_block[rows] = standing
            self._tail_fill[rows] = fill
            self._tail_tokens[rows] = tokens
        return identities

    def unwritten(self, blocks: I32) -> Bool:
        """Which blocks were registered since the last :meth:`settle`: bool ``[n]``."""
        if not self._unwritten:
            return np.zeros(blocks.size, np.bool_)
        return np.isin(blocks, np.concatenate(self._unwritten))

    def settle(self) -> None:
        """A forward pass is about to write the KV of all that is registered."""
        self._unwritten = []

    def forget(self, blocks: I32) -> None:
        """Registered blocks lose their content."""
        self.index.remove(blocks)

    def move(self, blocks: I32, to: I32) -> None:
        """The content of computed blocks is copied to others, which take their place."""
        held = self.holds(blocks)
        blocks, to = blocks[held], to[held]
        if not blocks.size:
            return
        self.index.move(blocks, to)
        if self.exact is not None:
            self.exact.move(blocks, to)
        rows = np.flatnonzero(np.isin(self._tail_block, blocks))
        order = np.argsort(blocks)
        at = np.searchsorted(blocks, self._tail_block.take(rows), sorter=order)
        self._tail_block[rows] = to[order[at]]

    def _common_length(self, found: Sequence[I32], limit: int) -> int:
        """The most whole blocks, at most ``limit``, such that every group holds all it needs of them."""
        windowed: list[tuple[I32, int]] = []
        for blocks, window in zip(found, self.windows, strict=True):
            if window is not None:
                windowed.append((blocks, window))
                continue
            missing = blocks[:limit] < 0
            if missing.any():
                limit = int(missing.argmax())
        if not windowed:
            return limit
        # k blocks will do for a window group when its blocks first(k) .. k - 1 are there: count misses.
        lengths: I64 = np.arange(limit + 1)
        fine = np.ones(limit + 1, np.bool_)
        for blocks, window in windowed:
            misses = np.zeros(limit + 1, np.int64)
            np.cumsum(blocks[:limit] < 0, out=misses[1:])
            firsts = np.maximum(0, lengths * self.block_size - window + 1) // self.block_size
            fine &= misses == misses[np.minimum(firsts, lengths)]
        return int(np.flatnonzero(fine)[-1])

    def _match_tail(self, match: PrefixMatch) -> tuple[int, tuple[int, ...]]:
        """Tokens after the whole blocks that a block to be copied holds, and that block in each group."""
        start = match.num_blocks * self.block_size
        stop = min(start + self.block_size, match.tokens.size - 1)
        # Up to the next image only: what is remembered of a block is its tokens.
        stop = min([stop, *(item.position for item in match.extra if item.position >= start)])
        rest = match.tokens[start:stop]
        partial = int(rest.size)
        if partial < self.match_unit:
            return 0, ()
        parent = match.root
        if start:
            parent = int(match.sums[0][start - 1]), int(match.sums[1][start - 1])
        sources: list[int] = []
        if stop % self.block_size == self.block_size - 1 and match.num_blocks < match.found[0].size:
            # The prompt ends with this block and all of it may be cached, but its last token is computed.
            whole = np.array([found[match.num_blocks] for found in match.found], np.int32)
            if (whole >= 0).all() and not self.unwritten(whole).any():
                return partial - partial % self.match_unit, tuple(whole.tolist())
        for ka, kb in self._group_keys:
            row = (parent[0] + ka & _MASK) >> (64 - self._tail_bits)
            block, fill = int(self._tail_block[row]), int(self._tail_fill[row])
            if block < 0 or self.index.place[block] < 0 or self.unwritten(np.array([block], np.int32))[0]:
                return 0, ()  # a copy runs before the forward pass, so it cannot read what that writes
            known = self._tail_tokens[row, :fill]
            shared = min(fill, partial)
            differ = known[:shared] != rest[:shared]
            partial = int(differ.argmax()) if differ.any() else shared
            partial -= partial % self.match_unit
            if partial == 0:
                return 0, ()
            # The row may be another prefix's, and the block reused since: it is right only if the block's
            # fingerprint is this prefix continued by the row's tokens.
            a, b = self.fingerprinter.terms(known, start)
            if int(a.sum()) + parent[0] + ka & _MASK != int(self.index.lane_a[block]) or int(
                b.sum()
            ) + parent[1] + kb & _MASK != int(self.index.lane_b[block]):
                return 0, ()
            sources.append(block)
        if self.exact:
            last = [int(f[match.num_blocks - 1]) for f in match.found if match.num_blocks] + [-1]
            link = self.exact.identity(max(last)) if start else self.exact.root(match.root)
            if start and max(last) < 0:
                return 0, ()
            if not all(self.exact.follows(block, rest[:partial], link) for block in sources):
                return 0, ()
        return partial, tuple(sources)
