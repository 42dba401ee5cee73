"""Random legal specs, schedules and inputs: whatever the families say that they cover.

Everything follows from a ``random.Random``, so a seed names a draw. What a field may hold is drawn widely and
left to ``KernelSpec`` and to the families to refuse, so that a family that comes to cover more is drawn more
widely with no change here.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields, replace
from enum import EnumType
from random import Random
from typing import Any, get_type_hints

import torch

from pagedgen.compiler.families import MODULES, family_for
from pagedgen.compiler.space import is_legal
from pagedgen.compiler.verify import POOLS, Case, Inputs
from pagedgen.errors import InvalidValue, Unsupported
from pagedgen.templates.family import Family
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import DType, KernelSpec, KInner, KVScale, Op
from pagedgen.values.target import Target

ATTENTION = (Op.DECODE, Op.EXTEND, Op.VERIFY)
# What an operator leaves no choice of; drawing it until it is right would take long.
FIXED: dict[Op, dict[str, Any]] = {
    Op.MERGE: {"block_size": 1, "kv_scale": KVScale.NONE, "k_inner": KInner.DIM},
    Op.KV_SCALES: {"block_size": 1, "kv_dtype": DType.FP8_E4M3, "k_inner": KInner.DIM},
}
BLOCKS = (1, 2, 3, 5, 8, 16, 16, 16, 32, 48, 64, 100, 128, 256, 528, 544, 784, 1024)
DIMS = (32, 40, 48, 64, 72, 80, 88, 96, 112, 120, 128, 128, 160, 192, 256)
GROUPS = (1, 1, 2, 3, 4, 4, 5, 6, 7, 8, 12, 16, 32, 71)
TRIES = 5000
HELD, HOLD = ("pdl", "split"), 500  # of a schedule what is drawn first, and for how many draws of the rest


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large draws may be: what an interpreter takes in a second, or a GPU in a millisecond."""

    q_heads: int
    seqs: int
    longest: int  # tokens of a sequence
    tokens: int  # of a batch
    queries: int  # of a batch
    pool: int = 1 << 27  # elements of K


SMALL = Sizes(q_heads=8, seqs=5, longest=300, tokens=500, queries=40, pool=1 << 22)
MEDIUM = Sizes(q_heads=24, seqs=40, longest=900, tokens=3000, queries=600, pool=1 << 24)
LARGE = Sizes(q_heads=128, seqs=300, longest=9000, tokens=20000, queries=3000)


def ops_for(target: Target) -> tuple[Op, ...]:
    """The operators that some family renders for a target."""
    return tuple(op for kind, op in MODULES if kind == target.kind)


def family_of(op: Op, target: Target) -> Family:
    """The family of an operator."""
    family: Family = importlib.import_module(MODULES[target.kind, op]).FAMILY
    return family


def _field(draw: Random, name: str, sizes: Sizes) -> Any:
    """A value of one of the fields that are not simply on or off, or one of an enumeration."""
    rare = draw.random()
    if name == "head_dim":
        return draw.choice(DIMS) if rare < 0.8 else draw.randrange(32, 257, 8)
    if name == "head_dim_v":
        return draw.randrange(32, 257, 8)
    if name == "block_size":
        return draw.choice(BLOCKS) if rare < 0.8 else draw.randint(1, 1100)
    if name == "window":  # a block, a tile, one token, or more than there is
        return draw.choice((1, 2, 16, 64, 65, 128, draw.randint(1, 2 * sizes.longest)))
    if name == "attention_chunk":
        return draw.choice((1, 16, 64, 100, draw.randint(1, sizes.longest)))
    if name == "rotary_dim":
        return draw.choice((16, 32, 64, draw.randrange(2, 256, 2)))
    if name == "logits_soft_cap":
        return draw.choice((1.0, 15.0, 30.0, 50.0))
    raise AssertionError(f"KernelSpec.{name} is new: say here what values it is drawn from")


OFTEN = {"tree_mask": 0.5, "return_lse": 0.4, "kv_scale": 1.0, "k_inner": 1.0}
OPTIONAL = {"window", "attention_chunk", "logits_soft_cap", "head_dim_v", "rotary_dim"}


def spec_of(draw: Random, op: Op, target: Target, sizes: Sizes) -> KernelSpec:
    """A legal spec of an operator that its family covers on a target.

    About one draw of a hundred is, which takes 3 ms to find.
    """
    hints = get_type_hints(KernelSpec)
    for _ in range(TRIES):
        heads = draw.choice((1, 2, 3, 4, 8))
        q_heads = heads * draw.choice(GROUPS) if op in ATTENTION else heads
        if q_heads > sizes.q_heads:
            continue
        q = draw.choice(list(DType))
        kv = q if draw.random() < 0.6 else draw.choice((DType.FP8_E4M3, DType.FP8_E5M2))
        if op is Op.MERGE:
            q_heads, kv = heads, q
        values: dict[str, Any] = {
            "op": op, "num_q_heads": q_heads, "num_kv_heads": heads, "q_dtype": q, "kv_dtype": kv,
        } | FIXED.get(op, {})  # fmt: skip
        for each in fields(KernelSpec):
            kind = hints[each.name]
            choices = [True] if kind is bool else list(kind) if isinstance(kind, EnumType) else None
            feature = choices is not None or each.name in OPTIONAL
            if each.name in values or (feature and draw.random() >= OFTEN.get(each.name, 0.25)):
                continue
            values[each.name] = draw.choice(choices) if choices else _field(draw, each.name, sizes)
        try:
            spec = KernelSpec(**values)
            family_for(spec, target)
        except (InvalidValue, Unsupported):
            continue
        if pool_of(spec, 8) <= sizes.pool:
            return spec
    raise AssertionError(f"no legal {op} spec for {target.name} in {TRIES} draws")


def pool_of(spec: KernelSpec, num_blocks: int) -> int:
    """Elements of K in a pool."""
    return num_blocks * spec.block_size * spec.num_kv_heads * spec.head_dim


def schedule_of(draw: Random, spec: KernelSpec, target: Target) -> Schedule:
    """The family's default in one of four draws, else any legal schedule.

    ``HELD`` are drawn first and the others until they go with them: decode's ``pdl`` 2 is legal with so few
    others that it came in 1 of 60 draws, and clusters with fewer.
    """
    family = family_for(spec, target)
    found = family.fields(spec, target)
    default = draw.random() < 0.25
    held: dict[str, Any] = {}
    for number in range(TRIES):
        if number % HOLD == 0:  # nothing may go with what was held: `pdl` 2 has no fixed splits
            held = {f.name: draw.choice(f.values) for f in found if f.name in HELD}
        values = {f.name: f.default if default else held.get(f.name, draw.choice(f.values)) for f in found}
        schedule = Schedule.of(family.name, **values)
        if is_legal(spec, target, schedule):
            return schedule
        default = False
    raise AssertionError(f"no legal schedule of {spec.name} in {TRIES} draws")


def case_of(draw: Random, spec: KernelSpec, sizes: Sizes) -> Case:
    """A ragged batch: block edges, one token, empty sequences, long ones; any layout of the pool."""
    block, seqs = spec.block_size, draw.randint(1, draw.choice((2, 5, sizes.seqs)))
    edges = [n for n in (1, block - 1, block, block + 1, 2 * block + 1) if 0 < n <= sizes.longest] or [1]
    lens, queries, left, left_q = [], [], sizes.tokens, sizes.queries
    blocks_left = sizes.pool // pool_of(spec, 1)
    for _ in range(seqs):
        kind = draw.random()
        if kind < 0.1:
            n = 0
        elif kind < 0.4:
            n = draw.choice(edges)
        elif kind < 0.8:
            n = draw.randint(1, min(sizes.longest, 150))
        else:
            n = draw.randint(1, sizes.longest)
        n = min(n, left, blocks_left * block)
        most = min(n, 64 if spec.op is Op.VERIFY else n, left_q)
        kind = draw.random()
        new = (
            0 if kind < 0.1 else min(1, most) if kind < 0.4 else draw.randint(0, most) if kind < 0.8 else most
        )
        lens.append(n)
        queries.append(new)
        left, left_q, blocks_left = left - n, left_q - new, blocks_left - -(-n // block)
    all_codes = spec.kv_dtype.is_fp8 and draw.random() < 0.3
    return Case(tuple(lens), draw.choice(POOLS), all_codes, None if spec.op is Op.DECODE else tuple(queries))


def loosened(draw: Random, inputs: Inputs) -> Inputs:
    """The same batch with strides of its own: q and out cut from wider rows, K and V from every other block.

    And a block table in a wider one whose other entries point nowhere.
    """
    changes: dict[str, Any] = {}
    if draw.random() < 0.5:
        for name, extra in (("q", draw.randint(0, 3)), ("out", draw.randint(0, 3))):
            tensor = getattr(inputs, name)
            wide = torch.full(
                (tensor.shape[0], tensor.shape[1] + extra, tensor.shape[2]), float("nan"),
                dtype=tensor.dtype, device=tensor.device,
            )  # fmt: skip
            changes[name] = wide[:, extra:]
            changes[name].copy_(tensor)
    if draw.random() < 0.3:
        for name in ("k", "v"):
            tensor = getattr(inputs, name)
            as_bytes = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
            strides = (2 * as_bytes.stride(0), *as_bytes.stride()[1:])
            apart = torch.empty_strided(as_bytes.shape, strides, dtype=as_bytes.dtype, device=tensor.device)
            apart.copy_(as_bytes)
            changes[name] = apart.view(tensor.dtype)
    if draw.random() < 0.5:
        table = inputs.block_table
        wide = torch.full(
            (table.shape[0], table.shape[1] + draw.randint(1, 9)), -(1 << 30), dtype=table.dtype,
            device=table.device,
        )  # fmt: skip
        changes["block_table"] = wide[:, : table.shape[1]]
        changes["block_table"].copy_(table)
    if draw.random() < 0.5:  # any bound of the lengths will do
        longest = int(inputs.seq_lens.max())
        changes["max_seq_len"] = draw.randint(max(1, longest), max(1, inputs.max_seq_len))
    return replace(inputs, **changes)
