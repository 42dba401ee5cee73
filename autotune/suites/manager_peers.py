"""The block managers that the ``manager`` suite compares, behind one set of timed operations."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from pagedgen.runtime.arrays import I32
from pagedgen.runtime.block_manager import BlockManager

BLOCK_SIZE = 16


def cpu_us(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU time of this thread in microseconds, and the call's result."""
    start = time.thread_time_ns()
    result = call()
    return (time.thread_time_ns() - start) / 1e3, result


class Manager(Protocol):
    """What is timed. Times are CPU microseconds; preparation outside them is not counted."""

    name: str

    def start(self, prompts: Sequence[I32]) -> None:
        """Admit the sequences that :meth:`step` decodes."""

    def step(self, tokens: I32) -> float:
        """Append a token to each sequence, blocks and hashes included."""

    def prompt(self, tokens: I32) -> dict[str, float]:
        """Times of ``lookup`` (hashing included), ``admit`` and ``free`` of one prompt."""


class Pagedgen:
    """This project's manager."""

    name = "pagedgen"

    def __init__(self, num_blocks: int, max_num_seqs: int, max_seq_len: int) -> None:
        self.manager = BlockManager(
            num_blocks, BLOCK_SIZE, max_num_seqs=max_num_seqs + 2, max_seq_len=max_seq_len
        )
        self._seqs = np.empty(0, np.int64)

    def start(self, prompts: Sequence[I32]) -> None:
        self._seqs = np.array([self.manager.allocate(p).seq for p in prompts])
        self.manager.take_copies()

    def step(self, tokens: I32) -> float:
        def call() -> None:
            self.manager.append_step(self._seqs, tokens)
            self.manager.take_copies()

        return cpu_us(call)[0]

    def prompt(self, tokens: I32) -> dict[str, float]:
        lookup, match = cpu_us(lambda: self.manager.match(tokens))
        admit, admission = cpu_us(lambda: self.manager.allocate(match))
        self.manager.take_copies()
        fork, children = cpu_us(lambda: self.manager.fork(admission.seq))
        self.manager.free(children[0])
        free, _ = cpu_us(lambda: self.manager.free(admission.seq))
        return {"lookup": lookup, "admit": admit, "fork": fork, "free": free}


class VLLM:
    """vLLM's KVCacheManager with its default block hash (SHA-256), one full-attention group."""

    def __init__(self, num_blocks: int, max_num_seqs: int, max_seq_len: int) -> None:
        import torch
        import vllm
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        self.name = f"vLLM {vllm.__version__}"
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=8, head_size=128, dtype=torch.float16)
        config = KVCacheConfig(
            num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        )
        self.manager = KVCacheManager(
            config, max_model_len=max_seq_len, scheduler_block_size=BLOCK_SIZE, hash_block_size=BLOCK_SIZE
        )
        self._requests: list[Any] = []
        self._count = 0

    def _request(self, tokens: list[int]) -> Any:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        self._count += 1
        params = SamplingParams(max_tokens=1 << 20)
        return Request(str(self._count), tokens, params, None, block_hasher=self._hasher)

    def _admit(self, request: Any, blocks: Any, hit: int) -> None:
        if self.manager.allocate_slots(request, request.num_tokens - hit, hit, blocks) is None:
            raise RuntimeError("the benchmark's pool is too small")
        request.num_computed_tokens = request.num_tokens

    def start(self, prompts: Sequence[I32]) -> None:
        for prompt in prompts:
            request = self._request(prompt.tolist())
            blocks, hit, _ = self.manager.get_computed_blocks(request)
            self._admit(request, blocks, hit)
            self._requests.append(request)

    def step(self, tokens: I32) -> float:
        new = tokens.tolist()

        def call() -> None:
            for request, token in zip(self._requests, new, strict=True):
                request.append_output_token_ids(token)
                self.manager.allocate_slots(request, 1)
                request.num_computed_tokens += 1

        return cpu_us(call)[0]

    def prompt(self, tokens: I32) -> dict[str, float]:
        prompt = tokens.tolist()
        hashing, request = cpu_us(lambda: self._request(prompt))
        lookup, (blocks, hit, _) = cpu_us(lambda: self.manager.get_computed_blocks(request))
        admit, _ = cpu_us(lambda: self._admit(request, blocks, hit))
        free, _ = cpu_us(lambda: self.manager.free(request))
        return {"lookup": hashing + lookup, "admit": admit, "free": free}
