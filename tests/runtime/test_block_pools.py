"""Tables of pools: what they say of memory, and what is no pool of blocks."""

from __future__ import annotations

import pytest
import torch

from pagedgen.errors import ArgumentError
from pagedgen.runtime.block_pools import BlockPools
from pagedgen.runtime.kv_cache import KVCache, KVShape
from pagedgen.runtime.kv_layout import KVLayout


def test_a_table_says_where_blocks_lie():
    """Pools of any order of axes; K and V of one layer beside each other."""
    own = torch.zeros(5, 16, 2, 64, dtype=torch.float16)
    heads_first = torch.zeros(7, 2, 16, 64, dtype=torch.float16).transpose(1, 2)
    both = torch.zeros(6, 2, 16, 2, 8, dtype=torch.float16)
    pools = BlockPools.of([own, heads_first, both[:, 0], both[:, 1]])
    page, small = 16 * 2 * 64 * 2, 16 * 2 * 8 * 2
    assert pools.table.tolist() == [
        [0, page, page],
        [heads_first.data_ptr() - own.data_ptr(), page, page],
        [both.data_ptr() - own.data_ptr(), 2 * small, small],
        [both.data_ptr() - own.data_ptr() + small, 2 * small, small],
    ]
    assert pools.origin == own.data_ptr()
    assert (pools.pages, pools.num_blocks, pools.align) == ((page, page, small, small), 5, 16)
    assert BlockPools.of([torch.zeros(3, 1, 5, 8, dtype=torch.uint8)]).align == 8


@pytest.mark.parametrize("layout", list(KVLayout))
def test_a_caches_table_is_that_of_its_planes(layout):
    cache = KVCache(KVShape(3, 2, 8, 4, layout=layout), 6)
    planes = BlockPools.of([plane for layer in cache.storage for plane in layer])
    assert torch.equal(cache.pools.table, planes.table)
    assert (cache.pools.pages, cache.pools.num_blocks, cache.pools.align) == (planes.pages, 7, planes.align)


def test_what_is_no_pool_of_blocks():
    both = torch.zeros(6, 16, 2, 16)
    for tensors, text in (
        ([], "pools: at least one tensor is expected"),
        (
            [torch.zeros(4)],
            r"pools\[0\]: shape \[4\], strides \[1\]: \[num_blocks, …\] with each block in one piece",
        ),
        ([both, both[..., :8]], r"pools\[1\]: shape \[6, 16, 2, 8\], strides \[512, 32, 16, 1\]"),
        ([both[:1].expand(6, -1, -1, -1)], r"pools\[0\]: .* strides \[0, 32, 16, 1\]"),
        ([both, torch.zeros(6, 8, device="meta")], r"pools\[1\]\.device = meta: cpu is expected"),
    ):
        with pytest.raises(ArgumentError, match=text):
            BlockPools.of(tensors)
