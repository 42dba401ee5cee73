"""Model presets, Hugging Face configs, tensor parallelism and the specs that follow."""

from __future__ import annotations

import json

import pytest

from pagedgen.errors import InvalidValue, MalformedFile, UnknownModel, Unsupported
from pagedgen.values.model import decode_specs, dtype_pairs, find_model, preset, presets, read_config
from pagedgen.values.spec import DType, KVScale, Op

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
}


def _config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(fields), encoding="utf-8")
    return path


def test_every_preset_gives_a_legal_spec_and_names_its_source():
    names = [name for row in presets() for name in (row.model.name, *row.aliases)]
    assert len(names) == len(set(names)) and len(presets()) >= 12
    for row in presets():
        (spec,) = row.model.specs()
        assert spec.group_size * spec.num_kv_heads == row.model.num_q_heads
        assert row.model.source


def test_llama_3_8b():
    (spec,) = find_model("Llama-3_8B").specs(kv_dtypes=(DType.FP8_E4M3,))
    assert spec.name == "decode-h128-q32-kv8-b16-bf16-kvf8e4m3"
    assert spec.kv_scale is KVScale.TENSOR


def test_unknown_model_lists_presets():
    with pytest.raises(UnknownModel, match=r"unknown model 'gpt-9'; known: llama-3-8b, "):
        find_model("gpt-9")


@pytest.mark.parametrize(
    ("tp", "heads"), [(1, (64, 8)), (2, (32, 4)), (8, (8, 1)), (16, (4, 1)), (64, (1, 1))]
)
def test_tensor_parallelism_divides_heads_and_replicates_kv_heads(tp, heads):
    model = preset("llama-3-70b").shard(tp)
    assert (model.num_q_heads, model.num_kv_heads) == heads


@pytest.mark.parametrize(
    ("name", "tp"), [("llama-3-8b", 3), ("llama-3-8b", 0), ("qwen2.5-7b", 8), ("llama-3.2-3b", 16)]
)
def test_tensor_parallelism_that_does_not_divide(name, tp):
    with pytest.raises(InvalidValue, match=rf"tp = {tp}: 1, .* divide"):
        preset(name).shard(tp)


def test_products_and_what_follows_from_what():
    f16, bf16, fp8 = DType.F16, DType.BF16, DType.FP8_E4M3
    assert dtype_pairs((), (), bf16) == ((bf16, bf16),)
    assert dtype_pairs((f16,), (), bf16) == ((f16, f16),)
    assert dtype_pairs((), (f16, fp8), bf16) == ((f16, f16), (bf16, fp8))
    specs = preset("llama-3-8b").specs(block_sizes=(16, 64, 16), kv_dtypes=(bf16, fp8))
    assert [(s.block_size, s.kv_dtype) for s in specs] == [(16, bf16), (16, fp8), (64, bf16), (64, fp8)]
    with pytest.raises(InvalidValue, match="kv_dtype = 'f16'"):
        decode_specs([(128, 8, 8)], block_sizes=(16,), dtypes=dtype_pairs((bf16,), (f16,), bf16))


def test_gaps_are_said():
    assert preset("llama-3-8b").gaps() == ()
    assert any("window of 128" in gap and "other 12 layers" in gap for gap in preset("gpt-oss-20b").gaps())
    assert any("sinks" in gap for gap in preset("gpt-oss-20b").gaps())
    assert any("capped at 50" in gap for gap in preset("gemma-2-9b").gaps())
    assert any("up to 4096 tokens only" in gap for gap in preset("starcoder2").gaps())


def test_config_json_by_file_and_by_folder(tmp_path):
    path = _config(tmp_path, **LLAMA)
    model = read_config(path)
    assert (model.num_q_heads, model.num_kv_heads, model.head_dim, model.dtype) == (32, 8, 128, DType.BF16)
    assert model.name == tmp_path.name
    assert find_model(str(tmp_path)) == find_model(str(path)) == model


def test_missing_num_key_value_heads_means_mha_and_null_too(tmp_path):
    fields = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    assert read_config(_config(tmp_path, **fields)).num_kv_heads == 32
    assert read_config(_config(tmp_path, **fields, num_key_value_heads=None)).num_kv_heads == 32


def test_head_dim_wins_over_hidden_size(tmp_path):
    assert read_config(_config(tmp_path, **LLAMA, head_dim=64)).head_dim == 64


def test_nested_text_config_and_its_dtype(tmp_path):
    inner = {k: v for k, v in LLAMA.items() if k != "torch_dtype"}
    path = _config(tmp_path, model_type="mistral3", dtype="float16", text_config=inner, vision_config={})
    assert read_config(path).dtype is DType.F16


def test_falcon_has_one_kv_head(tmp_path):
    path = _config(
        tmp_path,
        n_layer=32,
        hidden_size=4544,
        n_head=71,
        multi_query=True,
        num_kv_heads=71,
        model_type="falcon",
    )
    model = read_config(path)
    assert (model.num_q_heads, model.num_kv_heads, model.head_dim) == (71, 1, 64)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, False),
        ({"model_type": "bloom"}, True),
        ({"model_type": "mpt"}, True),
        ({"model_type": "mpt", "attn_config": {"alibi": False}}, False),
        ({"model_type": "falcon", "alibi": True}, True),
        ({"model_type": "falcon", "alibi": False}, False),
    ],
)
def test_slopes_are_seen_and_asked_for(tmp_path, fields, expected):
    model = read_config(_config(tmp_path, **LLAMA | fields))
    assert model.alibi is expected and any("ALiBi" in gap for gap in model.gaps()) is expected
    specs = model.serving_specs(model.specs(), (Op.DECODE, Op.EXTEND, Op.WRITE_KV))
    assert [spec.alibi for spec in specs] == [expected, expected, False]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"sliding_window": 4096, "use_sliding_window": False}, (0, 0)),  # qwen2
        ({"sliding_window": 262144, "max_position_embeddings": 131072}, (0, 0)),  # phi-3, 128k
        ({"sliding_window": 4096, "max_position_embeddings": 16384}, (4096, 32)),  # starcoder2
        ({"sliding_window": 1024, "sliding_window_pattern": 6}, (1024, 27)),  # gemma 3
        ({"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 16}, (128, 16)),
        ({"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 28}, (4096, 4)),
        ({"sliding_window": None}, (0, 0)),
    ],
)
def test_sliding_windows(tmp_path, fields, expected):
    model = read_config(_config(tmp_path, **LLAMA, **fields))
    assert (model.sliding_window, model.window_layers) == expected


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_attention_heads": None}, "num_attention_heads: None"),
        ({"num_attention_heads": "32"}, "num_attention_heads: '32'"),
        ({"num_attention_heads": 24, "num_key_value_heads": 5, "head_dim": 128}, "num_q_heads: 24"),
        ({"hidden_size": 4100}, "hidden_size: 4100.*multiple of num_attention_heads"),
        ({"torch_dtype": "int4"}, "dtype: 'int4'"),
        ({"sliding_window": "wide"}, "sliding_window: 'wide'"),
    ],
)
def test_malformed_configs_name_the_field(tmp_path, change, problem):
    with pytest.raises(MalformedFile, match=problem):
        read_config(_config(tmp_path, **{**LLAMA, **change}))


def test_files_that_are_no_config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(MalformedFile, match="JSON"):
        read_config(path)
    path.write_text("[1]", encoding="utf-8")
    with pytest.raises(MalformedFile, match="an object is expected"):
        read_config(path)


def test_latent_attention_is_refused_by_name(tmp_path):
    with pytest.raises(Unsupported, match="kv_lora_rank = 512"):
        read_config(_config(tmp_path, **LLAMA, kv_lora_rank=512))
