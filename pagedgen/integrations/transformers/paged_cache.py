"""``PagedCache``: the cache of a call of ``generate``, in blocks that the kernels read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from pagedgen.integrations.serving_pack import LayerKernels, refuse
from pagedgen.integrations.transformers.step import Step
from pagedgen.runtime.attention import TORCH_DTYPES
from pagedgen.values.spec import KInner

if TYPE_CHECKING:
    from pagedgen.integrations.transformers.attached import Attached, Chosen


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """K and V of one layer, as pools ``[num_blocks, block_size, num_kv_heads, head_dim]`` that grow."""

    is_sliding = False

    def __init__(self, cache: PagedCache, kernels: LayerKernels, device: torch.device) -> None:
        super().__init__()
        self.is_initialized = True
        self.cache, self.kernels, self.seen = cache, kernels, 0
        spec = kernels.write_kv
        shape = (0, spec.block_size, spec.num_kv_heads, spec.head_dim)
        self._order = (0, 1, 2, 3)
        if spec.k_inner is KInner.TOKEN:  # in memory [num_blocks, num_kv_heads, head_dim, block_size]
            self._order = (0, 3, 1, 2)
        dtype = TORCH_DTYPES[spec.kv_dtype]
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        k_shape = shape if spec.k_inner is KInner.DIM else (0, shape[2], shape[3], shape[1])
        self._k = torch.zeros(k_shape, dtype=dtype, device=device)

    @property
    def k(self) -> torch.Tensor:
        """K in logical order."""
        return self._k.permute(self._order)

    def grow(self, num_blocks: int) -> None:
        """Have at least so many blocks; those that were there keep their numbers."""
        more = num_blocks - self.v.shape[0]
        if more > 0:
            self._k, self.v = (torch.cat((p, p.new_zeros(more, *p.shape[1:]))) for p in (self._k, self.v))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store ``[batch, num_kv_heads, num_tokens, head_dim]``, and give back what was given."""
        tokens = key_states.shape[2]
        step = self.cache.step(self, tokens)
        self.seen += tokens
        new_k, new_v = (x.transpose(1, 2).flatten(0, 1) for x in (key_states, value_states))
        attention = self.cache.attached.pack.attention
        attention.write_kv(new_k, new_v, step.slots, self.k, self.v, spec=self.kernels.write_kv)
        self.cache.attached.generating = self.cache
        return key_states, value_states

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do."""

    def get_seq_length(self) -> int:
        """Columns of the batch seen so far, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the mask for new columns."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: any."""
        return -1

    def reset(self) -> None:
        """Start again."""
        self.seen = 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Refuse: beams.

        Raises:
            Unsupported: always.
        """
        refuse("num_beams", "more than 1", "pagedgen's plug-in has no beam search")


class PagedCache(Cache):  # type: ignore[misc]
    """Block j of row b is number ``j * batch + b``, so that growing leaves all numbers as they were.

    Args:
        attached: the model.
        chosen: its kernels.
        pads: int64 ``[batch]``, columns of padding at the left of each row, on the model's device.
    """

    def __init__(self, attached: Attached, chosen: Chosen, pads: torch.Tensor) -> None:
        self.attached, self.pads = attached, pads
        self.block_size = chosen.block_size
        self._padded = bool(pads.any())
        self._width = 0  # blocks a row
        self.now: Step  # the step that the layers are in
        self.queries: torch.Tensor | None = None  # rows of the step that are no padding; None: all
        super().__init__(layers=[PagedLayer(self, k, pads.device) for k in chosen.kernels.values()])

    def step(self, layer: PagedLayer, tokens: int) -> Step:
        """The step that stores ``tokens`` new columns; made in the first layer, the same in all."""
        if layer is self.layers[0]:
            self.now = self._make(layer.seen, tokens)
        layer.grow(self._width * len(self.pads))
        return self.now

    def _make(self, seen: int, tokens: int) -> Step:
        total, size, pads, batch = seen + tokens, self.block_size, self.pads, len(self.pads)
        needed = -(-total // size)
        if needed > self._width:
            self._width = max(needed + 1, 2 * self._width)
        device = pads.device
        row = torch.arange(batch, device=device)[:, None]
        position = torch.arange(seen, total, device=device) - pads[:, None]
        slots = (position // size * batch + row) * size + position % size
        real = position >= 0
        counts = real.sum(1)
        ends = torch.zeros(batch + 1, dtype=torch.int32, device=device)
        ends[1:] = counts.cumsum(0)
        padded = self._padded and tokens > 1
        self.queries = real.flatten().nonzero()[:, 0] if padded else None
        return Step(
            block_table=(torch.arange(self._width, device=device) * batch + row).to(torch.int32),
            seq_lens=(total - pads).clamp(min=0).to(torch.int32),
            cu_seqlens_q=ends,
            slots=slots.masked_fill(~real, -1).flatten(),
            max_seq_len=total,
            decodes=tokens == 1,
        )
