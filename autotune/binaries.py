"""Compiled candidates, kept by content: a run that is started again compiles nothing twice.

The key is a hash of everything that decides the outcome: source text, schedule (warps and stages are options,
not text), template hash, target and compiler version. Failures are kept too; time-outs and crashes are not,
they may have been the machine's fault. A damaged file counts as missing.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pagedgen.autotune.paths import publish, user_cache
from pagedgen.autotune.worker import Pool
from pagedgen.compiler.binary import Binary, Source
from pagedgen.compiler.compile import compile_source, compiler_version
from pagedgen.compiler.families import family_for, template_hash
from pagedgen.compiler.render import render
from pagedgen.errors import CacheUnwritable, CompileError, InvalidValue
from pagedgen.values import codec
from pagedgen.values.record import Resources
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target import Target

COMPILE_S = 120.0  # limit for one candidate; Triton takes 0.2-0.7 s, TVM 0.8 s
META = "binary.json"


@dataclass(frozen=True, slots=True)
class Compiled:
    """A candidate after compilation: a usable binary, or the reason why there is none."""

    source: Source
    binary: Binary | None
    reason: str = ""
    fresh: bool = True  # compiled now, not found in the cache

    @classmethod
    def of(cls, binary: Binary, fresh: bool) -> Compiled:
        """A binary that spills more than its family allows is refused: decode has no memory time to spare."""
        spilled = binary.resources.spill_bytes
        spec, target = binary.source.spec, binary.source.target
        if spilled > family_for(spec, target).spills(spec):
            return cls(binary.source, None, f"spills {spilled} B a thread", fresh)
        return cls(binary.source, binary, "", fresh)


@dataclass(frozen=True, slots=True)
class _Meta:
    symbol: str
    compiler: str
    num_warps: int
    resources: Resources
    error: str = ""


class BinaryCache:
    """Compiled kernels below ``folder``, one zip file each."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder if folder is not None else user_cache() / "binaries"

    def path(self, source: Source, compiler: str) -> Path:
        """The file of a source compiled by a compiler (``triton 3.7.1``)."""
        target = source.target
        # Alignments and options that the text does not show are decided by what the template hash covers.
        template = template_hash(family_for(source.spec, target))
        digest = hashlib.sha256()
        for part in (compiler, template, target.arch, target.name, source.schedule.name, source.text):
            digest.update(part.encode() + b"\0")
        name = digest.hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.zip"

    def get(self, source: Source, compiler: str) -> Compiled | None:
        """What is known of a source, None when nothing is."""
        path = self.path(source, compiler)
        try:
            with zipfile.ZipFile(path) as archive:  # reading checks the CRC of each member
                meta = codec.decode(_Meta, json.loads(archive.read(META)))
                files = tuple((n, archive.read(n)) for n in archive.namelist() if n.startswith("kernel."))
        except (OSError, zipfile.BadZipFile, KeyError, ValueError, EOFError, InvalidValue):
            return None
        if meta.error:
            return Compiled(source, None, meta.error, fresh=False)
        binary = Binary(source, meta.symbol, files, meta.resources, meta.compiler, meta.num_warps)
        return Compiled.of(binary, fresh=False)

    def put(self, source: Source, compiler: str, outcome: Binary | CompileError) -> None:
        """Keep an outcome; a cache that cannot be written is no reason to stop."""
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
            if isinstance(outcome, Binary):
                meta = _Meta(outcome.symbol, outcome.compiler, outcome.num_warps, outcome.resources)
                for name, content in outcome.files:
                    archive.writestr(name, content)
            else:
                meta = _Meta("", compiler, 0, Resources(), str(outcome) or type(outcome).__name__)
            archive.writestr(META, codec.dumps(meta))
            archive.writestr("source.py", source.text)
        with suppress(CacheUnwritable):
            publish(self.path(source, compiler), data.getvalue())


def compile_one(spec: KernelSpec, target: Target, schedule: Schedule) -> Binary:
    """The binary of a schedule, from the user's cache where it is there; compiled in this process.

    Raises:
        CompileError: it does not compile, or it spills.
        ToolMissing: the compiler is not installed.
    """
    cache, source = BinaryCache(), render(spec, target, schedule)
    compiler = compiler_version(target.kind)
    known = cache.get(source, compiler)
    if known is None:
        binary = compile_source(source)
        cache.put(source, compiler, binary)
        known = Compiled.of(binary, fresh=True)
    if known.binary is None:
        raise CompileError(f"{schedule.name}: {known.reason}")
    return known.binary


def compile_all(sources: Sequence[Source], pool: Pool, cache: BinaryCache) -> Iterator[Compiled]:
    """Compile candidates in parallel, those in the cache excepted; one outcome each, in order.

    Raises:
        ToolMissing: the compiler is not installed.
    """
    if not sources:
        return
    compiler = compiler_version(sources[0].target.kind)
    known = {source: cache.get(source, compiler) for source in sources}
    done = pool.map(compile_source, [s for s, c in known.items() if c is None], COMPILE_S)
    for source in sources:
        compiled = known[source]
        if compiled is None:
            result = next(done)
            if isinstance(result.value, Binary):
                compiled = Compiled.of(result.value, fresh=True)
                cache.put(source, compiler, result.value)
            else:
                compiled = Compiled(source, None, str(result.error))
                if isinstance(result.error, CompileError):
                    cache.put(source, compiler, result.error)
            known[source] = compiled
        yield compiled
