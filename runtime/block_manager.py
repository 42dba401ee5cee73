"""``BlockManager``: sequences over a pool of KV blocks. It decides; the KV cache moves the bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pagedgen.errors import (
    FreedTwice,
    InvalidLength,
    InvalidPool,
    InvalidPriority,
    InvalidSalt,
    InvalidTokens,
    OutOfBlocks,
    SequenceNotComputed,
    SequenceNotSwapped,
    SequenceTooLong,
    UnknownPin,
)
from pagedgen.runtime.arrays import EMPTY, I32, I64, Bool
from pagedgen.runtime.block_pool import PRIORITIES, BlockPool
from pagedgen.runtime.compaction import Residents
from pagedgen.runtime.fingerprint import ExtraKey, Salt, check_extra, check_salt, token_array
from pagedgen.runtime.layer_group import LayerGroup
from pagedgen.runtime.prefix_cache import PrefixCache, PrefixMatch
from pagedgen.runtime.run_pool import RunPool
from pagedgen.runtime.run_table import RunGroup
from pagedgen.runtime.sequence_prefixes import SequencePrefixes
from pagedgen.runtime.sequence_table import SequenceTable
from pagedgen.runtime.stats import Counters, Stats
from pagedgen.runtime.swap_space import SwappedBlocks, SwapSpace


@dataclass(frozen=True, slots=True)
class Admission:
    """A new sequence: its first ``num_tokens`` tokens have slots, the KV of ``num_cached`` of them is there.

    The caller computes tokens ``num_cached .. num_tokens`` and passes the rest of the prompt, if any, to
    :meth:`BlockManager.extend`.
    """

    seq: int
    num_cached: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Step:
    """Where one new token of each sequence goes.

    ``rows`` int64 ``[n]`` of the block table; ``positions`` int32 ``[n]``; ``slots`` int64
    ``[num_groups, n]``: block * block_size + offset.
    """

    rows: I64
    positions: I32
    slots: I64


@dataclass(frozen=True, slots=True)
class TailPlan:
    """Rows of one group whose last block has to be copied before they write, and blocks that stay.

    ``group`` -1: just the rows whose mark is settled by the call.
    """

    group: int
    rows: I64
    shared: I32
    kept: I32
    needed: int


class BlockManager:
    """Paged KV memory for many sequences (Kwon et al., "PagedAttention", 2023).

    All state is in numpy arrays and every call is a fixed number of numpy operations on them, so a
    decode step costs what changes, not what is stored. Handles of sequences are integers.

    The contract with the caller, each step: call the methods here, then :meth:`take_copies` once, run those
    copies, then one forward pass that writes the KV of all new tokens (each layer before it attends). Under
    this contract full blocks are shared from the moment their last token is known. A call that raises has
    changed nothing.

    Args:
        num_blocks: blocks of the pool, at most 2^24 - 1.
        block_size: tokens a block, any number from 1.
        max_num_seqs: sequences at a time, swapped out ones included.
        max_seq_len: tokens of the longest sequence.
        windows: one entry a group of layers: its sliding window in tokens, or None for full attention.
        prefix_caching: reuse blocks of equal prefixes.
        match_unit: partial matches of a block are rounded down to a multiple of this many tokens.
        lookahead: slots that are always there beyond a sequence's end, for drafted tokens.
        watermark: share of the pool that admission leaves free while others run, against preemption.
        num_host_blocks: blocks of host memory that sequences can be swapped out to.
        verify_tokens: prove every prefix hit token by token; see :class:`PrefixCache`.
        secret: fixes the fingerprints' keys; None (safer): random.
        adaptive: experimental: place the blocks of a sequence side by side, in runs of up to 256 tokens; for
            ``block_size`` 16 without windows. See :class:`RunPool`, :meth:`run_table`, :meth:`compact`.

    Raises:
        InvalidPool: an argument is out of range.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        *,
        max_num_seqs: int = 256,
        max_seq_len: int = 8192,
        windows: Sequence[int | None] = (None,),
        prefix_caching: bool = True,
        match_unit: int = 1,
        lookahead: int = 0,
        watermark: float = 0.01,
        num_host_blocks: int = 0,
        verify_tokens: bool = False,
        secret: bytes | None = None,
        adaptive: bool = False,
    ) -> None:
        _check_int("block_size", block_size, 1, 1 << 16)
        _check_int("max_seq_len", max_seq_len, 1, 1 << 27)
        _check_int("match_unit", match_unit, 1, block_size)
        _check_int("lookahead", lookahead, 0, 1 << 16)
        if not isinstance(watermark, float | int) or not 0 <= watermark < 1:
            raise InvalidPool("watermark", watermark, "a share from 0 up to, not including, 1 is allowed")
        if not 1 <= len(windows) <= 255:
            raise InvalidPool("windows", windows, "1 to 255 groups are allowed")
        for window in windows:
            if window is not None:
                _check_int("windows", window, 1, 1 << 27)
        if adaptive and (block_size != 16 or any(window is not None for window in windows)):
            allowed = f"False is allowed with block_size = {block_size}, windows = {tuple(windows)}"
            raise InvalidPool("adaptive", adaptive, f"{allowed}; it needs block_size 16 and no window")
        self.block_size, self.max_seq_len, self.lookahead = block_size, max_seq_len, lookahead
        self.windows = tuple(windows)
        self._runs = RunPool(num_blocks) if adaptive else None
        self.pool: BlockPool = self._runs or BlockPool(num_blocks)
        self.seqs = SequenceTable(max_num_seqs)
        self.swap = SwapSpace(num_host_blocks)
        self.max_blocks = -(-(max_seq_len + lookahead) // block_size)
        kind = RunGroup if adaptive else LayerGroup
        self.groups: list[LayerGroup] = [kind(max_num_seqs, self.max_blocks, window) for window in windows]
        self.cache: PrefixCache | None = None
        self.prefixes: SequencePrefixes | None = None
        if prefix_caching:
            self.cache = PrefixCache(
                num_blocks, block_size, max_seq_len, windows, match_unit, verify_tokens, secret
            )
            self.prefixes = SequencePrefixes(self.cache, self.groups, max_num_seqs)
        self.watermark_blocks = int(watermark * num_blocks)
        rows = max_num_seqs
        self.seq_lens: I32 = np.zeros(rows, np.int32)
        self._capacity: I32 = np.zeros(rows, np.int32)  # tokens that the row's blocks can hold
        # The last block may be shared or in the cache: look before writing into it.
        self._check_tail: Bool = np.zeros(rows, np.bool_)
        self._num_check_tail = 0  # an upper bound on how many rows are marked so
        # The step that last gave slots to new tokens of a row; KV of the present step is not written yet.
        self._step = 1
        self._step_of: I64 = np.zeros(rows, np.int64)
        self._priority = np.zeros(rows, np.uint8)
        self._copies: dict[int, int] = {}  # destination block -> source block, for the next take_copies
        self._pins: dict[int, I32] = {}
        self._next_pin = 0
        self._any_priority = False
        self.counters = Counters()
        self._windowed = any(window is not None for window in windows)

    # Admission

    def match(
        self, tokens: Sequence[int] | I32 | I64, salt: Salt = None, extra: Sequence[ExtraKey] = ()
    ) -> PrefixMatch:
        """Fingerprint a prompt and look up what of it is cached. Changes nothing; see :meth:`allocate`.

        Raises:
            InvalidTokens: empty, longer than max_seq_len, or not token ids.
            InvalidSalt: a salt or extra key of the wrong type.
        """
        prompt = token_array(tokens).copy()  # the caller may go on with its array
        if not 1 <= prompt.size <= self.max_seq_len:
            raise InvalidTokens("tokens", f"{prompt.size} tokens", f"1 to {self.max_seq_len} are allowed")
        check_salt(salt)
        checked = check_extra(extra)
        if self.cache is None:
            none = np.empty(0, np.uint64)
            groups = len(self.groups)
            return PrefixMatch(
                prompt, (0, 0), (), (none, none), (EMPTY,) * groups, 0, (0,) * groups, 0, (), 0
            )
        for item in checked:
            if item.position >= prompt.size:
                allowed = f"a position inside the prompt of {prompt.size} tokens is allowed"
                raise InvalidSalt("extra.position", item.position, allowed)
        return self.cache.match(prompt, self.cache.fingerprinter.root(salt), checked)

    def can_allocate(
        self, prompt: PrefixMatch | Sequence[int] | I32, max_new_tokens: int | None = None
    ) -> bool:
        """Whether :meth:`allocate` of the same would succeed now."""
        match = prompt if isinstance(prompt, PrefixMatch) else self.match(prompt)
        if self.cache is not None and not self.cache.still_holds(match):
            match = self.cache.match(match.tokens, match.root, match.extra)
        end = self._first_end(match, max_new_tokens)
        return len(self.seqs) < self.seqs.max_num_seqs and self._shortage(match, end) is None

    def allocate(
        self,
        prompt: PrefixMatch | Sequence[int] | I32 | I64,
        *,
        salt: Salt = None,
        extra: Sequence[ExtraKey] = (),
        max_new_tokens: int | None = None,
        priority: int = 0,
    ) -> Admission:
        """Admit a sequence with a prompt, or the first piece of it.

        Args:
            prompt: token ids, or what :meth:`match` returned for them (then salt and extra are in it).
            salt: sequences share blocks only under equal salts (tenant, LoRA adapter).
            extra: content behind placeholder tokens (images).
            max_new_tokens: chunked prefill: admit at most this many tokens beyond the cached ones.
            priority: 0 to 3; cached blocks of lower priority are evicted first.

        Raises:
            InvalidTokens, InvalidSalt, InvalidPriority: naming the argument.
            OutOfBlocks: the pool has too few free blocks (watermark included).
            TooManySequences: no row is free.
        """
        if type(priority) is not int or not 0 <= priority < PRIORITIES:
            raise InvalidPriority("priority", priority, f"0 to {PRIORITIES - 1} is allowed")
        match = prompt if isinstance(prompt, PrefixMatch) else self.match(prompt, salt, extra)
        if self.cache is not None and not self.cache.still_holds(match):
            match = self.cache.match(match.tokens, match.root, match.extra)
        end = self._first_end(match, max_new_tokens)
        self.seqs.check_room(1)
        shortage = self._shortage(match, end)
        if shortage is not None:
            self.counters.refused += 1
            raise shortage
        seq, row = self.seqs.add()
        self._priority[row] = priority
        self._any_priority |= priority > 0
        for group, found, first in zip(self.groups, match.found, match.firsts, strict=True):
            hits = found[first : match.num_blocks]
            self.pool.share(hits)
            group.set_row(row, first, hits)
            group.starts[row] = first
            if priority:
                self.pool.priority[hits] = np.maximum(self.pool.priority.take(hits), priority)
        self._capacity[row] = match.num_blocks * self.block_size
        sources = np.array(match.sources, np.int32)
        self.pool.share(sources)  # nobody may take them before they are copied
        self._grow(row, end)
        if match.partial:
            self._add_copies(
                np.array([g.table[row, match.num_blocks] for g in self.groups], np.int32), sources
            )
        if self.prefixes is not None:
            self.prefixes.admit(row, match, end)
        self._step_of[row] = self._step
        self.seq_lens[row] = end
        self._set_tail(row)
        self.counters.admitted += 1
        self.counters.prompt_tokens += match.tokens.size
        self.counters.hit_tokens += match.num_tokens
        self.counters.partial_hit_tokens += match.partial
        return Admission(seq, match.num_tokens, end)

    def extend(self, seq: int, tokens: Sequence[int] | I32 | I64) -> None:
        """Give slots to further tokens of one sequence: the next piece of a prompt.

        Raises:
            SequenceTooLong: it would pass max_seq_len.
            OutOfBlocks, InvalidTokens, and see :meth:`SequenceTable.resident_row`.
        """
        row = self.seqs.resident_row(seq)
        new = token_array(tokens)
        start = int(self.seq_lens[row])
        end = start + new.size
        if not new.size:
            raise InvalidTokens("tokens", "0 tokens", "at least 1 is allowed")
        if end > self.max_seq_len:
            raise SequenceTooLong(seq, f"of {start} tokens and {new.size} more: at most {self.max_seq_len}")
        rows = np.array([row], np.int64)
        writes = self._plan_tails(rows, start % self.block_size != 0)
        grow = (self._blocks_for(end) - int(self._capacity[row]) // self.block_size) * len(self.groups)
        needed = max(0, grow) + sum(w.needed for w in writes)
        if needed > self.pool.num_free:
            self.counters.refused += 1
            raise OutOfBlocks(needed, self.pool.num_free)
        self._own_tails(writes)
        self._grow(row, end)
        if self.prefixes is not None:
            self.prefixes.extend(row, start, new)
        if self._windowed:
            self._release_windows(rows, np.array([start], np.int32))
        self._step_of[row] = self._step
        self.seq_lens[row] = end
        self._set_tail(row)
        self.counters.appended_tokens += new.size

    # Decoding

    def append_step(self, seqs: Sequence[int] | I64, tokens: Sequence[int] | I32 | I64) -> Step:
        """Append one token to each of many sequences.

        Raises:
            InvalidTokens: not one token id for each sequence.
            SequenceTooLong: one would pass max_seq_len.
            OutOfBlocks, and see :meth:`SequenceTable.rows`.
        """
        rows = self.seqs.rows(seqs)
        new = token_array(tokens)
        if new.size != rows.size:
            raise InvalidTokens("tokens", f"{new.size} tokens", f"one for each of {rows.size} sequences")
        size = self.block_size
        positions = self.seq_lens.take(rows)
        if rows.size and int(positions.max()) >= self.max_seq_len:
            seq = int(np.asarray(seqs)[positions.argmax()])
            raise SequenceTooLong(seq, f"has {self.max_seq_len} tokens, the most that are allowed")
        columns = positions // size
        offsets = positions - columns * size
        # Everything that takes blocks is counted before anything is changed.
        short, grow = self._plan_growth(rows, positions)
        needed = (short.size if grow is None else int(grow.sum())) * len(self.groups)
        writes: list[TailPlan] = []
        if self._num_check_tail:
            writes = self._plan_tails(rows, offsets != 0)
            needed += sum(w.needed for w in writes)
        if needed > self.pool.num_free:
            self.counters.refused += 1
            raise OutOfBlocks(needed, self.pool.num_free)
        if writes:
            self._own_tails(writes)
        if short.size:
            self._grow_rows(rows.take(short), grow)
        opened = (offsets == 0).nonzero()[0] if self.lookahead else short
        if opened.size:
            at, column = rows.take(opened), columns.take(opened)
            for group in self.groups:
                group.tails[at] = group.get(at, column)
        slots = np.empty((len(self.groups), rows.size), np.int64)
        for group, out in zip(self.groups, slots, strict=True):
            np.multiply(group.tails.take(rows), size, out=out, dtype=np.int64)
            out += offsets
        if self.prefixes is not None:
            self.prefixes.append(rows, positions, columns, offsets, new)
        self.seq_lens[rows] = positions + 1
        if self._windowed:
            self._release_windows(rows, positions)
        self._step_of[rows] = self._step
        self.counters.appended_tokens += rows.size
        return Step(rows, positions, slots)

    def _plan_growth(self, rows: I64, positions: I32) -> tuple[I64, I32 | None]:
        """Which of ``rows`` need blocks for one more token, and how many (None: one each)."""
        capacity = self._capacity.take(rows)
        if not self.lookahead:  # a row's blocks always hold its tokens: it is short when they are full
            return (capacity == positions).nonzero()[0], None
        reach = positions + self.lookahead
        short = (capacity <= reach).nonzero()[0]
        return short, (reach.take(short) - capacity.take(short)) // self.block_size + 1

    def blocks_needed(self, seqs: Sequence[int] | I64) -> int:
        """Free blocks that :meth:`append_step` of these sequences would need now.

        Raises:
            See :meth:`SequenceTable.rows`.
        """
        rows = self.seqs.rows(seqs)
        positions = self.seq_lens.take(rows)
        short, grow = self._plan_growth(rows, positions)
        writes = self._plan_tails(rows, positions % self.block_size != 0)
        growth = short.size if grow is None else int(grow.sum())
        return growth * len(self.groups) + sum(w.needed for w in writes)

    # The end of a sequence, and copies of it

    def free(self, seq: int) -> None:
        """End a sequence. Its blocks are free; their content stays reusable until they are taken.

        Raises:
            FreedTwice: it was freed before.
            UnknownSequence: there never was one.
        """
        row = self.seqs.row(seq, freed=FreedTwice)
        length = int(self.seq_lens[row])
        if length % self.block_size and self.prefixes is not None and self._tail_is_its_own(row):
            self.prefixes.end(row, length)
        count = int(self._capacity[row]) // self.block_size
        swapped = self.swap.records.pop(row, None)
        for index, group in enumerate(self.groups):
            # Last block first: what is evicted first is then what can only be reused after the rest.
            first = int(group.starts[row])
            blocks = group.table[row, first:count]
            if swapped:
                resident = np.ones(blocks.size, np.bool_)
                resident[swapped[index].columns - first] = False
                blocks = blocks[resident]
                self.swap.give(swapped[index].host)
            self._forget_uncomputed(row, blocks)
            self._release(blocks[::-1])
        self._clear_tail_check(row)
        if self.prefixes is not None:
            self.prefixes.drop(row)
        self.seq_lens[row] = 0
        self._capacity[row] = 0
        self.counters.freed += 1
        self.seqs.remove(row)

    def fork(self, seq: int, n: int = 1) -> list[int]:
        """``n`` new sequences with the same tokens, which share all blocks.

        The last block, if it is not full, is copied when one of its owners writes into it (copy-on-write).

        Raises:
            TooManySequences: fewer than ``n`` rows are free.
            InvalidPool: ``n`` is below 1.
            See :meth:`SequenceTable.resident_row`.
        """
        _check_int("n", n, 1, 1 << 20)
        row = self.seqs.resident_row(seq)
        self.seqs.check_room(n)
        length = int(self.seq_lens[row])
        count = -(-length // self.block_size)  # not the lookahead blocks: they are its own
        spans = [(g, int(g.starts[row]), g.table[row, int(g.starts[row]) : count]) for g in self.groups]
        for _, _, blocks in spans:
            self.pool.share(blocks, n)
        children = []
        for _ in range(n):
            child, at = self.seqs.add()
            for array in (self.seq_lens, self._step_of, self._priority):
                array[at] = array[row]
            if self.prefixes is not None:
                self.prefixes.fork(row, at)
            for group, first, blocks in spans:
                group.set_row(at, first, blocks)
                group.starts[at] = first
                group.tails[at] = group.tails[row]
            self._capacity[at] = count * self.block_size
            children.append(child)
            if length % self.block_size:
                self._mark_tail_check(at)
        self.counters.forked += n
        if length % self.block_size:
            self._mark_tail_check(row)
        return children

    def truncate(self, seq: int, length: int) -> None:
        """Cut a sequence back to its first ``length`` tokens (rejected drafts).

        Cutting within the last two blocks is the fast and usual case. Farther back inside a block, the
        sequence's fingerprint is lost, and what it appends later does not enter the prefix cache.

        Raises:
            InvalidLength: below 0, above the present length, or behind blocks that a sliding window released.
            See :meth:`SequenceTable.resident_row`.
        """
        row = self.seqs.resident_row(seq)
        now = int(self.seq_lens[row])
        if type(length) is not int or not 0 <= length <= now:
            raise InvalidLength("length", length, f"0 to {now}, the present length, is allowed")
        for group in self.groups:
            if group.window is not None and group.starts[row]:
                least = int(group.starts[row]) * self.block_size + group.window - 1
                if length < least:
                    allowed = f"at least {least}: blocks behind the window of {group.window} are released"
                    raise InvalidLength("length", length, allowed)
        if length == now:
            return
        if self.prefixes is not None:
            self.prefixes.rewind(row, now, length)
        have = int(self._capacity[row]) // self.block_size
        keep = min(have, -(-length // self.block_size))
        for group in self.groups:
            first = int(group.starts[row])
            self._forget_uncomputed(row, group.table[row, max(first, length // self.block_size) : have])
            self._release(group.table[row, max(first, keep) : have][::-1])
        self._capacity[row] = keep * self.block_size
        self.seq_lens[row] = length
        self._set_tail(row)
        if length % self.block_size:
            self._mark_tail_check(row)

    # Swapping

    def swap_out(self, seq: int, num_blocks: int | None = None) -> I32:
        """Preempt a sequence: give its blocks up for host blocks.

        Blocks that others use as well stay where they are and stay its own. The sequence takes part in
        nothing but :meth:`swap_in`, :meth:`free`, and further calls of this that take more of it, until it
        is back.

        Args:
            num_blocks: only this many (a group) of the blocks that it alone has, from its end; None: all.

        Returns:
            int32 ``[n, 2]`` of (block, host block), to be copied at once, before what later calls return.

        Raises:
            OutOfHostBlocks: too few host blocks are free.
            SequenceNotComputed: the present step has not computed its last tokens.
            See :meth:`SequenceTable.row`.
        """
        row = self.seqs.row(seq)
        if num_blocks is not None:
            _check_int("num_blocks", num_blocks, 1, 1 << 31)
        if self._step_of[row] == self._step:
            raise SequenceNotComputed(seq, "has tokens of this step: run it (take_copies) before swapping")
        leaving = [self._own_columns(row, index) for index in range(len(self.groups))]
        if num_blocks is not None:
            leaving = [columns[-num_blocks:] for columns in leaving]
        self.swap.check_room(sum(columns.size for columns in leaving))
        count = -(-int(self.seq_lens[row]) // self.block_size)
        before = self.swap.records.get(row)
        records, pairs = [], []
        for index, (group, columns) in enumerate(zip(self.groups, leaving, strict=True)):
            device = group.table[row, columns]
            host = self.swap.take(columns.size)
            record = self._swapped(columns, host, device)
            records.append(record.joined(before[index]) if before else record)
            pairs.append(np.stack((device, host), axis=1))
            # Drafts' slots hold nothing yet.
            spare = group.table[row, count : int(self._capacity[row]) // self.block_size].copy()
            self._release(np.concatenate((spare[::-1], device[::-1])))
        self._capacity[row] = count * self.block_size
        self.swap.records[row] = records
        self.counters.preempted += before is None
        self.seqs.suspend(row)
        self.counters.swapped_out_blocks += sum(columns.size for columns in leaving)
        return np.concatenate(pairs)

    def swap_in(self, seq: int) -> I32:
        """Bring a sequence back.

        Returns:
            int32 ``[n, 2]`` of (host block, block), to be copied at once. What the cache still holds is
            taken from there and not copied.

        Raises:
            OutOfBlocks: too few blocks are free.
            SequenceNotSwapped: it is not swapped out.
        """
        row = self.seqs.row(seq)
        if not self.seqs.is_suspended(row):
            raise SequenceNotSwapped(seq, "is not swapped out")
        records = self.swap.records[row]
        alive = [self._still_cached(record) for record in records]
        needed = sum(int((~kept).sum()) for kept in alive)
        revived = sum(
            int((self.pool.refs.take(record.device[kept]) == 0).sum())
            for record, kept in zip(records, alive, strict=True)
        )
        if needed > self.pool.num_free - revived:
            self.counters.refused += 1
            raise OutOfBlocks(needed, max(0, self.pool.num_free - revived))
        for record, kept in zip(records, alive, strict=True):
            self.pool.share(record.device[kept])
        pairs = []
        at = np.array([row], np.int64)
        for group, record, kept in zip(self.groups, records, alive, strict=True):
            blocks = record.device.copy()
            fresh = self._take(int((~kept).sum()))
            blocks[~kept] = fresh
            self.pool.priority[fresh] = int(self._priority[row])
            group.set(at, record.columns, blocks)
            pairs.append(np.stack((record.host, blocks), axis=1)[~kept])
            self.swap.give(record.host)
        del self.swap.records[row]
        self.seqs.resume(row)
        self._set_tail(row)
        if int(self.seq_lens[row]) % self.block_size:
            self._mark_tail_check(row)
        self.counters.swapped_in_blocks += needed
        self.counters.swap_saved_blocks += sum(int(kept.sum()) for kept in alive)
        return np.concatenate(pairs)

    # Reading

    def slots(self, seq: int, start: int, stop: int, group: int = 0) -> I64:
        """Slots of tokens ``start .. stop`` of a sequence: int64, block * block_size + offset.

        Raises:
            InvalidLength: outside the sequence (``lookahead`` slots beyond its end included).
            See :meth:`SequenceTable.resident_row`.
        """
        row = self.seqs.resident_row(seq)
        size = self.block_size
        first = int(self.groups[group].starts[row]) * size
        if not first <= start <= stop <= int(self._capacity[row]):
            raise InvalidLength(
                "start, stop", (start, stop), f"{first} to {int(self._capacity[row])} are allowed"
            )
        blocks = self.groups[group].table[row, start // size : -(-stop // size)].astype(np.int64)
        slots = (blocks[:, None] * size + np.arange(size)).reshape(-1)
        return slots[start % size : start % size + stop - start]

    def length(self, seq: int) -> int:
        """Tokens of a sequence."""
        return int(self.seq_lens[self.seqs.row(seq)])

    def blocks(self, seq: int, group: int = 0) -> I32:
        """Blocks of a sequence's tokens, int32; 0 before the first that a sliding window still holds."""
        row = self.seqs.resident_row(seq)
        count = -(-int(self.seq_lens[row]) // self.block_size)
        blocks = self.groups[group].table[row, :count].copy()
        blocks[: int(self.groups[group].starts[row])] = 0
        return blocks

    def own_blocks(self, seq: int) -> list[I64]:
        """What preempting a sequence frees: for each group, the columns of the block table whose blocks are
        on the device and in nobody else's use, ascending.

        Raises:
            See :meth:`SequenceTable.row`.
        """
        row = self.seqs.row(seq)
        return [self._own_columns(row, index) for index in range(len(self.groups))]

    def stats(self) -> Stats:
        """A snapshot; O(sequences), so fit for every step of a serving loop."""
        size = self.block_size
        rows = np.array([self.seqs.row(seq) for seq in self.seqs.handles], np.int64)
        here = np.array([not self.seqs.is_suspended(row) for row in rows.tolist()], np.bool_)
        rows = rows[here]
        lengths, counts = self.seq_lens.take(rows), self._capacity.take(rows) // size
        logical = empty = 0
        for group in self.groups:
            logical += int((counts - group.starts.take(rows)).sum())
            empty += self._empty_slots(group, rows, lengths, counts)
        for row, records in self.swap.records.items():
            for group, record in zip(self.groups, records, strict=True):
                logical += int(self._capacity[row]) // size - int(group.starts[row]) - record.columns.size
        used = self.pool.num_blocks - self.pool.num_free
        counters = replace(self.counters)
        return Stats(
            num_blocks=self.pool.num_blocks,
            used_blocks=used,
            cached_blocks=self.pool.num_cached_free,
            free_blocks=self.pool.num_free,
            sequences=len(self.seqs),
            swapped_sequences=int((~here).sum()),
            pinned_blocks=sum(pin.size for pin in self._pins.values()),
            stored_tokens=max(0, used * size - empty),
            utilisation=used / self.pool.num_blocks,
            waste=empty / (used * size) if used else 0.0,
            sharing_saving=max(0.0, 1 - used / logical) if logical else 0.0,
            hit_rate=counters.hit_tokens / counters.prompt_tokens if counters.prompt_tokens else 0.0,
            host_blocks=self.swap.num_blocks,
            host_blocks_used=self.swap.num_blocks - self.swap.num_free,
            host_bytes=self._host_bytes() + 4 * logical,  # of the tables only what is used is ever touched
            counters=counters,
        )

    def take_copies(self) -> I32:
        """Block copies to run before this step's forward pass: int32 ``[n, 2]`` of (source, destination).

        Call it once a step, right before the forward pass: what was admitted and appended until now counts as
        computed from here on.

        No block is a source and a destination, and no destination appears twice, so that all may run in
        one launch in any order.
        """
        self._step += 1
        if self.cache is not None:
            self.cache.settle()
        if not self._copies:
            return np.empty((0, 2), np.int32)
        copies = np.array([(s, d) for d, s in self._copies.items()], np.int32)
        self._copies = {}
        self.counters.copied_blocks += len(copies)
        sources, counts = np.unique(copies[:, 0], return_counts=True)
        self._release(sources, counts.astype(np.int32))
        return copies

    # Runs (adaptive)

    def run_table(self, seqs: Sequence[int] | I64, group: int = 0) -> I32:
        """Runs of blocks that lie side by side in the pool: int32 ``[n, most runs, 2]``.

        Entries are (first block, blocks) in the order of the sequence's tokens, (0, 0) behind the last.

        Raises:
            InvalidPool: the manager is not adaptive.
            See :meth:`SequenceTable.rows`.
        """
        rows = self.seqs.rows(seqs)
        place = self.groups[group]
        if not isinstance(place, RunGroup):
            raise InvalidPool("adaptive", False, "True is needed for run tables")
        counts = -(-self.seq_lens.take(rows) // self.block_size)
        runs = [place.runs(row, n) for row, n in zip(rows.tolist(), counts.tolist(), strict=True)]
        table = np.zeros((len(runs), max((part.shape[0] for part in runs), default=0), 2), np.int32)
        for out, part in zip(table, runs, strict=True):
            out[: part.shape[0]] = part
        return table

    def compact(self, max_moves: int) -> I32:
        """Move scattered blocks into aligned runs.

        Only blocks that one sequence alone has, and whose KV is computed, are moved: stretches that may fill
        a run into free ones, and where none is free, blocks out of the emptiest runs into holes elsewhere,
        so that the next call finds room.

        Args:
            max_moves: at most this many blocks.

        Returns:
            int32 ``[n, 2]`` of (source, destination) blocks, as of :meth:`take_copies` but to be copied at
            once, before what later calls return.

        Raises:
            InvalidPool: the manager is not adaptive, or ``max_moves`` is below 1.
        """
        _check_int("max_moves", max_moves, 1, 1 << 31)
        if self._runs is None:
            raise InvalidPool("adaptive", False, "True is needed to compact")
        moves: list[tuple[I32, I32]] = []
        left = max_moves
        for group in self.groups:
            found = self._residents(group)
            crowded = False
            for stretch in found.stretches(self._runs.run_blocks):
                size = stretch.last - stretch.first
                piece = self._runs.take_piece(size) if size <= left else None
                if piece is None:
                    crowded = True
                    continue
                where = np.arange(stretch.begin, stretch.end)
                moves.append(self._move(group, found, where, self._evict_for(*piece)))
                found.movable[where] = False
                left -= size
            if crowded and left:  # room for the next call: what this one leaves may not be filled by it
                loose = np.flatnonzero(found.movable & found.short)
                which, holes, evicted = self._runs.take_holes(found.blocks[loose], left)
                if which.size:
                    moves.append(self._move(group, found, loose[which], self._evict_for(holes, evicted)))
                    left -= which.size
        if not moves:
            return np.empty((0, 2), np.int32)
        moved, to = (np.concatenate(part) for part in zip(*moves, strict=True))
        if self.cache is not None:
            self.cache.move(moved, to)
        self.pool.discard(self.pool.drop(moved))
        self.counters.compacted_blocks += moved.size
        return np.stack((moved, to), axis=1)

    def _residents(self, group: LayerGroup) -> Residents:
        """Blocks of all sequences that are here and computed."""
        rows = np.array([self.seqs.row(seq) for seq in self.seqs.handles], np.int64)
        suspended = np.array([self.seqs.is_suspended(row) for row in rows.tolist()], bool)
        rows = rows[~suspended & (self._step_of.take(rows) != self._step)]
        counts = -(-self.seq_lens.take(rows).astype(np.int64) // self.block_size)
        movable: Bool = self.pool.refs == 1
        movable[np.fromiter(self._copies, np.int32, len(self._copies))] = False
        run_blocks = self._runs.run_blocks if self._runs else 1
        return Residents.of(group.table, rows, counts, movable, run_blocks)

    def _move(self, group: LayerGroup, found: Residents, where: I64, to: I32) -> tuple[I32, I32]:
        """Enter the new places of blocks; returns (source, destination)."""
        rows, blocks = found.rows[where], found.blocks[where]
        self.pool.priority[to] = self.pool.priority.take(blocks)
        group.set(rows, found.columns[where], to)
        for row in np.unique(rows).tolist():
            self._set_tail(row)
        return blocks, to

    # Pins

    def pin(self, seq: int) -> int:
        """Keep the full blocks of a sequence from eviction beyond its end (a system prompt); see unpin.

        Raises:
            See :meth:`SequenceTable.resident_row`.
        """
        row = self.seqs.resident_row(seq)
        count = int(self.seq_lens[row]) // self.block_size
        blocks = np.concatenate([g.table[row, int(g.starts[row]) : count] for g in self.groups])
        self.pool.share(blocks)
        self._next_pin += 1
        self._pins[self._next_pin] = blocks
        return self._next_pin

    def unpin(self, pin: int) -> None:
        """Undo one :meth:`pin`.

        Raises:
            UnknownPin: no such pin, or it was undone before.
        """
        if pin not in self._pins:
            raise UnknownPin(f"pin {pin!r} is unknown or was undone before")
        self._release(self._pins.pop(pin)[::-1])

    def clear_cache(self) -> None:
        """Forget all cached content, as after a change of the model's weights.

        Sequences that live go on with what they have, and enter nothing in the cache any more.
        """
        if self.cache is None or self.prefixes is None:
            return
        blocks = np.flatnonzero(self.cache.index.place >= 0).astype(np.int32)
        self.cache.forget(blocks)
        self.pool.forget(blocks[self.pool.refs.take(blocks) == 0])
        for seq in self.seqs.handles:
            self.prefixes.lose(self.seqs.row(seq))

    # Inside

    def _empty_slots(self, group: LayerGroup, rows: I64, lengths: I32, counts: I32) -> int:
        """Slots of a group's blocks that hold no token, each block once."""
        size = self.block_size
        columns = (lengths - 1) // size  # of each row's last token
        drafts = int((counts - columns - 1).sum()) * size
        some = lengths > 0
        tails, where, owners = np.unique(
            group.tails.take(rows[some]), return_inverse=True, return_counts=True
        )
        # A shared last block is as full as its longest owner has it; if an owner goes on behind it, full.
        fills = np.zeros(tails.size, np.int64)
        np.maximum.at(fills, where, (lengths - columns * size)[some])
        return drafts + int((size - fills)[self.pool.refs.take(tails) == owners].sum())

    def _host_bytes(self) -> int:
        """Bytes of all arrays but the block tables."""
        arrays = [self.seq_lens, self._capacity, self._check_tail, self._step_of, self._priority]
        arrays += [array for group in self.groups for array in (group.tails, group.starts)]
        arrays += self.prefixes.arrays if self.prefixes else ()
        own = sum(array.nbytes for array in arrays)
        return own + self.seqs.nbytes + self.pool.nbytes + (self.cache.nbytes if self.cache else 0)

    def _first_end(self, match: PrefixMatch, max_new_tokens: int | None) -> int:
        size = int(match.tokens.size)
        if max_new_tokens is None:
            return size
        _check_int("max_new_tokens", max_new_tokens, 1, 1 << 31)
        return min(size, match.num_tokens + max_new_tokens)

    def _blocks_for(self, length: int) -> int:
        return -(-(length + self.lookahead) // self.block_size)

    def _shortage(self, match: PrefixMatch, end: int) -> OutOfBlocks | None:
        """Why the match cannot be admitted now, if so."""
        needed = (self._blocks_for(end) - match.num_blocks) * len(self.groups)
        free = self.pool.num_free
        if len(self.seqs):
            free -= self.watermark_blocks
        for found, first in zip(match.found, match.firsts, strict=True):
            free -= int((self.pool.refs.take(found[first : match.num_blocks]) == 0).sum())
        free -= sum(int(self.pool.refs[source] == 0) for source in match.sources)
        return OutOfBlocks(needed, max(0, free)) if needed > free else None

    def _take(self, n: int) -> I32:
        return self._evict_for(*self.pool.take(n))

    def _take_behind(self, runs: RunPool, rows: I64, columns: I32 | I64, counts: I32) -> I32:
        """For each group, ``counts[i]`` blocks for the columns of ``rows[i]`` from ``columns[i]`` on."""
        before = [np.where(columns > 0, g.get(rows, np.maximum(columns - 1, 0)), -1) for g in self.groups]
        previous = np.concatenate(before).astype(np.int32)
        return self._evict_for(*runs.take_after(previous, np.tile(counts, len(self.groups))))

    def _evict_for(self, blocks: I32, evicted: I32) -> I32:
        if evicted.size and self.cache is not None:
            self.cache.forget(evicted)
            self.counters.evicted_blocks += evicted.size
        return blocks

    def _release(self, blocks: I32, owners: I32 | int = 1) -> None:
        """Take owners from distinct blocks; those that lose their last one become free."""
        freed = self.pool.drop(blocks, owners)
        if self._copies and freed.size:
            self._cancel_copies(freed)
        if self.cache is None:
            self.pool.discard(freed)
            return
        worth = self.cache.holds(freed)
        if worth.all():
            self.pool.retain(freed)
        else:
            self.pool.retain(freed[worth])
            self.pool.discard(freed[~worth])

    def _forget_uncomputed(self, row: int, blocks: I32) -> None:
        """Take blocks of a row that the present step would have filled out of the cache: now it will not."""
        if self.cache is not None and self._step_of[row] == self._step:
            mine = blocks[self.cache.holds(blocks)]
            self.cache.forget(mine[self.cache.unwritten(mine)])

    def _cancel_copies(self, freed: I32) -> None:
        """Blocks that were freed before a copy into them ran are copied into no more, and hold nothing."""
        sources = [(block, self._copies.pop(block)) for block in freed.tolist() if block in self._copies]
        if not sources:
            return
        if self.cache is not None:
            garbage = np.array([block for block, _ in sources], np.int32)
            self.cache.forget(garbage[self.cache.holds(garbage)])
        for _, source in sources:
            self._release(np.array([source], np.int32))

    def _grow(self, row: int, end: int) -> None:
        """Blocks for a sequence of ``end`` tokens."""
        have = int(self._capacity[row]) // self.block_size
        n = self._blocks_for(end) - have
        if n <= 0:
            return
        if self._runs is None:
            blocks = self._take(n * len(self.groups))
        else:
            at, column, count = np.array([row]), np.array([have]), np.array([n], np.int32)
            blocks = self._take_behind(self._runs, at, column, count)
        priority = int(self._priority[row])
        if priority:
            self.pool.priority[blocks] = priority
        for i, group in enumerate(self.groups):
            group.set_row(row, have, blocks[i * n : (i + 1) * n])
        self._capacity[row] = (have + n) * self.block_size

    def _grow_rows(self, rows: I64, grow: I32 | None) -> None:
        """``grow`` more blocks (None: one) for each of several rows."""
        have = self._capacity.take(rows)
        self._capacity[rows] = have + (self.block_size if grow is None else grow * self.block_size)
        columns = have // self.block_size
        ends, tips = columns, rows
        if grow is not None:
            counts = grow.astype(np.int64)
            before = counts.cumsum() - counts
            steps = np.arange(int(counts.sum())) - np.repeat(before, counts)
            rows = np.repeat(rows, counts)
            columns = np.repeat(columns, counts) + steps.astype(np.int32)
        n = rows.size
        if self._runs is None:
            blocks = self._take(n * len(self.groups))
        else:
            each = np.ones(n, np.int32) if grow is None else grow.astype(np.int32)
            blocks = self._take_behind(self._runs, tips, ends, each)
        for i, group in enumerate(self.groups):
            part = blocks[i * n : (i + 1) * n]
            group.set(rows, columns, part)
            if self._any_priority:
                self.pool.priority[part] = self._priority.take(rows)

    def _set_tail(self, row: int) -> None:
        last = max(0, int(self.seq_lens[row]) - 1) // self.block_size
        for group in self.groups:
            group.tails[row] = group.table[row, last]

    def _tail_is_its_own(self, row: int) -> bool:
        """Whether a row's last block is computed, on the device, nobody else's and in no cache yet."""
        if self.seqs.is_suspended(row) or self._step_of[row] == self._step:
            return False
        tails = np.array([group.tails[row] for group in self.groups], np.int32)
        cached = self.cache is not None and bool(self.cache.holds(tails).any())
        return not cached and bool((self.pool.refs.take(tails) == 1).all())

    def _own_columns(self, row: int, index: int) -> I64:
        group = self.groups[index]
        first, count = int(group.starts[row]), -(-int(self.seq_lens[row]) // self.block_size)
        own = self.pool.refs.take(group.table[row, first:count]) == 1
        if row in self.swap.records:
            own[self.swap.records[row][index].columns - first] = False
        columns: I64 = own.nonzero()[0] + first
        return columns

    def _swapped(self, columns: I64, host: I32, device: I32) -> SwappedBlocks:
        zeros = np.zeros(columns.size, np.uint64)
        lanes, identities = (zeros, zeros), np.zeros(columns.size, np.int64)
        if self.cache is not None:
            index, held = self.cache.index, self.cache.holds(device)
            lanes = np.where(held, index.lane_a.take(device), 0), np.where(held, index.lane_b.take(device), 0)
            if self.cache.exact is not None:
                identities = self.cache.exact.identity_of(device)
        return SwappedBlocks(columns, host, device, lanes, identities)

    def _still_cached(self, record: SwappedBlocks) -> Bool:
        """Which blocks still hold, where they were, what was swapped out."""
        if self.cache is None:
            return np.zeros(record.device.size, np.bool_)
        index = self.cache.index
        same: Bool = self.cache.holds(record.device) & (record.lanes[0] != 0)
        same &= index.lane_a.take(record.device) == record.lanes[0]
        same &= index.lane_b.take(record.device) == record.lanes[1]
        if self.cache.exact is not None:
            same &= self.cache.exact.identity_of(record.device) == record.identities
        return same

    # Copy-on-write

    def _mark_tail_check(self, row: int) -> None:
        if not self._check_tail[row]:
            self._check_tail[row] = True
            self._num_check_tail += 1

    def _clear_tail_check(self, row: int) -> None:
        if self._check_tail[row]:
            self._check_tail[row] = False
            self._num_check_tail -= 1

    def _plan_tails(self, rows: I64, inside: Bool | bool) -> list[TailPlan]:
        """What writing into the last blocks of marked rows takes; changes nothing.

        Of the owners of a shared block that write in this call, all copy it, except that the last one
        keeps it when no other owner remains.
        """
        marked = self._check_tail.take(rows)
        if not marked.any():
            return []
        plans = [TailPlan(-1, rows[marked], EMPTY, EMPTY, 0)]
        rows = rows[marked & inside]
        if not rows.size:
            return plans
        for index, group in enumerate(self.groups):
            tails = group.tails.take(rows)
            order = np.argsort(tails, kind="stable")
            ordered = tails[order]
            last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
            writers = np.diff(last, prepend=-1)
            kept = last[writers == self.pool.refs.take(ordered[last])]
            copied = np.ones(rows.size, np.bool_)
            copied[kept] = False
            at = rows[order][copied]
            early = self._step_of.take(at) == self._step
            if early.any():
                seq = self.seqs.handle(int(at[early][0]))
                raise SequenceNotComputed(
                    seq, "shares tokens of this step: run it (take_copies) before appending"
                )
            plans.append(TailPlan(index, at, ordered[copied], ordered[kept], at.size))
        return plans

    def _own_tails(self, plans: list[TailPlan]) -> None:
        """Make the last blocks of the planned rows their own and in no cache."""
        for plan in plans:
            if plan.group < 0:
                self._check_tail[plan.rows] = False
                self._num_check_tail -= plan.rows.size
                continue
            group = self.groups[plan.group]
            if self.cache is not None and plan.kept.size:
                self.cache.forget(plan.kept[self.cache.holds(plan.kept)])
            if plan.needed:
                if self._runs is None:
                    blocks = self._take(plan.needed)
                else:  # each copy is the end of another sequence: they do not belong together
                    apart = np.full(plan.needed, -1, np.int32)
                    blocks = self._evict_for(*self._runs.take_after(apart, np.ones_like(apart)))
                self.pool.priority[blocks] = self.pool.priority.take(plan.shared)
                group.set(plan.rows, (self.seq_lens.take(plan.rows) - 1) // self.block_size, blocks)
                group.tails[plan.rows] = blocks
                self._add_copies(blocks, plan.shared)

    def _add_copies(self, blocks: I32, sources: I32) -> None:
        """Queue copies; the caller's ownership of the sources lasts until :meth:`take_copies`."""
        for block, source in zip(blocks.tolist(), sources.tolist(), strict=True):
            origin = self._copies.get(source, source)
            if origin != source:  # a copy of a copy that has not run: read the original
                self.pool.share(np.array([origin], np.int32))
                self._copies[block] = origin
                self._release(np.array([source], np.int32))
            else:
                self._copies[block] = source

    # Sliding windows

    def _release_windows(self, rows: I64, positions: I32) -> None:
        """Free what queries from ``positions`` on do not see, but for the reach of ``lookahead`` drafts.

        Rows that got tokens in this step before are left alone: those tokens' queries are still to come.
        """
        fresh = self._step_of.take(rows) != self._step
        for group in self.groups:
            if group.window is None:
                continue
            starts = group.starts.take(rows)
            unseen = positions - np.int32(group.window + self.lookahead - 1)
            firsts = np.maximum(0, unseen) // self.block_size
            for i in np.flatnonzero(fresh & (firsts > starts)).tolist():
                row, start, first = int(rows[i]), int(starts[i]), int(firsts[i])
                self._release(group.table[row, start:first].copy())
                group.set_row(row, start, np.zeros(first - start, np.int32))
                group.starts[row] = first
                self.counters.window_blocks += first - start


def _check_int(field: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise InvalidPool(field, value, f"an integer from {least} to {most} is allowed")
