"""Named benchmark suites: ``pagedgen bench --suite NAME --json FILE``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pagedgen.autotune.suites.output import Note, Output
from pagedgen.errors import InvalidValue, UnknownName

if TYPE_CHECKING:
    from pagedgen.autotune.suites.report import Report


@dataclass(frozen=True, slots=True)
class Suite:
    """A benchmark. ``module`` has ``run(output) -> Report``; it is imported when the suite is run.

    With ``takes_traces`` it is ``run(output, traces)``; ``has_cases``: some of them can be run alone.
    """

    name: str
    meaning: str
    module: str
    takes_traces: bool = False
    has_cases: bool = True


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            "decode-cpu",
            "decode on this CPU beside its peers: dtypes, head groups, ragged lengths",
            "pagedgen.autotune.suites.decode_cpu",
        ),
        Suite(
            "decode-gpu",
            "decode on this GPU: the published rows beside peers, and a grid of specs at 32x8192",
            "pagedgen.autotune.suites.decode_gpu",
        ),
        Suite(
            "extend-cpu",
            "prompts, chunks and a mixed batch on this CPU beside peers: dtypes, a window",
            "pagedgen.autotune.suites.extend_cpu",
        ),
        Suite(
            "extend-gpu",
            "prefill, chunks and mixed batches on this GPU: published rows, formats, masks, tiles",
            "pagedgen.autotune.suites.extend_gpu",
        ),
        Suite(
            "verify-gpu",
            "verifying drafts, in a line and in a tree, on this GPU, beside decode of the same KV",
            "pagedgen.autotune.suites.verify_gpu",
        ),
        Suite(
            "invariant-gpu",
            "batch-invariant decode on this GPU beside kernels that are free to follow the batch",
            "pagedgen.autotune.suites.invariant_gpu",
        ),
        Suite(
            "move-gpu",
            "writing, gathering and copying K and V on this GPU, against a copy's bandwidth",
            "pagedgen.autotune.suites.move_gpu",
        ),
        Suite(
            "load",
            "loading a pack and the first call in a fresh process, call overhead, pagedgen --help",
            "pagedgen.autotune.suites.load",
            has_cases=False,
        ),
        Suite(
            "manager",
            "the block manager: steps, prompts, memory, and vLLM's manager where vllm is installed",
            "pagedgen.autotune.suites.manager",
            takes_traces=True,
            has_cases=False,
        ),
        Suite(
            "block-sizes-gpu",
            "decode and extend on this GPU against block size and run coverage; for explore --kernel-times",
            "pagedgen.autotune.suites.block_sizes_gpu",
        ),
    )
}


def run_suite(
    name: str,
    json_path: Path | None,
    note: Note,
    traces: Sequence[Path] = (),
    cases: Sequence[str] = (),
) -> Report:
    """Run a suite, note its progress, and keep the report as JSON, anew after every case.

    Args:
        cases: texts; only cases whose names hold one of them are run.

    Raises:
        UnknownName: no such suite, or no case with such a name.
        InvalidValue: traces or cases for a suite that takes none.
        MalformedFile: a trace cannot be read.
        DeviceMissing: the suite needs a device that is not here.
        CacheUnwritable: the JSON file cannot be written.
    """
    if name not in SUITES:
        raise UnknownName("suite", name, SUITES)
    takers = [suite.name for suite in SUITES.values() if suite.takes_traces]
    if traces and name not in takers:
        raise InvalidValue("trace", str(traces[0]), f"no trace is allowed with {name}, only with {takers}")
    if cases and not SUITES[name].has_cases:
        raise InvalidValue("case", cases[0], f"{name} has no cases that can be run alone")
    run = cast("Callable[..., Report]", import_module(SUITES[name].module).run)
    output = Output(note, json_path, cases)
    try:
        return run(output, tuple(traces)) if traces else run(output)
    except BaseException:
        if output.is_kept:
            note(f"{name} was cut off; what was finished is in {json_path}")
        raise
