"""The SGLang plug-in beside SGLang's own torch backend: skipped without SGLang, run by `.ci/sglang-cpu`.

``PAGEDGEN_PACK`` is cpu_packs.py's pack for it. Nothing of a server runs here; batches, pools and the runner
are stand-ins with the fields that backends read.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang")

from pagedgen.errors import PackForeign, PackNotChosen, SpecNotInPack, Unsupported, VersionUnmet

HEADS, KV_HEADS, DIM, CONTEXT, SLOTS = 4, 2, 32, 96, 320


class Pool:
    """Token slots, or pages of them."""

    def __init__(self, page_size):
        self.k = torch.randn(SLOTS + page_size, KV_HEADS, DIM)
        self.v = torch.randn_like(self.k)

    def get_key_buffer(self, layer_id):
        return self.k

    def get_value_buffer(self, layer_id):
        return self.v

    def set_kv_buffer(self, layer, where, k, v):
        self.k[where.loc], self.v[where.loc] = k, v


class Block(torch.nn.Module):
    """What holds an attention layer in a model."""

    def __init__(self, **options):
        from sglang.srt.layers.radix_attention import RadixAttention

        super().__init__()
        self.attn = RadixAttention(HEADS, DIM, DIM**-0.5, KV_HEADS, 0, **options)


@pytest.fixture
def make():
    """A runner and our backend on it."""
    from pagedgen.integrations.sglang import backend

    def make(page_size, **options):
        rows = torch.zeros(8, CONTEXT, dtype=torch.int32)
        pages = torch.randperm(SLOTS // page_size)[: 3 * CONTEXT // page_size] + 1
        slots = (pages[:, None] * page_size + torch.arange(page_size)).flatten().to(torch.int32)
        rows[2:5] = slots.view(3, CONTEXT)
        runner = SimpleNamespace(
            token_to_kv_pool=Pool(page_size),
            req_to_token_pool=SimpleNamespace(req_to_token=rows),
            spec_algorithm=SimpleNamespace(is_none=lambda: True),
            page_size=page_size,
            model_config=SimpleNamespace(context_len=CONTEXT),
            device="cpu",
            dtype=torch.float32,
            kv_cache_dtype=torch.float32,
            model=Block(**options),
        )
        return runner, backend.PagedgenBackend(runner)

    return make


def batch(runner, prefixes, news, decode):
    """Requests 2, 3, 4 with ``prefixes`` tokens in the cache and ``news`` to compute."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    lengths = [prefix + new for prefix, new in zip(prefixes, news, strict=True)]
    rows = runner.req_to_token_pool.req_to_token
    where = [rows[2 + i, p:n] for i, (p, n) in enumerate(zip(prefixes, lengths, strict=True))]
    return SimpleNamespace(
        forward_mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
        batch_size=3,
        req_pool_indices=torch.tensor([2, 3, 4]),
        seq_lens=torch.tensor(lengths),
        seq_lens_cpu=torch.tensor(lengths),
        extend_prefix_lens=torch.tensor(prefixes),
        extend_seq_lens=torch.tensor(news),
        encoder_lens=None,
        out_cache_loc=torch.cat(where).long(),
    )


def both(runner, ours, forward_batch, decode):
    """Outputs of SGLang's backend and of ours for the same random tokens."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    tokens = len(forward_batch.out_cache_loc)
    q = torch.randn(tokens, HEADS * DIM)
    k, v = torch.randn(2, tokens, KV_HEADS, DIM)
    layer = runner.model.attn
    outputs = []
    for backend in (TorchNativeAttnBackend(runner), ours):
        runner.token_to_kv_pool.k[forward_batch.out_cache_loc] = float("nan")  # each writes for itself
        if backend is not ours or not ours._graph:
            backend.init_forward_metadata(forward_batch)
        run = backend.forward_decode if decode else backend.forward_extend
        outputs.append(run(q, k, v, layer, forward_batch))
    return outputs


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("options", [{}, {"sliding_window_size": 9}])
@pytest.mark.parametrize("decode", [False, True])
def test_outputs_are_those_of_sglang(make, page_size, options, decode):
    runner, ours = make(page_size, **options)
    ours._graph = False
    news = [1, 1, 1] if decode else [40, 1, 17]
    theirs, own = both(runner, ours, batch(runner, [20, 33, 0], news, decode), decode)
    assert own.shape == theirs.shape
    torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("page_size", [1, 16])
def test_captured_decodes_read_what_is_filled_in_before_a_replay(make, page_size):
    runner, ours = make(page_size)
    ours._graph = True
    ours.init_cuda_graph_state(4, 4)
    ours.init_forward_metadata_out_graph(batch(runner, [1, 1, 1], [1, 1, 1], True), in_capture=True)
    captured = ours.forward_metadata
    later = batch(runner, [20, 33, 0], [1, 1, 1], True)
    ours.init_forward_metadata_out_graph(later)
    assert captured.seq_lens.data_ptr() == ours.forward_metadata.seq_lens.data_ptr()
    assert captured.block_table.data_ptr() == ours.forward_metadata.block_table.data_ptr()
    ours.forward_metadata = captured
    theirs, own = both(runner, ours, later, True)
    torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)


def test_what_no_kernel_computes_is_refused(make):
    from sglang.srt.layers.radix_attention import AttentionType

    for options, name in [
        ({"attn_type": AttentionType.ENCODER_ONLY}, "attn_type"),
        ({"v_head_dim": 64}, "v_head_dim"),
        ({"is_cross_attention": True}, "is_cross_attention"),
        ({"pos_encoding_mode": "ALIBI"}, "pos_encoding_mode = 'ALIBI'"),
    ]:
        with pytest.raises(Unsupported, match=name):
            make(1, **options)


def test_a_layer_that_the_pack_lacks_is_refused_with_the_command(make):
    with pytest.raises(
        SpecNotInPack, match=r"it has no decode-h32-q4-kv2-b16-f32-cap30(?s:.*)pagedgen build --cpu"
    ):
        make(16, logit_cap=30.0)


def test_another_sglang_is_refused(make, monkeypatch):
    monkeypatch.setattr("sglang.__version__", "0.5.22")
    with pytest.raises(VersionUnmet, match=r"sglang = 0\.5\.22: .*pip install 'sglang>=0\.5\.23,<0\.6'"):
        make(16)


def test_a_pack_that_cannot_serve_is_refused_at_start(make, monkeypatch):
    from pagedgen.integrations import serving_pack

    def foreign(pack):
        raise PackForeign("x.pack: not for this machine")

    with monkeypatch.context() as patch, pytest.raises(PackForeign):
        patch.setattr(serving_pack, "check_machine", foreign)
        patch.delitem(vars(serving_pack.chosen_pack()), "attention", raising=False)
        make(16)
    monkeypatch.delenv("PAGEDGEN_PACK")
    with pytest.raises(PackNotChosen, match="PAGEDGEN_PACK is not set"):
        make(16)


def test_speculation_and_pools_with_windows_are_refused(make, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Unsupported, match="--disable-hybrid-swa-memory"):
        patch.setattr(Pool, "swa_kv_pool", None, raising=False)
        make(16)
    runner, _ = make(16)
    runner.spec_algorithm = SimpleNamespace(is_none=lambda: False)
    with pytest.raises(Unsupported, match="speculative_algorithm"):
        type(make(16)[1])(runner)


def test_speculative_modes_are_refused(make):
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    runner, ours = make(1)
    verify = batch(runner, [4, 4, 4], [2, 2, 2], False)
    verify.forward_mode = ForwardMode.TARGET_VERIFY
    with pytest.raises(Unsupported, match="forward_mode"):
        ours.init_forward_metadata(verify)


def test_registering_it():
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    from pagedgen.integrations.sglang import NAME, create, register

    register()
    register()
    assert ATTENTION_BACKENDS[NAME] is create and choices.ATTENTION_BACKEND_CHOICES.count(NAME) == 1
