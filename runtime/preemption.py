"""Which running sequences make room, and whether by swapping or by computing again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from pagedgen.errors import InvalidValue, OutOfBlocks
from pagedgen.runtime.block_manager import BlockManager


class Remedy(StrEnum):
    """How a preempted sequence comes back."""

    SWAP = "swap"  # its blocks are copied to host memory and back
    RECOMPUTE = "recompute"  # it is freed, and admitted again with all its tokens


@dataclass(frozen=True, slots=True)
class Preemption:
    """One step of making room.

    Execute it with ``manager.swap_out(seq, num_blocks)``, or with ``manager.free(seq)`` and a new
    admission later. ``freed`` blocks become free; ``seconds`` is what the sequence's return will cost, by
    the rule's figures.
    """

    seq: int
    remedy: Remedy
    num_blocks: int  # a group, from the end
    freed: int
    seconds: float


@dataclass(frozen=True, slots=True)
class PreemptionRule:
    """The cheaper of swapping and recomputing, from three figures of the machine.

    Swapping costs two transfers of the blocks that only this sequence has; recomputing costs a prefill of
    the tokens behind the blocks that others keep alive (the comparison of the PagedAttention paper, 4.5).

    Raises:
        InvalidValue: a figure is not above 0.
    """

    block_bytes: int  # of all layers; KVShape.block_bytes
    swap_bytes_per_s: float  # one direction
    prefill_tokens_per_s: float

    def __post_init__(self) -> None:
        for field in ("block_bytes", "swap_bytes_per_s", "prefill_tokens_per_s"):
            if not getattr(self, field) > 0:
                raise InvalidValue(field, getattr(self, field), "above 0 is allowed")

    def plan(self, manager: BlockManager, needed: int, victims: Sequence[int]) -> list[Preemption]:
        """Preemptions that bring ``needed`` blocks into being, changing nothing.

        Victims are taken in the given order: usually what is partly swapped out already, then the latest
        arrival. When one is swapped, it gives up no more of its tail than is still needed.

        Raises:
            OutOfBlocks: all victims together do not suffice.
            See :meth:`SequenceTable.resident_row`.
        """
        plan: list[Preemption] = []
        missing, host = needed, manager.swap.num_free
        for seq in victims:
            if missing <= 0:
                break
            own = manager.own_blocks(seq)
            total = sum(columns.size for columns in own)
            if not total:
                continue  # all of it is shared or gone already: preempting it frees nothing
            most = max(columns.size for columns in own)
            tail = next(
                n for n in range(1, most + 1) if n == most or sum(min(n, c.size) for c in own) >= missing
            )
            freed = sum(min(tail, columns.size) for columns in own)
            swap = 2 * freed * self.block_bytes / self.swap_bytes_per_s
            kept = min(int(columns[0]) for columns in own if columns.size) * manager.block_size
            recompute = max(1, manager.length(seq) - kept) / self.prefill_tokens_per_s
            if swap <= recompute and freed <= host:
                plan.append(Preemption(seq, Remedy.SWAP, tail, freed, swap))
                host -= freed
            else:
                freed = total
                plan.append(Preemption(seq, Remedy.RECOMPUTE, most, freed, recompute))
            missing -= freed
        if missing > 0:
            raise OutOfBlocks(needed, needed - missing)
        return plan
