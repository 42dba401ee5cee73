"""library × workload × verified variants → microseconds of each in interleaved rounds.

GPU: many calls captured in one CUDA graph, events around its replay. CPU: a monotonic clock around the
call, threads stated by ``PAGEDGEN_NUM_THREADS``. On both, the inputs rotate through pools that together
exceed four times the last-level cache, with random block tables, and every round times every candidate once,
in an order of its own. The functions here run in a worker process (:mod:`pagedgen.autotune.worker`), which
keeps the inputs of a workload from one call to the next.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pagedgen.autotune.worker import say
from pagedgen.compiler.verify import Inputs, Pool, gate, make_inputs, run_case
from pagedgen.errors import GateFailure, PagedgenError
from pagedgen.runtime.library import Library
from pagedgen.values.record import Verdict
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec
from pagedgen.values.workload import Workload

ROTATION = 4  # bytes of all pools over bytes of the last-level cache
SAMPLE_US = 1000.0  # calls are repeated until one sample takes this long
MAX_CALLS = 256  # in one sample
KEPT_BYTES = {"cpu": 4 << 30, "cuda": 24 << 30}  # of inputs, from one call to the next


@dataclass(frozen=True, slots=True)
class Verified:
    """A variant of a library that passed the gate: the only thing that is ever timed.

    Raises:
        GateFailure: the verdict is not a pass.
    """

    variant: int
    schedule: Schedule
    verdict: Verdict

    def __post_init__(self) -> None:
        if not self.verdict.passed:
            raise GateFailure(f"{self.schedule.name}: {self.verdict.reason or 'did not pass the gate'}")


@dataclass(frozen=True, slots=True)
class Samples:
    """Microseconds of one call, by variant and round; ``failed`` says why a variant has none."""

    times: Mapping[int, tuple[float, ...]]
    failed: Mapping[int, str]


def device_name(kind: str) -> str:
    """torch's name for a target kind's device."""
    return "cpu" if kind == "cpu" else "cuda"


def pool_layout(device: str) -> Pool:
    """The KV layout that is timed: on CPUs the one of the project's own cache, on GPUs vLLM's."""
    return "hnd" if device == "cpu" else "nhd"


@cache
def last_level_cache_bytes(device: str) -> int:
    """Size of the cache that inputs have to outrun."""
    if device != "cpu":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [32 << 20]  # where the system does not say: a common L3
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        scale = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * scale)
    return max(sizes)


class Turns:
    """Whose turn it is among ``count`` inputs. All clocks of a workload take turns from one of these: with a
    count of its own, each would read the pools that the one before it has just left in the cache."""

    def __init__(self, count: int) -> None:
        self.count, self._next = count, 0

    def reset(self) -> None:
        """Begin with the first: graphs that all begin with it never begin with what another ended on."""
        self._next = 0

    def take(self) -> int:
        """The next one, 0 to count - 1, round and round."""
        turn = self._next
        self._next = (turn + 1) % self.count
        return turn


class Rotation:
    """Inputs of one workload, enough of them that none is still cached when its turn comes again."""

    def __init__(self, spec: KernelSpec, workload: Workload, device: str, seed: int) -> None:
        # Queries and outputs of prompts go through the cache as well, and evict as much as they are.
        beside = sum(workload.query_lens) * spec.num_q_heads * (spec.head_dim + spec.v_dim)
        size = max(1, workload.kv_bytes(spec) + beside * spec.q_dtype.size)
        count = min(64, 1 + math.ceil(ROTATION * last_level_cache_bytes(device) / size))
        if size > ROTATION * last_level_cache_bytes(device):
            count = 1  # a call reads so much that it evicts its own beginning
        # with a window a call reads little of a lot
        count = max(1, min(count, KEPT_BYTES[device] // 2 // max(1, workload.cache_bytes(spec))))
        self.turns = Turns(count)
        pool, queries = pool_layout(device), workload.lens_of_queries
        self.inputs: list[Inputs] = []
        for i in range(count):
            lens = workload.seq_lens
            made = make_inputs(spec, lens, device, seed + i, query_lens=queries, pool=pool, poison=False)
            self.inputs.append(made)
        # Queries and outputs of prompts are more than K and V where many heads share them.
        values = (getattr(made, field.name) for made in self.inputs for field in fields(made))
        self.num_bytes = sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))


_rotations: OrderedDict[tuple[KernelSpec, Workload, str, int], Rotation] = OrderedDict()


def rotation(spec: KernelSpec, workload: Workload, device: str, seed: int = 0) -> Rotation:
    """The inputs of a workload, made once and kept while there is room."""
    key = (spec, workload, device, seed)
    if key in _rotations:
        _rotations.move_to_end(key)
        return _rotations[key]
    room = KEPT_BYTES[device] - max(1, workload.cache_bytes(spec))
    while _rotations and sum(r.num_bytes for r in _rotations.values()) > room:
        _rotations.popitem(last=False)
        _clocks.clear()  # they hold on to their inputs
    _rotations[key] = Rotation(spec, workload, device, seed)
    return _rotations[key]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class Clock:
    """Times a callable that is given its turn, and so rotates its inputs."""

    def __init__(self, call: Callable[[int], None], turns: Turns, device: str) -> None:
        self._call, self._turns, self._device = call, turns, device
        self._graph: Any = None
        self.calls = 1  # of one sample

    def _once(self) -> None:
        self._call(self._turns.take())

    def warm(self) -> None:
        """First calls, untimed; on a GPU the capture of the graph."""
        if self._device == "cpu":
            once_us = 0.0
            for _ in range(2):
                start = time.perf_counter()
                self._once()
                once_us = (time.perf_counter() - start) * 1e6
            self.calls = _calls(once_us)
            return
        torch.cuda.synchronize()  # inputs and workspace were made on another stream
        begin, end = _event(), _event()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(side):
            self._once()
            begin.record()
            for _ in range(4):
                self._once()
            end.record()
        side.synchronize()
        # whole turns, so that every replay reads what the last one evicted
        turns = math.ceil(_graph_calls(begin.elapsed_time(end) * 1e3 / 4) / self._turns.count)
        self.calls = turns * self._turns.count
        self._turns.reset()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=side):
            for _ in range(self.calls):
                self._once()
        self._graph.replay()
        torch.cuda.synchronize()

    def sample(self) -> float:
        """Microseconds of one call, averaged over one sample."""
        if self._device == "cpu":
            start = time.perf_counter()
            for _ in range(self.calls):
                self._once()
            return (time.perf_counter() - start) * 1e6 / self.calls
        begin, end = _event(), _event()
        begin.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / self.calls


def _calls(once_us: float) -> int:
    return min(MAX_CALLS, max(1, math.ceil(SAMPLE_US / max(once_us, 1.0))))


def _graph_calls(once_us: float) -> int:
    """Of a sample on a GPU: eight at least, so that a graph's start does not count, or as many as take 3 ms.

    Of prompts of 8192 tokens, eight took 12 ms, and a search takes hundreds of samples.
    """
    return max(_calls(once_us), min(8, math.ceil(3 * SAMPLE_US / max(once_us, 1.0))))


def clock_of(
    library: Library, spec: KernelSpec, workload: Workload, verified: Verified, device: str
) -> Clock:
    """The clock of one variant on a workload; clocks of one workload share its inputs."""
    rotating = rotation(spec, workload, device)
    inputs = rotating.inputs
    size = library.workspace_bytes(workload.num_seqs)
    workspace = torch.zeros(max(1, size), dtype=torch.uint8, device=device)

    def call(turn: int) -> None:
        run_case(spec, library, verified.variant, inputs[turn], workspace)

    return Clock(call, rotating.turns, device)


_libraries: OrderedDict[Path, Library] = OrderedDict()
_clocks: dict[tuple[Path, KernelSpec, Workload, str], dict[int, Clock]] = {}


def _library(path: Path) -> Library:
    if path not in _libraries:
        while len(_libraries) > 1:
            _libraries.popitem(last=False)
        _libraries[path] = Library(path)
    return _libraries[path]


def pin() -> None:
    """Keep this process on the cores it has, as many as there are kernel threads."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        threads = int(os.environ.get("PAGEDGEN_NUM_THREADS", 0)) or len(cores)
        os.sched_setaffinity(0, cores[:threads])


def gate_variant(library: Path, spec: KernelSpec, variant: int, device: str, seed: int) -> Verdict:
    """The correctness gate, for a worker."""
    return gate(_library(library), spec, variant, device, seed)


def device_works(device: str) -> None:
    """Raise when an earlier kernel has broken this process's CUDA context, for a worker."""
    torch.ones(1, device=device).sum().item()


def measure(
    library: Path,
    spec: KernelSpec,
    workload: Workload,
    variants: Sequence[Verified],
    rounds: int,
    device: str,
    seed: int = 0,
) -> Samples:
    """Time verified variants of a library in ``rounds`` interleaved rounds, for a worker.

    It says which variant is up before it runs, so that a crash or a hang is charged to the right one.
    """
    key = (library, spec, workload, device)
    if any(known != library for known, *_ in _clocks):
        _clocks.clear()  # lets go of graphs and workspaces before the next are made
    rotation(spec, workload, device)
    clocks = _clocks.setdefault(key, {})
    failed: dict[int, str] = {}
    order = [v.variant for v in variants]
    for verified in variants:
        variant = verified.variant
        say(variant)
        try:
            if variant not in clocks:
                clocks[variant] = clock_of(_library(library), spec, workload, verified, device)
                clocks[variant].warm()
        except (PagedgenError, RuntimeError) as error:
            try:
                device_works(device)
            except RuntimeError:
                os._exit(70)  # a broken context fails every later call: only this one is charged
            failed[variant] = f"call failed: {error}"
            clocks.pop(variant, None)
            order.remove(variant)
    times: dict[int, list[float]] = {variant: [] for variant in order}
    shuffle = random.Random(seed)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for variant in order:
            say(variant)
            times[variant].append(clocks[variant].sample())
    return Samples({variant: tuple(samples) for variant, samples in times.items()}, failed)
