"""The commands in process: results on stdout, everything else on stderr, exit codes."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from pagedgen import __version__
from pagedgen.cli.app import app

runner = CliRunner()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PAGEDGEN_CACHE_DIR", str(tmp_path / "cache"))


def run(*arguments: str, code: int = 0):
    result = runner.invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


COMMANDS = (
    "tune",
    "generate",
    "build",
    "inspect",
    "bench",
    "explain",
    "predict-check",
    "verify",
    "targets",
    "models",
    "doctor",
    "stats",
    "explore",
)


def test_help_lists_the_commands_and_teaches_by_example():
    text = run("--help").stdout
    for command in COMMANDS:
        assert command in text
    assert "pagedgen tune --gpu a100" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example(command):
    assert f"pagedgen {command}" in run(command, "--help").stdout


def test_version():
    assert run("--version").stdout.strip() == f"pagedgen {__version__}"


def test_no_arguments_is_help_and_a_usage_error():
    assert "Commands" in runner.invoke(app, []).output


@pytest.mark.parametrize(
    "arguments", [["tune", "--colour"], ["tune", "--tp", "two"], ["paint"], ["verify"], ["explain", "x"]]
)
def test_usage_errors_are_2(arguments):
    run(*arguments, code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-q-heads", "24", "--num-kv-heads", "5"], "num_q_heads = 24: a multiple of num_kv_heads (5)"),
        (["--head-dim", "100"], "head_dim = 100: a multiple of 8 from 32 to 256"),
        (["--head-dim", "wide"], "head_dim = 'wide': an integer"),
        (["--block-size", "0"], "block_size = 0: 1 to 65536"),
        (["--block-size", "16,"], "block_size = '': an integer"),
        (["--kv-dtype", "fp4"], "kv_dtype = 'fp4': allowed: f32, f16, bf16, fp8_e4m3, fp8_e5m2"),
        (["--q-dtype", "fp8_e4m3"], "q_dtype = 'fp8_e4m3': allowed: f32, f16, bf16"),
        (["--q-dtype", "bf16", "--kv-dtype", "f16"], "kv_dtype = 'f16': q_dtype (bf16)"),
        (["--kv-scale", "token"], "kv_scale = 'token': allowed: tensor, head"),
        (["--kv-scale", "none"], "kv_scale = 'none': allowed: tensor, head"),
        (["--gpu", "v100"], "unknown target 'v100'; known: a100-40g"),
        (["--gpu", "h100", "--cpu"], "gpu = 'h100': not together with --cpu"),
        (["--model", "gpt-9"], "unknown model 'gpt-9'; known: llama-3-8b"),
        (["--tp", "3"], "tp = 3: 1, 2, 4, 8, 16, 32 divide"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "explain", "tune", "build"])
def test_bad_input_is_one_line_that_names_field_value_and_what_is_allowed(command, arguments, message):
    if "--gpu" not in arguments and "--cpu" not in arguments:
        arguments = ["--gpu", "h100", *arguments]
    result = run(command, *arguments, code=1)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_commands_that_show_one_spec_refuse_several():
    assert "takes one" in run("generate", "--gpu", "h100", "--block-size", "16,64", code=1).stderr


def test_generate_prints_the_source_alone():
    result = run("generate", "--gpu", "h100", "--model", "llama-3-8b", "--kv-dtype", "fp8_e4m3")
    compile(result.stdout, "kernel", "exec")
    assert "@triton.jit" in result.stdout
    assert "decode-h128-q32-kv8-b16-bf16-kvf8e4m3 for h100-sxm (sm_90)" in result.stderr


def test_generate_to_a_file_and_with_another_schedule(tmp_path):
    place = tmp_path / "kernel.py"
    run("generate", "--gpu", "a100", "--schedule", "num_stages=2", "--out", place)
    assert "num_stages2" in place.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour=1", "FIELD=VALUE is expected, fields: "),
        ("num_stages", "num_stages = '': allowed: "),
        ("num_stages=99", "num_stages = '99': allowed: "),
        ("tile=16,num_warps=8", "not legal"),
    ],
)
def test_schedules_that_are_not(text, message):
    assert message in run("generate", "--gpu", "a100", "--schedule", text, code=1).stderr


def test_generate_as_json():
    data = json.loads(run("generate", "--gpu", "a100", "--json").stdout)
    assert data["target"] == "a100-80g" and data["spec"]["head_dim"] == 128
    assert "default" in data["origin"] and "@triton.jit" in data["source"]


def test_explain_puts_the_numbers_in():
    result = run("explain", "--gpu", "a100", "--workload", "8x1024")
    assert "smem_per_block 166,912" in result.stdout
    assert "predicted, not measured" in result.stdout
    assert "time_us" in result.stdout


def test_explain_as_json_agrees_with_the_model():
    data = json.loads(run("explain", "--gpu", "a100", "--workload", "8x1024", "--json").stdout)
    costs = {cost["name"]: cost for cost in data["costs"]}
    assert costs["time_us"]["predicted"] >= data["best_predicted"]["time_us"] > 0
    assert data["symbols"]["kv_bytes"] == 8 * 1024 * 4096
    assert 0 < data["space"]["legal"] <= data["space"]["product"]


@pytest.mark.parametrize("text", ["8", "0x5", "8x", "x8", "8x-1"])
def test_workloads_that_are_not(text):
    assert "like 32x8192" in run("explain", "--gpu", "a100", "--workload", text, code=1).stderr


def test_models_that_need_what_kernels_do_not_have_are_warned_of():
    result = run("generate", "--gpu", "h100", "--model", "gpt-oss-20b")
    assert "warning: gpt-oss-20b: 12 of 24 layers attend to a window of 128 tokens" in result.stderr
    assert "learned sinks" in result.stderr
    assert "warning" not in run("generate", "--gpu", "h100", "--model", "llama-3-8b").stderr


def test_targets_and_models():
    assert "h100-sxm" in run("targets").stdout
    data = json.loads(run("targets", "--json").stdout)
    assert {"a100-80g", "cpu"} <= {t["name"] for t in data["targets"]}
    assert data["here"]["name"]
    assert "qwen3-30b-a3b" in run("models").stdout
    assert any(m["name"] == "gpt-oss-20b" and m["gaps"] for m in json.loads(run("models", "--json").stdout))


def test_a_config_json_is_a_model(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({"num_hidden_layers": 2, "hidden_size": 640, "num_attention_heads": 10}), encoding="utf-8"
    )
    data = json.loads(run("generate", "--gpu", "h100", "--model", path, "--json").stdout)
    assert (data["spec"]["num_kv_heads"], data["spec"]["head_dim"]) == (10, 64)
    path.write_text("{}", encoding="utf-8")
    result = run("generate", "--gpu", "h100", "--model", path, code=1)
    assert f"{path}: num_attention_heads: None" in result.stderr


def test_build_without_records_says_what_to_do(tmp_path):
    result = run("build", "--gpu", "h100", "--out", tmp_path / "x.pack", code=1)
    assert "run pagedgen tune first" in result.stderr
    assert not (tmp_path / "x.pack").exists()


@pytest.mark.parametrize("command", ["tune", "build", "generate"])
def test_output_that_cannot_be_written_is_refused_at_once(tmp_path, command):
    (tmp_path / "file").write_text("", encoding="utf-8")
    result = run(command, "--cpu", "--out", tmp_path / "file" / "x", code=1)
    assert result.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/file/x: ")


def test_verify_names_what_is_not_a_pack(tmp_path):
    assert "is not a folder" in run("verify", tmp_path / "none", code=1).stderr
    assert "holds no manifest.json" in run("verify", tmp_path, code=1).stderr


def test_doctor_finds_this_python_and_a_writable_cache(tmp_path):
    result = runner.invoke(app, ["doctor", "--json"])
    checks = {check["name"]: check for check in json.loads(result.stdout)}
    assert checks["Python"]["state"] == checks["torch"]["state"] == checks["user cache"]["state"] == "ok"
    assert str(tmp_path) in checks["user cache"]["found"]
    assert result.exit_code == int(any(check["state"] == "missing" for check in checks.values()))


def test_doctor_fails_on_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    place = tmp_path / "file"
    place.write_text("", encoding="utf-8")
    monkeypatch.setenv("PAGEDGEN_CACHE_DIR", str(place))
    checks = {check["name"]: check for check in json.loads(run("doctor", "--json", code=1).stdout)}
    assert checks["user cache"]["state"] == "missing" and "PAGEDGEN_CACHE_DIR" in checks["user cache"]["fix"]


def test_bench_lists_its_suites_and_refuses_others():
    listed = run("bench").stdout
    assert "decode-cpu" in listed and "decode-gpu" in listed and "load" in listed
    assert "unknown suite 'speed'; known: decode-cpu" in run("bench", "--suite", "speed", code=1).stderr


def test_stats_of_a_trace_as_table_and_json(tmp_path):
    trace = tmp_path / "lengths.csv"
    trace.write_text("num_prefill_tokens,num_decode_tokens\n" + "100,30\n" * 50, encoding="utf-8")
    options = ("stats", "--trace", trace, "--pool-tokens", 2048, "--steps", 60)
    text = run(*options).stdout
    assert "num blocks" in text and "128" in text and "utilisation" in text
    data = json.loads(run(*options, "--json").stdout)
    assert data["num_blocks"] == 128 and data["steps"] == 60 and data["counters"]["admitted"] > 15
    assert data["counters"]["refused"] > 0  # the pool was full
    assert data["sequences"] * 100 <= data["stored_tokens"] <= data["used_blocks"] * 16
    assert "block_size = 0" in run("stats", "--trace", trace, "--block-size", 0, code=1).stderr
    run("stats", "--trace", tmp_path / "nothing.csv", code=2)
    trace.write_text("num_prefill_tokens,num_decode_tokens\n", encoding="utf-8")
    assert "no request" in run("stats", "--trace", trace, code=1).stderr


def test_bench_passes_traces_to_the_suite_that_takes_them(tmp_path, monkeypatch):
    trace = tmp_path / "lengths.csv"
    trace.write_text("num_prefill_tokens,num_decode_tokens\n1,1\n", encoding="utf-8")
    got = []

    class Lines:
        def lines(self):
            return ["done"]

    def fake(note, traces=()):
        got.append(traces)
        return Lines()

    monkeypatch.setattr("pagedgen.autotune.suites.manager.run", fake)
    assert "done" in run("bench", "--suite", "manager", "--trace", trace, "--trace", trace).stdout
    assert got == [(trace, trace)]
    assert "only with ['manager']" in run("bench", "--suite", "load", "--trace", trace, code=1).stderr
