"""Building packs: what is in them, what they replace, and what a build that fails or is killed leaves."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import pagedgen
from pagedgen.compiler import build as build_module
from pagedgen.compiler.build import Choice, build, check_place
from pagedgen.compiler.link import LAUNCHER, flags, host_compiler, libraries
from pagedgen.errors import CompileError, InvalidValue, OutputUnwritable, PackExists
from pagedgen.runtime.library import Library
from pagedgen.runtime.machine import host
from pagedgen.runtime.pack import open_pack
from pagedgen.values.manifest import MANIFEST, Rule

ALL = (Rule(2**31 - 1, 2**31 - 1, 0),)


@pytest.fixture
def choice(make_spec, gpu_binary):
    """One spec with one made-up kernel."""
    return Choice((gpu_binary(make_spec()),), ALL, ())


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_contents(tmp_path, make_spec, gpu_binary):
    small, large = make_spec(64), make_spec(128, lse=True)
    choices = [Choice((gpu_binary(s), gpu_binary(s, waves=2)), ALL, ()) for s in (small, large)]
    pack = open_pack(build(choices, tmp_path / "new" / "x.pack"))
    assert pack.path == (tmp_path / "new" / "x.pack").resolve()
    parts = [f"{i}.{kind}" for i in range(2) for kind in ("cubin", "ptx", "py")] + [LAUNCHER]
    expected = [f"lib/{s.name}.so" for s in (small, large)]
    expected += [f"kernels/{s.name}/{part}" for s in (small, large) for part in parts]
    assert names(pack.path) == sorted([*expected, MANIFEST])
    manifest = pack.manifest
    assert [entry.path for entry in manifest.files] == sorted(expected)
    assert (manifest.target, manifest.kind, manifest.arch) == ("h100-sxm", "cuda", "sm_90")
    assert (manifest.pagedgen, manifest.host) == (pagedgen.__version__, host())
    assert [kernel.spec for kernel in manifest.kernels] == [large, small]  # by name
    assert manifest.kernels[0].variants == tuple(b.source.schedule for b in choices[1].binaries)
    assert manifest.kernels[0].dispatch == ALL
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.pack"]
    assert stat.S_IMODE(pack.path.stat().st_mode) & 0o055 == 0o055  # others may read it


def test_only_what_is_embedded_is_packed(tmp_path, choice, make_spec):
    pack = open_pack(build([choice], tmp_path / "x.pack", embed="ptx"))
    assert names(pack.path / "kernels" / make_spec().name) == ["0.ptx", "0.py", LAUNCHER]


def test_a_library_can_be_linked_again_from_the_pack(tmp_path, choice):
    pack = build([choice], tmp_path / "x.pack")
    folder = tmp_path / "again"
    shutil.copytree(pack / "kernels" / choice.spec.name, folder)
    line = [*host_compiler(), *flags(folder), LAUNCHER, "-o", "library.so", *libraries()]
    subprocess.run(line, cwd=folder, check=True)
    assert (folder / "library.so").read_bytes() == (pack / "lib" / f"{choice.spec.name}.so").read_bytes()


def test_a_newer_pack_replaces_an_older(tmp_path, choice, make_spec, gpu_binary):
    out = build([choice], tmp_path / "x.pack")
    other = Choice((gpu_binary(make_spec(64)),), ALL, ())
    assert build([other], out) == out
    assert [k.spec for k in open_pack(out).manifest.kernels] == [make_spec(64)]
    assert [p.name for p in tmp_path.iterdir()] == ["x.pack"]


def test_replacing_where_folders_cannot_be_exchanged(tmp_path, choice, monkeypatch):
    out = build([choice], tmp_path / "x.pack")
    monkeypatch.setattr(build_module, "_exchange", lambda one, other: False)
    build([choice], out)
    assert open_pack(out)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pack"]


def test_a_link_to_a_pack_stays_a_link(tmp_path, choice):
    build([choice], tmp_path / "real.pack")
    (tmp_path / "x.pack").symlink_to("real.pack")
    build([choice], tmp_path / "x.pack")
    assert (tmp_path / "x.pack").is_symlink() and open_pack(tmp_path / "real.pack")


def in_the_way(kind: str, out: Path, choice: Choice) -> None:
    if kind == "file":
        out.write_text("notes")
        return
    if kind != "folder":
        build([choice], out)
    else:
        out.mkdir()
        (out / "notes.txt").write_text("notes")
    if kind == "pack with notes":
        (out / "notes.txt").write_text("notes")
    elif kind == "pack with a link":
        (out / "lib" / "link").symlink_to("/")
    elif kind == "truncated manifest":
        (out / MANIFEST).write_text((out / MANIFEST).read_text()[:100])
    elif kind == "later format":
        data = json.loads((out / MANIFEST).read_text())
        (out / MANIFEST).write_text(json.dumps({**data, "format": 1}))


@pytest.mark.parametrize(
    "kind", ["file", "folder", "pack with notes", "pack with a link", "truncated manifest", "later format"]
)
def test_nothing_but_a_pack_is_replaced(tmp_path, choice, kind):
    out = tmp_path / "x.pack"
    in_the_way(kind, out, choice)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(PackExists, match=r"x\.pack"):
        build([choice], out)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_an_empty_folder_is_taken(tmp_path, choice):
    (tmp_path / "x.pack").mkdir()
    assert open_pack(build([choice], tmp_path / "x.pack"))


def test_what_cannot_be_built(tmp_path, choice, make_spec, gpu_binary, a100):
    out = tmp_path / "x.pack"
    with pytest.raises(InvalidValue, match="at least one spec is expected"):
        build([], out)
    with pytest.raises(InvalidValue, match="one choice a spec is expected"):
        build([choice, choice], out)
    with pytest.raises(InvalidValue, match="one target a pack: h100-sxm"):
        build([choice, Choice((gpu_binary(make_spec(64), a100),), ALL, ())], out)
    with pytest.raises(InvalidValue, match="dispatch"):
        build([Choice(choice.binaries, (), ())], out)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_build_leaves_the_old_pack(tmp_path, choice, monkeypatch):
    out = build([choice], tmp_path / "x.pack")
    before = {name: (out / name).read_bytes() for name in names(out)}

    def fail(*args, **kwargs):
        raise CompileError("made up")

    monkeypatch.setattr(build_module, "compile_library", fail)
    with pytest.raises(CompileError, match="made up"):
        build([choice], out)
    assert {name: (out / name).read_bytes() for name in names(out)} == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.pack"]


def test_a_place_that_cannot_be_written_is_named(tmp_path, choice):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "x.pack"
    for attempt in (lambda: build([choice], place), lambda: check_place(place)):
        with pytest.raises(OutputUnwritable, match=r"file/x\.pack: "):
            attempt()


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, choice, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(build_module, "compile_library", full)
    with pytest.raises(OutputUnwritable, match=r"x\.pack: No space left"):
        build([choice], tmp_path / "x.pack")
    assert list(tmp_path.iterdir()) == []


def test_trying_a_place_leaves_nothing(tmp_path):
    check_place(tmp_path / "x.pack")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_build_leaves_no_pack_and_the_next_one_cleans_up(tmp_path, choice):
    hang = tmp_path / "hang"
    hang.write_text("#!/bin/sh\nexec sleep 60\n")
    hang.chmod(0o755)
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from conftest import default_schedule, make_spec
        from pagedgen.compiler.binary import Binary, Source
        from pagedgen.compiler.build import Choice, build
        from pagedgen.values.manifest import Rule
        from pagedgen.values.record import Resources
        from pagedgen.values.target import Target
        spec, target = make_spec(), Target("h100-sxm", "cuda", "sm_90", 132)
        source = Source(spec, target, default_schedule(spec, target), "")
        files = (("kernel.cubin", b""), ("kernel.ptx", b""))
        binary = Binary(source, "paged_decode", files, Resources(), "made up", 4)
        build([Choice((binary,), (Rule(1, 1, 0),), ())], {str(tmp_path / "x.pack")!r})
    """
    worker = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "CXX": str(hang)},
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".x.pack.building-*/pack/lib/.link-*/launcher.cc")):
        assert worker.poll() is None and time.monotonic() < deadline, "the build never got to its compiler"
        time.sleep(0.02)
    assert not (tmp_path / "x.pack").exists()
    build([choice], tmp_path / "y.pack")  # another pack's build leaves it alone
    build([choice], tmp_path / "x.pack")  # and so does one of the same pack, while the first one lives
    assert len(list(tmp_path.glob(".x.pack.building-*"))) == 1
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    build([choice], tmp_path / "x.pack")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hang", "x.pack", "y.pack"]
    assert open_pack(tmp_path / "x.pack")


def test_builds_of_one_pack_at_a_time_by_many(tmp_path, choice, make_spec, gpu_binary):
    other = Choice((gpu_binary(make_spec(64)),), ALL, ())
    out = tmp_path / "x.pack"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda c: build([c], out), [choice, other] * 2))
    pack = open_pack(out)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pack"]
    Library(pack.file(pack.manifest.kernels[0].library))
