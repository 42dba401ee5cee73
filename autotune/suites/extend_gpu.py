"""The ``extend-gpu`` suite: our extend kernels here, in TFLOP/s and as a share of a large matrix product.

The batches that published comparisons of prefill kernels use, in float16, bfloat16 and FP8, with several
tiles each: first what would be picked, then the default where that is another; then mixed batches, masks,
head dims and block sizes with the pick alone. Every kernel passes the gate first.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagedgen.autotune.binaries import BinaryCache, compile_all
from pagedgen.autotune.device import device_of
from pagedgen.autotune.roofline import gpu_matmul_tflops
from pagedgen.autotune.suites.contest import Pick, contest, ours, pick, prove_all
from pagedgen.autotune.suites.output import Output
from pagedgen.autotune.suites.report import Case, Draft, Report, Row
from pagedgen.autotune.tune import MEASURE_S, Workshop
from pagedgen.compiler.families import family_for
from pagedgen.compiler.render import render
from pagedgen.compiler.space import default_schedule, is_feasible
from pagedgen.errors import DeviceMissing, PagedgenError
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import DType, KernelSpec, KVScale, Op
from pagedgen.values.target import Target
from pagedgen.values.target_table import gpu_target
from pagedgen.values.workload import Workload

ROUNDS = 11
F16, BF16, E4M3 = DType.F16, DType.BF16, DType.FP8_E4M3
# (tile_m, tile, num_warps, num_stages, prefetch_ids): few instructions a pair, or two programs on an SM
TILES = (
    (128, 128, 8, 2, 0),
    (128, 128, 8, 2, 1),
    (128, 64, 4, 2, 1),
    (128, 64, 4, 3, 0),
    (128, 64, 8, 3, 1),
    (64, 128, 4, 2, 0),
    (64, 64, 4, 3, 1),
    (256, 64, 8, 2, 0),
)


@dataclass(frozen=True, slots=True)
class Job:
    """One case: a spec on a workload, with the pick alone or with every tile."""

    name: str
    spec: KernelSpec
    workload: Workload
    every_tile: bool


def spec_of(
    head_dim: int = 128,
    heads: tuple[int, int] = (32, 8),
    block_size: int = 16,
    q: DType = F16,
    kv: DType | None = None,
    scale: KVScale = KVScale.TENSOR,
    lse: bool = False,
    **masks: Any,
) -> KernelSpec:
    """An extend spec; ``kv`` is the queries' type unless given."""
    kv = kv or q
    scale = scale if kv.is_fp8 else KVScale.NONE
    return KernelSpec(Op.EXTEND, head_dim, *heads, block_size, q, kv, scale, return_lse=lse, **masks)


def jobs() -> tuple[Job, ...]:
    """The published batches in three formats, and what else changes a kernel's speed."""
    batches = (
        Workload.chunks(1, 8192, 8192),
        Workload.chunks(4, 4096, 4096),
        Workload.chunks(16, 1024, 1024),
        Workload.chunks(4, 512, 8192),
        Workload.chunks(64, 8, 4096),
    )
    found = []
    for q, kv in ((F16, F16), (BF16, BF16), (F16, E4M3)):
        for batch in batches:
            found.append(Job(f"{batch.name}, {kv.value}", spec_of(q=q, kv=kv), batch, every_tile=True))
    prompts = Workload.chunks(4, 4096, 4096)
    mixed = Workload.parse("2x1024of4096+62x1of2048", Op.EXTEND)
    ragged = Workload.parse("1x8192+31x256", Op.EXTEND)
    others = [
        (spec_of(), mixed),
        (spec_of(), ragged),
        (spec_of(window=1024), prompts),
        (spec_of(logits_soft_cap=50.0), prompts),
        (spec_of(window=1024, sinks=True), prompts),
        (spec_of(lse=True), prompts),
        (spec_of(64), prompts),
        (spec_of(256, (16, 8)), prompts),
        (spec_of(heads=(32, 32)), prompts),
        (spec_of(heads=(28, 4)), prompts),
        (spec_of(block_size=1), prompts),
        (spec_of(block_size=128), prompts),
    ]
    found += [Job(f"{spec.name}, {batch.name}", spec, batch, every_tile=False) for spec, batch in others]
    return tuple(found)


def candidates(spec: KernelSpec, target: Target) -> tuple[Schedule, ...]:
    """The default, then the legal ones of :data:`TILES`, each with the way of loading ids that suits it."""
    default = default_schedule(spec, target)
    base, found = dict(default.choices), [default]
    for tile_m, tile, warps, stages, prefetch in TILES:
        for ids in ("scalar", "page", "gather"):
            schedule = Schedule.of(
                family_for(spec, target).name,
                **{
                    **base, "tile_m": tile_m, "tile": tile, "num_warps": warps, "num_stages": stages,
                    "prefetch_ids": prefetch, "ids": ids,
                },
            )  # fmt: skip
            if is_feasible(spec, target, schedule):
                found.append(schedule)
                break
    return tuple(dict.fromkeys(found))


def run(output: Output) -> Report:
    """All cases that are wanted, on the first GPU.

    Raises:
        DeviceMissing: there is none.
    """
    target = gpu_target()
    if not device_of(target).present:
        raise DeviceMissing("extend-gpu: a CUDA GPU is needed")
    todo = output.chosen(jobs())
    draft = Draft("extend-gpu", target, len(todo), output)
    with tempfile.TemporaryDirectory(prefix="pagedgen-bench-") as folder, Workshop(target) as shop:
        first = {(job.spec, default_schedule(job.spec, target)): None for job in todo}
        more = {
            (job.spec, schedule): None
            for job in todo
            for schedule in (candidates(job.spec, target) if job.every_tile else ())
        }
        kernels = tuple(first | more)
        output.note(f"extend-gpu: compiling and proving {len(kernels)} kernels")
        list(compile_all([render(s, target, schedule) for s, schedule in kernels], shop.pool, BinaryCache()))
        prove_all(kernels, target, "cuda", Path(folder))
        for number, job in enumerate(todo, 1):
            case = _case(job, target, Path(folder), shop)
            draft.add(case)
            best = max(case.summaries(), key=lambda row: row.tflops)
            rate = f"{best.median_us:,.1f} us, {best.tflops:,.0f} TFLOP/s, {best.matmul_share:.0%}"
            what = best.failure or f"{rate}: {best.detail}"
            output.note(f"extend-gpu {number}/{len(todo)}: {job.name}: {what}")
    return draft.finish()


def _case(job: Job, target: Target, folder: Path, shop: Workshop) -> Case:
    try:
        rows, tflops = shop.worker.call(_contest, job, target, folder, timeout_s=2 * MEASURE_S)
    except PagedgenError as error:
        shop.worker.kill()  # whatever it was, the next case gets a clean CUDA context
        rows = (Row("pagedgen", (), job.workload.kv_bytes(job.spec), "", f"{type(error).__name__}: {error}"),)
        tflops = 0.0
    return Case(job.name, job.spec, job.workload, rows, (), tflops)


def _contest(job: Job, target: Target, folder: Path) -> tuple[tuple[Row, ...], float]:
    """One case, in the worker."""
    chosen = pick(job.spec, target, job.workload)
    contenders = [ours(job.spec, target, job.workload, "cuda", folder, chosen=chosen)]
    failed = []
    for schedule in candidates(job.spec, target) if job.every_tile else ():
        if schedule == chosen.schedule:
            continue
        name = "tile {}x{}, {} warps".format(*(schedule[f] for f in ("tile_m", "tile", "num_warps")))
        default = schedule == default_schedule(job.spec, target)
        candidate = Pick(schedule, "default" if default else "candidate")
        name += f", {schedule['num_stages']} stages{', ids ahead' if schedule['prefetch_ids'] else ''}"
        try:
            contenders.append(ours(job.spec, target, job.workload, "cuda", folder, name, candidate))
        except PagedgenError as error:
            reason = f"{type(error).__name__}: {error}"
            failed.append(Row(name, (), job.workload.kv_bytes(job.spec), schedule.name, reason))
    rows, _ = contest(contenders, ROUNDS)
    return (*rows, *failed), gpu_matmul_tflops()
