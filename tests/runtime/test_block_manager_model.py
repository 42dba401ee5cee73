"""Every operation of the block manager, in any order, against a model that knows each sequence's tokens.

The model keeps what every slot of every sequence must hold, moves bytes exactly as the manager says, and
compares all of it after each forward pass. A long run of the same:
``python tests/runtime/test_block_manager_model.py --operations 1000000``.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pagedgen.errors import (
    FreedTwice,
    InvalidLength,
    InvalidPool,
    OutOfBlocks,
    OutOfHostBlocks,
    PagedgenError,
    SequenceFreed,
    SequenceNotComputed,
    SequenceTooLong,
    TooManySequences,
)
from pagedgen.runtime.block_manager import BlockManager
from pagedgen.runtime.fingerprint import ExtraKey
from pagedgen.runtime.kv_cache import KVCache, KVShape
from pagedgen.runtime.run_pool import RunPool
from pagedgen.values.spec import DType

MASK = (1 << 63) - 1


@dataclass
class Modelled:
    """A sequence as the model sees it: its tokens and what each one's slot must hold."""

    salt: object
    extra: tuple[ExtraKey, ...]
    tokens: list[int] = field(default_factory=list)
    values: list[int] = field(default_factory=list)  # a hash of salt, extra content and all tokens up to here
    computed: int = 0  # slots before this are written
    rest: list[int] = field(default_factory=list)  # of a prompt that is admitted in pieces

    def push(self, token: int) -> None:
        here = tuple(e.content for e in self.extra if e.position == len(self.tokens))
        last = self.values[-1] if self.values else hash((self.salt, "root"))
        self.tokens.append(token)
        self.values.append(hash((last, token, here)) & MASK)

    def copy(self) -> Modelled:
        return Modelled(self.salt, self.extra, self.tokens[:], self.values[:], self.computed)


class World:
    """A manager, a pool of real values, and the model."""

    def __init__(
        self,
        seed: int,
        num_blocks: int,
        block_size: int,
        windows: tuple[int | None, ...] = (None,),
        run_blocks: int = 16,
        **options: object,
    ) -> None:
        self.random = random.Random(seed)
        self.max_len = 12 * block_size
        self.manager = BlockManager(
            num_blocks, block_size, max_num_seqs=7, max_seq_len=self.max_len, windows=windows,
            num_host_blocks=20, secret=seed.to_bytes(16, "little"), **options,
        )  # fmt: skip
        self.runs = self.manager._runs
        if self.runs is not None and run_blocks != 16:  # so that this small pool has many runs
            self.manager.pool = self.manager._runs = self.runs = RunPool(num_blocks, run_blocks)
        self.moves = 0
        # A real KV cache, one layer a group, whose K and V of a token are eight bytes each: one model value.
        shape = KVShape(len(windows), num_kv_heads=1, head_dim=2, block_size=block_size, dtype=DType.F32)
        self.cache = KVCache(shape, num_blocks, num_host_blocks=self.manager.swap.num_blocks)
        self.kv = self.cache.storage.numpy().view(np.int64)  # [groups, K and V, num_blocks + 1, block_size]
        self.seqs: dict[int, Modelled] = {}
        self.swapped: dict[int, Modelled] = {}
        self.freed: list[int] = []
        self.pins: list[int] = []
        self.histories: list[tuple[object, tuple[ExtraKey, ...], list[int]]] = [(None, (), [])]
        self.admitted = False  # in this step
        self.hits = self.failures = self.operations = 0

    # What a serving loop does

    def prompt(self) -> tuple[object, tuple[ExtraKey, ...], list[int]]:
        salt, extra, base = self.random.choice(self.histories)
        cut = self.random.randint(0, len(base))
        tokens = base[:cut] + [self.random.randrange(3) for _ in range(self.random.randint(1, 20))]
        tokens = tokens[: self.max_len - 2]
        if self.random.random() < 0.15:
            salt = self.random.choice([None, "tenant", 7, b"lora"])
        if self.random.random() < 0.15:
            extra = (ExtraKey(self.random.randrange(len(tokens)), self.random.choice([b"cat", b"dog"])),)
        return salt, tuple(e for e in extra if e.position < len(tokens)), tokens

    def admit(self) -> None:
        salt, extra, tokens = self.prompt()
        chunk = self.random.choice([None, None, 1, 5])
        manager = self.manager
        match = manager.match(np.array(tokens, np.int32), salt, extra)
        possible = manager.can_allocate(match, chunk)
        try:
            admission = manager.allocate(
                match, max_new_tokens=chunk, priority=self.random.choice([0, 0, 0, 1, 3])
            )
        except (OutOfBlocks, TooManySequences):
            assert not possible
            self.failures += 1
            return
        assert possible and admission.num_cached == match.num_tokens < len(tokens)
        seq = Modelled(salt, extra)
        for token in tokens[: admission.num_tokens]:
            seq.push(token)
        seq.rest = tokens[admission.num_tokens :]
        seq.computed = admission.num_cached
        self.hits += admission.num_cached
        self.seqs[admission.seq] = seq
        self.histories = [*self.histories[-6:], (salt, extra, tokens)]
        self.admitted = True

    def extend(self, handle: int) -> None:
        seq = self.seqs[handle]
        n = self.random.randint(1, 18)
        tokens = seq.rest[:n] or [self.random.randrange(3) for _ in range(n)]
        try:
            self.manager.extend(handle, tokens)
        except SequenceTooLong:
            assert len(seq.tokens) + len(tokens) > self.max_len
            return
        except (OutOfBlocks, SequenceNotComputed):
            self.failures += 1
            return
        assert len(seq.tokens) + len(tokens) <= self.max_len
        seq.rest = seq.rest[n:]
        for token in tokens:
            seq.push(token)
        self.note(seq)

    def step(self, handles: list[int]) -> None:
        tokens = [self.random.randrange(3) for _ in handles]
        needed = None
        try:
            needed = self.manager.blocks_needed(handles)
            step = self.manager.append_step(np.array(handles, np.int64), np.array(tokens, np.int32))
        except SequenceTooLong:
            assert any(len(self.seqs[h].tokens) >= self.max_len for h in handles)
            return
        except OutOfBlocks as error:
            assert error.needed == needed > self.manager.pool.num_free == error.free
            self.failures += 1
            return
        except SequenceNotComputed:
            self.failures += 1
            return
        for i, (handle, token) in enumerate(zip(handles, tokens, strict=True)):
            seq = self.seqs[handle]
            assert step.positions[i] == len(seq.tokens)
            seq.push(token)
            for group in range(len(self.manager.groups)):
                want = self.manager.slots(handle, len(seq.tokens) - 1, len(seq.tokens), group)
                assert step.slots[group, i] == want[0]
            self.note(seq)

    def fork(self, handle: int) -> None:
        n = self.random.randint(1, 2)
        try:
            children = self.manager.fork(handle, n)
        except TooManySequences:
            self.failures += 1
            return
        for child in children:
            self.seqs[child] = self.seqs[handle].copy()

    def truncate(self, handle: int) -> None:
        self.settle(handle)
        seq = self.seqs[handle]
        length = max(0, len(seq.tokens) - self.random.choice([0, 1, 2, 3, 5, 9, 40]))
        try:
            self.manager.truncate(handle, length)
        except InvalidLength:
            assert any(g.window is not None for g in self.manager.groups)
            return
        self.note(seq)
        del seq.tokens[length:], seq.values[length:]
        seq.computed = min(seq.computed, length)
        seq.rest = []

    def free(self, handle: int) -> None:
        self.settle(handle)
        self.manager.free(handle)
        seq = self.seqs.pop(handle) if handle in self.seqs else self.swapped.pop(handle)
        self.note(seq)
        self.freed = [*self.freed[-4:], handle]

    def pin(self, handle: int) -> None:
        if len(self.pins) > 2:
            self.manager.unpin(self.pins.pop(0))
        elif self.seqs[handle].computed == len(self.seqs[handle].tokens):
            self.pins.append(self.manager.pin(handle))

    def swap_out(self, handle: int) -> None:
        """Blocks go to host memory, byte by byte, and the device's are overwritten by whoever comes next."""
        count = self.random.choice([None, None, 1, 2])
        try:
            pairs = self.manager.swap_out(handle, count)
        except (OutOfHostBlocks, SequenceNotComputed):
            self.failures += 1
            return
        self.cache.swap_out(pairs)
        if handle in self.seqs:
            self.swapped[handle] = self.seqs.pop(handle)

    def swap_in(self, handle: int) -> None:
        try:
            pairs = self.manager.swap_in(handle)
        except OutOfBlocks:
            self.failures += 1
            return
        self.cache.swap_in(pairs)
        self.seqs[handle] = self.swapped.pop(handle)

    def compact(self) -> None:
        """Scattered blocks move; what they leave behind is overwritten, so that a stale reader shows."""
        if self.runs is None:
            with pytest.raises(InvalidPool):
                self.manager.compact(1)
            return
        most = self.random.choice([1, 4, 16, 100])
        before = self.manager.pool.num_free
        pairs = self.manager.compact(most)
        assert len(pairs) <= most and before == self.manager.pool.num_free
        assert len({*pairs.ravel().tolist()}) == pairs.size
        self.cache.copy_blocks(pairs)
        self.kv[:, :, pairs[:, 0]] = -1
        self.moves += len(pairs)

    def check_runs(self) -> None:
        """Maps and run tables say what owners and block tables say."""
        pool = self.runs
        assert pool is not None
        is_open = (pool.refs == 0) & ((pool._places < 0) | (pool.priority == 0))
        bits = np.zeros(pool._maps.size * pool.run_blocks, np.int64)
        bits[: pool.num_blocks] = is_open
        maps = (bits.reshape(-1, pool.run_blocks) << np.arange(pool.run_blocks)).sum(axis=1)
        assert (maps == pool._maps).all()
        whole = {run for run, stamp in pool._whole if pool._is_whole(run, stamp)}
        assert whole == set(np.flatnonzero(maps == (1 << pool.run_blocks) - 1).tolist())
        handles = [h for h in self.seqs if self.random.random() < 0.5]
        for index in range(len(self.manager.groups)):
            table = self.manager.run_table(handles, index)
            for handle, runs in zip(handles, table.tolist(), strict=True):
                walked = [start + i for start, length in runs for i in range(length)]
                assert walked == self.manager.blocks(handle, index).tolist()
                ends = [(a + n, b) for (a, n), (b, m) in pairwise(runs) if m]
                assert all(end != start for end, start in ends)  # runs are as long as they can be

    def settle(self, handle: int) -> None:
        """What others were admitted on may not be dropped before it is computed."""
        if (
            self.admitted
            and handle in self.seqs
            and self.seqs[handle].computed < len(self.seqs[handle].tokens)
        ):
            self.forward()

    def note(self, seq: Modelled) -> None:
        self.histories = [*self.histories[-6:], (seq.salt, seq.extra, seq.tokens[:])]

    def forward(self) -> None:
        """Copies in random order, then the KV of all new tokens."""
        pairs = self.manager.take_copies()
        copies = pairs.tolist()
        assert not {s for s, _ in copies} & {d for _, d in copies}
        assert len({d for _, d in copies}) == len(copies)
        if self.random.random() < 0.5:
            self.cache.copy_blocks(pairs)
        else:
            self.cache.move_blocks(np.array(self.random.sample(copies, len(copies)), np.int32), 1)
        for handle, seq in self.seqs.items():
            for group in range(len(self.manager.groups)):
                slots = self.manager.slots(handle, seq.computed, len(seq.tokens), group)
                for plane in self.kv[group]:
                    plane.reshape(-1)[slots] = np.array(seq.values[seq.computed :], np.int64) ^ group
            seq.computed = len(seq.tokens)
        self.admitted = False
        self.check_bytes()

    def check_bytes(self) -> None:
        """Every slot that a query may still read holds what it must."""
        for handle, seq in self.seqs.items():
            for index, group in enumerate(self.manager.groups):
                row = self.manager.seqs.row(handle)
                first = int(group.starts[row]) * self.manager.block_size
                if group.window is None:
                    assert first == 0
                else:
                    assert first <= max(0, len(seq.tokens) - group.window + 1)  # the next query sees the rest
                slots = self.manager.slots(handle, first, len(seq.tokens), index)
                want = np.array(seq.values[first:], np.int64) ^ index
                for plane in self.kv[index]:
                    assert (plane.reshape(-1)[slots] == want).all(), (handle, index)

    def check_books(self) -> None:
        """No leak, no double owner: counts, free lists and index agree with the tables."""
        manager, pool = self.manager, self.manager.pool
        refs = np.zeros(pool.num_blocks, np.int64)
        host = []
        for handle in [*self.seqs, *self.swapped]:
            row = manager.seqs.row(handle)
            if handle in self.swapped:
                records = manager.swap.records[row]
                count = int(manager._capacity[row]) // manager.block_size
                for group, record in zip(manager.groups, records, strict=True):
                    kept = np.setdiff1d(np.arange(int(group.starts[row]), count), record.columns)
                    np.add.at(refs, group.table[row, kept], 1)
                    host += record.host.tolist()
                continue
            assert manager.length(handle) == len(self.seqs[handle].tokens)
            count = int(manager._capacity[row]) // manager.block_size
            assert count * manager.block_size >= len(self.seqs[handle].tokens)
            mine: list[int] = []
            for group in manager.groups:
                mine += group.table[row, int(group.starts[row]) : count].tolist()
            assert len(set(mine)) == len(mine)
            np.add.at(refs, mine, 1)
        for blocks in manager._pins.values():
            np.add.at(refs, blocks, 1)
        np.add.at(refs, list(manager._copies.values()), 1)
        assert (refs == pool.refs).all()
        stats = manager.stats()
        assert stats.used_blocks == int((refs > 0).sum()) == manager.pool.num_blocks - stats.free_blocks
        if not manager._pins and not manager._copies and not self.swapped:
            fills: dict[int, int] = {}
            for handle, seq in self.seqs.items():
                for index, group in enumerate(manager.groups):
                    first = int(group.starts[manager.seqs.row(handle)])
                    for column, block in enumerate(manager.blocks(handle, index).tolist()):
                        if column >= first:
                            fill = min(manager.block_size, len(seq.tokens) - column * manager.block_size)
                            fills[block] = max(fill, fills.get(block, 0))
            assert stats.stored_tokens == sum(fills.values())
        assert len(set(host)) == len(host)
        assert sorted(host) == np.flatnonzero(~manager.swap._free).tolist()
        assert manager.swap.num_free == manager.swap.num_blocks - len(host)
        free = set(np.flatnonzero(refs == 0).tolist())
        if self.runs is not None:
            self.check_runs()
        clean = pool._clean[: pool._num_clean].tolist() + list(range(pool._fresh, pool.num_blocks))
        if self.runs is not None:
            clean = np.flatnonzero((pool.refs == 0) & (pool._places < 0)).tolist()
        queued = []
        for level, queue in enumerate(pool._queues):
            for place in range(queue._head, queue._tail):
                block = int(queue._ring[place])
                if pool._places[block] == place * len(pool._queues) + level:
                    queued.append(block)
        assert sorted(clean + queued) == sorted(free), (clean, queued, free)
        assert len(free) == pool.num_free and len(queued) == pool.num_cached_free
        assert manager._num_check_tail == int(manager._check_tail.sum())
        if manager.cache is None:
            assert not queued
            return
        index = manager.cache.index
        indexed = np.flatnonzero(index.place >= 0)
        assert set(queued) <= set(indexed.tolist()) and not set(clean) & set(indexed.tolist())
        assert int((index._entries != 0).sum()) == indexed.size
        found = index.lookup(index.lane_a[indexed], index.lane_b[indexed])
        assert (index.lane_a[found] == index.lane_a[indexed]).all() and (found >= 0).all()

    def bad_call(self) -> None:
        """A refused call changes nothing."""
        before = state(self.manager)
        calls = [
            lambda: self.manager.free(-1),
            lambda: self.manager.free(1 << 40),
            lambda: self.manager.append_step([1 << 40], [1]),  # 12345 comes to life after 90,000 operations
            lambda: self.manager.allocate([]),
            lambda: self.manager.allocate([1] * (self.max_len + 1)),
            lambda: self.manager.allocate([1, -1]),
            lambda: self.manager.allocate([1, 2], salt=1.5),
        ]
        for handle in self.freed:
            calls += [lambda h=handle: self.manager.free(h), lambda h=handle: self.manager.fork(h)]
        for handle in self.swapped:
            calls += [
                lambda h=handle: self.manager.append_step([h], [1]),
                lambda h=handle: self.manager.fork(h),
                lambda h=handle: self.manager.truncate(h, 0),
                lambda h=handle: self.manager.pin(h),
            ]
        for handle, seq in self.seqs.items():
            calls += [
                lambda h=handle: self.manager.swap_in(h),
                lambda h=handle: self.manager.truncate(h, -1),
                lambda h=handle, s=seq: self.manager.truncate(h, len(s.tokens) + 1),
                lambda h=handle: self.manager.append_step([h, h], [1, 1]),
                lambda h=handle: self.manager.append_step([h], [1, 1]),
                lambda h=handle: self.manager.extend(h, [1] * (self.max_len + 1)),
            ]
        try:
            self.random.choice(calls)()
        except PagedgenError:
            assert state(self.manager) == before
        else:
            raise AssertionError("a bad call was accepted")

    def act(self) -> None:
        """One random operation."""
        self.operations += 1
        if self.pins and self.random.random() < 0.02:
            self.manager.unpin(self.pins.pop(0))
        if self.random.random() < 0.002:
            self.manager.clear_cache()
        if self.runs is not None and self.random.random() < 0.1:
            self.compact()
        handles = list(self.seqs)
        handle = self.random.choice(handles) if handles else None
        kind = self.random.random()
        if self.swapped and kind > (0.97 if handles else 0.5):
            self.swap_in(self.random.choice(list(self.swapped)))
        elif self.swapped and kind > (0.965 if handles else 0.3):
            self.free(self.random.choice(list(self.swapped)))
        elif handle is None or kind < 0.12:
            self.admit()
        elif kind < 0.45:
            self.step(self.random.sample(handles, self.random.randint(1, len(handles))))
        elif kind < 0.55:
            self.extend(handle)
        elif kind < 0.62:
            self.fork(handle)
        elif kind < 0.69:
            self.truncate(handle)
        elif kind < 0.79:
            self.free(handle)
        elif kind < 0.82:
            self.pin(handle)
        elif kind < 0.85:
            self.bad_call()
        elif kind < 0.875:
            self.swap_out(self.random.choice([handle, *self.swapped]))
        else:
            self.forward()


def state(manager: BlockManager) -> list[bytes]:
    """Everything that a call could change."""
    pool, seqs = manager.pool, manager.seqs
    arrays = [pool.refs, pool.priority, pool._places, manager.seq_lens, manager._capacity]
    arrays += [manager._check_tail, seqs._live, seqs._ready]
    arrays += manager.prefixes.arrays if manager.prefixes else ()
    for group in manager.groups:
        arrays += [group.table, group.tails, group.starts]
    if manager._runs is not None:
        arrays += [manager._runs._maps, manager._runs._orders, manager._runs._tips]
    if manager.cache:
        arrays += [manager.cache.index._table, manager.cache.index.place, manager.cache._tail_block]
    rest = [
        pool.num_free,
        pool.num_cached_free,
        pool._num_clean,
        pool._fresh,
        sorted(seqs._free),
        manager._copies,
    ]
    return [a.tobytes() for a in arrays] + [repr(rest).encode()]


CONFIGURATIONS: dict[str, dict[str, object]] = {
    "plain": {"num_blocks": 40, "block_size": 4},
    "tight": {"num_blocks": 14, "block_size": 4, "watermark": 0.2},
    "block_1": {"num_blocks": 60, "block_size": 1},
    "odd_block": {"num_blocks": 40, "block_size": 5, "match_unit": 2},
    "no_cache": {"num_blocks": 30, "block_size": 4, "prefix_caching": False},
    "lookahead": {"num_blocks": 60, "block_size": 4, "lookahead": 6},
    "window": {"num_blocks": 40, "block_size": 4, "windows": (9,), "lookahead": 2},
    "hybrid": {"num_blocks": 70, "block_size": 4, "windows": (6, None, 11)},
    "verified": {"num_blocks": 40, "block_size": 4, "verify_tokens": True},
    "adaptive": {"num_blocks": 43, "block_size": 16, "adaptive": True, "match_unit": 4},
    "adaptive_tight": {"num_blocks": 30, "block_size": 16, "adaptive": True, "run_blocks": 4},
    "adaptive_verified": {
        "num_blocks": 90,
        "block_size": 16,
        "adaptive": True,
        "run_blocks": 4,
        "verify_tokens": True,
        "lookahead": 18,
        "windows": (None, None),
    },
    "adaptive_no_cache": {
        "num_blocks": 32,
        "block_size": 16,
        "adaptive": True,
        "run_blocks": 4,
        "prefix_caching": False,
    },
    "verified_hybrid": {"num_blocks": 70, "block_size": 4, "verify_tokens": True, "windows": (None, 6)},
}


class Machine(RuleBasedStateMachine):
    """The same operations, chosen and shrunk by hypothesis."""

    @initialize(name=st.sampled_from(sorted(CONFIGURATIONS)), seed=st.integers(0, 1 << 30))
    def start(self, name: str, seed: int) -> None:
        self.world = World(seed, **CONFIGURATIONS[name])  # type: ignore[arg-type]

    def any(self, choice: int) -> int | None:
        handles = list(self.world.seqs)
        return handles[choice % len(handles)] if handles else None

    @rule()
    def admit(self) -> None:
        self.world.admit()

    @rule(share=st.integers(1, 7))
    def step(self, share: int) -> None:
        if self.world.seqs:
            self.world.step(list(self.world.seqs)[:share])

    @rule(
        choice=st.integers(0, 6),
        name=st.sampled_from(["extend", "fork", "truncate", "free", "pin", "swap_out"]),
    )
    def one(self, choice: int, name: str) -> None:
        handle = self.any(choice)
        if handle is not None:
            getattr(self.world, name)(handle)

    @rule(choice=st.integers(0, 6))
    def swap_in(self, choice: int) -> None:
        handles = list(self.world.swapped)
        if handles:
            self.world.swap_in(handles[choice % len(handles)])

    @rule()
    def bad_call(self) -> None:
        self.world.bad_call()

    @rule()
    def compact(self) -> None:
        self.world.compact()

    @rule()
    def forward(self) -> None:
        self.world.forward()

    @invariant()
    def books(self) -> None:
        if hasattr(self, "world"):
            self.world.check_books()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            drain(self.world)


def drain(world: World) -> None:
    """Nothing is left when all is freed."""
    world.forward()
    for handle in [*world.seqs, *world.swapped]:
        world.free(handle)
        with pytest.raises(FreedTwice):
            world.manager.free(handle)
        with pytest.raises(SequenceFreed):
            world.manager.fork(handle)
    for pin in world.pins:
        world.manager.unpin(pin)
    world.pins = []
    world.forward()
    world.check_books()
    assert world.manager.swap.num_free == world.manager.swap.num_blocks
    assert world.manager.pool.num_free == world.manager.pool.num_blocks


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)


def run(name: str, seed: int, operations: int) -> World:
    """A random run of one configuration; the books are checked every 20 operations."""
    world = World(seed, **CONFIGURATIONS[name])  # type: ignore[arg-type]
    for i in range(operations):
        world.act()
        if i % 20 == 0:
            world.check_books()
    drain(world)
    return world


def test_random_runs() -> None:
    for seed, name in enumerate(CONFIGURATIONS):
        world = run(name, seed, 800)
        assert world.failures > 0, name  # pressure was real
        if world.manager.cache is not None:
            assert world.hits > 0, name
        if world.runs is not None:
            assert world.moves > 0, name


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="configurations whose name begins with this")
    options = parser.parse_args()
    names = [name for name in CONFIGURATIONS if name.startswith(options.only)]
    each = -(-options.operations // len(names))
    for name in names:
        world = run(name, options.seed, each)
        print(
            f"{name}: {world.operations} operations, {world.failures} refused, {world.hits} cached tokens, "
            f"{world.moves} blocks compacted"
        )


if __name__ == "__main__":
    main()
