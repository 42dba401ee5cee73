"""A server small enough that a trace runs through it in a moment."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pagedgen.autotune.explore.kernel_time import KernelTime
from pagedgen.autotune.explore.load import Arrivals, Load
from pagedgen.autotune.explore.policies import Policy
from pagedgen.autotune.explore.simulation import Setup
from pagedgen.autotune.explore.step_time import StepTime
from pagedgen.values.model import Model
from pagedgen.values.record import Status
from pagedgen.values.spec import DType, KernelSpec, Op
from pagedgen.values.target_table import target
from pagedgen.values.trace import Request, Trace
from pagedgen.values.weights import Weights

TOKEN_BYTES = 1000  # of KV, all layers
MODEL = Model("small", 4, 256, 8, 2, 64, DType.F16)


def make_trace(
    count: int = 60, prompt: int = 300, output: int = 60, *, prefixes: bool = False, seed: int = 0
) -> Trace:
    """Random lengths around ``prompt`` and ``output``; every second prompt has one of three beginnings."""
    rng = np.random.default_rng(seed)
    requests, own = [], 3
    for i in range(count):
        tokens = int(rng.integers(1, 2 * prompt)) + 512 * prefixes
        ids: tuple[int, ...] = ()
        if prefixes:
            ids = (int(rng.integers(0, 3)) if i % 2 else own, *range(own + 1, own + -(-tokens // 512)))
            own += 10
        requests.append(Request(tokens, int(rng.integers(1, 2 * output)), 0.05 * i, ids, i + 2))
    return Trace("made-up", tuple(requests))


@pytest.fixture
def trace() -> Callable[..., Trace]:
    return make_trace


@pytest.fixture
def step_time() -> Callable[..., StepTime]:
    """Step times of a policy on an H100; the kernel takes 10 µs and 1 µs for each 100 tokens or so."""

    def make(policy: Policy, factors: tuple[tuple[float, float], ...] = ((0.0, 1.0),)) -> StepTime:
        spec = KernelSpec(Op.DECODE, 64, 8, 2, policy.block_size, DType.F16, DType.F16)
        us = tuple(tuple(10 + 2.0**i * 2.0 ** (j + 4) / 100 for j in range(12)) for i in range(8))
        kernel = KernelTime(spec, Status.PREDICTED, "made up", us, factors)
        weights = Weights(dense=50_000_000, head=5_000_000, embedding=5_000_000, bytes_per_param=2)
        return StepTime(kernel, MODEL, weights, target("h100"), TOKEN_BYTES * policy.block_size)

    return make


@pytest.fixture
def setup() -> Callable[..., Setup]:
    """A pool of ``tokens``, 32 sequences at most, 256 tokens a step."""

    def make(requests: Trace, load: Load | None = None, tokens: int = 8192, **more: object) -> Setup:
        return Setup(requests, load or Load(Arrivals.CLOSED, 48), tokens * TOKEN_BYTES, 32, 256, **more)  # type: ignore[arg-type]

    return make
