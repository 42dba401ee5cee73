"""The gate of calls in a row: a call must not disturb the next, nor the one before it that is still running.

A kernel may begin while the call before it merges (``pdl``), and calls share a workspace and its counters.
Nothing is compared with a reference here: each output must have the bits that its batch has in a single call,
which :mod:`pagedgen.compiler.verify` has judged. No template leaves its bits to the order of arrival.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pagedgen.values.spec import KernelSpec

if TYPE_CHECKING:
    from pagedgen.compiler.verify import Callee, Inputs

REPLAYS = 4  # what overlaps differs a little from one replay to the next
BITS = {2: torch.int16, 4: torch.int32}

Row = Callable[[Sequence[Callable[[], None]]], Callable[[], None]]


def each_behind_each(count: int) -> list[int]:
    """Numbers below ``count`` in such an order that each follows each, and itself, once (de Bruijn, 1946)."""
    order: list[int] = []
    for one in range(count):
        order.append(one)
        for other in range(one + 1, count):
            order += (one, other)
    return [*order, 0]


def captured(calls: Sequence[Callable[[], None]]) -> Callable[[], None]:
    """The calls captured in one CUDA graph: a host launches them too slowly for them to overlap."""
    torch.cuda.synchronize()  # inputs and workspace were made on another stream
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        graph.capture_begin()  # torch.cuda.graph empties the allocator's cache first, at every candidate
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    return graph.replay


def disturbed(
    spec: KernelSpec,
    callee: Callee,
    variant: int,
    batches: Sequence[Inputs],
    workspace: torch.Tensor,
    row: Row = captured,
) -> str:
    """Call every batch behind every other and behind itself, on one workspace; say what differs, or nothing.

    Args:
        spec, callee, variant: as :func:`pagedgen.compiler.verify.gate` takes them.
        batches: their ``out`` and ``lse`` hold what a single call wrote over NaN; they are left alone.
        workspace: large enough for each of them.
        row: turns calls into one that makes them all, without waiting in between.
    """
    from pagedgen.compiler.verify import run_case

    order = each_behind_each(len(batches))
    made = [_unwritten(batches[i]) for i in order]

    def call_of(inputs: Inputs) -> Callable[[], None]:
        return lambda: run_case(spec, callee, variant, inputs, workspace)

    replay = row([call_of(inputs) for inputs in made])
    for number in range(REPLAYS):
        for inputs in made:
            for _, written in _outputs(inputs):
                written.fill_(float("nan"))
        replay()
        for place, (i, inputs) in enumerate(zip(order, made, strict=True)):
            for (name, single), (_, got) in zip(_outputs(batches[i]), _outputs(inputs), strict=True):
                bits = BITS[got.element_size()]
                if torch.equal(got.view(bits), single.view(bits)):
                    continue
                rows = (got.view(bits) != single.view(bits)).flatten(1).any(1).nonzero().flatten().tolist()
                behind = f"behind one of batch {order[place - 1]}" if place else "the first"
                return (
                    f"calls in a row disturb each other: rows {rows[:4]} of {name} of batch {i} are not what "
                    f"a single call writes (call {place + 1} of {len(order)}, {behind}, replay {number + 1})"
                )
    return ""


def _unwritten(inputs: Inputs) -> Inputs:
    """The same call with outputs of its own."""
    lse = None if inputs.lse is None else torch.empty_like(inputs.lse)
    return replace(inputs, out=torch.empty_like(inputs.out), lse=lse)


def _outputs(inputs: Inputs) -> list[tuple[str, torch.Tensor]]:
    both = (("out", inputs.out), ("lse", inputs.lse))
    return [(name, tensor) for name, tensor in both if tensor is not None]
