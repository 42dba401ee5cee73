"""Figures of a report, by matplotlib: as SVG for the page, as PNG for documents."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagedgen.autotune.explore.compare import score
from pagedgen.autotune.explore.outcome import Outcome
from pagedgen.autotune.explore.report import Report, TraceReport
from pagedgen.autotune.paths import publish
from pagedgen.autotune.suites.fragmentation import PAPER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
SALT = "pagedgen"  # makes the ids in an SVG the same each time
DPI = 110

Plot = Callable[[Report, TraceReport], "Figure"]


def _figure(width: float = 6.4, height: float = 3.8) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _note(report: Report, axes: Any) -> None:
    """Says on the figure itself when its times are predicted."""
    if report.predicted:
        axes.annotate(
            "kernel times predicted", (1, 1.01), xycoords="axes fraction", ha="right", va="bottom",
            fontsize=8, color="#666666",
        )  # fmt: skip


def _fixed(trace: TraceReport) -> list[Outcome]:
    return [o for o in trace.outcomes if not o.policy.adaptive and not o.policy.kernel_block_size]


def _other(trace: TraceReport) -> list[Outcome]:
    return [o for o in trace.outcomes if o not in _fixed(trace)]


def _by_size(axes: Any, outcomes: list[Outcome]) -> list[int]:
    axes.set_xlabel("block size, tokens")
    axes.set_xticks(range(len(outcomes)), [o.name for o in outcomes])
    return list(range(len(outcomes)))


def waste(report: Report, trace: TraceReport) -> Figure:
    """Where the pool goes, against block size: tokens, inside blocks, free while a request waits."""
    figure, axes = _figure()
    outcomes = trace.outcomes
    at = _by_size(axes, [o for o in outcomes if not o.policy.kernel_block_size])
    shown = [outcomes[i] for i in at]
    bottom = [0.0] * len(at)
    parts = (
        ("holds tokens", COLOURS[2], [o.memory_tokens for o in shown]),
        ("empty inside blocks", COLOURS[1], [o.internal_waste for o in shown]),
        ("free while a request waits", COLOURS[3], [o.external_waste for o in shown]),
    )
    for label, colour, values in parts:
        axes.bar(at, [100 * v for v in values], bottom=bottom, color=colour, label=label, width=0.7)
        bottom = [b + 100 * v for b, v in zip(bottom, values, strict=True)]
    for x, outcome, top in zip(at, shown, bottom, strict=True):
        text = f"{100 * outcome.internal_waste:.1f}%"
        axes.annotate(text, (x, top), (0, 2), textcoords="offset points", ha="center", fontsize=8)
    axes.set_ylim(0, 1.3 * max(bottom))
    axes.set_ylabel("% of the KV pool")
    axes.set_title(f"{trace.trace}: where memory goes (number: empty inside blocks)", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="upper center", ncols=3)
    return figure


def throughput(report: Report, trace: TraceReport) -> Figure:
    """Output tokens a second against block size, adaptive policies as lines across."""
    figure, axes = _figure()
    fixed = _fixed(trace)
    at = _by_size(axes, fixed)
    axes.plot(at, [o.tokens_per_s for o in fixed], "o-", color=COLOURS[0], label="fixed")
    for outcome, colour, style in zip(_other(trace), COLOURS[1:], ("--", ":"), strict=False):
        axes.axhline(outcome.tokens_per_s, color=colour, linestyle=style, label=outcome.name)
    chosen = [o.name for o in fixed].index(trace.recommendation.policy)
    axes.plot(
        [chosen], [fixed[chosen].tokens_per_s], "o", markersize=12, markerfacecolor="none",
        color=COLOURS[2], label="recommended",
    )  # fmt: skip
    axes.set_ylim(0, 1.15 * max(o.tokens_per_s for o in trace.outcomes))
    axes.set_ylabel("output tokens/s, one rank")
    axes.set_title(f"{trace.trace}: throughput", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    _note(report, axes)
    return figure


def front(report: Report, trace: TraceReport) -> Figure:
    """Memory wasted inside blocks against throughput (in open loops: latency), the Pareto front joined."""
    figure, axes = _figure()
    shown = [o for o in trace.outcomes if not o.policy.kernel_block_size]

    def height(outcome: Outcome) -> float:
        return outcome.tokens_per_s if trace.closed else 1000 / score(outcome, closed=False)

    best = sorted((o for o in shown if o.name in trace.pareto), key=lambda o: o.internal_waste)
    axes.plot(
        [100 * o.internal_waste for o in best],
        [height(o) for o in best],
        "-",
        color=COLOURS[2],
        label="front",
    )
    for outcome in shown:
        colour = COLOURS[2] if outcome in best else COLOURS[0]
        point = (100 * outcome.internal_waste, height(outcome))
        axes.plot(*point, "o", color=colour)
        axes.annotate(outcome.name, point, xytext=(5, 4), textcoords="offset points", fontsize=8)
    low, high = min(map(height, shown)), max(map(height, shown))
    room = max(0.15 * (high - low), 0.02 * high)  # less than 2% apart should not look far apart
    axes.set_ylim(low - room, high + room)
    axes.set_xlabel("empty inside blocks, % of the KV pool")
    axes.set_ylabel("output tokens/s, one rank" if trace.closed else "latency a token, ms")
    axes.set_title(f"{trace.trace}: Pareto front", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False)
    _note(report, axes)
    return figure


def timeline(report: Report, trace: TraceReport) -> Figure:
    """The pool over time under the recommended block size."""
    figure, axes = _figure(width=10)
    outcome = trace.outcome(trace.recommendation.policy)
    seconds = [m.seconds for m in outcome.timeline]
    tokens = [100 * m.tokens for m in outcome.timeline]
    both = [100 * (m.tokens + m.internal) for m in outcome.timeline]
    axes.fill_between(seconds, tokens, color=COLOURS[2], alpha=0.7, linewidth=0, label="holds tokens")
    axes.fill_between(seconds, tokens, both, color=COLOURS[1], linewidth=0, label="empty inside blocks")
    axes.set_ylim(0, 100)
    axes.set_xlabel("seconds")
    axes.set_ylabel("% of the KV pool")
    batch = axes.twinx()
    batch.spines[["top"]].set_visible(False)
    batch.plot(
        seconds,
        [m.running for m in outcome.timeline],
        color=COLOURS[0],
        linewidth=1,
        label="sequences in a step",
    )
    batch.set_ylim(0, 1.2 * max(1, *(m.running for m in outcome.timeline)))
    batch.set_ylabel("sequences in a step")
    axes.set_title(f"{trace.trace}: memory over time, blocks of {outcome.name}", fontsize=10, loc="left")
    lines = [*axes.get_legend_handles_labels()[0], *batch.get_legend_handles_labels()[0]]
    names = [*axes.get_legend_handles_labels()[1], *batch.get_legend_handles_labels()[1]]
    axes.legend(lines, names, fontsize=8, frameon=False, loc="lower center", ncols=3)
    return figure


def contiguous(report: Report, trace: TraceReport) -> Figure:
    """Figure 2 of the PagedAttention paper on this trace, beside the paper's own values."""
    figure, axes = _figure()
    names = list(PAPER)
    here = {share.policy: share.of_pool for share in trace.contiguous}
    at = range(len(names))
    axes.bar(
        [x - 0.2 for x in at],
        [100 * PAPER[n] for n in names],
        0.38,
        color="#9ca3af",
        label="the paper's traces",
    )
    axes.bar(
        [x + 0.2 for x in at],
        [100 * here.get(n, 0.0) for n in names],
        0.38,
        color=COLOURS[0],
        label=trace.trace,
    )
    for x, name in enumerate(names):
        text = f"{100 * here[name]:.1f}" if name in here else "-"
        axes.annotate(text, (x + 0.2, 100 * here.get(name, 0.0) + 1), ha="center", fontsize=8)
        axes.annotate(f"{100 * PAPER[name]:.1f}", (x - 0.2, 100 * PAPER[name] + 1), ha="center", fontsize=8)
    axes.set_xticks(list(at), names)
    axes.set_ylim(0, 108)
    axes.set_ylabel("% of KV memory that holds tokens")
    axes.set_title(f"{trace.trace}: contiguous reservation and paging", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    return figure


PLOTS: dict[str, tuple[str, Plot]] = {
    "waste": ("Memory against block size", waste),
    "throughput": ("Throughput against block size", throughput),
    "pareto": ("Pareto front", front),
    "contiguous": ("Contiguous policies, as in Figure 2 of the PagedAttention paper", contiguous),
    "timeline": ("Memory over time", timeline),
}


def svg(figure: Figure) -> bytes:
    """A figure as SVG, the same bytes for the same figure."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": SALT}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()


def save_pngs(report: Report, folder: Path) -> list[Path]:
    """Every plot of every trace as ``FOLDER/TRACE-PLOT.png``.

    Raises:
        CacheUnwritable: the folder cannot be written.
    """
    paths = []
    for trace in report.traces:
        for name, (_, plot) in PLOTS.items():
            paths.append(folder / f"{trace.trace}-{name}.png")
            publish(paths[-1], png(plot(report, trace)))
    return paths
