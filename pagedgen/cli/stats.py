"""``pagedgen stats``: the block manager's statistics after a trace of request lengths."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from pagedgen.autotune.suites.fragmentation import read_trace, replay
from pagedgen.cli import console
from pagedgen.runtime.block_manager import BlockManager


def run(path: Path, *, block_size: int, pool_tokens: int, requests: int, steps: int, as_json: bool) -> None:
    """Drive a block manager with a trace and show what it holds and has done, as a table or as JSON."""
    trace = read_trace(path, requests)
    manager = BlockManager(
        pool_tokens // block_size if block_size > 0 else 0,
        block_size,
        max_num_seqs=4096,
        max_seq_len=trace.longest + 1,
    )
    stats, done = manager.stats(), 0
    for step, _ in replay(manager, trace, steps):
        if step + 1 == steps or step % 16 == 0:
            stats, done = manager.stats(), step + 1
    if as_json:
        console.emit({"trace": trace.name, "requests": len(trace.prompts), "steps": done, **asdict(stats)})
        return
    title = f"{trace.name}: {len(trace.prompts):,} requests, after {done:,} steps"
    console.table(title, ("block manager", ">value"), stats.rows())
