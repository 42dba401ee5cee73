"""The block-size suite without a GPU: aged tables, what is timed, and the path from kernels to the file."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest

from pagedgen.autotune import worker
from pagedgen.autotune.explore.kernel_time import kernel_time
from pagedgen.autotune.explore.timings import KernelTimings
from pagedgen.autotune.suites import block_sizes_gpu, run_suite
from pagedgen.autotune.suites.block_sizes_gpu import (
    BATCHES,
    BLOCK_SIZES,
    COVERAGES,
    PROMPTS,
    Aged,
    Group,
    aged_table,
    candidates,
    coverages,
    groups,
    time_group,
    timing,
)
from pagedgen.autotune.suites.contest import Contender
from pagedgen.compiler.space import is_legal
from pagedgen.compiler.verify import reference
from pagedgen.errors import CompileError, DeviceMissing, InvalidValue
from pagedgen.values.record import Status
from pagedgen.values.spec import DType, KernelSpec, KInner, Op
from pagedgen.values.target_table import target
from pagedgen.values.workload import Workload


def coverage_of(table: np.ndarray, block_size: int) -> float:
    """Share of blocks in runs of 64 tokens or more, block by block."""
    covered = 0
    for row in table:
        length = 1
        for i in range(1, row.size + 1):
            if i < row.size and row[i] == row[i - 1] + 1:
                length += 1
                continue
            covered += length if length * block_size >= 64 else 0
            length = 1
    return covered / table.size


@pytest.mark.parametrize("coverage", COVERAGES)
@pytest.mark.parametrize("block_size", [1, 8, 16, 32])
def test_aged_tables_have_the_coverage_that_they_say(block_size, coverage):
    num_seqs, blocks = 16, 1024 // block_size
    num_blocks = num_seqs * blocks + 3  # as make_inputs has them: no room to choose
    table = aged_table(num_seqs, blocks, num_blocks, block_size, coverage, seed=1)
    assert table.shape == (num_seqs, blocks) and table.dtype == np.int32
    assert np.unique(table).size == table.size and table.min() >= 0 and table.max() < num_blocks
    assert coverage_of(table, block_size) == pytest.approx(coverage, abs=0.02)
    assert (table == aged_table(num_seqs, blocks, num_blocks, block_size, coverage, seed=1)).all()
    assert (table != aged_table(num_seqs, blocks, num_blocks, block_size, coverage, seed=2)).any()
    runs = table.reshape(-1, 64 // block_size)
    if coverage == 1:  # runs are aligned, and in no order
        assert (runs[:, 0] % (64 // block_size) == 0).all()
        assert (np.diff(runs[:, 0]) == 64 // block_size).mean() < 0.1


def test_large_blocks_are_runs_themselves():
    assert [coverages(size) for size in (32, 64, 256)] == [COVERAGES, (1.0,), (1.0,)]
    table = aged_table(4, 8, 35, 64, 1.0, 0)
    assert np.unique(table).size == 32 and (np.diff(table) != 1).mean() > 0.8


def test_the_groups_are_what_was_promised():
    todo = groups()
    kinds = {
        (s.op, s.head_dim, s.num_q_heads, s.num_kv_heads, s.kv_dtype) for group in todo for s in group.specs
    }
    formats = {(dim, 32, 8, kv) for dim in (64, 128) for kv in (DType.F16, DType.FP8_E4M3)}
    formats.add((128, 16, 2, DType.F16))
    assert kinds == {(op, *kind) for op in (Op.DECODE, Op.EXTEND) for kind in formats}
    assert len(todo) == 5 * (len(BATCHES) + len(PROMPTS))
    assert all([spec.block_size for spec in group.specs] == list(BLOCK_SIZES) for group in todo)
    assert todo[0].name == "decode, head_dim 64, 32/8 heads, f16, 8x4096"


@pytest.mark.parametrize("op", [Op.DECODE, Op.EXTEND])
def test_every_block_size_has_the_same_candidates(op):
    h100 = target("h100")
    group = next(g for g in groups() if g.specs[0].op is op)
    found = [candidates(spec, h100) for spec in group.specs]
    assert all(len(set(schedules)) == len(found[0]) > 2 for schedules in found)
    assert all(is_legal(spec, h100, s) for spec, row in zip(group.specs, found, strict=True) for s in row)
    free = [{tuple((k, v) for k, v in s.choices if k != "ids") for s in schedules} for schedules in found]
    assert all(row == free[0] for row in free)


def test_kernels_read_the_aged_table(cpu_kernels, tmp_path):
    """CPU kernels through the same path: they are gated, and read the table that they are given."""
    spec, workload, where = cpu_kernels
    aged = Aged(spec, where, workload, "cpu", tmp_path)
    for coverage in (0.5, 1.0):
        contender = aged.contender(0, coverage)
        contender.clock._call(0)
        inputs = aged.inputs(coverage)[0]
        expected = reference(spec, inputs)[0]
        assert (inputs.out.double() - expected).abs().max() < 1e-3
    assert (aged.inputs(0.5)[0].block_table != aged.inputs(1.0)[0].block_table).any()
    rows = time_group(Group((spec,), workload), where, tmp_path, "cpu")
    assert [row.coverage for row in rows] == list(COVERAGES)
    assert all(row.samples_us and not row.failure for row in rows)


@pytest.fixture
def cpu_kernels(tmp_path, monkeypatch):
    pytest.importorskip("tvm")
    monkeypatch.setenv("PAGEDGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(block_sizes_gpu.SHAPES, Op.DECODE, ({}, {"ahead": 0}))
    spec = KernelSpec(Op.DECODE, 64, 4, 2, 16, DType.F32, DType.F32, k_inner=KInner.DIM)
    return spec, Workload.uniform(3, 256), target("cpu")


class FakeClock:
    """A kernel whose time is known."""

    def __init__(self, us: float) -> None:
        self.us = us

    def warm(self) -> None:
        """Fail where there is no time to tell."""
        if math.isnan(self.us):
            raise RuntimeError("illegal address")

    def sample(self) -> float:
        return self.us


class Here:
    """A worker that is this process."""

    def __init__(self, *_: object) -> None:
        self.worker, self.pool, self.killed = self, None, 0

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def call(self, function, group, *more, timeout_s):
        if group.workload.num_seqs == 256 and group.specs[0].head_dim == 64:
            raise worker.WorkerLost("the process died")
        return function(group, *more)

    def kill(self) -> None:
        self.killed += 1


def test_from_kernels_to_the_explorer(tmp_path, monkeypatch):
    """The whole suite with kernels whose times are made up: failures are kept, the rest is read back."""

    class Fake:
        """Of three variants the second is the fastest; the third fails when it is called."""

        def __init__(self, spec, where, workload, device, folder):
            if spec.block_size == 8:
                raise CompileError("spills")
            self.spec = spec
            self.variants = {0: "slow", 1: "fast", 2: "fails"}

        def contender(self, variant, coverage):
            size = self.spec.block_size
            us = 200 - 100 * variant + size - 20 * coverage if variant < 2 else math.nan
            return Contender(f"{size} {coverage} {variant}", FakeClock(us), 1, self.variants[variant])  # type: ignore[arg-type]

    h100 = target("h100")
    monkeypatch.setattr(block_sizes_gpu, "gpu_target", lambda: h100)
    monkeypatch.setattr(block_sizes_gpu, "device_of", lambda _: type("D", (), {"present": True}))
    monkeypatch.setattr(block_sizes_gpu, "Workshop", Here)
    monkeypatch.setattr(block_sizes_gpu, "compile_candidates", lambda *_: None)
    monkeypatch.setattr(block_sizes_gpu, "gpu_read_gbs", lambda: 3000.0)
    monkeypatch.setattr(block_sizes_gpu, "Aged", Fake)
    noted: list[str] = []
    report = run_suite("block-sizes-gpu", tmp_path / "t.json", noted.append)
    assert KernelTimings.load(tmp_path / "t.json") == report and report.read_gbs == 3000
    assert (report.complete, report.done, report.planned) == (True, len(groups()), len(groups()))
    assert report.environment.target == "h100-sxm"
    assert report.notes == tuple(
        f"decode, head_dim 64, 32/8 heads, {kv}, 256x1024: WorkerLost: the process died"
        for kv in ("f16", "fp8_e4m3")
    )
    assert len({(row.spec, row.workload) for row in report.rows}) == 7 * (len(groups()) - 2)
    assert {row.detail for row in report.rows if not row.failure} == {"fast"}
    failed = [row for row in report.rows if row.spec.block_size == 8]
    assert failed and all(row.failure == "CompileError: spills" for row in failed)
    spec = groups()[6].specs[2]
    found = kernel_time(spec, h100, 64, 4096, report)
    assert found.status is Status.MEASURED
    assert found.at(64, 64 * 2048) == pytest.approx(116) and found.factor(1.0) == pytest.approx(96 / 116)
    flops = [batch.flops(extend := replace(spec, op=Op.EXTEND)) for batch in PROMPTS]
    expected = statistics.geometric_mean(flops) / 116e-6 / (h100.f16_tflops * 1e12)
    assert report.matmul_share(extend, h100) == pytest.approx(expected)
    assert report.matmul_share(replace(extend, head_dim=256), h100) is None
    with pytest.raises(InvalidValue, match=r"29 of 30 groups of kernels.*was cut off"):
        kernel_time(spec, h100, 64, 4096, replace(report, complete=False, done=29, planned=30))
    chosen = run_suite("block-sizes-gpu", None, print, cases=["decode, head_dim 128, 16/2"])
    assert {row.spec.num_q_heads for row in chosen.rows} == {16} and chosen.planned == len(BATCHES)
    assert "head_dim 64" in noted[0] and any("block size 1" in line for line in noted)
    assert any("failed" in line for line in report.lines())


def test_a_row_that_failed_has_no_samples():
    spec = groups()[0].specs[0]
    row = timing(spec, BATCHES[0], 0.5, "no")
    assert (row.samples_us, row.failure, row.num_tokens) == ((), "no", 8 * 4096)
    row = timing(replace(spec, op=Op.EXTEND), PROMPTS[1], 0.5, "no")
    assert row.workload == PROMPTS[1] and row.num_queries == 2048


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DeviceMissing, match="gpu 0"):
        run_suite("block-sizes-gpu", None, print)
