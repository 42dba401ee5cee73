"""``Attention`` on real CPU kernels out of a real pack."""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import replace

import pytest
import torch

import pagedgen
from pagedgen.compiler.build import build
from pagedgen.compiler.verify import cases_of, gate, judge, make_inputs
from pagedgen.errors import ArgumentError, PagedgenError, SpecNotInPack
from pagedgen.runtime.attention import Attention

LENS = (5, 100, 0, 33, 1, 64)


@pytest.fixture(scope="module")
def attention(cpu_pack):
    """The three specs' pack, loaded."""
    return pagedgen.load(cpu_pack)


@pytest.fixture
def plain(make_spec):
    return make_spec(64, (8, 2), 16, "f32")


@pytest.fixture
def with_lse(make_spec):
    return make_spec(64, (8, 2), 16, "f32", lse=True)


@pytest.fixture
def fp8(make_spec):
    return make_spec(64, (8, 2), 16, "f32", "fp8_e4m3")


def call(attention, inputs, **more):
    """A call on the gate's inputs, with out given."""
    return attention.decode(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.block_table,
        inputs.seq_lens,
        **{"out": inputs.out, "k_scale": inputs.k_scale, "v_scale": inputs.v_scale, **more},
    )


def test_specs(attention, plain, with_lse, fp8):
    assert set(attention.specs) == {plain, with_lse, fp8}


def test_every_variant_of_every_spec_passes_the_gate(attention):
    for spec in attention.specs:
        library = attention.kernel(spec).library
        for variant in (-1, 0, 1):
            verdict = gate(library, spec, variant, "cpu", seed=3, cases=cases_of(spec, 3)[:1])
            assert verdict.passed, verdict.reason


@pytest.mark.parametrize("index", range(3))
def test_the_right_kernel_is_found_and_right(attention, index):
    spec = attention.specs[index]
    inputs = make_inputs(spec, LENS, seed=index)
    result = call(attention, inputs, **({"lse": inputs.lse} if spec.return_lse else {}))
    assert judge(spec, inputs)[2] == ""
    if spec.return_lse:
        assert result[0] is inputs.out and result[1] is inputs.lse
    else:
        assert result is inputs.out


def test_outputs_are_allocated_where_not_given(attention, plain, with_lse):
    inputs = make_inputs(plain, (5, 100))
    assert torch.equal(call(attention, inputs, out=None), call(attention, inputs))
    out, lse = call(attention, inputs, out=None, spec=with_lse)
    torch.testing.assert_close(out, inputs.out)
    assert lse.shape == (2, 8) and lse.dtype == torch.float32 and bool(lse.isfinite().all())


def test_bytes_are_taken_for_fp8(attention, fp8):
    inputs = make_inputs(fp8, LENS)
    call(attention, inputs)
    expected = inputs.out.clone()
    k, v = inputs.k.view(torch.uint8), inputs.v.view(torch.uint8)
    inputs.out.fill_(0)
    attention.decode(
        inputs.q,
        k,
        v,
        inputs.block_table,
        inputs.seq_lens,
        out=inputs.out,
        k_scale=inputs.k_scale,
        v_scale=inputs.v_scale,
    )
    live = inputs.seq_lens > 0
    assert torch.equal(inputs.out[live], expected[live])


def test_no_sequences(attention, plain):
    inputs = make_inputs(plain, (5,))
    out = attention.decode(inputs.q[:0], inputs.k, inputs.v, inputs.block_table[:0], inputs.seq_lens[:0])
    assert out.shape == (0, 8, 64)


def test_softmax_scale(attention, plain):
    inputs = make_inputs(plain, (50,))
    call(attention, inputs)
    default = inputs.out.clone()
    call(attention, inputs, softmax_scale=64**-0.5)
    assert torch.equal(inputs.out, default)
    inputs.q.mul_(0.5)
    call(attention, inputs, softmax_scale=2 * 64**-0.5)
    torch.testing.assert_close(inputs.out, default)


def test_kernels_that_are_not_there(attention, make_spec):
    other = make_spec(96, (8, 2), 16, "f32")
    inputs = make_inputs(other, (5,))
    for more in ({}, {"spec": other}):
        with pytest.raises(SpecNotInPack, match="the pack holds decode-h64-q8-kv2-b16-f32"):
            call(attention, inputs, **more)
    with pytest.raises(SpecNotInPack, match="decode-h96"):
        attention.workspace_bytes(4, other)


def test_kernels_that_cannot_be_told_apart(cpu_choice, tmp_path, make_spec):
    specs = [make_spec(64, (4, 2), 16, "f32", kv) for kv in ("fp8_e4m3", "fp8_e5m2")]
    attention = pagedgen.load(build([cpu_choice(s) for s in specs], tmp_path / "two.pack"))
    for spec in specs:  # their own types tell
        inputs = make_inputs(spec, LENS)
        call(attention, inputs)
        assert judge(spec, inputs)[2] == ""
    inputs = make_inputs(specs[1], LENS)
    bytes_of = {"k": inputs.k.view(torch.uint8), "v": inputs.v.view(torch.uint8)}
    arguments = [inputs.q, bytes_of["k"], bytes_of["v"], inputs.block_table, inputs.seq_lens]
    more = {"out": inputs.out, "k_scale": inputs.k_scale, "v_scale": inputs.v_scale}
    with pytest.raises(SpecNotInPack, match="all fit; say which as spec="):
        attention.decode(*arguments, **more)
    attention.decode(*arguments, **more, spec=specs[1])
    assert judge(specs[1], inputs)[2] == ""


def test_one_kernel_packs_need_no_choice(cpu_choice, tmp_path, plain):
    attention = pagedgen.load(build([cpu_choice(plain)], tmp_path / "one.pack"))
    inputs = make_inputs(plain, LENS)
    call(attention, inputs)
    assert judge(plain, inputs)[2] == ""
    with pytest.raises(ArgumentError, match="lse: None is expected, since this kernel returns no lse"):
        call(attention, inputs, lse=torch.empty(len(LENS), 8))
    with pytest.raises(ArgumentError, match=r"q\.dtype = float16: float32 is expected"):
        attention.decode(inputs.q.half(), inputs.k, inputs.v, inputs.block_table, inputs.seq_lens)


def test_wrong_arguments(attention, plain):
    inputs = make_inputs(plain, (5, 100))

    def wrong(match, **more):
        arguments = {
            "q": inputs.q,
            "k": inputs.k,
            "v": inputs.v,
            "block_table": inputs.block_table,
            "seq_lens": inputs.seq_lens,
            "out": inputs.out,
        }
        with pytest.raises(ArgumentError, match=match):
            attention.decode(**{**arguments, **more})

    wrong(r"q\.shape = \[8, 64\]: rank 3", q=inputs.q[0])
    wrong(r"k\.shape = .*: rank 4", k=inputs.k[0])
    wrong(r"block_table\.shape = \[7\]: rank 2", block_table=inputs.block_table[0])
    wrong(r"block_table\.dtype = int64: int32", block_table=inputs.block_table.long())
    wrong("too narrow for max_seq_len = 1000", max_seq_len=1000)
    wrong(r"workspace\.shape = \[64\]: at least", workspace=torch.zeros(64, dtype=torch.uint8))
    wrong(r"v: torch\.strided on meta", v=inputs.v.to("meta"))
    wrong("q: list: a torch.Tensor is expected", q=[1])
    wrong("block_table: list: a torch.Tensor is expected", block_table=[[1]])
    wrong("seq_lens: not a tensor", seq_lens=[5, 100])
    wrong("q: torch.sparse_coo on cpu", q=inputs.q.to_sparse())
    call(attention, inputs)  # none of it stuck
    assert judge(plain, inputs)[2] == ""


def test_a_given_workspace_is_enough_and_nothing_is_allocated(attention, plain):
    workspace = torch.zeros(attention.workspace_bytes(len(LENS), plain), dtype=torch.uint8)
    assert attention.workspace_bytes(len(LENS)) >= workspace.numel()
    inputs = make_inputs(plain, LENS)
    kernel = attention.kernel(plain)
    before = dict(kernel.workspaces._current)
    call(attention, inputs, workspace=workspace)
    assert judge(plain, inputs)[2] == ""
    assert kernel.workspaces._current == before


def test_workspaces_grow_and_outgrown_ones_stay(cpu_pack, plain):
    attention = pagedgen.load(cpu_pack)
    workspaces = attention.kernel(plain).workspaces
    seen = []
    for num_seqs in (1, 16, 17, 3, 50, 1):
        inputs = make_inputs(plain, (3,) * num_seqs)
        call(attention, inputs)
        assert judge(plain, inputs)[2] == ""
        seen.append(workspaces.take(num_seqs, inputs.q.device).data_ptr())
    assert len(set(seen)) == 3  # for 16, 32 and 64 sequences
    assert seen[0] == seen[1] and seen[2] == seen[3] and seen[4] == seen[5]
    assert {t.data_ptr() for t in workspaces._outgrown} == {seen[0], seen[2]}


def test_calls_of_many_threads(attention, plain):
    """Each thread has its own workspace, so calls that overlap do not meet."""
    inputs = [make_inputs(plain, (3000 + i, 7, 500 * i), seed=i) for i in range(4)]
    reasons: list[str] = []

    def work(i: int) -> None:
        for _ in range(10):
            inputs[i].out.fill_(float("nan"))
            call(attention, inputs[i])
            reasons.append(judge(plain, inputs[i])[2])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reasons == [""] * 40


def test_prepare_is_nothing_on_a_cpu(attention):
    attention.prepare()


def test_prepare_takes_a_cuda_device_and_by_default_the_current_one(attention, monkeypatch):
    prepared = []
    library = type("Library", (), {"prepare": staticmethod(prepared.append)})
    gpu = object.__new__(Attention)
    manifest = replace(attention.pack.manifest, kind="cuda", arch="sm_90")
    gpu.pack = replace(attention.pack, manifest=manifest)
    gpu._kernels = {0: type("Kernel", (), {"library": library})}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for device in (2, "cuda:1", torch.device("cuda", 0), "cuda"):
        gpu.prepare(device)
    assert prepared == [2, 1, 0, 3]
    with pytest.raises(ArgumentError, match="device = cpu: a CUDA device"):
        gpu.prepare("cpu")


def test_a_spec_that_is_none_is_named(attention):
    with pytest.raises(SpecNotInPack, match=r"spec = 'decode': the pack holds decode-"):
        attention.kernel("decode")


def test_errors_of_the_library_are_pagedgens_own(attention, plain):
    with pytest.raises(PagedgenError):
        attention.kernel(plain).library.decode(1)


def test_a_call_costs_microseconds(attention, plain):
    """Arguments checked and no work: far under the 10 us that a call may cost, even on a busy machine."""
    inputs = make_inputs(plain, (0,))
    workspace = torch.zeros(attention.workspace_bytes(1, plain), dtype=torch.uint8)
    times = []
    for _ in range(2000):
        start = time.perf_counter()
        call(attention, inputs, workspace=workspace)
        times.append(time.perf_counter() - start)
    assert statistics.median(times) < 20e-6
