"""The gate itself: it passes an exact kernel and catches every way of being wrong that it claims to."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from pagedgen.compiler.verify import Case, Inputs, cases_of, gate, judge, make_inputs, query_ranges, reference
from pagedgen.compiler.verify_write import WriteCase
from pagedgen.runtime.kv_cache import store
from pagedgen.runtime.merge import merge
from pagedgen.values.spec import Causality


class Exact:
    """A library that computes the reference; subclasses break it in one way."""

    def __init__(self, spec):
        self.spec = spec

    def workspace_bytes(self, num_seqs):
        return 64

    def decode(
        self, q, k, v, table, lens, out, lse, scale, k_scale, v_scale, workspace, max_seq_len, variant
    ):
        inputs = Inputs(q, k, v, table, lens, out, lse, k_scale, v_scale, scale, max_seq_len)
        want, want_lse, _ = reference(self.spec, inputs)
        live = lens > 0
        self.write(out, want, live)
        if lse is not None:
            lse[live] = want_lse[live].float()

    def write(self, out, want, live):
        out[live] = want[live].to(out.dtype)


class Padding(Exact):
    def write(self, out, want, live):
        out[:] = torch.nan_to_num(want).to(out.dtype)


class Unwritten(Exact):
    def write(self, out, want, live):
        super().write(out, want, live)
        out[live.nonzero()[0], -1, -1] = float("nan")


class Slightly(Exact):
    def write(self, out, want, live):
        out[live] = (want[live] * 1.02).to(out.dtype)


class Shifted(Exact):
    def decode(self, q, k, v, table, lens, *rest):
        super().decode(q, k, v, table, torch.clamp(lens - 1, min=0) + (lens == 1), *rest)


class Crashing(Exact):
    def decode(self, *args):
        raise RuntimeError("boom")


@pytest.fixture
def spec(make_spec):
    return make_spec(head_dim=32, heads=(4, 2), lse=True)


def test_exact_kernel_passes(spec):
    verdict = gate(Exact(spec), spec, 0, "cpu", 1)
    assert verdict.passed, verdict
    assert 0 < verdict.max_error <= verdict.tolerance


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (Padding, "padding row"),
        (Unwritten, "not finite"),
        (Slightly, "error"),
        (Shifted, "error"),
        (Crashing, "boom"),
    ],
)
def test_broken_kernels_are_caught(spec, broken, reason):
    verdict = gate(broken(spec), spec, 0, "cpu", 2)
    assert not verdict.passed
    assert reason in verdict.reason


@pytest.mark.parametrize("kv", ["f16", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("pool", ["nhd", "hnd", "packed"])
@pytest.mark.parametrize("k_inner", ["dim", "token"])
def test_inputs_are_poisoned_and_laid_out_as_asked(make_spec, kv, pool, k_inner):
    spec = make_spec(head_dim=40, heads=(2, 2), block_size=8, kv=kv, k_inner=k_inner)
    inputs = make_inputs(spec, (9, 0, 3), seed=3, pool=pool)
    assert inputs.k.shape == inputs.v.shape == (6, 8, 2, 40)
    assert inputs.k.stride(3 if k_inner == "dim" else 1) == 1
    assert inputs.v.stride(3) == 1
    used = sorted({int(b) for b in inputs.block_table[0, :2]} | {int(inputs.block_table[2, 0])})
    poisoned = inputs.k.float().isnan().flatten(1).all(1)
    assert int(poisoned.sum()) == 3  # the spare blocks
    assert not poisoned[used].any()
    assert int((~inputs.v.float().isnan()).all(-1).all(-1).sum()) == 9 + 3
    assert inputs.out.isnan().all()
    out, _, _ = reference(spec, inputs)
    assert out[0].isfinite().all() and out[1].isnan().all()


def test_all_codes_case_holds_every_finite_code(make_spec):
    spec = make_spec(head_dim=128, kv="fp8_e4m3")
    inputs = make_inputs(spec, (300,), seed=1, all_codes=True, poison=False)
    assert inputs.k.float().isfinite().all()
    assert len(inputs.k.view(torch.uint8).unique()) == 254


def test_cases_cover_the_edges_of_a_block(make_spec):
    lens = {n for case in cases_of(make_spec(block_size=16), 0) for n in case.seq_lens}
    assert {0, 1, 15, 16, 17} <= lens
    assert max(len(case.seq_lens) for case in cases_of(make_spec(), 0)) > 128


def test_every_seed_makes_cases_whose_queries_fit(make_spec):
    for seed in range(200):
        for case in cases_of(make_spec(op="extend"), seed):
            assert all(
                0 <= q <= n for q, n in zip(case.query_lens or case.seq_lens, case.seq_lens, strict=True)
            )


def test_judge_reports_the_worst_error(make_spec):
    spec = make_spec(head_dim=32, heads=(2, 1))
    inputs = make_inputs(spec, (5,), seed=0)
    inputs.out.copy_(reference(spec, inputs)[0])
    error, allowed, reason = judge(spec, inputs)
    assert not reason and error <= allowed


def modifiers(spec):
    """The arguments that specs may have more, and whether this one has."""
    per_sequence = spec.causality is Causality.PER_SEQUENCE
    return (("sinks", spec.sinks), ("alibi_slopes", spec.alibi), ("causal", per_sequence))


class ExactExtend:
    """An extend library that computes the reference of the spec that ``believed`` makes of its own."""

    def __init__(self, spec, **believed):
        self.spec, self.believed = spec, replace(spec, **believed)

    def workspace_bytes(self, num_seqs):
        return 0

    def extend(
        self, q, k, v, table, lens, cu_seqlens_q, out, lse, scale, k_scale, v_scale, workspace, max_seq_len,
        variant, *extras,
    ):  # fmt: skip
        names = [name for name, given in modifiers(self.spec) if given]
        given = dict(zip(names, extras, strict=True))
        for name, believed in modifiers(self.believed):
            if not believed:
                given.pop(name, None)
        inputs = Inputs(
            q,
            k,
            v,
            table,
            self.lens(lens),
            out,
            lse,
            k_scale,
            v_scale,
            scale,
            max_seq_len,
            cu_seqlens_q,
            **given,
        )
        want, want_lse, _ = reference(self.believed, inputs)
        want, live = torch.nan_to_num(want), torch.zeros(len(q), dtype=torch.bool)
        for first, end in query_ranges(self.spec, inputs):
            live[first:end] = True
        self.write(out, want, live, cu_seqlens_q)
        if lse is not None:
            lse[live] = torch.nan_to_num(want_lse[live]).float()

    def lens(self, lens):
        return lens

    def write(self, out, want, live, cu_seqlens_q):
        out[live] = want[live].to(out.dtype)


class WritesPadding(ExactExtend):
    def write(self, out, want, live, cu_seqlens_q):
        out[:] = want.to(out.dtype)


class LastQueryOfAll(ExactExtend):
    """Every query of a run gets what its last one sees: a mask that is not causal."""

    def write(self, out, want, live, cu_seqlens_q):
        for first, end in pairwise(cu_seqlens_q.tolist()):
            out[first:end] = want[max(first, end - 1) : end].to(out.dtype)


class ExactWrite:
    """A write_kv library of torch's operators; subclasses break it in one way."""

    def write_kv(self, new_k, new_v, slots, k, v, k_scale, v_scale, variant):
        for new, pool, scale in ((new_k, k, k_scale), (new_v, v, v_scale)):
            fp8 = pool.dtype if scale is not None else None
            held = pool.view(torch.uint8) if fp8 else pool
            spare = torch.cat((held, held[:1]))  # what store takes for slot -1
            store(spare, new, self.slots(slots), scale, fp8)
            held.copy_(spare[:-1])

    def slots(self, slots):
        return slots


class OneSlotOff(ExactWrite):
    def slots(self, slots):
        return torch.where(slots >= 0, (slots + 1) % 16, slots)


class WritesPaddingToo(ExactWrite):
    def slots(self, slots):
        return torch.where(slots < 0, slots.max(), slots)


@pytest.mark.parametrize("kv", ["f16", "fp8_e4m3", "fp8_e5m2"])
def test_write_kv_is_judged_by_its_bytes(make_spec, kv):
    spec = make_spec(head_dim=32, heads=(2, 2), kv=kv, scale="head", op="write_kv")
    verdict = gate(ExactWrite(), spec, 0, "cpu", 1)
    assert verdict.passed and verdict.cases == 3, verdict
    for broken in (OneSlotOff(), WritesPaddingToo()):
        verdict = gate(broken, spec, 0, "cpu", 1)
        assert not verdict.passed and "wrong elements of k" in verdict.reason, verdict
    case = WriteCase(spec, 30, "nhd", torch.device("cpu"), 2)
    case.k, case.v = case.expected[0][0].clone(), case.expected[1][0].clone()
    assert case.judge() == ""
    case.v.view(torch.uint8)[0, 3, 1, 5] ^= 1
    assert "1 wrong elements of v, the first at [0, 3, 1" in case.judge()


class ExactMerge:
    """merge by the public function; ``broken`` in one way."""

    def __init__(self, broken=""):
        self.broken = broken

    def merge(self, outs, lses, out, lse, variant, *sinks):
        if self.broken == "order":
            lses = lses.flip(0)
        if self.broken == "sinks":
            sinks = ()
        merged, sums = merge(outs, lses, *sinks)
        out.copy_(merged)
        lse.copy_(sums + (0.01 if self.broken == "lse" else 0.0))


@pytest.mark.parametrize("q", ["f16", "bf16", "f32"])
def test_merge_is_judged_by_float64(make_spec, q):
    spec = make_spec(head_dim=32, heads=(3, 3), q=q, block_size=1, op="merge", sinks=True)
    verdict = gate(ExactMerge(), spec, 0, "cpu", 1)
    assert verdict.passed and verdict.cases == 3, verdict
    for broken, reason in (("order", "error of out"), ("sinks", "error of out"), ("lse", "lse: ")):
        verdict = gate(ExactMerge(broken), spec, 0, "cpu", 1)
        assert not verdict.passed and reason in verdict.reason, verdict


class ExactMoves:
    """gather and copy_blocks by torch's operators, on the tables' tensors; ``broken`` in one way."""

    def __init__(self, broken=""):
        self.broken = broken

    def gather(self, out_k, out_v, slots, k, v, k_scale, v_scale, variant):
        kept = slots >= 0
        if self.broken == "padding":
            kept = torch.ones_like(kept)
        for out, pool, scale in ((out_k, k, k_scale), (out_v, v, v_scale)):
            if self.broken == "scale" and scale is not None:
                scale = scale.flip(0)
            fp8 = pool.element_size() == 1
            rows = (pool.view(torch.uint8) if fp8 else pool)[slots[kept] // 16, slots[kept] % 16]
            if scale is not None:
                rows = (rows.view(pool.dtype).float() * scale[:, None]).to(out.dtype)
            (out.view(torch.uint8) if out.element_size() == 1 else out)[kept] = rows

    def copy_blocks(self, src_origin, dst_origin, src, dst, pairs, page_bytes, variant):
        for (source, step, page), (into, jump, _) in zip(src.tolist(), dst.tolist(), strict=True):
            assert page <= page_bytes
            page -= self.broken == "short"
            for read, written in pairs.tolist():
                into_at, from_at = dst_origin + into + written * jump, src_origin + source + read * step
                ctypes.memmove(into_at, from_at, page)


@pytest.mark.parametrize("types", [("f16", "f16"), ("f16", "fp8_e4m3"), ("fp8_e5m2", "fp8_e5m2")])
def test_gather_is_judged_by_its_bytes(make_spec, types):
    spec = make_spec(head_dim=32, heads=(2, 2), q=types[0], kv=types[1], scale="head", op="gather")
    verdict = gate(ExactMoves(), spec, 0, "cpu", 1)
    assert verdict.passed and verdict.cases == 3, verdict
    for broken in ("padding", "scale") if types[0] != types[1] else ("padding",):
        verdict = gate(ExactMoves(broken), spec, 0, "cpu", 1)
        assert not verdict.passed and "wrong elements of out_k" in verdict.reason, verdict


def test_copies_are_judged_by_their_bytes(make_spec):
    spec = make_spec(head_dim=32, head_dim_v=64, heads=(2, 2), op="copy_blocks")
    verdict = gate(ExactMoves(), spec, 0, "cpu", 1)
    assert verdict.passed and verdict.cases == 3, verdict
    verdict = gate(ExactMoves("short"), spec, 0, "cpu", 1)
    assert not verdict.passed and "wrong bytes of pool 0" in verdict.reason


CASES = (
    Case((1, 15, 16, 17, 0, 77), "nhd", query_lens=(1, 15, 2, 17, 0, 60)),
    Case((200, 0, 131, 9), "hnd", query_lens=(35, 0, 1, 0)),
)
ALL_MASKS = {"window": 40, "logits_soft_cap": 30.0, "sinks": True}
LATER_MASKS = {"alibi": True, "attention_chunk": 24, "causality": Causality.PER_SEQUENCE}


@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"window": 40},
        {"logits_soft_cap": 30.0},
        {"sinks": True},
        ALL_MASKS,
        {"alibi": True},
        {"attention_chunk": 24},
        {"causality": Causality.FULL},
        {"causality": Causality.FULL, "window": 9},
        {"head_dim_v": 48},
        {**ALL_MASKS, **LATER_MASKS, "head_dim_v": 64},
    ],
)
def test_exact_extend_passes(make_spec, masks):
    spec = make_spec(head_dim=32, heads=(4, 2), lse=True, op="extend", **masks)
    verdict = gate(ExactExtend(spec), spec, 0, "cpu", 1, cases=CASES)
    assert verdict.passed and 0 < verdict.max_error <= verdict.tolerance, verdict


def test_exact_extend_passes_the_gates_own_cases(make_spec):
    spec = make_spec(head_dim=32, heads=(2, 1), op="extend", **ALL_MASKS)
    cases = [case for case in cases_of(spec, 1) if len(case.seq_lens) < 100]
    verdict = gate(ExactExtend(spec), spec, 0, "cpu", 1, cases=cases)
    assert verdict.passed and verdict.cases == len(cases_of(spec, 1)) - 1, verdict


@pytest.mark.parametrize(
    "wrong",
    [
        {"window": None},
        {"window": 39},
        {"window": 41},
        {"logits_soft_cap": None},
        {"logits_soft_cap": 31.0},
        {"sinks": False},
    ],
)
def test_a_wrong_mask_is_caught(make_spec, wrong):
    spec = make_spec(head_dim=32, heads=(4, 2), op="extend", **ALL_MASKS)
    verdict = gate(ExactExtend(spec, **wrong), spec, 0, "cpu", 3, cases=CASES)
    assert not verdict.passed and ("error" in verdict.reason or "not finite" in verdict.reason), verdict


@pytest.mark.parametrize(
    "wrong",
    [
        {"alibi": False},
        {"attention_chunk": None},
        {"attention_chunk": 23},
        {"attention_chunk": 25},
        {"causality": Causality.CAUSAL},
        {"causality": Causality.FULL},
    ],
)
def test_a_wrong_later_mask_is_caught(make_spec, wrong):
    spec = make_spec(head_dim=32, heads=(4, 2), op="extend", **LATER_MASKS)
    assert gate(ExactExtend(spec), spec, 0, "cpu", 3, cases=CASES).passed
    verdict = gate(ExactExtend(spec, **wrong), spec, 0, "cpu", 3, cases=CASES)
    assert not verdict.passed and ("error" in verdict.reason or "not finite" in verdict.reason), verdict


def test_the_reference_sees_what_the_spec_says(make_spec):
    """With V the identity, outputs are the softmax's weights: above zero where visible, and nowhere else."""
    choices = itertools.product((None, 5), (None, 6), ("causal", "full", "per_sequence"))
    for window, chunk, causality in choices:
        spec = make_spec(
            head_dim=32, heads=(1, 1), block_size=32, q="f32", op="extend",
            window=window, attention_chunk=chunk, causality=Causality(causality),
        )  # fmt: skip
        inputs = make_inputs(spec, (20, 20), query_lens=(20, 13), poison=False)
        if inputs.causal is not None:
            inputs.causal.copy_(torch.tensor([0, 1]))
        inputs.v.copy_(torch.eye(32)[:, None].expand(32, 1, 32))
        out = reference(spec, inputs)[0][:, 0]
        for row, (first, end) in enumerate(((0, 20), (20, 33))):
            for i in range(end - first):
                causal = causality == "causal" or (causality == "per_sequence" and row == 1)
                position = 20 - (end - first) + i
                seen = (out[first + i] > 0).nonzero().flatten().tolist()
                assert seen == list(spec.visible(position, 20, causal=causal))


def test_alibi_is_a_penalty_of_slope_times_distance(make_spec):
    spec = make_spec(head_dim=32, heads=(2, 2), block_size=8, op="extend", alibi=True)
    inputs = make_inputs(spec, (20,), query_lens=(7,), poison=False)
    ids = inputs.block_table[0].long()
    k, v = (x[ids].flatten(0, 1)[:20].double().transpose(0, 1) for x in (inputs.k, inputs.v))
    distance = (torch.arange(13, 20)[:, None] - torch.arange(20)).double()
    bias = -inputs.alibi_slopes.double()[:, None, None] * distance
    bias = bias.masked_fill(distance < 0, float("-inf"))
    want = torch.nn.functional.scaled_dot_product_attention(
        inputs.q.double().transpose(0, 1), k, v, attn_mask=bias
    )
    torch.testing.assert_close(reference(spec, inputs)[0], want.transpose(0, 1))


@pytest.mark.parametrize(("broken", "reason"), [(WritesPadding, "padding row"), (LastQueryOfAll, "error")])
def test_broken_extend_is_caught(make_spec, broken, reason):
    spec = make_spec(head_dim=32, heads=(4, 2), op="extend")
    verdict = gate(broken(spec), spec, 0, "cpu", 2, cases=CASES)
    assert not verdict.passed and reason in verdict.reason and "query_lens" in verdict.reason


def test_what_no_window_reaches_is_poisoned(make_spec):
    spec = make_spec(head_dim=32, heads=(2, 1), block_size=8, op="extend", window=10)
    inputs = make_inputs(spec, (40, 30), query_lens=(3, 1))
    # the first query of the first sequence, at 37, sees 28 to 37; that of the second, at 29, sees 20 to 29
    assert int((~inputs.k.float().isnan()).all(-1).all(-1).sum()) == (40 - 28) + (30 - 20)
    assert len(set(inputs.block_table[0, :3].tolist())) == 1  # blocks left behind are nobody's
    out, lse, _ = reference(spec, inputs)
    assert out[:4].isfinite().all() and lse[:4].isfinite().all() and out[4:].isnan().all()


def test_the_reference_is_attention(make_spec):
    """Against torch's own, on a case without masks beyond causality."""
    spec = make_spec(head_dim=32, heads=(4, 2), block_size=8, op="extend")
    inputs = make_inputs(spec, (20,), query_lens=(7,), poison=False)
    ids = inputs.block_table[0].long()
    k, v = (x[ids].flatten(0, 1)[:20].double().transpose(0, 1) for x in (inputs.k, inputs.v))
    mask = torch.arange(20) <= torch.arange(13, 20)[:, None]
    want = torch.nn.functional.scaled_dot_product_attention(
        inputs.q.double().transpose(0, 1), k, v, attn_mask=mask, enable_gqa=True
    )
    torch.testing.assert_close(reference(spec, inputs)[0], want.transpose(0, 1))


def test_decode_cases_reach_past_the_window(make_spec):
    spec = make_spec(head_dim=32, heads=(2, 1), window=100)
    past = [case for case in cases_of(spec, 0) if {100, 101, 205} < set(case.seq_lens)]
    assert len(past) == 1
    verdict = gate(Exact(spec), spec, 0, "cpu", 4, cases=past)
    assert verdict.passed, verdict


def test_a_tree_in_a_line_is_causal_and_siblings_do_not_see_each_other(make_spec):
    """The reference of trees against what is known without it, in a batch with a full tree of 64."""
    tree = make_spec(head_dim=32, heads=(4, 2), block_size=8, lse=True, op="verify", tree_mask=True)
    inputs = make_inputs(tree, (90, 0, 64, 7), query_lens=(9, 0, 64, 1))
    line = [(1 << (i + 1)) - 1 for count in (9, 64, 1) for i in range(count)]
    masks = torch.tensor([m - (1 << 64) if m >> 63 else m for m in line] + [0] * 3)
    causal = replace(tree, tree_mask=False)
    in_line = reference(tree, replace(inputs, tree_mask=masks))
    for got, want in zip(in_line, reference(causal, inputs), strict=True):
        assert torch.equal(got.nan_to_num(), want.nan_to_num())
    siblings = reference(tree, replace(inputs, tree_mask=torch.zeros_like(masks)))
    for query in (0, 8):  # the first sees the context and itself; so does the last, but none between
        alone = make_inputs(tree, (90, 0, 64, 7), query_lens=(9, 0, 64, 1))
        k, v = _contiguous(alone)
        seen = torch.tensor([*range(81), 81 + query])
        q = alone.q[query].double().view(2, 2, 32)
        scores = torch.einsum("hgd,thd->hgt", q, k[seen]) * alone.softmax_scale
        out = torch.einsum("hgt,thd->hgd", torch.softmax(scores, -1), v[seen])
        torch.testing.assert_close(siblings[0][query], out.flatten(0, 1))


def _contiguous(inputs):
    """K and V of the first sequence in float64, ``[tokens, heads, head_dim]``."""
    ids = inputs.block_table[0].long()
    return tuple(pool[ids].flatten(0, 1)[: int(inputs.seq_lens[0])].double() for pool in (inputs.k, inputs.v))


@pytest.mark.parametrize("seed", range(3))
def test_the_gate_notices_a_wrong_tree(make_spec, seed):
    """A kernel that takes every tree for a line, and one that has the bits of a sibling."""
    spec = make_spec(head_dim=32, heads=(2, 1), op="verify", tree_mask=True)
    inputs = make_inputs(spec, (40, 70), seed=seed, query_lens=(12, 20))
    for wrong in (
        reference(replace(spec, tree_mask=False), replace(inputs, tree_mask=None)),
        reference(spec, replace(inputs, tree_mask=inputs.tree_mask.roll(1))),
    ):
        inputs.out.copy_(wrong[0].to(inputs.out.dtype))
        assert "error" in judge(spec, inputs)[2]
