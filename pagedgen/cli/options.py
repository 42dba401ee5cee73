"""Option texts → values: what a command is about (:class:`Job`), budgets, workloads and schedules."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pagedgen.errors import InvalidValue
from pagedgen.values.model import decode_specs, dtype_pairs, find_model
from pagedgen.values.schedule import Choice, Schedule
from pagedgen.values.spec import DType, KernelSpec, KInner, KVScale, Op, parse_dtype
from pagedgen.values.target import Target
from pagedgen.values.target_table import cpu_target, detect, target
from pagedgen.values.trace import Trace, read_trace, sample_trace

DEFAULT_MODEL = "llama-3-8b"


@dataclass(frozen=True, slots=True)
class Job:
    """The specs and the target that a command was given; ``label`` names them for people and files.

    ``serving``: the specs are those of a pack to serve with, several operators with the model's masks, and
    not decode specs to be tuned.
    """

    target: Target
    specs: tuple[KernelSpec, ...]
    label: str
    warnings: tuple[str, ...] = ()
    serving: bool = False

    @classmethod
    def of(
        cls,
        *,
        gpu: str | None,
        cpu: bool,
        model: str | None,
        tp: int,
        head_dim: str | None,
        num_q_heads: str | None,
        num_kv_heads: str | None,
        block_size: str,
        q_dtype: str | None,
        kv_dtype: str | None,
        kv_scale: str,
        k_inner: str | None,
        lse: bool,
        ops: str | None = None,
    ) -> Job:
        """From the options' texts; comma lists make a product, and what is not given comes from the model.

        ``ops`` makes it a job of serving specs, of these operators.

        Raises:
            InvalidValue, UnknownTarget, UnknownModel, MalformedFile, Unsupported: an option, by name.
        """
        if cpu and gpu:
            raise InvalidValue("gpu", gpu, "not together with --cpu")
        where = cpu_target() if cpu else target(gpu) if gpu else detect()
        shape = find_model(model or DEFAULT_MODEL).shard(tp)
        own_shape = any((head_dim, num_q_heads, num_kv_heads))
        dims = integers("head_dim", head_dim) or [shape.head_dim]
        q_heads = integers("num_q_heads", num_q_heads) or [shape.num_q_heads]
        kv_heads = integers("num_kv_heads", num_kv_heads) or [shape.num_kv_heads]
        if kv_scale not in (KVScale.TENSOR, KVScale.HEAD):
            raise InvalidValue("kv_scale", kv_scale, "allowed: tensor, head")
        if k_inner not in (None, *KInner):
            raise InvalidValue("k_inner", k_inner, f"allowed: {', '.join(KInner)}")
        # The layout that is fastest on the target, which the project's own KV cache has there.
        fastest = KInner.TOKEN if where.kind == "cpu" else KInner.DIM
        specs = decode_specs(
            itertools.product(dims, q_heads, kv_heads),
            block_sizes=integers("block_size", block_size) or [16],
            dtypes=dtype_pairs(dtypes("q_dtype", q_dtype), dtypes("kv_dtype", kv_dtype), shape.dtype),
            kv_scale=KVScale(kv_scale),
            k_inner=KInner(k_inner) if k_inner else fastest,
            return_lse=lse,
        )
        explicit = own_shape and model is None
        if ops is not None:
            if explicit:
                shape = replace(
                    shape, sliding_window=0, window_layers=0, logit_softcap=0.0, sinks=False, alibi=False
                )
            label = f"h{dims[0]}-q{q_heads[0]}-kv{kv_heads[0]}" if explicit else shape.name
            return cls(where, shape.serving_specs(specs, operators(ops)), label, serving=True)
        label = f"h{dims[0]}-q{q_heads[0]}-kv{kv_heads[0]}" if explicit else shape.name
        return cls(where, specs, label, () if explicit else shape.gaps())

    def checked(self) -> Job:
        """The same with kernels of a debug build, where a GPU has them.

        Raises:
            InvalidValue: no operator with slots is among them.
        """
        slotted = [spec for spec in self.specs if spec.op is Op.WRITE_KV]
        if not slotted:
            raise InvalidValue("debug", True, "write_kv among the operators (--ops) is expected")
        if self.target.kind == "cpu":
            return self
        return replace(self, specs=tuple(replace(s, checked=s in slotted) for s in self.specs))

    @property
    def only(self) -> KernelSpec:
        """The one spec, for commands that show one.

        Raises:
            InvalidValue: the options make several.
        """
        if len(self.specs) != 1:
            names = ", ".join(spec.name for spec in self.specs)
            raise InvalidValue("specs", names, "this command takes one: give one value an option")
        return self.specs[0]

    def warn(self) -> None:
        """Say on stderr what the model needs that the specs do not have."""
        from pagedgen.cli.console import warn

        for warning in self.warnings:
            warn(warning)


def split(text: str | None) -> list[str]:
    """The parts of a comma list; none of an absent one."""
    return [] if text is None else [part.strip() for part in text.split(",")]


def integers(field: str, text: str | None) -> list[int]:
    """A comma list of integers.

    Raises:
        InvalidValue: names the field and the part.
    """
    values = []
    for part in split(text):
        try:
            values.append(int(part))
        except ValueError:
            raise InvalidValue(field, part, "an integer, or a comma list of them, is expected") from None
    return values


def operators(text: str) -> list[Op]:
    """A comma list of operators.

    Raises:
        InvalidValue: names the part.
    """
    for part in split(text):
        if part not in list(Op):
            raise InvalidValue("ops", part, f"a comma list of {', '.join(Op)} is expected")
    return [Op(part) for part in split(text)]


def dtypes(field: str, text: str | None) -> list[DType]:
    """A comma list of dtypes.

    Raises:
        InvalidValue: names the field and the part.
    """
    return [parse_dtype(part, field) for part in split(text)]


def seconds(text: str) -> float:
    """``90``, ``90s``, ``10m`` or ``2h`` in seconds.

    Raises:
        InvalidValue: not a positive time.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip().lower())
    value = float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0
    if value <= 0:
        raise InvalidValue("budget", text, "a time like 90s, 10m or 2h is expected")
    return value


def trace_of(path: Path, seed: int) -> Trace:
    """The trace at a path, or the shipped one where the path is ``sample`` and no such file exists."""
    return sample_trace() if str(path) == "sample" and not path.exists() else read_trace(path, seed)


def schedule_of(spec: KernelSpec, where: Target, text: str | None) -> tuple[Schedule, str]:
    """The schedule to show and where it comes from: tuned where recorded, else the default; then ``text``.

    Raises:
        InvalidValue: no such field or value; the changed schedule is not legal.
    """
    from pagedgen.autotune.database import recorded
    from pagedgen.compiler.families import family_for
    from pagedgen.compiler.space import default_schedule, feasible

    found = recorded(spec, where)
    if found is not None and found.entry.selection is not None:
        base, origin = found.entry.selection.variants[0], f"{found.entry.selection.status}, {found.path}"
    else:
        base, origin = default_schedule(spec, where), "the default; nothing is recorded for this spec"
    if text is None:
        return base, origin
    fields = {field.name: field.values for field in family_for(spec, where).fields(spec, where)}
    changed = replace(base, choices=tuple(sorted({**dict(base.choices), **_changes(fields, text)}.items())))
    if changed not in feasible(spec, where):
        raise InvalidValue("schedule", changed.name, "not legal: pagedgen explain prints the constraints")
    return changed, "given"


def _changes(fields: dict[str, tuple[Choice, ...]], text: str) -> dict[str, Choice]:
    changes: dict[str, Choice] = {}
    for part in split(text):
        name, _, value = part.partition("=")
        if name not in fields:
            raise InvalidValue("schedule", part, f"FIELD=VALUE is expected, fields: {', '.join(fields)}")
        match = [choice for choice in fields[name] if str(choice) == value]
        if not match:
            raise InvalidValue(name, value, f"allowed: {', '.join(map(str, fields[name]))}")
        changes[name] = match[0]
    return changes


def shape_text(specs: Sequence[KernelSpec]) -> str:
    """``2 specs: decode-…, decode-…``"""
    return f"{len(specs)} spec{'s' * (len(specs) > 1)}: {', '.join(spec.name for spec in specs)}"
