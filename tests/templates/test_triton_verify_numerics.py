"""The verify template's mathematics, on the CPU through Triton's interpreter and the gate.

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
    "gqa-lse": ({"heads": (4, 1), "head_dim": 64, "lse": True}, {}, 0),
    "many-seqs": ({"heads": (2, 1), "head_dim": 32}, {"tile_m": 16}, 130),
    "gqa7-h80-tree": (
        {"heads": (14, 2), "head_dim": 80, "block_size": 8, "tree_mask": True},
        {"tile": 32},
        0,
    ),
    "token-slots-tree": (
        {"heads": (3, 1), "head_dim": 96, "block_size": 1, "tree_mask": True, "lse": True},
        {"tile_m": 64, "waves": 4},
        0,
    ),
    "block544": ({"heads": (5, 1), "head_dim": 32, "block_size": 544}, {"tile": 32}, 0),
    "e4m3-heads-tree": (
        {
            "heads": (2, 2), "head_dim": 40, "block_size": 64, "kv": "fp8_e4m3", "scale": "head", "lse": True,
            "tree_mask": True, "logits_soft_cap": 30.0, "sinks": True,
        },
        {"fp8_decode": "plain"},
        0,
    ),
    "window-sinks": ({"heads": (4, 2), "head_dim": 64, "window": 70, "sinks": True}, {"tile": 32}, 0),
    "window1-lse": ({"heads": (2, 1), "head_dim": 64, "window": 1, "lse": True}, {"tile_m": 16}, 0),
    "alibi-tree": ({"heads": (4, 1), "head_dim": 64, "alibi": True, "tree_mask": True, "lse": True}, {}, 0),
    "chunk-per-sequence-h64-of-v48": (
        {
            "heads": (4, 2), "head_dim": 64, "head_dim_v": 48, "attention_chunk": 70,
            "causality": "per_sequence", "lse": True,
        },
        {},
        0,
    ),
    "all-masks-e5m2": (
        {
            "heads": (2, 1), "head_dim": 64, "kv": "fp8_e5m2",
            "window": 300, "logits_soft_cap": 50.0, "sinks": True, "lse": True,
        },
        {"tile": 16, "fp8_decode": "plain"},
        0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel_passes_the_gate(name):
    """A process of its own: TRITON_INTERPRET is read when Triton is imported."""
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interpreted_verify.py")), repr(CASES[name])],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "passed=True" in run.stdout
