"""The first decode and the first prompt of a fresh process, with caches of compiled code empty, then full.

    python docs/benchmarks/first_call.py PACK [--contenders pagedgen vllm flashinfer] [--json FILE]

Llama-3-8B's attention in bf16 over blocks of 16: decode of 4 sequences, then a prompt of 512 tokens. Each
contender runs in a process of its own that has imported torch and made a CUDA context before the clock
starts, twice: its caches are empty the first time. Times end when the GPU has finished; outputs are checked
against torch. pagedgen: ``load`` and its first calls, of a pack with decode and extend. vllm: its Triton
kernels (what backend TRITON_ATTN calls). flashinfer: its wrappers, decode by tensor cores and the prompt by
the backend it chooses itself, plan included; compiled by nvcc when first used, unless its wheels of
binaries are installed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Q_HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 16
DECODES, CONTEXT, PROMPT = 4, 300, 512
ALLOWED = 0.02  # absolute, outputs being means of standard normal values in bf16


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of ``kv_len`` tokens, of which the last ``q_len`` are queries.

    q bf16 ``[num_seqs * q_len, Q_HEADS, HEAD_DIM]``; k, v bf16 ``[num_blocks, BLOCK, KV_HEADS, HEAD_DIM]``;
    table int32 ``[num_seqs, blocks]``; lens int32 ``[num_seqs]``; cu_q int32 ``[num_seqs + 1]``.
    """

    q_len: int
    kv_len: int
    q: Any
    k: Any
    v: Any
    table: Any
    lens: Any
    cu_q: Any


def batch(num_seqs: int, q_len: int, kv_len: int) -> Batch:
    """Random numbers; every block belongs to one sequence."""
    import torch

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    def ints(values: Any) -> torch.Tensor:
        return torch.tensor(values, device="cuda", dtype=torch.int32)

    each = -(-kv_len // BLOCK)
    kv = normal(2, num_seqs * each, BLOCK, KV_HEADS, HEAD_DIM)
    return Batch(
        q_len, kv_len, normal(num_seqs * q_len, Q_HEADS, HEAD_DIM), kv[0], kv[1],
        ints([[i * each + j for j in range(each)] for i in range(num_seqs)]),
        ints([kv_len] * num_seqs), ints([i * q_len for i in range(num_seqs + 1)]),
    )  # fmt: skip


def wrong(b: Batch, out: Any) -> float:
    """The largest absolute error."""
    import torch

    seqs, ratio = b.lens.numel(), Q_HEADS // KV_HEADS
    q = b.q.float().view(seqs, b.q_len, Q_HEADS, HEAD_DIM).transpose(1, 2)
    k, v = (
        x[b.table.long()].flatten(1, 2)[:, : b.kv_len].float().transpose(1, 2).repeat_interleave(ratio, 1)
        for x in (b.k, b.v)
    )
    seen = torch.ones(b.q_len, b.kv_len, device="cuda", dtype=torch.bool).tril(b.kv_len - b.q_len)
    scores = (q @ k.transpose(2, 3) * HEAD_DIM**-0.5).masked_fill(~seen, float("-inf"))
    expected = (scores.softmax(-1) @ v).transpose(1, 2).reshape(out.shape)
    return float((out.float() - expected).abs().max())


def pagedgen(pack: str) -> Callable[[Batch], Any]:
    """A pack that is loaded, and its kernels put on the device."""
    import torch

    import pagedgen

    attention = pagedgen.load(pack)
    attention.prepare(torch.device("cuda"))

    def call(b: Batch) -> Any:
        if b.q_len == 1:
            return attention.decode(b.q, b.k, b.v, b.table, b.lens)
        return attention.extend(b.q, b.k, b.v, b.table, b.lens, b.cu_q)

    return call


def vllm(pack: str) -> Callable[[Batch], Any]:
    """The function that TRITON_ATTN calls, with what it gives it in decode and in prompts."""
    import torch
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    segments, threshold = 16, 128 // KV_HEADS  # TRITON_ATTN's

    def call(b: Batch) -> Any:
        out = torch.empty_like(b.q)
        partial = torch.empty(threshold, Q_HEADS, segments, HEAD_DIM, device="cuda")
        maxima, sums = (torch.empty(threshold, Q_HEADS, segments, device="cuda") for _ in range(2))
        scale = torch.ones(1, device="cuda").expand(b.lens.numel(), KV_HEADS)
        unified_attention(
            q=b.q, k=b.k, v=b.v, out=out, cu_seqlens_q=b.cu_q, max_seqlen_q=b.q_len, seqused_k=b.lens,
            max_seqlen_k=b.kv_len, softmax_scale=HEAD_DIM**-0.5, causal=True, window_size=(-1, -1),
            block_table=b.table, softcap=0, q_descale=None, k_descale=scale, v_descale=scale,
            seq_threshold_3D=threshold, num_par_softmax_segments=segments, softmax_segm_output=partial,
            softmax_segm_max=maxima, softmax_segm_expsum=sums,
        )  # fmt: skip
        return out

    return call


def flashinfer(pack: str) -> Callable[[Batch], Any]:
    """Its wrappers for paged caches."""
    import flashinfer
    import torch

    workspace = torch.zeros(128 << 20, dtype=torch.uint8, device="cuda")

    def call(b: Batch) -> Any:
        seqs, blocks = b.table.shape
        indptr = torch.arange(seqs + 1, dtype=torch.int32, device="cuda") * blocks
        last = torch.full((seqs,), (b.kv_len - 1) % BLOCK + 1, dtype=torch.int32, device="cuda")
        heads = (Q_HEADS, KV_HEADS, HEAD_DIM, BLOCK)
        types = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
        if b.q_len == 1:
            decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
            decode.plan(indptr, b.table.flatten(), last, *heads, **types)
            return decode.run(b.q, (b.k, b.v))
        prompt = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        prompt.plan(b.cu_q, indptr, b.table.flatten(), last, *heads, causal=True, **types)
        return prompt.run(b.q, (b.k, b.v))

    return call


CONTENDERS = {"pagedgen": pagedgen, "vllm": vllm, "flashinfer": flashinfer}


def inside(contender: str, pack: str, result: Path) -> None:
    """Time one contender in this process, and write after every step."""
    import torch

    decodes, prompt = batch(DECODES, 1, CONTEXT), batch(1, PROMPT, PROMPT)
    wrong(decodes, decodes.q)  # what torch itself loads at its first products
    torch.cuda.synchronize()
    start = time.perf_counter()
    call = CONTENDERS[contender](pack)
    torch.cuda.synchronize()
    figures = {"import_and_load_s": time.perf_counter() - start}
    for name, b in (("decode", decodes), ("prompt", prompt)):
        start = time.perf_counter()
        out = call(b)
        torch.cuda.synchronize()
        figures[f"{name}_s"] = time.perf_counter() - start
        error = wrong(b, out)
        if not error <= ALLOWED:  # NaN too
            raise SystemExit(f"{contender}, {name}: an error of {error}")
        start = time.perf_counter()
        call(b)
        torch.cuda.synchronize()
        figures[f"{name}_again_s"] = time.perf_counter() - start
        result.write_text(json.dumps(figures))


def main() -> None:
    """Every contender twice; print and write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--limit", type=float, help="seconds of a process")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside(options.inside, str(options.pack), options.result)
        return
    import torch

    versions: dict[str, str] = {}
    for name in ("pagedgen", "vllm", "flashinfer-python", "torch", "triton"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    environment = {"date": str(date.today()), "cpus": os.cpu_count(), **versions}
    runs: list[dict[str, Any]] = []
    for contender in options.contenders:
        folder = Path(tempfile.mkdtemp())
        caches = {
            "TRITON_CACHE_DIR": str(folder / "triton"),
            "FLASHINFER_WORKSPACE_BASE": str(folder / "flashinfer"),
            "PAGEDGEN_CACHE_DIR": str(folder / "pagedgen"),
        }
        for state in ("empty", "full"):
            result = folder / f"{state}.json"
            command = [
                sys.executable, __file__, str(options.pack), "--inside", contender, "--result", str(result),
            ]  # fmt: skip
            ran: dict[str, Any] = {"contender": contender, "caches": state}
            try:
                done = subprocess.run(
                    command, env={**os.environ, **caches}, capture_output=True, text=True, check=False,
                    timeout=options.limit,
                )  # fmt: skip
                if done.returncode:
                    ran["failed"] = (done.stdout + done.stderr)[-3000:]
            except subprocess.TimeoutExpired:
                ran["failed"] = f"cut off after {options.limit} s"
            ran |= json.loads(result.read_text()) if result.exists() else {}
            runs.append(ran)
            print(json.dumps(ran), flush=True)
            if options.json:
                environment["device"] = torch.cuda.get_device_name()
                options.json.write_text(json.dumps({"environment": environment, "runs": runs}, indent=1))
    if any("failed" in ran for ran in runs):
        raise SystemExit("not every contender ran")


if __name__ == "__main__":
    main()
