"""The extend template's mathematics, on the CPU through Triton's interpreter and the gate.

The interpreter computes bfloat16 wrongly and has no inline assembly, so these run float16 with FP8 decoded in
plain Triton; bfloat16 and the assembly are proved on a GPU (docs/gpu_tests.md).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # in every run the fuzzer interprets kernels of the family

CASES = {
    "gqa": ({"heads": (4, 1), "head_dim": 64}, {}, 40),
    "gqa7-h80-lse": ({"heads": (14, 2), "head_dim": 80, "block_size": 8, "lse": True}, {"tile": 32}, 0),
    "token-slots": (
        {"heads": (3, 1), "head_dim": 96, "block_size": 1},
        {"ids": "gather", "prefetch_ids": 0},
        0,
    ),
    "mqa-block544": ({"heads": (71, 1), "head_dim": 32, "block_size": 544}, {"tile": 32, "ids": "scalar"}, 0),
    "e4m3-heads": (
        {"heads": (2, 2), "head_dim": 40, "block_size": 64, "kv": "fp8_e4m3", "scale": "head", "lse": True},
        {"ids": "scalar", "fp8_decode": "plain"},
        0,
    ),
    "e5m2-block48": (
        {"heads": (2, 1), "head_dim": 72, "block_size": 48, "kv": "fp8_e5m2"},
        {"ids": "gather", "fp8_decode": "plain", "tile_m": 32},
        0,
    ),
    "window": ({"heads": (4, 2), "head_dim": 64, "window": 70, "lse": True}, {"tile": 32, "tile_m": 32}, 0),
    "window1": ({"heads": (2, 1), "head_dim": 64, "window": 1}, {"tile": 64}, 0),
    "window-page8": (
        {"heads": (2, 1), "head_dim": 64, "block_size": 8, "window": 200, "sinks": True, "lse": True},
        {"tile": 16, "prefetch_ids": 0},
        0,
    ),
    "soft-cap": ({"heads": (4, 1), "head_dim": 64, "logits_soft_cap": 30.0, "lse": True}, {}, 0),
    "alibi-h96-of-v40": (
        {"heads": (7, 1), "head_dim": 96, "head_dim_v": 40, "alibi": True, "lse": True},
        {"tile": 32, "tile_m": 32},
        0,
    ),
    "chunk-alibi-cap": (
        {"heads": (4, 2), "head_dim": 64, "attention_chunk": 50, "alibi": True, "logits_soft_cap": 30.0},
        {"tile": 32, "tile_m": 32},
        0,
    ),
    "full-window-alibi": (
        {"heads": (2, 1), "head_dim": 64, "causality": "full", "window": 30, "alibi": True, "lse": True},
        {"tile": 32, "tile_m": 32},
        0,
    ),
    "full": ({"heads": (2, 1), "head_dim": 64, "causality": "full", "sinks": True}, {"tile_m": 32}, 40),
    "per-sequence-chunk-e4m3-h64-of-v128": (
        {
            "heads": (2, 1), "head_dim": 64, "head_dim_v": 128, "kv": "fp8_e4m3",
            "causality": "per_sequence", "attention_chunk": 50,
        },
        {"tile": 16, "tile_m": 32, "fp8_decode": "plain"},
        40,
    ),
    "all-masks-e4m3": (
        {
            "heads": (2, 1), "head_dim": 64, "kv": "fp8_e4m3",
            "window": 50, "logits_soft_cap": 50.0, "sinks": True, "lse": True,
        },
        {"tile": 32, "fp8_decode": "plain"},
        0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel_passes_the_gate(name):
    """A process of its own: TRITON_INTERPRET is read when Triton is imported."""
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interpreted_extend.py")), repr(CASES[name])],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "passed=True" in run.stdout
