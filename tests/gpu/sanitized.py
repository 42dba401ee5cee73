"""Kernels of every family on small batches, to be run under compute-sanitizer.

``python tests/gpu/sanitized.py build FOLDER`` compiles them, ``compute-sanitizer … sanitized.py run FOLDER``
puts each to the gate; operators behind FOLDER: those alone. ``plant`` in place of ``run`` calls one kernel
with a block id that is out of the pool, which memcheck has to find.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # every tensor an allocation: what lies beside it is seen
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from fuzz.draw import ATTENTION, FIXED, family_of, ops_for

from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.families import family_for
from pagedgen.compiler.link import link
from pagedgen.compiler.render import render
from pagedgen.compiler.space import default_schedule, is_legal
from pagedgen.compiler.verify import Case, gate, make_inputs, run_case
from pagedgen.errors import InvalidValue, Unsupported
from pagedgen.runtime.library import Library
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import Causality, DType, KernelSpec, KVScale, Op
from pagedgen.values.target import Target
from pagedgen.values.target_table import gpu_target

F16, BF16, E4M3, E5M2 = DType.F16, DType.BF16, DType.FP8_E4M3, DType.FP8_E5M2
FEATURES = {
    "window": 70, "logits_soft_cap": 30.0, "sinks": True, "alibi": True, "attention_chunk": 64,
    "tree_mask": True,
}  # fmt: skip


def specs(op: Op, to: Target) -> tuple[KernelSpec, ...]:
    """Of a family: 16 bits; fp8 with its masks and two loads a row; token slots; large blocks; and of
    attention what else changes its kernels: V's own rows, causality by the call, batch invariance."""
    family = family_of(op, to)
    masks = {name: value for name, value in FEATURES.items() if name in family.masks}
    if "tree_mask" in masks:  # which takes no other rule of what a query sees
        masks = {name: value for name, value in masks.items() if name not in ("window", "attention_chunk")}
    heads = (6, 2) if op in ATTENTION else (2, 2)
    lse = op in ATTENTION
    wanted: tuple[tuple[int, int, DType, DType, KVScale, dict[str, Any]], ...] = (
        (64, 16, F16, F16, KVScale.NONE, {}),
        (80, 8, BF16, E4M3, KVScale.HEAD, {"return_lse": lse} | masks),
        (128, 1, F16, E5M2, KVScale.TENSOR, {"return_lse": lse}),
        (64, 544, BF16, BF16, KVScale.NONE, {}),
    )
    if op in ATTENTION:
        rest: dict[str, Any] = {"head_dim_v": 40, "batch_invariant": family.invariant}
        if "causality" in family.masks:
            rest["causality"] = Causality.PER_SEQUENCE
        wanted += ((96, 16, F16, F16, KVScale.NONE, rest),)
    found = []
    for dim, block, q, kv, scale, more in wanted:
        fields = {"head_dim": dim, "block_size": block, "q_dtype": q, "kv_dtype": kv, "kv_scale": scale}
        fields |= {"num_q_heads": heads[0], "num_kv_heads": heads[1]}
        try:
            spec = KernelSpec(op, **(fields | more | FIXED.get(op, {})))
            family_for(spec, to)
        except (InvalidValue, Unsupported):
            continue
        found.append(spec)
    assert len(found) >= (5 if op in ATTENTION else 2), f"{op}: {len(found)} of the specs are legal"
    return tuple(found)


def schedules(spec: KernelSpec, to: Target) -> tuple[Schedule, ...]:
    """The default, and the same with every other choice that has a place in the kernel's source."""
    default = default_schedule(spec, to)
    values = {field.name: field.values for field in family_for(spec, to).fields(spec, to)}
    others = [
        {"split": "even", "pdl": 1},
        {"split": "walk"},
        {"split": "walk", "pdl": 2, "waves": 2},
        {"split": "cluster", "pdl": 2, "waves": 1, "num_warps": 2, "num_stages": 3},
        {"num_warps": 4},
        {"num_warps": 8},
        {"prefetch_ids": 0, "tile": 32},
    ]
    found = [default]
    for other in others:
        choices = dict(default.choices)
        if all(value in values.get(name, ()) for name, value in other.items()):
            schedule = Schedule.of(default.template, **(choices | other))
            if is_legal(spec, to, schedule):
                found.append(schedule)
    return tuple(dict.fromkeys(found))


def cases(spec: KernelSpec) -> tuple[Case, ...]:
    """Block edges, several pieces of one sequence, and padding, in the three layouts."""
    block = spec.block_size
    edges, some = (1, max(1, block - 1), block, block + 1, 0, 77), (1, 3, 5, 2, 0, 64)
    return (
        Case(edges, "nhd", query_lens=tuple(min(q, n) for q, n in zip(some, edges, strict=True))),
        Case((900, 0, 300), "hnd", spec.kv_dtype.is_fp8, query_lens=(9, 0, 40)),
        Case((517,), "packed", query_lens=(33,)),
    )


def build_one(job: tuple[KernelSpec, Target, Path]) -> None:
    """A library of a spec's schedules."""
    spec, to, folder = job
    binaries = [compile_source(render(spec, to, schedule)) for schedule in schedules(spec, to)]
    link(binaries, (), folder / f"{spec.name}.so")


def build(folder: Path, ops: Sequence[Op]) -> None:
    """Libraries of all specs, in parallel."""
    to = gpu_target()
    jobs = [(spec, to, folder) for op in ops for spec in specs(op, to)]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        list(pool.map(build_one, jobs))


def run(folder: Path, ops: Sequence[Op]) -> int:
    """The gate on every variant; the exit status counts those that fail it."""
    to, failures = gpu_target(), 0
    for op in ops:
        for spec in specs(op, to):
            library = Library(folder / f"{spec.name}.so")
            for variant, schedule in enumerate(schedules(spec, to)):
                # calls one by one: those in a row would be seven times as many
                verdict = gate(library, spec, variant, "cuda", 5, cases=cases(spec), row=None)
                print("passed" if verdict.passed else verdict, spec.name, schedule.name, flush=True)
                failures += not verdict.passed
    return failures


def plant(folder: Path) -> int:
    """One call that reads far behind its pool."""
    to = gpu_target()
    spec = specs(Op.DECODE, to)[0]
    library = Library(folder / f"{spec.name}.so")
    inputs = make_inputs(spec, (40,), "cuda")
    inputs = replace(inputs, block_table=torch.full_like(inputs.block_table, 1 << 20))
    workspace = torch.zeros(library.workspace_bytes(1), dtype=torch.uint8, device="cuda")
    run_case(spec, library, 0, inputs, workspace)
    torch.cuda.synchronize()
    return 0


def main() -> int:
    what, folder = sys.argv[1], Path(sys.argv[2])
    ops = [Op(name) for name in sys.argv[3:]] or ops_for(gpu_target())
    if what == "build":
        build(folder, ops)
        return 0
    return run(folder, ops) if what == "run" else plant(folder)


if __name__ == "__main__":
    sys.exit(main())
