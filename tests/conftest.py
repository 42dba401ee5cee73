"""Targets and specs that many tests use."""

from __future__ import annotations

import pytest

from pagedgen.values.spec import DType, KernelSpec, KInner, KVScale, Op
from pagedgen.values.target import Target


@pytest.fixture(scope="session")
def h100() -> Target:
    """A Hopper target with the figures of an H100 SXM."""
    return Target(
        "h100-sxm",
        "cuda",
        "sm_90",
        132,
        232448,
        233472,
        65536,
        2048,
        50 << 20,
        80 << 30,
        3352.0,
        989.0,
        1979.0,
        True,
    )


@pytest.fixture(scope="session")
def a100() -> Target:
    """An Ampere target with the figures of an A100 80 GB."""
    return Target(
        "a100-80g", "cuda", "sm_80", 108, 166912, 167936, 65536, 2048, 40 << 20, 80 << 30, 2039.0, 312.0
    )


def make_spec(
    head_dim: int = 128,
    heads: tuple[int, int] = (32, 8),
    block_size: int = 16,
    q: str = "f16",
    kv: str | None = None,
    *,
    scale: str = "tensor",
    lse: bool = False,
    k_inner: str = "dim",
) -> KernelSpec:
    """A decode spec in one line."""
    kv_dtype = DType(kv or q)
    kv_scale = KVScale(scale) if kv_dtype.is_fp8 else KVScale.NONE
    return KernelSpec(
        Op.DECODE, head_dim, *heads, block_size, DType(q), kv_dtype, kv_scale, KInner(k_inner), lse
    )


@pytest.fixture(scope="session", name="make_spec")
def _make_spec():
    return make_spec
