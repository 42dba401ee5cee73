"""For vLLM's ``worker_extension_cls``: what the end-to-end test changes in a worker, before it loads a model.

``PAGEDGEN_TEST_REFERENCE=1``: operators that the pack has no kernels for are computed by torch; without it
the worker is as users have it. ``PAGEDGEN_TEST_TIMES=1``: the time that attention takes is added up.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from functools import wraps

from reference_attention import ReferenceAttention

from pagedgen.integrations import serving_pack
from pagedgen.values.spec import KernelSpec

TIMES: dict[str, float] = defaultdict(float)


class PackWithReference(serving_pack.ServingPack):
    """A pack that has everything, some of it as plain torch."""

    @property
    def attention(self) -> ReferenceAttention:
        """One for all layers."""
        return ATTENTION

    def kernels(self, layer: serving_pack.Layer, block_size: int) -> serving_pack.LayerKernels:
        """The specs, whether there are kernels or not."""
        specs: list[KernelSpec] = [layer.spec(op, block_size, self.k_inner) for op in serving_pack.OPERATORS]
        return serving_pack.LayerKernels(*specs)

    def check(self, layer: serving_pack.Layer) -> None:
        """Everything is served."""

    def block_sizes(self, **shape: int | None) -> tuple[int, ...]:
        """Those of the pack's kernels."""
        return tuple(sorted({spec.block_size for spec in self.specs}))


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


if os.environ.get("PAGEDGEN_TEST_REFERENCE"):
    whole = serving_pack.chosen_pack()
    ATTENTION = ReferenceAttention(whole.attention)
    substitute = PackWithReference(whole.pack)
    serving_pack.chosen_pack = lambda: substitute

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
        """Calls of kernels and of the reference so far; none where the pack serves everything itself."""
        return dict(ATTENTION.calls) if os.environ.get("PAGEDGEN_TEST_REFERENCE") else {}

    def attention_times(self) -> dict[str, float]:
        """Seconds since the last call, by what took them."""
        taken = dict(TIMES)
        TIMES.clear()
        return taken
