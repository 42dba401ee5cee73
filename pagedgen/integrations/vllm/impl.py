"""``PagedgenImpl``: one attention layer of a vLLM model on the kernels of the chosen pack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from pagedgen.integrations.serving_pack import (
    Layer,
    LayerKernels,
    chosen_pack,
    lookup,
    refuse,
    require_version,
)
from pagedgen.runtime.attention import Attention
from pagedgen.runtime.huge_pages import use_huge_pages
from pagedgen.values.spec import DType, KernelSpec, KInner

if TYPE_CHECKING:
    from pagedgen.integrations.vllm.metadata import StepMetadata

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is logged below its own name
VERSIONS = (0, 32), (0, 34)  # the first that is allowed, and the first that is not
Q_DTYPES = {torch.float16: DType.F16, torch.bfloat16: DType.BF16, torch.float32: DType.F32}
KV_DTYPES = {
    "float16": DType.F16,
    "bfloat16": DType.BF16,
    "fp8": DType.FP8_E4M3,
    "fp8_e4m3": DType.FP8_E4M3,
    "fp8_e5m2": DType.FP8_E5M2,
}

# Workspaces of the process by what they serve. Layers run one after the other on one stream, so all layers of
# a spec share one. Captured graphs hold its address: a layer keeps the one that it was bound with.
_workspaces: dict[tuple[KernelSpec, torch.device], tuple[int, torch.Tensor]] = {}


def _workspace(attention: Attention, spec: KernelSpec, num_seqs: int, device: torch.device) -> torch.Tensor:
    held = _workspaces.get((spec, device))
    if held is None or held[0] < num_seqs:
        size = attention.workspace_bytes(num_seqs, spec)
        held = num_seqs, torch.zeros(size, dtype=torch.uint8, device=device)
        _workspaces[spec, device] = held
    return held[1]


class PagedgenImpl(AttentionImpl):  # type: ignore[misc]
    """Attention of one layer, and the writing of its K and V.

    Args are vLLM's: ``num_heads`` and ``num_kv_heads`` are those of this rank, ``sliding_window`` counts the
    tokens a query sees, ``sinks`` is ``[num_heads]`` in any float type, ``alibi_slopes`` are these
    heads' own.

    Raises:
        Unsupported: the layer has a feature that no kernel computes; names it.
        PackNotChosen, PackDamaged, PackForeign, SpecNotInPack: no pack, or none for this layer; says what to
            run.
        VersionUnmet: another vLLM than the plug-in was tested with.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        require_version("vllm", vllm.__version__, *VERSIONS)
        if attn_type != AttentionType.DECODER:
            refuse("attn_type", attn_type, "pagedgen's kernels are those of decoder layers")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype, self.kv_sharing_target_layer_name = kv_cache_dtype, kv_sharing_target_layer_name
        self.sinks, self._sinks = sinks, None if sinks is None else sinks.to(torch.float32)
        q_dtype = lookup("dtype", get_current_vllm_config().model_config.dtype, Q_DTYPES)
        kv_dtype = (
            q_dtype if kv_cache_dtype == "auto" else lookup("kv_cache_dtype", kv_cache_dtype, KV_DTYPES)
        )
        self.layer = Layer(
            head_dim=head_size,
            num_q_heads=num_heads,
            num_kv_heads=self.num_kv_heads,
            q_dtype=q_dtype,
            kv_dtype=kv_dtype,
            window=sliding_window,
            logits_soft_cap=float(logits_soft_cap) if logits_soft_cap else None,
            sinks=sinks is not None,
            alibi=alibi_slopes is not None,
        )
        self.alibi_slopes = alibi_slopes
        self._slopes: torch.Tensor | None = None  # on the device once it is known
        self._pack = chosen_pack()
        self._pack.check(self.layer)
        self._attention: Attention = self._pack.attention
        logger.info_once("pagedgen: %s serves %s", self._pack.pack.path, self.layer)
        self._met_cache = False
        self._kernels: LayerKernels | None = None
        self._workspaces: tuple[torch.Tensor, torch.Tensor] | None = None

    def bind(self, block_size: int, num_seqs: int, device: torch.device) -> None:
        """Take the kernels of a block size, load them, and set aside workspaces for ``num_seqs`` sequences.

        Raises:
            SpecNotInPack: the pack has none for this block size.
        """
        kernels = self._pack.kernels(self.layer, block_size)
        if device.type == "cuda":
            self._attention.prepare(device)
        self._workspaces = (
            _workspace(self._attention, kernels.decode, num_seqs, device),
            _workspace(self._attention, kernels.extend, num_seqs, device),
        )
        if self.alibi_slopes is not None:
            self._slopes = torch.tensor(self.alibi_slopes, dtype=torch.float32, device=device)
        self._kernels = kernels

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """The sinks' values are there now."""
        if self.sinks is not None:
            self._sinks = self.sinks.detach().to(torch.float32).contiguous()

    def views(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, ``[num_blocks, block_size, num_kv_heads, head_dim]``, of vLLM's packed cache.

        Args:
            kv_cache: ``[num_blocks, num_kv_heads, block_size, 2 * head_dim]``, any strides; for kernels with
                K along tokens, the last two axes contiguous: a head's share of a block is then K as
                ``[head_dim, block_size]`` and V as ``[block_size, head_dim]``.
        """
        dim = self.head_size
        if self._pack.k_inner is KInner.DIM:
            both = kv_cache.transpose(1, 2)
            return both[..., :dim], both[..., dim:]
        blocks, heads, size, _ = kv_cache.shape
        both = kv_cache.view(blocks, heads, 2 * size * dim)
        k = both[..., : size * dim].view(blocks, heads, dim, size).permute(0, 3, 1, 2)
        v = both[..., size * dim :].view(blocks, heads, size, dim).transpose(1, 2)
        return k, v

    def _scales(self, layer: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if not self.layer.kv_dtype.is_fp8:
            return None, None
        return layer._k_scale.view(1), layer._v_scale.view(1)

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store ``key`` and ``value``, ``[num_tokens, num_kv_heads, head_dim]``; slot -1 is nowhere."""
        assert self._kernels is not None
        if not self._met_cache:  # once: vLLM has allocated it before the first step
            self._met_cache = True
            use_huge_pages(kv_cache)
        k, v = self.views(kv_cache)
        k_scale, v_scale = self._scales(layer)
        tokens = slot_mapping.shape[0]
        self._attention.write_kv(
            key[:tokens], value[:tokens], slot_mapping, k, v,
            k_scale=k_scale, v_scale=v_scale, spec=self._kernels.write_kv,
        )  # fmt: skip

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: StepMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of ``query``, ``[num_tokens, num_heads, head_dim]``, into ``output``, of the same shape.

        Raises:
            Unsupported: the output is to be quantised.
        """
        if output_scale is not None or output_block_scale is not None:
            refuse("output_scale", "given", "pagedgen's kernels do not quantise their output")
        if attn_metadata is None:  # vLLM measures memory: nothing is computed
            return output.fill_(0)
        assert self._kernels is not None and self._workspaces is not None
        step = attn_metadata
        k, v = self.views(kv_cache)
        k_scale, v_scale = self._scales(layer)
        decodes = step.num_decodes
        if decodes:
            self._attention.decode(
                query[:decodes], k, v, step.block_table[:decodes], step.seq_lens[:decodes],
                out=output[:decodes],
                softmax_scale=self.scale, k_scale=k_scale, v_scale=v_scale, sinks=self._sinks,
                alibi_slopes=self._slopes, workspace=self._workspaces[0],
                max_seq_len=step.max_seq_len, spec=self._kernels.decode,
            )  # fmt: skip
        if decodes < step.num_seqs:
            # Rows of decodes lie outside of what query_start_loc's rest covers, and so are none of extend's.
            self._attention.extend(
                query[: step.num_tokens], k, v, step.block_table[decodes:], step.seq_lens[decodes:],
                step.query_start_loc[decodes:], out=output[: step.num_tokens],
                softmax_scale=self.scale, k_scale=k_scale, v_scale=v_scale, sinks=self._sinks,
                alibi_slopes=self._slopes, workspace=self._workspaces[1],
                max_seq_len=step.max_seq_len, spec=self._kernels.extend,
            )  # fmt: skip
        return output
