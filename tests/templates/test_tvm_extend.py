"""The CPU extend family: what it computes on every instruction-set level; its source, space and launcher."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.cost import predict
from pagedgen.compiler.link import link
from pagedgen.compiler.render import render
from pagedgen.compiler.space import default_schedule, feasible
from pagedgen.compiler.verify import Case, cases_of, gate, judge, make_inputs, run_case
from pagedgen.compiler.verify_invariant import changed_bits
from pagedgen.errors import ArgumentError, Unsupported
from pagedgen.runtime.library import Library
from pagedgen.templates.tvm.extend import FAMILY
from pagedgen.templates.tvm.vectors import LEVELS
from pagedgen.values.cpu_level import CPU_LEVELS, cpu_flags
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target import Target
from pagedgen.values.workload import Workload

pytest.importorskip("tvm")

GOLDEN = Path(__file__).parents[1] / "golden"
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
    "bf16": {"q": "bf16", "k_inner": "token"},
    "f16-mha": {"q": "f16", "heads": (2, 2), "lse": True},
    "f32-g7": {"q": "f32", "heads": (14, 2), "head_dim": 40, "block_size": 24, "k_inner": "token"},
    "e4m3": {"q": "bf16", "kv": "fp8_e4m3", "scale": "head", "heads": (10, 2)},
    "e5m2": {"q": "f32", "kv": "fp8_e5m2", "k_inner": "token"},
    "slots": {"q": "f16", "block_size": 1, "k_inner": "token"},
    "block-5": {"q": "bf16", "block_size": 5, "heads": (3, 1), "k_inner": "token"},
    "block-544-h248": {"q": "f16", "block_size": 544, "heads": (1, 1), "head_dim": 248},
    # Without a soft cap, whose large scores leave sinks no weight.
    "window-sinks": {"q": "f32", "heads": (2, 1), "window": 60, "sinks": True, "lse": True},
    "masks": {
        "q": "bf16", "kv": "fp8_e4m3", "k_inner": "token", "block_size": 24, "window": 300,
        "logits_soft_cap": 50.0, "sinks": True, "lse": True,
    },
    "alibi": {"q": "f32", "heads": (4, 2), "alibi": True, "lse": True},
    "chunk": {"q": "f32", "heads": (2, 1), "attention_chunk": 100, "sinks": True},
    "full": {"q": "f16", "heads": (3, 1), "causality": "full", "lse": True},
    "full-window-alibi": {"q": "f32", "heads": (2, 1), "causality": "full", "window": 60, "alibi": True},
    "full-chunk-cap": {
        "q": "f32", "heads": (2, 1), "causality": "full", "attention_chunk": 100, "logits_soft_cap": 20.0,
    },
    "percausal": {"q": "bf16", "heads": (4, 2), "k_inner": "token", "causality": "per_sequence", "lse": True},
    "all-masks": {
        "q": "bf16", "heads": (2, 1), "kv": "fp8_e5m2", "block_size": 24, "window": 60,
        "attention_chunk": 256, "causality": "per_sequence", "alibi": True, "logits_soft_cap": 20.0,
        "sinks": True,
    },
    "h192v128": {"q": "bf16", "heads": (2, 1), "head_dim": 192, "head_dim_v": 128, "k_inner": "token"},
    "e4m3-h40v200": {"q": "f16", "kv": "fp8_e4m3", "heads": (2, 1), "head_dim": 40, "head_dim_v": 200},
}  # fmt: skip
SLOW = ("chunk", "full", "full-window-alibi", "h192v128")  # the fuzzer draws the like in every run


@needs_cpu
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in GRID]
)
def test_gate(name, build, make_spec):
    spec = make_spec(**{**SMALL, **GRID[name]}, op="extend")
    verdict = gate(build(spec), spec, 0, "cpu", seed=1)
    assert verdict.passed, verdict.reason


@needs_cpu
@pytest.mark.parametrize("k_inner", ["token", "dim"])
def test_every_kind_of_block_is_right(k_inner, build, make_spec):
    """Of few rows and many, in small tiles and large ones."""
    spec = make_spec(32, (6, 2), 16, "f32", k_inner=k_inner, op="extend")
    legal = sorted(feasible(spec, cpu()), key=lambda s: (s.int("vectors"), s.int("blocks"), s.int("tile")))
    picked = (legal[0], legal[len(legal) // 2], legal[-1])
    library = build(spec, *picked)
    for variant, schedule in enumerate(picked):
        verdict = gate(library, spec, variant, "cpu", seed=2, cases=cases_of(spec, 2)[::3])
        assert verdict.passed, f"{schedule.name}: {verdict.reason}"


@pytest.mark.parametrize("arch", RUNS_HERE[1:])
@pytest.mark.parametrize("dtypes", [("bf16", "bf16"), ("bf16", "fp8_e4m3")])
def test_lower_levels_are_right_too(arch, dtypes, build, make_spec):
    spec = make_spec(32, (8, 2), 16, *dtypes, k_inner="token", op="extend")
    verdict = gate(build(spec, arch=arch), spec, 0, "cpu", seed=3, cases=cases_of(spec, 3)[::3])
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize("arch", LEVELS)
def test_cross_compiles_for_every_level(arch, make_spec):
    """Object files of the right machine, wherever they are compiled."""
    spec = make_spec(64, (8, 2), 16, "bf16", "fp8_e4m3", op="extend")
    code = compile_source(render(spec, cpu(arch), default_schedule(spec, cpu(arch)))).file("kernel.o")
    assert {"x86_64": 62, "aarch64": 183}[arch.split("-")[0]] == int.from_bytes(code[18:20], "little")
    assert b"_query_tile" in code


def pairs(spec: KernelSpec) -> Schedule:
    """The default with products of bf16 pairs."""
    schedule = default_schedule(spec, cpu("x86_64-avx512bf16"))
    return Schedule.of(schedule.template, **{**dict(schedule.choices), "dot": "bf16"})


def test_pairs_are_the_default_where_they_are_fast(make_spec):
    """And only of what loses nothing by them."""
    slow = cpu("x86_64-avx512bf16")
    fast = replace(slow, fast_bf16_dots=True)
    for q, target, dot in (
        ("bf16", fast, "bf16"),
        ("bf16", slow, "f32"),
        ("f32", fast, "f32"),
        ("f16", fast, "f32"),
    ):
        assert default_schedule(make_spec(q=q, op="extend"), target)["dot"] == dot


@pytest.mark.parametrize("block_size", [5, 24])
def test_cross_compiles_pairs_of_any_block(block_size, make_spec):
    """bf16 pairs of K along tokens are shuffled as many tokens at a time as lie next to each other."""
    spec = make_spec(32, (4, 2), block_size, "bf16", k_inner="token", op="extend")
    source = render(spec, cpu("x86_64-avx512bf16"), pairs(spec))
    assert "dpbf16ps" in source.text and compile_source(source).file("kernel.o")


@pytest.mark.skipif("x86_64-avx512bf16" not in RUNS_HERE, reason="this processor has no AVX-512 BF16")
@pytest.mark.parametrize("settings", [{"k_inner": "token"}, {"kv": "fp8_e4m3", "block_size": 5}])
def test_pairs_are_right(settings, build, make_spec):
    spec = make_spec(**{**SMALL, "q": "bf16", **settings}, op="extend")
    verdict = gate(build(spec, pairs(spec)), spec, 0, "cpu", seed=6)
    assert verdict.passed, verdict.reason


@needs_cpu
def test_a_row_does_not_depend_on_how_its_prompt_was_cut(build, make_spec):
    """Whole, in chunks and beside other sequences: the same bits, but for tiles of other rows."""
    spec = make_spec(32, (4, 2), 16, "f32", op="extend")
    library = build(spec)
    whole = make_inputs(spec, (300,), seed=5, poison=False)
    workspace = torch.zeros(library.workspace_bytes(4), dtype=torch.uint8)
    run_case(spec, library, 0, whole, workspace)
    for cuts in ((300,), (1, 299), (37, 64, 100, 99), (299, 1)):
        out, end = torch.full_like(whole.out, float("nan")), 0
        for count in cuts:
            first, end = end, end + count
            rows = slice(first, end)
            library.extend(
                whole.q[rows], whole.k, whole.v, whole.block_table, torch.tensor([end], dtype=torch.int32),
                torch.tensor([0, count], dtype=torch.int32), out[rows], None, whole.softmax_scale, None, None,
                workspace, 304, 0,
            )  # fmt: skip
        torch.testing.assert_close(out, whole.out, rtol=2e-6, atol=2e-7)


INVARIANT = {
    "f32": {"q": "f32", "heads": (3, 1), "lse": True},
    "bf16": {
        "q": "bf16", "heads": (4, 2), "k_inner": "token", "window": 70, "attention_chunk": 256, "alibi": True,
        "sinks": True,
    },
}  # fmt: skip
INVARIANT_LENS = (1, 16, 17, 65, 333, 700)


@needs_cpu
@pytest.mark.parametrize("name", INVARIANT)
def test_bits_do_not_follow_from_the_batch(name, build, make_spec):
    """Over 200 random batches, nor from how a prompt was cut."""
    spec = make_spec(32, **INVARIANT[name], op="extend", batch_invariant=True)
    lens = {"lens": INVARIANT_LENS, "batches": 200}
    assert changed_bits(spec, build(spec), 0, torch.device("cpu"), 3, **lens) == ""


@needs_cpu
def test_what_a_row_does_not_see_adds_nothing(build, make_spec):
    """Not even 2^-126 of it, which shows where all that is seen is 0."""
    spec = make_spec(32, (2, 1), 16, "f32", op="extend", window=20, batch_invariant=True)
    library = build(spec)
    inputs = make_inputs(spec, (300,), seed=1, poison=False)
    inputs.v.fill_(0)
    for block in inputs.block_table[0, :5].tolist():
        inputs.v[block] = 1e3
    workspace = torch.zeros(library.workspace_bytes(1), dtype=torch.uint8)
    run_case(spec, library, 0, inputs, workspace)
    assert not inputs.out[99:].any() and inputs.out[98].all()


@needs_cpu
def test_tiles_that_a_row_sees_nothing_of(build, make_spec):
    """Rows whose window begins behind their block's first tile, at any scale of scores: a masked score times
    it, rounded, is not what the fused product is compared with."""
    spec = make_spec(32, (2, 1), 16, "f32", op="extend", window=20)
    library = build(spec)
    inputs = make_inputs(spec, (300,), seed=1, poison=False)
    workspace = torch.zeros(library.workspace_bytes(1), dtype=torch.uint8)
    for number in range(30):
        inputs = replace(inputs, softmax_scale=0.05 + number / 67)
        run_case(spec, library, 0, inputs, workspace)
        assert judge(spec, inputs)[2] == "", inputs.softmax_scale


@needs_cpu
def test_offsets_of_64_bits(build, make_spec):
    """A pool of more than 2^31 elements; only the blocks that are used take memory."""
    spec = make_spec(32, (4, 1), 16, "bf16", "fp8_e4m3", op="extend")
    inputs = make_inputs(spec, (40,), poison=False)
    count = (1 << 31) // (16 * 32) + 8
    pools = []
    for small in (inputs.k, inputs.v):
        large = torch.empty(count * 16 * 32, dtype=torch.uint8).as_strided(
            (count, *small.shape[1:]), small.stride()
        )
        pools.append(large)
    far = torch.tensor([[count - 1, 2, count - 5]], dtype=torch.int32)
    for near, place in zip(inputs.block_table[0].tolist(), far[0].tolist(), strict=True):
        for large, small in zip(pools, (inputs.k, inputs.v), strict=True):
            large[place] = small.view(torch.uint8)[near]
    library = build(spec)
    workspace = torch.zeros(library.workspace_bytes(1), dtype=torch.uint8)
    library.extend(
        inputs.q, pools[0], pools[1], far, inputs.seq_lens, inputs.cu_seqlens_q, inputs.out, None,
        inputs.softmax_scale, inputs.k_scale, inputs.v_scale, workspace, 48, 0,
    )  # fmt: skip
    assert judge(spec, inputs)[2] == ""


@needs_cpu
def test_what_only_a_cpu_checks(build, make_spec):
    spec = make_spec(32, (4, 2), 16, "f32", op="extend")
    library = build(spec)
    workspace = torch.zeros(library.workspace_bytes(2), dtype=torch.uint8)
    for change, message in (
        ({"seq_lens": 49}, r"seq_lens\[1\] = 49: 0 to 48 is allowed"),
        (
            {"seq_lens": 9},
            r"cu_seqlens_q\[2\] - cu_seqlens_q\[1\] = 10: at most seq_lens\[1\] = 9 is allowed",
        ),
        ({"cu_seqlens_q": 31}, r"cu_seqlens_q\[2\] = 30: 31 to 33 is allowed"),
        ({"cu_seqlens_q": -1}, r"cu_seqlens_q\[1\] = -1: 0 to 33 is allowed"),
        ({"block_table": 99}, r"block_table\[1, 1\] = 99: 0 to 7 is allowed"),
    ):
        inputs = make_inputs(spec, (20, 40), query_lens=(20, 10))
        ((name, value),) = change.items()
        place = (1, 1) if name == "block_table" else 1
        getattr(inputs, name)[place] = value
        with pytest.raises(ArgumentError, match=message):
            run_case(spec, library, 0, inputs, workspace)
        assert inputs.out.isnan().all(), "something was written before the check"
    inputs = make_inputs(spec, (20, 40), query_lens=(20, 0))
    inputs.seq_lens[1], inputs.block_table[1] = 48, 99  # not read where there is no query
    run_case(spec, library, 0, inputs, workspace)
    assert judge(spec, inputs)[2] == ""
    inputs = make_inputs(spec, (20, 40), query_lens=(20, 10))
    inputs.cu_seqlens_q[0] = 8  # rows before it are another call's: the first sequence has 12 queries
    run_case(spec, library, 0, inputs, workspace)
    assert judge(spec, inputs)[2] == ""


@needs_cpu
def test_one_thread_and_many(build, make_spec):
    """Which thread takes a tile changes nothing; workspace need not be clean."""
    spec = make_spec(32, (4, 2), 16, "f32", op="extend")
    library = build(spec)
    inputs = make_inputs(spec, (900, 3, 0, 700), query_lens=(500, 3, 0, 1), poison=False)
    workspace = torch.full((library.workspace_bytes(4),), 255, dtype=torch.uint8)
    run_case(spec, library, 0, inputs, workspace)
    want = inputs.out.clone()
    library.set_num_threads(1)
    inputs.out.fill_(float("nan"))
    run_case(spec, library, 0, inputs, workspace)
    assert torch.equal(inputs.out, want)
    verdict = gate(library, spec, 0, "cpu", seed=4, cases=[Case((333, 70), "hnd", query_lens=(333, 1))])
    assert verdict.passed, verdict.reason


def test_space_cost_and_refusal(make_spec):
    for arch in LEVELS:
        for settings in GRID.values():
            spec = make_spec(**{**SMALL, **settings}, op="extend")
            defaults = {field.name: field.default for field in FAMILY.fields(spec, cpu(arch))}
            assert Schedule.of(FAMILY.name, **defaults) in feasible(spec, cpu(arch)), (arch, spec.name)
    spec, target, work = make_spec(q="f32", op="extend"), cpu("x86_64-avx2"), Workload.chunks(1, 1024, 1024)
    best = default_schedule(spec, target)

    def time_us(
        **changes,
    ) -> float:  # as measured: 57 ms, 95 with a vector of rows, 62 with small query tiles
        return predict(
            spec, target, Schedule.of(best.template, **{**dict(best.choices), **changes}), work
        ).time_us

    assert time_us() < time_us(blocks=2) < time_us(vectors=1)
    with pytest.raises(Unsupported, match="arch x86_64-sse2 of target old"):
        FAMILY.check(spec, Target("old", "cpu", "x86_64-sse2", 2))


def test_rendered_source_is_pinned(make_spec):
    """Regenerate with PAGEDGEN_UPDATE_GOLDEN=1 and read the difference before committing it."""
    masks = {"q": "f16", "k_inner": "token", "window": 128, "sinks": True, "lse": True}
    plain, masked = make_spec(q="bf16", op="extend"), make_spec(**masks, op="extend")
    lower = cpu("x86_64-avx2")
    for name, source in (
        ("tvm-extend-llama-3-8b-bf16-pairs", render(plain, cpu("x86_64-avx512bf16"), pairs(plain))),
        ("tvm-extend-f16-ktoken-masks", render(masked, lower, default_schedule(masked, lower))),
    ):
        path = GOLDEN / f"{name}.py"
        if os.environ.get("PAGEDGEN_UPDATE_GOLDEN"):
            path.write_text(source.text, encoding="utf-8")
        assert source.text == path.read_text(encoding="utf-8")
