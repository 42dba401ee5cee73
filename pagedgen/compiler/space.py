"""spec × target → the schedules that are legal, enumerated exactly: no invalid trial reaches the search."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

from pagedgen.compiler.families import family_for
from pagedgen.errors import NoCandidate
from pagedgen.templates.family import Family
from pagedgen.values.schedule import Schedule
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


def near_default(spec: KernelSpec, target: Target) -> tuple[Schedule, ...]:
    """Every feasible schedule, the family's default or the nearest to it first."""
    fields = family_for(spec, target).fields(spec, target)

    def distance(schedule: Schedule) -> int:
        return sum(
            abs(field.values.index(schedule[field.name]) - field.values.index(field.default))
            for field in fields
        )

    return tuple(sorted(feasible(spec, target), key=distance))


def default_schedule(spec: KernelSpec, target: Target) -> Schedule:
    """The family's default where it is legal, else the legal schedule nearest to it."""
    return near_default(spec, target)[0]
