"""The ``block-sizes-gpu`` suite: our kernels against block size and against how tables have aged.

Every block size from 1 to 256, decode and extend, fp16 and e4m3, head_dim 64 and 128; block tables with
0, 50, 90 and 100% of the tokens in runs of blocks that lie side by side, which is what serving leaves behind
(a block of 64 tokens or more is a run itself). Each size gets the same effort: of the same few schedules,
proved, the fastest on the batch stands for it. All of one batch are timed in the same interleaved rounds.
``pagedgen explore --kernel-times`` reads the file.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from pagedgen.autotune.binaries import BinaryCache, compile_all, compile_one
from pagedgen.autotune.device import device_of
from pagedgen.autotune.explore.policies import RUN_TOKENS
from pagedgen.autotune.explore.timings import KernelTiming, KernelTimings
from pagedgen.autotune.measure import Clock, Rotation, gate_variant, rotation
from pagedgen.autotune.roofline import gpu_read_gbs
from pagedgen.autotune.suites.contest import Contender, contest
from pagedgen.autotune.suites.decode_gpu import E4M3, F16, spec_of
from pagedgen.autotune.suites.output import Note, Output
from pagedgen.autotune.suites.report import Environment, Row
from pagedgen.autotune.tune import MEASURE_S, Workshop
from pagedgen.compiler.binary import Binary
from pagedgen.compiler.families import family_for
from pagedgen.compiler.link import link
from pagedgen.compiler.render import render
from pagedgen.compiler.space import is_legal
from pagedgen.compiler.verify import Inputs, run_case
from pagedgen.errors import CompileError, DeviceMissing, GateFailure, PagedgenError
from pagedgen.runtime.arrays import I32
from pagedgen.runtime.library import Library
from pagedgen.values.schedule import Choice, Schedule
from pagedgen.values.spec import KernelSpec, Op
from pagedgen.values.target import Target
from pagedgen.values.target_table import gpu_target
from pagedgen.values.workload import Workload

SUITE = "block-sizes-gpu"
BLOCK_SIZES = (1, 8, 16, 32, 64, 128, 256)
COVERAGES = (0.0, 0.5, 0.9, 1.0)
BATCHES = (Workload.uniform(8, 4096), Workload.uniform(64, 2048), Workload.uniform(256, 1024))
PROMPTS = (Workload.chunks(4, 2048, 2048), Workload.chunks(4, 512, 8192))
# Changes to the family's default that were the fastest somewhere on an H100; the same for every block size.
SHAPES: Mapping[Op, tuple[Mapping[str, Choice], ...]] = {
    Op.DECODE: (
        {},
        {"tile": 32, "num_warps": 1, "num_stages": 4, "waves": 3},
        {"tile": 32, "num_warps": 2, "num_stages": 4, "waves": 6},
        {"tile": 64, "num_warps": 2, "num_stages": 3, "waves": 4},
        {"tile": 64, "num_warps": 2, "num_stages": 2, "waves": 6},
        {"tile": 128, "num_warps": 4, "num_stages": 3, "waves": 1},
    ),
    Op.EXTEND: (
        {},
        {"tile_m": 128, "tile": 64, "num_warps": 4, "num_stages": 2, "prefetch_ids": 1},
        {"tile_m": 128, "tile": 64, "num_warps": 8, "num_stages": 3, "prefetch_ids": 1},
        {"tile_m": 64, "tile": 64, "num_warps": 4, "num_stages": 3, "prefetch_ids": 1},
    ),
}
RACE_ROUNDS = 5
ROUNDS = 11


@dataclass(frozen=True, slots=True)
class Group:
    """Kernels that are timed in the same rounds: those of all block sizes on one batch."""

    specs: tuple[KernelSpec, ...]
    workload: Workload

    @property
    def name(self) -> str:
        """``decode, head_dim 128, 32/8 heads, f16, 64x2048``"""
        spec = self.specs[0]
        heads = f"{spec.num_q_heads}/{spec.num_kv_heads} heads"
        kind = f"{spec.op.value}, head_dim {spec.head_dim}, {heads}, {spec.kv_dtype.value}"
        return f"{kind}, {self.workload.name}"


def groups() -> tuple[Group, ...]:
    """All that the suite times."""
    shapes = [(dim, (32, 8), kv) for dim in (64, 128) for kv in (F16, E4M3)]
    shapes.append((128, (16, 2), F16))  # a rank of llama-3-70b on four GPUs
    decode = [(Op.DECODE, *shape, batch) for shape in shapes for batch in BATCHES]
    extend = [(Op.EXTEND, *shape, batch) for shape in shapes for batch in PROMPTS]
    return tuple(
        Group(tuple(replace(spec_of(dim, heads, size, kv=kv), op=op) for size in BLOCK_SIZES), batch)
        for op, dim, heads, kv, batch in (*decode, *extend)
    )


def candidates(spec: KernelSpec, target: Target) -> tuple[Schedule, ...]:
    """The legal ones of :data:`SHAPES`, with the first way of loading ids that suits a tile."""
    family = family_for(spec, target)
    fields = family.fields(spec, target)
    default = {field.name: field.default for field in fields}
    ids = next((field.values for field in fields if field.name == "ids"), ())
    found = []
    for shape in SHAPES[spec.op]:
        base = {**default, **shape}
        ways = [base, *(base | {"ids": way} for way in reversed(ids))]  # scalar, page, gather
        schedules = (Schedule.of(family.name, **way) for way in ways)
        found += [next(s for s in schedules if is_legal(spec, target, s))]
    return tuple(dict.fromkeys(found))


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


def run(output: Output) -> KernelTimings:
    """All groups that are wanted, on the first GPU.

    Raises:
        DeviceMissing: there is none.
    """
    target = gpu_target()
    if not device_of(target).present:
        raise DeviceMissing(f"{SUITE}: a CUDA GPU is needed")
    todo = output.chosen(groups())
    environment = Environment.here(target)  # the date is the start's
    rows: list[KernelTiming] = []
    notes = [f"only groups with {' or '.join(output.wanted)}"] if output.wanted else []
    read_gbs = 0.0

    def report(done: int) -> KernelTimings:
        complete = done == len(todo)
        return KernelTimings(
            SUITE, environment, tuple(rows), read_gbs, tuple(notes), complete, done, len(todo)
        )

    with tempfile.TemporaryDirectory(prefix="pagedgen-bench-") as folder, Workshop(target) as shop:
        compile_candidates(todo, target, shop, output.note)
        for number, group in enumerate(todo, 1):
            try:
                timed, rate = shop.worker.call(_time, group, target, Path(folder), timeout_s=2 * MEASURE_S)
            except PagedgenError as error:
                shop.worker.kill()  # whatever it was, the next group gets a clean CUDA context
                notes.append(f"{group.name}: {type(error).__name__}: {error}")
                output.note(f"{SUITE} {number}/{len(todo)}: {notes[-1]}")
            else:
                rows += timed
                read_gbs = max(read_gbs, rate)
                output.note(f"{SUITE} {number}/{len(todo)}: {group.name}: {_best(timed)}")
            output.keep(report(number))
    return report(len(todo))


def compile_candidates(todo: Sequence[Group], target: Target, shop: Workshop, note: Note) -> None:
    """Fill the binary cache in parallel; what does not compile shows up where it is wanted."""
    specs = dict.fromkeys(spec for group in todo for spec in group.specs)
    sources = [render(spec, target, s) for spec in specs for s in candidates(spec, target)]
    note(f"{SUITE}: compiling {len(sources)} kernels")
    list(compile_all(sources, shop.pool, BinaryCache()))


def _best(timed: Sequence[KernelTiming]) -> str:
    right = [row for row in timed if row.samples_us]
    if not right:
        return "all failed"
    best = min(right, key=lambda row: row.median_us)
    return f"{best.median_us:,.1f} us at block size {best.spec.block_size}"


@cache
def proved(
    spec: KernelSpec, target: Target, folder: Path, device: str
) -> tuple[Library, dict[int, Schedule]]:
    """All candidates of a spec in one library, and which of its variants passed the gate.

    Raises:
        GateFailure: none did.
        CompileError: none compiles.
    """
    binaries: list[Binary] = []
    problems: list[PagedgenError] = []
    for schedule in candidates(spec, target):
        try:
            binaries.append(compile_one(spec, target, schedule))
        except CompileError as error:
            problems.append(error)
    if not binaries:
        raise CompileError(f"none of {len(problems)} schedules compiles; the last: {problems[-1]}")
    path = link(binaries, (), folder / f"{spec.name}.so")
    right: dict[int, Schedule] = {}
    for variant, binary in enumerate(binaries):
        try:
            gate_variant(path, spec, variant, device, 0)
        except GateFailure as error:
            problems.append(error)
        else:
            right[variant] = binary.source.schedule
    if not right:
        raise problems[-1]
    return Library(path), right


class Aged:
    """A spec on a batch, behind block tables of every coverage.

    Raises:
        GateFailure, CompileError: see :func:`proved`.
    """

    def __init__(
        self, spec: KernelSpec, target: Target, workload: Workload, device: str, folder: Path
    ) -> None:
        self.spec, self.workload, self.device = spec, workload, device
        self.library, self.variants = proved(spec, target, folder, device)
        self._rotation: Rotation = rotation(spec, workload, device)
        size = max(1, self.library.workspace_bytes(workload.num_seqs))
        self._workspace = torch.zeros(size, dtype=torch.uint8, device=device)
        self._inputs: dict[float, tuple[Inputs, ...]] = {}

    def inputs(self, coverage: float) -> tuple[Inputs, ...]:
        """The batch's inputs, with block tables of a coverage."""
        if coverage not in self._inputs:
            self._inputs[coverage] = tuple(
                replace(fresh, block_table=self._table(fresh, coverage, seed))
                for seed, fresh in enumerate(self._rotation.inputs)
            )
        return self._inputs[coverage]

    def _table(self, fresh: Inputs, coverage: float, seed: int) -> torch.Tensor:
        num_blocks, (seqs, width) = fresh.k.shape[0], fresh.block_table.shape
        table = aged_table(seqs, width, num_blocks, self.spec.block_size, coverage, seed)
        return torch.from_numpy(table).to(self.device)

    def contender(self, variant: int, coverage: float) -> Contender:
        """A variant behind tables of a coverage."""
        inputs = self.inputs(coverage)

        def call(turn: int) -> None:
            run_case(self.spec, self.library, variant, inputs[turn], self._workspace)

        name = f"block {self.spec.block_size}, {coverage:.0%} in runs, variant {variant}"
        clock = Clock(call, self._rotation.turns, self.device)
        return Contender(name, clock, self.workload.kv_bytes(self.spec), self.variants[variant].name)


def _time(group: Group, target: Target, folder: Path) -> tuple[list[KernelTiming], float]:
    """One group, in the worker; kernels that fail have a row that says why."""
    return time_group(group, target, folder, "cuda"), gpu_read_gbs()


def time_group(group: Group, target: Target, folder: Path, device: str) -> list[KernelTiming]:
    """The fastest variant of every block size, then those beside each other at every coverage."""
    ready: list[Aged] = []
    failed: list[KernelTiming] = []
    for spec in group.specs:
        try:
            ready.append(Aged(spec, target, group.workload, device, folder))
        except PagedgenError as error:
            reason = f"{type(error).__name__}: {error}"
            failed += [timing(spec, group.workload, c, reason) for c in coverages(spec.block_size)]
    entrants = [(aged, variant) for aged in ready for variant in aged.variants]
    least = {aged.spec: coverages(aged.spec.block_size)[0] for aged in ready}
    raced, _ = contest([aged.contender(v, least[aged.spec]) for aged, v in entrants], RACE_ROUNDS)
    fastest: dict[Aged, tuple[float, int]] = {}
    for (aged, variant), row in zip(entrants, raced, strict=True):
        if not row.failure:
            us = statistics.median(row.samples_us)
            fastest[aged] = min(fastest.get(aged, (us, variant)), (us, variant))
    finals = [(aged, c) for aged in fastest for c in coverages(aged.spec.block_size)]
    rows, _ = contest([aged.contender(fastest[aged][1], c) for aged, c in finals], ROUNDS)
    timed = [timing(aged.spec, group.workload, c, row) for (aged, c), row in zip(finals, rows, strict=True)]
    for aged in ready:
        if aged not in fastest:
            reason = next(row.failure for (a, _), row in zip(entrants, raced, strict=True) if a is aged)
            failed += [timing(aged.spec, group.workload, c, reason) for c in coverages(aged.spec.block_size)]
    return [*timed, *failed]


def timing(spec: KernelSpec, workload: Workload, coverage: float, row: Row | str) -> KernelTiming:
    """What the file holds of a contender, or of one that could not take part, with the reason."""
    failure = row if isinstance(row, str) else row.failure
    samples, detail = ((), "") if isinstance(row, str) or failure else (row.samples_us, row.detail)
    return KernelTiming(
        spec,
        workload.num_seqs,
        workload.num_tokens,
        coverage,
        samples,
        detail,
        failure,
        sum(workload.query_lens),
    )
