"""The cost model of extend and verify against what compilers made and an H100 measured, as recorded."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest

import pagedgen.cache
from pagedgen.autotune.calibration import rank_errors
from pagedgen.autotune.database import read
from pagedgen.compiler.cost import predict
from pagedgen.compiler.families import family_for
from pagedgen.compiler.space import default_schedule
from pagedgen.values.record import Status
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import Op
from pagedgen.values.target_table import target
from pagedgen.values.workload import Workload

H100 = target("h100")
FOLDER = Path(pagedgen.cache.__file__).parent / "h100-sxm"
FILES = [path for op in ("extend", "verify") for path in sorted(FOLDER.glob(f"{op}-*.json"))]


def measured(path: Path):
    entry = read(path)
    assert entry is not None
    return [r for r in entry.records if r.status is Status.MEASURED]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_sizes_are_nearly_those_of_the_compiled_kernels(path):
    off = []
    for record in {r.schedule: r for r in measured(path)}.values():
        family = family_for(record.spec, H100)
        symbols = family.symbols(record.spec, H100, record.schedule, record.workload)
        real = record.resources
        expected = pytest.approx(symbols["smem_bytes"], rel=0.1, abs=1100)
        if real.smem_bytes != expected:  # a short tile of many rows: the output goes through more of it
            assert real.smem_bytes == record.schedule.int("tile_m") * record.spec.v_dim * 4, record.schedule
        off.append(predict(record.spec, H100, record.schedule, record.workload)["regs"] - real.registers)
    assert abs(statistics.mean(off)) < 20 and max(map(abs, off)) < 100


def test_it_ranks_what_was_measured():
    """Over the batches that ten schedules or more met; among fewer, finalists, most are equal."""
    errors = [
        error
        for path in FILES
        for error in rank_errors(
            replace(r, predicted_us=predict(r.spec, H100, r.schedule, r.workload).time_us)
            for r in measured(path)
        )
        if error.schedules >= 10
    ]
    assert len(errors) >= 6
    assert statistics.mean(e.correlation for e in errors) > 0.7  # 0.45 before programs shared an SM in it
    assert statistics.mean(e.regret for e in errors) < 0.05  # 0.26


@pytest.fixture
def times(make_spec):
    """Predicted microseconds of a prompt of 8192 tokens, by what of the default's schedule is changed."""
    spec = make_spec(op="extend")
    choices = dict(default_schedule(spec, H100).choices)

    def time_us(workload: str = "1x8192", **changes: int) -> float:
        schedule = Schedule.of("triton-extend", **{**choices, **changes})
        return predict(spec, H100, schedule, Workload.parse(workload, Op.EXTEND)).time_us

    return time_us


def test_a_program_alone_on_an_sm_leaves_it_waiting(times):
    """A fourth stage leaves room for one program: 2023 us measured, and 1398 with three; fewer stages wait
    for memory, 1566; eight warps in step are less than two programs of four, 1650."""
    assert 1.3 < times(num_stages=4) / times() < 1.6
    assert 1.05 < times(num_stages=2) / times() < 1.25
    assert 1.05 < times(tile_m=128, num_warps=8) / times() < 1.3


def test_a_short_call_waits_for_its_longest_program(times):
    """1 x 512 on tiles of 256 rows: 64 programs, half the SMs, took 33 us where 64 rows took 17."""
    assert times("1x512", tile_m=256, num_warps=8) > 1.5 * times("1x512")


@pytest.mark.parametrize(("warps", "shared"), [(1, False), (2, True), (4, True)])
def test_warps_that_share_tokens_of_a_row_wait_for_each_other(make_spec, warps, shared):
    """Of tiles of 16 rows; maxima, sums and weights then go through shared memory, 0.3 us a tile."""
    spec = make_spec(op="verify")
    choices = dict(default_schedule(spec, H100).choices) | {"tile_m": 16, "num_warps": warps}
    schedule = Schedule.of("triton-verify", **choices)
    symbols = family_for(spec, H100).symbols(spec, H100, schedule, Workload.parse("16x4of4096", Op.VERIFY))
    assert (symbols["share_us"] > 0) is shared
