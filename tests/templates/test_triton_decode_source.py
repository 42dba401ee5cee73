"""The rendered Triton source: pinned for eight kernels, specialised, and compiled for named architectures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pagedgen.compiler.cost import predict
from pagedgen.compiler.render import render
from pagedgen.compiler.space import default_schedule, feasible
from pagedgen.compiler.triton import alignment_of, compile_triton, signature_of
from pagedgen.errors import Unsupported
from pagedgen.templates.triton.decode import TritonDecode, block_h, box_bytes, kv_align, loads_of, parts_of
from pagedgen.values.schedule import Schedule
from pagedgen.values.target_table import target
from pagedgen.values.workload import Workload

GOLDEN = Path(__file__).parents[1] / "golden"


def schedule(spec, **choices) -> Schedule:
    base = {
        "rows": block_h(spec),
        "columns": "pieces",
        "tile": 64,
        "num_warps": 4,
        "num_stages": 3,
        "waves": 4,
        "seq_lanes": 128,
        "split": "pieces",
        "merge": 32,
        "fp8_decode": "none",
        "sums": "reduce",
        "max_regs": 0,
        "pdl": 0,
    }
    return Schedule.of("triton-decode", **(base | choices))


GOLDENS = {
    "triton-llama-3-8b-f16": ({}, "h100", {}),
    "triton-mqa-h80-bf16-e4m3-lse": (
        {"head_dim": 80, "heads": (71, 1), "q": "bf16", "kv": "fp8_e4m3", "scale": "head", "lse": True},
        "a100",
        {"fp8_decode": "bits", "sums": "dot"},
    ),
    "triton-h192v128-alibi-chunk-f16": (
        {"head_dim": 192, "head_dim_v": 128, "alibi": True, "attention_chunk": 8192},
        "h100",
        {},
    ),
    "triton-llama-3-8b-f16-invariant": (
        {"batch_invariant": True},
        "h100",
        {"split": "fixed", "part": 256, "max_parts": 32, "pdl": 1},
    ),
    "triton-llama-3-8b-f16-ahead": ({}, "h100", {"split": "walk", "pdl": 2, "waves": 1}),
    "triton-mistral-f16-e4m3-cluster": (
        {"kv": "fp8_e4m3", "scale": "tensor", "lse": True, "window": 4096},
        "h100",
        {"split": "cluster", "tile": 128, "waves": 1, "fp8_decode": "cvt", "sums": "dot", "pdl": 1},
    ),
    "triton-mistral-f16-e4m3-turned": (
        {"kv": "fp8_e4m3", "scale": "tensor", "window": 4096},
        "h100",
        {"rows": 8, "tile": 32, "num_warps": 1, "fp8_decode": "cvt", "sums": "dot"},
    ),
    "triton-token-slots-bf16": ({"q": "bf16", "block_size": 1}, "h100", {"tile": 128, "pdl": 1}),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_rendered_source_is_pinned(name, request, make_spec):
    """Regenerate with PAGEDGEN_UPDATE_GOLDEN=1 and read the difference before committing it."""
    spec_args, target, choices = GOLDENS[name]
    spec = make_spec(**spec_args)
    text = render(spec, request.getfixturevalue(target), schedule(spec, **choices)).text
    path = GOLDEN / f"{name}.py"
    if os.environ.get("PAGEDGEN_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", GOLDENS)
def test_source_has_no_unused_names_and_no_blank_runs(name):
    """What a template renders holds no dead weight: every argument is used, and layout is even."""
    text = (GOLDEN / f"{name}.py").read_text(encoding="utf-8")
    assert "\n\n\n\n" not in text
    assert not any(line != line.rstrip() for line in text.splitlines())
    compile(text, name, "exec")
    body = text.split("\n):\n", 1)
    # what the launcher gives every decode kernel, and one that merges in clusters has no use for
    unused = ("partial_ptr", "partial_lse_ptr", "counter_ptr", "num_seqs", "partitions")
    expected = [] if "cluster" not in name else unused
    for line in body[0].splitlines():
        argument = line.strip().rstrip(",")
        if argument in expected:
            continue
        if argument.endswith(("_ptr", "_scale", "_seqs", "_blocks", "partitions")) or "_stride" in argument:
            assert argument in body[1], f"{argument} is never used"


@pytest.mark.parametrize("head_dim", range(32, 257, 8))
@pytest.mark.parametrize("kv", ["f16", "fp8_e4m3"])
@pytest.mark.parametrize("warps", [1, 4])
def test_loads_cover_head_dim_without_the_next_power_of_two(make_spec, head_dim, kv, warps):
    spec = make_spec(head_dim=head_dim, kv=kv)
    loads = loads_of(spec, warps, block_h(spec))
    columns = head_dim // 2 if spec.kv_dtype.is_fp8 else head_dim
    assert sum(load.valid for load in loads) == columns
    assert [load.base for load in loads] == [0, *(loads[0].valid for _ in loads[1:])]
    assert all(load.width >= 16 and load.width & (load.width - 1) == 0 for load in loads)
    parts = parts_of(spec, loads)
    assert len({part.name for part in parts}) == len(parts)
    assert warps == 1 or all(
        load.width > block_h(spec) for load in loads
    )  # or warps repeat each other's products
    if kv == "f16" and head_dim in (72, 80, 96, 160, 192):
        assert sum(load.width for load in loads) < 1 << (columns - 1).bit_length()


@pytest.mark.parametrize(
    ("arch", "spec_args", "choices"),
    [
        ("a100", {}, {}),
        ("a100", {"q": "bf16", "kv": "fp8_e4m3"}, {"fp8_decode": "bits"}),
        ("a100", {"kv": "fp8_e5m2"}, {"fp8_decode": "bits"}),
        ("h100", {"q": "bf16", "kv": "fp8_e4m3", "lse": True}, {"fp8_decode": "cvt"}),
        ("h100", {"kv": "fp8_e4m3", "window": 4096, "logits_soft_cap": 50.0, "sinks": True}, {}),
        ("a100", {"q": "bf16", "window": 128, "sinks": True, "lse": True}, {}),
        ("h100", {"head_dim": 96, "heads": (32, 32), "block_size": 544}, {}),
        (
            "a100",
            {"q": "bf16", "kv": "fp8_e4m3", "batch_invariant": True, "window": 4096, "lse": True},
            {"split": "fixed", "part": 256, "max_parts": 32, "fp8_decode": "bits"},
        ),
        ("a100", {"q": "bf16", "alibi": True, "attention_chunk": 8192}, {}),
        (
            "h100",
            {"kv": "fp8_e4m3", "head_dim": 192, "head_dim_v": 128, "alibi": True},
            {"fp8_decode": "cvt"},
        ),
        ("h100", {"head_dim": 256, "heads": (16, 8), "block_size": 64, "q": "bf16"}, {"max_regs": 168}),
        (
            "h100",
            {"kv": "fp8_e4m3", "block_size": 1, "window": 300},
            {"split": "walk", "pdl": 2, "waves": 1, "fp8_decode": "cvt"},
        ),
        (
            "h100",
            {"head_dim": 80, "heads": (71, 1), "block_size": 64, "lse": True},
            {"split": "walk", "pdl": 2, "waves": 1},
        ),
        (
            "h100",
            {"q": "bf16", "kv": "fp8_e4m3", "window": 300, "sinks": True, "lse": True},
            {"split": "cluster", "tile": 128, "waves": 1, "pdl": 2, "fp8_decode": "cvt", "sums": "reduce"},
        ),
    ],
)
def test_compiles_for_a_named_arch_with_no_gpu(request, make_spec, arch, spec_args, choices):
    spec = make_spec(**spec_args)
    binary = compile_triton(render(spec, request.getfixturevalue(arch), schedule(spec, **choices)))
    assert binary.symbol == "paged_decode"
    assert binary.num_warps == 4
    assert 0 < binary.resources.registers <= 255
    assert binary.resources.smem_bytes > 0
    assert binary.file("kernel.cubin")[:4] == b"\x7fELF"
    arch_name = request.getfixturevalue(arch).arch
    assert f".target {arch_name}" in binary.file("kernel.ptx").decode()
    # 16-byte asynchronous copies: without them the alignment promises were lost on the way
    assert "cp.async.cg.shared.global" in binary.file("kernel.ptx").decode()


@pytest.mark.parametrize("kv", ["f16", "fp8_e4m3"])
def test_programs_of_a_cluster_are_sent_results_once(make_spec, h100, kv):
    spec = make_spec(kv=kv)
    decode = {"fp8_decode": "cvt"} if kv != "f16" else {}
    chosen = schedule(spec, split="cluster", tile=128, waves=1, **decode)
    binary = compile_triton(render(spec, h100, chosen))
    ptx = binary.file("kernel.ptx").decode()
    assert f".b8 box[{box_bytes(spec, chosen)}]" in ptx
    assert ptx.count("barrier.cluster.arrive.release.aligned") == 1  # behind it, nobody's memory is written
    found = [s for s in feasible(spec, h100) if s["split"] == "cluster"]
    assert {s["num_warps"] for s in found} == {2, 4}
    # of rows of 128 bytes four warps copy 16 at once: with 16 tokens each, a warp's lie in the same banks
    assert {s["tile"] for s in found if s["num_warps"] == 4} == ({128} if kv == "fp8_e4m3" else {64, 128})
    assert {s["waves"] for s in found} == {s["merge"] // 32 for s in found} == {1}


@pytest.mark.parametrize("kv", ["f16", "fp8_e4m3"])
def test_heads_that_are_columns_take_half_the_products_and_fewer_registers(make_spec, h100, kv):
    decode = {"fp8_decode": "cvt", "sums": "dot"} if kv != "f16" else {}
    found = {}
    for rows in (16, 8):
        chosen = schedule(make_spec(kv=kv), rows=rows, tile=32, num_warps=1, **decode)
        found[rows] = compile_triton(render(make_spec(kv=kv), h100, chosen))
    products = {rows: each.file("kernel.ptx").count(b"mma.sync") for rows, each in found.items()}
    assert products[8] <= 0.52 * products[16]
    assert found[8].resources.registers <= found[16].resources.registers - 24
    assert found[8].resources.spill_bytes == 0


@pytest.mark.parametrize("head_dim", [32, 80, 128, 256])
@pytest.mark.parametrize("kv", ["f16", "fp8_e4m3"])
def test_heads_are_columns_where_eight_are_enough_and_warps_share_the_rows(
    make_spec, h100, a100, head_dim, kv
):
    spec = make_spec(head_dim=head_dim, kv=kv)
    for gpu in (h100, a100):
        turned = [s for s in feasible(spec, gpu) if s["rows"] == 8]
        assert turned
        for s in (s for s in turned if s["split"] != "cluster"):
            loads = loads_of(spec, s.int("num_warps"), 8, whole=s["columns"] == "whole")
            assert all(load.width >= 16 * s.int("num_warps") for load in loads)
    assert {s["rows"] for s in feasible(make_spec(heads=(9, 1)), h100)} == {16}
    assert {f.name: f.values for f in TritonDecode().fields(spec, target("mi300x"))}["rows"] == (16,)


@pytest.mark.parametrize(("warps", "width"), [(1, 16), (2, 32), (4, 64)])
def test_sums_by_a_product_have_rows_for_every_warp_where_heads_are_columns(make_spec, h100, warps, width):
    """16 rows of ones for each warp of the product."""
    chosen = schedule(make_spec(), rows=8, num_warps=warps, sums="dot")
    assert f"l = tl.zeros([{width}, 8], tl.float32)" in render(make_spec(), h100, chosen).text


@pytest.mark.parametrize(
    ("gpu", "offered"), [("a100", False), ("h100", True), ("h200", True), ("b200", False)]
)
def test_clusters_are_offered_where_they_were_run(make_spec, gpu, offered):
    splits = {f.name: f.values for f in TritonDecode().fields(make_spec(), target(gpu))}["split"]
    assert ("cluster" in splits) is offered


def test_batch_invariant_schedules_split_by_length_alone(make_spec, h100):
    spec = make_spec(batch_invariant=True)
    found = feasible(spec, h100)
    assert {s["split"] for s in found} == {"fixed"}
    assert {s["split"] for s in feasible(make_spec(), h100)} == {
        "pieces",
        "even",
        "walk",
        "cluster",
    }
    one = default_schedule(spec, h100)
    batches = [Workload.uniform(1, 8192), Workload.uniform(32, 8192)]
    free = default_schedule(make_spec(), h100)
    for batch in batches:
        mine, other = (predict(s, h100, c, batch) for s, c in ((spec, one), (make_spec(), free)))
        assert mine["memory_us"] > other["memory_us"]  # partial results


def test_verify_has_no_batch_invariant_kernels(make_spec, h100):
    with pytest.raises(Unsupported, match=r"batch_invariant = True: the bits of .* follow from the batch"):
        default_schedule(make_spec(op="verify", batch_invariant=True), h100)


def test_default_schedule_is_legal_and_prefers_the_declared_defaults(make_spec, h100):
    spec = make_spec()
    chosen = default_schedule(spec, h100)
    assert (chosen["tile"], chosen["num_warps"], chosen["num_stages"]) == (64, 2, 2)


def test_signature_covers_every_argument(make_spec):
    spec = make_spec(kv="fp8_e4m3")
    types = signature_of(
        spec, ["q_ptr", "k_ptr", "k_scale_ptr", "k_stride_block", "k_stride_head", "qk_scale"]
    )
    assert list(types.values()) == ["*fp16", "*u8", "*fp32", "i32", "i64", "fp32"]


def test_alignment_is_what_head_dim_allows(make_spec):
    assert kv_align(make_spec(head_dim=40, kv="fp8_e4m3")) == 8
    assert kv_align(make_spec(head_dim=40)) == 16
    assert alignment_of(make_spec(), "k_stride_token") == 8
    assert alignment_of(make_spec(), "num_seqs") == 1


@pytest.mark.parametrize(
    ("spec_args", "word"), [({"q": "f32"}, "q_dtype"), ({"k_inner": "token"}, "k_inner")]
)
def test_refuses_what_it_cannot_do(make_spec, h100, spec_args, word):
    with pytest.raises(Unsupported, match=word):
        render(make_spec(**spec_args), h100, schedule(make_spec()))
