"""The extend and verify specs proved on real GPUs: head dims, ratios, block sizes, formats and masks.

``python tests/gpu/extend_grid.py TARGET EMBED FOLDER [SPEC…]`` builds a pack of each spec (all without names)
with the default schedule, in parallel.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from pagedgen.autotune.suites.extend_gpu import BF16, E4M3, F16, jobs, spec_of
from pagedgen.values.spec import Causality, DType, KernelSpec, KVScale, Op

E5M2 = DType.FP8_E5M2
V_DIMS = ((192, 128), (64, 128), (96, 80))  # of K and of V


def specs() -> tuple[KernelSpec, ...]:
    """The benchmark's specs, which are also timed, and more."""
    found = [job.spec for job in jobs()]
    for q, kv in ((F16, F16), (BF16, BF16), (F16, E4M3), (BF16, E4M3), (BF16, E5M2)):
        found += [spec_of(block_size=block, q=q, kv=kv) for block in (1, 8, 16, 64, 544)]
    for head_dim in (32, 40, 64, 72, 80, 96, 112, 160, 192, 256):
        found.append(spec_of(head_dim, lse=head_dim in (80, 160)))
        found.append(spec_of(head_dim, q=BF16, kv=E4M3, scale=KVScale.HEAD, lse=head_dim == 96))
    for heads in ((8, 8), (40, 8), (28, 4), (64, 8), (64, 4), (71, 1)):
        found.append(spec_of(64 if heads == (71, 1) else 128, heads, q=BF16))
        found.append(spec_of(64 if heads == (71, 1) else 128, heads, 64, kv=E4M3, lse=heads == (28, 4)))
    for masks in (
        {"window": 1},
        {"window": 100},
        {"window": 4096},
        {"logits_soft_cap": 30.0},
        {"sinks": True},
        {"window": 128, "logits_soft_cap": 50.0, "sinks": True},
        {"alibi": True},
        {"attention_chunk": 300},
        {"attention_chunk": 8192, "window": 4096, "alibi": True, "logits_soft_cap": 30.0, "sinks": True},
        {"causality": Causality.FULL},
        {"causality": Causality.FULL, "window": 100, "alibi": True},
        {"causality": Causality.PER_SEQUENCE},
        {"causality": Causality.PER_SEQUENCE, "attention_chunk": 300},
    ):
        found.append(spec_of(q=BF16, lse=True, **masks))
        found.append(spec_of(64, (64, 8), 64, kv=E4M3, **masks))
    for head_dim, v_dim in V_DIMS:
        found.append(spec_of(head_dim, (16, 16), q=BF16, lse=True, head_dim_v=v_dim))
        found.append(spec_of(head_dim, (28, 4), 64, kv=E4M3, head_dim_v=v_dim, alibi=True))
    found += [replace(spec, op=Op.VERIFY) for spec in dict.fromkeys(found)]
    line = {"window", "attention_chunk", "causality"}  # what has no meaning in a tree
    verify = [s for s in dict.fromkeys(found) if s.op is Op.VERIFY and not line.intersection(s.masks)]
    found += [replace(spec, tree_mask=True) for spec in verify[::2]]
    found.append(spec_of(q=BF16, batch_invariant=True))
    return tuple(dict.fromkeys(found))


def main() -> None:
    from decode_grid import build_one  # beside this file, which is run as a script

    name, embed, folder, *wanted = sys.argv[1:]
    todo = [(s, name, embed, Path(folder)) for s in specs() if not wanted or s.name in wanted]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        list(pool.map(build_one, todo))


if __name__ == "__main__":
    main()
