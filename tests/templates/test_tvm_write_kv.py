"""The CPU write_kv family: every byte it leaves in a pool, on every instruction-set level that runs here."""

from __future__ import annotations

import pytest
import torch

from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.cost import predict
from pagedgen.compiler.link import link
from pagedgen.compiler.render import render
from pagedgen.compiler.space import default_schedule, feasible
from pagedgen.compiler.verify import gate
from pagedgen.compiler.verify_write import WriteCase
from pagedgen.errors import ArgumentError, Unsupported
from pagedgen.runtime.library import Library
from pagedgen.templates.tvm.vectors import LEVELS
from pagedgen.templates.tvm.write_kv import FAMILY
from pagedgen.values.cpu_level import CPU_LEVELS, cpu_flags
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target import Target
from pagedgen.values.workload import Workload

pytest.importorskip("tvm")

RUNS_HERE = [level for level, needed in CPU_LEVELS.items() if needed <= cpu_flags()]
needs_cpu = pytest.mark.skipif(not RUNS_HERE, reason="no kernels are made for this processor")
BEST = RUNS_HERE[0] if RUNS_HERE else "x86_64-avx2"


def cpu(arch: str = BEST) -> Target:
    return Target("cpu", "cpu", arch, 2)


@pytest.fixture
def build(tmp_path):
    def make(spec: KernelSpec, *, arch: str = BEST, every: bool = False) -> Library:
        schedules = feasible(spec, cpu(arch)) if every else (default_schedule(spec, cpu(arch)),)
        binaries = [compile_source(render(spec, cpu(arch), schedule)) for schedule in schedules]
        return Library(link(binaries, (), tmp_path / f"{spec.name}-{arch}.so"))

    return make


GRID = {
    "bf16": {"q": "bf16"},
    "bf16-token": {"q": "bf16", "k_inner": "token"},
    "f16-h40-token": {"q": "f16", "head_dim": 40, "block_size": 7, "k_inner": "token"},
    "f32-slots": {"q": "f32", "block_size": 1},
    "e4m3-from-f32": {"q": "f32", "kv": "fp8_e4m3", "k_inner": "token"},
    "e4m3-from-bf16": {"q": "bf16", "kv": "fp8_e4m3", "scale": "head", "block_size": 32},
    "e5m2-from-f16": {"q": "f16", "kv": "fp8_e5m2", "head_dim": 80, "block_size": 24},
    "e5m2-from-f32": {"q": "f32", "kv": "fp8_e5m2", "scale": "head", "k_inner": "token"},
}


@needs_cpu
@pytest.mark.parametrize("name", GRID)
def test_gate(name, build, make_spec):
    spec = make_spec(**{"heads": (3, 3), "head_dim": 64, **GRID[name]}, op="write_kv")
    verdict = gate(build(spec), spec, 0, "cpu", seed=1)
    assert verdict.passed, verdict.reason


@needs_cpu
def test_every_schedule_is_right(build, make_spec):
    spec = make_spec(64, (2, 2), 16, "bf16", "fp8_e4m3", k_inner="token", op="write_kv")
    library = build(spec, every=True)
    for variant in range(len(feasible(spec, cpu()))):
        verdict = gate(library, spec, variant, "cpu", seed=2)
        assert verdict.passed, f"{variant}: {verdict.reason}"


@pytest.mark.parametrize("arch", LEVELS)
@pytest.mark.parametrize("kv", ["bf16", "fp8_e5m2"])
def test_cross_compiles_for_every_level(arch, kv, make_spec):
    spec = make_spec(128, (8, 8), 16, "bf16", kv, k_inner="token", op="write_kv")
    binary = compile_source(render(spec, cpu(arch), default_schedule(spec, cpu(arch))))
    assert f"{binary.symbol}_rows".encode() in binary.file("kernel.o")


@needs_cpu
def test_slots_outside_the_pool_are_refused_before_anything_is_written(build, make_spec):
    spec = make_spec(64, (2, 2), 16, "f32", op="write_kv")
    library, case = build(spec), WriteCase(spec, 77, "hnd", torch.device("cpu"), 3)
    before = case.k.clone()
    last = case.k.shape[0] * 16 - 1
    case.slots[40] = last + 1
    arguments = (case.new_k, case.new_v, case.slots, case.k, case.v, None, None, 0)
    message = rf"slot_mapping\[40\] = {last + 1}: below 0, or up to {last} \(num_blocks \* block_size - 1\)"
    with pytest.raises(ArgumentError, match=message):
        library.write_kv(*arguments)
    assert torch.equal(case.k.view(torch.int32), before.view(torch.int32))
    case.slots[40] = -7  # padding, whichever negative number says so
    library.write_kv(*arguments)
    tokens = make_spec(64, (2, 2), 1, "f32", k_inner="token", op="write_kv")
    spread = torch.zeros(80, 1, 2, 128)[..., ::2]
    with pytest.raises(ArgumentError, match=r"k\.stride\(3\) = 2: 1 is expected along head_dim"):
        build(tokens).write_kv(case.new_k, case.new_v, case.slots, spread, spread.contiguous(), None, None, 0)


@needs_cpu
def test_large_batches_are_shared_out(build, make_spec):
    """More tokens than a thread takes at once, more bytes than one thread is left alone with."""
    spec = make_spec(128, (2, 2), 16, "f32", op="write_kv")
    library, case = build(spec), WriteCase(spec, 1000, "nhd", torch.device("cpu"), 4)
    library.write_kv(case.new_k, case.new_v, case.slots, case.k, case.v, None, None, 0)
    assert case.judge() == ""


def test_cost_and_refusal(make_spec):
    spec, work = make_spec(heads=(8, 8), q="bf16", op="write_kv"), Workload.uniform(4096, 2048)
    narrow, *_, wide = feasible(spec, cpu())
    assert narrow.int("lanes") < wide.int("lanes")
    assert (
        predict(spec, cpu(), wide, work)["instructions"] < predict(spec, cpu(), narrow, work)["instructions"]
    )
    with pytest.raises(Unsupported, match="arch x86_64-sse2 of target old"):
        FAMILY.check(spec, Target("old", "cpu", "x86_64-sse2", 2))
