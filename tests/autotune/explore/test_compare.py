"""Gains with their intervals, the recommendation, the rule for adaptive blocks, and the controller."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pagedgen.autotune.explore.compare import KEEP, gain, judge, pareto, recommend, score
from pagedgen.autotune.explore.controller import choose, estimate
from pagedgen.autotune.explore.outcome import Outcome
from pagedgen.autotune.explore.policies import ADAPTIVE, BOUND, Policy
from pagedgen.autotune.explore.simulation import simulate
from pagedgen.values.record import Status
from pagedgen.values.trace import Request


def made(policy: Policy, speed: float = 1.0, waste: float = 0.0, wobble: float = 0.0) -> Outcome:
    """An outcome at a relative speed; its parts wobble up and down by a share of themselves."""
    parts = tuple(10 / speed * (1 + wobble * (-1) ** i) for i in range(8))
    return Outcome(
        policy, 100, Status.PREDICTED, "", 0.9, waste, 0.0, 0.0, 1, 10, 100, 100, 0, 0.0, 10, 5.0, 6.0,
        0, 0, 0, 0, 80 / speed, 1.0, 100 * speed, 1.0, 2.0, 0.1, 0.2, 1 / speed,
        parts, tuple(p / 10 for p in parts), (),
    )  # fmt: skip


def test_a_gain_and_its_interval():
    sure = gain(made(Policy(16), 1.1), made(Policy(64)), closed=True)
    assert (sure.against, sure.mean) == ("64", pytest.approx(0.1))
    assert sure.low == pytest.approx(0.1) and sure.high == pytest.approx(0.1)
    noisy = gain(made(Policy(16), 1.1, wobble=0.1), made(Policy(64)), closed=True)
    parts = [10 / 1.1 * (1 + 0.1 * (-1) ** i) for i in range(8)]
    left_out = [math.log(70 / (sum(parts) - part)) for part in parts]
    error = math.sqrt(7 / 8 * sum((x - sum(left_out) / 8) ** 2 for x in left_out))
    assert noisy.mean == pytest.approx(0.1)  # of the whole, whatever the parts do
    assert noisy.low == pytest.approx(1.1 * math.exp(-2.365 * error) - 1)
    assert noisy.low < noisy.mean < noisy.high
    assert gain(made(Policy(16), 1.1), made(Policy(64)), closed=False).mean == pytest.approx(0.1)
    lone = replace(made(Policy(16), 1.1), windows=(1.0,))
    assert gain(lone, lone, True).mean == 0


@pytest.mark.parametrize("closed", [True, False])
def test_the_rule_for_adaptive_blocks(closed):
    yardsticks = {64: made(Policy(64)), 128: made(Policy(128), 0.99)}
    assert judge("a", made(ADAPTIVE, 1.05), yardsticks, closed).kept
    assert not judge("a", made(ADAPTIVE, 1.0 + 0.9 * KEEP), yardsticks, closed).kept
    against_one = judge(
        "a", made(ADAPTIVE, 1.025), {64: made(Policy(64), 1.02), 128: made(Policy(128))}, closed
    )
    assert not against_one.kept and "over 64" in against_one.reason and "over 128" not in against_one.reason
    noisy = judge("a", made(ADAPTIVE, 1.05, wobble=0.1), yardsticks, closed)
    assert not noisy.kept and [g.against for g in noisy.gains] == ["64", "128"]


def test_the_recommendation_is_the_largest_block_that_costs_nothing():
    outcomes = [
        made(Policy(1), 0.9, 0.0),
        made(Policy(16), 1.0, 0.005),
        made(Policy(64), 0.995, 0.02),
        made(Policy(128), 0.994, 0.04),  # wastes too much
        made(Policy(256), 0.95, 0.1),
        made(ADAPTIVE, 2.0),  # never recommended: it is judged by its own rule
        made(BOUND, 2.0),
    ]
    advice = recommend(outcomes, closed=True)
    assert advice.policy == "64" and advice.margin.against == "16"
    assert advice.margin.mean == pytest.approx(-0.005) and "128 wastes 4.0% of the pool" in advice.reason
    assert (
        recommend(outcomes[:2], True).policy == "16"
        and "best tokens/s, +11.1%" in recommend(outcomes[:2], True).reason
    )
    assert "only size" in recommend(outcomes[:1], True).reason
    noisy = [made(Policy(16)), made(Policy(32), 0.98, wobble=0.1), made(Policy(64), 0.96, wobble=0.1)]
    assert recommend(noisy, True).policy == "32"  # 2% in the noise; 4% is too much to doubt
    assert recommend([made(Policy(16)), made(Policy(32), 0.98)], True).policy == "16"  # 2% for certain
    wasteful = [made(Policy(16), 1.0, 0.05), made(Policy(64), 1.001, 0.2)]
    assert recommend(wasteful, True).policy == "64"  # none is frugal: the fastest
    assert score(outcomes[0], True) == pytest.approx(0.9 * 100 / 80) and score(
        outcomes[0], False
    ) == pytest.approx(0.9)


def test_the_front():
    outcomes = [
        made(Policy(1), 0.9, 0.0),
        made(Policy(16), 1.0, 0.1),
        made(Policy(64), 0.95, 0.2),
        made(Policy(128), 1.1, 0.3),
        made(Policy(256), 1.1, 0.3),
    ]
    assert pareto(outcomes, True) == ("1", "16", "128", "256")


def test_the_controller_sees_what_memory_is_worth(trace, setup, step_time):
    step_times = {size: step_time(Policy(size)) for size in (16, 64, 256)}
    short = [Request(30, 100)] * 300
    tight = setup(trace(), tokens=2048)
    assert choose(short, tight, step_times) == 16  # memory is the limit
    assert choose(short, setup(trace(), tokens=1 << 20), step_times) == 256  # memory is no limit
    assert choose([*[Request(3000, 400)] * 256, *short], setup(trace(), tokens=32768), step_times) == 64
    small, large = (estimate(short, tight, step_times[size], size) for size in (16, 256))
    assert small.tokens_per_s > large.tokens_per_s and small.waste < large.waste


def test_the_estimate_is_near_the_simulation(trace, setup, step_time):
    made_up = setup(trace(300, 60, 100), tokens=4096)
    for size in (16, 64):
        outcome = simulate(made_up, Policy(size), step_time(Policy(size)))
        guess = estimate(made_up.trace.requests, made_up, step_time(Policy(size)), size)
        assert guess.tokens_per_s == pytest.approx(outcome.tokens_per_s, rel=0.25)
        assert guess.waste == pytest.approx(outcome.internal_waste, rel=0.25)
