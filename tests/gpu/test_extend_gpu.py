"""Extend and verify kernels on a real GPU: a grid of specs through the gate; the suite's tiles."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpu.extend_grid import specs

from pagedgen import load
from pagedgen.autotune.suites.extend_gpu import candidates, spec_of
from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.link import link
from pagedgen.compiler.render import render
from pagedgen.compiler.verify import gate, judge, make_inputs
from pagedgen.runtime.library import Library
from pagedgen.values.spec import DType, KernelSpec, Op
from pagedgen.values.target_table import target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (docs/gpu_tests.md)"),
]
SPECS = specs()
PLAIN = {op: replace(SPECS[0], op=op) for op in (Op.EXTEND, Op.VERIFY)}
NAMES = {(8, 0): "a100", (8, 9): "l40s", (9, 0): "h100", (10, 0): "b200"}


@pytest.fixture(scope="session")
def packs(request, tmp_path_factory) -> Callable[[str, str], dict[KernelSpec, Path]]:
    """Packs of the selected tests' specs for a target, built in parallel once a session."""
    wanted = {i.callspec.params.get("spec") for i in request.session.items if hasattr(i, "callspec")}
    made: dict[tuple[str, str], dict[KernelSpec, Path]] = {}

    def make(name: str, embed: str) -> dict[KernelSpec, Path]:
        if (name, embed) not in made:
            folder = tmp_path_factory.mktemp(f"extend-{name}-{embed}")
            chosen = [spec for spec in SPECS if spec in wanted or spec in PLAIN.values()]
            script = Path(__file__).with_name("extend_grid.py")
            command = [sys.executable, str(script), name, embed, str(folder), *(s.name for s in chosen)]
            subprocess.run(command, check=True, timeout=600)
            made[name, embed] = {spec: folder / f"{spec.name}.pack" for spec in chosen}
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
    library, wrap = attention.kernel(spec).library, captured if way == "captured" else None
    verdict = gate(library, spec, -1, "cuda", int(time.time()), wrap=wrap)
    assert verdict.passed, verdict


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a100_code_passes_the_gate_through_the_drivers_jit(packs, spec):
    """PTX for sm_80, FP8 decoded from bytes included, compiled by the driver for the GPU at hand."""
    attention = load(packs("a100", "ptx")[spec])
    verdict = gate(attention.kernel(spec).library, spec, -1, "cuda", int(time.time()))
    assert verdict.passed, verdict


@pytest.mark.parametrize("kv", [DType.BF16, DType.FP8_E4M3])
def test_every_tile_of_the_suite_passes_the_gate(tmp_path, kv):
    spec, to = spec_of(q=DType.BF16, kv=kv), target(NAMES[torch.cuda.get_device_capability()])
    schedules = candidates(spec, to)
    library = Library(link([compile_source(render(spec, to, s)) for s in schedules], (), tmp_path / "all.so"))
    for variant, schedule in enumerate(schedules):
        verdict = gate(library, spec, variant, "cuda", 7)
        assert verdict.passed, (schedule.name, verdict)


@pytest.mark.parametrize("op", PLAIN)
def test_one_graph_serves_changing_lengths(packs, op):
    """Prompts, chunks, decodes and padding in one captured launch, shared out anew at every replay."""
    spec = PLAIN[op]
    inputs = make_inputs(spec, (700, 900, 64, 300), "cuda", 1, query_lens=(300, 1, 64, 35), poison=False)
    attention = load(packs(NAMES[torch.cuda.get_device_capability()], "cubin")[spec])
    attention.prepare(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        getattr(attention, op)(
            inputs.q, inputs.k, inputs.v, inputs.block_table, inputs.seq_lens, inputs.cu_seqlens_q,
            out=inputs.out, softmax_scale=inputs.softmax_scale,
        )  # fmt: skip
    changes = [
        ((700, 900, 64, 300), (300, 1, 64, 35)),
        ((1, 0, 16, 17), (1, 0, 16, 1)),
        ((0, 0, 0, 0), (0, 0, 0, 0)),
        ((400, 900, 1, 300), (0, 399, 1, 0)),
    ]
    for lens, queries in changes:
        ends = [0, *torch.tensor(queries).cumsum(0).tolist()]
        inputs.seq_lens.copy_(torch.tensor(lens, dtype=torch.int32))
        inputs.cu_seqlens_q.copy_(torch.tensor(ends, dtype=torch.int32))
        inputs.out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert judge(spec, inputs)[2] == ""


def test_pools_past_two_to_the_31_elements(packs):
    """Offsets are 64-bit where a pool passes 2^31 elements."""
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    spec = SPECS[0]
    attention = load(packs(NAMES[torch.cuda.get_device_capability()], "cubin")[spec])
    shape = ((1 << 31) // (16 * 8 * 128) + 4096, 16, 8, 128)
    k, v = (torch.randn(shape, dtype=torch.float16, device="cuda") for _ in range(2))
    last = torch.arange(shape[0] - 64, shape[0], dtype=torch.int32, device="cuda")
    small = torch.arange(64, dtype=torch.int32, device="cuda")
    q = torch.randn(200, 32, 128, dtype=torch.float16, device="cuda")
    lens = torch.tensor([1024], dtype=torch.int32, device="cuda")
    ends = torch.tensor([0, 200], dtype=torch.int32, device="cuda")
    got = attention.extend(q, k, v, last[None], lens, ends)
    want = attention.extend(q, k[-64:].clone(), v[-64:].clone(), small[None], lens, ends)
    assert torch.equal(got, want)
