"""Scales of an FP8 pool, set by the first tokens that are written to it; plain torch, for CPUs and GPUs."""

from __future__ import annotations

import torch

from pagedgen.values.spec import LEAST_SCALE


def set_scales(
    new: torch.Tensor, slot_mapping: torch.Tensor, scale: torch.Tensor, fp8_type: torch.dtype
) -> None:
    """Set the entries of ``scale`` that are not set, 0 or less, by new K or V; set ones stay as they are.

    The largest magnitude among the tokens that are kept then lies at half of the type's largest value: FP8
    is a floating-point type, so that the other half costs little and is room for what comes later, and for K
    that is turned afterwards, which grows an element by at most a factor of 1.42. Larger ones saturate.
    Where all are 0 the scale is 1; where no token is kept it stays unset. Infinities and NaN don't count.

    A pool has one set of scales for all of its tokens, so they can only follow from the first ones. vLLM's
    ``calculate_kv_scales`` takes them from the first batch as well, and found that to be representative (pull
    request 11906). Nothing synchronises.

    Args:
        new: ``[num_tokens, num_kv_heads, head_dim]``.
        slot_mapping: int64 ``[num_tokens]``; below 0: the token is not kept.
        scale: float32 ``[1]`` or ``[num_kv_heads]``; written.
        fp8_type: of the pool.
    """
    size = new.float().abs()
    size = torch.where((slot_mapping >= 0)[:, None, None] & (size < torch.inf), size, -1.0)
    start = size.new_full((1, *size.shape[1:]), -1.0)  # there may be no token
    largest = torch.cat((start, size)).amax((0, 2))  # [num_kv_heads]
    if scale.numel() == 1:
        largest = largest.amax(0, keepdim=True)
    # A tensor: torch on CUDA multiplies by a number's reciprocal instead, a unit in the last place off.
    half = torch.full_like(largest, torch.finfo(fp8_type).max / 2)
    wanted = (largest / half).clamp_min(LEAST_SCALE)
    wanted = torch.where(largest == 0, 1.0, wanted)
    scale.copy_(torch.where((scale <= 0) & (largest >= 0), wanted.view_as(scale), scale))
