"""Which kernels of a pack serve a layer, and what is said where none do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pagedgen.errors import PackDamaged, PackNotChosen, SpecNotInPack, Unsupported, VersionUnmet
from pagedgen.integrations.serving_pack import (
    OPERATORS,
    Layer,
    ServingPack,
    chosen_pack,
    command,
    refuse,
    require_version,
)
from pagedgen.values.spec import DType, KInner, Op

LAYER = Layer(64, 8, 2, DType.F16, DType.FP8_E4M3, window=100, logits_soft_cap=30.0, sinks=True)
PLAIN = Layer(64, 8, 2, DType.F16, DType.F16)


@pytest.fixture
def serving():
    """Everything for LAYER over blocks of 16 and 32; decode alone for PLAIN, over blocks of 64."""
    specs = [LAYER.spec(op, size, KInner.DIM) for size in (16, 32) for op in OPERATORS]
    specs.append(PLAIN.spec(Op.DECODE, 64, KInner.DIM))
    manifest = SimpleNamespace(
        kind="cuda", target="h100-sxm", kernels=[SimpleNamespace(spec=spec) for spec in specs]
    )
    return ServingPack(SimpleNamespace(path=Path("x.pack"), manifest=manifest))


def test_a_layer_gets_its_three_kernels(serving):
    serving.check(LAYER)
    found = serving.kernels(LAYER, 32)
    assert [spec.op for spec in found.all] == list(OPERATORS)
    assert {spec.block_size for spec in found.all} == {32}
    assert found.decode.window == found.extend.window == 100 and found.write_kv.window is None
    assert found.decode.sinks and found.decode.logits_soft_cap == 30.0
    assert found.write_kv.num_q_heads == found.write_kv.num_kv_heads == 2
    assert set(found.all) <= serving.specs


def test_block_sizes_are_those_that_have_all_operators(serving):
    assert serving.block_sizes() == (16, 32)  # 64 has decode alone
    assert serving.block_sizes(head_dim=64, num_kv_heads=2) == (16, 32)
    assert serving.block_sizes(num_kv_heads=4) == ()
    assert serving.k_inner is KInner.DIM


@pytest.mark.parametrize(
    ("layer", "block_size", "missing"),
    [
        (LAYER, 64, ("decode-h64-q8-kv2-b64", "extend-", "write_kv-")),
        (Layer(64, 8, 2, DType.F16, DType.FP8_E4M3), 16, ("decode-h64-q8-kv2-b16-f16-kvf8e4m3, extend-",)),
        (PLAIN, 64, ("extend-h64-q8-kv2-b64-f16, write_kv-h64-kv2-b64-f16",)),
    ],
)
def test_what_is_missing_is_named_with_the_command(serving, layer, block_size, missing):
    with pytest.raises(SpecNotInPack) as caught:
        serving.kernels(layer, block_size)
    text = str(caught.value)
    assert all(name in text for name in missing)
    assert "x.pack" in text and "it holds decode-h64" in text and "and 1 more" in text
    assert text.endswith(f"To get them:\n  {command(layer, block_size, KInner.DIM, 'h100-sxm')}")


def test_a_layer_that_no_block_size_serves_is_refused_early(serving):
    with pytest.raises(SpecNotInPack, match="it has no decode-h128-q8-kv2-b32-f16"):
        serving.check(Layer(128, 8, 2, DType.F16, DType.F16))


def test_the_command_states_the_layer():
    assert command(PLAIN, 16, KInner.TOKEN, "cpu") == (
        "pagedgen build --cpu --head-dim 64 --num-q-heads 8 --num-kv-heads 2 --block-size 16 --q-dtype f16 "
        "--kv-dtype f16 --k-inner token --ops decode,extend,write_kv --out model.pack"
    )
    first, then, _ = command(LAYER, 16, KInner.DIM, "h100-sxm").split("\n")
    assert first == (
        "pagedgen build --gpu h100-sxm --model PATH --block-size 16 --q-dtype f16 --kv-dtype fp8_e4m3 "
        "--k-inner dim --out model.pack"
    )
    assert "config.json for PATH" in then


@pytest.mark.parametrize("layer", [PLAIN, LAYER])
def test_the_command_is_one_that_is_there(layer, tmp_path):
    """Its options make the specs that were asked for."""
    from pagedgen.cli.app import SERVING
    from pagedgen.cli.options import Job

    config = {
        "model_type": "gpt_oss", "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 64, "num_hidden_layers": 2, "sliding_window": 100, "attn_logit_softcapping": 30.0,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    words = iter(command(layer, 32, KInner.DIM, "h100-sxm").split("\n")[0].split()[2:])
    options = {word.removeprefix("--").replace("-", "_"): next(words) for word in words}
    assert options.pop("out") == "model.pack"
    if "model" in options:
        options |= {"model": str(tmp_path), "ops": SERVING}
    unset = ("cpu", "model", "head_dim", "num_q_heads", "num_kv_heads")
    job = Job.of(**{**dict.fromkeys(unset), "tp": 1, "kv_scale": "tensor", "lse": False} | options)
    assert set(job.specs) >= {layer.spec(op, 32, KInner.DIM) for op in OPERATORS}
    assert len(job.specs) == (3 if layer is PLAIN else 5)


def test_the_pack_is_named_by_the_environment(monkeypatch, cpu_pack, tmp_path):
    monkeypatch.delenv("PAGEDGEN_PACK", raising=False)
    with pytest.raises(PackNotChosen, match="PAGEDGEN_PACK is not set"):
        chosen_pack()
    monkeypatch.setenv("PAGEDGEN_PACK", str(tmp_path / "none"))
    with pytest.raises(PackDamaged, match="none is not a folder"):
        chosen_pack()
    monkeypatch.setenv("PAGEDGEN_PACK", str(cpu_pack))
    assert chosen_pack() is chosen_pack()
    assert chosen_pack().specs == set(chosen_pack().attention.specs)


@pytest.mark.parametrize(("version", "good"), [
    ("0.32.0", True), ("0.33.1+cpu", True), ("0.31.9", False), ("0.34.0rc1", False), ("dev", False),
])  # fmt: skip
def test_versions(version, good):
    if good:
        require_version("vllm", version, (0, 32), (0, 34))
        return
    with pytest.raises(VersionUnmet, match=r">=0\.32,<0\.34 is supported: pip install 'vllm>=0\.32,<0\.34'"):
        require_version("vllm", version, (0, 32), (0, 34))


@pytest.mark.parametrize(("version", "good"), [
    ("0.5.23", True), ("0.5.23.post1", True), ("0.5.100", True), ("0.5.22", False), ("0.5", False),
    ("0.6", False),
])  # fmt: skip
def test_versions_down_to_the_patch(version, good):
    if good:
        require_version("sglang", version, (0, 5, 23), (0, 6))
        return
    with pytest.raises(VersionUnmet, match=r"pip install 'sglang>=0\.5\.23,<0\.6'"):
        require_version("sglang", version, (0, 5, 23), (0, 6))


def test_a_refused_feature_is_named():
    with pytest.raises(Unsupported, match=r"alibi_slopes = \[0.5\]: none; choose another attention backend"):
        refuse("alibi_slopes", [0.5], "none")


def test_nothing_of_the_compilers_is_imported():
    code = (
        "import sys, pagedgen.integrations.serving_pack, pagedgen.integrations.vllm\n"
        "import pagedgen.integrations.sglang\n"
        "tools = {'triton', 'tvm', 'optuna', 'sympy', 'jinja2', 'vllm', 'sglang'}\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & tools))\n"
        "print([n for n in sys.modules if n.startswith(('pagedgen.compiler', 'pagedgen.autotune'))])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.split() == ["[]", "[]"]
