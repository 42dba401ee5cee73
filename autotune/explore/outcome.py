"""``Outcome``: what a simulation of one policy on one trace came to."""

from __future__ import annotations

from dataclasses import dataclass

from pagedgen.autotune.explore.policies import Policy
from pagedgen.values.record import Status


@dataclass(frozen=True, slots=True)
class Moment:
    """The pool at one time: shares (0 to 1) of it that hold tokens, that are allocated and hold none."""

    seconds: float
    tokens: float
    internal: float
    running: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """Figures of one run. Shares are from 0 to 1, times in seconds, sizes in bytes of one rank.

    Shares of memory, batches and rates are of the middle of the run, between a tenth and nine tenths of all
    tokens served (those of a prompt once it is complete, and those generated), so that filling and draining
    the server do not count; the rest is of the whole run.
    Internal waste is allocated slots that hold no token; external waste is what was free while a request
    waited for memory, averaged over those times; both are shares of the pool.
    """

    policy: Policy
    num_blocks: int
    kernel_status: Status
    kernel_origin: str
    # memory
    memory_tokens: float
    internal_waste: float
    external_waste: float
    run_coverage: float  # share of tokens in runs of 64 tokens or more, at the end of the middle
    metadata_bytes: int  # the manager's arrays and tables, at most
    # work
    requests: int
    output_tokens: int
    computed_tokens: int
    dropped_tokens: int
    hit_share: float  # of prompt tokens, found in the prefix cache
    steps: int
    batch_mean: float  # sequences in a step
    batch_p99: float
    preemptions: int
    copied_bytes: int  # copy-on-write and partial prefix hits
    swapped_bytes: int
    compacted_bytes: int
    # time
    seconds: float
    kernel_seconds: float
    tokens_per_s: float  # output: the rate of tokens served, times the share of outputs among them
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float
    latency_per_token: float  # mean over requests of latency / output tokens
    windows: tuple[float, ...]  # seconds of each of the equal parts of the middle
    latencies: tuple[float, ...]  # latency per token, mean of each of as many groups of arrivals
    timeline: tuple[Moment, ...]

    @property
    def name(self) -> str:
        """The policy's name."""
        return self.policy.name

    @property
    def kernel_share(self) -> float:
        """Of the time, spent in decode attention."""
        return self.kernel_seconds / self.seconds if self.seconds else 0.0
