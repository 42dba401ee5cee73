"""Decode that looks for its work before the kernel before it is done (``pdl`` 2), on a real GPU.

The kernel before it writes lengths and block ids late, while decode has already read what was there.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
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
        reason="programmatic dependent launch came with sm_90",
    ),
]
SPECS = (
    spec_of(lse=True),
    spec_of(q=BF16, kv=E4M3),
    spec_of(block_size=64),  # tiles inside a block
    spec_of(80, (40, 8), 1, q=BF16),
    spec_of(heads=(32, 1), block_size=544, kv=E4M3),
    replace(spec_of(block_size=64, kv=E4M3), window=700, sinks=True),
)
SEQ_LENS = ((8192,), (1, 16, 17, 3000, 0, 333))
MOST = 2**31 - 1
STALE = {"zeros": 0, "minus one": -1, "least": -MOST - 1, "most": MOST, "long": 1 << 20}


def ahead(spec: KernelSpec) -> Schedule:
    """The default schedule, looking ahead."""
    to = target(NAMES[torch.cuda.get_device_capability()])
    default = default_schedule(spec, to)
    schedule = Schedule.of(
        default.template, **dict(default.choices) | {"split": "walk", "pdl": 2, "waves": 1}
    )
    assert is_legal(spec, to, schedule)
    return schedule


def library_of(spec: KernelSpec, folder) -> Library:
    to = target(NAMES[torch.cuda.get_device_capability()])
    return Library(link([compile_source(render(spec, to, ahead(spec)))], (), folder / "kernel.so"))


def late_writer():
    """A kernel that lets the next one start, takes its time, and then writes."""
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents

    @triton.jit
    def write_late(to_ptr, from_ptr, count, spins, block: tl.constexpr):
        gdc_launch_dependents()
        at = tl.arange(0, block)
        values = tl.load(from_ptr + at, mask=at < count, other=0)
        noise = values
        for _ in range(spins):
            noise = noise * 1664525 + 1013904223
        tl.store(to_ptr + at, tl.where(noise == 12345, values, values), mask=at < count)
        tl.store(to_ptr + count + at, noise, mask=at < 1)

    return write_late


def wrong_after_late_writes(
    spec: KernelSpec, library: Library, spins: int = 20000, variant: int = 0
) -> list[str]:
    """Which stale lengths and block ids, replaced late, changed the output."""
    import triton

    write_late, found = late_writer(), []
    for lens in SEQ_LENS:
        inputs = make_inputs(spec, lens, "cuda", 3, pool="nhd", poison=False)
        workspace = torch.zeros(library.workspace_bytes(len(lens)), dtype=torch.uint8, device="cuda")
        inputs.out.zero_()  # rows without tokens are left alone
        run_case(spec, library, variant, inputs, workspace)
        expected = inputs.out.clone()
        rows, width = inputs.block_table.shape
        both = torch.cat([inputs.seq_lens, inputs.block_table.flatten()])
        room = torch.empty(len(both) + 1, dtype=torch.int32, device="cuda")
        late = replace(
            inputs, seq_lens=room[:rows], block_table=room[rows : rows + rows * width].view(rows, width)
        )
        for name, value in STALE.items():
            for what, part in (("lengths", room[:rows]), ("block ids", room[rows:]), ("both", room)):
                room[:-1].copy_(both)
                part.fill_(value)
                late.out.zero_()
                torch.cuda.synchronize()
                block = triton.next_power_of_2(len(both))
                write_late[(1,)](room, both, len(both), spins, block=block)
                run_case(spec, library, variant, late, workspace)
                torch.cuda.synchronize()
                if not torch.equal(late.out, expected):
                    found.append(f"{lens}: {what} {name}")
    return found


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_it_passes_the_gate_and_relies_on_nothing_it_read_too_early(spec, tmp_path):
    library = library_of(spec, tmp_path)
    verdict = gate(library, spec, 0, "cuda", 5)
    assert verdict.passed, verdict
    assert wrong_after_late_writes(spec, library) == []


def test_calls_in_a_row_in_a_graph(tmp_path):
    """Each call may start while the one before it merges, and they share a workspace."""
    spec = SPECS[0]
    library = library_of(spec, tmp_path)
    workspace = torch.zeros(library.workspace_bytes(4), dtype=torch.uint8, device="cuda")
    batches = [make_inputs(spec, lens, "cuda", 3, pool="nhd") for lens in ((8192,), (700, 1, 0, 5000), (3,))]
    expected = []
    for inputs in batches:
        inputs.out.zero_()
        run_case(spec, library, 0, inputs, workspace)
        expected.append(inputs.out.clone())

    def all_of_them() -> None:
        for _ in range(20):
            for inputs in batches:
                run_case(spec, library, 0, inputs, workspace)

    for inputs in batches:
        inputs.out.zero_()
    captured(all_of_them)()
    for inputs, out in zip(batches, expected, strict=True):
        assert torch.equal(inputs.out, out)
