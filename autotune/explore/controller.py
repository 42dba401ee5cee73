"""The controller: picks a block size at start, from the lengths of the first requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pagedgen.autotune.explore.compare import TIE, WASTE
from pagedgen.autotune.explore.request import Request
from pagedgen.autotune.explore.scheduler import Batch, Chunk
from pagedgen.autotune.explore.simulation import Setup
from pagedgen.autotune.explore.step_time import StepTime
from pagedgen.values.trace import Request as Lengths

FIRST = 256  # requests that it looks at


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a block size should reach: output tokens a second, and the share of the pool it leaves empty."""

    tokens_per_s: float
    waste: float


def estimate(lengths: Sequence[Lengths], setup: Setup, step_time: StepTime, block_size: int) -> Estimate:
    """What to expect of requests like these when there are always more of them than fit.

    A request is in the batch once for each token it generates, with its prompt and on average half of its
    output, and half a block empty at its end. So many of them fit into the pool; a step gives each a token,
    and beside it every token has to pay for its share of a prompt.
    """
    outputs = sum(max(1, r.output) for r in lengths)
    prompts = sum(max(1, r.prompt) for r in lengths)
    resident = sum(max(1, r.output) * (max(1, r.prompt) + max(1, r.output) / 2) for r in lengths) / outputs
    slots = setup.memory_bytes // step_time.block_bytes * block_size
    batch = max(1, min(setup.max_num_seqs, int(slots / (resident + (block_size - 1) / 2))))
    decode, _ = step_time(_batch(batch, int(batch * resident), ()))
    # One step's prompts, in the pieces that they come in.
    tokens = max(1, round(batch * prompts / outputs))
    typical = Request(0, Lengths(prompts // len(lengths), 1))
    whole, rest = divmod(tokens, typical.prompt)
    chunks = [Chunk(typical, 0, typical.prompt, True)] * whole
    if rest:
        chunks.append(Chunk(typical, 0, rest, False))
    both, _ = step_time(_batch(batch, int(batch * resident), tuple(chunks)))
    return Estimate(batch / max(both, decode), batch * (block_size - 1) / 2 / slots)


def choose(
    lengths: Sequence[Lengths], setup: Setup, step_times: Mapping[int, StepTime], first: int = FIRST
) -> int:
    """The rule of :func:`pagedgen.autotune.explore.compare.recommend`, on estimates."""
    seen = lengths[:first]
    estimates = {size: estimate(seen, setup, model, size) for size, model in step_times.items()}
    best = max(estimates, key=lambda size: estimates[size].tokens_per_s)
    least = (1 - TIE) * estimates[best].tokens_per_s
    near = [size for size, e in estimates.items() if e.tokens_per_s >= least and e.waste <= WASTE]
    return max(near, default=best)


def _batch(decodes: int, tokens: int, chunks: tuple[Chunk, ...]) -> Batch:
    return Batch(decodes, tokens, chunks, 0, 0, 0, (), False)
