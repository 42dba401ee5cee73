"""What kernels of a debug build found: slots behind a pool's last, recorded on the device, raised here."""

from __future__ import annotations

import torch

from pagedgen.errors import ArgumentError


class Faults:
    """The records of one kernel, one a device.

    Each is int64 ``[4]``: whether a slot was found, its token, the slot, and how many the pool had. A
    captured call holds the record's address, so that replays are covered.
    """

    __slots__ = ("_records",)

    def __init__(self) -> None:
        self._records: dict[torch.device, torch.Tensor] = {}

    def record(self, device: torch.device) -> torch.Tensor:
        """The record that calls on a device are given; make it before a capture."""
        held = self._records.get(device)
        if held is None:
            held = self._records[device] = torch.zeros(4, dtype=torch.int64, device=device)
        return held

    def check(self) -> None:
        """Raise what was recorded, and clear it. Waits for the current stream of each device.

        Raises:
            ArgumentError: names the token, its slot and what is allowed.
        """
        for held in self._records.values():
            found, token, slot, num_slots = held.tolist()
            if found:
                held.zero_()
                raise ArgumentError(
                    f"slot_mapping[{token}] = {slot}: below 0, or up to {num_slots - 1} "
                    "(num_blocks * block_size - 1) is allowed; the token was left out"
                )
