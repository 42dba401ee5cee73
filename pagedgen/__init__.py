"""pagedgen: generates, verifies, autotunes and packs paged-attention kernels.

``pagedgen.load(path)`` loads a pack and gives an :class:`Attention` to call. The other public names are
imported when first used, so that ``import pagedgen`` costs milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pagedgen.errors import PagedgenError
    from pagedgen.runtime.attention import Attention, load
    from pagedgen.runtime.block_manager import BlockManager
    from pagedgen.runtime.kv_cache import KVCache, KVShape
    from pagedgen.runtime.kv_layout import KVLayout
    from pagedgen.runtime.merge import merge
    from pagedgen.values.schedule import Schedule
    from pagedgen.values.spec import DType, KernelSpec, KInner, KVScale, Op
    from pagedgen.values.target import Target
    from pagedgen.values.workload import Workload

__version__ = "0.1.0"

_PLACES = {
    "Attention": "pagedgen.runtime.attention",
    "BlockManager": "pagedgen.runtime.block_manager",
    "DType": "pagedgen.values.spec",
    "KInner": "pagedgen.values.spec",
    "KVCache": "pagedgen.runtime.kv_cache",
    "KVLayout": "pagedgen.runtime.kv_layout",
    "KVScale": "pagedgen.values.spec",
    "KVShape": "pagedgen.runtime.kv_cache",
    "KernelSpec": "pagedgen.values.spec",
    "Op": "pagedgen.values.spec",
    "PagedgenError": "pagedgen.errors",
    "Schedule": "pagedgen.values.schedule",
    "Target": "pagedgen.values.target",
    "Workload": "pagedgen.values.workload",
    "load": "pagedgen.runtime.attention",
    "merge": "pagedgen.runtime.merge",
}

__all__ = [
    "Attention",
    "BlockManager",
    "DType",
    "KInner",
    "KVCache",
    "KVLayout",
    "KVScale",
    "KVShape",
    "KernelSpec",
    "Op",
    "PagedgenError",
    "Schedule",
    "Target",
    "Workload",
    "__version__",
    "load",
    "merge",
]


def __getattr__(name: str) -> object:
    if name in _PLACES:
        value = getattr(import_module(_PLACES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pagedgen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
