"""``Schedule``: HOW a kernel does it, one value for each tunable field of its template."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from pagedgen.errors import InvalidValue
from pagedgen.values import codec

Choice = int | str


@dataclass(frozen=True, order=True, slots=True)
class Schedule:
    """A point of a template's schedule space.

    ``choices`` holds (field, value) pairs sorted by field; the template family that declares the fields
    (``pagedgen.templates``) says what each one means.
    """

    template: str
    choices: tuple[tuple[str, Choice], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.choices]
        if names != sorted(set(names)):
            raise InvalidValue("choices", names, "distinct fields in sorted order are expected")

    @classmethod
    def of(cls, template: str, **choices: Choice) -> Schedule:
        """``Schedule.of("triton-decode", tile=64, num_warps=4)``."""
        return cls(template, tuple(sorted(choices.items())))

    def __getitem__(self, field: str) -> Choice:
        for name, value in self.choices:
            if name == field:
                return value
        raise InvalidValue("field", field, f"{self.template} has {', '.join(n for n, _ in self.choices)}")

    def int(self, field: str) -> int:
        """The value of an integer field.

        Raises:
            InvalidValue: the field holds a string, or there is no such field.
        """
        value = self[field]
        if not isinstance(value, int):
            raise InvalidValue(field, value, "an integer field is expected")
        return value

    def without(self, fields: Collection[str]) -> Schedule:
        """The same choices but for those of some fields."""
        return Schedule(self.template, tuple(choice for choice in self.choices if choice[0] not in fields))

    @property
    def name(self) -> str:
        """Readable: ``num_stages3-num_warps4-tile64``."""
        return "-".join(f"{field}{value}" for field, value in self.choices)

    @property
    def hash(self) -> str:
        """Content hash, 16 hex digits."""
        return codec.content_hash(self)
