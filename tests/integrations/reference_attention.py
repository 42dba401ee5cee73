"""``Attention`` in plain torch, for operators that a pack has no kernels of: to test what calls it."""

from __future__ import annotations

import torch

from pagedgen.runtime.attention import Attention
from pagedgen.values.spec import KernelSpec


class ReferenceAttention:
    """The methods that plug-ins call, by the kernels of ``real`` where it has the spec, else by torch.

    Arguments are checked as docs/kernel_contract.md states them; FP8 pools are not covered.
    """

    def __init__(self, real: Attention | None = None) -> None:
        self.real = real
        self.calls = {"kernel": 0, "reference": 0}

    def _has(self, spec: KernelSpec) -> bool:
        has = self.real is not None and spec in self.real.specs
        self.calls["kernel" if has else "reference"] += 1
        return has

    def prepare(self, device: torch.device) -> None:
        if self.real is not None:
            self.real.prepare(device)

    def workspace_bytes(self, num_seqs: int, spec: KernelSpec) -> int:
        has = self.real is not None and spec in self.real.specs
        return self.real.workspace_bytes(num_seqs, spec) if has else 1

    def decode(self, q, k, v, block_table, seq_lens, *, spec, **options):
        if self._has(spec):
            return self.real.decode(q, k, v, block_table, seq_lens, spec=spec, **options)
        rows = torch.arange(len(seq_lens) + 1, dtype=torch.int32)
        return self._attend(q, k, v, block_table, seq_lens, rows, spec=spec, **options)

    def extend(self, q, k, v, block_table, seq_lens, cu_seqlens_q, *, spec, **options):
        if self._has(spec):
            return self.real.extend(q, k, v, block_table, seq_lens, cu_seqlens_q, spec=spec, **options)
        return self._attend(q, k, v, block_table, seq_lens, cu_seqlens_q, spec=spec, **options)

    def write_kv(self, new_k, new_v, slot_mapping, k, v, *, k_scale=None, v_scale=None, spec):
        if self._has(spec):
            self.real.write_kv(new_k, new_v, slot_mapping, k, v, k_scale=k_scale, v_scale=v_scale, spec=spec)
            return
        assert slot_mapping.dtype == torch.int64 and len(new_k) == len(new_v) == len(slot_mapping)
        kept = slot_mapping >= 0
        slots = slot_mapping[kept]
        for pool, new in ((k, new_k), (v, new_v)):
            pool[slots // spec.block_size, slots % spec.block_size] = new[kept]

    def _attend(
        self, q, k, v, block_table, seq_lens, cu_seqlens_q, *, out, softmax_scale, sinks, max_seq_len,
        spec, workspace=None, k_scale=None, v_scale=None,
    ):  # fmt: skip
        assert block_table.dtype == seq_lens.dtype == cu_seqlens_q.dtype == torch.int32
        assert len(block_table) == len(seq_lens) == len(cu_seqlens_q) - 1
        assert int(seq_lens.max()) <= max_seq_len <= block_table.shape[1] * spec.block_size
        assert q.shape == out.shape and k.shape[1:] == (spec.block_size, spec.num_kv_heads, spec.head_dim)
        assert (sinks is not None) == spec.sinks and (sinks is None or sinks.dtype == torch.float32)
        for i, length in enumerate(seq_lens.tolist()):
            start, end = cu_seqlens_q[i : i + 2].tolist()
            if start == end or not length:
                continue
            blocks = block_table[i, : -(-length // spec.block_size)].long()
            keys, values = (
                pool[blocks].flatten(0, 1)[:length].repeat_interleave(spec.group_size, 1) for pool in (k, v)
            )
            scores = torch.einsum("nhd,thd->hnt", q[start:end].float(), keys.float()) * softmax_scale
            if spec.logits_soft_cap is not None:
                scores = spec.logits_soft_cap * torch.tanh(scores / spec.logits_soft_cap)
            query = torch.arange(length - (end - start), length)[:, None]
            key = torch.arange(length)[None]
            seen = key <= query
            if spec.window is not None:
                seen &= key > query - spec.window
            scores = scores.masked_fill(~seen, float("-inf"))
            if sinks is not None:
                scores = torch.cat([scores, sinks[:, None, None].expand(-1, end - start, 1)], -1)
            weights = scores.softmax(-1)[..., :length]
            out[start:end] = torch.einsum("hnt,thd->nhd", weights, values.float()).to(out.dtype)
        return out
