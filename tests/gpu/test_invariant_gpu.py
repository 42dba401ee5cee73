"""Batch-invariant kernels on a real GPU: the same bits over 200 random batches, eager and captured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu.test_decode_grid import NAMES, captured

from pagedgen.autotune.suites.decode_gpu import BF16, E4M3, spec_of
from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.link import link
from pagedgen.compiler.render import render
from pagedgen.compiler.space import default_schedule
from pagedgen.compiler.verify import gate
from pagedgen.compiler.verify_invariant import changed_bits
from pagedgen.runtime.library import Library
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import Causality, KernelSpec, Op
from pagedgen.values.target_table import target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (docs/gpu_tests.md)"),
]
BASES = (
    spec_of(lse=True),
    spec_of(q=BF16, kv=E4M3),
    spec_of(64, (71, 1), q=BF16, lse=True),
    replace(spec_of(kv=E4M3, block_size=64), window=700, sinks=True),
    replace(spec_of(192, (16, 16), q=BF16), head_dim_v=128, alibi=True),
)
DECODES = tuple(replace(spec, batch_invariant=True) for spec in BASES)
EXTENDS = tuple(replace(spec, op=Op.EXTEND) for spec in DECODES)
SPECS = (*DECODES, *EXTENDS, replace(EXTENDS[0], causality=Causality.PER_SEQUENCE))
# A free kernel's splits of the longest differ with what is beside it.
LENS = {Op.DECODE: (1, 16, 17, 333, 3000, 17000), Op.EXTEND: (1, 16, 17, 333, 700, 2100)}


def library_of(spec: KernelSpec, schedule: Schedule, folder) -> Library:
    to = target(NAMES[torch.cuda.get_device_capability()])
    return Library(link([compile_source(render(spec, to, schedule))], (), folder / "kernel.so"))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_bits_do_not_follow_from_the_batch(spec, tmp_path):
    to = target(NAMES[torch.cuda.get_device_capability()])
    library = library_of(spec, default_schedule(spec, to), tmp_path)
    verdict = gate(library, spec, 0, "cuda", 5)
    assert verdict.passed, verdict
    device = torch.device("cuda")
    assert changed_bits(spec, library, 0, device, 6, lens=LENS[spec.op], batches=200) == ""
    assert changed_bits(spec, library, 0, device, 7, lens=LENS[spec.op], batches=5, wrap=captured) == ""


def test_free_splits_are_found_out(tmp_path):
    """The free kernel of the first spec: the gate of its batch-invariant twin must refuse it."""
    free, spec = BASES[0], DECODES[0]
    to = target(NAMES[torch.cuda.get_device_capability()])
    library = library_of(free, default_schedule(free, to), tmp_path)
    assert gate(library, free, 0, "cuda", 5).passed
    verdict = gate(library, spec, 0, "cuda", 5)
    assert not verdict.passed and "differ from those it has alone" in verdict.reason


class AnyWaves:
    """A library of variants that differ in waves alone, each call by another of them."""

    def __init__(self, library: Library, variants: int) -> None:
        self.library, self.variants, self.calls = library, variants, 0
        self.workspace_bytes = library.workspace_bytes

    def decode(self, *arguments) -> None:
        called = list(arguments)
        called[12] = self.calls % self.variants  # of `variant`
        self.calls += 1
        self.library.decode(*called)


def test_waves_change_no_bit(tmp_path):
    """Variants of one kernel that a batch picks among."""
    spec, to = DECODES[0], target(NAMES[torch.cuda.get_device_capability()])
    default = dict(default_schedule(spec, to).choices)
    waves = (1, 2, 3, 6)
    binaries = [
        compile_source(render(spec, to, Schedule.of("triton-decode", **(default | {"waves": each}))))
        for each in waves
    ]
    callee = AnyWaves(Library(link(binaries, (), tmp_path / "kernel.so")), len(waves))
    changed = changed_bits(
        spec, callee, 0, torch.device("cuda"), 8, lens=(1, 16, 1024, 1025, 3000, 17000), batches=200
    )
    assert changed == "" and callee.calls > 200
