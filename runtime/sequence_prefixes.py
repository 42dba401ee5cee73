"""``SequencePrefixes``: the fingerprint of each sequence as it grows, and the blocks it puts in the cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pagedgen.runtime.arrays import I32, I64, U64
from pagedgen.runtime.fingerprint import ExtraKey
from pagedgen.runtime.layer_group import LayerGroup
from pagedgen.runtime.prefix_cache import PrefixCache, PrefixMatch, Proof

_MASK = (1 << 64) - 1


class SequencePrefixes:
    """What is to be known of a sequence to go on with its fingerprint, or to take some of it back.

    A row's fingerprint is kept for all of its tokens and for its full blocks, with the tokens of its last
    block and the one before. Blocks are registered when their last token is known.
    """

    def __init__(self, cache: PrefixCache, groups: Sequence[LayerGroup], rows: int) -> None:
        self._cache, self._groups, self._size = cache, groups, cache.block_size
        # Fingerprints of all tokens of a row, and of its full blocks, in two lanes.
        self._sum_a: U64 = np.zeros(rows, np.uint64)
        self._sum_b: U64 = np.zeros(rows, np.uint64)
        self._base_a: U64 = np.zeros(rows, np.uint64)
        self._base_b: U64 = np.zeros(rows, np.uint64)
        self._base_identity: I64 = np.zeros(rows, np.int64)  # of the full blocks, when tokens are verified
        # Tokens of the last block and the one before, by the block's parity. After a cut those from
        # position _recent_from[row] on are there.
        self._recent: I32 = np.zeros((rows, 2, self._size), np.int32)
        self._recent_blocks = self._recent.reshape(2 * rows, self._size)
        self._recent_flat = self._recent.reshape(-1)
        self._recent_from: I32 = np.zeros(rows, np.int32)
        self._lost: set[int] = set()  # rows whose fingerprint is lost: they enter nothing in the cache
        self._origins: dict[int, tuple[tuple[int, int], tuple[ExtraKey, ...]]] = {}  # root and extra content
        self._extra_ahead: set[int] = set()  # rows with extra content at or behind their end

    @property
    def arrays(self) -> tuple[U64 | I64 | I32, ...]:
        """All state that is in arrays, one row a sequence."""
        return (
            self._sum_a, self._sum_b, self._base_a, self._base_b, self._base_identity, self._recent,
            self._recent_from,
        )  # fmt: skip

    def admit(self, row: int, match: PrefixMatch, end: int) -> None:
        """A new row with the first ``end`` tokens of a prompt, whose blocks are in the table."""
        self._origins[row] = (match.root, match.extra)
        first = match.num_blocks
        self._base_a[row], self._base_b[row] = match.root
        if first:
            last = first * self._size - 1
            self._base_a[row], self._base_b[row] = match.sums[0][last], match.sums[1][last]
        if self._cache.exact is not None:
            held = [int(found[first - 1]) for found in match.found if first]
            exact = self._cache.exact
            self._base_identity[row] = exact.identity(max(held)) if held else exact.root(match.root)
        # Found behind the first gap: a block of the same content may be there, so it is looked for.
        fresh = not any((found[first:] >= 0).any() for found in match.found)
        self._recent_from[row] = 0
        self._enter(row, first, end, match.tokens, 0, match.sums, 0, fresh)
        self._remember(row, match.tokens[:end], 0, end)
        self._look_ahead(row, end)

    def extend(self, row: int, start: int, tokens: I32) -> None:
        """More tokens from position ``start``, whose blocks are in the table."""
        first, end = start // self._size, start + tokens.size
        buffer = np.concatenate((self._recent[row, first & 1, : start % self._size], tokens))
        a, b = self._cache.fingerprinter.terms(tokens, start, self._origins[row][1])
        a[:1] += self._sum_a[row : row + 1]
        b[:1] += self._sum_b[row : row + 1]
        self._enter(row, first, end, buffer, first * self._size, (a.cumsum(), b.cumsum()), start)
        self._remember(row, buffer, first * self._size, end)
        self._look_ahead(row, end)

    def append(self, rows: I64, positions: I32, columns: I32, offsets: I32, tokens: I32) -> None:
        """One token at ``positions`` (block ``columns``, place ``offsets``) of each of many rows."""
        size = self._size
        self._recent_flat[rows * (2 * size) + positions % (2 * size)] = tokens
        x = np.add(tokens, 1, dtype=np.uint64, casting="unsafe")  # ids are never negative
        keys = self._cache.fingerprinter.keys
        a = keys[0].take(positions)
        a *= x
        a += self._sum_a.take(rows)
        b = keys[1].take(positions)
        b *= x
        b += self._sum_b.take(rows)
        if self._extra_ahead:
            self._add_extra(rows, positions, a, b)
        self._sum_a[rows] = a
        self._sum_b[rows] = b
        full = (offsets == size - 1).nonzero()[0]
        if full.size:
            self._enter_full(rows.take(full), a.take(full), b.take(full), columns.take(full))

    def end(self, row: int, length: int) -> None:
        """Register the part of the last block that a row of ``length`` tokens leaves behind."""
        if row in self._lost:
            return
        fill = length % self._size
        at = np.array([row], np.int64)
        half = length // self._size & 1
        tokens = self._recent[row, half : half + 1].copy()
        tokens[:, fill:] = -1  # what was cut off is no content
        self._register([g.tails[row : row + 1] for g in self._groups], at, length // self._size, tokens, fill)

    def fork(self, row: int, child: int) -> None:
        """A row with the same tokens."""
        for array in self.arrays:
            array[child] = array[row]
        self._origins[child] = self._origins[row]
        for marked in (self._lost, self._extra_ahead):
            if row in marked:
                marked.add(child)

    def drop(self, row: int) -> None:
        """The row is free."""
        del self._origins[row]
        self._lost.discard(row)
        self._extra_ahead.discard(row)

    def lose(self, row: int) -> None:
        """From now on the row enters nothing in the cache, unless it is cut to nothing."""
        self._lost.add(row)

    def rewind(self, row: int, now: int, length: int) -> None:
        """Take the fingerprint back from ``now`` to fewer tokens.

        It is lost when the tokens to take back are no longer known; cutting to nothing recovers it.
        """
        size = self._size
        root, extra = self._origins[row]
        begin = length // size * size
        # Positions only went up since the last cut, so what precedes the last two blocks is forgotten.
        self._recent_from[row] = max(int(self._recent_from[row]), ((now - 1) // size - 1) * size)
        if length == 0:
            self._sum_a[row], self._sum_b[row] = root
            self._lost.discard(row)
            self._recent_from[row] = 0
        elif row in self._lost or begin < self._recent_from[row]:
            self._lost.add(row)
        else:
            # Sums are taken back term by term: from the block's start for the base, from the cut for the row.
            a, b = self._cache.fingerprinter.terms(self._recent_tokens(row, begin, now), begin, extra)
            kept = length - begin
            if begin // size != now // size:
                self._base_a[row] = (int(self._sum_a[row]) - int(a.sum())) & _MASK
                self._base_b[row] = (int(self._sum_b[row]) - int(b.sum())) & _MASK
            self._sum_a[row] = (int(self._sum_a[row]) - int(a[kept:].sum())) & _MASK
            self._sum_b[row] = (int(self._sum_b[row]) - int(b[kept:].sum())) & _MASK
        if row not in self._lost:
            if length % size == 0:
                self._base_a[row], self._base_b[row] = self._sum_a[row], self._sum_b[row]
            if begin // size != now // size:
                self._rewind_identity(row, begin // size)
        self._look_ahead(row, length)

    def _rewind_identity(self, row: int, full_blocks: int) -> None:
        exact = self._cache.exact
        if exact is None:
            return
        if full_blocks == 0:
            self._base_identity[row] = exact.root(self._origins[row][0])
            return
        column = full_blocks - 1
        held = [g.table[row, column] for g in self._groups if g.starts[row] <= column]
        if held:
            self._base_identity[row] = exact.identity(int(held[0]))
        else:  # behind every group's window
            self._lost.add(row)

    def _enter(
        self,
        row: int,
        first: int,
        end: int,
        buffer: I32,
        buffer_start: int,
        sums: tuple[U64, U64],
        origin: int,
        fresh: bool = False,
    ) -> None:
        """Register the blocks from ``first`` that a row of ``end`` tokens fills.

        ``buffer`` holds tokens from position ``buffer_start``, ``sums`` fingerprints from ``origin``.
        """
        size = self._size
        self._sum_a[row], self._sum_b[row] = sums[0][end - 1 - origin], sums[1][end - 1 - origin]
        last = end // size
        if last == first or row in self._lost:
            return
        ends = slice((first + 1) * size - 1 - origin, last * size - origin, size)
        a, b = sums[0][ends], sums[1][ends]
        parents = (
            np.concatenate((self._base_a[row : row + 1], a[:-1])),
            np.concatenate((self._base_b[row : row + 1], b[:-1])),
        )
        tokens = buffer[first * size - buffer_start : last * size - buffer_start].reshape(-1, size)
        proof = None
        if self._cache.exact is not None:
            marks = self._cache.exact.marks(first * size, last - first, self._origins[row][1])
            proof = Proof(self._base_identity[row : row + 1], marks, chain=True)
        blocks = [group.table[row, first:last] for group in self._groups]
        identities = self._cache.register(blocks, (a, b), parents, tokens, size, fresh=fresh, proof=proof)
        if identities is not None:
            self._base_identity[row] = identities[-1]
        self._base_a[row], self._base_b[row] = a[-1], b[-1]

    def _enter_full(self, rows: I64, a: U64, b: U64, columns: I32) -> None:
        """Register the last blocks of rows that one appended token has filled."""
        if self._lost:
            keep = np.array([row not in self._lost for row in rows.tolist()], np.bool_)
            rows, a, b, columns = rows[keep], a[keep], b[keep], columns[keep]
            if not rows.size:
                return
        tokens = self._recent_blocks.take(rows * 2 + (columns & 1), axis=0)
        blocks = [group.tails.take(rows) for group in self._groups]
        identities = self._register(blocks, rows, columns, tokens, self._size)
        if identities is not None:
            self._base_identity[rows] = identities
        self._base_a[rows] = a
        self._base_b[rows] = b

    def _register(
        self, blocks: list[I32], rows: I64, columns: I32 | int, tokens: I32, fill: int
    ) -> I64 | None:
        """Register one block of each row, as far as the row has come."""
        sums = self._sum_a.take(rows), self._sum_b.take(rows)
        parents = self._base_a.take(rows), self._base_b.take(rows)
        proof = None
        if self._cache.exact is not None:
            marks = np.zeros(rows.size, np.int64)
            starts = np.broadcast_to(columns, rows.shape) * self._size
            for i, (row, start) in enumerate(zip(rows.tolist(), starts.tolist(), strict=True)):
                if self._origins[row][1]:
                    marks[i] = self._cache.exact.marks(start, 1, self._origins[row][1])[0]
            proof = Proof(self._base_identity.take(rows), marks)
        return self._cache.register(blocks, sums, parents, tokens, fill, proof=proof)

    def _remember(self, row: int, buffer: I32, buffer_start: int, end: int) -> None:
        """Keep the tokens of the last two blocks; ``buffer`` holds tokens from ``buffer_start``."""
        last = (end - 1) // self._size
        for block in (last - 1, last):
            begin = block * self._size - buffer_start
            if begin >= 0:
                part = buffer[begin : min(begin + self._size, end - buffer_start)]
                self._recent[row, block & 1, : part.size] = part

    def _recent_tokens(self, row: int, start: int, stop: int) -> I32:
        size = self._size
        parts = []
        for block in range(start // size, -(-stop // size)):
            part = self._recent[row, block & 1]
            parts.append(part[max(0, start - block * size) : min(size, stop - block * size)])
        return np.concatenate(parts)

    def _look_ahead(self, row: int, length: int) -> None:
        if any(item.position >= length for item in self._origins[row][1]):
            self._extra_ahead.add(row)
        else:
            self._extra_ahead.discard(row)

    def _add_extra(self, rows: I64, positions: I32, a: U64, b: U64) -> None:
        """Add to the lanes what extra content adds at ``positions``."""
        for i, row in enumerate(rows.tolist()):
            if row in self._extra_ahead:
                more = self._cache.fingerprinter.extra_terms(1, int(positions[i]), self._origins[row][1])
                a[i : i + 1] += more[0]
                b[i : i + 1] += more[1]
