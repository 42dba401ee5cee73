"""A pack is loaded and called by a process that can import none of the tools that made it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest

BLOCKED = (
    "triton", "tvm", "optuna", "sympy", "jinja2", "typer", "rich", "platformdirs", "scipy", "matplotlib"
)  # fmt: skip
# Preloaded: once PAGEDGEN_TRAP is set, whatever would start a process ends this one instead. No headers:
# their declarations are not these.
TRAP = """
extern char *getenv(const char *);
extern int dprintf(int, const char *, ...);
extern void _exit(int), *dlsym(void *, const char *);
static void check(const char *name) {
  if (!getenv("PAGEDGEN_TRAP")) return;
  dprintf(2, "trapped: %s\\n", name);
  _exit(77);
}
#define TRAP(type, name, parameters, arguments)                          \\
  type name parameters {                                                 \\
    check(#name);                                                        \\
    return ((type(*) parameters)dlsym(((void *)-1l), #name)) arguments;  \\
  }
TRAP(int, fork, (void), ())
TRAP(int, vfork, (void), ())
TRAP(int, _Fork, (void), ())
TRAP(int, system, (const char *c), (c))
TRAP(void *, popen, (const char *c, const char *m), (c, m))
TRAP(int, execve, (const char *p, void *a, void *e), (p, a, e))
TRAP(int, execv, (const char *p, void *a), (p, a))
TRAP(int, execvp, (const char *p, void *a), (p, a))
TRAP(int, posix_spawn, (void *i, void *p, void *f, void *a, void *v, void *e), (i, p, f, a, v, e))
TRAP(int, posix_spawnp, (void *i, void *p, void *f, void *a, void *v, void *e), (i, p, f, a, v, e))
"""
SERVE = """
    import json, sys, time
    from importlib.abc import MetaPathFinder

    blocked = set(sys.argv[2].split(","))

    class Block(MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in blocked:
                raise ModuleNotFoundError(f"{name} is blocked", name=name)
            return None

    sys.meta_path.insert(0, Block())
    start = time.perf_counter()
    import pagedgen
    import_s = time.perf_counter() - start
    import torch, tvm_ffi
    start = time.perf_counter()
    attention = pagedgen.load(sys.argv[1])
    spec = attention.specs[0]
    q = torch.randn(2, spec.num_q_heads, spec.head_dim)
    k = torch.randn(4, spec.block_size, spec.num_kv_heads, spec.head_dim)
    table = torch.tensor([[1, 0], [3, 2]], dtype=torch.int32)
    lens = torch.tensor([20, 32], dtype=torch.int32)
    out = attention.decode(q, k, k, table, lens)
    load_s = time.perf_counter() - start
    keys = torch.cat([k[1], k[0]])[:20].repeat_interleave(spec.group_size, 1)
    weights = torch.softmax(torch.einsum("hd,thd->ht", q[0], keys) * spec.head_dim**-0.5, -1)
    error = (torch.einsum("ht,thd->hd", weights, keys) - out[0]).abs().max().item()
    loaded = sorted({name.partition(".")[0] for name in sys.modules} & blocked)
    inner = sorted(name for name in sys.modules if name.startswith("pagedgen."))
    report = {"error": error, "loaded": loaded, "inner": inner, "load_s": load_s, "import_s": import_s}
    print(json.dumps(report))
"""


def serve(pack) -> dict[str, object]:
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SERVE), str(pack), ",".join(BLOCKED)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def report(cpu_choice, make_spec, tmp_path_factory):
    from pagedgen.compiler.build import build

    choice = cpu_choice(make_spec(64, (8, 2), 16, "f32"))
    return serve(build([choice], tmp_path_factory.mktemp("isolated") / "x.pack"))


def test_it_works(report):
    assert report["error"] < 1e-5


def test_no_tool_is_imported(report):
    assert report["loaded"] == []


def test_only_the_runtime_and_the_values_are_imported(report):
    floors = ("pagedgen.runtime", "pagedgen.values", "pagedgen.errors")
    assert [name for name in report["inner"] if not name.startswith(floors)] == []


def test_loading_and_calling_is_fast(report):
    """Under 100 ms is promised on an idle machine (10 ms measured); tests share theirs."""
    assert report["load_s"] < 0.5
    assert report["import_s"] < 0.1  # of pagedgen itself; torch is not imported by it


def test_the_block_works():
    """The test above would pass for nothing if the finder did not block."""
    code = textwrap.dedent(SERVE).split("start = ")[0] + "\nimport jinja2\n"
    run = subprocess.run(
        [sys.executable, "-c", code, "", "jinja2"], capture_output=True, text=True, check=False, timeout=60
    )
    assert "jinja2 is blocked" in run.stderr


@pytest.fixture(scope="module")
def trap(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("a C compiler and LD_PRELOAD are needed")
    folder = tmp_path_factory.mktemp("trap")
    (folder / "trap.c").write_text(TRAP, encoding="utf-8")
    command = [compiler, "-w", "-shared", "-fPIC", "-fno-builtin", "trap.c", "-o", "trap.so", "-ldl"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "trap.so"


def trapped(trap, code: str, *arguments: object, **environment: str):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, "LD_PRELOAD": str(trap), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_serving_process_starts_no_process_and_no_compiler(trap, cpu_pack, tmp_path):
    """Loading, decoding by method and by operator, writing: with torch's own imports done, nothing starts."""
    code = """
        import os, sys
        import torch
        os.environ["PAGEDGEN_TRAP"] = "1"
        import pagedgen
        from pagedgen.runtime import ops
        from pagedgen.runtime.kv_cache import KVCache, KVShape
        from pagedgen.values.spec import DType

        attention = pagedgen.load(sys.argv[1])
        spec = next(s for s in attention.specs if s.kv_dtype == "f32" and not s.return_lse)
        cache = KVCache(KVShape(1, spec.num_kv_heads, spec.head_dim, spec.block_size, DType.F32), 4)
        new = torch.randn(20, spec.num_kv_heads, spec.head_dim)
        cache.write_kv(0, new, new, torch.arange(20))
        q = torch.randn(1, spec.num_q_heads, spec.head_dim)
        table, lens = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([20], dtype=torch.int32)
        out = attention.decode(q, cache.k[0], cache.v[0], table, lens, spec=spec)
        again = ops.bind(attention, spec)(q, cache.k[0], cache.v[0], table, lens)
        assert torch.equal(out, again) and out.abs().sum() > 0
        tools = {"triton", "tvm", "optuna", "sympy", "jinja2", "torch.utils.cpp_extension"}
        print("served", sorted(tools & set(sys.modules) - set(sys.argv[2].split(","))))
    """
    # What torch imports by itself, sympy and Triton where any custom operator is called, is none of ours.
    plain = """
        import sys, torch, tvm_ffi, pagedgen

        @torch.library.custom_op("test::same", mutates_args=())
        def same(x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        same(torch.zeros(1))
        print(",".join(sys.modules))
    """
    listed = trapped(trap, plain).stdout.strip()
    assert "torch" in listed
    nowhere = tmp_path / "cache"
    run = trapped(trap, code, cpu_pack, listed, PAGEDGEN_CACHE_DIR=str(nowhere))
    assert (run.returncode, run.stdout.strip()) == (0, "served []"), run.stderr
    assert not nowhere.exists()  # nor is anything kept for later


@pytest.mark.parametrize(
    "start",
    [
        "subprocess.run(['true'])",
        "os.fork()",
        "os.system('true')",
        "os.posix_spawn('/bin/true', ['true'], {})",
    ],
)
def test_the_trap_works(trap, start):
    """The test above would pass for nothing if it did not."""
    code = f"import os, subprocess; os.environ['PAGEDGEN_TRAP'] = '1'; {start}; print('started')"
    run = trapped(trap, code)
    assert run.returncode == 77 and "trapped: " in run.stderr and "started" not in run.stdout
