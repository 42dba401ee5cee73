"""The ``verify-gpu`` suite: our verify kernels on this GPU beside plain decode of the same KV.

Verification is worth its drafts while reading KV bounds it, so each case is read against decode: the same
sequences, the same cache, one query each, timed in the same interleaved rounds. Drafts in a line and in a
tree, in float16, bfloat16 and FP8; then what else changes a kernel's speed. Where a schedule is on record,
the default is timed beside it. Every kernel passes the gate first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pagedgen.autotune.device import device_of
from pagedgen.autotune.roofline import gpu_read_gbs
from pagedgen.autotune.suites.contest import Pick, contest, ours
from pagedgen.autotune.suites.decode_gpu import (
    BF16,
    E4M3,
    F16,
    Job,
    Picks,
    compile_picks,
    prove_picks,
    spec_of,
)
from pagedgen.autotune.suites.output import Output
from pagedgen.autotune.suites.report import Case, Draft, Report, Row
from pagedgen.autotune.tune import MEASURE_S, Workshop
from pagedgen.compiler.space import default_schedule
from pagedgen.errors import DeviceMissing, PagedgenError
from pagedgen.values.spec import KernelSpec, Op
from pagedgen.values.target import Target
from pagedgen.values.target_table import gpu_target
from pagedgen.values.workload import Workload

ROUNDS = 15
DECODE, LINE, TREE = "decode of the same KV", "verify, in a line", "verify, in a tree"
DEFAULT = ", default schedule"  # beside one that was tuned


def jobs() -> tuple[Job, ...]:
    """Batches of drafts in three formats, then shapes and a window with the first of them.

    The jobs' specs are those of drafts in a line.
    """
    batches = tuple(
        Workload.chunks(num_seqs, drafts, 4096) for num_seqs, drafts in ((64, 8), (16, 4), (64, 16), (8, 64))
    )
    found = []
    for q, kv in ((F16, F16), (BF16, BF16), (F16, E4M3)):
        spec = replace(spec_of(q=q, kv=kv), op=Op.VERIFY)
        found += [
            Job(f"{batch.name}, {kv.value}", spec, batch, ROUNDS, with_peers=False) for batch in batches
        ]
    others = (
        spec_of(64),
        spec_of(heads=(64, 8), kv=E4M3),
        spec_of(heads=(32, 32)),
        spec_of(block_size=64, kv=E4M3),
        replace(spec_of(), window=1024),
    )
    for other in others:
        spec = replace(other, op=Op.VERIFY)
        found.append(Job(f"{spec.name}, {batches[0].name}", spec, batches[0], ROUNDS, with_peers=False))
    return tuple(found)


def contenders_of(job: Job) -> tuple[tuple[str, KernelSpec, Workload], ...]:
    """What a case times: name, spec, workload. Decode is first, so that ratios are times of decode's."""
    spec, batch = job.spec, job.workload
    plain = Workload(f"{batch.num_seqs}x{batch.max_seq_len}", batch.seq_lens)
    found = [(DECODE, replace(spec, op=Op.DECODE), plain), (LINE, spec, batch)]
    if spec.window is None:
        found.append((TREE, replace(spec, tree_mask=True), batch))
    return tuple(found)


def with_defaults(picks: Picks, target: Target) -> dict[str, Picks]:
    """What is timed, by the end of a contender's name: verify's defaults, too, where others are on record."""
    defaults = {
        (spec, workload): Pick(default_schedule(spec, target), "default")
        for (spec, workload), chosen in picks.items()
        if spec.op is Op.VERIFY and chosen.origin != "default"
    }
    return {"": picks, DEFAULT: {key: d for key, d in defaults.items() if d.schedule != picks[key].schedule}}


def run(output: Output) -> Report:
    """All cases that are wanted, on the first GPU.

    Raises:
        DeviceMissing: there is none.
    """
    target = gpu_target()
    if not device_of(target).present:
        raise DeviceMissing("verify-gpu: a CUDA GPU is needed")
    todo = output.chosen(jobs())
    draft = Draft("verify-gpu", target, len(todo), output)
    timed = [
        Job(name, spec, workload, ROUNDS, with_peers=False)
        for job in todo
        for name, spec, workload in contenders_of(job)
    ]
    with tempfile.TemporaryDirectory(prefix="pagedgen-bench-") as folder, Workshop(target) as shop:
        picks = with_defaults(compile_picks(timed, target, shop, output.note), target)
        for some in picks.values():
            prove_picks(some, target, Path(folder), output.note)
        read_gbs: tuple[float, ...] = (shop.worker.call(gpu_read_gbs, timeout_s=MEASURE_S),)
        for number, job in enumerate(todo, 1):
            case = _case(job, target, Path(folder), shop, read_gbs, picks)
            draft.add(case)
            times = [
                f"{row.contender} {row.failure or f'{row.median_us:,.1f} us'} ({row.speed_ratio:.2f})"
                for row in case.summaries()
            ]
            output.note(f"verify-gpu {number}/{len(todo)}: {job.name}: {', '.join(times)}")
    return draft.finish()


def _case(
    job: Job,
    target: Target,
    folder: Path,
    shop: Workshop,
    read_gbs: Sequence[float],
    picks: Mapping[str, Picks],
) -> Case:
    here = {(s, w) for _, s, w in contenders_of(job)}
    chosen = {end: {key: some[key] for key in here if key in some} for end, some in picks.items()}
    try:
        rows = shop.worker.call(_contest, job, target, folder, chosen, timeout_s=2 * MEASURE_S)
    except PagedgenError as error:
        shop.worker.kill()  # whatever it was, the next case gets a clean CUDA context
        rows = (Row(DECODE, (), job.workload.kv_bytes(job.spec), "", f"{type(error).__name__}: {error}"),)
    return Case(job.name, job.spec, job.workload, rows, tuple(read_gbs))


def _contest(job: Job, target: Target, folder: Path, picks: Mapping[str, Picks]) -> tuple[Row, ...]:
    """One case, in the worker; a row for each contender, in their order."""
    contenders, rows = [], {}
    timed = [
        (f"{name}{end}", spec, workload, some.get((spec, workload)))
        for name, spec, workload in contenders_of(job)
        for end, some in picks.items()
        if not end or (spec, workload) in some
    ]
    for name, spec, workload, chosen in timed:
        try:
            found = ours(spec, target, workload, "cuda", folder, name, chosen)
        except PagedgenError as error:
            rows[name] = Row(name, (), workload.kv_bytes(spec), "", f"{type(error).__name__}: {error}")
        else:
            contenders.append(replace(found, flops=0))  # reading KV is what bounds it
    rows |= {row.contender: row for row in contest(contenders, job.rounds)[0]}
    return tuple(rows[name] for name, *_ in timed)
