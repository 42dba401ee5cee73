"""Decode whose query heads are columns of its products (``rows`` 8), on a real GPU.

How operands lie and are turned is the compiler's, so that several schedules of each spec are drawn.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from random import Random

import pytest
import torch
from gpu.test_ahead_gpu import wrong_after_late_writes
from gpu.test_decode_grid import NAMES

from pagedgen.autotune.suites.decode_gpu import BF16, E4M3, E5M2, spec_of
from pagedgen.compiler.binary import Binary, Source
from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.link import link
from pagedgen.compiler.render import render
from pagedgen.compiler.space import feasible
from pagedgen.compiler.verify import gate
from pagedgen.errors import CompileError
from pagedgen.runtime.library import Library
from pagedgen.templates.triton.decode import TURNED
from pagedgen.values.spec import KernelSpec, KVScale
from pagedgen.values.target_table import target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (docs/gpu_tests.md)"),
]
DRAWN = 6  # schedules of a spec, beside such as look ahead and clusters
SPECS = (
    spec_of(lse=True),
    spec_of(kv=E4M3),
    spec_of(q=BF16, kv=E4M3, lse=True),  # rows of q scaled
    spec_of(128, (64, 8), 64, kv=E4M3),  # tiles inside a block
    spec_of(80, (40, 8), 1, q=BF16),  # head_dim in two pieces, an id a token
    spec_of(32, (8, 1), 544, kv=E5M2, scale=KVScale.HEAD, lse=True),
    spec_of(96, (32, 32)),
    replace(spec_of(256, (16, 8), q=BF16), logits_soft_cap=50.0),
    replace(spec_of(64, (64, 8), 64, q=BF16, kv=E4M3), sinks=True, window=700),
    replace(spec_of(lse=True), alibi=True, attention_chunk=300),
    replace(spec_of(192, (16, 16), q=BF16, lse=True), head_dim_v=128),
    replace(spec_of(64, (28, 4), kv=E4M3), head_dim_v=128),
    replace(spec_of(lse=True), batch_invariant=True),
)


def compiled(source: Source) -> Binary | None:
    try:
        return compile_source(source)
    except CompileError:  # too much shared memory
        return None


def sources_of(spec: KernelSpec) -> list[Source]:
    to = target(NAMES[torch.cuda.get_device_capability()])
    turned = [s for s in feasible(spec, to) if s["rows"] == TURNED]
    ahead = [s for s in turned if s["pdl"] == 2]
    draw = Random(spec.name)
    drawn = [*draw.sample(turned, DRAWN), *draw.sample(ahead, min(2, len(ahead)))]
    return [render(spec, to, schedule) for schedule in drawn]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_it_passes_the_gate(spec, tmp_path):
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        mine = [binary for binary in pool.map(compiled, sources_of(spec)) if binary is not None]
    assert len(mine) >= 3
    library = Library(link(mine, (), tmp_path / "kernel.so"))
    for variant, binary in enumerate(mine):
        verdict = gate(library, spec, variant, "cuda", 5)
        assert verdict.passed, (binary.source.schedule.name, verdict)
        if binary.source.schedule["pdl"] == 2:
            assert wrong_after_late_writes(spec, library, variant=variant) == []
