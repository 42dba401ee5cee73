"""The ``invariant-gpu`` suite: batch-invariant decode on this GPU beside what is free to follow the batch.

A batch-invariant kernel splits every sequence by its own length, leaves more partial results, and is one
for all batches, where the free ones are picked for each; how many parts in a row a program takes, its waves,
may follow the batch. Of the candidates, :data:`TILES` with :data:`PARTS`, each with :data:`WAVES`, the kernel
with the best mean over the batches is named, with the waves that each batch gets. Every kernel passes the
gate first, which for these compares bits of sequences alone and in random batches.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pagedgen.autotune.binaries import BinaryCache, compile_all
from pagedgen.autotune.device import device_of
from pagedgen.autotune.roofline import gpu_read_gbs
from pagedgen.autotune.select import select
from pagedgen.autotune.suites.contest import Pick, contest, ours, prove_all
from pagedgen.autotune.suites.decode_gpu import BF16, Job, compile_picks, prove_picks, rows
from pagedgen.autotune.suites.output import Output
from pagedgen.autotune.suites.report import Case, Draft, Report, Row
from pagedgen.autotune.tune import MEASURE_S, Workshop
from pagedgen.compiler.render import render
from pagedgen.compiler.space import default_schedule, is_legal
from pagedgen.errors import DeviceMissing, PagedgenError
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target import Target
from pagedgen.values.target_table import gpu_target
from pagedgen.values.workload import Workload

ROUNDS = 12
FREE = "free"
BY = "; waves "
TILES = ((32, 1, 4), (32, 2, 4), (64, 2, 3), (64, 2, 4))  # tile, warps, stages
PARTS = ((512, 32),)  # tokens of a part, parts of a sequence at most
WAVES = (1, 2, 3, 4, 6)


def jobs() -> tuple[Job, ...]:
    """``decode-gpu``'s batches of 32/8 heads in float16 and FP8; the specs are those of free kernels."""
    return tuple(
        replace(job, rounds=ROUNDS, with_peers=False)
        for job in rows()
        if job.spec.q_dtype != BF16 and (job.spec.num_q_heads, job.spec.num_kv_heads) == (32, 8)
    )


def candidates(spec: KernelSpec, target: Target) -> tuple[tuple[str, Schedule], ...]:
    """Names and schedules of batch-invariant kernels of a free spec."""
    invariant = replace(spec, batch_invariant=True)
    base = dict(default_schedule(invariant, target).choices) | {"merge": 96}
    if target.capability >= 90:
        base["pdl"] = 1
    found = []
    for (tile, warps, stages), (part, parts), waves in itertools.product(TILES, PARTS, WAVES):
        own = {"tile": tile, "num_warps": warps, "num_stages": stages, "part": part, "max_parts": parts}
        schedule = Schedule.of("triton-decode", **{**base, **own, "waves": waves})
        if is_legal(invariant, target, schedule):
            kernel = f"tile {tile}, {warps} warps, {stages} stages, parts of {part}, {parts} at most"
            found.append((f"{kernel}{BY}{waves}", schedule))
    return tuple(found)


def best_of(cases: Sequence[Case]) -> dict[KernelSpec, str]:
    """The kernel of each spec with the best mean over its cases, and the waves that each case gets."""
    times: dict[KernelSpec, dict[Schedule, dict[Workload, float]]] = {}
    for case in cases:
        for row in case.summaries():
            if row.contender != FREE and not row.failure:
                kernel, waves = row.contender.split(BY)
                schedule = Schedule.of("candidate", kernel=kernel, waves=int(waves))
                times.setdefault(case.spec, {}).setdefault(schedule, {})[case.workload] = row.median_us
    found = {}
    for spec, of_spec in times.items():
        selection = select(of_spec, worst_regret=0.0, kernel_of=lambda schedule: schedule.without(("waves",)))
        picks = {w: selection.pick(w.num_seqs, w.max_seq_len)["waves"] for w in next(iter(of_spec.values()))}
        waves = ", ".join(f"{workload.name}: {pick}" for workload, pick in picks.items())
        found[spec] = f"{selection.variants[0]['kernel']}{BY}{waves}"
    return found


def run(output: Output) -> Report:
    """All cases that are wanted, on the first GPU.

    Raises:
        DeviceMissing: there is none.
    """
    target = gpu_target()
    if not device_of(target).present:
        raise DeviceMissing("invariant-gpu: a CUDA GPU is needed")
    todo = output.chosen(jobs())
    draft = Draft("invariant-gpu", target, len(todo), output)
    specs = tuple(dict.fromkeys(job.spec for job in todo))
    with tempfile.TemporaryDirectory(prefix="pagedgen-bench-") as folder, Workshop(target) as shop:
        picks = compile_picks(todo, target, shop, output.note)
        fixed = [
            (replace(spec, batch_invariant=True), schedule)
            for spec in specs
            for _, schedule in candidates(spec, target)
        ]
        output.note(f"invariant-gpu: compiling {len(fixed)} kernels")
        sources = tuple(render(spec, target, schedule) for spec, schedule in fixed)
        list(compile_all(sources, shop.pool, BinaryCache()))
        prove_picks(picks, target, Path(folder), output.note)
        output.note(f"invariant-gpu: proving {len(fixed)} kernels")
        prove_all(fixed, target, "cuda", Path(folder))
        read_gbs: tuple[float, ...] = (shop.worker.call(gpu_read_gbs, timeout_s=MEASURE_S),)
        cases = []
        for number, job in enumerate(todo, 1):
            chosen = picks.get((job.spec, job.workload))
            cases.append(_case(job, target, Path(folder), shop, read_gbs, chosen))
            draft.add(cases[-1])
            times = [
                f"{row.contender} {row.failure or f'{row.median_us:,.1f} us'} ({row.speed_ratio:.2f})"
                for row in cases[-1].summaries()
            ]
            output.note(f"invariant-gpu {number}/{len(todo)}: {job.name}: {', '.join(times)}")
    return draft.finish([f"{spec.name}: best is {name}" for spec, name in best_of(cases).items()])


def _case(
    job: Job,
    target: Target,
    folder: Path,
    shop: Workshop,
    read_gbs: tuple[float, ...],
    chosen: Pick | None,
) -> Case:
    try:
        found = shop.worker.call(_contest, job, target, folder, chosen, timeout_s=2 * MEASURE_S)
    except PagedgenError as error:
        shop.worker.kill()  # whatever it was, the next case gets a clean CUDA context
        found = (Row(FREE, (), job.workload.kv_bytes(job.spec), "", f"{type(error).__name__}: {error}"),)
    return Case(job.name, job.spec, job.workload, found, read_gbs)


def _contest(job: Job, target: Target, folder: Path, chosen: Pick | None) -> tuple[Row, ...]:
    """One case, in the worker; the free kernel is first, so that ratios are times of its."""
    invariant = replace(job.spec, batch_invariant=True)
    makers = [(FREE, partial(ours, job.spec, target, job.workload, "cuda", folder, FREE, chosen))]
    makers += [
        (
            name,
            partial(ours, invariant, target, job.workload, "cuda", folder, name, Pick(schedule, "candidate")),
        )
        for name, schedule in candidates(job.spec, target)
    ]
    contenders, found = [], {}
    for name, make in makers:
        try:
            contenders.append(make())
        except PagedgenError as error:
            reason = f"{type(error).__name__}: {error}"
            found[name] = Row(name, (), job.workload.kv_bytes(job.spec), "", reason)
    found |= {row.contender: row for row in contest(contenders, job.rounds)[0]}
    return tuple(found[name] for name, _ in makers)
