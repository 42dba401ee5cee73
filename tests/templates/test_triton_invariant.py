"""Batch invariance, bit for bit, over random batches in Triton's interpreter; tests/gpu uses one.

200 batches of decode, each with waves of its own, and 200 of extend; 20 of what their masks change.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # in every run the fuzzer interprets kernels of the family

CASES = {
    "decode-lse-sinks": ({"heads": (2, 1), "lse": True, "sinks": True}, {}, 200),
    "decode-window": ({"heads": (2, 1), "window": 100, "block_size": 8}, {"max_parts": 2}, 20),
    "decode-turned-alibi": ({"heads": (2, 1), "alibi": True}, {"rows": 8, "sums": "dot"}, 20),
    "extend": ({"op": "extend", "heads": (3, 1), "lse": True}, {}, 200),
    "extend-chunks-window": (
        {"op": "extend", "heads": (2, 1), "window": 20, "attention_chunk": 24, "alibi": True},
        {},
        20,
    ),
}


def bits(case) -> subprocess.CompletedProcess[str]:
    """A process of its own: TRITON_INTERPRET is read when Triton is imported."""
    return subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interpreted_invariant.py")), repr(case)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize("name", CASES)
def test_bits_do_not_follow_from_the_batch(name):
    spec, choices, batches = CASES[name]
    run = bits((spec, choices, batches))
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{batches} batches, the same bits" in run.stdout


def test_shares_that_follow_from_the_batch_are_found_out():
    run = bits(({"heads": (2, 1)}, {"split": "even"}, 20))
    assert run.returncode == 1 and "differ from those it has alone" in run.stdout, run.stderr
