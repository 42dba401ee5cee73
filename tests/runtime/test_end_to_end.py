"""A Llama with random weights on the paged runtime gives the tokens that ``generate`` gives on its caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch

import pagedgen
from pagedgen.compiler.build import Choice, build
from pagedgen.errors import OutOfBlocks
from pagedgen.runtime import torch_attention
from pagedgen.runtime.block_manager import BlockManager
from pagedgen.runtime.kv_cache import KVCache, KVShape
from pagedgen.runtime.kv_layout import KVLayout
from pagedgen.runtime.preemption import PreemptionRule, Remedy
from pagedgen.values.spec import DType, KernelSpec, Op

transformers = pytest.importorskip("transformers")
VOCABULARY, NEW = 97, 24


class Engine:
    """The least serving loop around a transformers model: paged KV for attention, tokens in, logits out."""

    def __init__(
        self,
        model: torch.nn.Module,
        num_blocks: int,
        layout: KVLayout,
        block_size: int = 4,
        attention: pagedgen.Attention | None = None,
        **options: object,
    ) -> None:
        self.model, config, self.attention = model, model.config, attention
        host = int(options.get("num_host_blocks", 0))  # type: ignore[call-overload]
        # Partial hits are kept in a direct-mapped table: with a secret drawn anew, one in a hundred is lost.
        options.setdefault("secret", b"end to end")
        self.manager = BlockManager(
            num_blocks, block_size, max_num_seqs=16, max_seq_len=128, watermark=0.0, **options  # type: ignore[arg-type]
        )  # fmt: skip
        shape = KVShape(
            config.num_hidden_layers,
            config.num_key_value_heads,
            config.head_dim,
            block_size,
            DType.F32,
            layout=layout,
        )
        self.cache = KVCache(shape, num_blocks, num_host_blocks=host, attention=attention)
        self.operators = set() if attention is None else {spec.op for spec in attention.specs}
        self.computed_tokens = 0

    def forward(self, work: Sequence[tuple[int, Sequence[int]]]) -> list[torch.Tensor]:
        """Run the last tokens of each sequence, which have slots: logits ``[tokens, vocabulary]`` each."""
        manager = self.manager
        self.cache.copy_blocks(manager.take_copies())
        lens = [manager.length(seq) for seq, _ in work]
        news = [len(tokens) for _, tokens in work]
        slots = [manager.slots(seq, n - new, n) for (seq, _), n, new in zip(work, lens, news, strict=True)]
        rows = [manager.seqs.row(seq) for seq, _ in work]
        table = torch.from_numpy(manager.groups[0].table[rows])
        everything = torch.from_numpy(np.concatenate(slots))
        seq_lens = torch.tensor(lens, dtype=torch.int32)
        ends = torch.tensor([0, *accumulate(news)], dtype=torch.int32)
        cache = self.cache

        def attend(
            module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object,
            scaling: float, **__: object,
        ) -> tuple[torch.Tensor, None]:  # fmt: skip
            layer = int(module.layer_idx)  # type: ignore[arg-type]
            cache.write_kv(layer, key[0].transpose(0, 1), value[0].transpose(0, 1), everything)
            q, pools = query[0].transpose(0, 1).contiguous(), (cache.k[layer], cache.v[layer])
            if self.attention is not None and max(news) == 1:
                out = self.attention.decode(q, *pools, table, seq_lens, softmax_scale=scaling)
                return out[None], None
            if self.attention is not None and Op.EXTEND in self.operators:
                out = self.attention.extend(q, *pools, table, seq_lens, ends, softmax_scale=scaling)
                return out[None], None
            out = torch_attention.extend(
                query[0].transpose(0, 1),
                cache.k[layer],
                cache.v[layer],
                table,
                lens,
                news,
                softmax_scale=scaling,
            )
            return out[None], None

        transformers.AttentionInterface.register("pagedgen_test", attend)
        self.model.set_attn_implementation("pagedgen_test")
        positions = [torch.arange(n - new, n) for n, new in zip(lens, news, strict=True)]
        ids = torch.tensor([[token for _, tokens in work for token in tokens]])
        with torch.no_grad():
            logits = self.model(
                input_ids=ids, position_ids=torch.cat(positions)[None], use_cache=False
            ).logits
        self.model.set_attn_implementation("sdpa")
        self.computed_tokens += ids.numel()
        return list(logits[0].split(news))

    def admit(self, prompt: Sequence[int], chunk: int | None = None) -> tuple[int, torch.Tensor]:
        """Admit and compute a prompt, in pieces if ``chunk`` says so: the sequence and its last logits."""
        admission = self.manager.allocate(prompt, max_new_tokens=chunk)
        seq, at = admission.seq, admission.num_tokens
        logits = self.forward([(seq, prompt[admission.num_cached : at])])[0]
        while at < len(prompt):
            piece = prompt[at : at + (chunk or len(prompt))]
            self.manager.extend(seq, piece)
            logits = self.forward([(seq, piece)])[0]
            at += len(piece)
        return seq, logits[-1]

    def decode(self, seqs: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """One token a sequence: logits ``[sequences, vocabulary]``."""
        self.manager.append_step(seqs, tokens)
        out = self.forward([(seq, [token]) for seq, token in zip(seqs, tokens, strict=True)])
        return torch.stack([logits[-1] for logits in out])

    def greedy(self, prompt: Sequence[int], chunk: int | None = None) -> list[int]:
        """The most probable continuation."""
        seq, logits = self.admit(prompt, chunk)
        tokens = [int(logits.argmax())]
        while len(tokens) < NEW:
            tokens.append(int(self.decode([seq], tokens[-1:])[0].argmax()))
        self.manager.free(seq)
        return tokens


def llama(**sizes: int) -> torch.nn.Module:
    """A small Llama whose random weights are large enough that its tokens vary."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        initializer_range=0.25, **sizes,
    )  # fmt: skip
    model: torch.nn.Module = transformers.LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    return model


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return llama(num_attention_heads=4, num_key_value_heads=2, head_dim=32)


@pytest.fixture
def engine(model: torch.nn.Module) -> Callable[..., Engine]:
    def make(num_blocks: int = 200, layout: KVLayout = KVLayout.NHD, **options: object) -> Engine:
        return Engine(model, num_blocks, layout, **options)

    return make


def prompts(n: int, length: int = 30, seed: int = 1) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, length + i).tolist() for i in range(n)]


def generate(model: torch.nn.Module, prompt: Sequence[int], **options: object) -> list[list[int]]:
    """What transformers continues the prompt with, on contiguous caches."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, **options}
    with torch.no_grad():
        out = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, **options
        )
    return [row[len(prompt) :].tolist() for row in out]


@pytest.mark.parametrize("layout", list(KVLayout))
def test_greedy(model: torch.nn.Module, engine: Callable[..., Engine], layout: KVLayout) -> None:
    (prompt,) = prompts(1)
    want = generate(model, prompt)[0]
    assert len(set(want)) > 5  # the model is not stuck on a token, which would prove little
    assert engine(layout=layout).greedy(prompt) == want


@pytest.mark.parametrize("chunk", [1, 3, 4, 11])
def test_chunked_prefill(model: torch.nn.Module, engine: Callable[..., Engine], chunk: int) -> None:
    (prompt,) = prompts(1)
    assert engine().greedy(prompt, chunk) == generate(model, prompt)[0]


def test_prefix_reuse(model: torch.nn.Module, engine: Callable[..., Engine]) -> None:
    serving = engine()
    (prompt,) = prompts(1)
    serving.greedy(prompt)
    other = [*prompt[:22], 5, 6, 7, *prompt[22:]]  # leaves the cached prefix in the middle of a block
    for again, cached in ((prompt, len(prompt) - 1), (other, 22)):
        before = serving.computed_tokens
        assert serving.greedy(again) == generate(model, again)[0]
        assert serving.computed_tokens - before == len(again) - cached + NEW - 1
    assert serving.manager.stats().counters.partial_hit_tokens > 0
    turn = [*prompt, *generate(model, prompt)[0], 1, 2, 3]  # the next turn of the conversation
    hit = serving.manager.match(turn).num_tokens
    assert hit >= len(prompt) + NEW - 1
    assert serving.greedy(turn) == generate(model, turn)[0]


def test_parallel_sampling(model: torch.nn.Module, engine: Callable[..., Engine]) -> None:
    (prompt,) = prompts(1)
    torch.manual_seed(7)
    want = generate(
        model, prompt, do_sample=True, num_return_sequences=4, top_k=0, top_p=1.0, temperature=1.0
    )
    serving = engine()
    torch.manual_seed(7)
    seq, logits = serving.admit(prompt)
    seqs = [seq, *serving.manager.fork(seq, 3)]
    rows: list[list[int]] = [[] for _ in seqs]
    batch = logits.repeat(4, 1)
    for _ in range(NEW):
        for row, token in zip(rows, torch.multinomial(batch.softmax(-1), 1)[:, 0].tolist(), strict=True):
            row.append(token)
        if len(rows[0]) < NEW:
            batch = serving.decode(seqs, [row[-1] for row in rows])
    assert rows == want and len({tuple(row) for row in rows}) == 4
    assert serving.manager.stats().counters.copied_blocks == 3


def test_beam_search(model: torch.nn.Module, engine: Callable[..., Engine]) -> None:
    (prompt,) = prompts(1)
    want = generate(model, prompt, num_beams=4, num_return_sequences=4)
    serving = engine()
    seq, logits = serving.admit(prompt)
    scores, first = logits.log_softmax(-1).topk(4)
    beams = [seq, *serving.manager.fork(seq, 3)]
    rows = [[token] for token in first.tolist()]
    while len(rows[0]) < NEW:
        step = scores[:, None] + serving.decode(beams, [row[-1] for row in rows]).log_softmax(-1)
        scores, best = step.flatten().topk(4)
        parents = (best // VOCABULARY).tolist()
        new = [serving.manager.fork(beams[parent])[0] for parent in parents]
        for beam in beams:
            serving.manager.free(beam)
        beams = new
        rows = [[*rows[p], t] for p, t in zip(parents, (best % VOCABULARY).tolist(), strict=True)]
    assert rows == want and len({tuple(row) for row in rows}) == 4


@pytest.mark.parametrize(("swap", "recompute"), [(1e12, 1.0), (1.0, 1e12)])
def test_forced_preemption(
    model: torch.nn.Module, engine: Callable[..., Engine], swap: float, recompute: float
) -> None:
    """Five requests in a pool for two or three: the others are swapped out, or freed and computed again."""
    many = prompts(5)
    serving = engine(num_blocks=30, num_host_blocks=60)
    rule = PreemptionRule(serving.cache.shape.block_bytes, swap, recompute)
    manager = serving.manager
    outputs: list[list[int]] = [[] for _ in many]
    waiting, swapped = list(range(5)), {}
    running: dict[int, int] = {}  # request -> sequence
    remedies = set()
    for _ in range(1000):
        if not (waiting or swapped or running):
            break
        for request in list(swapped):
            try:
                serving.cache.swap_in(manager.swap_in(swapped[request]))
            except OutOfBlocks:
                break
            running[request] = swapped.pop(request)
        while waiting and not swapped and manager.can_allocate([*many[waiting[0]], *outputs[waiting[0]]]):
            request = waiting.pop(0)
            seq, logits = serving.admit([*many[request], *outputs[request]])
            outputs[request].append(int(logits.argmax()))
            running[request] = seq
        short = manager.blocks_needed(list(running.values())) - manager.pool.num_free
        if short > 0:
            request_of = {seq: request for request, seq in [*swapped.items(), *running.items()]}
            for step in rule.plan(manager, short, [*swapped.values(), *list(running.values())[::-1]]):
                remedies.add(step.remedy)
                request = request_of[step.seq]
                running.pop(request, None)
                if step.remedy is Remedy.SWAP:
                    serving.cache.swap_out(manager.swap_out(step.seq, step.num_blocks))
                    swapped[request] = step.seq
                else:
                    manager.free(step.seq)
                    waiting.insert(0, request)
        for request in [r for r in running if len(outputs[r]) >= NEW]:
            manager.free(running.pop(request))
        if running:
            logits = serving.decode(list(running.values()), [outputs[r][-1] for r in running])
            for request, row in zip(running, logits, strict=True):
                outputs[request].append(int(row.argmax()))
    assert remedies == {Remedy.SWAP if swap > recompute else Remedy.RECOMPUTE}
    assert [row[:NEW] for row in outputs] == [generate(model, prompt)[0] for prompt in many]
    assert manager.pool.num_free == 30


def test_speculative_rollback(model: torch.nn.Module, engine: Callable[..., Engine]) -> None:
    """Drafts that are right at first and wrong then: the target's tokens come out, in fewer passes."""
    (prompt,) = prompts(1)
    want = generate(model, prompt)[0]
    rng = np.random.default_rng(3)
    serving = engine(lookahead=5)
    seq, logits = serving.admit(prompt)
    out = [int(logits.argmax())]
    passes = 0
    while len(out) < NEW:
        good = int(rng.integers(0, 5))
        draft = [*want[len(out) : len(out) + good], *rng.integers(0, VOCABULARY, 4).tolist()][:4]
        serving.manager.extend(seq, [out[-1], *draft])
        choice = serving.forward([(seq, [out[-1], *draft])])[0].argmax(-1).tolist()
        accepted = 0
        while accepted < 4 and draft[accepted] == choice[accepted]:
            accepted += 1
        serving.manager.truncate(seq, serving.manager.length(seq) - 4 + accepted)
        out += choice[: accepted + 1]
        passes += 1
    assert out[:NEW] == want and passes < NEW - 1
    tail = [*prompt, *out[:-1], 3]
    serving.manager.free(seq)
    assert serving.greedy(tail) == generate(model, tail)[0]  # what the cache kept is right as well


def test_a_mixed_batch(model: torch.nn.Module, engine: Callable[..., Engine]) -> None:
    """Prefill of one sequence in the pass that decodes another."""
    first, second = prompts(2, 20)
    serving = engine()
    a, logits = serving.admit(first)
    token = int(logits.argmax())
    b = serving.manager.allocate(second)
    serving.manager.append_step([a], [token])
    one, two = serving.forward([(a, [token]), (b.seq, second[b.num_cached :])])
    assert int(one[-1].argmax()) == generate(model, first)[0][1]
    assert int(two[-1].argmax()) == generate(model, second)[0][0]


@pytest.fixture(scope="module")
def wide_model() -> torch.nn.Module:
    return llama(num_attention_heads=8, num_key_value_heads=2, head_dim=64)


def test_decode_with_a_packs_kernel(
    cpu_pack: Path, make_spec: Callable[..., KernelSpec], wide_model: torch.nn.Module
) -> None:
    """Prefill in torch, decode by the CPU kernel of a pack, sequences of different lengths at once."""
    attention = pagedgen.load(cpu_pack)
    assert make_spec(64, (8, 2), 16, "f32") in attention.specs
    serving = Engine(wide_model, 40, KVLayout.NHD, 16, attention)
    many = prompts(3, 14)
    admitted = [serving.admit(prompt) for prompt in many]
    rows = [[int(logits.argmax())] for _, logits in admitted]
    while len(rows[0]) < NEW:
        logits = serving.decode([seq for seq, _ in admitted], [row[-1] for row in rows])
        for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
            row.append(token)
    assert rows == [generate(wide_model, prompt)[0] for prompt in many]


@pytest.fixture(scope="module")
def packs(
    cpu_choice: Callable[..., Choice],
    make_spec: Callable[..., KernelSpec],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[KVLayout, pagedgen.Attention]:
    """Packs with every operator that serving takes, for K along tokens and along head_dim."""
    found = {}
    for layout in (KVLayout.KTOKEN, KVLayout.PACKED):
        specs = [
            make_spec(64, (2 if op is Op.WRITE_KV else 8, 2), 16, "f32", k_inner=layout.k_inner, op=op)
            for op in (Op.DECODE, Op.EXTEND, Op.WRITE_KV)
        ]
        place = tmp_path_factory.mktemp("packs") / f"{layout}.pack"
        found[layout] = pagedgen.load(build([cpu_choice(spec) for spec in specs], place))
    return found


@pytest.mark.parametrize("layout", [KVLayout.KTOKEN, KVLayout.PACKED])
def test_every_step_by_a_packs_kernels(
    packs: dict[KVLayout, pagedgen.Attention],
    layout: KVLayout,
    wide_model: torch.nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunked prompts, a prompt beside a decode, samples that copy shared blocks: never torch's attention."""
    monkeypatch.setattr(torch_attention, "extend", None)
    monkeypatch.setattr("pagedgen.runtime.kv_cache.store", None)
    serving = Engine(wide_model, 60, layout, 16, packs[layout])
    first, second = prompts(2, 37)
    want = [generate(wide_model, prompt)[0] for prompt in (first, second)]
    assert len(set(want[0])) > 5
    for chunk in (None, 1, 11, 16):
        serving.manager.clear_cache()
        assert serving.greedy(first, chunk) == want[0]
    serving.manager.clear_cache()
    a, logits = serving.admit(first)
    token = int(logits.argmax())
    b = serving.manager.allocate(second)
    serving.manager.append_step([a], [token])
    one, two = serving.forward([(a, [token]), (b.seq, second[b.num_cached :])])
    assert (int(one[-1].argmax()), int(two[-1].argmax())) == (want[0][1], want[1][0])

    samples = [b.seq, *serving.manager.fork(b.seq, 2)]
    last = [want[1][0]] * 3
    for step in range(1, NEW):
        last = serving.decode(samples, last).argmax(-1).tolist()
        assert last == [want[1][step]] * 3
    assert serving.manager.stats().counters.copied_blocks == 2
