"""transformers' continuous batching on a GPU, captured decode steps too: the tokens of eager attention."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23")

import transformers

from pagedgen.compiler.build import Choice, build
from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.render import render
from pagedgen.compiler.space import default_schedule
from pagedgen.integrations.serving_pack import OPERATORS, Layer
from pagedgen.integrations.transformers import attach, detach
from pagedgen.runtime import ops
from pagedgen.runtime.attention import load
from pagedgen.values.manifest import Rule
from pagedgen.values.spec import DType, KInner, Op
from pagedgen.values.target_table import gpu_target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (docs/gpu_tests.md)"),
]
F16 = DType.F16
EVERY_CALL = (Rule(2**31 - 1, 2**31 - 1, 0),)
LAYERS = (
    Layer(64, 8, 2, F16, F16),
    Layer(64, 8, 2, F16, F16, window=48, logits_soft_cap=5.0),
    Layer(64, 8, 2, F16, F16, logits_soft_cap=5.0),
)
COMMON = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.2,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GEMMA = {
    "sliding_window": 48, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 64, "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    to = gpu_target()
    specs = {layer.spec(op, 16, KInner.DIM) for layer in LAYERS for op in OPERATORS}
    choices = [
        Choice(
            (compile_source(render(s, to, default_schedule(s, to))),), (Rule(2**31 - 1, 2**31 - 1, 0),), ()
        )
        for s in sorted(specs)
    ]
    return build(choices, tmp_path_factory.mktemp("packs") / "tiny.pack")


@pytest.mark.parametrize(("kind", "changes"), [("LlamaConfig", {}), ("Gemma2Config", GEMMA)])
def test_the_same_tokens_as_eager(pack, kind, changes):
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**COMMON, **changes})
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float16, attn_implementation="eager"
        ).eval()
    model.generation_config.eos_token_id = -1
    model.generation_config.pad_token_id = 0
    prompts = [torch.randint(3, 512, (n,)).tolist() for n in (1, 15, 17, 100, 33)]
    want = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device="cuda")
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        want.append(out[0, len(prompt) :].tolist())
    attach(model, pack)
    options = {"page_size": 32, "num_blocks": 64, "max_batch_tokens": 64}
    for more in ({}, {"use_cuda_graph": False}, {"max_blocks_per_request": 0}):
        batches = transformers.ContinuousBatchingConfig(**options, **more)
        made = model.generate_batch(prompts, continuous_batching_config=batches, max_new_tokens=6)
        assert [output.generated_tokens for output in made.values()] == want, more
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device="cuda")
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device="cuda")
    made = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert made[:, longest:].tolist() == want
    detach(model)


def test_out_variants_and_writes_are_captured(pack):
    """torch.ops.pagedgen.decode_out and write_kv in one graph: replayed with other lengths and slots."""
    attention = load(pack)
    decode_spec, write_spec = (LAYERS[0].spec(op, 16, KInner.DIM) for op in (Op.DECODE, Op.WRITE_KV))
    decode, write = ops.bind(attention, decode_spec), ops.bind_write_kv(attention, write_spec)
    half = {"dtype": torch.float16, "device": "cuda"}
    k, v = torch.zeros(8, 16, 2, 64, **half), torch.zeros(8, 16, 2, 64, **half)
    q, new, out = torch.randn(3, 8, 64, **half), torch.randn(3, 2, 64, **half), torch.zeros(3, 8, 64, **half)
    table = torch.arange(6, dtype=torch.int32, device="cuda").view(3, 2)
    lens = torch.ones(3, dtype=torch.int32, device="cuda")
    slots = torch.tensor([0, 32, 64], device="cuda")

    def step():
        write(new, new, slots, k, v)
        decode(q, k, v, table, lens, out=out)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for length in range(2, 20):
        new.normal_()
        lens.fill_(length)
        slots.copy_((torch.arange(3, device="cuda") * 32) + length - 1)
        out.fill_(float("nan"))
        graph.replay()
        captured = out.clone()
        out.fill_(float("nan"))
        decode(q, k, v, table, lens, out=out)
        assert torch.equal(captured, out) and torch.equal(k.flatten(0, 1)[slots], new)
    keys = k.flatten(0, 1)[:19].float().repeat_interleave(4, 1)
    weights = torch.softmax(torch.einsum("hd,thd->ht", q[0].float(), keys) * 64**-0.5, -1)
    assert (torch.einsum("ht,thd->hd", weights, keys) - out[0].float()).abs().max() < 2e-3
