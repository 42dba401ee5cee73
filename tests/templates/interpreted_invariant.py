"""Bits of an interpreted kernel in batches: ``interpreted_invariant.py '(spec_args, choices, batches)'``.

The interpreter's matrix products are numpy's, whose last bits depend on where in the matrix a row lies; a
GPU's don't, and here they are summed in one order.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import sys
import tempfile
from pathlib import Path

import interpreted_extend
import interpreted_gate
import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from pagedgen.compiler.verify_invariant import changed_bits
from pagedgen.values.schedule import Schedule

LENS = {"decode": (1, 16, 70, 150), "extend": (1, 17, 40)}
BASES = {
    "decode": {
        "columns": "pieces", "tile": 32, "num_warps": 4, "num_stages": 3, "waves": 4, "seq_lanes": 128,
        "split": "fixed", "part": 64, "max_parts": 4, "merge": 32, "pdl": 0, "sums": "reduce", "max_regs": 0,
        "rows": 16, "fp8_decode": "none",
    },
    "extend": {
        "tile_m": 32, "tile": 32, "num_warps": 2, "num_stages": 3, "ids": "page", "prefetch_ids": 1,
        "seq_lanes": 32, "fp8_decode": "none",
    },
}  # fmt: skip


def create_dot(self, a, b, d, *_):
    """``a @ b + d`` in float32, the products added one after the other."""
    out = d.data.astype(np.float32)
    left, right = a.data.astype(np.float32), b.data.astype(np.float32)
    for k in range(left.shape[1]):
        out = out + left[:, k, None] * right[None, k, :]
    return TensorHandle(out, d.dtype.scalar)


class AnyWaves:
    """Calls of a decode kernel with a batch's own waves: how many parts a program takes changes no bit."""

    def __init__(self, callee):
        self.callee, self.draw = callee, random.Random(1)
        self.workspace_bytes = callee.workspace_bytes

    def decode(self, *arguments):
        interpreted_gate.PARTITIONS = self.draw.choice((1, 3, 6))
        self.callee.decode(*arguments)


def main() -> int:
    spec_args, choices, batches = ast.literal_eval(sys.argv[1])
    InterpreterBuilder.create_dot = create_dot
    conftest_path = Path(__file__).parents[1] / "conftest.py"
    loaded = importlib.util.spec_from_file_location("conftest", conftest_path)
    conftest = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(conftest)
    spec = conftest.make_spec(**{"head_dim": 32, "batch_invariant": True, **spec_args})
    schedule = Schedule.of(f"triton-{spec.op}", **(BASES[spec.op] | choices))
    interpreted = interpreted_gate if spec.op == "decode" else interpreted_extend
    with tempfile.TemporaryDirectory() as folder:
        callee = interpreted.Interpreted(spec, schedule, Path(folder))
        if spec.op == "decode":
            callee = AnyWaves(callee)
        changed = changed_bits(spec, callee, 0, torch.device("cpu"), 11, lens=LENS[spec.op], batches=batches)
    print(changed or f"{batches} batches, the same bits")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
