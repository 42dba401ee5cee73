"""The batches that a spec is tuned for: a grid for its operator, or what follows from a trace."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from pagedgen.cli import console
from pagedgen.cli.options import trace_of
from pagedgen.values.spec import KernelSpec, Op
from pagedgen.values.trace import Trace, decode_workloads
from pagedgen.values.workload import Workload

# Without a trace. Decode: (sequences, tokens of each), from one long request to many short ones.
GRID = {
    "cpu": ((1, 2048), (4, 2048), (16, 2048), (1, 16384)),
    "gpu": ((1, 1024), (1, 8192), (8, 4096), (128, 1024), (32, 8192)),
}
# And batches of unequal lengths: drawn evenly between two bounds, and one long one among short ones. They are
# (sequences, shortest, longest) and (tokens of the long one, sequences beside it, tokens of each).
RAGGED = {"cpu": (16, 128, 4096), "gpu": (32, 128, 16384)}
SKEWED = {"cpu": (16384, 15, 512), "gpu": (131072, 63, 1024)}
# Extend: a short prompt, long ones, chunks of long contexts, chunks among decodes, a prompt among short ones;
# verify: few drafts and many, of one sequence and of a batch. Spelled as `Workload.parse` reads them.
QUERIES = {
    (Op.EXTEND, "cpu"): ("1x128", "1x512", "4x64of1024", "1x128of1024+15x1of1024"),
    (Op.EXTEND, "gpu"): (
        "1x512",
        "1x8192",
        "16x1024",
        "4x512of8192",
        "2x1024of4096+62x1of2048",
        "1x8192+31x256",
    ),
    (Op.VERIFY, "cpu"): ("1x4of4096", "8x4of2048", "4x8of2048"),
    (Op.VERIFY, "gpu"): ("1x8of8192", "16x4of4096", "64x8of4096", "16x16of4096"),
}
BATCHES = {"cpu": (1, 4, 16, 64), "gpu": (1, 8, 32, 128)}  # sizes of the batches drawn from a trace
STEPS = {  # (tokens of prompts, decodes beside) in a step of chunked prefill drawn from a trace
    "cpu": ((128, 0), (512, 0), (256, 8)),
    "gpu": ((512, 0), (2048, 0), (8192, 0), (2048, 64)),
}
DRAFTS = 8  # queries of a sequence that verifies, with a trace
MOST_BYTES = {"cpu": 1 << 30, "gpu": 8 << 30}  # of KV in one workload
MOST_FLOPS = {"cpu": 3e10, "gpu": 1e13}  # of one workload: about 0.2 s and 20 ms a call


def workloads_of(spec: KernelSpec, kind: str, trace: Path | None, seed: int) -> tuple[Workload, ...]:
    """The batches to tune for, of the trace or of the grid; those that need too much memory or time are left
    out, but for one."""
    group = "cpu" if kind == "cpu" else "gpu"
    made = grid(spec.op, group) if trace is None else drawn(spec.op, group, trace_of(trace, seed), seed)
    kept = tuple(w for w in made if _fits(w, spec, group)) or (min(made, key=_work),)
    for workload in made:
        if workload not in kept:
            size = f"{workload.cache_bytes(spec) / 2**30:.1f} GiB of KV"
            work = f"{workload.flops(spec) / 1e9:,.0f} GFLOP"
            most = f"{MOST_BYTES[group] >> 30} GiB and {MOST_FLOPS[group] / 1e9:,.0f} GFLOP at most"
            console.note(f"left out: {workload.name}, {size}, {work} ({most})")
    return kept


def grid(op: Op, group: str) -> tuple[Workload, ...]:
    """The batches without a trace."""
    if op is not Op.DECODE:
        return tuple(Workload.parse(text, op) for text in QUERIES[op, group])
    return (*(Workload.uniform(n, length) for n, length in GRID[group]), *unequal(group))


def drawn(op: Op, group: str, trace: Trace, seed: int) -> tuple[Workload, ...]:
    """The batches of a trace."""
    if op is Op.EXTEND:
        return tuple(trace.step(tokens, decodes, seed) for tokens, decodes in STEPS[group])
    decodes = decode_workloads(trace, BATCHES[group], seed)
    if op is Op.DECODE:
        return decodes
    return tuple(replace(w, query_lens=tuple(min(DRAFTS, n) for n in w.seq_lens)) for w in decodes)


def unequal(group: str) -> tuple[Workload, Workload]:
    """The ragged and the skewed batch of the grid; the same in every run, so that records are found again."""
    count, shortest, longest = RAGGED[group]
    lengths = [shortest + round(i * (longest - shortest) / (count - 1)) for i in range(count)]
    random.Random(0).shuffle(lengths)
    long, others, short = SKEWED[group]
    beside = [short] * others
    beside.insert(others // 3, long)
    return (
        Workload(f"{count}x{shortest}-{longest}", tuple(lengths)),
        Workload(f"1x{long}+{others}x{short}", tuple(beside)),
    )


def _fits(workload: Workload, spec: KernelSpec, group: str) -> bool:
    return workload.cache_bytes(spec) <= MOST_BYTES[group] and workload.flops(spec) <= MOST_FLOPS[group]


def _work(workload: Workload) -> tuple[int, int]:
    return workload.num_tokens, workload.num_queries
