"""binaries + dispatch table → one host library in the TVM-FFI ABI (docs/architecture.md).

The launcher is plain C++ against TVM-FFI's C header: no CUDA headers, no toolkit, no C++ run-time library.
Kernels come in through the assembler's ``.incbin``, so a library of fifty candidates compiles about as fast
as one of two.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pagedgen
from pagedgen.compiler.binary import Binary
from pagedgen.compiler.families import family_for
from pagedgen.compiler.render import environment
from pagedgen.errors import CompileError, HostCompilerMissing, InvalidValue, Unsupported
from pagedgen.values.manifest import Rule
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec, Op
from pagedgen.values.target import Target

Embed = Literal["both", "cubin", "ptx"]
EMBEDS: tuple[Embed, ...] = ("both", "cubin", "ptx")
LAUNCHER = "launcher.cc"
TIMEOUT_S = 300  # a launcher compiles in under a second; a compiler that hangs must not hang the tuner


@dataclass(frozen=True, slots=True)
class Align:
    """Bytes that pointers, and elements that strides, must be multiples of."""

    q: int
    out: int
    k: int
    v: int
    q_stride: int
    out_stride: int
    k_stride: int
    v_stride: int
    workspace: int
    cos_sin: int = 4


@dataclass(frozen=True, slots=True)
class Assembly:
    """What a library is compiled from: the launcher's source and the kernel files it takes in, by name."""

    source: str
    files: tuple[tuple[str, bytes], ...]
    objects: tuple[str, ...]  # those of the files that go to the linker


@cache
def host_compiler() -> tuple[str, ...]:
    """The C++ compiler's command: $CXX, g++, clang++, c++, or the ``ziglang`` wheel.

    Raises:
        HostCompilerMissing: there is none, or $CXX names nothing runnable.
    """
    if named := os.environ.get("CXX"):
        command = shlex.split(named)
        if not shutil.which(command[0]):
            raise HostCompilerMissing(f"CXX = {named!r}: no such program")
        return tuple(command)
    for name in ("g++", "clang++", "c++"):
        if path := shutil.which(name):
            return (path,)
    if find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "c++")
    raise HostCompilerMissing(
        "no C++ compiler found (looked for $CXX, g++, clang++, c++, and ziglang in Python): "
        "install g++ or clang, or run: pip install ziglang"
    )


def common(binaries: Sequence[Binary]) -> tuple[KernelSpec, Target]:
    """The one spec and target of all binaries.

    Raises:
        InvalidValue: there are none, or they differ.
    """
    if not binaries:
        raise InvalidValue("binaries", (), "at least one is expected")
    first = binaries[0].source
    for binary in binaries:
        if binary.source.spec != first.spec:
            raise InvalidValue("spec", binary.source.spec.name, f"one spec a library: {first.spec.name}")
        if binary.source.target != first.target:
            raise InvalidValue(
                "target", binary.source.target.name, f"one target a library: {first.target.name}"
            )
    return first.spec, first.target


def assemble(binaries: Sequence[Binary], dispatch: Sequence[Rule], *, embed: Embed = "both") -> Assembly:
    """Render the launcher of a library.

    Args:
        binaries: the variants, of one spec and target; variant i is ``binaries[i]``.
        dispatch: the table that serves variant -1; without one the caller always names the variant.
        embed: for GPUs, machine code and PTX, or one of them. "both" leaves out PTX that no other
            architecture could use (``sm_90a`` and the like).

    Raises:
        InvalidValue: several specs or targets, a rule that names no variant, several kernels of a batch
            invariant spec, an unknown ``embed``.
        Unsupported: a kind of target that has no launcher.
    """
    spec, target = common(binaries)
    for rule in dispatch:
        if not 0 <= rule.variant < len(binaries):
            raise InvalidValue("variant", rule.variant, f"0 to {len(binaries) - 1} is allowed")
    used = sorted({rule.variant for rule in dispatch})
    if spec.batch_invariant:
        fields = family_for(spec, target).launch_fields
        if len({binaries[variant].source.schedule.without(fields) for variant in used}) > 1:
            allowed = f"variants of one kernel are allowed: the batch must not pick the bits of {spec.name}"
            raise InvalidValue("dispatch", used, allowed)
    if embed not in EMBEDS:
        raise InvalidValue("embed", embed, f"allowed: {', '.join(EMBEDS)}")
    shared: dict[str, object] = {
        "version": pagedgen.__version__,
        "spec": spec,
        "target": target,
        "dispatch": tuple(dispatch),
        "num_variants": len(binaries),
    }
    if target.kind == "cuda":
        return _assemble_gpu(binaries, shared, spec, embed)
    if target.kind == "cpu":
        return _assemble_cpu(binaries, shared, spec)
    raise Unsupported(f"target kind {target.kind}: kernels are compiled for it, but there is no launcher")


def portable_ptx(ptx: bytes) -> bool:
    """Whether newer architectures run this PTX: a target that ends in a letter (``sm_90a``) is for one."""
    found = re.search(rb"^\.target\s+sm_\d+([a-z]?)", ptx, re.MULTILINE)
    return found is not None and not found.group(1)


def _own_fields(schedule: Schedule) -> tuple[str, ...]:
    """What the launcher has to know of a variant beside its binary, as C++ literals in their order there."""
    if schedule.template == "triton-verify":
        return str(schedule.int("tile_m")), str(schedule.int("waves"))
    if schedule.template == "triton-copy-blocks":
        return str(schedule.int("tile_m")), str(schedule.int("pdl") == 1).lower()
    if schedule.template != "triton-decode":
        return (str(schedule.int("tile_m")),)
    even, pdl = schedule["split"] == "even", schedule.int("pdl") >= 1
    own = str(schedule.int("waves")), str(even).lower(), str(pdl).lower()
    return (*own, str(schedule.int("max_parts"))) if schedule["split"] == "fixed" else own


def _looks_ahead(schedule: Schedule) -> bool:
    """Whether a kernel takes the sizes of the pool and the block table, to find its work before its wait."""
    return schedule.template == "triton-decode" and schedule.int("pdl") == 2


def _cluster_of(binary: Binary) -> dict[str, int]:
    """Programs of a cluster, 0 where there is none, and the static shared memory that they write to."""
    from pagedgen.templates.triton.decode import box_bytes, cluster_of

    source = binary.source
    if source.schedule.template != "triton-decode":
        return {"cluster": 0, "box_bytes": 0}
    return {"cluster": cluster_of(source.schedule), "box_bytes": box_bytes(source.spec, source.schedule)}


def _assemble_gpu(
    binaries: Sequence[Binary], shared: Mapping[str, object], spec: KernelSpec, embed: Embed
) -> Assembly:
    from pagedgen.compiler.families import family_for
    from pagedgen.compiler.triton import alignment_of

    files: list[tuple[str, bytes]] = []
    variants = []
    for i, binary in enumerate(binaries):
        names: dict[str, str | None] = {"cubin": None, "ptx": None}
        for kind in names:
            data = binary.file(f"kernel.{kind}")
            if embed == kind or (embed == "both" and (kind == "cubin" or portable_ptx(data))):
                names[kind] = f"{i}.{kind}"
                files.append((f"{i}.{kind}", data))
        variants.append(
            {
                "name": binary.source.schedule.name,
                "symbol": binary.symbol,
                "threads": 32 * binary.num_warps,
                "smem_bytes": binary.resources.smem_bytes,
                "own": _own_fields(binary.source.schedule),
                "ahead": _looks_ahead(binary.source.schedule),
                **_cluster_of(binary),
                **names,
            }
        )
    align = Align(
        q=alignment_of(spec, "q_ptr"),
        out=alignment_of(spec, "out_ptr"),
        k=alignment_of(spec, "k_ptr"),
        v=alignment_of(spec, "v_ptr"),
        q_stride=alignment_of(spec, "q_stride_head"),
        out_stride=alignment_of(spec, "out_stride_head"),
        k_stride=alignment_of(spec, "k_stride_block"),
        v_stride=alignment_of(spec, "v_stride_block"),
        workspace=alignment_of(spec, "partial_ptr"),
        cos_sin=alignment_of(spec, "cos_sin_ptr"),
    )
    first = binaries[0].source
    literals: Mapping[str, Any] = family_for(spec, first.target).context(spec, first.target, first.schedule)
    own: dict[str, object] = {"clustered": any(variant["cluster"] for variant in variants)}
    if spec.op is Op.DECODE:
        own |= {"rows": literals["rows"], "programs": literals["programs"]}
        own["ahead"] = any(variant["ahead"] for variant in variants)
    elif spec.op is Op.VERIFY:
        own["programs"] = spec.num_kv_heads
    elif spec.op is Op.COPY_BLOCKS:
        own["unit_bytes"] = literals["unit"]
    source = (
        environment()
        .get_template("launcher/gpu.cc.j2")
        .render(
            **shared,
            variants=variants,
            align=align,
            max_kv_stride="INT32_MAX",  # block and token strides are 32-bit in the kernels
            **own,
        )
    )
    return Assembly(source, tuple(files), ())


def _assemble_cpu(binaries: Sequence[Binary], shared: Mapping[str, object], spec: KernelSpec) -> Assembly:
    symbols = [binary.symbol for binary in binaries]
    if len(set(symbols)) != len(symbols):
        raise InvalidValue("symbol", symbols, "every variant of a library has a symbol of its own")
    q, kv = spec.q_dtype.size, spec.kv_dtype.size
    align = Align(q=q, out=q, k=kv, v=kv, q_stride=1, out_stride=1, k_stride=1, v_stride=1, workspace=16)
    names = [f"{i}.o" for i in range(len(binaries))]
    extend_only: dict[str, object] = {}
    if spec.op in (Op.EXTEND, Op.VERIFY):
        from pagedgen.templates.tvm.extend import Shape

        sources = [binary.source for binary in binaries]
        extend_only = {"shapes": [Shape.of(spec, each.target, each.schedule) for each in sources]}
    source = (
        environment()
        .get_template("launcher/cpu.cc.j2")
        .render(
            **shared,
            binaries=tuple(binaries),
            symbols=symbols,
            align=align,
            max_kv_stride="INT64_MAX",
            **extend_only,
        )
    )
    files = tuple((name, b.file("kernel.o")) for name, b in zip(names, binaries, strict=True))
    return Assembly(source, files, tuple(names))


def flags(folder: Path) -> list[str]:
    """Compiler flags of every launcher: a shared library that exports its ABI and needs libtvm_ffi alone."""
    from tvm_ffi import libinfo

    return [
        "-std=c++17",
        "-O2",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-exceptions",
        "-fno-rtti",
        f"-ffile-prefix-map={folder}=.",  # the same inputs give the same bytes
        f"-I{libinfo.find_include_path()}",
        f"-I{libinfo.find_dlpack_include_path()}",
    ]


def libraries() -> list[str]:
    """What a launcher is linked against; libtvm_ffi by its file, since ``-L`` makes zig write a run path."""
    from tvm_ffi import libinfo

    return ["-Wl,--as-needed", "-Wl,-s", libinfo.find_libtvm_ffi(), "-lm", "-lpthread", "-ldl"]


def compile_library(assembly: Assembly, out: Path) -> Path:
    """Compile and publish a library: it appears at ``out`` whole or not at all.

    Raises:
        CompileError: with the compiler's last lines.
        HostCompilerMissing: there is no C++ compiler.
    """
    command = host_compiler()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".link-", dir=out.parent) as name:
        folder = Path(name).resolve()
        (folder / LAUNCHER).write_text(assembly.source, encoding="utf-8")
        for file, data in assembly.files:
            (folder / file).write_bytes(data)
        line = [*command, *flags(folder), LAUNCHER, *assembly.objects, "-o", "library.so", *libraries()]
        try:
            run = subprocess.run(
                line, cwd=folder, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
            )
        except subprocess.TimeoutExpired as error:
            raise CompileError(f"{command[0]} did not finish within {TIMEOUT_S} s") from error
        except OSError as error:
            raise HostCompilerMissing(f"{command[0]} does not start: {error}") from error
        if run.returncode:
            errors = [
                text for text in run.stderr.splitlines() if "error" in text.lower() or "undefined" in text
            ]
            tail = "\n".join((errors or run.stderr.splitlines())[-12:])
            raise CompileError(f"{shlex.join(command)} could not build the launcher:\n{tail}")
        (folder / "library.so").replace(out)
    return out


def link(binaries: Sequence[Binary], dispatch: Sequence[Rule], out: Path, *, embed: Embed = "both") -> Path:
    """Link the variants of one spec into a host library at ``out``; see :func:`assemble` for the arguments.

    Raises:
        InvalidValue, Unsupported: as :func:`assemble`.
        CompileError, HostCompilerMissing: as :func:`compile_library`.
    """
    return compile_library(assemble(binaries, dispatch, embed=embed), Path(out))
