"""``Step``: one forward pass of continuous batching, as the kernels want it told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Step:
    """Blocks, lengths and slots of a step; the same in all layers, so made once a step, on the device.

    transformers has two forms of a step. Where all requests decode it gives a block table, of pages. Else it
    lists the row of every token that is read and of every one that is written: the block of every
    ``block_size``-th row that is read is the block table, a gather of a few numbers a sequence. K and V are
    never gathered. A page holds a whole number of the kernels' blocks.
    """

    block_table: torch.Tensor  # int32 [num_seqs, max_blocks]
    seq_lens: torch.Tensor  # int32 [num_seqs]; 0: padding
    cu_seqlens_q: torch.Tensor  # int32 [num_seqs + 1]
    slots: torch.Tensor  # int64 [num_tokens]; -1: padding
    max_seq_len: int
    decodes: bool  # one query a sequence

    @classmethod
    def of(cls, asked: dict[str, Any], block_size: int, page_size: int, trash: int) -> Step:
        """A step, from what transformers passes to attention.

        Args:
            asked: its keyword arguments; see ``PagedAttentionArgs`` in transformers.
            block_size: of the kernels, in tokens; divides ``page_size``.
            page_size: of the cache, in tokens.
            trash: the row that padding is written to.
        """
        ends_k = asked["cu_seq_lens_k"]["full_attention"].to(torch.int32)
        ends_q = asked["cu_seq_lens_q"].to(torch.int32)
        lens = ends_k[1:] - ends_k[:-1]
        if asked["block_table"] is not None:
            return cls._of_pages(asked["block_table"][0], lens, ends_q, block_size, page_size)
        written = asked["write_index"][0]
        read = asked["read_index"][0]
        starts = ends_k[:-1]
        if not read.numel():  # nothing was there before: what is written is all there is
            read, starts = written, ends_q[:-1]
        most = asked["max_length_k"]["full_attention"]
        first = torch.arange(0, most, block_size, device=read.device)  # of each block
        rows = (starts[:, None] + first).clamp_(max=read.numel() - 1)
        table = (read[rows] // block_size).to(torch.int32)
        slots = written.masked_fill(written == trash, -1)
        return cls(table, lens, ends_q, slots, most, asked["max_length_q"] == 1)

    @classmethod
    def _of_pages(
        cls, pages: torch.Tensor, lens: torch.Tensor, ends_q: torch.Tensor, block_size: int, page_size: int
    ) -> Step:
        in_page = page_size // block_size
        pages = pages.clamp(min=0)  # -1: none
        last = lens - 1  # the new token of each sequence
        page = pages.gather(1, (last // page_size).clamp(min=0)[:, None].long())[:, 0]
        slots = (page.long() * page_size + last % page_size).masked_fill(lens == 0, -1)
        inner = torch.arange(in_page, dtype=torch.int32, device=pages.device)
        table = (pages[:, :, None] * in_page + inner).flatten(1)
        return cls(table, lens, ends_q, slots, table.shape[1] * block_size, True)
