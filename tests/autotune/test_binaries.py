"""Compiled candidates by content: nothing twice, failures too, damage is a miss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pagedgen.autotune import binaries as module
from pagedgen.autotune.binaries import BinaryCache, Compiled, compile_all
from pagedgen.autotune.worker import Done, WorkerLost
from pagedgen.compiler.binary import Binary, Source
from pagedgen.compiler.families import template_hash
from pagedgen.errors import CompileError
from pagedgen.values.record import Resources
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import DType, KernelSpec, Op
from pagedgen.values.target_table import target

SPEC = KernelSpec(Op.DECODE, 128, 32, 8, 16, DType.F16, DType.F16)
COMPILER = "triton 3.7.1"


def source(tile: int = 64, text: str = "kernel\n", where: str = "a100") -> Source:
    return Source(SPEC, target(where), Schedule.of("t", tile=tile), text)


def binary(of: Source, spill: int = 0) -> Binary:
    files = (("kernel.cubin", b"\x00\x01" * 500), ("kernel.ptx", b".version 8\n"))
    return Binary(of, "paged_decode", files, Resources(96, spill, 4096, 1000), COMPILER, 4)


@pytest.fixture
def cache(tmp_path: Path) -> BinaryCache:
    return BinaryCache(tmp_path)


def test_what_is_put_is_got(cache: BinaryCache) -> None:
    one = source()
    assert cache.get(one, COMPILER) is None
    cache.put(one, COMPILER, binary(one))
    assert cache.get(one, COMPILER) == Compiled(one, binary(one), fresh=False)


@pytest.mark.parametrize(
    "other",
    [source(tile=128), source(text="other\n"), source(where="h100"), source(where="a100-40g")],
    ids=["schedule", "text", "arch", "target"],
)
def test_everything_that_decides_the_outcome_is_in_the_key(cache: BinaryCache, other: Source) -> None:
    cache.put(source(), COMPILER, binary(source()))
    assert cache.get(other, COMPILER) is None
    assert cache.get(source(), "triton 3.8.0") is None


def test_a_binary_of_other_compiler_options_is_a_miss(cache: BinaryCache, monkeypatch) -> None:
    cache.put(source(), COMPILER, binary(source()))
    monkeypatch.setattr("pagedgen.autotune.binaries.template_hash", lambda family: "after an edit")
    assert cache.get(source(), COMPILER) is None


@pytest.mark.parametrize("name", ["triton.py", "sass.py"])
def test_a_binary_that_another_check_let_through_is_a_miss(cache: BinaryCache, monkeypatch, name) -> None:
    """What is refused of compiled kernels counts as the compiler's options do."""
    cache.put(source(), COMPILER, binary(source()))
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == name))
    template_hash.cache_clear()
    assert cache.get(source(), COMPILER) is None
    monkeypatch.undo()
    template_hash.cache_clear()
    assert cache.get(source(), COMPILER) is not None


def test_spills_and_errors_are_kept_as_what_they_are(cache: BinaryCache) -> None:
    cache.put(source(1), COMPILER, binary(source(1), spill=24))
    cache.put(source(2), COMPILER, CompileError("out of shared memory"))
    assert cache.get(source(1), COMPILER) == Compiled(source(1), None, "spills 24 B a thread", False)
    assert cache.get(source(2), COMPILER) == Compiled(source(2), None, "out of shared memory", False)


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:45] + bytes([b[45] ^ 1]) + b[46:]]
)
def test_a_damaged_file_is_a_miss(cache: BinaryCache, damage: Callable[[bytes], bytes]) -> None:
    cache.put(source(), COMPILER, binary(source()))
    path = cache.path(source(), COMPILER)
    path.write_bytes(damage(path.read_bytes()))
    assert cache.get(source(), COMPILER) is None
    cache.put(source(), COMPILER, binary(source()))
    assert cache.get(source(), COMPILER) is not None


class FakePool:
    """Compiles in place; tile 2 fails, tile 3 takes its worker along."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def map(self, function: object, sources: list[Source], timeout_s: float) -> Iterator[Done]:
        for one in sources:
            self.asked.append(one.schedule.int("tile"))
            if self.asked[-1] == 2:
                yield Done(one, error=CompileError("no"))
            elif self.asked[-1] == 3:
                yield Done(one, error=WorkerLost("timed out after 120 s"))
            else:
                yield Done(one, binary(one))


def test_a_second_run_compiles_what_may_have_been_bad_luck_only(cache: BinaryCache, monkeypatch) -> None:
    monkeypatch.setattr(module, "compiler_version", lambda kind: COMPILER)
    sources = [source(tile) for tile in (1, 2, 3, 4)]
    first, second = FakePool(), FakePool()
    done = list(compile_all(sources, first, cache))  # type: ignore[arg-type]
    assert [c.reason for c in done] == ["", "no", "timed out after 120 s", ""]
    assert [c.source for c in done] == sources and all(c.fresh for c in done)
    again = list(compile_all([*sources, source(5)], second, cache))  # type: ignore[arg-type]
    assert first.asked == [1, 2, 3, 4] and second.asked == [3, 5]
    assert [c.reason for c in again] == ["", "no", "timed out after 120 s", "", ""]
    assert [c.fresh for c in again] == [False, False, True, False, True]


def test_an_unwritable_cache_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    cache = BinaryCache(tmp_path / "file")
    cache.put(source(), COMPILER, binary(source()))
    assert cache.get(source(), COMPILER) is None
    assert replace(source(), text="x") != source()
