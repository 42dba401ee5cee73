"""Random legal specs on random inputs: TVM's kernels compiled, Triton's interpreted.

``pytest tests/fuzz --fuzz-seed 7 --fuzz-share 100`` draws other ones, and 100 times as many. On a GPU:
``python tests/fuzz/on_gpu.py`` (docs/gpu_tests.md).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
from fuzz.draw import ATTENTION, FIXED, MEDIUM, SMALL, case_of, family_of, ops_for, schedule_of, spec_of
from fuzz.trial import attempt, torch_attention, workspace_bytes

from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.link import link
from pagedgen.compiler.render import render
from pagedgen.compiler.verify import Case, live_rows, make_inputs, reference
from pagedgen.runtime.library import Library
from pagedgen.values.spec import Causality, KInner, Op
from pagedgen.values.target_table import target

# Drawn in CI: the specs of each test, and how many batches each is tried on.
INTERPRETED = (
    {Op.DECODE: 18},
    {Op.EXTEND: 18},
    {Op.VERIFY: 18},
    {Op.WRITE_KV: 3, Op.COPY_BLOCKS: 1, Op.GATHER: 2, Op.MERGE: 2, Op.KV_SCALES: 1},
)
LLVM_SPECS, LLVM_INPUTS, LLVM_TESTS = 5, 4, 3


@pytest.mark.parametrize("counts", INTERPRETED, ids=lambda counts: "-".join(counts))
def test_interpreted_kernels_are_right(counts, request):
    seed, share = request.config.getoption("--fuzz-seed"), request.config.getoption("--fuzz-share")
    command = [sys.executable, "-m", "fuzz.interpreted", str(seed)]
    command += [f"{op}={count * share}" for op, count in counts.items()]
    run = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300 * share,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    outcomes = [json.loads(line) for line in run.stdout.splitlines()]
    assert Counter(o["spec"].split("-")[0] for o in outcomes) == {o: n * share for o, n in counts.items()}
    assert [o for o in outcomes if o["reason"]] == []


def test_every_operator_is_interpreted():
    assert {op for counts in INTERPRETED for op in counts} == set(ops_for(target("h100")))


@pytest.mark.parametrize("part", range(LLVM_TESTS))
def test_compiled_cpu_kernels_are_right(part, cpu_target, tmp_path, request):
    pytest.importorskip("tvm")
    seed, share = request.config.getoption("--fuzz-seed"), request.config.getoption("--fuzz-share")
    ops = ops_for(cpu_target)
    for number in range(part, LLVM_SPECS * LLVM_TESTS * share, LLVM_TESTS):
        draw = Random(f"{seed} cpu {number}")
        spec = spec_of(draw, ops[number // LLVM_TESTS % len(ops)], cpu_target, MEDIUM)
        schedule = schedule_of(draw, spec, cpu_target)
        binary = compile_source(render(spec, cpu_target, schedule))
        library = Library(link([binary], (), tmp_path / f"{number}.so"))
        workspace = None
        if spec.op in ATTENTION:
            workspace = torch.zeros(workspace_bytes(library, MEDIUM), dtype=torch.uint8)
        for _ in range(LLVM_INPUTS):
            outcome = attempt(spec, library, 0, draw, MEDIUM, "cpu", workspace)
            assert outcome.reason == "", (number, spec.name, schedule.name, outcome)


@pytest.mark.parametrize("name", ["h100", "cpu"])
def test_draws_reach_all_that_a_family_covers(name):
    """Every mask, odd blocks, wide ratios, and every choice of code, each in some of the draws."""
    to = target(name)
    for op in ops_for(to):
        family = family_of(op, to)
        count = 150 if op in ATTENTION else 100
        specs = [spec_of(Random(f"{op} {i}"), op, to, MEDIUM) for i in range(count)]
        if op in ATTENTION:
            assert {mask for spec in specs for mask in spec.masks} == set(family.masks)
            assert {spec.return_lse for spec in specs} == {False, True}
            assert {spec.head_dim_v is not None for spec in specs} == {False, family.v_dims}
            assert len({spec.group_size for spec in specs}) >= 8
            assert any(spec.kv_dtype.is_fp8 for spec in specs)
        assert len({schedule_of(Random(i), specs[0], to) for i in range(20)}) >= 5
        chosen = {c for i, spec in enumerate(specs) for c in schedule_of(Random(i), spec, to).choices}
        fields = {field for spec in specs[:30] for field in family.fields(spec, to)}
        code = {(f.name, v) for f in fields for v in f.values if isinstance(v, str) or f.name == "pdl"}
        assert code <= chosen
        if op in FIXED:
            continue
        assert {1, 528, 544, 1024} <= {spec.block_size for spec in specs}
        assert any(spec.block_size not in (1, 528, 544) and spec.block_size % 8 for spec in specs)
        assert {spec.k_inner for spec in specs} == (set(KInner) if name == "cpu" else {KInner.DIM})


def test_batches_are_ragged_and_fit(make_spec):
    spec = make_spec(128, (8, 2), 16, op="verify")
    cases = [case_of(Random(i), spec, SMALL) for i in range(300)]
    lens = {n for case in cases for n in case.seq_lens}
    assert {0, 1, 15, 16, 17} <= lens and max(lens) > 200
    assert all(sum(case.seq_lens) <= SMALL.tokens for case in cases)
    assert all(q <= min(n, 64) for case in cases for q, n in zip(case.query_lens, case.seq_lens, strict=True))
    assert {case.pool for case in cases} == {"nhd", "hnd", "packed"}


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (0.0, ""),
        (0.5, "where"),  # the gate's rule
        (0.5 * 2**-8, "torch's 0:"),  # torch makes no error in a sequence of one token; the gate allows 0.009
    ],
)
def test_an_error_that_torch_would_not_make_is_found(monkeypatch, make_spec, error, says):
    def call(spec, callee, variant, inputs, workspace):
        found = reference(spec, inputs)[0]
        inputs.out.copy_(found)
        at = inputs.out[0].abs().argmax()
        inputs.out[0].view(-1)[at] *= 1 + error

    monkeypatch.setattr("fuzz.trial.run_case", call)
    monkeypatch.setattr("fuzz.trial.case_of", lambda *_: Case((1,), "nhd"))
    spec = make_spec(128, (8, 2), 16)
    outcome = attempt(spec, None, 0, Random(3), SMALL, "cpu", torch.zeros(1))
    assert says in outcome.reason and bool(outcome.reason) == bool(error), outcome


def test_what_lies_beside_the_output_is_watched(monkeypatch, make_spec):
    def call(spec, callee, variant, inputs, workspace):
        inputs.out.copy_(reference(spec, inputs)[0])
        if inputs.out._base is not None:
            inputs.out._base[:, 0] = 0

    monkeypatch.setattr("fuzz.trial.run_case", call)
    spec = make_spec(64, (2, 1), 16)
    reasons = {attempt(spec, None, 0, Random(i), SMALL, "cpu", torch.zeros(1)).reason for i in range(20)}
    assert "heads beside those of out were written" in reasons


def test_torch_in_float32_agrees_with_the_reference(make_spec):
    """The low-precision attention that errors are held against is right itself: masks, scales, sinks."""
    for masks in (
        {"window": 7, "sinks": True},
        {"logits_soft_cap": 5.0, "alibi": True, "lse": True},
        {"attention_chunk": 16, "causality": Causality.PER_SEQUENCE},
        {"head_dim_v": 64},
    ):
        spec = make_spec(32, (6, 2), 5, "f32", "fp8_e4m3", scale="head", op="extend", **masks)
        inputs = make_inputs(spec, (40, 0, 13), query_lens=(9, 0, 13))
        live = live_rows(spec, inputs)
        error = (torch_attention(spec, inputs)[live] - reference(spec, inputs)[0][live]).abs().max()
        assert error < 1e-5
