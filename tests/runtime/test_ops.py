"""The operators give what the methods give, eagerly, compiled in one graph, and under torch's own checks."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import pagedgen
from pagedgen.compiler.verify import make_inputs
from pagedgen.errors import ArgumentError, SpecNotInPack
from pagedgen.runtime import ops
from pagedgen.runtime.attention import loaded
from pagedgen.runtime.block_manager import BlockManager
from pagedgen.runtime.device_table import DeviceTable
from pagedgen.runtime.kv_cache import KVCache, KVShape
from pagedgen.runtime.kv_layout import KVLayout
from pagedgen.values.spec import DType, KVScale

CHECKS = ("test_schema", "test_faketensor")


def test_decode_compiles_into_one_graph(cpu_pack, make_spec):
    attention = pagedgen.load(cpu_pack)
    decode = ops.bind(attention)
    spec = make_spec(64, (8, 2), 16, "f32")

    def layer(q, k, v, block_table, seq_lens):
        return decode(q * 2, k, v, block_table, seq_lens, softmax_scale=0.1) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for lens in ((5, 100, 33), (1, 64), (7, 0, 3, 90, 2)):
        inputs = make_inputs(spec, lens)
        arguments = (inputs.q, inputs.k, inputs.v, inputs.block_table, inputs.seq_lens)
        want = torch.zeros_like(inputs.q)
        attention.decode(arguments[0] * 2, *arguments[1:], out=want, softmax_scale=0.1)
        assert torch.equal(layer(*arguments), want + 1)
        assert torch.equal(compiled(*arguments), want + 1)
    torch.library.opcheck(
        torch.ops.pagedgen.decode.default, (attention.number, *arguments), test_utils=CHECKS
    )


def test_out_is_written_and_the_lse_with_it(cpu_pack, make_spec):
    """One pack of several specs: each operator is bound to one; padding rows keep what was there."""
    attention = pagedgen.load(cpu_pack)
    spec = make_spec(64, (8, 2), 16, "f32", lse=True)
    decode = ops.bind(attention, spec)

    def layer(arguments, out, lse):
        return decode(*arguments, out=out, lse=lse, softmax_scale=0.1) * 1

    inputs = make_inputs(spec, (40, 0, 17))
    arguments = (inputs.q, inputs.k, inputs.v, inputs.block_table, inputs.seq_lens)
    want = torch.full_like(inputs.q, 7.0), torch.full(inputs.q.shape[:2], 7.0)
    attention.decode(*arguments, out=want[0], lse=want[1], softmax_scale=0.1, spec=spec)
    assert (want[0][1] == 7).all() and (want[1][[0, 2]] != 7).all()
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        out, lse = torch.full_like(inputs.q, 7.0), torch.full(inputs.q.shape[:2], 7.0)
        assert torch.equal(call(arguments, out, lse), want[0])
        assert torch.equal(out, want[0]) and torch.equal(lse, want[1])
    checked = {"out": out, "lse": lse, "spec": spec.name}
    torch.library.opcheck(
        torch.ops.pagedgen.decode_out.default, (attention.number, *arguments), checked, test_utils=CHECKS
    )
    with pytest.raises(SpecNotInPack, match=r"spec = decode-h64-q8-kv4-b16-f32: the pack holds decode-h64"):
        ops.bind(attention, make_spec(64, (8, 4), 16, "f32"))
    with pytest.raises(SpecNotInPack, match="spec = decode-h1: the pack holds decode-h64"):
        torch.ops.pagedgen.decode(attention.number, *arguments, spec="decode-h1")


def test_an_exported_program_runs_where_its_pack_is_loaded(cpu_pack, make_spec, tmp_path):
    """Saved here, run in a fresh process that loads the same pack from another place."""
    attention = pagedgen.load(cpu_pack)
    spec = make_spec(64, (8, 2), 16, "f32")
    decode = ops.bind(attention, spec)

    class Layer(torch.nn.Module):
        def forward(self, q, k, v, block_table, seq_lens):
            return decode(q * 2, k, v, block_table, seq_lens) + 1

    inputs = make_inputs(spec, (5, 100, 33))
    arguments = (inputs.q, inputs.k, inputs.v, inputs.block_table, inputs.seq_lens)
    num_seqs, width = torch.export.Dim("num_seqs", max=64), torch.export.Dim("width", max=64)
    shapes = {
        "q": {0: num_seqs}, "k": None, "v": None, "block_table": {0: num_seqs, 1: width},
        "seq_lens": {0: num_seqs},
    }  # fmt: skip
    program = torch.export.export(Layer(), arguments, dynamic_shapes=shapes)
    assert "pagedgen.decode.default" in str(program.graph)
    torch.export.save(program, tmp_path / "layer.pt2")
    others = make_inputs(spec, (20, 3, 64, 50))
    given = (others.q, inputs.k, inputs.v, inputs.block_table[1:2].repeat(4, 1), others.seq_lens)
    torch.save(given, tmp_path / "given.pt")
    shutil.copytree(cpu_pack, tmp_path / "moved.pack")
    code = (
        "import sys, torch, pagedgen; from pagedgen.runtime import ops\n"
        "attention = pagedgen.load(sys.argv[1] + '/moved.pack')\n"
        "program = torch.export.load(sys.argv[1] + '/layer.pt2')\n"
        "torch.save(program.module()(*torch.load(sys.argv[1] + '/given.pt')), sys.argv[1] + '/got.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "got.pt"), Layer()(*given))


def test_a_pack_lives_while_somebody_holds_it(cpu_pack, monkeypatch):
    # Compiled code of other tests may hold the same pack.
    monkeypatch.setattr("pagedgen.runtime.attention._loaded", {})
    attention, again = pagedgen.load(cpu_pack), pagedgen.load(cpu_pack)
    number = attention.number
    assert again.number == number and loaded(number) is again
    del again
    gc.collect()
    assert loaded(number) is attention
    decode = ops.bind(attention)
    del attention
    gc.collect()
    assert loaded(number) is decode.attention
    del decode
    gc.collect()
    q = torch.zeros(1, 8, 64)
    with pytest.raises(ArgumentError, match=f"pack = {number}: no such pack is loaded"):
        torch.ops.pagedgen.decode(number, q, q, q, q, q)


@pytest.mark.parametrize("layout", list(KVLayout))
@pytest.mark.parametrize("dtype", [DType.F16, DType.FP8_E4M3])
def test_store_kv_compiles_and_writes_what_the_method_writes(layout, dtype):
    scale = KVScale.HEAD if dtype.is_fp8 else KVScale.NONE
    shape = KVShape(2, 3, 8, 4, dtype, scale, layout)
    caches = [KVCache(shape, 5) for _ in range(3)]
    k, v = torch.randn(6, 3, 8), torch.randn(6, 3, 8)
    slots = torch.tensor([3, -1, 7, 19, 0, -1])

    def step(cache, k, v, slots):
        ops.store_kv(cache, 1, k + 1, v, slots)

    caches[0].write_kv(1, k + 1, v, slots)
    step(caches[1], k, v, slots)
    torch.compile(step, fullgraph=True, backend="aot_eager")(caches[2], k, v, slots)
    for cache in caches[1:]:
        assert torch.equal(cache.storage[:, :, :5], caches[0].storage[:, :, :5])
    assert caches[0].storage[:, :, :5].any()


def test_operators_pass_torchs_checks():
    cache = KVCache(KVShape(1, 2, 8, 4, DType.F32), 5)
    pool_k, pool_v = cache.raw(0)
    new = torch.randn(3, 2, 8)
    slots = torch.tensor([1, 9, 4])
    arguments = (pool_k, pool_v, new, new, slots, None, None, None)
    torch.library.opcheck(torch.ops.pagedgen.store_kv.default, arguments)
    torch.library.opcheck(
        torch.ops.pagedgen.copy_blocks.default, (cache.blocks, torch.tensor([[0, 1], [2, 3]]))
    )


def test_copy_blocks_copies_what_the_method_copies():
    caches = [KVCache(KVShape(2, 2, 8, 4, DType.F16), 6) for _ in range(2)]
    content = torch.randint(0, 255, caches[0].storage.shape, dtype=torch.uint8)
    pairs = np.array([[0, 5], [0, 2], [3, 1]], np.int32)
    for cache in caches:
        cache.storage.copy_(content)
    caches[0].copy_blocks(pairs)
    compiled = torch.compile(lambda b, p: ops.copy_blocks(b, p), fullgraph=True, backend="aot_eager")
    compiled(caches[1].blocks, torch.from_numpy(pairs.astype(np.int64)))
    assert torch.equal(caches[0].storage, caches[1].storage)
    assert not torch.equal(caches[0].storage, content)


def test_a_mirror_gets_changed_entries_only():
    """What a GPU's mirror does, with a second CPU tensor in its place."""
    m = BlockManager(64, max_num_seqs=4, max_seq_len=512)
    m.allocate(list(range(40)))
    mirror = DeviceTable(m, "cpu")
    assert mirror.tensor.data_ptr() == m.groups[0].table.ctypes.data
    mirror._group.track()  # as for a GPU
    mirror.tensor = torch.zeros(m.groups[0].table.shape, dtype=torch.int32)
    rng = np.random.default_rng(0)
    seqs = [m.allocate(rng.integers(0, 9, 100)).seq]
    m.take_copies()
    mirror.flush()
    sent = mirror.entries_sent
    for step in range(200):
        if step % 20 == 7:
            seqs += m.fork(seqs[0]) if len(seqs) < 3 else []
        if step % 50 == 49:
            m.free(seqs.pop())
        m.append_step(seqs, rng.integers(0, 9, len(seqs)))
        m.take_copies()
        mirror.flush()
        for seq in seqs:
            row, count = m.seqs.row(seq), m.blocks(seq).size
            assert (mirror.tensor[row, :count].numpy() == m.blocks(seq)).all()
    assert 0 < mirror.entries_sent - sent < 120  # not 200 steps times the table
