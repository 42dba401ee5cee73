"""The ``decode-gpu`` suite: our decode kernels on this GPU.

First the batches that published comparisons of decode kernels use, beside peers where they are installed;
then a grid of specs at 32 x 8192, ours alone. Kernels are the recorded picks where there are any, the
schedule nearest the default elsewhere, and each row says which. Compiling, linking and the gate run in
parallel beforehand; cases run in a worker, so that a kernel that takes the CUDA context along costs its row
only.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pagedgen.autotune.binaries import BinaryCache, compile_all
from pagedgen.autotune.device import device_of
from pagedgen.autotune.gating import GATE_S
from pagedgen.autotune.roofline import gpu_read_gbs
from pagedgen.autotune.suites.contest import NEAREST, Pick, contest, ours, prove_all, recorded_selection
from pagedgen.autotune.suites.output import Note, Output
from pagedgen.autotune.suites.report import Case, Draft, Report, Row
from pagedgen.autotune.tune import MEASURE_S, Workshop
from pagedgen.compiler.render import render
from pagedgen.compiler.space import near_default
from pagedgen.errors import DeviceMissing, PagedgenError
from pagedgen.values.spec import DType, KernelSpec, KVScale, Op
from pagedgen.values.target import Target
from pagedgen.values.target_table import gpu_target
from pagedgen.values.workload import Workload

ROUNDS = 21
GRID_ROUNDS = 9
GRID_WORKLOAD = Workload.uniform(32, 8192)
F16, BF16, E4M3, E5M2 = DType.F16, DType.BF16, DType.FP8_E4M3, DType.FP8_E5M2
LONG_AMONG_SHORT = Workload("1x131072+63x1024", (131072,) + (1024,) * 63)
_drawn = random.Random(0)
SPREAD = Workload("64x128..16384", tuple(_drawn.randint(128, 16384) for _ in range(64)))  # uniform


@dataclass(frozen=True, slots=True)
class Job:
    """One case: a spec on a workload, with or without peers."""

    name: str
    spec: KernelSpec
    workload: Workload
    rounds: int
    with_peers: bool


Picks = Mapping[tuple[KernelSpec, Workload], Pick]


def spec_of(
    head_dim: int = 128,
    heads: tuple[int, int] = (32, 8),
    block_size: int = 16,
    q: DType = F16,
    kv: DType | None = None,
    scale: KVScale = KVScale.TENSOR,
    lse: bool = False,
) -> KernelSpec:
    """A decode spec; ``kv`` is the queries' type unless given."""
    kv = kv or q
    scale = scale if kv.is_fp8 else KVScale.NONE
    return KernelSpec(Op.DECODE, head_dim, *heads, block_size, q, kv, scale, return_lse=lse)


def rows() -> tuple[Job, ...]:
    """The batches of published comparisons."""
    batches = (
        ((32, 8), Workload.uniform(1, 8192)),
        ((64, 8), Workload.uniform(1, 32768)),
        ((32, 8), Workload.uniform(8, 4096)),
        ((32, 8), Workload.uniform(32, 8192)),
        ((32, 8), Workload.uniform(128, 1024)),
        ((32, 8), Workload.uniform(256, 1024)),
        ((32, 32), Workload.uniform(16, 4096)),
        ((32, 8), LONG_AMONG_SHORT),
        ((32, 8), SPREAD),
    )
    jobs = []
    for kv in (F16, BF16, E4M3):
        for heads, workload in batches:
            spec = spec_of(heads=heads, q=BF16 if kv is BF16 else F16, kv=kv)
            name = f"{workload.name}, {heads[0]}/{heads[1]} heads, {kv.value}"
            jobs.append(Job(name, spec, workload, ROUNDS, with_peers=True))
    return tuple(jobs)


def grid() -> tuple[KernelSpec, ...]:
    """Head dims, head ratios, block sizes and dtypes around 32/8 heads, head_dim 128, block 16."""
    specs = [
        spec_of(dim, q=q, kv=kv)
        for dim in (32, 64, 80, 96, 112, 128, 160, 192, 256)
        for q, kv in ((F16, None), (BF16, None), (F16, E4M3))
    ]
    # 1, 2, 5, 7, 8, 16, 32 and MQA
    ratios = ((8, 8), (16, 8), (40, 8), (28, 4), (64, 8), (64, 4), (64, 2), (32, 1))
    specs += [spec_of(heads=heads, kv=kv) for heads in ratios for kv in (None, E4M3)]
    blocks = (1, 8, 32, 64, 128, 256, 544)
    specs += [spec_of(block_size=block, kv=kv) for block in blocks for kv in (None, E4M3)]
    specs += [spec_of(dim, kv=E5M2) for dim in (64, 80, 128, 256)]
    specs += [
        spec_of(q=BF16, kv=E4M3),
        spec_of(kv=E4M3, scale=KVScale.HEAD),
        spec_of(lse=True),
        spec_of(kv=E4M3, lse=True),
    ]
    return tuple(dict.fromkeys(specs))


def run(output: Output) -> Report:
    """All cases that are wanted, on the first GPU.

    Raises:
        DeviceMissing: there is none.
    """
    target = gpu_target()
    if not device_of(target).present:
        raise DeviceMissing("decode-gpu: a CUDA GPU is needed")
    jobs = [*rows()]
    for spec in grid():
        jobs.append(Job(f"grid {spec.name}", spec, GRID_WORKLOAD, GRID_ROUNDS, with_peers=False))
    jobs = list(output.chosen(jobs))
    draft = Draft("decode-gpu", target, len(jobs), output)
    with tempfile.TemporaryDirectory(prefix="pagedgen-bench-") as name, Workshop(target) as shop:
        folder = Path(name)
        picks = compile_picks(jobs, target, shop, output.note)
        prove_picks(picks, target, folder, output.note)
        for number, job in enumerate(jobs, 1):
            case = _case(job, target, folder, shop, picks.get((job.spec, job.workload)))
            draft.add(case)
            best = case.summaries()[0]
            rate = f"{best.median_us:,.1f} us, {best.gbs:,.0f} GB/s, {best.roofline_share:.0%}"
            output.note(f"decode-gpu {number}/{len(jobs)}: {job.name}: {best.failure or rate}")
        notes = shop.worker.call(_missing, timeout_s=GATE_S)
    return draft.finish(notes)


def compile_picks(jobs: Sequence[Job], target: Target, shop: Workshop, note: Note) -> Picks:
    """What stands for us in each case, compiled in parallel; a failure shows up in its case.

    Without a record that is the schedule nearest the default that does not spill, so a spec stays pending
    until one of its nearest compiles.
    """
    cache, specs = BinaryCache(), dict.fromkeys(job.spec for job in jobs)
    selections = {spec: recorded_selection(spec, target) for spec in specs}
    picks = {
        (job.spec, job.workload): Pick.of(selection, job.workload)
        for job in jobs
        if (selection := selections[job.spec]) is not None
    }
    pending = {s: near_default(s, target, NEAREST) for s, found in selections.items() if found is None}
    note(f"compiling {len(picks)} recorded picks")
    sources = dict.fromkeys(render(spec, target, chosen.schedule) for (spec, _), chosen in picks.items())
    list(compile_all(tuple(sources), shop.pool, cache))
    for turn in range(NEAREST):
        todo = {spec: near[turn] for spec, near in pending.items() if turn < len(near)}
        if not todo:
            break
        note(f"compiling {len(todo)} specs, turn {turn + 1}")
        for done in compile_all([render(spec, target, s) for spec, s in todo.items()], shop.pool, cache):
            if done.binary is not None:
                spec = done.source.spec
                del pending[spec]
                chosen = Pick(done.source.schedule, "default")
                picks |= {(spec, job.workload): chosen for job in jobs if job.spec == spec}
    return picks


def prove_picks(picks: Picks, target: Target, folder: Path, note: Note) -> None:
    """Gate what stands for us in each case; a failure shows up in its case."""
    kernels = dict.fromkeys((spec, chosen.schedule) for (spec, _), chosen in picks.items())
    note(f"proving {len(kernels)} kernels")
    prove_all(kernels, target, "cuda", folder)


def _case(job: Job, target: Target, folder: Path, shop: Workshop, chosen: Pick | None) -> Case:
    try:
        rows, read_gbs = shop.worker.call(_contest, job, target, folder, chosen, timeout_s=2 * MEASURE_S)
    except PagedgenError as error:
        shop.worker.kill()  # whatever it was, the next case gets a clean CUDA context
        rows = (Row("pagedgen", (), job.workload.kv_bytes(job.spec), "", f"{type(error).__name__}: {error}"),)
        read_gbs = ()
    return Case(job.name, job.spec, job.workload, rows, read_gbs)


def _contest(
    job: Job, target: Target, folder: Path, chosen: Pick | None
) -> tuple[tuple[Row, ...], tuple[float, ...]]:
    """One case, in the worker."""
    contenders = [ours(job.spec, target, job.workload, "cuda", folder, chosen=chosen)]
    if job.with_peers:
        from pagedgen.autotune.suites import peers_gpu

        contenders += peers_gpu.peers(job.spec, job.workload)
    found, _ = contest(contenders, job.rounds)
    return found, (gpu_read_gbs(),)


def _missing() -> tuple[str, ...]:
    from pagedgen.autotune.suites import peers_gpu

    return peers_gpu.missing()
