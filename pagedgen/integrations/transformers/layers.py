"""The attention layers of a transformers model: which modules they are, and what each asks of kernels."""

from __future__ import annotations

from typing import Any

import torch

from pagedgen.integrations.serving_pack import Layer, lookup, refuse
from pagedgen.values.spec import DType

DTYPES = {torch.float16: DType.F16, torch.bfloat16: DType.BF16, torch.float32: DType.F32}
LAYER_TYPES = ("full_attention", "sliding_attention")


def layers_of(model: Any) -> dict[torch.nn.Module, Layer]:
    """The model's attention modules, in the order that they run in, with what they ask of kernels.

    Raises:
        Unsupported: the model, or one of its layers, has what no kernel computes; names it.
    """
    config = model.config.get_text_config()
    dtype = lookup("dtype", model.dtype, DTYPES)
    if getattr(model, "_device_mesh", None) is not None:
        refuse("tp_plan", "given", "the plug-in serves models on one device")
    for field in ("kv_lora_rank", "attention_chunk_size"):
        if getattr(config, field, None) is not None:
            refuse(field, getattr(config, field), "pagedgen's plug-in has no such attention")
    if getattr(config, "is_encoder_decoder", False):
        refuse("is_encoder_decoder", True, "pagedgen's kernels are those of decoder layers")
    for kind in getattr(config, "layer_types", None) or ():
        if kind not in LAYER_TYPES:
            refuse("layer_types", kind, f"pagedgen's plug-in serves {' and '.join(LAYER_TYPES)}")
    found = {
        module: _layer(module, config, dtype)
        for module in model.modules()
        if all(hasattr(module, name) for name in ("layer_idx", "head_dim", "is_causal"))
    }
    numbers = [module.layer_idx for module in found]
    if numbers != list(range(config.num_hidden_layers)):
        why = f"its {config.num_hidden_layers} layers are not all attention of the usual form"
        refuse("model", type(model).__name__, why)
    return found


def _layer(module: Any, config: Any, dtype: DType) -> Layer:
    if not module.is_causal:
        refuse("is_causal", False, "pagedgen's plug-in serves causal attention")
    heads = config.num_attention_heads
    return Layer(
        head_dim=module.head_dim,
        num_q_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        q_dtype=dtype,
        kv_dtype=dtype,
        window=_window(module, config),
        logits_soft_cap=_cap(getattr(module, "attn_logit_softcapping", None)),
        sinks=getattr(module, "sinks", None) is not None,
    )


def _window(module: Any, config: Any) -> int | None:
    """Tokens that a query sees, its own included."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[module.layer_idx] == "full_attention":
        return None
    window = getattr(module, "sliding_window", None)
    if window is None and (kinds is not None or getattr(config, "use_sliding_window", True)):
        window = getattr(config, "sliding_window", None)
    return window


def _cap(value: float | None) -> float | None:
    return float(value) if value else None


def check_call(layer: Layer, window: int | None, soft_cap: float | None, sinks: torch.Tensor | None) -> None:
    """Whether a call of the attention asks for what its module was taken for.

    Raises:
        Unsupported: it does not: a model that the plug-in does not understand.
    """
    asked = (window, _cap(soft_cap), sinks is not None)
    planned = (layer.window, layer.logits_soft_cap, layer.sinks)
    if asked != planned:
        refuse("window, soft cap, sinks", asked, f"the model's modules say {planned}")
