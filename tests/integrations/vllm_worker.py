"""For vLLM's ``worker_extension_cls``: what the end-to-end test changes in a worker, before it loads a model.

Calls of the pack's kernels are counted. ``PAGEDGEN_TEST_TIMES=1``: the time that attention takes is added up.
``PAGEDGEN_TEST_QUERIES=16``: vLLM's Triton backend keeps queries in 16 bits where the cache is in FP8, as
pagedgen does; its own way is to round them to FP8 as well.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from functools import wraps

from pagedgen.integrations import serving_pack
from pagedgen.runtime.attention import Attention

TIMES: dict[str, float] = defaultdict(float)
CALLS = {op.value: 0 for op in serving_pack.OPERATORS}


def _counted(name):
    function = getattr(Attention, name)

    @wraps(function)
    def call(*args, **options):
        CALLS[name] += 1
        return function(*args, **options)

    return call


for operator in CALLS:
    setattr(Attention, operator, _counted(operator))


def _timed(function, name):
    @wraps(function)
    def call(*args, **options):
        start = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            TIMES[name] += time.perf_counter() - start
            TIMES[name + "_calls"] += 1

    return call


if os.environ.get("PAGEDGEN_TEST_QUERIES") == "16":
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    _made = TritonAttentionImpl.__init__

    @wraps(_made)
    def _init(self, *args, **options):
        _made(self, *args, **options)
        self.supports_quant_query_input = False

    TritonAttentionImpl.__init__ = _init

if os.environ.get("PAGEDGEN_TEST_TIMES"):
    from vllm.v1.attention.backends import cpu_attn

    if os.environ.get(serving_pack.PACK_VARIABLE):
        from pagedgen.integrations.vllm import impl as ours

        implementation, builder = ours.PagedgenImpl, None
    else:
        implementation, builder = cpu_attn.CPUAttentionBackendImpl, cpu_attn.CPUAttentionMetadataBuilder
    if builder is None:
        from pagedgen.integrations.vllm.metadata import MetadataBuilder as builder
    implementation.forward = _timed(implementation.forward, "forward")
    implementation.do_kv_cache_update = _timed(implementation.do_kv_cache_update, "write")
    builder.build = _timed(builder.build, "build")


class Extension:
    """Mixed into vLLM's worker; methods are called by ``collective_rpc``."""

    def attention_calls(self) -> dict[str, int]:
        """Calls of the pack's kernels so far, by operator."""
        return dict(CALLS)

    def attention_times(self) -> dict[str, float]:
        """Seconds since the last call, by what took them."""
        taken = dict(TIMES)
        TIMES.clear()
        return taken
