"""Packs of the whole grid on a real GPU, eager and captured; and A100 code through the driver's JIT."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gpu.decode_grid import build_one, specs

from pagedgen import load
from pagedgen.autotune.suites.decode_gpu import grid, spec_of
from pagedgen.compiler.verify import gate
from pagedgen.values.spec import KernelSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (docs/gpu_tests.md)"),
]
SPECS = specs()
NAMES = {(8, 0): "a100", (8, 9): "l40s", (9, 0): "h100", (10, 0): "b200"}


def test_grid_is_large_enough():
    assert len(grid()) >= 60


@pytest.fixture(scope="session")
def packs(request, tmp_path_factory) -> Callable[[str, str], dict[KernelSpec, Path]]:
    """Packs of the selected tests' specs for a target, built in parallel once a session."""
    wanted = {i.callspec.params.get("spec") for i in request.session.items if hasattr(i, "callspec")}
    made: dict[tuple[str, str], dict[KernelSpec, Path]] = {}

    def make(name: str, embed: str) -> dict[KernelSpec, Path]:
        if (name, embed) not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{embed}")
            specs = [spec for spec in SPECS if spec in wanted]
            script = Path(__file__).with_name("decode_grid.py")
            command = [sys.executable, str(script), name, embed, str(folder), *(s.name for s in specs)]
            subprocess.run(command, check=True, timeout=600)
            made[name, embed] = {spec: folder / f"{spec.name}.pack" for spec in specs}
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
    attention = load(packs(NAMES[torch.cuda.get_device_capability()], "cubin")[spec])
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
    spec = spec_of()
    with tempfile.TemporaryDirectory() as folder:
        build_one((spec, NAMES[torch.cuda.get_device_capability()], "both", Path(folder)))
        attention = load(Path(folder) / f"{spec.name}.pack")
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
