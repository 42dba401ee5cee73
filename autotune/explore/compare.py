"""``Gain``: how much better one outcome is than another, and how sure that is.

On it stand the recommendation of a block size and the rule that judges adaptive blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pagedgen.autotune.explore.outcome import Outcome
from pagedgen.autotune.explore.policies import Policy

# Two-sided 95% quantiles of Student's t for 1 to 7 degrees of freedom: the parts of a run are few.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)
TIE = 0.01  # a larger block is taken where it costs less than this,
WASTE = 0.03  # and where no more of the pool than this is empty inside blocks
KEEP = 0.02  # adaptive blocks have to win by more than this, for certain
YARDSTICKS = (64, 128)  # fixed sizes that adaptive blocks are judged against


@dataclass(frozen=True, slots=True)
class Gain:
    """Relative gain over ``against`` (0.03: 3% better), with a 95% interval.

    Both policies served the same requests, so their runs are compared part by part (the equal parts of
    :class:`Outcome`); the interval is Student's, of the mean of the parts' logarithmic ratios.
    """

    against: str
    mean: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """``+1.2% (+0.4 to +2.0)``"""
        return f"{self.mean:+.1%} ({100 * self.low:+.1f} to {100 * self.high:+.1f})"


def gain(outcome: Outcome, against: Outcome, closed: bool) -> Gain:
    """Of throughput in a closed loop; of latency a token in an open one."""
    mine, theirs = (outcome.windows, against.windows) if closed else (outcome.latencies, against.latencies)
    logs = [math.log(b / a) for a, b in zip(mine, theirs, strict=True) if a > 0 and b > 0]
    if not logs:
        return Gain(against.name, 0.0, 0.0, 0.0)
    mean, width = float(np.mean(logs)), 0.0
    if len(logs) > 1:
        freedom = min(len(logs) - 1, len(STUDENT))
        width = STUDENT[freedom - 1] * float(np.std(logs, ddof=1)) / math.sqrt(len(logs))
    return Gain(against.name, math.expm1(mean), math.expm1(mean - width), math.expm1(mean + width))


def score(outcome: Outcome, closed: bool) -> float:
    """What policies are ranked by, more is better: tokens a second, in open loops those of one request."""
    return outcome.tokens_per_s if closed else 1 / outcome.latency_per_token


def pareto(outcomes: Sequence[Outcome], closed: bool) -> tuple[str, ...]:
    """Names of those that no other beats in both memory wasted inside blocks and :func:`score`.

    Scores within 0.1% of each other are the same.
    """
    points = [(-o.internal_waste, round(math.log(score(o, closed)), 3)) for o in outcomes]
    return tuple(
        o.name
        for o, (a, b) in zip(outcomes, points, strict=True)
        if not any(x >= a and y >= b and (x > a or y > b) for x, y in points)
    )


@dataclass(frozen=True, slots=True)
class Recommendation:
    """A block size, the margin to the best other than it, and why."""

    policy: str
    margin: Gain
    reason: str


def recommend(outcomes: Sequence[Outcome], closed: bool) -> Recommendation:
    """The largest fixed size that loses less than ``TIE`` to the best score and wastes at most ``WASTE``; the
    one with the best score where none does.

    Larger blocks mean fewer of them to keep, to send and to look up, which no score here counts; wasted
    memory is missed by the prefix cache and by the next, larger load.
    """
    fixed = [o for o in outcomes if o.policy == Policy(o.policy.block_size)]
    best = max(fixed, key=lambda o: score(o, closed))
    least = (1 - TIE) * score(best, closed)
    near = [o for o in fixed if score(o, closed) >= least and o.internal_waste <= WASTE]
    chosen = max(near or [best], key=lambda o: o.policy.block_size)
    others = [o for o in fixed if o is not chosen]
    what = "tokens/s" if closed else "latency a token"
    if not others:
        return Recommendation(chosen.name, Gain(chosen.name, 0.0, 0.0, 0.0), "the only size that was tried")
    rival = best if best is not chosen else max(others, key=lambda o: score(o, closed))
    margin = gain(chosen, rival, closed)
    if chosen is best:
        reason = f"best {what}, {margin.text} over {rival.name}"
    else:
        reason = (
            f"the largest block within {TIE:.0%} of the best {what} (that of {rival.name}: {margin.text}) "
            f"with at most {WASTE:.0%} of the pool empty inside blocks ({chosen.internal_waste:.1%})"
        )
    worse = [o for o in fixed if o.policy.block_size > chosen.policy.block_size]
    if worse:
        following = min(worse, key=lambda o: o.policy.block_size)
        lost = gain(following, chosen, closed)
        reason += f"; {following.name} wastes {following.internal_waste:.1%} of the pool: {lost.text}"
    return Recommendation(chosen.name, margin, reason)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether something adaptive is kept: its gains over the fixed sizes 64 and 128."""

    policy: str
    gains: tuple[Gain, ...]
    kept: bool
    reason: str


def judge(name: str, outcome: Outcome, yardsticks: Mapping[int, Outcome], closed: bool) -> Verdict:
    """The rule: kept only where the whole 95% interval of its gain over each yardstick is above ``KEEP``."""
    gains = tuple(gain(outcome, yardsticks[size], closed) for size in sorted(yardsticks))
    failed = [g for g in gains if g.low <= KEEP]
    if failed:
        reason = "; ".join(f"over {g.against}: {g.text}" for g in failed)
        return Verdict(name, gains, False, f"not certain to win by more than {KEEP:.0%}: {reason}")
    reason = "; ".join(f"over {g.against}: {g.text}" for g in gains)
    return Verdict(name, gains, True, f"wins by more than {KEEP:.0%}: {reason}")
