"""``ServingPack``: the pack that a serving stack was told to use, and which of its kernels serve a layer.

A stack states what each attention layer of the model needs; a layer that the pack has no kernels for is
refused when the model is loaded, with the command that tunes them. Nothing falls back to another backend.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NoReturn

from pagedgen.errors import PackNotChosen, SpecNotInPack, Unsupported, VersionUnmet
from pagedgen.runtime.attention import Attention
from pagedgen.runtime.pack import Pack, check_machine, open_pack
from pagedgen.values.spec import DType, KernelSpec, KInner, KVScale, Op

PACK_VARIABLE = "PAGEDGEN_PACK"
OPERATORS = (Op.DECODE, Op.EXTEND, Op.WRITE_KV)  # what a layer needs
SHOWN = 6  # specs of a pack that a message names


@dataclass(frozen=True, slots=True)
class Layer:
    """What one attention layer asks of kernels; heads are those of one rank.

    ``window`` counts the tokens that a query sees, its own included. Scales of an fp8 cache are one number.
    """

    head_dim: int
    num_q_heads: int
    num_kv_heads: int
    q_dtype: DType
    kv_dtype: DType
    window: int | None = None
    logits_soft_cap: float | None = None
    sinks: bool = False
    alibi: bool = False

    def spec(self, op: Op, block_size: int, k_inner: KInner) -> KernelSpec:
        """The spec of an operator for this layer.

        Raises:
            InvalidValue: the layer is nothing that a kernel could be made for; names the field.
        """
        scale = KVScale.TENSOR if self.kv_dtype.is_fp8 else KVScale.NONE
        if op is Op.WRITE_KV:
            return KernelSpec(
                op, self.head_dim, self.num_kv_heads, self.num_kv_heads, block_size, self.q_dtype,
                self.kv_dtype, scale, k_inner,
            )  # fmt: skip
        return KernelSpec(
            op, self.head_dim, self.num_q_heads, self.num_kv_heads, block_size, self.q_dtype, self.kv_dtype,
            scale, k_inner, window=self.window, logits_soft_cap=self.logits_soft_cap, sinks=self.sinks,
            alibi=self.alibi,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class LayerKernels:
    """The specs that serve one layer over pools of one block size."""

    decode: KernelSpec
    extend: KernelSpec
    write_kv: KernelSpec

    @property
    def all(self) -> tuple[KernelSpec, ...]:
        """In the order of the operators."""
        return (self.decode, self.extend, self.write_kv)


@dataclass(frozen=True)
class ServingPack:
    """An intact pack; its kernels are loaded when :attr:`attention` is first asked for."""

    pack: Pack
    specs: frozenset[KernelSpec] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "specs", frozenset(entry.spec for entry in self.pack.manifest.kernels))

    @cached_property
    def attention(self) -> Attention:
        """The pack's kernels, in this process.

        Raises:
            PackForeign: they are not for this machine.
        """
        check_machine(self.pack)
        return Attention(self.pack)

    @property
    def k_inner(self) -> KInner:
        """How the pack's kernels want K to lie: along tokens where any of them does, else along head_dim."""
        along_tokens = any(spec.k_inner is KInner.TOKEN for spec in self.specs)
        return KInner.TOKEN if along_tokens else KInner.DIM

    def block_sizes(self, *, head_dim: int | None = None, num_kv_heads: int | None = None) -> tuple[int, ...]:
        """Block sizes, in tokens, that all operators have kernels for; of layers of this shape if given."""
        sizes: dict[int, set[Op]] = {}
        for spec in self.specs:
            if head_dim in (None, spec.head_dim) and num_kv_heads in (None, spec.num_kv_heads):
                sizes.setdefault(spec.block_size, set()).add(spec.op)
        return tuple(sorted(size for size, ops in sizes.items() if ops >= set(OPERATORS)))

    def kernels(self, layer: Layer, block_size: int) -> LayerKernels:
        """The kernels of a layer over a pool of one block size.

        Raises:
            SpecNotInPack: it has none; says which, and the command that makes a pack with them.
        """
        wanted = [layer.spec(op, block_size, self.k_inner) for op in OPERATORS]
        missing = [spec for spec in wanted if spec not in self.specs]
        if missing:
            raise SpecNotInPack(self._refusal(layer, missing))
        return LayerKernels(*wanted)

    def check(self, layer: Layer) -> None:
        """Whether the pack serves a layer at all, over whatever block size.

        Raises:
            SpecNotInPack: it does not; says why, and the command that makes a pack that does.
        """
        sizes = self.block_sizes() or tuple(sorted({spec.block_size for spec in self.specs}))[:1] or (16,)
        for size in sizes:
            if all(layer.spec(op, size, self.k_inner) in self.specs for op in OPERATORS):
                return
        self.kernels(layer, sizes[-1])

    def _refusal(self, layer: Layer, missing: Sequence[KernelSpec]) -> str:
        names = ", ".join(spec.name for spec in missing)
        have = sorted(spec.name for spec in self.specs)
        held = ", ".join(have[:SHOWN]) + (f" and {len(have) - SHOWN} more" if len(have) > SHOWN else "")
        how = command(layer, missing[0].block_size, self.k_inner, self.pack.manifest.target)
        return f"{self.pack.path}: it has no {names}; it holds {held}. To get them:\n  {how}"


def command(layer: Layer, block_size: int, k_inner: KInner, target: str) -> str:
    """The command that builds a pack with a layer's kernels.

    Masks come from the model, whose folder the reader fills in; a layer without any is stated in full.
    """
    where = "--cpu" if target == "cpu" else f"--gpu {target}"
    types = (
        f"--block-size {block_size} --q-dtype {layer.q_dtype} --kv-dtype {layer.kv_dtype} --k-inner {k_inner}"
    )
    if not layer.spec(Op.DECODE, block_size, k_inner).masks:
        heads = f"--num-q-heads {layer.num_q_heads} --num-kv-heads {layer.num_kv_heads}"
        ops = f"--ops {','.join(OPERATORS)}"
        return f"pagedgen build {where} --head-dim {layer.head_dim} {heads} {types} {ops} --out model.pack"
    return (
        f"pagedgen build {where} --model PATH {types} --out model.pack\n"
        "  with the model's folder or config.json for PATH (and --tp N for one of N ranks): it has the\n"
        "  masks of every layer"
    )


@cache
def _opened(path: Path) -> ServingPack:
    return ServingPack(open_pack(path))


def chosen_pack() -> ServingPack:
    """The pack that ``PAGEDGEN_PACK`` names, opened once a process.

    Raises:
        PackNotChosen: the variable is not set.
        PackDamaged, PackForeign: what it names is not a pack, or not intact.
    """
    text = os.environ.get(PACK_VARIABLE)
    if not text:
        raise PackNotChosen(PACK_VARIABLE)
    return _opened(Path(text).expanduser().resolve())


def require_version(name: str, version: str, low: tuple[int, ...], high: tuple[int, ...]) -> None:
    """Refuse a stack outside of the versions that the plug-in was tested with.

    Args:
        name: of the distribution.
        version: the one that is installed.
        low, high: (major, minor, …), the first that is allowed and the first that is not.

    Raises:
        VersionUnmet: names both and the command that installs the right one.
    """
    found = re.match(r"\d+\.\d+(\.\d+)*", version)
    if not found or not low <= tuple(map(int, found[0].split("."))) < high:
        first, last = (".".join(map(str, bound)) for bound in (low, high))
        raise VersionUnmet(name, version, f">={first},<{last}")


def lookup(feature: str, value: Any, table: Mapping[Any, DType]) -> DType:
    """The element type that a stack means.

    Raises:
        Unsupported: none that kernels take.
    """
    if value not in table:
        refuse(feature, value, f"pagedgen's kernels take {', '.join(map(str, table))}")
    return table[value]


def refuse(feature: str, value: object, why: str) -> NoReturn:
    """Refuse what a layer asks for and no kernel computes.

    Raises:
        Unsupported: always.
    """
    raise Unsupported(f"{feature} = {value!r}: {why}; choose another attention backend for this model")
