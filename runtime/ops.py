"""torch custom operators of the runtime, so that ``torch.compile(fullgraph=True)`` goes through them.

``pagedgen::decode``, ``::extend``, ``::verify``, ``::write_kv`` and ``::copy_blocks`` have fake
implementations (shapes without data) and declare what they write to. None of them synchronises, so captured
CUDA graphs replay them.

    decode = ops.bind(pagedgen.load(pack))          # once
    out = decode(q, k, v, block_table, seq_lens)    # inside a compiled function
"""

from __future__ import annotations

from typing import Protocol

import torch

from pagedgen.errors import ArgumentError
from pagedgen.runtime.attention import LOADED, Attention
from pagedgen.runtime.kv_cache import KVCache, store


class Decode(Protocol):
    """Decode attention as an operator; the arguments are those of :meth:`Attention.decode`."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        softmax_scale: float | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        max_seq_len: int | None = None,
    ) -> torch.Tensor: ...


class Extend(Protocol):
    """Extend attention as an operator; the arguments are those of :meth:`Attention.extend`."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        *,
        softmax_scale: float | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        causal: torch.Tensor | None = None,
        max_seq_len: int | None = None,
    ) -> torch.Tensor: ...


class Verify(Protocol):
    """Verify attention as an operator; the arguments are those of :meth:`Attention.verify`."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        *,
        tree_mask: torch.Tensor | None = None,
        softmax_scale: float | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        causal: torch.Tensor | None = None,
        max_seq_len: int | None = None,
    ) -> torch.Tensor: ...


# Operators take tensors and numbers only, so a pack goes by its number; it lives while somebody holds it.
_attentions = LOADED


def bind(attention: Attention) -> Decode:
    """The decode operator of one pack, without LSE; it keeps the pack loaded."""
    number = attention.number

    def decode(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        softmax_scale: float | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        max_seq_len: int | None = None,
    ) -> torch.Tensor:
        out: torch.Tensor = _decode(
            number,
            q,
            k,
            v,
            block_table,
            seq_lens,
            softmax_scale,
            k_scale,
            v_scale,
            max_seq_len,
            sinks,
            alibi_slopes,
        )
        return out

    decode.attention = attention  # type: ignore[attr-defined]
    return decode


def bind_extend(attention: Attention) -> Extend:
    """The extend operator of one pack, without LSE; it keeps the pack loaded."""
    number = attention.number

    def extend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        *,
        softmax_scale: float | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        causal: torch.Tensor | None = None,
        max_seq_len: int | None = None,
    ) -> torch.Tensor:
        out: torch.Tensor = _extend(
            number, q, k, v, block_table, seq_lens, cu_seqlens_q, softmax_scale, k_scale, v_scale,
            max_seq_len, sinks, alibi_slopes, causal,
        )  # fmt: skip
        return out

    extend.attention = attention  # type: ignore[attr-defined]
    return extend


def bind_verify(attention: Attention) -> Verify:
    """The verify operator of one pack, without LSE; it keeps the pack loaded."""
    number = attention.number

    def verify(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        *,
        tree_mask: torch.Tensor | None = None,
        softmax_scale: float | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        causal: torch.Tensor | None = None,
        max_seq_len: int | None = None,
    ) -> torch.Tensor:
        out: torch.Tensor = _verify(
            number, q, k, v, block_table, seq_lens, cu_seqlens_q, softmax_scale, k_scale, v_scale,
            max_seq_len, sinks, alibi_slopes, causal, tree_mask,
        )  # fmt: skip
        return out

    verify.attention = attention  # type: ignore[attr-defined]
    return verify


def _shape(q: torch.Tensor, v: torch.Tensor) -> tuple[int, ...]:
    """Of the result: queries' rows, as long as V's."""
    return (*q.shape[:-1], v.shape[-1])


def _held(pack: int) -> Attention:
    attention = _attentions.get(pack)
    if attention is None:
        raise ArgumentError(
            f"pack = {pack}: the operator that bind() returned for it is gone, and the pack with it"
        )
    return attention


@torch.library.custom_op("pagedgen::decode", mutates_args=())
def _decode(
    pack: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax_scale: float | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    max_seq_len: int | None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    attention = _held(pack)
    # Padding rows are not written by kernels; an operator's result has no bytes of old memory.
    out = q.new_zeros(_shape(q, v))
    attention.decode(
        q, k, v, block_table, seq_lens, out=out, softmax_scale=softmax_scale,
        k_scale=k_scale, v_scale=v_scale, sinks=sinks, alibi_slopes=alibi_slopes, max_seq_len=max_seq_len,
    )  # fmt: skip
    return out


@_decode.register_fake
def _(
    pack: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax_scale: float | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    max_seq_len: int | None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    return q.new_empty(_shape(q, v))


@torch.library.custom_op("pagedgen::extend", mutates_args=())
def _extend(
    pack: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    softmax_scale: float | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    max_seq_len: int | None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    causal: torch.Tensor | None = None,
) -> torch.Tensor:
    attention = _held(pack)
    out = q.new_zeros(_shape(q, v))  # padding rows, as for decode
    attention.extend(
        q, k, v, block_table, seq_lens, cu_seqlens_q, out=out, softmax_scale=softmax_scale,
        k_scale=k_scale, v_scale=v_scale, sinks=sinks, alibi_slopes=alibi_slopes, causal=causal,
        max_seq_len=max_seq_len,
    )  # fmt: skip
    return out


@_extend.register_fake
def _(
    pack: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    softmax_scale: float | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    max_seq_len: int | None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    causal: torch.Tensor | None = None,
) -> torch.Tensor:
    return q.new_empty(_shape(q, v))


@torch.library.custom_op("pagedgen::verify", mutates_args=())
def _verify(
    pack: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    softmax_scale: float | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    max_seq_len: int | None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    causal: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    attention = _held(pack)
    out = q.new_zeros(_shape(q, v))  # padding rows, as for decode
    attention.verify(
        q, k, v, block_table, seq_lens, cu_seqlens_q, out=out, softmax_scale=softmax_scale,
        k_scale=k_scale, v_scale=v_scale, sinks=sinks, alibi_slopes=alibi_slopes, causal=causal,
        tree_mask=tree_mask, max_seq_len=max_seq_len,
    )  # fmt: skip
    return out


@_verify.register_fake
def _(
    pack: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    softmax_scale: float | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    max_seq_len: int | None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    causal: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    return q.new_empty(_shape(q, v))


def write_kv(cache: KVCache, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
    """:meth:`KVCache.write_kv` as an operator."""
    raw_k, raw_v = cache.raw(layer)
    writer = None if cache.writer(k, v) is None or cache.attention is None else cache.attention.number
    k_scale = None if cache.k_scale is None else cache.k_scale[layer]
    v_scale = None if cache.v_scale is None else cache.v_scale[layer]
    _write_kv(raw_k, raw_v, k, v, slots, k_scale, v_scale, cache.fp8_type, writer)


@torch.library.custom_op("pagedgen::write_kv", mutates_args=("pool_k", "pool_v"))
def _write_kv(
    pool_k: torch.Tensor,
    pool_v: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    fp8_type: torch.dtype | None,
    pack: int | None = None,
) -> None:
    if pack is not None:  # its kernel needs no spare block behind the pool's last
        into_k, into_v = pool_k[:-1], pool_v[:-1]
        if fp8_type is not None:
            into_k, into_v = into_k.view(fp8_type), into_v.view(fp8_type)
        _held(pack).write_kv(k, v, slots, into_k, into_v, k_scale=k_scale, v_scale=v_scale)
        return
    store(pool_k, k, slots, k_scale, fp8_type)
    store(pool_v, v, slots, v_scale, fp8_type)


@_write_kv.register_fake
def _(
    pool_k: torch.Tensor,
    pool_v: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    fp8_type: torch.dtype | None,
    pack: int | None = None,
) -> None:
    return None


@torch.library.custom_op("pagedgen::copy_blocks", mutates_args=("blocks",))
def copy_blocks(blocks: torch.Tensor, pairs: torch.Tensor) -> None:
    """Copy blocks ``[planes, num_blocks, page]`` by int64 ``pairs`` ``[n, 2]`` of (source, destination).

    All sources are read before anything is written. :attr:`KVCache.blocks` is the tensor to give.
    """
    blocks.index_copy_(1, pairs[:, 1], blocks.index_select(1, pairs[:, 0]))


@copy_blocks.register_fake
def _(blocks: torch.Tensor, pairs: torch.Tensor) -> None:
    return None
