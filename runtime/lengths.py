"""What a call's lengths, block ids and slots must be, checked on the host: to find mistakes, not to serve.

Kernels read both on the device, where nothing can be raised: an id outside the pool is read as an address.
``PAGEDGEN_CHECK_LENGTHS=1`` has every call of ``Attention`` checked first, which synchronises and takes
longer than the call; while a CUDA graph is captured nothing can be read, and nothing is checked.
"""

from __future__ import annotations

import os
from itertools import pairwise

import torch

from pagedgen.errors import ArgumentError
from pagedgen.values.spec import KernelSpec

VARIABLE = "PAGEDGEN_CHECK_LENGTHS"
TREE_BITS = 64  # of a query's tree mask, and so the queries of a sequence


def checks_wanted() -> bool:
    """Whether the environment asks for the checks.

    Raises:
        ArgumentError: it says neither 0 nor 1.
    """
    text = os.environ.get(VARIABLE, "0")
    if text not in ("0", "1"):
        raise ArgumentError(f"{VARIABLE} = {text!r}: 0 or 1 is allowed")
    return text == "1"


def check_lengths(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    *,
    spec: KernelSpec,
    num_tokens: int,
    num_blocks: int,
    max_seq_len: int,
) -> None:
    """Read lengths and block ids back to the host and check them.

    Args:
        block_table, seq_lens, cu_seqlens_q: as a call takes them; without ``cu_seqlens_q`` a decode.
        spec: the kernel's; blocks that no query sees are not looked at.
        num_tokens: rows of q.
        num_blocks: of the pool.
        max_seq_len: the call's bound.

    Raises:
        ArgumentError: names the argument, the sequence, the value and what is allowed.
    """
    if seq_lens.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    lens: list[int] = seq_lens.tolist()
    if cu_seqlens_q is None:
        new = [min(1, length) for length in lens]
    else:
        ends: list[int] = cu_seqlens_q.tolist()
        if ends[0] < 0 or ends[-1] > num_tokens:
            raise ArgumentError(
                f"cu_seqlens_q = {ends[0]} … {ends[-1]}: 0 to {num_tokens}, the rows of q, is allowed"
            )
        new = [end - first for first, end in pairwise(ends)]
    rows: list[list[int]] = block_table.tolist()
    for seq, (length, queries) in enumerate(zip(lens, new, strict=True)):
        if not 0 <= length <= max_seq_len:
            raise ArgumentError(f"seq_lens[{seq}] = {length}: 0 to max_seq_len ({max_seq_len}) is allowed")
        if queries < 0:
            raise ArgumentError(f"cu_seqlens_q[{seq + 1}] = {ends[seq + 1]}: {ends[seq]} or more is allowed")
        if queries > length:
            raise ArgumentError(
                f"cu_seqlens_q[{seq + 1}] = {ends[seq + 1]}: {queries} queries of sequence {seq}, whose "
                f"seq_len is {length}: at most as many are allowed"
            )
        if spec.tree_mask and queries > TREE_BITS:
            raise ArgumentError(
                f"cu_seqlens_q[{seq + 1}] = {ends[seq + 1]}: {queries} queries of sequence {seq}: at most "
                f"{TREE_BITS} are allowed with a tree mask"
            )
        if not queries:
            continue
        first = spec.visible(length - queries, length).start
        for i in range(first // spec.block_size, -(-length // spec.block_size)):
            if not 0 <= rows[seq][i] < num_blocks:
                raise ArgumentError(
                    f"block_table[{seq}, {i}] = {rows[seq][i]}: 0 to {num_blocks - 1} is allowed"
                )


def check_slots(slot_mapping: torch.Tensor, num_slots: int, *, written: bool) -> None:
    """Read slots back to the host and check them: inside the pool, or below 0; each once where it is written.

    Raises:
        ArgumentError: names the token, its slot and what is allowed.
    """
    if slot_mapping.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    first: dict[int, int] = {}
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= num_slots:
            raise ArgumentError(f"slot_mapping[{token}] = {slot}: up to {num_slots - 1} is allowed")
        if written and slot >= 0 and first.setdefault(slot, token) != token:
            raise ArgumentError(
                f"slot_mapping[{token}] = {slot}: token {first[slot]} goes there too; one a slot is allowed"
            )


def check_positions(positions: torch.Tensor, slot_mapping: torch.Tensor, max_position: int) -> None:
    """Read positions back to the host and check those of kept tokens: in the table of cosines and sines.

    Raises:
        ArgumentError: names the token, its position and what is allowed.
    """
    if positions.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    for token, (position, slot) in enumerate(zip(positions.tolist(), slot_mapping.tolist(), strict=True)):
        if slot >= 0 and not 0 <= position < max_position:
            raise ArgumentError(f"positions[{token}] = {position}: 0 to {max_position - 1} is allowed")


def check_pairs(pairs: torch.Tensor, num_blocks: int, num_written: int, *, same_pools: bool) -> None:
    """Read pairs of blocks back to the host and check them: in the pools, none written that is also read.

    Args:
        pairs: as :meth:`Attention.copy_blocks` takes them.
        num_blocks, num_written: of the pools that are read, and of those that are written.
        same_pools: whether these are the same.

    Raises:
        ArgumentError: names the pair, the block and what is allowed.
    """
    if pairs.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    read = {source for source, _ in pairs.tolist()} if same_pools else set()
    first: dict[int, int] = {}
    for number, (source, destination) in enumerate(pairs.tolist()):
        for axis, block, most in ((0, source, num_blocks), (1, destination, num_written)):
            if not 0 <= block < most:
                raise ArgumentError(f"pairs[{number}, {axis}] = {block}: 0 to {most - 1} is allowed")
        if first.setdefault(destination, number) != number:
            raise ArgumentError(
                f"pairs[{number}, 1] = {destination}: pair {first[destination]} writes it too; "
                "one pair a block is allowed"
            )
        if destination in read:
            raise ArgumentError(
                f"pairs[{number}, 1] = {destination}: it is read in the same call; copies go in no order"
            )
