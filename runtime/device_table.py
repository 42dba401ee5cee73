"""``DeviceTable``: the block table on a device, kept up to date by sending what changed."""

from __future__ import annotations

import numpy as np
import torch

from pagedgen.runtime.block_manager import BlockManager


class DeviceTable:
    """A mirror of one group's block table.

    ``tensor`` is int32 ``[max_num_seqs, max_blocks]`` at a fixed address, so a captured CUDA graph may hold
    it; rows are those of :attr:`Step.rows`, and rows whose sequence ended keep what they held (their seq_len
    is 0). On a CPU it is the manager's own memory. One mirror a group.
    """

    def __init__(self, manager: BlockManager, device: torch.device | str, group: int = 0) -> None:
        self._group = manager.groups[group]
        self._device = torch.device(device)
        self.entries_sent = 0
        host = torch.from_numpy(self._group.table)
        if self._device.type == "cpu":
            self.tensor = host
            return
        self.tensor = torch.zeros(host.shape, dtype=torch.int32, device=self._device)
        self._group.track()

    def flush(self) -> None:
        """Send the entries that changed since the last call: one transfer and one scatter, or nothing."""
        where = self._group.take_changed()
        if not where.size:
            return
        self.entries_sent += where.size
        # What an entry is now, so that a place that changed twice gets the same value twice.
        packed = torch.from_numpy(np.stack((where, self._group.flat.take(where).astype(np.int64))))
        if self._device.type == "cuda":
            packed = packed.pin_memory()
        places, blocks = packed.to(self._device, non_blocking=True)
        self.tensor.view(-1).index_put_((places,), blocks.int())
