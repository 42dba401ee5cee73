"""A built pack, loaded as a serving process would load it, called with batches it was tuned for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pagedgen.autotune.measure import pool_layout
from pagedgen.compiler.verify import Inputs, judge, make_inputs
from pagedgen.errors import GateFailure
from pagedgen.runtime.attention import Attention, load
from pagedgen.values.spec import KernelSpec
from pagedgen.values.workload import Workload

WARM, CALLS = 3, 25


@dataclass(frozen=True, slots=True)
class Called:
    """One batch: median time of a call as Python makes it, and its error against the float64 reference."""

    spec: str
    batch: str
    call_us: float
    gbs: float  # of KV
    error: float
    allowed: float


def try_pack(pack: Path, workloads: Mapping[KernelSpec, Sequence[Workload]]) -> tuple[float, list[Called]]:
    """Load a pack, in milliseconds, and call its kernels with every workload.

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
            lens = batch.lens_of_queries
            inputs = make_inputs(spec, batch.seq_lens, device, 1, query_lens=lens, pool=pool_layout(device))
            times = []
            for _ in range(WARM + CALLS):
                start = time.perf_counter()
                _call(attention, spec, inputs)
                if device == "cuda":
                    torch.cuda.synchronize()
                times.append((time.perf_counter() - start) * 1e6)
            error, allowed, reason = judge(spec, inputs)
            if reason:
                raise GateFailure(f"{pack}: {spec.name} on {batch.name}: {reason}")
            call_us = statistics.median(times[WARM:])
            gbs = batch.kv_bytes(spec) / call_us / 1e3
            rows.append(Called(spec.name, batch.name, call_us, gbs, error, allowed))
    return load_ms, rows


def _call(attention: Attention, spec: KernelSpec, inputs: Inputs) -> None:
    queries = [] if inputs.cu_seqlens_q is None else [inputs.cu_seqlens_q]
    given = {
        name: tensor
        for name in ("k_scale", "v_scale", "sinks", "alibi_slopes")
        if (tensor := getattr(inputs, name)) is not None
    }
    getattr(attention, spec.op.value)(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.block_table,
        inputs.seq_lens,
        *queries,
        out=inputs.out,
        lse=inputs.lse,
        softmax_scale=inputs.softmax_scale,
        spec=spec,
        **given,
    )
