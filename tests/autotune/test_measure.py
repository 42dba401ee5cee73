"""Measuring: nothing unverified is timed, inputs outrun the cache, failures are charged to their variant."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pagedgen.autotune import measure as module
from pagedgen.autotune.measure import (
    ROTATION,
    Clock,
    Rotation,
    Turns,
    Verified,
    _graph_calls,
    last_level_cache_bytes,
    measure,
)
from pagedgen.errors import GateFailure
from pagedgen.values.record import Verdict
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import DType, KernelSpec, KInner, Op
from pagedgen.values.workload import Workload

SPEC = KernelSpec(Op.DECODE, 32, 2, 1, 16, DType.F32, DType.F32)
SCHEDULE = Schedule.of("t", tile=16)
PASSED, FAILED = Verdict(True, 4, 1e-4, 1e-3, 0), Verdict(False, 1, 1.0, 1e-3, 0, "error 1")


def test_only_what_passed_the_gate_can_be_timed() -> None:
    assert Verified(0, SCHEDULE, PASSED).variant == 0
    with pytest.raises(GateFailure, match="tile16: error 1"):
        Verified(0, SCHEDULE, FAILED)


@pytest.mark.parametrize(("cache", "expected"), [(1 << 20, 33), (1 << 15, 2), (1 << 12, 1)])
def test_inputs_rotate_past_the_cache(monkeypatch, cache: int, expected: int) -> None:
    monkeypatch.setattr(module, "last_level_cache_bytes", lambda device: cache)
    workload = Workload("w", (500, 0, 12))  # 131,072 bytes of K and V
    assert workload.kv_bytes(SPEC) == 1 << 17
    turns = Rotation(SPEC, workload, "cpu", seed=0)
    assert len(turns.inputs) == expected
    assert expected == 1 or turns.num_bytes > ROTATION * cache
    assert expected > 1 or workload.kv_bytes(SPEC) > ROTATION * cache
    tables = {tuple(one.block_table.flatten().tolist()) for one in turns.inputs}
    assert len(tables) == expected, "block tables are random, and not the same ones"
    assert not any(bool(one.k.isnan().any()) for one in turns.inputs)


def test_inputs_behind_a_window_rotate_by_what_is_read_of_them(monkeypatch) -> None:
    monkeypatch.setattr(module, "last_level_cache_bytes", lambda device: 1 << 15)
    workload, windowed = Workload.uniform(1, 512), replace(SPEC, window=64)  # 128 KiB, of which 16 are read
    assert len(Rotation(SPEC, workload, "cpu", 0).inputs) == 2
    assert len(Rotation(windowed, workload, "cpu", 0).inputs) == 9
    monkeypatch.setitem(module.KEPT_BYTES, "cpu", 8 << 17)
    assert len(Rotation(windowed, workload, "cpu", 0).inputs) == 4, "no more than half of what may be kept"


def test_queries_and_outputs_count_as_memory(monkeypatch) -> None:
    monkeypatch.setattr(module, "last_level_cache_bytes", lambda device: 1 << 12)
    spec = KernelSpec(Op.EXTEND, 32, 8, 1, 16, DType.F32, DType.F32, k_inner=KInner.DIM)
    turns = Rotation(spec, Workload.chunks(2, 256, 256), "cpu", seed=0)
    kv, queries = 2 * 512 * 32 * 4, 512 * 8 * 32 * 4
    assert len(turns.inputs) == 1 and 2 * queries + kv < turns.num_bytes < 2 * queries + 3 * kv


def test_what_prompts_evict_by_themselves_counts_for_the_rotation(monkeypatch) -> None:
    monkeypatch.setattr(module, "last_level_cache_bytes", lambda device: 1 << 15)
    spec = KernelSpec(Op.EXTEND, 32, 8, 1, 16, DType.F32, DType.F32, k_inner=KInner.DIM)
    chunk, prompt = Workload.chunks(1, 8, 256), Workload.chunks(1, 256, 256)  # 64 KiB of K and V
    assert len(Rotation(spec, chunk, "cpu", 0).inputs) == 3
    assert len(Rotation(spec, prompt, "cpu", 0).inputs) == 1  # 512 KiB of queries and outputs beside them


def test_long_calls_are_repeated_less() -> None:
    assert [_graph_calls(us) for us in (1.0, 10.0, 100.0, 400.0, 1000.0, 5000.0)] == [256, 100, 10, 8, 3, 1]


def test_this_machines_cache_is_known() -> None:
    assert last_level_cache_bytes("cpu") >= 32 << 20


def test_a_clock_takes_turns_and_repeats_short_calls() -> None:
    turns: list[int] = []
    clock = Clock(turns.append, Turns(3), "cpu")
    clock.warm()
    assert clock.calls == module.MAX_CALLS  # a call this short is repeated as often as is allowed
    assert clock.sample() < 100
    assert turns[:7] == [0, 1, 2, 0, 1, 2, 0] and len(turns) == 2 + clock.calls


def test_clocks_of_a_workload_never_follow_each_other_on_one_input() -> None:
    turns, seen = Turns(4), []
    clocks = [Clock(seen.append, turns, "cpu") for _ in range(3)]
    for clock in clocks:
        clock.warm()
        clock.calls = 1
    for _ in range(5):
        for clock in clocks:
            clock.sample()
    assert all(a != b for a, b in itertools.pairwise(seen))
    assert seen == [i % 4 for i in range(len(seen))]


class FakeLibrary:
    """Two good variants and one that the device refuses; counts calls by variant."""

    def __init__(self, path: Path) -> None:
        self.order: list[int] = []

    def workspace_bytes(self, num_seqs: int) -> int:
        return 64

    def decode(self, *arguments: object) -> None:
        variant = arguments[-1]
        assert isinstance(variant, int)
        if variant == 2:
            raise RuntimeError("too many resources requested")
        self.order.append(variant)
        workspace = arguments[-3]
        assert isinstance(workspace, torch.Tensor) and not workspace.any()


def test_rounds_are_interleaved_and_a_refusal_is_one_candidates(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "Library", FakeLibrary)
    monkeypatch.setattr(module, "MAX_CALLS", 1)
    monkeypatch.setattr(module, "last_level_cache_bytes", lambda device: 1 << 12)
    verified = [Verified(v, SCHEDULE, PASSED) for v in range(4)]
    path = tmp_path / "a.so"
    samples = measure(path, SPEC, Workload.uniform(1, 64), verified, 5, "cpu")
    assert {v: len(times) for v, times in samples.times.items()} == {0: 5, 1: 5, 3: 5}
    assert samples.failed == {2: "call failed: too many resources requested"}
    order = module._library(path).order
    rounds = [order[6 + 3 * i : 9 + 3 * i] for i in range(5)]  # after two warm calls of each
    assert all(sorted(r) == [0, 1, 3] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1, "every round has an order of its own"
    measure(path, SPEC, Workload.uniform(1, 64), verified[:1], 2, "cpu")
    assert len(order) == 21 + 2, "what is warm is not warmed up again"
