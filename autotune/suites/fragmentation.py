"""How much of the KV memory holds tokens: Figure 2 of the PagedAttention paper, on any trace of lengths.

A closed loop: requests enter in the order of the trace as soon as memory is there, every running one gets a
token a step, and memory is looked at when the pool has filled once. The paged policy is this project's block
manager itself, with preemption by recomputation; the contiguous ones are the paper's: Orca reserves prompt
and output space in one piece from a buddy allocator, for the longest possible output (Max), up to twice the
true one (Pow2), or exactly the true one, known in advance (Oracle).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pagedgen.errors import MalformedFile, OutOfBlocks
from pagedgen.runtime.arrays import I32
from pagedgen.runtime.block_manager import BlockManager

COLUMNS = (("ContextTokens", "GeneratedTokens"), ("num_prefill_tokens", "num_decode_tokens"))
# Shares in Figure 2 of Kwon et al., "Efficient Memory Management for LLM Serving with PagedAttention", 2023.
PAPER = {"Orca (Max)": 0.204, "Orca (Pow2)": 0.268, "Orca (Oracle)": 0.382, "paged": 0.963}


@dataclass(frozen=True, slots=True)
class Lengths:
    """Prompt and output length of each request, in tokens."""

    name: str
    prompts: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return max(p + o for p, o in zip(self.prompts, self.outputs, strict=True))


@dataclass(frozen=True, slots=True)
class Share:
    """What part of the memory holds tokens, averaged over the steps.

    ``of_allocated``: of what is reserved for requests; ``of_pool``: of all, which also counts what no
    request could be given.
    """

    policy: str
    of_allocated: float
    of_pool: float
    running: float  # requests at a time, mean


def read_trace(path: Path, limit: int) -> Lengths:
    """The first ``limit`` requests of a trace.

    CSV with the columns of Azure's or Sarathi's traces, or JSON lines with ``input_length`` and
    ``output_length`` (Mooncake).

    Raises:
        MalformedFile: names the line.
    """
    pairs: list[tuple[int, int]] = []
    with path.open(encoding="utf-8", newline="") as file:
        rows = map(json.loads, file) if path.suffix == ".jsonl" else csv.DictReader(file)
        for number, row in enumerate(rows, start=1):
            names = (("input_length", "output_length"), *COLUMNS)
            for prompt, output in names:
                if prompt in row and output in row:
                    pairs.append((max(1, int(float(row[prompt]))), max(1, int(float(row[output])))))
                    break
            else:
                raise MalformedFile(path, f"line {number}", f"no known pair of columns: {list(row)}")
            if len(pairs) == limit:
                break
    if not pairs:
        raise MalformedFile(path, "the file", "no request in it")
    return Lengths(path.stem, tuple(p for p, _ in pairs), tuple(o for _, o in pairs))


def replay(
    manager: BlockManager, trace: Lengths, max_steps: int, seed: int = 0
) -> Iterator[tuple[int, bool]]:
    """Drive a manager with a trace; yields (step, whether the pool was full once), then frees what ended.

    Requests enter in order as memory allows, each with a prompt of its own; when a step needs more than is
    free, the latest arrivals give way and come back with what they had. Ends when no request waits, none
    fits, or ``max_steps`` are done; the manager is left as it was then.
    """
    waiting = [(i, p, o) for i, (p, o) in enumerate(zip(trace.prompts, trace.outputs, strict=True))][::-1]
    running: dict[int, tuple[int, int]] = {}  # sequence -> request, tokens that it is still to get
    arrived: list[int] = []
    noise = np.random.default_rng(seed).integers(0, 1 << 17, manager.max_seq_len + 1).astype(np.int32)
    full = False
    for step in range(max_steps):
        while waiting and len(running) < manager.seqs.max_num_seqs:
            request, prompt, output = waiting[-1]
            try:  # the same noise after another first token: no two prompts have a prefix in common
                seq = manager.allocate(np.concatenate(([request], noise[1:prompt]))).seq
            except OutOfBlocks:
                full = True
                break
            waiting.pop()
            running[seq] = (request, output)
            arrived.append(seq)
        if not waiting or not running:
            break
        while manager.blocks_needed(list(running)) > manager.pool.num_free:
            victim = arrived.pop()
            request, output = running.pop(victim)
            waiting.append((request, manager.length(victim), output))
            manager.free(victim)
        seqs = np.array(list(running))
        manager.append_step(seqs, noise[manager.seq_lens.take(manager.seqs.rows(seqs))])
        manager.take_copies()
        yield step, full
        for seq in [seq for seq, (_, left) in running.items() if left == 1]:
            manager.free(seq)
            del running[seq]
            arrived.remove(seq)
        running = {seq: (request, left - 1) for seq, (request, left) in running.items()}


def paged(trace: Lengths, pool_tokens: int, block_size: int, max_steps: int) -> Share:
    """The block manager under the trace."""
    manager = BlockManager(
        pool_tokens // block_size,
        block_size,
        max_num_seqs=4096,
        max_seq_len=trace.longest + 1,
        prefix_caching=False,
    )
    samples: list[tuple[float, float, int]] = []
    for step, full in replay(manager, trace, max_steps):
        if full and step % 16 == 0:
            stats = manager.stats()
            samples.append((1 - stats.waste, stats.stored_tokens / pool_tokens, stats.sequences))
    return _mean("paged", samples)


def contiguous(
    policy: str, trace: Lengths, pool_tokens: int, max_steps: int, reserve: Callable[[int, int], int]
) -> Share:
    """Reservation in one piece; ``reserve(prompt, output)`` tokens, rounded up to a power of two."""
    order = pool_tokens.bit_length() - 1
    free: list[list[int]] = [[] for _ in range(order + 1)]
    free[order] = [0]
    waiting = list(zip(trace.prompts, trace.outputs, strict=True))[::-1]
    running: list[list[int]] = []  # tokens, tokens to come, reserved, order, address
    samples: list[tuple[float, float, int]] = []
    full = False
    for step in range(max_steps):
        while waiting:
            prompt, output = waiting[-1]
            reserved = reserve(prompt, output)
            level = min(order, max(0, (reserved - 1).bit_length()))
            address = _buddy_take(free, level)
            if address is None:
                full = True
                break
            waiting.pop()
            running.append([prompt, output, reserved, level, address])
        if not waiting:
            break
        for request in running:
            request[0] += 1
            request[1] -= 1
        if full and step % 16 == 0:
            tokens = sum(r[0] for r in running)
            allocated = sum(1 << r[3] for r in running)
            samples.append((tokens / allocated, tokens / (1 << order), len(running)))
        for request in running:
            if request[1] <= 0:
                _buddy_give(free, request[3], request[4])
        running = [request for request in running if request[1] > 0]
    return _mean(policy, samples)


def figure_2(trace: Lengths, pool_tokens: int, block_size: int = 16, max_steps: int = 4000) -> list[Share]:
    """All policies on one trace; the pool is rounded to a power of two for the buddy allocator's sake."""
    pool_tokens = 1 << (pool_tokens - 1).bit_length()
    longest = trace.longest
    policies: Sequence[tuple[str, Callable[[int, int], int]]] = (
        ("Orca (Max)", lambda prompt, output: longest),
        ("Orca (Pow2)", lambda prompt, output: min(longest, prompt + (1 << (output - 1).bit_length()))),
        ("Orca (Oracle)", lambda prompt, output: prompt + output),
    )
    shares = [contiguous(name, trace, pool_tokens, max_steps, reserve) for name, reserve in policies]
    return [*shares, paged(trace, pool_tokens, block_size, max_steps)]


def sharing(trace: Lengths, width: int, requests: int, beam: bool, seed: int) -> tuple[float, float]:
    """Memory that sharing spares at the end of each request, mean: (measured, theoretical).

    Theoretical: every common token stored once. Parallel sampling forks the prompt; a beam step keeps the
    best ``width`` continuations, whose parents are drawn at random.
    """
    rng = np.random.default_rng(seed)
    blocks = tokens = private_blocks = private_tokens = 0
    for prompt, output in list(zip(trace.prompts, trace.outputs, strict=True))[:requests]:
        manager = BlockManager(
            width * (prompt + output + 64) // 8, max_num_seqs=2 * width, max_seq_len=prompt + output + 1,
            prefix_caching=False,
        )  # fmt: skip
        root = manager.allocate(np.zeros(prompt, np.int32)).seq
        manager.take_copies()
        beams = [root, *manager.fork(root, width - 1)]
        paths: list[tuple[int, ...]] = [()] * width
        zeros: I32 = np.zeros(width, np.int32)
        for step in range(output):
            if beam:
                parents = rng.integers(0, width, width).tolist()
                new = [manager.fork(beams[parent])[0] for parent in parents]
                for seq in beams:
                    manager.free(seq)
                beams = new
                paths = [(*paths[parent][-512:], step * width + i) for i, parent in enumerate(parents)]
            manager.append_step(beams, zeros)
            manager.take_copies()
        blocks += manager.stats().used_blocks
        private_blocks += width * -(-(prompt + output) // manager.block_size)
        # Beams that part stay apart: paths agree up to the last common step.
        distinct = len({(i, token) for path in paths for i, token in enumerate(path, output - len(path))})
        tail = max(0, output - 512) if beam else 0
        tokens += prompt + (tail + distinct if beam else width * output)
        private_tokens += width * (prompt + output)
    return 1 - blocks / private_blocks, 1 - tokens / private_tokens


def _buddy_take(free: list[list[int]], level: int) -> int | None:
    for larger in range(level, len(free)):
        if free[larger]:
            address = free[larger].pop()
            while larger > level:  # halves go back, smaller and smaller
                larger -= 1
                free[larger].append(address + (1 << larger))
            return address
    return None


def _buddy_give(free: list[list[int]], level: int, address: int) -> None:
    while level < len(free) - 1 and (address ^ (1 << level)) in free[level]:
        free[level].remove(address ^ (1 << level))
        address &= ~(1 << level)
        level += 1
    free[level].append(address)


def _mean(policy: str, samples: Sequence[tuple[float, float, int]]) -> Share:
    if not samples:
        return Share(policy, float("nan"), float("nan"), 0.0)
    allocated, pool, running = np.array(samples).mean(axis=0)
    return Share(policy, float(allocated), float(pool), float(running))
