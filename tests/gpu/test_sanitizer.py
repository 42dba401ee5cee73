"""Kernels of every family under compute-sanitizer: nothing out of bounds, no race in shared memory.

A family and a tool a test, so that several can run side by side: ``-k "decode and memcheck"``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from gpu.sanitized import schedules, specs

from pagedgen.compiler.families import MODULES
from pagedgen.values.spec import Op
from pagedgen.values.target_table import gpu_target

TOOL = shutil.which("compute-sanitizer")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (docs/gpu_tests.md)"),
    pytest.mark.skipif(TOOL is None, reason="needs compute-sanitizer, of the CUDA toolkit"),
]
SCRIPT = Path(__file__).with_name("sanitized.py")


@pytest.fixture(scope="session")
def libraries(tmp_path_factory) -> Callable[[Op], Path]:
    """The folder of a family's kernels, compiled once a session."""

    @cache
    def build(op: Op) -> Path:
        folder = tmp_path_factory.mktemp(f"sanitized-{op}")
        subprocess.run([sys.executable, str(SCRIPT), "build", str(folder), op], check=True, timeout=600)
        return folder

    return build


def sanitized(tool: str, what: str, folder: Path, op: Op) -> str:
    """What the sanitizer and the script print; only our kernels are watched."""
    assert TOOL is not None
    watched = ("--kernel-name", "kns=paged_", "--target-processes", "application-only")
    command = [TOOL, "--tool", tool, *watched, sys.executable, str(SCRIPT), what, str(folder), op]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    return done.stdout + done.stderr


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
@pytest.mark.parametrize("op", [op for kind, op in MODULES if kind == "cuda"])
def test_every_family_is_clean(libraries, op, tool):
    text = sanitized(tool, "run", libraries(op), op)
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors|hazards)", text)
    assert summaries == ["0"], text[-4000:]
    to = gpu_target()
    kernels = [f"{spec.name} {schedule.name}" for spec in specs(op, to) for schedule in schedules(spec, to)]
    passed = [line.removeprefix("passed ") for line in text.splitlines() if line.startswith("passed ")]
    assert passed == kernels, text[-4000:]
    if op is Op.DECODE:
        assert any("pdl2" in kernel for kernel in kernels) == (to.capability >= 90)


def test_what_is_planted_is_found(libraries):
    text = sanitized("memcheck", "plant", libraries(Op.DECODE), Op.DECODE)
    assert re.search(r"ERROR SUMMARY: [1-9]\d* error", text), text[-4000:]
    assert "Invalid __global__ read" in text and "paged_decode" in text, text[-4000:]
