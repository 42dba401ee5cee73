"""Records on disk: one readable JSON file per (target, spec), the user cache over the shipped one.

``cache/README.md`` describes the file. Reading needs no lock and no write permission: files are replaced
whole. Writing takes the folder's lock, merges with what is there, and replaces the file.

A stored file fits this machine in one of three ways (:class:`Fit`), and each of its records is of a kernel
that is rendered today as it was, or of one that no longer is (:meth:`Database.current`). What definitely
belongs to something else (another kernel, pagedgen major version, device or file format) is neither used nor
overwritten: new records go beside it, into ``<spec>.2.json``, ``<spec>.3.json`` and so on.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from pagedgen.autotune.device import NONE, stamp_here
from pagedgen.autotune.paths import locked, publish, user_cache
from pagedgen.autotune.select import Selection
from pagedgen.compiler.families import family_for
from pagedgen.compiler.kernel_hash import kernel_hash
from pagedgen.errors import DeviceMissing, InvalidValue, MalformedFile, UnknownTarget, Unsupported
from pagedgen.values import codec
from pagedgen.values.record import Record, Resources, Stamp, Status, Timing, Verdict
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target import Target
from pagedgen.values.target_table import gpu_target
from pagedgen.values.target_table import target as find_target
from pagedgen.values.workload import Lens, Workload

FORMAT = 2  # of the file; bumped when an older reader could misread it


class Fit(StrEnum):
    """How far stored records hold for a stamp."""

    EXACT = "exact"  # same versions, same device: as good as measured now
    NEAR = "near"  # another compiler or driver, or a prediction: used, and tuned anew when asked to tune
    FOREIGN = "foreign"  # another major version or device: neither used nor overwritten


def fit(stored: Stamp, here: Stamp) -> Fit:
    """Compare stamps. A device of ``none`` (a prediction, or no such device here) rules nothing out."""
    if _major(stored) != _major(here):
        return Fit.FOREIGN
    if NONE not in (stored.device, here.device) and stored.device != here.device:
        return Fit.FOREIGN
    same = (stored.compiler, stored.device, stored.driver) == (here.compiler, here.device, here.driver)
    return Fit.EXACT if same else Fit.NEAR


def _major(stamp: Stamp) -> str:
    return stamp.pagedgen.split(".", 1)[0]


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of a spec on a target: every record, and the selection made from them."""

    spec: KernelSpec
    target: str
    records: tuple[Record, ...]
    selection: Selection | None = None

    def __post_init__(self) -> None:
        if not self.records:
            raise InvalidValue("records", (), "at least one record is expected")
        for record in self.records:
            if record.spec != self.spec or record.target != self.target:
                raise InvalidValue("records", record.spec.name, f"of {self.spec.name} on {self.target} alone")

    @property
    def stamp(self) -> Stamp:
        """The newest stamp among the records, a measured one where there is any."""
        return max(self.records, key=lambda r: (r.status is Status.MEASURED, r.stamp.date)).stamp

    def chosen(self) -> tuple[Record, ...]:
        """The records of the selection's variants: what the choice rests on."""
        if self.selection is None:
            return ()
        status, variants = self.selection.status, set(self.selection.variants)
        return tuple(r for r in self.records if r.status is status and r.schedule in variants)

    def merged(self, newer: Entry) -> Entry:
        """``newer`` over this one. A prediction never displaces a measurement."""
        records = {_key(r): r for r in self.records}
        for record in newer.records:
            old = records.get(_key(record))
            if old is None or record.status is Status.MEASURED or old.status is Status.PREDICTED:
                records[_key(record)] = record
        old_choice, new_choice = self.selection, newer.selection
        keep = new_choice is None or (
            old_choice is not None
            and old_choice.status is Status.MEASURED
            and new_choice.status is Status.PREDICTED
        )
        return replace(newer, records=tuple(records.values()), selection=old_choice if keep else new_choice)


def kernel_now(spec: KernelSpec, target: str, schedule: Schedule) -> str | None:
    """The hash of the kernel rendered today for a schedule; None when it cannot be rendered any more."""
    try:
        where = _target(target)
        family = family_for(spec, where)
    except (Unsupported, UnknownTarget):
        return None
    fields = {field.name: field.values for field in family.fields(spec, where)}
    choices = dict(schedule.choices)
    if schedule.template != family.name or fields.keys() != choices.keys():
        return None
    if any(choices[name] not in values for name, values in fields.items()):
        return None
    return kernel_hash(spec, where, schedule)


def _target(name: str) -> Target:
    """The target of that name: of the table, or this machine's GPU where the table has no such card."""
    try:
        return find_target(name)
    except UnknownTarget:
        try:
            here = gpu_target()
        except (DeviceMissing, ImportError):
            here = None
        if here is None or here.name != name:
            raise
        return here


def _key(record: Record) -> tuple[Lens, Schedule]:
    return record.workload.lens, record.schedule


@dataclass(frozen=True, slots=True)
class Found:
    """What a file holds that is current, the file, and how it fits."""

    entry: Entry
    path: Path
    fit: Fit


class Database:
    """Records in the user cache, over those that ship with the package.

    ``user`` and ``shipped`` are folders that hold ``<target>/<spec.name>.json``; they need not exist.
    ``kernel`` says what is rendered today for a spec, a target's name and a schedule.

    >>> database = Database()
    >>> found = database.find(spec, "h100-sxm", stamp)
    >>> found.entry.selection.pick(num_seqs=32, max_seq_len=8192)  # doctest: +SKIP
    """

    def __init__(
        self,
        user: Path | None = None,
        shipped: Path | None = None,
        kernel: Callable[[KernelSpec, str, Schedule], str | None] = kernel_now,
    ) -> None:
        from pagedgen.cache import SHIPPED

        self.user = user if user is not None else user_cache() / "records"
        self.shipped = shipped if shipped is not None else SHIPPED
        self.kernel = kernel

    def current(self, entry: Entry) -> Entry | None:
        """The records whose kernels are rendered today as they were when recorded, None where there are none.

        The selection goes with them while all its variants are among them.
        """
        now = {s: self.kernel(entry.spec, entry.target, s) for s in {r.schedule for r in entry.records}}
        kept = tuple(r for r in entry.records if r.kernel == now[r.schedule])
        if len(kept) == len(entry.records):
            return entry
        if not kept:
            return None
        known, selection = {r.schedule for r in kept}, entry.selection
        whole = selection is not None and known.issuperset(selection.variants)
        return replace(entry, records=kept, selection=selection if whole else None)

    def find(self, spec: KernelSpec, target: str, here: Stamp) -> Found | None:
        """The entry that holds for ``here``, of kernels rendered today: a measured selection before a
        predicted one, an exact fit before a near one, the user's before the shipped one, then the newest.

        Raises:
            MalformedFile: a file is damaged, or is not what its name says.
        """
        best: Found | None = None
        for path in self.files(spec, target):
            found = self._open(path, spec, target, here)
            if found is not None and (best is None or self._rank(found) > self._rank(best)):
                best = found
        return best

    def files(self, spec: KernelSpec, target: str) -> tuple[Path, ...]:
        """Every file about a spec on a target, whether its records hold here or not."""
        return tuple(p for folder in (self.user, self.shipped) for p in _files(folder / target, spec.name))

    def save(self, entry: Entry) -> Path:
        """Merge an entry into the user cache, atomically; concurrent savers lose nothing. Returns the file.

        Raises:
            CacheUnwritable: read-only folder, full disk.
            MalformedFile: the file there is damaged; it is left as it is.
        """
        folder, here = self.user / entry.target, entry.stamp
        with locked(folder):
            for number in itertools.count(1):
                path = folder / _file_name(entry.spec.name, number)
                if not path.exists():
                    merged = entry
                    break
                found = self._open(path, entry.spec, entry.target, here)
                if found is not None and found.entry == read(path):  # every record of it is current
                    merged = found.entry.merged(entry)
                    break
            publish(path, _dump(merged))
        return path

    def entries(self, target: str | None = None) -> Iterator[Found]:
        """Every readable entry, the user's first, whatever its stamp and kernels (nothing is compared).

        Raises:
            MalformedFile: a file is damaged.
        """
        for folder in (self.user, self.shipped):
            for path in sorted(folder.glob(f"{target or '*'}/*.json")):
                entry = read(path)
                if entry is not None:
                    yield Found(entry, path, Fit.NEAR)

    def of_spec(self, spec: KernelSpec) -> Iterator[Entry]:
        """What any target has of a spec, of kernels rendered today, whatever the stamps; damaged files are
        passed over."""
        for folder in (self.user, self.shipped):
            for place in sorted(folder.glob("*/")):
                for path in _files(place, spec.name):
                    with suppress(MalformedFile):
                        entry = read(path)
                        current = self.current(entry) if entry is not None and entry.spec == spec else None
                        if current is not None:
                            yield current

    def _open(self, path: Path, spec: KernelSpec, target: str, here: Stamp) -> Found | None:
        entry = read(path)
        if entry is None:
            return None
        if entry.spec != spec or entry.target != target:
            raise MalformedFile(path, "spec", f"about {entry.spec.name} on {entry.target}")
        how = fit(entry.stamp, here)
        current = self.current(entry) if how is not Fit.FOREIGN else None
        return None if current is None else Found(current, path, how)

    def _rank(self, found: Found) -> tuple[bool, bool, bool, bool, str]:
        selection = found.entry.selection
        measured = selection is not None and selection.status is Status.MEASURED
        users = found.path.is_relative_to(self.user)
        return measured, selection is not None, found.fit is Fit.EXACT, users, found.entry.stamp.date


def recorded(spec: KernelSpec, target: Target, database: Database | None = None) -> Found | None:
    """What is recorded of a spec for this machine's device, or where it has none for any of the target.

    Raises:
        MalformedFile: a file is damaged, or is not what its name says.
        Unsupported, ToolMissing: as :func:`pagedgen.autotune.device.stamp_here`.
    """
    return (database or Database()).find(spec, target.name, stamp_here(spec, target))


def _file_name(name: str, number: int) -> str:
    return f"{name}.json" if number == 1 else f"{name}.{number}.json"


def _files(folder: Path, name: str) -> list[Path]:
    numbers = sorted(
        int(number)
        for path in folder.glob(f"{name}.*.json")
        if (number := path.name.removeprefix(f"{name}.").removesuffix(".json")).isdecimal()
    )
    return [p for n in (1, *numbers) if (p := folder / _file_name(name, n)).is_file()]


# ---- the file ----


@dataclass(frozen=True, slots=True)
class _Row:
    """A record with its spec, target, workload and stamp said once in the file, not in every row."""

    status: Status
    workload: int  # index into workloads
    stamp: int  # index into stamps
    schedule: tuple[tuple[str, int | str], ...]
    kernel: str
    predicted_us: float
    timing: Timing | None
    roofline_gbs: float
    resources: Resources
    verdict: Verdict | None
    roofline_tflops: float = field(default=0.0, metadata=codec.OMIT_DEFAULT)


@dataclass(frozen=True, slots=True)
class _File:
    format: int
    target: str
    spec: KernelSpec
    template: str
    stamps: tuple[Stamp, ...]
    workloads: tuple[Workload, ...]
    selection: Selection | None
    records: tuple[_Row, ...]


def read(path: Path) -> Entry | None:
    """The entry in a file, or None when its format is a newer pagedgen's or an older one's.

    Raises:
        MalformedFile: damaged; names the place.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MalformedFile(path, "JSON", str(error)) from error
    except OSError as error:
        raise MalformedFile(path, "file", error.strerror or str(error)) from error
    if isinstance(data, dict) and type(data.get("format")) is int and 0 < data["format"] != FORMAT:
        return None
    try:
        file = codec.decode(_File, data, "record file")
        if file.format != FORMAT:
            raise InvalidValue("format", file.format, f"{FORMAT} is allowed")
        records = tuple(_record(file, row) for row in file.records)
        return Entry(file.spec, file.target, records, file.selection)
    except InvalidValue as error:
        raise MalformedFile(path, error.field, f"{error.value!r}: {error.allowed}") from error


def _record(file: _File, row: _Row) -> Record:
    for name, index, table in (
        ("workload", row.workload, file.workloads),
        ("stamp", row.stamp, file.stamps),
    ):
        if not 0 <= index < len(table):
            raise InvalidValue(name, index, f"0 to {len(table) - 1} is allowed")
    return Record(
        status=row.status,
        spec=file.spec,
        target=file.target,
        workload=file.workloads[row.workload],
        schedule=Schedule(file.template, row.schedule),
        kernel=row.kernel,
        stamp=file.stamps[row.stamp],
        resources=row.resources,
        predicted_us=row.predicted_us,
        timing=row.timing,
        roofline_gbs=row.roofline_gbs,
        verdict=row.verdict,
        roofline_tflops=row.roofline_tflops,
    )


def _dump(entry: Entry) -> bytes:
    stamps = tuple(dict.fromkeys(r.stamp for r in entry.records))
    workloads = tuple(dict.fromkeys(r.workload for r in entry.records))
    rows = tuple(
        _Row(
            r.status,
            workloads.index(r.workload),
            stamps.index(r.stamp),
            r.schedule.choices,
            r.kernel,
            r.predicted_us,
            r.timing,
            r.roofline_gbs,
            r.resources,
            r.verdict,
            r.roofline_tflops,
        )
        for r in sorted(entry.records, key=lambda r: (workloads.index(r.workload), r.time_us))
    )
    template = _only(r.schedule.template for r in entry.records)
    file = _File(FORMAT, entry.target, entry.spec, template, stamps, workloads, entry.selection, rows)
    return (_pretty(codec.encode(file)) + "\n").encode()


def _only(values: Iterable[str]) -> str:
    distinct = set(values)
    if len(distinct) != 1:
        raise InvalidValue("template", sorted(distinct), "the records of a file share one template")
    return distinct.pop()


def _pretty(data: Any, indent: int = 0) -> str:
    """JSON with one line for everything that fits in 110 characters, so that a record is a line or two."""
    flat = json.dumps(data, ensure_ascii=False)
    scalars = isinstance(data, list) and not any(isinstance(item, dict | list) for item in data)
    if scalars or not data or not isinstance(data, dict | list) or len(flat) + indent <= 110:
        return flat
    pad, end = " " * (indent + 2), " " * indent
    if isinstance(data, dict):
        items = [f"{json.dumps(key)}: {_pretty(value, indent + 2)}" for key, value in data.items()]
    else:
        items = [_pretty(value, indent + 2) for value in data]
    left, right = ("{", "}") if isinstance(data, dict) else ("[", "]")
    return left + "\n" + ",\n".join(pad + item for item in items) + "\n" + end + right
