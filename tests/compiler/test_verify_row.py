"""The gate of calls in a row: it passes what does not mind its neighbours and catches what does."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch

from pagedgen.compiler.verify import Case, Inputs, gate, make_inputs, reference, run_case
from pagedgen.compiler.verify_row import disturbed, each_behind_each

LENS = ((1, 0, 17), (40,), (5, 3))


class Overlapping:
    """A library whose calls have not ended when they return: ``settle`` waits for them."""

    def __init__(self, spec):
        self.spec, self.running = spec, []

    def workspace_bytes(self, num_seqs):
        return 4

    def settle(self):
        self.running.clear()

    def decode(
        self, q, k, v, table, lens, out, lse, scale, k_scale, v_scale, workspace, max_seq_len, variant
    ):
        inputs = Inputs(q, k, v, table, lens, out, lse, k_scale, v_scale, scale, max_seq_len)
        want, want_lse, _ = reference(self.spec, inputs)
        live = lens > 0
        out[live] = want[live].to(out.dtype)
        lse[live] = want_lse[live].float()
        self.after(out, lse, lens)
        self.running.append(out)

    def after(self, out, lse, lens):
        pass


class DisturbedByTheSame(Overlapping):
    """A counter that the call before left: its smallest bit of one output, where batches are alike."""

    def after(self, out, lse, lens):
        if self.running and self.running[-1].shape == out.shape:
            out.view(torch.int16)[-1, -1, -1] ^= 1


class DisturbedByAnother(Overlapping):
    def after(self, out, lse, lens):
        if self.running and self.running[-1].shape != out.shape and len(out) == 1:
            lse[0, 1] += 1


class DisturbsTheCallBefore(Overlapping):
    def after(self, out, lse, lens):
        if self.running and len(out) == 3:
            self.running[-1][-1] = 0


class WritesPadding(Overlapping):
    def after(self, out, lse, lens):
        if len(self.running) > 5:
            out[lens == 0] = 0


class Unwritten(Overlapping):
    """Once: a replay after the first, whose outputs are poisoned anew."""

    calls = 0

    def decode(self, *arguments):
        Unwritten.calls += 1
        if Unwritten.calls != 3 + 10 + 4:
            super().decode(*arguments)


@pytest.fixture
def spec(make_spec):
    return make_spec(head_dim=32, heads=(4, 2), lse=True)


def found(library, spec):
    batches = [make_inputs(spec, lens, seed=3) for lens in LENS]
    workspace = torch.zeros(4, dtype=torch.uint8)
    for inputs in batches:
        run_case(spec, library, 0, inputs, workspace)
        library.settle()
    before = [inputs.out.clone() for inputs in batches]

    def row(calls):
        def all_of_them():
            library.settle()
            for call in calls:
                call()

        return all_of_them

    reason = disturbed(spec, library, 0, batches, workspace, row)
    for inputs, out in zip(batches, before, strict=True):
        assert torch.equal(inputs.out.view(torch.int16), out.view(torch.int16))  # left alone
    return reason


@pytest.mark.parametrize("count", range(1, 8))
def test_each_follows_each_and_itself_once(count):
    order = each_behind_each(count)
    assert sorted(pairwise(order)) == sorted(product(range(count), repeat=2))


def test_what_does_not_mind_its_neighbours_passes(spec):
    assert found(Overlapping(spec), spec) == ""


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (DisturbedByTheSame, "rows [2] of out of batch 0 .* call 2 of 10, behind one of batch 0, replay 1"),
        (DisturbedByAnother, "rows [0] of lse of batch 1 .* call 3 of 10, behind one of batch 0, replay 1"),
        (DisturbsTheCallBefore, "rows [2] of out of batch 0 .* call 1 of 10, the first, replay 1"),
        (WritesPadding, "rows [1] of out of batch 0 .* call 10 of 10, behind one of batch 2, replay 1"),
        (Unwritten, "rows [0, 2] of out of batch 0 .* call 4 of 10, behind one of batch 1, replay 2"),
    ],
)
def test_what_minds_its_neighbours_is_caught(spec, broken, said):
    reason = found(broken(spec), spec)
    for part in said.split(" .* "):
        assert part in reason, reason


class Disturbed(Overlapping):
    def after(self, out, lse, lens):
        out[0] += 1 if self.running else 0


def test_the_gate_makes_a_verdict_of_it(spec):
    """One by one its calls are right."""

    def gated(library, row=None):
        def one(call):
            return lambda: (call(), library.settle())

        cases = [Case(lens, "nhd") for lens in LENS]
        return gate(library, spec, 0, "cpu", 1, cases=cases, wrap=one, row=row)

    def row(calls):
        return lambda: [call() for call in calls]

    def refused(calls):
        raise RuntimeError("no capture")

    assert gated(Overlapping(spec), row).passed
    assert gated(Disturbed(spec)).passed  # nothing overlaps on a CPU
    verdict = gated(Disturbed(spec), row)
    assert not verdict.passed and verdict.reason.startswith("calls in a row disturb each other: rows [0]")
    assert gated(Overlapping(spec), refused).reason == "calls in a row failed: no capture"
