"""A Llama in a hundred lines of torch, random weights, whose attention is a function of its caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import rms_norm, silu

# (layer, q [tokens, num_q_heads, head_dim], k, v [tokens, num_kv_heads, head_dim]) -> as q
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model."""

    vocabulary: int = 31
    layers: int = 3
    hidden: int = 256
    q_heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64


class TinyLlama:
    """float16 weights, drawn on the CPU from a seed, so that every device has the same.

    They are large enough that the most probable token stands out, and changes from step to step.
    """

    def __init__(self, sizes: Sizes, seed: int, device: str) -> None:
        self.sizes, draw = sizes, torch.Generator().manual_seed(seed)

        def weight(out: int, into: int, gain: float = 1.0) -> torch.Tensor:
            drawn = torch.randn(out, into, generator=draw) * gain / into**0.5
            return drawn.half().to(device)

        width, inner = sizes.hidden, 2 * sizes.hidden
        heads = sizes.q_heads + 2 * sizes.kv_heads
        self.embedding = weight(sizes.vocabulary, width, width**0.5)
        self.qkv = [weight(heads * sizes.head_dim, width, 1.6) for _ in range(sizes.layers)]
        self.output = [weight(width, sizes.q_heads * sizes.head_dim, 2.0) for _ in range(sizes.layers)]
        self.up = [weight(2 * inner, width) for _ in range(sizes.layers)]
        self.down = [weight(width, inner) for _ in range(sizes.layers)]
        self.head = weight(sizes.vocabulary, width, 4.0)
        self.frequencies = (10000.0 ** -(torch.arange(0, sizes.head_dim, 2) / sizes.head_dim)).to(device)

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotary embedding (Su et al., 2021) of the halves of each head."""
        angle = (positions[:, None].float() * self.frequencies)[:, None, :]  # [tokens, 1, head_dim / 2]
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1).half()

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Logits, float32 ``[tokens, vocabulary]``."""
        sizes = self.sizes
        x = self.embedding[ids]
        for layer in range(sizes.layers):
            y = rms_norm(x, (sizes.hidden,)) @ self.qkv[layer].T
            q, k, v = y.view(len(ids), -1, sizes.head_dim).split(
                (sizes.q_heads, sizes.kv_heads, sizes.kv_heads), dim=1
            )
            out = attend(layer, self._rotate(q, positions), self._rotate(k, positions), v)
            x = x + out.flatten(1) @ self.output[layer].T
            up, gate = (rms_norm(x, (sizes.hidden,)) @ self.up[layer].T).chunk(2, dim=-1)
            x = x + (up * silu(gate)) @ self.down[layer].T
        return (rms_norm(x, (sizes.hidden,)) @ self.head.T).float()


class Contiguous:
    """Attention over caches that are one tensor a layer: what paged attention has to agree with.

    K and V are held as ``stored`` leaves them: rounded to a cache's type and back.
    """

    def __init__(
        self, sizes: Sizes, stored: Callable[[int, torch.Tensor, torch.Tensor], list[torch.Tensor]]
    ) -> None:
        self.sizes, self.stored = sizes, stored
        self.kept: list[list[torch.Tensor]] = [[] for _ in range(sizes.layers)]

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        new = self.stored(layer, k, v)
        old = self.kept[layer]
        self.kept[layer] = [torch.cat(pair) for pair in zip(old, new, strict=True)] if old else new
        keys, values = (
            x.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in self.kept[layer]
        )
        scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * self.sizes.head_dim**-0.5
        ahead = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(ahead.triu(scores.shape[2] - scores.shape[1] + 1), float("-inf"))
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).half()


def greedy(
    model: TinyLlama, prompt: list[int], count: int, attend: Attend, device: str
) -> tuple[list[int], float]:
    """The most probable continuation, and the least by which a token was ahead of the next."""
    tokens, ahead, at = list(prompt), float("inf"), 0
    for _ in range(count):
        ids = torch.tensor(tokens[at:], device=device)
        logits = model(ids, torch.arange(at, len(tokens), device=device), attend)[-1]
        best = logits.topk(2)
        ahead = min(ahead, float(best.values[0] - best.values[1]))
        at = len(tokens)
        tokens.append(int(best.indices[0]))
    return tokens[len(prompt) :], ahead
