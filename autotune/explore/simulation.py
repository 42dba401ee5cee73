"""setup × policy → outcome: a trace played through a scheduler, with the clock of a step-time model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pagedgen.autotune.explore.load import Load
from pagedgen.autotune.explore.outcome import Moment, Outcome
from pagedgen.autotune.explore.policies import COMPACT_SHARE, COMPACT_STEPS, RUN_TOKENS, Policy
from pagedgen.autotune.explore.request import Request
from pagedgen.autotune.explore.scheduler import Batch, Scheduler
from pagedgen.autotune.explore.step_time import SWAP_GBS, StepTime
from pagedgen.errors import InvalidValue, MalformedFile
from pagedgen.runtime.block_manager import BlockManager
from pagedgen.runtime.preemption import PreemptionRule
from pagedgen.values.trace import Trace

SAMPLE_STEPS = 16  # between two looks at the pool
COVERAGE_STEPS = 256  # at least, between two looks at the block tables
MIDDLE = (0.1, 0.9)  # of all tokens served: what rates and shares are taken of
WINDOWS = 8  # equal parts of the middle, for the noise
MOMENTS = 120  # of the timeline that is kept
SECRET = b"explore: same seed, same report"

Watcher = Callable[[Batch, float, Scheduler], None]  # sees each step's batch and the time after it


@dataclass(frozen=True, slots=True)
class Setup:
    """A server of one rank and its traffic, but for how memory is handed out.

    Raises:
        InvalidValue: naming the field.
    """

    trace: Trace
    load: Load
    memory_bytes: int  # of the KV pool
    max_num_seqs: int = 1024
    max_batched_tokens: int = 2048
    host_bytes: int = 0  # of the pool that sequences are swapped out to
    prefix_caching: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("memory_bytes", "max_num_seqs", "max_batched_tokens"):
            if getattr(self, field) < 1:
                raise InvalidValue(field, getattr(self, field), "above 0 is allowed")
        if self.max_batched_tokens < self.max_num_seqs:
            allowed = f"at least max_num_seqs ({self.max_num_seqs}) is allowed"
            raise InvalidValue("max_batched_tokens", self.max_batched_tokens, allowed)
        if self.host_bytes < 0:
            raise InvalidValue("host_bytes", self.host_bytes, "0 or more is allowed")

    def num_blocks(self, policy: Policy, block_bytes: int) -> int:
        """Blocks of the pool.

        Raises:
            InvalidValue: not one fits, or more than a manager takes.
            MalformedFile: a request can never fit; names its line.
        """
        num_blocks = self.memory_bytes // block_bytes
        if not 1 <= num_blocks < 1 << 24:
            allowed = (
                f"1 to 16777215 blocks of {policy.block_size} tokens ({block_bytes:,} bytes) are allowed"
            )
            raise InvalidValue("memory", self.memory_bytes, allowed)
        capacity = num_blocks * policy.block_size
        for number, request in enumerate(self.trace.requests, 1):
            tokens = max(1, request.prompt) + max(1, request.output) - 1
            if -(-tokens // policy.block_size) > num_blocks:
                where = f"line {request.line}" if request.line else f"request {number}"
                problem = (
                    f"{tokens:,} tokens never fit into a pool of {capacity:,} (blocks of {policy.block_size})"
                )
                raise MalformedFile(self.trace.source or self.trace.name, where, problem)
        return num_blocks

    @property
    def max_seq_len(self) -> int:
        """Tokens of the longest request."""
        return max(max(1, r.prompt) + max(1, r.output) for r in self.trace.requests)


def manager_of(setup: Setup, policy: Policy, block_bytes: int) -> BlockManager:
    """The block manager of a run.

    Raises:
        InvalidValue, MalformedFile: see :meth:`Setup.num_blocks`.
    """
    return BlockManager(
        setup.num_blocks(policy, block_bytes),
        policy.block_size,
        max_num_seqs=setup.max_num_seqs,
        max_seq_len=setup.max_seq_len,
        prefix_caching=setup.prefix_caching,
        num_host_blocks=setup.host_bytes // block_bytes,
        secret=SECRET if setup.prefix_caching else None,
        adaptive=policy.adaptive,
    )


def simulate(
    setup: Setup,
    policy: Policy,
    step_time: StepTime,
    progress: Callable[[int], None] | None = None,
    watch: Watcher | None = None,
) -> Outcome:
    """Play the trace to its end.

    Args:
        step_time: of this policy's kernel and block bytes.
        progress: is told now and then how many requests are finished.
        watch: is shown every step, before its requests are told that it is done.

    Raises:
        InvalidValue, MalformedFile: see :meth:`Setup.num_blocks`.
    """
    manager = manager_of(setup, policy, step_time.block_bytes)
    rule = PreemptionRule(step_time.block_bytes, SWAP_GBS * 1e9, step_time.prefill_tokens_per_s)
    scheduler = Scheduler(manager, rule, setup.max_batched_tokens)
    requests = setup.load.requests(setup.trace, setup.seed)
    meter = Meter(manager, sum(request.prompt + request.output for request in requests))
    output_tokens = sum(request.output for request in requests)
    clock, coming, finished_count = 0.0, 0, 0
    preemptions = steps = 0
    kernel_seconds = 0.0
    limit = int(setup.load.amount) if setup.load.is_closed else 0
    compact = max(1, int(COMPACT_SHARE * manager.pool.num_blocks)) if policy.adaptive else 0
    while finished_count < len(requests):
        begin = coming
        while coming < len(requests) and (
            coming - finished_count < limit if limit else requests[coming].arrival <= clock
        ):
            if limit:
                requests[coming].arrival = clock
            coming += 1
        if coming > begin:
            scheduler.add(requests[begin:coming])
        if not scheduler.is_busy:
            clock = requests[coming].arrival
            continue
        batch = scheduler.step()
        seconds, kernel = step_time(batch, meter.coverage)
        clock += seconds
        kernel_seconds += kernel
        steps += 1
        preemptions += len(batch.preempted)
        meter.step(batch, seconds, clock)
        if watch is not None:
            watch(batch, clock, scheduler)
        first, finished = scheduler.commit()
        for request in first:
            request.first_token = clock
        for request in finished:
            request.finish = clock
        finished_count += len(finished)
        if compact and steps % COMPACT_STEPS == 0:
            moved = len(manager.compact(compact))
            clock += 2 * moved * step_time.block_bytes / (step_time.target.bandwidth_gbs * 1e9)
        if progress is not None and finished and steps % SAMPLE_STEPS < 4:
            progress(finished_count)
    counters = manager.counters
    ttft, tpot, latency = _latencies(requests)
    middle = meter.middle()
    return Outcome(
        policy=policy,
        num_blocks=manager.pool.num_blocks,
        kernel_status=step_time.kernel.status,
        kernel_origin=step_time.origin,
        memory_tokens=middle.tokens,
        internal_waste=middle.internal,
        external_waste=middle.external,
        run_coverage=meter.coverage,
        metadata_bytes=meter.metadata_bytes,
        requests=len(requests),
        output_tokens=output_tokens,
        computed_tokens=scheduler.computed_tokens,
        dropped_tokens=scheduler.dropped_tokens,
        hit_share=counters.hit_tokens / counters.prompt_tokens,
        steps=steps,
        batch_mean=middle.batch_mean,
        batch_p99=middle.batch_p99,
        preemptions=preemptions,
        copied_bytes=counters.copied_blocks * step_time.block_bytes,
        swapped_bytes=(counters.swapped_out_blocks + counters.swapped_in_blocks) * step_time.block_bytes,
        compacted_bytes=counters.compacted_blocks * step_time.block_bytes,
        seconds=clock,
        kernel_seconds=kernel_seconds,
        tokens_per_s=(MIDDLE[1] - MIDDLE[0]) * output_tokens / sum(middle.windows),
        ttft_p50=_quantile(ttft, 0.5),
        ttft_p99=_quantile(ttft, 0.99),
        tpot_p50=_quantile(tpot, 0.5),
        tpot_p99=_quantile(tpot, 0.99),
        latency_per_token=float(latency.mean()),
        windows=middle.windows,
        latencies=tuple(float(part.mean()) for part in np.array_split(latency, WINDOWS) if part.size),
        timeline=meter.timeline(),
    )


def _latencies(requests: Sequence[Request]) -> tuple[npt.NDArray[np.float64], ...]:
    """Time to the first token, time per further token (of requests that have any), latency per token."""
    arrival = np.array([r.arrival for r in requests])
    first = np.array([r.first_token for r in requests], np.float64)
    finish = np.array([r.finish for r in requests], np.float64)
    output = np.array([r.output for r in requests])
    more = output > 1
    return first - arrival, ((finish - first)[more] / (output[more] - 1)), (finish - arrival) / output


def _quantile(values: npt.NDArray[np.float64], share: float) -> float:
    return float(np.quantile(values, share)) if values.size else 0.0


@dataclass(frozen=True, slots=True)
class Middle:
    """Means over the middle of a run; see :class:`Outcome`."""

    tokens: float
    internal: float
    external: float
    batch_mean: float
    batch_p99: float
    windows: tuple[float, ...]


class Meter:
    """Looks at the pool every ``SAMPLE_STEPS`` steps, and at the batch in every one."""

    def __init__(self, manager: BlockManager, total: int) -> None:
        self.manager, self.total = manager, total  # total: prompts and outputs of all requests
        self.coverage = 1.0 if manager.block_size >= RUN_TOKENS else 0.0
        self.metadata_bytes = 0
        self._steps = self._served = self._next_coverage = 0
        self._since = 0.0
        self._tokens = self._internal = self._weight = 0.0
        self._free = self._blocked = 0.0
        self._batches: dict[int, float] = {}  # sequences that run -> seconds
        self._clocks: list[float] = [0.0]
        self._counts: list[int] = [0]
        self._moments: list[Moment] = []

    def step(self, batch: Batch, seconds: float, clock: float) -> None:
        """One step that took ``seconds`` and ended at ``clock``."""
        self._steps += 1
        self._since += seconds
        before = self._served
        self._served += batch.num_decodes
        for chunk in batch.chunks:
            if chunk.last:  # a prompt counts when it is complete, and once
                self._served += 1 + (0 if chunk.request.produced else chunk.request.prompt)
        inside = before < MIDDLE[1] * self.total and self._served > MIDDLE[0] * self.total
        running = batch.num_decodes + len(batch.chunks)
        if inside:
            self._batches[running] = self._batches.get(running, 0.0) + seconds
            if batch.blocked:
                self._free += self.manager.pool.num_free * seconds
                self._blocked += seconds
        if self._steps % SAMPLE_STEPS and self._served < self.total:
            return
        self._clocks.append(clock)
        self._counts.append(self._served)
        stats = self.manager.stats()
        slots = self.manager.pool.num_blocks * self.manager.block_size
        internal = stats.used_blocks * self.manager.block_size - stats.stored_tokens
        self._moments.append(Moment(clock, stats.stored_tokens / slots, internal / slots, running))
        self.metadata_bytes = max(self.metadata_bytes, stats.host_bytes)
        if inside:
            self._tokens += stats.stored_tokens / slots * self._since
            self._internal += internal / slots * self._since
            self._weight += self._since
        self._since = 0.0
        if inside and self.manager.block_size < RUN_TOKENS and self._steps >= self._next_coverage:
            self.coverage = run_coverage(self.manager)
            self._next_coverage = self._steps + COVERAGE_STEPS

    def middle(self) -> Middle:
        """The means, when the run is over."""
        seconds = sum(self._batches.values())
        mean = p99 = 0.0
        if seconds:
            mean = sum(n * time for n, time in self._batches.items()) / seconds
            left = 0.01 * seconds
            for n in sorted(self._batches, reverse=True):
                left -= self._batches[n]
                p99 = n
                if left <= 0:
                    break
        marks = np.linspace(*MIDDLE, WINDOWS + 1) * self.total
        times = np.interp(marks, self._counts, self._clocks)
        weight = self._weight or 1.0
        free = self._free / self._blocked / self.manager.pool.num_blocks if self._blocked else 0.0
        return Middle(
            self._tokens / weight, self._internal / weight, free, mean, p99, tuple(np.diff(times).tolist())
        )

    def timeline(self) -> tuple[Moment, ...]:
        """At most ``MOMENTS`` of the samples, evenly spread."""
        count = len(self._moments)
        kept = np.unique(np.linspace(0, count - 1, min(count, MOMENTS)).astype(int))
        return tuple(self._moments[i] for i in kept)


def run_coverage(manager: BlockManager) -> float:
    """Share of the resident KV tokens that lie in runs of blocks side by side of at least ``RUN_TOKENS``.

    A token that several sequences share counts for each of them, as each of them reads it.
    """
    covered = total = 0
    size = manager.block_size
    for seq in manager.seqs.handles:
        row = manager.seqs.row(seq)
        if manager.seqs.is_suspended(row):
            continue
        blocks = manager.blocks(seq)
        breaks = np.flatnonzero(np.diff(blocks) != 1) + 1
        lengths = np.diff(breaks, prepend=0, append=blocks.size) * size
        covered += int(lengths[lengths >= RUN_TOKENS].sum())
        total += blocks.size * size
    return covered / total if total else 0.0
