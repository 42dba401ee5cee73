"""One draw put to a kernel: the gate's rule, and FlashAttention's: at most twice torch's own error.

The gate allows each output so much for the rounding of what it is the sum of. The second rule holds the
largest error of a call against that of torch in the spec's own type on the same batch (the rule of
FlashAttention's tests): a kernel may err twice as much, and ``floor`` more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from fuzz.draw import ATTENTION, Sizes, case_of, loosened

from pagedgen.compiler.verify import (
    EPS,
    F32_WEIGHT,
    Inputs,
    gate,
    judge,
    live_rows,
    make_inputs,
    reference,
    run_case,
    runs_of,
)
from pagedgen.errors import ArgumentError
from pagedgen.runtime.attention import TORCH_DTYPES
from pagedgen.values.spec import KernelSpec


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one draw of inputs. ``reason`` is empty where the kernel is right."""

    what: str
    reason: str
    error: float = 0.0  # the largest, against float64
    torch_error: float = 0.0  # torch's in the spec's own type
    allowed: float = 0.0
    inputs: int = 1  # batches that it stands for
    broke: bool = False  # the call raised: a GPU's context may be lost


def torch_attention(spec: KernelSpec, inputs: Inputs) -> torch.Tensor:
    """What torch computes in the queries' type, float64 ``[num_tokens, num_q_heads, v_dim]``."""
    dtype = TORCH_DTYPES[spec.q_dtype]
    out = torch.full(inputs.out.shape, float("nan"), dtype=torch.float64, device=inputs.q.device)
    heads, group = spec.num_kv_heads, spec.group_size
    for run in runs_of(spec, inputs):
        q = inputs.q[run.rows].reshape(-1, heads, group, spec.head_dim) * inputs.softmax_scale
        scores = torch.einsum("nhgd,thd->nhgt", q, run.k.to(dtype))
        if spec.logits_soft_cap is not None:
            scores = spec.logits_soft_cap * torch.tanh(scores / spec.logits_soft_cap)
        if inputs.alibi_slopes is not None:
            slopes = inputs.alibi_slopes.to(dtype).view(heads, group, 1)
            scores = scores - slopes * run.distance.abs()[:, None, None, :].to(dtype)
        scores = scores.masked_fill(~run.visible[:, None, None, :], float("-inf"))
        if inputs.sinks is not None:
            sinks = inputs.sinks.to(dtype).view(heads, group, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, sinks), dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., : run.k.shape[0]]
        out[run.rows] = torch.einsum("nhgt,thd->nhgd", weights, run.v.to(dtype)).flatten(1, 2).double()
    return out


def floor(spec: KernelSpec, magnitude: torch.Tensor) -> float:
    """What is allowed beside torch's error, which is 0 for a sequence of one token: half a unit of the type,
    or what float32 kernels are allowed for their exponential, times the largest weighted magnitude."""
    return max(EPS[spec.q_dtype] / 2, F32_WEIGHT) * float(magnitude.max()) + 1e-7


def attempt(
    spec: KernelSpec,
    callee: Any,
    variant: int,
    draw: Random,
    sizes: Sizes,
    device: str,
    workspace: torch.Tensor | None,
    wrap: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
) -> Outcome:
    """Draw inputs, call the kernel, compare. ``workspace`` is one that earlier calls have used."""
    seed = draw.randrange(1 << 30)
    if spec.op not in ATTENTION:
        verdict = gate(callee, spec, variant, device, seed, wrap=wrap)
        return Outcome(f"seed {seed}", verdict.reason, inputs=verdict.cases)
    case = case_of(draw, spec, sizes)
    made = make_inputs(
        spec, case.seq_lens, device, seed,
        query_lens=case.query_lens, pool=case.pool, all_codes=case.all_codes, spare_blocks=draw.randint(1, 4),
    )  # fmt: skip
    inputs = loosened(draw, made)
    what = f"seed {seed}, {case}"
    if workspace is None:
        workspace = torch.zeros(workspace_bytes(callee, sizes), dtype=torch.uint8, device=device)

    def call() -> None:
        run_case(spec, callee, variant, inputs, workspace)

    what += ", captured" if wrap else ""
    try:
        (wrap(call) if wrap else call)()
        if device != "cpu":
            torch.cuda.synchronize()  # what the kernel did is found out here, where its batch can be named
    except ArgumentError:
        raise
    except Exception as error:
        return Outcome(what, f"{type(error).__name__}: {error}".splitlines()[0], broke=True)
    expected = reference(spec, inputs)
    error, allowed, reason = judge(spec, inputs, expected)
    if reason:
        return Outcome(what, reason, error, 0.0, allowed)
    whole = inputs.out._base
    if whole is not None and not bool(whole[:, : whole.shape[1] - inputs.out.shape[1]].isnan().all()):
        return Outcome(what, "heads beside those of out were written")
    live = live_rows(spec, inputs)
    if not bool(live.any()):
        return Outcome(what, "")
    want = expected[0][live]
    error = float((inputs.out[live].double() - want).abs().max())
    torch_error = float((torch_attention(spec, inputs)[live] - want).abs().max())
    allowed = 2 * torch_error + floor(spec, expected[2][live])
    if not error <= allowed:
        reason = f"error {error:.3g}, torch's {torch_error:.3g}: {allowed:.3g} is allowed"
    return Outcome(what, reason, error, torch_error, allowed)


def workspace_bytes(callee: Any, sizes: Sizes) -> int:
    """Of any batch of these sizes; more than it needs, as a caller that serves many batches has it."""
    return max(1, callee.workspace_bytes(sizes.seqs))
