"""SGLang's quick starts in docs/serving.md, as printed: skipped without SGLang, run by `.ci/sglang-cpu`.

``pagedgen`` on the PATH has the compilers; ``python`` has SGLang.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from serving_page import ask, commands, served
from tiny_models import write, write_tokenizer

pytest.importorskip("sglang")

PORT = "8138"


@pytest.fixture(scope="module")
def page():
    """The commands: build, serve and ask; the last two on a port of this test's."""
    build, serve, request = commands("SGLang on a CPU")
    return build, f"{serve} --port {PORT}", request.replace("localhost:30000", f"localhost:{PORT}")


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory, page):
    """my-model, a tiny Llama, and my-model.pack, which is the working directory's."""
    folder = tmp_path_factory.mktemp("page")
    write("llama", folder / "my-model")
    write_tokenizer(folder / "my-model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("PAGEDGEN_PACK", raising=False)
        subprocess.run(["bash", "-c", page[0]], check=True)
        yield folder


def test_the_server(page, folder):
    """The same tokens as by SGLang's torch backend, prompts of many lengths at once and found again."""
    _, serve, request = page
    stock = serve.removeprefix("PAGEDGEN_PACK=my-model.pack ").replace(
        "backend pagedgen", "backend torch_native"
    )
    assert "PAGEDGEN" not in stock and "torch_native" in stock
    many = request.replace('"The capital of France is"', "[" + ", ".join(
        f'"{" and ".join([f"{n} of {n + 1}"] * (n + 1))}"' for n in range(16)
    ) + "]")  # fmt: skip
    assert many != request
    answers = {}
    for name, command in (("own", serve), ("stock", stock)):
        log = Path(folder, f"{name}.log")
        with served(command, log) as server:
            first = ask(request, server, log)
            rounds = [ask(many, server, log) for _ in range(2)]
        assert any(answer["meta_info"]["cached_tokens"] for answer in rounds[1])
        answers[name] = [answer["output_ids"] for answer in [first, *rounds[0], *rounds[1]]]
        assert ("pagedgen: " in log.read_text()) == (name == "own")
    assert answers["own"] == answers["stock"] and len(answers["own"]) == 33
    # A random model may end an answer early.
    lengths = [len(tokens) for tokens in answers["own"]]
    assert min(lengths) > 0 and sum(lengths) > 33 * 8, lengths


def test_a_pack_of_another_model_is_refused_with_the_command_that_makes_the_right_one(page, folder):
    """At start; the command is then run as printed, and SGLang serves."""
    build, serve, request = page
    write("qwen3", folder / "other")
    wrong = build.replace("my-model.pack", "wrong.pack").replace("--model my-model", "--model other")
    subprocess.run(["bash", "-c", wrong], check=True)
    log = folder / "refused.log"
    with served(serve.replace("my-model.pack", "wrong.pack"), log) as server, pytest.raises(RuntimeError):
        ask(request, server, log)
    told = log.read_text()
    assert "wrong.pack: it has no decode-h32-q4-kv2-b16-f32" in told
    (fix,) = {line.strip() for line in told.splitlines() if line.strip().startswith("pagedgen build --cpu")}
    subprocess.run(["bash", "-c", fix], check=True)
    log = folder / "fixed.log"
    with served(serve.replace("my-model.pack", "model.pack"), log) as server:
        assert len(ask(request, server, log)["output_ids"]) == 16


def test_the_options_for_a_gpu_are_sglang_s():
    """No GPU here: SGLang's own parser takes the command, and ``pagedgen`` is the plug-in."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    from pagedgen.integrations.sglang import create

    load_plugins()
    (serve,) = (line for line in commands("SGLang") if "--model-path …" in line)
    words = serve.replace("…", "my-model").partition(" sglang.launch_server ")[2].split()
    arguments = prepare_server_args([*words, "--device", "cpu"])
    assert arguments.attention_backend == "pagedgen" and arguments.page_size == 16
    assert ATTENTION_BACKENDS["pagedgen"] is create
