"""docs/examples/decode.cc: a pack from C++, built by the command in its head and run without Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pagedgen.compiler.build import build

SOURCE = Path(__file__).parents[2] / "docs" / "examples" / "decode.cc"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("example")
    (command,) = re.findall(r"^//   (c\+\+ .*)$", SOURCE.read_text(encoding="utf-8"), re.MULTILINE)
    shutil.copy(SOURCE, folder)
    tools = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # tvm-ffi-config
    run = subprocess.run(
        command, shell=True, cwd=folder, env=tools, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return folder / "decode"


def decode(program, pack):
    """In an empty environment: nothing is found by a path to Python."""
    return subprocess.run([program, pack], env={}, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("k_inner", ["dim", "token"])
def test_the_example_decodes(program, cpu_choice, make_spec, tmp_path, k_inner):
    specs = [make_spec(64, (8, 2), 16, "f32", lse=True), make_spec(64, (8, 2), 16, "f32", k_inner=k_inner)]
    pack = build([cpu_choice(spec) for spec in specs], tmp_path / "cpu.pack")
    run = decode(program, pack)
    assert run.returncode == 0, run.stderr
    first, second = run.stdout.splitlines()
    assert re.fullmatch(
        rf"{re.escape(str(pack))}/lib/{specs[1].name}\.so: largest error \d\.\de-0[78]", first
    )
    assert second == "pagedgen.ArgumentError: max_seq_len = -1: at least 0 is allowed"


def test_no_python_is_linked_and_what_is_no_pack_is_named(program, tmp_path):
    linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    assert "libtvm_ffi.so" in linked and "libpython" not in linked
    run = decode(program, tmp_path)
    assert (run.returncode, run.stderr.strip()) == (1, f"{tmp_path} holds no manifest.json")
