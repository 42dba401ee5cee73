"""Random legal specs on a GPU: ``python tests/fuzz/on_gpu.py --specs 400 --inputs 5 --seed 7 --json FILE``.

Kernels are compiled and linked in processes of their own while others run. Every third batch is captured in
a CUDA graph and replayed, of attention three calls in a row. The report holds every draw; one is made again
by seed and number (``--only``). A kernel that breaks the CUDA context ends the run: the report says which.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from fuzz.draw import ATTENTION, LARGE, ops_for, schedule_of, spec_of
from fuzz.trial import Outcome, attempt, workspace_bytes

from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.link import link
from pagedgen.compiler.render import render
from pagedgen.errors import CompileError
from pagedgen.runtime.library import Library
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec, Op
from pagedgen.values.target import Target
from pagedgen.values.target_table import gpu_target

SCHEDULES = 8  # tried in place of one that needs more shared memory than there is


def made(
    seed: int, number: int, to: Target, folder: Path, having: str, without: str
) -> tuple[KernelSpec, Schedule, Path, int]:
    """Draw, compile and link: spec, schedule, library, and how many schedules did not compile."""
    draw = Random(f"{seed} {number}")
    ops = [*ops_for(to), *ATTENTION]  # attention twice as often
    if having:
        ops = [op for op in ATTENTION if _reaches(op, having, to)]
    spec = spec_of(draw, ops[number % len(ops)], to, LARGE)
    while (having and not getattr(spec, having)) or (without and getattr(spec, without)):
        spec = spec_of(draw, spec.op, to, LARGE)
    for refused in range(SCHEDULES):
        schedule = schedule_of(draw, spec, to)
        try:
            binary = compile_source(render(spec, to, schedule))
        except CompileError as error:
            problem = error
            continue
        return spec, schedule, link([binary], (), folder / f"{number}.so"), refused
    raise problem


def _reaches(op: Op, field: str, to: Target) -> bool:
    """Whether some draw of an operator's specs has a feature."""
    return any(getattr(spec_of(Random(i), op, to, LARGE), field) for i in range(60))


def captured(call: Callable[[], None], times: int = 1) -> Callable[[], None]:
    """The same call, captured in a CUDA graph so many times, one behind the other, and replayed."""

    def replay() -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                call()
        graph.replay()
        torch.cuda.synchronize()

    return replay


def tried(seed: int, number: int, spec: KernelSpec, path: Path, inputs: int) -> list[Outcome]:
    """The outcomes of a library on ``inputs`` batches, on one workspace."""
    draw = Random(f"{seed} {number} inputs")
    library = Library(path)
    library.prepare(0, 0)
    workspace, wrapped = None, captured
    if spec.op in ATTENTION:  # the next call may begin while one drains (`pdl`): both write the same
        wrapped = partial(captured, times=3)
        workspace = torch.zeros(workspace_bytes(library, LARGE), dtype=torch.uint8, device="cuda")
    outcomes = []
    while sum(outcome.inputs for outcome in outcomes) < inputs:
        wrap = wrapped if draw.random() < 1 / 3 else None
        outcomes.append(attempt(spec, library, 0, draw, LARGE, "cuda", workspace, wrap))
        if outcomes[-1].broke:
            break
    return outcomes


def is_lost() -> bool:
    """Whether the CUDA context has gone: every call fails from then on."""
    try:
        torch.ones(1, device="cuda").sum().item()
    except RuntimeError:
        return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--specs", type=int, default=400)
    parser.add_argument("--inputs", type=int, default=5, help="batches a spec")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--having", default="", help="only specs with this feature: a field of KernelSpec")
    parser.add_argument("--without", default="", help="no specs with this feature")
    parser.add_argument("--first", type=int, default=0, help="begin with this draw")
    parser.add_argument("--only", type=int, help="one draw, by its number")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no more specs after so long")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    to, start = gpu_target(), time.monotonic()
    numbers = [options.only] if options.only is not None else list(range(options.first, options.specs))
    draws: list[dict[str, Any]] = []
    refused, not_compiled, broken = 0, [], ""
    with (
        tempfile.TemporaryDirectory() as name,
        ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool,
    ):
        todo: dict[Future[Any], int] = {
            pool.submit(made, options.seed, number, to, Path(name), options.having, options.without): number
            for number in numbers
        }
        while todo and not broken and time.monotonic() - start < options.seconds:
            for future in wait(todo, timeout=5, return_when=FIRST_COMPLETED).done:
                number = todo.pop(future)
                try:
                    spec, schedule, path, count = future.result()
                except CompileError as error:
                    not_compiled.append(f"{number}: {error}")
                    continue
                refused += count
                try:
                    outcomes = tried(options.seed, number, spec, path, options.inputs)
                except Exception as error:  # whatever it was, it is that draw's
                    outcomes = [Outcome("", f"{type(error).__name__}: {error}".splitlines()[0], broke=True)]
                if outcomes[-1].broke and is_lost():
                    broken = f"the CUDA context is lost after {spec.name} ({number}, {outcomes[-1].what})"
                path.unlink()
                about = {"number": number, "op": spec.op.value, "spec": spec.name, "schedule": schedule.name}
                draws += [about | asdict(outcome) for outcome in outcomes]
                if broken:
                    break
        pool.shutdown(wait=False, cancel_futures=True)
    wrong = [draw for draw in draws if draw["reason"]]
    counts = Counter(dict.fromkeys(ops_for(to), 0))
    for draw in draws:
        counts[draw["op"]] += draw["inputs"]
    summary = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "seed": options.seed,
        "first": options.first,
        "having": options.having, "without": options.without,
        "seconds": round(time.monotonic() - start, 1), "specs": len({draw["number"] for draw in draws}),
        "distinct_specs": len({draw["spec"] for draw in draws}),
        "batches": sum(counts.values()), "batches_by_op": dict(counts), "wrong": len(wrong),
        "most_of_allowed": max((d["error"] / d["allowed"] for d in draws if d["allowed"]), default=0.0),
        "most_of_torch": max((d["error"] / d["torch_error"] for d in draws if d["torch_error"]), default=0.0),
        "schedules_refused": refused, "not_compiled": not_compiled, "broken": broken,
    }  # fmt: skip
    print(json.dumps(summary, indent=1))
    for draw in wrong[:20]:
        print(json.dumps(draw))
    if options.json is not None:
        lines = ",\n".join(json.dumps(draw) for draw in draws)  # a draw a line
        head = json.dumps(summary, indent=1).removesuffix("\n}")
        options.json.write_text(f'{head},\n "draws": [\n{lines}\n]}}\n', encoding="utf-8")
    return 1 if wrong or broken or not_compiled else 0


if __name__ == "__main__":
    sys.exit(main())
