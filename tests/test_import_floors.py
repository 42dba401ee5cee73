"""Imports only go down (docs/architecture.md), read from the source of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pagedgen

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
ROOT = Path(pagedgen.__file__).parent

# Highest floor first; a module may import its own floor and those below. The package's face is on no floor:
# it imports on demand.
FLOORS = (
    ("pagedgen.cli", "pagedgen.integrations", "pagedgen.__main__"),
    ("pagedgen.autotune",),
    ("pagedgen.compiler", "pagedgen.templates"),
    ("pagedgen.runtime",),
    ("pagedgen.cache",),
    ("pagedgen.values", "pagedgen.errors"),
)

# What a floor may use beside the standard library and itself; nothing is said of the floors above. The values
# ask torch which device is present, when asked themselves.
ALLOWED = {
    "pagedgen.values": {"torch"},
    "pagedgen.errors": set(),
    "pagedgen.runtime": {"torch", "numpy", "tvm_ffi"},
}


def modules() -> dict[str, Path]:
    """Every module of the package by name; the linked folders included."""
    found = {}
    for path in ROOT.rglob("*.py"):
        found[name_of(path)] = path
    for link in (p for p in ROOT.iterdir() if p.is_symlink()):
        for path in link.resolve().rglob("*.py"):
            found[name_of(ROOT / link.name / path.relative_to(link.resolve()))] = path
    return found


def name_of(path: Path) -> str:
    parts = ("pagedgen", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST, module: str, is_package: bool) -> set[str]:
    """Absolute names of what a module imports anywhere, but for type checkers only."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def floor_of(name: str) -> int | None:
    for level, prefixes in enumerate(FLOORS):
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes):
            return level
    return None


def test_every_folder_has_its_floor():
    assert [name for name in modules() if name != "pagedgen" and floor_of(name) is None] == []
    assert {"pagedgen.runtime.pack", "pagedgen.templates.family", "pagedgen.values.spec"} <= set(modules())


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_only_go_down(name):
    path = modules()[name]
    found = imports_of(ast.parse(path.read_text(encoding="utf-8")), name, path.name == "__init__.py")
    level = floor_of(name)
    if level is not None:
        up = {other for other in found if (there := floor_of(other)) is not None and there < level}
        assert not up, f"{name} imports from above: {', '.join(sorted(up))}"
    for prefix, allowed in ALLOWED.items():
        if name == prefix or name.startswith(f"{prefix}."):
            foreign = (
                {other.partition(".")[0] for other in found} - set(sys.stdlib_module_names) - {"pagedgen", ""}
            )
            assert foreign <= allowed, f"{name} imports {', '.join(sorted(foreign - allowed))}"


def test_the_reader_of_imports_sees_them_all():
    text = """
import os, pagedgen.cli.app as x
from pagedgen import autotune
from . import sibling
from ..values.spec import DType
if TYPE_CHECKING:
    import hidden
def late():
    from pagedgen.compiler import render
"""
    found = imports_of(ast.parse(text), "pagedgen.runtime.pack", False)
    assert {"pagedgen.cli.app", "pagedgen.autotune", "pagedgen.runtime.sibling"} <= found
    assert {"pagedgen.values.spec", "pagedgen.compiler.render", "os"} <= found
    assert "hidden" not in found
    assert (floor_of("pagedgen.cli.app"), floor_of("pagedgen.values"), floor_of("torch")) == (0, 5, None)


def test_importing_the_face_imports_nothing_heavy():
    heavy = ("torch", "numpy", "tvm_ffi", "jinja2")
    code = f"import pagedgen, sys; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sorted(n for n in modules() if n.startswith("pagedgen.values")))
def test_importing_values_takes_the_standard_library_alone(name):
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    top = imports_of(ast.Module([n for n in tree.body if not isinstance(n, FUNCTIONS)], []), name, False)
    outside = {other.partition(".")[0] for other in top} - set(sys.stdlib_module_names)
    assert outside <= {"pagedgen"}


def test_public_names():
    assert sorted(pagedgen._PLACES) == sorted(set(pagedgen.__all__) - {"__version__"})
    for name in pagedgen.__all__:
        assert getattr(pagedgen, name) is not None
    assert set(dir(pagedgen)) >= set(pagedgen.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        pagedgen.nonsense  # noqa: B018
