"""spec × target → the schedules that are legal, enumerated exactly: no invalid trial reaches the search."""

from __future__ import annotations

import itertools
from functools import cache

from pagedgen.compiler.families import family_for
from pagedgen.errors import NoCandidate
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target import Target
from pagedgen.values.workload import Workload

PROBE = Workload.uniform(1, 1)  # legality does not depend on the workload


@cache
def feasible(spec: KernelSpec, target: Target) -> tuple[Schedule, ...]:
    """Every schedule that meets all constraints of the family, in a stable order.

    Raises:
        Unsupported: no template covers the spec on this target.
        NoCandidate: the constraints leave nothing.
    """
    import sympy

    family = family_for(spec, target)
    fields = family.fields(spec, target)
    tests = []
    for constraint in family.constraints():
        names = sorted(str(symbol) for symbol in constraint.holds.free_symbols)
        arguments = sorted(constraint.holds.free_symbols, key=str)
        tests.append((names, sympy.lambdify(arguments, constraint.holds, "math")))
    found = []
    for values in itertools.product(*(field.values for field in fields)):
        choices = {field.name: value for field, value in zip(fields, values, strict=True)}
        schedule = Schedule.of(family.name, **choices)
        symbols = family.symbols(spec, target, schedule, PROBE)
        if all(test(*(symbols[name] for name in names)) for names, test in tests):
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
