"""Packs of the whole grid on a real GPU, eager and captured; and A100 code through the driver's JIT."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from pagedgen import load
from pagedgen.compiler.build import Choice, build
from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.render import render
from pagedgen.compiler.space import default_schedule
from pagedgen.compiler.verify import gate
from pagedgen.values.manifest import Rule
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target import Target
from pagedgen.values.target_table import target

from .decode_grid import grid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (docs/gpu_tests.md)"),
]
SPECS = grid()
EVERYTHING = (Rule(1 << 30, 1 << 30, 0),)


def test_grid_is_large_enough():
    assert len(SPECS) >= 60


def build_one(job: tuple[KernelSpec, Target, str, Path]) -> None:
    spec, to, embed, out = job
    binary = compile_source(render(spec, to, default_schedule(spec, to)))
    build([Choice((binary,), EVERYTHING, ())], out, embed=embed)


@pytest.fixture(scope="session")
def packs(request, tmp_path_factory) -> Callable[[str, str], dict[KernelSpec, Path]]:
    """Packs of the selected tests' specs for a target, built in parallel once a session."""
    wanted = {i.callspec.params.get("spec") for i in request.session.items if hasattr(i, "callspec")}
    made: dict[tuple[str, str], dict[KernelSpec, Path]] = {}

    def make(name: str, embed: str) -> dict[KernelSpec, Path]:
        if (name, embed) not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{embed}")
            paths = {spec: folder / f"{spec.name}.pack" for spec in SPECS if spec in wanted}
            jobs = [(spec, target(name), embed, path) for spec, path in paths.items()]
            with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
                list(pool.map(build_one, jobs))
            made[name, embed] = paths
        return made[name, embed]

    return make


def captured(call: Callable[[], None]) -> Callable[[], None]:
    """The same call, captured in a CUDA graph and replayed."""

    def replay() -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        torch.cuda.synchronize()

    return replay


@pytest.mark.parametrize("way", ["eager", "captured"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_pack_passes_the_gate(packs, spec, way):
    here = torch.cuda.get_device_capability()
    name = {(8, 0): "a100", (8, 9): "l40s", (9, 0): "h100", (10, 0): "b200"}[here]
    attention = load(packs(name, "cubin")[spec])
    attention.prepare(0)
    verdict = gate(
        attention.kernel(spec).library,
        spec,
        -1,
        "cuda",
        int(time.time()),
        wrap=captured if way == "captured" else None,
    )
    assert verdict.passed, verdict


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs sm_80 or newer",
)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a100_code_passes_the_gate_through_the_drivers_jit(packs, spec):
    """PTX for sm_80, FP8 decoded from bytes included, compiled by the driver for the GPU at hand."""
    attention = load(packs("a100", "ptx")[spec])
    verdict = gate(attention.kernel(spec).library, spec, -1, "cuda", int(time.time()))
    assert verdict.passed, verdict


def test_workload_of_more_than_two_gib_of_elements():
    """Offsets are 64-bit where a pool passes 2^31 elements."""
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    spec = replace(SPECS[0], block_size=16)
    to = target({(8, 0): "a100", (9, 0): "h100"}.get(torch.cuda.get_device_capability(), "h100"))
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        build_one((spec, to, "both", Path(folder) / "big.pack"))
        attention = load(Path(folder) / "big.pack")
        shape = ((1 << 31) // (16 * 8 * 128) + 4096, 16, 8, 128)
        k = torch.randn(shape, dtype=torch.float16, device="cuda")
        v = torch.randn(shape, dtype=torch.float16, device="cuda")
        last = torch.arange(shape[0] - 64, shape[0], dtype=torch.int32, device="cuda")
        q = torch.randn(1, 32, 128, dtype=torch.float16, device="cuda")
        lens = torch.tensor([1024], dtype=torch.int32, device="cuda")
        got = attention.decode(q, k, v, last[None], lens)
        small = torch.arange(64, dtype=torch.int32, device="cuda")[None]
        want = attention.decode(q, k[-64:].clone(), v[-64:].clone(), small, lens)
    assert torch.equal(got, want)
