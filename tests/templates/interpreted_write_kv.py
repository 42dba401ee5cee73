"""The gate on interpreted write_kv kernels: ``interpreted_write_kv.py '[spec_args, …]'``."""

from __future__ import annotations

import ast
import importlib.util
import sys
import tempfile
from pathlib import Path

import torch

from pagedgen.compiler.render import render
from pagedgen.compiler.space import default_schedule
from pagedgen.compiler.triton import load_source
from pagedgen.compiler.verify import gate
from pagedgen.values.target import Target

HOST = Target("interpreter", "cuda", "sm_90", 4, fp8_convert=True)


class Interpreted:
    """The library ABI over an interpreted kernel: what the generated launcher does, in Python."""

    def __init__(self, spec, schedule, folder):
        self.spec, self.tile_m = spec, schedule.int("tile_m")
        self.kernel = load_source(render(spec, HOST, schedule).text, folder).paged_write_kv

    def write_kv(self, new_k, new_v, slots, k, v, k_scale, v_scale, variant):
        if self.spec.kv_dtype.is_fp8:
            k, v = k.view(torch.uint8), v.view(torch.uint8)
        scales = [] if k_scale is None else [k_scale, v_scale]
        strides = [*new_k.stride()[:2], *new_v.stride()[:2], *k.stride()[:3], *v.stride()[:3]]
        rows = len(new_k) * self.spec.num_kv_heads
        self.kernel[(-(-rows // self.tile_m),)](new_k, new_v, slots, k, v, *scales, len(new_k), *strides)


def main() -> int:
    conftest_path = Path(__file__).parents[1] / "conftest.py"
    loaded = importlib.util.spec_from_file_location("conftest", conftest_path)
    conftest = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(conftest)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for spec_args in ast.literal_eval(sys.argv[1]):
            spec = conftest.make_spec(op="write_kv", **spec_args)
            callee = Interpreted(spec, default_schedule(spec, HOST), Path(folder))
            verdict = gate(callee, spec, 0, "cpu", 5)
            print(spec.name, verdict)
            failed += not verdict.passed
    return failed


if __name__ == "__main__":
    sys.exit(main())
