"""``attach``: a transformers model whose attention runs on the kernels of a pack.

transformers keeps what it must be told about an attention in three places: a function by the name of the
implementation, the configuration of a manager of continuous batches, and the groups that layers' caches are
in. Each is served here for models that were attached, and no other.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import cache as cb_cache
from transformers.generation.continuous_batching import initialization as cb_initialization

from pagedgen.integrations.serving_pack import ServingPack, chosen_pack, refuse, require_version
from pagedgen.integrations.transformers.attached import Attached
from pagedgen.integrations.transformers.attend import attend
from pagedgen.integrations.transformers.paged_cache import PagedCache
from pagedgen.runtime.pack import open_pack

VERSIONS = (5, 23), (5, 24)  # the first that is allowed, and the first that is not
# transformers makes no masks for implementations with "flash" in their name, captures their decode steps in
# CUDA graphs, and refuses all others but its own.
NAME = "pagedgen_flash"


def attach(model: Any, pack: str | Path | ServingPack | None = None) -> None:
    """Have ``generate``, ``generate_batch`` and all of continuous batching attend by a pack's kernels.

    Layers with a sliding window keep the whole context in the cache (transformers' own keep the window), and
    in exchange share prefixes and decode by block tables, as the others do.

    Args:
        model: a causal language model with weights on its device.
        pack: a pack's folder; what ``PAGEDGEN_PACK`` names if not given.

    Raises:
        Unsupported: the model has what no kernel computes; names it.
        PackNotChosen, PackDamaged, PackForeign, SpecNotInPack: no pack, or none for this model; says what to
            run.
        VersionUnmet: another transformers than the plug-in was tested with.
    """
    require_version("transformers", transformers.__version__, *VERSIONS)
    if not isinstance(pack, ServingPack):
        pack = chosen_pack() if pack is None else ServingPack(open_pack(Path(pack).expanduser()))
    detach(model)
    found = Attached(model, pack)
    attention = pack.attention
    if model.device.type == "cuda":
        attention.prepare(model.device)
    for module, layer in found.layers.items():
        module._pagedgen = (found, layer)  # type: ignore[assignment]
    model._pagedgen = found
    _register()
    model.config.get_text_config()._attn_implementation = NAME
    model.config._attn_implementation = NAME
    model.init_continuous_batching = _managers(model, found)
    model.generate = _generate(model, found)


def detach(model: Any) -> None:
    """Give a model its own attention back; nothing if it was not attached."""
    found = attached(model)
    if found is None:
        return
    model.destroy_cached_continuous_batching_manager()
    for module in found.layers:
        del module._pagedgen
    del model._pagedgen, model.init_continuous_batching, model.generate
    model.config.get_text_config()._attn_implementation = found.before
    model.config._attn_implementation = found.before


def attached(model: Any) -> Attached | None:
    """What a model is attached to, or None."""
    return getattr(model, "_pagedgen", None)


def _managers(model: Any, found: Attached) -> Callable[..., Any]:
    """The model's ``init_continuous_batching``, but for what transformers decides by name."""
    original = type(model).init_continuous_batching

    @wraps(original)
    def init_continuous_batching(
        generation_config: Any = None, continuous_batching_config: Any = None, workload_hints: Any = None
    ) -> Any:
        if getattr(model, "_cached_continuous_batching_manager", None) is not None:
            return original(model, generation_config, continuous_batching_config, workload_hints)
        config = deepcopy(continuous_batching_config) or ContinuousBatchingConfig()
        found.batching = found.choose(config.page_size)
        if config.use_cuda_graph is None:
            # A step with prompts has its own size nearly every time, and capturing runs it twice more.
            config.use_cuda_graph = (False, True)
        manager = original(model, generation_config, config, workload_hints)
        # transformers has block tables for flash_attention_2 and 3 alone, and sets this to 0.
        cb_initialization.resolve_using_hints(config, workload_hints)
        cb_initialization.resolve_without_hints(config)
        manager.continuous_batching_config.max_blocks_per_request = config.max_blocks_per_request
        return manager

    return init_continuous_batching


# What generate may be asked for and is not served, and what it must be.
NOT_SERVED = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "assistant_model": (None,),
    "prompt_lookup_num_tokens": (None,),
    "past_key_values": (None,),
    "cache_implementation": (None,),
    "use_cache": (None, True),
}


def _generate(model: Any, found: Attached) -> Callable[..., Any]:
    """The model's ``generate``, with a paged cache."""
    original = type(model).generate

    @wraps(original)
    def generate(inputs: torch.Tensor | None = None, *arguments: Any, **options: Any) -> Any:
        ids = options.get("input_ids") if inputs is None else inputs
        if ids is None:
            refuse("inputs", None, "the plug-in serves prompts of token ids")
        given = arguments[0] if arguments else options.get("generation_config")
        config = given or model.generation_config
        for name, allowed in NOT_SERVED.items():
            value = options.get(name, getattr(config, name, None))
            if value not in allowed:
                refuse(name, value, "the plug-in's generate has one sequence a row and a cache of its own")
        mask = options.get("attention_mask")
        if mask is None and len(ids) > 1:
            refuse("attention_mask", None, "with several prompts it says where they begin")
        mask = torch.ones_like(ids) if mask is None else mask
        if mask.ndim != 2 or not torch.equal(mask.int(), mask.int().cummax(1).values):
            refuse("attention_mask", list(mask.shape), "padding at the left of prompts is served")
        pads = (~mask.bool()).sum(1).to(model.device)
        cache = PagedCache(found, found.choose(), pads)
        return original(
            model, inputs, *arguments, **{**options, "attention_mask": mask, "past_key_values": cache}
        )

    return generate


def _register() -> None:
    """Tell transformers of the implementation; once a process."""
    if NAME in transformers.AttentionInterface._global_mapping:
        return
    transformers.AttentionInterface.register(NAME, attend)
    original = cb_cache.group_layers_by_attn_type

    @wraps(original)
    def group_layers_by_attn_type(config: Any) -> dict[str, list[int]]:
        if config._attn_implementation == NAME:  # one group: kernels know of windows, the cache need not
            return {"full_attention": list(range(config.num_hidden_layers))}
        groups: dict[str, list[int]] = original(config)
        return groups

    cb_cache.group_layers_by_attn_type = group_layers_by_attn_type
    cb_initialization.group_layers_by_attn_type = group_layers_by_attn_type
