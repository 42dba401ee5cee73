"""``pagedgen tune``: the driver with progress and a result table; with ``--out``, a pack that is tried."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.progress import Progress, TaskID

from pagedgen.autotune.database import Entry
from pagedgen.autotune.device import device_of
from pagedgen.autotune.events import Event, Started, Step, Tried, Warned
from pagedgen.autotune.ledger import open_storage
from pagedgen.autotune.plots import check_folder, draw
from pagedgen.autotune.tune import TUNED, Effort, TuneResult, Workshop, tune
from pagedgen.cli import build, console
from pagedgen.cli.batches import workloads_of
from pagedgen.cli.options import Job, seconds
from pagedgen.cli.trial import Called, try_pack
from pagedgen.compiler.build import check_place
from pagedgen.compiler.families import family_for
from pagedgen.errors import InvalidValue
from pagedgen.values import codec
from pagedgen.values.record import Status
from pagedgen.values.spec import KernelSpec, Op
from pagedgen.values.workload import Workload


def run(
    job: Job,
    *,
    trace: Path | None,
    effort: str,
    budget: str | None,
    seed: int,
    storage: str | None,
    study: str | None,
    out: Path | None,
    plots: Path | None,
    as_json: bool,
) -> None:
    """Tune every spec of the job in turn; what cannot work is refused before the first starts."""
    begin = time.monotonic()
    job.warn()
    if effort not in list(Effort):
        raise InvalidValue("effort", effort, f"allowed: {', '.join(Effort)}")
    budget_s = seconds(budget) if budget else None
    if study is not None and (storage is None or len(job.specs) > 1):
        raise InvalidValue("study", study, "names the study of one spec in a --storage")
    if out is not None:
        check_place(out)
    if plots is not None:
        check_folder(plots)
    for spec in job.specs:
        if spec.op not in TUNED:
            raise InvalidValue(
                "ops", spec.op.value, f"a comma list of {', '.join(TUNED)}: others have no batches"
            )
        family_for(spec, job.target)
    present = device_of(job.target).present
    device = device_of(job.target).name if present else "not on this machine: times are predictions"
    console.note(f"{job.label} on {job.target.name} ({job.target.arch}; {device})")
    if storage is not None and present:
        open_storage(storage)  # that it answers is known before anything is compiled
    results: list[TuneResult] = []
    workloads: dict[KernelSpec, tuple[Workload, ...]] = {}
    with Workshop(job.target) as workshop:
        for i, spec in enumerate(job.specs):
            workloads[spec] = workloads_of(spec, job.target.kind, trace, seed)
            left = None
            if budget_s is not None:  # what is left, shared evenly among the specs that are left
                left = max(1.0, (begin + budget_s - time.monotonic()) / (len(job.specs) - i))
            with console.progress() as bars:
                watch = Watch(bars)
                results.append(
                    tune(
                        spec,
                        job.target,
                        workloads[spec],
                        effort=effort,
                        budget_s=left,
                        seed=seed,
                        progress=watch,
                        workshop=workshop,
                        storage=storage,
                        study=study,
                    )
                )
            if plots is not None:
                for path in draw(results[-1], plots):
                    console.note(f"{path}")
            if not as_json:
                show(results[-1], workloads[spec])
    tried: list[Called] = []
    if out is not None:
        entries = [Entry(r.spec, r.target.name, r.records, r.selection) for r in results]
        parts = [build.Part.of(entry) for entry in entries]
        build.write(job.target, parts, out, gate=False)  # they passed just now, or cannot run here
        if not as_json:
            build.report(out, parts, as_json=False)
        if present:
            load_ms, tried = try_pack(out, workloads)
            if not as_json:
                _show_trial(load_ms, tried)
    if as_json:
        data = [summary(result, workloads[result.spec]) for result in results]
        pack = build.summary(out, parts) if out is not None else None
        console.emit({"results": data, "pack": pack, "called": [codec.encode(row) for row in tried]})


class Watch:
    """Events of the driver → one bar on a terminal, one line a batch elsewhere."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.task: TaskID | None = None
        self.name = ""
        self.trials = 0
        self.best = ""
        self.bound = ""

    def __call__(self, event: Event) -> None:
        """Take an event."""
        if isinstance(event, Started):
            self.name, self.trials = event.spec.name, event.trials
            self.bound = "the read bandwidth" if event.spec.op is Op.DECODE else "the roofline"
            how = "measured" if event.measured else "predicted"
            known = f", {event.known} of them on record" if event.known else ""
            console.note(f"{self.name}: {event.trials} of {event.space} schedules to try{known}, {how}")
            self.task = self.bars.add_task(self.name, total=event.trials, completed=event.known)
        elif isinstance(event, Warned):
            console.warn(event.text)
        elif self.task is not None and isinstance(event, Step):
            self.bars.update(self.task, description=f"{event.phase} {event.done}/{event.total}{self.best}")
        elif self.task is not None and isinstance(event, Tried):
            share = f", {event.share:.0%} of {self.bound}" if event.share else ""
            self.best = f", best {event.best_us:,.1f} µs{share}" if event.best_us else ""
            self.bars.update(self.task, completed=event.done)
            if self.bars.disable:
                console.note(f"  {event.done}/{self.trials} tried{self.best}")


def show(result: TuneResult, workloads: Sequence[Workload]) -> None:
    """The result table of one spec."""
    measured, decode = result.status is Status.MEASURED, result.spec.op is Op.DECODE
    columns = ["batch", ">KV tokens", ">µs" if measured else ">µs predicted"]
    columns += [">p10-p90"] if measured else []
    columns += [">GB/s"] if decode else [">TFLOP/s", ">GB/s"]
    columns += [">of read rate" if decode else ">of roofline"] if measured else []
    rows = []
    for workload in workloads:
        record = result.chosen(workload)
        row = [workload.name, f"{workload.num_tokens:,}", f"{record.time_us:,.1f}"]
        row += [f"{record.timing.low_us:,.1f}-{record.timing.high_us:,.1f}"] if record.timing else []
        row += [] if decode else [f"{record.tflops:,.3g}"]
        row += [f"{record.gbs:,.1f}"]
        row += [f"{record.roofline_share:.0%}"] if record.timing else []
        rows.append([*row, str(result.selection.variants.index(record.schedule))])
    columns.append(">kernel")
    how = f"measured; read rate {result.roofline_gbs:,.1f} GB/s" if measured else "predicted, not measured"
    if result.roofline_tflops:
        how += f", matrix product {result.roofline_tflops:,.3g} TFLOP/s"
    if result.selection.expected_regret is not None:
        how += (
            f"; such picks are {result.selection.expected_regret:.1%} off a device's own best in the median"
        )
    console.table(f"{result.spec.name} on {result.target.name} ({how})", columns, rows)
    for i, schedule in enumerate(result.selection.variants):
        console.out().print(f"  kernel {i}: {schedule.name}", soft_wrap=True)
    counts = result.counts
    spent = result.spent
    console.note(
        f"{counts.compiled} compiled, {counts.cached} from cache, {counts.passed} passed the gate, "
        f"{counts.timed} timed, {len(counts.rejected)} rejected of {counts.space}; {result.stop}; "
        f"{result.seconds:.0f} s (compiling {spent.compile_s:.0f}, proving {spent.gate_s:.0f}, timing "
        f"{spent.time_s:.0f}); {result.path or 'records were not kept'}"
    )


def _show_trial(load_ms: float, rows: Sequence[Called]) -> None:
    console.table(
        f"The pack, loaded in {load_ms:.1f} ms, at work (the same inputs each call)",
        ("spec", "batch", ">µs a call", ">GB/s", ">largest error", ">allowed there"),
        (
            (r.spec, r.batch, f"{r.call_us:,.1f}", f"{r.gbs:,.1f}", f"{r.error:.2g}", f"{r.allowed:.2g}")
            for r in rows
        ),
    )


def summary(result: TuneResult, workloads: Sequence[Workload]) -> dict[str, object]:
    """JSON data of one spec's result."""
    rows = []
    for workload in workloads:
        record = result.chosen(workload)
        rows.append(
            {
                "workload": workload.name,
                "num_seqs": workload.num_seqs,
                "num_tokens": workload.num_tokens,
                "num_queries": workload.num_queries,
                "schedule": dict(record.schedule.choices),
                "time_us": record.time_us,
                "predicted_us": record.predicted_us,
                "timing": codec.encode(record.timing),
                "gbs": record.gbs,
                "tflops": record.tflops,
                "roofline_share": record.roofline_share if record.timing else None,
            }
        )
    return {
        "spec": codec.encode(result.spec),
        "name": result.spec.name,
        "target": result.target.name,
        "status": result.status.value,
        "roofline_gbs": result.roofline_gbs or None,
        "roofline_tflops": result.roofline_tflops or None,
        "workloads": rows,
        "selection": codec.encode(result.selection),
        "counts": {
            "space": result.counts.space,
            "known": result.counts.known,
            "compiled": result.counts.compiled,
            "cached": result.counts.cached,
            "passed": result.counts.passed,
            "timed": result.counts.timed,
            "rejected": len(result.counts.rejected),
        },
        "stop": result.stop.value,
        "seconds": round(result.seconds, 1),
        "spent": {name: round(value, 1) for name, value in asdict(result.spent).items()},
        "records": str(result.path) if result.path else None,
    }
