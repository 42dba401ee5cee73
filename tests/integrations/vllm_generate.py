"""Generate with vLLM on token ids and print the tokens as JSON: run once with pagedgen, once without.

python vllm_generate.py MODEL_FOLDER [--dtype float32] [--requests 16] [--new-tokens 24]
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import Any


def main() -> None:
    """Random prompts of 1 to 300 tokens, half with a prefix in common; more than one step can take."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--speculative-tokens", type=int, default=0)
    parser.add_argument("--logprobs", type=int, help="with the most likely tokens of every position")
    parser.add_argument("--attention-backend")
    parser.add_argument("--graphs", help="vLLM's cudagraph_mode, without torch.compile; eager if not given")
    parser.add_argument(
        "--native-ops",
        action="store_true",
        help="norms, activations, rotation by torch",
    )
    options = parser.parse_args()

    from vllm import LLM, SamplingParams

    draw = random.Random(0)
    speculation = {
        "method": "ngram",
        "num_speculative_tokens": options.speculative_tokens,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    chosen: dict[str, Any] = {"enforce_eager": options.graphs is None}
    if options.attention_backend:
        chosen["attention_backend"] = options.attention_backend
        chosen["gpu_memory_utilization"] = 0.05  # several run side by side
    if options.graphs or options.native_ops:
        compilation = {"mode": 0, "cudagraph_mode": options.graphs or "NONE"}
        if options.native_ops:
            compilation["custom_ops"] = ["none"]
            native = {name: ["native"] for name in ("rms_norm", "fused_add_rms_norm")}
            chosen["kernel_config"] = {"ir_op_priority": native}
        chosen["compilation_config"] = compilation
    llm = LLM(
        options.model,
        skip_tokenizer_init=True,
        dtype=options.dtype,
        kv_cache_dtype=options.kv_cache_dtype,
        block_size=options.block_size,
        max_model_len=1024,
        max_num_seqs=16,
        max_num_batched_tokens=256,  # prompts are split into chunks
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        kv_cache_memory_bytes=256 << 20,
        speculative_config=speculation if options.speculative_tokens else None,
        worker_extension_cls="vllm_worker.Extension",
        **chosen,
    )
    prefix = [draw.randrange(3, 500) for _ in range(100)]
    lengths = [1, 31, 32, 33, *(draw.randrange(2, 300) for _ in range(options.requests - 4))]
    prompts = [
        (prefix if i % 2 else []) + [draw.randrange(3, 500) for _ in range(length)]
        for i, length in enumerate(lengths)
    ]
    sampling = SamplingParams(
        temperature=0,
        max_tokens=options.new_tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=options.logprobs,
    )
    rounds = []
    for _ in range(options.rounds):  # the second finds the first's prompts in the prefix cache
        start = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        rounds.append(
            {
                "seconds": seconds,
                "tokens": [list(o.outputs[0].token_ids) for o in outputs],
                "cached": sum(o.num_cached_tokens or 0 for o in outputs),
            }
        )
        if options.logprobs:
            rounds[-1]["logprobs"] = [
                [{token: one.logprob for token, one in place.items()} for place in o.outputs[0].logprobs]
                for o in outputs
            ]
    calls = llm.collective_rpc("attention_calls")[0]
    print("RESULT " + json.dumps({"rounds": rounds, "calls": calls}))


if __name__ == "__main__":
    main()
