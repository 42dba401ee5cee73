"""KV pools in host memory lie in huge pages, where the system has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pagedgen.runtime.huge_pages import use_huge_pages
from pagedgen.runtime.kv_cache import KVCache, KVShape

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MIB = 1 << 20

needs_huge_pages = pytest.mark.skipif(
    not THP.exists() or "[never]" in THP.read_text() or "[always]" in THP.read_text(),
    reason="huge pages are not given to those who ask, or to all",
)


def huge_bytes(memory: torch.Tensor) -> int:
    """Bytes of the mapping around the middle of ``memory`` that lie in huge pages."""
    middle, inside = memory.data_ptr() + memory.numel() * memory.element_size() // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first:
            begin, end = (int(x, 16) for x in first.split("-"))
            inside = begin <= middle < end
        elif inside and first == "AnonHugePages:":
            return int(rest.split()[0]) << 10
    return 0


@needs_huge_pages
@pytest.mark.parametrize("written", [True, False])
def test_a_pool_gets_them_before_and_after_it_is_written(written):
    memory = torch.empty(64 * MIB, dtype=torch.uint8)
    if written:
        memory.fill_(7)
    assert huge_bytes(memory) == 0
    thread = use_huge_pages(memory[5:])  # its storage counts
    assert thread is not None
    thread.join()
    memory[:32] = 7
    memory[MIB:] = 7
    assert huge_bytes(memory) >= 32 * MIB
    assert bool((memory[MIB:] == 7).all())


@needs_huge_pages
def test_a_kv_cache_lies_in_them():
    cache = KVCache(KVShape(2, 8, 64), 512)
    assert huge_bytes(cache.storage) >= cache.storage.numel() // 2
    assert not cache.storage.any()


def test_small_memory_and_none_at_all_stay_as_they_are():
    for size in (0, 1, 4096):
        memory = torch.zeros(size)
        assert use_huge_pages(memory) is None
        assert not memory.any()
