"""build --model and inspect: a pack with all that serving a model takes, and what is said of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pagedgen.cli.app import app
from pagedgen.errors import InvalidValue
from pagedgen.integrations.serving_pack import Layer, ServingPack
from pagedgen.runtime.pack import open_pack, read_manifest
from pagedgen.values.record import Verdict
from pagedgen.values.spec import DType, Op

BF16 = DType.BF16
MODEL = {
    "model_type": "gpt_oss", "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 64, "num_hidden_layers": 4, "sliding_window": 128, "max_position_embeddings": 4096,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAGEDGEN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def model_pack(tmp_path_factory):
    """A pack for a model with sinks and two kinds of layers, for a GPU, and what its making said."""
    folder = tmp_path_factory.mktemp("packs")
    (folder / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    pack = folder / "model.pack"
    return pack, run("build", "--gpu", "h100", "--model", folder / "config.json", "--out", pack)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are gated where such a GPU is")
def test_a_models_pack_serves_every_layer(model_pack):
    pack, said = model_pack
    serving = ServingPack(open_pack(pack))
    for window in (128, None):
        layer = Layer(64, 8, 2, BF16, BF16, window=window, sinks=True)
        serving.check(layer)
        assert [spec.op for spec in serving.kernels(layer, 16).all] == [Op.DECODE, Op.EXTEND, Op.WRITE_KV]
    assert len(serving.specs) == 5  # writing is the same for both
    assert sum(path.stat().st_size for path in pack.rglob("*") if path.is_file()) < 2e6
    assert "nothing is recorded, default schedules were taken for decode-h64-q8-kv2-b16-bf16" in said.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are gated where such a GPU is")
def test_inspect_shows_what_is_there_and_what_is_not_known(model_pack):
    pack, _ = model_pack
    data = json.loads(run("inspect", pack, "--json").stdout)
    assert (data["target"], data["kind"], data["arch"]) == ("h100-sxm", "cuda", "sm_90")
    assert data["serves_block_sizes"] == [16]
    assert data["bytes"] == sum(path.stat().st_size for path in pack.rglob("*") if path.is_file())
    assert len(data["digest"]) == 16 and len(data["kernels"]) == 5
    for kernel in data["kernels"]:
        assert (kernel["schedules"], kernel["gate"], kernel["stamps"]) == (
            "default", {"when": None, "verdicts": []}, []
        )  # fmt: skip
    table = run("inspect", pack).stdout
    assert "decode-h64-q8-kv2-b16-bf16-window128-sinks" in table and "not run: no such device" in table
    library = next(pack.glob("lib/*.so"))
    library.write_bytes(library.read_bytes()[:-1] + b"x")
    assert "was altered" in run("inspect", pack, code=1).stderr
    assert "is not a folder" in run("inspect", pack.parent / "none", code=1).stderr


def test_kernels_for_a_device_that_is_here_are_gated_and_the_verdicts_kept(cpu_target, tmp_path, monkeypatch):
    pytest.importorskip("tvm")
    shape = ("--head-dim", 32, "--num-q-heads", 2, "--num-kv-heads", 1, "--q-dtype", "f32")
    pack = tmp_path / "cpu.pack"
    run("build", "--cpu", *shape, "--ops", "decode,write_kv", "--out", pack)
    data = json.loads(run("inspect", pack, "--json").stdout)
    assert [kernel["spec"]["op"] for kernel in data["kernels"]] == ["decode", "write_kv"]
    for kernel in data["kernels"]:
        (verdict,) = kernel["gate"]["verdicts"]
        assert kernel["gate"]["when"] == "build" and verdict["passed"] and verdict["cases"] > 0
        assert kernel["schedules"] == "default"
    assert "1 of 1 passed, at build" in run("inspect", pack).stdout
    wrong = Verdict(False, 1, 1.0, 0.1, 0, "made up")
    monkeypatch.setattr("pagedgen.cli.build.verdict_on", lambda *args, **options: wrong)
    again = tmp_path / "again.pack"
    said = run("build", "--cpu", *shape, "--ops", "write_kv", "--out", again, code=1).stderr
    assert "write_kv-h32-kv1-b16-f32-ktoken: " in said and "made up" in said and not again.exists()


def test_what_there_are_no_kernels_for_is_named(tmp_path):
    said = run("build", "--gpu", "h100", "--ops", "decode,prefill", code=1).stderr
    assert "ops = 'prefill': a comma list of decode, extend" in said
    place = ("--out", tmp_path / "x.pack")
    config = Path(tmp_path / "config.json")
    config.write_text(json.dumps(MODEL | {"head_dim": 512}), encoding="utf-8")
    said = run("build", "--gpu", "h100", "--model", config, *place, code=1).stderr
    assert "head_dim = 512" in said and not (tmp_path / "x.pack").exists()


def test_verdicts_are_one_a_variant(model_pack):
    entry = read_manifest(model_pack[0]).kernels[0]
    verdict = Verdict(True, 1, 0.0, 0.1, 0)
    with pytest.raises(InvalidValue, match="verdicts = 2: none, or 1, are allowed"):
        replace(entry, verdicts=(verdict, verdict))
