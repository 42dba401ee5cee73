"""Kernel times from records, a suite's file and the cost model; and the roofline around them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pagedgen.autotune.database import Database, Entry
from pagedgen.autotune.device import stamp_here
from pagedgen.autotune.explore.kernel_time import KernelTime, _schedule, kernel_time
from pagedgen.autotune.explore.policies import Policy
from pagedgen.autotune.explore.request import OWN, Request
from pagedgen.autotune.explore.scheduler import Batch, Chunk
from pagedgen.autotune.explore.step_time import MATMUL_SHARE, PREFILL_SHARE, READ_SHARE, StepTime
from pagedgen.autotune.explore.timings import KernelTiming, KernelTimings
from pagedgen.autotune.select import select
from pagedgen.autotune.suites.report import Environment
from pagedgen.compiler.cost import predict
from pagedgen.compiler.kernel_hash import kernel_hash
from pagedgen.compiler.space import default_schedule
from pagedgen.errors import InvalidValue, MalformedFile
from pagedgen.values.record import Record, Resources, Status, Timing, Verdict
from pagedgen.values.spec import DType, KernelSpec, KVScale, Op
from pagedgen.values.target_table import target
from pagedgen.values.trace import Request as Lengths
from pagedgen.values.workload import Workload

SPEC = KernelSpec(Op.DECODE, 128, 32, 8, 16, DType.F16, DType.F16)
H100 = target("h100")


@pytest.fixture
def empty(tmp_path):
    return Database(tmp_path / "user", tmp_path / "shipped")


def test_without_measurements_it_is_the_cost_model_and_says_so(empty):
    found = kernel_time(SPEC, H100, 64, 8192, records=empty)
    assert (found.status, found.origin) == (Status.PREDICTED, "predicted by the cost model")
    schedule = default_schedule(SPEC, H100)
    for n, length in ((1, 16), (1, 8192), (16, 1024), (64, 4096)):  # points of the grid
        expected = predict(SPEC, H100, schedule, Workload.uniform(n, length)).time_us
        assert found.at(n, n * length) == pytest.approx(expected, rel=1e-9)
    for n, length in ((3, 700), (24, 3000), (50, 5000)):  # in between
        expected = predict(SPEC, H100, schedule, Workload.uniform(n, length)).time_us
        assert found.at(n, n * length) == pytest.approx(expected, rel=0.15)
    assert found.at(128, 128 * 8192) > 1.8 * found.at(64, 64 * 8192)  # goes on beyond the grid
    assert found.at(1, 1) > 0


@pytest.mark.parametrize("block_size", [1, 7, 16, 32, 256])
def test_the_schedule_that_is_predicted_is_the_default(block_size):
    spec = replace(SPEC, block_size=block_size)
    assert _schedule(spec, H100) == default_schedule(spec, H100)


def _save(database, workloads, factor, status=Status.MEASURED):
    schedule = default_schedule(SPEC, H100)
    times, records = {}, []
    for workload in workloads:
        us = factor * predict(SPEC, H100, schedule, workload).time_us
        times[workload] = us
        measured = {
            "timing": Timing(us, us, us, 5),
            "roofline_gbs": 3000.0,
            "verdict": Verdict(True, 1, 0.0, 1.0, 0),
        }
        more = measured if status is Status.MEASURED else {}
        stamp = stamp_here(SPEC, H100)
        kernel = kernel_hash(SPEC, H100, schedule)
        records.append(
            Record(status, SPEC, H100.name, workload, schedule, kernel, stamp, Resources(), us, **more)
        )
    database.save(Entry(SPEC, H100.name, tuple(records), select({schedule: times}, status)))


def test_measured_records_come_before_the_model(empty):
    _save(empty, [Workload.uniform(4, 1024), Workload("ragged", (1000, 3000))], 1.5)
    other = _row(2.0, spec=replace(SPEC, block_size=64))
    found = kernel_time(SPEC, H100, 64, 8192, _timings([other]), empty)
    assert (found.status, found.origin) == (Status.MEASURED, "measured: 2 recorded batches")
    model = kernel_time(SPEC, H100, 64, 8192, records=Database(empty.shipped, empty.shipped))
    assert found.at(4, 4096) == pytest.approx(1.5 * model.at(4, 4096), rel=1e-9)
    assert 1.4 < found.at(32, 32 * 4096) / model.at(32, 32 * 4096) < 1.6  # the ratio carries over


def test_predicted_records_are_not_measured_ones(empty):
    _save(empty, [Workload.uniform(4, 1024)], 1.5, Status.PREDICTED)
    assert kernel_time(SPEC, H100, 64, 8192, records=empty).status is Status.PREDICTED


def _row(factor, n=4, length=1024, coverage=0.0, spec=SPEC, failure=""):
    us = factor * predict(SPEC, H100, default_schedule(SPEC, H100), Workload.uniform(n, length)).time_us
    samples = () if failure else (0.9 * us, us, 1.1 * us)
    return KernelTiming(spec, n, n * length, coverage, samples, "default", failure)


def _timings(rows):
    return KernelTimings(
        "block-sizes-gpu", replace(Environment.here(target("cpu")), target="h100-sxm"), tuple(rows)
    )


def test_the_file_of_the_suite_comes_first(empty, tmp_path):
    _save(empty, [Workload.uniform(4, 1024)], 1.5)
    rows = [
        _row(2.0),
        _row(1.8, coverage=0.5),
        _row(1.6, coverage=1.0),
        _row(3.0, 32, 4096),
        _row(2.4, 32, 4096, 1.0),
        _row(9.0, spec=replace(SPEC, block_size=64)),
        _row(1.0, 8, 1024, failure="no"),
    ]
    _timings(rows).save(tmp_path / "timings.json")
    timings = KernelTimings.load(tmp_path / "timings.json")
    assert timings == _timings(rows)
    bf16 = replace(SPEC, q_dtype=DType.BF16, kv_dtype=DType.BF16)
    for spec in (SPEC, bf16):
        found = kernel_time(spec, H100, 64, 8192, timings, empty)
        assert found.status is Status.MEASURED and "5 rows of block-sizes-gpu" in found.origin
    model = kernel_time(SPEC, H100, 64, 8192, records=Database(empty.shipped, empty.shipped))
    found = kernel_time(SPEC, H100, 64, 8192, timings, empty)
    assert found.at(4, 4096) == pytest.approx(2 * model.at(4, 4096), rel=1e-9)
    assert found.at(32, 32 * 4096) == pytest.approx(3 * model.at(32, 32 * 4096), rel=1e-9)
    assert 2 < found.at(11, 11 * 2048) / model.at(11, 11 * 2048) < 3
    assert found.factor(0.5) == pytest.approx(0.9)
    assert found.factor(1.0) == pytest.approx(0.8)  # of 0.8 and 0.8
    assert found.factor(0.25) == pytest.approx(0.95) and found.factor(0.75) == pytest.approx(0.85)
    e4m3 = replace(SPEC, kv_dtype=DType.FP8_E4M3, kv_scale=KVScale.TENSOR)
    assert kernel_time(e4m3, H100, 64, 8192, timings, empty).status is Status.PREDICTED
    with pytest.raises(InvalidValue, match="kernel_times = 'h100-sxm': a file measured on a100-80g"):
        kernel_time(SPEC, target("a100"), 64, 8192, timings, empty)
    lines = "\n".join(timings.lines())
    assert "50%" in lines and "failed" in lines and f"{SPEC.name}: no" in lines


def test_a_factor_before_the_first_and_after_the_last_coverage():
    kernel = KernelTime(SPEC, Status.MEASURED, "", ((1.0, 1.0), (1.0, 1.0)), ((0.5, 1.0), (0.9, 0.8)))
    assert [kernel.factor(c) for c in (0.0, 0.5, 0.7, 0.9, 1.0)] == pytest.approx([1, 1, 0.9, 0.8, 0.8])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_seqs": 0}, "num_seqs = 0"),
        ({"num_tokens": 1}, "num_seqs = 4"),
        ({"coverage": 1.5}, "coverage = 1.5"),
        ({"samples_us": ()}, "samples_us"),
        ({"samples_us": (0.0,)}, "samples_us"),
        ({"failure": "x"}, "samples_us"),
    ],
)
def test_timings_that_are_not(fields, message):
    with pytest.raises(InvalidValue, match=message):
        replace(_row(1.0), **fields)


def test_files_that_are_no_timings(tmp_path):
    with pytest.raises(MalformedFile, match="No such file"):
        KernelTimings.load(tmp_path / "none.json")
    (tmp_path / "other.json").write_text('{"suite": "load"}', encoding="utf-8")
    with pytest.raises(MalformedFile, match=r"KernelTimings\.environment"):
        KernelTimings.load(tmp_path / "other.json")


def _batch(decodes=0, tokens=0, chunks=(), **more):
    fields = {"copies": 0, "swapped_out": 0, "swapped_in": 0, "preempted": (), "blocked": False, **more}
    return Batch(decodes, tokens, chunks, **fields)


def test_a_step_is_the_sum_of_its_parts(step_time):
    model: StepTime = step_time(Policy(16))
    read, peak = H100.bandwidth_gbs * 1e9 * READ_SHARE, H100.f16_tflops * 1e12
    weights = model.weights
    seconds, kernel = model(_batch(8, 8 * 1024))
    assert kernel == pytest.approx(4 * 1e-6 * model.kernel.at(8, 8192))  # four layers
    assert seconds - kernel == pytest.approx(weights.bytes_read(8) / read)  # too few to be bound by FLOPs
    request = Request(0, Lengths(10_000, 1))
    chunk = Chunk(request, 1000, 4000, False)
    seconds, kernel = model(_batch(chunks=(chunk,)))
    pairs = sum(range(1001, 5001))
    assert kernel == 0 and seconds == pytest.approx(
        weights.flops(4000, 0) / (peak * MATMUL_SHARE) + 4 * 4 * 8 * 64 * pairs / (peak * PREFILL_SHARE)
    )
    assert model(_batch(8, 8192, (chunk,)))[0] < model(_batch(8, 8192))[0] + seconds  # weights are read once
    assert model(_batch(copies=3))[0] == pytest.approx(2 * 3 * 16_000 / read)
    assert model(_batch(swapped_out=2, swapped_in=1))[0] == pytest.approx(3 * 16_000 / 25e9)


def test_a_measured_rate_of_prompts_takes_the_place_of_the_assumed_one(step_time):
    assumed = step_time(Policy(16))
    model = replace(assumed, prefill_share=2 * PREFILL_SHARE)
    batch = _batch(chunks=(Chunk(Request(0, Lengths(10_000, 1)), 1000, 4000, False),))
    pairs = sum(range(1001, 5001))
    saved = 4 * 4 * 8 * 64 * pairs / (H100.f16_tflops * 1e12 * 2 * PREFILL_SHARE)
    assert assumed(batch)[0] - model(batch)[0] == pytest.approx(saved)
    assert model.origin == f"{assumed.origin}, prompts at 70% of the matrix rate"


def test_coverage_reaches_the_kernel(step_time):
    model = step_time(Policy(16), ((0.0, 1.0), (1.0, 0.5)))
    assert model(_batch(8, 8192), 1.0)[1] == pytest.approx(model(_batch(8, 8192))[1] / 2)


def test_the_rate_that_preemption_reckons_with(step_time):
    rate = step_time(Policy(16)).prefill_tokens_per_s
    assert rate == pytest.approx(H100.f16_tflops * 1e12 * MATMUL_SHARE / (2 * 50e6))


def test_tokens_stand_for_content():
    alike = [Request(i, Lengths(700, 5, 0.0, (7, i + 8))).tokens() for i in range(2)]
    same = alike[0] == alike[1]
    assert same[:512].all() and not same[512]
    own = [Request(i, Lengths(700, 5)) for i in range(2)]
    assert own[0].tokens()[0] != own[1].tokens()[0]
    own[0].produced = 3
    assert own[0].tokens().size == 703 and set(own[0].tokens()[700:]) == {OWN}
    assert own[0].max_stored == 704
    assert (Request(0, Lengths(0, 0)).prompt, Request(0, Lengths(0, 0)).output) == (1, 1)
