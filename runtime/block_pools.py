"""``BlockPools``: pools of blocks in any number of layers, as a table that one launch goes through."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pagedgen.errors import ArgumentError
from pagedgen.runtime.arrays import I64


@dataclass(frozen=True, slots=True, eq=False)
class BlockPools:
    """Pools that blocks are copied between, one block of each pool to a pair.

    Attributes:
        tensors: the pools, kept so that their memory is; see :meth:`of`.
        table: int64 ``[num_pools, 3]`` on the device: where a pool begins, in bytes from the first pool's
            address; bytes from one block to the next; bytes of a page, a block's part of one pool.
        pages: bytes of each pool's pages.
        num_blocks: of the smallest pool.
        align: bytes that all of it is a multiple of, 16 at most.
    """

    tensors: tuple[torch.Tensor, ...]
    table: torch.Tensor
    pages: tuple[int, ...]
    num_blocks: int
    align: int

    @property
    def origin(self) -> int:
        """The address that the table counts from."""
        return self.tensors[0].data_ptr()

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], device: torch.device | str | None = None) -> BlockPools:
        """A table of pools, uploaded once: make it when the pools are made, and keep it.

        Args:
            tensors: each ``[num_blocks, …]`` with a block's elements in one piece, in any order; blocks may
                lie further apart, as those of K do in a pool that holds K and V. All on one device, or in
                pinned memory, which kernels reach too.
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
                    f"pools[{i}]: shape {list(pool.shape)}, strides {list(pool.stride())}: "
                    "[num_blocks, …] with each block in one piece is expected"
                )
            if pool.device != home and not (pool.device.type == "cpu" and pool.is_pinned()):
                raise ArgumentError(
                    f"pools[{i}].device = {pool.device}: {home} is expected, or pinned memory"
                )
            size = pool.element_size()
            rows.append(
                (pool.data_ptr() - tensors[0].data_ptr(), pool.stride(0) * size, pool[0].numel() * size)
            )
        num_blocks = min(pool.shape[0] for pool in tensors)
        return cls._made(tuple(tensors), np.array(rows, np.int64), num_blocks, home)

    @classmethod
    def stacked(cls, pools: torch.Tensor, device: torch.device | str | None = None) -> BlockPools:
        """As :meth:`of` for one tensor ``[num_pools, num_blocks, page]``, pages in one piece; unchecked."""
        size = pools.element_size()
        rows = np.empty((pools.shape[0], 3), np.int64)
        rows[:, 0] = np.arange(pools.shape[0]) * pools.stride(0) * size
        rows[:, 1:] = pools.stride(1) * size, pools.shape[2] * size
        return cls._made(
            (pools,), rows, pools.shape[1], torch.device(pools.device if device is None else device)
        )

    @classmethod
    def _made(
        cls, tensors: tuple[torch.Tensor, ...], rows: I64, num_blocks: int, home: torch.device
    ) -> BlockPools:
        pages = tuple(rows[:, 2].tolist())
        align = int(np.gcd.reduce(rows, axis=None, initial=math.gcd(16, tensors[0].data_ptr())))
        return cls(tensors, upload(rows, home), pages, num_blocks, align)


def upload(numbers: I64, device: torch.device) -> torch.Tensor:
    """Numbers on a device; a GPU takes them from pinned memory, so that nobody waits."""
    numbers_here = torch.from_numpy(np.ascontiguousarray(numbers, np.int64))
    if device.type == "cuda":
        return numbers_here.pin_memory().to(device, non_blocking=True)
    return numbers_here


def _in_one_piece(pool: torch.Tensor) -> bool:
    """Whether the elements of each block lie side by side, whatever the order of its axes."""
    step = 1
    axes = zip(pool.stride()[1:], pool.shape[1:], strict=True)
    for stride, size in sorted((stride, size) for stride, size in axes if size != 1):
        if stride != step:
            return False
        step *= size
    return pool.shape[0] > 0 and (pool.shape[0] == 1 or pool.stride(0) >= step)
