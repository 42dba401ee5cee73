"""Continuous batching in transformers on a GPU: a pack's kernels, stock sdpa, and static ``generate``.

    python docs/benchmarks/transformers_gpu.py PACK --lengths FILE [--layers 16] [--skip stock] [--json FILE]

Random weights in the shape of Llama-3-8B with fewer layers, bf16, one GPU, one process. 256 requests with the
lengths of a trace (CSV with num_prefill_tokens and num_decode_tokens, a request a row), drawn with a seed
from those of at most 1,024 prompt tokens and 4 to 1,024 new ones. All are there at the start and none ends
early, so that each makes as many tokens as the trace says. Greedy. Continuous batching is warmed up first,
and what that takes is stated apart; each way runs ``--rounds`` times, in turns. Static batches take requests
as they come, run until the longest is done, and are credited with the tokens that were asked for.

Then the same with KV memory for 65,536 tokens alone: paged, and with as many requests at a time as would be
there if each had the longest request's 2,048 tokens reserved in one piece.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import random
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

REQUESTS, LONGEST = 256, 1024
SMALL_POOL = 65536  # tokens
SHAPE = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FIRST_CALL = """
import json, sys, time, torch
torch.zeros(1, device="cuda").sum().item()
start = time.perf_counter()
import pagedgen
imported = time.perf_counter()
attention = pagedgen.load(sys.argv[1])
attention.prepare("cuda")
loaded = time.perf_counter()
spec = next(s for s in attention.specs if s.op == "decode")
q = torch.zeros(1, spec.num_q_heads, spec.head_dim, dtype=torch.bfloat16, device="cuda")
k = torch.zeros(4, spec.block_size, spec.num_kv_heads, spec.head_dim, dtype=torch.bfloat16, device="cuda")
table = torch.zeros(1, 4, dtype=torch.int32, device="cuda")
lens = torch.full((1,), 9, dtype=torch.int32, device="cuda")
torch.cuda.synchronize()
before = time.perf_counter()
attention.decode(q, k, k, table, lens, spec=spec)
torch.cuda.synchronize()
done = time.perf_counter()
compilers = sorted({name.partition(".")[0] for name in sys.modules} & {"triton", "tvm", "optuna", "jinja2"})
print(json.dumps({"import_s": imported - start, "load_s": loaded - imported, "call_s": done - before,
                  "compilers": compilers}))
"""


def lengths_of(path: Path) -> list[tuple[int, int]]:
    """(prompt, new) tokens of the requests."""
    with path.open(encoding="utf-8") as file:
        rows = [(int(r["num_prefill_tokens"]), int(r["num_decode_tokens"])) for r in csv.DictReader(file)]
    fit = [(prompt, new) for prompt, new in rows if 1 <= prompt <= LONGEST and 4 <= new <= LONGEST]
    return random.Random(0).sample(fit, REQUESTS)


def prompts_of(lengths: list[tuple[int, int]]) -> list[list[int]]:
    """Random tokens."""
    draw = random.Random(1)
    return [[draw.randrange(3, SHAPE["vocab_size"]) for _ in range(n)] for n, _ in lengths]


def continuous(
    model: Any, prompts: list[list[int]], lengths: list[tuple[int, int]], **options: Any
) -> dict[str, Any]:
    """All requests by transformers' manager of continuous batches; its defaults but for ``options``."""
    import torch
    from transformers import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    hints = WorkloadHints(max(p for p, _ in lengths), max(n for _, n in lengths), len(lengths))
    begin = time.perf_counter()
    asked_for = ContinuousBatchingConfig(**options)
    with model.continuous_batching_context_manager(
        continuous_batching_config=asked_for, workload_hints=hints
    ) as manager:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i, (prompt, (_, new)) in enumerate(zip(prompts, lengths, strict=True)):
            manager.add_request(prompt, request_id=str(i), max_new_tokens=new)
        made: dict[str, list[int]] = {}
        while len(made) < len(prompts):
            result = manager.get_result(timeout=5)
            if result is not None and result.is_finished():
                if result.error:
                    raise SystemExit(f"request {result.request_id}: {result.error}")
                made[result.request_id] = list(result.generated_tokens)
            elif result is None and not manager.is_running():
                raise SystemExit(
                    f"the generation thread stopped: {manager.background_thread_status.fatal_error}"
                )
        end = time.perf_counter()
        config = manager.continuous_batching_config
        used = {
            "page_size": config.page_size, "num_blocks": config.num_blocks,
            "max_batch_tokens": config.max_batch_tokens, "use_cuda_graph": config.use_cuda_graph,
            "use_async_batching": config.use_async_batching,
            "max_blocks_per_request": config.max_blocks_per_request,
            "max_requests_per_batch": config.max_requests_per_batch,
        }  # fmt: skip
    tokens = sum(len(made[str(i)]) for i in range(len(prompts)))
    assert tokens == sum(new for _, new in lengths), tokens
    release()
    return {
        "seconds": end - start, "warm_up_s": start - begin, "tokens": tokens,
        "tokens_per_s": tokens / (end - start), "config": used,
        "first_tokens": [made[str(i)][:4] for i in range(len(prompts))],
    }  # fmt: skip


def static(model: Any, prompts: list[list[int]], lengths: list[tuple[int, int]], size: int) -> dict[str, Any]:
    """Batches of ``size`` by ``generate``, padded to the longest."""
    import torch

    torch.cuda.synchronize()
    start = time.perf_counter()
    for first in range(0, len(prompts), size):
        batch, asked = prompts[first : first + size], lengths[first : first + size]
        longest, new = max(map(len, batch)), max(n for _, n in asked)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(batch):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        model.generate(
            ids.cuda(), attention_mask=mask.cuda(), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    tokens = sum(new for _, new in lengths)
    release()
    return {"seconds": seconds, "tokens": tokens, "tokens_per_s": tokens / seconds, "batch_size": size}


def release() -> None:
    """Give memory back between runs."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def first_call(pack: Path) -> dict[str, Any]:
    """pagedgen's share of the time to a first token, in a fresh process that has torch and a context."""
    command = [sys.executable, "-c", FIRST_CALL, str(pack)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Every way in turn, then the fresh processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--lengths", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--skip", default="", help="of: stock, memory, static, first")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import torch
    import transformers

    import pagedgen
    from pagedgen.integrations.transformers import attach, detach
    from pagedgen.runtime.pack import read_manifest

    lengths = lengths_of(options.lengths)
    prompts = prompts_of(lengths)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, num_hidden_layers=options.layers)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    model.generation_config.eos_token_id = -1
    model.generation_config.pad_token_id = 0
    raw: dict[str, Any] = {
        "date": date.today().isoformat(),
        "command": " ".join(sys.argv),
        "device": torch.cuda.get_device_name(),
        "versions": {
            "pagedgen": pagedgen.__version__, "torch": torch.__version__,
            "transformers": transformers.__version__, "apache-tvm-ffi": version("apache-tvm-ffi"),
        },
        "model": {**SHAPE, "num_hidden_layers": options.layers, "dtype": "bfloat16", "weights": "random"},
        "pack": {
            kernel.spec.name: [schedule.name for schedule in kernel.variants]
            for kernel in read_manifest(options.pack).kernels
        },
        "lengths": lengths,
        "rounds": [],
        "equal_memory": {},
        "static": [],
        "first_call": [],
    }  # fmt: skip

    def save() -> None:
        if options.json:
            options.json.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")

    def show(name: str, run: dict[str, Any]) -> None:
        extra = {k: round(v, 2) for k, v in run.items() if isinstance(v, float)}
        print(name, extra, run.get("config", ""), flush=True)
        save()

    def equal_memory() -> None:
        small = {"page_size": 16, "num_blocks": SMALL_POOL // 16}
        attach(model, options.pack)
        for name, more in (
            ("paged", {}),
            ("reserved", {"max_requests_per_batch": SMALL_POOL // (2 * LONGEST)}),
        ):
            raw["equal_memory"][name] = continuous(model, prompts, lengths, **small, **more)
            show(f"memory for {SMALL_POOL} tokens, {name}", raw["equal_memory"][name])
        detach(model)

    skipped = options.skip.split(",")
    for number in range(options.rounds):
        found: dict[str, Any] = {}
        attach(model, options.pack)
        found["pagedgen"] = continuous(model, prompts, lengths)
        detach(model)
        raw["rounds"].append(found)
        show("pagedgen", found["pagedgen"])
        if "stock" not in skipped and (number == 0 or not raw.get("slow_stock")):
            found["stock"] = continuous(model, prompts, lengths)
            show("stock sdpa", found["stock"])
            raw["slow_stock"] = found["stock"]["seconds"] > 60  # once is enough then
    if "memory" not in skipped:
        equal_memory()
    if "static" not in skipped:
        for size in (256, 64):
            raw["static"].append(static(model, prompts, lengths, size))
            show(f"static, batches of {size}", raw["static"][-1])
    if "first" not in skipped:
        for _ in range(3):
            raw["first_call"].append(first_call(options.pack))
            print("first call", raw["first_call"][-1], flush=True)
    save()


if __name__ == "__main__":
    main()
