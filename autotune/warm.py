"""First guesses for a search: what was chosen for this spec before, for its neighbours, and on other devices.

A choice made of other kernels, with another version or on another device is worth nothing as a result, but
what was fast there is the likeliest to be fast here.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from pagedgen.autotune.database import Database, read
from pagedgen.autotune.select import Selection
from pagedgen.compiler.families import family_for
from pagedgen.compiler.space import default_schedule
from pagedgen.errors import InvalidValue, MalformedFile
from pagedgen.values import codec
from pagedgen.values.record import Status
from pagedgen.values.schedule import Choice, Schedule
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target import Target
from pagedgen.values.workload import Lens

GUESSES = 6
NEIGHBOURS = 1  # specs whose times are a belief about this one's
ENOUGH = 8  # timed schedules from which on they are
ELSEWHERE = 0.5  # what another target counts, in the units of `_distance`: as much as a factor of 1.4
PREDICTED = 2.0  # and what a choice counts that was made by the model: this run has one of its own


@dataclass(frozen=True, slots=True)
class _Choice:
    spec: KernelSpec
    target: str
    selection: Selection
    path: Path = Path()


def guesses(
    database: Database, spec: KernelSpec, target: Target, space: Sequence[Schedule], count: int = GUESSES
) -> list[Schedule]:
    """At most ``count`` legal schedules, of the nearest specs first; none where nothing is on record.

    A schedule that is not legal here stands for the legal one that agrees with it in most fields.
    """
    defaults = dict(default_schedule(spec, target).choices)
    legal, found = set(space), dict[Schedule, None]()
    for choice in _nearest(database, spec, target):
        for variant in choice.selection.variants:
            if len(found) == count:
                return list(found)
            found[_legal(variant, defaults, legal, space)] = None
    return list(found)


def timings(
    database: Database, spec: KernelSpec, target: Target, count: int = NEIGHBOURS
) -> list[dict[Schedule, float]]:
    """Measured times of the ``count`` nearest specs, in this template's fields, over the batches that the
    most of their schedules met. A spec with fewer than ``ENOUGH`` such schedules says nothing.

    The spec itself is the nearest: what was timed of kernels that are rendered otherwise now, or on another
    device, is no result here, but tells which choices go together.
    """
    defaults = dict(default_schedule(spec, target).choices)
    found: list[dict[Schedule, float]] = []
    for choice in _nearest(database, spec, target):
        if len(found) == count:
            break
        try:
            entry = read(choice.path)
        except MalformedFile:  # whoever needs this file will say what is wrong with it
            continue
        times: dict[Schedule, dict[Lens, float]] = {}
        for record in entry.records if entry is not None else ():
            if record.status is Status.MEASURED:
                schedule = _in_fields(record.schedule, defaults)
                times.setdefault(schedule, {})[record.workload.lens] = record.time_us
        rows = _widest(times)
        if len(rows) >= ENOUGH:
            found.append(rows)
    return found


def _widest(times: Mapping[Schedule, Mapping[Lens, float]]) -> dict[Schedule, float]:
    """Geometric means over the batches that the most schedules met, of those that met them all."""
    met = Counter(batch for row in times.values() for batch in row)
    if not met:
        return {}
    most = max(met.values())
    batches = sorted(batch for batch, count in met.items() if count == most)
    return {
        schedule: math.exp(sum(math.log(row[batch]) for batch in batches) / len(batches))
        for schedule, row in times.items()
        if all(batch in row for batch in batches)
    }


def untried_values(
    best: Sequence[Schedule], seen: Iterable[Schedule], space: Sequence[Schedule], count: int
) -> list[Schedule]:
    """At most ``count`` legal schedules with a value that none of ``seen`` has, otherwise like one of
    ``best``: in all fields, or where that is not legal, in as many as can be.

    Records know nothing of a value that came into the template after them (how work is split, say), and a
    search that starts from their winners may never leave what they have in common.
    """
    names = [name for name, _ in space[0].choices]
    had = {(name, s[name]) for s in seen for name in names}
    new: dict[tuple[str, Choice], list[Schedule]] = {}
    for schedule in space:
        for value in set(schedule.choices) - had:
            new.setdefault(value, []).append(schedule)
    found = dict[Schedule, None]()
    for one in best:
        for value in sorted(new, key=str):
            if len(found) < count:
                found[max(new[value], key=lambda s: len(set(s.choices) & set(one.choices)))] = None
    return list(found)


def _nearest(database: Database, spec: KernelSpec, target: Target) -> list[_Choice]:
    """What was chosen for specs of the operator, the nearest ones first."""
    template = family_for(spec, target).name
    return sorted(
        _choices(database, template, spec),
        key=lambda c: (
            _distance(c.spec, spec)
            + ELSEWHERE * (c.target != target.name)
            + PREDICTED * (c.selection.status is Status.PREDICTED),
            c.target,
            c.spec.name,
        ),
    )


def _choices(database: Database, template: str, spec: KernelSpec) -> Iterator[_Choice]:
    for folder in (database.user, database.shipped):
        for path in sorted(folder.glob("*/*.json")):
            choice = _peek(path, template)
            if choice is not None and choice.spec.op is spec.op and choice.spec.k_inner is spec.k_inner:
                yield choice


def _peek(path: Path, template: str) -> _Choice | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return _peeked(path, template, (status.st_mtime_ns, status.st_size))


@lru_cache(4096)  # a command may tune many specs, and every one of them looks at every file
def _peeked(path: Path, template: str, status: tuple[int, int]) -> _Choice | None:
    """The selection in a record file, its records left unread: there may be thousands."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["template"] != template or not data["selection"]:
            return None
        kept = {key: data[key] for key in ("spec", "target", "selection")}
        return replace(codec.decode(_Choice, kept), path=path)
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
    same = _in_fields(schedule, defaults)
    if same in legal:
        return same
    choices = dict(same.choices)
    return max(space, key=lambda s: sum(choices[name] == value for name, value in s.choices))


def _in_fields(schedule: Schedule, defaults: Mapping[str, Choice]) -> Schedule:
    """With exactly the fields there are: new ones have their defaults."""
    choices = {**defaults, **{name: value for name, value in schedule.choices if name in defaults}}
    return Schedule(schedule.template, tuple(sorted(choices.items())))
