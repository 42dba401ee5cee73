"""The ``manager`` suite: what the block manager costs, beside vLLM's in the same run, and what it wastes.

    python -m pagedgen.autotune.suites.manager --trace lengths.csv --json manager.json

Times are CPU time of one thread. The managers alternate, so that a slow moment of the machine hits both.
vLLM's manager is measured where ``vllm`` can be imported; ``--python`` names the interpreter of an
environment that has it, and the whole suite then runs there.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from pagedgen.autotune.paths import publish
from pagedgen.autotune.suites import fragmentation
from pagedgen.autotune.suites.manager_peers import BLOCK_SIZE, VLLM, Manager, Pagedgen
from pagedgen.autotune.suites.output import Output
from pagedgen.runtime.arrays import I32
from pagedgen.runtime.block_manager import BlockManager
from pagedgen.values import codec

BATCHES = (256, 1024, 4096)
PROMPT = 8192  # tokens
WINDOWS = 8  # a manager and operation; they alternate
MILLION = 1_000_000
# Quoted, not measured here: nano-vllm, thread CPU time on a 2-vCPU VM, best of many.
NANO_VLLM = {
    "step, 256 running": 190.0,
    "step, 1024 running": 860.0,
    "8k prompt: hash and look up": 880.0,
    "8k prompt: admit": 990.0,
}
LIMITS = {  # microseconds: what this manager is built to stay within
    "step, 256 running": 150.0,
    "step, 1024 running": 500.0,
    "step, 4096 running": 2000.0,
    "8k prompt: hash and look up": 250.0,
    "8k prompt: admit": 300.0,
    "8k prompt: free": 40.0,
    "8k prompt: fork": 30.0,
}
NAMES = {"lookup": "hash and look up", "admit": "admit", "free": "free", "fork": "fork"}


@dataclass(frozen=True, slots=True)
class Samples:
    """CPU microseconds of one operation by one manager."""

    operation: str
    manager: str
    pool_blocks: int
    samples_us: tuple[float, ...]
    cold_us: tuple[float, ...]  # the first of each window, with the caches full of something else

    @property
    def median_us(self) -> float:
        """Median of the samples."""
        return float(np.median(self.samples_us))


@dataclass(frozen=True, slots=True)
class Memory:
    """A pool of a million blocks that are all in use or cached.

    ``array_bytes``: the manager's arrays; ``resident_bytes``: growth of the process.
    """

    num_blocks: int
    array_bytes: int
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class TraceShares:
    """Figure 2 of the PagedAttention paper on one trace, and what sharing spares."""

    trace: str
    requests: int
    pool_tokens: int
    shares: tuple[fragmentation.Share, ...]
    sampling_saving: float  # n = 4
    sampling_theory: float
    beam_saving: float  # width 4
    beam_theory: float


@dataclass(frozen=True, slots=True)
class Environment:
    """Where and when the figures were made."""

    command: str
    date: str
    cpu: str
    cores: int
    python: str
    numpy: str


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that one run measured; not ``complete`` while it does, or where it was cut off."""

    environment: Environment
    complete: bool
    times: tuple[Samples, ...]
    memory: Memory
    traces: tuple[TraceShares, ...]

    def lines(self) -> list[str]:
        """The table, and what it says about the limits."""
        broken = broken_limits(self)
        return [*table(self).splitlines(), *(f"limit broken: {b}" for b in broken or ["none"])]

    def save(self, path: Path) -> None:
        """Write all samples, the whole file or nothing.

        Raises:
            CacheUnwritable: the folder cannot be written.
        """
        publish(path, codec.dumps(self).encode())


def prompts(n: int, tokens: int, seed: int) -> list[I32]:
    """Random prompts of ``tokens`` tokens on average, half to one and a half times that long."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(tokens // 2, tokens * 3 // 2, n)
    return [rng.integers(0, 128_000, length).astype(np.int32) for length in lengths]


def measure_steps(managers: Sequence[Manager], batch: int, pool_blocks: int) -> list[Samples]:
    """Decode steps of ``batch`` sequences, in windows of one block that alternate between the managers.

    The first step of a window finds the processor's caches as the other manager left them: it is kept apart,
    as the cold one.
    """
    rng = np.random.default_rng(batch)
    starts = prompts(batch, 512, batch)
    for manager in managers:
        manager.start(starts)
    steps: dict[str, list[float]] = {manager.name: [] for manager in managers}
    cold: dict[str, list[float]] = {manager.name: [] for manager in managers}
    for window in range(WINDOWS + 1):
        for manager in managers:
            for step in range(BLOCK_SIZE + 1):
                spent = manager.step(rng.integers(0, 128_000, batch).astype(np.int32))
                if window:  # the first one grows arrays
                    (steps if step else cold)[manager.name].append(spent)
    name = f"step, {batch} running"
    return [
        Samples(name, manager, pool_blocks, tuple(spent), tuple(cold[manager]))
        for manager, spent in steps.items()
    ]


def measure_prompts(managers: Sequence[Manager], pool_blocks: int) -> list[Samples]:
    """Admission and end of new 8k prompts in a pool whose free blocks are all cached, so each evicts."""
    rng = np.random.default_rng(1)
    for _ in range(pool_blocks * BLOCK_SIZE // PROMPT + 4):
        for manager in managers:
            manager.prompt(rng.integers(0, 128_000, PROMPT).astype(np.int32))
    times: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for _ in range(WINDOWS):
        for manager in managers:
            for i in range(9):
                tokens = rng.integers(0, 128_000, PROMPT).astype(np.int32)
                for operation, spent in manager.prompt(tokens).items():
                    warm, cold = times.setdefault((operation, manager.name), ([], []))
                    (warm if i else cold).append(spent)
    return [
        Samples(f"8k prompt: {NAMES[operation]}", manager, pool_blocks, tuple(warm), tuple(cold))
        for (operation, manager), (warm, cold) in times.items()
    ]


def measure_memory() -> Memory:
    """Host memory of a million blocks: half of them held by sequences, the rest cached."""
    before = _resident()
    manager = BlockManager(MILLION, BLOCK_SIZE, max_num_seqs=256, max_seq_len=131_072)
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(MILLION * BLOCK_SIZE // 65_536 + 2):
        seq = manager.allocate(rng.integers(0, 128_000, 65_536).astype(np.int32)).seq
        manager.take_copies()
        held += 65_536 // BLOCK_SIZE
        if held > MILLION // 2:
            manager.free(seq)
    return Memory(MILLION, manager.stats().host_bytes, _resident() - before)


def measure_trace(path: Path, requests: int, pool_tokens: int) -> TraceShares:
    """Figure 2 and the saving of sharing on one trace."""
    trace = fragmentation.read_trace(path, requests)
    pool_tokens = max(pool_tokens, 8 * (1 << (trace.longest - 1).bit_length()))
    sampling = fragmentation.sharing(trace, 4, 50, beam=False, seed=0)
    beam = fragmentation.sharing(trace, 4, 20, beam=True, seed=0)
    shares = tuple(fragmentation.figure_2(trace, pool_tokens, BLOCK_SIZE))
    return TraceShares(trace.name, len(trace.prompts), pool_tokens, shares, *sampling, *beam)


def run(output: Output, traces: Sequence[Path] = (), requests: int = 4000, command: str = "") -> Report:
    """Measure everything; about a minute with vLLM, and a few seconds a trace.

    Args:
        output: where lines of progress go, and what is finished.
        traces: files of request lengths; see :func:`fragmentation.read_trace`.
        requests: at most this many of each trace.
        command: how to run it again.
    """
    command = command or " ".join(["pagedgen bench --suite manager", *(f"--trace {p.name}" for p in traces)])
    environment = _environment(command)
    times: list[Samples] = []
    shares: list[TraceShares] = []

    def keep(complete: bool = False) -> Report:
        report = Report(environment, complete, tuple(times), memory, tuple(shares))
        output.keep(report)
        return report

    with_peer = importlib.util.find_spec("vllm") is not None
    output.note(
        "vLLM's manager beside ours" if with_peer else "vllm is not installed here: this manager alone"
    )
    memory = measure_memory()
    for batch in BATCHES:
        output.note(f"decode steps of {batch} sequences")
        pool = batch * 64  # every sequence, and as many cached blocks
        managers: list[Manager] = [Pagedgen(pool, batch, 16_384)]
        if with_peer:
            managers.append(VLLM(pool, batch, 16_384))
        times += measure_steps(managers, batch, pool)
        times += measure_steps([Pagedgen(MILLION, batch, 16_384)], batch, MILLION)
        keep()
    for pool in (16_384, MILLION):
        output.note(f"8k prompts in {pool:,} blocks")
        managers = [Pagedgen(pool, 64, 16_384)]
        if with_peer and pool != MILLION:
            managers.append(VLLM(pool, 64, 16_384))
        times += measure_prompts(managers, pool)
        keep()
    for path in traces:
        output.note(f"trace {path.name}")
        shares.append(measure_trace(path, requests, 1 << 18))
        keep()
    return keep(complete=True)


def table(report: Report) -> str:
    """The report as Markdown."""
    env = report.environment
    lines = [
        f"{env.cpu}, {env.cores} cores, Python {env.python}, numpy {env.numpy}, {env.date}.",
        "",
        f"    {env.command}",
        "",
        "CPU time of one thread in microseconds; block 16, prefix caching on. Median (best) in windows that",
        "alternate between the managers; cold: the first of a window, after the other manager's work.",
        "",
    ]
    small = [s for s in report.times if s.pool_blocks != MILLION]
    large = {s.operation: s for s in report.times if s.pool_blocks == MILLION}
    peers = list(dict.fromkeys(s.manager for s in small if s.manager != Pagedgen.name))
    lines += [
        f"| operation | limit | pagedgen | of limit | cold | a million blocks | "
        f"{''.join(f'{p} | ' for p in peers)}nano-vllm (quoted) |",
        "| --- " * (7 + len(peers)) + "|",
    ]
    for operation, limit in LIMITS.items():
        mine = next(s for s in small if s.operation == operation and s.manager == Pagedgen.name)
        cells = [operation, f"{limit:,.0f}", _cell(mine), f"{mine.median_us / limit:.0%}"]
        cells += [f"{np.median(mine.cold_us):,.0f}", _cell(large[operation])]
        for peer in peers:
            theirs = [s for s in small if s.operation == operation and s.manager == peer]
            cells.append(_cell(theirs[0]) if theirs else "-")
        quoted = NANO_VLLM.get(operation)
        cells.append(f"{quoted:,.0f}" if quoted else "-")
        lines.append(f"| {' | '.join(cells)} |")
    memory = report.memory
    lines += [
        "",
        f"Host memory of {memory.num_blocks:,} blocks, all in use or cached (limit 64 MB): arrays "
        f"{memory.array_bytes / 1e6:.1f} MB, growth of the process {memory.resident_bytes / 1e6:.1f} MB.",
    ]
    if report.traces:
        lines += ["", *_trace_lines(report.traces)]
    return "\n".join(lines) + "\n"


def broken_limits(report: Report) -> list[str]:
    """The limits that this run did not hold, in words."""
    broken = []
    for s in report.times:
        if s.manager == Pagedgen.name and s.median_us > LIMITS[s.operation]:
            broken.append(f"{s.operation} ({s.pool_blocks:,} blocks): {s.median_us:.0f} us")
    if max(report.memory.array_bytes, report.memory.resident_bytes) > 64e6:
        broken.append(f"memory: {report.memory}")
    for t in report.traces:
        paged = t.shares[-1].of_allocated
        if paged < 0.96:
            broken.append(f"{t.trace}: {paged:.1%} of allocated memory holds tokens")
        for kind, got, theory in (
            ("n=4", t.sampling_saving, t.sampling_theory),
            ("beam 4", t.beam_saving, t.beam_theory),
        ):
            if abs(got - theory) > 0.02:
                broken.append(f"{t.trace}, {kind}: sharing saves {got:.1%}, theory {theory:.1%}")
    return broken


def _trace_lines(traces: Iterable[TraceShares]) -> list[str]:
    lines = [
        "KV memory that holds tokens, in % of what is allocated (in brackets: of the pool, as in Figure 2 of",
        "the PagedAttention paper, whose values are for its own traces and at most 2,048 tokens a request):",
        "",
        "| trace | requests | pool, tokens | Orca (Max) | Orca (Pow2) | Orca (Oracle) | block manager |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| the paper | | | "
        + " | ".join(f"({100 * share:.1f})" for share in fragmentation.PAPER.values())
        + " |",
    ]
    for t in traces:
        cells = [f"{100 * s.of_allocated:.1f} ({100 * s.of_pool:.1f})" for s in t.shares]
        lines.append(f"| {t.trace} | {t.requests:,} | {t.pool_tokens:,} | {' | '.join(cells)} |")
    lines += [
        "",
        "Memory that sharing spares, in %, and in theory (every common token once):",
        "",
        "| trace | parallel sampling n=4 | theory | beam width 4 | theory |",
        "| --- | --- | --- | --- | --- |",
    ]
    for t in traces:
        values = (t.sampling_saving, t.sampling_theory, t.beam_saving, t.beam_theory)
        lines.append(f"| {t.trace} | {' | '.join(f'{100 * value:.1f}' for value in values)} |")
    return lines


def _cell(samples: Samples) -> str:
    return f"{samples.median_us:,.0f} ({min(samples.samples_us):,.0f})"


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - not a real file
        return int(file.read().split()[1]) * resource.getpagesize()


def _environment(command: str) -> Environment:
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return Environment(
        command=command,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        cpu=cpu,
        cores=os.cpu_count() or 1,
        python=platform.python_version(),
        numpy=np.__version__,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite from the command line; the exit status is 1 when a limit is broken."""
    parser = argparse.ArgumentParser(prog="python -m pagedgen.autotune.suites.manager")
    parser.add_argument(
        "--trace", type=Path, action="append", default=[], help="a trace of lengths; repeatable"
    )
    parser.add_argument("--requests", type=int, default=4000, help="at most this many of each trace")
    parser.add_argument("--json", type=Path, help="write every sample here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--python", type=Path, help="run in this interpreter, which has vllm")
    options = parser.parse_args(arguments)
    given = list(sys.argv[1:] if arguments is None else arguments)
    if options.python:
        at = given.index("--python")
        root = Path(__file__).resolve().parents[2]
        return subprocess.call(
            [str(options.python), "-m", "pagedgen.autotune.suites.manager", *given[:at], *given[at + 2 :]],
            env={**os.environ, "PYTHONPATH": str(root)},
        )
    traces = " ".join(f"--trace {path.name}" for path in options.trace)
    command = f"python -m pagedgen.autotune.suites.manager {traces}".strip()
    output = Output(lambda line: print(line, file=sys.stderr), options.json)
    report = run(output, options.trace, options.requests, command)
    print("\n".join(report.lines()))
    if options.markdown:
        options.markdown.write_text("# Block manager\n\n" + table(report), encoding="utf-8")
    return 1 if broken_limits(report) else 0


if __name__ == "__main__":
    sys.exit(main())
