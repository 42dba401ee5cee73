"""The fields of a Hugging Face ``config.json`` that attention depends on, under one set of names.

Families spell them differently; what is not stated means what transformers takes it to mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagedgen.errors import InvalidValue, Unsupported

TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
SPELLINGS = {
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"),
    "head_dim": ("head_dim", "kv_channels"),
}
REFUSED = {
    "kv_lora_rank": "latent attention (MLA) has no template",
    "global_head_dim": "layers with different head_dim need a spec each: give --head-dim, --num-q-heads and "
    "--num-kv-heads",
    "block_configs": "layers with different heads need a spec each: give --head-dim, --num-q-heads and "
    "--num-kv-heads",
}
DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def attention_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``Model`` but its name and source, as JSON data.

    Raises:
        InvalidValue: a field is missing or wrong.
        Unsupported: attention of a kind that there are no kernels for.
    """
    text = config
    for nested in TEXT_CONFIGS:
        if isinstance(config.get(nested), Mapping):
            text = {**{k: v for k, v in config.items() if k in ("dtype", "torch_dtype")}, **config[nested]}
            break
    for field, why in REFUSED.items():
        if text.get(field):
            raise Unsupported(f"{field} = {text[field]!r:.40}: {why}")
    heads = _integer(text, "num_attention_heads")
    hidden = _integer(text, "hidden_size")
    layers = _integer(text, "num_hidden_layers")
    window, window_layers = _window(text, layers)
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_q_heads": heads,
        "num_kv_heads": _kv_heads(text, heads),
        "head_dim": _head_dim(text, hidden, heads),
        "dtype": _dtype(text),
        "sliding_window": window,
        "window_layers": window_layers,
        "logit_softcap": float(text.get("attn_logit_softcapping") or 0.0),
        "sinks": text.get("model_type") == "gpt_oss",
        "alibi": _alibi(text),
    }


def _find(config: Mapping[str, Any], name: str) -> Any:
    for spelling in SPELLINGS[name]:
        if config.get(spelling) is not None:
            return config[spelling]
    return None


def _integer(config: Mapping[str, Any], name: str) -> int:
    value = _find(config, name)
    if type(value) is not int or value < 1:
        raise InvalidValue(name, value, f"a positive integer is expected (as {' or '.join(SPELLINGS[name])})")
    return value


def _kv_heads(config: Mapping[str, Any], heads: int) -> int:
    # Falcon before its "new decoder architecture" has one KV head, whatever num_kv_heads says.
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    return heads if _find(config, "num_key_value_heads") is None else _integer(config, "num_key_value_heads")


def _head_dim(config: Mapping[str, Any], hidden: int, heads: int) -> int:
    if _find(config, "head_dim") is not None:
        return _integer(config, "head_dim")
    if hidden % heads:
        allowed = f"without head_dim, a multiple of num_attention_heads ({heads}) is expected"
        raise InvalidValue("hidden_size", hidden, allowed)
    return hidden // heads


def _alibi(config: Mapping[str, Any]) -> bool:
    """Whether heads have slopes: all BLOOMs, MPTs and Falcons that say so (MPT's own default is to)."""
    if config.get("model_type") == "mpt":
        return bool((config.get("attn_config") or {}).get("alibi", True))
    return config.get("model_type") == "bloom" or bool(config.get("alibi"))


def _dtype(config: Mapping[str, Any]) -> str:
    """The dtype of the weights; ``bfloat16`` where the config does not say."""
    value = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if value not in DTYPES:
        raise InvalidValue("dtype", value, f"allowed: {', '.join(DTYPES)}")
    return DTYPES[value]


def _window(config: Mapping[str, Any], layers: int) -> tuple[int, int]:
    """(tokens, layers that have it); (0, 0) where no layer's window is shorter than the context."""
    window = config.get("sliding_window")
    if window is None or config.get("use_sliding_window") is False:
        return 0, 0
    if type(window) is not int or window < 0:
        raise InvalidValue("sliding_window", window, "tokens, or null, are expected")
    if window == 0 or window >= config.get("max_position_embeddings", window + 1):
        return 0, 0
    kinds = config.get("layer_types")
    pattern = config.get("sliding_window_pattern")
    if isinstance(kinds, list):
        count = sum(kind == "sliding_attention" for kind in kinds[:layers])
    elif type(pattern) is int and pattern > 1:  # every pattern-th layer sees everything
        count = layers - layers // pattern
    elif config.get("model_type") in ("gemma2", "gpt_oss"):  # every other one
        count = (layers + 1) // 2
    elif config.get("use_sliding_window") and type(config.get("max_window_layers")) is int:
        count = max(0, layers - config["max_window_layers"])
    else:
        count = layers
    return (window, count) if count else (0, 0)
