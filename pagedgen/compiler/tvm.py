"""Rendered TIR → object file, by TVM's LLVM backend. The one module that touches TVM.

Only code generation is used: the object needs neither TVM nor Python, and it can be for another processor.
"""

from __future__ import annotations

import ast
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagedgen.compiler.binary import Binary, Source
from pagedgen.errors import CompileError, ToolMissing
from pagedgen.templates.tvm.vectors import symbol_of
from pagedgen.values.record import Resources


@dataclass(frozen=True, slots=True)
class Machine:
    """What LLVM is told of an instruction-set level."""

    triple: str
    cpu: str
    features: tuple[str, ...] = ()


# avx512bf16 stands for the server cores that have it beside VBMI: Zen 4, Sapphire Rapids and newer.
MACHINES = {
    "x86_64-avx512bf16": Machine(
        "x86_64-linux-gnu", "x86-64-v4", ("+avx512bf16", "+avx512vbmi", "+avx512vbmi2")
    ),
    "x86_64-avx512": Machine("x86_64-linux-gnu", "x86-64-v4"),
    "x86_64-avx2": Machine("x86_64-linux-gnu", "x86-64-v3"),
    "aarch64-neon": Machine("aarch64-linux-gnu", "generic", ("+neon", "+fullfp16")),
}


def compile_tvm(source: Source) -> Binary:
    """Compile for ``source.target.arch``, whichever processor this is.

    The object defines C functions named ``<symbol>_…``, which the launcher of the operator calls.

    Raises:
        CompileError: TVM or LLVM refused it.
        ToolMissing: TVM is not installed.
    """
    try:
        import tvm
        from tvm import tirx
        from tvm.script import ir
        from tvm.script import tirx as script
    except ImportError as error:
        raise ToolMissing("apache-tvm", "cpu") from error
    machine = MACHINES[source.target.arch]
    target = tvm.target.Target(
        {"kind": "llvm", "mtriple": machine.triple, "mcpu": machine.cpu, "mattr": list(machine.features)}
    )
    constants, module_text = split(source.text)
    # TVM's default pipeline moves local arrays to the heap and makes them share memory, which costs 4.7x;
    # this one leaves them to LLVM, which keeps them in registers. Plain C functions need nothing else of it.
    passes = tvm.ir.transform.Sequential(
        [
            tirx.transform.BindTarget(target.with_host(target)),
            tirx.transform.FlattenBuffer(),
            tirx.transform.VectorizeLoop(True),
            tirx.transform.UnrollLoop(),
            tirx.transform.StmtSimplify(),
            tirx.transform.RemoveNoOp(),
            tirx.transform.LowerIntrin(),
        ]
    )
    try:
        module = tvm.script.from_source(module_text, extra_vars={"T": script, "I": ir, **constants})
        compiled = tvm.get_global_func("target.build.llvm")(passes(module), target)
        with tempfile.TemporaryDirectory(prefix="pagedgen-") as folder:
            path = Path(folder) / "kernel.o"
            compiled.write_to_file(str(path))
            code = path.read_bytes()
    except Exception as error:  # TVM raises many kinds, all meaning "not this candidate"
        lines = str(error).strip().splitlines()[-5:]
        raise CompileError(f"{source.schedule.name}: " + "\n".join(lines)) from error
    return Binary(
        source,
        symbol_of(source.spec, source.schedule),
        (("kernel.o", code),),
        Resources(code_bytes=len(code)),
        f"tvm {tvm.__version__}",
    )


def split(text: str) -> tuple[dict[str, Any], str]:
    """The constants that a rendered module assigns, and the text of its one class with its decorator."""
    constants: dict[str, Any] = {}
    module = ""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constants[node.targets[0].id] = ast.literal_eval(node.value)
        elif isinstance(node, ast.ClassDef):
            first = min(d.lineno for d in node.decorator_list)
            module = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
    return constants, module
