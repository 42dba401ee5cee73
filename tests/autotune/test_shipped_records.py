"""What ships in ``cache/``: readable, about what its place says, of today's kernels that passed the gate."""

from __future__ import annotations

from pathlib import Path

import pytest

import pagedgen.cache
from pagedgen.autotune.binaries import Compiled
from pagedgen.autotune.database import Database, read
from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.render import render
from pagedgen.values.record import Status
from pagedgen.values.target_table import target

FOLDER = Path(pagedgen.cache.__file__).parent
FILES = sorted(FOLDER.glob("*/*.json"))


def test_there_are_some():
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_file(path):
    entry = read(path)
    assert entry is not None and (entry.target, entry.spec.name) == (path.parent.name, path.stem)
    assert entry.selection is not None and entry.records
    assert Database().current(entry) == entry, "its kernels are rendered otherwise now: tune it again"
    tried = {record.schedule for record in entry.records}
    assert set(entry.selection.variants) <= tried
    for record in entry.records:
        if record.status is Status.MEASURED:
            assert record.verdict is not None and record.verdict.passed
            assert record.timing is not None and record.roofline_gbs > 0
            assert record.workload.kv_bytes(record.spec) / record.time_us / 1e3 < 1.05 * record.roofline_gbs


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_what_is_chosen_fits_in_registers_by_the_compiler_here_too(path):
    """Measured by Triton 3.6: a kernel that spills by another is one that `build` refuses there."""
    entry = read(path)
    assert entry is not None and entry.selection is not None
    for schedule in entry.selection.variants:
        compiled = Compiled.of(compile_source(render(entry.spec, target(entry.target), schedule)), fresh=True)
        assert compiled.binary is not None, f"{schedule.name}: {compiled.reason}"
