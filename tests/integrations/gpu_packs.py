"""The pack of GPU kernels for the layers of the tiny models in f16, Gemma 2's in bf16; default schedules.

python gpu_packs.py FOLDER h100        (needs pagedgen[tune]; no GPU)
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import cpu_packs

from pagedgen.values.spec import DType, KInner
from pagedgen.values.target_table import target

LAYERS = tuple(replace(layer, q_dtype=DType.F16, kv_dtype=DType.F16) for layer in cpu_packs.LAYERS)
# vLLM refuses Gemma 2 in f16.
GEMMA = tuple(replace(x, q_dtype=DType.BF16, kv_dtype=DType.BF16) for x in LAYERS if x.logits_soft_cap)
FP8 = replace(LAYERS[0], kv_dtype=DType.FP8_E4M3)


def main() -> None:
    """One pack: K along head_dim, blocks of 16."""
    folder, gpu = Path(sys.argv[1]), sys.argv[2]
    cpu_packs.pack((*LAYERS, *GEMMA, FP8), (16,), KInner.DIM, folder / "gpu.pack", target(gpu))


if __name__ == "__main__":
    main()
