"""Where a suite's progress and results go, and which of its cases are wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from pagedgen.errors import UnknownName

Note = Callable[[str], None]  # a line of progress


class Named(Protocol):
    """A case of a suite, before it is run."""

    @property
    def name(self) -> str:
        """What :option:`--case` is looked for in."""


class Savable(Protocol):
    """A report, of some cases or of all."""

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""


CaseType = TypeVar("CaseType", bound=Named)


class Output:
    """What a suite is run with.

    Args:
        note: takes a line of progress.
        json_path: the file that every finished case is added to; None to keep nothing.
        wanted: texts; cases whose names hold one of them are run, all without any.
    """

    def __init__(self, note: Note, json_path: Path | None = None, wanted: Sequence[str] = ()) -> None:
        self.note, self.json_path, self.wanted = note, json_path, tuple(wanted)
        self.is_kept = False  # whether the file holds anything of this run

    def chosen(self, cases: Sequence[CaseType]) -> tuple[CaseType, ...]:
        """The cases that are wanted, in their order.

        Raises:
            UnknownName: a text that is in no name.
        """
        for text in self.wanted:
            if not any(_holds(case.name, text) for case in cases):
                raise UnknownName("case", text, [case.name for case in cases])
        if not self.wanted:
            return tuple(cases)
        return tuple(c for c in cases if any(_holds(c.name, text) for text in self.wanted))

    def keep(self, report: Savable) -> None:
        """Put what there is into the file, in one step: whenever the suite ends, the last such is there.

        Raises:
            CacheUnwritable: the folder cannot be written.
        """
        if self.json_path is not None:
            report.save(self.json_path)
            self.is_kept = True


def _holds(name: str, text: str) -> bool:
    return text.casefold() in name.casefold()
