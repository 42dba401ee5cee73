"""The CPU verify family: what it computes, in one piece of a context and in several."""

from __future__ import annotations

import pytest
import torch

from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.link import link
from pagedgen.compiler.render import render
from pagedgen.compiler.space import default_schedule, feasible
from pagedgen.compiler.verify import Case, cases_of, gate, judge, make_inputs, run_case
from pagedgen.errors import ArgumentError, Unsupported
from pagedgen.runtime.library import Library
from pagedgen.templates.tvm.vectors import LEVELS
from pagedgen.templates.tvm.verify import FAMILY
from pagedgen.values.cpu_level import CPU_LEVELS, cpu_flags
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import Causality, KernelSpec
from pagedgen.values.target import Target

pytest.importorskip("tvm")

RUNS_HERE = [level for level, needed in CPU_LEVELS.items() if needed <= cpu_flags()]
needs_cpu = pytest.mark.skipif(not RUNS_HERE, reason="no kernels are made for this processor")
BEST = RUNS_HERE[0] if RUNS_HERE else "x86_64-avx2"
SMALL = {"heads": (4, 2), "head_dim": 32}


def cpu(arch: str = BEST) -> Target:
    return Target("cpu", "cpu", arch, 2)


@pytest.fixture
def build(tmp_path):
    def make(spec: KernelSpec, *schedules: Schedule, arch: str = BEST) -> Library:
        schedules = schedules or (default_schedule(spec, cpu(arch)),)
        binaries = [compile_source(render(spec, cpu(arch), schedule)) for schedule in schedules]
        return Library(link(binaries, (), tmp_path / f"{spec.name}-{arch}.so"))

    return make


GRID = {
    "bf16-tree": {"q": "bf16", "k_inner": "token", "tree_mask": True, "lse": True},
    "e4m3-masks": {
        "q": "bf16", "kv": "fp8_e4m3", "scale": "head", "k_inner": "token", "block_size": 24, "window": 300,
        "logits_soft_cap": 50.0, "sinks": True, "lse": True,
    },
    "f32-g7-tree-sinks": {"q": "f32", "heads": (14, 2), "head_dim": 40, "tree_mask": True, "sinks": True},
    "f16-v64-causalities": {
        "q": "f16", "head_dim_v": 64, "alibi": True, "attention_chunk": 100, "sinks": True, "lse": True,
        "causality": Causality.PER_SEQUENCE,
    },
}  # fmt: skip


@needs_cpu
@pytest.mark.parametrize("name", GRID)
def test_gate(name, build, make_spec):
    spec = make_spec(**{**SMALL, **GRID[name]}, op="verify")
    verdict = gate(build(spec), spec, 0, "cpu", seed=1, cases=cases_of(spec, 1)[::2])
    assert verdict.passed, verdict.reason


@needs_cpu
def test_every_number_of_rows_and_lanes_is_right(build, make_spec):
    """One vector of rows to all of a block, whole vectors and halves, prefetching and not."""
    spec = make_spec(32, (2, 2), 16, "f32", k_inner="token", op="verify")
    best = dict(default_schedule(spec, cpu()).choices)
    lanes = sorted({schedule.int("lanes") for schedule in feasible(spec, cpu())})
    picked = [
        Schedule.of(FAMILY.name, **{**best, "lanes": lanes[0], "vectors": 3, "blocks": 1, "ahead": 0}),
        Schedule.of(FAMILY.name, **{**best, "lanes": lanes[-1], "vectors": 2, "blocks": 4, "tile": 32}),
    ]
    library = build(spec, *picked)
    case = Case((700, 64, 90, 17, 40), "hnd", query_lens=(9, 64, 33, 17, 1))
    for variant, schedule in enumerate(picked):
        verdict = gate(library, spec, variant, "cpu", seed=2, cases=[case])
        assert verdict.passed, f"{schedule.name}: {verdict.reason}"


@needs_cpu
@pytest.mark.parametrize("settings", [{"window": 700, "sinks": True}, {"tree_mask": True, "sinks": True}])
def test_pieces_of_a_context_are_merged(settings, build, make_spec):
    """One sequence of one KV head is shared out to all threads; with one thread it is one piece."""
    spec = make_spec(32, (4, 1), 16, "f32", lse=True, op="verify", **settings)
    library = build(spec)
    inputs = make_inputs(spec, (3000, 5), query_lens=(40, 5), seed=7)
    size = library.workspace_bytes(2)
    run_case(spec, library, 0, inputs, torch.full((size,), 255, dtype=torch.uint8))
    assert judge(spec, inputs)[2] == ""
    cut = inputs.out[:45].clone()
    library.set_num_threads(1)
    run_case(spec, library, 0, inputs, torch.zeros(size, dtype=torch.uint8))
    assert judge(spec, inputs)[2] == ""
    assert not torch.equal(cut[:40], inputs.out[:40]), "the context was not cut"
    assert torch.equal(cut[40:], inputs.out[40:45])


@needs_cpu
def test_more_drafts_than_a_tree_mask_has_bits(build, make_spec):
    spec = make_spec(32, (4, 2), 16, "f32", op="verify", tree_mask=True)
    library = build(spec)
    inputs = make_inputs(spec, (20, 80), query_lens=(20, 64))
    inputs.cu_seqlens_q[2] += 1
    workspace = torch.zeros(library.workspace_bytes(2), dtype=torch.uint8)
    with pytest.raises(ArgumentError, match=r"cu_seqlens_q\[1\] = 65: at most 64 are allowed with a tree"):
        run_case(spec, library, 0, inputs, workspace)
    assert inputs.out.isnan().all(), "something was written before the check"


@pytest.mark.parametrize("arch", LEVELS)
def test_cross_compiles_for_every_level(arch, make_spec):
    spec = make_spec(64, (8, 2), 16, "bf16", "fp8_e4m3", op="verify", tree_mask=True)
    code = compile_source(render(spec, cpu(arch), default_schedule(spec, cpu(arch)))).file("kernel.o")
    assert {"x86_64": 62, "aarch64": 183}[arch.split("-")[0]] == int.from_bytes(code[18:20], "little")
    assert b"_finish" in code


def test_space_and_refusal(make_spec):
    for arch in LEVELS:
        for settings in GRID.values():
            spec = make_spec(**{**SMALL, **settings}, op="verify")
            defaults = {field.name: field.default for field in FAMILY.fields(spec, cpu(arch))}
            assert Schedule.of(FAMILY.name, **defaults) in feasible(spec, cpu(arch)), (arch, spec.name)
    with pytest.raises(Unsupported, match="batch_invariant = True: the bits of tvm-verify follow"):
        default_schedule(make_spec(op="verify", batch_invariant=True), cpu())
