"""``PagedgenBackend``: what vLLM asks of an attention backend before it builds anything."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheLayout

from pagedgen.integrations.serving_pack import chosen_pack
from pagedgen.integrations.vllm.impl import PagedgenImpl
from pagedgen.integrations.vllm.metadata import MetadataBuilder
from pagedgen.values.spec import KInner


class PagedgenBackend(AttentionBackend):  # type: ignore[misc]
    """Causal self-attention over a paged cache by the kernels of one pack.

    Which layers it serves is a matter of the pack, and settled for each layer when the model is built
    (:class:`PagedgenImpl`); what is said here is what kernels can be had for at all.
    """

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [
        "auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2",
    ]  # fmt: skip
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        """The member of vLLM's table of backends."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[PagedgenImpl]:
        """What computes a layer."""
        return PagedgenImpl

    @staticmethod
    def get_builder_cls() -> type[MetadataBuilder]:
        """What prepares a step."""
        return MetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Those of the pack, for the layers of ``kv_cache_spec`` where it is given.

        vLLM's own blocks may be any multiple: it splits them for the kernels.

        Raises:
            PackNotChosen, PackDamaged, PackForeign: there is no usable pack.
        """
        pack = chosen_pack()
        if kv_cache_spec is not None and hasattr(kv_cache_spec, "num_kv_heads"):
            own = pack.block_sizes(head_dim=kv_cache_spec.head_size, num_kv_heads=kv_cache_spec.num_kv_heads)
            if own:
                return list(own)
        return list(pack.block_sizes())

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...] | None:
        """Any, by strides; for kernels with K along tokens, those with contiguous heads within a block."""
        if chosen_pack().k_inner is KInner.DIM:
            return None
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Multiples of 8 from 32 to 256."""
        return 32 <= head_size <= 256 and head_size % 8 == 0

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """A field of the spec."""
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        """A field of the spec."""
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """No: decodes and prompts are told apart by the lengths on the host."""
        return False
