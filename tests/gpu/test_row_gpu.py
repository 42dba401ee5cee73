"""The gate's calls in a row on a real GPU: what overlaps passes, what does not wait is caught."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu.test_decode_grid import NAMES

from pagedgen.autotune.suites.decode_gpu import BF16, E4M3, spec_of
from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.families import family_for
from pagedgen.compiler.link import link
from pagedgen.compiler.render import render
from pagedgen.compiler.space import default_schedule, is_legal
from pagedgen.compiler.verify import gate
from pagedgen.runtime.library import Library
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec, Op
from pagedgen.values.target_table import target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (docs/gpu_tests.md)"),
]
SPECS = (
    spec_of(lse=True),
    spec_of(q=BF16, kv=E4M3),
    spec_of(heads=(64, 8), block_size=64),
    replace(spec_of(), batch_invariant=True),
    replace(spec_of(), op=Op.EXTEND),
    replace(spec_of(q=BF16, kv=E4M3), op=Op.VERIFY),
)
AHEAD = {"split": "walk", "pdl": 2, "waves": 1}
OTHERS = (
    {"pdl": 1},
    {"split": "even", "pdl": 1},
    {"split": "walk", "pdl": 1},
    AHEAD,
    {"split": "cluster", "pdl": 2, "waves": 1, "merge": 32, "tile": 64, "num_warps": 2, "num_stages": 3},
)


def schedules(spec: KernelSpec) -> list[Schedule]:
    """The default and, of those that overlap, what the spec has."""
    to = target(NAMES[torch.cuda.get_device_capability()])
    default = default_schedule(spec, to)
    values = {field.name: field.values for field in family_for(spec, to).fields(spec, to)}
    found = [default]
    for other in OTHERS:
        if all(value in values.get(name, ()) for name, value in other.items()):
            found.append(Schedule.of(default.template, **dict(default.choices) | other))
    return [schedule for schedule in found if is_legal(spec, to, schedule)]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_kernels_that_overlap_pass(spec, tmp_path):
    to = target(NAMES[torch.cuda.get_device_capability()])
    found = schedules(spec)
    library = Library(
        link([compile_source(render(spec, to, each)) for each in found], (), tmp_path / "kernel.so")
    )
    for variant, schedule in enumerate(found):
        verdict = gate(library, spec, variant, "cuda", 7)
        assert verdict.passed, (schedule.name, verdict)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="programmatic dependent launch came with sm_90",
)
@pytest.mark.parametrize("spec", SPECS[:3], ids=lambda spec: spec.name)
def test_a_kernel_that_does_not_wait_for_the_one_before_it_is_caught(spec, tmp_path):
    """One by one its calls are right."""
    to = target(NAMES[torch.cuda.get_device_capability()])
    default = default_schedule(spec, to)
    source = render(spec, to, Schedule.of(default.template, **dict(default.choices) | AHEAD))
    assert source.text.count("\n    gdc_wait()") == 1
    hasty = replace(source, text=source.text.replace("\n    gdc_wait()", "\n    pass"))
    library = Library(link([compile_source(hasty)], (), tmp_path / "kernel.so"))
    assert gate(library, spec, 0, "cuda", 7, row=None).passed
    verdict = gate(library, spec, 0, "cuda", 7)
    assert not verdict.passed and "in a row" in verdict.reason, verdict
