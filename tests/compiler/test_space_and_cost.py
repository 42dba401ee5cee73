"""The feasible set is exact and the model's figures behave."""

from __future__ import annotations

import functools
import itertools

import pytest

from pagedgen.compiler.cost import predict
from pagedgen.compiler.families import BESIDE, family_for, template_hash
from pagedgen.compiler.space import default_schedule, feasible, is_feasible, near_default
from pagedgen.templates.triton.decode import addressing, block_h
from pagedgen.values.schedule import Schedule
from pagedgen.values.workload import Workload

SPECS = [
    {},
    {"block_size": 1},
    {"block_size": 544, "head_dim": 64},
    {"kv": "fp8_e4m3", "head_dim": 256, "heads": (16, 8)},
    {"heads": (71, 1), "head_dim": 64},
]


@pytest.mark.parametrize("spec_args", SPECS)
@pytest.mark.parametrize("target", ["h100", "a100"])
def test_every_feasible_schedule_addresses_its_blocks_legally(request, make_spec, spec_args, target):
    spec = make_spec(**spec_args)
    schedules = feasible(spec, request.getfixturevalue(target))
    assert len(schedules) == len(set(schedules)) > 10
    for schedule in schedules:
        tile = schedule.int("tile")
        ids = addressing(spec, tile)
        assert block_h(spec) >= 64 or 16 * schedule.int("num_warps") <= tile
        if ids == "scalar":
            assert spec.block_size % tile == 0
        elif ids == "page":
            assert tile % spec.block_size == 0 and 1 < spec.block_size < tile
        else:
            assert spec.block_size % tile
    assert default_schedule(spec, request.getfixturevalue(target)) in schedules


@pytest.mark.parametrize("op", ["extend", "copy_blocks"])
def test_the_nearest_to_the_default_are_those_of_the_whole_space(make_spec, h100, op):
    spec = make_spec(heads=(8, 8), op=op)
    fields = family_for(spec, h100).fields(spec, h100)

    def distance(schedule):
        return sum(abs(f.values.index(schedule[f.name]) - f.values.index(f.default)) for f in fields)

    space = sorted(feasible(spec, h100), key=distance)
    assert list(near_default(spec, h100, len(space) + 1)) == space
    assert list(near_default(spec, h100, 5)) == space[:5] and default_schedule(spec, h100) == space[0]
    assert is_feasible(spec, h100, space[-1])
    name = fields[0].name
    for choices in ({}, {name: 12345}, {"other": 1}):
        changed = Schedule.of(space[0].template, **{**dict(space[0].choices), **choices})
        assert is_feasible(spec, h100, changed) == (not choices)


def test_space_is_complete(make_spec, h100):
    """Nothing legal is missing: the set equals the product filtered by the constraints one by one."""
    spec = make_spec(block_size=32)
    family = family_for(spec, h100)
    fields = family.fields(spec, h100)
    constraints = family.constraints()
    total = 0
    probe = Workload.uniform(1, 1)

    @functools.cache  # many schedules share the values that a constraint looks at
    def holds(constraint, values):
        return bool(constraint.holds.subs(dict(values)))

    for values in itertools.product(*(f.values for f in fields)):
        choices = dict(zip((f.name for f in fields), values, strict=True))
        symbols = family.symbols(spec, h100, Schedule.of(family.name, **choices), probe)
        total += all(
            holds(c, tuple((s, symbols[str(s)]) for s in sorted(c.holds.free_symbols, key=str)))
            for c in constraints
        )
    assert total == len(feasible(spec, h100))


def test_fp8_decode_follows_the_hardware(make_spec, h100, a100):
    spec = make_spec(kv="fp8_e4m3")
    assert {s["fp8_decode"] for s in feasible(spec, h100)} == {"cvt"}
    assert {s["fp8_decode"] for s in feasible(spec, a100)} == {"bits"}


def test_an_lse_is_never_the_sum_of_weights_in_bfloat16(make_spec, h100):
    """A weight in bfloat16 errs by 2^-9, and so would the LSE where one token has most of the weight."""
    sums = {
        (dtype, lse): {s["sums"] for s in feasible(make_spec(q=dtype, lse=lse), h100)}
        for dtype in ("f16", "bf16")
        for lse in (False, True)
    }
    assert sums.pop(("bf16", True)) == {"reduce"}
    assert list(sums.values()) == 3 * [{"reduce", "dot"}]


def test_hopper_s_own_choices_are_offered_on_hopper_alone(make_spec, h100, a100):
    mqa = make_spec(heads=(32, 1))
    assert {(s["rows"], s["num_warps"] >= 4) for s in feasible(mqa, h100)} == {
        (32, True),
        (32, False),
        (64, True),
    }
    assert {s["rows"] for s in feasible(mqa, a100)} == {32}
    assert {s["pdl"] for s in feasible(mqa, h100)} == {0, 1, 2}
    ahead = [s for s in feasible(mqa, h100) if s["pdl"] == 2]
    assert {s["split"] for s in ahead} == {"walk"} and {s["waves"] for s in ahead} == {1, 2}
    assert {s["pdl"] for s in feasible(mqa, a100)} == {0}


def test_predicted_time_grows_with_bytes_and_never_beats_the_memory(make_spec, h100):
    spec = make_spec()
    schedule = default_schedule(spec, h100)
    times = []
    for seq_len in (1024, 4096, 16384):
        workload = Workload.uniform(32, seq_len)
        prediction = predict(spec, h100, schedule, workload)
        times.append(prediction.time_us)
        assert workload.kv_bytes(spec) / prediction.time_us / 1e3 < h100.bandwidth_gbs
    assert times == sorted(times)


def test_template_hash_follows_the_sources(make_spec, h100, tmp_path, monkeypatch):
    family = family_for(make_spec(), h100)
    before = template_hash(family)
    copy = tmp_path / "decode.py.j2"
    copy.write_text(family.source.read_text() + "\n")
    monkeypatch.setattr(type(family), "source", copy)
    template_hash.cache_clear()
    assert template_hash(family) != before
    monkeypatch.undo()
    launcher = tmp_path / "gpu.cc.j2"
    launcher.write_text("another launcher\n")
    monkeypatch.setitem(BESIDE, "cuda", (*BESIDE["cuda"][:-1], launcher))
    template_hash.cache_clear()
    assert template_hash(family) != before
    monkeypatch.undo()
    template_hash.cache_clear()
    assert template_hash(family) == before
