"""torch custom operators of the runtime: the base for any stack, and what ``torch.compile`` goes through.

``pagedgen::decode``, ``::extend`` and ``::verify`` return a new tensor; ``::decode_out``, ``::extend_out``
and ``::verify_out`` write to ``out``, and to ``lse`` where it is given; ``::write_kv`` writes to pools of K
and V. All name a pack by :attr:`Attention.number`, which follows from what is in it, and with ``spec`` one of
its kernels where several fit; other arguments are those of the methods of :class:`Attention`.
``::store_kv`` and ``::copy_blocks`` are operations on a :class:`KVCache`.

They have fake implementations (shapes without data), declare what they write to and never synchronise: they
work under ``torch.compile(fullgraph=True)``, ``torch.export`` and in captured CUDA graphs. A process that
runs an exported program imports this module and keeps the pack loaded.

    decode = ops.bind(pagedgen.load(pack))          # once; keeps the pack loaded
    out = decode(q, k, v, block_table, seq_lens)    # inside a compiled function
"""

from __future__ import annotations

import math
from typing import Any, Protocol, cast

import torch

from pagedgen.runtime.attention import Attention, loaded
from pagedgen.runtime.block_pools import BlockPools
from pagedgen.runtime.kv_cache import KVCache, copy_by_torch, store
from pagedgen.runtime.kv_scales import set_scales
from pagedgen.values.spec import KernelSpec, Op


class Decode(Protocol):
    """Decode attention as an operator; the arguments are those of :meth:`Attention.decode`.

    Without ``out`` the result is a new tensor, zero in padding rows. The LSE goes to ``lse`` with ``out``.
    """

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        softmax_scale: float | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        max_seq_len: int | None = None,
    ) -> torch.Tensor: ...


class Extend(Protocol):
    """Extend attention as an operator; the arguments are those of :meth:`Attention.extend`.

    ``out`` and ``lse`` are as :class:`Decode` has them.
    """

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        *,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        softmax_scale: float | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        causal: torch.Tensor | None = None,
        max_seq_len: int | None = None,
    ) -> torch.Tensor: ...


class Verify(Protocol):
    """Verify attention as an operator; the arguments are those of :meth:`Attention.verify`.

    ``out`` and ``lse`` are as :class:`Decode` has them.
    """

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
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        softmax_scale: float | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        causal: torch.Tensor | None = None,
        max_seq_len: int | None = None,
    ) -> torch.Tensor: ...


class WriteKV(Protocol):
    """The writing of new tokens as an operator; the arguments are those of :meth:`Attention.write_kv`."""

    def __call__(
        self,
        new_k: torch.Tensor,
        new_v: torch.Tensor,
        slot_mapping: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
    ) -> None: ...


def bind(attention: Attention, spec: KernelSpec | None = None) -> Decode:
    """The decode operator of a pack, or of one of its specs; it keeps the pack loaded.

    Raises:
        SpecNotInPack: ``spec`` is not in the pack.
    """
    return cast(Decode, _bound(Op.DECODE, attention, spec))


def bind_extend(attention: Attention, spec: KernelSpec | None = None) -> Extend:
    """The extend operator of a pack; see :func:`bind`."""
    return cast(Extend, _bound(Op.EXTEND, attention, spec))


def bind_verify(attention: Attention, spec: KernelSpec | None = None) -> Verify:
    """The verify operator of a pack; see :func:`bind`."""
    return cast(Verify, _bound(Op.VERIFY, attention, spec))


def bind_write_kv(attention: Attention, spec: KernelSpec | None = None) -> WriteKV:
    """The operator of a pack that writes to pools; see :func:`bind`."""
    number, name = attention.number, _name(attention, spec)

    def write_kv(*tensors: torch.Tensor, **scales: torch.Tensor | None) -> None:
        torch.ops.pagedgen.write_kv(number, *tensors, spec=name, **scales)

    write_kv.attention = attention  # type: ignore[attr-defined]
    return cast(WriteKV, write_kv)


def _bound(op: Op, attention: Attention, spec: KernelSpec | None) -> object:
    number, name = attention.number, _name(attention, spec)
    functional = getattr(torch.ops.pagedgen, op.value)
    into = getattr(torch.ops.pagedgen, f"{op.value}_out")

    def call(*tensors: torch.Tensor, out: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        if out is None:
            result: torch.Tensor = functional(number, *tensors, spec=name, **options)
            return result
        into(number, *tensors, out=out, spec=name, **options)
        return out

    call.attention = attention  # type: ignore[attr-defined]
    return call


def _name(attention: Attention, spec: KernelSpec | None) -> str | None:
    return None if spec is None else attention.kernel(spec).spec.name


def _spec(attention: Attention, name: str | None) -> KernelSpec | None:
    return None if name is None else attention.spec_named(name)


# What the attention operators take, as torch's schema language has it. An optional argument that a method of
# Attention gains is added here and to the protocols above, nowhere else.
TENSORS = {
    Op.DECODE: "Tensor q, Tensor k, Tensor v, Tensor block_table, Tensor seq_lens",
    Op.EXTEND: "Tensor q, Tensor k, Tensor v, Tensor block_table, Tensor seq_lens, Tensor cu_seqlens_q",
    Op.VERIFY: "Tensor q, Tensor k, Tensor v, Tensor block_table, Tensor seq_lens, Tensor cu_seqlens_q",
}
OPTIONS = (
    "float? softmax_scale=None, Tensor? k_scale=None, Tensor? v_scale=None, Tensor? sinks=None, "
    "Tensor? alibi_slopes=None, SymInt? max_seq_len=None, str? spec=None"
)
OWN_OPTIONS = {
    Op.EXTEND: ", Tensor? causal=None",
    Op.VERIFY: ", Tensor? causal=None, Tensor? tree_mask=None",
}
OUTPUTS = "Tensor(a!) out, Tensor(b!)? lse=None"


def _names(schema: str) -> tuple[str, ...]:
    """Argument names, in order: torch hands arguments to an implementation by position."""
    return tuple(argument.split()[-1].partition("=")[0] for argument in schema.split(", "))


def _define(op: Op) -> None:
    """Make the two operators of an attention operator known to torch."""
    options = OPTIONS + OWN_OPTIONS.get(op, "")
    of_functional, of_out = f"{TENSORS[op]}, {options}", f"{TENSORS[op]}, {OUTPUTS}, {options}"
    names, names_of_out = _names(of_functional), _names(of_out)

    def run(pack: int, spec: str | None = None, **arguments: Any) -> None:
        attention = loaded(pack)
        getattr(attention, op.value)(**arguments, spec=_spec(attention, spec))

    def functional(pack: int, *arguments: Any) -> torch.Tensor:
        # Padding rows are not written by kernels; an operator's result has no bytes of old memory.
        given = dict(zip(names, arguments, strict=False))
        out: torch.Tensor = given["q"].new_zeros(_shape(*arguments))
        run(pack, out=out, **given)
        return out

    def fake(pack: int, *arguments: Any) -> torch.Tensor:
        out: torch.Tensor = arguments[0].new_empty(_shape(*arguments))
        return out

    def into(pack: int, *arguments: Any) -> None:
        run(pack, **dict(zip(names_of_out, arguments, strict=False)))

    torch.library.custom_op(
        f"pagedgen::{op}", functional, mutates_args=(), schema=f"(int pack, {of_functional}) -> Tensor"
    ).register_fake(fake)
    torch.library.custom_op(
        f"pagedgen::{op}_out", into, mutates_args=("out", "lse"), schema=f"(int pack, {of_out}) -> ()"
    ).register_fake(_nothing)


def _shape(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object) -> tuple[int, ...]:
    return (*q.shape[:-1], v.shape[-1])


def _nothing(*arguments: object, **options: object) -> None:
    """The fake implementation of what returns nothing."""


for _op in TENSORS:
    _define(_op)


@torch.library.custom_op("pagedgen::write_kv", mutates_args=("k", "v"))
def _write_kv(
    pack: int,
    new_k: torch.Tensor,
    new_v: torch.Tensor,
    slot_mapping: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    spec: str | None = None,
) -> None:
    attention = loaded(pack)
    attention.write_kv(
        new_k, new_v, slot_mapping, k, v, k_scale=k_scale, v_scale=v_scale, spec=_spec(attention, spec)
    )


_write_kv.register_fake(_nothing)


def store_kv(cache: KVCache, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
    """:meth:`KVCache.write_kv` as an operator."""
    if cache.dynamic_scales:
        assert cache.k_scale is not None and cache.v_scale is not None and cache.fp8_type is not None
        scaler = cache.scaler(k, v)
        number = None if scaler is None or cache.attention is None else cache.attention.number
        _kv_scales(
            k, v, slots, cache.k_scale[layer], cache.v_scale[layer], cache.fp8_type, number,
            None if scaler is None else scaler.name,
        )  # fmt: skip
    raw_k, raw_v = cache.raw(layer)
    writer = cache.writer(k, v)
    pack = None if writer is None or cache.attention is None else cache.attention.number
    k_scale = None if cache.k_scale is None else cache.k_scale[layer]
    v_scale = None if cache.v_scale is None else cache.v_scale[layer]
    _store_kv(
        raw_k, raw_v, k, v, slots, k_scale, v_scale, cache.fp8_type, pack,
        None if writer is None else writer.name,
    )  # fmt: skip


@torch.library.custom_op("pagedgen::store_kv", mutates_args=("pool_k", "pool_v"))
def _store_kv(
    pool_k: torch.Tensor,
    pool_v: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    fp8_type: torch.dtype | None,
    pack: int | None = None,
    spec: str | None = None,
) -> None:
    if pack is not None:  # its kernel needs no spare block behind the pool's last
        into_k, into_v = pool_k[:-1], pool_v[:-1]
        if fp8_type is not None:
            into_k, into_v = into_k.view(fp8_type), into_v.view(fp8_type)
        attention = loaded(pack)
        attention.write_kv(
            k, v, slots, into_k, into_v, k_scale=k_scale, v_scale=v_scale, spec=_spec(attention, spec)
        )
        return
    store(pool_k, k, slots, k_scale, fp8_type)
    store(pool_v, v, slots, v_scale, fp8_type)


_store_kv.register_fake(_nothing)


@torch.library.custom_op("pagedgen::kv_scales", mutates_args=("k_scale", "v_scale"))
def _kv_scales(
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    fp8_type: torch.dtype,
    pack: int | None = None,
    spec: str | None = None,
) -> None:
    wanted = None if pack is None else _spec(loaded(pack), spec)
    if pack is not None and wanted is not None:
        loaded(pack).kv_scales(k, v, slots, k_scale, v_scale, spec=wanted)
        return
    set_scales(k, slots, k_scale, fp8_type)
    set_scales(v, slots, v_scale, fp8_type)


_kv_scales.register_fake(_nothing)


def copy_kv_blocks(cache: KVCache, pairs: torch.Tensor) -> None:
    """:meth:`KVCache.copy_blocks` as an operator, by int64 ``pairs`` ``[n, 2]`` on the device.

    No block that is written may be read too: a pack's kernel copies pairs in no order.
    """
    pack = None if cache.copier is None or cache.attention is None else cache.attention.number
    copy_blocks(
        cache.blocks, pairs, cache.pools.table, pack, None if cache.copier is None else cache.copier.name
    )


@torch.library.custom_op("pagedgen::copy_blocks", mutates_args=("blocks",))
def copy_blocks(
    blocks: torch.Tensor,
    pairs: torch.Tensor,
    table: torch.Tensor | None = None,
    pack: int | None = None,
    spec: str | None = None,
) -> None:
    """Copy blocks ``[planes, num_blocks, page]`` by int64 ``pairs`` ``[n, 2]`` of (source, destination).

    :attr:`KVCache.blocks` is the tensor to give. With a pack and the blocks' table (:class:`BlockPools`) its
    kernel copies, in no order; without, all sources are read before anything is written.
    """
    if pack is not None and table is not None:
        attention = loaded(pack)
        page = blocks.shape[2] * blocks.element_size()
        pools = BlockPools((blocks,), table, (page,) * blocks.shape[0], blocks.shape[1], math.gcd(16, page))
        attention.copy_blocks(pools, pairs, spec=_spec(attention, spec))
        return
    copy_by_torch(blocks, pairs)


copy_blocks.register_fake(_nothing)
