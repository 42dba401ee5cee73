"""docs/kernels.md says what the code says."""

from __future__ import annotations

import os
from pathlib import Path

from pagedgen.compiler.support import BASE, Proof, cell, tables
from pagedgen.values.target import Target
from pagedgen.values.target_table import target

DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"
BEGIN, END = "<!-- generated: tests/compiler/test_support.py -->", "<!-- end -->"
PROOFS = (
    Proof(target("h100-sxm"), "CUDA sm_80 … sm_120", "covered"),
    Proof(target("mi300x"), "HIP", "compile-checked only"),
    Proof(Target("cpu", "cpu", "x86_64-avx512", 2), "CPU", "tested"),
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
    cpu = PROOFS[-1]
    assert cell(BASE, cpu) == "tested"
    assert cell(make_spec(op="verify"), cpu) == "refused: op verify on target kind cpu: no template"
    gpu = PROOFS[0]
    assert cell(make_spec(head_dim_v=64, alibi=True), gpu) == "covered"
    assert "head_dim_v = 64: tvm-decode covers head_dim_v = head_dim (128)" in cell(
        make_spec(head_dim_v=64), cpu
    )
    assert "alibi = True: tvm-decode covers window" in cell(make_spec(alibi=True), cpu)
