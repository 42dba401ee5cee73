"""The analytic model: what a schedule should cost on a target, before anything is compiled or run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from pagedgen.compiler.families import family_for
from pagedgen.templates.family import Family
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target import Target
from pagedgen.values.workload import Workload


@dataclass(frozen=True, slots=True)
class Prediction:
    """The model's figures for one case, in the family's order; ``time_us`` ranks schedules."""

    figures: tuple[tuple[str, float], ...]
    inputs: frozenset[str] = frozenset()  # the symbols that the figures were made from

    def __getitem__(self, name: str) -> float:
        return dict(self.figures)[name]

    @property
    def time_us(self) -> float:
        """Predicted time of one call, microseconds."""
        return self["time_us"]


@cache
def _compiled(family: Family) -> tuple[tuple[str, tuple[str, ...], Callable[..., float]], ...]:
    import sympy

    compiled = []
    for cost in family.costs():
        symbols = sorted(cost.formula.free_symbols, key=str)
        names = tuple(str(symbol) for symbol in symbols)
        compiled.append((cost.name, names, sympy.lambdify(symbols, cost.formula, "math")))
    return tuple(compiled)


def predict(
    spec: KernelSpec,
    target: Target,
    schedule: Schedule,
    workload: Workload,
    factors: Mapping[str, float] | None = None,
) -> Prediction:
    """Evaluate the family's cost expressions; ``factors`` scale symbols, as a calibration asks for.

    Raises:
        Unsupported: no template covers the spec on this target.
    """
    family = family_for(spec, target)
    values = dict(family.symbols(spec, target, schedule, workload))
    inputs = frozenset(values)
    for name, factor in (factors or {}).items():
        values[name] *= factor
    figures = []
    for name, arguments, function in _compiled(family):
        values[name] = float(function(*(values[argument] for argument in arguments)))
        figures.append((name, values[name]))
    return Prediction(tuple(figures), inputs)
