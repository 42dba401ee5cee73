"""Suites: what follows from raw samples, the registry, the grid; and loading for real."""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pagedgen.autotune.binaries import Compiled
from pagedgen.autotune.select import ANY, Selection
from pagedgen.autotune.suites import (
    SUITES,
    decode_gpu,
    extend_cpu,
    extend_gpu,
    invariant_gpu,
    move_gpu,
    peers_cpu,
    peers_extend_cpu,
    run_suite,
    verify_gpu,
)
from pagedgen.autotune.suites import contest as contest_module
from pagedgen.autotune.suites.contest import Contender, Pick, contest, ours, pick, prove_all, proved
from pagedgen.autotune.suites.decode_gpu import GRID_WORKLOAD, grid, rows
from pagedgen.autotune.suites.output import Output
from pagedgen.autotune.suites.report import Case, Draft, Report, Row
from pagedgen.autotune.worker import Done
from pagedgen.compiler.binary import Source
from pagedgen.compiler.space import default_schedule, near_default
from pagedgen.compiler.verify import make_inputs
from pagedgen.compiler.verify_write import turn
from pagedgen.errors import CompileError, DeviceMissing, GateFailure, InvalidValue, UnknownName
from pagedgen.runtime.kv_cache import store
from pagedgen.runtime.merge import merge
from pagedgen.values.manifest import Rule
from pagedgen.values.record import Status, Verdict
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import DType, KernelSpec, KVScale, Op, Rope
from pagedgen.values.target_table import target
from pagedgen.values.workload import Workload

SPEC = KernelSpec(Op.DECODE, 128, 32, 8, 16, DType.F16, DType.F16)
WORKLOAD = Workload.uniform(16, 2048)


def test_ratios_and_shares_are_taken_round_by_round() -> None:
    ours = Row("pagedgen", (100.0, 300.0, 110.0), 1_000_000, "measured: tile64")
    peer = Row("peer", (200.0, 600.0, 110.0), 1_000_000)
    double = Row("twice the bytes", (100.0, 300.0, 110.0), 2_000_000)
    broken = Row("broken", (), 1_000_000, failure="RuntimeError: no")
    read = (20.0, 5.0, 10.0)
    case = Case("case", SPEC, WORKLOAD, (ours, peer, double, broken), read)
    first, second, third, fourth = case.summaries()
    assert (first.median_us, first.speed_ratio) == (110.0, 1.0)
    assert first.roofline_share == pytest.approx(2 / 3)  # of 1/2, 2/3 and 10/11; of the medians 0.91
    assert second.speed_ratio == 2.0  # of 2, 2 and 1; the medians alone would say 1.82
    assert third.speed_ratio == 0.5 and third.gbs == pytest.approx(2 * first.gbs)
    assert (fourth.failure, fourth.median_us, fourth.gbs) == ("RuntimeError: no", 0.0, 0.0)
    assert first.samples_us == ours.samples_us


def report_of(case: Case, json_path: Path | None = None) -> Report:
    """A made-up suite's report of one case."""
    draft = Draft("made-up", target("cpu"), 1, Output(lambda line: None, json_path))
    draft.add(case)
    return draft.finish(["a note"])


def test_a_report_is_json_with_raw_samples_and_reads_as_a_table(tmp_path: Path) -> None:
    row = Row("pagedgen", (100.0, 120.0), 1_000_000)
    report = report_of(Case("case", SPEC, WORKLOAD, (row,), (20.0,)), tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert (data["complete"], data["planned"], len(data["cases"])) == (True, 1, 1)
    assert data["cases"][0]["rows"][0]["samples_us"] == [100.0, 120.0]
    assert data["environment"]["device"] and data["environment"]["threads"] >= 1
    assert {name for name, _ in data["environment"]["packages"]} >= {"torch", "numpy"}
    assert any("pagedgen" in line and "110.0 us" in line for line in report.lines())
    assert report.lines()[-1] == "a note"


INTERRUPTED = """
import sys
import time
from pagedgen import cli
from pagedgen.autotune.suites import extend_cpu
from pagedgen.autotune.suites.contest import Contender

class Clock:
    def warm(self):
        pass
    def sample(self):
        return 5.0

def third(*job):
    if job[0] != extend_cpu.jobs()[2].spec:
        return Contender("pagedgen", Clock(), 100)
    print("third", file=sys.stderr, flush=True)
    time.sleep(60)

extend_cpu.ours = third
extend_cpu.peers_extend_cpu.peers = lambda *a: []
extend_cpu.cpu_matmul_tflops = lambda: 0.0
sys.argv = ["pagedgen", "bench", "--suite", "extend-cpu", "--json", sys.argv[1]]
cli.main()
"""


def test_a_suite_that_is_ended_leaves_its_finished_cases(tmp_path) -> None:
    path = tmp_path / "report.json"
    command = [sys.executable, "-c", INTERRUPTED, str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while process.stderr.readline() != "third\n":
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
    assert process.returncode == 143
    data = json.loads(path.read_text())
    assert (data["complete"], data["planned"]) == (False, len(extend_cpu.jobs()))
    assert [case["name"] for case in data["cases"]] == [job.name for job in extend_cpu.jobs()[:2]]
    assert data["cases"][1]["rows"][0]["samples_us"] == [5.0] * extend_cpu.ROUNDS
    assert list(tmp_path.iterdir()) == [path]
    assert f"cut off; what was finished is in {path}" in said.replace("\n", "")


def test_a_suite_that_is_interrupted_says_where_its_finished_cases_are(tmp_path, monkeypatch) -> None:
    """Those alone: before the first case ends, what an earlier run left in the file stays."""
    path, said, ends = tmp_path / "report.json", [], []
    path.write_text("an earlier run's")

    def ours(*job: object) -> Contender:
        if len(ends) == broken:
            raise KeyboardInterrupt
        ends.append(job)
        return Contender("pagedgen", FakeClock(5.0, []), 100)  # type: ignore[arg-type]

    monkeypatch.setattr(extend_cpu, "ours", ours)
    monkeypatch.setattr(peers_extend_cpu, "peers", lambda *a: [])
    monkeypatch.setattr(extend_cpu, "cpu_matmul_tflops", lambda: 0.0)
    for broken in (0, 2):
        with pytest.raises(KeyboardInterrupt):
            run_suite("extend-cpu", path, said.append)
        if broken == 0:
            assert path.read_text() == "an earlier run's" and not any("cut off" in line for line in said)
    assert len(json.loads(path.read_text())["cases"]) == 2
    assert said[-1] == f"extend-cpu was cut off; what was finished is in {path}"


def test_cases_can_be_chosen_by_a_part_of_their_names(tmp_path, monkeypatch) -> None:
    clock = FakeClock(5.0, [])
    monkeypatch.setattr(extend_cpu, "ours", lambda *a: Contender("pagedgen", clock, 100))  # type: ignore[arg-type]
    monkeypatch.setattr(peers_extend_cpu, "peers", lambda *a: [])
    monkeypatch.setattr(extend_cpu, "cpu_matmul_tflops", lambda: 0.0)
    found = run_suite("extend-cpu", tmp_path / "a.json", print, cases=["Window", "chunks, f32"])
    assert [case.name for case in found.cases] == ["chunks, f32", "prompt in a window, f32"]
    assert (found.complete, found.planned) == (True, 2)
    assert found.notes[0] == "only cases with Window or chunks, f32"
    with pytest.raises(UnknownName, match="unknown case 'verify'; known: prompt, f32, prompt, bf16"):
        run_suite("extend-cpu", None, print, cases=["window", "verify"])
    with pytest.raises(InvalidValue, match="load has no cases"):
        run_suite("load", None, print, cases=["call"])


class Here:
    """A pool that is this process."""

    def __init__(self, *_: object) -> None:
        self.pool = self

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, function, arguments, timeout_s):
        for argument in arguments:
            try:
                yield Done(argument, function(argument))
            except CompileError as error:
                yield Done(argument, error=error)


def test_kernels_are_proved_once_for_a_run(tmp_path, monkeypatch) -> None:
    """Libraries and verdicts are left for the cases; what does not compile is left to its case."""
    h100, gated = target("h100"), []

    def compile_one(spec, target, schedule):
        if schedule["tile"] == 17:
            raise CompileError("no")
        return schedule

    def gate_variant(library, spec, *_):
        gated.append(library)
        return Verdict(library.read_text() == "64", 4, 0.1, 0.2, 0)

    monkeypatch.setattr(contest_module, "Pool", Here)
    monkeypatch.setattr(contest_module, "compile_one", compile_one)
    monkeypatch.setattr(
        contest_module, "link", lambda binaries, _, out: out.write_text(str(binaries[0]["tile"]))
    )
    monkeypatch.setattr(contest_module, "Library", lambda path: None)
    monkeypatch.setattr(contest_module, "gate_variant", gate_variant)
    monkeypatch.setattr(contest_module, "device_works", lambda device: None)
    right, wrong, absent = (Schedule.of("triton-decode", tile=tile) for tile in (64, 32, 17))
    prove_all([(SPEC, s) for s in (right, wrong, absent, right)], h100, "cuda", tmp_path)
    assert [library.read_text() for library in gated] == ["64", "32"]
    proved.cache_clear()  # the cases run in another process
    for schedule, passed in ((right, True), (wrong, False)):
        library, verdict = proved(SPEC, h100, schedule, "cuda", tmp_path)
        assert library.read_text() == str(schedule["tile"]) and verdict.passed is passed
    assert len(gated) == 2
    with pytest.raises(CompileError):
        proved(SPEC, h100, absent, "cuda", tmp_path)
    with pytest.raises(GateFailure):
        ours(SPEC, h100, WORKLOAD, "cuda", tmp_path, chosen=contest_module.Pick(wrong, "candidate"))


def test_picks_are_records_or_the_nearest_default_that_compiles(monkeypatch) -> None:
    h100, tried = target("h100"), []
    jobs = [job for job in rows() if job.workload in (Workload.uniform(1, 8192), Workload.uniform(32, 8192))]
    odd, broken = replace(SPEC, head_dim=72), replace(SPEC, head_dim=40)
    jobs += [replace(jobs[0], spec=spec) for spec in (odd, broken)]

    def compile_all(sources, pool, cache):
        for source in sources:
            tried.append(source)
            refused = source.spec == broken or source.schedule == default_schedule(odd, h100)
            yield Compiled(source, None if refused else source)  # type: ignore[arg-type]

    monkeypatch.setattr(decode_gpu, "compile_all", compile_all)
    monkeypatch.setattr(decode_gpu, "recorded_selection", lambda spec, where: selections.get(spec))
    short, long = (Schedule.of("triton-decode", tile=tile) for tile in (64, 128))
    selections = {
        job.spec: Selection(Status.MEASURED, (short, long), (Rule(1, 8192, 0), Rule(ANY, ANY, 1)), 0.0)
        for job in jobs[:-2]
    }
    monkeypatch.setattr(decode_gpu, "render", lambda s, where, schedule: Source(s, where, schedule, ""))
    picks = decode_gpu.compile_picks(jobs, h100, Here(), lambda line: None)  # type: ignore[arg-type]
    for job in jobs[:-2]:
        chosen = picks[job.spec, job.workload]
        assert chosen.origin == "measured"
        assert chosen.schedule == (short if job.workload.num_seqs == 1 else long)
    second = near_default(odd, h100, 2)[1]
    assert picks[odd, jobs[-2].workload] == contest_module.Pick(second, "default")
    assert not any(spec == broken for spec, _ in picks)
    assert sum(source.spec == broken for source in tried) == contest_module.NEAREST


class FakeClock:
    """Counts its samples; may refuse to warm up."""

    def __init__(self, us: float, log: list[float], refuses: bool = False) -> None:
        self.us, self.log, self.refuses = us, log, refuses

    def warm(self) -> None:
        if self.refuses:
            raise ValueError("not on this device")

    def sample(self) -> float:
        self.log.append(self.us)
        return self.us


def test_a_contest_interleaves_and_keeps_failures() -> None:
    log: list[float] = []
    clocks = [FakeClock(1.0, log), FakeClock(2.0, log), FakeClock(3.0, log, refuses=True)]
    contenders = [Contender(f"c{i}", clock, 100) for i, clock in enumerate(clocks)]  # type: ignore[arg-type]
    found, read = contest(contenders, 6, lambda: 7.0)
    assert [row.samples_us for row in found] == [(1.0,) * 6, (2.0,) * 6, ()]
    assert found[2].failure == "ValueError: not on this device"
    assert read == (7.0,) * 6
    assert all(sorted(log[2 * i : 2 * i + 2]) == [1.0, 2.0] for i in range(6))


def test_nothing_recorded_means_the_default_and_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PAGEDGEN_CACHE_DIR", str(tmp_path))
    odd = KernelSpec(Op.DECODE, 72, 6, 3, 24, DType.F32, DType.F32)
    chosen = pick(odd, target("cpu"), WORKLOAD)
    assert chosen.origin == "default" and chosen.schedule == default_schedule(odd, target("cpu"))


def test_the_grid_is_what_was_promised() -> None:
    specs = grid()
    assert len(specs) == len(set(specs)) >= 60
    assert {s.head_dim for s in specs} >= {32, 64, 80, 96, 128, 192, 256}
    assert {s.group_size for s in specs} >= {1, 2, 4, 5, 7, 8, 16, 32}
    assert any(s.num_kv_heads == 1 for s in specs)
    assert {s.block_size for s in specs} >= {1, 8, 16, 32, 64, 128, 256, 544}
    assert {s.kv_dtype for s in specs} == {DType.F16, DType.BF16, DType.FP8_E4M3, DType.FP8_E5M2}
    assert Workload.uniform(32, 8192) == GRID_WORKLOAD
    assert {job.workload.name for job in rows()} >= {
        *("1x8192", "32x8192", "128x1024", "1x131072+63x1024", "64x128..16384"),
    }


def test_verify_is_timed_beside_decode_of_the_same_kv() -> None:
    jobs = verify_gpu.jobs()
    assert all(job.spec.op is Op.VERIFY for job in jobs)
    for kv in (DType.F16, DType.BF16, DType.FP8_E4M3):
        batches = [job.workload for job in jobs if job.spec.kv_dtype is kv]
        assert {(w.num_seqs, w.lens_of_queries[0], w.max_seq_len) for w in batches} >= {
            (64, 8, 4096), (16, 4, 4096), (64, 16, 4096), (8, 64, 4096),
        }  # fmt: skip
    for job in jobs:
        (_, decode, plain), *verifies = verify_gpu.contenders_of(job)
        assert decode.op is Op.DECODE and plain.seq_lens == job.workload.seq_lens and not plain.query_lens
        for _, spec, workload in verifies:
            assert spec.op is Op.VERIFY and workload.cache_bytes(spec) == plain.cache_bytes(decode)
        assert {spec.tree_mask for _, spec, _ in verifies} == ({False} if job.spec.window else {False, True})


def test_a_verify_that_does_not_compile_is_a_row_and_others_are_timed(tmp_path, monkeypatch) -> None:
    log: list[float] = []

    def ours(spec, target, workload, device, folder, name, chosen):
        if spec.tree_mask:
            raise CompileError("no")
        return Contender(name, FakeClock(30.0 if spec.op is Op.VERIFY else 20.0, log), 100, flops=7)  # type: ignore[arg-type]

    monkeypatch.setattr(verify_gpu, "ours", ours)
    job = verify_gpu.jobs()[0]
    rows = verify_gpu._contest(job, target("h100"), tmp_path, {"": {}})
    first, second, third = Case("case", job.spec, job.workload, rows, (1.0,)).summaries()
    assert (first.contender, first.failure) == (verify_gpu.DECODE, "")
    assert (second.contender, second.speed_ratio) == (verify_gpu.LINE, 1.5)  # of decode's time
    assert (third.contender, third.failure) == (verify_gpu.TREE, "CompileError: no")


def test_defaults_are_timed_beside_what_is_on_record(tmp_path, monkeypatch) -> None:
    h100, job = target("h100"), verify_gpu.jobs()[0]
    (_, decode, plain), (_, line, batch), (_, tree, _) = verify_gpu.contenders_of(job)
    default = default_schedule(line, h100)
    tuned = next(s for s in near_default(line, h100, 2) if s != default)
    picks = {
        (decode, plain): Pick(default_schedule(decode, h100), "measured"),
        (line, batch): Pick(tuned, "measured"),
        (tree, batch): Pick(default_schedule(tree, h100), "default"),
    }
    called: list[tuple[str, Schedule]] = []

    def ours(spec, target, workload, device, folder, name, chosen):
        called.append((name, chosen.schedule))
        return Contender(name, FakeClock(20.0, []), 100)  # type: ignore[arg-type]

    monkeypatch.setattr(verify_gpu, "ours", ours)
    rows = verify_gpu._contest(job, h100, tmp_path, verify_gpu.with_defaults(picks, h100))
    beside = verify_gpu.LINE + verify_gpu.DEFAULT
    assert [r.contender for r in rows] == [verify_gpu.DECODE, verify_gpu.LINE, beside, verify_gpu.TREE]
    assert dict(called)[verify_gpu.LINE] == tuned and dict(called)[beside] == default


def test_extend_is_timed_with_its_default_and_every_tile_once() -> None:
    h100 = target("h100")
    for spec in {job.spec for job in extend_gpu.jobs() if job.every_tile}:
        first, *others = extend_gpu.candidates(spec, h100)
        assert first == default_schedule(spec, h100) and first not in others and len(others) >= 5


def test_invariant_kernels_are_timed_beside_the_free_one(tmp_path, monkeypatch) -> None:
    """One kernel serves all batches, the best mean of its own best waves, not the best of each batch."""
    free = {"1x8192": 10.0, "32x8192": 100.0}
    short, long = (f"tile 64, 2 warps, {stages} stages, parts of 512, 32 at most" for stages in (3, 4))
    times = {
        f"{short}; waves 1": (12.0, 110.0),
        f"{short}; waves 4": (10.0, 130.0),
        f"{long}; waves 2": (14.0, 101.0),
    }

    def ours(spec, target, workload, device, folder, name, chosen):
        if name not in {"free", *times}:
            raise CompileError("no")
        assert spec.batch_invariant == (name != "free") == (chosen is not None)
        time = free[workload.name] if name == "free" else times[name][workload.num_seqs > 1]
        return Contender(name, FakeClock(time, []), 100)  # type: ignore[arg-type]

    monkeypatch.setattr(invariant_gpu, "ours", ours)
    h100 = target("h100")
    jobs = [job for job in invariant_gpu.jobs() if job.workload.name in free][:2]
    assert jobs[0].spec == jobs[1].spec and not jobs[0].spec.batch_invariant
    assert all(s["split"] == "fixed" for _, s in invariant_gpu.candidates(jobs[0].spec, h100))
    cases = [
        Case(j.name, j.spec, j.workload, invariant_gpu._contest(j, h100, tmp_path, None), (1.0,))
        for j in jobs
    ]
    rows = {row.contender: row for row in cases[1].summaries()}
    assert rows[f"{short}; waves 1"].speed_ratio == pytest.approx(1.1)
    assert rows[f"{short}; waves 6"].failure == "CompileError: no"
    assert invariant_gpu.best_of(cases) == {jobs[0].spec: f"{short}; waves 1x8192: 4, 32x8192: 1"}


class TorchMoves:
    """The moves' libraries, by torch's operators."""

    def write_kv(self, new_k, new_v, slots, k, v, k_scale, v_scale, variant, *turns):
        if turns:
            new_k = turn(new_k, turns[0], turns[1], Rope.NEOX)[0].to(new_k.dtype)
        for new, pool, scale in ((new_k, k, k_scale), (new_v, v, v_scale)):
            fp8 = None if scale is None else pool.dtype
            store(pool if scale is None else pool.view(torch.uint8), new, slots, scale, fp8)

    def gather(self, out_k, out_v, slots, k, v, k_scale, v_scale, variant):
        for out, pool, scale in ((out_k, k, k_scale), (out_v, v, v_scale)):
            rows = (pool if scale is None else pool.float() * scale)[slots // 16, slots % 16]
            out.copy_(rows)

    def copy_blocks(self, src_origin, dst_origin, src, dst, pairs, page_bytes, variant):
        for (begin, step, page), (first, stride, _) in zip(src.tolist(), dst.tolist(), strict=True):
            for source, into in pairs.tolist():
                ctypes.memmove(dst_origin + first + into * stride, src_origin + begin + source * step, page)

    def merge(self, outs, lses, out, lse, variant):
        for into, found in zip((out, lse), merge(outs, lses), strict=True):
            into.copy_(found)


@pytest.mark.parametrize("number", range(0, 32, 4))
def test_moves_are_timed_at_the_same_work_as_torchs_operators(number) -> None:
    """One call of ours and one of torch's, each turn: the same bytes; and as many as are stated."""
    job = move_gpu.jobs()[number]
    assert job.num_tokens == 64 and job.every_schedule
    ours, torchs = (
        (move_gpu.Blocks if job.spec.op is Op.COPY_BLOCKS else move_gpu.Rows)(job, 2, "cpu") for _ in range(2)
    )
    copied = job.spec.op is Op.COPY_BLOCKS
    turns = () if copied else ours.turns  # float32 turns there, float64 here
    torchs.turns = turns
    names = ("blocks", "pairs") if copied else ("raw", "rows", "slots")
    for name in names:
        held, other = getattr(ours, name), getattr(torchs, name)
        for one, two in zip(held, other, strict=True) if isinstance(held, list) else [(held, other)]:
            if name in ("blocks", "raw"):
                one.copy_(torch.randint(0, 100, one.shape))
            two.copy_(one)
    before = [x.clone() for x in ([ours.blocks] if copied else [*ours.raw, ours.rows])]
    for which in (0, 1):
        ours.ours(TorchMoves(), which)
        torchs.torchs(which)
    after = [ours.blocks] if copied else [*ours.raw, ours.rows]
    for got, want in zip(after, [torchs.blocks] if copied else [*torchs.raw, torchs.rows], strict=True):
        codes = (
            got.dtype == torch.uint8
        )  # may be next to each other: these here are rounded to bfloat16 first
        assert torch.allclose(
            got.float(), want.float(), *((0, 1) if turns and codes else (0.01 * bool(turns),))
        )
    changed = sum(int((a != b).sum()) * a.element_size() for a, b in zip(before, after, strict=True))
    written = (
        64
        * job.num_layers
        * 2
        * 8
        * 128
        * (job.spec.q_dtype if job.spec.op is Op.GATHER else job.spec.kv_dtype).size
    )
    assert 0.9 * written <= changed / 2 <= written < job.num_bytes


@pytest.mark.parametrize("way", ["out", "in"])
def test_swaps_are_timed_at_the_same_work_as_torchs_operators(way) -> None:
    job = next(job for job in move_gpu.jobs() if job.swap == way and job.num_tokens == 64)
    ours, torchs = (move_gpu.Swaps(job, 2, "cpu") for _ in range(2))
    for name in ("here", "there"):
        getattr(ours, name).random_(1000)
    for name in ("here", "there", "blocks", "pairs"):
        getattr(torchs, name).copy_(getattr(ours, name))
    before = ours.there.clone(), ours.here.clone()
    for which in range(2):
        ours.ours(TorchMoves(), which)
        torchs.torchs(which)
        torchs.plain(which)
    assert torch.equal(ours.here, torchs.here) and torch.equal(ours.there, torchs.there)
    changed = [int((a != b).sum()) * 8 for a, b in zip(before, (ours.there, ours.here), strict=True)]
    written = changed[0] if way == "out" else changed[1]
    assert min(changed) == 0 and 0.99 < written / job.num_bytes <= 1  # two turns, half of the bytes each


def test_scales_stay_unset_and_parts_are_merged_turn_by_turn() -> None:
    """What the suite times of kv_scales reads all tokens in every call; merge's bytes are those it moves."""
    scales, merged = (next(j for j in move_gpu.jobs() if j.spec.op is op) for op in (Op.KV_SCALES, Op.MERGE))
    unset = move_gpu.arguments(scales)(scales, 2, "cpu")
    unset.torchs(0)
    assert all(not scale.any() for scale in unset.scales) and not unset.rows.isfinite().any()
    assert unset.rows[0].nbytes == scales.num_bytes
    ours, torchs = (move_gpu.arguments(merged)(merged, 2, "cpu") for _ in range(2))
    torchs.outs, torchs.lses = ours.outs, ours.lses
    ours.ours(TorchMoves(), 1)
    torchs.torchs(1)
    assert torch.equal(ours.out, torchs.out) and torch.equal(ours.lse, torchs.lse) and not ours.out[0].any()
    assert sum(x[0].nbytes for x in (ours.outs, ours.lses, ours.out, ours.lse)) == merged.num_bytes


def test_unknown_suites_and_absent_devices_are_named(monkeypatch) -> None:
    with pytest.raises(
        UnknownName,
        match="decode-cpu, decode-gpu, extend-cpu, extend-gpu, verify-gpu, invariant-gpu, move-gpu",
    ):
        run_suite("nope", None, print)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for suite in ("decode-gpu", "verify-gpu", "invariant-gpu", "move-gpu"):
        with pytest.raises(DeviceMissing, match="gpu 0"):
            run_suite(suite, None, print)


def test_every_suite_has_its_module() -> None:
    from importlib.util import find_spec

    for suite in SUITES.values():
        assert find_spec(suite.module) is not None, suite.module


def test_load_for_real(tmp_path, monkeypatch) -> None:
    pytest.importorskip("tvm")
    from pagedgen.autotune.suites import load

    monkeypatch.setenv("PAGEDGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(load, "PROCESSES", 1)
    monkeypatch.setattr(load, "CALLS", 50)
    report = run_suite("load", tmp_path / "load.json", lambda line: None)
    named = {row.contender: row.median_us for row in report.cases[0].rows}
    assert set(named) == {"load and first call", "load", "first call", "call", "pagedgen --help"}
    assert all(time > 0 for time in named.values())
    assert named["load"] + named["first call"] == pytest.approx(named["load and first call"])


def test_extend_on_a_cpu_is_timed_in_every_type_and_batch() -> None:
    found = extend_cpu.jobs()
    assert all(job.spec.op is Op.EXTEND for job in found)
    prompts = {job.spec.kv_dtype for job in found if job.workload == extend_cpu.PROMPT}
    assert prompts == set(DType) - {DType.FP8_E5M2}
    assert {job.workload for job in found if job.spec.kv_dtype is DType.F32} >= {
        extend_cpu.PROMPT, extend_cpu.CHUNKS, extend_cpu.MIXED,
    }  # fmt: skip


@pytest.mark.parametrize("kv", [DType.F32, DType.FP8_E4M3])
def test_what_peers_of_extend_compute_is_checked(kv: DType) -> None:
    """SDPA on chunks, whole prompts and one query; an output that is wrong is refused."""
    scale = KVScale.TENSOR if kv.is_fp8 else KVScale.NONE
    spec = KernelSpec(Op.EXTEND, 32, 4, 2, 16, DType.F32, kv, scale)
    inputs = make_inputs(spec, (70, 33, 50), query_lens=(70, 1, 20), poison=False)
    peers_extend_cpu.sdpa_call(spec, inputs)()
    peers_cpu.check("sdpa", spec, inputs)
    inputs.out[5] += 0.1
    with pytest.raises(GateFailure, match=r"sdpa: .* times the error that is allowed"):
        peers_cpu.check("sdpa", spec, inputs)
    with pytest.raises(NotImplementedError, match="ragged"):
        peers_extend_cpu.flex_call(spec, inputs)


def test_rates_of_a_cpu_read_in_gflops_and_peers_as_ratios() -> None:
    rows = (Row("pagedgen", (1e5,), 100, flops=15 * 10**9), Row("peer", (2e5,), 100, flops=15 * 10**9))
    case = Case("case", SPEC, WORKLOAD, rows, (), 0.2)
    head, first, second, _ = report_of(case).lines()
    assert (
        "matmul 200.0 GFLOP/s" in head and "150.0 GFLOP/s   75%" in first and "x" not in first.split("%")[1]
    )
    assert "75.0 GFLOP/s   37%    2.00x" in second
