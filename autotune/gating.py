"""The correctness gate in a worker: whatever a kernel does there becomes a verdict on that kernel alone."""

from __future__ import annotations

import math
from pathlib import Path

from pagedgen.autotune.measure import device_works, gate_variant
from pagedgen.autotune.worker import Worker, WorkerFailed, WorkerLost
from pagedgen.values.record import Verdict
from pagedgen.values.spec import KernelSpec

GATE_S = 120.0  # limit in a worker; a gate takes 0.1-5 s


def verdict_on(
    worker: Worker, library: Path, spec: KernelSpec, variant: int, device: str, seed: int
) -> Verdict:
    """Gate one variant of a library; a crash, a hang or a refusal is a verdict too.

    Raises:
        PackForeign, PackDamaged: the library does not load.
    """
    try:
        verdict = worker.call(gate_variant, library, spec, variant, device, seed, timeout_s=GATE_S)
    except (WorkerLost, WorkerFailed) as error:
        return Verdict(False, 0, math.inf, 0.0, seed, str(error))
    if not verdict.passed and device != "cpu":
        _revive(worker, device)
    return verdict


def _revive(worker: Worker, device: str) -> None:
    """A kernel that failed may have taken the CUDA context along; then the next needs a new process."""
    try:
        worker.call(device_works, device, timeout_s=GATE_S)
    except (WorkerLost, WorkerFailed):
        worker.kill()
