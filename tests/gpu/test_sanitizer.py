"""Kernels of every family under compute-sanitizer: nothing out of bounds, no race in shared memory."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz.draw import ops_for

from pagedgen.values.target_table import gpu_target

TOOL = shutil.which("compute-sanitizer")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (docs/gpu_tests.md)"),
    pytest.mark.skipif(TOOL is None, reason="needs compute-sanitizer, of the CUDA toolkit"),
]
SCRIPT = Path(__file__).with_name("sanitized.py")


@pytest.fixture(scope="session")
def libraries(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sanitized")
    subprocess.run([sys.executable, str(SCRIPT), "build", str(folder)], check=True, timeout=600)
    return folder


def sanitized(tool: str, what: str, folder: Path) -> str:
    """What the sanitizer and the script print; only our kernels are watched."""
    assert TOOL is not None
    watched = ("--kernel-name", "kns=paged_", "--target-processes", "application-only")
    command = [TOOL, "--tool", tool, *watched, sys.executable, str(SCRIPT), what, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    return done.stdout + done.stderr


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_every_family_is_clean(libraries, tool):
    text = sanitized(tool, "run", libraries)
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors|hazards)", text)
    assert summaries == ["0"], text[-4000:]
    names = [line.split()[1] for line in text.splitlines() if line.startswith("passed ")]
    assert {name.split("-")[0] for name in names} == set(ops_for(gpu_target())), text[-4000:]
    assert "Verdict(" not in text


def test_what_is_planted_is_found(libraries):
    text = sanitized("memcheck", "plant", libraries)
    assert re.search(r"ERROR SUMMARY: [1-9]\d* error", text), text[-4000:]
    assert "Invalid __global__ read" in text and "paged_decode" in text, text[-4000:]
