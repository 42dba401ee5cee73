"""source → binary, by the compiler of the target's kind."""

from __future__ import annotations

from pagedgen.compiler.binary import Binary, Source


def compile_source(source: Source) -> Binary:
    """Compile a rendered kernel for its target; the target need not be present.

    Raises:
        CompileError: with the compiler's last lines.
        ToolMissing: the compiler is not installed.
    """
    if source.target.kind == "cpu":
        from pagedgen.compiler.tvm import compile_tvm

        return compile_tvm(source)
    from pagedgen.compiler.triton import compile_triton

    return compile_triton(source)


def compiler_version(kind: str) -> str:
    """``triton 3.7.1`` or ``tvm 0.27.0``: what :func:`compile_source` would use for this kind of target."""
    from importlib.metadata import PackageNotFoundError, version

    from pagedgen.errors import ToolMissing

    package, extra = ("apache-tvm", "cpu") if kind == "cpu" else ("triton", "tune")
    try:
        return f"{package.removeprefix('apache-')} {version(package)}"
    except PackageNotFoundError:
        raise ToolMissing(package, extra) from None
