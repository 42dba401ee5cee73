"""The manager suite's simulations and its table, on inputs small enough to know the answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagedgen.autotune.suites import fragmentation, manager
from pagedgen.autotune.suites.fragmentation import Lengths
from pagedgen.autotune.suites.manager_peers import Pagedgen
from pagedgen.errors import MalformedFile


def test_traces_are_read_in_each_format(tmp_path: Path) -> None:
    for name, text in (
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nx,10,3\ny,20,0\n"),
        ("b.csv", "num_prefill_tokens,num_decode_tokens,pd_ratio\n10,3,1\n20.0,1,1\n"),
        ("c.jsonl", '{"input_length": 10, "output_length": 3}\n{"input_length": 20, "output_length": 1}\n'),
    ):
        path = tmp_path / name
        path.write_text(text)
        trace = fragmentation.read_trace(path, 10)
        assert (trace.prompts, trace.outputs) == ((10, 20), (3, 1))
        assert len(fragmentation.read_trace(path, 1).prompts) == 1
    path.write_text('{"length": 3}\n')
    with pytest.raises(MalformedFile, match="line 1"):
        fragmentation.read_trace(path, 1)


def test_policies_waste_what_they_reserve() -> None:
    trace = Lengths("fixed", (100,) * 4000, (28,) * 4000)
    shares = {s.policy: s for s in fragmentation.figure_2(trace, 1 << 13, max_steps=600)}
    # 128 tokens are a power of two: 64 requests fit, and each holds 101 to 128 of its 128 tokens.
    assert shares["Orca (Oracle)"].running == 64
    assert shares["Orca (Oracle)"].of_allocated == pytest.approx(114.5 / 128, abs=0.02)
    assert shares["Orca (Max)"].of_allocated == pytest.approx(shares["Orca (Oracle)"].of_allocated)
    # Paged: at most one block of 16 is part full in each of them.
    assert shares["paged"].of_allocated > 0.92 and shares["paged"].running > 64
    long_one = Lengths("tail", (100,) * 4000, (28,) * 3999 + (4000,))
    by_policy = {s.policy: s for s in fragmentation.figure_2(long_one, 1 << 13, max_steps=600)}
    assert by_policy["Orca (Max)"].running == 1  # the longest request's room for each


def test_buddies_meet_again() -> None:
    free: list[list[int]] = [[], [], [], [0]]
    taken = [fragmentation._buddy_take(free, level) for level in (0, 1, 0, 1)]
    assert sorted(a for a in taken if a is not None) == sorted({a for a in taken if a is not None})
    assert fragmentation._buddy_take(free, 2) is None
    for level, address in zip((0, 1, 0, 1), taken, strict=True):
        assert address is not None
        fragmentation._buddy_give(free, level, address)
    assert free == [[], [], [], [0]]


@pytest.mark.parametrize("beam", [False, True])
def test_sharing_is_close_to_theory(beam: bool) -> None:
    trace = Lengths("fixed", (800,), (60,))
    saving, theory = fragmentation.sharing(trace, 4, 1, beam, seed=0)
    assert abs(saving - theory) < 0.02 and saving > 0.5


def test_table_and_limits() -> None:
    samples = []
    for operation in manager.LIMITS:
        for pool in (100, manager.MILLION):
            samples.append(manager.Samples(operation, Pagedgen.name, pool, (10.0, 12.0), (20.0,)))
    environment = manager.Environment("command", "2026-01-01", "a CPU", 2, "3.11", "2.0")
    memory = manager.Memory(manager.MILLION, 40_000_000, 50_000_000)
    report = manager.Report(environment, True, tuple(samples), memory, ())
    assert manager.broken_limits(report) == []
    assert "| 8k prompt: fork | 30 | 11 (10) | 37% | 20 | 11 (10) | - |" in manager.table(report)
    slow = manager.Samples("8k prompt: fork", Pagedgen.name, 100, (31.0,), ())
    heavy = manager.Memory(manager.MILLION, 65_000_000, 1)
    assert len(manager.broken_limits(manager.Report(environment, True, (slow,), heavy, ()))) == 2


def test_a_short_run_of_the_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "WINDOWS", 1)
    steps = manager.measure_steps([Pagedgen(600, 8, 2048)], 8, 600)
    assert steps[0].operation == "step, 8 running" and len(steps[0].samples_us) == 16
    prompts = manager.measure_prompts([Pagedgen(1200, 8, 16_384)], 1200)
    assert {s.operation for s in prompts} == {o for o in manager.LIMITS if o.startswith("8k")}
