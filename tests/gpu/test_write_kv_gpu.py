"""write_kv kernels on a real GPU: formats, scales and shapes through the gate, eager and captured."""

from __future__ import annotations

import pytest
import torch

from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.link import link
from pagedgen.compiler.render import render
from pagedgen.compiler.space import default_schedule, feasible
from pagedgen.compiler.verify import gate
from pagedgen.runtime.library import Library
from pagedgen.values.spec import DType, KernelSpec, KVScale, Op
from pagedgen.values.target_table import target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (docs/gpu_tests.md)"),
]
NAMES = {(8, 0): "a100", (8, 9): "l40s", (9, 0): "h100", (10, 0): "b200"}
F16, BF16, F32, E4M3, E5M2 = DType.F16, DType.BF16, DType.F32, DType.FP8_E4M3, DType.FP8_E5M2
SPECS = tuple(
    KernelSpec(Op.WRITE_KV, head_dim, heads, heads, block_size, q, kv or q, scale if kv else KVScale.NONE)
    for head_dim, heads, block_size in ((128, 8, 16), (80, 3, 1), (256, 1, 64), (40, 32, 544))
    for q, kv, scale in (
        (F16, None, KVScale.NONE),
        (BF16, None, KVScale.NONE),
        (F16, E4M3, KVScale.TENSOR),
        (BF16, E4M3, KVScale.HEAD),
        (BF16, E5M2, KVScale.TENSOR),
        (F32, E5M2, KVScale.HEAD),
    )
)


def captured(call):
    """The same call, captured in a CUDA graph and replayed."""

    def replay() -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        torch.cuda.synchronize()

    return replay


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_kernels_pass_the_gate(tmp_path, spec):
    to = target(NAMES[torch.cuda.get_device_capability()])
    schedules = (default_schedule(spec, to), feasible(spec, to)[0], feasible(spec, to)[-1])
    library = Library(link([compile_source(render(spec, to, s)) for s in schedules], (), tmp_path / "w.so"))
    library.prepare(0)
    for variant, schedule in enumerate(schedules):
        for wrap in (None, captured):
            verdict = gate(library, spec, variant, "cuda", 3, wrap=wrap)
            assert verdict.passed, (schedule.name, verdict)
