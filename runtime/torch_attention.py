"""Attention over a paged KV cache in plain torch: for what a pack has no kernel for, and to compare with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from pagedgen.errors import ArgumentError


def extend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: Sequence[int],
    query_lens: Sequence[int],
    *,
    softmax_scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention of the last ``query_lens[i]`` tokens of each sequence (1: decode).

    K and V of all tokens are in the cache, those of the queries included. Each sequence's blocks are gathered
    to a contiguous copy and given to torch's scaled_dot_product_attention: right, not fast.

    Args:
        q: ``[sum(query_lens), num_q_heads, head_dim]``, the sequences one after the other.
        k, v: ``[num_blocks, block_size, num_kv_heads, head_dim]``, any strides, any float type.
        block_table: int32 ``[num_seqs, max_blocks]``, on the device of k.
        seq_lens, query_lens: of each sequence, in tokens, on the host.
        softmax_scale: ``head_dim ** -0.5`` if not given.
        window: tokens that a query sees, itself included; None: all.

    Returns:
        As q.

    Raises:
        ArgumentError: the lengths do not fit the tensors or each other.
    """
    size = k.shape[1]
    if not len(seq_lens) == len(query_lens) == len(block_table) or sum(query_lens) != len(q):
        raise ArgumentError(
            f"query_lens = {list(query_lens)}: {len(block_table)} lengths with the sum {len(q)} are expected"
        )
    out = torch.empty_like(q)
    start = 0
    for row, length, new in zip(block_table, seq_lens, query_lens, strict=True):
        if not 0 <= new <= length <= row.numel() * size:
            raise ArgumentError(
                f"seq_len = {length}: {new}, its queries, to {row.numel() * size} is expected"
            )
        if not new:
            continue
        first = 0 if window is None else max(0, length - new - window + 1) // size  # what no query sees
        blocks = row[first : -(-length // size)].long()
        keys, values = (
            x[blocks].flatten(0, 1)[: length - first * size].to(q.dtype).transpose(0, 1) for x in (k, v)
        )
        query = torch.arange(length - new, length, device=q.device)[:, None]
        key = torch.arange(first * size, length, device=q.device)[None]
        mask = key <= query
        if window is not None:
            mask &= key > query - window
        part = scaled_dot_product_attention(
            q[None, start : start + new].transpose(1, 2),
            keys[None],
            values[None],
            attn_mask=mask,
            scale=softmax_scale,
            enable_gqa=True,
        )
        out[start : start + new] = part[0].transpose(0, 1)
        start += new
    return out
