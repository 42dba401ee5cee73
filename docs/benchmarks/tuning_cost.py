"""What tuning costs and what it finds: ``quick``, and ``max`` to its end by workers that share a study.

    python docs/benchmarks/tuning_cost.py OUT [--specs fp8 f16] [--gpus 0 1] [--limit SECONDS]

Nothing is on record when either begins, of any spec. Each process has 16 cores of its own. Specs are tuned by
``quick``, one on each GPU, with each of ``--seeds``; then each spec by ``max``, by a worker on every GPU,
whose study is an Optuna journal (SQLite with ``--sqlite``); one of them is killed with SIGKILL in the middle
of the first spec, another one started, and one comes late to the finished study. Then what each ``quick``,
``max`` and the shipped records picked for each batch is timed in interleaved rounds, all together.
``--resume JOURNAL`` goes on with a study that was cut off elsewhere; with ``--quick-only`` what OUT holds of
an earlier ``max`` is what ``quick`` is held against. ``report.json`` is written anew after every step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from datetime import date
from pathlib import Path
from typing import Any

CORES = 16  # of each process
ROUNDS = 51
KILLED_AT = 0.4  # of max's trials told: then one worker is killed
KEPT_AT = 0.6  # then a copy of the journal is kept, as it is at that moment
SHIPPED, QUICK, MAX = "shipped", "quick", "max"


def spec_of(name: str) -> Any:
    """Llama-3-8B's decode over blocks of 16: ``f16``, or ``fp8`` (e4m3) K and V; ``cpu`` is a small one."""
    from pagedgen.values.spec import DType, KernelSpec, KInner, KVScale, Op

    if name == "cpu":
        return KernelSpec(Op.DECODE, 64, 8, 2, 16, DType.BF16, DType.BF16, k_inner=KInner.TOKEN)
    kv, scale = {"f16": (DType.F16, KVScale.NONE), "fp8": (DType.FP8_E4M3, KVScale.TENSOR)}[name]
    return KernelSpec(Op.DECODE, 128, 32, 8, 16, DType.F16, kv, scale)


def surroundings(name: str) -> tuple[Any, Any, Any]:
    """Spec, target and batches."""
    from pagedgen.cli.batches import workloads_of
    from pagedgen.values.target_table import cpu_target, gpu_target

    spec = spec_of(name)
    where = cpu_target() if name == "cpu" else gpu_target()
    return spec, where, workloads_of(spec, where.kind, None, 0)


# ---- one tuning process ----


def work(
    out: Path, label: str, name: str, effort: str, seed: int, budget: float, storage: str, trials: int
) -> None:
    """Tune, with every step's moment in ``LABEL.steps`` and the outcome in ``LABEL.json``."""
    from dataclasses import replace

    from pagedgen.autotune import events
    from pagedgen.autotune.database import Database
    from pagedgen.autotune.paths import user_cache
    from pagedgen.autotune.tune import PLANS, Effort, tune
    from pagedgen.values import codec

    if trials:
        PLANS[Effort(effort)] = replace(PLANS[Effort(effort)], trials=trials)  # type: ignore[index]
    spec, where, workloads = surroundings(name)
    steps = (out / f"{label}.steps").open("a", encoding="utf-8", buffering=1)

    spent: defaultdict[str, float] = defaultdict(
        float
    )  # seconds until a step was done, since the event before it
    before = time.time()

    def progress(event: Any) -> None:
        nonlocal before
        before, since = time.time(), before
        row: dict[str, Any] = {"t": round(time.time(), 3), "event": type(event).__name__}
        if isinstance(event, events.Step):
            row |= {"phase": event.phase, "done": event.done, "of": event.total}
            first = {"compile": "choose and begin", "gate": "link and begin"}.get(event.phase)
            spent[first if first and event.done == 1 else event.phase] += before - since
        elif isinstance(event, events.Tried):
            row |= {"tried": event.done, "best_us": event.best_us, "batch": len(event.outcomes)}
        print(json.dumps(row), file=steps)

    result = tune(
        spec,
        where,
        workloads,
        effort=effort,
        budget_s=budget or None,
        seed=seed,
        database=Database(user_cache() / "records", out / "nothing"),
        progress=progress,
        storage=storage or None,
    )
    picked = {w.name: result.chosen(w) for w in workloads}
    data = {
        "spec": spec.name,
        "effort": effort,
        "s": round(result.seconds, 1),
        "stop": result.stop.value,
        "space": result.counts.space,
        "known": result.counts.known,
        "compiled": result.counts.compiled,
        "cached": result.counts.cached,
        "passed": result.counts.passed,
        "timed": result.counts.timed,
        "tried": len(result.outcomes),
        "rejected": dict(Counter(r.stage for r in result.counts.rejected)),
        "device": f"{result.records[0].stamp.device}, {result.records[0].stamp.driver}",
        "compiler": result.records[0].stamp.compiler,
        "read_gbs": result.roofline_gbs,
        "us": {n: r.time_us for n, r in picked.items()},
        "finalists": len({r.schedule for r in result.records}),
        "phases_s": {phase: round(s, 1) for phase, s in spent.items()},
        "selection": codec.encode(result.selection),
    }
    (out / f"{label}.json").write_text(json.dumps(data, indent=1), encoding="utf-8")


# ---- picks beside each other ----


def compare(out: Path, name: str) -> None:
    """The picks of quick, max and the shipped records, timed together: ``race-NAME.json``."""
    from pagedgen.autotune.binaries import compile_all
    from pagedgen.autotune.database import kernel_now, read
    from pagedgen.autotune.gating import verdict_on
    from pagedgen.autotune.measure import Verified, device_name, measure
    from pagedgen.autotune.roofline import bandwidth
    from pagedgen.autotune.select import Selection
    from pagedgen.autotune.tune import Workshop
    from pagedgen.cache import SHIPPED as FOLDER
    from pagedgen.compiler.link import link
    from pagedgen.compiler.render import render
    from pagedgen.values import codec

    spec, where, workloads = surroundings(name)
    chosen: dict[str, Any] = {}
    found = {path.stem: path for path in sorted(out.glob(f"quick-{name}-*.json"))}
    found |= {MAX: next(iter(sorted(out.glob(f"max-{name}-*.json"))))}
    for label, path in found.items():
        chosen[label] = codec.decode(Selection, json.loads(path.read_text(encoding="utf-8"))["selection"])
    shipped = FOLDER / where.name / f"{spec.name}.json"
    entry = read(shipped) if shipped.exists() else None
    selection = entry.selection if entry is not None else None
    if selection is not None and all(kernel_now(spec, where.name, s) for s in selection.variants):
        chosen[SHIPPED] = selection
    schedules = list(dict.fromkeys(s for selection in chosen.values() for s in selection.variants))
    device = device_name(where.kind)
    races: list[dict[str, Any]] = []
    with Workshop(where) as shop:
        sources = [render(spec, where, s) for s in schedules]
        binaries = [c.binary for c in compile_all(sources, shop.pool, shop.cache) if c.binary is not None]
        library = shop.folder / "picks.so"
        assert len(binaries) == len(schedules), "what was timed compiles"
        link(binaries, (), library)
        verdicts = [verdict_on(shop.worker, library, spec, i, device, 7) for i in range(len(schedules))]
        verified = [Verified(i, s, v) for i, (s, v) in enumerate(zip(schedules, verdicts, strict=True))]
        for seed in (0, 1):
            rate = shop.worker.call(bandwidth, spec, device, timeout_s=300)
            rows = {}
            for workload in workloads:
                sampled = shop.worker.call(
                    measure, library, spec, workload, tuple(verified), ROUNDS, device, seed, timeout_s=300
                )
                times = {schedules[i]: samples for i, samples in sampled.times.items()}
                rows[workload.name] = {
                    effort: statistics.median(times[selection.pick_for(workload)])
                    for effort, selection in chosen.items()
                }
                base = times[chosen[MAX].pick_for(workload)]
                for effort, selection in chosen.items():  # of each round: free of drift
                    own = times[selection.pick_for(workload)]
                    ratio = statistics.median(a / b for a, b in zip(own, base, strict=True))
                    rows[workload.name][f"{effort}_over_max"] = ratio
            means = {
                effort: math.exp(statistics.mean(math.log(r[f"{effort}_over_max"]) for r in rows.values()))
                for effort in chosen
            }
            races.append({"read_gbs": rate.read_gbs, "over_max": means, "us": rows})
    data = {
        "spec": spec.name,
        "rounds": ROUNDS,
        "kernels": {e: [s.name for s in c.variants] for e, c in chosen.items()},
        "races": races,
    }
    (out / f"race-{name}.json").write_text(json.dumps(data, indent=1), encoding="utf-8")


# ---- what a study says of its workers ----


def audit(storage: str) -> dict[str, Any]:
    """Who tried what, and whether anything was done twice."""
    import optuna

    from pagedgen.autotune.ledger import open_storage

    store = open_storage(storage)
    name = min(study.study_name for study in optuna.get_all_study_summaries(store))
    trials = optuna.load_study(study_name=name, storage=store).get_trials(deepcopy=False)
    states = Counter(t.state.name for t in trials)
    done = [t for t in trials if t.state.name == "COMPLETE"]
    schedules = Counter(tuple(sorted(t.params.items())) for t in done)
    return {
        "study": name,
        "trials": dict(states),
        "taken from dead workers": sum("lost" in t.user_attrs for t in trials),
        "told twice": sum(n - 1 for n in schedules.values()),
        "works": sum("reason" not in t.user_attrs for t in done),
        "by worker": dict(Counter(t.user_attrs["worker"].split("/", 1)[1] for t in done)),
    }


# ---- all of it ----


class Run:
    """Processes on GPUs, and the report."""

    def __init__(self, out: Path, options: argparse.Namespace) -> None:
        self.out, self.options, self.begin = out, options, time.time()
        self.report: dict[str, Any] = {"date": str(date.today()), "steps": []}

    def left(self) -> float:
        """Seconds."""
        return self.begin + float(self.options.limit) - time.time()

    def start(self, place: int, cache: str, *arguments: str) -> subprocess.Popen[bytes]:
        """A process on the GPU of that place, with cores of its own and a cache of binaries and records."""
        gpus = self.options.gpus
        cores = sorted(os.sched_getaffinity(0))
        mine = cores[place * CORES : (place + 1) * CORES] or cores
        variables = {
            "CUDA_VISIBLE_DEVICES": gpus[place],
            "PAGEDGEN_CACHE_DIR": f"{self.options.scratch}/{cache}",
        }
        command = [sys.executable, str(Path(__file__).resolve()), "--do", str(self.out), *arguments]
        return subprocess.Popen(
            command,
            env={**os.environ, **variables},
            preexec_fn=lambda: os.sched_setaffinity(0, mine),
            start_new_session=True,
        )

    def say(self, **row: Any) -> None:
        """Into the report, with the moment."""
        row = {"at": round(time.time() - self.begin, 1), **row}
        print(json.dumps(row), flush=True)
        self.report["steps"].append(row)
        text = json.dumps(self.report, indent=1)
        (self.out / "report.tmp").write_text(text, encoding="utf-8")
        (self.out / "report.tmp").replace(self.out / "report.json")

    def wait(self, processes: list[subprocess.Popen[bytes]]) -> list[int]:
        """Their exit codes; the time limit kills them."""
        codes = []
        for process in processes:
            try:
                codes.append(process.wait(max(1.0, self.left())))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                codes.append(process.wait())
        return codes

    def read(self, name: str) -> dict[str, Any]:
        """What a process left, {} where it left nothing."""
        path = self.out / name
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return found

    def quick(self, specs: list[str], seed: int) -> None:
        """A spec a GPU, at once."""
        started = {}
        for i, name in enumerate(specs):
            label = f"quick-{name}-{seed}"
            arguments = (label, name, "quick", str(seed), "0", "", str(self.options.trials))
            started[label] = self.start(i, label, *arguments)
        for label, process in started.items():
            codes = self.wait([process])
            self.say(what=label, effort=QUICK, exit=codes, **self.brief(f"{label}.json"))

    def brief(self, name: str) -> dict[str, Any]:
        """A worker's outcome without its table."""
        return {k: v for k, v in self.read(name).items() if k not in ("selection", "us", "spec", "effort")}

    def storage(self, name: str) -> tuple[str, Path]:
        path = Path(self.options.scratch) / f"study-{name}"
        return (f"sqlite:///{path}" if self.options.sqlite else str(path)), path

    def told(self, labels: list[str]) -> int:
        """Trials told by the workers so far."""
        most = 0
        for label in labels:
            path = self.out / f"{label}.steps"
            rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            most = max([most, *(json.loads(r)["tried"] for r in rows if '"tried"' in r)])
        return most

    def max(self, name: str) -> None:
        """A worker a GPU, one study; one of them is killed in the middle and started again."""
        storage, path = self.storage(name)
        if self.options.resume:
            shutil.copy(self.options.resume, path)
        begin, budget = time.time(), f"{max(30.0, self.left() - 40):.0f}"
        trials = str(self.options.trials * 4)

        def worker(place: int, turn: str = "") -> tuple[str, subprocess.Popen[bytes]]:
            label = f"max-{name}-{place}{turn}"
            effort = self.options.effort
            return label, self.start(place, f"max-{name}", label, name, effort, "0", budget, storage, trials)

        workers = dict(worker(place) for place in range(len(self.options.gpus)))
        total = self.options.trials * 4 or {"standard": 240, "max": 480}[self.options.effort]
        kept = bool(self.options.resume)
        killed = kept or name != self.options.specs[0]
        while any(p.poll() is None for p in workers.values()) and self.left() > 1:
            time.sleep(0.5)
            told = self.told(list(workers))
            if not kept and path.exists() and told >= KEPT_AT * total and not self.options.sqlite:
                shutil.copy(path, self.out / f"cut-{name}.log")
                kept = True
            if not killed and told >= KILLED_AT * total:
                label, process = list(workers.items())[-1]
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                self.say(spec=name, killed=label, after_s=round(time.time() - begin, 1), tried=told)
                again, process = worker(len(self.options.gpus) - 1, "-again")
                workers[again] = process
                killed = True
        codes = dict(zip(workers, self.wait(list(workers.values())), strict=True))
        if not self.options.sqlite:
            shutil.copy(path, self.out / f"study-{name}.log")
        choices = [self.read(f"{label}.json").get("selection") for label, code in codes.items() if code == 0]
        self.say(
            spec=name,
            effort=self.options.effort,
            s=round(time.time() - begin, 1),
            exit=codes,
            agree=len(choices) > 1 and all(choice == choices[0] for choice in choices),
            workers={label: self.brief(f"{label}.json") for label in codes},
            audit=audit(storage),
        )

    def race(self, specs: list[str]) -> None:
        """The picks beside each other, a spec a GPU."""
        for name, process in {n: self.start(i, f"race-{n}", n) for i, n in enumerate(specs)}.items():
            codes = self.wait([process])
            means = [r["over_max"] for r in self.read(f"race-{name}.json").get("races", [])]
            self.say(race=name, exit=codes, over_max=means)

    def late(self, name: str) -> None:
        """One who comes to the finished study."""
        storage, _ = self.storage(name)
        trials = str(self.options.trials * 4)
        arguments = (f"late-{name}", name, self.options.effort, "0", "60", storage, trials)
        codes = self.wait([self.start(len(self.options.gpus) - 1, f"late-{name}", *arguments)])
        first = self.read(f"max-{name}-0.json").get("selection")
        same = bool(first) and self.read(f"late-{name}.json").get("selection") == first
        self.say(late=name, exit=codes, agrees=same, **self.brief(f"late-{name}.json"))

    def all(self) -> None:
        """Every step, in order."""
        options = self.options
        width = len(options.gpus)
        groups = [options.specs[i : i + width] for i in range(0, len(options.specs), width)]
        if not options.resume and not options.max_only:
            for seed, group in itertools.product(options.seeds, groups):
                self.quick(group, seed)
        for name in [] if options.quick_only else options.specs:
            if self.left() < 60:
                self.say(spec=name, effort=options.effort, skipped=f"{self.left():.0f} s are left")
                continue
            self.max(name)
            self.late(name)
        for group in groups if list(self.out.glob("quick-*.json")) else []:
            self.race(group)


def main() -> None:
    """Of the command line; ``--do`` is how it calls itself."""
    if sys.argv[1:2] == ["--do"]:
        out, rest = Path(sys.argv[2]), sys.argv[3:]
        if len(rest) == 1:
            compare(out, rest[0])
        else:
            label, name, effort, seed, budget, storage, trials = rest
            work(out, label, name, effort, int(seed), float(budget), storage, int(trials))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--specs", nargs="+", default=["fp8", "f16"], choices=["fp8", "f16", "cpu"])
    parser.add_argument("--gpus", nargs="+", default=["0", "1"])
    parser.add_argument("--limit", type=float, default=3600.0)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--effort", default=MAX, choices=["standard", MAX], help="in max's place")
    parser.add_argument("--quick-only", action="store_true")
    parser.add_argument("--max-only", action="store_true")
    parser.add_argument("--sqlite", action="store_true")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--trials", type=int, default=0, help="of quick, and four times as many of max")
    parser.add_argument("--scratch", default="/tmp/tuning-cost")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    Path(options.scratch).mkdir(parents=True, exist_ok=True)
    Run(options.out.resolve(), options).all()


if __name__ == "__main__":
    main()
