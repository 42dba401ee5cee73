"""vLLM's quick starts in docs/serving.md, as printed: skipped without vLLM, run by `.ci/vllm-cpu`.

``pagedgen`` on the PATH has the compilers; ``python`` has vLLM.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from serving_page import ask, block, commands, served
from tiny_models import write, write_tokenizer

pytest.importorskip("vllm")

SERVES = "pagedgen: {} serves Layer("


@pytest.fixture(scope="module")
def page():
    """The commands: build, serve and ask."""
    build, serve, request = (line for line in commands("vLLM on a CPU") if not line.startswith("pip "))
    return build, serve, request


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
    """The same text as without the plug-in, and the log says who serves."""
    _, serve, request = page
    port = " --port 8137"
    request = request.replace("localhost:8000", "localhost:8137")
    variable = "PAGEDGEN_PACK=my-model.pack "
    assert serve.startswith(variable)
    texts = []
    for name, command in (("own", serve), ("stock", serve.removeprefix(variable))):
        log = folder / f"{name}.log"
        with served(command + port, log) as server:
            texts.append(ask(request, server, log)["choices"][0]["text"])
        assert (SERVES.format(folder / "my-model.pack") in log.read_text()) == (name == "own")
    assert texts[0] == texts[1] and len(texts[0]) >= 16


def test_the_script(folder):
    script = folder / "generate.py"
    script.write_text(block("vLLM on a CPU"), encoding="utf-8")
    printed = []
    for variables in ({"PAGEDGEN_PACK": "my-model.pack"}, {}):
        run = subprocess.run(
            [sys.executable, script],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr[-4000:]
        assert (SERVES.format(folder / "my-model.pack") in run.stdout + run.stderr) == bool(variables)
        (tokens,) = re.findall(r"^\[[0-9, ]+\] ", run.stdout, re.MULTILINE)
        printed.append(tokens.split(","))
    assert printed[0] == printed[1] and len(printed[0]) == 16


def test_the_options_for_a_gpu_are_vllm_s():
    """No GPU here: vLLM's own parser takes the command, and CUSTOM is the plug-in."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    (serve,) = (line for line in commands("vLLM") if " vllm serve " in line)
    words = serve.partition(" vllm serve ")[2].split()
    parsed = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(["--model", *words])
    arguments = EngineArgs.from_cli_args(parsed)
    assert arguments.model == words[0] and arguments.attention_backend == "CUSTOM"
    load_general_plugins()
    assert AttentionBackendEnum.CUSTOM.get_path().startswith("pagedgen.integrations.vllm.")


def test_a_pack_of_another_model_is_refused_with_the_command_that_makes_the_right_one(page, folder):
    """At start; the command is then run as printed, and vLLM serves."""
    write("qwen3", folder / "other")
    wrong = page[0].replace("my-model.pack", "wrong.pack").replace("--model my-model", "--model other")
    subprocess.run(["bash", "-c", wrong], check=True)
    script = folder / "generate.py"
    script.write_text(block("vLLM on a CPU"), encoding="utf-8")

    def run(pack: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PAGEDGEN_PACK": pack}
        return subprocess.run(
            [sys.executable, script], env=environment, capture_output=True, text=True, check=False
        )

    refused = run("wrong.pack")
    told = refused.stdout + refused.stderr
    assert refused.returncode != 0 and "wrong.pack: it has no decode-h32-q4-kv2-b16-f32-ktoken" in told
    fix = re.search(r"pagedgen build --cpu .*--out model\.pack", told)
    assert fix is not None
    subprocess.run(["bash", "-c", fix[0]], check=True)
    right = run("model.pack")
    assert right.returncode == 0 and SERVES.format(Path(folder, "model.pack")) in right.stdout + right.stderr
