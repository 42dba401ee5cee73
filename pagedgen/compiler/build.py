"""records → pack: link the chosen kernels and publish a folder that is whole or not there.

A pack is written under a hidden name beside its place and moved there in one step. A build that is killed
leaves at most that hidden folder, which the next build of the same pack removes.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pagedgen
from pagedgen.compiler.binary import Binary
from pagedgen.compiler.link import LAUNCHER, Embed, assemble, common, compile_library
from pagedgen.errors import InvalidValue, OutputUnwritable, PackDamaged, PackExists, PackForeign
from pagedgen.runtime.machine import host
from pagedgen.runtime.pack import open_pack, read_manifest
from pagedgen.values import codec
from pagedgen.values.manifest import FORMAT, MANIFEST, FileEntry, KernelEntry, Manifest, Rule
from pagedgen.values.record import Record, Verdict
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target import Target


@dataclass(frozen=True, slots=True)
class Choice:
    """What one spec brings to a pack: its kernels, the table that picks one, and the records behind them.

    ``verdicts``, one a kernel, are those of the gate here and now; none where there is no device for it.

    Raises:
        InvalidValue: no kernel, kernels of several specs or targets, a record of another spec.
    """

    binaries: tuple[Binary, ...]
    dispatch: tuple[Rule, ...]
    records: tuple[Record, ...]
    verdicts: tuple[Verdict, ...] = ()

    def __post_init__(self) -> None:
        spec, _ = common(self.binaries)
        for record in self.records:
            if record.spec != spec:
                raise InvalidValue("records", record.spec.name, f"records of {spec.name} are expected")

    @property
    def spec(self) -> KernelSpec:
        """The one spec of its kernels."""
        return self.binaries[0].source.spec

    @property
    def target(self) -> Target:
        """The one target of its kernels."""
        return self.binaries[0].source.target


def build(choices: Sequence[Choice], out: Path | str, *, embed: Embed = "both") -> Path:
    """Write a pack at ``out``, replacing an older pack there.

    Args:
        choices: one for each spec, all for one target.
        out: the pack's folder; ``*.pack`` by custom.
        embed: for GPUs, machine code ("cubin"), "ptx" or both; see ``link.assemble``.

    Raises:
        InvalidValue: no choice, several for one spec, or several targets.
        PackExists: something at ``out`` is not, or not only, a pack of ours.
        OutputUnwritable: the place cannot be written: read-only folder, full disk.
        CompileError, HostCompilerMissing: the launcher did not compile.
    """
    if not choices:
        raise InvalidValue("choices", (), "at least one spec is expected")
    target = choices[0].target
    for choice in choices:
        if choice.target != target:
            raise InvalidValue("target", choice.target.name, f"one target a pack: {target.name}")
    ordered = sorted(choices, key=lambda choice: choice.spec.name)
    for one, other in pairwise(ordered):
        if one.spec == other.spec:
            raise InvalidValue("choices", one.spec.name, "one choice a spec is expected")
    out = Path(out).resolve()
    check_replaceable(out)
    with _workplace(out) as folder:
        pack = folder / "pack"
        pack.mkdir()
        # A launcher takes about a second; compilers run beside each other, not Python.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            entries = tuple(pool.map(lambda choice: _write_choice(choice, pack, embed), ordered))
        manifest = Manifest(
            format=FORMAT,
            pagedgen=pagedgen.__version__,
            target=target.name,
            kind=target.kind,
            arch=target.arch,
            host=host(),
            kernels=entries,
            files=tuple(_list_files(pack)),
        )
        manifest = replace(manifest, digest=manifest.content_digest())
        (pack / MANIFEST).write_text(codec.dumps(manifest), encoding="utf-8")
        open_pack(pack)  # what is published passes the loader's checks
        _publish(pack, out, folder / "old")
    return out


def _write_choice(choice: Choice, pack: Path, embed: Embed) -> KernelEntry:
    """Link one spec's library and lay its parts beside it: all that it takes to link it again."""
    name = choice.spec.name
    assembly = assemble(choice.binaries, choice.dispatch, embed=embed)
    library = compile_library(assembly, pack / "lib" / f"{name}.so")
    parts = pack / "kernels" / name
    parts.mkdir(parents=True)
    (parts / LAUNCHER).write_text(assembly.source, encoding="utf-8")
    for file, data in assembly.files:
        (parts / file).write_bytes(data)
    for i, binary in enumerate(choice.binaries):
        (parts / f"{i}.py").write_text(binary.source.text, encoding="utf-8")
    return KernelEntry(
        spec=choice.spec,
        library=library.relative_to(pack).as_posix(),
        variants=tuple(binary.source.schedule for binary in choice.binaries),
        dispatch=choice.dispatch,
        records=choice.records,
        verdicts=choice.verdicts,
    )


def _list_files(pack: Path) -> Iterator[FileEntry]:
    for path in sorted(p for p in pack.rglob("*") if p.is_file()):
        data = path.read_bytes()
        yield FileEntry(path.relative_to(pack).as_posix(), len(data), hashlib.sha256(data).hexdigest())


def check_replaceable(out: Path) -> None:
    """Whether a pack may be published at ``out``: nothing, an empty folder, or a pack and nothing else.

    Raises:
        PackExists: names what is in the way.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise PackExists(f"{out} exists and is not a pack: choose another place, or remove it")
    if not any(out.iterdir()):
        return
    try:
        listed = {entry.path for entry in read_manifest(out).files} | {MANIFEST}
    except PackForeign:
        raise PackExists(f"{out} is a pack of another version: choose another place, or remove it") from None
    except PackDamaged as error:
        raise PackExists(f"{out} is not a pack, or a damaged one ({error}): remove it yourself") from None
    for path in out.rglob("*"):
        name = path.relative_to(out).as_posix()
        if name not in listed and (path.is_symlink() or not path.is_dir()):
            if {entry.path for entry in read_manifest(out).files} | {MANIFEST} != listed:
                check_replaceable(out)  # another build has just replaced the pack: look again
                return
            raise PackExists(f"{out} is a pack, but {name} in it is not of it: move that away")


def check_place(out: Path | str) -> None:
    """Whether a pack can be written at ``out``, so that nobody tunes for an hour first; tries it.

    Raises:
        PackExists: as :func:`check_replaceable`.
        OutputUnwritable: no folder can be made there.
    """
    out = Path(out).resolve()
    check_replaceable(out)
    with _workplace(out):
        pass


@contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out``, locked while its builder lives; those of dead builders are removed.

    Raises:
        OutputUnwritable: it cannot be made, or what happens in it meets a disk that is full or broken.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked_folder(out) as folder:
            yield folder
    except OSError as error:
        raise OutputUnwritable(f"{out}: {error.strerror or error}") from error


@contextmanager
def _locked_folder(out: Path) -> Iterator[Path]:
    prefix = f".{out.name}.building-"
    for left in out.parent.glob(f"{prefix}*"):
        with _try_lock(left / "lock") as dead:
            if dead:
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    folder.chmod(0o755)
    try:
        with (folder / "lock.new").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "lock.new").rename(folder / "lock")  # nobody ever sees it unlocked
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _try_lock(path: Path) -> Iterator[bool]:
    """Whether nobody holds a lock file that exists."""
    try:
        with path.open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
    except OSError:
        yield False


def _publish(pack: Path, out: Path, old: Path) -> None:
    """Move ``pack`` to ``out`` in one step; a pack that was there is left beside, for the caller to remove.

    Raises:
        PackExists: something that is no pack appeared there meanwhile.
    """
    check_replaceable(out)
    try:
        pack.rename(out)  # nothing there, or an empty folder
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if not _exchange(pack, out):
        # The filesystem cannot exchange: for a moment there is no pack, never half of one.
        out.rename(old)
        pack.rename(out)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders atomically (Linux renameat2); False where that is not supported."""
    at_cwd, exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0)
