"""Trace formats by content, errors with their line, and the batches drawn from a trace."""

from __future__ import annotations

import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedgen.errors import InvalidValue, MalformedFile
from pagedgen.values.trace import Request, Trace, decode_workloads, read_trace, sample_trace

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n2023-11-16 18:15:50.9,396,109"
)
LENGTHS = (
    "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n374,44,418,8.5\n396.0,109,505,3.6\n"
)
MOONCAKE = (
    '{"timestamp": 0, "input_length": 374, "output_length": 44, "hash_ids": [0]}\n\n'
    '{"timestamp": 9, "input_length": 396, "output_length": 109, "hash_ids": [0]}\n'
)
PLAIN = "# prompt, output\n374,44\n396,109\n"


@pytest.mark.parametrize(
    ("text", "seconds", "prefix", "lines"),
    [
        (AZURE, 4.22, (), (2, 3)),
        (LENGTHS, 0, (), (2, 3)),
        (MOONCAKE, 0.009, (0,), (1, 3)),
        (PLAIN, 0, (), (2, 3)),
        ("\ufeff" + AZURE, 4.22, (), (2, 3)),
        (AZURE.replace("\n", "\r\n"), 4.22, (), (2, 3)),
        ("arrived_at,prompt,output\n100.5,374,44\n101.75,396,109\n", 1.25, (), (2, 3)),
    ],
)
def test_formats_are_recognised_by_content(tmp_path, text, seconds, prefix, lines):
    path = tmp_path / "some_trace.txt"
    path.write_text(text, encoding="utf-8", newline="")
    trace = read_trace(path)
    assert trace.requests == (
        Request(374, 44, 0.0, prefix),
        Request(396, 109, pytest.approx(seconds, abs=1e-6), prefix),
    )
    assert tuple(request.line for request in trace.requests) == lines
    assert (trace.name, trace.source) == ("some-trace", str(path))
    assert (trace.has_times, trace.has_prefixes) == (seconds > 0, bool(prefix))


def test_requests_come_in_the_order_of_their_arrival(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("timestamp,prompt,output\n9,1,1\n7,2,2\n9,3,3\n", encoding="utf-8")
    assert [(r.prompt, r.arrival) for r in read_trace(path).requests] == [(2, 0), (1, 2), (3, 2)]
    with pytest.raises(InvalidValue, match="arrival = 1"):
        Trace("t", (Request(1, 1, 2.0), Request(1, 1, 1.0)))


def test_one_line_of_mooncake_is_no_histogram(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text(MOONCAKE.splitlines()[0], encoding="utf-8")
    assert read_trace(path).requests == (Request(374, 44, 0.0, (0,)),)


def _histogram(tmp_path, **families):
    path = tmp_path / "hist.json"
    path.write_text(json.dumps(families), encoding="utf-8")
    return path


def test_histograms_are_drawn_from(tmp_path):
    small = {"input_tokens": {"10": 0.25, "20": 0.75}, "output_tokens": {"5": 1.0}}
    path = _histogram(tmp_path, small=small)
    trace = read_trace(path, seed=1)
    assert trace == read_trace(path, seed=1) != read_trace(path, seed=2)
    assert {r.output for r in trace.requests} == {5}
    share = sum(r.prompt == 20 for r in trace.requests) / len(trace.requests)
    assert abs(share - 0.75) < 0.03  # 4 standard deviations of 4096 draws


def test_one_of_several_histograms_has_to_be_named(tmp_path):
    family = {"input_tokens": {"10": 1}, "output_tokens": {"5": 1}}
    path = _histogram(tmp_path, **{"a/one": family, "a/two": family, "images": {"output_tokens": {"5": 1}}})
    with pytest.raises(InvalidValue, match=r"FILE#FAMILY: a/one, a/two$"):
        read_trace(path)
    assert read_trace(f"{path}#a/two").name == "hist-two"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (AZURE + "\n2023,12", "line 4: 2 columns: 3 are expected"),
        (AZURE.replace("396", "-396"), "line 3: prompt = '-396'"),
        (AZURE.replace("109", "many"), "line 3: output = 'many'"),
        (AZURE.replace("109", "1e300"), "line 3: output = '1e300'"),
        (AZURE.replace("109", "10.5"), "line 3: output = '10.5'"),
        (AZURE.replace("109", "nan"), "line 3: output = 'nan'"),
        ("a,b,c\n1,2,3\n", "line 1: 'a,b,c': a header with one of contexttokens"),
        ("# only a comment\n", "line 1: no request"),
        ("", "line 1: no request"),
        (AZURE.splitlines()[0], "line 1: no request"),
        (MOONCAKE + "{oops}\n", "line 4: JSON"),
        (MOONCAKE + '{"input_length": 3}\n', "line 4: an object with output_length"),
        (MOONCAKE.replace("109", "null"), "line 3: output_length = 'None'"),
        (MOONCAKE.replace('"timestamp": 9', '"timestamp": "late"'), "line 3: timestamp = 'late'"),
        (MOONCAKE.replace("[0]", "[0, 1]"), "line 1: 2 hash_ids for 374 tokens: 1, one for each 512"),
        (MOONCAKE.replace("[0]", "[-1]"), "line 1: hash_ids = '[-1]'"),
        (MOONCAKE.replace("[0]", '"a"'), "line 1: hash_ids = 'a'"),
        (AZURE.replace("2023-11-16 18:15:50.9", "yesterday"), "line 3: arrival = 'yesterday'"),
        (AZURE.replace("2023-11-16 18:15:50.9", "inf"), "line 3: arrival = 'inf'"),
        (MOONCAKE + "[3]\n", "line 4: an object with input_length"),
        ("{}", "line 1: no family"),
        ('{"a": {"input_tokens": {"x": 1}, "output_tokens": {"1": 1}}}', "input_tokens: a histogram is"),
        ('{"a": {"input_tokens": {"1": 0}, "output_tokens": {"1": 1}}}', "input_tokens: a histogram is"),
        ('{"a": {"input_tokens": [1], "output_tokens": {"1": 1}}}', "input_tokens: a histogram is"),
    ],
)
def test_malformed_traces_name_the_line(tmp_path, text, where):
    path = tmp_path / "trace"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(MalformedFile) as error:
        read_trace(path)
    assert str(error.value).startswith(f"{path}: {where}")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(MalformedFile, match="No such file"):
        read_trace(tmp_path / "none.csv")
    path = tmp_path / "binary"
    path.write_bytes(b"1,2\n\xff\xfe")
    with pytest.raises(MalformedFile, match="byte 4"):
        read_trace(path)


def test_the_sample_is_what_its_header_says():
    requests = sample_trace().requests
    assert len(requests) == 200
    for values, mean, deviation in (
        ([r.prompt for r in requests], 6.6333, 0.9852),
        ([r.output for r in requests], 5.0190, 0.8590),
    ):
        logs = [math.log(v) for v in values]
        assert abs(statistics.mean(logs) - mean) < 4 * deviation / math.sqrt(200)
        assert abs(statistics.stdev(logs) - deviation) < 4 * deviation / math.sqrt(400)


requests = st.builds(Request, st.integers(0, 5000), st.integers(0, 5000))


@given(
    st.lists(requests, min_size=1).filter(lambda r: any(x.output for x in r)),
    st.integers(1, 40),
    st.integers(),
)
def test_a_batch_holds_lengths_that_requests_pass_through(requests, num_seqs, seed):
    trace = Trace("t", tuple(requests))
    batch = trace.batch(num_seqs, seed)
    assert batch.num_seqs == num_seqs and batch == trace.batch(num_seqs, seed)
    for length in batch.seq_lens:
        assert any(r.prompt < length <= r.prompt + r.output for r in requests)


def test_a_batch_sees_requests_in_proportion_to_their_steps():
    trace = Trace("t", (Request(0, 1), Request(1000, 99)))
    lengths = trace.batch(4000, seed=3).seq_lens
    short = sum(length == 1 for length in lengths) / 4000
    assert abs(short - 0.01) < 0.007
    grown = [length - 1000 for length in lengths if length > 1]
    assert abs(statistics.mean(grown) - 50) < 2


@given(
    st.lists(requests, min_size=1).filter(lambda r: any(x.output for x in r) and any(x.prompt for x in r)),
    st.integers(1, 9000),
    st.integers(0, 9),
    st.integers(),
)
def test_a_step_holds_chunks_of_prompts_and_decodes(requests, num_tokens, num_decodes, seed):
    trace = Trace("t", tuple(requests))
    step = trace.step(num_tokens, num_decodes, seed)
    assert step == trace.step(num_tokens, num_decodes, seed)
    chunks = list(zip(step.seq_lens, step.query_lens, strict=True))
    if num_decodes:
        chunks, beside = chunks[:-num_decodes], chunks[-num_decodes:]
        assert beside == [(n, 1) for n in trace.batch(num_decodes, seed).seq_lens]
    assert sum(queries for _, queries in chunks) == num_tokens
    prompts = {request.prompt for request in requests}
    for number, (length, queries) in enumerate(chunks):
        assert 0 < length <= max(prompts)
        assert number == 0 or length == queries  # only the first began before
        assert number == len(chunks) - 1 or length in prompts  # only the last goes on after


def test_a_step_begins_anywhere_in_the_tokens_of_prompts():
    trace = Trace("t", (Request(0, 1), Request(100, 1), Request(900, 1)))
    first = [trace.step(1, seed=seed).seq_lens[0] for seed in range(2000)]
    assert abs(sum(n > 100 for n in first) / 2000 - 0.8) < 0.04
    assert abs(statistics.mean(first) - (0.1 * 50.5 + 0.9 * 450.5)) < 25


def test_batches_can_be_cut_and_need_output():
    assert max(sample_trace().batch(64, max_seq_len=512).seq_lens) == 512
    assert [w.num_seqs for w in decode_workloads(sample_trace(), (1, 8))] == [1, 8]
    with pytest.raises(InvalidValue, match="at least one request must have output"):
        Trace("t", (Request(5, 0),)).batch(1)
    with pytest.raises(InvalidValue, match="num_seqs = 0"):
        sample_trace().batch(0)
    with pytest.raises(InvalidValue, match="at least one request must have a prompt"):
        Trace("t", (Request(0, 5),)).step(16)
    with pytest.raises(InvalidValue, match="num_tokens = 0"):
        sample_trace().step(0)
    with pytest.raises(InvalidValue, match="at least one request"):
        Trace("t", ())
