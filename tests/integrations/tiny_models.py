"""Random models of a few layers, written as Hugging Face folders that a serving stack loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 512
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,  # logits far enough apart that rounding does not choose the token
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SLIDING = ["sliding_attention", "full_attention"] * 2
# transformers' config class and what differs from COMMON.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"num_attention_heads": 6}),
    "mistral-window": ("MistralConfig", {"sliding_window": 48}),
    "gemma2": (
        "Gemma2Config",
        {
            "sliding_window": 48,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 32,
            "layer_types": SLIDING,
            "tie_word_embeddings": True,
        },
    ),
    "llama4": (  # attention in chunks; dense layers, of which the last sees all tokens and rotates nothing
        "Llama4TextConfig",
        {
            "attention_chunk_size": 64,
            "intermediate_size_mlp": 256,
            "interleave_moe_layer_step": 8,
            "num_local_experts": 1,
            "no_rope_layers": [1, 1, 1, 0],
        },
    ),
    "bloom": ("BloomConfig", {"num_key_value_heads": 4, "tie_word_embeddings": True}),  # ALiBi
    "gpt-oss": (
        "GptOssConfig",
        {"sliding_window": 48, "layer_types": SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}


def write(name: str, folder: Path, seed: int = 0) -> None:
    """Write ``MODELS[name]`` with random weights in float32 to ``folder``."""
    import torch
    import transformers

    config_class, changes = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**{**COMMON, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in (p for n, p in model.named_parameters() if n.endswith("sinks")):
        torch.nn.init.normal_(parameter)
    if config.tie_word_embeddings:  # else the embedding outweighs the layers, and every token repeats itself
        model.get_input_embeddings().weight.data.mul_(0.01)
    model.save_pretrained(folder)


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer to ``folder``: a token a byte from 3 on, then made-up words."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<s>", "</s>", *letters, *(f"[{i}]" for i in range(3 + len(letters), VOCABULARY))]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
