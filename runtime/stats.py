"""``Stats``: one snapshot of what the block manager holds and has done."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class Counters:
    """What happened since the manager was made; each is one addition where it happens."""

    admitted: int = 0  # sequences
    freed: int = 0
    forked: int = 0
    appended_tokens: int = 0
    prompt_tokens: int = 0  # of admitted prompts
    hit_tokens: int = 0  # of those, found in the cache
    partial_hit_tokens: int = 0  # of those, in blocks that had to be copied
    copied_blocks: int = 0  # copy-on-write and partial hits
    evicted_blocks: int = 0  # cached content that was overwritten
    window_blocks: int = 0  # released behind sliding windows
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    swap_saved_blocks: int = 0  # not copied back: the cache still held them
    preempted: int = 0  # sequences swapped out
    compacted_blocks: int = 0  # moved into runs
    refused: int = 0  # calls that ended in OutOfBlocks


@dataclass(frozen=True, slots=True)
class Stats:
    """Figures of one moment. Shares are from 0 to 1.

    ``stored_tokens`` counts token slots of used blocks that hold a token, each block once however many
    sequences share it; ``waste`` is the share of the used blocks' slots that hold none (internal
    fragmentation, reserved draft slots included); ``sharing_saving`` is the share of blocks that sharing
    spares against a private copy for each sequence.
    """

    num_blocks: int
    used_blocks: int
    cached_blocks: int  # free, with reusable content
    free_blocks: int  # free in all: cached ones count
    sequences: int
    swapped_sequences: int
    pinned_blocks: int
    stored_tokens: int
    utilisation: float
    waste: float
    sharing_saving: float
    hit_rate: float
    host_blocks: int
    host_blocks_used: int
    host_bytes: int  # of the manager's own arrays
    counters: Counters

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) pairs for a table."""
        out = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float):
                out.append((field.name.replace("_", " "), f"{100 * value:.2f}%"))
            elif isinstance(value, int):
                out.append((field.name.replace("_", " "), f"{value:,}"))
        for field in fields(self.counters):
            out.append((field.name.replace("_", " "), f"{getattr(self.counters, field.name):,}"))
        return out

    def prometheus(self, prefix: str = "pagedgen_kv") -> str:
        """The Prometheus text exposition format: gauges, and counters with ``_total``."""
        lines = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float):
                lines += [f"# TYPE {prefix}_{field.name} gauge", f"{prefix}_{field.name} {value}"]
        for field in fields(self.counters):
            name = f"{prefix}_{field.name}_total"
            lines += [f"# TYPE {name} counter", f"{name} {getattr(self.counters, field.name)}"]
        return "\n".join(lines) + "\n"
