"""The CPU decode family: what it computes on every instruction-set level; its source, space and launcher."""

from __future__ import annotations

import math
import os
import random
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.cost import predict
from pagedgen.compiler.link import link
from pagedgen.compiler.render import render
from pagedgen.compiler.space import default_schedule, feasible
from pagedgen.compiler.verify import Case, cases_of, gate, make_inputs, run_case
from pagedgen.compiler.verify_invariant import changed_bits
from pagedgen.errors import ArgumentError, CompileError, Unsupported
from pagedgen.runtime.library import Library
from pagedgen.templates.tvm.decode import FAMILY
from pagedgen.templates.tvm.vectors import EXP2, LEVELS, bf16_table, sum_tree
from pagedgen.values.cpu_level import CPU_LEVELS, cpu_flags
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import DType, KInner
from pagedgen.values.target import Target
from pagedgen.values.workload import Workload

pytest.importorskip("tvm")

GOLDEN = Path(__file__).parents[1] / "golden"
RUNS_HERE = [level for level, needed in CPU_LEVELS.items() if needed <= cpu_flags()]
BEST = RUNS_HERE[0] if RUNS_HERE else "x86_64-avx2"
needs_cpu = pytest.mark.skipif(not RUNS_HERE, reason="no kernels are made for this processor")


def cpu(arch: str = BEST) -> Target:
    return Target("cpu", "cpu", arch, 2)


@pytest.fixture
def build(tmp_path):
    """Compile and link schedules of a spec; without any, its default."""

    def make(spec, *schedules: Schedule, arch: str = BEST) -> Library:
        schedules = schedules or (default_schedule(spec, cpu(arch)),)
        binaries = [compile_source(render(spec, cpu(arch), schedule)) for schedule in schedules]
        return Library(link(binaries, (), tmp_path / f"{spec.name}-{arch}.so"))

    return make


# Every dtype, ratio, block size and kind of head_dim once in each layout; the gate tries edges, NaN poison,
# shuffled blocks, empty rows and long splits on each.
GRID = {
    "bf16": {"q": "bf16", "k_inner": "token"},
    "bf16-nhd": {"q": "bf16"},
    "f16-mha": {"q": "f16", "heads": (4, 4), "k_inner": "token", "lse": True},
    "f32-g7": {"q": "f32", "heads": (14, 2), "head_dim": 96, "block_size": 32, "k_inner": "token"},
    "e4m3": {"q": "bf16", "kv": "fp8_e4m3", "k_inner": "token", "lse": True},
    "e4m3-nhd": {"q": "bf16", "kv": "fp8_e4m3", "scale": "head", "heads": (10, 2)},
    "e5m2-f16": {"q": "f16", "kv": "fp8_e5m2", "scale": "head", "heads": (16, 2), "k_inner": "token"},
    "e5m2-f32": {"q": "f32", "kv": "fp8_e5m2", "heads": (2, 1), "head_dim": 64},
    "e4m3-f16-h80": {"q": "f16", "kv": "fp8_e4m3", "head_dim": 80, "block_size": 64, "k_inner": "token"},
    "slots": {"q": "bf16", "block_size": 1, "heads": (4, 2)},
    "slots-token": {"q": "f16", "block_size": 1, "heads": (4, 2), "k_inner": "token"},
    "block-8": {"q": "bf16", "block_size": 8, "heads": (5, 1), "k_inner": "token"},
    "block-24": {"q": "bf16", "block_size": 24, "heads": (4, 1), "head_dim": 64, "k_inner": "token"},
    "block-5": {"q": "f16", "block_size": 5, "heads": (4, 1), "head_dim": 40, "k_inner": "token"},
    "block-256": {"q": "bf16", "block_size": 256, "heads": (32, 1), "k_inner": "token"},
    "block-544": {"q": "f16", "block_size": 544, "heads": (2, 1), "head_dim": 256, "k_inner": "token"},
    "h40": {"q": "f32", "head_dim": 40, "heads": (8, 2)},
    "window": {"q": "bf16", "k_inner": "token", "window": 100, "lse": True},
    "soft-cap": {"q": "f32", "logits_soft_cap": 30.0, "lse": True},
    "sinks": {"q": "f16", "sinks": True, "lse": True},
    # Without a soft cap, whose large scores leave sinks no weight: a sink counts once, skipped tiles or not.
    "window-sinks": {"q": "f16", "window": 60, "sinks": True, "lse": True},
    "masks": {
        "q": "bf16",
        "kv": "fp8_e4m3",
        "k_inner": "token",
        "block_size": 24,
        "window": 300,
        "logits_soft_cap": 50.0,
        "sinks": True,
        "lse": True,
    },
    "h248": {"q": "bf16", "head_dim": 248, "heads": (3, 1), "k_inner": "token"},
    "alibi": {"q": "f32", "heads": (4, 2), "head_dim": 32, "alibi": True, "lse": True},
    "chunk": {"q": "f32", "heads": (2, 1), "head_dim": 32, "attention_chunk": 100, "sinks": True},
    "chunk-of-slots": {"q": "f16", "heads": (2, 1), "head_dim": 32, "block_size": 1, "attention_chunk": 1},
    "all-masks": {
        "q": "bf16", "heads": (4, 2), "head_dim": 32, "k_inner": "token", "window": 120,
        "attention_chunk": 300, "alibi": True, "logits_soft_cap": 20.0, "sinks": True,
    },
    "h192v128": {"q": "bf16", "heads": (2, 1), "head_dim": 192, "head_dim_v": 128, "k_inner": "token"},
    "h40v200": {"q": "f16", "heads": (2, 1), "head_dim": 40, "head_dim_v": 200, "lse": True},
    "e4m3-h64v96": {"q": "bf16", "kv": "fp8_e4m3", "heads": (2, 1), "head_dim": 64, "head_dim_v": 96},
    "e4m3-h128v40": {  # too short for pairs of V
        "q": "bf16", "kv": "fp8_e4m3", "heads": (2, 1), "head_dim_v": 40, "k_inner": "token",
    },
}  # fmt: skip
# The fuzzer draws the like in every run.
SLOW = (
    "block-8",
    "block-256",
    "chunk",
    "e4m3-f16-h80",
    "e4m3-h128v40",
    "f32-g7",
    "h40v200",
    "sinks",
    "soft-cap",
)


@needs_cpu
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in GRID]
)
def test_gate(name, build, make_spec):
    spec = make_spec(**{"heads": (8, 2), **GRID[name]})
    verdict = gate(build(spec), spec, 0, "cpu", seed=1)
    assert verdict.passed, verdict.reason


@needs_cpu
@pytest.mark.parametrize("k_inner", ["token", "dim"])
@pytest.mark.parametrize("kv", ["bf16", "fp8_e4m3"])
def test_random_schedules_are_right(kv, k_inner, build, make_spec):
    """Any legal schedule computes the same; a fresh draw each time the space changes."""
    spec = make_spec(128, (16, 2), 16, "bf16", kv, k_inner=k_inner)
    picked = random.Random(len(feasible(spec, cpu()))).sample(feasible(spec, cpu()), 6)
    library = build(spec, *picked)
    for variant, schedule in enumerate(picked):
        verdict = gate(library, spec, variant, "cpu", seed=2, cases=cases_of(spec, 2)[:2])
        assert verdict.passed, f"{schedule.name}: {verdict.reason}"


@pytest.mark.parametrize("arch", RUNS_HERE[1:])
@pytest.mark.parametrize("k_inner", ["token", "dim"])
@pytest.mark.parametrize("dtypes", [("bf16", "bf16"), ("f16", "fp8_e4m3"), ("f32", "f32")])
def test_lower_levels_are_right_too(arch, k_inner, dtypes, build, make_spec):
    spec = make_spec(64, (8, 2), 16, *dtypes, k_inner=k_inner)
    verdict = gate(build(spec, arch=arch), spec, 0, "cpu", seed=3, cases=cases_of(spec, 3)[:2])
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize("arch", LEVELS)
@pytest.mark.parametrize("k_inner", ["token", "dim"])
def test_cross_compiles_for_every_level(arch, k_inner, make_spec):
    """Object files of the right machine, which define the two functions, wherever they are compiled."""
    spec = make_spec(128, (8, 2), 16, "bf16", "fp8_e4m3", k_inner=k_inner)
    source = render(spec, cpu(arch), default_schedule(spec, cpu(arch)))
    assert ("dpbf16ps" in source.text) == (arch == "x86_64-avx512bf16")
    binary = compile_source(source)
    code = binary.file("kernel.o")
    machine = int.from_bytes(code[18:20], "little")  # e_machine of the ELF header
    assert code[:4] == b"\x7fELF"
    assert machine == {"x86_64": 62, "aarch64": 183}[arch.split("-")[0]]
    for function in ("tiles", "merge"):
        assert f"{binary.symbol}_{function}".encode() in code
    assert binary.resources.code_bytes == len(code)


def test_refusals(make_spec):
    spec = make_spec(q="bf16")
    with pytest.raises(Unsupported, match=r"arch x86_64-sse2 of target old: .*x86_64-avx2"):
        FAMILY.check(spec, Target("old", "cpu", "x86_64-sse2", 2))
    source = render(spec, cpu(), default_schedule(spec, cpu()))
    broken = type(source)(
        source.spec, source.target, source.schedule, source.text.replace("T.serial(", "T.sorial(")
    )
    with pytest.raises(CompileError, match="sorial"):
        compile_source(broken)


@pytest.mark.parametrize("kind", [DType.FP8_E4M3, DType.FP8_E5M2])
def test_fp8_table_is_exact(kind):
    """Every code without sign, against torch: finite values bit for bit, infinities and NaN as such."""
    low, high = bf16_table(kind)
    bits = torch.tensor([lo | hi << 8 for lo, hi in zip(low, high, strict=True)], dtype=torch.int32)
    got = bits.to(torch.int16).view(torch.bfloat16).double()
    torch_type = torch.float8_e4m3fn if kind is DType.FP8_E4M3 else torch.float8_e5m2
    want = torch.arange(128, dtype=torch.uint8).view(torch_type).double()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(nan=-1.0), want.nan_to_num(nan=-1.0))


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_tree_sums_rows(lanes):
    rows = np.arange(lanes * lanes).reshape(lanes, lanes) ** 2
    level = list(rows)
    for low, high in sum_tree(lanes):
        pairs = [np.concatenate(level[i : i + 2]) for i in range(0, len(level), 2)]
        level = [pair[low] + pair[high] for pair in pairs]
    assert len(level) == 1
    np.testing.assert_array_equal(level[0], rows.sum(1))


def test_polynomial_is_close_enough():
    x = np.linspace(-0.5, 0.5, 100_001, dtype=np.float32)
    value = np.float32(EXP2[0])
    for coefficient in EXP2[1:]:
        value = value * x + np.float32(coefficient)
    assert np.abs(value / np.exp2(x.astype(np.float64)) - 1).max() < 3e-7


@pytest.mark.parametrize("arch", LEVELS)
def test_defaults_are_legal(arch, make_spec):
    """The defaults of the fields, taken together, are a schedule of the space; other tests rely on it."""
    for settings in GRID.values():
        spec = make_spec(**{"heads": (8, 2), **settings})
        defaults = {field.name: field.default for field in FAMILY.fields(spec, cpu(arch))}
        schedules = feasible(spec, cpu(arch))
        assert Schedule.of(FAMILY.name, **defaults) in schedules, spec.name
        assert 50 < len(schedules) < 20_000


def test_cost_model_ranks_what_was_measured(make_spec):
    """Prefetching, bf16 products and wide register blocks were each measured faster; the model agrees."""
    spec, target = make_spec(q="bf16", k_inner="token"), cpu("x86_64-avx512bf16")
    best = default_schedule(spec, target)
    work = Workload.uniform(16, 2048)

    def time_us(**changes) -> float:
        return predict(
            spec, target, Schedule.of(best.template, **{**dict(best.choices), **changes}), work
        ).time_us

    assert time_us() < time_us(ahead=0)
    crowded, one = make_spec(heads=(128, 8), q="bf16", k_inner="token"), Workload.uniform(1, 2048)
    few = default_schedule(crowded, target)
    slow = Schedule.of(few.template, **{**dict(few.choices), "dot": "f32", "k_heads": 1, "v_heads": 1})
    assert predict(crowded, target, few, one).time_us < predict(crowded, target, slow, one).time_us


def prefetched_lines(
    text: str, offsets: dict[str, list[int]], k_stride: int, line: int
) -> dict[str, list[int]]:
    """Numbers of the cache lines of K and V that one tile asks for: its loops, run with prefetches only."""
    kept = []
    loops = textwrap.dedent(
        text[text.index("        for tile in") : text.index("    @T.prim_func(s_tir=True)\n    def merge")]
    )
    for row in loops.splitlines():
        code, indent = row.strip(), row[: len(row) - len(row.lstrip())]
        code = re.sub(r"T\.(?:serial|unroll|vectorized)\(", "range(", code).replace("T.min", "min")
        if found := re.search(r"T\.address_of\(([KV])\[(.*)\]\), 0", code):
            kept.append(f"{indent}touched['{found[1]}'].append(({found[2]}) // {line})")
        elif code.startswith(("for ", "if ")):
            kept += [indent + code, f"{indent}    pass"]
        elif code.startswith(("step =", "line =")):
            kept.append(indent + code)
    touched: dict[str, list[int]] = {"K": [], "V": []}
    exec("\n".join(kept), {"touched": touched, "num_tiles": 1, "k_stride": k_stride, **offsets})
    return touched


PREFETCHED = {
    "block-16": {},
    "block-64": {"block_size": 64},  # a row of K is two lines
    "block-256": {"block_size": 256},  # two tiles of it to a block
    "e4m3": {"kv": "fp8_e4m3", "block_size": 32},
    "f32-g7": {"q": "f32", "heads": (14, 2), "head_dim": 96},  # steps and lines do not divide each other
    "g16": {"heads": (32, 2)},
    "mha": {"q": "f16", "heads": (2, 2)},
    "dim": {"k_inner": "dim"},
}


@pytest.mark.parametrize("name", PREFETCHED)
def test_the_next_tile_is_prefetched_whole(name, make_spec):
    """Every line of K and V once: one that is left out is a miss, one asked for twice an instruction."""
    spec = make_spec(**{"heads": (8, 2), "k_inner": "token", **PREFETCHED[name]})
    target = cpu("x86_64-avx512bf16")
    schedule = default_schedule(spec, target)
    tile, dim, block = schedule.int("tile"), spec.head_dim, spec.block_size
    unit, line = math.gcd(tile, block), 64 // spec.kv_dtype.size
    tokens = [t * dim for t in range(2 * tile)]
    k_units = [u * unit // block * block * dim + u * unit % block for u in range(2 * tile // unit)]
    touched = prefetched_lines(
        render(spec, target, schedule).text,
        {"KU": k_units, "k_next": tokens[tile:], "v_next": tokens[tile:]},
        block,
        line,
    )
    whole = {t // line for t in range(tile * dim, 2 * tile * dim, line)}
    rows = [start + d * block for start in k_units[tile // unit :] for d in range(dim)]
    along_tokens = {(row + t) // line for row in rows for t in range(0, unit, line)}
    for pool, lines in ("K", along_tokens if spec.k_inner is KInner.TOKEN else whole), ("V", whole):
        assert set(touched[pool]) == lines
        assert len(touched[pool]) <= 1.02 * len(lines)


GOLDENS = {
    "tvm-llama-3-8b-bf16": {"q": "bf16", "k_inner": "token"},
    "tvm-slots-f16": {"q": "f16", "block_size": 1},
}


@pytest.mark.parametrize("name", GOLDENS)
def test_rendered_source_is_pinned(name, make_spec):
    """Regenerate with PAGEDGEN_UPDATE_GOLDEN=1 and read the difference before committing it."""
    target = cpu("x86_64-avx512bf16")
    spec = make_spec(**GOLDENS[name])
    text = render(spec, target, default_schedule(spec, target)).text
    path = GOLDEN / f"{name}.py"
    if os.environ.get("PAGEDGEN_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


# ---- Batch invariance ----

INVARIANT = {
    "f32": {"q": "f32", "sinks": True, "lse": True},
    "bf16": {"q": "bf16", "k_inner": "token", "heads": (6, 2), "window": 9000, "alibi": True},
}
# In parts of the default's 512 tokens: one of them, or two, or as many as there may be; and longer ones.
INVARIANT_LENS = (1, 16, 333, 512, 513, 700, 1030, 3000, 8192, 12000)


@needs_cpu
@pytest.mark.parametrize("name", INVARIANT)
def test_bits_do_not_follow_from_the_batch(name, build, make_spec):
    """Over 200 random batches, whoever does which part of them."""
    spec = make_spec(32, **{"heads": (4, 2), **INVARIANT[name]}, batch_invariant=True)
    library = build(spec)
    lens = {"lens": INVARIANT_LENS, "batches": 200}
    assert changed_bits(spec, library, 0, torch.device("cpu"), 3, **lens) == ""
    inputs = make_inputs(spec, INVARIANT_LENS, poison=False)
    workspace = torch.zeros(library.workspace_bytes(len(INVARIANT_LENS)), dtype=torch.uint8)
    run_case(spec, library, 0, inputs, workspace)
    want = inputs.out.clone()
    for threads in range(1, len(os.sched_getaffinity(0)) + 1):
        library.set_num_threads(threads)
        run_case(spec, library, 0, inputs, workspace)
        assert torch.equal(inputs.out, want), threads
    verdict = gate(library, spec, 0, "cpu", 3, cases=[Case(INVARIANT_LENS, "hnd")])
    assert verdict.passed, verdict.reason


@needs_cpu
def test_shares_that_follow_from_the_batch_are_found_out(build, make_spec):
    free, invariant = make_spec(32, (4, 2), q="f32"), make_spec(32, (4, 2), q="f32", batch_invariant=True)
    lens = {"lens": INVARIANT_LENS, "batches": 20}
    assert "differ from those it has alone" in changed_bits(
        invariant, build(free), 0, torch.device("cpu"), 3, **lens
    )


def test_parts_are_a_schedule_of_invariant_specs_alone(make_spec):
    free, invariant = make_spec(q="bf16"), make_spec(q="bf16", batch_invariant=True)
    assert {"part", "max_parts"} == {f.name for f in FAMILY.fields(invariant, cpu())} - {
        f.name for f in FAMILY.fields(free, cpu())
    }
    one, work = default_schedule(invariant, cpu()), Workload.uniform(16, 8192)
    short = Schedule.of(one.template, **{**dict(one.choices), "part": 256, "max_parts": 64})
    partials = [predict(invariant, cpu(), s, work)["instructions"] for s in (one, short)]
    assert partials[0] < partials[1]  # more parts, more to merge
    assert predict(free, cpu(), default_schedule(free, cpu()), work)["instructions"] < partials[0]


# ---- The launcher ----


@needs_cpu
def test_offsets_of_64_bits(build, make_spec):
    """A pool of more than 2^31 elements; only the blocks that are used take memory."""
    spec = make_spec(128, (4, 1), 16, "bf16", "fp8_e4m3", k_inner="token")
    inputs = make_inputs(spec, (40,), poison=False)
    count = (1 << 31) // (16 * 128) + 8
    pools = []
    for small in (inputs.k, inputs.v):
        # the strides of the small pool, over a large one
        large = torch.empty(count * 16 * 128, dtype=torch.uint8).as_strided(
            (count, *small.shape[1:]), small.stride()
        )
        pools.append(large)
    far = torch.tensor([[count - 1, 2, count - 5]], dtype=torch.int32)
    for near, place in zip(inputs.block_table[0].tolist(), far[0].tolist(), strict=True):
        for large, small in zip(pools, (inputs.k, inputs.v), strict=True):
            large[place] = small.view(torch.uint8)[near]
    library = build(spec)
    workspace = torch.zeros(library.workspace_bytes(1), dtype=torch.uint8)
    run_case(spec, library, 0, inputs, workspace)
    want = inputs.out.clone()
    moved = make_inputs(spec, (40,), poison=False)
    library.decode(
        inputs.q, pools[0], pools[1], far, inputs.seq_lens, moved.out, None, inputs.softmax_scale,
        inputs.k_scale, inputs.v_scale, workspace, 48, 0,
    )  # fmt: skip
    assert torch.equal(moved.out, want)


@needs_cpu
def test_same_bits_every_time_and_workspace_left_clean(build, make_spec):
    """Chunks are taken by whichever thread is free; the result does not depend on it."""
    spec = make_spec(64, (8, 2), 16, "f32", k_inner="token")
    library = build(spec)
    inputs = make_inputs(spec, (9000, 3, 0, 700), poison=False)
    workspace = torch.zeros(library.workspace_bytes(4), dtype=torch.uint8)
    results = []
    for _ in range(20):
        run_case(spec, library, 0, inputs, workspace)
        results.append(inputs.out.clone())
    assert all(torch.equal(results[0].nan_to_num(), other.nan_to_num()) for other in results[1:])
    # one thread cuts the batch elsewhere: equal up to rounding
    library.set_num_threads(1)
    run_case(spec, library, 0, inputs, workspace)
    torch.testing.assert_close(inputs.out.nan_to_num(), results[0].nan_to_num(), rtol=1e-5, atol=1e-6)


@needs_cpu
def test_what_only_a_cpu_checks(build, make_spec):
    spec = make_spec(64, (4, 2), 16, "f32")
    library = build(spec)
    inputs = make_inputs(spec, (20, 40))
    workspace = torch.zeros(library.workspace_bytes(2), dtype=torch.uint8)
    inputs.seq_lens[1] = 49
    with pytest.raises(ArgumentError, match=r"seq_lens\[1\] = 49: 0 to 48 is allowed"):
        run_case(spec, library, 0, inputs, workspace)
    inputs.seq_lens[1] = -1
    with pytest.raises(ArgumentError, match=r"seq_lens\[1\] = -1: 0 to 48 is allowed"):
        run_case(spec, library, 0, inputs, workspace)
    inputs.seq_lens[1] = 40
    for bad in (inputs.k.shape[0], -1):
        inputs.block_table[1, 2] = bad
        with pytest.raises(
            ArgumentError, match=rf"block_table\[1, 2\] = {bad}: 0 to {inputs.k.shape[0] - 1}"
        ):
            run_case(spec, library, 0, inputs, workspace)
    assert inputs.out.isnan().all(), "something was written before the check"
    inputs.seq_lens[1] = 32  # then the entry is not used, and may be anything
    run_case(spec, library, 0, inputs, workspace)
    with pytest.raises(ArgumentError, match=r"num_threads = 0: 1 to \d+ is allowed"):
        library.set_num_threads(0)
    token = make_spec(64, (4, 2), 1, "f32", k_inner="token")
    library = build(token)
    inputs = make_inputs(token, (5,))
    spread = torch.zeros(*inputs.k.shape[:3], 128)[..., ::2]
    with pytest.raises(ArgumentError, match=r"k\.stride\(3\) = 2: 1 is expected along head_dim"):
        library.decode(
            inputs.q, spread, inputs.v, inputs.block_table, inputs.seq_lens, inputs.out, None,
            inputs.softmax_scale, None, None, workspace, 5, 0,
        )  # fmt: skip


@needs_cpu
def test_batches_of_every_size(build, make_spec):
    """From less than a chunk each to many chunks a sequence, one sequence to hundreds."""
    spec = make_spec(64, (4, 2), 16, "f32", k_inner="token")
    library = build(spec)
    cases = [Case(lens, "hnd") for lens in ((1,), (6000,), (64,) * 100, (2000, *range(90)))]
    verdict = gate(library, spec, 0, "cpu", seed=4, cases=cases)
    assert verdict.passed, verdict.reason


WITHOUT_TORCH = """
import os, sys
sys.modules["torch"] = None  # and so no OpenMP: the library's own threads do the work
import numpy as np, tvm_ffi

library = tvm_ffi.load_module(sys.argv[1])
random = np.random.default_rng(0)
lens = np.array([3000, 700, 0, 65], np.int32)
blocks = -(-lens // 16)
table = np.zeros((4, blocks.max()), np.int32)
order = random.permutation(blocks.sum()).astype(np.int32)
for row, (start, count) in enumerate(zip(np.cumsum(blocks) - blocks, blocks)):
    table[row, :count] = order[start : start + count]
k, v = (random.standard_normal((blocks.sum(), 16, 2, 64)).astype(np.float32) for _ in range(2))
q = random.standard_normal((4, 8, 64)).astype(np.float32)

def check():
    out = np.full_like(q, np.nan)
    workspace = np.zeros(library.workspace_bytes(4) + 64, np.uint8)
    workspace = workspace[-workspace.ctypes.data % 64 :]
    tensors = [tvm_ffi.from_dlpack(x) for x in (q, k, v, table, lens, out, workspace)]
    library.decode(*tensors[:6], None, 0.125, None, None, tensors[6], 3000, 0)
    for row, length in enumerate(lens):
        if length:
            keys, values = (x[table[row, : blocks[row]]].reshape(-1, 2, 64)[:length] for x in (k, v))
            scores = np.einsum("hgd,thd->hgt", q[row].reshape(2, 4, 64), keys) * 0.125
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            want = np.einsum("hgt,thd->hgd", weights / weights.sum(-1, keepdims=True), values).reshape(8, 64)
            np.testing.assert_allclose(out[row], want, rtol=1e-4, atol=1e-5)
        else:
            assert np.isnan(out[row]).all()

for _ in range(50):
    check()
assert os.path.exists("/proc/self/task") and len(os.listdir("/proc/self/task")) > 1, "no thread was started"
child = os.fork()
if child == 0:
    check()  # the parent's threads are not here; new ones are
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
del library  # unloading stops the threads
print("done")
"""


@needs_cpu
def test_its_own_threads_forks_and_unloading(build, make_spec, tmp_path):
    spec = make_spec(64, (8, 2), 16, "f32")
    build(spec)
    (path,) = tmp_path.glob("*.so")
    environment = {**os.environ, "PAGEDGEN_NUM_THREADS": "3"}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(path)],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout == "done\n"
