"""What a template declares beside its source: schedule fields, legality and cost, each said once.

Legality and cost are sympy expressions over named symbols. The same expressions enumerate the space,
prune it, predict times, are printed by ``pagedgen explain`` and stand in the docs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pagedgen.values.schedule import Choice, Schedule
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target import Target
from pagedgen.values.workload import Workload

if TYPE_CHECKING:
    import sympy

TEMPLATES = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Field:
    """A tunable choice: the values it may take on this spec and target, and the default among them."""

    name: str
    values: tuple[Choice, ...]
    default: Choice
    meaning: str

    def __post_init__(self) -> None:
        if self.default not in self.values:
            raise ValueError(f"{self.name}: default {self.default!r} is not in {self.values}")


@dataclass(frozen=True, slots=True)
class Constraint:
    """A condition that every legal schedule meets, as a sympy relation, and why it must."""

    name: str
    holds: sympy.Basic
    why: str


@dataclass(frozen=True, slots=True)
class Cost:
    """A named figure of the model, as a sympy expression. ``time_us`` is the one that ranks."""

    name: str
    unit: str
    formula: sympy.Expr
    meaning: str


class Family(ABC):
    """One operator on one backend: a template, its schedule space and its cost expressions."""

    name: str  # "triton-decode": what Schedule.template holds
    kind: str  # Target.kind it renders for: "cuda" (hip is compiled by the same backend) or "cpu"
    source: Path  # the .j2 file
    shared: tuple[Path, ...] = ()  # files the source imports; they count in the template's hash
    spill_bytes: int = 0  # see spills
    masks: tuple[str, ...] = ()  # of KernelSpec.masks, those that the template covers
    v_dims: bool = False  # whether V's rows may have another length than K's
    invariant: bool = False  # whether it has kernels whose bits don't follow from the batch
    launch_fields: tuple[str, ...] = ()  # of the schedule, those that the launcher alone reads

    def spills(self, spec: KernelSpec) -> int:
        """Bytes a thread that a kernel of a spec may spill and still be used."""
        return self.spill_bytes

    @abstractmethod
    def check(self, spec: KernelSpec, target: Target) -> None:
        """Raise ``Unsupported``, naming the field, when the template cannot do this spec on this target."""

    @abstractmethod
    def fields(self, spec: KernelSpec, target: Target) -> tuple[Field, ...]:
        """The schedule fields, each with its values for this spec and target."""

    def meaningless(self, choices: Mapping[str, Choice]) -> bool:
        """Whether some of the choices mean nothing beside the others; constraints say so, too.

        Of a large product most combinations are such; what this says at once need not be computed for each.
        """
        return False

    @abstractmethod
    def constraints(self) -> tuple[Constraint, ...]:
        """Relations over the names of :meth:`symbols`."""

    @abstractmethod
    def costs(self) -> tuple[Cost, ...]:
        """Expressions over the names of :meth:`symbols`; earlier costs may be used by later ones."""

    @abstractmethod
    def symbols(
        self, spec: KernelSpec, target: Target, schedule: Schedule, workload: Workload
    ) -> Mapping[str, float]:
        """The number behind every symbol, for one case."""

    @abstractmethod
    def context(self, spec: KernelSpec, target: Target, schedule: Schedule) -> Mapping[str, object]:
        """What the Jinja source is rendered with."""
