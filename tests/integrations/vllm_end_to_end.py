"""Every tiny model in vLLM twice, with vLLM's own backend and with pagedgen: the tokens are the same.

    python vllm_end_to_end.py FOLDER        (FOLDER holds cpu_packs.py's packs; run by .ci/vllm-cpu)
    python vllm_end_to_end.py FOLDER --gpu [--native-ops] [--json FILE]    (gpu_packs.py's pack)

Chunked prefill and prefix caching are on; the second round finds the prompts of the first in the cache. On a
GPU vLLM's own backend is TRITON_ATTN, models are in f16, and runs are eager or captured in full CUDA graphs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tiny_models

HERE = Path(__file__).parent
Run = tuple[str, str, tuple[str, ...]]  # model, pack, options of vllm_generate.py
RUNS: tuple[Run, ...] = (
    ("llama", "token", ()),
    ("llama", "dim", ()),
    ("llama", "token", ("--block-size", "64")),  # vLLM's blocks of 64 are two of the kernels'
    ("llama", "token", ("--speculative-tokens", "3")),
    ("qwen3", "token", ()),
    ("mistral-window", "token", ()),
    ("gemma2", "token", ()),
    ("gpt-oss", "token", ()),
    ("bloom", "token", ()),
)
FULL = ("--graphs", "FULL")
GPU_RUNS: tuple[Run, ...] = (
    ("llama", "gpu", ()),
    ("llama", "gpu", FULL),
    ("llama", "gpu", ("--graphs", "FULL_DECODE_ONLY")),
    ("llama", "gpu", ("--block-size", "64")),
    ("llama", "gpu", ("--speculative-tokens", "3")),
    ("llama", "gpu", ("--kv-cache-dtype", "fp8", *FULL)),
    ("qwen3", "gpu", FULL),
    ("mistral-window", "gpu", FULL),
    ("gemma2", "gpu", FULL),
    ("gpt-oss", "gpu", FULL),
)


def generate(model: Path, options: tuple[str, ...], **variables: str) -> dict[str, Any]:
    """What vllm_generate.py printed, and whether pagedgen said that it serves; or the end of its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PAGEDGEN_")}
    path = [str(HERE), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(path), **variables}
    command = [sys.executable, str(HERE / "vllm_generate.py"), str(model), *options]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        return {"failed": f"{' '.join(command)} failed:\n{run.stdout[-4000:]}{run.stderr[-4000:]}"}
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    result["serves"] = "pagedgen: " in run.stdout + run.stderr
    return result


def both(folder: Path, run: Run, gpu: bool, native_ops: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run with vLLM's own backend and with pagedgen's."""
    name, pack, options = run
    chosen: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    if gpu:
        options = ("--dtype", "float16", "--block-size", "16", *options)
        options += ("--native-ops",) if native_ops else ()
        chosen = ("--attention-backend", "TRITON_ATTN"), ("--attention-backend", "CUSTOM")
    stock = generate(folder / name, options + chosen[0])
    return stock, generate(folder / name, options + chosen[1], PAGEDGEN_PACK=str(folder / f"{pack}.pack"))


def main() -> None:
    """Print a row a run; end with an error if any differs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--native-ops", action="store_true")
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder: Path = options.folder
    runs = GPU_RUNS if options.gpu else RUNS
    for name in dict.fromkeys(name for name, *_ in runs):
        if not (folder / name).exists():
            tiny_models.write(name, folder / name)
    good, rows = True, []
    print("| model | pack | options | same tokens | cached tokens | calls of decode | extend | write_kv |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    with ThreadPoolExecutor(options.at_once) as threads:
        results = threads.map(lambda run: both(folder, run, options.gpu, options.native_ops), runs)
        for (name, pack, more), (stock, ours) in zip(runs, results, strict=True):
            if failed := [one["failed"] for one in (stock, ours) if "failed" in one]:
                print(f"| {name} | {pack} | {' '.join(more)} | failed |\n" + "\n".join(failed), flush=True)
                good = False
                continue
            pairs = [
                (a, b)
                for one, other in zip(stock["rounds"], ours["rounds"], strict=True)
                for a, b in zip(one["tokens"], other["tokens"], strict=True)
            ]
            same = sum(a == b for a, b in pairs)
            cached = [one["cached"] for one in ours["rounds"]]
            calls = ours["calls"]
            row = (name, pack, " ".join(more), f"{same} of {len(pairs)}", sum(cached), *calls.values())
            print(f"| {' | '.join(map(str, row))} |", flush=True)
            rows.append({"model": name, "options": more, "stock": stock, "pagedgen": ours})
            good &= same == len(pairs) and ours["serves"] and not stock["serves"] and cached[-1] > 0
            good &= all(calls.values()) and not any(stock["calls"].values())
    if options.json:
        options.json.write_text(json.dumps(rows))
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
