"""Targets and specs that many tests use."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagedgen.compiler import link
from pagedgen.compiler.binary import Binary, Source
from pagedgen.compiler.build import Choice, build
from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.families import family_for
from pagedgen.compiler.render import render
from pagedgen.compiler.space import near_default
from pagedgen.runtime import machine
from pagedgen.values.manifest import Rule
from pagedgen.values.record import Resources
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import Causality, DType, KernelSpec, KInner, KVScale, Op, Rope
from pagedgen.values.target import Target


def pytest_addoption(parser: pytest.Parser) -> None:
    """What tests/fuzz draws."""
    group = parser.getgroup("pagedgen")
    group.addoption("--fuzz-seed", type=int, default=0, help="seed of the draws of tests/fuzz")
    group.addoption("--fuzz-share", type=int, default=1, help="how many times as many draws")


@pytest.fixture(autouse=True)
def no_shipped_records(monkeypatch, tmp_path_factory) -> None:
    """Tests make their own records: what ships changes with every release."""
    monkeypatch.setattr("pagedgen.cache.SHIPPED", tmp_path_factory.getbasetemp() / "nothing-shipped")


@pytest.fixture(scope="session", autouse=True)
def linked_once(tmp_path_factory) -> Iterator[None]:
    """A library of the same launcher and kernels as one before is a copy of that one.

    The same inputs give the same bytes (test_link), and a launcher takes 0.5 s to compile. Workers share
    what is kept.
    """
    base, compile_library = tmp_path_factory.getbasetemp(), link.compile_library
    kept = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "linked"
    kept.mkdir(exist_ok=True)

    def put(library: Path, out: Path) -> Path:
        """A copy, there in one step: what it replaces may be loaded."""
        with tempfile.TemporaryDirectory(dir=out.parent) as name:
            return shutil.copy(library, Path(name) / out.name).replace(out)

    def once(assembly: link.Assembly, out: Path) -> Path:
        key = repr((assembly, link.host_compiler()))
        first = kept / f"{hashlib.sha256(key.encode()).hexdigest()}.so"
        if first.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            return put(first, out)
        put(compile_library(assembly, out), first)
        return out

    with pytest.MonkeyPatch.context() as patch:
        for module in ("link", "build"):
            patch.setattr(f"pagedgen.compiler.{module}.compile_library", once)
        yield


@pytest.fixture(scope="session")
def h100() -> Target:
    """A Hopper target with the figures of an H100 SXM."""
    return Target(
        "h100-sxm",
        "cuda",
        "sm_90",
        132,
        232448,
        233472,
        65536,
        2048,
        50 << 20,
        80 << 30,
        3352.0,
        989.0,
        1979.0,
        True,
    )


@pytest.fixture(scope="session")
def a100() -> Target:
    """An Ampere target with the figures of an A100 80 GB."""
    return Target(
        "a100-80g", "cuda", "sm_80", 108, 166912, 167936, 65536, 2048, 40 << 20, 80 << 30, 2039.0, 312.0
    )


def make_spec(
    head_dim: int = 128,
    heads: tuple[int, int] = (32, 8),
    block_size: int = 16,
    q: str = "f16",
    kv: str | None = None,
    *,
    scale: str = "tensor",
    lse: bool = False,
    k_inner: str = "dim",
    op: str = "decode",
    causality: str = "causal",
    **masks: Any,
) -> KernelSpec:
    """A spec in one line, decode unless ``op`` says otherwise."""
    masks["causality"] = Causality(causality)
    kv_dtype = DType(kv or q)
    as_stored = op == "copy_blocks" or q == kv_dtype  # fp8 without a scale
    kv_scale = KVScale(scale) if kv_dtype.is_fp8 and not as_stored else KVScale.NONE
    if "rope" in masks:
        masks["rope"] = Rope(masks["rope"])
    return KernelSpec(
        Op(op), head_dim, *heads, block_size, DType(q), kv_dtype, kv_scale, KInner(k_inner), lse, **masks
    )


@pytest.fixture(scope="session", name="make_spec")
def _make_spec():
    return make_spec


def default_schedule(spec: KernelSpec, target: Target) -> Schedule:
    """The schedule of a family's default fields; always legal to render, not always fast."""
    family = family_for(spec, target)
    return Schedule.of(family.name, **{field.name: field.default for field in family.fields(spec, target)})


@pytest.fixture(scope="session", name="default_schedule")
def _default_schedule():
    return default_schedule


@pytest.fixture(scope="session")
def gpu_binary(h100):
    """Make a Binary with made-up machine code, for what never runs: linking, packing, checking arguments."""

    def make(spec: KernelSpec, target: Target = h100, *, suffix: str = "", **choices: int | str) -> Binary:
        schedule = default_schedule(spec, target)
        own: dict[str, int | str] = {"waves": 4} if spec.op is Op.DECODE else {}
        if spec.op is Op.DECODE and not spec.batch_invariant:
            own["split"] = "pieces"
        choices = {**dict(schedule.choices), **own, **choices}
        source = Source(spec, target, Schedule.of(schedule.template, **choices), "# kernel source\n")
        ptx = f".version 8.7\n.target {target.arch}{suffix}\n.address_size 64\n// made up\n".encode()
        files = (("kernel.cubin", b"\x7fELF made up " + bytes(range(256))), ("kernel.ptx", ptx))
        return Binary(source, f"paged_{spec.op}", files, Resources(64, 0, 50_000, 300), "made up", 4)

    return make


@pytest.fixture(scope="session")
def cpu_target() -> Target:
    """This machine's processor."""
    arch = machine.cpu_arch()
    if arch is None:
        pytest.skip("no kernels are made for this processor")
    return Target("cpu", "cpu", arch, 2)


@pytest.fixture(scope="session")
def cpu_choice(cpu_target):
    """Compile real CPU kernels of a spec, as one choice of a pack: two variants, one for batches over 4."""
    pytest.importorskip("tvm")

    def make(spec: KernelSpec) -> Choice:
        schedule = default_schedule(spec, cpu_target)
        if spec.op is Op.DECODE:
            other = Schedule.of(schedule.template, **{**dict(schedule.choices), "ahead": 0})
        else:
            other = near_default(spec, cpu_target, 2)[1]
        binaries = tuple(compile_source(render(spec, cpu_target, s)) for s in (schedule, other))
        return Choice(binaries, (Rule(4, 2**31 - 1, 0), Rule(2**31 - 1, 2**31 - 1, 1)), ())

    return make


@pytest.fixture(scope="session")
def cpu_pack(cpu_choice, tmp_path_factory):
    """A real pack of three specs for this machine: f32, f32 with LSE, and f32 queries over an fp8 cache."""
    specs = [
        make_spec(64, (8, 2), 16, "f32"),
        make_spec(64, (8, 2), 16, "f32", lse=True),
        make_spec(64, (8, 2), 16, "f32", "fp8_e4m3"),
    ]
    return build([cpu_choice(s) for s in specs], tmp_path_factory.mktemp("packs") / "cpu.pack")
