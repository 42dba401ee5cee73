"""Packs of CPU kernels for the layers of the tiny models, with default schedules.

python cpu_packs.py FOLDER [--speed | --sglang]        (needs pagedgen[cpu])
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from pagedgen.compiler.build import Choice, build
from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.render import render
from pagedgen.compiler.space import default_schedule
from pagedgen.integrations.serving_pack import OPERATORS, Layer
from pagedgen.values.manifest import Rule
from pagedgen.values.spec import DType, KInner
from pagedgen.values.target import Target
from pagedgen.values.target_table import cpu_target

BLOCK_SIZE = 32
LAYERS = (
    Layer(32, 4, 2, DType.F32, DType.F32),
    Layer(32, 6, 2, DType.F32, DType.F32),
    Layer(32, 4, 2, DType.F32, DType.F32, window=48),
    Layer(32, 4, 2, DType.F32, DType.F32, logits_soft_cap=5.0),
    Layer(32, 4, 2, DType.F32, DType.F32, window=48, logits_soft_cap=5.0),
    Layer(32, 4, 2, DType.F32, DType.F32, sinks=True),
    Layer(32, 4, 2, DType.F32, DType.F32, window=48, sinks=True),
    Layer(32, 4, 4, DType.F32, DType.F32, alibi=True),
)

SPEED = tuple(Layer(128, 32, 8, dtype, dtype) for dtype in (DType.F32, DType.BF16))
# Of test_sglang_plugin.py, over pools of token slots and of pages of 16.
SGLANG = (Layer(32, 4, 2, DType.F32, DType.F32), Layer(32, 4, 2, DType.F32, DType.F32, window=10))


def pack(
    layers: tuple[Layer, ...],
    block_sizes: tuple[int, ...],
    k_inner: KInner,
    place: Path,
    target: Target | None = None,
) -> None:
    """Build a pack of every operator's kernels for ``layers`` and block sizes; for this CPU if no target."""
    target = target or cpu_target()
    choices = []
    wanted = itertools.product(layers, OPERATORS, block_sizes)
    for spec in sorted({layer.spec(op, block_size, k_inner) for layer, op, block_size in wanted}):
        binary = compile_source(render(spec, target, default_schedule(spec, target)))
        choices.append(Choice((binary,), (Rule(2**31 - 1, 2**31 - 1, 0),), ()))
    build(choices, place)


def main() -> None:
    """Packs with K along head_dim and along tokens, or the one that the option names."""
    folder, option = Path(sys.argv[1]), sys.argv[2:]
    if option == ["--speed"]:
        pack(SPEED, (16,), KInner.TOKEN, folder / "speed.pack")
    elif option == ["--sglang"]:
        pack(SGLANG, (1, 16), KInner.DIM, folder / "sglang.pack")
    else:
        for inner in KInner:
            pack(LAYERS, (BLOCK_SIZE,), inner, folder / f"{inner}.pack")


if __name__ == "__main__":
    main()
