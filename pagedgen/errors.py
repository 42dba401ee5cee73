"""Every error pagedgen raises on purpose, in one place.

Each class is one thing that can go wrong and carries the facts a caller may act on; the message always
names the field, the value and what is allowed. Catch :class:`PagedgenError` for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable


class PagedgenError(Exception):
    """Base of every error of this package."""


class InvalidValue(PagedgenError, ValueError):
    """A field of a value (spec, target, schedule, workload, record) is not allowed.

    Attributes: ``field``, ``value`` and ``allowed`` (a sentence).
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field} = {value!r}: {allowed}")
        self.field, self.value, self.allowed = field, value, allowed


class UnknownName(PagedgenError, KeyError):
    """A name (target, model, suite, template…) that is not in its table."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, tuple(known)
        super().__init__(f"unknown {kind} {name!r}; known: {', '.join(self.known)}")

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class UnknownTarget(UnknownName):
    """No such processor."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__("target", name, known)


class UnknownModel(UnknownName):
    """No such model preset, and no readable config.json at that path."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__("model", name, known)


class Unsupported(PagedgenError):
    """A legal spec that no template covers on this target; the message says which part."""


class MalformedFile(PagedgenError):
    """A trace, record, config or manifest that does not parse: names the file and where in it."""

    def __init__(self, path: object, where: str, problem: str) -> None:
        super().__init__(f"{path}: {where}: {problem}")
        self.path, self.where, self.problem = path, where, problem


class CompileError(PagedgenError):
    """A rendered kernel or launcher did not compile; holds the compiler's last lines."""


class HostCompilerMissing(CompileError):
    """No C++ compiler to link the launcher with."""


class ToolMissing(PagedgenError):
    """An optional dependency that this command needs is not installed; names the extra that brings it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} is not installed: pip install 'pagedgen[{extra}]'")


class NoCandidate(PagedgenError):
    """No schedule of the space was legal, compiled and correct."""


class GateFailure(PagedgenError):
    """A kernel failed the correctness gate where a correct one was required."""


class DeviceMissing(PagedgenError):
    """The command needs a device that this machine does not have."""


class RecordConflict(PagedgenError):
    """A stored record was made by something else (other version, device, spec) and is not overwritten."""


class CacheUnwritable(PagedgenError):
    """The user cache cannot be written (read-only folder, full disk): names the path and the cause."""


class PackError(PagedgenError):
    """Base of what can be wrong with a pack."""


class PackDamaged(PackError):
    """A file of the pack is missing, truncated or altered: names the file."""


class PackForeign(PackError):
    """The pack is intact but not for this machine: another architecture, ABI or major version."""


class PackExists(PackError):
    """The output folder exists and is not a pack of ours, so it is not overwritten."""


class ArgumentError(PagedgenError, ValueError):
    """A tensor or scalar passed to a kernel is not what its contract says; raised before any launch."""


class SpecNotInPack(PackError, KeyError):
    """The pack holds no kernel for the wanted spec."""

    def __str__(self) -> str:
        return str(self.args[0])
