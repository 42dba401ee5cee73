"""Peers of ``extend-cpu`` that are importable here, on the very inputs ours are timed on.

vLLM's CPU attention on a cache of its own, and what PyTorch offers: ``flex_attention``, compiled, on K and V
that were gathered beforehand, so that it pays for no paging; and gathering, then
``scaled_dot_product_attention``. All are checked against the float64 reference before they are timed.
"""

from __future__ import annotations

from importlib.metadata import version

import torch

from pagedgen.autotune.suites.contest import Contender
from pagedgen.autotune.suites.peers_cpu import (
    VLLM_BLOCK,
    Call,
    contender,
    scales_of,
    tokens_of,
    vllm_call,
    vllm_package,
)
from pagedgen.compiler.verify import Inputs, query_ranges
from pagedgen.values.spec import KernelSpec
from pagedgen.values.workload import Workload


def peers(spec: KernelSpec, workload: Workload) -> list[Contender]:
    """Contenders for one case; a peer that refuses the case or is wrong on it raises when its turn comes."""
    found = []
    if package := vllm_package():
        detail = f"{package}, block {VLLM_BLOCK}"
        found.append(contender("vllm cpu attention", detail, spec, workload, vllm_call))
    detail = f"torch {version('torch')}"
    found.append(
        contender("torch flex, compiled", f"{detail}, K and V gathered before", spec, workload, flex_call)
    )
    found.append(contender("torch gather + sdpa", detail, spec, workload, sdpa_call))
    return found


def sdpa_call(spec: KernelSpec, inputs: Inputs) -> Call:
    """Gather every sequence's K and V, then SDPA over it, as a user of PyTorch alone would."""
    k_scale, v_scale = scales_of(spec, inputs)
    if spec.masks:
        raise NotImplementedError(", ".join(spec.masks))
    ranges, lens = query_ranges(spec, inputs), inputs.seq_lens.tolist()
    masks = [
        None if end - first == n else torch.ones(end - first, n, dtype=torch.bool).tril(n - (end - first))
        for (first, end), n in zip(ranges, lens, strict=True)
    ]

    def call() -> None:
        for row, (first, end) in enumerate(ranges):
            k, v = tokens_of(spec, inputs, row)
            attended = torch.nn.functional.scaled_dot_product_attention(
                inputs.q[first:end].transpose(0, 1)[None],  # [1, num_q_heads, queries, head_dim]
                k.transpose(0, 1)[None],
                v.transpose(0, 1)[None],
                attn_mask=masks[row],
                is_causal=masks[row] is None,
                scale=inputs.softmax_scale * k_scale,
                enable_gqa=spec.group_size > 1,
            )
            inputs.out[first:end] = attended[0].transpose(0, 1) * v_scale

    return call


def flex_call(spec: KernelSpec, inputs: Inputs) -> Call:
    """``flex_attention`` on contiguous K and V, with a block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    k_scale, v_scale = scales_of(spec, inputs)
    lens = set(
        zip((end - first for first, end in query_ranges(spec, inputs)), inputs.seq_lens.tolist(), strict=True)
    )
    if len(lens) > 1:
        raise NotImplementedError("ragged lengths")
    if spec.sinks or spec.logits_soft_cap:
        raise NotImplementedError(", ".join(spec.masks))
    ((queries, tokens),) = lens
    count, window, before = len(inputs.seq_lens), spec.window, tokens - queries

    def seen(batch: object, head: object, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        visible: torch.Tensor = kv <= q + before
        return visible if window is None else visible & (kv > q + before - window)

    mask = create_block_mask(seen, None, None, queries, tokens, device="cpu")
    gathered = [tokens_of(spec, inputs, row) for row in range(count)]
    k, v = (torch.stack([pair[i] for pair in gathered]).transpose(1, 2).contiguous() for i in range(2))
    q = inputs.q.view(count, queries, spec.num_q_heads, spec.head_dim).transpose(1, 2).contiguous()
    if k_scale != 1:
        q = q * k_scale  # a scale of its own in every input would be compiled anew
    out = inputs.out.view(count, queries, spec.num_q_heads, spec.head_dim)
    compiled = torch.compile(flex_attention)

    def call() -> None:
        attended = compiled(
            q, k, v, block_mask=mask, scale=inputs.softmax_scale, enable_gqa=spec.group_size > 1
        )
        out.copy_(attended.transpose(1, 2))
        if v_scale != 1:
            out.mul_(v_scale)

    return call
