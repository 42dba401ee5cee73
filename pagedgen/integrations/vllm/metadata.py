"""``StepMetadata``, what all layers of a step share, and the builder that takes it from vLLM's batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import CUDAGraphMode, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec

from pagedgen.integrations.serving_pack import refuse
from pagedgen.integrations.vllm.impl import PagedgenImpl

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(slots=True)
class StepMetadata(AttentionMetadata):  # type: ignore[misc]
    """A batch: ``num_decodes`` sequences of one query each come first, the others after them.

    ``query_start_loc`` int32 ``[num_seqs + 1]``, ``seq_lens`` int32 ``[num_seqs]``, ``block_table`` int32
    ``[num_seqs, max_blocks]``, all on the device; ``max_seq_len`` is a bound on seq_lens. vLLM sets
    ``make_virtual_batches_block_table`` for layers with attention in chunks.
    """

    num_tokens: int
    num_decodes: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    max_seq_len: int
    make_virtual_batches_block_table: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def num_seqs(self) -> int:
        """Sequences of the batch, padding included."""
        return self.seq_lens.shape[0]


class MetadataBuilder(AttentionMetadataBuilder[StepMetadata]):  # type: ignore[misc]
    """Takes vLLM's batch as it is: nothing is planned, copied or synchronised.

    Every tensor is vLLM's persistent one, so captured graphs see the values of the step that replays them. A
    mixed batch is two calls, decodes apart, except where vLLM captures mixed batches whole: how many of a
    replayed batch are decodes is not known at its capture, so that there one call of extend takes them all.

    For attention in chunks (Llama 4) vLLM makes a sequence of every chunk that a step has queries in, over
    that chunk's blocks alone, and never captures: kernels without chunks serve such batches.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS
    supports_update_block_table = True
    supports_draft_decode_metadata_update = True

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        config = vllm_config.compilation_config
        mode = config.cudagraph_mode
        chunked = isinstance(kv_cache_spec, ChunkedLocalAttentionSpec)
        self._whole = not chunked and mode is not None and mode.mixed_mode() == CUDAGraphMode.FULL
        self._block_size: int = kv_cache_spec.block_size
        # Graphs are captured for padded batches, which may pass max_num_seqs.
        most_seqs = max(
            vllm_config.scheduler_config.max_num_seqs, max(config.cudagraph_capture_sizes or (), default=0)
        )
        if chunked:
            # Of q new tokens at most 2 + q / chunk chunks have some: the first and the last may have few.
            most_tokens = vllm_config.scheduler_config.max_num_batched_tokens
            most_seqs = 2 * most_seqs + most_tokens // kv_cache_spec.attention_chunk_size
        for layer in get_layers_from_vllm_config(vllm_config, Attention, layer_names).values():
            if isinstance(layer.impl, PagedgenImpl):
                layer.impl.bind(self._block_size, most_seqs, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StepMetadata:
        """The metadata of a step.

        Raises:
            Unsupported: the batch is not causal.
        """
        common = common_attn_metadata
        if common.causal is not True:
            refuse("causal", common.causal, "pagedgen's kernels are causal")
        if common.max_query_len <= 1:
            num_decodes = common.num_reqs
        else:
            num_decodes = 0 if self._whole else split_decodes_and_prefills(common, decode_threshold=1)[0]
        # vLLM's bound may lie past what the table holds when it plans ahead; no length does.
        capacity = common.block_table_tensor.shape[1] * self._block_size
        return StepMetadata(
            num_tokens=common.num_actual_tokens,
            num_decodes=num_decodes,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            max_seq_len=min(common.max_seq_len, capacity),
        )

    def update_block_table(
        self, metadata: StepMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> StepMetadata:
        """The same step over another group's blocks."""
        return replace(metadata, block_table=blk_table)

    def update_draft_decode_metadata(self, metadata: StepMetadata) -> None:
        """Nothing to do: everything refers to vLLM's own tensors."""
