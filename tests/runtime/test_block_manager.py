"""What the block manager promises, one promise a test."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pagedgen import errors
from pagedgen.runtime.block_manager import BlockManager
from pagedgen.runtime.fingerprint import ExtraKey, Fingerprinter
from pagedgen.runtime.preemption import PreemptionRule, Remedy


def tokens(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 128_000, n).astype(np.int32)


def manager(num_blocks: int = 64, **options: object) -> BlockManager:
    defaults = {"max_num_seqs": 8, "max_seq_len": 512, "watermark": 0.0, "secret": b"fixed"}
    return BlockManager(num_blocks, **{**defaults, **options})  # type: ignore[arg-type]


def finish(m: BlockManager, seq: int) -> None:
    """End a sequence after a forward pass."""
    m.take_copies()
    m.free(seq)


# Bad input: each its own error, and nothing changes


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("num_blocks", {"num_blocks": 0}),
        ("num_blocks", {"num_blocks": 1 << 24}),
        ("num_blocks", {"num_blocks": 4.0}),
        ("block_size", {"block_size": 0}),
        ("max_num_seqs", {"max_num_seqs": 0}),
        ("max_seq_len", {"max_seq_len": 0}),
        ("match_unit", {"match_unit": 17}),
        ("lookahead", {"lookahead": -1}),
        ("watermark", {"watermark": 1.0}),
        ("windows", {"windows": ()}),
        ("windows", {"windows": (None, 0)}),
        ("num_host_blocks", {"num_host_blocks": -1}),
    ],
)
def test_pools_that_cannot_be(field: str, arguments: dict[str, object]) -> None:
    with pytest.raises(errors.InvalidPool, match=field):
        BlockManager(**{"num_blocks": 8, **arguments})  # type: ignore[arg-type]


def test_each_bad_call_has_its_error() -> None:
    m = manager(num_blocks=4, num_host_blocks=1)
    seq = m.allocate(tokens(20)).seq
    gone = m.allocate(tokens(4, 1)).seq
    m.take_copies()
    m.free(gone)
    calls: list[tuple[type[errors.PagedgenError], Callable[[], object]]] = [
        (errors.FreedTwice, lambda: m.free(gone)),
        (errors.SequenceFreed, lambda: m.fork(gone)),
        (errors.SequenceFreed, lambda: m.append_step([seq, gone], [1, 1])),
        (errors.UnknownSequence, lambda: m.free(1 << 50)),
        (errors.UnknownSequence, lambda: m.fork("seq")),  # type: ignore[arg-type]
        (errors.UnknownSequence, lambda: m.append_step([-5], [1])),
        (errors.SequenceTwice, lambda: m.append_step([seq, seq], [1, 1])),
        (errors.SequenceTooLong, lambda: m.extend(seq, tokens(493))),
        (errors.InvalidLength, lambda: m.truncate(seq, -1)),
        (errors.InvalidLength, lambda: m.truncate(seq, 21)),
        (errors.InvalidLength, lambda: m.slots(seq, 0, 33)),
        (errors.InvalidTokens, lambda: m.allocate([])),
        (errors.InvalidTokens, lambda: m.allocate([1.5])),
        (errors.InvalidTokens, lambda: m.allocate([1, -2])),
        (errors.InvalidTokens, lambda: m.allocate([1, 1 << 31])),
        (errors.InvalidTokens, lambda: m.allocate(tokens(513))),
        (errors.InvalidTokens, lambda: m.append_step([seq], [1, 2])),
        (errors.InvalidTokens, lambda: m.extend(seq, [])),
        (errors.InvalidSalt, lambda: m.allocate([1], salt=1.5)),  # type: ignore[arg-type]
        (errors.InvalidSalt, lambda: m.allocate([1], salt=["a"])),  # type: ignore[arg-type]
        (errors.InvalidSalt, lambda: m.allocate([1], extra=[b"image"])),  # type: ignore[list-item]
        (errors.InvalidSalt, lambda: m.allocate([1], extra=[ExtraKey(1, b"image")])),
        (errors.InvalidPriority, lambda: m.allocate([1], priority=4)),
        (errors.OutOfBlocks, lambda: m.allocate(tokens(40, 2))),
        (errors.OutOfBlocks, lambda: m.extend(seq, tokens(50))),
        (errors.OutOfHostBlocks, lambda: m.swap_out(seq)),
        (errors.SequenceNotSwapped, lambda: m.swap_in(seq)),
        (errors.UnknownPin, lambda: m.unpin(1)),
        (errors.TooManySequences, lambda: m.fork(seq, 8)),
    ]
    before = (m.pool.refs.copy(), m.seq_lens.copy(), m.pool.num_free, len(m.seqs))
    for error, call in calls:
        with pytest.raises(error) as raised:
            call()
        assert type(raised.value) is error
        after = (m.pool.refs, m.seq_lens, m.pool.num_free, len(m.seqs))
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)), error
    m.take_copies()
    m.swap_out(seq, 1)
    for call in (lambda: m.append_step([seq], [1]), lambda: m.fork(seq), lambda: m.blocks(seq)):
        with pytest.raises(errors.SequenceSwapped):
            call()


def test_a_full_pool_refuses_a_step_and_keeps_its_state() -> None:
    m = manager(num_blocks=4, prefix_caching=False)
    seqs = [m.allocate(tokens(32, i)).seq for i in range(2)]
    table, sums = m.groups[0].table.copy(), m.seq_lens.copy()
    with pytest.raises(errors.OutOfBlocks) as raised:
        m.append_step(seqs, [1, 2])
    assert (raised.value.needed, raised.value.free) == (2, 0)
    assert np.array_equal(table, m.groups[0].table) and np.array_equal(sums, m.seq_lens)
    m.free(seqs[0])
    assert m.append_step(seqs[1:], [2]).positions.tolist() == [32]


# Prefix cache


def test_a_repeated_prompt_is_cached_to_its_last_token_but_one() -> None:
    for n in (1, 15, 16, 17, 100, 512):
        m = manager()
        prompt = tokens(n)
        finish(m, m.allocate(prompt).seq)
        again = m.allocate(prompt)
        assert again.num_cached == n - 1
        copies = m.take_copies()
        assert len(copies) == ((n - 1) % 16 > 0)  # whole blocks are shared, a part of one is copied


def test_partial_match_within_a_block_and_match_unit() -> None:
    for unit, want in ((1, 37), (4, 36), (8, 32)):
        m = manager(match_unit=unit)
        finish(m, m.allocate(tokens(64)).seq)
        other = tokens(64)
        other[37:] += 1
        admission = m.allocate(other)
        assert admission.num_cached == want
        copies = m.take_copies()
        assert len(copies) == (want > 32)


def test_the_next_turn_finds_the_unfinished_last_block() -> None:
    m = manager()
    seq = m.allocate(tokens(20)).seq
    answer = tokens(14, 1)
    for token in answer:
        m.take_copies()
        m.append_step([seq], [token])
    finish(m, seq)
    turn = np.concatenate((tokens(20), answer, tokens(30, 2)))
    assert m.match(turn).num_tokens == 34


def test_blocks_of_one_step_are_shared_in_it_but_not_copied() -> None:
    m = manager()
    first = m.allocate(tokens(40))
    second = m.allocate(tokens(40))
    assert (first.num_cached, second.num_cached) == (0, 32)  # 39 would read what the pass has yet to write
    assert m.blocks(first.seq)[:2].tolist() == m.blocks(second.seq)[:2].tolist()
    m.take_copies()
    assert m.match(tokens(40)).num_tokens == 32  # nobody has ended with the 8 tokens after them
    m.free(first.seq)
    assert m.match(tokens(40)).num_tokens == 39


def test_salts_adapters_and_images_keep_caches_apart() -> None:
    prompt = tokens(100)
    image = ExtraKey(40, b"cat")
    keys: list[dict[str, object]] = [
        {}, {"salt": "a"}, {"salt": "b"}, {"salt": b"a"}, {"salt": 1}, {"salt": "1"}, {"extra": [image]},
        {"extra": [ExtraKey(40, b"dog")]}, {"extra": [ExtraKey(41, b"cat")]},
    ]  # fmt: skip
    for key in keys:
        m = manager()
        finish(m, m.allocate(prompt, **key).seq)  # type: ignore[arg-type]
        for other in keys:
            hit = m.match(prompt, **other).num_tokens  # type: ignore[arg-type]
            if other == key:
                assert hit == 99
            elif "salt" in key or "salt" in other:
                assert hit == 0
            else:  # only what precedes the images is shared
                images = [*key.get("extra", ()), *other.get("extra", ())]  # type: ignore[misc]
                assert 32 <= hit <= min(item.position for item in images)


def test_zeros_are_tokens() -> None:
    m = manager()
    finish(m, m.allocate(np.zeros(40, np.int32)).seq)
    assert m.match(np.zeros(20, np.int32)).num_tokens == 19
    assert m.match(np.zeros(512, np.int32)).num_tokens == 40


def test_least_recently_used_goes_first_low_priority_before_high() -> None:
    m = manager(num_blocks=8)
    prompts = [tokens(32, i) for i in range(4)]  # two blocks each
    for prompt, priority in zip(prompts, (0, 2, 0, 0), strict=True):
        finish(m, m.allocate(prompt, priority=priority).seq)
    finish(m, m.allocate(prompts[0]).seq)  # used again, and copied its last block: one more is gone
    hits = [m.match(p).num_tokens for p in prompts]
    assert hits[0] == 31 and hits[1] == 31 and hits[3] == 31 and hits[2] == 16
    finish(m, m.allocate(tokens(80, 9)).seq)  # five blocks: all of priority 0 is older
    assert m.match(prompts[1]).num_tokens == 31
    assert m.match(prompts[2]).num_tokens == m.match(prompts[3]).num_tokens == 0
    finish(m, m.allocate(tokens(128, 10)).seq)
    assert m.match(prompts[1]).num_tokens == 0


def test_pinned_blocks_stay_whatever_comes() -> None:
    m = manager(num_blocks=8)
    seq = m.allocate(tokens(48)).seq
    pin = m.pin(seq)
    finish(m, seq)
    for i in range(1, 6):
        finish(m, m.allocate(tokens(80, i)).seq)
    assert m.match(np.append(tokens(48), 5)).num_tokens == 48
    assert not m.can_allocate(tokens(100, 9))
    m.unpin(pin)
    assert m.can_allocate(tokens(100, 9))
    with pytest.raises(errors.UnknownPin):
        m.unpin(pin)


def test_a_cleared_cache_holds_nothing_and_what_lives_goes_on() -> None:
    m = manager()
    finish(m, m.allocate(tokens(60)).seq)
    seq = m.allocate(tokens(40, 1)).seq
    m.take_copies()
    m.clear_cache()
    assert m.match(tokens(60)).num_tokens == m.match(tokens(40, 1)).num_tokens == 0
    assert m.pool.num_cached_free == 0 and m.pool.num_free == 61
    for token in range(30):
        m.append_step([seq], [token])
        m.take_copies()
    m.free(seq)
    turn = np.concatenate((tokens(40, 1), np.arange(30), [1])).astype(np.int32)
    assert m.match(turn).num_tokens == 0  # its later blocks continue what the old weights computed
    finish(m, m.allocate(turn).seq)
    assert m.match(turn).num_tokens == turn.size - 1


def test_a_step_of_nobody() -> None:
    m = manager()
    assert m.append_step([], []).rows.size == 0 and m.blocks_needed([]) == 0


def test_a_match_that_went_stale_is_looked_up_again() -> None:
    m = manager(num_blocks=8)
    finish(m, m.allocate(tokens(64)).seq)
    match = m.match(tokens(64))
    finish(m, m.allocate(tokens(128, 1)).seq)  # evicts all of it
    admission = m.allocate(match)
    assert match.num_tokens == 63 and admission.num_cached == 0


# Collisions


@pytest.mark.parametrize("bits", [0, 3])
def test_equal_fingerprints_never_serve_the_wrong_block(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``verify_tokens``, even when all fingerprints are the same (0 bits) or take 8 values a lane."""
    terms = Fingerprinter.terms

    def weak(self: Fingerprinter, tokens: np.ndarray, start: int, extra: tuple[ExtraKey, ...] = ()) -> object:
        lanes = terms(self, tokens, start, extra)
        return tuple(
            lane >> np.uint64(64 - bits) << np.uint64(64 - bits) if bits else lane * 0 for lane in lanes
        )

    monkeypatch.setattr(Fingerprinter, "terms", weak)
    m = manager(num_blocks=400, verify_tokens=True)
    heads = [tokens(16, i) for i in range(30)]
    tail = tokens(40, 50)  # the same after each head: only the links tell the blocks apart
    prefix_of: dict[int, list[int]] = {}
    right = wrong = 0
    for _ in range(2):
        for head in heads:
            prompt = np.concatenate((head, tail))
            match = m.match(prompt)
            for column, block in enumerate(match.found[0][: match.num_blocks].tolist()):
                wrong += prefix_of[block] != prompt[: 16 * column + 16].tolist()
                right += 1
            if match.partial:
                start = 16 * match.num_blocks
                known = prefix_of[match.sources[0]]
                wrong += known[: start + match.partial] != prompt[: start + match.partial].tolist()
                right += 1
            seq = m.allocate(match).seq
            for column, block in enumerate(m.blocks(seq).tolist()):
                if column >= match.num_blocks:
                    prefix_of[block] = prompt[: 16 * column + 16].tolist()
            finish(m, seq)
    assert wrong == 0
    assert right > 0 or bits == 0  # with nothing but equal fingerprints all hits may be lost, none is wrong


def test_one_bucket_for_all_is_slow_not_wrong() -> None:
    m = manager(num_blocks=60)
    index = m.cache.index  # type: ignore[union-attr]
    index._shift = np.uint64(63)  # buckets 0 and 1 only: 16 places for everything
    prompts = [tokens(48, i) for i in range(15)]
    for prompt in prompts:
        finish(m, m.allocate(prompt).seq)
    assert index.overflows > 0
    hits = [m.match(prompt).num_tokens for prompt in prompts]
    assert max(hits) > 0 and (index.place >= 0).sum() <= 16
    for prompt in prompts:
        other = prompt.copy()
        other[0] += 1
        assert m.match(other).num_tokens == 0


# Sharing


def test_fork_shares_all_and_copies_the_last_block_once_for_each_writer() -> None:
    m = manager(prefix_caching=False)
    seq = m.allocate(tokens(40)).seq
    children = m.fork(seq, 3)
    m.take_copies()
    assert m.stats().used_blocks == 3
    m.append_step([seq, *children], [1, 2, 3, 4])
    copies = m.take_copies()
    assert len(copies) == 3 and len({*copies[:, 0]}) == 1  # the last writer keeps the block
    assert m.stats().used_blocks == 2 + 4
    tails = {int(m.blocks(s)[2]) for s in (seq, *children)}
    assert len(tails) == 4
    m.append_step([seq, *children], [1, 2, 3, 4])
    assert len(m.take_copies()) == 0


def test_forking_at_a_block_boundary_copies_nothing() -> None:
    m = manager()
    seq = m.allocate(tokens(32)).seq
    m.take_copies()
    (child,) = m.fork(seq)
    m.append_step([seq, child], [1, 2])
    assert len(m.take_copies()) == 0


def test_copying_what_this_step_has_yet_to_compute_is_refused() -> None:
    m = manager()
    seq = m.allocate(tokens(40)).seq
    (child,) = m.fork(seq)
    with pytest.raises(errors.SequenceNotComputed):
        m.append_step([child], [1])
    m.take_copies()
    m.append_step([child], [1])


def test_sharing_saves_what_theory_says() -> None:
    """Parallel sampling n=4 and beam width 4: within 2 points of sharing every common token.

    Prompt and output are the means of the Azure conversation trace.
    """
    rng = np.random.default_rng(0)
    prompt, output = 1155, 211
    m = manager(num_blocks=1024, max_seq_len=2048)
    seq = m.allocate(tokens(prompt)).seq
    m.take_copies()
    samples = [seq, *m.fork(seq, 3)]
    for _ in range(output):
        m.append_step(samples, rng.integers(0, 1000, 4))
        m.take_copies()
    theory = 1 - (prompt + 4 * output) / (4 * (prompt + output))
    assert abs(m.stats().sharing_saving - theory) < 0.02

    m = manager(num_blocks=1024, max_seq_len=2048, prefix_caching=False)
    root = m.allocate(tokens(prompt)).seq
    m.take_copies()
    paths: dict[int, tuple[int, ...]] = dict.fromkeys([root, *m.fork(root, 3)], ())
    for step in range(output):
        handles, new = list(paths), {}
        for i, parent in enumerate(rng.integers(0, 4, 4).tolist()):  # the best four go on from these beams
            (child,) = m.fork(handles[parent])
            new[child] = (*paths[handles[parent]], 4 * step + i)
        for handle in handles:
            m.free(handle)
        m.append_step(list(new), [path[-1] for path in new.values()])
        m.take_copies()
        paths = new
    distinct = {path[: i + 1] for path in paths.values() for i in range(output)}
    theory = 1 - (prompt + len(distinct)) / (4 * (prompt + output))
    assert abs(m.stats().sharing_saving - theory) < 0.02


# Pieces, drafts, windows


def test_a_prompt_admitted_in_pieces() -> None:
    m = manager()
    prompt = tokens(200)
    finish(m, m.allocate(prompt[:50]).seq)
    admission = m.allocate(prompt, max_new_tokens=64)
    assert (admission.num_cached, admission.num_tokens) == (50, 114)
    m.take_copies()
    m.extend(admission.seq, prompt[114:178])
    m.take_copies()
    m.extend(admission.seq, prompt[178:])
    finish(m, admission.seq)
    assert m.match(prompt).num_tokens == 199  # as if it had come in one piece


def test_lookahead_slots_are_there_and_rollback_returns_them() -> None:
    m = manager(lookahead=5)
    seq = m.allocate(tokens(30)).seq
    assert m.slots(seq, 30, 35).size == 5
    for token in range(40):
        m.take_copies()
        m.append_step([seq], [token])
        length = m.length(seq)
        assert m.slots(seq, length, length + 5).size == 5
    m.take_copies()
    m.truncate(seq, 33)
    assert m.length(seq) == 33
    with pytest.raises(errors.InvalidLength):
        m.truncate(seq, 34)


def test_rollback_and_other_tokens_find_their_own_prefix() -> None:
    m = manager()
    prompt = tokens(40)
    seq = m.allocate(prompt).seq
    m.take_copies()
    for token in range(12):
        m.append_step([seq], [token])
    m.take_copies()
    m.truncate(seq, 44)  # back over a block boundary
    for token in range(100, 120):
        m.append_step([seq], [token])
    finish(m, seq)
    kept = np.concatenate((prompt, [0, 1, 2, 3], np.arange(100, 120), [7])).astype(np.int32)
    assert m.match(kept).num_tokens == 64
    rejected = np.concatenate((prompt, np.arange(12), [7])).astype(np.int32)
    assert m.match(rejected).num_tokens in (44, 48)  # 48: the first full block was computed, so it is right


def test_sliding_window_holds_the_window_only() -> None:
    m = manager(windows=(None, 40))
    seq = m.allocate(tokens(64)).seq
    for token in range(200):
        m.take_copies()
        m.append_step([seq], [token])
    full, window = m.groups
    row = m.seqs.row(seq)
    assert full.starts[row] == 0 and window.starts[row] == (264 - 40) // 16
    assert m.stats().used_blocks == 17 + 17 - window.starts[row]
    with pytest.raises(errors.InvalidLength, match="window"):
        m.truncate(seq, 100)


def test_hybrid_hit_needs_the_window_not_all_blocks() -> None:
    m = manager(windows=(None, 20), num_blocks=200)
    seq = m.allocate(tokens(320)).seq
    for token in range(10):
        m.take_copies()
        m.append_step([seq], [token])
    finish(m, seq)
    prompt = np.append(tokens(320), [0, 1, 2, 3])
    match = m.match(prompt)
    assert match.num_blocks == 20 and match.firsts == (0, (320 - 20 + 1) // 16)
    admission = m.allocate(match)
    assert admission.num_cached >= 320
    assert (m.blocks(admission.seq, 1)[: match.firsts[1]] == 0).all()


# Pressure


def test_watermark_holds_admission_back_but_not_decoding() -> None:
    m = BlockManager(10, max_num_seqs=4, max_seq_len=256, watermark=0.3)
    seq = m.allocate(tokens(80)).seq  # alone: the watermark does not apply
    assert not m.can_allocate(tokens(40, 1)) and m.can_allocate(tokens(32, 1))
    for token in range(60):
        m.append_step([seq], [token])


def test_swap_returns_what_the_cache_still_holds_without_copying() -> None:
    m = manager(num_blocks=12, num_host_blocks=12)
    seq = m.allocate(tokens(100)).seq
    m.take_copies()
    out = m.swap_out(seq)
    assert len(out) == 7 and m.pool.num_free == 12
    back = m.swap_in(seq)
    assert len(back) == 1  # the last block was not full, so it was not cached
    m.swap_out(seq)
    finish(m, m.allocate(tokens(190, 1)).seq)  # overwrites them all
    assert len(m.swap_in(seq)) == 7
    assert m.stats().counters.swap_saved_blocks == 6


def test_preemption_takes_the_cheaper_way_and_no_more_than_it_must() -> None:
    m = manager(num_blocks=40, num_host_blocks=40)
    seqs = [m.allocate(tokens(160, i)).seq for i in range(3)]
    m.take_copies()
    fast_link = PreemptionRule(block_bytes=1 << 20, swap_bytes_per_s=1e12, prefill_tokens_per_s=1e3)
    slow_link = PreemptionRule(block_bytes=1 << 20, swap_bytes_per_s=1e6, prefill_tokens_per_s=1e3)
    (step,) = fast_link.plan(m, 4, seqs[::-1])
    assert (step.seq, step.remedy, step.num_blocks, step.freed) == (seqs[2], Remedy.SWAP, 4, 4)
    first, second = slow_link.plan(m, 14, seqs[::-1])
    assert first.remedy is second.remedy is Remedy.RECOMPUTE and first.freed == second.freed == 10
    free = m.pool.num_free
    m.swap_out(step.seq, step.num_blocks)
    assert m.pool.num_free == free + step.freed
    with pytest.raises(errors.OutOfBlocks):
        fast_link.plan(m, 31, seqs[:2])
    with pytest.raises(errors.InvalidValue, match="swap_bytes_per_s"):
        PreemptionRule(1, 0, 1)


# Figures


def test_stats_and_their_text() -> None:
    m = manager(num_blocks=100)
    seq = m.allocate(tokens(40)).seq
    m.take_copies()
    stats = m.stats()
    assert stats.used_blocks == 3 and stats.stored_tokens == 40
    assert stats.waste == pytest.approx(8 / 48) and stats.utilisation == 0.03
    m.free(seq)
    m.allocate(tokens(40))
    m.take_copies()
    stats = m.stats()
    assert stats.hit_rate == 39 / 80 and stats.counters.partial_hit_tokens == 7
    assert ("used blocks", "3") in stats.rows()
    text = stats.prometheus()
    assert "pagedgen_kv_used_blocks 3\n" in text and "pagedgen_kv_hit_tokens_total 39\n" in text


def test_a_million_blocks_take_less_than_64_mb() -> None:
    m = BlockManager(1_000_000, max_num_seqs=256, max_seq_len=131_072)
    for queue in m.pool._queues:
        queue.push(np.empty(0, np.int32))
    full_queue = 2 * 4 * m.pool.num_blocks  # what the eviction queue grows to
    tables = 4 * m.pool.num_blocks
    assert m.stats().host_bytes + full_queue + tables <= 64_000_000


def test_adaptive_places_side_by_side_and_says_what_it_needs() -> None:
    for options in ({"block_size": 8}, {"windows": (64,)}):
        with pytest.raises(errors.InvalidPool, match="adaptive = True"):
            BlockManager(64, adaptive=True, **options)
    with pytest.raises(errors.InvalidPool, match="adaptive = False"):
        BlockManager(64).run_table([])
    manager = BlockManager(64, adaptive=True)
    seqs = [manager.allocate([i] * 20).seq for i in range(3)]
    for token in range(200):  # they grow in turns, each inside its own run
        manager.append_step(seqs, [token] * 3)
        manager.take_copies()
    assert manager.run_table(seqs).tolist() == [[[0, 14]], [[16, 14]], [[32, 14]]]
    assert manager.compact(16).shape == (0, 2)


def test_compaction_clears_a_run_and_fills_it_in_the_next_call() -> None:
    """Holes of one block everywhere: the emptiest run's blocks move away, then a whole stretch moves in."""
    manager = BlockManager(64, adaptive=True, prefix_caching=False)
    singles = [manager.allocate([i] * 16).seq for i in range(64)]
    manager.take_copies()
    for seq in singles:
        if manager.blocks(seq)[0] % 2:
            manager.free(seq)
    scattered = manager.allocate(range(16 * 12)).seq
    manager.take_copies()
    assert manager.run_table([scattered]).shape[1] == 12
    moved = []
    for _ in range(2):
        pairs = manager.compact(32)
        assert len({*pairs.ravel().tolist()}) == pairs.size  # may be copied in any order
        moved.append(len(pairs))
    assert 8 <= moved[0] <= 16 and moved[1] == 12
    run = manager.run_table([scattered])[0]
    assert run.shape[0] == 1 and run[0, 0] % 16 == 0 and run[0, 1] == 12
    assert manager.pool.num_free == 64 - 32 - 12
