"""A built pack, loaded as a serving process would load it, decoding batches it was tuned for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pagedgen.autotune.measure import pool_layout
from pagedgen.compiler.verify import judge, make_inputs
from pagedgen.errors import GateFailure
from pagedgen.runtime.attention import load
from pagedgen.values.spec import KernelSpec
from pagedgen.values.workload import Workload

WARM, CALLS = 3, 25


@dataclass(frozen=True, slots=True)
class Decoded:
    """One batch: median time of a call as Python makes it, and its error against the float64 reference."""

    spec: str
    batch: str
    call_us: float
    gbs: float  # of KV
    error: float
    allowed: float


def try_pack(pack: Path, workloads: Mapping[KernelSpec, Sequence[Workload]]) -> tuple[float, list[Decoded]]:
    """Load a pack, in milliseconds, and decode every workload with it.

    Raises:
        GateFailure: an output is not what the reference allows.
        PackError: the pack does not load.
    """
    start = time.perf_counter()
    attention = load(pack)
    load_ms = (time.perf_counter() - start) * 1e3
    device = "cpu" if attention.pack.manifest.kind == "cpu" else "cuda"
    rows = []
    for spec, batches in workloads.items():
        for batch in batches:
            inputs = make_inputs(spec, batch.seq_lens, device, seed=1, pool=pool_layout(device))
            times = []
            for _ in range(WARM + CALLS):
                start = time.perf_counter()
                attention.decode(
                    inputs.q,
                    inputs.k,
                    inputs.v,
                    inputs.block_table,
                    inputs.seq_lens,
                    out=inputs.out,
                    lse=inputs.lse,
                    k_scale=inputs.k_scale,
                    v_scale=inputs.v_scale,
                    spec=spec,
                )
                if device == "cuda":
                    torch.cuda.synchronize()
                times.append((time.perf_counter() - start) * 1e6)
            error, allowed, reason = judge(spec, inputs)
            if reason:
                raise GateFailure(f"{pack}: {spec.name} on {batch.name}: {reason}")
            call_us = statistics.median(times[WARM:])
            gbs = batch.kv_bytes(spec) / call_us / 1e3
            rows.append(Decoded(spec.name, batch.name, call_us, gbs, error, allowed))
    return load_ms, rows
