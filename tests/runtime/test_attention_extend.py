"""``Attention`` with several operators: which library a call goes to, and with what.

The libraries are real ones of made-up GPU kernels; their functions are replaced by the reference, on the CPU.
That extend kernels compute attention is shown by the gate (tests/templates, tests/gpu).
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest
import torch

import pagedgen
from pagedgen.compiler.build import Choice, build
from pagedgen.compiler.verify import Inputs, judge, make_inputs, query_ranges, reference
from pagedgen.errors import ArgumentError, InvalidPool, SpecNotInPack
from pagedgen.runtime import ops
from pagedgen.runtime.attention import TORCH_DTYPES, Attention
from pagedgen.runtime.block_pools import BlockPools
from pagedgen.runtime.kv_cache import KVCache, KVShape
from pagedgen.runtime.kv_layout import KVLayout
from pagedgen.runtime.kv_scales import set_scales
from pagedgen.runtime.lengths import VARIABLE
from pagedgen.runtime.pack import open_pack
from pagedgen.values.manifest import Rule
from pagedgen.values.spec import DType, KVScale, Rope

SHAPE = {"head_dim": 64, "heads": (8, 2)}
MIXED = {"alibi": True, "causality": "per_sequence", "head_dim_v": 32}
LENS, QUERIES = (50, 17, 0, 33), (20, 1, 0, 33)


@pytest.fixture(scope="module")
def pack_of(make_spec, gpu_binary, tmp_path_factory):
    def make(*specs):
        choices = [Choice((gpu_binary(spec),), (Rule(2**31 - 1, 2**31 - 1, 0),), ()) for spec in specs]
        return Attention(open_pack(build(choices, tmp_path_factory.mktemp("packs") / "gpu.pack")))

    return make


@pytest.fixture
def served(pack_of, make_spec):
    """A pack of decode, extend with and without LSE and sinks, verify of both masks; calls are noted."""
    decode, plain = make_spec(**SHAPE), make_spec(**SHAPE, op="extend")
    lse, sinks = make_spec(**SHAPE, op="extend", lse=True), make_spec(**SHAPE, op="extend", sinks=True)
    line, tree = make_spec(**SHAPE, op="verify"), make_spec(**SHAPE, op="verify", tree_mask=True)
    mixed = make_spec(**SHAPE, op="extend", **MIXED)
    attention, calls = pack_of(decode, plain, lse, sinks, line, tree, mixed), []
    for kernel in attention._kernels.values():

        def call(*arguments, spec=kernel.spec):
            calls.append((spec, arguments))
            if spec.op == "decode":
                return
            q, k, v, table, lens, ends, out, lse, scale, k_scale, v_scale, workspace, most, variant, *more = (
                arguments
            )
            assert variant == -1 and workspace.dtype == torch.uint8
            wanted = (spec.sinks, spec.alibi, spec.causality == "per_sequence", spec.tree_mask)
            extras = [more.pop(0) if each else None for each in wanted]
            assert not more
            inputs = Inputs(q, k, v, table, lens, out, lse, k_scale, v_scale, scale, most, ends, *extras)
            want, want_lse, _ = reference(spec, inputs)
            for first, end in query_ranges(spec, inputs):
                out[first:end] = want[first:end].to(out.dtype)
                if lse is not None:
                    lse[first:end] = want_lse[first:end].float()

        kernel.call = call
    return attention, calls, (decode, plain, lse, sinks)


def extend(attention, inputs, **more):
    return attention.extend(
        inputs.q, inputs.k, inputs.v, inputs.block_table, inputs.seq_lens, inputs.cu_seqlens_q, **more
    )


def test_the_tensors_pick_the_kernel(served):
    attention, calls, (decode, plain, lse, sinks) = served
    for spec in (plain, lse, sinks):
        inputs = make_inputs(spec, LENS, query_lens=QUERIES)
        more = {"lse": inputs.lse} if spec is lse else {"sinks": inputs.sinks} if spec is sinks else {}
        result = extend(attention, inputs, out=inputs.out, **more)
        assert calls[-1][0] == spec
        assert judge(spec, inputs)[2] == ""
        assert result[0] is inputs.out if spec is lse else result is inputs.out
    inputs = make_inputs(decode, LENS)
    attention.decode(inputs.q, inputs.k, inputs.v, inputs.block_table, inputs.seq_lens)
    assert calls[-1][0] == decode and len(calls[-1][1]) == 13


def test_defaults_are_filled_in(served):
    attention, calls, (_, plain, lse, _) = served
    inputs = make_inputs(plain, LENS, query_lens=QUERIES)
    out = extend(attention, inputs)
    assert out.shape == inputs.q.shape and out.dtype == inputs.q.dtype
    arguments = calls[-1][1]
    assert arguments[8] == 64**-0.5 and arguments[12] == inputs.block_table.shape[1] * 16
    out, sums = extend(attention, inputs, spec=lse)
    assert sums.shape == inputs.q.shape[:2] and sums.dtype == torch.float32


def test_an_only_kernel_of_its_operator_is_taken_and_checks_by_itself(pack_of, make_spec):
    plain = make_spec(**SHAPE, op="extend")
    attention = pack_of(make_spec(**SHAPE), plain)
    inputs = make_inputs(plain, LENS, query_lens=QUERIES)
    with pytest.raises(ArgumentError, match=r"q\.device = cpu:0: a cuda device is expected"):
        extend(attention, inputs)
    with pytest.raises(
        ArgumentError, match="sinks: None is expected, since extend-h64-q8-kv2-b16-f16 has none"
    ):
        extend(attention, inputs, sinks=torch.zeros(8))
    with pytest.raises(ArgumentError, match=r"block_table\.shape = \[4\]: rank 2 is expected"):
        attention.extend(inputs.q, inputs.k, inputs.v, inputs.seq_lens, inputs.seq_lens, inputs.cu_seqlens_q)


def test_what_the_pack_does_not_have(served, pack_of, make_spec):
    attention, _, (decode, plain, *_) = served
    inputs = make_inputs(plain, LENS, query_lens=QUERIES)
    with pytest.raises(SpecNotInPack, match=f"spec = {decode.name}: a spec of extend is expected"):
        extend(attention, inputs, spec=decode)
    other = make_inputs(make_spec(head_dim=32, heads=(8, 2), op="extend"), LENS, query_lens=QUERIES)
    with pytest.raises(SpecNotInPack, match=r"q float16 \[57, 8, 32\].*: no kernel fits; the pack holds"):
        extend(attention, other)
    with pytest.raises(ArgumentError, match=r"rank 3 is expected, .num_tokens, num_q_heads, head_dim"):
        attention.extend(
            inputs.q[0], *(inputs.k, inputs.v, inputs.block_table, inputs.seq_lens, inputs.seq_lens)
        )
    decodes = pack_of(decode)
    with pytest.raises(SpecNotInPack, match=f"extend: the pack holds {decode.name}"):
        extend(decodes, inputs)


def test_the_operator_compiles_into_one_graph(served):
    attention, _, (_, plain, _, sinks) = served
    operator = ops.bind_extend(attention)

    def layer(q, k, v, table, lens, ends, sinks):
        return operator(q * 2, k, v, table, lens, ends, softmax_scale=0.1, sinks=sinks) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for spec in (plain, sinks):
        inputs = make_inputs(spec, LENS, query_lens=QUERIES)
        tensors = (inputs.k, inputs.v, inputs.block_table, inputs.seq_lens, inputs.cu_seqlens_q)
        want = torch.zeros_like(inputs.q)
        attention.extend(inputs.q * 2, *tensors, out=want, softmax_scale=0.1, sinks=inputs.sinks)
        assert not want[-3:].any() and want[:-3].any()  # padding rows are zeros
        assert torch.equal(layer(inputs.q, *tensors, inputs.sinks), want + 1)
        assert torch.equal(compiled(inputs.q, *tensors, inputs.sinks), want + 1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cu_seqlens_q", [0, 20, 19, 21, 54], r"cu_seqlens_q\[2\] = 19: 20 or more is allowed"),
        (
            "cu_seqlens_q",
            [0, 20, 21, 22, 54],
            r"cu_seqlens_q\[3\] = 22: 1 queries of sequence 2, whose seq_len is 0",
        ),
        ("cu_seqlens_q", [0, 20, 21, 21, 58], "cu_seqlens_q = 0 … 58: 0 to 57, the rows of q, is allowed"),
        ("cu_seqlens_q", [-1, 20, 21, 21, 54], "cu_seqlens_q = -1 … 54: 0 to 57"),
        ("seq_lens", [50, 17, -1, 33], r"seq_lens\[2\] = -1: 0 to max_seq_len \(64\) is allowed"),
        ("seq_lens", [65, 17, 0, 33], r"seq_lens\[0\] = 65: 0 to max_seq_len"),
        ("block_table", [[0, 1, 2, 12]] + [[0] * 4] * 3, r"block_table\[0, 3\] = 12: 0 to 11 is allowed"),
        ("block_table", [[0] * 4, [0, -1, 0, 0], [0] * 4, [0] * 4], r"block_table\[1, 1\] = -1: 0 to 11"),
    ],
)
def test_lengths_are_checked_where_it_is_asked_for(pack_of, make_spec, monkeypatch, name, value, message):
    monkeypatch.setenv(VARIABLE, "1")
    spec = make_spec(**SHAPE, op="extend")
    attention, calls = pack_of(spec), []
    attention.kernel(spec).call = lambda *arguments: calls.append(arguments)
    inputs = make_inputs(spec, LENS, query_lens=QUERIES)
    assert inputs.k.shape[0] == 12 and inputs.q.shape[0] == 57
    extend(attention, inputs)
    assert len(calls) == 1
    setting = {name: torch.tensor(value, dtype=torch.int32)}
    with pytest.raises(ArgumentError, match=message):
        extend(attention, replace(inputs, **setting))
    assert len(calls) == 1


def test_lengths_are_not_read_unless_asked_for(pack_of, make_spec, monkeypatch):
    spec = make_spec(**SHAPE)
    attention, calls = pack_of(spec), []
    attention.kernel(spec).call = lambda *arguments: calls.append(arguments)
    inputs = make_inputs(spec, (5, 9))
    inputs.seq_lens[1] = 10_000
    attention.decode(inputs.q, inputs.k, inputs.v, inputs.block_table, inputs.seq_lens)
    assert len(calls) == 1
    monkeypatch.setenv(VARIABLE, "1")
    checking = Attention(attention.pack)
    with pytest.raises(ArgumentError, match=r"seq_lens\[1\] = 10000: 0 to max_seq_len \(16\) is allowed"):
        checking.decode(inputs.q, inputs.k, inputs.v, inputs.block_table, inputs.seq_lens)
    monkeypatch.setenv(VARIABLE, "yes")
    with pytest.raises(ArgumentError, match=f"{VARIABLE} = 'yes': 0 or 1 is allowed"):
        Attention(attention.pack)


@pytest.mark.parametrize("layout", [KVLayout.NHD, KVLayout.HND, KVLayout.PACKED])
@pytest.mark.parametrize("kv", ["f16", "fp8_e4m3"])
def test_a_cache_writes_through_the_packs_kernel(pack_of, make_spec, layout, kv):
    """The same bytes as torch's operators, by the method and by the operator, and only where it fits."""
    spec = make_spec(64, (2, 2), 16, kv=kv, scale="head", op="write_kv")
    other = make_spec(64, (2, 2), 8, kv=kv, scale="head", op="write_kv")
    attention, calls = pack_of(spec, other), []

    def call(new_k, new_v, slots, k, v, k_scale, v_scale, variant):
        calls.append(variant)
        assert k.shape == (5, 16, 2, 64) and k.dtype == TORCH_DTYPES[spec.kv_dtype]
        kept = slots >= 0
        for new, pool, scale in ((new_k, k, k_scale), (new_v, v, v_scale)):
            if scale is not None:
                most = torch.finfo(pool.dtype).max
                new = (new.float() / scale[:, None]).clamp(-most, most).to(pool.dtype).view(torch.uint8)
                pool = pool.view(torch.uint8)
            pool[slots[kept] // 16, slots[kept] % 16] = new[kept]

    attention.kernel(spec).call = call
    shape = KVShape(2, 2, 64, 16, DType(kv), spec.kv_scale, layout)
    scales = (
        {"k_scale": torch.rand(2, 2) + 0.5, "v_scale": torch.rand(2, 2) + 0.5} if spec.kv_dtype.is_fp8 else {}
    )
    plain = KVCache(shape, 5, **scales)
    caches = [KVCache(shape, 5, attention=attention, **scales) for _ in range(3)]
    k, v = (torch.randn(6, 2, 64, dtype=torch.float16) for _ in range(2))
    slots = torch.tensor([3, -1, 17, 79, 0, -1])

    def step(cache, k, v, slots):
        ops.store_kv(cache, 1, k, v, slots)

    plain.write_kv(1, k, v, slots)
    caches[0].write_kv(1, k, v, slots)
    step(caches[1], k, v, slots)
    torch.compile(step, fullgraph=True, backend="aot_eager")(caches[2], k, v, slots)
    assert calls == [-1] * 3
    for cache in caches:
        assert torch.equal(cache.storage[:, :, :5], plain.storage[:, :, :5])
    caches[0].write_kv(0, k.float(), v.float(), slots)  # a type that the pack has no kernel for
    plain.write_kv(0, k.float(), v.float(), slots)
    assert calls == [-1] * 3 and torch.equal(caches[0].storage[:, :, :5], plain.storage[:, :, :5])


def test_write_kv_to_pools_compiles_into_one_graph(pack_of, make_spec):
    """A pack of two writers, over pools that are views of one tensor: each operator is bound to one."""
    narrow, wide = (make_spec(64, (heads, heads), 16, op="write_kv") for heads in (2, 4))
    attention = pack_of(narrow, wide)

    def call(new_k, new_v, slots, k, v, k_scale, v_scale, variant):
        assert variant == -1
        for pool, new in ((k, new_k), (v, new_v)):
            pool[slots // 16, slots % 16] = new

    attention.kernel(wide).call = call
    write = ops.bind_write_kv(attention, wide)

    def step(new, slots, both):
        write(new + 1, new, slots, both[..., :64], both[..., 64:])
        return both.sum()

    new, slots = torch.randn(3, 4, 64, dtype=torch.float16), torch.tensor([5, 70, 0])
    pools = [torch.zeros(5, 16, 4, 128, dtype=torch.float16) for _ in range(2)]
    sums = (
        step(new, slots, pools[0]),
        torch.compile(step, fullgraph=True, backend="aot_eager")(new, slots, pools[1]),
    )
    assert torch.equal(pools[0], pools[1]) and torch.equal(*sums)
    assert torch.equal(pools[0].flatten(0, 1)[70], torch.cat([new[1] + 1, new[1]], -1))
    arguments = (attention.number, new, new, slots, pools[0][..., :64], pools[0][..., 64:])
    torch.library.opcheck(
        torch.ops.pagedgen.write_kv.default, arguments, {"spec": wide.name},
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_write_kv_goes_to_its_library(pack_of, make_spec):
    spec = make_spec(64, (2, 2), 16, op="write_kv")
    attention = pack_of(spec, make_spec(64, (2, 2), 16))
    new, pool = torch.zeros(3, 2, 64, dtype=torch.float16), torch.zeros(4, 16, 2, 64, dtype=torch.float16)
    slots = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ArgumentError, match=r"new_k\.device = cpu:0: a cuda device is expected"):
        attention.write_kv(new, new, slots, pool, pool)
    with pytest.raises(SpecNotInPack, match=r"write_kv: the pack holds decode-"):
        pack_of(make_spec(64, (2, 2), 16)).write_kv(new, new, slots, pool, pool)


def copied(src_origin, dst_origin, src, dst, pairs, page_bytes, variant):
    """copy_blocks on the CPU, by the tables' addresses."""
    assert variant == -1
    for (source, step, page), (into, jump, _) in zip(src.tolist(), dst.tolist(), strict=True):
        assert page <= page_bytes
        for read, written in pairs.tolist():
            into_at, from_at = dst_origin + into + written * jump, src_origin + source + read * step
            ctypes.memmove(into_at, from_at, page)


@pytest.mark.parametrize("layout", list(KVLayout))
def test_a_cache_copies_and_swaps_through_the_packs_kernel(pack_of, make_spec, layout, monkeypatch):
    """The same bytes as torch's operators; blocks that are both read and written go through those."""
    spec = make_spec(64, (2, 2), 16, op="copy_blocks")
    attention, calls = pack_of(spec), []
    attention.kernel(spec).call = lambda *arguments: (calls.append(len(arguments[4])), copied(*arguments))
    shape = KVShape(3, 2, 64, 16, layout=layout)
    plain = KVCache(shape, 9, num_host_blocks=6)
    cache = KVCache(shape, 9, num_host_blocks=6, attention=attention)
    other = KVCache(shape, 9, attention=attention)
    plain.storage.copy_(torch.randint(0, 255, plain.storage.shape, dtype=torch.uint8))
    for held in (cache, other):
        held.storage.copy_(plain.storage)
    pairs = np.array([[0, 4], [0, 5], [6, 1]], np.int32)
    for held in (plain, cache):
        held.copy_blocks(pairs)
    compiled = torch.compile(
        lambda pairs: ops.copy_kv_blocks(other, pairs), fullgraph=True, backend="aot_eager"
    )
    compiled(torch.from_numpy(pairs.astype(np.int64)))
    assert calls == [3, 3] and torch.equal(cache.storage, plain.storage)
    assert torch.equal(other.storage, plain.storage)
    monkeypatch.setattr("pagedgen.runtime.kv_cache.STAGING_BYTES", 2 * shape.block_bytes)
    for held in (plain, cache):
        held.copy_blocks(np.array([[0, 1], [1, 2]], np.int32))  # in order, this would copy block 0 twice
        held.swap_out(np.array([[2, 0], [3, 1], [5, 4]], np.int32))
        held.storage[:, :, 2:6] = 7
        held.swap_in(np.array([[4, 0], [0, 1], [1, 6]], np.int32))
    assert calls == [3, 3, 2, 1, 2, 1] and torch.equal(cache.storage, plain.storage)
    assert torch.equal(cache.host[[0, 1, 4]], plain.host[[0, 1, 4]])


@pytest.mark.parametrize("layout", [KVLayout.NHD, KVLayout.HND, KVLayout.PACKED])
@pytest.mark.parametrize("kv", ["f16", "fp8_e4m3"])
def test_a_cache_gathers_a_sequence(pack_of, make_spec, layout, kv):
    """By the pack's kernels, one for each type outside the pool, and by torch's operators: the same."""
    dequantised = make_spec(64, (2, 2), 16, kv=kv, scale="head", op="gather")
    raw = make_spec(64, (2, 2), 16, q=kv, op="gather")
    attention, calls = pack_of(*{dequantised, raw}), []

    def call(out_k, out_v, slots, k, v, k_scale, v_scale, variant):
        calls.append(out_k.dtype)
        for out, pool, scale in ((out_k, k, k_scale), (out_v, v, v_scale)):
            rows = pool.view(torch.uint8) if kv != "f16" else pool
            rows = rows[slots // 16, slots % 16].view(pool.dtype)
            out.copy_(rows if scale is None else (rows.float() * scale[:, None]).to(out.dtype))

    for spec in {dequantised, raw}:
        attention.kernel(spec).call = call
    shape = KVShape(2, 2, 64, 16, DType(kv), dequantised.kv_scale, layout)
    scales = (
        {"k_scale": torch.rand(2, 2) + 0.5, "v_scale": torch.rand(2, 2) + 0.5} if shape.dtype.is_fp8 else {}
    )
    caches = [KVCache(shape, 5, **scales), KVCache(shape, 5, attention=attention, **scales)]
    k, v = (torch.randn(37, 2, 64, dtype=torch.float16) for _ in range(2))
    blocks = np.array([3, 0, 4], np.int32)
    for cache in caches:
        slots = cache.token_slots(blocks, 37)
        assert slots[[0, 15, 16, 36]].tolist() == [48, 63, 0, 68]
        cache.write_kv(1, k, v, slots)
    held = caches[0].k[1].dtype
    for dtype in (None, torch.float16):
        got = [cache.gather(1, slots, dtype) for cache in caches]
        for ours, torchs in zip(got[1], got[0], strict=True):
            assert ours.dtype == torchs.dtype == (dtype or held) and ours.shape == (37, 2, 64)
            assert torch.equal(ours.contiguous().view(torch.uint8), torchs.contiguous().view(torch.uint8))
    assert calls == [held, torch.float16]
    assert (got[1][0] - k).abs().max() <= (0 if kv == "f16" else 0.3)
    with pytest.raises(InvalidPool, match=r"num_tokens = 49: 0 to 48, which the blocks hold"):
        caches[0].token_slots(blocks, 49)
    with pytest.raises(InvalidPool, match=r"dtype = torch\.int32"):
        caches[0].gather(1, slots, torch.int32)


def test_copies_and_gathers_that_cannot_be(pack_of, make_spec):
    copier, raw = make_spec(64, (2, 2), 16, op="copy_blocks"), make_spec(64, (2, 2), 16, op="gather")
    attention = pack_of(copier, raw)
    pool = torch.zeros(4, 16, 2, 64, dtype=torch.float16)
    pools, odd = BlockPools.of([pool]), BlockPools.of([torch.zeros(4, 40, dtype=torch.uint8)])
    pairs, slots = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    rows = torch.zeros(3, 2, 64, dtype=torch.float16)
    with pytest.raises(ArgumentError, match=r"src\.device = cpu:0: a cuda device is expected"):
        attention.copy_blocks(pools, pairs)
    with pytest.raises(
        ArgumentError, match=r"into: pages of \(40,\) B: \(4096,\), as of pools, are expected"
    ):
        attention.copy_blocks(pools, pairs, into=odd)
    with pytest.raises(
        SpecNotInPack, match=r"copy_blocks of pages that are multiples of 8 B: no such kernel"
    ):
        attention.copy_blocks(odd, pairs)
    with pytest.raises(
        ArgumentError, match=r"pools: .* are multiples of 8 B: 16 is expected by copy_blocks-h64"
    ):
        attention.copy_blocks(odd, pairs, spec=copier)
    with pytest.raises(SpecNotInPack, match=r"gather-h64-kv2-b16-f16: no such kernel"):
        attention.copy_blocks(pools, pairs, spec=raw)
    with pytest.raises(ArgumentError, match=r"out_k\.device = cpu:0: a cuda device is expected"):
        attention.gather(slots, pool, pool, rows, rows)
    with pytest.raises(ArgumentError, match=r"k: float: a torch\.Tensor is expected"):
        pack_of(raw, replace(raw, block_size=8)).gather(slots, 0.5, pool, rows, rows)


def test_merge_goes_by_its_rows_and_sinks(pack_of, make_spec):
    plain = make_spec(64, (4, 4), 1, op="merge")
    attention = pack_of(plain, replace(plain, sinks=True), make_spec(64, (8, 2), 16))

    def call(outs, lses, out, lse, variant, *sinks):
        merged, sums = pagedgen.merge(outs, lses, *sinks)
        out.copy_(merged), lse.copy_(sums)

    outs, lses, sinks = torch.randn(3, 5, 4, 64).half(), torch.randn(3, 5, 4), torch.randn(4)
    with pytest.raises(ArgumentError, match=r"outs\.device = cpu:0: a cuda device is expected"):
        attention.merge(outs, lses)
    for spec, more in ((plain, {}), (replace(plain, sinks=True), {"sinks": sinks})):
        attention.kernel(spec).call = call
        want = pagedgen.merge(outs, lses, **more)
        out, lse = torch.empty(5, 4, 64).half(), torch.empty(5, 4)
        given = attention.merge(outs, lses, out=out, lse=lse, **more)
        assert given[0] is out and given[1] is lse
        for got in (given, attention.merge(outs, lses, **more)):
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    for arguments, kind, text in (
        ((outs[0], lses), ArgumentError, r"outs\.shape = \[5, 4, 64\]: rank 4 is expected"),
        ((outs.float(), lses), SpecNotInPack, r"merge of outs float32 \[3, 5, 4, 64\]: no kernel fits"),
        ((outs[..., :32], lses), SpecNotInPack, r"merge of outs float16 \[3, 5, 4, 32\]: no kernel fits"),
    ):
        with pytest.raises(kind, match=text):
            attention.merge(*arguments)
    with pytest.raises(ArgumentError, match="sinks: None is expected"):
        attention.merge(outs, lses, sinks=sinks, spec=plain)
    with pytest.raises(SpecNotInPack, match=r"spec = decode-.*: a spec of merge is expected"):
        attention.merge(outs, lses, spec=make_spec(64, (8, 2), 16))


@pytest.mark.parametrize("op", ["write_kv", "gather"])
def test_a_debug_build_raises_what_it_recorded_once(pack_of, make_spec, op):
    spec = make_spec(64, (2, 2), 16, op=op, checked=True)
    attention, records = pack_of(spec), []

    def call(rows_k, rows_v, slots, k, v, k_scale, v_scale, variant, faults):
        records.append(faults)
        if int(slots.max()) >= 80:
            faults.copy_(torch.tensor([1, 1, int(slots.max()), 80]))

    attention.kernel(spec).call = call
    rows, pool = torch.zeros(3, 2, 64).half(), torch.zeros(5, 16, 2, 64).half()

    def run(slots):
        order = (rows, rows, slots, pool, pool) if op == "write_kv" else (slots, pool, pool, rows, rows)
        getattr(attention, op)(*order)

    run(torch.tensor([3, 79, -1]))
    with pytest.raises(ArgumentError, match=r"slot_mapping\[1\] = 99: below 0, or up to 79 \(num_blocks"):
        run(torch.tensor([3, 99, -1]))
    attention.check_faults()
    assert len(records) == 2 and records[0] is records[1] and not records[0].any()
    records[0][0] = 1  # by the replay of a graph
    with pytest.raises(ArgumentError, match=r"slot_mapping\[1\]|slot_mapping\[0\]"):
        attention.check_faults()


@pytest.mark.parametrize("scale", ["tensor", "head"])
def test_scales_are_set_by_the_first_tokens(pack_of, make_spec, scale):
    """By the method, by the operator and by a pack's kernel: the same; later tokens change nothing."""
    spec = make_spec(64, (2, 2), 1, kv="fp8_e4m3", scale=scale, op="kv_scales")
    attention, calls = pack_of(spec, make_spec(64, (2, 2), 16)), []

    def call(new_k, new_v, slots, k_scale, v_scale, variant):
        calls.append(variant)
        for new, given in ((new_k, k_scale), (new_v, v_scale)):
            set_scales(new, slots, given, torch.float8_e4m3fn)

    attention.kernel(spec).call = call
    shape = KVShape(2, 2, 64, 16, DType.FP8_E4M3, KVScale(scale))
    caches = [KVCache(shape, 5, attention=a, dynamic_scales=True) for a in (None, attention, attention)]
    k, v = torch.randn(5, 2, 64).half(), 7 * torch.randn(5, 2, 64).half()
    k[4], k[3, 0, 0] = 1000, float("inf")  # a token that is not kept, and what no scale is made for
    slots = torch.tensor([3, 17, 79, 0, -1])
    compiled = torch.compile(
        lambda k, v, slots: ops.store_kv(caches[2], 1, k, v, slots), fullgraph=True, backend="aot_eager"
    )
    for factor in (1, 50):
        for cache in caches[:2]:
            cache.write_kv(1, k * factor, v * factor, slots)
        compiled(k * factor, v * factor, slots)
    kept = k[:4].masked_fill(k[:4].isinf(), 0).float().abs()
    want = kept.amax() if scale == "tensor" else kept.amax((0, 2))
    assert torch.equal(caches[0].k_scale[1], (want / 224).view(-1)) and not caches[0].k_scale[0].any()
    for cache in caches[1:]:
        assert torch.equal(cache.k_scale, caches[0].k_scale) and torch.equal(cache.v_scale, caches[0].v_scale)
        assert torch.equal(cache.storage[:, :, :5], caches[0].storage[:, :, :5])
    assert calls == [-1] * 4
    caches[0].write_kv(0, k, v, torch.full_like(slots, -1))
    assert not caches[0].k_scale[0].any()  # nothing was kept
    caches[0].write_kv(0, 0 * v, v, slots)
    assert (caches[0].k_scale[0] == 1).all() and (caches[0].v_scale[0] != 1).all()
    with pytest.raises(InvalidPool, match="dynamic_scales = True: False is allowed for f16"):
        KVCache(KVShape(1, 1, 64), 3, dynamic_scales=True)
    with pytest.raises(ArgumentError, match=r"new_k\.device = cpu:0: a cuda device is expected"):
        pack_of(spec).kv_scales(k, v, slots, torch.zeros(1), torch.zeros(1), spec=spec)
    with pytest.raises(SpecNotInPack, match=r"spec = decode-.*: a spec of kv_scales is expected"):
        attention.kv_scales(k, v, slots, torch.zeros(1), torch.zeros(1), spec=make_spec(64, (2, 2), 16))


def test_k_is_turned_by_kernels_that_say_so(pack_of, make_spec, monkeypatch):
    plain = make_spec(64, (2, 2), 16, op="write_kv")
    turning = replace(plain, rope=Rope.NEOX, rotary_dim=32)
    attention, calls = pack_of(plain, turning), []
    for spec in (plain, turning):
        attention.kernel(spec).call = lambda *arguments, spec=spec: calls.append((spec, arguments[8:]))
    pool, new = torch.zeros(4, 16, 2, 64).half(), torch.zeros(3, 2, 64).half()
    slots, positions, cos_sin = torch.tensor([0, 5, -1]), torch.tensor([1, 9, 70]), torch.zeros(10, 32)
    attention.write_kv(new, new, slots, pool, pool)
    attention.write_kv(new, new, slots, pool, pool, positions=positions, cos_sin=cos_sin)
    assert [spec for spec, _ in calls] == [plain, turning]
    assert calls[0][1] == () and calls[1][1][0] is positions and calls[1][1][1] is cos_sin
    with pytest.raises(
        ArgumentError, match="positions: None is expected, since write_kv-h64-kv2-b16-f16 has none"
    ):
        attention.write_kv(new, new, slots, pool, pool, positions=positions, cos_sin=cos_sin, spec=plain)
    monkeypatch.setenv(VARIABLE, "1")
    checked = Attention(attention.pack)
    with pytest.raises(ArgumentError, match=r"positions\[1\] = 10: 0 to 9 is allowed"):
        checked.write_kv(new, new, slots, pool, pool, positions=positions + 1, cos_sin=cos_sin)
    assert not KVCache(KVShape(1, 2, 64), 3, attention=pack_of(turning)).writer(new, new)


def test_slots_and_pairs_are_checked_where_that_is_asked_for(pack_of, make_spec, monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    specs = [make_spec(64, (2, 2), 16, op=op) for op in ("write_kv", "gather", "copy_blocks")]
    attention, calls = pack_of(*specs), []
    for spec in specs:
        attention.kernel(spec).call = lambda *arguments: calls.append(arguments)
    pool = torch.zeros(4, 16, 2, 64, dtype=torch.float16)
    rows, pools = torch.zeros(3, 2, 64, dtype=torch.float16), BlockPools.of([pool])

    def write(*slots):
        attention.write_kv(rows, rows, torch.tensor(slots), pool, pool)

    def gather(*slots):
        attention.gather(torch.tensor(slots), pool, pool, rows, rows)

    def copy(*pairs, **options):
        attention.copy_blocks(pools, torch.tensor(pairs), **options)

    write(63, -1, -1)
    gather(5, 5, 0)
    copy((0, 1), (0, 2))
    copy((0, 1), (1, 0), into=BlockPools.of([pool.clone()]))
    assert len(calls) == 4
    for call, arguments, text in (
        (write, (3, 64, -1), r"slot_mapping\[1\] = 64: up to 63 is allowed"),
        (write, (7, -1, 7), r"slot_mapping\[2\] = 7: token 0 goes there too"),
        (gather, (3, 64, -1), r"slot_mapping\[1\] = 64: up to 63 is allowed"),
        (copy, ((0, 1), (4, 2)), r"pairs\[1, 0\] = 4: 0 to 3 is allowed"),
        (copy, ((0, 1), (0, -1)), r"pairs\[1, 1\] = -1: 0 to 3 is allowed"),
        (copy, ((0, 1), (2, 1)), r"pairs\[1, 1\] = 1: pair 0 writes it too"),
        (copy, ((0, 1), (1, 2)), r"pairs\[0, 1\] = 1: it is read in the same call"),
    ):
        with pytest.raises(ArgumentError, match=text):
            call(*arguments)
    assert len(calls) == 4


def test_verify_goes_by_its_mask_and_compiles_into_one_graph(served, make_spec):
    attention, calls, _ = served
    operator = ops.bind_verify(attention)
    compiled = torch.compile(operator, fullgraph=True, backend="eager")
    for spec in (make_spec(**SHAPE, op="verify"), make_spec(**SHAPE, op="verify", tree_mask=True)):
        inputs = make_inputs(spec, LENS, query_lens=QUERIES)
        arguments = (
            inputs.q, inputs.k, inputs.v, inputs.block_table, inputs.seq_lens, inputs.cu_seqlens_q
        )  # fmt: skip
        attention.verify(
            *arguments, out=inputs.out, softmax_scale=inputs.softmax_scale, tree_mask=inputs.tree_mask
        )
        assert calls[-1][0] == spec
        assert judge(spec, inputs)[2] == ""
        got = compiled(*arguments, softmax_scale=inputs.softmax_scale, tree_mask=inputs.tree_mask)
        assert calls[-1][0] == spec
        for first, end in query_ranges(spec, inputs):
            assert torch.equal(got[first:end], inputs.out[first:end])
    with pytest.raises(SpecNotInPack, match="sinks given, tree_mask given: no kernel fits"):
        attention.verify(*arguments, tree_mask=inputs.tree_mask, sinks=torch.zeros(8))


def test_extend_with_alibi_causality_per_sequence_and_rows_of_v(served, make_spec):
    attention, calls, _ = served
    spec = make_spec(**SHAPE, op="extend", **MIXED)
    inputs = make_inputs(spec, LENS, query_lens=QUERIES)
    more = {"alibi_slopes": inputs.alibi_slopes, "causal": inputs.causal}
    got = extend(attention, inputs, softmax_scale=inputs.softmax_scale, **more)
    assert calls[-1][0] == spec and got.shape == (inputs.q.shape[0], 8, 32)
    for first, end in query_ranges(spec, inputs):
        inputs.out[first:end] = got[first:end]
    assert judge(spec, inputs)[2] == ""
    compiled = torch.compile(ops.bind_extend(attention), fullgraph=True, backend="eager")
    again = compiled(
        inputs.q, inputs.k, inputs.v, inputs.block_table, inputs.seq_lens, inputs.cu_seqlens_q,
        softmax_scale=inputs.softmax_scale, **more,
    )  # fmt: skip
    assert again.shape == got.shape
    for first, end in query_ranges(spec, inputs):
        assert torch.equal(again[first:end], got[first:end])
    with pytest.raises(SpecNotInPack, match="causal given: no kernel fits"):
        extend(attention, inputs, causal=inputs.causal)
    with pytest.raises(
        ArgumentError, match="alibi_slopes: None is expected, since extend-h64-q8-kv2-b16-f16"
    ):
        extend(
            attention, make_inputs(make_spec(**SHAPE, op="extend"), LENS, query_lens=QUERIES),
            spec=make_spec(**SHAPE, op="extend"), alibi_slopes=inputs.alibi_slopes,
        )  # fmt: skip


def test_a_cpu_pack_takes_slopes_causality_and_rows_of_v(make_spec, cpu_choice, tmp_path):
    """Real kernels, decode and extend, as the tensors pick them."""
    shape = {"head_dim": 64, "heads": (4, 2), "q": "f32", "head_dim_v": 32, "alibi": True}
    extends = make_spec(**shape, op="extend", causality="per_sequence", attention_chunk=24)
    decodes = make_spec(**shape, attention_chunk=24)
    attention = Attention(
        open_pack(build([cpu_choice(spec) for spec in (extends, decodes)], tmp_path / "p.pack"))
    )
    for spec in (extends, decodes):
        inputs = make_inputs(spec, LENS, query_lens=QUERIES)
        more = {"alibi_slopes": inputs.alibi_slopes, "softmax_scale": inputs.softmax_scale, "out": inputs.out}
        if spec is extends:
            extend(attention, inputs, causal=inputs.causal, **more)
        else:
            attention.decode(inputs.q, inputs.k, inputs.v, inputs.block_table, inputs.seq_lens, **more)
        assert judge(spec, inputs)[2] == ""


def test_blocks_that_no_query_sees_are_not_looked_at(pack_of, make_spec, monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    spec = make_spec(**SHAPE, op="extend", attention_chunk=32)
    attention = pack_of(spec)
    attention.kernel(spec).call = lambda *arguments: None
    inputs = make_inputs(spec, (70, 9), query_lens=(5, 1))
    inputs.block_table[0, :4] = -1  # the last chunk begins at token 64
    extend(attention, inputs)
    inputs.block_table[0, 4] = -1
    with pytest.raises(ArgumentError, match=r"block_table\[0, 4\] = -1"):
        extend(attention, inputs)


def test_a_tree_has_64_queries_at_most(pack_of, make_spec, monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    spec = make_spec(**SHAPE, op="verify", tree_mask=True)
    inputs = make_inputs(spec, (70, 9), query_lens=(65, 1))
    with pytest.raises(
        ArgumentError, match=r"cu_seqlens_q\[1\] = 65: 65 queries of sequence 0: at most 64 are"
    ):
        pack_of(spec).verify(
            inputs.q, inputs.k, inputs.v, inputs.block_table, inputs.seq_lens, inputs.cu_seqlens_q,
            tree_mask=inputs.tree_mask,
        )  # fmt: skip
