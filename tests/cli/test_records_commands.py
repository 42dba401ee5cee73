"""Commands that read records (explain, predict-check, verify --records), plots and shared studies."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "autotune"))

import worker_functions as functions
from recorded import H100, SPECS, modelled

from pagedgen.autotune import calibration
from pagedgen.autotune import recheck as rechecking
from pagedgen.autotune import tune as tuner
from pagedgen.autotune.database import Database, Entry
from pagedgen.autotune.device import stamp_here
from pagedgen.autotune.grid import Grid
from pagedgen.autotune.ledger import Ledger, Place
from pagedgen.autotune.recheck import Recheck
from pagedgen.autotune.select import select
from pagedgen.autotune.tune import Effort, Plan
from pagedgen.cli import batches
from pagedgen.cli import verify as checking
from pagedgen.cli.app import app
from pagedgen.compiler.kernel_hash import kernel_hash
from pagedgen.compiler.space import feasible, near_default
from pagedgen.runtime.pack import read_manifest
from pagedgen.values.record import Timing
from pagedgen.values.spec import DType, KernelSpec, KInner, Op
from pagedgen.values.target_table import cpu_target
from pagedgen.values.workload import Workload

runner = CliRunner()
TINY = ("--cpu", "--head-dim", "32", "--num-q-heads", "2", "--num-kv-heads", "1")
SPEC, BATCH = SPECS[0], Workload.uniform(32, 8192)
TINY_SPEC = KernelSpec(Op.DECODE, 32, 2, 1, 16, DType.BF16, DType.BF16, k_inner=KInner.TOKEN)


def run(*arguments: object, code: int = 0):
    result = runner.invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PAGEDGEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def save(where: str, factor: float = 1.0) -> None:
    """Sixty schedules, as measured by this version on a target."""
    stamp = stamp_here(SPEC, H100)
    rows = [
        replace(r, target=where, stamp=stamp, timing=Timing(r.time_us * factor, r.time_us, r.time_us, 3))
        for r in modelled(SPEC, BATCH)
    ]
    times = {r.schedule: {r.workload: r.time_us} for r in rows}
    Database().save(Entry(SPEC, where, tuple(rows), select(times)))


def test_explain_prints_how_well_the_model_ranks(cache):
    options = ("--gpu", "h100", "--kv-dtype", "f16")
    assert "how well the model ranks is not known" in run("explain", *options).stdout
    save(H100.name)
    data = json.loads(run("explain", *options, "--json").stdout)["rank_errors"]
    (error,) = calibration.rank_errors(Database().find(SPEC, H100.name, stamp_here(SPEC, H100)).entry.records)
    assert data == [
        {"workload": "32x8192", "schedules": 60, "spearman": error.correlation, "regret": error.regret}
    ]
    assert f"{error.regret:.1%}" in run("explain", *options).stdout

    # what another model predicted is on record, and not what this one is judged by
    entry = Database().find(SPEC, H100.name, stamp_here(SPEC, H100)).entry
    old = tuple(replace(r, predicted_us=1e6 / r.predicted_us) for r in entry.records)
    Database().save(replace(entry, records=old))
    assert json.loads(run("explain", *options, "--json").stdout)["rank_errors"] == data


def test_predict_check(cache, monkeypatch):
    monkeypatch.setattr(calibration, "FITTED", 40)
    there = ("predict-check", "--from", "h100", "--to", "h200")
    assert "nothing measured on h100-sxm" in run(*there, code=1).stderr
    save(H100.name)
    save("h200", 0.8)
    data = json.loads(run(*there, "--json").stdout)
    assert data["from"] == H100.name and data["to"] == "h200"
    assert data["median_regret"] == data["specs"][0]["regret"]
    assert data["median_regret"] == pytest.approx(data["median_moved"], abs=0.02)
    assert "median regret" in run(*there).stdout
    assert "unknown target" in run("predict-check", "--from", "h100", "--to", "h9000", code=1).stderr


def test_tune_with_a_study_and_plots_then_verify_its_records(cache, tmp_path, monkeypatch):
    pytest.importorskip("tvm")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(tuner, "PLANS", {Effort.QUICK: Plan(3, 3, 120.0, (2,), 3, 1)})
    monkeypatch.setattr(tuner, "SIMPLER", 0)
    monkeypatch.setattr(tuner, "bandwidth", functions.fake_bandwidth)  # the real one is measured for seconds
    monkeypatch.setattr(rechecking, "bandwidth", functions.fake_bandwidth)
    monkeypatch.setattr(batches, "GRID", {"cpu": ((1, 512),)})
    monkeypatch.setattr(batches, "RAGGED", {"cpu": (4, 64, 1024)})
    monkeypatch.setattr(batches, "SKEWED", {"cpu": (2048, 3, 64)})
    study, plots = tmp_path / "study.log", tmp_path / "plots"
    options = (*TINY, "--effort", "quick", "--storage", study)
    run("tune", *options, "--plots", plots)
    drawn = sorted(plots.iterdir())
    assert [p.suffixes[-2:] for p in drawn] == [
        [f".{n}", ".png"] for n in ("history", "importance", "roofline")
    ]
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.stat().st_size > 5000 for p in drawn)

    checked = json.loads(run_any("verify", "--records", "--cpu", "--json").stdout)["records"]
    assert checked and all(row["timing"]["median_us"] > 0 and row["reason"] == "" for row in checked)


@pytest.mark.slow  # five commands that start workers: 50 s of CPU time
@pytest.mark.parametrize("op", [Op.EXTEND, Op.VERIFY])
def test_operators_with_queries_are_tuned_built_inspected_and_checked(cache, tmp_path, monkeypatch, op):
    pytest.importorskip("tvm")
    monkeypatch.setattr(tuner, "PLANS", {Effort.QUICK: Plan(2, 2, 120.0, (2,), 3, 1)})
    monkeypatch.setattr(tuner, "SIMPLER", 0)
    for module in (tuner, rechecking):
        monkeypatch.setattr(module, "bandwidth", functions.fake_bandwidth)
        monkeypatch.setattr(module, "matmul_tflops", functions.fake_matmul_tflops)
    spelled = ("1x8", "2x4of96")
    monkeypatch.setattr(batches, "QUERIES", {(op, "cpu"): spelled})
    tuned, pack, plots = tmp_path / "tuned.pack", tmp_path / "built.pack", tmp_path / "plots"
    options = (*TINY, "--ops", op)
    data = json.loads(run("tune", *options, "--effort", "quick", "--out", tuned, "--json").stdout)
    assert [row["batch"] for row in data["called"]] == list(spelled)
    assert all(row["error"] <= row["allowed"] for row in data["called"])
    (result,) = data["results"]
    assert result["name"] == f"{op}-h32-q2-kv1-b16-bf16-ktoken" and result["roofline_tflops"] == 50.0
    for row, text in zip(result["workloads"], spelled, strict=True):
        batch = Workload.parse(text, op)
        assert (row["workload"], row["num_queries"], row["timing"]["rounds"]) == (text, 8, 3)
        floor = batch.floor_us(replace(TINY_SPEC, op=op), 20.0, 50.0)
        assert row["roofline_share"] == pytest.approx(floor / row["time_us"])

    run("build", *options, "--out", pack)
    (kernel,) = json.loads(run("inspect", pack, "--json").stdout)["kernels"]
    assert kernel["schedules"] == "measured" and {t["workload"] for t in kernel["timings"]} == set(spelled)
    assert all(verdict["passed"] for verdict in kernel["gate"]["verdicts"])
    checked = json.loads(run_any("verify", "--records", "--cpu", "--json").stdout)["records"]
    assert [row["workload"] for row in checked] == list(spelled)
    explained = run("explain", *TINY, "--op", op, "--workload", "2x4of96").stdout
    assert f"family tvm-{op}, 2x4of96" in explained and "measured, " in explained
    pytest.importorskip("matplotlib")
    run("tune", *options, "--effort", "quick", "--plots", plots)
    assert (plots / f"{op}-h32-q2-kv1-b16-bf16-ktoken.cpu.roofline.png").stat().st_size > 5000


def test_a_gpus_records_are_what_is_packed_and_dispatched(cache, tmp_path):
    """Records of extend and verify, as an H100 leaves them: `build`, `inspect` and `explain` read them, and
    a call finds the kernel that was the fastest on the batch most like it."""
    shape = ("--head-dim", "64", "--num-q-heads", "8", "--num-kv-heads", "2", "--q-dtype", "bf16")
    pack, chosen = tmp_path / "built.pack", {}
    for op in (Op.EXTEND, Op.VERIFY):
        spec = KernelSpec(op, 64, 8, 2, 16, DType.BF16, DType.BF16)
        few, many = (Workload.parse(text, op) for text in ("1x8of8192", "64x8of4096"))
        stamp, pair, rows = stamp_here(spec, H100), near_default(spec, H100, 2), []
        for schedule, times in zip(pair, ((20.0, 400.0), (30.0, 300.0)), strict=True):
            for batch, us in zip((few, many), times, strict=True):
                one = replace(modelled(SPEC, BATCH)[0], spec=spec, workload=batch, schedule=schedule)
                kernel = kernel_hash(spec, H100, schedule)
                rows.append(replace(one, stamp=stamp, kernel=kernel, timing=Timing(us, us, us, 15)))
        picks = select({s: {r.workload: r.time_us for r in rows if r.schedule == s} for s in pair})
        assert [picks.pick_for(batch) for batch in (few, many)] == list(pair)
        Database().save(Entry(spec, H100.name, tuple(rows), picks))
        chosen[op] = picks
    run("build", "--gpu", "h100", *shape, "--ops", "extend,verify", "--out", pack)
    manifest = read_manifest(pack)
    for part in manifest.kernels:
        assert part.variants == chosen[part.spec.op].variants
        assert part.dispatch == chosen[part.spec.op].dispatch
    found = json.loads(run("inspect", pack, "--json").stdout)["kernels"]
    assert {kernel["schedules"] for kernel in found} == {"measured"} and len(found) == 2
    said = json.loads(run("explain", "--gpu", "h100", *shape, "--op", "verify", "--json").stdout)
    assert {row["workload"] for row in said["rank_errors"]} <= {"1x8of8192", "64x8of4096"}
    source = run("generate", "--gpu", "h100", *shape, "--op", "verify").stdout
    assert chosen[Op.VERIFY].variants[0].name in source
    assert "on such a device alone" in run("verify", "--records", "--gpu", "h100", code=1).stderr


def test_operators_without_batches_are_not_tuned(cache):
    refused = run("tune", *TINY, "--ops", "extend,write_kv", code=1).stderr
    assert "ops = 'write_kv'" in refused
    assert "a comma list of decode, extend, verify" in refused


def test_what_has_slipped_or_is_wrong_is_named_and_ends_with_1(cache, monkeypatch):
    stamp, schedule = stamp_here(TINY_SPEC, cpu_target()), feasible(TINY_SPEC, cpu_target())[0]
    kernel = kernel_hash(TINY_SPEC, cpu_target(), schedule)
    one = replace(
        modelled(SPEC, BATCH)[0], spec=TINY_SPEC, target="cpu", stamp=stamp, schedule=schedule, kernel=kernel
    )
    Database().save(Entry(TINY_SPEC, "cpu", (one,), select({one.schedule: {one.workload: one.time_us}})))
    slow = Timing(2 * one.time_us, one.time_us, one.time_us, 15)

    def found(*share: float, reason: str = "") -> None:
        row = Recheck(TINY_SPEC, one.schedule, one.workload, one.time_us, 0.9, slow, share[0], reason)
        monkeypatch.setattr(checking, "recheck", lambda *arguments, **named: (row,))

    found(0.9 * 0.96)
    assert "1 of 1 hold" in run("verify", "--records", "--cpu").stdout
    found(0.9 * 0.94)
    assert "slipped" in run("verify", "--records", "--cpu", code=1).stdout
    found(0.9, reason="wrong: error 1 where 0.01 is allowed")
    assert "wrong: error 1" in run("verify", "--records", "--cpu", code=1).stdout


def test_a_study_of_another_spec_is_refused_before_anything_runs(cache, tmp_path):
    storage = str(tmp_path / "study.log")
    Ledger(Grid(feasible(TINY_SPEC, cpu_target())), Place(storage, "mine"), {"spec": "decode-h64"}).close()
    refused = run("tune", *TINY, "--storage", storage, "--study", "mine", code=1)
    assert "study 'mine': spec = 'decode-h64' there, 'decode-h32-q2-kv1" in refused.stderr
    assert "names the study of one spec" in run("tune", *TINY, "--study", "mine", code=1).stderr


def run_any(*arguments: object):
    """Exit status 0 or 1: on a machine with neighbours a pick may have slipped."""
    result = runner.invoke(app, [str(a) for a in arguments])
    assert result.exit_code in (0, 1), result.output
    return result


def test_bad_input_is_named(cache, tmp_path):
    assert "either a PACK or --records" in run("verify", code=2).stderr
    assert "either a PACK or --records" in run("verify", tmp_path, "--records", code=2).stderr
    assert "a pack names" in run("verify", tmp_path, "--cpu", code=2).stderr
    assert (
        "can be checked on such a device alone" in run("verify", "--records", "--gpu", "a100", code=1).stderr
    )
    assert "nothing that was measured" in run("verify", "--records", "--cpu", code=1).stderr
    (tmp_path / "file").touch()
    assert "error: " in run("tune", *TINY, "--plots", tmp_path / "file" / "x", code=1).stderr
    bad = run("tune", *TINY, "--storage", "sqlite:////nowhere/x.db", code=1)
    assert "storage sqlite:////nowhere/x.db: unable to open database file" in bad.stderr
    assert "budget" in run("tune", *TINY, "--budget", "0", code=1).stderr
