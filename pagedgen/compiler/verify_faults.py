"""What the gate asks of a debug build: slots behind the pool's last are left out, and one is recorded."""

from __future__ import annotations

import torch


class Outside:
    """Some slots out of range among a case's, one just behind the last among many, and the record of them.

    Args:
        slots: int64 ``[num_tokens]``; written. With one token nothing is out of range, nor to be recorded.
        num_slots: of the pool.
    """

    def __init__(self, slots: torch.Tensor, num_slots: int) -> None:
        self.tokens = range(3, len(slots), 10) if len(slots) < 100 else range(103, 104)
        self.num_slots = num_slots
        for step, token in enumerate(self.tokens):
            slots[token] = num_slots + step * (1 << 33)  # the first is just behind
        self.slots = slots
        self.record = torch.zeros(4, dtype=torch.int64, device=slots.device)

    def judge(self) -> str:
        """What is wrong with the record, or nothing."""
        found, token, slot, num_slots = self.record.tolist()
        if not len(self.tokens):
            return "" if not found else f"faults = {self.record.tolist()}: no slot is out of range"
        right = found == 1 and token in self.tokens and num_slots == self.num_slots
        if right and slot == int(self.slots[token]):
            return ""
        some = ", ".join(str(token) for token in self.tokens[:4])
        return (
            f"faults = {self.record.tolist()}: one of tokens {some}, ... and {self.num_slots} slots is right"
        )
