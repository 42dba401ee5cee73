"""Draws put to Triton kernels in Triton's interpreter, one JSON line each.

``TRITON_INTERPRET=1 python -m fuzz.interpreted SEED OP=COUNT…``, in the folder tests.

The interpreter computes bfloat16 wrongly and has no inline assembly, so queries are float16 and FP8 is
decoded in plain Triton (docs/gpu_tests.md says where the rest is proved).
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "templates"))

import torch
from fuzz.draw import ATTENTION, SMALL, schedule_of, spec_of
from fuzz.trial import attempt
from interpreted_moves import Interpreted as Moves

from pagedgen.compiler.families import family_for
from pagedgen.compiler.render import render
from pagedgen.compiler.triton import load_source
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import Causality, DType, KernelSpec, Op
from pagedgen.values.target import Target

HOST = Target(
    "interpreter", "cuda", "sm_90", 2, 232448, 233472, 65536, 2048, 1 << 25, 1 << 35, 3000.0, 900.0, 1800.0,
    fp8_convert=True,
)  # fmt: skip


class Interpreted:
    """The library ABI over an interpreted kernel: its arguments by their names in the source."""

    def __init__(self, spec: KernelSpec, schedule: Schedule, folder: Path) -> None:
        self.spec, self.schedule = spec, schedule
        module = load_source(render(spec, HOST, schedule).text, folder)
        self.kernel = getattr(module, f"paged_{spec.op}")
        self.literals: Any = family_for(spec, HOST).context(spec, HOST, schedule)
        self.programs = self.literals.get("programs", spec.num_kv_heads)
        waves = dict(schedule.choices).get("waves", 1)
        self.partitions = max(1, -(-HOST.num_sms * int(waves) // self.programs))
        self.counters = torch.zeros(1 << 16, dtype=torch.int32)

    def workspace_bytes(self, num_seqs: int) -> int:
        """None: partial results are made by the call."""
        return 0

    def decode(self, q, k, v, table, lens, *rest) -> None:
        """As of the library; the grid and the partial results are the generated launcher's."""
        split, most = self.literals["split"], dict(self.schedule.choices).get("max_parts", 0)
        grid = self.partitions + (0 if split == "even" else len(lens))
        slots = {"even": 2 * self.partitions, "fixed": int(most) * len(lens)}.get(split, grid)
        self._run(grid * self.programs, slots * self.programs, (q, k, v, table, lens, None, *rest))

    def extend(self, q, k, v, table, lens, ends, *rest) -> None:
        """As of the library."""
        tiles = q.shape[0] * self.spec.group_size // self.schedule.int("tile_m") + len(lens)
        self._run(tiles * self.programs, 0, (q, k, v, table, lens, ends, *rest))

    def verify(self, q, k, v, table, lens, ends, *rest) -> None:
        """As of the library."""
        tiles = q.shape[0] * self.spec.group_size // self.schedule.int("tile_m") + len(lens)
        slots = 2 * self.partitions * self.programs
        self._run((self.partitions + tiles) * self.programs, slots, (q, k, v, table, lens, ends, *rest))

    def _run(self, grid: int, slots: int, arguments: tuple[Any, ...]) -> None:
        """An attention kernel; ``slots`` are those of partial results, filled with NaN."""
        q, k, v, table, lens, ends, out, lse, scale, k_scale, v_scale, _, _, _, *extras = arguments
        tensors = {
            "q": q, "k": k, "v": v, "block_table": table, "seq_lens": lens, "cu_seqlens_q": ends, "out": out,
            "lse": lse, "k_scale": k_scale, "v_scale": v_scale, "counter": self.counters,
        }  # fmt: skip
        spec = self.spec
        given = {
            "sinks": spec.sinks, "alibi_slopes": spec.alibi,
            "causal": spec.causality is Causality.PER_SEQUENCE, "tree_mask": spec.tree_mask,
        }  # fmt: skip
        tensors |= dict(zip((name for name, is_given in given.items() if is_given), extras, strict=True))
        rows = self.literals.get("rows", 0)
        tensors["partial"] = torch.full((slots, rows, spec.v_dim), float("nan"))
        tensors["partial_lse"] = torch.full((slots, rows), float("nan"))
        numbers = {
            "qk_scale": scale * math.log2(math.e),
            "num_seqs": len(lens),
            "partitions": self.partitions,
        }
        self._launch(grid, tensors, numbers)
        assert not self.counters.any(), "counters must be zero after a call"

    def _launch(self, grid: int, tensors: dict[str, Any], numbers: dict[str, Any]) -> None:
        values = []
        for name in self.kernel.arg_names:
            if name.endswith("_ptr"):
                tensor = tensors[name.removesuffix("_ptr")]
                is_fp8 = tensor.element_size() == 1 and tensor.is_floating_point()
                values.append(tensor.view(torch.uint8) if is_fp8 else tensor)
            elif "_stride" in name:  # q_stride_head, k_stride_block, block_table_stride
                of, axis = name.split("_stride")
                tensor = tensors[of]
                axes = ("_block", "_token", "_head") if tensor.ndim == 4 else ("_token", "_head")
                values.append(tensor.stride(axes.index(axis) if axis in axes else 0))
            else:
                values.append(numbers[name])
        self.kernel[(grid,)](*values)


def interpretable(draw: Random, spec: KernelSpec) -> Schedule:
    """A legal schedule but for what an interpreter has none of."""
    choices = dict(schedule_of(draw, spec, HOST).choices)
    if choices.get("fp8_decode", "none") != "none":
        choices["fp8_decode"] = "plain"
    choices |= {"pdl": 0} if "pdl" in choices else {}
    if choices.get("split") == "cluster":
        choices["split"] = "pieces"
    return Schedule.of(family_for(spec, HOST).name, **choices)


def main() -> None:
    seed, wanted = int(sys.argv[1]), [each.split("=") for each in sys.argv[2:]]
    with tempfile.TemporaryDirectory() as folder:
        for op, number in ((Op(op), number) for op, count in wanted for number in range(int(count))):
            draw = Random(f"{seed} {op} {number}")
            while (spec := spec_of(draw, op, HOST, SMALL)).q_dtype is DType.BF16:
                continue
            schedule, start = interpretable(draw, spec), time.perf_counter()
            callee = (Interpreted if op in ATTENTION else Moves)(spec, schedule, Path(folder))
            outcome = attempt(spec, callee, 0, draw, SMALL, "cpu", None)
            seconds = round(time.perf_counter() - start, 2)
            about = {"spec": spec.name, "schedule": schedule.name, "number": number, "seconds": seconds}
            print(json.dumps(about | asdict(outcome)), flush=True)


if __name__ == "__main__":
    main()
