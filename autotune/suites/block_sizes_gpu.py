"""The ``block-sizes-gpu`` suite: our decode kernels against block size and against how tables have aged.

Every block size from 1 to 256, fp16 and e4m3, head_dim 64 and 128, on three batches; block tables with 0, 50,
90 and 100% of the tokens in runs of blocks that lie side by side, which is what serving leaves behind (a
block of 64 tokens or more is a run itself). All of one batch are timed in the same interleaved rounds.
``pagedgen explore --kernel-times`` reads the file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pagedgen.autotune.binaries import compile_one
from pagedgen.autotune.device import device_of
from pagedgen.autotune.explore.policies import RUN_TOKENS
from pagedgen.autotune.explore.timings import KernelTiming, KernelTimings
from pagedgen.autotune.measure import Clock, Verified, gate_variant, rotation
from pagedgen.autotune.roofline import gpu_read_gbs
from pagedgen.autotune.suites import Note
from pagedgen.autotune.suites.contest import Contender, contest, pick
from pagedgen.autotune.suites.decode_gpu import E4M3, F16, Job, compile_picks, spec_of
from pagedgen.autotune.suites.report import Environment, Row
from pagedgen.autotune.tune import MEASURE_S, Workshop
from pagedgen.compiler.link import link
from pagedgen.errors import DeviceMissing, PagedgenError
from pagedgen.runtime.arrays import I32
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target import Target
from pagedgen.values.target_table import gpu_target
from pagedgen.values.workload import Workload

SUITE = "block-sizes-gpu"
BLOCK_SIZES = (1, 8, 16, 32, 64, 128, 256)
COVERAGES = (0.0, 0.5, 0.9, 1.0)
BATCHES = (Workload.uniform(8, 4096), Workload.uniform(64, 2048), Workload.uniform(256, 1024))
ROUNDS = 11


@dataclass(frozen=True, slots=True)
class Group:
    """Kernels that are timed in the same rounds: those of all block sizes on one batch."""

    specs: tuple[KernelSpec, ...]
    workload: Workload

    @property
    def name(self) -> str:
        """``head_dim 128, f16, 64x2048``"""
        spec = self.specs[0]
        return f"head_dim {spec.head_dim}, {spec.kv_dtype.value}, {self.workload.name}"


def groups() -> tuple[Group, ...]:
    """All that the suite times."""
    return tuple(
        Group(tuple(spec_of(head_dim, block_size=size, kv=kv) for size in BLOCK_SIZES), workload)
        for head_dim in (64, 128)
        for kv in (F16, E4M3)
        for workload in BATCHES
    )


def coverages(block_size: int) -> tuple[float, ...]:
    """The run coverages that a block size can have."""
    return COVERAGES if block_size < RUN_TOKENS else (1.0,)


def aged_table(
    num_seqs: int, blocks_each: int, num_blocks: int, block_size: int, coverage: float, seed: int
) -> I32:
    """A block table as serving leaves it: int32 ``[num_seqs, blocks_each]``, every block once.

    Of the stretches of ``RUN_TOKENS`` tokens a share of ``coverage``, drawn at random, lie in aligned runs of
    blocks side by side, here and there in the pool; the blocks of the others are scattered one by one.
    """
    rng = np.random.default_rng(seed)
    run = max(1, RUN_TOKENS // block_size)
    total = num_seqs * blocks_each
    table = np.empty(total, np.int32)
    stretches = np.arange(0, total - total % run, run)
    whole = stretches // blocks_each == (stretches + run - 1) // blocks_each  # of one sequence
    stretches = stretches[whole]
    in_runs = rng.permutation(stretches)[: round(coverage * total / run)]
    places = rng.permutation(num_blocks // run)[: in_runs.size] * run
    steps = np.arange(run)
    table[(in_runs[:, None] + steps).reshape(-1)] = (places[:, None] + steps).reshape(-1)
    scattered = np.ones(total, np.bool_)
    scattered[(in_runs[:, None] + steps).reshape(-1)] = False
    free = np.ones(num_blocks, np.bool_)
    free[(places[:, None] + steps).reshape(-1)] = False
    rest = rng.permutation(np.flatnonzero(free))[: int(scattered.sum())]
    table[scattered] = rest
    return table.reshape(num_seqs, blocks_each)


def run(note: Note) -> KernelTimings:
    """All groups, on the first GPU.

    Raises:
        DeviceMissing: there is none.
    """
    target = gpu_target()
    if not device_of(target).present:
        raise DeviceMissing(f"{SUITE}: a CUDA GPU is needed")
    todo = groups()
    jobs = [Job(group.name, spec, group.workload, ROUNDS, False) for group in todo for spec in group.specs]
    rows: list[KernelTiming] = []
    notes: list[str] = []
    read_gbs = 0.0
    with tempfile.TemporaryDirectory(prefix="pagedgen-bench-") as folder, Workshop(target) as shop:
        compile_picks(jobs, target, shop, note)
        for number, group in enumerate(todo, 1):
            try:
                timed, rate = shop.worker.call(_time, group, target, Path(folder), timeout_s=2 * MEASURE_S)
            except PagedgenError as error:
                shop.worker.kill()  # whatever it was, the next group gets a clean CUDA context
                notes.append(f"{group.name}: {type(error).__name__}: {error}")
                note(f"{SUITE} {number}/{len(todo)}: {notes[-1]}")
                continue
            rows += timed
            read_gbs = max(read_gbs, rate)
            note(f"{SUITE} {number}/{len(todo)}: {group.name}: {_best(timed)}")
    return KernelTimings(SUITE, Environment.here(target), tuple(rows), read_gbs, tuple(notes))


def _best(timed: Sequence[KernelTiming]) -> str:
    right = [row for row in timed if row.samples_us]
    if not right:
        return "all failed"
    best = min(right, key=lambda row: row.median_us)
    return f"{best.median_us:,.1f} us at block size {best.spec.block_size}"


def _time(group: Group, target: Target, folder: Path) -> tuple[list[KernelTiming], float]:
    """One group, in the worker; kernels that fail have a row that says why."""
    contenders: list[Contender] = []
    cases: dict[str, tuple[KernelSpec, float]] = {}
    failures: list[KernelTiming] = []
    for spec in group.specs:
        try:
            found = aged_contenders(spec, target, group.workload, "cuda", folder)
        except PagedgenError as error:
            reason = f"{type(error).__name__}: {error}"
            failures += [timing(spec, group.workload, c, reason) for c in coverages(spec.block_size)]
            continue
        for coverage, contender in found:
            contenders.append(contender)
            cases[contender.name] = spec, coverage
    rows, _ = contest(contenders, ROUNDS)
    return [*(timing(*_case(cases, group, row), row) for row in rows), *failures], gpu_read_gbs()


def _case(
    cases: dict[str, tuple[KernelSpec, float]], group: Group, row: Row
) -> tuple[KernelSpec, Workload, float]:
    spec, coverage = cases[row.contender]
    return spec, group.workload, coverage


def timing(spec: KernelSpec, workload: Workload, coverage: float, row: Row | str) -> KernelTiming:
    """What the file holds of a contender, or of one that could not take part, with the reason."""
    if isinstance(row, str):
        return KernelTiming(spec, workload.num_seqs, workload.num_tokens, coverage, (), "", row)
    samples = () if row.failure else row.samples_us
    return KernelTiming(
        spec, workload.num_seqs, workload.num_tokens, coverage, samples, row.detail, row.failure
    )


def aged_contenders(
    spec: KernelSpec, target: Target, workload: Workload, device: str, folder: Path
) -> list[tuple[float, Contender]]:
    """One proved kernel, on the same K and V behind a block table of each coverage.

    Raises:
        GateFailure: the kernel is wrong.
        CompileError: it does not compile.
    """
    import torch

    from pagedgen.compiler.verify import run_case
    from pagedgen.runtime.library import Library

    chosen = pick(spec, target, workload)
    out = folder / f"{spec.name}-{chosen.schedule.hash}.so"
    library = link([compile_one(spec, target, chosen.schedule)], (), out)
    Verified(0, chosen.schedule, gate_variant(library, spec, 0, device, 0))
    loaded = Library(library)
    rotating = rotation(spec, workload, device)
    workspace = torch.zeros(
        max(1, loaded.workspace_bytes(workload.num_seqs)), dtype=torch.uint8, device=device
    )
    found = []
    for coverage in coverages(spec.block_size):
        inputs = []
        for seed, fresh in enumerate(rotating.inputs):
            num_blocks, (seqs, width) = fresh.k.shape[0], fresh.block_table.shape
            table = aged_table(seqs, width, num_blocks, spec.block_size, coverage, seed)
            inputs.append(replace(fresh, block_table=torch.from_numpy(table).to(device)))

        def call(turn: int, inputs: Sequence[object] = tuple(inputs)) -> None:
            run_case(spec, loaded, 0, inputs[turn], workspace)  # type: ignore[arg-type]

        name = f"block {spec.block_size}, {coverage:.0%} in runs"
        clock = Clock(call, rotating.turns, device)
        detail = f"{chosen.origin}: {chosen.schedule.name}"
        found.append((coverage, Contender(name, clock, workload.kv_bytes(spec), detail)))
    return found
