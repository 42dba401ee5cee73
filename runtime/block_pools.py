"""``BlockPools``: pools of blocks in any number of layers, as a table that one launch goes through."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pagedgen.errors import ArgumentError


@dataclass(frozen=True, slots=True, eq=False)
class BlockPools:
    """Pools that blocks are copied between, one block of each pool to a pair.

    Attributes:
        tensors: the pools, kept so that their memory is; see :meth:`of`.
        table: int64 ``[num_pools, 3]`` on the device: a pool's address, bytes from one block to the next, bytes
            of a page, which is a block's part of one pool.
        pages: bytes of each pool's pages.
        num_blocks: of the smallest pool.
        align: bytes that all of it is a multiple of, 16 at most.
    """

    tensors: tuple[torch.Tensor, ...]
    table: torch.Tensor
    pages: tuple[int, ...]
    num_blocks: int
    align: int

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], device: torch.device | str | None = None) -> BlockPools:
        """A table of pools, uploaded once: make it when the pools are made, and keep it.

        Args:
            tensors: each ``[num_blocks, …]`` with a block's elements in one piece, in any order; blocks may lie
                further apart, as those of K do in a pool that holds K and V. All on one device, or in pinned
                memory, which kernels reach too.
            device: where the table is to be; where the tensors are if not given.

        Raises:
            ArgumentError: there is no pool, one is no such tensor, or they are on several devices.
        """
        if not tensors:
            raise ArgumentError("pools: at least one tensor is expected")
        home = torch.device(tensors[0].device if device is None else device)
        rows = []
        for i, pool in enumerate(tensors):
            if pool.ndim < 2 or not _in_one_piece(pool):
                raise ArgumentError(
                    f"pools[{i}]: shape {list(pool.shape)}, strides {list(pool.stride())}: [num_blocks, …] with "
                    "each block in one piece is expected"
                )
            if pool.device != home and not (pool.device.type == "cpu" and pool.is_pinned()):
                raise ArgumentError(f"pools[{i}].device = {pool.device}: {home} is expected, or pinned memory")
            size = pool.element_size()
            rows.append((pool.data_ptr(), pool.stride(0) * size, pool[0].numel() * size))
        table = torch.tensor(rows, dtype=torch.int64)
        pages = tuple(page for _, _, page in rows)
        num_blocks = min(pool.shape[0] for pool in tensors)
        align = math.gcd(16, *(number for row in rows for number in row))
        return cls(tuple(tensors), table.to(home), pages, num_blocks, align)


def _in_one_piece(pool: torch.Tensor) -> bool:
    """Whether the elements of each block lie side by side, whatever the order of its axes."""
    step = 1
    axes = zip(pool.stride()[1:], pool.shape[1:], strict=True)
    for stride, size in sorted((stride, size) for stride, size in axes if size != 1):
        if stride != step:
            return False
        step *= size
    return pool.shape[0] > 0 and (pool.shape[0] == 1 or pool.stride(0) >= step)
