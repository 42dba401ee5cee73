"""``Scheduler``: continuous batching at iteration level over a block manager."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pagedgen.autotune.explore.request import Request
from pagedgen.errors import InvalidValue, OutOfBlocks
from pagedgen.runtime.arrays import I32, I64
from pagedgen.runtime.block_manager import BlockManager
from pagedgen.runtime.preemption import PreemptionRule, Remedy


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a prompt that a step computes: ``tokens`` of them behind ``context`` that are there."""

    request: Request
    context: int
    tokens: int
    last: bool  # it completes the prompt, so that its request gets a token


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass computes, and the copies before it.

    ``num_decodes`` sequences get one token each; ``decode_tokens`` are the KV tokens that they attend to, the
    new ones included. Counts of blocks are of one group.
    """

    num_decodes: int
    decode_tokens: int
    chunks: tuple[Chunk, ...]
    copies: int
    swapped_out: int
    swapped_in: int
    preempted: tuple[Request, ...]
    blocked: bool  # a request waits because the pool has too few free blocks

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed."""
        return self.num_decodes + sum(chunk.tokens for chunk in self.chunks)


class Scheduler:
    """First come, first served, with a budget of tokens a step (Orca's iteration-level scheduling; chunked
    prefill as in Sarathi-Serve).

    A step gives one token to every sequence that decodes, continues the one prompt that is not complete, and
    spends what is left of the budget on waiting requests: those swapped out first, then new ones, each only
    when its whole prompt fits into the free blocks. A request that was refused is looked at again when blocks
    have come free. When decoding needs more blocks than are free, the latest arrivals make room, each by the
    cheaper of swapping and recomputing (:class:`PreemptionRule`); in such a step nobody is admitted.

    The caller alternates :meth:`step`, its forward pass, and :meth:`commit`.

    Raises:
        InvalidValue: the budget is below ``max_num_seqs``, so that a step may not fit into it.
    """

    def __init__(self, manager: BlockManager, rule: PreemptionRule, max_batched_tokens: int) -> None:
        if max_batched_tokens < manager.seqs.max_num_seqs:
            allowed = f"at least max_num_seqs ({manager.seqs.max_num_seqs}) is allowed"
            raise InvalidValue("max_batched_tokens", max_batched_tokens, allowed)
        self.manager, self.rule, self.max_batched_tokens = manager, rule, max_batched_tokens
        self.waiting: deque[Request] = deque()
        self.swapped: list[Request] = []
        self.decoding: list[Request] = []
        self.prefilling: Request | None = None
        self.steps = 0
        self.computed_tokens = 0  # by forward passes
        self.dropped_tokens = (
            0  # of preempted requests: they have to be computed again, or found in the cache
        )
        self._joining: list[Request] = []  # their prompts are complete with this step
        self._seqs: I64 = np.empty(0, np.int64)
        self._tokens: I32 = np.empty(0, np.int32)
        self._decode_tokens = 0
        self._next_end = 0
        self._refused_free = -1  # free blocks when the first waiting request was refused
        self._watermark = manager.watermark_blocks

    @property
    def num_running(self) -> int:
        """Requests with a sequence on the device."""
        return len(self.decoding) + (self.prefilling is not None)

    @property
    def is_busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.decoding or self.waiting or self.swapped or self.prefilling)

    def add(self, requests: Iterable[Request]) -> None:
        """Requests arrive, in this order."""
        self.waiting.extend(requests)

    def step(self) -> Batch:
        """Decide what the next forward pass computes, and give it its blocks.

        Raises:
            OutOfBlocks: a request alone does not fit into the pool.
        """
        self.steps += 1
        manager, free_before = self.manager, self.manager.pool.num_free
        preempted: list[Request] = []
        swapped_out = swapped_in = 0
        made_room = False
        while self.decoding:
            try:
                manager.append_step(self._seqs, self._tokens)
            except OutOfBlocks as error:
                latest = sorted(self._running(), key=lambda request: -request.index)
                swapped_out += self._preempt(error.needed - error.free, preempted, [*self.swapped, *latest])
                made_room = True
            else:
                break
        num_decodes = len(self.decoding)
        self._decode_tokens += num_decodes
        budget = self.max_batched_tokens - num_decodes
        chunks: list[Chunk] = []
        if self.prefilling is not None and budget:
            budget -= self._continue(self.prefilling, budget, chunks)
        blocked = made_room
        decode_tokens = self._decode_tokens
        if not made_room:
            while self.swapped:
                request, runs = self.swapped[0], self.num_running or self._joining
                short = request.host_blocks + (self._watermark if runs else 0) - manager.pool.num_free
                if short > 0 and runs:
                    blocked = True
                    break
                if short > 0:  # the others that are swapped out hold what it lacks
                    swapped_out += self._preempt(short, preempted, self.swapped[:0:-1])
                    made_room = True
                swapped_in += len(manager.swap_in(request.seq))
                request.host_blocks = 0
                self._joining.append(self.swapped.pop(0))
            while self.waiting and budget and not (self.swapped or made_room or self.prefilling):
                if len(manager.seqs) >= manager.seqs.max_num_seqs:
                    break
                used = self._admit(self.waiting[0], budget, chunks)
                if not used:
                    blocked = True
                    break
                budget -= used
        if not num_decodes and not chunks and not self._joining and not made_room:
            raise OutOfBlocks(free_before + 1, free_before)
        self.computed_tokens += num_decodes + sum(chunk.tokens for chunk in chunks)
        return Batch(
            num_decodes,
            decode_tokens,
            tuple(chunks),
            len(manager.take_copies()),
            swapped_out,
            swapped_in,
            tuple(preempted),
            blocked,
        )

    def commit(self) -> tuple[list[Request], list[Request]]:
        """The forward pass is done: everybody who decoded, or whose prompt is complete, has a new token.

        Returns:
            (requests that got their first token, requests that are finished, whose sequences are freed).
        """
        first: list[Request] = []
        finished: list[Request] = []
        joining, self._joining = self._joining, []
        if self.decoding and self.steps >= self._next_end:
            finished = [request for request in self.decoding if request.end_step <= self.steps]
            self.decoding = [request for request in self.decoding if request.end_step > self.steps]
            for request in finished:
                self._decode_tokens -= request.max_stored
                request.produced = request.output
                self._end(request)
        for request in joining:
            if request.stored == request.num_tokens:  # a prompt, not one that was swapped in
                request.produced += 1
                if request.produced == 1:
                    first.append(request)
                if request.produced == request.output:
                    finished.append(request)
                    self._end(request)
                    continue
            self.decoding.append(request)
            request.end_step = self.steps + request.output - request.produced
            self._decode_tokens += request.stored
        if finished or joining:
            self._rebuild()
        return first, finished

    # Inside

    def _end(self, request: Request) -> None:
        self.manager.free(request.seq)
        request.seq, request.stored = -1, 0

    def _rebuild(self) -> None:
        """The arrays of what decodes, after it has changed."""
        n = len(self.decoding)
        self._seqs = np.fromiter((request.seq for request in self.decoding), np.int64, n)
        self._tokens = np.fromiter((request.own for request in self.decoding), np.int32, n)
        self._next_end = min((request.end_step for request in self.decoding), default=0)

    def _running(self) -> list[Request]:
        return self.decoding if self.prefilling is None else [*self.decoding, self.prefilling]

    def _preempt(self, needed: int, preempted: list[Request], victims: list[Request]) -> int:
        """Bring ``needed`` blocks into being; returns the blocks that were swapped out.

        A prompt that is not complete is always computed again.
        """
        manager, swapped_blocks = self.manager, 0
        by_seq = {request.seq: request for request in victims}
        for step in self.rule.plan(manager, needed, list(by_seq)):
            request, remedy = by_seq[step.seq], step.remedy
            if request is self.prefilling:
                self.prefilling, remedy = None, Remedy.RECOMPUTE
            elif request not in self.swapped:
                self.decoding.remove(request)
                # This step counts already, but has given it nothing yet.
                request.produced = request.output - (request.end_step - (self.steps - 1))
                request.stored = request.num_tokens - 1
                self._decode_tokens -= request.stored
            if request not in self.swapped:
                preempted.append(request)
            if remedy is Remedy.SWAP:
                moved = len(manager.swap_out(request.seq, step.num_blocks))
                swapped_blocks += moved
                request.host_blocks += moved
                if request not in self.swapped:
                    self.swapped.append(request)
                    self.swapped.sort(key=lambda r: r.index)
            else:
                if request in self.swapped:
                    self.swapped.remove(request)
                self.dropped_tokens += request.stored
                self._end(request)
                request.host_blocks = 0
                self._wait_again(request)
        self._refused_free = -1
        self._rebuild()
        return swapped_blocks

    def _wait_again(self, request: Request) -> None:
        """Back into the queue, at its place among the arrivals."""
        at = 0
        while at < len(self.waiting) and self.waiting[at].index < request.index:
            at += 1
        self.waiting.insert(at, request)

    def _continue(self, request: Request, budget: int, chunks: list[Chunk]) -> int:
        """The next piece of a prompt; 0 tokens when there are no blocks for it."""
        tokens = request.tokens()
        piece = tokens[request.stored : request.stored + budget]
        try:
            self.manager.extend(request.seq, piece)
        except OutOfBlocks:
            return 0
        self._computes(request, piece.size, chunks)
        return int(piece.size)

    def _admit(self, request: Request, budget: int, chunks: list[Chunk]) -> int:
        """Begin with a waiting request; 0 when the pool has no room for its prompt."""
        manager = self.manager
        free = manager.pool.num_free
        if free <= self._refused_free:
            return 0
        if manager.cache is None:
            spare = self._watermark if len(manager.seqs) else 0
            if -(-request.num_tokens // manager.block_size) > free - spare:
                self._refused_free = free
                return 0
        match = manager.match(request.tokens())
        if not manager.can_allocate(match):
            self._refused_free = free
            return 0
        admission = manager.allocate(match, max_new_tokens=budget)
        self.waiting.popleft()
        self._refused_free = -1
        request.seq, request.stored = admission.seq, admission.num_cached
        new = admission.num_tokens - admission.num_cached
        self.prefilling = request
        self._computes(request, new, chunks)
        return new

    def _computes(self, request: Request, new: int, chunks: list[Chunk]) -> None:
        chunk = Chunk(request, request.stored, new, request.stored + new == request.num_tokens)
        chunks.append(chunk)
        request.stored += new
        if chunk.last:
            self.prefilling = None
            self._joining.append(request)
