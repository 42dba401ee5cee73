"""The hash that says which kernel a record is of: what changes it, and what doesn't."""

from __future__ import annotations

from collections.abc import Callable

import jinja2
import pytest

from pagedgen.compiler import kernel_hash as module
from pagedgen.compiler import triton, tvm
from pagedgen.compiler.kernel_hash import cpp_code, kernel_hash, python_code
from pagedgen.compiler.space import default_schedule, feasible
from pagedgen.templates.family import TEMPLATES
from pagedgen.values.target_table import target


@pytest.fixture(autouse=True)
def _fresh():
    kernel_hash.cache_clear()
    yield
    kernel_hash.cache_clear()


def hash_of(spec, where) -> str:
    kernel_hash.cache_clear()
    return kernel_hash(spec, where, default_schedule(spec, where))


@pytest.fixture
def edit(monkeypatch) -> Callable[[str, str, str], None]:
    """Replace a text in a template, for the rest of the test."""

    def to(name: str, old: str, new: str) -> None:
        text = (TEMPLATES / name).read_text(encoding="utf-8")
        assert text.count(old) >= 1
        edited = jinja2.DictLoader({name: text.replace(old, new)})
        environment = jinja2.Environment(
            loader=jinja2.ChoiceLoader([edited, jinja2.FileSystemLoader(TEMPLATES)]),
            undefined=jinja2.StrictUndefined,
            keep_trailing_newline=True,
        )
        for place in ("pagedgen.compiler.render", "pagedgen.compiler.link"):
            monkeypatch.setattr(f"{place}.environment", lambda: environment)

    return to


def test_it_is_of_the_spec_the_schedule_and_the_architecture(make_spec, h100):
    spec = make_spec()
    schedules = feasible(spec, h100)[:40]
    assert len({kernel_hash(spec, h100, s) for s in schedules}) == len(schedules)
    assert hash_of(spec, h100) != hash_of(make_spec(block_size=64), h100)
    one = default_schedule(spec, h100)
    assert kernel_hash(spec, h100, one) != kernel_hash(spec, target("b200"), one)


def test_an_edit_counts_where_it_is_rendered(make_spec, h100, edit):
    f16, fp8 = make_spec(), make_spec(kv="fp8_e4m3")
    before = hash_of(f16, h100), hash_of(fp8, h100)
    edit("triton/fp8.j2", "prmt.b32", "prmt.b32 ")
    assert hash_of(f16, h100) == before[0] and hash_of(fp8, h100) != before[1]
    edit("triton/decode.py.j2", "import triton.language as tl", "import triton.language as tl\nONE = 1")
    assert hash_of(f16, h100) != before[0]


def test_comments_versions_and_messages_do_not_count(make_spec, h100, edit, monkeypatch):
    spec = make_spec()
    before = hash_of(spec, h100)
    monkeypatch.setattr("pagedgen.__version__", "0.2.0")
    assert hash_of(spec, h100) == before
    edit("triton/decode.py.j2", "import triton.language as tl", "import triton.language as tl  # why")
    assert hash_of(spec, h100) == before
    edit("launcher/gpu.cc.j2", "which does not run there", "which cannot run there")
    assert hash_of(spec, h100) == before
    edit("launcher/gpu.cc.j2", "namespace {", "namespace {\nconstexpr int kOne = 1;")
    assert hash_of(spec, h100) != before, "the launcher decides the grid"


def test_what_the_compiler_is_told_counts(make_spec, h100, monkeypatch):
    spec, cpu_spec, cpu = make_spec(), make_spec(kv="f32", q="f32", k_inner="token"), target("cpu")
    before, on_cpu = hash_of(spec, h100), hash_of(cpu_spec, cpu)
    monkeypatch.setattr(triton, "options_of", lambda schedule: {"num_warps": 8, "num_stages": 9})
    assert hash_of(spec, h100) != before
    monkeypatch.undo()
    monkeypatch.setattr(triton, "alignment_of", lambda spec, name: 4 if name == "k_ptr" else 16)
    assert hash_of(spec, h100) != before
    monkeypatch.undo()
    assert (hash_of(spec, h100), hash_of(cpu_spec, cpu)) == (before, on_cpu)
    monkeypatch.setitem(tvm.MACHINES, cpu.arch, tvm.Machine("x86_64-linux-gnu", "another"))
    assert hash_of(cpu_spec, cpu) != on_cpu


def test_a_target_without_a_launcher_has_hashes_too(make_spec):
    assert len(hash_of(make_spec(), target("mi300x"))) == 12


def test_python_code_keeps_code_and_strings():
    text = '"""Header 0.1.0"""\n\n# about\nX = "# kept"  # not kept\n\n\n'
    text += 'def f():\n    """Doc\n\n    string."""\n    return """a\nb"""\n'
    assert python_code(text) == 'X = "# kept"\ndef f():\n    return """a\nb"""'


def test_cpp_code_keeps_code_and_no_words():
    text = (
        '// Rendered by 0.1.0\nint a; /* one\n two */ const char* b = "x // y \\" z";\n\n  f("//");  // why\n'
    )
    assert cpp_code(text) == 'int a;  const char* b = "";\nf("");'
    assert module.CPP.sub("", "a / b * c") == "a / b * c"
