"""The simulation against a real run of the runtime: a plain serving loop and a small random Llama.

Every step has the same batch, the same blocks and the same preemptions.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from pagedgen.autotune.explore import request as request_module
from pagedgen.autotune.explore.kernel_time import KernelTime
from pagedgen.autotune.explore.load import Arrivals, Load
from pagedgen.autotune.explore.policies import ADAPTIVE, Policy
from pagedgen.autotune.explore.scheduler import Batch, Scheduler
from pagedgen.autotune.explore.simulation import SECRET, Setup, simulate
from pagedgen.autotune.explore.step_time import SWAP_GBS, StepTime
from pagedgen.errors import OutOfBlocks
from pagedgen.runtime import torch_attention
from pagedgen.runtime.block_manager import BlockManager
from pagedgen.runtime.kv_cache import KVCache, KVShape
from pagedgen.runtime.preemption import PreemptionRule, Remedy
from pagedgen.values.model import Model
from pagedgen.values.record import Status
from pagedgen.values.spec import DType, KernelSpec, Op
from pagedgen.values.target_table import target
from pagedgen.values.trace import Request, Trace
from pagedgen.values.weights import Weights

transformers = pytest.importorskip("transformers")
REQUESTS, PIECE, VOCABULARY, BUDGET, SEQS = 200, 8, 1024, 32, 16
LLAMA = Model("tiny", 2, 32, 4, 2, 16, DType.F32)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(request_module, "PREFIX_TOKENS", PIECE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
        bos_token_id=None, eos_token_id=None, pad_token_id=0, initializer_range=0.25,
    )  # fmt: skip
    made = transformers.LlamaForCausalLM(config).eval()
    made.generation_config.eos_token_id = None
    return made


def the_trace() -> Trace:
    """200 requests of 3 to 70 tokens; four in five begin with one of five prefixes, and no two are equal."""
    rng = np.random.default_rng(7)
    requests, ids = [], 5
    for i in range(REQUESTS):
        shared = [int(rng.integers(0, 5))] if rng.random() < 0.8 else []
        prompt = PIECE * len(shared) + int(rng.integers(1, 40))
        own = -(-prompt // PIECE) - len(shared)
        requests.append(Request(prompt, int(rng.integers(1, 24)), 0.4 * i, (*shared, *range(ids, ids + own))))
        ids += own
    return Trace("small", tuple(requests))


def prompt_of(lengths: Request) -> list[int]:
    """Real token ids: those of a piece follow from its id, and its first token is no other piece's."""
    tokens: list[int] = []
    for piece in lengths.prefix:
        rng = np.random.default_rng(piece)
        tokens += [piece % VOCABULARY, *rng.integers(0, VOCABULARY, PIECE - 1).tolist()]
    return tokens[: lengths.prompt]


@dataclass
class State:
    """A request in the plain loop."""

    index: int
    prompt: list[int]
    output: int
    tokens: list[int] = field(default_factory=list)  # generated
    seq: int = -1


class PlainLoop:
    """Serves requests with the runtime, each step in the order that the scheduler's documentation states.

    What the scheduler keeps in counters and arrays is asked of the manager here.
    """

    def __init__(self, model, manager: BlockManager, rule: PreemptionRule):
        self.model, self.manager, self.rule = model, manager, rule
        shape = KVShape(2, 2, 16, manager.block_size, DType.F32)
        self.cache = KVCache(shape, manager.pool.num_blocks, num_host_blocks=manager.swap.num_blocks)
        self.waiting: deque[State] = deque()
        self.running: list[State] = []  # decode, in the order in which they began to
        self.partial: State | None = None  # its prompt is not complete
        self.swapped: list[State] = []
        self.refused_at = -1

    def pending(self, state: State) -> list[int]:
        """Tokens that have no KV yet."""
        everything = state.prompt + state.tokens
        return everything[self.manager.length(state.seq) if state.seq >= 0 else 0 :]

    def step(self):
        """(what each request computes, who was preempted, who is done)"""
        manager, work, preempted = self.manager, [], []
        room_made = False
        while self.running:
            seqs = [s.seq for s in self.running]
            short = manager.blocks_needed(seqs) - manager.pool.num_free
            if short <= 0:
                manager.append_step(seqs, [s.tokens[-1] for s in self.running])
                work += [(s, 1) for s in self.running]
                break
            room_made = True
            everyone = self.running + ([self.partial] if self.partial else [])
            everyone.sort(key=lambda s: -s.index)
            self.make_room(short, self.swapped + everyone, preempted)
        budget = BUDGET - len(work)
        later = []  # decode from the next step on, in the order in which this one turned to them
        if self.partial and budget:
            piece = self.pending(self.partial)[:budget]
            try:
                manager.extend(self.partial.seq, piece)
            except OutOfBlocks:
                pass
            else:
                work.append((self.partial, len(piece)))
                later.append(self.partial)
                budget -= len(piece)
                if not self.pending(self.partial):
                    self.partial = None
        while self.swapped and not room_made:
            first = self.swapped[0]
            anybody = self.running or self.partial or later
            on_host = sum(r.columns.size for r in manager.swap.records[manager.seqs.row(first.seq)])
            short = on_host + (manager.watermark_blocks if anybody else 0) - manager.pool.num_free
            if short > 0 and anybody:
                break
            if short > 0:
                self.make_room(short, self.swapped[:0:-1], preempted)
                room_made = True
            self.cache.swap_in(manager.swap_in(first.seq))
            later.append(self.swapped.pop(0))
        while self.waiting and budget and not (room_made or self.swapped or self.partial):
            state = self.waiting[0]
            if len(manager.seqs) == SEQS or manager.pool.num_free <= self.refused_at:
                break
            if not manager.can_allocate(self.pending(state)):
                self.refused_at = manager.pool.num_free
                break
            self.waiting.popleft()
            self.refused_at = -1
            admission = manager.allocate(self.pending(state), max_new_tokens=budget)
            state.seq = admission.seq
            work.append((state, admission.num_tokens - admission.num_cached))
            later.append(state)
            budget -= work[-1][1]
            self.partial = state if self.pending(state) else None
        computed = [(s.index, manager.length(s.seq) - n, n) for s, n in work]
        blocks = {s.index: manager.blocks(s.seq).tolist() for s, _ in work}
        logits = self.forward(work) if work else []
        free = manager.pool.num_free
        done = []
        for (state, _), out in zip(work, logits, strict=True):
            if not self.pending(state):
                state.tokens.append(int(out[-1].argmax()))
                if len(state.tokens) == state.output:
                    manager.free(state.seq)
                    done.append(state)
        self.running = [s for s in self.running if s not in done]
        self.running += [s for s in later if s not in done and s is not self.partial]
        return computed, blocks, [s.index for s in preempted], free, done

    def make_room(self, short, victims, preempted):
        by_seq = {s.seq: s for s in victims}
        for step in self.rule.plan(self.manager, short, list(by_seq)):
            state = by_seq[step.seq]
            was_swapped = state in self.swapped
            if not was_swapped:
                preempted.append(state)
            if step.remedy is Remedy.SWAP and state is not self.partial:
                self.cache.swap_out(self.manager.swap_out(step.seq, step.num_blocks))
                if not was_swapped:
                    self.running.remove(state)
                    self.swapped = sorted([*self.swapped, state], key=lambda s: s.index)
                continue
            if was_swapped:
                self.swapped.remove(state)
                preempted.append(state)
            elif state is self.partial:
                self.partial = None
            else:
                self.running.remove(state)
            self.manager.free(state.seq)
            state.seq = -1
            self.waiting = deque(sorted([*self.waiting, state], key=lambda s: s.index))
        self.refused_at = -1

    def forward(self, work):
        manager, cache = self.manager, self.cache
        cache.copy_blocks(manager.take_copies())
        lens, news = [manager.length(s.seq) for s, _ in work], [n for _, n in work]
        slots = torch.from_numpy(
            np.concatenate([manager.slots(s.seq, n - new, n) for (s, new), n in zip(work, lens, strict=True)])
        )
        table = torch.from_numpy(manager.groups[0].table[[manager.seqs.row(s.seq) for s, _ in work]])

        def attend(module, query, key, value, *_, scaling, **__):
            layer = module.layer_idx
            cache.write_kv(layer, key[0].transpose(0, 1), value[0].transpose(0, 1), slots)
            q = query[0].transpose(0, 1)
            out = torch_attention.extend(
                q, cache.k[layer], cache.v[layer], table, lens, news, softmax_scale=scaling
            )
            return out[None], None

        transformers.AttentionInterface.register("pagedgen_explore_test", attend)
        self.model.set_attn_implementation("pagedgen_explore_test")
        everything = [s.prompt + s.tokens for s, _ in work]
        ids = [t for all_, n, new in zip(everything, lens, news, strict=True) for t in all_[n - new : n]]
        positions = torch.cat([torch.arange(n - new, n) for n, new in zip(lens, news, strict=True)])
        with torch.no_grad():
            logits = self.model(
                input_ids=torch.tensor([ids]), position_ids=positions[None], use_cache=False
            ).logits
        self.model.set_attn_implementation("sdpa")
        return logits[0].split(news)


@pytest.mark.parametrize(
    ("policy", "num_blocks", "caching", "host", "recompute_rate", "arrivals"),
    [
        (Policy(4), 60, False, 0, 1e12, Arrivals.CLOSED),
        (Policy(4), 60, True, 0, 1e12, Arrivals.TRACE),
        (Policy(8), 30, True, 30, 1.0, Arrivals.TRACE),
        (ADAPTIVE, 18, True, 0, 1e12, Arrivals.CLOSED),
    ],
)
def test_step_by_step(model, monkeypatch, policy, num_blocks, caching, host, recompute_rate, arrivals):
    # With caching, blocks divide pieces: the cache finds the head of a block through a table in which entries
    # of other prefixes can stand in the way, and which ones do depends on the very tokens.
    trace, size = the_trace(), policy.block_size
    monkeypatch.setattr(StepTime, "prefill_tokens_per_s", recompute_rate)
    spec = KernelSpec(Op.DECODE, 32, 4, 2, size, DType.F16, DType.F16)
    kernel = KernelTime(spec, Status.PREDICTED, "made up", ((1e5, 2e5), (1.5e5, 3e5)))
    step_time = StepTime(kernel, LLAMA, Weights(1, 1, 0, 2), target("h100"), block_bytes=1000)
    load = Load(arrivals, 40 if arrivals is Arrivals.CLOSED else 1)
    setup = Setup(trace, load, num_blocks * 1000, SEQS, BUDGET, host * 1000, caching)

    manager = BlockManager(
        num_blocks, size, max_num_seqs=SEQS, max_seq_len=setup.max_seq_len, prefix_caching=caching,
        num_host_blocks=host, secret=SECRET, adaptive=policy.adaptive,
    )  # fmt: skip
    loop = PlainLoop(model, manager, PreemptionRule(1000, SWAP_GBS * 1e9, recompute_rate))
    states = [State(i, prompt_of(r), r.output) for i, r in enumerate(trace.requests)]
    seen = {"steps": 0, "arrived": 0, "done": 0, "preempted": 0}

    def watch(batch: Batch, clock: float, scheduler: Scheduler) -> None:
        begun = clock - step_time(batch)[0]
        while seen["arrived"] < REQUESTS and (
            seen["arrived"] - seen["done"] < 40
            if arrivals is Arrivals.CLOSED
            else trace.requests[seen["arrived"]].arrival <= begun + 1e-9
        ):
            loop.waiting.append(states[seen["arrived"]])
            seen["arrived"] += 1
        computed, blocks, preempted, free, done = loop.step()
        decodes, chunks = computed[: batch.num_decodes], computed[batch.num_decodes :]
        mine = scheduler.manager
        assert decodes == [(r.index, mine.length(r.seq) - 1, 1) for r in scheduler.decoding]
        assert sum(before + 1 for _, before, _ in decodes) == batch.decode_tokens
        assert chunks == [(c.request.index, c.context, c.tokens) for c in batch.chunks]
        assert preempted == [r.index for r in batch.preempted]
        theirs = [*scheduler.decoding, *(c.request for c in batch.chunks)]
        assert blocks == {r.index: mine.blocks(r.seq).tolist() for r in theirs}
        assert free == mine.pool.num_free
        seen["done"] += len(done)
        seen["preempted"] += len(preempted)
        seen["steps"] += 1

    outcome = simulate(setup, policy, step_time, watch=watch)
    assert seen["done"] == outcome.requests == REQUESTS and seen["steps"] == outcome.steps
    assert seen["preempted"] == outcome.preemptions > 10
    assert (outcome.hit_share > 0.02) == caching
    assert (outcome.swapped_bytes > 0) == (host > 0)
    assert [len(s.tokens) for s in states] == [r.output for r in trace.requests]
    for state in states[:3]:  # the loop served real tokens
        ids = torch.tensor([state.prompt])
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False,
                max_new_tokens=state.output, min_new_tokens=state.output,
            )  # fmt: skip
        assert out[0, len(state.prompt) :].tolist() == state.tokens
