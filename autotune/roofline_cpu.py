"""The read bandwidth of this machine's memory, as a decode kernel could use it at best.

What a paged kernel can reach is not the sequential rate: blocks lie anywhere, so every few KB a new stream
begins. The ceiling that kernels are held against reads blocks of the kernel's size in random order,
prefetching.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from pagedgen.compiler.link import TIMEOUT_S, host_compiler
from pagedgen.errors import CompileError, InvalidValue
from pagedgen.templates.family import TEMPLATES

SOURCE = TEMPLATES / "launcher" / "roofline_cpu.cc"
# (blocks read in turn, turns prefetched ahead); the best of them is the ceiling. Reading 4 blocks in turn
# instead of one after the other gave 38 against 27 GB/s for random 4 KB blocks on two cores of an EPYC 9004.
PATTERNS = ((1, 1), (1, 4), (2, 1), (4, 1))


@cache
def _library() -> ctypes.CDLL:
    """Compile the reader once a process.

    Raises:
        CompileError, HostCompilerMissing: no reader could be made.
    """
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    with tempfile.TemporaryDirectory(prefix="pagedgen-") as folder:
        out = Path(folder) / f"roofline-{digest}.so"
        line = [
            *host_compiler(),
            "-std=c++17",
            "-O3",
            "-shared",
            "-fPIC",
            str(SOURCE),
            "-o",
            str(out),
            "-lpthread",
        ]
        try:  # ziglang's first C++ file takes it 50 s of CPU time, for a C++ library of its own
            run = subprocess.run(line, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise CompileError(f"{line[0]} did not finish within {TIMEOUT_S} s") from error
        if run.returncode:
            raise CompileError("\n".join(run.stderr.splitlines()[-8:]))
        library = ctypes.CDLL(str(out))
    library.read_blocks.restype = ctypes.c_double
    library.read_blocks.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_uint64),
    ]
    return library


def num_threads() -> int:
    """Threads that the kernels use by default: PAGEDGEN_NUM_THREADS, else those the process may run on."""
    wanted = os.environ.get("PAGEDGEN_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) else len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class BlockReader:
    """Reads the same blocks of memory on every call.

    ``addresses`` is int64 ``[count]``, ``block_bytes`` a multiple of 64, ``keep`` what the memory belongs to.
    """

    addresses: torch.Tensor
    block_bytes: int
    threads: int
    keep: tuple[torch.Tensor, ...]

    def __post_init__(self) -> None:
        if self.block_bytes <= 0 or self.block_bytes % 64:
            raise InvalidValue("block_bytes", self.block_bytes, "a positive multiple of 64 is expected")

    @property
    def num_bytes(self) -> int:
        """Bytes one call reads."""
        return self.addresses.numel() * self.block_bytes

    def seconds(self, ways: int, ahead: int) -> float:
        """Read every block once, ``ways`` in turn, prefetching ``ahead`` turns ahead; the seconds it took."""
        total = ctypes.c_uint64(0)
        seconds = _library().read_blocks(
            self.addresses.data_ptr(),
            self.addresses.numel(),
            self.block_bytes,
            ahead,
            ways,
            self.threads,
            ctypes.byref(total),
        )
        if seconds < 0:
            raise InvalidValue("threads", self.threads, "1 to 1024 threads that the system can start")
        return float(seconds)

    def best_gbs(self) -> float:
        """The best rate over :data:`PATTERNS`, GB/s."""
        return self.num_bytes / min(self.seconds(ways, ahead) for ways, ahead in PATTERNS) / 1e9


def sequential_reader(
    memory: torch.Tensor, threads: int | None = None, block_bytes: int = 1 << 16
) -> BlockReader:
    """Blocks that follow each other through a contiguous tensor."""
    count = memory.numel() * memory.element_size() // block_bytes
    addresses = memory.data_ptr() + torch.arange(count, dtype=torch.int64) * block_bytes
    return BlockReader(addresses, block_bytes, threads or num_threads(), (memory,))


def random_reader(
    memory: torch.Tensor, block_bytes: int, threads: int | None = None, *, seed: int = 0
) -> BlockReader:
    """Blocks of ``block_bytes`` of a contiguous tensor, each once, in random order."""
    count = memory.numel() * memory.element_size() // block_bytes
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return BlockReader(
        memory.data_ptr() + order * block_bytes, block_bytes, threads or num_threads(), (memory,)
    )


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return sorted(values)[len(values) // 2]


@dataclass(frozen=True, slots=True)
class Roofline:
    """GB/s: best and median over rounds, of reading in sequence and in random blocks."""

    block_bytes: int
    threads: int
    sequential_gbs: float
    random_gbs: float
    sequential_median_gbs: float
    random_median_gbs: float


def measure_roofline(
    block_bytes: int, threads: int | None = None, *, memory_bytes: int = 1 << 28, rounds: int = 7
) -> Roofline:
    """Read bandwidth now, in sequence and in random blocks; ``memory_bytes`` should exceed the caches."""
    memory = torch.ones(memory_bytes // 8, dtype=torch.int64)
    sequential, random = sequential_reader(memory, threads), random_reader(memory, block_bytes, threads)
    rates = [(sequential.best_gbs(), random.best_gbs()) for _ in range(rounds)]
    first, second = [a for a, _ in rates], [b for _, b in rates]
    return Roofline(block_bytes, sequential.threads, max(first), max(second), median(first), median(second))
