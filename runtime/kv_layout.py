"""``KVLayout``: the physical orders of a KV pool. All of them give the kernels the same logical view."""

from __future__ import annotations

from enum import StrEnum

import torch

from pagedgen.values.spec import KInner


class KVLayout(StrEnum):
    """How the elements of a block lie in memory.

    Kernels see K and V as ``[num_blocks, block_size, num_kv_heads, head_dim]`` whatever the order.
    """

    NHD = "nhd"  # token, head, dim; K and V in pools of their own; read as token slots by SGLang
    HND = "hnd"  # head, token, dim
    PACKED = "packed"  # head, token, K's dims then V's: the order of vLLM
    KTOKEN = "ktoken"  # K: head, dim, token; V: head, token, dim; fastest on CPUs

    @property
    def planes(self) -> int:
        """Pools a layer: K and V apart, or both in one."""
        return 1 if self is KVLayout.PACKED else 2

    @property
    def k_inner(self) -> KInner:
        """The spec field that kernels for this layout have."""
        return KInner.TOKEN if self is KVLayout.KTOKEN else KInner.DIM

    def views(
        self, planes: torch.Tensor, block_size: int, num_kv_heads: int, head_dim: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, ``[num_blocks, block_size, num_kv_heads, head_dim]``, as views.

        Args:
            planes: ``[planes, num_blocks, elements of a block]``, contiguous in the last axis.
        """
        blocks = planes.shape[1]
        heads_first = (blocks, num_kv_heads, block_size, head_dim)
        match self:
            case KVLayout.NHD:
                shape = (blocks, block_size, num_kv_heads, head_dim)
                return planes[0].view(shape), planes[1].view(shape)
            case KVLayout.HND:
                return planes[0].view(heads_first).transpose(1, 2), planes[1].view(heads_first).transpose(
                    1, 2
                )
            case KVLayout.KTOKEN:
                k = planes[0].view(blocks, num_kv_heads, head_dim, block_size)
                return k.permute(0, 3, 1, 2), planes[1].view(heads_first).transpose(1, 2)
            case KVLayout.PACKED:
                both = planes[0].view(blocks, num_kv_heads, block_size, 2 * head_dim).transpose(1, 2)
                return both[..., :head_dim], both[..., head_dim:]
