"""Run the gate on one interpreted Triton kernel: ``interpreted_gate.py '(spec_args, choices)'``."""

from __future__ import annotations

import ast
import importlib.util
import math
import sys
import tempfile
import time
from pathlib import Path

import torch

from pagedgen.compiler.render import render
from pagedgen.compiler.triton import load_source
from pagedgen.compiler.verify import Case, gate
from pagedgen.templates.triton.decode import block_h, head_blocks
from pagedgen.values.schedule import Schedule
from pagedgen.values.target import Target

PARTITIONS = 6
HOST = Target("interpreter", "cuda", "sm_90", 4, fp8_convert=True)


class Interpreted:
    """The library ABI over an interpreted kernel: what the generated launcher does, in Python."""

    def __init__(self, spec, schedule, folder):
        self.spec = spec
        self.kernel = load_source(render(spec, HOST, schedule).text, folder).paged_decode
        self.split, self.max_parts = schedule["split"], dict(schedule.choices).get("max_parts", 0)
        self.programs = spec.num_kv_heads * head_blocks(spec)
        self.counters = torch.zeros(self.programs * 256, dtype=torch.int32)

    def workspace_bytes(self, num_seqs):
        return 1

    def decode(
        self,
        q,
        k,
        v,
        table,
        lens,
        out,
        lse,
        scale,
        k_scale,
        v_scale,
        workspace,
        max_seq_len,
        variant,
        *extras,
    ):
        spec = self.spec
        grid = PARTITIONS if self.split == "even" else PARTITIONS + q.shape[0]
        slots = {"even": 2 * PARTITIONS, "fixed": self.max_parts * q.shape[0]}.get(self.split, grid)
        rows = min(block_h(spec), spec.group_size)
        partial = torch.full((self.programs, slots, rows, spec.v_dim), float("nan"))
        partial_lse = torch.full((self.programs, slots, rows), float("nan"))
        if spec.kv_dtype.is_fp8:
            k, v = k.view(torch.uint8), v.view(torch.uint8)
        arguments = [q, k, v, table, lens, out]
        arguments += [lse] if spec.return_lse else []
        arguments += [k_scale, v_scale] if k_scale is not None else []
        arguments += [
            *extras,
            partial,
            partial_lse,
            self.counters,
            scale * math.log2(math.e),
            q.shape[0],
            PARTITIONS,
        ]
        arguments += [q.stride(0), q.stride(1), out.stride(0), out.stride(1)]
        arguments += [
            k.stride(0),
            k.stride(1),
            k.stride(2),
            v.stride(0),
            v.stride(1),
            v.stride(2),
            table.stride(0),
        ]
        self.kernel[(grid * self.programs,)](*arguments)
        assert not self.counters.any(), "counters must be zero after a call"


def main() -> int:
    conftest_path = Path(__file__).parents[1] / "conftest.py"
    loaded = importlib.util.spec_from_file_location("conftest", conftest_path)
    conftest = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(conftest)
    spec_args, choices = ast.literal_eval(sys.argv[1])
    base = {
        "columns": "pieces",
        "tile": 64,
        "num_warps": 4,
        "num_stages": 3,
        "waves": 4,
        "seq_lanes": 128,
        "split": "pieces",
        "merge": 32,
        "pdl": 0,
        "sums": "reduce",
        "max_regs": 0,
    }
    spec = conftest.make_spec(**spec_args)
    base["rows"] = block_h(spec)
    schedule = Schedule.of("triton-decode", **(base | {"fp8_decode": "none"} | choices))
    block = spec.block_size
    # An interpreted operation costs about 50 us, so these are the gate's cases in small.
    cases = [
        Case((1, max(1, block - 1), block, block + 1, 0, 77), "nhd"),
        Case((900, 0, 131), "hnd", all_codes=spec.kv_dtype.is_fp8),
        Case((517,), "packed"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        verdict = gate(
            Interpreted(spec, schedule, Path(folder)),
            spec,
            0,
            "cpu",
            int(time.time()),
            cases=cases,
        )
    print(spec.name, verdict)
    return 0 if verdict.passed else 1


if __name__ == "__main__":
    sys.exit(main())
