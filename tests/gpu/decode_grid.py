"""The decode specs that are proved on real GPUs: head dims, ratios, block sizes and formats.

``python tests/gpu/decode_grid.py TARGET EMBED FOLDER [SPEC…]`` builds a pack of each spec (all without names)
with the default schedule, in parallel.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pagedgen.autotune.suites.decode_gpu import BF16, E4M3, E5M2, F16, grid, spec_of
from pagedgen.compiler.build import Choice, build
from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.render import render
from pagedgen.compiler.space import default_schedule
from pagedgen.values.manifest import Rule
from pagedgen.values.spec import KernelSpec, KVScale
from pagedgen.values.target_table import target

MASKS: tuple[dict[str, Any], ...] = (
    {"window": 1},
    {"window": 100},
    {"window": 4096},
    {"logits_soft_cap": 30.0},
    {"sinks": True},
    {"window": 128, "logits_soft_cap": 50.0, "sinks": True},
    {"alibi": True},
    {"attention_chunk": 300},
    {"attention_chunk": 8192, "window": 4096, "alibi": True, "logits_soft_cap": 30.0, "sinks": True},
)
V_DIMS: tuple[tuple[int, int], ...] = ((192, 128), (64, 128), (96, 80))  # of K and of V
EVERYTHING = (Rule(1 << 30, 1 << 30, 0),)


def extra() -> tuple[KernelSpec, ...]:
    """Beyond the benchmark's grid: head dims that 16 does not divide, real models' shapes, mixed formats."""
    specs = []
    for q, kv in ((F16, F16), (BF16, BF16), (F16, E4M3), (BF16, E4M3), (BF16, E5M2)):
        for block_size in (1, 8, 16, 32, 64, 128, 256, 544):
            if q == kv or block_size in (1, 16, 64, 544):
                specs.append(spec_of(block_size=block_size, q=q, kv=kv))
    for head_dim in (32, 40, 64, 72, 80, 96, 112, 160, 192, 256):
        specs.append(spec_of(head_dim, lse=head_dim in (80, 160)))
        specs.append(spec_of(head_dim, q=BF16, kv=E4M3, scale=KVScale.HEAD, lse=head_dim == 96))
    for heads in ((8, 8), (16, 8), (40, 8), (28, 4), (64, 8), (64, 4), (32, 1), (71, 1)):
        head_dim = 64 if heads == (71, 1) else 128  # Falcon 7B
        specs.append(spec_of(head_dim, heads, q=BF16))
        specs.append(spec_of(head_dim, heads, 64, kv=E4M3, lse=heads == (28, 4)))
    specs.append(spec_of(96, (32, 32)))  # Phi 3 mini
    specs.append(spec_of(80, (32, 32), 32, kv=E5M2, scale=KVScale.HEAD))  # Phi 2
    for masks in MASKS:
        specs.append(replace(spec_of(q=BF16, lse=True), **masks))
        specs.append(replace(spec_of(64, (64, 8), 64, kv=E4M3), **masks))
    for head_dim, v_dim in V_DIMS:
        specs.append(replace(spec_of(head_dim, (16, 16), q=BF16, lse=True), head_dim_v=v_dim))
        specs.append(replace(spec_of(head_dim, (28, 4), 64, kv=E4M3), head_dim_v=v_dim, alibi=True))
    for spec in (spec_of(lse=True), spec_of(64, (71, 1), 1, q=BF16, kv=E4M3)):
        specs.append(replace(spec, batch_invariant=True))
    return tuple(specs)


def specs() -> tuple[KernelSpec, ...]:
    """The benchmark's grid, which is also timed, and more."""
    return tuple(dict.fromkeys((*grid(), *extra())))


def build_one(job: tuple[KernelSpec, str, str, Path]) -> None:
    """A pack of one spec with the default schedule."""
    spec, name, embed, folder = job
    to = target(name)
    binary = compile_source(render(spec, to, default_schedule(spec, to)))
    build([Choice((binary,), EVERYTHING, ())], folder / f"{spec.name}.pack", embed=embed)


def main() -> None:
    name, embed, folder, *wanted = sys.argv[1:]
    jobs = [(s, name, embed, Path(folder)) for s in specs() if not wanted or s.name in wanted]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        list(pool.map(build_one, jobs))


if __name__ == "__main__":
    main()
