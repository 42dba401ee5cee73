"""Every tiny model in vLLM twice, with vLLM's own backend and with pagedgen: the tokens are the same.

    python vllm_end_to_end.py FOLDER        (FOLDER holds cpu_packs.py's packs; run by .ci/vllm-cpu)
    python vllm_end_to_end.py FOLDER --gpu [--native-ops] [--at-once 16] [--json FILE]    (gpu_packs.py's)

Chunked prefill and prefix caching are on; the second round finds the prompts of the first in the cache. On a
GPU vLLM's own backend is TRITON_ATTN, and runs are eager or captured in full CUDA graphs. Models are in f16
or bf16 there, as GPU kernels take no f32, so rounding may choose another token where two are about as likely.
Then up to where the tokens of a request part, their log-probabilities differ by at most ``CLOSE``, and there
the two most likely tokens of vLLM lie that close, ours being one of them.
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
    ("llama4", "token", ()),
)
# Natural logarithms. A bf16 number has three bits less than one in f16; and where caches are in FP8, one unit
# of f16 more or less makes K or V another FP8 number, up to 1/16 away, in the layers above.
CLOSE = {"float16": 0.05, "bfloat16": 0.4, "fp8": 0.4}
FULL = ("--graphs", "FULL")  # one graph takes decodes and prompts, by extend
DECODES = ("--graphs", "FULL_DECODE_ONLY")  # batches with prompts run eagerly
BF16 = ("--dtype", "bfloat16")  # vLLM refuses Gemma 2 in f16
GPU_RUNS: tuple[Run, ...] = (
    ("llama", "gpu", ()),
    ("llama", "gpu", FULL),
    ("llama", "gpu", DECODES),
    ("llama", "gpu", ("--block-size", "64")),
    ("llama", "gpu", ("--speculative-tokens", "3")),
    ("llama", "gpu", ("--kv-cache-dtype", "fp8", *DECODES)),
    ("qwen3", "gpu", DECODES),
    ("mistral-window", "gpu", DECODES),
    ("gemma2", "gpu", (*BF16, *DECODES)),
    ("gemma2", "gpu", (*BF16, *FULL)),
    ("gpt-oss", "gpu", DECODES),
    ("llama4", "gpu", DECODES),
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


def options_of(run: Run, gpu: bool, native_ops: bool, ours: bool) -> tuple[str, ...]:
    """Those of vllm_generate.py."""
    if not gpu:
        return run[2]
    chosen = ("--dtype", "float16", "--block-size", "16", "--logprobs", "2", *run[2])
    chosen += ("--native-ops",) if native_ops else ()
    return (*chosen, "--attention-backend", "CUSTOM" if ours else "TRITON_ATTN")


def half(folder: Path, run: Run, gpu: bool, native_ops: bool, ours: bool) -> dict[str, Any]:
    """A run with pagedgen's backend, or with vLLM's own."""
    if ours:
        variables = {"PAGEDGEN_PACK": str(folder / f"{run[1]}.pack")}
    else:
        variables = {"PAGEDGEN_TEST_QUERIES": "16"} if gpu else {}
    return generate(folder / run[0], options_of(run, gpu, native_ops, ours), **variables)


def parted(stock: dict[str, Any], ours: dict[str, Any], close: float) -> dict[str, Any]:
    """How far two rounds agree: requests with the same tokens, and whether rounding explains the others.

    ``apart`` is the largest difference of a token's log-probability before the tokens part;
    ``chosen_by_rounding`` are requests that part where vLLM's two most likely tokens are within ``close``,
    ours one of them; ``wrong`` are the rest of those that part.
    """
    counts = {"same": 0, "chosen_by_rounding": 0, "wrong": 0, "apart": 0.0}
    for request, (one, other) in enumerate(zip(stock["tokens"], ours["tokens"], strict=True)):
        places = enumerate(zip(one, other, strict=True))
        place = next((i for i, (a, b) in places if a != b), None)
        if "logprobs" in stock:
            tops, our_tops = stock["logprobs"][request], ours["logprobs"][request]
            for i, token in enumerate(one[:place]):
                difference = abs(tops[i][str(token)] - our_tops[i][str(token)])
                counts["apart"] = max(counts["apart"], difference)
        if place is None:
            counts["same"] += 1
        elif "logprobs" in stock and str(other[place]) in tops[place]:
            gap = tops[place][str(one[place])] - tops[place][str(other[place])]
            counts["chosen_by_rounding" if gap <= close else "wrong"] += 1
        else:
            counts["wrong"] += 1
    return counts


def main() -> None:
    """Print a row a run, and write what is there; end with an error if any differs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--native-ops", action="store_true")
    parser.add_argument("--only", nargs="+", type=int, help="numbers of runs, from 0")
    parser.add_argument("--at-once", type=int, default=1, help="processes side by side")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder: Path = options.folder
    runs = GPU_RUNS if options.gpu else RUNS
    runs = tuple(runs[i] for i in options.only) if options.only else runs
    for name in dict.fromkeys(name for name, *_ in runs):
        if not (folder / name).exists():
            tiny_models.write(name, folder / name)
    good, rows = True, []
    print("| model | pack | options | same tokens | cached tokens | calls of decode | extend | write_kv |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    with ThreadPoolExecutor(options.at_once) as threads:
        halves = [
            [
                threads.submit(half, folder, run, options.gpu, options.native_ops, ours)
                for ours in (False, True)
            ]
            for run in runs
        ]
        for (name, pack, more), (stock_run, our_run) in zip(runs, halves, strict=True):
            stock, ours = stock_run.result(), our_run.result()
            if failed := [one["failed"] for one in (stock, ours) if "failed" in one]:
                print(f"| {name} | {pack} | {' '.join(more)} | failed |\n" + "\n".join(failed), flush=True)
                good = False
                continue
            close = max(value for name, value in CLOSE.items() if name in ("float16", *more))
            counts = [parted(a, b, close) for a, b in zip(stock["rounds"], ours["rounds"], strict=True)]
            requests = sum(len(one["tokens"]) for one in ours["rounds"])
            total = {key: sum(one[key] for one in counts) for key in ("same", "chosen_by_rounding", "wrong")}
            total["apart"] = max(one["apart"] for one in counts)
            cached = [one["cached"] for one in ours["rounds"]]
            calls = ours["calls"]
            same = f"{total['same']} of {requests}"
            same += f", {rounded} by rounding" if (rounded := total["chosen_by_rounding"]) else ""
            row = (name, pack, " ".join(more), same, sum(cached), *calls.values())
            print(f"| {' | '.join(map(str, row))} |", flush=True)
            rows.append({"model": name, "options": more, "requests": requests, **total, "calls": calls})
            good &= not total["wrong"] and total["apart"] <= close
            good &= ours["serves"] and not stock["serves"] and cached[-1] > 0
            good &= all(calls.values()) and not any(stock["calls"].values())
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1))
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
