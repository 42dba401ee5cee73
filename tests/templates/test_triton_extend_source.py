"""The rendered extend source: pinned for three specs, specialised, and compiled for named architectures."""

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
    "triton-extend-llama-3-8b-f16": ({}, "h100"),
    "triton-extend-h80-bf16-e4m3-masks-lse": (
        {
            "head_dim": 80,
            "heads": (28, 4),
            "q": "bf16",
            "kv": "fp8_e4m3",
            "scale": "head",
            "lse": True,
            **MASKS,
        },
        "a100",
    ),
    "triton-extend-h192v128-f16-percausal": (
        {
            "head_dim": 192,
            "head_dim_v": 128,
            "heads": (16, 16),
            "alibi": True,
            "attention_chunk": 8192,
            "window": 4096,
            "causality": "per_sequence",
        },
        "h100",
    ),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_rendered_source_is_pinned(name, request, make_spec):
    """Regenerate with PAGEDGEN_UPDATE_GOLDEN=1 and read the difference before committing it."""
    spec_args, target_name = GOLDENS[name]
    spec, target = make_spec(op="extend", **spec_args), request.getfixturevalue(target_name)
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
    for argument in re.findall(r"^    (\w+),$", head.split("def paged_extend(")[1], re.MULTILINE):
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
        ("a100", {"alibi": True, "attention_chunk": 8192, "causality": "full"}),
        ("h100", {"head_dim": 192, "head_dim_v": 128, "heads": (16, 16), "alibi": True}),
        ("h100", {"kv": "fp8_e4m3", "causality": "per_sequence", "window": 4096, "attention_chunk": 8192}),
    ],
)
def test_the_default_compiles_with_no_gpu_and_hardly_spills(request, make_spec, arch, spec_args):
    target = request.getfixturevalue(arch)
    spec = make_spec(op="extend", **spec_args)
    binary = compile_triton(render(spec, target, default_schedule(spec, target)))
    assert binary.symbol == "paged_extend"
    assert 0 < binary.resources.registers <= 255 and binary.resources.spill_bytes <= 96  # measured: no harm
    assert binary.file("kernel.cubin")[:4] == b"\x7fELF"
    ptx = binary.file("kernel.ptx").decode()
    # 16-byte asynchronous copies: without them the alignment promises were lost on the way
    assert "cp.async.cg.shared.global" in ptx
    assert ("wgmma" in ptx) == (arch == "h100")


def test_offsets_of_rows_do_not_depend_on_where_a_tile_lies_in_its_block(make_spec, h100):
    """``tokens * k_token`` is the same for every tile: the compiler moves it out of the loop."""
    spec = make_spec(op="extend", block_size=256)
    schedule = default_schedule(spec, h100)
    assert (schedule["ids"], schedule.int("tile")) == ("scalar", 64)
    text = render(spec, h100, schedule).text
    for name in ("k", "v"):
        begin = f"ids.to(tl.int64) * {name}_block + pos % 256 * {name}_token"
        assert text.count(f"{name}_rows = ({begin}) + tokens * {name}_token") == 2  # masked or not
    fp8 = make_spec(op="extend", block_size=256, kv="fp8_e4m3")  # is faster without
    assert ") + tokens" not in render(fp8, h100, default_schedule(fp8, h100)).text


def test_costs_follow_the_work(make_spec, h100):
    spec = make_spec(op="extend")
    schedule = default_schedule(spec, h100)
    short, long = Workload.chunks(4, 2048, 2048), Workload.chunks(4, 4096, 4096)
    assert (
        3 < predict(spec, h100, schedule, long).time_us / predict(spec, h100, schedule, short).time_us < 4.5
    )
    windowed = make_spec(op="extend", window=512)
    assert predict(windowed, h100, schedule, long).time_us < predict(spec, h100, schedule, long).time_us / 3
    assert all(s.int("tile_m") >= 16 * s.int("num_warps") for s in feasible(spec, h100))


@pytest.mark.parametrize(
    ("spec_args", "word"), [({"q": "f32"}, "q_dtype"), ({"k_inner": "token"}, "k_inner")]
)
def test_refuses_what_it_cannot_do(make_spec, h100, spec_args, word):
    spec = make_spec(op="extend")
    with pytest.raises(Unsupported, match=word):
        render(make_spec(op="extend", **spec_args), h100, default_schedule(spec, h100))


def test_operators_without_a_template_are_refused_by_name(make_spec, cpu_target):
    with pytest.raises(Unsupported, match="op merge on target kind cpu: no template"):
        default_schedule(make_spec(op="merge", heads=(32, 32), block_size=1), cpu_target)
