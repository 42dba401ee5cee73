"""Kernels that move K and V on a real GPU: formats, scales and shapes through the gate, and a cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pagedgen
from pagedgen.compiler.build import Choice, build
from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.link import link
from pagedgen.compiler.render import render
from pagedgen.compiler.space import default_schedule, feasible
from pagedgen.compiler.verify import gate
from pagedgen.errors import ArgumentError
from pagedgen.runtime import ops
from pagedgen.runtime.attention import TORCH_DTYPES
from pagedgen.runtime.block_pools import BlockPools
from pagedgen.runtime.kv_cache import KVCache, KVShape
from pagedgen.runtime.kv_layout import KVLayout
from pagedgen.runtime.kv_scales import set_scales
from pagedgen.runtime.library import Library
from pagedgen.values.manifest import Rule
from pagedgen.values.spec import DType, KernelSpec, KVScale, Op, Rope
from pagedgen.values.target_table import target

EVERY_CALL = (Rule(2**31 - 1, 2**31 - 1, 0),)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (docs/gpu_tests.md)"),
]
NAMES = {(8, 0): "a100", (8, 9): "l40s", (9, 0): "h100", (10, 0): "b200"}
F16, BF16, F32, E4M3, E5M2 = DType.F16, DType.BF16, DType.F32, DType.FP8_E4M3, DType.FP8_E5M2
SHAPES = ((128, 8, 16), (80, 3, 1), (256, 1, 64), (40, 32, 544))
CONVERTING = tuple(
    KernelSpec(op, head_dim, heads, heads, block_size, q, kv or q, scale if kv else KVScale.NONE)
    for op in (Op.WRITE_KV, Op.GATHER)
    for head_dim, heads, block_size in SHAPES
    for q, kv, scale in (
        (F16, None, KVScale.NONE),
        (BF16, None, KVScale.NONE),
        (F16, E4M3, KVScale.TENSOR),
        (BF16, E4M3, KVScale.HEAD),
        (BF16, E5M2, KVScale.TENSOR),
        (F32, E5M2, KVScale.HEAD),
    )
)


AS_STORED = tuple(
    KernelSpec(op, head_dim, heads, heads, block_size, kind, kind)
    for op in (Op.GATHER, Op.COPY_BLOCKS)
    for head_dim, heads, block_size in (*SHAPES, (40, 1, 1))
    for kind in (F16, E4M3)
)
TURNING = tuple(
    KernelSpec(Op.WRITE_KV, head_dim, heads, heads, 16, q, kv or q, scale, rope=rope, rotary_dim=rotary_dim)
    for head_dim, heads, rotary_dim in ((128, 8, None), (80, 3, 64), (64, 1, 24))
    for rope in (Rope.NEOX, Rope.GPTJ)
    for q, kv, scale in ((BF16, None, KVScale.NONE), (F16, E4M3, KVScale.TENSOR), (BF16, E5M2, KVScale.HEAD))
)
MERGING = tuple(
    KernelSpec(Op.MERGE, head_dim, heads, heads, 1, q, q, sinks=sinks)
    for head_dim, heads, sinks in ((128, 32, False), (80, 7, True), (256, 1, False))
    for q in (F16, BF16, F32)
)
SCALING = tuple(
    KernelSpec(Op.KV_SCALES, head_dim, heads, heads, 1, q, kv, scale)
    for head_dim, heads in ((128, 8), (80, 3))
    for q, kv, scale in ((BF16, E4M3, KVScale.TENSOR), (F16, E5M2, KVScale.HEAD), (F32, E4M3, KVScale.HEAD))
)
CHECKED = tuple(
    KernelSpec(op, head_dim, heads, heads, block_size, BF16, kv, scale, checked=True)
    for op in (Op.WRITE_KV, Op.GATHER)
    for head_dim, heads, block_size in SHAPES[:2]
    for kv, scale in ((BF16, KVScale.NONE), (E4M3, KVScale.HEAD))
)
SPECS = tuple(dict.fromkeys((*CONVERTING, *AS_STORED, *TURNING, *MERGING, *SCALING, *CHECKED)))


def captured(call):
    """The same call, captured in a CUDA graph and replayed."""

    def replay() -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        torch.cuda.synchronize()

    return replay


@pytest.fixture(scope="module")
def pack_of(tmp_path_factory):
    """A pack of default kernels."""

    def make(*specs):
        to = target(NAMES[torch.cuda.get_device_capability()])
        choices = [
            Choice((compile_source(render(spec, to, default_schedule(spec, to))),), EVERY_CALL, ())
            for spec in specs
        ]
        return pagedgen.load(build(choices, tmp_path_factory.mktemp("packs") / "moves.pack"))

    return make


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_kernels_pass_the_gate(tmp_path, spec):
    to = target(NAMES[torch.cuda.get_device_capability()])
    schedules = (default_schedule(spec, to), feasible(spec, to)[0], feasible(spec, to)[-1])
    library = Library(link([compile_source(render(spec, to, s)) for s in schedules], (), tmp_path / "w.so"))
    library.prepare(0)
    for variant, schedule in enumerate(schedules):
        for wrap in (None, captured):
            verdict = gate(library, spec, variant, "cuda", 3, wrap=wrap)
            assert verdict.passed, (schedule.name, verdict)


@pytest.mark.parametrize("kv", [E4M3, E5M2])
@pytest.mark.parametrize("q", [F16, BF16])
def test_every_value_becomes_the_code_of_its_quotient(pack_of, q, kv):
    """All 65,536 values by scales of every kind: the bytes of a true division, torch's clamp and its cast."""
    pack = pack_of(KernelSpec(Op.WRITE_KV, 128, 8, 8, 16, q, kv, KVScale.TENSOR))
    outside, kind = TORCH_DTYPES[q], TORCH_DTYPES[kv]
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(outside).view(64, 8, 128)
    new, slots = every.cuda(), torch.arange(64, device="cuda")
    most = torch.finfo(kind).max
    make = torch.Generator().manual_seed(1)
    drawn = torch.exp2(60 * torch.rand(40, generator=make) - 30).tolist()
    for value in (1.0, 0.5, 1.25, 1 + 2**-23, 1 - 2**-24, 1 / 448, 3 / 224, 2.0**-126, 2.0**112, *drawn):
        scale = torch.full((1,), value)
        k, v = (torch.zeros(4, 16, 8, 128, dtype=torch.uint8, device="cuda") for _ in range(2))
        pack.write_kv(
            new, new.flip(0), slots, k.view(kind), v.view(kind), k_scale=scale.cuda(), v_scale=scale.cuda()
        )
        want = (every.float() / scale).clamp(-most, most).to(kind).view(torch.uint8)
        for got, right in ((k, want), (v, want.flip(0))):
            got = got.view(64, 8, 128).cpu()
            same = (got == right) | (got & 0x7F == 0x7F) & (right & 0x7F == 0x7F)
            assert same.all(), (value, every[~same][:4], got[~same][:4], right[~same][:4])


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_scales_by_torch_are_divided_as_on_a_cpu(kind):
    """Quotients rounded correctly: times a reciprocal, most of these would be a unit off."""
    new = torch.randn(64, 512, 8, dtype=torch.bfloat16)
    slots, scales = torch.arange(64), (torch.zeros(512), torch.zeros(512, device="cuda"))
    set_scales(new, slots, scales[0], kind)
    set_scales(new.cuda(), slots.cuda(), scales[1], kind)
    assert scales[0].gt(0).all() and torch.equal(scales[0], scales[1].cpu())


@pytest.mark.parametrize("layout", list(KVLayout))
def test_a_cache_with_kernels_holds_what_one_without_holds(pack_of, layout):
    """Copies, swaps that overlap with later writes, gathers; a captured copy, replayed with other pairs."""
    pack = pack_of(
        KernelSpec(Op.COPY_BLOCKS, 128, 8, 8, 16, E4M3, E4M3),
        KernelSpec(Op.GATHER, 128, 8, 8, 16, BF16, E4M3, KVScale.HEAD, layout.k_inner)
        if layout is not KVLayout.KTOKEN
        else KernelSpec(Op.GATHER, 128, 8, 8, 32, E4M3, E4M3),
    )
    shape = KVShape(6, 8, 128, 16, E4M3, KVScale.HEAD, layout)
    scale = torch.rand(6, 8) + 0.5
    plain, cache = (
        KVCache(shape, 400, "cuda", num_host_blocks=300, k_scale=scale, v_scale=scale, attention=attention)
        for attention in (None, pack)
    )
    assert cache.copier is not None and plain.copier is None
    plain.storage.copy_(torch.randint(0, 255, plain.storage.shape, dtype=torch.uint8, device="cuda"))
    cache.storage.copy_(plain.storage)
    rng = np.random.default_rng(0)
    for _ in range(3):
        order = rng.permutation(400).astype(np.int32)
        host = np.sort(rng.permutation(300)[:200]).astype(np.int32)
        for held in (plain, cache):
            held.copy_blocks(np.stack((order[:100], order[200:300]), axis=1))
            held.swap_out(np.stack((order[:200], host), axis=1))
            held.storage[:, :, torch.from_numpy(order[:200]).cuda().long()] = 7
            held.swap_in(np.stack((host[::-1], order[100:300]), axis=1))
        assert torch.equal(plain.storage[:, :, :400], cache.storage[:, :, :400])
    slots = cache.token_slots(order[:20], 311)
    for dtype in (None, torch.bfloat16):
        for got, want in zip(cache.gather(3, slots, dtype), plain.gather(3, slots, dtype), strict=True):
            assert torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))
    pairs = torch.tensor([[0, 1], [2, 3]], device="cuda")
    ops.copy_kv_blocks(cache, pairs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.copy_kv_blocks(cache, pairs)
    cache.storage.copy_(plain.storage)
    pairs.copy_(torch.tensor([[5, 9], [5, 8]]))
    graph.replay()
    plain.copy_blocks(np.array([[5, 9], [5, 8]], np.int32))
    assert torch.equal(plain.storage[:, :, :400], cache.storage[:, :, :400])


def test_blocks_go_to_pinned_memory_and_back(pack_of):
    """The kernel itself reaches host memory: one launch, no staging."""
    pack = pack_of(KernelSpec(Op.COPY_BLOCKS, 128, 8, 8, 16, F16, F16))
    pools = [torch.randn(20, 16, 8, 128, device="cuda").half() for _ in range(6)]
    before = [pool.clone() for pool in pools]
    host = [torch.empty(20, 16, 8, 128, dtype=torch.float16, pin_memory=True) for _ in range(6)]
    here, there = BlockPools.of(pools), BlockPools.of(host, "cuda")
    pairs = torch.tensor([[3, 0], [7, 19], [11, 4]], device="cuda")
    pack.copy_blocks(here, pairs, into=there)
    for pool in pools:
        pool.zero_()
    pack.copy_blocks(there, pairs.flip(1).contiguous(), into=here)
    torch.cuda.synchronize()
    for pool, want in zip(pools, before, strict=True):
        assert torch.equal(pool[[3, 7, 11]], want[[3, 7, 11]]) and not pool[[0, 19, 4]].any()


def test_a_debug_build_reports_slots_out_of_range(pack_of):
    """Eager calls raise; a captured one records, at each replay; what is in range is stored all the same."""
    pack = pack_of(
        KernelSpec(Op.WRITE_KV, 128, 8, 8, 16, BF16, BF16, checked=True),
        KernelSpec(Op.GATHER, 128, 8, 8, 16, BF16, BF16, checked=True),
    )
    new = torch.randn(2, 40, 8, 128, device="cuda").bfloat16()
    k, v = (torch.zeros(4, 16, 8, 128, device="cuda").bfloat16() for _ in range(2))
    right = torch.arange(40, device="cuda")
    slots = right.clone()
    pack.write_kv(new[0], new[1], slots, k, v)
    slots[7] = 64
    with pytest.raises(ArgumentError, match=r"slot_mapping\[7\] = 64: below 0, or up to 63 \(num_blocks"):
        pack.write_kv(new[1], new[0], slots, k, v)
    assert torch.equal(k.view(64, 8, 128)[:7], new[1, :7]) and torch.equal(k.view(64, 8, 128)[7], new[0, 7])
    out = torch.zeros_like(new)
    with pytest.raises(ArgumentError, match=r"slot_mapping\[7\] = 64: "):
        pack.gather(slots, k, v, out[0], out[1])
    assert torch.equal(out[0, 8:], new[1, 8:]) and not out[0, 7].any()
    slots.copy_(right)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pack.write_kv(new[0], new[1], slots, k, v)
    graph.replay()
    pack.check_faults()
    slots[39] = 1 << 40
    graph.replay()
    with pytest.raises(ArgumentError, match=r"slot_mapping\[39\] = 1099511627776: "):
        pack.check_faults()
    slots.copy_(right)
    graph.replay()
    pack.check_faults()
    assert torch.equal(k.view(64, 8, 128)[:40], new[0]) and not k.view(64, 8, 128)[40:].any()


def test_pools_past_2_to_the_31(pack_of):
    """The last blocks of pools of more than 2^31 elements are written, copied and gathered."""
    shape = (140_000, 16, 8, 128)
    pack = pack_of(
        KernelSpec(Op.WRITE_KV, 128, 8, 8, 16, F16, E4M3, KVScale.TENSOR),
        KernelSpec(Op.GATHER, 128, 8, 8, 16, F16, E4M3, KVScale.TENSOR),
        KernelSpec(Op.COPY_BLOCKS, 128, 8, 8, 16, E4M3, E4M3),
    )
    k, v = (torch.zeros(shape, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn) for _ in range(2))
    assert k.numel() > 2**31
    new = (torch.randint(-8, 9, (2, 3, 8, 128), device="cuda") / 4).half()
    last = shape[0] * 16 - 1
    one = torch.ones(1, device="cuda")
    slots = torch.tensor([last, last - 16, 5], device="cuda")
    pack.write_kv(new[0], new[1], slots, k, v, k_scale=one, v_scale=one)
    pairs = torch.tensor([[shape[0] - 1, shape[0] - 3], [shape[0] - 2, 2]], device="cuda")
    pack.copy_blocks(BlockPools.of([k, v]), pairs)
    out_k, out_v = torch.empty_like(new[0]), torch.empty_like(new[1])
    moved = torch.tensor([last - 32, 47, 5], device="cuda")
    pack.gather(moved, k, v, out_k, out_v, k_scale=one, v_scale=one)
    assert torch.equal(out_k, new[0]) and torch.equal(out_v, new[1])
    for pool in (k, v):
        assert int(pool.view(torch.uint8).view(torch.int64).count_nonzero()) <= 5 * 8 * 128 // 8
