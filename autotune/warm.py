"""First guesses for a search: what was chosen for this spec before, for its neighbours, and on other devices.

A choice made of other kernels, with another version or on another device is worth nothing as a result, but
what was fast there is the likeliest to be fast here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pagedgen.autotune.database import Database
from pagedgen.autotune.select import Selection
from pagedgen.compiler.families import family_for
from pagedgen.compiler.space import default_schedule
from pagedgen.errors import InvalidValue
from pagedgen.values import codec
from pagedgen.values.record import Status
from pagedgen.values.schedule import Choice, Schedule
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target import Target

GUESSES = 6
ELSEWHERE = 0.5  # what another target counts, in the units of `_distance`: as much as a factor of 1.4
PREDICTED = 2.0  # and what a choice counts that was made by the model: this run has one of its own


@dataclass(frozen=True, slots=True)
class _Choice:
    spec: KernelSpec
    target: str
    selection: Selection


def guesses(
    database: Database, spec: KernelSpec, target: Target, space: Sequence[Schedule], count: int = GUESSES
) -> list[Schedule]:
    """At most ``count`` legal schedules, of the nearest specs first; none where nothing is on record.

    A schedule that is not legal here stands for the legal one that agrees with it in most fields.
    """
    family = family_for(spec, target)
    defaults = dict(default_schedule(spec, target).choices)
    near = sorted(
        _choices(database, family.name, spec),
        key=lambda c: (
            _distance(c.spec, spec)
            + ELSEWHERE * (c.target != target.name)
            + PREDICTED * (c.selection.status is Status.PREDICTED),
            c.target,
            c.spec.name,
        ),
    )
    legal, found = set(space), dict[Schedule, None]()
    for choice in near:
        for variant in choice.selection.variants:
            if len(found) == count:
                return list(found)
            found[_legal(variant, defaults, legal, space)] = None
    return list(found)


def _choices(database: Database, template: str, spec: KernelSpec) -> Iterator[_Choice]:
    for folder in (database.user, database.shipped):
        for path in sorted(folder.glob("*/*.json")):
            choice = _peek(path, template)
            if choice is not None and choice.spec.op is spec.op and choice.spec.k_inner is spec.k_inner:
                yield choice


def _peek(path: Path, template: str) -> _Choice | None:
    """The selection in a record file, its records left unread: there may be thousands."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["template"] != template or not data["selection"]:
            return None
        kept = {key: data[key] for key in ("spec", "target", "selection")}
        return codec.decode(_Choice, kept)
    except (OSError, ValueError, KeyError, TypeError, InvalidValue):
        return None  # whoever needs this file will say what is wrong with it


def _distance(a: KernelSpec, b: KernelSpec) -> float:
    """0 for equal specs. A factor of two in a size counts 1, in the block size half; another dtype 1 or 2."""
    sizes = abs(math.log2(a.head_dim / b.head_dim)) + abs(math.log2(a.group_size / b.group_size))
    sizes += 0.25 * abs(math.log2(a.num_kv_heads / b.num_kv_heads))
    sizes += 0.5 * abs(math.log2(a.block_size / b.block_size))
    dtype = 0.0 if a.kv_dtype is b.kv_dtype else 1.0 + (a.kv_dtype.size != b.kv_dtype.size)
    return sizes + dtype + 0.25 * (a.q_dtype is not b.q_dtype) + 0.1 * (a.return_lse != b.return_lse)


def _legal(
    schedule: Schedule, defaults: Mapping[str, Choice], legal: set[Schedule], space: Sequence[Schedule]
) -> Schedule:
    """The schedule in this space's fields, or the legal one that agrees with it in most of them."""
    choices = {**defaults, **{name: value for name, value in schedule.choices if name in defaults}}
    same = Schedule(schedule.template, tuple(sorted(choices.items())))
    if same in legal:
        return same
    return max(space, key=lambda s: sum(choices[name] == value for name, value in s.choices))
