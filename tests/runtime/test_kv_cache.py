"""Pools in every layout: writes land where kernels read, copies and swaps move whole blocks of all layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pagedgen
from pagedgen.compiler.build import build
from pagedgen.errors import InvalidPool
from pagedgen.runtime.kv_cache import KVCache, KVShape, runs
from pagedgen.runtime.kv_layout import KVLayout
from pagedgen.values.spec import DType, KInner, KVScale

LAYOUTS = list(KVLayout)


def filled(
    shape: KVShape, num_blocks: int = 7, **options: object
) -> tuple[KVCache, torch.Tensor, torch.Tensor]:
    """A cache whose every slot was written, and what was written: [layers, slots, heads, dim]."""
    cache = KVCache(shape, num_blocks, **options)  # type: ignore[arg-type]
    slots = torch.randperm(num_blocks * shape.block_size)
    size = (shape.num_layers, slots.numel(), shape.num_kv_heads, shape.head_dim)
    k, v = torch.randn(size).half().float(), torch.randn(size).half().float()
    for layer in range(shape.num_layers):
        cache.write_kv(layer, k[layer, slots], v[layer, slots], slots)
    return cache, k, v


def stored(cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
    """All slots as the kernels' view has them, dequantised: [layers, slots, heads, dim]."""
    out = []
    for views, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        layers = torch.stack([view.flatten(0, 1).float() for view in views])
        out.append(layers if scale is None else layers * scale[:, None, :, None])
    return out[0], out[1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [DType.F32, DType.F16])
@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_what_is_written_is_what_kernels_see(layout: KVLayout, dtype: DType, block_size: int) -> None:
    cache, k, v = filled(KVShape(2, 3, 8, block_size, dtype, layout=layout))
    assert cache.k[0].shape == cache.v[1].shape == (7, block_size, 3, 8)
    inner = 1 if layout is KVLayout.KTOKEN else 3
    assert cache.k[0].stride(inner) == 1 and cache.v[0].stride(3) == 1
    assert layout.k_inner is (KInner.TOKEN if inner == 1 else KInner.DIM)
    got_k, got_v = stored(cache)
    assert torch.equal(got_k, k) and torch.equal(got_v, v)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [DType.FP8_E4M3, DType.FP8_E5M2])
@pytest.mark.parametrize("scale", [KVScale.TENSOR, KVScale.HEAD])
def test_fp8_pools_scale_and_saturate(layout: KVLayout, dtype: DType, scale: KVScale) -> None:
    columns = 3 if scale is KVScale.HEAD else 1
    k_scale = torch.rand(2, columns) + 0.5
    cache, k, v = filled(KVShape(2, 3, 8, 4, dtype, scale, layout), k_scale=k_scale, v_scale=2 * k_scale)
    got_k, got_v = stored(cache)
    step = 2.0**-4 if dtype is DType.FP8_E4M3 else 2.0**-3  # half a unit in the last place
    for got, want in ((got_k, k), (got_v, v)):
        assert ((got - want).abs() <= step * want.abs() + 0.02).all()
        assert not torch.equal(got, want)
    huge = torch.full((1, 3, 8), 1e6)
    cache.write_kv(0, huge, -huge, torch.tensor([0]))
    most = torch.finfo(cache.k[0].dtype).max
    assert (cache.k[0][0, 0].float() == most).all() and (cache.v[0][0, 0].float() == -most).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_slots_change_nothing(layout: KVLayout) -> None:
    cache, k, v = filled(KVShape(1, 2, 8, 4, DType.F16, layout=layout))
    new = torch.ones(3, 2, 8)
    cache.write_kv(0, new, new, torch.tensor([-1, 9, -1]))
    k[0, 9], v[0, 9] = 1, 1
    got_k, got_v = stored(cache)
    assert torch.equal(got_k, k) and torch.equal(got_v, v)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [DType.F16, DType.FP8_E4M3])
def test_copies_move_whole_blocks_of_all_layers(layout: KVLayout, dtype: DType) -> None:
    scale = KVScale.TENSOR if dtype.is_fp8 else KVScale.NONE
    cache, _, _ = filled(KVShape(3, 1, 5, 3, dtype, scale, layout))  # an odd page: moved byte by byte
    before_k, before_v = stored(cache)
    want_k, want_v = before_k.clone(), before_v.clone()
    for source, destination in ((0, 4), (0, 5), (6, 1)):
        for want, before in ((want_k, before_k), (want_v, before_v)):
            want[:, destination * 3 : destination * 3 + 3] = before[:, source * 3 : source * 3 + 3]
    cache.copy_blocks(np.array([[0, 4], [0, 5], [6, 1]], np.int32))
    got_k, got_v = stored(cache)
    assert torch.equal(got_k, want_k) and torch.equal(got_v, want_v)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_swapped_blocks_come_back_elsewhere(layout: KVLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, k, v = filled(KVShape(2, 2, 8, 4, DType.F16, layout=layout), num_host_blocks=5)
    monkeypatch.setattr("pagedgen.runtime.kv_cache.STAGING_BYTES", 2 * cache.shape.block_bytes)
    cache.swap_out(np.array([[2, 0], [3, 1], [5, 4]], np.int32))
    cache.storage.zero_()
    cache.swap_in(np.array([[4, 0], [0, 1], [1, 6]], np.int32))
    got_k, got_v = stored(cache)
    for host, device in ((5, 0), (2, 1), (3, 6)):
        assert torch.equal(got_k[:, device * 4 : device * 4 + 4], k[:, host * 4 : host * 4 + 4])
        assert torch.equal(got_v[:, device * 4 : device * 4 + 4], v[:, host * 4 : host * 4 + 4])


def test_nhd_pool_is_token_slots() -> None:
    cache, k, v = filled(KVShape(2, 2, 8, 4, DType.F16))
    slots_k, slots_v = cache.slots(1)
    assert slots_k.data_ptr() == cache.k[1].data_ptr()
    assert torch.equal(slots_k.float(), k[1]) and torch.equal(slots_v.float(), v[1])
    with pytest.raises(InvalidPool, match="layout"):
        KVCache(KVShape(2, 2, 8, 4, layout=KVLayout.HND), 3).slots(0)


def test_packed_blocks_are_vllm_pages() -> None:
    cache = KVCache(KVShape(1, 2, 8, 4, DType.F16, layout=KVLayout.PACKED), 3)
    pages = cache.storage.view(torch.float16)[0, 0, :3].view(3, 2, 4, 16)  # block, head, token, K then V
    cache.write_kv(0, torch.full((1, 2, 8), 2.0), torch.full((1, 2, 8), 3.0), torch.tensor([6]))
    assert (pages[1, :, 2, :8] == 2).all() and (pages[1, :, 2, 8:] == 3).all()
    assert pages.sum() == 2 * 8 * 5


def test_sizing() -> None:
    shape = KVShape(32, 8, 128, 16, DType.FP8_E4M3, KVScale.TENSOR)
    assert shape.block_bytes == 32 * 2 * 16 * 8 * 128
    assert shape.num_blocks(11 * shape.block_bytes + 5) == 10
    assert shape.num_blocks_of_free(0.5, torch.device("cpu")) > 1
    small = KVShape(1, 1, 8)
    cache = KVCache(small, small.num_blocks(10 * small.block_bytes))
    assert cache.storage.nbytes == 10 * small.block_bytes
    for call, field in (
        (lambda: shape.num_blocks(shape.block_bytes), "budget_bytes"),
        (lambda: shape.num_blocks_of_free(1.5, torch.device("cpu")), "fraction"),
        (lambda: KVCache(small, 0), "num_blocks"),
        (lambda: KVShape(1, 1, 0), "head_dim"),
        (lambda: KVShape(1, 1, 8, dtype=DType.FP8_E4M3), "kv_scale"),
        (lambda: KVShape(1, 1, 8, kv_scale=KVScale.HEAD), "kv_scale"),
        (lambda: KVCache(small, 2, k_scale=torch.ones(1, 1)), "k_scale"),
    ):
        with pytest.raises(InvalidPool, match=field):
            call()


def test_runs() -> None:
    assert runs(np.array([], np.int32)) == []
    assert runs(np.array([4, 5, 6, 2, 9, 10], np.int32)) == [(0, 3), (3, 4), (4, 6)]


@pytest.mark.parametrize("kv", ["bf16", "fp8_e4m3"])
def test_a_packs_kernel_writes_the_bytes_that_torch_does(kv, cpu_choice, make_spec, tmp_path):
    scale = KVScale.HEAD if kv == "fp8_e4m3" else KVScale.NONE
    shape = KVShape(2, 3, 64, 16, DType(kv), scale, KVLayout.KTOKEN)
    spec = make_spec(64, (3, 3), 16, "bf16", kv, scale="head", k_inner="token", op="write_kv")
    attention = pagedgen.load(build([cpu_choice(spec)], tmp_path / "write.pack"))
    scales = {}
    if scale is KVScale.HEAD:
        scales = {name: torch.rand(2, 3) + 0.5 for name in ("k_scale", "v_scale")}
    ours, plain = KVCache(shape, 9, attention=attention, **scales), KVCache(shape, 9, **scales)
    new = 100 * torch.randn(2, 50, 3, 64, dtype=torch.bfloat16)
    slots = torch.randperm(9 * 16)[:50]
    slots[::7] = -1
    assert ours.writer(new[0], new[1]) == spec
    for cache in (ours, plain):
        for layer in range(2):
            cache.write_kv(layer, new[0], new[1], slots)
    assert plain.storage[:, :, :-1].any()
    assert torch.equal(ours.storage[:, :, :-1], plain.storage[:, :, :-1])  # all but the spare block
