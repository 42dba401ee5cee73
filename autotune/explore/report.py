"""``Report``: everything that an exploration found, as it is kept in JSON."""

from __future__ import annotations

from dataclasses import dataclass

from pagedgen.autotune.explore.compare import Recommendation, Verdict
from pagedgen.autotune.explore.outcome import Outcome
from pagedgen.autotune.suites.fragmentation import Share

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Server:
    """What was simulated: one rank of a model on a processor. Sizes in bytes."""

    model: str
    target: str
    kv_dtype: str
    weight_bytes: int
    memory_bytes: int  # KV pool
    host_bytes: int  # pool that sequences are swapped out to
    token_bytes: int  # KV of a token, all layers
    max_num_seqs: int
    max_batched_tokens: int


@dataclass(frozen=True, slots=True)
class TraceReport:
    """One trace under every policy.

    ``contiguous`` are the policies of Figure 2 of the PagedAttention paper on this trace, the paged one among
    them; ``controller`` is the block size that the first requests suggest, None without ``--adaptive``.
    """

    trace: str
    requests: int
    mean_prompt: float
    mean_output: float
    load: str
    closed: bool
    prefix_caching: bool
    outcomes: tuple[Outcome, ...]
    contiguous: tuple[Share, ...]
    contiguous_pool: int  # tokens; a power of two
    pareto: tuple[str, ...]
    recommendation: Recommendation
    controller: int | None
    verdicts: tuple[Verdict, ...]

    def outcome(self, name: str) -> Outcome:
        """That of a policy, by its name."""
        return next(o for o in self.outcomes if o.name == name)


@dataclass(frozen=True, slots=True)
class Report:
    """The whole exploration. Equal inputs and seeds give equal reports: nothing in it is of the moment."""

    format: int
    pagedgen: str
    command: str
    seed: int
    server: Server
    traces: tuple[TraceReport, ...]

    @property
    def predicted(self) -> bool:
        """Whether any kernel's time is predicted, not measured."""
        return any(o.kernel_status == "predicted" for t in self.traces for o in t.outcomes)

    @property
    def origins(self) -> tuple[str, ...]:
        """What the kernels' times rest on, a line an origin with the policies it holds for."""
        found: dict[str, list[str]] = {}
        for trace in self.traces:
            for outcome in trace.outcomes:
                names = found.setdefault(outcome.kernel_origin, [])
                if outcome.name not in names:
                    names.append(outcome.name)
        return tuple(f"{origin} ({', '.join(names)})" for origin, names in found.items())
