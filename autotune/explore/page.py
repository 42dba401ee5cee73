"""The HTML report: one file that needs nothing beside it, no script and no network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from pagedgen.autotune.explore.plots import PLOTS, svg
from pagedgen.autotune.explore.report import Report, TraceReport
from pagedgen.autotune.explore.table import COLUMNS, facts, remarks, rows

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid #e5e7eb; padding-top: 1rem; }
table { border-collapse: collapse; font-size: 13px; margin: .8rem 0; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e5e7eb; text-align: right; white-space: nowrap; }
th { vertical-align: bottom; } .facts th, .facts td { text-align: left; white-space: normal; }
.wide { overflow-x: auto; } tr.chosen { background: #ecfdf5; font-weight: 600; }
.advice { background: #ecfdf5; border-left: 4px solid #059669; padding: .6rem 1rem; }
.warning { background: #fffbeb; border-left: 4px solid #d97706; padding: .6rem 1rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(430px, 1fr)); gap: 1rem; }
figure { margin: 0; } figure.timeline { grid-column: 1 / -1; } img { width: 100%; height: auto; }
figcaption, dl, footer { font-size: 13px; color: #4b5563; } dt { font-weight: 600; } dd { margin: 0 0 .3rem 1rem; }
"""  # noqa: E501 - a style sheet


def page(report: Report) -> str:
    """The report as HTML text; the same text for the same report."""
    server = report.server
    title = f"Block sizes: {server.model} on {server.target}"
    warning = ""
    if report.predicted:
        warning = (
            '<p class="warning"><strong>Kernel times are predicted</strong>, not measured, for '
            "some or all block sizes (see below). Memory, batches, preemptions and prefix hits come from the "
            "block manager itself; times of steps rest on the kernels' times and a roofline.</p>"
        )
    contents = "".join(
        f'<li><a href="#t{i}">{escape(trace.trace)}</a>: blocks of {escape(trace.recommendation.policy)}</li>'
        for i, trace in enumerate(report.traces)
    )
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        warning,
        '<table class="facts">',
        *(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts(report)),
        "</table>",
        f"<p>Recommended, by trace:</p><ul>{contents}</ul>",
        *(_trace(report, trace, i) for i, trace in enumerate(report.traces)),
        "<h2>What the columns mean</h2><dl>",
        *(f"<dt>{escape(name.lstrip('>'))}</dt><dd>{escape(meaning)}</dd>" for name, meaning, _ in COLUMNS),
        "</dl>",
        f"<footer>pagedgen {escape(report.pagedgen)}, seed {report.seed}"
        + (f": <code>{escape(report.command)}</code>" if report.command else "")
        + "</footer></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _trace(report: Report, trace: TraceReport, number: int) -> str:
    first, *others = remarks(trace)
    cached = "with a prefix cache" if trace.prefix_caching else "without a prefix cache"
    lengths = f"prompts of {trace.mean_prompt:,.0f} tokens and outputs of {trace.mean_output:,.0f} on average"
    figures = []
    for name, (caption, plot) in PLOTS.items():
        data = base64.b64encode(svg(plot(report, trace))).decode("ascii")
        figures.append(
            f'<figure class="{name}"><img alt="{escape(caption)}, {escape(trace.trace)}" '
            f'src="data:image/svg+xml;base64,{data}"><figcaption>{escape(caption)}</figcaption></figure>'
        )
    return "\n".join(
        (
            f'<h2 id="t{number}">{escape(trace.trace)}</h2>',
            f"<p>{trace.requests:,} requests, {lengths}; {escape(trace.load)}; {cached}.</p>",
            f'<p class="advice">{escape(first)}</p>',
            f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in others)}</ul>",
            f'<div class="wide">{_table(trace)}</div>',
            f'<div class="plots">{"".join(figures)}</div>',
        )
    )


def _table(trace: TraceReport) -> str:
    head = _row((name.lstrip(">") for name, _, _ in COLUMNS), "th")
    body = "".join(
        _row(row, "td", "chosen" if row[0] == trace.recommendation.policy else "") for row in rows(trace)
    )
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def _row(cells: Iterable[str] | Sequence[str], tag: str, kind: str = "") -> str:
    opening = f'<tr class="{kind}">' if kind else "<tr>"
    return opening + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
