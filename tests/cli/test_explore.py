"""``pagedgen explore`` in process: output, options, and refusals that leave nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pagedgen.cli.app import app
from pagedgen.cli.explore import _command, size
from pagedgen.errors import InvalidValue

runner = CliRunner()
COMMON = ("--gpu", "h100", "--memory", "2GiB", "--jobs", "1", "--block-sizes", "16,128", "--requests", "40")
COMMON += ("--max-num-seqs", "32")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PAGEDGEN_CACHE_DIR", str(tmp_path / "cache"))


def run(*arguments: object, code: int = 0):
    result = runner.invoke(app, ["explore", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_tables_page_and_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    result = run(*COMMON, "--html", tmp_path / "r.html", "--plots", tmp_path / "plots")
    assert "sample-trace: 40 requests" in result.stdout and "Use blocks of " in result.stdout
    assert "predicted by the cost model" in result.stdout and "kernel times are predicted" in result.stderr
    assert (tmp_path / "r.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert len(list((tmp_path / "plots").glob("*.png"))) == 5


def test_json_is_the_same_each_time(tmp_path):
    trace = tmp_path / "t.csv"
    trace.write_text("timestamp,prompt,output\n" + "".join(f"{i},{50 + i},{9 + i}\n" for i in range(30)))
    arguments = (*COMMON, "--trace", trace, "--trace", trace, "--rate-factor", "2", "--json")
    first, second = run(*arguments), run(*arguments)
    assert first.stdout == second.stdout
    data = json.loads(first.stdout)
    assert [t["trace"] for t in data["traces"]] == ["t", "t-2"]
    assert data["traces"][0]["load"] == "open loop, times of the trace at 2 times its rate"
    assert not data["traces"][0]["prefix_caching"]
    assert data["server"]["memory_bytes"] == 2 << 30


def test_swapping_prefixes_and_fp8(tmp_path):
    trace = tmp_path / "t.jsonl"
    rows = [{"input_length": 600, "output_length": 300, "hash_ids": [i % 2, i + 2]} for i in range(40)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    arguments = (
        *COMMON,
        "--trace",
        trace,
        "--host-memory",
        "4GiB",
        "--kv-dtype",
        "fp8_e4m3",
        "--memory",
        "512MiB",
    )
    data = json.loads(run(*arguments, "--request-rate", "1000", "--json").stdout)
    outcome = data["traces"][0]["outcomes"][0]
    assert outcome["hit_share"] > 0.2 and outcome["preemptions"] > 0
    assert data["server"]["token_bytes"] == 65_536 and data["server"]["kv_dtype"] == "fp8_e4m3"
    off = json.loads(run(*arguments, "--no-prefix-caching", "--json").stdout)
    assert off["traces"][0]["outcomes"][0]["hit_share"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "lots"], "memory = 'lots': a size like 40GiB"),
        (["--memory", "70GiB"], "memory = '70.0 GiB': at most 52.1 GiB"),
        (["--model", "llama-3-70b"], "141.1 GB of weights do not fit into 72.0 GB of h100-sxm"),
        (["--model", "gpt-9"], "unknown model 'gpt-9'"),
        (["--gpu", "v100"], "unknown target 'v100'"),
        (["--gpu", "cpu"], "memory_bytes"),
        (["--block-sizes", "16,x"], "block_sizes = 'x'"),
        (["--block-sizes", "0"], "block_size = 0"),
        (["--kv-dtype", "fp4"], "kv_dtype = 'fp4'"),
        (["--concurrency", "8", "--rate-factor", "1"], "rate_factor = 1.0: not together with concurrency"),
        (["--rate-factor", "1"], "has no arrival times"),
        (["--request-rate", "0"], "request_rate = 0.0: above 0"),
        (["--jobs", "0"], "jobs = 0"),
        (["--max-batched-tokens", "8"], "max_batched_tokens = 8: at least max_num_seqs (32)"),
        (["--trace", "none.csv"], "none.csv: file: No such file"),
        (["--kernel-times", "none.json"], "none.json: file: No such file"),
        (["--memory", "40MiB"], "sample_trace.csv: line "),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, arguments, message):
    result = run(*COMMON, "--html", tmp_path / "r.html", "--json", *arguments, code=1)
    assert result.stdout == "" and not (tmp_path / "r.html").exists()
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_malformed_traces_are_named_with_their_line(tmp_path):
    trace = tmp_path / "t.csv"
    trace.write_text("10,20\n10,-1\n")
    assert f"{trace}: line 2: output = '-1'" in run(*COMMON, "--trace", trace, code=1).stderr


def test_the_report_says_how_to_make_it_again(monkeypatch):
    given = ["pagedgen", "explore", "--json", "--trace", "a/b.json#data/x", "--jobs", "2", "--html=c/d.html"]
    given += ["--plots", "e", "--seed", "3"]
    monkeypatch.setattr("sys.argv", given)
    assert _command() == "pagedgen explore --trace 'b.json#data/x' --seed 3"


def test_outputs_are_checked_first(tmp_path):
    assert "a file is expected" in run(*COMMON, "--html", tmp_path, code=1).stderr
    (tmp_path / "x").write_text("")
    assert "a folder is expected" in run(*COMMON, "--plots", tmp_path / "x", code=1).stderr


def test_an_ended_exploration_ends_at_once_and_leaves_nothing(tmp_path):
    """A run that would take a minute is ended in its midst; its processes end with it."""
    command = [
        sys.executable,
        "-m",
        "pagedgen",
        "explore",
        "--gpu",
        "h100",
        "--memory",
        "40GiB",
        "--jobs",
        "2",
    ]
    trace = tmp_path / "t.csv"
    trace.write_text("200,4000\n" * 4000)
    page = tmp_path / "r.html"
    job = subprocess.Popen([*command, "--trace", str(trace), "--html", str(page)], stderr=subprocess.DEVNULL)
    children: list[str] = []
    begin = time.monotonic()
    while len(children) < 3 and time.monotonic() < begin + 60:  # two simulations and what tracks them
        time.sleep(0.2)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    time.sleep(1)
    job.terminate()
    assert job.wait(20) == 128 + 15
    begin = time.monotonic()
    while any(map(_runs, children)) and time.monotonic() < begin + 5:
        time.sleep(0.1)
    assert [pid for pid in children if _runs(pid)] == [] and not page.exists()


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_models_with_windows_are_warned_of():
    result = run(*COMMON, "--model", "gemma-2-9b", "--memory", "6GiB")
    assert "as if every layer kept and read the whole context" in result.stderr


@pytest.mark.parametrize(
    ("text", "value"), [("40GiB", 40 << 30), ("1.5 gb", 1_500_000_000), ("12", 12), ("3KiB", 3072)]
)
def test_sizes(text, value):
    assert size("memory", text) == value
    with pytest.raises(InvalidValue, match="memory = '12 apples'"):
        size("memory", "12 apples")
