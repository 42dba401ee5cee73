"""spec × target → the schedules that are legal, enumerated exactly: no invalid trial reaches the search."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from pagedgen.compiler.families import family_for
from pagedgen.errors import NoCandidate
from pagedgen.templates.family import Family, Field
from pagedgen.values.schedule import Choice, Schedule
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target import Target
from pagedgen.values.workload import Workload

PROBE = Workload.uniform(1, 1)  # legality does not depend on the workload


@cache
def _tests(family: Family) -> tuple[tuple[tuple[str, ...], Callable[..., bool]], ...]:
    """The family's constraints as functions, each with the names of its arguments."""
    import sympy

    tests = []
    for constraint in family.constraints():
        arguments = sorted(constraint.holds.free_symbols, key=str)
        names = tuple(str(symbol) for symbol in arguments)
        tests.append((names, sympy.lambdify(arguments, constraint.holds, "math")))
    return tuple(tests)


def is_legal(spec: KernelSpec, target: Target, schedule: Schedule) -> bool:
    """Whether a schedule of the spec's family meets all constraints.

    Raises:
        Unsupported: no template covers the spec on this target.
    """
    family = family_for(spec, target)
    symbols = family.symbols(spec, target, schedule, PROBE)
    return all(test(*(symbols[name] for name in names)) for names, test in _tests(family))


@cache
def feasible(spec: KernelSpec, target: Target) -> tuple[Schedule, ...]:
    """Every schedule that meets all constraints of the family, in a stable order.

    Raises:
        Unsupported: no template covers the spec on this target.
        NoCandidate: the constraints leave nothing.
    """
    family = family_for(spec, target)
    fields = family.fields(spec, target)
    found = []
    for values in itertools.product(*(field.values for field in fields)):
        choices = {field.name: value for field, value in zip(fields, values, strict=True)}
        if family.meaningless(choices):
            continue
        schedule = Schedule.of(family.name, **choices)
        if is_legal(spec, target, schedule):
            found.append(schedule)
    if not found:
        raise NoCandidate(f"{spec.name} on {target.name}: no schedule meets the constraints of {family.name}")
    return tuple(found)


def is_feasible(spec: KernelSpec, target: Target, schedule: Schedule) -> bool:
    """Whether a schedule is one of :func:`feasible`; enumerates nothing."""
    fields = family_for(spec, target).fields(spec, target)
    chosen = dict(schedule.choices)
    known = chosen.keys() == {field.name for field in fields}
    return known and all(chosen[f.name] in f.values for f in fields) and is_legal(spec, target, schedule)


def near_default(spec: KernelSpec, target: Target, count: int) -> tuple[Schedule, ...]:
    """The ``count`` feasible schedules nearest to the family's default, the nearest first.

    Distance is counted in steps of the fields' values. No more of the space is looked at than it takes: to
    enumerate decode's takes 1.4 to 11 s.

    Raises:
        Unsupported: no template covers the spec on this target.
        NoCandidate: the constraints leave nothing.
    """
    family = family_for(spec, target)
    fields = family.fields(spec, target)
    found: list[Schedule] = []
    for distance in range(sum(_farthest(field) for field in fields) + 1):
        for choices in _at(fields, distance):
            schedule = Schedule.of(family.name, **dict(choices))
            if is_legal(spec, target, schedule):
                found.append(schedule)
                if len(found) == count:
                    return tuple(found)
    if not found:
        raise NoCandidate(f"{spec.name} on {target.name}: no schedule meets the constraints of {family.name}")
    return tuple(found)


def _farthest(field: Field) -> int:
    """Steps from a field's default to the value that is farthest from it."""
    home = field.values.index(field.default)
    return max(home, len(field.values) - 1 - home)


def _at(fields: Sequence[Field], distance: int) -> Iterator[tuple[tuple[str, Choice], ...]]:
    """Choices of all fields whose distances from the defaults sum up to ``distance``."""
    if not fields:
        if not distance:
            yield ()
        return
    (first, *rest), reach = fields, sum(_farthest(field) for field in fields[1:])
    home = first.values.index(first.default)
    for index, value in enumerate(first.values):
        left = distance - abs(index - home)
        if 0 <= left <= reach:
            for others in _at(rest, left):
                yield ((first.name, value), *others)


def default_schedule(spec: KernelSpec, target: Target) -> Schedule:
    """The family's default where it is legal, else the legal schedule nearest to it."""
    return near_default(spec, target, 1)[0]
