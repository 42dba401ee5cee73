"""Parts merged by their LSE against attention over the whole, in float64."""

from __future__ import annotations

import math

import pytest
import torch

import pagedgen
from pagedgen.compiler.verify import make_inputs
from pagedgen.errors import ArgumentError
from pagedgen.runtime.merge import merge

INF = math.inf


def attention(q, k, v):
    """Output and LSE of ``q [n, h, d]`` over ``k, v [t, h, d]``, in float64."""
    scores = torch.einsum("nhd,thd->nht", q, k)
    return torch.einsum("nht,thd->nhd", scores.softmax(-1), v), scores.logsumexp(-1)


def parts_of(rows, heads, dim, lens, spread):
    """Float64 parts of one context, empty ones NaN-poisoned with LSE -inf, and the whole's result."""
    q = torch.randn(rows, heads, dim, dtype=torch.float64) * spread
    k, v = (torch.randn(sum(lens), heads, dim, dtype=torch.float64) for _ in range(2))
    outs = torch.full((len(lens), rows, heads, dim), math.nan, dtype=torch.float64)
    lses = torch.full((len(lens), rows, heads), -INF, dtype=torch.float64)
    start = 0
    for i, n in enumerate(lens):
        if n:
            outs[i], lses[i] = attention(q, k[start : start + n], v[start : start + n])
        start += n
    return outs, lses, *attention(q, k, v)


@pytest.mark.parametrize("lens", [(1,), (1, 1), (15, 16, 17), (0, 33, 0, 1, 200), (3, 0), (0, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.1, 5.0])  # nearly equal weights, and LSEs hundreds apart
@pytest.mark.parametrize("with_sinks", [False, True])
def test_parts_make_the_whole(lens, dtype, spread, with_sinks):
    rows, heads, dim = 7, 5, 80
    outs, lses, want, want_lse = parts_of(rows, heads, dim, lens, spread)
    sinks = None
    if with_sinks:
        sinks = torch.randn(heads) * 4
        total = torch.logaddexp(want_lse, sinks.double())
        want, want_lse = want * torch.exp(want_lse - total)[..., None], total
    given = outs.to(dtype)
    out, lse = merge(given, lses.float(), sinks)
    assert out.dtype == dtype and lse.dtype == torch.float32
    # The rounding of the parts, weighted as they are, and one of the result; LSEs of float32 move weights.
    weight = torch.exp(lses - want_lse)[..., None]
    size = torch.where(weight > 0, weight * outs.abs(), 0.0).sum(0)
    lse_step = torch.finfo(torch.float32).eps * want_lse.abs().max()
    allowed = (2 * torch.finfo(dtype).eps + 4 * lse_step) * size + 1e-6
    assert ((out.double() - want).abs() <= allowed).all()
    assert ((lse.double() - want_lse).abs() <= 2 * lse_step + 1e-6).all()


def test_parts_of_a_kernel_make_its_whole(cpu_pack, make_spec):
    """Decode over blocks 0-1, 2-4 and the rest; kernels leave rows without tokens as they were."""
    attention = pagedgen.load(cpu_pack)
    spec = make_spec(64, (8, 2), 16, "f32", lse=True)
    inputs = make_inputs(spec, (1, 15, 16, 17, 33, 0, 200, 80))
    q, k, v, table, lens = inputs.q, inputs.k, inputs.v, inputs.block_table, inputs.seq_lens
    bounds = (0, 2, 5, table.shape[1])
    outs = torch.full((3, *q.shape), math.nan)
    lses = torch.full((3, *q.shape[:2]), -INF)
    for i in range(3):
        first, end = bounds[i], bounds[i + 1]
        own = (lens - first * 16).clamp(0, (end - first) * 16).int()
        attention.decode(q, k, v, table[:, first:end], own, out=outs[i], lse=lses[i], spec=spec)
    assert outs.isnan().any()  # some parts are empty
    out, lse = merge(outs, lses)
    want, want_lse = torch.zeros_like(q), torch.full_like(lse, -INF)
    attention.decode(q, k, v, table, lens, out=want, lse=want_lse, spec=spec)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)


def test_rows_are_empty_each_by_itself():
    outs = torch.tensor([[1.0], [math.nan], [3.0], [math.nan]]).view(1, 4, 1, 1)
    outs = torch.cat([outs, torch.tensor([[math.nan], [5.0], [7.0], [math.inf]]).view(1, 4, 1, 1)])
    lses = torch.tensor([[0.0, -INF, 1.0, -INF], [-INF, 2.0, 1.0, -INF]]).view(2, 4, 1)
    out, lse = merge(outs, lses)
    assert out.flatten().tolist() == [1, 5, 5, 0]
    assert lse.flatten().tolist() == pytest.approx([0, 2, 1 + math.log(2), -INF])
    out, lse = merge(outs, lses, torch.tensor([0.5]))
    assert out[3].item() == 0 and lse[3].item() == 0.5  # the sink alone
    assert torch.equal(merge(outs, lses, torch.tensor([-INF]))[1], merge(outs, lses)[1])


def test_large_lses_do_not_overflow_and_bad_ones_are_not_hidden():
    outs = torch.tensor([2.0, 4.0]).view(2, 1, 1, 1)
    for at in (-1e4, 1e4):
        out, lse = merge(outs, torch.full((2, 1, 1), at))
        assert out.item() == 3 and lse.item() == pytest.approx(at + math.log(2))
    for bad in (math.nan, INF):
        out, lse = merge(outs, torch.tensor([0.0, bad]).view(2, 1, 1))
        assert out.isnan().all() and lse.isnan().all()


def test_merged_results_merge_again_and_bits_repeat():
    outs, lses, *_ = parts_of(6, 4, 64, (9, 0, 31, 64), 1.0)
    outs, lses = outs.float(), lses.float()
    once = merge(outs, lses)
    again = [merge(outs[:2], lses[:2]), merge(outs[2:], lses[2:])]
    twice = merge(torch.stack([o for o, _ in again]), torch.stack([x for _, x in again]))
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    strided = outs.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert not strided.is_contiguous()
    for a, b, c in zip(once, merge(outs, lses), merge(strided, lses), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_as_an_operator():
    outs, lses = torch.randn(3, 5, 4, 16), torch.randn(3, 5, 4)
    sinks = torch.randn(4)
    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager", dynamic=True)
    for given in (None, sinks):
        for a, b in zip(merge(outs, lses, given), compiled(outs, lses, given), strict=True):
            assert torch.equal(a, b)
        torch.library.opcheck(torch.ops.pagedgen.merge.default, (outs, lses, given))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outs": torch.zeros(2, 3, 4, 8, dtype=torch.float64)}, "outs.dtype = torch.float64: float16"),
        ({"outs": torch.zeros(3, 4, 8)}, r"outs.shape = \[3, 4, 8\]"),
        ({"outs": torch.zeros(0, 3, 4, 8)}, "at least one part"),
        ({"lses": torch.zeros(2, 4, 3)}, r"lses.shape = \[2, 4, 3\]: \[2, 3, 4\]"),
        ({"lses": torch.zeros(2, 3, 4).half()}, "lses.dtype = torch.float16: float32"),
        ({"lses": torch.zeros(2, 3, 4, device="meta")}, "lses.device = meta: cpu"),
        ({"sinks": torch.zeros(3)}, r"sinks.shape = \[3\]: \[4\]"),
        ({"sinks": torch.zeros(4).bfloat16()}, "sinks.dtype = torch.bfloat16: float32"),
    ],
)
def test_what_is_refused(change, message):
    arguments = {"outs": torch.zeros(2, 3, 4, 8), "lses": torch.zeros(2, 3, 4)} | change
    with pytest.raises(ArgumentError, match=message):
        merge(**arguments)
