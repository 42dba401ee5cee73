"""docs/kernels.md says what the code says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from gpu import decode_grid, extend_grid, test_invariant_gpu, test_moves_gpu

from pagedgen.compiler.render import render
from pagedgen.compiler.space import default_schedule
from pagedgen.compiler.support import Proof, cell, tables
from pagedgen.compiler.triton import compile_triton
from pagedgen.values.spec import Op, Rope
from pagedgen.values.target import Target
from pagedgen.values.target_table import target

DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"
BEGIN, END = "<!-- generated: tests/compiler/test_support.py -->", "<!-- end -->"
# On an H100 in its own code, and in sm_80's; batch-invariant kernels in sm_90's alone (docs/gpu_tests.md).
GRIDS = tuple(s for s in (*decode_grid.specs(), *extend_grid.specs()) if not s.batch_invariant)
PROOFS = (
    Proof(target("a100-80g"), "sm_80", GRIDS),
    Proof(target("l40s"), "sm_89"),
    Proof(target("h100-sxm"), "sm_90", (*GRIDS, *test_invariant_gpu.SPECS, *test_moves_gpu.SPECS)),
    Proof(target("b200"), "sm_100"),
    Proof(target("rtx5090"), "sm_120"),
    Proof(target("mi300x"), "gfx942"),
    Proof(Target("cpu", "cpu", "x86_64-avx512", 2), "CPU", None),
)


def test_the_matrix_in_the_docs_is_what_the_families_say():
    """Regenerate with PAGEDGEN_UPDATE_GOLDEN=1 and read the difference before committing it."""
    text = DOCS.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    wanted = f"{head}{BEGIN}\n\n" + "\n".join(tables(PROOFS)) + f"\n{END}{tail}"
    if os.environ.get("PAGEDGEN_UPDATE_GOLDEN"):
        DOCS.write_text(wanted, encoding="utf-8")
        text = wanted
    assert text == wanted


def test_a_cell_says_why_it_is_refused(make_spec):
    a100, l40s, *_, cpu = PROOFS
    assert cell(Op.DECODE, {}, cpu) == "tested"
    assert cell(Op.VERIFY, {"tree_mask": True}, cpu) == "tested"
    assert cell(Op.MERGE, {}, cpu) == (
        "refused: op merge on target kind cpu: no template; the runtime has torch do it"
    )
    assert "head_dim_v = 64: tvm-write-kv covers" in cell(Op.WRITE_KV, {"head_dim_v": 64}, cpu)
    rope = {"rope": Rope.NEOX}
    assert "rope = neox: tvm-write-kv covers no such feature" in cell(Op.WRITE_KV, rope, cpu)
    assert cell(Op.DECODE, {"tree_mask": True}, a100) == "–"
    for proof, how in ((a100, "tested"), (l40s, "compile-checked only")):
        assert cell(Op.DECODE, {"alibi": True}, proof) == how
    assert cell(Op.DECODE, {"head_dim": 200}, a100) == "compile-checked only"  # no spec of the grids has it


@pytest.mark.parametrize(
    ("name", "op"), [("l40s", "decode"), ("b200", "extend"), ("rtx5090", "decode"), ("mi300x", "extend")]
)
def test_kernels_of_architectures_that_no_test_runs_on_compile(make_spec, name, op):
    """A sample of what is compile-checked only; verify has the pieces of both."""
    to = target(name)
    spec = make_spec(
        96, (28, 4), q="bf16", kv="fp8_e4m3", op=op, head_dim_v=64, alibi=True, window=700, sinks=True,
        attention_chunk=4096, lse=True, causality="per_sequence" if op == "extend" else "causal",
    )  # fmt: skip
    binary = compile_triton(render(spec, to, default_schedule(spec, to)))
    assert binary.file("kernel.hsaco" if to.kind == "hip" else "kernel.cubin")[:4] == b"\x7fELF"
