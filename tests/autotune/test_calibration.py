"""Rank errors, calibration and picks for a device that is not here, on recorded and on derived timings."""

from __future__ import annotations

import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from recorded import H100, SPECS, modelled

from pagedgen.autotune import calibration as module
from pagedgen.autotune.calibration import (
    Calibration,
    median_regret,
    rank_errors,
    spearman,
    transfers,
)
from pagedgen.autotune.database import Entry
from pagedgen.compiler.cost import predict
from pagedgen.errors import InvalidValue
from pagedgen.values.record import Record, Timing
from pagedgen.values.target_table import target
from pagedgen.values.workload import Workload

H200 = target("h200")
BATCHES = (Workload.uniform(32, 8192), Workload.uniform(128, 1024))
KNOWN = [r for spec in SPECS[:2] for batch in BATCHES for r in modelled(spec, batch)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FITTED", 60)


def timed(one: Record, us: float, where: str) -> Record:
    return replace(one, target=where, timing=Timing(us, us, us, 3))


def other_device(known: list[Record], seed: int = 0, noise: float = 0.01) -> list[Record]:
    """What an H200 might have given: the H100's times, moved as the model moves, and noise."""
    draw = random.Random(seed)
    moved = []
    for one in known:
        there = predict(one.spec, H200, one.schedule, one.workload).time_us
        here = predict(one.spec, H100, one.schedule, one.workload).time_us
        us = one.time_us * there / here * math.exp(noise * draw.gauss(0, 1))
        moved.append(timed(one, us, H200.name))
    return moved


def test_spearman() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(0.8207826817)  # ties share a rank
    assert spearman([1, 1, 1], [1, 2, 3]) == 0.0
    with pytest.raises(InvalidValue, match="ranks"):
        spearman([1], [1])


def test_rank_errors_are_those_of_the_predictions_on_record() -> None:
    errors = rank_errors(KNOWN)
    assert [(e.spec, e.workload) for e in errors] == [(s, b) for s in SPECS[:2] for b in BATCHES]
    for error in errors:
        rows = [r for r in KNOWN if (r.spec, r.workload) == (error.spec, error.workload)]
        favourite = min(rows, key=lambda r: r.predicted_us)
        assert error.regret == pytest.approx(favourite.time_us / min(r.time_us for r in rows) - 1)
        assert error.schedules == len(rows) and 0 < error.correlation < 1
    assert rank_errors(KNOWN[:2]) == ()


def test_constants_that_made_the_times_are_found_again() -> None:
    factors = {"bandwidth_gbs": 0.8, "launch_us": 1.5, "warp_rate": 0.7}
    made = [
        timed(r, predict(r.spec, H100, r.schedule, r.workload, factors).time_us, H100.name) for r in KNOWN
    ]
    found = Calibration.of(made, H100)
    assert found.factors["bandwidth_gbs"] == pytest.approx(0.8, rel=0.05)
    errors = [
        abs(math.log(Calibration(found.factors).time_us(H100, r.spec, r.schedule, r.workload) / r.time_us))
        for r in made
    ]
    plain = [abs(math.log(r.predicted_us / r.time_us)) for r in made]
    assert sum(errors) < 0.2 * sum(plain)


def test_residuals_make_the_calibrated_time_of_what_was_measured_the_measured_one() -> None:
    found = Calibration.of(KNOWN, H100)
    for one in KNOWN[::20]:
        assert found.time_us(H100, one.spec, one.schedule, one.workload) == pytest.approx(one.time_us)
    assert Calibration().time_us(H100, KNOWN[0].spec, KNOWN[0].schedule, KNOWN[0].workload) == pytest.approx(
        KNOWN[0].predicted_us
    )


def test_a_pick_for_another_device_is_held_against_its_own_best() -> None:
    truth = other_device(KNOWN)
    found = transfers(KNOWN, H100, truth, H200)
    assert [t.spec for t in found] == list(dict.fromkeys(r.spec for r in KNOWN))
    assert median_regret(found) <= 0.03
    for one in found:
        rows = [r for r in truth if r.spec == one.spec]
        means = {
            s: math.exp(
                sum(math.log(r.time_us) for r in rows if r.schedule == s) / sum(r.schedule == s for r in rows)
            )
            for s in {r.schedule for r in rows}
        }
        assert one.regret == pytest.approx(means[one.pick] / min(means.values()) - 1)
        assert one.candidates == len(means) and one.moved is not None
    # what was measured there decides nothing but the regret: the same picks, had all been different
    slower = [timed(r, r.time_us * (2 + (i % 7)), H200.name) for i, r in enumerate(truth)]
    assert [t.pick for t in transfers(KNOWN, H100, slower, H200)] == [t.pick for t in found]


def test_what_was_fastest_here_is_that_on_the_batches_measured_there() -> None:
    """Other batches of here, on which another schedule wins by far, do not count."""
    truth = other_device(KNOWN)
    before = transfers(KNOWN, H100, truth, H200)
    order = list(dict.fromkeys(r.schedule for r in KNOWN))
    more = [
        timed(
            replace(r, workload=Workload.uniform(1 + i, 512)),
            r.time_us * 10 ** order.index(r.schedule),
            H100.name,
        )
        for i in range(4)
        for r in KNOWN
        if r.workload == BATCHES[0]
    ]
    after = transfers([*KNOWN, *more], H100, truth, H200)
    assert [t.moved for t in after] == [t.moved for t in before]


def test_a_spec_that_was_measured_there_alone_has_only_the_constants() -> None:
    (first, second) = dict.fromkeys(r.spec for r in KNOWN)
    found = transfers([r for r in KNOWN if r.spec == first], H100, other_device(KNOWN), H200)
    assert found[0].moved is not None and found[1].moved is None and found[1].spec == second
    assert found[1].regret >= 0


def test_what_the_model_flatters_does_not_win_over_what_is_known() -> None:
    rows = [r for r in KNOWN if (r.spec, r.workload) == (KNOWN[0].spec, KNOWN[0].workload)]
    unknown, *known = sorted(rows, key=lambda r: r.predicted_us)
    found = Calibration.of(known, H100)
    constants = Calibration(found.factors)
    case = (unknown.spec, unknown.schedule, unknown.workload)
    assert found.time_us(H100, *case) / constants.time_us(H100, *case) > 1.02


def test_an_absent_target_is_calibrated_on_the_likest_one() -> None:
    rows = tuple(r for r in KNOWN if r.spec == KNOWN[0].spec)
    entry = Entry(rows[0].spec, H100.name, rows)
    on_cpu = Entry(rows[0].spec, "cpu", tuple(replace(r, target="cpu") for r in rows))
    found = Calibration.for_absent([entry], H200)
    assert found.residuals == Calibration.of(rows, H100).residuals
    assert found.alike and found.expected_regret == module.REGRET_ALIKE
    elsewhere = Calibration.for_absent([entry], target("a100"))
    assert not elsewhere.alike and elsewhere.expected_regret == module.REGRET_OTHER > module.REGRET_ALIKE
    for one in (
        Calibration.for_absent([], H200),
        Calibration.for_absent([entry], H100),  # its own records are no prediction's business
        Calibration.for_absent([on_cpu], H200),
    ):
        assert one == Calibration()


def test_the_expected_regret_is_the_published_one() -> None:
    published = json.loads(
        (Path(__file__).parents[2] / "docs/benchmarks/prediction-h100-h200.json").read_text()
    )
    assert round(published["median_regret"], 3) == module.REGRET_ALIKE <= 0.03
    assert round(published["median_uncalibrated"], 3) == module.REGRET_OTHER
    assert published["median_regret"] == median([spec["regret"] for spec in published["specs"]])


def test_nothing_measured_is_named() -> None:
    with pytest.raises(InvalidValue, match="h100-sxm"):
        Calibration.of([], H100)
    with pytest.raises(InvalidValue, match="h200"):
        transfers(KNOWN, H100, KNOWN, H200)
