"""Reports of ``pagedgen explore --json`` → the data, tables and pictures of docs/block_sizes.md.

    python docs/benchmarks/block_sizes.py reports/*.json

writes ``block-sizes.json`` beside this file, the tables into the document between its markers, and the
pictures into ``docs/images``. Kernel times are those of the files ``block-sizes-gpu-*.json`` beside this one.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from pagedgen.autotune.explore import compare
from pagedgen.autotune.explore.compare import gain, score
from pagedgen.autotune.explore.outcome import Outcome
from pagedgen.autotune.explore.plots import COLOURS, png
from pagedgen.autotune.explore.report import Report, Server, TraceReport
from pagedgen.autotune.explore.timings import KernelTiming, KernelTimings
from pagedgen.autotune.suites.fragmentation import PAPER
from pagedgen.values import codec

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parent / "block_sizes.md"
IMAGES = HERE.parent / "images"
KEPT = (
    "num_blocks", "kernel_status", "memory_tokens", "internal_waste", "external_waste", "run_coverage",
    "metadata_bytes", "hit_share", "steps", "batch_mean", "batch_p99", "preemptions", "copied_bytes",
    "swapped_bytes", "compacted_bytes", "seconds", "kernel_seconds", "tokens_per_s", "ttft_p50", "ttft_p99",
    "tpot_p50", "tpot_p99", "windows",
)  # fmt: skip
SIZES = ("1", "8", "16", "32", "64", "128", "256")

Row = tuple[Server, TraceReport]
Times = Mapping[tuple[str, float], Sequence[float]]  # (block size, run coverage) -> µs, a batch each


def fixed(trace: TraceReport) -> list[Outcome]:
    """Outcomes of the fixed sizes."""
    return [o for o in trace.outcomes if o.name in SIZES]


def label(server: Server) -> str:
    """``llama-3-8b fp8, h100-sxm, 20 GiB``"""
    kv = " fp8" if server.kv_dtype.startswith("fp8") else ""
    return f"{server.model}{kv}, {server.target}, {server.memory_bytes / (1 << 30):.0f} GiB"


def judged(trace: TraceReport) -> TraceReport:
    """The trace's outcomes judged by the rules as they stand."""
    found = (
        () if trace.controller is None else compare.verdicts(trace.outcomes, trace.controller, trace.closed)
    )
    shown = [o for o in trace.outcomes if o.name != "bound"]
    return replace(
        trace,
        recommendation=compare.recommend(trace.outcomes, trace.closed),
        pareto=compare.pareto(shown, trace.closed),
        verdicts=found,
    )


def complete(rows: Sequence[Row]) -> list[Row]:
    """Rows of servers that saw every trace."""
    traces = {trace.trace for _, trace in rows}
    seen: dict[Server, set[str]] = {}
    for server, trace in rows:
        seen.setdefault(server, set()).add(trace.trace)
    return [row for row in rows if seen[row[0]] == traces]


def short(value: Any) -> Any:
    """Numbers to four significant digits, in whatever holds them."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: short(item) for key, item in value.items()}
    return [short(item) for item in value] if isinstance(value, list) else value


def data(reports: Sequence[Report]) -> str:
    """What the document rests on: an entry a trace and server, in it a line a policy with ``columns``."""
    entries = []
    for report in reports:
        for trace in report.traces:
            entry = codec.encode(trace)
            outcomes = entry.pop("outcomes")
            head = {"command": report.command, "seed": report.seed, "server": codec.encode(report.server)}
            lines = ",\n".join(
                json.dumps([o.name, *(short(row[column]) for column in KEPT)], separators=(",", ":"))
                for o, row in zip(trace.outcomes, outcomes, strict=True)
            )
            entries.append(json.dumps(short(head | entry))[:-1] + ', "outcomes": [\n' + lines + "\n]}")
    columns = json.dumps(["policy", *KEPT])
    return f'{{"columns": {columns},\n"entries": [\n' + ",\n".join(entries) + "\n]}\n"


def markdown(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """A table; columns after the first are right-aligned."""
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def recommended(rows: Sequence[Row]) -> str:
    """A row a trace, a column a server that saw them all."""
    rows = complete(rows)
    places = list(dict.fromkeys(label(server) for server, _ in rows))
    traces = list(dict.fromkeys(trace.trace for _, trace in rows))
    found = {(trace.trace, label(server)): trace for server, trace in rows}

    def cells(name: str) -> Iterator[str]:
        yield name
        for place in places:
            trace = found[name, place]
            others = [score(o, trace.closed) for o in fixed(trace)]
            spread = 1 - min(others) / max(others)
            yield f"{trace.recommendation.policy} ({100 * spread:.1f}%)"

    return markdown(["trace", *places], (list(cells(name)) for name in traces))


def waste(rows: Sequence[Row]) -> str:
    """Internal waste of the pool by size, on the first server of the reports."""
    first = rows[0][0]

    def cells(trace: TraceReport) -> Iterator[str]:
        yield trace.trace
        yield from (f"{100 * trace.outcome(size).internal_waste:.1f}" for size in SIZES)
        yield f"{trace.outcome('16').batch_mean:.0f}"
        yield f"{100 * trace.outcome('16').memory_tokens:.0f}"

    head = ["trace", *SIZES, "batch at 16", "% of pool with tokens at 16"]
    return markdown(head, (list(cells(trace)) for server, trace in rows if server == first))


def speed(rows: Sequence[Row]) -> str:
    """Tokens a second of each size against 16, with the interval."""

    def cells(server: Server, trace: TraceReport) -> Iterator[str]:
        yield f"{trace.trace}; {server.memory_bytes / (1 << 30):.0f} GiB"
        base = trace.outcome("16")
        yield f"{base.tokens_per_s:,.0f}"
        for size in SIZES:
            if size != "16":
                found = gain(trace.outcome(size), base, trace.closed)
                yield f"{100 * found.mean:+.1f} ±{50 * (found.high - found.low):.1f}"

    head = ["trace; KV pool", "tokens/s at 16", *(size for size in SIZES if size != "16")]
    like = [row for row in rows if _is_like(row[0], rows[0][0])]
    return markdown(head, (list(cells(*row)) for row in like))


def _is_like(server: Server, other: Server) -> bool:
    """The same but for the size of the pool."""
    return (server.model, server.target, server.kv_dtype) == (other.model, other.target, other.kv_dtype)


def figure_2(rows: Sequence[Row]) -> str:
    """Shares of the contiguous policies and of paging, on the first server."""
    first = rows[0][0]

    def cells(trace: TraceReport) -> Iterator[str]:
        shares = {share.policy: share.of_pool for share in trace.contiguous}
        yield trace.trace
        yield f"{trace.contiguous_pool:,}"
        yield from (f"{100 * shares[name]:.1f}" if name in shares else "-" for name in PAPER)

    def all_rows() -> Iterator[Sequence[str]]:
        yield ["*the paper*", "", *(f"*{100 * share:.1f}*" for share in PAPER.values())]
        yield from (list(cells(trace)) for server, trace in rows if server == first)

    return markdown(["trace", "pool, tokens", *PAPER], all_rows())


def verdicts(rows: Sequence[Row]) -> str:
    """Gains of adaptive blocks, their bound, and the controller over 64 and 128."""

    def cells(server: Server, trace: TraceReport) -> Iterator[str]:
        yield f"{trace.trace}; {label(server)}"
        for verdict in trace.verdicts:
            texts = (f"{100 * g.mean:+.1f} ({100 * g.low:+.1f})" for g in verdict.gains)
            mark = "**" if verdict.kept else ""
            name = verdict.policy.removeprefix("controller ")
            yield mark + " / ".join(texts) + mark + (f" {name}" if name.startswith("(") else "")
        before, after = (100 * trace.outcome(name).run_coverage for name in ("16", "adaptive"))
        yield f"{before:.0f} → {after:.0f}"

    head = ["trace; server", "adaptive", "bound", "controller (its size)", "% in runs, 16 → adaptive"]
    return markdown(head, (list(cells(*row)) for row in rows if row[1].verdicts))


def kernel_files() -> list[KernelTimings]:
    """What the suite measured, by the name of the target."""
    return [KernelTimings.load(path) for path in sorted(HERE.glob("block-sizes-gpu-*.json"))]


def kernel_name(row: KernelTiming) -> str:
    """``decode, head_dim 128, 32/8 heads, fp16``"""
    spec = row.spec
    kv = "fp8" if spec.kv_dtype.is_fp8 else "fp16"
    heads = f"{spec.num_q_heads}/{spec.num_kv_heads} heads"
    return f"{spec.op.value}, head_dim {spec.head_dim}, {heads}, {kv}"


def kernels_of(file: KernelTimings) -> dict[str, Times]:
    """Times of every kernel of a file, by :func:`kernel_name`; batches in the same order in every list."""
    found: dict[str, dict[tuple[str, float], list[float]]] = {}
    for row in sorted(file.rows, key=_order):
        times = found.setdefault(kernel_name(row), {})
        times.setdefault((str(row.spec.block_size), row.coverage), []).append(row.median_us)
    return dict(found)


def _order(row: KernelTiming) -> tuple[Any, ...]:
    spec = row.spec
    kernel = (spec.op, spec.kv_dtype.is_fp8, spec.head_dim, -spec.num_q_heads)
    return *kernel, row.num_seqs, row.num_tokens


def against_16(times: Times, size: str) -> float:
    """Time at a block size over that at 16, behind tables with as few runs as a size can have."""
    least = min(coverage for own, coverage in times if own == size)
    ratios = [a / b for a, b in zip(times[size, least], times["16", 0.0], strict=True)]
    return geometric_mean(ratios)


def kernels() -> str:
    """Kernel time against block size: % against 16, geometric mean over batches."""

    def cells(target: str, name: str, times: Times) -> Iterator[str]:
        yield f"{name}; {target}"
        yield " / ".join(f"{us:,.0f}" for us in times["16", 0.0])
        yield from (f"{100 * (against_16(times, size) - 1):+.1f}" for size in SIZES if size != "16")

    head = ["kernel; GPU", "µs at 16, by batch", *(size for size in SIZES if size != "16")]
    rows = (
        list(cells(file.environment.target, name, times))
        for file in kernel_files()
        for name, times in kernels_of(file).items()
    )
    return markdown(head, rows)


def coverage() -> str:
    """Kernel time against run coverage: % against a table without runs, over blocks below 64 and batches."""

    def cells(target: str, name: str, times: Times) -> Iterator[str]:
        yield f"{name}; {target}"
        for share in (0.5, 0.9, 1.0):
            sizes = [size for size, known in times if known == share and (size, 0.0) in times]
            pairs = (zip(times[size, share], times[size, 0.0], strict=True) for size in sizes)
            ratios = [a / b for pair in pairs for a, b in pair]
            low, high = 100 * (min(ratios) - 1), 100 * (max(ratios) - 1)
            yield f"{100 * (geometric_mean(ratios) - 1):+.1f} ({low:+.1f} to {high:+.1f})"

    rows = (
        list(cells(file.environment.target, name, times))
        for file in kernel_files()
        for name, times in kernels_of(file).items()
    )
    return markdown(["kernel; GPU", "50% in runs", "90%", "100%"], rows)


def kernels_figure() -> Any:
    """Kernel time over block size, against 16: a panel an operator and GPU."""
    from matplotlib.figure import Figure

    files = kernel_files()
    figure = Figure(figsize=(9.6, 0.4 + 3.2 * len(files)), layout="constrained")
    panels = figure.subplots(len(files), 2, sharey=True, squeeze=False)
    for row, file in zip(panels, files, strict=True):
        for axes, op in zip(row, ("decode", "extend"), strict=True):
            own = {name: times for name, times in kernels_of(file).items() if name.startswith(op)}
            for i, (name, times) in enumerate(own.items()):
                values = [100 * (against_16(times, size) - 1) for size in SIZES]
                label = name.removeprefix(f"{op}, ")
                axes.plot(values, marker="o", markersize=3, color=COLOURS[i], label=label)
            axes.set_xticks(range(len(SIZES)), SIZES)
            axes.set_title(f"{op}, {file.environment.target}", fontsize=9, loc="left")
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("kernel time, % against blocks of 16")
    for axes in panels[-1]:
        axes.set_xlabel("block size, tokens")
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=7, frameon=False, loc="outside lower center", ncols=3)
    return figure


def lines_figure(rows: Sequence[Row], relative: bool) -> Any:
    """Waste, or speed against the best size, over block sizes: a line a trace, a panel a model on the first
    target."""
    from matplotlib.figure import Figure

    target, rows = rows[0][0].target, complete(rows)
    places = list(dict.fromkeys(label(server) for server, _ in rows if server.target == target))
    figure = Figure(figsize=(3.4 * len(places), 3.8), layout="constrained")
    panels = figure.subplots(1, len(places), sharey=True, squeeze=False)[0]
    for axes, place in zip(panels, places, strict=True):
        own = [trace for server, trace in rows if label(server) == place]
        for i, trace in enumerate(own):
            best = max(score(o, trace.closed) for o in fixed(trace))
            values = [
                100 * (score(o, trace.closed) / best - 1 if relative else o.internal_waste)
                for o in fixed(trace)
            ]
            style = "-" if i < len(COLOURS) else "--"
            axes.plot(
                values, style, marker="o", markersize=3, color=COLOURS[i % len(COLOURS)], label=trace.trace
            )
        axes.set_xticks(range(len(SIZES)), SIZES)
        axes.set_xlabel("block size, tokens")
        axes.set_title(place, fontsize=9, loc="left")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    note = " (kernels predicted)" if rows[0][1].outcomes[0].kernel_status == "predicted" else ""
    panels[0].set_ylabel(
        f"tokens/s, % off the best{note}" if relative else "empty inside blocks, % of the pool"
    )
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=7, frameon=False, loc="outside lower center", ncols=5)
    return figure


def shares_figure(rows: Sequence[Row]) -> Any:
    """Figure 2 of the paper on every trace."""
    from matplotlib.figure import Figure

    first = rows[0][0]
    own = [trace for server, trace in rows if server == first]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(PAPER)
    for i, name in enumerate(PAPER):
        shares = [{s.policy: s.of_pool for s in trace.contiguous}.get(name, 0.0) for trace in own]
        at = [x + (i - 1.5) * width for x in range(len(own) + 1)]
        axes.bar(at, [100 * v for v in (PAPER[name], *shares)], width, color=COLOURS[i], label=name)
    axes.set_xticks(
        range(len(own) + 1), ["the paper", *(t.trace.replace("-", "-\n", 1) for t in own)], fontsize=7
    )
    axes.set_ylabel("% of KV memory that holds tokens")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, loc="outside upper center", ncols=4)
    return figure


def gains_figure(rows: Sequence[Row]) -> Any:
    """Gains of adaptive blocks over 64 and 128 with their intervals."""
    from matplotlib.figure import Figure

    own = [row for row in rows if row[1].verdicts]
    figure = Figure(figsize=(8, 0.24 * len(own) + 1.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, against in zip(panels, (0, 1), strict=True):
        for y, (_, trace) in enumerate(own):
            found = trace.verdicts[0].gains[against]
            axes.plot([100 * found.low, 100 * found.high], [y, y], color=COLOURS[0])
            axes.plot(
                100 * found.mean, y, "o", markersize=4, color=COLOURS[2 if trace.verdicts[0].kept else 0]
            )
        axes.axvline(2, color=COLOURS[1], linestyle="--", linewidth=1)
        axes.axvline(0, color="#9ca3af", linewidth=1)
        axes.set_xlabel(f"gain over blocks of {(64, 128)[against]}, %", fontsize=9)
        axes.grid(alpha=0.3, axis="x")
    names = [f"{trace.trace}; {label(server)}" for server, trace in own]
    panels[0].set_yticks(range(len(own)), names, fontsize=7)
    panels[0].set_ylim(len(own) - 0.5, -0.5)
    figure.suptitle(
        "adaptive blocks: 95% intervals; kept if all of it is right of the dashed line", fontsize=9
    )
    return figure


def main(paths: Sequence[str]) -> None:
    """Read the reports and write everything."""
    reports = [codec.load_file(Report, Path(path)) for path in paths]
    reports = [replace(report, traces=tuple(map(judged, report.traces))) for report in reports]
    rows = [(report.server, trace) for report in reports for trace in report.traces]
    (HERE / "block-sizes.json").write_text(data(reports), encoding="utf-8")
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, table in (
        ("recommended", recommended(rows)),
        ("waste", waste(rows)),
        ("speed", speed(rows)),
        ("figure 2", figure_2(rows)),
        ("verdicts", verdicts(rows)),
        ("kernels", kernels()),
        ("coverage", coverage()),
    ):
        marks = f"<!-- {name} -->\n", "\n<!-- end -->"
        pattern = re.escape(marks[0]) + ".*?" + re.escape(marks[1].strip())
        text, count = re.subn(pattern, lambda _, t=table, m=marks: m[0] + t + m[1], text, flags=re.S)
        if count != 1:
            raise SystemExit(f"{DOCUMENT}: no place for the table {name!r}")
    DOCUMENT.write_text(text, encoding="utf-8")
    IMAGES.mkdir(exist_ok=True)
    for name, figure in (
        ("waste", lines_figure(rows, relative=False)),
        ("throughput", lines_figure(rows, relative=True)),
        ("figure-2", shares_figure(rows)),
        ("adaptive", gains_figure(rows)),
        ("kernels", kernels_figure()),
    ):
        (IMAGES / f"block-sizes-{name}.png").write_bytes(png(figure))


if __name__ == "__main__":
    main(sys.argv[1:])
