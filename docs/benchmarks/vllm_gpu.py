"""vLLM on a GPU with the plug-in beside its own backends: tokens/s, step times, start-up, tokens compared.

    python docs/benchmarks/vllm_gpu.py PACK [--backends CUSTOM TRITON_ATTN FLASH_ATTN] [--requests 64 256]
        [--json FILE] [--logs FOLDER]

Random weights in the shape of Llama-3-8B, bf16, one GPU. Each backend, CUSTOM being the plug-in, has an
engine in a process of its own, with caches of compiled code that start out empty. Engines start one after
the other (``--start-together``: at once), stay, and then take turns, so that each is timed alone and all
under the same conditions. For each number of requests: prompts of ``--context`` tokens; then rounds of the
same prompts, now in the prefix cache but for their last block, with ``--new-tokens`` tokens for each.
Nearly every step is then a decode of all requests. A round with ``SHORT`` new tokens is timed as well: the
difference of the two is steps alone, without the taking in of requests. At last ``COMPARED`` tokens of
every request are generated with their log-probabilities, and held against the first backend's. The JSON is
written after every round.

``--native-ops`` has torch compute norms, activations and rotation, for a vLLM without its compiled extension.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

SHORT = 8  # new tokens of the shorter of the two rounds
COMPARED = 32  # new tokens of the round whose log-probabilities are compared
SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "initializer_range": 0.02, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KV_BYTES = 2 * 8 * 128 * 2  # of a token in a layer
# What vLLM's log says of its start, in seconds.
STARTS = {
    "load_s": r"Model loading took .* and ([\d.]+) seconds",
    "profile_cache_warmup_s": r"init engine \(profile, create kv cache, warmup model\) took ([\d.]+) s",
}
Tops = list[dict[int, float]]  # of a request: the likeliest tokens of every place, with log-probabilities


def _weights(param: Any, name: str = "", drawn: list[int] = [0]) -> None:  # noqa: B006
    """Norms of ones, the rest normal: logits lie as far apart as a model's (vLLM's own are within 1e-3)."""
    import torch

    if not torch.is_floating_point(param):
        return
    if param.ndim < 2:
        param.data.fill_(1)
        return
    drawn[0] += 1
    param.data.normal_(0, 0.02, generator=torch.Generator(device=param.device).manual_seed(drawn[0]))


def inside(options: argparse.Namespace) -> None:
    """Start vLLM, then generate what is asked for until the other side hangs up."""
    begin = time.perf_counter()
    import torch
    from vllm import LLM, SamplingParams
    from vllm.model_executor.model_loader import dummy_loader

    dummy_loader.initialize_single_dummy_weight = _weights
    imported = time.perf_counter()
    compilation: dict[str, Any] = {"cudagraph_mode": options.graphs}
    chosen: dict[str, Any] = {}
    if options.mode is not None:
        compilation["mode"] = options.mode
    if options.capture_sizes:
        compilation["cudagraph_capture_sizes"] = options.capture_sizes
    if options.native_ops:
        compilation["custom_ops"] = ["none"]
        native = {name: ["native"] for name in ("rms_norm", "fused_add_rms_norm")}
        chosen["kernel_config"] = {"ir_op_priority": native}
    length = options.context + options.new_tokens + 16
    llm = LLM(
        options.model, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
        kv_cache_dtype=options.kv_cache_dtype, block_size=16, attention_backend=options.inside,
        max_model_len=length, max_num_seqs=max(options.requests),
        max_num_batched_tokens=options.batched_tokens, enable_prefix_caching=True,
        compilation_config=compilation, gpu_memory_utilization=0.2,  # what has to be free
        kv_cache_memory_bytes=max(options.requests) * length * options.layers * KV_BYTES * 11 // 10, **chosen,
    )  # fmt: skip
    started = time.perf_counter()
    with Connection(options.connection) as parent:
        parent.send({"import_s": imported - begin, "start_s": started - imported})
        while asked := parent.recv():
            requests, context, new, tops = asked
            draw = random.Random(f"{requests} {context}")
            vocabulary = range(3, SHAPE["vocab_size"])
            prompts: list[Any] = [
                {"prompt_token_ids": draw.choices(vocabulary, k=context)} for _ in range(requests)
            ]
            sampling = SamplingParams(
                temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, logprobs=tops
            )
            torch.cuda.synchronize()
            start = time.perf_counter()
            outputs = [o.outputs[0] for o in llm.generate(prompts, sampling, use_tqdm=False)]
            seconds = time.perf_counter() - start
            places = [
                [{token: one.logprob for token, one in place.items()} for place in o.logprobs] if tops else []
                for o in outputs
            ]
            parent.send((seconds, [list(o.token_ids) for o in outputs], places))


class Engine:
    """A process that serves one backend."""

    def __init__(self, options: argparse.Namespace, number: int, folder: Path) -> None:
        self.backend: str = options.backends[number]
        self.figures: dict[str, Any] = {"backend": self.backend, "rounds": []}
        self.tokens: list[tuple[list[list[int]], list[Tops]]] = []
        self._log = (options.logs or folder) / f"{number}-{self.backend}.log"
        self._connection, theirs = Pipe()
        caches = folder / str(number)
        environment = {
            **os.environ,
            "PAGEDGEN_PACK": str(options.pack.resolve()),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, so that all of it is timed
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "VLLM_CACHE_ROOT": str(caches / "vllm"),
        }
        command = [
            sys.executable, __file__, *sys.argv[1:], "--inside", self.backend,
            "--model", str(folder), "--connection", str(theirs.fileno()),
        ]  # fmt: skip
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, pass_fds=(theirs.fileno(),)
            )
        theirs.close()

    def _answer(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            raise SystemExit(f"{self.backend} failed:\n{self._log.read_text()[-6000:]}") from None

    def started(self, context: int) -> None:
        """Wait until it serves; take what it says of its start, and time two prompts."""
        self.figures |= self._answer()
        said = self._log.read_text()
        found = {name: re.findall(pattern, said) for name, pattern in STARTS.items()}
        self.figures |= {name: float(values[-1]) for name, values in found.items() if values}
        self.figures["log"] = re.findall(r"Using \S+ backend|serves Layer\(.*\)", said)
        self.figures["first_s"], self.figures["second_s"] = (self.ask(1, context - i, 1)[0] for i in range(2))

    def ask(self, requests: int, context: int, new: int, tops: int | None = None) -> Any:
        """Seconds, tokens and their log-probabilities."""
        self._connection.send((requests, context, new, tops))
        return self._answer()

    def ended(self) -> None:
        """Hang up and wait."""
        self._connection.send(None)
        self._process.wait()


def alike(one: Engine, other: Engine, index: int) -> dict[str, Any]:
    """How far the tokens of two engines agree, and how close the likeliest tokens were where they do not.

    ``apart``: the largest difference of a token's log-probability, before the tokens part. ``gaps``: where
    they part, by how much the first engine preferred its token to the other's: median and largest of the
    requests, None where the other's is not among its likeliest.
    """
    (tokens, tops), (others, other_tops) = one.tokens[index], other.tokens[index]
    same, apart, gaps, unlikely = [], 0.0, [], 0
    for r, (x, y) in enumerate(zip(tokens, others, strict=True)):
        places = enumerate(zip(x, y, strict=True))
        same.append(next((i for i, (a, b) in places if a != b), len(x)))
        for i, token in enumerate(x[: same[-1]]):
            apart = max(apart, abs(tops[r][i][token] - other_tops[r][i][token]))
        if same[-1] < len(x):
            place = tops[r][same[-1]]
            if y[same[-1]] in place:
                gaps.append(place[x[same[-1]]] - place[y[same[-1]]])
            else:
                unlikely += 1
    gaps.sort()
    return {
        "with": one.backend, "requests": len(same), "tokens_each": len(tokens[0]),
        "first_token_same": sum(n > 0 for n in same),
        "all_tokens_same": sum(n == len(x) for n, x in zip(same, tokens, strict=True)),
        "mean_tokens_until_they_differ": sum(same) / len(same), "log_probability_apart": apart,
        "gap_median": gaps[len(gaps) // 2] if gaps else None, "gap_largest": gaps[-1] if gaps else None,
        "not_among_the_likeliest": unlikely,
    }  # fmt: skip


def write(options: argparse.Namespace, engines: list[Engine]) -> None:
    """Every figure so far, at once or not at all."""
    import torch

    hidden = ("pack", "json", "logs", "inside", "model", "connection")
    packages = ("vllm", "torch", "triton", "transformers")
    written = {
        "environment": {
            "device": torch.cuda.get_device_name(),
            "date": str(date.today()),
            **{name: version(name) for name in packages},
        },
        "options": {k: v for k, v in vars(options).items() if k not in hidden},
        "shape": SHAPE,
        "runs": [engine.figures for engine in engines],
    }
    half = options.json.with_suffix(".half")
    half.write_text(json.dumps(written, indent=1))
    half.replace(options.json)


def main() -> None:
    """Start the engines, let them take turns; print and write what each gave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--backends", nargs="+", default=["CUSTOM", "TRITON_ATTN", "FLASH_ATTN"])
    parser.add_argument("--requests", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--context", type=int, default=1025)
    parser.add_argument("--new-tokens", type=int, default=136)
    parser.add_argument("--batched-tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=10, help="every engine has its own")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--graphs", default="FULL_AND_PIECEWISE", help="vLLM's cudagraph_mode")
    parser.add_argument("--capture-sizes", type=int, nargs="+", help="vLLM's cudagraph_capture_sizes")
    parser.add_argument("--mode", type=int, help="vLLM's compilation mode; 0: no torch.compile")
    parser.add_argument("--native-ops", action="store_true")
    parser.add_argument("--start-together", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--logs", type=Path, help="a folder for what each process said")
    for hidden in ("--inside", "--model"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--connection", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside(options)
        return
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": options.layers}))
    engines: list[Engine] = []
    for number in range(len(options.backends)):
        engines.append(Engine(options, number, folder))
        if not options.start_together:
            engines[-1].started(options.context)
    for engine in engines:
        if options.start_together:
            engine.started(options.context)
        print(json.dumps(engine.figures), flush=True)
    for requests in options.requests:
        prompts_s = [engine.ask(requests, options.context, 1)[0] for engine in engines]
        for _ in range(options.rounds):
            for engine, prompts in zip(engines, prompts_s, strict=True):
                short = engine.ask(requests, options.context, SHORT)[0]
                long = engine.ask(requests, options.context, options.new_tokens)[0]
                engine.figures["rounds"].append(
                    {
                        "requests": requests, "prompts_s": prompts, "short_s": short, "long_s": long,
                        "tokens_per_s": requests * options.new_tokens / long,
                        "step_ms": 1e3 * (long - short) / (options.new_tokens - SHORT),
                    }
                )  # fmt: skip
                shown = {k: round(v, 3) for k, v in engine.figures["rounds"][-1].items()}
                print(engine.backend, shown, flush=True)
            if options.json:
                write(options, engines)
    for index, requests in enumerate(options.requests):
        for engine in engines:
            engine.tokens.append(engine.ask(requests, options.context, COMPARED, 2)[1:])
            engine.figures.setdefault("tokens", []).append(alike(engines[0], engine, index))
            print(engine.backend, engine.figures["tokens"][-1], flush=True)
        if options.json:
            write(options, engines)
    for engine in engines:
        engine.ended()


if __name__ == "__main__":
    main()
