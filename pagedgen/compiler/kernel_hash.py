"""What a kernel is, as a short hash: records say by it which kernel was timed.

It is taken over what is rendered, not over the templates' files: an edit for other specs leaves the kernels
of this one, and their records, as they were. Comments and docstrings don't count (they hold versions), nor do
the launcher's messages; the launcher itself does: it decides the grid and, on a CPU, shares out the work.
"""

from __future__ import annotations

import ast
import hashlib
import io
import re
import tokenize
from functools import lru_cache

from pagedgen.compiler.binary import Binary, Source
from pagedgen.compiler.link import assemble
from pagedgen.compiler.render import render
from pagedgen.values.record import Resources
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec
from pagedgen.values.target import Target

CACHED = 65536  # hashes kept in a process; rendering a kernel and its launcher takes about 4 ms
CPP = re.compile(r'(?P<text>"(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/', re.DOTALL)


@lru_cache(maxsize=CACHED)
def kernel_hash(spec: KernelSpec, target: Target, schedule: Schedule) -> str:
    """First 12 hex digits of the SHA-256 over the kernel's code, its compilation's options and its launcher.

    Raises:
        Unsupported: no template covers the spec on this target.
    """
    source = render(spec, target, schedule)
    digest = hashlib.sha256()
    for part in (target.arch, python_code(source.text), *_beside(source), _launcher(source)):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:12]


def python_code(text: str) -> str:
    """Python source without comments, docstrings and blank lines."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                for row in range(first.lineno, (first.end_lineno or first.lineno) + 1):
                    lines[row - 1] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


def cpp_code(text: str) -> str:
    """C++ source without comments and blank lines, every string literal empty."""
    bare = CPP.sub(lambda found: '""' if found["text"] else "", text)
    return "\n".join(line.strip() for line in bare.splitlines() if line.strip())


def _beside(source: Source) -> tuple[str, ...]:
    """What the compiler is told beside the text."""
    if source.target.kind == "cpu":
        from pagedgen.compiler.tvm import MACHINES

        return (repr(MACHINES[source.target.arch]),)
    from pagedgen.compiler.triton import alignment_of, options_of, signature_of

    names = _arguments(source)
    types = signature_of(source.spec, names)
    told = [f"{name}: {types[name]} % {alignment_of(source.spec, name)}" for name in names]
    return (*told, *(f"{name}={value}" for name, value in options_of(source.schedule).items()))


def _arguments(source: Source) -> list[str]:
    """Names of the arguments of a rendered Triton kernel."""
    for node in ast.parse(source.text).body:
        if isinstance(node, ast.FunctionDef) and node.name == _symbol(source):
            return [argument.arg for argument in node.args.args]
    raise AssertionError(f"{source.spec.name}: the rendered module has no function {_symbol(source)}")


def _symbol(source: Source) -> str:
    if source.target.kind == "cpu":
        from pagedgen.templates.tvm.vectors import symbol_of

        return symbol_of(source.spec, source.schedule)
    return f"paged_{source.spec.op}"


def _launcher(source: Source) -> str:
    """The launcher's code of a library that holds this kernel alone; what compiling gives is left out."""
    if source.target.kind == "hip":
        return ""  # there is none
    files = tuple((f"kernel.{kind}", b"") for kind in ("cubin", "ptx", "o"))
    warps = 0 if source.target.kind == "cpu" else source.schedule.int("num_warps")
    binary = Binary(source, _symbol(source), files, Resources(), "", warps)
    return cpp_code(assemble((binary,), (), embed="cubin").source)
