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


class CacheUnwritable(PagedgenError):
    """The user cache cannot be written (read-only folder, full disk): names the path and the cause."""


class OutputUnwritable(PagedgenError):
    """What a command was told to write cannot be written there: names the path and the cause."""


class StudyUnreachable(PagedgenError):
    """A shared study's storage does not answer, or cannot be written: names it and the cause."""

    def __init__(self, storage: str, cause: str) -> None:
        super().__init__(f"storage {storage}: {cause}")
        self.storage, self.cause = storage, cause


class StudyForeign(PagedgenError):
    """The study of this name is about something else (spec, target, versions, workloads)."""

    def __init__(self, name: str, field: str, stored: str, here: str) -> None:
        super().__init__(
            f"study {name!r}: {field} = {stored!r} there, {here!r} here; "
            "take another name (--study), or delete that study"
        )
        self.name, self.field, self.stored, self.here = name, field, stored, here


class DeviceLost(PagedgenError):
    """The device stopped answering in the middle of a run; the message says what is kept."""


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


class LaunchError(PagedgenError, RuntimeError):
    """The driver refused to load or launch a kernel whose arguments were right: its name for the error."""


class SpecNotInPack(PackError, KeyError):
    """The pack holds no kernel for the wanted spec."""

    def __str__(self) -> str:
        return str(self.args[0])


class PackNotChosen(PackError):
    """A serving stack was told to use pagedgen, and no pack was named."""

    def __init__(self, variable: str) -> None:
        super().__init__(
            f"{variable} is not set: name the pack to serve with, {variable}=model.pack; "
            "pagedgen tune --model … --out model.pack makes one"
        )
        self.variable = variable


class VersionUnmet(PagedgenError):
    """A serving stack is installed in a version that its plug-in was not tested with."""

    def __init__(self, name: str, version: str, allowed: str) -> None:
        super().__init__(f"{name} = {version}: {allowed} is supported: pip install '{name}{allowed}'")
        self.name, self.version, self.allowed = name, version, allowed


class InvalidPool(InvalidValue):
    """A size of the KV pool, of its tables or of a manager's options is not allowed."""


class InvalidTokens(InvalidValue):
    """Token ids are not integers in range, or not one (or the stated number) a sequence."""


class InvalidSalt(InvalidValue):
    """A cache salt or extra key is of the wrong type."""


class InvalidLength(InvalidValue):
    """A sequence cannot be cut to this length."""


class InvalidPriority(InvalidValue):
    """No such eviction priority."""


class OutOfBlocks(PagedgenError):
    """The pool has too few free blocks; nothing was changed, so the caller may preempt and try again.

    Attributes: ``needed`` and ``free``, in blocks.
    """

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"{needed} blocks are needed, {free} are free")
        self.needed, self.free = needed, free


class OutOfHostBlocks(OutOfBlocks):
    """The host pool that sequences are swapped to has too few free blocks; nothing was changed."""


class TooManySequences(PagedgenError):
    """Every row of the block table is taken; nothing was changed."""


class SequenceError(PagedgenError, LookupError):
    """Base of calls on a sequence that cannot be made in its state; ``seq`` is its handle."""

    def __init__(self, seq: object, problem: str) -> None:
        super().__init__(f"sequence {seq!r} {problem}")
        self.seq = seq


class UnknownSequence(SequenceError):
    """The manager never gave out this handle."""


class SequenceFreed(SequenceError):
    """The sequence was freed before this call."""


class FreedTwice(SequenceFreed):
    """``free`` of a sequence that was freed before."""


class SequenceSwapped(SequenceError):
    """The sequence is in host memory: swap it in before this call."""


class SequenceNotSwapped(SequenceError):
    """The sequence is not in host memory."""


class SequenceNotComputed(SequenceError):
    """The call would copy KV that the present step has not computed yet."""


class SequenceTwice(SequenceError):
    """One call names the sequence twice."""


class SequenceTooLong(SequenceError):
    """The sequence would pass ``max_seq_len``; nothing was changed."""


class UnknownPin(PagedgenError, LookupError):
    """No such pin, or it was undone before."""
