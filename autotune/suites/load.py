"""The ``load`` suite: what a serving process pays for a pack, and a user for ``pagedgen --help``.

Each figure of loading is from a process of its own, in which torch (and on a GPU its CUDA context) is up
before the clock starts. The pack is built here, of one spec, for this machine's GPU or else its CPU.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pagedgen.autotune.binaries import compile_one
from pagedgen.autotune.measure import device_name
from pagedgen.autotune.suites.contest import pick
from pagedgen.autotune.suites.output import Output
from pagedgen.autotune.suites.report import Case, Draft, Report, Row
from pagedgen.compiler.build import Choice, build
from pagedgen.errors import GateFailure
from pagedgen.values import codec
from pagedgen.values.manifest import Rule
from pagedgen.values.spec import DType, KernelSpec, KInner, Op
from pagedgen.values.target_table import detect
from pagedgen.values.workload import Workload

PROCESSES = 7
CALLS = 2000
BOUND = 2**31 - 1
WORKLOAD = Workload.uniform(1, 1)  # so little work that a call is all overhead

CHILD = """
import json, statistics, sys, time
import torch
device, pack, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
from pagedgen.values import codec
from pagedgen.values.spec import KernelSpec
spec = codec.decode(KernelSpec, json.loads(sys.argv[4]))
kind = getattr(torch, sys.argv[5])
shape = (4, spec.num_kv_heads, spec.head_dim, spec.block_size)
if spec.k_inner.value == "token":
    k = torch.ones(shape, dtype=kind, device=device).permute(0, 3, 1, 2)
else:
    k = torch.ones(shape, dtype=kind, device=device).permute(0, 3, 1, 2).contiguous()
v = torch.ones(4, spec.block_size, spec.num_kv_heads, spec.head_dim, dtype=kind, device=device)
q = torch.ones(1, spec.num_q_heads, spec.head_dim, dtype=kind, device=device)
table = torch.zeros(1, 4, dtype=torch.int32, device=device)
lens = torch.ones(1, dtype=torch.int32, device=device)
out = torch.empty_like(q)
wait = torch.cuda.synchronize if device != "cpu" else (lambda: None)
wait()
start = time.perf_counter()
import pagedgen
attention = pagedgen.load(pack)
loaded = time.perf_counter()
attention.decode(q, k, v, table, lens, out=out, max_seq_len=64)
wait()
first = time.perf_counter()
assert bool((out == 1).all()), out
samples = []
for _ in range(calls):
    begin = time.perf_counter()
    attention.decode(q, k, v, table, lens, out=out, max_seq_len=64)
    samples.append(time.perf_counter() - begin)
    if len(samples) % 100 == 0:
        wait()  # or the launch queue fills and calls wait for the GPU
print(json.dumps([(loaded - start) * 1e6, (first - loaded) * 1e6, statistics.median(samples) * 1e6]))
"""


def run(output: Output) -> Report:
    """Loading, first call, call overhead and ``--help``; microseconds."""
    target = detect()
    cpu = target.kind == "cpu"
    kind = DType.F16
    inner = KInner.TOKEN if cpu else KInner.DIM
    spec = KernelSpec(Op.DECODE, 128, 32, 8, 16, kind, kind, k_inner=inner)
    chosen = pick(spec, target, WORKLOAD)
    with tempfile.TemporaryDirectory(prefix="pagedgen-bench-") as folder:
        binary = compile_one(spec, target, chosen.schedule)
        pack = build([Choice((binary,), (Rule(BOUND, BOUND, 0),), ())], Path(folder) / "bench.pack")
        shape = json.dumps(codec.encode(spec))
        arguments = [device_name(target.kind), str(pack), str(CALLS), shape, "float16"]
        command = [sys.executable, "-c", CHILD, *arguments]
        results = []
        for number in range(PROCESSES):
            output.note(f"load: process {number + 1}/{PROCESSES}")
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
            if done.returncode:  # the child's own check of the result included
                raise GateFailure(f"load: the serving process failed: {done.stderr.strip()[-800:]}")
            results.append(json.loads(done.stdout.splitlines()[-1]))
    load, first, call = (tuple(column) for column in zip(*results, strict=True))
    both = tuple(a + b for a, b in zip(load, first, strict=True))
    output.note("load: pagedgen --help")
    detail = f"{chosen.origin}: {chosen.schedule.name}"
    rows = (
        Row("load and first call", both, 0, detail),
        Row("load", load, 0, "manifest, hashes, library"),
        Row("first call", first, 0, "kernel load included"),
        Row("call", call, 0, f"host time, median of {CALLS} calls in each process"),
        Row("pagedgen --help", _help(), 0, f"whole process; an empty Python is {_empty():,.0f} us"),
    )
    draft = Draft("load", target, 1, output)
    draft.add(Case("microseconds", spec, WORKLOAD, rows, ()))
    return draft.finish()


def _help() -> tuple[float, ...]:
    code = "import sys, pagedgen.cli; sys.argv = ['pagedgen', '--help']; pagedgen.cli.main()"
    return _timed([sys.executable, "-c", code])


def _empty() -> float:
    return statistics.median(_timed([sys.executable, "-c", "pass"]))


def _timed(command: list[str]) -> tuple[float, ...]:
    """Wall time of whole processes, microseconds; the first, which fills the disk cache, is left out."""
    times = []
    for _ in range(PROCESSES + 1):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True, timeout=120)
        times.append((time.perf_counter() - start) * 1e6)
    return tuple(times[1:])
