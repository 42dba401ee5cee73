"""Rows of a report for people: the same columns in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Callable

from pagedgen.autotune.explore.outcome import Outcome
from pagedgen.autotune.explore.report import Report, TraceReport

Cell = Callable[[Outcome], str]


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"


def size(number: float) -> str:
    """``1.3 GB``, ``12 MB``, ``0``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f}"


def pair(low: float, high: float, scale: float, unit: str) -> str:
    """``27.5/40 s``"""
    return f"{low * scale:.3g}/{high * scale:.3g} {unit}"


# (column, what it means, cell); columns that begin with ``>`` are right-aligned.
COLUMNS: tuple[tuple[str, str, Cell], ...] = (
    (
        ">block",
        "tokens a block; adaptive: granules of 16 in runs; bound: their memory, read like blocks of 128",
        lambda o: o.name,
    ),
    (
        ">tokens/s",
        "output tokens a second of one rank, in the middle of the run",
        lambda o: f"{o.tokens_per_s:,.0f}",
    ),
    (">tokens", "share of the KV pool that holds tokens", lambda o: _share(o.memory_tokens)),
    (
        ">inside",
        "internal waste: share of the pool that is empty inside blocks",
        lambda o: _share(o.internal_waste),
    ),
    (
        ">outside",
        "external waste: share of the pool that was free while a request waited for memory",
        lambda o: _share(o.external_waste),
    ),
    (
        ">batch",
        "sequences in a step, mean and 99th percentile",
        lambda o: f"{o.batch_mean:.0f}/{o.batch_p99:.0f}",
    ),
    (">preempt", "requests that had to make room", lambda o: f"{o.preemptions:,}"),
    (">copied", "bytes copied on write and for partial prefix hits", lambda o: size(o.copied_bytes)),
    (">swapped", "bytes moved to host memory and back", lambda o: size(o.swapped_bytes)),
    (">hits", "share of prompt tokens found in the cache", lambda o: _share(o.hit_share)),
    (">kernel", "share of the time spent in decode attention", lambda o: _share(o.kernel_share)),
    (
        ">TTFT",
        "time to the first token, median and 99th percentile",
        lambda o: pair(o.ttft_p50, o.ttft_p99, 1, "s"),
    ),
    (
        ">TPOT",
        "time a further token, median and 99th percentile",
        lambda o: pair(o.tpot_p50, o.tpot_p99, 1000, "ms"),
    ),
    (">runs", "share of tokens in blocks side by side, 64 tokens or more", lambda o: _share(o.run_coverage)),
    (
        ">metadata",
        "bytes of the block manager's arrays and tables on the host",
        lambda o: size(o.metadata_bytes),
    ),
)


def rows(trace: TraceReport) -> list[tuple[str, ...]]:
    """A row a policy."""
    return [tuple(cell(outcome) for _, _, cell in COLUMNS) for outcome in trace.outcomes]


def facts(report: Report) -> list[tuple[str, str]]:
    """What was simulated, in (name, value) pairs."""
    server = report.server
    tokens = server.memory_bytes // server.token_bytes
    pairs = [
        ("model", f"{server.model}, {size(server.weight_bytes)} of weights a rank"),
        ("processor", server.target),
        ("KV pool", f"{size(server.memory_bytes)}, {tokens:,} tokens of {server.kv_dtype}"),
        ("swapping", f"{size(server.host_bytes)} of host memory" if server.host_bytes else "none"),
        ("a step", f"at most {server.max_num_seqs:,} sequences, {server.max_batched_tokens:,} tokens"),
    ]
    return [*pairs, *(("decode kernels", origin) for origin in report.origins)]


def remarks(trace: TraceReport) -> list[str]:
    """Sentences on a trace: the recommendation, the front, the baselines, the verdicts."""
    advice = trace.recommendation
    lines = [
        f"Use blocks of {advice.policy}: {advice.reason}.",
        f"Pareto front (waste inside blocks, speed): {', '.join(trace.pareto)}.",
    ]
    if trace.contiguous:
        shares = ", ".join(f"{s.policy} {100 * s.of_pool:.1f}%" for s in trace.contiguous)
        lines.append(f"Memory that holds tokens in a pool of {trace.contiguous_pool:,} tokens: {shares}.")
    for verdict in trace.verdicts:
        state = "kept" if verdict.kept else "not kept"
        lines.append(f"Adaptive, {verdict.policy}: {state}: {verdict.reason}.")
    return lines
