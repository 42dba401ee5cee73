"""The tune driver: on fakes that misbehave in every way, and for real on this CPU and for an absent GPU."""

from __future__ import annotations

import itertools
import pickle
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # workers import the functions by name

import worker_functions as functions

from pagedgen.autotune import gating
from pagedgen.autotune import tune as module
from pagedgen.autotune.binaries import BinaryCache, Compiled
from pagedgen.autotune.database import Database, Fit
from pagedgen.autotune.events import Event, Started, Tried, Warned
from pagedgen.autotune.search import Stop
from pagedgen.autotune.tune import Effort, Plan, Workshop, spread, tune
from pagedgen.compiler.binary import Binary, Source
from pagedgen.errors import CacheUnwritable, InvalidValue, NoCandidate
from pagedgen.values.record import Resources, Status
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import DType, KernelSpec, KInner, KVScale, Op
from pagedgen.values.target import Target
from pagedgen.values.target_table import target
from pagedgen.values.workload import Workload

SPEC = KernelSpec(Op.DECODE, 64, 8, 2, 16, DType.F32, DType.F32, k_inner=KInner.TOKEN)
SHORT, LONG = Workload.uniform(4, 256), Workload.uniform(2, 4096)


def schedule(tile: int, warps: int, mood: str = "fine") -> Schedule:
    return Schedule.of("fake", tile=tile, warps=warps, mood=mood)


FINE = tuple(schedule(t, w) for t in (8, 16, 32, 64, 128) for w in (1, 2, 4, 8))


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    monkeypatch.setenv("PAGEDGEN_CACHE_DIR", str(tmp_path / "cache"))
    return Database(tmp_path / "records", tmp_path / "shipped")


@pytest.fixture
def cpu() -> Target:
    return target("cpu")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[Schedule]:
    """Everything below the driver is made up; the workers are real. Returns the (changeable) space."""
    space = list(FINE)

    class Family:
        name = "fake"

    def fake_compile(sources: Sequence[Source], pool: object, cache: object) -> Iterator[Compiled]:
        for source in sources:
            if source.schedule["mood"] == "refused":
                yield Compiled(source, None, "out of registers")
            else:
                spill = 64 if source.schedule["mood"] == "spills" else 0
                yield Compiled.of(Binary(source, "f", (), Resources(32, spill), "fake 1", 4), fresh=True)

    def fake_link(binaries: Sequence[Binary], dispatch: object, out: Path) -> Path:
        out.write_bytes(pickle.dumps([b.source.schedule for b in binaries]))
        return out

    def fake_predict(spec: KernelSpec, where: Target, one: Schedule, workload: Workload) -> object:
        class Prediction:
            time_us = 2 * functions.fake_time(one, workload)

        return Prediction

    for name, fake in {
        "feasible": lambda spec, where: tuple(space),
        "default_schedule": lambda spec, where: space[0],
        "family_for": lambda spec, where: Family(),
        "template_hash": lambda family: "fakefakefake",
        "render": lambda spec, where, one: Source(spec, where, one, one.name),
        "compile_all": fake_compile,
        "link": fake_link,
        "predict": fake_predict,
        "measure": functions.fake_measure,
        "bandwidth": functions.fake_bandwidth,
        "pin": functions.no_pin,
        "PLANS": {
            Effort.QUICK: Plan(8, 4, 60.0, (2, 2), 3, 4),
            Effort.STANDARD: Plan(20, 5, 60.0, (2, 2), 3, 6),
            Effort.MAX: Plan(400, 8, 60.0, (2, 2), 3, 6),
        },
    }.items():
        monkeypatch.setattr(module, name, fake)
    monkeypatch.setattr(gating, "gate_variant", functions.fake_gate)
    monkeypatch.setattr(gating, "GATE_S", 3.0)
    return space


def test_it_finds_each_workloads_best_and_records_it(fakes, database, cpu) -> None:
    events: list[Event] = []
    result = tune(SPEC, cpu, [SHORT, LONG], effort="max", database=database, progress=events.append)
    assert result.status is Status.MEASURED and result.stop is Stop.EXHAUSTED
    assert result.selection.pick(4, 256) == schedule(16, 4)
    assert result.selection.pick(2, 4096) == schedule(64, 4)
    assert result.counts.space == result.counts.passed == result.counts.compiled == len(FINE)
    assert result.counts.rejected == ()
    best = result.chosen(LONG)
    assert best.time_us == functions.fake_time(schedule(64, 4), LONG)
    assert best.predicted_us == pytest.approx(2 * best.time_us)
    assert (best.roofline_gbs, best.verdict.passed, best.timing.rounds) == (20.0, True, 3)
    started, tried = events[0], [e for e in events if isinstance(e, Tried)]
    assert isinstance(started, Started) and started.space == started.trials == len(FINE)
    assert tried[-1].done == len(FINE) and sum(len(e.outcomes) for e in tried) == len(FINE)
    assert all(a.best_us >= b.best_us for a, b in itertools.pairwise(tried))


def test_records_are_found_again_and_the_search_goes_on_from_them(fakes, database, cpu) -> None:
    first = tune(SPEC, cpu, [SHORT, LONG], effort="quick", database=database)
    assert first.counts.known == 0 and first.counts.compiled == 8
    found = database.find(SPEC, "cpu", first.records[0].stamp)
    assert found is not None and found.fit is Fit.EXACT
    assert found.entry.selection == first.selection and found.path == first.path
    again = tune(SPEC, cpu, [SHORT, LONG], effort="quick", database=database)
    assert again.counts.known == 8  # nothing new to try: the finalists alone are timed again
    assert again.counts.compiled <= 6
    events: list[Event] = []
    further = tune(SPEC, cpu, [SHORT, LONG], effort="standard", database=database, progress=events.append)
    new = [o.schedule for e in events if isinstance(e, Tried) for o in e.outcomes]
    assert further.counts.known == 8 and len(new) == len(set(new)) == 12
    assert not set(new) & {r.schedule for r in found.entry.records}


def test_whatever_goes_wrong_costs_one_candidate(fakes, database, cpu) -> None:
    moods = ("refused", "spills", "crash", "hang", "wrong", "late crash", "late refusal")
    bad = {schedule(64, 4, mood): mood for mood in moods}
    fakes[:] = [*FINE, *bad]
    result = tune(SPEC, cpu, [SHORT, LONG], effort="max", database=database)
    reasons = {bad[r.schedule]: (r.stage, r.reason) for r in result.counts.rejected}
    assert reasons == {
        "refused": ("compile", "out of registers"),
        "spills": ("compile", "spills 64 B a thread"),
        "crash": ("gate", "crashed (SIGSEGV)"),
        "hang": ("gate", "timed out after 3 s"),
        "wrong": ("gate", "error 1 where 0.001 is allowed"),
        "late crash": ("time", "crashed (SIGSEGV)"),
        "late refusal": ("time", "call failed: too many resources"),
    }
    assert result.counts.timed >= len(FINE)
    assert {r.schedule for r in result.records} <= set(FINE)
    assert result.selection.pick(2, 4096) == schedule(64, 4)


def test_nothing_left_is_said_with_numbers(fakes, database, cpu) -> None:
    fakes[:] = [schedule(8, 1, "wrong"), schedule(8, 1, "refused"), schedule(8, 1, "spills")]
    with pytest.raises(NoCandidate, match="2 at compile") as caught:
        tune(SPEC, cpu, [SHORT], effort="quick", database=database)
    assert "1 at gate" in str(caught.value)
    assert not database.user.exists()


def test_the_budget_ends_the_search_with_what_there_is(fakes, database, cpu) -> None:
    result = tune(SPEC, cpu, [LONG], effort="max", budget_s=1e-6, database=database)
    assert result.stop is Stop.BUDGET
    assert result.counts.compiled == result.counts.timed == 8  # one batch, so that there is something


def test_an_unwritable_cache_is_warned_of_once(fakes, database, cpu, monkeypatch) -> None:
    def refuse(entry: object) -> Path:
        raise CacheUnwritable("/cache: No space left on device")

    monkeypatch.setattr(database, "save", refuse)
    events: list[Event] = []
    result = tune(SPEC, cpu, [LONG], effort="quick", database=database, progress=events.append)
    assert result.path is None and result.records
    warnings = [e.text for e in events if isinstance(e, Warned)]
    assert warnings == ["records are not kept: /cache: No space left on device"]


def test_an_absent_device_gives_predictions_only(fakes, database) -> None:
    fakes[:] = [*FINE, schedule(64, 4, "spills")]
    h100 = replace(target("h100"), name="h100-made-up")
    result = tune(SPEC, h100, [SHORT, LONG], effort="max", database=database)
    assert result.status is Status.PREDICTED and result.roofline_gbs == 0
    assert all(
        r.status is Status.PREDICTED and r.timing is None and r.verdict is None for r in result.records
    )
    assert all(r.stamp.device == r.stamp.driver == "none" for r in result.records)
    assert result.counts.timed == result.counts.passed == 0
    assert result.stop is Stop.COMPILED and result.counts.compiled == 7  # six usable ones and one that spills
    assert [r.reason for r in result.counts.rejected] == ["spills 64 B a thread"]
    assert result.selection.status is Status.PREDICTED


def test_bad_input_is_named(fakes, database, cpu) -> None:
    for arguments, field in (
        ({"workloads": []}, "workloads"),
        ({"workloads": [Workload("empty", (0, 0))]}, "workloads"),
        ({"budget_s": 0}, "budget"),
        ({"budget_s": float("nan")}, "budget"),
        ({"effort": "hard"}, "effort"),
    ):
        with pytest.raises(InvalidValue, match=field):
            tune(SPEC, cpu, **{"workloads": [SHORT], "database": database, **arguments})


def test_spread_keeps_the_ends() -> None:
    workloads = [Workload.uniform(1, 2**i) for i in range(10)]
    assert spread(workloads, 3) == (workloads[0], workloads[4], workloads[9])
    assert spread(workloads[:2], 3) == tuple(workloads[:2])


# ---- for real ----

SMALL = KernelSpec(Op.DECODE, 32, 2, 1, 16, DType.F32, DType.F32, k_inner=KInner.TOKEN)
TINY = {Effort.QUICK: Plan(3, 3, 120.0, (2,), 3, 2)}


def test_this_cpu_for_real(database, cpu, monkeypatch) -> None:
    pytest.importorskip("tvm")
    monkeypatch.setattr(module, "PLANS", TINY)
    with Workshop(cpu) as workshop:
        workloads = [Workload.uniform(2, 300), Workload("ragged", (1000, 3, 0, 17))]
        result = tune(SMALL, cpu, workloads, effort="quick", database=database, workshop=workshop)
        assert result.status is Status.MEASURED and result.counts.compiled == 3
        assert len(result.records) == 2 * len({r.schedule for r in result.records})
        for record in result.records:
            assert record.verdict is not None and record.verdict.passed and record.verdict.cases >= 4
            assert record.roofline_gbs > 0 and record.stamp.device != "none"
        again = tune(SMALL, cpu, workloads, effort="quick", database=database, workshop=workshop)
        assert again.counts.known == 3 and again.counts.compiled == 0 and again.counts.cached >= 1


def test_a_gpu_that_is_not_here_for_real(database, monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(module, "PLANS", {Effort.QUICK: Plan(2, 2, 120.0, (2,), 3, 2)})
    a100 = target("a100")
    spec = KernelSpec(Op.DECODE, 128, 32, 8, 16, DType.F16, DType.FP8_E4M3, KVScale.TENSOR)
    result = tune(spec, a100, [Workload.uniform(32, 8192)], effort="quick", database=database)
    assert result.status is Status.PREDICTED
    assert result.path is not None and '"measured"' not in result.path.read_text()
    for record in result.records:
        assert record.resources.registers > 0 and record.resources.spill_bytes == 0
        assert 0 < record.resources.smem_bytes <= a100.smem_per_block
    cache = BinaryCache()
    assert len(list(cache.folder.glob("*/*.zip"))) == result.counts.compiled == 2
