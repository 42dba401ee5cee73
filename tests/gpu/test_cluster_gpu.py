"""Decode merged within clusters (``split`` cluster), on a real GPU: its assembly runs nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu.test_ahead_gpu import wrong_after_late_writes
from gpu.test_decode_grid import NAMES, captured

from pagedgen.autotune.suites.decode_gpu import BF16, E4M3, spec_of
from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.link import link
from pagedgen.compiler.render import render
from pagedgen.compiler.space import default_schedule, is_legal
from pagedgen.compiler.verify import gate, make_inputs, run_case
from pagedgen.runtime.library import Library
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target_table import target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (docs/gpu_tests.md)"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
        reason="thread block clusters came with sm_90",
    ),
]
SPECS = (
    spec_of(lse=True),
    spec_of(q=BF16, kv=E4M3),  # rows of q scaled
    spec_of(heads=(64, 8), block_size=64, kv=E4M3),  # tiles inside a block
    spec_of(80, (40, 8), 1, q=BF16),  # head_dim in two pieces, an id a token
    spec_of(heads=(32, 2), block_size=544, kv=E4M3, lse=True),
    replace(spec_of(block_size=64, kv=E4M3), window=700, sinks=True),
    replace(spec_of(lse=True), alibi=True, logits_soft_cap=30.0),
)


def schedules(spec: KernelSpec) -> tuple[Schedule, ...]:
    """Merged in a cluster, ``pdl`` 1 and 2; and the default."""
    to = target(NAMES[torch.cuda.get_device_capability()])
    default = default_schedule(spec, to)
    fields = {"split": "cluster", "waves": 1, "merge": 32, "tile": 64, "num_warps": 2, "num_stages": 3}
    choices = dict(default.choices) | fields
    found = tuple(Schedule.of(default.template, **(choices | {"pdl": pdl})) for pdl in (1, 2))
    assert all(is_legal(spec, to, schedule) for schedule in found)
    return (*found, default)


def library_of(spec: KernelSpec, folder) -> Library:
    """One library of all: what the launcher does with a variant is the variant's own."""
    to = target(NAMES[torch.cuda.get_device_capability()])
    binaries = [compile_source(render(spec, to, schedule)) for schedule in schedules(spec)]
    return Library(link(binaries, (), folder / "kernel.so"))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_it_passes_the_gate_and_relies_on_nothing_it_read_too_early(spec, tmp_path):
    library = library_of(spec, tmp_path)
    for variant in range(2):
        verdict = gate(library, spec, variant, "cuda", 5)
        assert verdict.passed, (variant, verdict)
    assert wrong_after_late_writes(spec, library, variant=1) == []


def test_calls_in_a_row_in_a_graph_give_the_same_bits_each(tmp_path):
    spec = SPECS[0]
    library = library_of(spec, tmp_path)
    lens = ((8192,), (700, 1, 0, 5000), (3,), tuple(range(1, 300)))
    batches = [make_inputs(spec, each, "cuda", 3, pool="nhd") for each in lens]
    workspace = torch.zeros(library.workspace_bytes(299), dtype=torch.uint8, device="cuda")
    for variant in (1, 2, 0):  # what the default leaves in the workspace, a cluster has no use for
        expected = []
        for inputs in batches:
            inputs.out.zero_()
            run_case(spec, library, variant, inputs, workspace)
            expected.append(inputs.out.clone())

        def all_of_them(variant: int = variant) -> None:
            for _ in range(20):
                for inputs in batches:
                    run_case(spec, library, variant, inputs, workspace)

        for inputs in batches:
            inputs.out.zero_()
        captured(all_of_them)()
        for inputs, out in zip(batches, expected, strict=True):
            assert torch.equal(inputs.out, out)
