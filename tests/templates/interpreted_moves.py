"""The gate on interpreted kernels that move K and V: ``interpreted_moves.py '[spec_args, …]'``."""

from __future__ import annotations

import ast
import importlib.util
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from triton.runtime import interpreter

from pagedgen.compiler.render import render
from pagedgen.compiler.space import default_schedule
from pagedgen.compiler.triton import load_source
from pagedgen.compiler.verify import gate
from pagedgen.values.target import Target

HOST = Target("interpreter", "cuda", "sm_80", 4)  # no inline assembly


def fused(self, x, y, z):
    """x * y + z rounded once, as GPUs do: products of float32 are exact in float64. Triton's rounds twice."""
    found = (x.data.astype(np.float64) * y.data + z.data).astype(z.data.dtype)
    return interpreter.TensorHandle(found, z.dtype.scalar)


interpreter.InterpreterBuilder.create_fma = fused


def as_bytes(tensor):
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


class Interpreted:
    """The library ABI over an interpreted kernel: what the generated launcher does, in Python."""

    def __init__(self, spec, schedule, folder):
        self.spec, self.tile_m = spec, schedule.int("tile_m")
        self.kernel = getattr(load_source(render(spec, HOST, schedule).text, folder), f"paged_{spec.op}")

    def write_kv(self, rows_k, rows_v, slots, k, v, k_scale, v_scale, variant, *turns):
        rows_k, rows_v, k, v = map(as_bytes, (rows_k, rows_v, k, v))
        scales = [] if k_scale is None else [k_scale, v_scale]
        strides = [*rows_k.stride()[:2], *rows_v.stride()[:2], *k.stride()[:3], *v.stride()[:3]]
        rows = len(rows_k) * self.spec.num_kv_heads
        if self.spec.checked:
            turns = (*turns, len(k) * self.spec.block_size)
        grid = (-(-rows // self.tile_m),)
        self.kernel[grid](rows_k, rows_v, slots, k, v, *scales, *turns, len(rows_k), *strides)

    gather = write_kv

    def kv_scales(self, new_k, new_v, slots, k_scale, v_scale, variant):
        strides = [*new_k.stride()[:2], *new_v.stride()[:2]]
        self.kernel[(2 * len(k_scale),)](new_k, new_v, slots, k_scale, v_scale, len(new_k), *strides)

    def merge(self, outs, lses, out, lse, variant, *sinks):
        strides = [*outs.stride()[:3], *lses.stride(), *out.stride()[:2]]
        grid = (-(-out.shape[0] * out.shape[1] // self.tile_m),)
        self.kernel[grid](outs, lses, out, lse, *sinks, len(outs), len(out), *strides)

    def copy_blocks(self, src_origin, dst_origin, src, dst, pairs, page_bytes, variant):
        here = torch.zeros(4, dtype=torch.int32)  # the interpreter takes no bare address: all count from this
        src, dst = (
            table + torch.tensor([origin - here.data_ptr(), 0, 0])
            for table, origin in ((src, src_origin), (dst, dst_origin))
        )
        chunks = -(-page_bytes // (self.tile_m * self.spec.page_align))
        self.kernel[(len(pairs) * len(src) * chunks,)](here, here, src, dst, pairs, len(src), chunks)


def main() -> int:
    conftest_path = Path(__file__).parents[1] / "conftest.py"
    loaded = importlib.util.spec_from_file_location("conftest", conftest_path)
    conftest = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(conftest)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for spec_args in ast.literal_eval(sys.argv[1]):
            spec = conftest.make_spec(**spec_args)
            callee = Interpreted(spec, default_schedule(spec, HOST), Path(folder))
            verdict = gate(callee, spec, 0, "cpu", 5)
            print(spec.name, verdict)
            failed += not verdict.passed
    return failed


if __name__ == "__main__":
    sys.exit(main())
