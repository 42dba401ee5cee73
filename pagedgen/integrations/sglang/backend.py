"""``PagedgenBackend``: SGLang's attention over token-slot and paged pools, by the chosen pack's kernels."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sglang
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

from pagedgen.integrations.serving_pack import (
    Layer,
    LayerKernels,
    ServingPack,
    chosen_pack,
    lookup,
    refuse,
    require_version,
)
from pagedgen.runtime.attention import TORCH_DTYPES
from pagedgen.values.spec import DType, KernelSpec

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

logger = logging.getLogger(__name__)
VERSIONS = (0, 5, 23), (0, 6)  # the first that is allowed, and the first that is not
DTYPES = {torch_dtype: dtype for dtype, torch_dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class StepMetadata:
    """A batch: int32 ``block_table`` ``[num_seqs, max_blocks]``, ``seq_lens`` ``[num_seqs]``, and for an
    extend ``cu_seqlens_q`` ``[num_seqs + 1]``, on the device."""

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor | None
    max_seq_len: int
    captured: bool = False


def layer_of(attention: RadixAttention, *, sinks: bool, q_dtype: DType, kv_dtype: DType) -> Layer:
    """What a layer of an SGLang model asks of kernels.

    Raises:
        Unsupported: a feature that no kernel computes; names it.
    """
    wanted = {
        "attn_type": (attention.attn_type, AttentionType.DECODER),
        "is_cross_attention": (attention.is_cross_attention, False),
        "use_irope": (bool(attention.use_irope), False),
        "pos_encoding_mode": (attention.pos_encoding_mode, "NONE"),
        "logit_capping_method": (attention.logit_capping_method, "tanh"),
        "xai_temperature_len": (attention.xai_temperature_len, -1),
        "v_head_dim": (attention.v_head_dim, attention.qk_head_dim),
    }
    for name, (value, served) in wanted.items():
        if value != served:
            refuse(name, value, f"pagedgen's plug-in serves {served!r}")
    window = attention.sliding_window_size
    return Layer(
        head_dim=attention.qk_head_dim,
        num_q_heads=attention.tp_q_head_num,
        num_kv_heads=attention.tp_k_head_num,
        q_dtype=q_dtype,
        kv_dtype=kv_dtype,
        # SGLang counts the tokens before the query's own.
        window=window + 1 if window is not None and window > -1 else None,
        logits_soft_cap=float(attention.logit_cap) if attention.logit_cap else None,
        sinks=sinks,
    )


class PagedgenBackend(AttentionBackend):  # type: ignore[misc]
    """Decode, captured or not, and extend of decoder layers; blocks are the pool's pages.

    Raises:
        Unsupported: speculative decoding, a pool with a part for sliding windows, a feature of a layer that
            no kernel computes.
        PackNotChosen, PackDamaged, PackForeign, SpecNotInPack: no pack, or none for a layer of the model;
            says what to run.
        VersionUnmet: another SGLang than the plug-in was written for.
    """

    needs_cpu_seq_lens = False

    def __init__(self, runner: Any) -> None:
        super().__init__()
        require_version("sglang", sglang.__version__, *VERSIONS)
        self._pool, self._rows = runner.token_to_kv_pool, runner.req_to_token_pool
        if hasattr(self._pool, "swa_kv_pool"):
            refuse("token_to_kv_pool", type(self._pool).__name__, "start with --disable-hybrid-swa-memory")
        if not runner.spec_algorithm.is_none():
            refuse(
                "speculative_algorithm", str(runner.spec_algorithm), "the plug-in decodes one token a step"
            )
        self._page: int = runner.page_size
        self._max_context: int = runner.model_config.context_len
        self._device = torch.device(runner.device)
        self._ones = torch.ones(1, device=self._device)
        self._pack: ServingPack = chosen_pack()
        self._kernels: dict[int, LayerKernels] = {}
        served = set()
        q_dtype = lookup("dtype", runner.dtype, DTYPES)
        kv_dtype = lookup("kv_cache_dtype", runner.kv_cache_dtype, DTYPES)
        for parent in runner.model.modules():
            for layer in (child for child in parent.children() if isinstance(child, RadixAttention)):
                sinks = getattr(parent, "sinks", None) is not None
                own = layer_of(layer, sinks=sinks, q_dtype=q_dtype, kv_dtype=kv_dtype)
                self._kernels[layer.layer_id] = self._pack.kernels(own, self._page)
                served.add(own)
        for own in sorted(served, key=str):
            logger.info("pagedgen: %s serves %s", self._pack.pack.path, own)
        attention = self._pack.attention  # loaded at start: a pack for another machine is refused there
        if self._device.type == "cuda":
            attention.prepare(self._device)
        self._graph_table: torch.Tensor | None = None
        self._graph_lens: torch.Tensor | None = None
        self._workspaces: dict[KernelSpec, torch.Tensor] = {}  # of captured decodes: their addresses stay

    def _table(self, forward_batch: ForwardBatch, tokens: int) -> torch.Tensor:
        """Blocks of the batch's sequences, enough for ``tokens`` each, from the first slot of every page."""
        slots: torch.Tensor = self._rows.req_to_token[forward_batch.req_pool_indices, : tokens : self._page]
        return slots if self._page == 1 else slots // self._page

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """The metadata of a step that runs eagerly.

        Raises:
            Unsupported: neither a decode nor an extend.
        """
        mode = forward_batch.forward_mode
        if mode.is_idle():
            return
        longest = self._max_context
        if forward_batch.seq_lens_cpu is not None:
            longest = int(forward_batch.seq_lens_cpu.max())
        lengths, starts = forward_batch.seq_lens.to(torch.int32), None
        if mode.is_target_verify() or mode.is_draft_extend_v2():
            refuse("forward_mode", str(mode), "the plug-in decodes one token a step")
        if not mode.is_decode():
            starts = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
            starts[1:] = forward_batch.extend_seq_lens.cumsum(0)
        table = self._table(forward_batch, longest).to(torch.int32).contiguous()
        self.forward_metadata = StepMetadata(table, lengths, starts, longest)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Set aside what captured decodes read their tables and lengths from."""
        blocks = -(-self._max_context // self._page)
        self._graph_table = torch.zeros(max_bs, blocks, dtype=torch.int32, device=self._device)
        self._graph_lens = torch.zeros(max_bs, dtype=torch.int32, device=self._device)
        for spec in {kernels.decode for kernels in self._kernels.values()}:
            size = self._pack.attention.workspace_bytes(max_bs, spec)
            self._workspaces[spec] = torch.zeros(size, dtype=torch.uint8, device=self._device)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Fill the tables and lengths of a captured decode, before its capture and before each replay.

        Raises:
            Unsupported: not a decode.
        """
        if not forward_batch.forward_mode.is_decode_or_idle():
            refuse("forward_mode", str(forward_batch.forward_mode), "decodes alone are captured")
        assert self._graph_table is not None and self._graph_lens is not None
        size = forward_batch.batch_size
        self._graph_table[:size].copy_(self._table(forward_batch, self._max_context))
        self._graph_lens[:size].copy_(forward_batch.seq_lens)
        self.forward_metadata = StepMetadata(
            self._graph_table[:size], self._graph_lens[:size], None, self._max_context, captured=True
        )

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Padding reads the pool's slot for nothing."""
        return 1

    def support_triton(self) -> bool:
        """Whether SGLang may use its own Triton kernels for block tables."""
        return True

    def views(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer, ``[pages, page_size, num_kv_heads, head_dim]``.

        A pool is ``[slots, heads, dim]``, or with heads outside of tokens ``[pages, heads, page_size, dim]``.
        """
        pools = self._pool.get_key_buffer(layer_id), self._pool.get_value_buffer(layer_id)
        if pools[0].ndim == 4:
            return pools[0].transpose(1, 2), pools[1].transpose(1, 2)
        k, v = (pool.view(-1, self._page, *pool.shape[1:]) for pool in pools)
        return k, v

    def _run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention,
        forward_batch: ForwardBatch, save_kv_cache: bool, sinks: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        kernels, attention = self._kernels[layer.layer_id], self._pack.attention
        pool_k, pool_v = self.views(layer.layer_id)
        k_scale = v_scale = None
        if kernels.decode.kv_dtype.is_fp8:
            k_scale = self._ones if layer.k_scale is None else layer.k_scale.view(1)
            v_scale = self._ones if layer.v_scale is None else layer.v_scale.view(1)
        if save_kv_cache and k is not None:
            shape = (-1, layer.tp_k_head_num, layer.qk_head_dim)
            attention.write_kv(
                k.view(shape), v.view(shape), forward_batch.out_cache_loc.to(torch.int64), pool_k, pool_v,
                k_scale=k_scale, v_scale=v_scale, spec=kernels.write_kv,
            )  # fmt: skip
        rows = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = torch.empty_like(rows)
        step = self.forward_metadata
        assert isinstance(step, StepMetadata)
        options = {
            "out": out,
            "softmax_scale": layer.scaling,
            "k_scale": k_scale,
            "v_scale": v_scale,
            "sinks": None if sinks is None else sinks.to(torch.float32),
            # No length passes the table, whose width is in whole pages.
            "max_seq_len": min(step.max_seq_len, step.block_table.shape[1] * self._page),
        }
        if step.cu_seqlens_q is None:
            attention.decode(
                rows, pool_k, pool_v, step.block_table, step.seq_lens, spec=kernels.decode,
                workspace=self._workspaces[kernels.decode] if step.captured else None, **options,
            )  # fmt: skip
        else:
            attention.extend(
                rows, pool_k, pool_v, step.block_table, step.seq_lens, step.cu_seqlens_q, spec=kernels.extend,
                **options,
            )  # fmt: skip
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def forward_decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention,
        forward_batch: ForwardBatch, save_kv_cache: bool = True, sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """One query a sequence; q ``[num_seqs, num_q_heads * head_dim]``, as is what it returns."""
        return self._run(q, k, v, layer, forward_batch, save_kv_cache, sinks)

    def forward_extend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention,
        forward_batch: ForwardBatch, save_kv_cache: bool = True, sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The last tokens of each sequence; q ``[num_tokens, num_q_heads * head_dim]``."""
        return self._run(q, k, v, layer, forward_batch, save_kv_cache, sinks)
