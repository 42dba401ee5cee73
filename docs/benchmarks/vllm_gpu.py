"""vLLM on a GPU with the plug-in and with another of its backends: tokens/s, step times, first tokens.

    python docs/benchmarks/vllm_gpu.py PACK [--other TRITON_ATTN] [--requests 64 256] [--json FILE]

Random weights in the shape of Llama-3-8B, bf16, one GPU. Every run is a process of its own that starts the
engine, generates one token (the first of the process), then, for each number of requests: prompts of
``--context`` tokens that are in the prefix cache but for their last block, ``--new-tokens`` tokens for each.
Nearly every step is then a decode of all requests. A round with ``SHORT`` new tokens is timed as well: the
difference of the two is steps alone, without the taking in of requests. The backends take turns; each has
caches of compiled code of its own, which are empty in its first run and full in later ones (``--runs 2``).

``--native-ops`` has torch compute norms, activations and rotation, for a vLLM without its compiled extension.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

SHORT = 8  # new tokens of the shorter of the two rounds
SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "initializer_range": 0.02, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def inside(options: argparse.Namespace) -> None:
    """Start vLLM, time it, and print what came out."""
    begin = time.perf_counter()
    import random

    import torch
    from vllm import LLM, SamplingParams

    imported = time.perf_counter()
    compilation: dict[str, Any] = {"cudagraph_mode": options.graphs}
    chosen: dict[str, Any] = {}
    if options.mode is not None:
        compilation["mode"] = options.mode
    if options.native_ops:
        compilation["custom_ops"] = ["none"]
        native = {name: ["native"] for name in ("rms_norm", "fused_add_rms_norm")}
        chosen["kernel_config"] = {"ir_op_priority": native}
    llm = LLM(
        options.model, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
        kv_cache_dtype=options.kv_cache_dtype, block_size=16, attention_backend=options.inside,
        max_model_len=max(4096, options.context + options.new_tokens + 16),
        max_num_seqs=max(options.requests),
        max_num_batched_tokens=options.batched_tokens, enable_prefix_caching=True,
        compilation_config=compilation, gpu_memory_utilization=0.9, **chosen,
    )  # fmt: skip
    started = time.perf_counter()
    draw = random.Random(0)

    def prompts_of(requests: int, length: int) -> list[Any]:
        vocabulary = SHAPE["vocab_size"]
        return [
            {"prompt_token_ids": [draw.randrange(3, vocabulary) for _ in range(length)]}
            for _ in range(requests)
        ]

    def generate(prompts: list[Any], tokens: int) -> tuple[float, list[list[int]]]:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        torch.cuda.synchronize()
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start, [list(o.outputs[0].token_ids) for o in outputs]

    firsts = [generate(prompts_of(1, 100), 1)[0] for _ in range(2)]
    rounds = []
    for requests in options.requests:
        prompts = prompts_of(requests, options.context)
        prefill, _ = generate(prompts, 1)
        for _ in range(options.rounds):
            short, _ = generate(prompts, SHORT)
            long, tokens = generate(prompts, options.new_tokens)
            rounds.append(
                {
                    "requests": requests, "prompts_s": prefill, "short_s": short, "long_s": long,
                    "tokens_per_s": requests * options.new_tokens / long,
                    "step_ms": 1e3 * (long - short) / (options.new_tokens - SHORT),
                }
            )  # fmt: skip
        rounds[-1]["tokens"] = tokens
    result = {
        "import_s": imported - begin, "start_s": started - imported,
        "first_s": firsts[0], "second_s": firsts[1], "rounds": rounds,
    }  # fmt: skip
    Path(options.result).write_text(json.dumps(result))


def run(options: argparse.Namespace, backend: str, folder: Path) -> dict[str, Any]:
    """One process with ``backend``."""
    caches = folder / backend
    environment = {
        **os.environ,
        "PAGEDGEN_PACK": str(options.pack.resolve()),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, so that all of it is timed
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
    }
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    command = [
        sys.executable, __file__, *sys.argv[1:], "--inside", backend,
        "--model", str(folder), "--result", str(result),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if not result.exists():
        raise SystemExit(f"{backend} failed:\n{done.stdout[-6000:]}{done.stderr[-6000:]}")
    said = done.stdout + done.stderr
    lines = [line for line in said.splitlines() if "pagedgen: " in line or "backend" in line]
    return {"backend": backend, "log": lines[:8], **json.loads(result.read_text())}


def alike(one: list[list[int]], other: list[list[int]]) -> dict[str, Any]:
    """How far the tokens of two runs agree."""
    same = []
    for x, y in zip(one, other, strict=True):
        pairs = enumerate(zip(x, y, strict=True))
        same.append(next((i for i, (a, b) in pairs if a != b), len(x)))
    return {
        "requests": len(same),
        "first_token_same": sum(n > 0 for n in same),
        "all_tokens_same": sum(n == len(x) for n, x in zip(same, one, strict=True)),
        "mean_tokens_until_they_differ": sum(same) / len(same),
    }


def main() -> None:
    """Alternate, print, write every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--other", default="TRITON_ATTN")
    parser.add_argument("--requests", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--context", type=int, default=1025)
    parser.add_argument("--new-tokens", type=int, default=136)
    parser.add_argument("--batched-tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--graphs", default="FULL_AND_PIECEWISE", help="vLLM's cudagraph_mode")
    parser.add_argument("--mode", type=int, help="vLLM's compilation mode; 0: no torch.compile")
    parser.add_argument("--native-ops", action="store_true")
    parser.add_argument("--json", type=Path)
    for hidden in ("--inside", "--model", "--result"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside(options)
        return
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": options.layers}))
    runs: list[dict[str, Any]] = []
    agreement: list[dict[str, Any]] = []
    for _ in range(options.runs):
        pair = []
        for backend in ("CUSTOM", options.other):
            pair.append(run(options, backend, folder))
            shown = {k: v for k, v in pair[-1].items() if k not in ("rounds", "log")}
            print(json.dumps(shown), flush=True)
            for one in pair[-1]["rounds"]:
                print("   ", {k: round(v, 3) for k, v in one.items() if k != "tokens"}, flush=True)
        ends = [[r for r in one["rounds"] if "tokens" in r] for one in pair]
        for ours, other in zip(*ends, strict=True):
            agreement.append(alike(ours["tokens"], other["tokens"]))
            print(agreement[-1], flush=True)
        for one in (r for end in ends for r in end):
            del one["tokens"]
        runs += pair
    if options.json:
        import torch

        packages = ("vllm", "torch", "triton", "transformers")
        environment = {
            "device": torch.cuda.get_device_name(),
            "date": str(date.today()),
            **{name: version(name) for name in packages},
        }
        asked = {
            k: v for k, v in vars(options).items() if k not in ("pack", "json", "inside", "model", "result")
        }
        written = {
            "environment": environment,
            "options": asked,
            "shape": SHAPE,
            "runs": runs,
            "agreement": agreement,
        }
        options.json.write_text(json.dumps(written, indent=1))


if __name__ == "__main__":
    main()
