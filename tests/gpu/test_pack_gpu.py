"""Packs on a real GPU: loading, calling, capturing, and what the launcher refuses."""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import replace

import pytest
import torch

import pagedgen
from pagedgen.compiler.build import Choice, build
from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.link import link
from pagedgen.compiler.render import render
from pagedgen.compiler.verify import cases_of, gate, judge, make_inputs, run_case
from pagedgen.errors import ArgumentError, PackForeign
from pagedgen.runtime.library import Library
from pagedgen.values.manifest import Rule
from pagedgen.values.schedule import Schedule
from pagedgen.values.target_table import gpu_target
from pagedgen.values.target_table import target as named_target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="no CUDA GPU"),
]
ANY = 2**31 - 1
RULES = (Rule(8, ANY, 0), Rule(ANY, ANY, 1))
LENS = (4097, 1, 0, 515, 33, 64)


@pytest.fixture(scope="module")
def target():
    return gpu_target(0)


@pytest.fixture(scope="module")
def specs(make_spec):
    return [
        make_spec(128, (32, 8), 16, "f16"),
        make_spec(128, (32, 8), 16, "bf16", "fp8_e4m3", lse=True),
        make_spec(80, (14, 2), 32, "bf16", lse=True),
    ]


@pytest.fixture(scope="module")
def choice_of(default_schedule):
    """Two variants of a spec for a target: the default, and one with more waves."""

    def make(spec, target):
        schedule = default_schedule(spec, target)
        other = Schedule.of(schedule.template, **{**dict(schedule.choices), "waves": 2})
        return Choice(tuple(compile_source(render(spec, target, s)) for s in (schedule, other)), RULES, ())

    return make


@pytest.fixture(scope="module")
def choices(choice_of, specs, target):
    return [choice_of(spec, target) for spec in specs]


@pytest.fixture(scope="module")
def attention(choices, tmp_path_factory):
    return pagedgen.load(build(choices, tmp_path_factory.mktemp("packs") / "gpu.pack"))


def call(attention, inputs, **more):
    return attention.decode(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.block_table,
        inputs.seq_lens,
        **{
            "out": inputs.out,
            "lse": inputs.lse,
            "k_scale": inputs.k_scale,
            "v_scale": inputs.v_scale,
            **more,
        },
    )


def captured(work):
    """The same work as a CUDA graph; nothing runs before its replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@pytest.mark.parametrize("way", ["eager", "captured"])
@pytest.mark.parametrize("index", range(3))
def test_every_variant_passes_the_gate(attention, specs, index, way):
    spec = specs[index]
    library = attention.kernel(spec).library
    library.prepare(0)
    for variant in (-1, 0, 1):
        verdict = gate(library, spec, variant, "cuda", 5, wrap=captured if way == "captured" else None)
        assert verdict.passed, verdict.reason


def test_one_graph_serves_changing_lengths(attention, specs):
    spec = specs[0]
    inputs = make_inputs(spec, (2000, 900, 1, 0, 300), "cuda", 1, poison=False)
    workspace = torch.zeros(attention.workspace_bytes(5, spec), dtype=torch.uint8, device="cuda")
    attention.prepare()
    replay = captured(lambda: call(attention, inputs, workspace=workspace))
    for lens in ((2000, 900, 1, 0, 300), (1, 0, 16, 17, 2), (0, 0, 0, 0, 0), (1500, 900, 16, 16, 304)):
        inputs.seq_lens.copy_(torch.tensor(lens, dtype=torch.int32))
        inputs.out.fill_(float("nan"))
        replay()
        torch.cuda.synchronize()
        assert judge(spec, inputs)[2] == ""


def test_a_first_call_may_be_captured(choices, specs, tmp_path):
    """Nothing was loaded before: kernels are loaded while the stream is captured."""
    spec = specs[0]
    library = Library(link(choices[0].binaries, RULES, tmp_path / "fresh.so"))
    inputs = make_inputs(spec, LENS, "cuda", 2)
    workspace = torch.zeros(library.workspace_bytes(len(LENS)), dtype=torch.uint8, device="cuda")
    replay = captured(lambda: run_case(spec, library, -1, inputs, workspace))
    for _ in range(2):
        replay()
        assert judge(spec, inputs)[2] == ""


def test_capture_without_a_workspace(attention, specs):
    """The graph then owns one, and zeroes it itself."""
    spec = specs[0]
    inputs = make_inputs(spec, LENS, "cuda", 3)
    attention.prepare()
    replay = captured(lambda: call(attention, inputs))
    for _ in range(3):
        inputs.out.fill_(float("nan"))
        replay()
        assert judge(spec, inputs)[2] == ""


def test_one_workspace_for_many_and_few_sequences(attention, specs):
    """A small call's partial results must not land on the counters of a large one."""
    spec = specs[0]
    library = attention.kernel(spec).library
    large = make_inputs(spec, (700,) * 64, "cuda", 4)
    small = make_inputs(spec, (30000, 20000), "cuda", 5)
    workspace = torch.zeros(library.workspace_bytes(64), dtype=torch.uint8, device="cuda")
    for inputs in (large, small, large, small, small, large):
        for variant in (0, 1):
            inputs.out.fill_(float("nan"))
            run_case(spec, library, variant, inputs, workspace)
            assert judge(spec, inputs)[2] == ""


def test_streams_and_threads(attention, specs):
    """Threads on streams of their own, workspaces not given."""
    spec = specs[0]
    reasons: list[str] = []

    def work(i: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            inputs = make_inputs(spec, (5000 + i, 7, 500 * i), "cuda", i)
            for _ in range(20):
                inputs.out.fill_(float("nan"))
                call(attention, inputs)
            stream.synchronize()
            reasons.append(judge(spec, inputs)[2])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reasons == [""] * 4


def test_a_call_is_ordered_on_the_current_stream(attention, specs):
    spec = specs[0]
    inputs = make_inputs(spec, LENS, "cuda", 6)
    q = inputs.q.clone()
    attention.prepare()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        inputs.q.zero_()
        torch.cuda._sleep(100_000_000)  # a call on another stream would read zeros meanwhile
        inputs.q.copy_(q)
        call(attention, inputs)
    stream.synchronize()
    assert judge(spec, inputs)[2] == ""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_device_than_the_current_one(attention, specs):
    inputs = make_inputs(specs[0], LENS, "cuda:1", 7)
    with torch.cuda.device(0):
        call(attention, inputs)
        assert torch.cuda.current_device() == 0
    assert judge(specs[0], inputs)[2] == ""


def test_arguments_are_refused_before_any_launch(attention, specs):
    spec = specs[0]
    inputs = make_inputs(spec, (5, 100), "cuda", 8)
    padded = torch.zeros(inputs.k.numel() + 1, dtype=torch.float16, device="cuda")
    shifted = padded[1:].view(inputs.k.shape)
    wide = torch.zeros(*inputs.k.shape[:3], 132, dtype=torch.float16, device="cuda")[..., :128]
    wrong = [
        ("k", shifted, "k: address .*: a multiple of 16 bytes is expected"),
        ("k", wide, r"k\.stride\(2\) = 132: a multiple of 8 elements is expected"),
        (
            "block_table",
            inputs.block_table.cpu(),
            r"block_table\.device = cpu:0: cuda:0 is expected, where q is",
        ),
        ("seq_lens", inputs.seq_lens.cpu(), r"seq_lens\.device = cpu:0: cuda:0 is expected"),
        ("out", inputs.out.cpu(), r"out\.device = cpu:0: cuda:0 is expected"),
        ("v", inputs.v.cpu(), r"v\.device = cpu:0: cuda:0 is expected"),
        ("q", inputs.q.cpu(), r"q\.device = cpu:0: a cuda device is expected"),
    ]
    for name, value, message in wrong:
        arguments = {
            "q": inputs.q,
            "k": inputs.k,
            "v": inputs.v,
            "block_table": inputs.block_table,
            "seq_lens": inputs.seq_lens,
            "out": inputs.out,
            name: value,
        }
        with pytest.raises(ArgumentError, match=message):
            attention.decode(**arguments, spec=spec)
    torch.cuda.synchronize()
    assert bool(inputs.out.isnan().all())  # nothing ran
    call(attention, inputs)
    assert judge(spec, inputs)[2] == ""


def test_no_sequences_is_no_launch(attention, specs):
    inputs = make_inputs(specs[0], (5,), "cuda")
    out = attention.decode(inputs.q[:0], inputs.k, inputs.v, inputs.block_table[:0], inputs.seq_lens[:0])
    assert out.shape[0] == 0
    torch.cuda.synchronize()


def test_more_shared_memory_than_48_kb(default_schedule, specs, target, tmp_path):
    spec = specs[0]
    schedule = default_schedule(spec, target)
    large = {**dict(schedule.choices), "tile": 128, "num_stages": 4, "num_warps": 4}
    binary = compile_source(render(spec, target, Schedule.of(schedule.template, **large)))
    assert binary.resources.smem_bytes > 48 * 1024
    library = Library(link([binary], (), tmp_path / "large.so"))
    verdict = gate(library, spec, 0, "cuda", 9, cases=cases_of(spec, 9)[:2])
    assert verdict.passed, verdict.reason


def test_an_older_architecture_runs_from_its_ptx(choice_of, specs, target, tmp_path):
    """Kernels for sm_80 on what is newer: the driver compiles their PTX; their machine code is refused."""
    a100 = named_target("a100-80g")
    if target.capability // 10 == 8:
        pytest.skip("this GPU runs sm_80 machine code")
    for spec in specs:
        choice = choice_of(spec, a100)
        for embed in ("both", "ptx"):
            attention = pagedgen.load(build([choice], tmp_path / f"{embed}.pack", embed=embed))
            library = attention.kernel(spec).library
            verdict = gate(library, spec, -1, "cuda", 10, cases=cases_of(spec, 10)[:2])
            assert verdict.passed, verdict.reason
    out = build([choice], tmp_path / "cubin.pack", embed="cubin")
    with pytest.raises(PackForeign, match="arch = sm_80: this machine has"):
        pagedgen.load(out)
    with pytest.raises(PackForeign, match="this library holds machine code for sm_80"):
        Library(out / "lib" / f"{spec.name}.so").prepare(0)


def test_a_newer_architecture_is_refused(choices, target, tmp_path):
    newer = replace(target, name="newer", arch=f"sm_{target.capability // 10 * 10 + 19}")
    binaries = tuple(replace(b, source=replace(b.source, target=newer)) for b in choices[0].binaries)
    out = build([Choice(binaries, RULES, ())], tmp_path / "newer.pack")
    with pytest.raises(PackForeign, match=f"arch = {newer.arch}: this machine has {target.arch}"):
        pagedgen.load(out)


def test_call_overhead(attention, specs, capsys):
    """At most 10 us of CPU time a call, all given."""
    spec = specs[0]
    inputs = make_inputs(spec, (64,), "cuda")
    workspace = torch.zeros(attention.workspace_bytes(1, spec), dtype=torch.uint8, device="cuda")
    library = attention.kernel(spec).library
    medians = {}
    for name, work in {
        "decode(out=, workspace=)": lambda: call(attention, inputs, workspace=workspace),
        "decode()": lambda: call(attention, inputs, out=None),
        "library": lambda: run_case(spec, library, -1, inputs, workspace),
    }.items():
        times = []
        for i in range(3000):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
            if i % 100 == 99:
                torch.cuda.synchronize()
        medians[name] = statistics.median(times[300:]) * 1e6
    with capsys.disabled():
        print("\ncall overhead, us:", {name: round(us, 2) for name, us in medians.items()})
    assert medians["decode(out=, workspace=)"] <= 10


def test_load_and_first_call(choices, specs, tmp_path, capsys):
    """Under 100 ms, CUDA being up: pack checked, libraries opened, kernels loaded, result there."""
    out = build(choices, tmp_path / "fresh.pack")
    inputs = make_inputs(specs[0], (64, 1000), "cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    attention = pagedgen.load(out)
    loaded = time.perf_counter()
    call(attention, inputs)
    torch.cuda.synchronize()
    called = time.perf_counter()
    with capsys.disabled():
        print(f"\nload {1e3 * (loaded - start):.1f} ms, first call {1e3 * (called - loaded):.1f} ms")
    assert called - start < 0.1
    assert judge(specs[0], inputs)[2] == ""
