"""The gate on an interpreted verify kernel: ``interpreted_verify.py '(spec_args, choices, extra_seqs)'``.

``extra_seqs`` more sequences of one token each make the batch larger than the lanes that scan it.
"""

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
from pagedgen.values.schedule import Schedule
from pagedgen.values.target import Target

HOST = Target("interpreter", "cuda", "sm_90", 4, fp8_convert=True)


class Interpreted:
    """The library ABI over an interpreted kernel: what the generated launcher does, in Python."""

    def __init__(self, spec, schedule, folder):
        self.spec, self.tile_m = spec, schedule.int("tile_m")
        self.partitions = max(1, -(-HOST.num_sms * schedule.int("waves") // spec.num_kv_heads))
        self.slots = 2 * self.partitions * spec.num_kv_heads
        self.kernel = load_source(render(spec, HOST, schedule).text, folder).paged_verify

    def workspace_bytes(self, num_seqs):
        return self.slots * (self.tile_m * (self.spec.v_dim + 1) + 1) * 4

    def verify(
        self, q, k, v, table, lens, cu_seqlens_q, out, lse, scale, k_scale, v_scale, workspace, max_seq_len,
        variant, *extras,
    ):  # fmt: skip
        spec, num_seqs = self.spec, len(lens)
        if spec.kv_dtype.is_fp8:
            k, v = k.view(torch.uint8), v.view(torch.uint8)
        arguments = [q, k, v, table, lens, cu_seqlens_q, out]
        arguments += [lse] if spec.return_lse else []
        arguments += [k_scale, v_scale] if k_scale is not None else []
        parts = self.slots * self.tile_m
        partials = workspace.view(torch.float32).split([parts, parts * spec.v_dim, self.slots])
        assert not partials[2].any(), "counters are zero between calls"
        arguments += [*extras, partials[1], partials[0], partials[2].view(torch.int32)]
        arguments += [scale * math.log2(math.e), num_seqs, self.partitions]
        arguments += [q.stride(0), q.stride(1), out.stride(0), out.stride(1)]
        arguments += [*k.stride()[:3], *v.stride()[:3], table.stride(0)]
        tiles = q.shape[0] * spec.group_size // self.tile_m + num_seqs
        self.kernel[((self.partitions + tiles) * spec.num_kv_heads,)](*arguments)


def main() -> int:
    conftest_path = Path(__file__).parents[1] / "conftest.py"
    loaded = importlib.util.spec_from_file_location("conftest", conftest_path)
    conftest = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(conftest)
    spec_args, choices, extra = ast.literal_eval(sys.argv[1])
    base = {
        "tile_m": 32,
        "tile": 64,
        "num_warps": 4,
        "num_stages": 3,
        "waves": 2,
        "merge": 32,
        "seq_lanes": 128,
        "fp8_decode": "none",
    }
    schedule = Schedule.of("triton-verify", **(base | choices))
    spec = conftest.make_spec(op="verify", **spec_args)
    block, window = spec.block_size, spec.window or spec.attention_chunk or 40
    # An interpreted operation costs about 50 us, so these are the gate's cases in small.
    edges = (1, max(1, block - 1), block, block + 1, 0, 77)
    ones = (1,) * extra
    cases = [
        Case(edges + ones, "nhd", query_lens=tuple(min(n, 5) for n in edges) + ones),
        Case((900, 0, 64, 9, 600), "hnd", spec.kv_dtype.is_fp8, query_lens=(64, 0, 64, 1, 3)),
        Case((window + 333, window), "packed", query_lens=(17, min(window, 9))),
    ]
    with tempfile.TemporaryDirectory() as folder:
        verdict = gate(
            Interpreted(spec, schedule, Path(folder)), spec, 0, "cpu", int(time.time()), cases=cases
        )
    print(spec.name, verdict)
    return 0 if verdict.passed else 1


if __name__ == "__main__":
    sys.exit(main())
