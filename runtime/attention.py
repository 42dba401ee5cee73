"""``Attention``: the kernels of a pack, callable on a serving stack's own tensors."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from pagedgen.errors import ArgumentError, PackDamaged, PagedgenError, SpecNotInPack
from pagedgen.runtime.block_pools import BlockPools
from pagedgen.runtime.faults import Faults
from pagedgen.runtime.lengths import check_lengths, check_pairs, check_positions, check_slots, checks_wanted
from pagedgen.runtime.library import Library
from pagedgen.runtime.pack import Pack, check_machine, open_pack
from pagedgen.values.manifest import KernelEntry
from pagedgen.values.spec import Causality, DType, KernelSpec, KInner, KVScale, Op, Rope

TORCH_DTYPES = {
    DType.F32: torch.float32,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.FP8_E4M3: torch.float8_e4m3fn,
    DType.FP8_E5M2: torch.float8_e5m2,
}
MANY_MATCHES = 1024  # remembered (dtypes, shapes) of calls; serving has a handful


EXTRAS = ("sinks", "alibi_slopes", "causal", "tree_mask", "positions", "cos_sin")  # in the ABI's order


def taken_by(spec: KernelSpec) -> tuple[str, ...]:
    """The arguments of :data:`EXTRAS` that kernels of a spec take."""
    turns = spec.rope is not Rope.NONE
    per_sequence = spec.causality is Causality.PER_SEQUENCE
    takes = (spec.sinks, spec.alibi, per_sequence, spec.tree_mask, turns, turns)
    return tuple(name for name, taken in zip(EXTRAS, takes, strict=True) if taken)


class _Extras(NamedTuple):
    """The arguments of :data:`EXTRAS` as a call gives them."""

    sinks: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    causal: torch.Tensor | None = None
    tree_mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    cos_sin: torch.Tensor | None = None

    @property
    def given(self) -> tuple[str, ...]:
        """Names of those that are no None."""
        return tuple(name for name, tensor in zip(EXTRAS, self, strict=True) if tensor is not None)

    def of(self, kernel: Kernel) -> tuple[torch.Tensor | None, ...]:
        """What a kernel is called with.

        Raises:
            ArgumentError: one is given that it doesn't take.
        """
        for name in self.given:
            if name not in kernel.takes:
                raise ArgumentError(f"{name}: None is expected, since {kernel.spec.name} has none")
        return tuple([getattr(self, name) for name in kernel.takes])


class Workspaces:
    """The workspaces of one kernel, made when first needed: one for each stream of a GPU or thread of a CPU.

    A workspace grows by powers of two of num_seqs. What it outgrew is kept, because a captured CUDA graph may
    hold its address; all of them together are no larger than the newest.
    """

    __slots__ = ("_current", "_library", "_outgrown")

    def __init__(self, library: Library) -> None:
        self._library = library
        self._current: dict[tuple[torch.device, int], tuple[int, torch.Tensor]] = {}
        self._outgrown: list[torch.Tensor] = []

    def take(self, num_seqs: int, device: torch.device) -> torch.Tensor:
        """A zeroed, or properly left, workspace for a call on the current stream or thread."""
        if device.type == "cuda":
            key = (device, torch.cuda.current_stream(device).cuda_stream)
        else:
            key = (device, threading.get_ident())
        held = self._current.get(key)
        if held is not None and held[0] >= num_seqs:
            return held[1]
        capacity = max(16, 1 << (num_seqs - 1).bit_length()) if num_seqs else 16
        size = self._library.workspace_bytes(capacity)
        workspace = torch.zeros(size, dtype=torch.uint8, device=device)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return workspace  # belongs to the graph, which zeroes it at every replay
        if held is not None:
            self._outgrown.append(held[1])
        self._current[key] = (capacity, workspace)
        return workspace


class Kernel:
    """The kernels of one spec: its library, and what a call needs beside its arguments."""

    __slots__ = ("call", "entry", "faults", "library", "softmax_scale", "spec", "takes", "workspaces")

    def __init__(self, entry: KernelEntry, library: Library) -> None:
        self.entry, self.spec, self.library = entry, entry.spec, library
        self.takes = taken_by(entry.spec)
        self.faults = Faults() if entry.spec.checked else None
        try:
            self.call: Callable[..., None] = getattr(library, entry.spec.op.value)
        except AttributeError:
            raise PackDamaged(f"{library.path}: it has no function named {entry.spec.op.value}") from None
        self.softmax_scale = entry.spec.head_dim**-0.5
        self.workspaces = Workspaces(library)


# Every Attention that somebody holds, by its number; several where a pack was loaded several times.
_loaded: dict[int, list[weakref.ref[Attention]]] = {}


def loaded(number: int) -> Attention:
    """A pack of this process by its number, the newest if it was loaded again: operators take no objects.

    Raises:
        ArgumentError: no pack of that number is loaded, or not any more.
    """
    for reference in reversed(_loaded.get(number, ())):
        attention = reference()
        if attention is not None:
            return attention
    raise ArgumentError(
        f"pack = {number}: no such pack is loaded, or nobody holds it any more; pagedgen.load it, and keep "
        "what it returns"
    )


class Attention:
    """A loaded pack: attention over a paged KV cache, by the operators that it has kernels of.

    Calls go on torch's current stream and do not synchronise. They may be captured in a CUDA graph; call
    :meth:`prepare`, or once eagerly, before.

    Calls that may run at the same time need a workspace each. Where none is given, every stream (on a CPU
    every thread) has its own; graphs captured on one stream and replayed at the same time on several should
    be captured with a ``workspace`` each.

    ``PAGEDGEN_CHECK_LENGTHS=1`` has lengths, block ids and slots of every call read back and checked first
    (:mod:`pagedgen.runtime.lengths`): for finding mistakes, since it synchronises.
    """

    def __init__(self, pack: Pack) -> None:
        self.pack = pack
        kernels = [Kernel(e, Library(pack.file(e.library))) for e in pack.manifest.kernels]
        self._kernels = {kernel.spec: kernel for kernel in kernels}
        # An operator's kernel where it has one: no search, the library checks the arguments itself.
        of_op = {op: [kernel for kernel in kernels if kernel.spec.op is op] for op in Op}
        self._only = {op: found[0] for op, found in of_op.items() if len(found) == 1}
        self._matches: dict[tuple[object, ...], Kernel] = {}
        self._checked = checks_wanted()
        self._by_name = {kernel.spec.name: kernel.spec for kernel in kernels}
        # Of what is in the pack: a program that was exported with it finds it in another process.
        self.number = int(pack.manifest.digest[:15], 16)
        held = [reference for reference in _loaded.get(self.number, ()) if reference() is not None]
        _loaded[self.number] = [*held, weakref.ref(self)]

    @property
    def specs(self) -> tuple[KernelSpec, ...]:
        """The specs that the pack has kernels for."""
        return tuple(self._kernels)

    def decode(
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
        workspace: torch.Tensor | None = None,
        max_seq_len: int | None = None,
        spec: KernelSpec | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of one query token a sequence: ``softmax(q kᵀ · softmax_scale) v``.

        Args:
            q: ``[num_seqs, num_q_heads, head_dim]``, head_dim contiguous.
            k: ``[num_blocks, block_size, num_kv_heads, head_dim]`` in logical order, any strides, innermost
                as the spec's ``k_inner``; fp8 as its torch type or as uint8.
            v: as k, head_dim contiguous.
            block_table: int32 ``[num_seqs, max_blocks]``, the blocks of each sequence in order.
            seq_lens: int32 ``[num_seqs]``, tokens of each sequence in the cache. Rows of length 0 are
                padding: nothing is written for them, so what ``out`` held there stays.
            out: where the result goes, as q; allocated if not given.
            lse: float32 ``[num_seqs, num_q_heads]`` for the natural logarithm of the softmax sum, for kernels
                with ``return_lse``; allocated if not given.
            softmax_scale: ``head_dim ** -0.5`` if not given.
            k_scale, v_scale: float32 dequantisation scales of an fp8 cache, ``[1]`` or ``[num_kv_heads]``.
            sinks: float32 ``[num_q_heads]``, for kernels with ``sinks``.
            alibi_slopes: float32 ``[num_q_heads]``, for kernels with ``alibi``: what a score loses for each
                token that lies between.
            workspace: uint8, at least :meth:`workspace_bytes`, zeroed once by its owner, used for nothing
                else and always with the same size. The call allocates nothing if this and ``out`` are given.
            max_seq_len: a bound on seq_lens that is known on the host; picks the kernel. What the block table
                can hold if not given.
            spec: which kernel, where the pack has several that fit the tensors.

        Returns:
            ``out``, or ``(out, lse)`` if the kernel returns an LSE.

        Raises:
            ArgumentError: an argument is not as above; names it, its value and what is allowed. Nothing ran.
            SpecNotInPack: no kernel, or more than one, for these tensors.
        """
        try:
            kernel = self._only.get(Op.DECODE) if spec is None else self._kernels.get(spec)
            if kernel is None or kernel.spec.op is not Op.DECODE:
                kernel = self._find(Op.DECODE, q, k, v, lse, k_scale, spec, _Extras(sinks, alibi_slopes))
            if max_seq_len is None:
                max_seq_len = _capacity(block_table, kernel.spec)
            if out is None:
                out = _out(kernel.spec, q)
            returns_lse = kernel.spec.return_lse
            if returns_lse and lse is None:
                lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
            if self._checked:
                _check(kernel.spec, q, k, block_table, seq_lens, None, max_seq_len)
            if workspace is None:
                workspace = kernel.workspaces.take(q.shape[0] if q.ndim else 0, q.device)
            kernel.call(
                q,
                k,
                v,
                block_table,
                seq_lens,
                out,
                lse,
                kernel.softmax_scale if softmax_scale is None else softmax_scale,
                k_scale,
                v_scale,
                workspace,
                max_seq_len,
                -1,
                *_Extras(sinks, alibi_slopes).of(kernel),
            )
        except PagedgenError:
            raise
        except Exception:
            # What is no plain tensor fails in many ways on its way to the library; say which it was.
            _refuse_strange(
                q=q,
                k=k,
                v=v,
                block_table=block_table,
                seq_lens=seq_lens,
                out=out,
                lse=lse,
                k_scale=k_scale,
                v_scale=v_scale,
                sinks=sinks,
                alibi_slopes=alibi_slopes,
                workspace=workspace,
            )
            raise
        if returns_lse:
            assert lse is not None
            return out, lse
        return out

    def extend(
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
        workspace: torch.Tensor | None = None,
        max_seq_len: int | None = None,
        spec: KernelSpec | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of the last tokens of each sequence: prompts, chunks and decodes, mixed.

        K and V of all tokens are in the cache, those of the queries included. Query i of the n of a sequence
        is at position ``seq_len - n + i``; which tokens it sees, those up to its own if nothing else is said,
        is up to the spec (:class:`KernelSpec`: ``causality``, ``window``, ``attention_chunk``).

        Args:
            q: ``[num_tokens, num_q_heads, head_dim]``, the queries of the sequences one after the other,
                head_dim contiguous.
            k, v, block_table, seq_lens: as :meth:`decode`.
            cu_seqlens_q: int32 ``[num_seqs + 1]``, not decreasing: the queries of sequence s are
                ``q[cu_seqlens_q[s] : cu_seqlens_q[s + 1]]``, at most ``seq_lens[s]``, or none. Rows of q
                outside them are padding: nothing is written there.
            out: where the result goes, as q; allocated if not given.
            lse: float32 ``[num_tokens, num_q_heads]``, otherwise as :meth:`decode`.
            softmax_scale, k_scale, v_scale, sinks, alibi_slopes, workspace, max_seq_len, spec: as
                :meth:`decode`.
            causal: uint8 ``[num_seqs]``, for kernels with ``causality`` per sequence: 0 where the sequence's
                queries see all of it.

        Returns:
            ``out``, or ``(out, lse)`` if the kernel returns an LSE.

        Raises:
            ArgumentError: an argument is not as above; names it, its value and what is allowed. Nothing ran.
                What lies in device memory, lengths and block ids, is not read for it.
            SpecNotInPack: no extend kernel, or more than one, for these tensors.
        """
        return self._ragged(
            Op.EXTEND, q, k, v, block_table, seq_lens, cu_seqlens_q, out, lse, softmax_scale, k_scale,
            v_scale, _Extras(sinks, alibi_slopes, causal), workspace, max_seq_len, spec,
        )  # fmt: skip

    def verify(
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
        workspace: torch.Tensor | None = None,
        max_seq_len: int | None = None,
        spec: KernelSpec | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of a few queries a sequence, drafted tokens to be verified: what :meth:`extend` computes.

        Long contexts are split, as :meth:`decode` splits them.

        Args:
            q, k, v, block_table, seq_lens, cu_seqlens_q: as :meth:`extend`.
            tree_mask: int64 ``[num_tokens]``, for kernels with ``tree_mask``: bit j of a query's says whether
                it sees query j of its sequence, one of 64 at most. All see themselves and every token before
                the sequence's queries.
            out, lse, softmax_scale, k_scale, v_scale, sinks, alibi_slopes, causal, workspace, max_seq_len,
                spec: as :meth:`extend`.

        Returns:
            ``out``, or ``(out, lse)`` if the kernel returns an LSE.

        Raises:
            ArgumentError, SpecNotInPack: as :meth:`extend`.
        """
        return self._ragged(
            Op.VERIFY, q, k, v, block_table, seq_lens, cu_seqlens_q, out, lse, softmax_scale, k_scale,
            v_scale, _Extras(sinks, alibi_slopes, causal, tree_mask), workspace, max_seq_len, spec,
        )  # fmt: skip

    def _ragged(
        self,
        op: Op,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        out: torch.Tensor | None,
        lse: torch.Tensor | None,
        softmax_scale: float | None,
        k_scale: torch.Tensor | None,
        v_scale: torch.Tensor | None,
        extras: _Extras,
        workspace: torch.Tensor | None,
        max_seq_len: int | None,
        spec: KernelSpec | None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """A call of an operator with any number of queries a sequence."""
        try:
            kernel = self._only.get(op) if spec is None else self._kernels.get(spec)
            if kernel is None or kernel.spec.op is not op:
                kernel = self._find(op, q, k, v, lse, k_scale, spec, extras)
            if max_seq_len is None:
                max_seq_len = _capacity(block_table, kernel.spec)
            if out is None:
                out = _out(kernel.spec, q)
            returns_lse = kernel.spec.return_lse
            if returns_lse and lse is None:
                lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
            if self._checked:
                _check(kernel.spec, q, k, block_table, seq_lens, cu_seqlens_q, max_seq_len)
            if workspace is None:
                workspace = kernel.workspaces.take(seq_lens.shape[0] if seq_lens.ndim else 0, q.device)
            kernel.call(
                q,
                k,
                v,
                block_table,
                seq_lens,
                cu_seqlens_q,
                out,
                lse,
                kernel.softmax_scale if softmax_scale is None else softmax_scale,
                k_scale,
                v_scale,
                workspace,
                max_seq_len,
                -1,
                *extras.of(kernel),
            )
        except PagedgenError:
            raise
        except Exception:
            _refuse_strange(
                q=q,
                k=k,
                v=v,
                block_table=block_table,
                seq_lens=seq_lens,
                cu_seqlens_q=cu_seqlens_q,
                out=out,
                lse=lse,
                k_scale=k_scale,
                v_scale=v_scale,
                sinks=extras.sinks,
                alibi_slopes=extras.alibi_slopes,
                causal=extras.causal,
                tree_mask=extras.tree_mask,
                workspace=workspace,
            )
            raise
        if returns_lse:
            assert lse is not None
            return out, lse
        return out

    def write_kv(
        self,
        new_k: torch.Tensor,
        new_v: torch.Tensor,
        slot_mapping: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        cos_sin: torch.Tensor | None = None,
        spec: KernelSpec | None = None,
    ) -> None:
        """Store K and V of new tokens in their slots, quantised where the pool is fp8.

        Kernels with ``rope`` turn K on the way, in float32, and round it once; new_k itself and the queries
        are left as they are.

        Args:
            new_k, new_v: ``[num_tokens, num_kv_heads, head_dim]``, head_dim contiguous.
            slot_mapping: int64 ``[num_tokens]``, block * block_size + slot; below 0: the token is not kept.
                Slots of kept tokens lie in the pool and differ.
            k, v: the pools, as :meth:`decode` takes them; written in place.
            k_scale, v_scale: as :meth:`decode`: what is stored is the value divided by the scale, rounded to
                the nearest, ties to even, and no larger than the type's largest.
            positions: int64 ``[num_tokens]``, for kernels with ``rope``.
            cos_sin: float32 ``[max_position, rotary_dim]``, contiguous, for kernels with ``rope``: the
                cosines of a position's ``rotary_dim / 2`` angles, then their sines.
            spec: which kernel, where the pack has several that fit the tensors.

        Raises:
            ArgumentError: an argument is not as above. Nothing ran.
            SpecNotInPack: no write_kv kernel, or more than one, for these tensors.
        """
        try:
            kernel = self._only.get(Op.WRITE_KV) if spec is None else self._kernels.get(spec)
            if kernel is None or kernel.spec.op is not Op.WRITE_KV:
                extras = _Extras(positions=positions, cos_sin=cos_sin)
                kernel = self._find(Op.WRITE_KV, new_k, k, v, None, k_scale, spec, extras)
            if self._checked:
                check_slots(slot_mapping, k.shape[0] * kernel.spec.block_size, written=True)
                if positions is not None and cos_sin is not None:
                    check_positions(positions, slot_mapping, cos_sin.shape[0])
            if positions is None and cos_sin is None and not kernel.takes and kernel.faults is None:
                kernel.call(new_k, new_v, slot_mapping, k, v, k_scale, v_scale, -1)
            else:
                more = _Extras(positions=positions, cos_sin=cos_sin).of(kernel)
                kernel.call(
                    new_k, new_v, slot_mapping, k, v, k_scale, v_scale, -1, *more, *_record(kernel, new_k)
                )
            if kernel.faults is not None:
                _raise_faults(kernel.faults, new_k)
        except PagedgenError:
            raise
        except Exception:
            _refuse_strange(
                new_k=new_k,
                new_v=new_v,
                slot_mapping=slot_mapping,
                k=k,
                v=v,
                k_scale=k_scale,
                v_scale=v_scale,
                positions=positions,
                cos_sin=cos_sin,
            )
            raise

    def kv_scales(
        self,
        new_k: torch.Tensor,
        new_v: torch.Tensor,
        slot_mapping: torch.Tensor,
        k_scale: torch.Tensor,
        v_scale: torch.Tensor,
        *,
        spec: KernelSpec,
    ) -> None:
        """Set the scales of an fp8 pool that are not set yet, by tokens that :meth:`write_kv` stores next.

        What is set, and why so: see :func:`pagedgen.runtime.kv_scales.set_scales`, which does the same.
        One launch, that reads nothing where all are set.

        Args:
            new_k, new_v, slot_mapping: as :meth:`write_kv`.
            k_scale, v_scale: float32 ``[1]`` or ``[num_kv_heads]``; entries of 0 or less are written.
            spec: the kernel's: which fp8 type the pool has does not follow from the tensors.

        Raises:
            ArgumentError: an argument is not as above. Nothing ran.
            SpecNotInPack: no kernel of this spec.
        """
        kernel = self.kernel(spec)
        if spec.op is not Op.KV_SCALES:
            raise SpecNotInPack(f"spec = {spec.name}: a spec of kv_scales is expected")
        try:
            kernel.call(new_k, new_v, slot_mapping, k_scale, v_scale, -1)
        except PagedgenError:
            raise
        except Exception:
            _refuse_strange(
                new_k=new_k, new_v=new_v, slot_mapping=slot_mapping, k_scale=k_scale, v_scale=v_scale
            )
            raise

    def gather(
        self,
        slot_mapping: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out_k: torch.Tensor,
        out_v: torch.Tensor,
        *,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        spec: KernelSpec | None = None,
    ) -> None:
        """Bring tokens' K and V from their slots into one piece, dequantised or as they are stored.

        Args:
            slot_mapping: int64 ``[num_tokens]``, block * block_size + slot; below 0: that row is not written.
            k, v: the pools, as :meth:`decode` takes them.
            out_k, out_v: ``[num_tokens, num_kv_heads, head_dim]``, head_dim contiguous; written. Their type
                says which kernel: the pool's own leaves fp8 as it is stored, another has it dequantised.
            k_scale, v_scale: as :meth:`decode`, for kernels that dequantise: values are multiplied with them
                in float32, then rounded.
            spec: which kernel, where the pack has several that fit the tensors.

        Raises:
            ArgumentError: an argument is not as above. Nothing ran.
            SpecNotInPack: no gather kernel, or more than one, for these tensors.
        """
        try:
            kernel = self._only.get(Op.GATHER) if spec is None else self._kernels.get(spec)
            if kernel is None or kernel.spec.op is not Op.GATHER:
                kernel = self._find(Op.GATHER, out_k, k, v, None, k_scale, spec)
            if self._checked:
                check_slots(slot_mapping, k.shape[0] * kernel.spec.block_size, written=False)
            kernel.call(out_k, out_v, slot_mapping, k, v, k_scale, v_scale, -1, *_record(kernel, out_k))
            if kernel.faults is not None:
                _raise_faults(kernel.faults, out_k)
        except PagedgenError:
            raise
        except Exception:
            _refuse_strange(
                slot_mapping=slot_mapping,
                k=k,
                v=v,
                out_k=out_k,
                out_v=out_v,
                k_scale=k_scale,
                v_scale=v_scale,
            )
            raise

    def copy_blocks(
        self,
        pools: BlockPools,
        pairs: torch.Tensor,
        *,
        into: BlockPools | None = None,
        spec: KernelSpec | None = None,
    ) -> None:
        """Copy whole blocks in all pools, K and V of every layer, by one launch.

        Args:
            pools: where blocks are read; written too, unless ``into`` is given.
            pairs: int64 ``[num_pairs, 2]`` of (source, destination), contiguous, on the pools' device. No
                block is written twice, and none that is written is read: pairs are copied in no order.
            into: as many pools, with pages as long; a staging buffer, say.
            spec: which kernel, where the pack has several; any that knows the pools' alignment will do.

        Raises:
            ArgumentError: an argument is not as above. Nothing ran. The pairs' numbers, which lie in device
                memory, are not read for it.
            SpecNotInPack: no copy_blocks kernel for pools of this alignment.
        """
        kernel = self.copier(pools.align) if spec is None else self.kernel(spec)
        if kernel is None or kernel.spec.op is not Op.COPY_BLOCKS:
            what = (
                f"copy_blocks of pages that are multiples of {pools.align} B" if spec is None else spec.name
            )
            raise SpecNotInPack(f"{what}: no such kernel; {self._known()}")
        into = pools if into is None else into
        if into.pages != pools.pages:
            raise ArgumentError(f"into: pages of {into.pages} B: {pools.pages}, as of pools, are expected")
        for name, given in (("pools", pools), ("into", into)):
            if given.align % kernel.spec.page_align:
                raise ArgumentError(
                    f"{name}: addresses, steps and pages are multiples of {given.align} B: "
                    f"{kernel.spec.page_align} is expected by {kernel.spec.name}"
                )
        try:
            if self._checked:
                check_pairs(pairs, pools.num_blocks, into.num_blocks, same_pools=into is pools)
            kernel.call(pools.origin, into.origin, pools.table, into.table, pairs, max(pools.pages), -1)
        except PagedgenError:
            raise
        except Exception:
            _refuse_strange(pairs=pairs)
            raise

    def merge(
        self,
        outs: torch.Tensor,
        lses: torch.Tensor,
        *,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        spec: KernelSpec | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over a whole context from that over its parts, by one launch; see :func:`pagedgen.merge`.

        Args:
            outs: ``[num_parts, num_tokens, num_q_heads, head_dim]``, head_dim contiguous.
            lses: float32 ``[num_parts, num_tokens, num_q_heads]``; -inf: an empty part, not read.
            out, lse: where the result goes, ``[num_tokens, num_q_heads, head_dim]`` as outs, and float32
                ``[num_tokens, num_q_heads]``; allocated if not given.
            sinks: float32 ``[num_q_heads]``, for kernels with ``sinks``.
            spec: which kernel, where the pack has several that fit the tensors.

        Returns:
            ``(out, lse)``.

        Raises:
            ArgumentError: an argument is not as above. Nothing ran.
            SpecNotInPack: no merge kernel for these tensors; :func:`pagedgen.merge` needs none.
        """
        kernel = self._merger(outs, sinks) if spec is None else self.kernel(spec)
        if kernel.spec.op is not Op.MERGE:
            raise SpecNotInPack(f"spec = {kernel.spec.name}: a spec of merge is expected")
        try:
            if out is None:
                out = torch.empty(outs.shape[1:], dtype=outs.dtype, device=outs.device)
            if lse is None:
                lse = torch.empty(outs.shape[1:3], dtype=torch.float32, device=outs.device)
            kernel.call(outs, lses, out, lse, -1, *_Extras(sinks).of(kernel))
        except PagedgenError:
            raise
        except Exception:
            _refuse_strange(outs=outs, lses=lses, out=out, lse=lse, sinks=sinks)
            raise
        return out, lse

    def _merger(self, outs: torch.Tensor, sinks: torch.Tensor | None) -> Kernel:
        if outs.ndim != 4:
            shape = "[num_parts, num_tokens, num_q_heads, head_dim]"
            raise ArgumentError(f"outs.shape = {list(outs.shape)}: rank 4 is expected, {shape}")
        for kernel in self._kernels.values():
            spec = kernel.spec
            fits = spec.op is Op.MERGE and TORCH_DTYPES[spec.q_dtype] == outs.dtype
            if (
                fits
                and outs.shape[2:] == (spec.num_q_heads, spec.head_dim)
                and spec.sinks == (sinks is not None)
            ):
                return kernel
        what = f"merge of outs {outs.dtype} {list(outs.shape)}{'' if sinks is None else ', sinks given'}"
        raise SpecNotInPack(f"{what.replace('torch.', '')}: no kernel fits; {self._known()}")

    def copier(self, align: int) -> Kernel | None:
        """A copy_blocks kernel for pools whose begins, steps and pages are multiples of ``align`` bytes."""
        for kernel in self._kernels.values():
            if kernel.spec.op is Op.COPY_BLOCKS and align % kernel.spec.page_align == 0:
                return kernel
        return None

    def workspace_bytes(self, num_seqs: int, spec: KernelSpec | None = None) -> int:
        """Bytes of workspace for up to ``num_seqs`` sequences with one spec, or with any of the pack's.

        A workspace serves one spec: what kernels of another leave in it is not what this one expects.

        Raises:
            SpecNotInPack: no kernel for ``spec``.
        """
        kernels = self._kernels.values() if spec is None else [self.kernel(spec)]
        return max(kernel.library.workspace_bytes(num_seqs) for kernel in kernels)

    def kernel(self, spec: KernelSpec) -> Kernel:
        """The kernels of one spec.

        Raises:
            SpecNotInPack: there are none.
        """
        try:
            return self._kernels[spec]
        except KeyError:
            name = spec.name if isinstance(spec, KernelSpec) else repr(spec)
            raise SpecNotInPack(f"spec = {name}: {self._known()}") from None

    def spec_named(self, name: str) -> KernelSpec:
        """The pack's spec of that name.

        Raises:
            SpecNotInPack: there is none.
        """
        try:
            return self._by_name[name]
        except KeyError:
            raise SpecNotInPack(f"spec = {name}: {self._known()}") from None

    def prepare(self, device: torch.device | str | int = 0) -> None:
        """Load every kernel onto a GPU, which otherwise happens in the first call of each; no-op on a CPU.

        Raises:
            ArgumentError: no CUDA device.
        """
        if self.pack.manifest.kind == "cpu":
            return
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if device.type != "cuda":
            raise ArgumentError(
                f"device = {device}: a CUDA device is expected, the pack's kernels are for one"
            )
        index = torch.cuda.current_device() if device.index is None else device.index
        for kernel in self._kernels.values():
            kernel.library.prepare(index)

    def check_faults(self) -> None:
        """Raise what kernels of a debug build (``checked``) found; after the replay of a captured graph.

        Eager calls of such kernels wait and raise by themselves; others record nothing.

        Raises:
            ArgumentError: names the token, its slot and what is allowed. The token was left out.
        """
        for kernel in self._kernels.values():
            if kernel.faults is not None:
                kernel.faults.check()

    def _known(self) -> str:
        return f"the pack holds {', '.join(spec.name for spec in self._kernels)}"

    def _find(
        self,
        op: Op,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor | None,
        k_scale: torch.Tensor | None,
        spec: KernelSpec | None,
        extras: _Extras | None = None,
    ) -> Kernel:
        """The kernel of an operator that fits the tensors; what it found is remembered."""
        if spec is not None:
            kernel = self.kernel(spec)
            if spec.op is not op:
                raise SpecNotInPack(f"spec = {spec.name}: a spec of {op.value} is expected")
            return kernel
        strides = k.stride()
        scales = 0 if k_scale is None else k_scale.numel()
        inner = (strides[-1:] == (1,), strides[1:2] == (1,))
        names = () if extras is None else extras.given
        key = (op, q.dtype, k.dtype, q.shape[1:], k.shape[1:], v.shape[3:], inner, lse is None, scales, names)
        found = self._matches.get(key)
        if found is None:
            found = self._match(op, q, k, v, lse, k_scale, names)
            if len(self._matches) >= MANY_MATCHES:
                self._matches.clear()
            self._matches[key] = found
        return found

    def _match(
        self,
        op: Op,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor | None,
        k_scale: torch.Tensor | None,
        given: tuple[str, ...],
    ) -> Kernel:
        if q.ndim != 3:
            rows = "num_seqs" if op is Op.DECODE else "num_tokens"
            raise ArgumentError(
                f"q.shape = {list(q.shape)}: rank 3 is expected, [{rows}, num_q_heads, head_dim]"
            )
        if k.ndim != 4:
            pool = "[num_blocks, block_size, num_kv_heads, head_dim]"
            raise ArgumentError(f"k.shape = {list(k.shape)}: rank 4 is expected, {pool}")
        of_op = [kernel for kernel in self._kernels.values() if kernel.spec.op is op]
        if not of_op:
            raise SpecNotInPack(f"{op.value}: {self._known()}")
        fits = [kernel for kernel in of_op if _fits(kernel.spec, q, k, v)]
        fits = [kernel for kernel in fits if kernel.takes == given]
        if lse is not None:
            fits = [kernel for kernel in fits if kernel.spec.return_lse]
        elif not all(kernel.spec.return_lse for kernel in fits):
            fits = [kernel for kernel in fits if not kernel.spec.return_lse]
        if k_scale is not None and len(fits) > 1:
            per_head = k_scale.numel() > 1
            fits = [kernel for kernel in fits if (kernel.spec.kv_scale is KVScale.HEAD) == per_head]
        if len(fits) == 1:
            return fits[0]
        what = (
            f"q {q.dtype} {list(q.shape)}, k {k.dtype} {list(k.shape)} with strides {list(k.stride())}"
            f"{'' if lse is None else ', lse wanted'}{''.join(f', {name} given' for name in given)}"
        ).replace("torch.", "")
        if fits:
            names = ", ".join(kernel.spec.name for kernel in fits)
            raise SpecNotInPack(f"{what}: {names} all fit; say which as spec=")
        raise SpecNotInPack(f"{what}: no kernel fits; {self._known()}")


def _record(kernel: Kernel, given: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The argument that kernels of a debug build have more."""
    return () if kernel.faults is None else (kernel.faults.record(given.device),)


def _raise_faults(faults: Faults, given: torch.Tensor) -> None:
    """Raise what an eager call found; a captured one has not run yet."""
    if not (given.is_cuda and torch.cuda.is_current_stream_capturing()):
        faults.check()


def _capacity(block_table: torch.Tensor, spec: KernelSpec) -> int:
    """Tokens that a row of the block table can hold."""
    if block_table.ndim != 2:
        shape = list(block_table.shape)
        raise ArgumentError(f"block_table.shape = {shape}: rank 2 is expected, [num_seqs, max_blocks]")
    return block_table.shape[1] * spec.block_size


def _check(
    spec: KernelSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    max_seq_len: int,
) -> None:
    check_lengths(
        block_table,
        seq_lens,
        cu_seqlens_q,
        spec=spec,
        num_tokens=q.shape[0],
        num_blocks=k.shape[0],
        max_seq_len=max_seq_len,
    )


def _out(spec: KernelSpec, q: torch.Tensor) -> torch.Tensor:
    """Memory for a call's result."""
    return torch.empty_like(q) if spec.head_dim_v is None else q.new_empty((*q.shape[:2], spec.head_dim_v))


def _refuse_strange(**tensors: object) -> None:
    for name, value in tensors.items():
        if value is None and name in ("lse", "k_scale", "v_scale", "workspace", "out", *EXTRAS):
            continue
        if not isinstance(value, torch.Tensor):
            raise ArgumentError(f"{name}: {type(value).__name__}: a torch.Tensor is expected")
        if value.layout != torch.strided or value.device.type == "meta":
            raise ArgumentError(
                f"{name}: {value.layout} on {value.device}: a plain tensor with data is expected"
            )


def _fits(spec: KernelSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    if q.dtype != TORCH_DTYPES[spec.q_dtype] or tuple(q.shape[1:]) != (spec.num_q_heads, spec.head_dim):
        return False
    if k.dtype != TORCH_DTYPES[spec.kv_dtype] and not (spec.kv_dtype.is_fp8 and k.dtype == torch.uint8):
        return False
    if tuple(k.shape[1:]) != (spec.block_size, spec.num_kv_heads, spec.head_dim):
        return False
    if tuple(v.shape[3:]) != (spec.v_dim,):
        return False
    if spec.k_inner is KInner.TOKEN:
        return k.stride(1) == 1 or spec.block_size == 1
    return k.stride(3) == 1


def load(path: Path | str) -> Attention:
    """Load a pack: check every file of it and that it is for this machine, and open its libraries.

    Example::

        attention = pagedgen.load("llama-3-8b.h100.pack")
        out = attention.decode(q, k, v, block_table, seq_lens)

    Raises:
        PackDamaged: a file is missing, truncated or altered; names it.
        PackForeign: for another architecture, platform, format or major version.
    """
    pack = open_pack(path)
    check_machine(pack)
    return Attention(pack)
