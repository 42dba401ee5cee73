"""The ``move-gpu`` suite: our kernels that write, gather, copy, swap and merge, against a copy's bandwidth.

64 to 8,192 tokens, in bfloat16 and FP8, in one layer and in 32. Blocks are swapped with pinned host memory,
up to 1,024 tokens, beside a cudaMemcpyAsync of as many bytes in one piece. Rates count bytes read and
written, and are held against torch's copy of 1 GiB in the same rounds, counted the same way; a copy of as
many bytes as the case moves, and what torch's own operators take, stand beside. The first row is what would
be picked; other schedules follow where the case asks for them. Every kernel passes the gate first. Inputs
rotate through four times the L2 cache, slots and blocks are random.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from pagedgen.autotune.binaries import BinaryCache, compile_all
from pagedgen.autotune.device import device_of
from pagedgen.autotune.measure import (
    MAX_CALLS,
    ROTATION,
    Clock,
    Turns,
    Verified,
    last_level_cache_bytes,
)
from pagedgen.autotune.suites.contest import Contender, contest, pick, prove_all, proved
from pagedgen.autotune.suites.output import Output
from pagedgen.autotune.suites.report import Case, Draft, Report, Row
from pagedgen.autotune.tune import MEASURE_S, Workshop
from pagedgen.compiler.render import render
from pagedgen.compiler.space import feasible
from pagedgen.errors import DeviceMissing, PagedgenError
from pagedgen.runtime.attention import TORCH_DTYPES
from pagedgen.runtime.block_pools import BlockPools
from pagedgen.runtime.kv_cache import store
from pagedgen.runtime.kv_scales import set_scales
from pagedgen.runtime.library import Library
from pagedgen.runtime.merge import merge
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import DType, KernelSpec, KVScale, Op, Rope
from pagedgen.values.target import Target
from pagedgen.values.target_table import gpu_target
from pagedgen.values.workload import Workload

ROUNDS = 15
TOKENS = (64, 256, 1024, 8192)
BF16, E4M3 = DType.BF16, DType.FP8_E4M3
COPY_BYTES = 1 << 30
NOTE = "GB/s count bytes read and written; the share is of torch's copy of 1 GiB in the same rounds"
SWAP_NOTE = "swap out and swap in go over PCIe: torch's copy_ of as much is what they are held against there"
NUM_PARTS = 4  # that are merged


@dataclass(frozen=True, slots=True)
class Job:
    """One case: a spec, the tokens that move and in how many layers; with every schedule or the pick."""

    name: str
    spec: KernelSpec
    num_tokens: int
    num_layers: int
    every_schedule: bool
    swap: str = ""  # "out" to pinned host memory, "in" from there

    @property
    def workload(self) -> Workload:
        """Its tokens as one sequence."""
        return Workload.chunks(1, self.num_tokens, self.num_tokens)

    @property
    def num_bytes(self) -> int:
        """Read and written by one call."""
        spec = self.spec
        if spec.op is Op.MERGE:
            rows = self.num_tokens * spec.num_q_heads
            return rows * (NUM_PARTS + 1) * (spec.head_dim * spec.q_dtype.size + 4)
        outside = spec.num_kv_heads * (spec.head_dim + spec.v_dim) * spec.q_dtype.size
        if spec.op is Op.KV_SCALES:
            return self.num_tokens * outside
        return self.num_tokens * self.num_layers * (spec.kv_bytes_per_token + outside)


def jobs() -> tuple[Job, ...]:
    """Each operator and format at each number of tokens; of most, every schedule at both ends."""
    shape = (128, 8, 8, 16)
    kinds = (
        ("write_kv, bfloat16", KernelSpec(Op.WRITE_KV, *shape, BF16, BF16), 1),
        ("write_kv, bfloat16 to fp8", KernelSpec(Op.WRITE_KV, *shape, BF16, E4M3, KVScale.TENSOR), 1),
        ("write_kv, bfloat16, K turned", KernelSpec(Op.WRITE_KV, *shape, BF16, BF16, rope=Rope.NEOX), 1),
        (
            "write_kv, bfloat16 to fp8, K turned",
            KernelSpec(Op.WRITE_KV, *shape, BF16, E4M3, KVScale.TENSOR, rope=Rope.NEOX),
            1,
        ),
        ("gather, bfloat16", KernelSpec(Op.GATHER, *shape, BF16, BF16), 1),
        ("gather, fp8 to bfloat16", KernelSpec(Op.GATHER, *shape, BF16, E4M3, KVScale.TENSOR), 1),
        ("copy_blocks, bfloat16, 1 layer", KernelSpec(Op.COPY_BLOCKS, *shape, BF16, BF16), 1),
        ("copy_blocks, bfloat16, 32 layers", KernelSpec(Op.COPY_BLOCKS, *shape, BF16, BF16), 32),
    )
    once = (
        ("kv_scales, bfloat16", KernelSpec(Op.KV_SCALES, 128, 8, 8, 1, BF16, E4M3, KVScale.TENSOR)),
        (
            "kv_scales, bfloat16, a scale a head",
            KernelSpec(Op.KV_SCALES, 128, 8, 8, 1, BF16, E4M3, KVScale.HEAD),
        ),
        (f"merge, bfloat16, 32 heads, {NUM_PARTS} parts", KernelSpec(Op.MERGE, 128, 32, 32, 1, BF16, BF16)),
    )
    swapped = KernelSpec(Op.COPY_BLOCKS, *shape, BF16, BF16)
    return (
        *(
            Job(f"{name}, {tokens} tokens", spec, tokens, layers, tokens in (TOKENS[0], TOKENS[-1]))
            for name, spec, layers in kinds
            for tokens in TOKENS
        ),
        *(
            Job(f"{name}, {tokens} tokens", spec, tokens, 1, False)
            for name, spec in once
            for tokens in TOKENS
        ),
        *(
            Job(f"swap {way}, bfloat16, 32 layers, {tokens} tokens", swapped, tokens, 32, False, way)
            for way in ("out", "in")
            for tokens in TOKENS[:-1]
        ),
    )


class Rows:
    """What write_kv and gather take: tokens in one piece, and pools with slots for all of them, at random."""

    def __init__(self, job: Job, count: int, device: str = "cuda") -> None:
        spec = self.spec = job.spec
        kind, outside = TORCH_DTYPES[spec.kv_dtype], TORCH_DTYPES[spec.q_dtype]
        blocks = count * -(-job.num_tokens // spec.block_size) + 1
        shape = (blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
        raw = torch.uint8 if kind.itemsize == 1 else kind
        self.raw = [torch.zeros(shape, dtype=raw, device=device) for _ in range(2)]
        self.pools = [pool.view(kind) for pool in self.raw]
        rows = (count, 2, job.num_tokens, *shape[2:])
        self.rows = torch.randn(rows, dtype=outside, device=device)
        order = torch.randperm((blocks - 1) * spec.block_size, device=device)
        self.slots = order[: count * job.num_tokens].view(count, job.num_tokens)
        one = torch.ones(1, device=device) if spec.kv_scale is not KVScale.NONE else None
        self.scales = [one, one]
        self.turns: tuple[torch.Tensor, ...] = ()
        if spec.rope is not Rope.NONE:
            positions = torch.randint(0, 8192, (job.num_tokens,), device=device)
            self.turns = (positions, torch.rand(8192, spec.head_dim, device=device))

    def ours(self, library: Library, turn: int) -> None:
        """A call of the library's operator."""
        call = library.write_kv if self.spec.op is Op.WRITE_KV else library.gather
        (rows_k, rows_v), (k, v), (k_scale, v_scale) = self.rows[turn], self.pools, self.scales
        call(rows_k, rows_v, self.slots[turn], k, v, k_scale, v_scale, 0, *self.turns)

    def torchs(self, turn: int) -> None:
        """The same by torch's operators."""
        fp8 = self.pools[0].dtype if self.scales[0] is not None else None
        for pool, rows, scale in zip(self.raw, self.rows[turn], self.scales, strict=True):
            if self.spec.op is Op.WRITE_KV:
                turned = self._turned(rows) if self.turns and pool is self.raw[0] else rows
                store(pool, turned, self.slots[turn], scale, fp8)
                continue
            size = self.spec.block_size
            found = pool[self.slots[turn] // size, self.slots[turn] % size]
            if fp8 is not None and scale is not None:
                found = found.view(fp8).float() * scale
            rows.copy_(found)

    def _turned(self, k: torch.Tensor) -> torch.Tensor:
        """Rotary position embedding, as models write it (NeoX)."""
        positions, cos_sin = self.turns
        cos, sin = cos_sin[positions][:, None].tensor_split(2, dim=-1)
        one, other = k.float().tensor_split(2, dim=-1)
        return torch.cat((one * cos - other * sin, other * cos + one * sin), -1)


class Unset:
    """What kv_scales takes: scales that stay unset, so that every call reads all: no element is finite."""

    def __init__(self, job: Job, count: int, device: str = "cuda") -> None:
        spec = job.spec
        rows = (count, 2, job.num_tokens, spec.num_kv_heads, spec.head_dim)
        self.rows = torch.full(rows, float("inf"), dtype=TORCH_DTYPES[spec.q_dtype], device=device)
        self.slots = torch.arange(job.num_tokens, device=device)
        size = spec.num_kv_heads if spec.kv_scale is KVScale.HEAD else 1
        self.scales = [torch.zeros(size, device=device) for _ in range(2)]
        self.fp8 = TORCH_DTYPES[spec.kv_dtype]

    def ours(self, library: Library, turn: int) -> None:
        """A call of the library's operator."""
        new_k, new_v = self.rows[turn]
        library.kv_scales(new_k, new_v, self.slots, *self.scales, 0)

    def torchs(self, turn: int) -> None:
        """The same by torch's operators."""
        for rows, scale in zip(self.rows[turn], self.scales, strict=True):
            set_scales(rows, self.slots, scale, self.fp8)


class Parts:
    """What merge takes: outputs of parts and their LSEs."""

    def __init__(self, job: Job, count: int, device: str = "cuda") -> None:
        spec = job.spec
        rows = (job.num_tokens, spec.num_q_heads)
        kind = TORCH_DTYPES[spec.q_dtype]
        self.outs = torch.randn(count, NUM_PARTS, *rows, spec.head_dim, device=device).to(kind)
        self.lses = torch.randn(count, NUM_PARTS, *rows, device=device)
        self.out = torch.zeros(count, *rows, spec.head_dim, dtype=kind, device=device)
        self.lse = torch.zeros(count, *rows, device=device)

    def ours(self, library: Library, turn: int) -> None:
        """A call of the library's operator."""
        library.merge(self.outs[turn], self.lses[turn], self.out[turn], self.lse[turn], 0)

    def torchs(self, turn: int) -> None:
        """The same by torch's operators."""
        out, lse = merge(self.outs[turn], self.lses[turn])
        self.out[turn].copy_(out)
        self.lse[turn].copy_(lse)


class Swaps:
    """Blocks of all layers that go to pinned host memory, or come from there; ids at random on the device."""

    def __init__(self, job: Job, count: int, device: str = "cuda") -> None:
        spec = job.spec
        num = -(-job.num_tokens // spec.block_size)
        words = spec.block_size * spec.num_kv_heads * spec.head_dim * spec.kv_dtype.size // 8
        self.way, pinned = job.swap, device == "cuda"
        self.here = torch.zeros(2 * job.num_layers, 2 * num * count, words, dtype=torch.int64, device=device)
        # A turn's in one piece: torch copies no others to pinned memory while a graph is captured.
        shape = (count, 2 * job.num_layers, num, words)
        self.there = torch.zeros(shape, dtype=torch.int64, pin_memory=pinned)
        self.flat = torch.zeros(count, self.there[0].numel(), dtype=torch.int64, pin_memory=pinned)
        self.flat_here = torch.zeros(self.flat.shape, dtype=torch.int64, device=device)
        here = BlockPools.stacked(self.here)
        there = [BlockPools.stacked(pools, device) for pools in self.there]
        self.ways = [(here, pools) if self.way == "out" else (pools, here) for pools in there]
        blocks = torch.randperm(2 * num * count, device=device)[: num * count].view(count, num)
        places = torch.arange(num, device=device).expand(count, num)
        ids = (blocks, places) if self.way == "out" else (places, blocks)
        self.pairs = torch.stack(ids, dim=2).contiguous()
        self.blocks = blocks

    def ours(self, library: Library, turn: int) -> None:
        """A call of the library's operator: the kernel reaches host memory by itself."""
        src, dst = self.ways[turn]
        library.copy_blocks(src.origin, dst.origin, src.table, dst.table, self.pairs[turn], max(src.pages), 0)

    def torchs(self, turn: int) -> None:
        """The same by torch's operators: through a staging buffer on the device."""
        theirs = self.there[turn]
        if self.way == "out":
            theirs.copy_(self.here.index_select(1, self.blocks[turn]), non_blocking=True)
        else:
            self.here.index_copy_(1, self.blocks[turn], theirs.to(self.here.device, non_blocking=True))

    def plain(self, turn: int) -> None:
        """As many bytes in one piece: one cudaMemcpyAsync."""
        flat, here = self.flat[turn], self.flat_here[turn]
        (flat if self.way == "out" else here).copy_(here if self.way == "out" else flat, non_blocking=True)


class Blocks:
    """What copy_blocks takes: pools of K and V of all layers, and pairs of blocks, none twice, at random."""

    def __init__(self, job: Job, count: int, device: str = "cuda") -> None:
        spec = job.spec
        pairs = -(-job.num_tokens // spec.block_size)
        page = spec.block_size * spec.num_kv_heads * spec.head_dim * spec.kv_dtype.size
        shape = (2 * job.num_layers, 2 * pairs * count, page // 8)
        self.blocks = torch.zeros(shape, dtype=torch.int64, device=device)
        self.pools = BlockPools.stacked(self.blocks)
        self.pairs = torch.randperm(shape[1], device=device).view(count, pairs, 2)

    def ours(self, library: Library, turn: int) -> None:
        """A call of the library's operator."""
        pools = self.pools
        library.copy_blocks(
            pools.origin, pools.origin, pools.table, pools.table, self.pairs[turn], max(pools.pages), 0
        )

    def torchs(self, turn: int) -> None:
        """The same by torch's operators."""
        source, into = self.pairs[turn].unbind(1)
        self.blocks.index_copy_(1, into, self.blocks.index_select(1, source))


def copy_gbs() -> float:
    """torch's copy of :data:`COPY_BYTES` on the device, bytes read and written: GB/s."""
    if not _copied:
        _copied.extend(torch.zeros(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(3):
        _copied[1].copy_(_copied[0])
    end.record()
    end.synchronize()
    return 3 * 2 * COPY_BYTES / float(begin.elapsed_time(end)) / 1e6


_copied: list[torch.Tensor] = []


def arguments(job: Job) -> type[Rows] | type[Unset] | type[Parts] | type[Swaps] | type[Blocks]:
    """What makes the arguments of a case's operator."""
    if job.swap:
        return Swaps
    kinds: dict[Op, type[Unset] | type[Parts] | type[Blocks]] = {
        Op.COPY_BLOCKS: Blocks, Op.KV_SCALES: Unset, Op.MERGE: Parts
    }  # fmt: skip
    return kinds.get(job.spec.op, Rows)


def candidates(job: Job, target: Target) -> tuple[Schedule, ...]:
    """The schedules that a case times beside its pick; of copies, those by PDL where there is that."""
    if not job.every_schedule:
        return ()
    found = feasible(job.spec, target)
    most = max(by_pdl(schedule) for schedule in found)
    return tuple(schedule for schedule in found if by_pdl(schedule) == most)


def by_pdl(schedule: Schedule) -> bool:
    """Whether a kernel is launched while the one before it drains."""
    return dict(schedule.choices).get("pdl") == 1


def run(output: Output) -> Report:
    """All cases that are wanted, on the first GPU.

    Raises:
        DeviceMissing: there is none.
    """
    target = gpu_target()
    if not device_of(target).present:
        raise DeviceMissing("move-gpu: a CUDA GPU is needed")
    todo = output.chosen(jobs())
    draft = Draft("move-gpu", target, len(todo), output)
    with tempfile.TemporaryDirectory(prefix="pagedgen-bench-") as folder, Workshop(target) as shop:
        kernels = dict.fromkeys(
            (job.spec, schedule)
            for job in todo
            for schedule in (pick(job.spec, target, job.workload).schedule, *candidates(job, target))
        )
        output.note(f"move-gpu: compiling and proving {len(kernels)} kernels")
        list(compile_all([render(s, target, schedule) for s, schedule in kernels], shop.pool, BinaryCache()))
        prove_all(kernels, target, "cuda", Path(folder))
        for number, job in enumerate(todo, 1):
            case = _case(job, target, Path(folder), shop)
            draft.add(case)
            summaries = case.summaries()
            times = [f"{s.median_us:,.1f} us ({s.roofline_share:.0%})" for s in summaries[:1]]
            best = min((s for s in summaries if s.samples_us), key=lambda s: s.median_us, default=None)
            best_is = "" if best is None else f"; best {best.contender}: {best.median_us:,.1f} us"
            output.note(
                f"move-gpu {number}/{len(todo)}: {job.name}: {summaries[0].failure or times[0]}{best_is}"
            )
    return draft.finish((NOTE, SWAP_NOTE))


def _case(job: Job, target: Target, folder: Path, shop: Workshop) -> Case:
    bandwidths: Sequence[float] = ()
    try:
        rows, bandwidths = shop.worker.call(_contest, job, target, folder, timeout_s=2 * MEASURE_S)
    except PagedgenError as error:
        shop.worker.kill()  # whatever it was, the next case gets a clean CUDA context
        rows = (Row("pagedgen", (), job.num_bytes, "", f"{type(error).__name__}: {error}"),)
    return Case(job.name, job.spec, job.workload, rows, tuple(bandwidths))


def _contest(job: Job, target: Target, folder: Path) -> tuple[tuple[Row, ...], tuple[float, ...]]:
    """One case, in the worker."""
    count = min(MAX_CALLS, math.ceil(ROTATION * last_level_cache_bytes("cuda") / job.num_bytes))
    given = arguments(job)(job, count)
    turns = Turns(count)
    if isinstance(given, Swaps):
        plain_copy: Callable[[int], None] = given.plain
    else:
        flat = torch.zeros(2, count, job.num_bytes // 2, dtype=torch.uint8, device="cuda")

        def plain_copy(turn: int) -> None:
            flat[0, turn].copy_(flat[1, turn])

    chosen = pick(job.spec, target, job.workload)
    contenders, failed = [], []
    for schedule in dict.fromkeys((chosen.schedule, *candidates(job, target))):
        first = schedule == chosen.schedule
        name = "pagedgen" if first else f"{schedule['tile_m']} rows, {schedule['num_warps']} warps"
        detail = f"{chosen.origin if first else 'candidate'}: {schedule.name}"
        try:
            call = partial(given.ours, _library(job.spec, target, schedule, folder))
        except PagedgenError as error:
            if first:
                raise
            failed.append(Row(name, (), job.num_bytes, detail, f"{type(error).__name__}: {error}"))
            continue
        contenders.append(Contender(name, Clock(call, turns, "cuda"), job.num_bytes, detail))
    for name, torchs in (("torch's copy_ of as much", plain_copy), ("torch's operators", given.torchs)):
        contenders.append(Contender(name, Clock(torchs, turns, "cuda"), job.num_bytes))
    rows, bandwidths = contest(contenders, ROUNDS, copy_gbs)
    return (*rows, *failed), bandwidths


_loaded: dict[Path, Library] = {}


def _library(spec: KernelSpec, target: Target, schedule: Schedule, folder: Path) -> Library:
    """A library of one schedule that has passed the gate; loaded once, for all cases."""
    path, verdict = proved(spec, target, schedule, "cuda", folder)
    Verified(0, schedule, verdict)
    if path not in _loaded:
        _loaded[path] = Library(path)
    return _loaded[path]
