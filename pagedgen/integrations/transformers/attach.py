"""``attach``: a transformers model whose attention in continuous batching runs on the kernels of a pack.

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

from pagedgen.errors import InvalidValue, SpecNotInPack
from pagedgen.integrations.serving_pack import (
    Layer,
    LayerKernels,
    ServingPack,
    chosen_pack,
    refuse,
    require_version,
)
from pagedgen.integrations.transformers.layers import check_call, layers_of
from pagedgen.integrations.transformers.step import Step
from pagedgen.runtime.pack import open_pack
from pagedgen.values.spec import KInner

VERSIONS = (5, 23), (5, 24)  # the first that is allowed, and the first that is not
# transformers makes no masks for implementations with "flash" in their name, captures their decode steps in
# CUDA graphs, and refuses all others but its own.
NAME = "pagedgen_flash"


class Attached:
    """What a model was attached to: a pack, and which of its kernels serve each layer."""

    def __init__(self, model: Any, pack: ServingPack) -> None:
        self.pack, self.layers = pack, layers_of(model)
        for layer in self.layers.values():
            pack.check(layer)
        self.before: str = model.config._attn_implementation
        self.first = next(iter(self.layers))
        self.kernels: dict[torch.nn.Module, LayerKernels] = {}
        self.block_size = self.page_size = 0
        self._step: Step | None = None
        # K and V of each layer as pools, of one cache.
        self._cache: object = None
        self._pools: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def choose(self, page_size: int) -> None:
        """Take the kernels of the largest block size that divides a page and serves every layer.

        Raises:
            InvalidValue: there is none; says which page sizes there are kernels for.
            SpecNotInPack: no block size serves all layers.
        """
        sizes = [size for size in self.pack.block_sizes() if self._serves(size)]
        if not sizes:
            held = ", ".join(map(str, self.pack.block_sizes()))
            raise SpecNotInPack(f"{self.pack.pack.path}: none of its block sizes, {held}, serves every layer")
        fits = [size for size in sizes if page_size % size == 0]
        if not fits:
            allowed = f"a multiple of {' or '.join(map(str, sizes))} is allowed with {self.pack.pack.path}"
            raise InvalidValue("page_size", page_size, allowed)
        self.block_size, self.page_size = fits[-1], page_size
        self.kernels = {module: self.pack.kernels(layer, fits[-1]) for module, layer in self.layers.items()}

    def _serves(self, block_size: int) -> bool:
        try:
            for layer in self.layers.values():
                self.pack.kernels(layer, block_size)
        except SpecNotInPack:
            return False
        return True

    def step(self, module: torch.nn.Module, asked: dict[str, Any], trash: int) -> Step:
        """The step that a layer is in; made anew in the first layer: a captured graph makes its own."""
        if module is self.first or self._step is None:
            self._step = Step.of(asked, self.block_size, self.page_size, trash)
        return self._step

    def pools(self, layer: int, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer, ``[num_blocks, block_size, num_kv_heads, head_dim]``, of the cache."""
        if cache is not self._cache:
            self._cache, self._pools = cache, {}
        found = self._pools.get(layer)
        if found is None:
            pages = cache.layer_to_allocator[layer].get_cache_for_block_table(layer)
            k, v = (pool.flatten(0, 1).unflatten(0, (-1, self.block_size)) for pool in pages)
            if self.pack.k_inner is KInner.TOKEN:  # only these kernels read it: a block lies as they like it
                blocks, size, heads, dim = k.shape
                k = k.view(blocks, heads, dim, size).permute(0, 3, 1, 2)
            found = self._pools[layer] = (k, v)
        return found


def attach(model: Any, pack: str | Path | ServingPack | None = None) -> None:
    """Have ``model.generate_batch``, and all of continuous batching, attend by a pack's kernels.

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


def detach(model: Any) -> None:
    """Give a model its own attention back; nothing if it was not attached."""
    found = attached(model)
    if found is None:
        return
    model.destroy_cached_continuous_batching_manager()
    for module in found.layers:
        del module._pagedgen
    del model._pagedgen, model.init_continuous_batching
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
        found.choose(config.page_size)
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


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the cache is written in place, through views
def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    cache: Any = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    dropout: float = 0.0,
    **asked: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer in one step, as transformers calls it.

    Args:
        query: ``[1, num_q_heads, num_tokens, head_dim]``, the requests of a step one after the other.
        key, value: ``[1, num_kv_heads, num_tokens, head_dim]`` of the new tokens.
        cache: transformers' ``PagedAttentionCache``.

    Returns:
        ``[1, num_tokens, num_q_heads, head_dim]``, and no weights.

    Raises:
        Unsupported: called for other than continuous batching, or with what the layer was not taken to have.
    """
    found: Attached
    layer: Layer
    found, layer = module._pagedgen  # type: ignore[misc]
    if cache is None:
        refuse("cache", None, "an attached model serves generate_batch; pagedgen's detach(model) undoes it")
    check_call(layer, sliding_window, softcap, s_aux)
    number: int = module.layer_idx  # type: ignore[assignment]
    step = found.step(module, asked, cache.layer_to_allocator[number].write_trash_index)
    kernels, attention = found.kernels[module], found.pack.attention
    k, v = found.pools(number, cache)
    q, new_k, new_v = (x[0].transpose(0, 1) for x in (query, key, value))
    attention.write_kv(new_k, new_v, step.slots, k, v, spec=kernels.write_kv)
    sinks = None if s_aux is None else s_aux.to(torch.float32)
    out = q.new_zeros(q.shape)  # padding rows are not written
    if step.decodes:
        attention.decode(
            q, k, v, step.block_table, step.seq_lens, out=out, softmax_scale=scaling, sinks=sinks,
            max_seq_len=step.max_seq_len, spec=kernels.decode,
        )  # fmt: skip
    else:
        attention.extend(
            q, k, v, step.block_table, step.seq_lens, step.cu_seqlens_q, out=out, softmax_scale=scaling,
            sinks=sinks, max_seq_len=step.max_seq_len, spec=kernels.extend,
        )  # fmt: skip
    return out[None], None
