"""``Gain``: how much better one outcome is than another, and how sure that is.

On it stand the recommendation of a block size and the rule that judges adaptive blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pagedgen.autotune.explore.outcome import Outcome
from pagedgen.autotune.explore.policies import ADAPTIVE, BOUND, Policy

# Two-sided 95% quantiles of Student's t for 1 to 7 degrees of freedom: the parts of a run are few.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)
TIE = 0.01  # a larger block is taken where it costs less than this,
DOUBT = 0.03  # or less than this and not for certain,
WASTE = 0.03  # and where no more of the pool than this is empty inside blocks
KEEP = 0.02  # adaptive blocks have to win by more than this, for certain
YARDSTICKS = (64, 128)  # fixed sizes that adaptive blocks are judged against


@dataclass(frozen=True, slots=True)
class Gain:
    """Relative gain over ``against`` (0.03: 3% better), with a 95% interval.

    Both policies served the same requests to the end, so the gain is the ratio of whole runs, filling and
    draining included. The interval around it is that of the jackknife (Tukey, 1958), with Student's quantile,
    over the equal parts of :class:`Outcome`, compared part by part. Where requests that began together end
    together, another policy shifts those waves from one part into the next, and the interval is wide.
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
    a, b = np.array(mine), np.array(theirs)
    parts = min(a.size, b.size)
    whole = math.log(score(outcome, closed) / score(against, closed))
    width = 0.0
    if parts > 1:
        others = np.log((b.sum() - b) / (a.sum() - a))  # without one part each
        error = math.sqrt((parts - 1) * float(np.var(others)))
        width = STUDENT[min(parts - 1, len(STUDENT)) - 1] * error
    return Gain(against.name, math.expm1(whole), math.expm1(whole - width), math.expm1(whole + width))


def score(outcome: Outcome, closed: bool) -> float:
    """What policies are ranked by: output tokens a second of the whole run; in open loops, of one request."""
    return outcome.output_tokens / outcome.seconds if closed else 1 / outcome.latency_per_token


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
    """The largest fixed size that keeps up with the best score and wastes at most ``WASTE``; the one with the
    best score where none does.

    To keep up is to be behind by less than ``TIE``, or by less than ``DOUBT`` and not for certain. Larger
    blocks mean fewer of them to keep, to send and to look up, which no score here counts; wasted memory is
    missed by the prefix cache and by the next, larger load.
    """
    fixed = [o for o in outcomes if o.policy == Policy(o.policy.block_size)]
    best = max(fixed, key=lambda o: score(o, closed))
    near = [o for o in fixed if o.internal_waste <= WASTE and _keeps_up(o, best, closed)]
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
            f"the largest block that keeps up with the best {what} (that of {rival.name}: {margin.text}) "
            f"with at most {WASTE:.0%} of the pool empty inside blocks ({chosen.internal_waste:.1%})"
        )
    worse = [o for o in fixed if o.policy.block_size > chosen.policy.block_size]
    if worse:
        following = min(worse, key=lambda o: o.policy.block_size)
        lost = gain(following, chosen, closed)
        reason += f"; {following.name} wastes {following.internal_waste:.1%} of the pool: {lost.text}"
    return Recommendation(chosen.name, margin, reason)


def _keeps_up(outcome: Outcome, best: Outcome, closed: bool) -> bool:
    found = gain(outcome, best, closed)
    return found.mean > -TIE or (found.mean > -DOUBT and found.high >= 0)


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


def verdicts(outcomes: Sequence[Outcome], controller: int, closed: bool) -> tuple[Verdict, ...]:
    """On adaptive blocks, on their bound, and on the size that the controller picked."""
    found = {outcome.name: outcome for outcome in outcomes}
    yardsticks = {size: found[str(size)] for size in YARDSTICKS}
    candidates = {
        ADAPTIVE.name: ADAPTIVE.name,
        BOUND.name: BOUND.name,
        f"controller ({controller})": str(controller),
    }
    return tuple(judge(name, found[of], yardsticks, closed) for name, of in candidates.items())
