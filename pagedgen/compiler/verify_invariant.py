"""The gate of batch-invariant kernels: the bits of a sequence's outputs, alone and in random batches.

A sequence is called alone, then with others, in any order, with padding between them, and with its prompt cut
into chunks of any length. Nothing is compared with a reference: that is :mod:`pagedgen.compiler.verify`'s.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from pagedgen.values.spec import Causality, KernelSpec, Op

if TYPE_CHECKING:
    from pagedgen.compiler.verify import Callee, Inputs

MOST_SEQS = 6  # of a random batch, padding included


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence of a batch: which of the pool's, of how many tokens, how many of them queries."""

    source: int
    seq_len: int
    query_len: int


PADDING = Row(0, 0, 0)


def draw_batch(spec: KernelSpec, lens: Sequence[int], draw: random.Random) -> list[Row]:
    """A random batch of sequences of these lengths, chunks of them where that changes no query's view."""
    rows = []
    for source in draw.sample(range(len(lens)), draw.randint(1, min(len(lens), MOST_SEQS - 1))):
        end = lens[source]
        if spec.op is Op.DECODE:
            rows.append(Row(source, end, 1))
            continue
        if spec.causality is Causality.CAUSAL:
            end = draw.randint(1, end)
        rows.append(Row(source, end, draw.choice((1, draw.randint(1, end), end))))
    for _ in range(draw.randint(0, MOST_SEQS - len(rows))):
        rows.insert(draw.randint(0, len(rows)), PADDING)
    return rows


def batch_of(spec: KernelSpec, pool: Inputs, firsts: Sequence[int], rows: Sequence[Row]) -> Inputs:
    """The call of a batch on the sequences of ``pool``, whose queries begin at ``firsts`` in its q."""
    device = pool.q.device
    queries: list[int] = []
    ends = [0]
    for row in rows:
        if spec.op is Op.DECODE:
            queries.append(firsts[row.source])
        else:
            first = firsts[row.source] + row.seq_len
            queries += range(first - row.query_len, first)
            ends.append(len(queries))
    sources = torch.tensor([row.source for row in rows], device=device)
    q = pool.q[torch.tensor(queries, dtype=torch.int64, device=device)]
    out = torch.full((*q.shape[:2], spec.v_dim), float("nan"), dtype=q.dtype, device=device)
    return replace(
        pool,
        q=q,
        block_table=pool.block_table[sources],
        seq_lens=torch.tensor([row.seq_len for row in rows], dtype=torch.int32, device=device),
        out=out,
        lse=torch.full(q.shape[:2], float("nan"), device=device) if spec.return_lse else None,
        cu_seqlens_q=None if spec.op is Op.DECODE else torch.tensor(ends, dtype=torch.int32, device=device),
        causal=None if pool.causal is None else pool.causal[sources],
    )


def changed_bits(
    spec: KernelSpec,
    callee: Callee,
    variant: int,
    device: torch.device,
    seed: int,
    *,
    lens: Sequence[int],
    batches: int,
    wrap: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
) -> str:
    """Call sequences of these lengths alone and in random batches; say what differs, or nothing.

    Args:
        spec, callee, variant, device, seed, wrap: as :func:`pagedgen.compiler.verify.gate` takes them.
        lens: tokens of each sequence of the pool; all of them are queries, but in a decode the last.
        batches: how many random ones.
    """
    from pagedgen.compiler.verify import make_inputs, run_case

    draw = random.Random(seed)
    pool = make_inputs(spec, lens, device, seed, poison=False)
    firsts = [row if spec.op is Op.DECODE else sum(lens[:row]) for row in range(len(lens))]
    workspace = torch.zeros(callee.workspace_bytes(MOST_SEQS), dtype=torch.uint8, device=device)

    def call(rows: Sequence[Row]) -> Inputs:
        inputs = batch_of(spec, pool, firsts, rows)

        def once() -> None:
            run_case(spec, callee, variant, inputs, workspace)

        (wrap(once) if wrap else once)()
        return inputs

    whole = [call([Row(i, n, 1 if spec.op is Op.DECODE else n)]) for i, n in enumerate(lens)]
    for number in range(batches):
        rows = draw_batch(spec, lens, draw)
        got = call(rows)
        first = 0
        for row in rows:
            count = 1 if spec.op is Op.DECODE else row.query_len
            mine = slice(first, first + count)
            first += count
            if not row.query_len:
                continue
            want, at = whole[row.source], 0 if spec.op is Op.DECODE else row.seq_len - row.query_len
            pairs = [(got.out, want.out)]
            if got.lse is not None and want.lse is not None:
                pairs.append((got.lse, want.lse))
            if not all(torch.equal(a[mine], b[at : at + count]) for a, b in pairs):
                batch = [(each.source, each.seq_len, each.query_len) for each in rows]
                return (
                    f"bits of a sequence of {row.seq_len} tokens, {row.query_len} of them queries, differ "
                    f"from those it has alone (random batch {number}: sequence, seq_len, query_len = {batch})"
                )
    return ""
