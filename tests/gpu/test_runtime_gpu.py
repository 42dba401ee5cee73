"""KV cache and block-table mirror on a real GPU: overlapped swaps, captured writes, changed entries only."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pagedgen.runtime import ops
from pagedgen.runtime.block_manager import BlockManager
from pagedgen.runtime.device_table import DeviceTable
from pagedgen.runtime.kv_cache import KVCache, KVShape
from pagedgen.runtime.kv_layout import KVLayout
from pagedgen.values.spec import DType, KVScale

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="no CUDA GPU"),
]


@pytest.mark.parametrize("layout", list(KVLayout))
@pytest.mark.parametrize("dtype", [DType.BF16, DType.FP8_E4M3])
def test_gpu_and_cpu_store_the_same_bytes(layout: KVLayout, dtype: DType) -> None:
    scale = KVScale.HEAD if dtype.is_fp8 else KVScale.NONE
    shape = KVShape(2, 4, 64, 16, dtype, scale, layout)
    caches = [KVCache(shape, 9, device) for device in ("cpu", "cuda")]
    k, v = torch.randn(40, 4, 64), torch.randn(40, 4, 64)
    slots = torch.randperm(9 * 16)[:40]
    slots[::7] = -1
    for cache in caches:
        for layer in range(2):
            cache.write_kv(layer, k.to(cache.device), v.to(cache.device), slots.to(cache.device))
        cache.copy_blocks(np.array([[0, 8], [1, 7]], np.int32))
    assert torch.equal(caches[0].storage[:, :, :9], caches[1].storage[:, :, :9].cpu())


def test_swaps_overlap_with_later_writes_and_lose_nothing() -> None:
    """Blocks that left are overwritten at once, while they may still be on their way to the host."""
    shape = KVShape(16, 8, 128, 16, DType.F16)  # 2 MiB a block
    cache = KVCache(shape, 512, "cuda", num_host_blocks=300)
    content = torch.randint(0, 255, cache.storage.shape, dtype=torch.uint8, device="cuda")
    cache.storage.copy_(content)
    rng = np.random.default_rng(0)
    for _ in range(4):
        gone = rng.permutation(512)[:256].astype(np.int32)
        host = np.sort(rng.permutation(300)[:256]).astype(np.int32)
        cache.swap_out(np.stack((gone, host), axis=1))
        cache.storage[:, :, torch.from_numpy(gone).cuda().long()] = 7
        cache.swap_in(np.stack((host, gone), axis=1))
        assert torch.equal(cache.storage[:, :, :512], content[:, :, :512])


def test_captured_writes_take_padding_and_new_slots() -> None:
    cache = KVCache(KVShape(1, 2, 64, 16, DType.F16), 8, "cuda")
    k = torch.ones(4, 2, 64, dtype=torch.float16, device="cuda")
    slots = torch.tensor([0, -1, 17, 33], device="cuda")
    ops.store_kv(cache, 0, k, k, slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.store_kv(cache, 0, k, k, slots)
    cache.storage.zero_()
    slots.copy_(torch.tensor([-1, 5, -1, 127], device="cuda"))
    graph.replay()
    written = cache.k[0].flatten(0, 1).float().sum((1, 2)).nonzero().flatten()
    assert written.tolist() == [5, 127]


def test_the_mirror_follows_the_table() -> None:
    manager = BlockManager(400, max_num_seqs=8, max_seq_len=1024)
    seqs = [manager.allocate(np.arange(100 + i)).seq for i in range(4)]
    mirror = DeviceTable(manager, "cuda")
    address = mirror.tensor.data_ptr()
    for step in range(100):
        if step == 50:
            manager.free(seqs.pop(1))
            seqs.append(manager.allocate(np.arange(77)).seq)
        manager.append_step(seqs, np.full(len(seqs), step))
        manager.take_copies()
        mirror.flush()
        for seq in seqs:
            blocks = manager.blocks(seq)
            assert (mirror.tensor[manager.seqs.row(seq), : blocks.size].cpu().numpy() == blocks).all()
    assert mirror.tensor.data_ptr() == address
