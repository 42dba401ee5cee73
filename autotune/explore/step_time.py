"""``StepTime``: how long a forward pass takes: the kernels' times, and a roofline for everything else."""

from __future__ import annotations

from dataclasses import dataclass

from pagedgen.autotune.explore.kernel_time import KernelTime
from pagedgen.autotune.explore.scheduler import Batch
from pagedgen.values.model import Model
from pagedgen.values.target import Target
from pagedgen.values.weights import Weights

# Shares of the published rates that are assumed; the first was measured (docs/benchmarks/decode-gpu.md).
READ_SHARE = 0.92  # of the bandwidth, by weights and block copies
MATMUL_SHARE = 0.65  # of the 16-bit matrix rate, by large products
PREFILL_SHARE = 0.35  # of the 16-bit matrix rate, by attention over a prompt, where it was not measured
SWAP_GBS = 25.0  # one direction between device and host: PCIe 4.0 x16, or half of a 5.0 link


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a forward pass of a rank.

    Decode attention is the kernel's time a layer. Matrix products take the longer of reading their weights
    and computing; attention over prompts the longer of its FLOPs and of reading its context. Block copies and
    swaps are added, not overlapped. Communication between ranks and the host's own work are not counted.

    ``model`` and ``weights`` are those of one rank; ``block_bytes`` of all layers. The target's bandwidth and
    matrix rate are known. ``prefill_share`` is the share of that rate that attention over prompts was
    measured to reach; without it ``PREFILL_SHARE`` is assumed.
    """

    kernel: KernelTime
    model: Model
    weights: Weights
    target: Target
    block_bytes: int
    prefill_share: float | None = None

    @property
    def origin(self) -> str:
        """What the kernels' times rest on, in words."""
        if self.prefill_share is None:
            return self.kernel.origin
        return f"{self.kernel.origin}, prompts at {self.prefill_share:.0%} of the matrix rate"

    @property
    def prefill_tokens_per_s(self) -> float:
        """Tokens of prompts computed in a second, attention left out: what preemption reckons with."""
        return self.target.f16_tflops * 1e12 * MATMUL_SHARE / self.weights.flops(1, 0)

    def __call__(self, batch: Batch, coverage: float = 0.0) -> tuple[float, float]:
        """(seconds of the step, seconds of decode attention in it)."""
        read = self.target.bandwidth_gbs * 1e9 * READ_SHARE
        peak = self.target.f16_tflops * 1e12
        layers = self.model.num_layers
        share = PREFILL_SHARE if self.prefill_share is None else self.prefill_share
        moved = 2 * batch.copies * self.block_bytes / read
        moved += (batch.swapped_out + batch.swapped_in) * self.block_bytes / (SWAP_GBS * 1e9)
        tokens = batch.num_tokens
        if not tokens:
            return moved, 0.0
        logits = batch.num_decodes + sum(chunk.last for chunk in batch.chunks)
        products = max(
            self.weights.bytes_read(tokens) / read,
            self.weights.flops(tokens, logits) / (peak * MATMUL_SHARE),
        )
        attention = 0.0
        if batch.num_decodes:
            attention = layers * 1e-6 * self.kernel.at(batch.num_decodes, batch.decode_tokens, coverage)
        prompts = 0.0
        for chunk in batch.chunks:
            # Each of the new tokens attends to those before it.
            pairs = chunk.tokens * (chunk.context + (chunk.tokens + 1) / 2)
            flops = 4 * self.model.num_q_heads * self.model.head_dim * pairs
            context = (chunk.context + chunk.tokens) * self.kernel.spec.kv_bytes_per_token
            prompts += layers * max(flops / (peak * share), context / read)
        return products + attention + prompts + moved, attention
