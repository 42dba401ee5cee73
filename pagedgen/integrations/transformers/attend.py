"""The attention function that transformers calls for every layer of an attached model."""

from __future__ import annotations

from typing import Any

import torch

from pagedgen.integrations.serving_pack import Layer, LayerKernels, refuse
from pagedgen.integrations.transformers.attached import Attached
from pagedgen.integrations.transformers.layers import check_call
from pagedgen.integrations.transformers.paged_cache import PagedCache
from pagedgen.integrations.transformers.step import Step
from pagedgen.runtime.attention import Attention


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
        query: ``[batch, num_q_heads, num_tokens, head_dim]``; in continuous batching the batch is 1 and the
            requests of a step come one after the other.
        key, value: ``[batch, num_kv_heads, num_tokens, head_dim]`` of the new tokens.
        cache: transformers' ``PagedAttentionCache``; None in ``generate``, whose cache was just updated.

    Returns:
        ``[batch, num_tokens, num_q_heads, head_dim]``, and no weights.

    Raises:
        Unsupported: called for other than generating, or with what the layer was not taken to have.
    """
    found: Attached
    layer: Layer
    found, layer = module._pagedgen  # type: ignore[misc]
    check_call(layer, sliding_window, softcap, s_aux)
    sinks = None if s_aux is None else s_aux.to(torch.float32)
    number: int = module.layer_idx  # type: ignore[assignment]
    paged, found.generating = found.generating, None
    if cache is None:
        if paged is None:
            why = "an attached model serves generate and generate_batch; detach(model) undoes it"
            refuse("past_key_values", "not pagedgen's", why)
        return _generate(paged, number, query, scaling, sinks, found.pack.attention), None
    chosen, attention = found.batching, found.pack.attention
    assert chosen is not None
    step = found.step(module, asked, cache.layer_to_allocator[number].write_trash_index, chosen)
    kernels = chosen.kernels[module]
    k, v = found.pools(number, cache, chosen)
    q, new_k, new_v = (x[0].transpose(0, 1) for x in (query, key, value))
    attention.write_kv(new_k, new_v, step.slots, k, v, spec=kernels.write_kv)
    out = q.new_zeros(q.shape)  # padding rows are not written
    _run(attention, kernels, step, q, k, v, out, scaling, sinks)
    return out[None], None


def _generate(
    cache: PagedCache,
    number: int,
    query: torch.Tensor,
    scaling: float,
    sinks: torch.Tensor | None,
    attention: Attention,
) -> torch.Tensor:
    """A step of ``generate``: the prompts of a batch, or one token of each."""
    layer = cache.layers[number]
    step = cache.now
    rows = query.transpose(1, 2)
    q = rows.flatten(0, 1)
    if cache.queries is not None:  # without the padding between prompts
        q = q[cache.queries]
    out = q.new_zeros(q.shape)
    _run(attention, layer.kernels, step, q, layer.k, layer.v, out, scaling, sinks)
    if cache.queries is not None:
        out = out.new_zeros((rows.shape[0] * rows.shape[1], *out.shape[1:])).index_copy(0, cache.queries, out)
    return out.view(rows.shape)


def _run(
    attention: Attention,
    kernels: LayerKernels,
    step: Step,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    scaling: float,
    sinks: torch.Tensor | None,
) -> None:
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
