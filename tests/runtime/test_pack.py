"""Opening packs: every kind of damage is found and names its file, and foreign packs are refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import pagedgen
from pagedgen.compiler.build import Choice, build
from pagedgen.errors import PackDamaged, PackForeign
from pagedgen.runtime import machine
from pagedgen.runtime.pack import check_machine, open_pack, read_manifest
from pagedgen.values import codec
from pagedgen.values.manifest import MANIFEST, FileEntry, Manifest, Rule

ALL = (Rule(2**31 - 1, 2**31 - 1, 0),)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, make_spec, gpu_binary) -> Path:
    """An intact pack; copy it before spoiling it."""
    choice = Choice((gpu_binary(make_spec()),), ALL, ())
    return build([choice], tmp_path_factory.mktemp("whole") / "x.pack")


@pytest.fixture
def pack(whole, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "x.pack"))


def write_manifest(pack: Path, change: Callable[[Manifest], Manifest]) -> None:
    """Rewrite the manifest with its digest made to match: what a careful builder of bad packs would do."""
    manifest = change(read_manifest(pack))
    manifest = replace(manifest, digest=manifest.content_digest())
    (pack / MANIFEST).write_text(codec.dumps(manifest))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path, at: int = -1, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


def link_to_a_copy(path: Path) -> None:
    copy = path.with_name("copy")
    path.rename(copy)
    path.symlink_to(copy)


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = [
    truncate, extend, empty, flip, remove, link_to_a_copy, link_to_itself, become_a_folder, become_a_pipe
]  # fmt: skip
KINDS = [".so", ".cubin", ".ptx", ".py", ".cc"]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_named(pack, kind, damage):
    (path,) = (p for p in pack.rglob("*") if p.suffix == kind)
    damage(path)
    with pytest.raises(PackDamaged, match=path.name.replace(".", r"\.")):
        open_pack(pack)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_found_wherever_it_is(pack, kind):
    (path,) = (p for p in pack.rglob("*") if p.suffix == kind)
    size = path.stat().st_size
    for i in range(0, size, max(1, size // 40)):
        flip(path, i, 1 << i % 8)
        with pytest.raises(PackDamaged, match=path.name.replace(".", r"\.")):
            open_pack(pack)
        flip(path, i, 1 << i % 8)
    open_pack(pack)


def test_an_altered_manifest_never_passes_for_another(pack):
    """Any single byte: refused as damaged or foreign, or read as exactly what it was (whitespace)."""
    place, good = pack / MANIFEST, read_manifest(pack)
    data = place.read_bytes()
    for i in range(0, len(data), 7):
        for bit in (1, 16, 128):
            place.write_bytes(data[:i] + bytes([data[i] ^ bit]) + data[i + 1 :])
            try:
                assert read_manifest(pack) == good
            except (PackDamaged, PackForeign) as error:
                assert MANIFEST in str(error)


def test_a_truncated_manifest_is_damaged(pack):
    data = (pack / MANIFEST).read_bytes()
    for size in [*range(0, len(data) - 2, 97), len(data) - 3]:
        (pack / MANIFEST).write_bytes(data[:size])
        with pytest.raises(PackDamaged, match=r"manifest\.json"):
            open_pack(pack)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "null", "[" * 100_000, '{"format": 2}', "\udcff", '{"format": ' + "9" * 5000 + "}"],
)
def test_what_is_no_manifest(pack, text):
    (pack / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(PackDamaged, match=r"manifest\.json"):
        open_pack(pack)


def test_what_is_no_pack(tmp_path):
    with pytest.raises(PackDamaged, match="is not a folder"):
        open_pack(tmp_path / "absent.pack")
    with pytest.raises(PackDamaged, match=r"holds no manifest\.json, so it is not a pack"):
        open_pack(tmp_path)


@pytest.mark.parametrize("path", ["../x.so", "/etc/passwd", "lib/../../x", "lib//x", ".", "a\\b", "", "lib/"])
def test_paths_that_leave_the_pack(pack, path):
    data = json.loads((pack / MANIFEST).read_text())
    data["files"][0]["path"] = path
    (pack / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(PackDamaged, match="a relative path inside the pack is allowed"):
        open_pack(pack)


def test_a_folder_that_is_a_link_out_of_the_pack(pack, tmp_path):
    (pack / "lib").rename(tmp_path / "outside")
    (pack / "lib").symlink_to(tmp_path / "outside")
    with pytest.raises(PackDamaged, match=r"a plain file is expected, not a link"):
        open_pack(pack)


def test_the_pack_itself_may_be_a_link(pack, tmp_path):
    (tmp_path / "current.pack").symlink_to(pack)
    assert open_pack(tmp_path / "current.pack").path == pack.resolve()


def test_files_that_are_not_listed_are_ignored(pack):
    (pack / "NOTES.txt").write_text("mine")
    (pack / "lib" / "evil.so").symlink_to("/dev/zero")
    open_pack(pack)


def test_a_library_must_be_a_listed_file(pack):
    write_manifest(pack, lambda m: replace(m, files=tuple(f for f in m.files if not f.path.endswith(".so"))))
    with pytest.raises(PackDamaged, match=r"library lib/.*\.so is not among its files"):
        open_pack(pack)
    write_manifest(pack, lambda m: replace(m, kernels=(replace(m.kernels[0], library="../../x.so"),)))
    with pytest.raises(PackDamaged, match="is not among its files"):
        open_pack(pack)


def test_foreign_formats_and_versions(pack):
    data = json.loads((pack / MANIFEST).read_text())
    (pack / MANIFEST).write_text(json.dumps({"format": 1, "whatever": "comes"}))
    with pytest.raises(PackForeign, match="format = 1: this pagedgen reads format 2"):
        open_pack(pack)
    major = int(pagedgen.__version__.split(".")[0]) + 1
    (pack / MANIFEST).write_text(json.dumps({**data, "pagedgen": f"{major}.0.0"}))
    with pytest.raises(PackForeign, match=rf"pagedgen = {major}\.0\.0: a pack of major version"):
        open_pack(pack)


def test_an_intact_pack(whole):
    pack = open_pack(whole)
    assert pack.manifest == read_manifest(whole)
    assert all(pack.file(entry.path).is_file() for entry in pack.manifest.files)


def seen(monkeypatch, *capabilities: tuple[int, int]) -> None:
    monkeypatch.setattr(machine, "gpu_capabilities", lambda: capabilities)


def test_gpu_packs_are_for_some_gpus(pack, monkeypatch):
    # sm_90 with portable PTX: Hopper by its machine code, newer by PTX
    for capability in [(9, 0), (10, 0), (12, 0)]:
        seen(monkeypatch, (8, 0), capability)
        check_machine(open_pack(pack))
    seen(monkeypatch, (8, 0), (8, 9))
    with pytest.raises(PackForeign, match="arch = sm_90: this machine has sm_80, sm_89"):
        check_machine(open_pack(pack))
    seen(monkeypatch)
    with pytest.raises(PackForeign, match="arch = sm_90: this machine has no CUDA GPU"):
        check_machine(open_pack(pack))
    # without PTX, Hopper only
    write_manifest(pack, lambda m: replace(m, files=tuple(f for f in m.files if not f.path.endswith(".ptx"))))
    seen(monkeypatch, (10, 0))
    with pytest.raises(PackForeign, match="arch = sm_90: this machine has sm_100"):
        check_machine(open_pack(pack))


def test_packs_of_other_machines(pack, monkeypatch):
    seen(monkeypatch, (9, 0))
    write_manifest(pack, lambda m: replace(m, host="linux-s390x"))
    with pytest.raises(PackForeign, match=f"host = linux-s390x: this machine is {machine.host()}"):
        check_machine(open_pack(pack))
    write_manifest(pack, lambda m: replace(m, host=machine.host(), kind="cpu", arch="x86_64-avx1024"))
    with pytest.raises(PackForeign, match="arch = x86_64-avx1024: this processor has"):
        check_machine(open_pack(pack))
    write_manifest(pack, lambda m: replace(m, kind="tpu"))
    with pytest.raises(PackForeign, match="kind = tpu: allowed: cuda, cpu"):
        check_machine(open_pack(pack))


def test_file_entries_sort_and_compare(whole):
    files = read_manifest(whole).files
    assert list(files) == sorted(files)
    assert all(isinstance(entry, FileEntry) and len(entry.sha256) == 64 for entry in files)
