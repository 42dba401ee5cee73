"""The quick starts of docs/serving.md run as printed; the pack is built by the page's command."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from integrations.serving_page import block, commands
from integrations.tiny_models import write
from typer.testing import CliRunner

from pagedgen.autotune.device import ABSENT
from pagedgen.cli.app import app


def pagedgen_commands():
    """Of the page's first section, in words."""
    return [line.split()[1:] for line in commands("A pack to serve with") if line.startswith("pagedgen ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """my-model, a tiny Llama, and model.pack, built for this machine's processor by the page's command."""
    pytest.importorskip("tvm")
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("page")
    write("llama", folder / "my-model")
    build, inspect = pagedgen_commands()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PAGEDGEN_CACHE_DIR", str(folder / "cache"))
        patch.setattr("pagedgen.cli.build.device_of", lambda target: ABSENT)  # the gate takes half a minute
        here = {"h100": None, "--gpu": "--cpu", "llama-3-8b": "my-model", "llama-3-8b.pack": "model.pack"}
        for command in (build, inspect):
            words = [word for word in (here.get(word, word) for word in command) if word]
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 0, result.output
    assert "extend-h32-q4-kv2-b16-f32-ktoken" in result.output
    return folder


def test_the_page_has_its_commands():
    assert [command[0] for command in pagedgen_commands()] == ["build", "inspect"]


def test_the_commands_are_taken_as_printed(monkeypatch):
    """For the GPU that they name, without the minutes of compiling."""
    built = []
    monkeypatch.setattr("pagedgen.cli.build.write", lambda target, parts, *_, **__: built.extend(parts))
    monkeypatch.setattr("pagedgen.cli.build.report", lambda *_, **__: None)
    monkeypatch.setattr("pagedgen.cli.build.check_place", lambda place: None)
    result = CliRunner().invoke(app, pagedgen_commands()[0])
    assert result.exit_code == 0, result.output
    shape = "h128-q32-kv8-b16-bf16"
    assert [part.spec.name for part in built] == [
        f"decode-{shape}", f"extend-{shape}", "write_kv-h128-kv8-b16-bf16"
    ]  # fmt: skip


def test_pytorch(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    names: dict[str, object] = {}
    exec(block("PyTorch"), names)
    spec = next(s for s in names["attention"].specs if s.op == "decode")
    blocks, size, heads, dim = 4, spec.block_size, spec.num_kv_heads, spec.head_dim
    k = torch.zeros(blocks, heads, dim, size).permute(0, 3, 1, 2)  # along tokens, as this pack has it
    v = torch.zeros(blocks, size, heads, dim)
    q, new_k, new_v = (torch.randn(1, n, dim) for n in (spec.num_q_heads, heads, heads))
    table, lens = torch.tensor([[2, 0]], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    out = names["step"](q, new_k, new_v, torch.tensor([2 * size]), k, v, table, lens)
    assert torch.equal(v[2, 0], new_v[0]) and torch.equal(k[2, 0], new_k[0])
    assert torch.allclose(out[0], new_v[0].repeat_interleave(spec.group_size, 0))  # one token: its value


def test_transformers(folder, monkeypatch):
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    exec(block("Transformers"), names)
    made = [output.generated_tokens for output in names["outputs"].values()]
    assert made[0] == names["tokens"][0, 3:].tolist() and len(made) == 2 and all(made)
