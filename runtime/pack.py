"""``Pack``: a pack folder, checked: intact to the last byte, and for this machine.

A pack is data plus native code. Nothing in it is executed as Python, nothing outside its folder is opened,
and only the files that its manifest lists, with their sizes and SHA-256, are used; other files in the folder
are ignored. The checks find damage and mix-ups. They are no protection against somebody who can write both a
library and a manifest to match: load packs from sources you trust, as you would any library.
"""

from __future__ import annotations

import hashlib
import json
import stat
from dataclasses import dataclass
from pathlib import Path

import pagedgen
from pagedgen.errors import InvalidValue, PackDamaged, PackForeign
from pagedgen.runtime import machine
from pagedgen.values import codec
from pagedgen.values.manifest import FORMAT, MANIFEST, FileEntry, Manifest


@dataclass(frozen=True, slots=True)
class Pack:
    """An intact pack: its folder, resolved, and its manifest."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Where a listed file lies."""
        return self.path / name


def read_manifest(path: Path) -> Manifest:
    """The manifest of a pack folder; its other files are not looked at.

    Raises:
        PackDamaged: the manifest is missing, does not parse, or does not match its own digest.
        PackForeign: another format, or built by another major version of pagedgen.
    """
    place = path / MANIFEST
    try:
        text = place.read_text(encoding="utf-8")
    except FileNotFoundError:
        what = "is not a folder" if not path.is_dir() else f"holds no {MANIFEST}, so it is not a pack"
        raise PackDamaged(f"{path} {what}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PackDamaged(f"{place}: cannot be read: {error}") from error
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PackDamaged(f"{place}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise PackDamaged(f"{place}: an object is expected")
    # Before the rest is understood: another format may hold anything.
    if type(data.get("format")) is int and data["format"] != FORMAT:
        raise PackForeign(f"{place}: format = {data['format']}: this pagedgen reads format {FORMAT}")
    version = data.get("pagedgen")
    if isinstance(version, str) and _major(version) != _major(pagedgen.__version__):
        allowed = f"a pack of major version {_major(pagedgen.__version__)} is expected"
        raise PackForeign(f"{place}: pagedgen = {version}: {allowed}; build it again with this version")
    try:
        manifest = codec.decode(Manifest, data)
    except InvalidValue as error:
        raise PackDamaged(f"{place}: {error}") from error
    if manifest.digest != manifest.content_digest():
        raise PackDamaged(f"{place}: was altered: its digest does not match its contents")
    return manifest


def _major(version: str) -> str:
    return version.split(".", 1)[0]


def check_file(root: Path, entry: FileEntry) -> None:
    """Compare a listed file with its entry; ``root`` is the pack's folder, resolved.

    Raises:
        PackDamaged: missing, not a plain file inside the pack, truncated or altered; names the file.
    """
    path = root / entry.path
    try:
        if path.resolve(strict=True) != path or not stat.S_ISREG(path.lstat().st_mode):
            raise PackDamaged(f"{path}: a plain file is expected, not a link or a folder")
        data = path.read_bytes()
    except (
        OSError
    ) as error:  # RuntimeError of a link loop is an OSError since 3.13, and was one in lstat before
        raise PackDamaged(f"{path}: cannot be read: {error.strerror or error}") from error
    except RuntimeError as error:
        raise PackDamaged(f"{path}: cannot be read: {error}") from error
    if len(data) != entry.size:
        raise PackDamaged(f"{path}: {len(data)} bytes: the manifest says {entry.size}")
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise PackDamaged(f"{path}: was altered: its SHA-256 is not the manifest's")


def open_pack(path: Path | str) -> Pack:
    """Check a pack's manifest and every file in it, whatever machine it is for.

    Raises:
        PackDamaged: names the file that is missing, truncated or altered.
        PackForeign: another format or major version.
    """
    root = Path(path).resolve()
    manifest = read_manifest(root)
    listed = set()
    for entry in manifest.files:
        check_file(root, entry)
        listed.add(entry.path)
    for kernel in manifest.kernels:
        if kernel.library not in listed:
            raise PackDamaged(f"{root / MANIFEST}: library {kernel.library} is not among its files")
    return Pack(root, manifest)


def check_machine(pack: Pack) -> None:
    """Whether this machine can run the pack.

    Raises:
        PackForeign: another platform, instruction set or GPU architecture; says what is needed and what is
            here.
    """
    manifest = pack.manifest
    if manifest.host != machine.host():
        raise PackForeign(f"{pack.path}: host = {manifest.host}: this machine is {machine.host()}")
    if manifest.kind == "cpu":
        if not machine.cpu_runs(manifest.arch):
            have = machine.cpu_arch() or "none of the known levels"
            raise PackForeign(f"{pack.path}: arch = {manifest.arch}: this processor has {have}")
    elif manifest.kind == "cuda":
        names = [entry.path for entry in manifest.files]
        machine_code = any(name.endswith(".cubin") for name in names)
        ptx = any(name.endswith(".ptx") for name in names)
        seen = machine.gpu_capabilities()
        if not any(machine.gpu_runs(manifest.arch, c, machine_code=machine_code, ptx=ptx) for c in seen):
            have = ", ".join(f"sm_{major}{minor}" for major, minor in seen) or "no CUDA GPU"
            raise PackForeign(f"{pack.path}: arch = {manifest.arch}: this machine has {have}")
    else:
        raise PackForeign(f"{pack.path}: kind = {manifest.kind}: allowed: cuda, cpu")
