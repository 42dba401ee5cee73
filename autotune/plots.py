"""What a search found, drawn: history, how much each field mattered, and the kernels under the roofline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagedgen.autotune.outcome import Outcome
from pagedgen.errors import OutputUnwritable, ToolMissing
from pagedgen.values.record import Record
from pagedgen.values.spec import Op

if TYPE_CHECKING:
    from pagedgen.autotune.tune import TuneResult

SIZE, DPI = (7.0, 4.2), 150


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written, and a missing matplotlib, before a search is begun for it.

    Raises:
        OutputUnwritable: it cannot be made or written.
        ToolMissing: matplotlib is not installed.
    """
    _figure_class()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".pagedgen"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputUnwritable(f"{folder}: {error.strerror or error}") from error


def draw(result: TuneResult, folder: Path) -> tuple[Path, ...]:
    """Write ``<spec>.history.png``, ``.importance.png`` and ``.roofline.png``; those there is data for.

    A prediction has no history; its roofline is the model's, and says so.

    Raises:
        OutputUnwritable, ToolMissing: as :func:`check_folder`.
    """
    timed = [o for o in result.outcomes if o.time_us is not None]
    figures = {"roofline": _roofline(result)}
    if timed:
        figures["history"] = _history(result)
    weights = importance(timed)
    if weights:
        figures["importance"] = _bars(result, weights)
    paths = []
    for name, figure in figures.items():
        path = folder / f"{result.spec.name}.{result.target.name}.{name}.png"
        try:
            figure.savefig(path, dpi=DPI)
        except OSError as error:
            raise OutputUnwritable(f"{path}: {error.strerror or error}") from error
        paths.append(path)
    return tuple(paths)


def importance(timed: Sequence[Outcome]) -> dict[str, float]:
    """The share of the variance of log time that each field explains by itself, the largest first.

    The main effects of a functional ANOVA (Hutter et al., ICML 2014), over the schedules that were timed: a
    search times more of what is good, so this says what mattered on the way, not in the whole space.
    """
    if len(timed) < 3:
        return {}
    logs = [math.log(o.time_us or 1.0) for o in timed]
    total = statistics.pvariance(logs)
    shares = {}
    for name, _ in timed[0].schedule.choices:
        groups: dict[object, list[float]] = {}
        for outcome, log in zip(timed, logs, strict=True):
            groups.setdefault(outcome.schedule[name], []).append(log)
        if len(groups) > 1 and total > 0:
            inside = sum(statistics.pvariance(g) * len(g) for g in groups.values()) / len(logs)
            shares[name] = 1 - inside / total
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ToolMissing("matplotlib", "plot") from error
    return Figure


def _axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    figure = _figure_class()(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.title.set_fontsize(9)
    return figure, axes


def _history(result: TuneResult) -> Any:
    figure, axes = _axes(
        _title(result), "schedule, in the order of trying", "µs, geometric mean of the batches"
    )
    times = [(i, o.time_us) for i, o in enumerate(result.outcomes, 1) if o.time_us is not None]
    axes.plot(*zip(*times, strict=True), ".", color="0.6", label="tried")
    best: list[tuple[int, float]] = []
    for i, time in times:
        best.append((i, min(time, best[-1][1]) if best else time))
    axes.plot(*zip(*best, strict=True), drawstyle="steps-post", label="best so far")
    broken = [i for i, o in enumerate(result.outcomes, 1) if o.time_us is None]
    if broken:
        level = max(t for _, t in times)
        axes.plot(broken, [level] * len(broken), "x", color="tab:red", label="did not work")
    axes.set_yscale("log")
    axes.legend()
    return figure


def _bars(result: TuneResult, weights: dict[str, float]) -> Any:
    figure, axes = _axes(_title(result), "share of the variance of log time that a field explains alone", "")
    axes.barh(list(weights)[::-1], list(weights.values())[::-1])
    axes.set_xlim(0, 1)
    return figure


def _roofline(result: TuneResult) -> Any:
    """The picked kernels' GB/s over what a call reads, of decode; else TFLOP/s over FLOPs per byte read."""
    measured, decode = result.roofline_gbs > 0, result.spec.op is Op.DECODE
    how = "" if measured else " (predicted, not measured)"
    labels = (
        ("MB of K and V that a call reads", "GB/s") if decode else ("FLOP per byte of K and V", "TFLOP/s")
    )
    figure, axes = _axes(f"{_title(result)}{how}", *labels)
    rows = [result.chosen(w) for w in {r.workload: r for r in result.records}]
    points = [_point(record, decode) for record in rows]
    axes.plot(*zip(*points, strict=True), "o", label="picked kernels")
    for record, point in zip(rows, points, strict=True):
        axes.annotate(record.workload.name, point, textcoords="offset points", xytext=(5, 4), size=7)
    gbs = result.roofline_gbs or result.target.bandwidth_gbs
    tflops = result.roofline_tflops or result.target.f16_tflops
    name = "measured" if measured else "published"
    if decode and gbs:
        axes.axhline(gbs, color="tab:red", label="measured reads" if measured else "published bandwidth")
    elif gbs and tflops:
        ends = sorted({min(x for x, _ in points) / 2, tflops / gbs * 1e3, max(x for x, _ in points) * 2})
        roof = [min(x * gbs / 1e3, tflops) for x in ends]
        axes.plot(ends, roof, color="tab:red", label=f"{name} bandwidth and matrix product")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _point(record: Record, decode: bool) -> tuple[float, float]:
    """Where a record stands in the roofline's plot."""
    size = record.workload.kv_bytes(record.spec)
    if decode:
        return size / 1e6, record.gbs
    return record.workload.flops(record.spec) / size, record.tflops


def _title(result: TuneResult) -> str:
    return f"{result.spec.name} on {result.target.name}"
