"""The tune driver: on fakes that misbehave in every way, and for real on this CPU and for an absent GPU."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # workers import the functions by name

import worker_functions as functions
from fake_tuner import FINE, LONG, SHORT, SPEC, fake_kernel, install, schedule

from pagedgen.autotune import calibration, gating
from pagedgen.autotune import tune as module
from pagedgen.autotune.binaries import BinaryCache
from pagedgen.autotune.database import Database, Fit
from pagedgen.autotune.events import Event, Started, Step, Tried, Warned
from pagedgen.autotune.search import Stop, search
from pagedgen.autotune.select import ANY
from pagedgen.autotune.tune import Effort, Plan, Workshop, pruned, regimes, spread, tune
from pagedgen.errors import CacheUnwritable, DeviceLost, InvalidValue, NoCandidate
from pagedgen.values.manifest import Rule
from pagedgen.values.record import Status
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import DType, KernelSpec, KInner, KVScale, Op
from pagedgen.values.target import Target
from pagedgen.values.target_table import target
from pagedgen.values.workload import Workload

PHASES = ("compile", "gate", "time", "retime")


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    monkeypatch.setenv("PAGEDGEN_CACHE_DIR", str(tmp_path / "cache"))
    return Database(tmp_path / "records", tmp_path / "shipped", fake_kernel)


@pytest.fixture
def real(database: Database) -> Database:
    """The same folders, for kernels that are rendered."""
    return Database(database.user, database.shipped)


@pytest.fixture
def cpu() -> Target:
    return target("cpu")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[Schedule]:
    """Everything below the driver is made up; the workers are real. Returns the (changeable) space."""
    space = list(FINE)
    install(space, monkeypatch.setattr)
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
    steps = {phase: [e for e in events if isinstance(e, Step) and e.phase == phase] for phase in PHASES}
    assert all(0 < e.done <= e.total for made in steps.values() for e in made)
    assert {e.total for e in steps["time"]} == {4} and steps["time"][3].done == 4  # two rungs, two batches
    assert [(e.done, e.total) for e in steps["retime"]] == [(1, 2), (2, 2)]
    with pytest.raises(InvalidValue, match="a workload of this run"):
        result.chosen(Workload.uniform(3, 3))


@pytest.mark.parametrize("shared", [False, True])
def test_batches_and_workers_are_put_on_one_clock(
    fakes, database, cpu, tmp_path, monkeypatch, shared: bool
) -> None:
    monkeypatch.setitem(module.PLANS, Effort.MAX, Plan(160, 8, 60.0, (2, 2), 3, 1))
    bad = schedule(16, 4, "refused")
    fakes[:] = [schedule(16, 4), bad, *(s for s in fakes if s != schedule(16, 4))]  # tried in this order
    options = {"database": database, "effort": "max"}
    options |= {"storage": str(tmp_path / "study.log")} if shared else {}
    workloads = [SHORT, LONG, Workload.uniform(1, 8192)]
    tune(SPEC, cpu, workloads, budget_s=1e-6, **options)  # one batch, with the best for SHORT
    monkeypatch.setattr(module, "measure", functions.drifting_measure)
    if shared:  # another worker goes on from the study alone
        options["database"] = Database(tmp_path / "other", tmp_path / "shipped", fake_kernel)
    result = tune(SPEC, cpu, workloads, **options)
    assert {o.schedule for o in result.outcomes} == {bad, *FINE}
    for outcome in result.outcomes:
        if outcome.schedule == bad:
            continue
        times = [functions.fake_time(outcome.schedule, w) for w in workloads]
        assert outcome.time_us == pytest.approx(module.geometric_mean(times))
    assert result.selection.pick_for(SHORT) == schedule(16, 4)  # a finalist, whoever timed it
    assert result.selection.pick_for(LONG) == schedule(64, 4)


def test_batches_of_extend_are_known_by_their_queries(fakes, database, cpu, monkeypatch) -> None:
    monkeypatch.setattr(module, "matmul_tflops", functions.fake_matmul_tflops)
    extend = replace(SPEC, op=Op.EXTEND)
    chunk, prompt = Workload.parse("1x64of4096", Op.EXTEND), Workload.parse("1x4096", Op.EXTEND)
    result = tune(extend, cpu, [chunk, prompt], effort="max", database=database)
    assert result.selection.pick_for(chunk) == schedule(16, 4)
    assert result.selection.pick_for(prompt) == schedule(64, 4)
    assert (result.roofline_gbs, result.roofline_tflops) == (20.0, 50.0)
    best = result.chosen(prompt)
    assert best.workload == prompt and best.schedule == schedule(64, 4)
    assert best.roofline_share == pytest.approx(prompt.flops(extend) / 50.0 / 1e6 / best.time_us)
    again = tune(extend, cpu, [prompt, chunk], effort="max", database=database)
    assert again.counts.known == len(FINE) and again.chosen(chunk).workload == chunk

    assert regimes([prompt, chunk]) == (chunk, prompt)
    with pytest.raises(InvalidValue, match="a batch of decode has no query lengths"):
        tune(SPEC, cpu, [chunk], database=database)
    with pytest.raises(InvalidValue, match="op = 'write_kv': allowed: decode, extend, verify"):
        tune(replace(extend, op=Op.WRITE_KV, num_q_heads=2), cpu, [chunk], database=database)


def test_records_are_found_again_and_the_search_goes_on_from_them(fakes, database, cpu, monkeypatch) -> None:
    first = tune(SPEC, cpu, [SHORT, LONG], effort="quick", database=database)
    assert first.counts.known == 0 and 8 <= first.counts.compiled <= 12  # and simpler variants of the winner
    found = database.find(SPEC, "cpu", first.records[0].stamp)
    assert found is not None and found.fit is Fit.EXACT
    assert found.entry.selection == first.selection and found.path == first.path
    again = tune(SPEC, cpu, [SHORT, LONG], effort="quick", database=database)
    assert again.counts.known >= 8  # nothing new to try: the finalists alone are timed again
    assert again.counts.compiled <= 6
    gone = again.records[0].schedule
    fakes.remove(gone)  # not legal any more: what is on record of it is neither known nor chosen
    less = tune(SPEC, cpu, [SHORT, LONG], effort="quick", database=database)
    assert less.counts.known >= 7 and gone not in {r.schedule for r in less.records}
    fakes.append(gone)
    events: list[Event] = []
    further = tune(SPEC, cpu, [SHORT, LONG], effort="standard", database=database, progress=events.append)
    new = [o.schedule for e in events if isinstance(e, Tried) for o in e.outcomes]
    assert len(new) == len(set(new)) == 20 - further.counts.known > 0
    assert not set(new) & {r.schedule for r in found.entry.records}
    monkeypatch.setattr(module, "compiler_version", lambda kind: "another")  # by which nothing is known
    tune(SPEC, cpu, [SHORT], effort="quick", budget_s=1e-6, database=database, progress=events.append)
    assert [e.known for e in events if isinstance(e, Started)] == [further.counts.known, 0]


def test_what_is_chosen_on_record_is_timed_beside_the_finalists(fakes, database, cpu) -> None:
    first = tune(SPEC, cpu, [SHORT, LONG], effort="max", database=database)
    slow = max(FINE, key=lambda s: functions.fake_time(s, SHORT))
    chosen = replace(first.selection, variants=(slow,), dispatch=(Rule(ANY, ANY, 0),))
    found = database.find(SPEC, "cpu", first.records[0].stamp)
    assert slow not in {record.schedule for record in first.records}
    database.save(replace(found.entry, selection=chosen))
    again = tune(SPEC, cpu, [SHORT, LONG], effort="quick", database=database)
    assert {r.workload for r in again.records if r.schedule == slow} == {SHORT, LONG}
    assert slow not in again.selection.variants


def test_the_default_is_timed_beside_the_finalists_however_slow(fakes, database, cpu) -> None:
    default = max(FINE, key=lambda s: functions.fake_time(s, SHORT) + functions.fake_time(s, LONG))
    fakes.insert(0, fakes.pop(fakes.index(default)))  # the first of the space stands for the default
    result = tune(SPEC, cpu, [SHORT, LONG], effort="max", database=database)
    assert {r.workload for r in result.records if r.schedule == default} == {SHORT, LONG}
    assert default not in result.selection.variants

    fakes[0] = schedule(256, 8, "wrong")  # a default that fails the gate is no finalist
    refused = tune(SPEC, cpu, [SHORT], effort="max", database=database)
    assert all(r.schedule != fakes[0] for r in refused.records)


def test_the_time_of_a_run_is_split_into_its_phases(fakes, database, cpu) -> None:
    spent = tune(SPEC, cpu, [SHORT], effort="quick", database=database).spent
    assert spent.gate_s > 0 and spent.time_s > 0 and spent.compile_s > 0
    assert tune(SPEC, target("h100"), [SHORT], effort="quick", database=database).spent.gate_s == 0


def test_the_search_is_told_what_a_neighbour_timed_and_tries_new_values(
    fakes, database, cpu, monkeypatch
) -> None:
    near = replace(SPEC, head_dim=128)
    tune(near, cpu, [SHORT, LONG], effort="max", database=database)
    given: dict[str, object] = {}

    def spy(*arguments: object, **named: object) -> object:
        given.update(named)
        return search(*arguments, **named)

    monkeypatch.setattr(module, "search", spy)
    fakes += [schedule(tile, 4, "new") for tile in (8, 16, 32)]
    tune(SPEC, cpu, [SHORT, LONG], effort="quick", database=database)
    (times,) = given["elsewhere"]
    assert set(times) == set(FINE)
    assert any(one["mood"] == "new" for one in given["start"])


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
    with pytest.raises(
        NoCandidate, match=r"left \((2 at compile, 1 at gate|1 at gate, 2 at compile); "
    ) as caught:
        tune(SPEC, cpu, [SHORT], effort="quick", database=database)
    assert "; the last: " in str(caught.value)
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


def test_a_disk_that_fills_up_under_candidates_ends_the_run_with_its_name(
    fakes, database, cpu, monkeypatch
) -> None:
    linked = module.link
    calls = []

    def link(*arguments: object) -> Path:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return linked(*arguments)

    monkeypatch.setattr(module, "link", link)
    with pytest.raises(CacheUnwritable, match=r"No space left on device; \d+ timings are kept in "):
        tune(SPEC, cpu, [SHORT, LONG], effort="standard", database=database)
    result = tune(SPEC, cpu, [SHORT, LONG], effort="standard", database=database)
    assert result.counts.known == 5 and {o.schedule for o in result.outcomes} == set(FINE)


def test_an_absent_device_gives_predictions_only(fakes, database, monkeypatch) -> None:
    fakes[:] = [*FINE, schedule(64, 4, "spills")]
    h100 = replace(target("h100"), name="h100-made-up")
    events: list[Event] = []
    result = tune(SPEC, h100, [SHORT, LONG], effort="max", database=database, progress=events.append)
    assert result.status is Status.PREDICTED and result.roofline_gbs == 0
    tried = [e for e in events if isinstance(e, Tried)]
    assert tried[-1].done == sum(len(e.outcomes) for e in tried) == 7
    assert tried[-1].best_us == min(o.time_us for e in tried for o in e.outcomes if o.time_us is not None)
    assert all(
        r.status is Status.PREDICTED and r.timing is None and r.verdict is None for r in result.records
    )
    assert all(r.stamp.device == r.stamp.driver == "none" for r in result.records)
    assert result.counts.timed == result.counts.passed == 0
    assert result.stop is Stop.COMPILED and result.counts.compiled == 7  # six usable ones and one that spills
    assert [r.reason for r in result.counts.rejected] == ["spills 64 B a thread"]
    assert result.selection.status is Status.PREDICTED
    assert result.selection.expected_regret == calibration.REGRET_OTHER
    fakes[:] = [schedule(64, 4, "spills"), *FINE]  # its first candidate spills, and there is no time
    cut = tune(SPEC, h100, [SHORT, LONG], effort="max", budget_s=1e-6, database=database)
    assert cut.stop is Stop.BUDGET and 0 < len({r.schedule for r in cut.records}) < 6
    fakes[:] = [*(schedule(64, 4, mood) for mood in ("spills", "refused")), *FINE]
    monkeypatch.setitem(module.PLANS, Effort.MAX, Plan(3, 8, 60.0, (2,), 3, 3))  # two of three do not compile
    few = tune(SPEC, h100, [SHORT, LONG], effort="max", database=database)
    assert few.stop is Stop.TRIALS and len(few.selection.variants) == 1
    fakes[:] = [schedule(64, 4, "spills")]
    with pytest.raises(NoCandidate, match=r"left \(1 at compile; the last: spills 64 B a thread\)"):
        tune(SPEC, h100, [SHORT, LONG], effort="max", database=database)


def test_a_device_that_is_lost_ends_the_run_and_nobody_is_charged(fakes, database, cpu, monkeypatch) -> None:
    fakes[:] = [*FINE[:8], schedule(64, 4, "crash"), *FINE[8:]]
    monkeypatch.setattr(module, "device_name", lambda kind: "cuda")
    monkeypatch.setattr(gating, "device_works", functions.gone)
    monkeypatch.setattr(module, "device_works", functions.gone)
    with pytest.raises(DeviceLost, match="CUDA error: device lost") as caught:
        tune(SPEC, cpu, [SHORT, LONG], effort="max", database=database)
    assert "kept" in str(caught.value)
    monkeypatch.setattr(module, "device_works", functions.fine)
    result = tune(SPEC, cpu, [SHORT, LONG], effort="max", database=database)
    assert [r.reason for r in result.counts.rejected] == ["crashed (SIGSEGV)"]
    assert result.selection.pick(2, 4096) == schedule(64, 4)


def test_runs_of_one_study_share_it_and_read_one_result(fakes, database, cpu, tmp_path, monkeypatch) -> None:
    storage = str(tmp_path / "study.log")
    events: list[Event] = []
    options = {"effort": "standard", "database": database, "storage": storage}
    monkeypatch.setitem(module.PLANS, Effort.STANDARD, Plan(40, 5, 60.0, (2, 2), 3, 6))
    first = tune(SPEC, cpu, [SHORT, LONG], **options, progress=events.append)
    batches = [len(e.outcomes) for e in events if isinstance(e, Tried)]
    assert batches == [2] * 10, "a worker that is killed costs at most 5% of the trials"
    # another host, with records of its own
    elsewhere = Database(tmp_path / "other", tmp_path / "shipped", fake_kernel)
    monkeypatch.setattr(module, "bandwidth", functions.other_bandwidth)
    second = tune(SPEC, cpu, [SHORT, LONG], effort="standard", database=elsewhere, storage=storage)
    assert first.roofline_gbs == second.roofline_gbs == 20.0  # of those who timed the finalists
    assert second.counts.compiled == second.counts.timed == 0
    assert second.selection == first.selection and second.records == first.records
    here, there = (d.find(SPEC, "cpu", first.records[0].stamp).entry for d in (database, elsewhere))
    rows = [{(r.schedule, r.workload, r.timing) for r in entry.records} for entry in (here, there)]
    assert rows[0] == rows[1] and here.selection == there.selection


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


def test_the_better_half_is_kept_and_a_tenth_of_the_rest() -> None:
    ranked = {schedule(8, i): float(i) for i in range(1, 41)}
    order = list(ranked)
    for trials, cut, audited in ((5, 20, 2), (30, 30, 1), (50, 40, 0)):
        kept = pruned(ranked, trials, "spec")
        assert list(kept[:cut]) == order[:cut]
        assert len(kept) == len(set(kept)) == cut + audited and set(kept) <= set(order)


def test_a_gpu_times_candidates_on_up_to_eight_batches(fakes, database, cpu) -> None:
    batches = tuple(Workload.uniform(1, 2**i) for i in range(10))
    for where, count in ((target("h100"), 8), (cpu, 3)):
        plan = module.PLANS[Effort.QUICK]
        run = module._Run(SPEC, where, batches, plan, 0, database, lambda e: None, True, None, None)
        assert run.searched == regimes(batches, count) and len(run.searched) == count


def test_a_cpu_tries_as_many_as_its_two_minutes_have_room_for(
    fakes, database, cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.ON_CPU, Effort.QUICK, (5, 3))
    monkeypatch.setitem(module.ON_CPU, Effort.STANDARD, (1000, 1000))
    assert module.plan_of(Effort.QUICK, target("h100")) == module.PLANS[Effort.QUICK]
    assert module.plan_of(Effort.STANDARD, cpu) == module.PLANS[Effort.STANDARD]  # never more than elsewhere
    assert module.plan_of(Effort.MAX, cpu) == module.PLANS[Effort.MAX]
    events: list[Event] = []
    tune(SPEC, cpu, (SHORT,), effort=Effort.QUICK, database=database, progress=events.append)
    assert [e.done for e in events if isinstance(e, Tried)] == [3, 5]


def test_spread_keeps_the_ends() -> None:
    workloads = [Workload.uniform(1, 2**i) for i in range(10)]
    assert spread(workloads, 3) == (workloads[0], workloads[4], workloads[9])
    assert spread(workloads[1::-1], 3) == tuple(workloads[:2])


def test_the_search_meets_the_smallest_the_largest_and_the_most_skewed_batch() -> None:
    plain = [Workload.uniform(1, 2**i) for i in range(10)]
    assert regimes(plain) == spread(plain, 3)
    skewed = Workload("skewed", (1, 1, 300, 1, 1, 1, 1, 1))
    assert regimes([*plain, skewed]) == (plain[0], skewed, plain[9])
    assert regimes([plain[0], skewed]) == (plain[0], skewed)
    long, many = Workload("one", (4096,)), Workload("many", (512,) * 8)  # as many tokens
    large = [Workload.uniform(8, 4096), Workload.uniform(8, 8192)]
    assert regimes([many, long, *large]) == (long, large[0], large[1])
    assert regimes([large[0], many, long]) == (long, many, large[0])
    assert regimes([*plain, skewed], 5) == (plain[0], skewed, plain[5], plain[8], plain[9])
    assert regimes([skewed, *plain], 11) == (*plain[:9], skewed, plain[9])


# ---- for real ----

SMALL = KernelSpec(Op.DECODE, 32, 2, 1, 16, DType.F32, DType.F32, k_inner=KInner.TOKEN)
TINY = {Effort.QUICK: Plan(3, 3, 120.0, (2,), 3, 2)}


@pytest.mark.slow  # tests/cli tunes this CPU for real in every run
def test_this_cpu_for_real(real, cpu, monkeypatch) -> None:
    pytest.importorskip("tvm")
    monkeypatch.setattr(module, "PLANS", TINY)
    with Workshop(cpu) as workshop:
        workloads = [Workload.uniform(2, 300), Workload("ragged", (1000, 3, 0, 17))]
        result = tune(SMALL, cpu, workloads, effort="quick", database=real, workshop=workshop)
        assert result.status is Status.MEASURED and result.counts.compiled >= 3
        assert len(result.records) == 2 * len({r.schedule for r in result.records})
        for record in result.records:
            assert record.verdict is not None and record.verdict.passed and record.verdict.cases >= 4
            assert record.roofline_gbs > 0 and record.stamp.device != "none"
        again = tune(SMALL, cpu, workloads, effort="quick", database=real, workshop=workshop)
        assert again.counts.known >= 3 and again.counts.compiled == 0 and again.counts.cached >= 1


def test_a_gpu_that_is_not_here_for_real(real, monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(module, "PLANS", {Effort.QUICK: Plan(12, 2, 120.0, (2,), 3, 2)})
    a100 = target("a100")
    spec = KernelSpec(Op.DECODE, 128, 32, 8, 16, DType.F16, DType.FP8_E4M3, KVScale.TENSOR)
    result = tune(spec, a100, [Workload.uniform(32, 8192)], effort="quick", database=real)
    assert result.status is Status.PREDICTED
    assert result.path is not None and '"measured"' not in result.path.read_text()
    for record in result.records:
        assert record.resources.registers > 0 and record.resources.spill_bytes == 0
        assert 0 < record.resources.smem_bytes <= a100.smem_per_block
    cache = BinaryCache()
    assert len(list(cache.folder.glob("*/*.zip"))) == result.counts.compiled >= 2


def test_the_defaults_neighbours_are_tried_at_once(fakes, database, cpu) -> None:
    events: list[Event] = []
    tune(SPEC, cpu, [LONG], effort="quick", database=database, progress=events.append)
    first = next(e for e in events if isinstance(e, Tried))
    assert {*fakes[:3]} < {o.schedule for o in first.outcomes}


def test_from_scratch_each_value_is_tried_beside_the_defaults(fakes, database, cpu, monkeypatch) -> None:
    monkeypatch.setitem(module.PLANS, Effort.QUICK, Plan(11, 11, 60.0, (2,), 3, 4))
    fakes += [schedule(tile, 4, "new") for tile in (128, 8)]
    result = tune(SPEC, cpu, [LONG], effort="quick", database=database)
    values = {schedule(8, 4, "new"), *(schedule(tile, 1) for tile in (16, 32, 128))}  # nothing else has them
    assert {o.schedule for o in result.outcomes} >= {*fakes[:3], schedule(64, 4), *values}
