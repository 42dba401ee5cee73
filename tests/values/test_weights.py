"""Parameters of the presets against published totals, and what a step reads and multiplies."""

from __future__ import annotations

import json

import pytest

from pagedgen.errors import InvalidValue, MalformedFile, UnknownModel
from pagedgen.values.model import presets
from pagedgen.values.weights import FeedForward, Weights, find_weights, table

# Billions, as the models' cards or their safetensors indices state them.
PUBLISHED = {
    "llama-3-8b": 8.03, "llama-3-70b": 70.55, "llama-3-405b": 405.85, "llama-3.2-1b": 1.236,
    "llama-3.2-3b": 3.213, "mistral-7b": 7.248, "mixtral-8x7b": 46.70, "qwen2.5-7b": 7.616,
    "qwen2.5-72b": 72.71, "qwen3-8b": 8.19, "qwen3-32b": 32.76, "qwen3-30b-a3b": 30.53, "gemma-2-9b": 9.24,
    "gemma-3-27b": 27.0, "phi-3-mini": 3.82, "phi-2": 2.78, "falcon-7b": 6.92, "starcoder2-7b": 7.17,
    "starcoder2-15b": 15.96, "gpt-oss-20b": 20.91, "gpt-oss-120b": 116.83, "deepseek-llm-7b": 6.91,
    "glm-4-9b": 9.40, "olmo-2-7b": 7.30, "granite-3.3-8b": 8.17,
}  # fmt: skip


def test_every_preset_has_weights():
    assert set(table()) == {row.model.name for row in presets()} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_the_published_ones(name):
    assert find_weights(name).num_params / 1e9 == pytest.approx(PUBLISHED[name], rel=0.01)


def test_what_a_step_reads_and_multiplies():
    dense = Weights(dense=1000, head=100, embedding=100, bytes_per_param=2)
    assert dense.num_bytes == 2400
    assert dense.bytes_read(1) == dense.bytes_read(500) == 2200
    assert dense.flops(10, 3) == 2 * (10 * 1000 + 3 * 100)
    sparse = Weights(1000, 100, 100, 2, expert=10, num_experts=8, experts_per_token=2)
    assert sparse.bytes_read(1) == pytest.approx(2 * (1100 + 2 * 10))  # one token reads its own experts
    assert sparse.bytes_read(10_000) == pytest.approx(2 * (1100 + 8 * 10))
    assert sparse.flops(10, 0) == 2 * 10 * (1000 + 2 * 10)


def test_ranks_divide_the_weights():
    whole, part = find_weights("llama-3-70b"), find_weights("llama-3-70b", 4)
    assert part.num_params == pytest.approx(whole.num_params / 4, rel=1e-6)


CONFIG = {
    "num_hidden_layers": 2, "hidden_size": 640, "num_attention_heads": 10, "vocab_size": 1000,
    "intermediate_size": 1280,
}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "params"),
    [
        ({}, 2 * (4 * 640 * 640 + 3 * 640 * 1280) + 2 * 640_000),
        ({"tie_word_embeddings": True}, 2 * (4 * 640 * 640 + 3 * 640 * 1280) + 640_000),
        ({"model_type": "phi"}, 2 * (4 * 640 * 640 + 2 * 640 * 1280) + 2 * 640_000),
        (
            {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
            2 * (4 * 640 * 640 + 4 * 3 * 640 * 64) + 2 * 640_000,
        ),
    ],
)
def test_a_config_has_weights(tmp_path, more, params):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG, **more}), encoding="utf-8")
    assert find_weights(str(path)).num_params == params


def test_bad_sizes_are_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "vocab_size"}), encoding="utf-8")
    with pytest.raises(MalformedFile, match="vocab_size: None"):
        find_weights(str(path))
    path.write_text(json.dumps({**CONFIG, "num_experts": 4}), encoding="utf-8")
    with pytest.raises(MalformedFile, match=r"experts_per_token: 0: 1 to num_experts \(4\)"):
        find_weights(str(path))
    with pytest.raises(UnknownModel):
        find_weights("no-such-model")
    with pytest.raises(InvalidValue, match="vocab_size = 0"):
        FeedForward("x", 1, 0)
