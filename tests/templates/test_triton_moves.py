"""Templates that move K and V: the gate through Triton's interpreter, and compiled for architectures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.render import render
from pagedgen.compiler.space import default_schedule, feasible
from pagedgen.errors import Unsupported

WRITE, GATHER, COPY = {"op": "write_kv"}, {"op": "gather"}, {"op": "copy_blocks"}
MERGE, SCALES = {"op": "merge", "block_size": 1}, {"op": "kv_scales", "block_size": 1}
SPECS = [
    {**WRITE, "heads": (2, 2), "head_dim": 64},
    {**WRITE, "heads": (3, 3), "head_dim": 80, "block_size": 1, "kv": "fp8_e4m3"},
    {**WRITE, "heads": (2, 2), "head_dim": 40, "block_size": 7, "kv": "fp8_e4m3", "scale": "head"},
    {**WRITE, "heads": (1, 1), "head_dim": 64, "kv": "fp8_e5m2"},
    {**WRITE, "heads": (2, 2), "head_dim": 64, "q": "f32", "kv": "fp8_e5m2", "scale": "head"},
    {**WRITE, "heads": (2, 2), "head_dim": 64, "rope": "neox"},
    {**WRITE, "heads": (3, 3), "head_dim": 80, "q": "f32", "rope": "gptj", "rotary_dim": 24},
    {**WRITE, "heads": (2, 2), "head_dim": 80, "kv": "fp8_e4m3", "rope": "neox", "rotary_dim": 40},
    {**WRITE, "heads": (1, 1), "head_dim": 64, "kv": "fp8_e4m3", "rope": "gptj", "rotary_dim": 24},
    {**GATHER, "heads": (2, 2), "head_dim": 64},
    {**GATHER, "heads": (3, 3), "head_dim": 80, "block_size": 1, "kv": "fp8_e4m3"},
    {**GATHER, "heads": (2, 2), "head_dim": 40, "block_size": 7, "q": "fp8_e4m3"},
    {**GATHER, "heads": (2, 2), "head_dim": 64, "q": "f32", "kv": "fp8_e5m2", "scale": "head"},
    {**WRITE, "heads": (3, 3), "head_dim": 64, "checked": True},
    {**GATHER, "heads": (3, 3), "head_dim": 40, "block_size": 7, "kv": "fp8_e4m3", "checked": True},
    {**COPY, "heads": (2, 2), "head_dim": 64},
    {**COPY, "heads": (1, 1), "head_dim": 40, "block_size": 1, "q": "fp8_e4m3"},
    {**SCALES, "heads": (3, 3), "head_dim": 64, "kv": "fp8_e4m3"},
    {**SCALES, "heads": (2, 2), "head_dim": 80, "q": "f32", "kv": "fp8_e5m2", "scale": "head"},
    {**MERGE, "heads": (3, 3), "head_dim": 64},
    {**MERGE, "heads": (2, 2), "head_dim": 80, "q": "f32", "sinks": True},
    {**COPY, "heads": (2, 2), "head_dim": 128, "head_dim_v": 64, "q": "f32"},
]


def test_interpreted_kernels_pass_the_gate():
    """A process of its own: TRITON_INTERPRET is read when Triton is imported."""
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interpreted_moves.py")), repr(SPECS)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("passed=True") == len(SPECS)


@pytest.mark.parametrize("arch", ["a100", "h100"])
@pytest.mark.parametrize(
    "args",
    [{**WRITE, "kv": "bf16"}, {**WRITE, "kv": "fp8_e4m3"}, {**GATHER, "kv": "fp8_e5m2"}, COPY, MERGE],
    ids=str,
)
def test_compiles_to_16_byte_moves(request, make_spec, arch, args):
    """FP8 by integers alone, so that GPUs without the conversion have it too."""
    spec, target = make_spec(heads=(8, 8), q="bf16", **args), request.getfixturevalue(arch)
    binary = compile_source(render(spec, target, default_schedule(spec, target)))
    assert binary.symbol == f"paged_{spec.op}" and binary.resources.spill_bytes == 0
    ptx = binary.file("kernel.ptx").decode()
    narrow = 2 if spec.kv_dtype != spec.q_dtype else 4  # words: FP8 is half as wide as what it is made of
    loads, stores = (narrow, 4) if spec.op == "gather" else (4, narrow)
    assert f"ld.global.v{loads}.b32" in ptx and f"st.global.v{stores}.b32" in ptx


def test_refuses_what_it_cannot_do(make_spec, h100):
    with pytest.raises(Unsupported, match="k_inner token: GPU write_kv stores"):
        feasible(make_spec(heads=(8, 8), k_inner="token", op="write_kv"), h100)
    with pytest.raises(Unsupported, match="k_inner token: GPU gather reads"):
        feasible(make_spec(heads=(8, 8), k_inner="token", op="gather"), h100)
