"""Conservation laws of the simulation, its refusals, and that a seed fixes everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pagedgen.autotune.explore.load import Arrivals, Load
from pagedgen.autotune.explore.policies import ADAPTIVE, Policy
from pagedgen.autotune.explore.scheduler import Scheduler
from pagedgen.autotune.explore.simulation import MIDDLE, Setup, manager_of, run_coverage, simulate
from pagedgen.errors import InvalidValue, MalformedFile
from pagedgen.runtime.block_manager import BlockManager
from pagedgen.runtime.preemption import PreemptionRule
from pagedgen.values.trace import Request, Trace


class Laws:
    """Checks every step; :meth:`end` checks the whole."""

    def __init__(self, setup: Setup):
        self.setup, self.clock, self.computed = setup, 0.0, 0
        self.given: dict[int, int] = {}  # tokens that each request was given
        self.manager: BlockManager | None = None

    def __call__(self, batch, clock, scheduler: Scheduler) -> None:
        # a step that only takes back what is still cached has nothing to run, and costs nothing
        assert clock > self.clock or (clock == self.clock and not batch.num_tokens)
        self.clock, self.manager = clock, scheduler.manager
        pool = scheduler.manager.pool
        assert 0 <= pool.num_free <= pool.num_blocks
        stats = scheduler.manager.stats()
        assert stats.stored_tokens <= stats.used_blocks * scheduler.manager.block_size
        assert stats.sequences <= self.setup.max_num_seqs
        assert batch.num_tokens <= self.setup.max_batched_tokens
        rows = scheduler.manager.seqs.rows([r.seq for r in scheduler.decoding])
        assert batch.num_decodes == rows.size
        assert batch.decode_tokens == int(scheduler.manager.seq_lens[rows].sum())
        self.computed += batch.num_tokens
        for request in itertools.chain(scheduler.decoding, (c.request for c in batch.chunks if c.last)):
            self.given[request.index] = self.given.get(request.index, 0) + 1

    def end(self, outcome) -> None:
        requests = self.setup.trace.requests
        manager = self.manager
        assert manager.pool.num_free == manager.pool.num_blocks and len(manager.seqs) == 0
        assert manager.swap.num_free == manager.swap.num_blocks
        # Every token that was asked for was given, once, and nothing else was.
        assert self.given == {i: max(1, r.output) for i, r in enumerate(requests)}
        assert outcome.output_tokens == sum(self.given.values()) and outcome.requests == len(requests)
        # Every token that was stored, for good or until a preemption, was computed or found in the cache.
        stored = sum(max(1, r.prompt) + max(1, r.output) - 1 for r in requests)
        hits = manager.counters.hit_tokens
        assert outcome.computed_tokens == self.computed == stored + outcome.dropped_tokens - hits
        shares = (outcome.memory_tokens, outcome.internal_waste, outcome.external_waste, outcome.hit_share)
        assert all(0 <= share <= 1 for share in (*shares, outcome.run_coverage, outcome.kernel_share))
        assert outcome.memory_tokens + outcome.internal_waste <= 1 + 1e-9
        assert outcome.seconds >= self.clock >= sum(outcome.windows) > 0
        assert 0 < outcome.ttft_p50 <= outcome.ttft_p99 <= outcome.seconds
        assert 0 < outcome.batch_mean <= self.setup.max_num_seqs >= outcome.batch_p99 > 0
        times = [moment.seconds for moment in outcome.timeline]
        assert times == sorted(times) and len(times) <= 120


@pytest.mark.parametrize("policy", [Policy(1), Policy(16), Policy(100), Policy(256), ADAPTIVE])
@pytest.mark.parametrize("prefixes", [False, True])
@pytest.mark.parametrize("host", [0, 4_000_000])
def test_conservation(policy, prefixes, host, trace, setup, step_time):
    requests = trace(prefixes=prefixes)
    made = setup(requests, prefix_caching=prefixes, host_bytes=host)
    laws = Laws(made)
    outcome = simulate(made, policy, step_time(policy), watch=laws)
    laws.end(outcome)
    assert (outcome.hit_share > 0) == prefixes
    assert outcome.dropped_tokens == 0 or outcome.preemptions > 0


@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 60)), min_size=1, max_size=25),
    st.sampled_from([Policy(1), Policy(7), Policy(64), ADAPTIVE]),
    st.sampled_from([Load(Arrivals.CLOSED, 1), Load(Arrivals.CLOSED, 30), Load(Arrivals.POISSON, 500.0)]),
    st.booleans(),
    st.sampled_from([0, 300_000]),
)
@example(  # what was swapped out is still cached: bringing it back copies nothing
    [(117, 21), (182, 20), (54, 12)], Policy(64), Load(Arrivals.CLOSED, 30), True, 300_000
)
@settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_conservation_on_any_trace(setup, step_time, lengths, policy, load, caching, host):
    requests = Trace("any", tuple(Request(p, o) for p, o in lengths))
    made = setup(requests, load, tokens=512, prefix_caching=caching, host_bytes=host)
    laws = Laws(made)
    laws.end(simulate(made, policy, step_time(policy), watch=laws))


def test_pressure_is_felt_and_a_larger_pool_relieves_it(trace, setup, step_time):
    long_outputs = trace(40, 60, 300)
    small = simulate(setup(long_outputs, tokens=2048), Policy(16), step_time(Policy(16)))
    large = simulate(setup(long_outputs, tokens=65536), Policy(16), step_time(Policy(16)))
    assert small.preemptions > 0 == large.preemptions and small.dropped_tokens > 0 == large.dropped_tokens
    assert large.tokens_per_s > small.tokens_per_s and large.batch_mean > small.batch_mean
    swapping = simulate(setup(long_outputs, tokens=2048, host_bytes=10**8), Policy(16), step_time(Policy(16)))
    assert swapping.swapped_bytes > 0 and swapping.dropped_tokens < small.dropped_tokens


def test_waste_grows_with_the_block(trace, setup, step_time):
    waste = []
    for size in (1, 16, 64, 256):
        outcome = simulate(setup(trace()), Policy(size), step_time(Policy(size)))
        waste.append(outcome.internal_waste)
    assert waste[0] == 0 and waste == sorted(waste) and waste[-1] > 0.2


def test_the_same_seed_gives_the_same_outcome(trace, setup, step_time):
    made = setup(trace(prefixes=True), Load(Arrivals.POISSON, 100.0), prefix_caching=True, seed=3)
    first, second = (simulate(made, Policy(16), step_time(Policy(16))) for _ in range(2))
    assert first == second
    other = setup(made.trace, Load(Arrivals.POISSON, 100.0), prefix_caching=True, seed=4)
    assert simulate(other, Policy(16), step_time(Policy(16))) != first


def test_open_and_closed_loops(trace, setup, step_time):
    requests = trace(30)
    slow = simulate(setup(requests, Load(Arrivals.TRACE, 0.1)), Policy(16), step_time(Policy(16)))
    assert slow.seconds >= requests.requests[-1].arrival / 0.1 and slow.batch_mean < 2
    alone = simulate(setup(requests, Load(Arrivals.CLOSED, 1)), Policy(16), step_time(Policy(16)))
    assert alone.batch_p99 == 1
    assert slow.ttft_p50 == pytest.approx(alone.ttft_p50, rel=0.05)  # both serve one request at a time
    full = simulate(setup(requests, Load(Arrivals.CLOSED, 30)), Policy(16), step_time(Policy(16)))
    assert full.tokens_per_s > 3 * alone.tokens_per_s and full.ttft_p50 > alone.ttft_p50


def test_figures_of_one_request(setup, step_time):
    made = setup(Trace("one", (Request(100, 11),)))
    model = step_time(Policy(16))
    seen = []
    outcome = simulate(made, Policy(16), model, watch=lambda batch, clock, _: seen.append(clock))
    assert outcome.steps == len(seen) == 11  # a prompt in one step, which gives the first token, and ten more
    assert outcome.ttft_p50 == seen[0] and outcome.seconds == seen[-1]
    assert outcome.tpot_p50 == pytest.approx((seen[-1] - seen[0]) / 10)
    assert outcome.latency_per_token == pytest.approx(seen[-1] / 11)
    assert outcome.computed_tokens == 110
    middle = np.interp(np.array(MIDDLE) * 111, [0, 111], [0, seen[-1]])  # the pool was looked at once
    assert sum(outcome.windows) == pytest.approx(np.diff(middle))
    assert outcome.tokens_per_s == pytest.approx(11 * 0.8 / np.diff(middle))


def test_coverage_of_a_pool_that_is_known():
    manager = BlockManager(64, 16, prefix_caching=False)
    first, second = (manager.allocate([0] * 128).seq for _ in range(2))
    assert run_coverage(manager) == 1.0
    for _ in range(4 * 16):  # now they take turns, a block at a time
        manager.append_step([first, second], [0, 0])
        manager.take_copies()
    assert run_coverage(manager) == pytest.approx(2 * 128 / (2 * 192))
    manager.free(first)
    assert run_coverage(manager) == pytest.approx(128 / 192)


def test_requests_that_never_fit_are_named_with_their_line(trace, setup, step_time):
    requests = Trace("big", (Request(10, 10, line=2), Request(9000, 10, line=3)), "big.csv")
    with pytest.raises(MalformedFile, match=r"^big.csv: line 3: 9,009 tokens never fit into a pool of 8,192"):
        simulate(setup(requests), Policy(16), step_time(Policy(16)))
    drawn = Trace("drawn", (Request(9000, 10),))
    with pytest.raises(MalformedFile, match=r"^drawn: request 1: "):
        simulate(setup(drawn), Policy(16), step_time(Policy(16)))
    exact = Trace("fits", (Request(8183, 10),))
    assert simulate(setup(exact), Policy(16), step_time(Policy(16))).output_tokens == 10
    with pytest.raises(InvalidValue, match="memory = 1000: 1 to 16777215 blocks"):
        manager_of(setup(exact, tokens=1), Policy(16), 16_000)


@pytest.mark.parametrize(
    ("arrivals", "amount"),
    [
        (Arrivals.CLOSED, 0),
        (Arrivals.CLOSED, 1.5),
        (Arrivals.TRACE, 0),
        (Arrivals.POISSON, -1),
        (Arrivals.TRACE, float("nan")),
    ],
)
def test_loads_that_are_not(arrivals, amount):
    with pytest.raises(InvalidValue, match=f"{arrivals} load"):
        Load(arrivals, amount)


def test_setups_that_are_not(trace, setup, step_time):
    with pytest.raises(InvalidValue, match="has no arrival times"):
        simulate(
            setup(Trace("x", (Request(1, 1),)), Load(Arrivals.TRACE, 1)), Policy(16), step_time(Policy(16))
        )
    load = Load(Arrivals.CLOSED, 1)
    for field, values in (
        ("memory_bytes", (0, 1, 1)),
        ("max_num_seqs", (1, 0, 1)),
        ("max_batched_tokens", (1, 8, 7)),
    ):
        with pytest.raises(InvalidValue, match=field):
            Setup(trace(), load, *values)
    with pytest.raises(InvalidValue, match="host_bytes = -1"):
        Setup(trace(), load, 1, 1, 1, -1)
    with pytest.raises(InvalidValue, match="max_batched_tokens = 3"):
        Scheduler(BlockManager(8, max_num_seqs=4), PreemptionRule(1, 1.0, 1.0), 3)
    with pytest.raises(InvalidValue, match="block_size = 0"):
        Policy(0)
    with pytest.raises(InvalidValue, match="block_size = 64: 16 is allowed"):
        Policy(64, adaptive=True)
