"""Schedules, workloads, records and manifests: validation, names and round trips."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedgen.errors import InvalidValue
from pagedgen.values import codec
from pagedgen.values.manifest import FileEntry, KernelEntry, Manifest, Rule
from pagedgen.values.record import Record, Resources, Stamp, Status, Timing, Verdict
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import Causality, DType, KernelSpec, Op
from pagedgen.values.target import Target
from pagedgen.values.target_table import table
from pagedgen.values.workload import Workload, visible_pairs

SPEC = KernelSpec(Op.DECODE, 128, 32, 8, 16, DType.BF16, DType.BF16)
MEASURED = Record(
    Status.MEASURED,
    SPEC,
    "cpu",
    Workload.uniform(16, 2048),
    Schedule.of("tvm-decode", tile=64, into="l2"),
    "0123456789ab",
    Stamp("0.1.0", "tvm 0.27.0", "a CPU", "Linux 6.1", "2026-01-01T00:00:00+00:00"),
    Resources(code_bytes=4096),
    predicted_us=5000.0,
    timing=Timing(4800.0, 4700.0, 5100.0, 9),
    roofline_gbs=30.0,
    verdict=Verdict(True, 5, 1e-3, 1e-2, 0),
)
names = st.text("abcdefgh_", min_size=1, max_size=8)


@given(st.dictionaries(names, st.integers() | names, max_size=6))
def test_schedules_do_not_depend_on_order_and_round_trip(choices):
    schedule = Schedule.of("t", **choices)
    assert schedule == Schedule.of("t", **dict(reversed(choices.items())))
    assert codec.decode(Schedule, json.loads(codec.dumps(schedule))) == schedule
    for field, value in choices.items():
        assert schedule[field] == value


def test_schedules_refuse_what_is_not_theirs():
    schedule = Schedule.of("tvm-decode", tile=64, into="l2")
    assert schedule.name == "intol2-tile64"
    with pytest.raises(InvalidValue, match="field = 'warps': tvm-decode has into, tile"):
        schedule["warps"]
    with pytest.raises(InvalidValue, match="into = 'l2': an integer"):
        schedule.int("into")
    with pytest.raises(InvalidValue, match="choices"):
        Schedule("t", (("b", 1), ("a", 1)))


@given(st.lists(st.integers(0, 1 << 20), min_size=1, max_size=50))
def test_workloads_count_their_bytes(lengths):
    workload = Workload("w", tuple(lengths))
    assert workload.kv_bytes(SPEC) == sum(lengths) * 2 * 8 * 128 * 2
    assert workload.cache_bytes(SPEC) == workload.kv_bytes(SPEC)
    assert workload.max_seq_len == max(lengths)
    for masks, seen in (({"window": 64}, 64), ({"attention_chunk": 256}, 256)):
        spec = replace(SPEC, **masks)
        first = [(n - 1) // seen * seen if spec.attention_chunk else n - seen for n in lengths]
        tokens = sum(n - max(0, f) for n, f in zip(lengths, first, strict=True) if n)
        assert workload.kv_bytes(spec) == tokens * 2 * 8 * 128 * 2  # of what no query sees, nothing
    assert codec.decode(Workload, json.loads(codec.dumps(workload))) == workload


@pytest.mark.parametrize(
    ("changes", "workload", "tokens"),
    [
        ({"window": 128}, Workload("w", (1000, 128, 5, 0)), 128 + 128 + 5),
        ({"window": 128}, Workload.chunks(1, 8, 1000), 135),
        ({"window": 128}, Workload.chunks(2, 512, 512), 2 * 512),
        ({"attention_chunk": 256}, Workload("w", (1000, 256, 257)), 1000 - 768 + 256 + 1),
        ({}, Workload("w", (7, 9), (0, 2)), 9),
    ],
)
def test_a_call_reads_what_its_queries_see(changes, workload, tokens):
    spec = replace(SPEC, **changes)
    assert workload.kv_bytes(spec) == tokens * SPEC.kv_bytes_per_token
    assert workload.cache_bytes(spec) == sum(workload.seq_lens) * SPEC.kv_bytes_per_token


@pytest.mark.parametrize(
    ("text", "op", "seqs", "queries"),
    [
        ("32x8192", Op.DECODE, (8192,) * 32, ()),
        ("1x9+2x4", Op.DECODE, (9, 4, 4), ()),
        ("3x64", Op.EXTEND, (64,) * 3, (64,) * 3),
        (" 2x8of16+1x1of4 ", Op.EXTEND, (16, 16, 4), (8, 8, 1)),
        ("1x4of64", Op.VERIFY, (64,), (4,)),
    ],
)
def test_batches_are_spelled_in_one_way(text, op, seqs, queries):
    workload = Workload.parse(text, op)
    assert workload == Workload(text.strip(), seqs, queries)
    assert workload.lens == (seqs, queries or (1,) * len(seqs))
    assert workload.num_queries == sum(queries) or (op is Op.DECODE and workload.num_queries == len(seqs))


@pytest.mark.parametrize("text", ["", "32", "0x8", "x8", "4x-1", "2x8+", "2x8of4x1"])
def test_misspelled_batches(text):
    with pytest.raises(InvalidValue, match=r"workload = .*like 4x512of8192, parts joined by"):
        Workload.parse(text, Op.EXTEND)
    with pytest.raises(InvalidValue, match=r"workload = .*like 32x8192"):
        Workload.parse("2x8of16", Op.DECODE)
    with pytest.raises(InvalidValue, match="query_lens = 32"):
        Workload.parse("1x32of16", Op.EXTEND)


def test_the_floor_is_the_later_one_of_reading_and_of_products():
    prompt, step = Workload.parse("1x4096", Op.EXTEND), Workload.parse("4x1of4096", Op.EXTEND)
    spec = replace(SPEC, op=Op.EXTEND)
    assert prompt.floor_us(spec, 1000, 100) == pytest.approx(prompt.flops(spec) / 1e8)
    assert step.floor_us(spec, 1000, 100) == pytest.approx(step.kv_bytes(spec) / 1e6)
    assert prompt.floor_us(spec, 1000) == pytest.approx(prompt.kv_bytes(spec) / 1e6)
    record = replace(MEASURED, spec=spec, workload=prompt, roofline_tflops=100.0)
    floor = max(prompt.flops(spec) / 1e8, prompt.kv_bytes(spec) / record.roofline_gbs / 1e3)
    assert record.roofline_share == pytest.approx(floor / record.time_us)
    assert record.tflops == pytest.approx(prompt.flops(spec) / record.time_us / 1e6)


@pytest.mark.parametrize("lengths", [(), (5, -1), (1.5,), (True,)])
def test_impossible_workloads(lengths):
    with pytest.raises(InvalidValue, match="seq_lens"):
        Workload("w", lengths)


def test_records_round_trip_and_derive_their_figures():
    again = codec.decode(Record, json.loads(codec.dumps(MEASURED)))
    assert again == MEASURED
    assert again.time_us == 4800.0
    assert again.gbs == pytest.approx(16 * 2048 * 4096 / 4800e-6 / 1e9)
    assert again.roofline_share == pytest.approx(again.gbs / 30)


def test_a_measured_record_needs_timing_roofline_and_verdict():
    for change in ({"timing": None}, {"roofline_gbs": 0.0}):
        with pytest.raises(InvalidValue, match="timing"):
            replace(MEASURED, **change)
    failed = Verdict(False, 1, 1.0, 0.1, 0, "wrong")
    for verdict in (None, failed):
        with pytest.raises(InvalidValue, match="verdict"):
            replace(MEASURED, verdict=verdict)


def test_a_prediction_has_no_timing():
    with pytest.raises(InvalidValue, match="a predicted record has none"):
        replace(MEASURED, status=Status.PREDICTED)
    predicted = replace(MEASURED, status=Status.PREDICTED, timing=None, roofline_gbs=0.0, verdict=None)
    assert predicted.time_us == 5000.0 and predicted.roofline_share == 0.0


def test_targets_round_trip():
    for row in table():
        assert codec.decode(Target, json.loads(codec.dumps(row.target))) == row.target


@pytest.mark.parametrize(("field", "value"), [("num_sms", 0), ("arch", "sm90"), ("arch", "gfx942")])
def test_impossible_targets(field, value):
    with pytest.raises(InvalidValue, match=field):
        replace(table()[0].target, **{field: value})


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "a//b", "a\\b", "", ".", "a/./b"])
def test_no_path_of_a_manifest_leaves_its_pack(path):
    with pytest.raises(InvalidValue, match="path"):
        FileEntry(path, 1, "0" * 64)


def test_manifests_round_trip_and_point_at_variants_that_exist():
    entry = KernelEntry(SPEC, "lib/x.so", (MEASURED.schedule,), (Rule(1 << 31, 1 << 31, 0),), (MEASURED,))
    manifest = Manifest(
        1,
        "0.1.0",
        "cpu",
        "cpu",
        "x86_64-avx2",
        "linux-x86_64",
        (entry,),
        (FileEntry("lib/x.so", 9, "0" * 64),),
    )
    assert codec.decode(Manifest, json.loads(codec.dumps(manifest))) == manifest
    with pytest.raises(InvalidValue, match="variant = 1: 0 to 0"):
        replace(entry, dispatch=(Rule(1, 1, 1),))
    with pytest.raises(InvalidValue, match="dispatch"):
        replace(entry, dispatch=())


def test_visible_pairs_counts_what_a_mask_of_booleans_counts(make_spec):
    lens = ((1, 1), (5, 9), (9, 9), (3, 20), (7, 7), (13, 20), (0, 6))
    masks = itertools.product(lens, (None, 1, 3, 4, 50), (None, 1, 4, 7, 64), ("causal", "full"))
    for (q_len, seq_len), window, chunk, causality in masks:
        pairs = 0
        for p, t in itertools.product(range(seq_len - q_len, seq_len), range(seq_len)):
            sees = (t <= p or causality == "full") and abs(p - t) < (window or 99)
            pairs += sees and (chunk is None or t // chunk == p // chunk)
        spec = make_spec(op="extend", window=window, attention_chunk=chunk, causality=Causality(causality))
        assert visible_pairs(spec, q_len, seq_len) == pairs


def test_query_lengths_fit_their_sequences():
    mixed = Workload("mixed", (9, 5, 0), (4, 1, 0))
    assert codec.decode(Workload, json.loads(codec.dumps(mixed))) == mixed
    assert Workload("decode", (9, 5, 0)).lens_of_queries == (1, 1, 0)
    assert Workload.chunks(4, 512, 8192).name == "4x512of8192" and Workload.chunks(1, 9, 9).name == "1x9"
    assert mixed.flops(SPEC) == 4 * 128 * 32 * (6 + 7 + 8 + 9 + 5)
    for lens in ((4, 1), (10, 1, 0), (-1, 1, 0), (1.0, 1, 0)):
        with pytest.raises(InvalidValue, match="query_lens = "):
            Workload("bad", (9, 5, 0), lens)
