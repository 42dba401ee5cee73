"""A Llama with random weights on a GPU: paged kernels give the tokens of contiguous attention.

Prompts whole and in chunks, chunks beside decodes in one launch, copies on write after a fork; K and V go
through ``write_kv``, ``copy_blocks``, ``extend`` and ``decode`` of one pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu.tiny_llama import Contiguous, Sizes, TinyLlama, greedy

from pagedgen import Attention, load
from pagedgen.compiler.build import Choice, build
from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.render import render
from pagedgen.compiler.space import default_schedule
from pagedgen.runtime.attention import TORCH_DTYPES
from pagedgen.runtime.block_manager import BlockManager
from pagedgen.runtime.kv_cache import KVCache, KVShape
from pagedgen.runtime.kv_layout import KVLayout
from pagedgen.values.manifest import Rule
from pagedgen.values.spec import DType, KernelSpec, KVScale, Op
from pagedgen.values.target_table import gpu_target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (docs/gpu_tests.md)"),
]
SIZES, BLOCK, NEW = Sizes(), 16, 20
LENGTHS = (37, 61, 18)  # of the prompts
SEEDS = {DType.F16: 38, DType.FP8_E4M3: 22}  # of weights whose tokens stand out, by SURE, at every step
SURE = 0.1  # of a logit; they spread over about 4


def shape_of(kv: DType, layout: KVLayout) -> KVShape:
    scale = KVScale.HEAD if kv.is_fp8 else KVScale.NONE
    return KVShape(SIZES.layers, SIZES.kv_heads, SIZES.head_dim, BLOCK, kv, scale, layout)


def pack_of(kv: DType, folder: Path) -> Attention:
    """Kernels of the four operators that serving needs."""
    heads, scale = (SIZES.q_heads, SIZES.kv_heads), KVScale.HEAD if kv.is_fp8 else KVScale.NONE
    decode = KernelSpec(Op.DECODE, SIZES.head_dim, *heads, BLOCK, DType.F16, kv, scale)
    specs = [decode, replace(decode, op=Op.EXTEND)]
    specs.append(replace(decode, op=Op.WRITE_KV, num_q_heads=SIZES.kv_heads))
    kv_heads = (SIZES.kv_heads, SIZES.kv_heads)
    specs.append(KernelSpec(Op.COPY_BLOCKS, SIZES.head_dim, *kv_heads, BLOCK, kv, kv))
    to = gpu_target()
    choices = [
        Choice((compile_source(render(s, to, default_schedule(s, to))),), (Rule(1 << 30, 1 << 30, 0),), ())
        for s in specs
    ]
    return load(build(choices, folder / "model.pack"))


class Engine:
    """The least serving loop: sequences' tokens in, logits out."""

    def __init__(self, model: TinyLlama, attention: Attention, cache: KVCache) -> None:
        self.model, self.attention, self.cache = model, attention, cache
        self.manager = BlockManager(
            cache.num_blocks, BLOCK, max_num_seqs=16, max_seq_len=256, watermark=0.0, secret=b"end to end"
        )
        self.launches: list[str] = []

    def forward(self, work: Sequence[tuple[int, Sequence[int]]]) -> list[torch.Tensor]:
        """Run the last tokens of each sequence, which have slots: logits ``[tokens, vocabulary]`` each."""
        manager, cache, device = self.manager, self.cache, self.cache.device
        pairs = manager.take_copies()
        if len(pairs):
            assert cache.copier is not None  # nor are blocks copied by torch
            self.launches.append("copy_blocks")
            cache.copy_blocks(pairs)
        lens = [manager.length(seq) for seq, _ in work]
        news = [len(tokens) for _, tokens in work]
        slots = [manager.slots(seq, n - new, n) for (seq, _), n, new in zip(work, lens, news, strict=True)]
        rows = [manager.seqs.row(seq) for seq, _ in work]
        table = torch.from_numpy(manager.groups[0].table[rows]).to(device)
        slot_mapping = torch.from_numpy(np.concatenate(slots)).to(device)
        seq_lens = torch.tensor(lens, dtype=torch.int32, device=device)
        ends = torch.tensor([0, *np.cumsum(news)], dtype=torch.int32, device=device)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            assert cache.writer(k, v) is not None  # a kernel stores them, not torch
            cache.write_kv(layer, k, v, slot_mapping)
            scales = {}
            if cache.k_scale is not None and cache.v_scale is not None:
                scales = {"k_scale": cache.k_scale[layer], "v_scale": cache.v_scale[layer]}
            pools = (cache.k[layer], cache.v[layer], table, seq_lens)
            if max(news) == 1:
                self.launches.append("decode")
                out = self.attention.decode(q, *pools, **scales)
            else:
                self.launches.append("extend")
                out = self.attention.extend(q, *pools, ends, **scales)
            assert isinstance(out, torch.Tensor)
            return out

        ids = torch.tensor([token for _, tokens in work for token in tokens], device=device)
        positions = [torch.arange(n - new, n, device=device) for n, new in zip(lens, news, strict=True)]
        return list(self.model(ids, torch.cat(positions), attend).split(news))


def serve(engine: Engine, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Continuations of all prompts and of a fork of the first, which begins one token later.

    The first prompt comes whole; the second in two chunks, the later beside a decode of the first.
    """
    manager = engine.manager
    first, second, third = prompts
    a = manager.allocate(first).seq
    rows = [[int(engine.forward([(a, first)])[0][-1].argmax())]]
    admission = manager.allocate(second, max_new_tokens=40)
    b, at = admission.seq, admission.num_tokens
    engine.forward([(b, second[:at])])
    manager.append_step([a], [rows[0][-1]])
    manager.extend(b, second[at:])
    mixed = engine.forward([(a, rows[0][-1:]), (b, second[at:])])
    rows[0].append(int(mixed[0][-1].argmax()))
    rows.append([int(mixed[1][-1].argmax())])
    c = manager.allocate(third).seq
    rows.append([int(engine.forward([(c, third)])[0][-1].argmax())])
    (d,) = manager.fork(a)
    rows.append(list(rows[0]))
    seqs = [a, b, c, d]
    while min(len(row) for row in rows) < NEW:
        last = [row[-1] for row in rows]
        manager.append_step(seqs, last)
        logits = engine.forward([(seq, [token]) for seq, token in zip(seqs, last, strict=True)])
        for row, each in zip(rows, logits, strict=True):
            row.append(int(each[-1].argmax()))
    return [row[:NEW] for row in rows]


@pytest.mark.parametrize("layout", [KVLayout.NHD, KVLayout.HND])
@pytest.mark.parametrize("kv", SEEDS)
def test_tokens_are_those_of_contiguous_attention(tmp_path, kv, layout):
    model = TinyLlama(SIZES, SEEDS[kv], "cuda")
    attention = pack_of(kv, tmp_path)
    check(model, attention, kv, layout, "cuda")


def check(model: TinyLlama, attention: Attention, kv: DType, layout: KVLayout, device: str) -> None:
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, SIZES.vocabulary, (n,), generator=draw).tolist() for n in LENGTHS]
    scales = {}
    if kv.is_fp8:
        scales = {
            name: 0.01 + 0.02 * torch.rand(SIZES.layers, SIZES.kv_heads, generator=draw).to(device)
            for name in ("k_scale", "v_scale")
        }
    cache = KVCache(shape_of(kv, layout), 40, device, attention=attention, **scales)

    def stored(layer: int, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        if not kv.is_fp8:
            return [k, v]
        found = []
        for name, x in (("k_scale", k), ("v_scale", v)):
            scale, kind = scales[name][layer][:, None], TORCH_DTYPES[kv]
            most = torch.finfo(kind).max
            found.append((x.float() / scale).clamp(-most, most).to(kind).float() * scale)
        return found

    want, sure = [], []
    for prompt in prompts:
        tokens, ahead = greedy(model, prompt, NEW, Contiguous(SIZES, stored), device)
        want.append(tokens)
        sure.append(ahead)
    assert min(sure) > SURE, f"tokens that are nearly equal prove nothing: {sure}"
    assert min(len(set(tokens)) for tokens in want) > 5  # nor does one that repeats itself
    engine = Engine(model, attention, cache)
    assert serve(engine, prompts) == [*want, want[0]]
    assert set(engine.launches) == {"extend", "decode", "copy_blocks"}
    assert engine.manager.stats().counters.copied_blocks >= 1
