"""model × target × traces × block sizes → report: every policy simulated on every trace."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

from pagedgen import __version__
from pagedgen.autotune.database import Database
from pagedgen.autotune.explore import controller
from pagedgen.autotune.explore.compare import YARDSTICKS, pareto, recommend, verdicts
from pagedgen.autotune.explore.kernel_time import KernelTime, kernel_time
from pagedgen.autotune.explore.load import Load
from pagedgen.autotune.explore.outcome import Outcome
from pagedgen.autotune.explore.policies import ADAPTIVE, BOUND, GRANULE, Policy
from pagedgen.autotune.explore.report import FORMAT, Report, Server, TraceReport
from pagedgen.autotune.explore.simulation import Setup, simulate
from pagedgen.autotune.explore.step_time import StepTime
from pagedgen.autotune.explore.timings import KernelTimings
from pagedgen.autotune.suites.fragmentation import Lengths, Share, figure_2
from pagedgen.errors import InvalidValue
from pagedgen.values.model import Model
from pagedgen.values.spec import DType, KernelSpec, Op
from pagedgen.values.target import Target
from pagedgen.values.trace import Trace
from pagedgen.values.weights import Weights

BLOCK_SIZES = (1, 8, 16, 32, 64, 128, 256)
RESERVED = 0.1  # share of a GPU's memory that is neither for weights nor for KV: activations, workspaces
FIGURE_STEPS = 4000  # decode steps of the contiguous policies
FIGURE_TOKENS = 1 << 18  # of their pool, unless the longest request needs more
POLL_S = 0.2

Progress = Callable[[str, int, int], None]  # trace, requests done over all its policies, of how many


@dataclass(frozen=True, slots=True)
class Exploration:
    """What is explored; ``model`` and ``weights`` are those of one rank.

    ``memory_bytes`` of the KV pool; 0: what the weights and a tenth of the memory leave.

    Raises:
        InvalidValue: naming the field: the weights or the pool do not fit into the target's memory, its rates
            are not known, a block size twice or out of range.
    """

    model: Model
    weights: Weights
    target: Target
    kv_dtype: DType
    block_sizes: tuple[int, ...] = BLOCK_SIZES
    adaptive: bool = False
    memory_bytes: int = 0
    host_bytes: int = 0
    max_num_seqs: int = 1024
    max_batched_tokens: int = 2048
    seed: int = 0
    timings: KernelTimings | None = None
    records: Database | None = None
    command: str = ""

    def __post_init__(self) -> None:
        if not self.block_sizes or len(set(self.block_sizes)) != len(self.block_sizes):
            raise InvalidValue("block_sizes", self.block_sizes, "at least one, and each once, is allowed")
        for size in self.block_sizes:
            Policy(size)
        for field in ("memory_bytes", "bandwidth_gbs", "f16_tflops"):
            if not getattr(self.target, field) > 0:
                allowed = f"{self.target.name}: a target that is published with one is allowed"
                raise InvalidValue(field, getattr(self.target, field), allowed)
        usable = int(self.target.memory_bytes * (1 - RESERVED))
        have = f"{usable / 1e9:.1f} GB of {self.target.name} ({RESERVED:.0%} kept free)"
        if self.weights.num_bytes >= usable:
            needed = f"{self.weights.num_bytes / 1e9:.1f} GB of weights do not fit into {have}: raise tp"
            raise InvalidValue("model", self.model.name, needed)
        if self.memory_bytes < 0 or self.weights.num_bytes + self.memory_bytes > usable:
            left = f"at most {(usable - self.weights.num_bytes) / (1 << 30):.1f} GiB is allowed: "
            weights = f"{self.weights.num_bytes / 1e9:.1f} GB of weights and the pool share {have}"
            raise InvalidValue("memory", f"{self.memory_bytes / (1 << 30):.1f} GiB", left + weights)

    @property
    def pool_bytes(self) -> int:
        """Of the KV pool."""
        return self.memory_bytes or int(self.target.memory_bytes * (1 - RESERVED)) - self.weights.num_bytes

    @property
    def sizes(self) -> tuple[int, ...]:
        """Fixed block sizes, ascending; with ``adaptive``, those that it is judged against among them."""
        return tuple(sorted({*self.block_sizes, *(YARDSTICKS if self.adaptive else ())}))

    @property
    def policies(self) -> tuple[Policy, ...]:
        """All that are simulated."""
        return (*map(Policy, self.sizes), *((ADAPTIVE, BOUND) if self.adaptive else ()))

    def spec(self, block_size: int) -> KernelSpec:
        """The decode kernel of a block size."""
        return self.model.specs(block_sizes=(block_size,), kv_dtypes=(self.kv_dtype,))[0]

    def setup(self, trace: Trace, load: Load, prefix_caching: bool) -> Setup:
        """The server on a trace."""
        return Setup(
            trace,
            load,
            self.pool_bytes,
            self.max_num_seqs,
            self.max_batched_tokens,
            self.host_bytes,
            prefix_caching,
            self.seed,
        )

    def step_time(self, policy: Policy, kernel: KernelTime) -> StepTime:
        """Of a policy, with the kernel that it is timed with."""
        token = self.spec(policy.block_size).kv_bytes_per_token * self.model.num_layers
        extend = replace(kernel.spec, op=Op.EXTEND)
        share = self.timings.matmul_share(extend, self.target) if self.timings else None
        return StepTime(kernel, self.model, self.weights, self.target, token * policy.block_size, share)


def explore(
    what: Exploration,
    traces: Sequence[tuple[Trace, Load, bool]],
    jobs: int = 1,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Report:
    """Simulate every policy on every trace; each trace with its load and whether prefixes are cached.

    Everything that can be wrong with the input is refused before the first simulation.

    Args:
        jobs: processes that share the simulations.
        progress: is told how far a trace is.
        note: is told what is being done.

    Raises:
        InvalidValue, MalformedFile: see :class:`Exploration` and :meth:`Setup.num_blocks`.
        Unsupported: no template covers the model on the target.
    """
    say = note or (lambda line: None)
    setups = [what.setup(*row) for row in traces]
    for setup in setups:
        setup.load.requests(setup.trace, setup.seed)
        for policy in what.policies:
            setup.num_blocks(
                policy,
                what.spec(policy.block_size).kv_bytes_per_token * what.model.num_layers * policy.block_size,
            )
    longest = max(setup.max_seq_len for setup in setups)
    kernels = {}
    for size in sorted({*what.sizes, *(p.kernel for p in what.policies)}):
        say(f"kernel times at block size {size}")
        kernels[size] = kernel_time(
            what.spec(size), what.target, what.max_num_seqs, longest, what.timings, what.records
        )
    step_times = {policy: what.step_time(policy, kernels[policy.kernel]) for policy in what.policies}
    outcomes = _simulate_all(setups, step_times, jobs, progress)
    reports = []
    for setup, found in zip(setups, outcomes, strict=True):
        say(f"contiguous policies on {setup.trace.name}")
        reports.append(_trace_report(what, setup, found, step_times))
    return Report(FORMAT, __version__, what.command, what.seed, _server(what), tuple(reports))


def _server(what: Exploration) -> Server:
    return Server(
        what.model.name,
        what.target.name,
        what.kv_dtype.value,
        what.weights.num_bytes,
        what.pool_bytes,
        what.host_bytes,
        what.spec(GRANULE).kv_bytes_per_token * what.model.num_layers,
        what.max_num_seqs,
        what.max_batched_tokens,
    )


def _trace_report(
    what: Exploration, setup: Setup, outcomes: tuple[Outcome, ...], step_times: dict[Policy, StepTime]
) -> TraceReport:
    trace, closed = setup.trace, setup.load.is_closed
    pool, shares = contiguous(trace, setup.memory_bytes // _server(what).token_bytes)
    chosen = None
    if what.adaptive:
        sizes = {size: step_times[Policy(size)] for size in what.sizes}
        chosen = controller.choose(trace.requests, setup, sizes)
    return TraceReport(
        trace=trace.name,
        requests=len(trace.requests),
        mean_prompt=sum(r.prompt for r in trace.requests) / len(trace.requests),
        mean_output=sum(r.output for r in trace.requests) / len(trace.requests),
        load=setup.load.text,
        closed=closed,
        prefix_caching=setup.prefix_caching,
        outcomes=outcomes,
        contiguous=shares,
        contiguous_pool=pool,
        pareto=pareto([o for o in outcomes if not o.policy.kernel_block_size], closed),
        recommendation=recommend(outcomes, closed),
        controller=chosen,
        verdicts=() if chosen is None else verdicts(outcomes, chosen, closed),
    )


def contiguous(trace: Trace, pool_tokens: int) -> tuple[int, tuple[Share, ...]]:
    """(pool in tokens, shares): reservation in one piece as in Figure 2 of the PagedAttention paper.

    The pool is rounded down to a power of two, which a buddy allocator has, and cut to what shows the shares:
    ``FIGURE_TOKENS``, or eight of the longest requests. A policy under which it never fills with the requests
    there are has no share.
    """
    prompts = tuple(max(1, request.prompt) for request in trace.requests)
    outputs = tuple(max(1, request.output) for request in trace.requests)
    lengths = Lengths(trace.name, prompts, outputs)
    enough = max(FIGURE_TOKENS, 8 << (lengths.longest - 1).bit_length())
    pool = min(1 << (pool_tokens.bit_length() - 1), enough)
    if lengths.longest > pool:
        return pool, ()
    shares = figure_2(lengths, pool, GRANULE, FIGURE_STEPS)
    return pool, tuple(share for share in shares if share.running > 0)


_finished: Any = None  # requests that each task has finished; shared between the processes


def _share(counts: Any) -> None:
    global _finished
    _finished = counts


def _task(number: int, setup: Setup, policy: Policy, step_time: StepTime) -> Outcome:
    def progress(count: int) -> None:
        if _finished is not None:
            _finished[number] = count

    outcome = simulate(setup, policy, step_time, progress)
    progress(len(setup.trace.requests))
    return outcome


def _simulate_all(
    setups: Sequence[Setup], step_times: dict[Policy, StepTime], jobs: int, progress: Progress | None
) -> list[tuple[Outcome, ...]]:
    """Outcomes of every setup, in the order of the policies."""
    tasks = [(setup, policy) for setup in setups for policy in step_times]
    context = multiprocessing.get_context("spawn")  # forking a process that has threads is not safe
    counts = context.Array("L", len(tasks))

    def report() -> None:
        if progress is None:
            return
        for i, setup in enumerate(setups):
            part = counts[i * len(step_times) : (i + 1) * len(step_times)]
            progress(setup.trace.name, sum(part), len(setup.trace.requests) * len(step_times))

    if jobs == 1:
        _share(counts)
        done = []
        for i, (setup, policy) in enumerate(tasks):
            done.append(_task(i, setup, policy, step_times[policy]))
            report()
        _share(None)
    else:
        others = set(multiprocessing.active_children())
        with ProcessPoolExecutor(jobs, context, _share, (counts,)) as pool:
            # The slowest first: adaptive placement, then small blocks.
            order = sorted(
                range(len(tasks)), key=lambda i: (not tasks[i][1].adaptive, tasks[i][1].block_size)
            )
            futures = {
                i: pool.submit(_task, i, tasks[i][0], tasks[i][1], step_times[tasks[i][1]]) for i in order
            }
            try:
                waiting = set(futures.values())
                while waiting:
                    ended, waiting = wait(waiting, POLL_S)
                    for future in ended:
                        future.result()
                    report()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for child in set(multiprocessing.active_children()) - others:
                    child.terminate()  # a simulation may go on for minutes
                raise
        done = [futures[i].result() for i in range(len(tasks))]
    size = len(step_times)
    return [tuple(done[i * size : (i + 1) * size]) for i in range(len(setups))]
