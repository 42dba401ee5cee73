"""Peers of ``decode-gpu`` that are importable here, on the very inputs ours are timed on.

FlashInfer's paged decode wrapper, CUDA-core and tensor-core; ``plan`` stays outside the clock. What a peer
computes is checked against the float64 reference before it is timed, with eight times our tolerance, since
peers round elsewhere than we do.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from pagedgen.autotune.measure import Clock, rotation
from pagedgen.autotune.suites.contest import Contender
from pagedgen.compiler.verify import Inputs, reference, tolerance
from pagedgen.errors import GateFailure
from pagedgen.runtime.attention import TORCH_DTYPES
from pagedgen.values.spec import KernelSpec
from pagedgen.values.workload import Workload

SLACK = 8.0
WORKSPACE = 256 << 20  # bytes, what FlashInfer's documentation asks for and more
UNWRAPPED = ("vllm", "sglang")  # importable ones of these are named in the report as not measured


def missing() -> tuple[str, ...]:
    """Notes on peers that are not measured here."""
    notes = [] if find_spec("flashinfer") else ["flashinfer is not installed: not measured"]
    for name in UNWRAPPED:
        if find_spec(name):
            notes.append(f"{name} is installed, but this suite has no wrapper for its kernels")
    return tuple(notes)


def peers(spec: KernelSpec, workload: Workload) -> list[Contender]:
    """Contenders for one case; a peer that refuses the case or is wrong on it raises when its turn comes."""
    if not find_spec("flashinfer"):
        return []
    return [
        _contender("flashinfer cuda-core", spec, workload, use_tensor_cores=False),
        _contender("flashinfer tensor-core", spec, workload, use_tensor_cores=True),
    ]


def _contender(name: str, spec: KernelSpec, workload: Workload, *, use_tensor_cores: bool) -> Contender:
    rotating = rotation(spec, workload, "cuda")
    inputs = rotating.inputs
    calls: list[Callable[[], None]] = []

    def call(turn: int) -> None:
        if not calls:
            calls.extend(_flashinfer(spec, one, use_tensor_cores) for one in inputs)
            calls[0]()
            _check(name, spec, inputs[0])
        calls[turn]()

    import flashinfer

    return Contender(
        name,
        Clock(call, rotating.turns, "cuda"),
        workload.kv_bytes(spec),
        f"flashinfer {flashinfer.__version__}",
    )


def _flashinfer(spec: KernelSpec, inputs: Inputs, use_tensor_cores: bool) -> Callable[[], None]:
    """One planned call on one set of inputs."""
    import flashinfer

    lens = inputs.seq_lens.cpu()
    counts = (lens + spec.block_size - 1) // spec.block_size
    indptr = torch.zeros(len(lens) + 1, dtype=torch.int32)
    indptr[1:] = counts.cumsum(0)
    indices = torch.cat([inputs.block_table[row, :count] for row, count in enumerate(counts.tolist())])
    last = (lens - (counts - 1) * spec.block_size).to(torch.int32)
    workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device="cuda")
    wrapper: Any = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=use_tensor_cores
    )
    wrapper.plan(
        indptr.to("cuda"),
        indices,
        last.to("cuda"),
        spec.num_q_heads,
        spec.num_kv_heads,
        spec.head_dim,
        spec.block_size,
        q_data_type=TORCH_DTYPES[spec.q_dtype],
        kv_data_type=TORCH_DTYPES[spec.kv_dtype],
        sm_scale=inputs.softmax_scale,
    )
    scales = {}
    if inputs.k_scale is not None and inputs.v_scale is not None:
        scales = {"k_scale": float(inputs.k_scale[0]), "v_scale": float(inputs.v_scale[0])}

    def call() -> None:
        wrapper.run(inputs.q, (inputs.k, inputs.v), out=inputs.out, **scales)

    return call


def _check(name: str, spec: KernelSpec, inputs: Inputs) -> None:
    want, _, magnitude = reference(spec, inputs)
    error = (inputs.out.double() - want).abs()
    worst = float((error / (SLACK * tolerance(spec, want, magnitude))).max())
    if not worst <= 1:
        raise GateFailure(f"{name}: {worst:.1f} times the error that is allowed")
