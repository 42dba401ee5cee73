"""Every tiny model in vLLM twice, with vLLM's own backend and with pagedgen: the tokens are the same.

    python vllm_end_to_end.py FOLDER        (FOLDER holds cpu_packs.py's packs; run by .ci/vllm-cpu)

Chunked prefill and prefix caching are on; the second round finds the prompts of the first in the cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny_models

HERE = Path(__file__).parent
# (model, pack, options of vllm_generate.py)
RUNS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
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


def generate(model: Path, options: tuple[str, ...], **variables: str) -> dict[str, Any]:
    """What vllm_generate.py printed, and whether pagedgen said that it serves."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PAGEDGEN_")}
    environment |= {"PYTHONPATH": str(HERE), **variables}
    command = [sys.executable, str(HERE / "vllm_generate.py"), str(model), *options]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{' '.join(command)} failed:\n{run.stdout[-4000:]}{run.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    result["serves"] = "pagedgen: " in run.stdout + run.stderr
    return result


def main() -> None:
    """Print a row a run; end with an error if any differs."""
    folder = Path(sys.argv[1])
    good = True
    print("| model | pack | options | same tokens | cached tokens | calls of decode | extend | write_kv |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, pack, options in RUNS:
        model = folder / name
        if not model.exists():
            tiny_models.write(name, model)
        stock = generate(model, options)
        ours = generate(model, options, PAGEDGEN_PACK=str(folder / f"{pack}.pack"))
        pairs = [
            (a, b)
            for one, other in zip(stock["rounds"], ours["rounds"], strict=True)
            for a, b in zip(one["tokens"], other["tokens"], strict=True)
        ]
        same = sum(a == b for a, b in pairs)
        cached = [one["cached"] for one in ours["rounds"]]
        calls = ours["calls"]
        row = (name, pack, " ".join(options), f"{same} of {len(pairs)}", sum(cached), *calls.values())
        print(f"| {' | '.join(map(str, row))} |", flush=True)
        good &= same == len(pairs) and ours["serves"] and not stock["serves"] and cached[-1] > 0
        good &= all(calls.values()) and not any(stock["calls"].values())
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
