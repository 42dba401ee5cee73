"""The gate itself: it passes an exact kernel and catches every way of being wrong that it claims to."""

from __future__ import annotations

import pytest
import torch

from pagedgen.compiler.verify import cases_of, gate, judge, make_inputs, reference


class Exact:
    """A library that computes the reference; subclasses break it in one way."""

    def __init__(self, spec):
        self.spec = spec

    def workspace_bytes(self, num_seqs):
        return 64

    def decode(
        self, q, k, v, table, lens, out, lse, scale, k_scale, v_scale, workspace, max_seq_len, variant
    ):
        from pagedgen.compiler.verify import Inputs

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


def test_judge_reports_the_worst_error(make_spec):
    spec = make_spec(head_dim=32, heads=(2, 1))
    inputs = make_inputs(spec, (5,), seed=0)
    inputs.out.copy_(reference(spec, inputs)[0])
    error, allowed, reason = judge(spec, inputs)
    assert not reason and error <= allowed
