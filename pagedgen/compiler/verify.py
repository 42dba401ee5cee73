"""The correctness gate: no kernel is timed, recorded or packed before it has passed.

Reference in float64 on the same quantised K and V, one for all operators: decode is extend with one query
a sequence. Fresh random inputs; shuffled blocks; unused slots, unused blocks, what no window reaches, and
outputs poisoned with NaN; padding rows that must stay unwritten; every case called twice on one workspace,
so that what a call leaves behind is tried too; on a GPU, calls in a row that overlap (``verify_row``).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, Literal, Protocol

import torch

from pagedgen.compiler.verify_row import Row, captured, disturbed
from pagedgen.errors import ArgumentError
from pagedgen.runtime.attention import TORCH_DTYPES
from pagedgen.values.record import Verdict
from pagedgen.values.spec import MOVES, Causality, DType, KernelSpec, KInner, KVScale, Op

F32_WEIGHT = 4e-6
EPS = {DType.F32: 2.0**-23, DType.F16: 2.0**-10, DType.BF16: 2.0**-7}
Pool = Literal["nhd", "hnd", "packed"]
POOLS: tuple[Pool, ...] = ("nhd", "hnd", "packed")
PADDING = 3  # rows of q and out behind the last sequence's, as a captured graph's largest batch leaves them
INVARIANT_BATCHES = 8  # random ones, that a batch-invariant kernel is tried on
SCORES = 1 << 25  # float64 scores that the reference holds at a time


@dataclass(frozen=True, slots=True)
class Inputs:
    """Arguments of one call; shapes as in ``KernelSpec``. The last are for specs that have them."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor | None
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    softmax_scale: float
    max_seq_len: int
    cu_seqlens_q: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    causal: torch.Tensor | None = None
    tree_mask: torch.Tensor | None = None

    @property
    def extras(self) -> tuple[torch.Tensor, ...]:
        """The arguments after ``variant``: those of the spec's modifiers, in the ABI's order."""
        given = (self.sinks, self.alibi_slopes, self.causal, self.tree_mask)
        return tuple(tensor for tensor in given if tensor is not None)


class Callee(Protocol):
    """What the gate can call: a linked library, or anything with the same functions.

    The other function is named after the spec's operator and takes what the library ABI
    (docs/architecture.md) says.
    """

    def workspace_bytes(self, num_seqs: int) -> int:
        """Bytes of workspace a call with ``num_seqs`` sequences needs."""


def empty_pool(
    spec: KernelSpec, num_blocks: int, pool: Pool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised K and V pools of the logical shape, strided as ``pool`` says; bytes for fp8."""
    kind = torch.uint8 if spec.kv_dtype.is_fp8 else TORCH_DTYPES[spec.kv_dtype]
    blocks, tokens, heads = num_blocks, spec.block_size, spec.num_kv_heads
    dim, v_dim = spec.head_dim, spec.v_dim
    if pool == "packed":
        both = torch.empty(blocks, tokens, heads, dim + v_dim, dtype=kind, device=device)
        k, v = both[..., :dim], both[..., dim:]
    elif pool == "hnd":
        k = torch.empty(blocks, heads, tokens, dim, dtype=kind, device=device).transpose(1, 2)
        v = torch.empty(blocks, heads, tokens, v_dim, dtype=kind, device=device).transpose(1, 2)
    else:
        k = torch.empty(blocks, tokens, heads, dim, dtype=kind, device=device)
        v = torch.empty(blocks, tokens, heads, v_dim, dtype=kind, device=device)
    if spec.k_inner is KInner.TOKEN:
        k = torch.empty(blocks, heads, dim, tokens, dtype=kind, device=device).permute(0, 3, 1, 2)
        if pool != "nhd":  # V head-major beside token-innermost K: the layout of the project's own CPU cache
            v = torch.empty(blocks, heads, tokens, v_dim, dtype=kind, device=device).transpose(1, 2)
    return k, v


def make_inputs(
    spec: KernelSpec,
    seq_lens: Sequence[int],
    device: torch.device | str = "cpu",
    seed: int = 0,
    *,
    query_lens: Sequence[int] | None = None,
    pool: Pool = "nhd",
    poison: bool = True,
    all_codes: bool = False,
    spare_blocks: int = 3,
) -> Inputs:
    """Fresh random inputs of one batch: blocks shuffled over the pool, everything unused NaN if ``poison``.

    With ``all_codes`` an FP8 cache holds every finite code, subnormals included, with scales to match. Scores
    are large enough that a soft cap matters. ``query_lens`` are for extend: all tokens of a sequence if not
    given.
    """
    if spec.op is Op.DECODE:
        query_lens = [min(1, n) for n in seq_lens]
    elif query_lens is None:
        query_lens = seq_lens
    device = torch.device(device)
    generator = torch.Generator(device=device).manual_seed(seed)
    shuffle = random.Random(seed)
    block, dim = spec.block_size, spec.head_dim
    blocks_of = [-(-n // block) for n in seq_lens]
    num_blocks = sum(blocks_of) + spare_blocks
    order = list(range(num_blocks))
    shuffle.shuffle(order)
    width = max(max(blocks_of), 1)
    spare = order[-1]
    first_seen = [_first_seen(spec, n, new) for n, new in zip(seq_lens, query_lens, strict=True)]
    rows, taken = [], 0
    for count, first in zip(blocks_of, first_seen, strict=True):
        gone = min(first // block, count) if poison else 0  # blocks that a window has left behind
        rows.append([spare] * gone + order[taken + gone : taken + count] + [spare] * (width - count))
        taken += count
    block_table = torch.tensor(rows, dtype=torch.int32, device=device)

    k, v = empty_pool(spec, num_blocks, pool, device)
    is_fp8 = spec.kv_dtype.is_fp8
    for tensor in (k, v):
        if is_fp8 and all_codes:
            codes = torch.randint(0, 256, tensor.shape, dtype=torch.int32, generator=generator, device=device)
            limit = 0x7E if spec.kv_dtype is DType.FP8_E4M3 else 0x7B  # largest finite magnitude
            magnitude = codes & 0x7F
            codes = torch.where(magnitude > limit, codes & 0xBF, codes)
            tensor.copy_(codes.to(torch.uint8))
        else:
            values = torch.randn(tensor.shape, dtype=torch.float32, generator=generator, device=device)
            if is_fp8:
                tensor.copy_(values.to(TORCH_DTYPES[spec.kv_dtype]).view(torch.uint8))
            else:
                tensor.copy_(values)
    if poison:
        used = torch.zeros(num_blocks, block, dtype=torch.bool)
        for row, (length, first) in enumerate(zip(seq_lens, first_seen, strict=True)):
            for i in range(first // block, -(-length // block)):
                used[rows[row][i], max(0, first - i * block) : length - i * block] = True
        used = used.to(device)
        for tensor in (k, v):
            tensor[~used] = 0x7F if is_fp8 else float("nan")

    scales: list[torch.Tensor | None] = [None, None]
    if is_fp8:
        size = spec.num_kv_heads if spec.kv_scale is KVScale.HEAD else 1
        for i in range(2):
            random_scale = torch.rand(size, generator=generator, device=device) + 0.5
            scales[i] = (random_scale / (64 if all_codes else 1)).float()
    num_tokens = len(seq_lens)
    cu_seqlens_q = None
    if spec.op is not Op.DECODE:
        ends = [0, *accumulate(query_lens)]
        num_tokens = ends[-1] + (PADDING if poison else 0)
        cu_seqlens_q = torch.tensor(ends, dtype=torch.int32, device=device)
    q_shape = (num_tokens, spec.num_q_heads, dim)
    q = torch.randn(q_shape, dtype=torch.float32, generator=generator, device=device).to(
        TORCH_DTYPES[spec.q_dtype]
    )
    out_shape = (num_tokens, spec.num_q_heads, spec.v_dim)
    out = torch.full(out_shape, float("nan"), dtype=q.dtype, device=device)
    lse = torch.full(q_shape[:2], float("nan"), device=device) if spec.return_lse else None
    if is_fp8:
        k, v = k.view(TORCH_DTYPES[spec.kv_dtype]), v.view(TORCH_DTYPES[spec.kv_dtype])
    lens = torch.tensor(list(seq_lens), dtype=torch.int32, device=device)
    sinks = None
    if spec.sinks:
        sinks = 2 * torch.randn(spec.num_q_heads, generator=generator, device=device)
    alibi_slopes = causal = None
    if spec.alibi:  # the usual ones lie between 2^-8 and 2^-0.5
        alibi_slopes = 2 ** (-8 * torch.rand(spec.num_q_heads, generator=generator, device=device))
    if spec.causality is Causality.PER_SEQUENCE:
        causal = torch.randint(0, 2, lens.shape, generator=generator, device=device, dtype=torch.uint8)
    softmax_scale = dim**-0.5 * max(1.0, (spec.logits_soft_cap or 0.0) / 4)
    trees = _random_trees(query_lens, num_tokens, shuffle, device) if spec.tree_mask else None
    return Inputs(
        q, k, v, block_table, lens, out, lse, scales[0], scales[1], softmax_scale, width * block,
        cu_seqlens_q, sinks, alibi_slopes, causal, trees,
    )  # fmt: skip


def _random_trees(
    query_lens: Sequence[int], num_tokens: int, draw: random.Random, device: torch.device
) -> torch.Tensor:
    """Tree masks, int64 ``[num_tokens]``: trees of drafted tokens, and for every third sequence any bits."""
    masks: list[int] = []
    for seq, count in enumerate(query_lens):
        of_seq: list[int] = []
        for query in range(count):
            parent = draw.randrange(-1, query)
            ancestors = of_seq[parent] if parent >= 0 else 0
            of_seq.append(draw.getrandbits(64) if seq % 3 == 2 else ancestors | 1 << query)
        masks += of_seq
    masks += [draw.getrandbits(64) for _ in range(num_tokens - len(masks))]
    signed = [mask - (1 << 64) if mask >> 63 else mask for mask in masks]
    return torch.tensor(signed, dtype=torch.int64, device=device)


def _first_seen(spec: KernelSpec, seq_len: int, query_len: int) -> int:
    """The first position that any of the last ``query_len`` tokens sees; seq_len if there is no query."""
    return spec.visible(seq_len - query_len, seq_len).start if query_len else seq_len


def query_ranges(spec: KernelSpec, inputs: Inputs) -> list[tuple[int, int]]:
    """Rows of q of each sequence, first and end."""
    if inputs.cu_seqlens_q is not None:
        ends: list[int] = inputs.cu_seqlens_q.tolist()
        return list(pairwise(ends))
    return [(row, row + min(1, length)) for row, length in enumerate(inputs.seq_lens.tolist())]


def live_rows(spec: KernelSpec, inputs: Inputs) -> torch.Tensor:
    """Which rows of q are some sequence's queries, bool ``[num_tokens]``: the others stay unwritten."""
    live = torch.zeros(inputs.q.shape[0], dtype=torch.bool)
    for first, end in query_ranges(spec, inputs):
        live[first:end] = True
    return live.to(inputs.q.device)


def reference(spec: KernelSpec, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention in float64.

    Returns:
        out ``[num_tokens, num_q_heads, v_dim]``, lse ``[num_tokens, num_q_heads]`` and, per output, the
        magnitude that rounding errors scale with (``sum_t p_t |v_t|`` and a trace of the largest). Rows that
        are no sequence's are NaN.
    """
    out = torch.full(inputs.out.shape, float("nan"), dtype=torch.float64, device=inputs.q.device)
    magnitude = out.clone()
    lse = out[..., 0].clone()
    for run in runs_of(spec, inputs):
        out[run.rows], lse[run.rows], magnitude[run.rows] = _attend(spec, inputs, run)
    return out, lse, magnitude


@dataclass(frozen=True, slots=True)
class Run:
    """Queries of one sequence and all that they attend to."""

    rows: slice  # of q and out
    k: torch.Tensor  # float64 [tokens, num_kv_heads, head_dim], dequantised; 0 where no query of the run sees
    v: torch.Tensor  # float64 [tokens, num_kv_heads, v_dim], likewise
    visible: torch.Tensor  # bool [queries, tokens]
    distance: torch.Tensor  # int64 [queries, tokens], a query's position less a token's


def runs_of(spec: KernelSpec, inputs: Inputs) -> Iterator[Run]:
    """All queries of a call, as many at a time as keep the scores below ``SCORES``."""
    lens: list[int] = inputs.seq_lens.tolist()
    for row, (first, end) in enumerate(query_ranges(spec, inputs)):
        length, new = lens[row], end - first
        if not new:
            continue
        begin = _first_seen(spec, length, new) // spec.block_size  # blocks before it may be anything
        k, v = _gather(spec, inputs, row, begin, length)
        at_once = max(1, SCORES // (spec.num_q_heads * k.shape[0]))
        for start in range(first, end, at_once):
            rows = slice(start, min(start + at_once, end))
            position = length - end + torch.arange(rows.start, rows.stop, device=inputs.q.device)
            seen = torch.arange(length, device=inputs.q.device)[begin * spec.block_size :]
            visible = _visible(spec, position, seen, is_causal(spec, inputs, row))
            if spec.tree_mask:
                assert inputs.tree_mask is not None
                visible = _tree_visible(inputs.tree_mask[rows], seen - (length - new), rows.start - first)
            # What no query sees may be NaN; times a weight of 0 it would still be.
            by_any = visible.any(0)[:, None, None]
            seen_k, seen_v = torch.where(by_any, k, 0.0), torch.where(by_any, v, 0.0)
            yield Run(rows, seen_k, seen_v, visible, position[:, None] - seen)


def is_causal(spec: KernelSpec, inputs: Inputs, row: int) -> bool:
    """Whether the queries of sequence ``row`` see nothing behind themselves."""
    return spec.causality is Causality.CAUSAL if inputs.causal is None else bool(inputs.causal[row])


def _visible(spec: KernelSpec, position: torch.Tensor, seen: torch.Tensor, causal: bool) -> torch.Tensor:
    """Which of the tokens at ``seen`` the queries at ``position`` see, bool ``[queries, tokens]``.

    What ``KernelSpec.visible`` says, told from its other side: a test holds the two together.
    """
    distance = position[:, None] - seen
    visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if spec.window is not None:
        visible &= distance.abs() < spec.window
    if spec.attention_chunk is not None:
        visible &= position[:, None] // spec.attention_chunk == seen // spec.attention_chunk
    return visible


def _tree_visible(masks: torch.Tensor, tokens: torch.Tensor, first: int) -> torch.Tensor:
    """Which tokens queries with these masks see, bool ``[queries, tokens]``.

    ``tokens`` are counted from the sequence's first query; ``first`` is the number of the first mask's query.
    """
    bits = masks[:, None] >> tokens.clamp(0, 63) & 1
    own = tokens == torch.arange(first, first + len(masks), device=masks.device)[:, None]
    return (tokens < 0) | (bits == 1) | own


def _gather(
    spec: KernelSpec, inputs: Inputs, row: int, begin: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dequantised K and V of a sequence from block ``begin`` on, ``[tokens, num_kv_heads, head_dim]``."""
    ids = inputs.block_table[row, begin : -(-length // spec.block_size)].long()
    found = []
    for pool, scale in ((inputs.k, inputs.k_scale), (inputs.v, inputs.v_scale)):
        # fp8 tensors cannot be indexed everywhere; bytes can
        blocks = pool.view(torch.uint8)[ids].view(pool.dtype) if spec.kv_dtype.is_fp8 else pool[ids]
        values = blocks.flatten(0, 1)[: length - begin * spec.block_size].double()
        found.append(values if scale is None else values * scale.double()[:, None])
    return found[0], found[1]


def _attend(spec: KernelSpec, inputs: Inputs, run: Run) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, lse and magnitude of a run."""
    heads, group = spec.num_kv_heads, spec.group_size
    q = inputs.q[run.rows].double().view(-1, heads, group, spec.head_dim)
    k, v = run.k, run.v
    scores = torch.einsum("nhgd,thd->nhgt", q, k) * inputs.softmax_scale
    if spec.logits_soft_cap is not None:
        scores = spec.logits_soft_cap * torch.tanh(scores / spec.logits_soft_cap)
    if inputs.alibi_slopes is not None:
        slopes = inputs.alibi_slopes.double().view(heads, group, 1)
        scores = scores - slopes * run.distance.abs()[:, None, None, :]
    scores = scores.masked_fill(~run.visible[:, None, None, :], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    if inputs.sinks is not None:
        lse = torch.logaddexp(lse, inputs.sinks.double().view(heads, group))
    weights = torch.exp(scores - lse[..., None])
    out = torch.einsum("nhgt,thd->nhgd", weights, v)
    # float16 weights below 2^-24 are lost, which is 2^-14 of its rounding unit times the largest value
    lost = 2.0**-14 * v.abs().amax(0)  # [num_kv_heads, v_dim]
    magnitude = torch.einsum("nhgt,thd->nhgd", weights, v.abs()) + lost[:, None]
    if spec.q_dtype is DType.F32:
        # A score summed in float32, one term after the other, errs by about sqrt(head_dim) roundings of its
        # terms (Higham and Mary, 2019), and its weight by as much of itself. Little at the 7 or so that terms
        # usually sum to; more than all else where e5m2's are thousands.
        terms = torch.einsum("nhgd,thd->nhgt", q.abs(), k.abs()) * inputs.softmax_scale * weights
        moved = torch.einsum("nhgt,thd->nhgd", terms, v.abs())
        moved += out.abs() * terms.sum(-1)[..., None]
        magnitude += spec.head_dim**0.5 * 2.0**-24 / F32_WEIGHT * moved
    return out.flatten(1, 2), lse.flatten(1), magnitude.flatten(1, 2)


def tolerance(spec: KernelSpec, out: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Allowed absolute error of every output: rounding the result, and rounding the softmax weights.

    Weights may be rounded to the 16-bit type in use, which costs at most half a unit of each weight, and as
    much of the output again where their sum is that of the rounded ones; float32 kernels are allowed
    F32_WEIGHT of the weighted magnitude for their exponential (measured: 1e-6).
    """
    eps = EPS[spec.q_dtype]
    return 2 * eps * out.abs() + max(eps, F32_WEIGHT) * magnitude + 1e-7


@dataclass(frozen=True, slots=True)
class Case:
    """One batch the gate tries; ``query_lens`` as in :func:`make_inputs`."""

    seq_lens: tuple[int, ...]
    pool: Pool
    all_codes: bool = False
    query_lens: tuple[int, ...] | None = None


def cases_of(spec: KernelSpec, seed: int) -> tuple[Case, ...]:
    """The gate's batches: edges of a block and of the window, odd lengths, long splits, padding rows, many
    sequences; for extend whole prompts, chunks, and decodes mixed with chunks."""
    draw = random.Random(seed)
    block = spec.block_size
    edges = (1, max(1, block - 1), block, block + 1, 2 * block + 3, 0, 77, 333)
    many = tuple(draw.randrange(0, 70) for _ in range(133))
    if spec.op is Op.DECODE:
        cases = [
            Case(edges, "nhd"),
            Case((4097, 1, 0, 515 + draw.randrange(200)), "hnd"),
            Case((1031,), "packed"),
            Case(many, "nhd"),
        ]
    elif spec.op is Op.VERIFY:
        few = tuple(draw.randint(0, min(n, 64)) if draw.random() < 0.3 else min(1, n) for n in many)
        drafted = (1, 64, 7, 8, 3, 0, 33, 64)
        cases = [
            Case(edges, "nhd", query_lens=tuple(min(q, n) for q, n in zip(drafted, edges, strict=True))),
            Case((4097, 1, 0, 515 + draw.randrange(200), 900), "hnd", query_lens=(64, 1, 0, 8, 0)),
            Case((1031, 64), "packed", query_lens=(17, 64)),
            Case(many, "nhd", query_lens=few),
        ]
    else:
        chunks = tuple(draw.randint(0, n) if draw.random() < 0.3 else min(1, n) for n in many)
        cases = [
            Case(edges, "nhd", query_lens=tuple(n if n <= 400 else 150 for n in edges)),
            Case((4097, 1, 0, 515 + draw.randrange(200), 900), "hnd", query_lens=(130, 1, 0, 77, 0)),
            Case((701,), "packed"),
            Case(many, "nhd", query_lens=chunks),
        ]
    most = 64 if spec.op is Op.VERIFY else 110
    for reach in (spec.window, spec.attention_chunk):
        if reach is not None:
            around = (reach + 257 + draw.randrange(200), reach, reach + 1, 2 * reach + 5)
            cases.append(Case(around, "hnd", query_lens=(most, min(most, 70, reach), 1, 3)))
    if spec.kv_dtype.is_fp8:
        cases.append(
            Case(
                (1, 300, 129), "hnd", all_codes=True, query_lens=(1, 64 if spec.op is Op.VERIFY else 300, 40)
            )
        )
    return tuple(cases)


def run_case(spec: KernelSpec, callee: Callee, variant: int, inputs: Inputs, workspace: torch.Tensor) -> None:
    """One call of the library on ``inputs``."""
    arguments: list[Any] = [inputs.q, inputs.k, inputs.v, inputs.block_table, inputs.seq_lens]
    if inputs.cu_seqlens_q is not None:
        arguments.append(inputs.cu_seqlens_q)
    arguments += [inputs.out, inputs.lse, inputs.softmax_scale, inputs.k_scale, inputs.v_scale, workspace]
    arguments += [inputs.max_seq_len, variant, *inputs.extras]
    getattr(callee, spec.op.value)(*arguments)


Reference = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # out, lse, magnitude


def judge(spec: KernelSpec, inputs: Inputs, expected: Reference | None = None) -> tuple[float, float, str]:
    """Compare what a call wrote with the reference: (largest error, its tolerance, reason or empty)."""
    out, lse, magnitude = reference(spec, inputs) if expected is None else expected
    empty = ~live_rows(spec, inputs)
    if not bool(inputs.out[empty].isnan().all()):
        return float("inf"), 0.0, "a padding row was written"
    got, want = inputs.out[~empty].double(), out[~empty]
    if not bool(got.isfinite().all()):
        rows = (~got.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        return float("inf"), 0.0, f"unwritten or not finite outputs in rows {rows[:4]}"
    if not got.numel():
        return 0.0, 0.0, ""
    error = (got - want).abs()
    allowed = tolerance(spec, want, magnitude[~empty])
    worst = int((error / allowed).argmax())
    largest, limit = float(error.flatten()[worst]), float(allowed.flatten()[worst])
    if largest > limit:
        return largest, limit, f"error {largest:.3g} where {limit:.3g} is allowed"
    if inputs.lse is not None:
        lse_error = float((inputs.lse[~empty].double() - lse[~empty]).abs().max())
        if not lse_error <= 1e-3:
            return lse_error, 1e-3, f"lse error {lse_error:.3g} where 0.001 is allowed"
        if not bool(inputs.lse[empty].isnan().all()):
            return float("inf"), 0.0, "the lse of a padding row was written"
    return largest, limit, ""


@lru_cache(maxsize=10)
def _tried(spec: KernelSpec, case: Case, device: torch.device, seed: int) -> tuple[Inputs, Reference]:
    """Inputs and reference, kept for the spec's next candidate: computing them is 90% of the gate's time."""
    inputs = make_inputs(
        spec, case.seq_lens, device, seed,
        query_lens=case.query_lens, pool=case.pool, all_codes=case.all_codes,
    )  # fmt: skip
    return inputs, reference(spec, inputs)


def gate(
    callee: Callee,
    spec: KernelSpec,
    variant: int,
    device: torch.device | str,
    seed: int,
    *,
    cases: Sequence[Case] | None = None,
    wrap: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
    row: Row | None = captured,
) -> Verdict:
    """Try one variant on every case (:func:`cases_of` unless given), twice each on one workspace.

    Then the cases in a row, each behind each (:mod:`pagedgen.compiler.verify_row`).
    Kernels that move K and V have cases of their own (:mod:`pagedgen.compiler.verify_moves`).

    ``wrap`` may turn a call into another way of making it (CUDA-graph capture and replay), ``row`` calls
    into one that makes them all: a CUDA graph of them, and none on a CPU, where a call has ended when it
    returns. None: no calls in a row.
    """
    device = torch.device(device)
    if spec.op in (*MOVES, Op.MERGE):
        from pagedgen.compiler.verify_moves import gate_move

        return gate_move(callee, spec, variant, device, seed, wrap)
    block = spec.block_size
    invariant_lens = [n for n in cases[0].seq_lens if n] if cases else [1, block, block + 1, 333, 900]
    if spec.op is Op.DECODE and not cases:
        invariant_lens.append(12000)  # pieces of 256 tokens at least follow from a batch that is long enough
    cases = cases_of(spec, seed) if cases is None else cases
    most = max(len(case.seq_lens) for case in cases)
    size = callee.workspace_bytes(most)
    workspace = torch.zeros(size, dtype=torch.uint8, device=device)
    worst = (0.0, 0.0)
    single: list[Inputs] = []  # each case's first, with the outputs of its call
    for number, case in enumerate(cases):
        for again in range(2):
            inputs, expected = _tried(spec, case, device, seed + 2 * number + again)
            for written in (inputs.out, inputs.lse):
                if written is not None:
                    written.fill_(float("nan"))

            def call(inputs: Inputs = inputs) -> None:
                run_case(spec, callee, variant, inputs, workspace)

            try:
                (wrap(call) if wrap else call)()
            except ArgumentError:
                raise
            except Exception as problem:  # any failure of a candidate is a verdict, not a crash of the search
                return Verdict(False, number + 1, float("inf"), 0.0, seed, f"call failed: {problem}")
            error, allowed, reason = judge(spec, inputs, expected)
            if reason:
                _tried.cache_clear()  # a wrong kernel may have written where it should not
                lens = f"seq_lens {list(case.seq_lens[:8])}"
                if spec.op is not Op.DECODE and case.query_lens is not None:
                    lens += f", query_lens {list(case.query_lens[:8])}"
                where = f"{reason} (case {number}: {lens}, pool {case.pool}, call {again + 1})"
                return Verdict(False, number + 1, error, allowed, seed, where)
            if not worst[1] or error / max(allowed, 1e-30) > worst[0] / worst[1]:
                worst = (error, allowed)
            if not again:
                single.append(inputs)
    if row is not None and (device.type == "cuda" or row is not captured):
        try:
            reason = disturbed(spec, callee, variant, single, workspace, row)
        except ArgumentError:
            raise
        except Exception as problem:
            reason = f"calls in a row failed: {problem}"
        if reason:
            _tried.cache_clear()
            return Verdict(False, len(cases), float("inf"), 0.0, seed, reason)
    if spec.batch_invariant:
        from pagedgen.compiler.verify_invariant import changed_bits

        reason = changed_bits(
            spec, callee, variant, device, seed, lens=invariant_lens, batches=INVARIANT_BATCHES, wrap=wrap
        )
        if reason:
            return Verdict(False, len(cases), float("inf"), 0.0, seed, reason)
    return Verdict(True, len(cases), worst[0], worst[1], seed)
