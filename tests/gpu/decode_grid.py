"""The grid of decode specs that is proved on real GPUs: head dims, ratios, block sizes and formats.

``python tests/gpu/decode_grid.py TARGET EMBED FOLDER [SPEC…]`` builds a pack of each spec (all without names)
with the default schedule, in parallel.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from pagedgen.compiler.build import Choice, build
from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.render import render
from pagedgen.compiler.space import default_schedule
from pagedgen.values.manifest import Rule
from pagedgen.values.spec import DType, KernelSpec, KVScale, Op
from pagedgen.values.target_table import target

EVERYTHING = (Rule(1 << 30, 1 << 30, 0),)


def spec(
    head_dim: int,
    heads: tuple[int, int],
    block_size: int,
    q: str,
    kv: str,
    scale: str = "tensor",
    lse: bool = False,
) -> KernelSpec:
    kv_dtype = DType(kv)
    kv_scale = KVScale(scale) if kv_dtype.is_fp8 else KVScale.NONE
    return KernelSpec(Op.DECODE, head_dim, *heads, block_size, DType(q), kv_dtype, kv_scale, return_lse=lse)


def grid() -> tuple[KernelSpec, ...]:
    """At least 60 specs: every value of every axis, crossed where axes meet in a kernel."""
    specs = []
    formats = [
        ("f16", "f16"),
        ("bf16", "bf16"),
        ("f16", "fp8_e4m3"),
        ("bf16", "fp8_e4m3"),
        ("bf16", "fp8_e5m2"),
    ]
    for q, kv in formats:  # the shape of Llama 3 8B, at every block size
        for block_size in (1, 8, 16, 32, 64, 128, 256, 544):
            if q == kv or block_size in (1, 16, 64, 544):
                specs.append(spec(128, (32, 8), block_size, q, kv))
    for head_dim in (32, 40, 64, 72, 80, 96, 112, 160, 192, 256):
        specs.append(spec(head_dim, (32, 8), 16, "f16", "f16", lse=head_dim in (80, 160)))
        specs.append(spec(head_dim, (32, 8), 16, "bf16", "fp8_e4m3", "head", lse=head_dim == 96))
    for heads in ((8, 8), (16, 8), (40, 8), (28, 4), (64, 8), (64, 4), (32, 1), (71, 1)):
        specs.append(spec(128 if heads[0] != 71 else 64, heads, 16, "bf16", "bf16"))
        specs.append(spec(128 if heads[0] != 71 else 64, heads, 64, "f16", "fp8_e4m3", lse=heads == (28, 4)))
    specs.append(spec(96, (32, 32), 16, "f16", "f16"))  # Phi 3 mini
    specs.append(spec(80, (32, 32), 32, "f16", "fp8_e5m2", "head"))  # Phi 2
    return tuple(dict.fromkeys(specs))


def build_one(job: tuple[KernelSpec, str, str, Path]) -> None:
    """A pack of one spec with the default schedule."""
    spec, name, embed, folder = job
    to = target(name)
    binary = compile_source(render(spec, to, default_schedule(spec, to)))
    build([Choice((binary,), EVERYTHING, ())], folder / f"{spec.name}.pack", embed=embed)


def main() -> None:
    name, embed, folder, *wanted = sys.argv[1:]
    jobs = [(s, name, embed, Path(folder)) for s in grid() if not wanted or s.name in wanted]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        list(pool.map(build_one, jobs))


if __name__ == "__main__":
    main()
