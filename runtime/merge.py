"""Attention over parts of a context, put together by the parts' LSE; plain torch, for CPUs and GPUs."""

from __future__ import annotations

import torch

from pagedgen.errors import ArgumentError

OUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def merge(
    outs: torch.Tensor, lses: torch.Tensor, sinks: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention over a whole context from the attention over its disjoint parts.

    For each row and head, with ``w[i] = exp(lses[i])``: the output is ``Σ w[i]·outs[i] / Σ w[i]`` and its LSE
    ``log Σ w[i]``, in float32 and in the order of the parts, so that equal input gives equal bits. Exact but
    for rounding: that of the parts' outputs stays, which float32 parts keep small. It is the rule by which
    split kernels combine their partial results (Dao et al., Flash-Decoding, 2023).

    A part whose LSE is -inf is empty: its output is not used, whatever is in it, NaN included. Where all are
    empty and there is no sink, the output is 0 and the LSE -inf. Kernels write nothing for rows without
    tokens, so fill the LSE with -inf before a call that may have such rows. An LSE that is NaN or +inf gives
    NaN: it is an error elsewhere, and not hidden.

    torch runs 10 operations and 7 a part, one more for 16-bit outputs, each a launch on a GPU: right, not
    fast. None synchronises.

    Args:
        outs: ``[num_parts, num_tokens, num_q_heads, head_dim]``, float16, bfloat16 or float32; any strides.
        lses: float32 ``[num_parts, num_tokens, num_q_heads]``, natural logarithm.
        sinks: float32 ``[num_q_heads]``, learned sinks that no part has had: one more part, with output 0
            and this LSE.

    Returns:
        out ``[num_tokens, num_q_heads, head_dim]`` in the dtype of outs, and lse, float32
        ``[num_tokens, num_q_heads]``; two parts of a larger whole may be merged again.

    Raises:
        ArgumentError: a dtype, shape or device is not as above.
    """
    _check(outs, lses, sinks)
    out: torch.Tensor
    lse: torch.Tensor
    out, lse = _merge(outs, lses, sinks)
    return out, lse


def _check(outs: torch.Tensor, lses: torch.Tensor, sinks: torch.Tensor | None) -> None:
    if outs.dtype not in OUT_DTYPES:
        raise ArgumentError(f"outs.dtype = {outs.dtype}: float16, bfloat16 or float32 is expected")
    if outs.ndim != 4 or not outs.shape[0]:
        raise ArgumentError(
            f"outs.shape = {list(outs.shape)}: [num_parts, num_tokens, num_q_heads, head_dim], "
            "at least one part, is expected"
        )
    tensors = [("lses", lses, outs.shape[:3])]
    if sinks is not None:
        tensors.append(("sinks", sinks, outs.shape[2:3]))
    for name, x, shape in tensors:
        if x.dtype != torch.float32:
            raise ArgumentError(f"{name}.dtype = {x.dtype}: float32 is expected")
        if x.shape != shape:
            raise ArgumentError(f"{name}.shape = {list(x.shape)}: {list(shape)}, as of outs, is expected")
        if x.device != outs.device:
            raise ArgumentError(f"{name}.device = {x.device}: {outs.device}, that of outs, is expected")


@torch.library.custom_op("pagedgen::merge", mutates_args=())
def _merge(
    outs: torch.Tensor, lses: torch.Tensor, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    largest = lses.amax(0)
    if sinks is not None:
        largest = torch.maximum(largest, sinks)
    # All empty: any finite number will do, and -inf minus -inf would not.
    base = torch.where(largest == -torch.inf, 0.0, largest)
    total = torch.zeros_like(base) if sinks is None else torch.exp(sinks - base)
    merged = torch.zeros(outs.shape[1:], dtype=torch.float32, device=outs.device)
    for out, lse in zip(outs, lses, strict=True):  # one part in float32 at a time, not all of them
        weight = torch.exp(lse - base)
        total = total + weight
        # 0 · NaN is NaN: what an empty part holds is left out, not weighted with 0.
        merged += torch.where((lse == -torch.inf)[..., None], 0.0, out * weight[..., None])  # in float32
    merged /= torch.where(total == 0, 1.0, total)[..., None]
    return merged.to(outs.dtype), base + torch.log(total)


@_merge.register_fake
def _(
    outs: torch.Tensor, lses: torch.Tensor, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])
