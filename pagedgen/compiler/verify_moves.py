"""The gate of operators that move K and V, every byte held against torch's own operators, and of merge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from pagedgen.compiler.verify import EPS, POOLS, Pool, empty_pool
from pagedgen.compiler.verify_faults import Outside
from pagedgen.compiler.verify_write import WriteCase
from pagedgen.errors import ArgumentError
from pagedgen.runtime.attention import TORCH_DTYPES
from pagedgen.runtime.block_pools import BlockPools
from pagedgen.runtime.kv_scales import set_scales
from pagedgen.values.record import Verdict
from pagedgen.values.spec import KernelSpec, KVScale, Op

COUNTS = (1, 77, 300)  # tokens, or pairs of blocks: one, an odd number, several programs


class Case(Protocol):
    """Arguments of one call, and what there must be after it."""

    def call(self, callee: Any, variant: int) -> None:
        """Call the operator."""

    def judge(self) -> str:
        """What is wrong, or nothing."""


def gate_move(
    callee: Any,
    spec: KernelSpec,
    variant: int,
    device: torch.device,
    seed: int,
    wrap: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
) -> Verdict:
    """Try one variant on pools of every layout, with slots or blocks out of order."""
    kinds: dict[Op, Callable[..., Case]] = {
        Op.WRITE_KV: WriteCase,
        Op.GATHER: GatherCase,
        Op.COPY_BLOCKS: CopyCase,
        Op.MERGE: MergeCase,
        Op.KV_SCALES: ScalesCase,
    }
    for number, (count, pool) in enumerate(zip(COUNTS, POOLS, strict=True)):
        case = kinds[spec.op](spec, count, pool, device, seed + number)

        def call(case: Case = case) -> None:
            case.call(callee, variant)

        try:
            (wrap(call) if wrap else call)()
        except ArgumentError:
            raise
        except Exception as problem:  # any failure of a candidate is a verdict, not a crash of the search
            return Verdict(False, number + 1, float("inf"), 0.0, seed, f"call failed: {problem}")
        if reason := case.judge():
            where = f"{reason} (case {number}: {count}, pool {pool})"
            return Verdict(False, number + 1, float("inf"), 0.0, seed, where)
    return Verdict(True, len(COUNTS), 0.0, 0.0, seed)


class GatherCase:
    """Tokens from slots out of order, some of them not wanted; outputs are parts of wider tensors of NaN.

    An fp8 pool holds every code, NaN included.
    """

    def __init__(self, spec: KernelSpec, count: int, pool: Pool, device: torch.device, seed: int) -> None:
        make = torch.Generator(device="cpu").manual_seed(seed)
        heads, dim = spec.num_kv_heads, spec.head_dim
        num_blocks = -(-count // spec.block_size) + 3
        kind, is_fp8 = TORCH_DTYPES[spec.kv_dtype], spec.kv_dtype.is_fp8
        slots = torch.randperm(num_blocks * spec.block_size, generator=make)[:count]
        if count > 1:
            slots[::5] = -1
        self.slots = slots.to(device)
        num_slots = num_blocks * spec.block_size
        self.outside = Outside(self.slots, num_slots) if spec.checked else None
        k, v = empty_pool(spec, num_blocks, pool, device)
        for held in (k, v):
            if is_fp8:
                held.copy_(torch.randint(0, 256, held.shape, generator=make, dtype=torch.int32))
            else:
                held.copy_(torch.randn(held.shape, generator=make))
        self.k, self.v = (k.view(kind), v.view(kind)) if is_fp8 else (k, v)
        self.scales: list[torch.Tensor | None] = [None, None]
        if spec.kv_scale is not KVScale.NONE:
            size = heads if spec.kv_scale is KVScale.HEAD else 1
            self.scales = [(torch.rand(size, generator=make) + 0.5).to(device) for _ in range(2)]
        out = TORCH_DTYPES[spec.q_dtype]
        self.outs = []
        for _ in range(2):
            wide = torch.full((count, heads + 2, dim), float("nan"), device=device)
            if out.itemsize == 1:  # casts of NaN may differ
                wide = torch.full(wide.shape, 0x7F, dtype=torch.uint8, device=device).view(out)
            self.outs.append(wide.to(out)[:, :heads])
        kept = (self.slots >= 0) & (self.slots < num_slots)
        blocks = self.slots[kept] // spec.block_size
        places = self.slots[kept] % spec.block_size
        self.expected = []
        for held, scale, into in zip((k, v), self.scales, self.outs, strict=True):
            rows = held[blocks, places]
            if scale is not None:
                rows = (rows.view(kind).float() * scale[:, None]).to(out)
            want = into.clone()
            if is_fp8 and scale is None:
                want.view(torch.uint8)[kept] = rows
            else:
                want[kept] = rows
            self.expected.append(want)

    def call(self, callee: Any, variant: int) -> None:
        """Call the operator."""
        record = [self.outside.record] if self.outside else []
        callee.gather(*self.outs, self.slots, self.k, self.v, *self.scales, variant, *record)

    def judge(self) -> str:
        """What is wrong, or nothing."""
        for name, got, want in zip(("out_k", "out_v"), self.outs, self.expected, strict=True):
            if got.element_size() == 1:
                same = got.contiguous().view(torch.uint8) == want.contiguous().view(torch.uint8)
            else:
                same = (got == want) | (got.isnan() & want.isnan())
            if not bool(same.all()):
                first = (~same).nonzero()[0].tolist()
                return f"{int((~same).sum())} wrong elements of {name}, the first at {first}"
        return self.outside.judge() if self.outside else ""


class CopyCase:
    """Blocks from some pools into others, or into other blocks of the same; sources repeat.

    Pools are K's and V's of several layers, in memory of their own or beside each other in one tensor.
    """

    LAYERS = 3

    def __init__(self, spec: KernelSpec, count: int, pool: Pool, device: torch.device, seed: int) -> None:
        make = torch.Generator(device="cpu").manual_seed(seed)
        rows = spec.block_size * spec.num_kv_heads * spec.kv_dtype.size
        pages = (rows * spec.head_dim, rows * spec.v_dim)
        count = max(1, min(count // 4, (8 << 20) // (sum(pages) * self.LAYERS)))
        num_blocks = 2 * count + 3

        def some_pools(step: int) -> list[torch.Tensor]:
            shape = (num_blocks, sum(pages) + step)
            found: list[torch.Tensor] = []
            for _ in range(self.LAYERS):
                layer = torch.randint(0, 256, shape, generator=make, dtype=torch.uint8).to(device)
                found += [layer[:, : pages[0]], layer[:, pages[0] : sum(pages)]]
            return found if pool != "nhd" else [p.contiguous() for p in found]

        self.pools = some_pools(0)
        self.into = some_pools(64) if pool == "packed" else self.pools
        order = torch.randperm(num_blocks, generator=make)
        source = order[torch.randint(0, max(1, count // 2), (count,), generator=make)]
        self.pairs = torch.stack((source, order[-count:]), dim=1).to(device)
        self.expected = [held.clone() for held in self.into]
        for held, want in zip(self.pools, self.expected, strict=True):
            want[self.pairs[:, 1]] = held[self.pairs[:, 0]]
        self.src, self.dst = BlockPools.of(self.pools), BlockPools.of(self.into)

    def call(self, callee: Any, variant: int) -> None:
        """Call the operator."""
        callee.copy_blocks(
            self.src.origin,
            self.dst.origin,
            self.src.table,
            self.dst.table,
            self.pairs,
            max(self.src.pages),
            variant,
        )

    def judge(self) -> str:
        """What is wrong, or nothing."""
        for number, (got, want) in enumerate(zip(self.into, self.expected, strict=True)):
            if not torch.equal(got, want):
                wrong = (got != want).nonzero()
                return f"{len(wrong)} wrong bytes of pool {number}, the first at {wrong[0].tolist()}"
        return ""


class MergeCase:
    """Parts of random weights, some of them empty and NaN inside, some rows empty in all; against float64."""

    def __init__(self, spec: KernelSpec, count: int, pool: Pool, device: torch.device, seed: int) -> None:
        make = torch.Generator(device="cpu").manual_seed(seed)
        self.spec = spec
        heads, dim, kind = spec.num_q_heads, spec.head_dim, TORCH_DTYPES[spec.q_dtype]
        parts = {"nhd": 1, "hnd": 2, "packed": 7}[pool]
        wide = torch.randn(count, parts, heads + 1, dim, generator=make)
        lses = 4 * torch.randn(parts, count, heads, generator=make) + 100 * torch.randn(
            1, count, heads, generator=make
        )
        lses[torch.rand(lses.shape, generator=make) < 0.2] = float("-inf")
        self.outs = wide.to(kind).to(device).transpose(0, 1)[:, :, :heads]  # tokens before parts in memory
        self.lses = lses.to(device)
        self.outs[self.lses == float("-inf")] = float("nan")
        self.sinks = 100 * torch.randn(heads, generator=make).to(device) if spec.sinks else None
        self.out = torch.full((count, heads, dim), float("nan"), device=device).to(kind)
        self.lse = torch.full((count, heads), float("nan"), device=device)

    def call(self, callee: Any, variant: int) -> None:
        """Call the operator."""
        sinks = () if self.sinks is None else (self.sinks,)
        callee.merge(self.outs, self.lses, self.out, self.lse, variant, *sinks)

    def judge(self) -> str:
        """What is wrong, or nothing."""
        lses = self.lses.double()
        parts = lses if self.sinks is None else torch.cat((lses, self.sinks.double().expand(lses[:1].shape)))
        want = torch.logsumexp(parts, 0)
        weights = torch.where(lses == float("-inf"), 0.0, torch.exp(lses - want))[..., None]
        outs = torch.where(weights == 0, 0.0, self.outs.double())
        total, magnitude = (weights * outs).sum(0), (weights * outs.abs()).sum(0)
        allowed = EPS[self.spec.q_dtype] * total.abs() + 1e-5 * magnitude + 1e-7
        error = (self.out.double() - total).abs()
        if not bool((error <= allowed).all()):  # NaN is not
            worst = float((error / allowed).nan_to_num(float("inf")).max())
            return f"error of out up to {worst:.3g} times what is allowed"
        same = (self.lse == want) | ((self.lse - want).abs() <= 1e-6 * want.abs() + 1e-5)
        return (
            ""
            if bool(same.all())
            else f"lse: {int((~same).sum())} wrong, the first at {(~same).nonzero()[0].tolist()}"
        )


class ScalesCase:
    """Scales all or half of which are unset; padding tokens hold the largest values, others NaN and inf.

    In the first case nothing is kept, or everything is 0: the scale stays unset, or becomes 1. What is right
    is computed on the CPU, whose division rounds correctly whatever it divides by.
    """

    def __init__(self, spec: KernelSpec, count: int, pool: Pool, device: torch.device, seed: int) -> None:
        make = torch.Generator(device="cpu").manual_seed(seed)
        heads, dim = spec.num_kv_heads, spec.head_dim
        both = (
            torch.randn(count, 3 * heads, dim, generator=make)
            * torch.exp2(torch.arange(3.0 * heads) % 8)[:, None]
        )
        self.slots = torch.arange(count).to(device)
        if count == 1:
            self.slots[seed % 2 :] = -1
            both.zero_()
        else:
            self.slots[::5] = -1
            both[::5] *= 1000
            both[1, :, 0], both[2, :, 1] = float("nan"), float("-inf")
        both = both.to(TORCH_DTYPES[spec.q_dtype]).to(device)
        self.new = (both[:, heads : 2 * heads], both[:, 2 * heads :])
        size = heads if spec.kv_scale is KVScale.HEAD else 1
        self.scales = [torch.zeros(size, device=device), torch.full((size,), -1.0, device=device)]
        if pool == "packed":
            self.scales[0][::2] = 0.25
            self.scales[1][1::2] = 7.0
        self.expected = [scale.cpu().clone() for scale in self.scales]
        for new, scale in zip(self.new, self.expected, strict=True):
            set_scales(new.cpu(), self.slots.cpu(), scale, TORCH_DTYPES[spec.kv_dtype])

    def call(self, callee: Any, variant: int) -> None:
        """Call the operator."""
        callee.kv_scales(*self.new, self.slots, *self.scales, variant)

    def judge(self) -> str:
        """What is wrong, or nothing."""
        for name, got, want in zip(("k_scale", "v_scale"), self.scales, self.expected, strict=True):
            if not torch.equal(got.cpu(), want):
                return f"{name} = {got.tolist()[:4]}: {want.tolist()[:4]} is right"
        return ""
