"""``pagedgen explore``: which block size serves a traffic best, simulated on the block manager itself."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pagedgen.autotune.explore import table
from pagedgen.autotune.explore.explorer import BLOCK_SIZES, Exploration, explore
from pagedgen.autotune.explore.load import Arrivals, Load
from pagedgen.autotune.explore.report import Report
from pagedgen.autotune.explore.timings import KernelTimings
from pagedgen.autotune.paths import publish
from pagedgen.cli import console
from pagedgen.cli.options import DEFAULT_MODEL, integers, trace_of
from pagedgen.errors import CacheUnwritable, InvalidValue, OutputUnwritable, ToolMissing
from pagedgen.values import codec
from pagedgen.values.model import find_model
from pagedgen.values.spec import parse_dtype
from pagedgen.values.target_table import detect, num_cores, target
from pagedgen.values.trace import Trace
from pagedgen.values.weights import find_weights

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def size(field: str, text: str) -> int:
    """``40GiB``, ``512 MB`` or a number of bytes.

    Raises:
        InvalidValue: not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not found or found[2].upper() not in UNITS:
        raise InvalidValue(field, text, "a size like 40GiB, 512MB or a number of bytes is expected")
    return int(float(found[1]) * UNITS[found[2].upper()])


def run(
    *,
    gpu: str | None,
    model: str | None,
    tp: int,
    memory: str | None,
    kv_dtype: str | None,
    block_sizes: str | None,
    adaptive: bool,
    traces: Sequence[Path],
    requests: int | None,
    concurrency: int | None,
    rate_factor: float | None,
    request_rate: float | None,
    prefix_caching: bool | None,
    host_memory: str | None,
    max_num_seqs: int,
    max_batched_tokens: int,
    kernel_times: Path | None,
    jobs: int | None,
    seed: int,
    html: Path | None,
    plots: Path | None,
    as_json: bool,
) -> None:
    """Explore, and show the result as tables, as JSON, as a page and as pictures.

    Raises:
        InvalidValue, MalformedFile, UnknownModel, UnknownTarget, Unsupported: an option or a file, by name.
        ToolMissing: matplotlib, for ``html`` and ``plots``.
        OutputUnwritable: what was asked for cannot be written.
    """
    if html or plots:
        _check_outputs(html, plots)
    load = _load(concurrency, rate_factor, request_rate, max_num_seqs)
    if jobs is not None and jobs < 1:
        raise InvalidValue("jobs", jobs, "at least 1 is allowed")
    name = model or DEFAULT_MODEL
    shape = find_model(name).shard(tp)
    what = Exploration(
        model=shape,
        weights=find_weights(name, tp),
        target=target(gpu) if gpu else detect(),
        kv_dtype=parse_dtype(kv_dtype, "kv_dtype") if kv_dtype else shape.dtype,
        block_sizes=tuple(integers("block_sizes", block_sizes)) or BLOCK_SIZES,
        adaptive=adaptive,
        memory_bytes=size("memory", memory) if memory else 0,
        host_bytes=size("host_memory", host_memory) if host_memory else 0,
        max_num_seqs=max_num_seqs,
        max_batched_tokens=max_batched_tokens,
        seed=seed,
        timings=KernelTimings.load(kernel_times) if kernel_times else None,
        command=_command(),
    )
    read = _distinct([_cut(trace_of(path, seed), requests) for path in traces or (Path("sample"),)])
    for warning in shape.gaps():
        console.warn(f"{warning}; explored as if every layer kept and read the whole context")
    with console.progress() as bars:
        rows = {trace.name: bars.add_task(trace.name, total=None) for trace in read}
        report = explore(
            what,
            [
                (trace, load, trace.has_prefixes if prefix_caching is None else prefix_caching)
                for trace in read
            ],
            jobs or min(2, num_cores()),
            lambda trace, done, total: bars.update(rows[trace], completed=done, total=total),
        )
    if as_json:
        console.emit(codec.encode(report))
    else:
        show(report)
    if plots:
        from pagedgen.autotune.explore.plots import save_pngs

        with _written():
            paths = save_pngs(report, plots)
        console.note(f"{plots}: {len(paths)} plots")
    if html:
        from pagedgen.autotune.explore.page import page

        with _written():
            publish(html, page(report).encode())
        console.note(f"{html}: {html.stat().st_size / 1e6:.1f} MB, opens in any browser")


def show(report: Report) -> None:
    """The report as tables."""
    out = console.out()
    for name, value in table.facts(report):
        out.print(f"[dim]{name}[/] {value}", soft_wrap=True)
    for trace in report.traces:
        title = (
            f"{trace.trace}: {trace.requests:,} requests, prompt {trace.mean_prompt:,.0f} and output "
            f"{trace.mean_output:,.0f} tokens on average; {trace.load}"
        )
        console.table(title, [name for name, _, _ in table.COLUMNS], table.rows(trace))
        for line in table.remarks(trace):
            out.print(line, markup=False, soft_wrap=True)
    if report.predicted:
        console.warn("kernel times are predicted, not measured: see 'decode kernels'")


def _load(
    concurrency: int | None, rate_factor: float | None, request_rate: float | None, max_num_seqs: int
) -> Load:
    given = {
        "concurrency": concurrency and Load(Arrivals.CLOSED, concurrency),
        "rate_factor": rate_factor and Load(Arrivals.TRACE, rate_factor),
        "request_rate": request_rate and Load(Arrivals.POISSON, request_rate),
    }
    values = {"concurrency": concurrency, "rate_factor": rate_factor, "request_rate": request_rate}
    named = [name for name, value in values.items() if value is not None]
    if len(named) > 1:
        raise InvalidValue(named[1], values[named[1]], f"not together with {named[0]}")
    if not named:
        return Load(Arrivals.CLOSED, max_num_seqs)
    if not given[named[0]]:
        raise InvalidValue(named[0], values[named[0]], "above 0 is allowed")
    return given[named[0]]  # type: ignore[return-value]


def _cut(trace: Trace, requests: int | None) -> Trace:
    return trace if requests is None else replace(trace, requests=trace.requests[:requests])


def _distinct(traces: Sequence[Trace]) -> list[Trace]:
    """The traces, numbered where they share a name: plots and rows are told apart by it."""
    named: list[Trace] = []
    for trace in traces:
        name, number = trace.name, 1
        while any(other.name == name for other in named):
            number += 1
            name = f"{trace.name}-{number}"
        named.append(replace(trace, name=name))
    return named


def _check_outputs(html: Path | None, plots: Path | None) -> None:
    """Before anything runs: a run of minutes should not end in an error that was there at its start."""
    if find_spec("matplotlib") is None:
        raise ToolMissing("matplotlib", "plot")
    if html is not None and html.is_dir():
        raise OutputUnwritable(f"{html}: a file is expected, this is a folder")
    if plots is not None and plots.exists() and not plots.is_dir():
        raise OutputUnwritable(f"{plots}: a folder is expected, this is a file")
    for folder in (html.absolute().parent if html else None, plots):
        if folder is not None and folder.exists() and not os.access(folder, os.W_OK):
            raise OutputUnwritable(f"{folder}: no permission to write")


@contextmanager
def _written() -> Any:
    try:
        yield
    except CacheUnwritable as error:
        raise OutputUnwritable(str(error)) from error


def _command() -> str:
    """How this report was asked for; where its output went does not matter."""
    words, skip = ["pagedgen"], False
    for word in sys.argv[1:]:
        if skip:
            skip = False
        elif word in ("--html", "--plots", "--jobs"):
            skip = True
        elif word != "--json" and not word.startswith(("--html=", "--plots=", "--jobs=")):
            file, mark, family = word.partition("#")
            words.append((Path(file).name if "/" in file else file) + mark + family)
    return shlex.join(words)
