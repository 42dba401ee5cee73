"""The rendered verify source: pinned for two specs, specialised, and compiled for named architectures."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from pagedgen.compiler.cost import predict
from pagedgen.compiler.render import render
from pagedgen.compiler.space import default_schedule, feasible
from pagedgen.compiler.triton import compile_triton
from pagedgen.errors import Unsupported
from pagedgen.values.workload import Workload

GOLDEN = Path(__file__).parents[1] / "golden"
MASKS = {"window": 1024, "logits_soft_cap": 50.0, "sinks": True}
GOLDENS = {
    "triton-verify-llama-3-8b-f16": ({}, "h100"),
    "triton-verify-h80-bf16-e4m3-tree-lse": (
        {
            "head_dim": 80,
            "heads": (28, 4),
            "q": "bf16",
            "kv": "fp8_e4m3",
            "scale": "head",
            "lse": True,
            "tree_mask": True,
            "logits_soft_cap": 50.0,
        },
        "a100",
    ),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_rendered_source_is_pinned(name, request, make_spec):
    """Regenerate with PAGEDGEN_UPDATE_GOLDEN=1 and read the difference before committing it."""
    spec_args, target_name = GOLDENS[name]
    spec, target = make_spec(op="verify", **spec_args), request.getfixturevalue(target_name)
    text = render(spec, target, default_schedule(spec, target)).text
    path = GOLDEN / f"{name}.py"
    if os.environ.get("PAGEDGEN_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", GOLDENS)
def test_source_has_no_unused_names_and_no_blank_runs(name):
    text = (GOLDEN / f"{name}.py").read_text(encoding="utf-8")
    assert "\n\n\n\n" not in text
    assert not any(line != line.rstrip() for line in text.splitlines())
    compile(text, name, "exec")
    head, body = text.split("block_table_stride,\n):", 1)
    for argument in re.findall(r"^    (\w+),$", head.split("def paged_verify(")[1], re.MULTILINE):
        assert argument in body, f"{argument} is never used"


@pytest.mark.parametrize(
    ("arch", "spec_args"),
    [
        ("a100", {}),
        ("a100", {"q": "bf16", "kv": "fp8_e4m3", **MASKS}),
        ("h100", {"q": "bf16"}),
        ("h100", {"kv": "fp8_e4m3", "lse": True}),
        ("h100", {"head_dim": 256, "heads": (16, 8), "block_size": 64, "q": "bf16", **MASKS}),
        ("h100", {"head_dim": 96, "heads": (71, 1), "block_size": 544}),
        ("a100", {"alibi": True, "attention_chunk": 8192, "causality": "per_sequence"}),
        ("h100", {"head_dim": 192, "head_dim_v": 128, "alibi": True, "tree_mask": True}),
    ],
)
def test_the_default_compiles_with_no_gpu_and_hardly_spills(request, make_spec, arch, spec_args):
    target = request.getfixturevalue(arch)
    spec = make_spec(op="verify", **spec_args)
    binary = compile_triton(render(spec, target, default_schedule(spec, target)))
    assert binary.symbol == "paged_verify"
    assert 0 < binary.resources.registers <= 255 and binary.resources.spill_bytes <= 96  # measured: no harm
    assert binary.file("kernel.cubin")[:4] == b"\x7fELF"
    ptx = binary.file("kernel.ptx").decode()
    # 16-byte asynchronous copies: without them the alignment promises were lost on the way
    assert "cp.async.cg.shared.global" in ptx


def test_lanes_that_share_a_row_of_parts_round_alike(make_spec, h100):
    """Racecheck (docs/gpu_tests.md) found lanes that store different sums of one row of 64 values."""
    guard = "weighted = tl.where(part_ok, part_out * weight[:, :, None], 0.0)"
    for head_dim, guarded in ((32, True), (64, True), (72, False), (128, False)):
        spec = make_spec(head_dim, op="verify")
        assert (guard in render(spec, h100, default_schedule(spec, h100)).text) == guarded


def test_costs_follow_the_work(make_spec, h100):
    """Bytes decide, not queries, until there are more of them than a tile holds."""
    spec = make_spec(op="verify")
    schedule = default_schedule(spec, h100)
    batches = [(1, 4096), (8, 4096), (64, 4096), (8, 8192)]
    one, few, many, longer = (
        predict(spec, h100, schedule, Workload.chunks(64, *batch)).time_us for batch in batches
    )
    assert one == few < many
    assert 1.8 < longer / few < 2.1
    windowed = make_spec(op="verify", window=512)
    workload = Workload.chunks(64, 8, 8192)
    assert predict(windowed, h100, schedule, workload).time_us < longer / 3
    assert all(
        16 * s.int("num_warps") <= max(64, s.int("tile"))
        for s in feasible(spec, h100)
        if s.int("tile_m") < 64
    )


@pytest.mark.parametrize(
    ("spec_args", "word"), [({"q": "f32"}, "q_dtype"), ({"k_inner": "token"}, "k_inner")]
)
def test_refuses_what_it_cannot_do(make_spec, h100, spec_args, word):
    spec = make_spec(op="verify")
    with pytest.raises(Unsupported, match=word):
        render(make_spec(op="verify", **spec_args), h100, default_schedule(spec, h100))
