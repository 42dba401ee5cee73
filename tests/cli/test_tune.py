"""tune, build and verify for real: predicted for a GPU that is not here, measured on this CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "autotune"))  # workers import the functions by name

import worker_functions as functions

from pagedgen.autotune import tune as tuner
from pagedgen.autotune.tune import Effort, Plan
from pagedgen.cli.app import app
from pagedgen.cli.batches import MOST_BYTES, workloads_of
from pagedgen.values.record import Verdict
from pagedgen.values.trace import SAMPLE

runner = CliRunner()
TINY = ("--head-dim", "32", "--num-q-heads", "2", "--num-kv-heads", "1")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAGEDGEN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def run(*arguments: object, code: int = 0):
    result = runner.invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.mark.skipif(torch.cuda.is_available(), reason="predictions are for machines without that GPU")
def test_a_gpu_that_is_not_here_is_predicted_and_nothing_claims_a_measurement(tmp_path):
    pack = tmp_path / "llama.a100.pack"
    options = ("--gpu", "a100", "--model", "llama-3-8b", "--kv-dtype", "fp8_e4m3")
    result = run("tune", *options, "--effort", "quick", "--json")
    assert "not on this machine: times are predictions" in result.stderr
    (tuned,) = json.loads(result.stdout)["results"]
    assert tuned["status"] == "predicted" and tuned["roofline_gbs"] is None
    for row in tuned["workloads"]:
        assert row["timing"] is None and row["roofline_share"] is None
        assert row["time_us"] == row["predicted_us"] > 0

    result = run("build", *options, "--out", pack)
    assert "warning: schedules were chosen by the cost model: predicted, not measured" in result.stderr
    assert "measured" not in result.stdout and "predicted" in result.stdout
    manifest = json.loads((pack / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["arch"] == "sm_80"
    assert {record["status"] for record in manifest["kernels"][0]["records"]} == {"predicted"}
    assert any(path.suffix == ".cubin" for path in pack.rglob("*"))

    result = run("verify", pack, "--json")
    assert "kernels were not run" in result.stderr
    checked = json.loads(result.stdout)
    assert checked["intact"] and not checked["run"] and checked["verdicts"] == []

    library = next(pack.glob("lib/*.so"))
    library.write_bytes(library.read_bytes()[:-1])
    assert f"error: {library}" in run("verify", pack, code=1).stderr

    assert "predicted, " in run("generate", *options).stderr  # the recorded schedule, and from where


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A tiny spec tuned on this CPU from a trace, as JSON, and its pack."""
    pack = tmp_path_factory.mktemp("packs") / "tiny.pack"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner, "PLANS", {Effort.QUICK: Plan(4, 4, 5.0, (2,), 3, 2)})
        patch.setattr(tuner, "SIMPLER", 0)
        options = ("--trace", "sample", "--effort", "quick", "--budget", "5s", "--out", pack, "--json")
        result = run("tune", "--cpu", *TINY, *options)
    return json.loads(result.stdout), pack


def test_this_cpu_is_measured_and_its_pack_decodes(tuned):
    data, pack = tuned
    (result,) = data["results"]
    assert result["status"] == "measured" and result["roofline_gbs"] > 0
    assert [w["num_seqs"] for w in result["workloads"]] == [1, 4, 16, 64]
    for row in result["workloads"]:
        assert row["timing"]["low_us"] <= row["time_us"] == row["timing"]["median_us"]
    assert data["pack"]["kernels"][0]["status"] == "measured"
    assert len(data["called"]) == 4
    for row in data["called"]:
        assert 0 <= row["error"] <= row["allowed"] and row["call_us"] > 0
    assert (pack / "manifest.json").is_file()


def test_its_pack_passes_the_gate(tuned):
    verdicts = json.loads(run("verify", tuned[1], "--seed", "3", "--json").stdout)["verdicts"]
    assert verdicts[0]["kernel"] == "dispatch table" and len(verdicts) >= 2
    assert all(v["passed"] and v["seed"] == 3 for v in verdicts)


def test_the_same_pack_is_built_from_the_records(tuned, tmp_path):
    run("build", "--cpu", *TINY, "--out", tmp_path / "again.pack")
    first, again = (
        json.loads((p / "manifest.json").read_text()) for p in (tuned[1], tmp_path / "again.pack")
    )
    assert [k["variants"] for k in first["kernels"]] == [k["variants"] for k in again["kernels"]]
    assert [k["dispatch"] for k in first["kernels"]] == [k["dispatch"] for k in again["kernels"]]


@pytest.fixture
def changed(tuned, tmp_path, monkeypatch):
    """The record file of the tuned spec in a cache of its own, to be changed."""
    monkeypatch.setenv("PAGEDGEN_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "cache" / "records" / "cpu" / Path(tuned[0]["results"][0]["records"]).name
    path.parent.mkdir(parents=True)
    path.write_text(Path(tuned[0]["results"][0]["records"]).read_text())
    return path


def test_build_says_why_records_do_not_serve(changed, tmp_path):
    pack = tmp_path / "x.pack"
    data = json.loads(changed.read_text())
    changed.write_text(json.dumps({**data, "selection": None}))
    refused = run("build", "--cpu", *TINY, "--out", pack, code=1).stderr
    assert f"tuning did not finish, {changed} holds no selection" in refused
    stamps = [{**stamp, "device": "an abacus"} for stamp in data["stamps"]]
    changed.write_text(json.dumps({**data, "stamps": stamps}))
    refused = run("build", "--cpu", *TINY, "--out", pack, code=1).stderr
    assert f"{changed} is of other kernels, another version or device" in refused
    assert not pack.exists()


def test_build_packs_no_kernel_that_is_wrong_now(changed, tmp_path, monkeypatch):
    wrong = Verdict(False, 2, 1.0, 0.1, 0, "error 1 where 0.1 is allowed")
    monkeypatch.setattr("pagedgen.cli.build.verdict_on", lambda *args, **options: wrong)
    refused = run("build", "--cpu", *TINY, "--out", tmp_path / "x.pack", code=1).stderr
    assert "error 1 where 0.1 is allowed; run pagedgen tune" in refused
    assert not (tmp_path / "x.pack").exists()


def test_a_kernel_that_crashes_costs_verify_a_verdict_not_its_life(tuned, monkeypatch):
    monkeypatch.setattr("pagedgen.autotune.gating.gate_variant", functions.crashing_gate)
    result = run("verify", tuned[1], "--json", code=1)
    verdicts = json.loads(result.stdout)["verdicts"]
    assert all(not v["passed"] and "SIGSEGV" in v["reason"] for v in verdicts)


def test_what_cannot_work_is_refused_before_anything_is_tuned(tmp_path):
    place = tmp_path / "mine"
    place.mkdir()
    (place / "thesis.txt").write_text("precious", encoding="utf-8")
    tiny = ("tune", "--cpu", *TINY)
    assert "is not a pack" in run(*tiny, "--out", place, code=1).stderr
    assert "effort = 'hard': allowed: quick, standard, max" in run(*tiny, "--effort", "hard", code=1).stderr
    assert "budget = 'soon'" in run(*tiny, "--budget", "soon", code=1).stderr
    assert "No such file" in run(*tiny, "--trace", tmp_path / "none.csv", code=1).stderr
    bad = tmp_path / "bad.csv"
    bad.write_text("prompt,output\n5,x\n", encoding="utf-8")
    assert f"{bad}: line 2: output = 'x'" in run(*tiny, "--trace", bad, code=1).stderr


def test_batches_that_need_too_much_memory_are_left_out(make_spec, capsys):
    spec = make_spec(256, (128, 128), 16, "f32", k_inner="token")  # 256 KiB a token
    kept = workloads_of(spec, "cpu", SAMPLE, 0)
    assert 1 <= len(kept) < 4
    assert all(w.cache_bytes(spec) <= MOST_BYTES["cpu"] for w in kept) or len(kept) == 1
    assert "left out: sample-trace-64" in capsys.readouterr().err
