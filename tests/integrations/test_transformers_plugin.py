"""transformers with pagedgen attached: tiny random models give the tokens of eager attention."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from integrations.cpu_packs import pack as build_pack
from integrations.tiny_models import COMMON, MODELS
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig
from transformers.generation.continuous_batching import PagedAttentionCache

from pagedgen.errors import InvalidValue, PackNotChosen, SpecNotInPack, Unsupported, VersionUnmet
from pagedgen.integrations.serving_pack import Layer, ServingPack
from pagedgen.integrations.transformers import attach, attached, detach
from pagedgen.integrations.transformers.step import Step
from pagedgen.runtime.pack import open_pack
from pagedgen.values.spec import DType, KInner

F32 = DType.F32
PLAIN = Layer(32, 4, 2, F32, F32)
LAYERS = {
    "llama": {PLAIN},
    "qwen3": {PLAIN},
    "mistral-window": {Layer(32, 4, 2, F32, F32, window=48)},
    "gemma2": {
        Layer(32, 4, 2, F32, F32, logits_soft_cap=5.0),
        Layer(32, 4, 2, F32, F32, window=48, logits_soft_cap=5.0),
    },
    "gpt-oss": {
        Layer(32, 4, 2, F32, F32, sinks=True),
        Layer(32, 4, 2, F32, F32, window=48, sinks=True),
    },
}  # fmt: skip
LENGTHS = (1, 15, 17, 100, 33)  # blocks have 16 tokens, pages 32, steps 64 at most: prompts are split
NEW = 5


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: threads cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


COMPILED = {KInner.TOKEN: tuple(sorted(set().union(*LAYERS.values()), key=repr)), KInner.DIM: (PLAIN,)}
RUNS = [(KInner.TOKEN, name) for name in LAYERS] + [(KInner.DIM, "llama")]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A pack by the axis that K is contiguous along, made when first asked for."""
    pytest.importorskip("tvm")

    @cache
    def make(k_inner):
        path = tmp_path_factory.mktemp("packs") / f"{k_inner}.pack"
        build_pack(COMPILED[k_inner], (16,), k_inner, path)
        return ServingPack(open_pack(path))

    return make


def random_model(name):
    config_class, changes = MODELS[name]
    torch.manual_seed(0)
    changes = changes | {"num_attention_heads": 4}
    config = getattr(transformers, config_class)(**{**COMMON, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for parameter in (p for n, p in model.named_parameters() if n.endswith("sinks")):
        torch.nn.init.normal_(parameter)
    if config.tie_word_embeddings:
        model.get_input_embeddings().weight.data.mul_(0.01)
    model.generation_config.eos_token_id = -1
    model.generation_config.pad_token_id = 0
    return model


def prompts_of(lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, COMMON["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


def eager(model, prompts):
    made = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        made.append(out[0, len(prompt) :].tolist())
    return made


def batched(model, prompts, **options):
    config = ContinuousBatchingConfig(**{"page_size": 32, "num_blocks": 64, "max_batch_tokens": 64} | options)
    outputs = model.generate_batch(
        prompts, continuous_batching_config=config, max_new_tokens=NEW, warmup=False
    )
    return [output.generated_tokens for output in outputs.values()]


def padded(model, prompts):
    """``generate`` for all prompts in one batch."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    made = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    alone = model.generate(ids[3:4], max_new_tokens=NEW, do_sample=False)  # the longest has no padding
    assert torch.equal(alone[0], made[3])
    return made[:, longest:].tolist()


def forms(monkeypatch):
    """Which forms of a step came up."""
    seen, original = set(), Step.of.__func__

    def of(cls, asked, *arguments):
        made = original(cls, asked, *arguments)
        listed = "written" if not asked["read_index"][0].numel() else "read"
        seen.add(("pages" if asked["block_table"] is not None else listed, made.decodes))
        return made

    monkeypatch.setattr(Step, "of", classmethod(of))
    return seen


@cache
def model_and_want(name):
    model, prompts = random_model(name), prompts_of(LENGTHS)
    return model, prompts, eager(model, prompts)


@pytest.mark.parametrize(("k_inner", "name"), [*RUNS[:-1], pytest.param(*RUNS[-1], marks=pytest.mark.slow)])
def test_the_same_tokens_as_eager(served, k_inner, name, monkeypatch):
    """Steps of prompts, of the rest of a prompt beside decodes, and of decodes, in both of their forms."""
    model, prompts, want = model_and_want(name)
    assert len(set(map(tuple, want))) == len(prompts)
    attach(model, served(k_inner))
    assert set(attached(model).layers.values()) == LAYERS[name]
    seen = forms(monkeypatch)
    assert batched(model, prompts) == want
    assert batched(model, prompts, max_blocks_per_request=0, page_size=16) == want
    assert padded(model, prompts) == want
    assert seen == {("written", False), ("read", False), ("read", True), ("pages", True)}
    detach(model)
    assert model.config._attn_implementation == "eager" and attached(model) is None
    assert not hasattr(next(m for m in model.modules() if hasattr(m, "layer_idx")), "_pagedgen")
    assert eager(model, prompts[:1]) == want[:1]


def test_prefixes_are_shared_between_requests(served, monkeypatch):
    """Also where layers have windows: the second prompt begins as the first, whose pages are in the cache."""
    model, prompts, _ = model_and_want("gemma2")
    two = [prompts[3], [*prompts[3][:70], 7, 8]]
    want, found = eager(model, two), []
    original = PagedAttentionCache.search_prefix_match

    def search(self, *arguments):
        found.append(original(self, *arguments))
        return found[-1]

    monkeypatch.setattr(PagedAttentionCache, "search_prefix_match", search)
    attach(model, served(KInner.TOKEN))
    assert batched(model, two) == want
    assert found == [0, 64]
    detach(model)


def test_what_is_refused(served, monkeypatch):
    model, prompts, _ = model_and_want("llama")
    monkeypatch.delenv("PAGEDGEN_PACK", raising=False)
    with pytest.raises(PackNotChosen):
        attach(model)
    with pytest.raises(
        SpecNotInPack, match=r"(?s)it has no decode-h32-q4-kv2-b16-f16-ktoken, extend.*pagedgen build --cpu "
    ):
        attach(
            random_model("qwen3").to(torch.float16), served(KInner.TOKEN).pack.path
        )  # its kernels are of f32
    with (
        monkeypatch.context() as patch,
        pytest.raises(VersionUnmet, match=r"transformers = 5\.24\.1: >=5\.23,<5\.24 is"),
    ):
        patch.setattr(transformers, "__version__", "5.24.1")
        attach(model, served(KInner.TOKEN))
    with monkeypatch.context() as patch, pytest.raises(Unsupported, match="layer_types = 'linear_attention'"):
        patch.setattr(model.config, "layer_types", ["linear_attention"] * 4, raising=False)
        attach(model, served(KInner.TOKEN))
    with monkeypatch.context() as patch, pytest.raises(Unsupported, match="is_causal = False"):
        patch.setattr(model.model.layers[1].self_attn, "is_causal", False)
        attach(model, served(KInner.TOKEN))
    assert attached(model) is None and model.config._attn_implementation == "eager"
    attach(model, served(KInner.TOKEN))
    with pytest.raises(InvalidValue, match="page_size = 24: a multiple of 16 is allowed"):
        batched(model, prompts, page_size=24)
    with pytest.raises(Unsupported, match=r"past_key_values = .*: an attached model serves"):
        model(torch.tensor([[1, 2]]))
    ids = torch.tensor([[1, 2], [0, 3]])
    with pytest.raises(Unsupported, match="attention_mask = None: with several prompts"):
        model.generate(ids)
    with pytest.raises(Unsupported, match=r"attention_mask = \[2, 2\]: padding at the left"):
        model.generate(ids, attention_mask=torch.tensor([[1, 1], [1, 0]]))
    for option in ({"num_beams": 2}, {"num_return_sequences": 2}, {"use_cache": False}):
        (name,) = option
        with pytest.raises(Unsupported, match=f"{name} = .*one sequence a row"):
            model.generate(ids, attention_mask=torch.ones_like(ids), **option)
    changed = transformers.GenerationConfig(num_beams=3)
    with pytest.raises(Unsupported, match="num_beams = 3"):
        model.generate(ids, changed, attention_mask=torch.ones_like(ids))
    detach(model)
    detach(model)


def test_no_compiler_of_ours_comes_with_it():
    """What transformers and torch import by themselves is theirs; the plug-in adds nothing that compiles."""
    code = (
        "import sys, pagedgen.integrations.transformers\n"
        "own = ('pagedgen.compiler', 'pagedgen.autotune', 'pagedgen.templates', 'pagedgen.cli')\n"
        "print([n for n in sys.modules if n.startswith((*own, 'tvm.', 'optuna'))])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.split() == ["[]"]
