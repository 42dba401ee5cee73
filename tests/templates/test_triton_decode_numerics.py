"""The Triton template's mathematics, on the CPU through Triton's interpreter and the whole gate.

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
    "gqa": ({"heads": (4, 1), "head_dim": 64}, {"tile": 64}),
    "block8-h80-lse": ({"heads": (5, 1), "head_dim": 80, "block_size": 8, "lse": True}, {"tile": 32}),
    "token-slots": ({"heads": (7, 1), "head_dim": 96, "block_size": 1}, {"sums": "dot"}),
    "mqa-block544": ({"heads": (71, 1), "head_dim": 32, "block_size": 544}, {"tile": 32}),
    "e4m3-heads": (
        {"heads": (2, 2), "head_dim": 40, "block_size": 64, "kv": "fp8_e4m3", "scale": "head", "lse": True},
        {"fp8_decode": "plain"},
    ),
    "even-lse": (
        {"heads": (10, 2), "head_dim": 80, "block_size": 8, "lse": True},
        {"tile": 32, "split": "even"},
    ),
    "even-e4m3": (
        {"heads": (4, 2), "head_dim": 64, "block_size": 64, "kv": "fp8_e4m3"},
        {"fp8_decode": "plain", "split": "even"},
    ),
    "window": ({"heads": (4, 2), "head_dim": 64, "window": 70, "lse": True}, {"tile": 32}),
    "window-even-sinks": (
        {"heads": (4, 1), "head_dim": 64, "block_size": 8, "window": 300, "sinks": True, "lse": True},
        {"tile": 32, "split": "even", "sums": "dot"},
    ),
    "window1": ({"heads": (2, 1), "head_dim": 32, "block_size": 1, "window": 1}, {"tile": 16}),
    "soft-cap-sinks-e4m3": (
        {
            "heads": (4, 2),
            "head_dim": 64,
            "kv": "fp8_e4m3",
            "logits_soft_cap": 30.0,
            "sinks": True,
            "lse": True,
        },
        {"fp8_decode": "plain", "sums": "dot"},
    ),
    "walk": ({"heads": (4, 1), "head_dim": 64, "lse": True}, {"split": "walk", "tile": 32}),
    "walk-window": ({"heads": (2, 1), "head_dim": 32, "window": 90}, {"split": "walk", "tile": 16}),
    "rows-for-wgmma": ({"heads": (20, 1), "head_dim": 64}, {"rows": 64, "sums": "dot"}),
    "alibi-cap-h96-of-v40": (
        {
            "heads": (7, 1), "head_dim": 96, "head_dim_v": 40, "alibi": True, "logits_soft_cap": 30.0,
            "lse": True,
        },
        {"tile": 32, "split": "even"},
    ),
    "chunk-alibi-e4m3-h64-of-v80": (
        {
            "heads": (4, 2), "head_dim": 64, "head_dim_v": 80, "kv": "fp8_e4m3", "attention_chunk": 130,
            "alibi": True,
        },
        {"tile": 32, "fp8_decode": "plain", "sums": "dot"},
    ),
    "chunk-window-even": (
        {"heads": (2, 1), "head_dim": 32, "attention_chunk": 200, "window": 90, "sinks": True},
        {"tile": 16, "split": "even"},
    ),
    "turned": ({"heads": (4, 1), "head_dim": 64}, {"rows": 8, "tile": 64}),
    "turned-h80-lse-one-warp": (
        {"heads": (5, 1), "head_dim": 80, "block_size": 8, "lse": True},
        {"rows": 8, "tile": 32, "sums": "dot", "num_warps": 1},
    ),
    "turned-walk-token-slots": (
        {"heads": (7, 1), "head_dim": 96, "block_size": 1, "sinks": True, "window": 300},
        {"rows": 8, "tile": 32, "split": "walk", "columns": "whole"},
    ),
    "turned-soft-cap-sinks-e4m3": (
        {
            "heads": (4, 2),
            "head_dim": 64,
            "kv": "fp8_e4m3",
            "scale": "head",
            "logits_soft_cap": 30.0,
            "sinks": True,
            "lse": True,
        },
        {"rows": 8, "fp8_decode": "plain", "sums": "dot", "num_warps": 2},
    ),
    "turned-even-chunk-alibi-e4m3-h64-of-v80": (
        {
            "heads": (8, 1), "head_dim": 64, "head_dim_v": 80, "kv": "fp8_e4m3", "attention_chunk": 130,
            "alibi": True,
        },
        {"rows": 8, "tile": 32, "fp8_decode": "plain", "split": "even", "num_warps": 1},
    ),
    "e5m2": ({"heads": (2, 1), "head_dim": 64, "block_size": 32, "kv": "fp8_e5m2"}, {"fp8_decode": "plain"}),
    "e4m3-block48": (
        {"heads": (4, 1), "head_dim": 72, "block_size": 48, "kv": "fp8_e4m3"},
        {"fp8_decode": "plain", "columns": "whole", "sums": "dot"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel_passes_the_gate(name):
    """A process of its own: TRITON_INTERPRET is read when Triton is imported."""
    spec_args, choices = CASES[name]
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interpreted_gate.py")), repr((spec_args, choices))],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "passed=True" in run.stdout
