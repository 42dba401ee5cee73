"""The serving loop of docs/runtime.md runs as it is printed there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pagedgen import BlockManager, KVCache, KVShape
from pagedgen.errors import OutOfBlocks
from pagedgen.runtime import torch_attention
from pagedgen.values.spec import DType

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "runtime.md"
HEADS, DIM, LAYERS, VOCABULARY = 2, 16, 2, 61


class Model:
    """Two attention layers with random weights, paged; ``alone`` is the same on contiguous tensors."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(VOCABULARY, HEADS * DIM, generator=generator)
        self.position = torch.randn(2048, HEADS * DIM, generator=generator)
        self.weights = torch.randn(LAYERS, 3, HEADS * DIM, HEADS * DIM, generator=generator) / 4
        self.passes: list[int] = []

    def layer(self, x: torch.Tensor, layer: int) -> list[torch.Tensor]:
        return [(x @ w).view(-1, HEADS, DIM) for w in self.weights[layer]]

    def __call__(
        self, manager: BlockManager, cache: KVCache, work: Sequence[tuple[int, list[int]]]
    ) -> list[int]:
        seqs, news = [seq for seq, _ in work], [len(tokens) for _, tokens in work]
        lens = [manager.length(seq) for seq in seqs]
        starts = [n - new for n, new in zip(lens, news, strict=True)]
        slots = [manager.slots(*span) for span in zip(seqs, starts, lens, strict=True)]
        table = torch.from_numpy(manager.groups[0].table[[manager.seqs.row(seq) for seq in seqs]])
        positions = [p for start, stop in zip(starts, lens, strict=True) for p in range(start, stop)]
        x = self.embedding[[t for _, tokens in work for t in tokens]] + self.position[positions]
        for layer in range(LAYERS):
            q, k, v = self.layer(x, layer)
            cache.write_kv(layer, k, v, torch.from_numpy(np.concatenate(slots)))
            out = torch_attention.extend(q, cache.k[layer], cache.v[layer], table, lens, news)
            x = x + out.reshape(len(x), -1)
        self.passes.append(len(x))
        last = torch.tensor(news).cumsum(0) - 1
        return (x[last] @ self.embedding.T).argmax(-1).tolist()

    def alone(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(max_new_tokens):
            x = self.embedding[tokens] + self.position[: len(tokens)]
            for layer in range(LAYERS):
                q, k, v = (part.transpose(0, 1) for part in self.layer(x, layer))
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                x = x + out.transpose(0, 1).reshape(len(x), -1)
            tokens.append(int((x[-1] @ self.embedding.T).argmax()))
        return tokens[len(prompt) :]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def serve() -> Any:
    """The function that the guide's first block of code defines."""
    code = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)[0]
    body = [line for line in code.splitlines() if line.strip()]
    assert len(body) <= 45
    namespace: dict[str, Any] = {}
    exec(compile(code, str(GUIDE), "exec"), namespace)
    return namespace["serve"]


def requests() -> list[list[int]]:
    rng = np.random.default_rng(5)
    system = rng.integers(0, VOCABULARY, 21).tolist()
    return [[*system, *rng.integers(0, VOCABULARY, 5 + 3 * i).tolist()] for i in range(6)]


@pytest.mark.parametrize("blocks", [200, 34, 20])
def test_every_request_gets_its_own_tokens_whatever_the_pool(serve: Any, blocks: int) -> None:
    shape = KVShape(LAYERS, HEADS, DIM, block_size=4, dtype=DType.F32)
    model = Model()
    done = dict(serve(model, shape, requests(), 18, (blocks + 1) * shape.block_bytes))
    assert done == {i: model.alone(prompt, 18) for i, prompt in enumerate(requests())}
    computed = sum(model.passes)
    if blocks == 200:  # continuous batching: 18 passes, and the system prompt's full blocks are computed once
        assert len(model.passes) == 18
        assert computed == sum(map(len, requests())) - 5 * 20 + 6 * 17
    else:
        assert len(model.passes) > 18


def test_a_request_that_can_never_fit_says_so(serve: Any) -> None:
    shape = KVShape(LAYERS, HEADS, DIM, block_size=4, dtype=DType.F32)
    with pytest.raises(OutOfBlocks):
        list(serve(Model(), shape, requests(), 18, 6 * shape.block_bytes))


def test_names_in_the_guide_exist() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    for name in re.findall(r"^\| `(\w+)\(", text, flags=re.MULTILINE):
        assert callable(getattr(BlockManager, name)), name
