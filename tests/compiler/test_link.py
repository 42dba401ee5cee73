"""Linking: what goes into a library, what it refuses, and what is left when it fails."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from pagedgen.compiler import link as link_module
from pagedgen.compiler.compile import compile_source
from pagedgen.compiler.link import Assembly, assemble, compile_library, host_compiler, link, portable_ptx
from pagedgen.compiler.render import render
from pagedgen.errors import (
    ArgumentError,
    CompileError,
    DeviceMissing,
    HostCompilerMissing,
    InvalidValue,
    PackDamaged,
    PackForeign,
    Unsupported,
)
from pagedgen.runtime.library import Library
from pagedgen.values.manifest import Rule
from pagedgen.values.target import Target

ALL = (Rule(2**31 - 1, 2**31 - 1, 0),)


@pytest.fixture(autouse=True)
def linked_anew(monkeypatch):
    """Here libraries are compiled each time, not copied (conftest's ``linked_once``)."""
    monkeypatch.setattr(link_module, "compile_library", compile_library)


@pytest.fixture
def compiler_search(monkeypatch):
    """Each test looks for the host compiler anew."""
    host_compiler.cache_clear()
    yield monkeypatch
    host_compiler.cache_clear()


def decode_arguments(spec, device="cpu"):
    """Right arguments but for the device."""
    q = torch.zeros(2, spec.num_q_heads, spec.head_dim, dtype=torch.float16, device=device)
    pool = torch.zeros(
        4, spec.block_size, spec.num_kv_heads, spec.head_dim, dtype=torch.float16, device=device
    )
    table = torch.zeros(2, 2, dtype=torch.int32, device=device)
    workspace = torch.zeros(1 << 22, dtype=torch.uint8, device=device)
    return [q, pool, pool, table, table[:, 0].contiguous(), q.clone(), None, 0.1, None, None, workspace, 4, 0]


@pytest.mark.parametrize(("kv", "lse", "heads"), [("f16", False, (32, 8)), ("fp8_e4m3", True, (14, 2))])
def test_real_kernels_for_named_gpus(tmp_path, make_spec, default_schedule, a100, h100, kv, lse, heads):
    spec = make_spec(128, heads, 16, "f16", kv, lse=lse)
    for target in (a100, h100):
        binary = compile_source(render(spec, target, default_schedule(spec, target)))
        out = link([binary], ALL, tmp_path / f"{target.name}.so")
        data = out.read_bytes()
        assert binary.file("kernel.cubin") in data
        # sm_90 code is for sm_90a, which no other architecture runs; sm_80's goes on to newer GPUs as PTX
        assert (binary.file("kernel.ptx") in data) == (target is a100)
        library = Library(out)
        with pytest.raises(ArgumentError, match=r"q\.device = cpu:0: a cuda device is expected"):
            library.decode(*decode_arguments(spec))


def parameters_in_launcher(source: str) -> list[str]:
    """Names of the kernel arguments that a rendered launcher passes, in order."""
    text = source.split("void* parameters[] = {")[1].split("};")[0]
    return [line.strip().removeprefix("&").removeprefix("call.").rstrip(",") for line in text.split() if line]


@pytest.mark.parametrize(
    ("kv", "lse"), [("f16", False), ("f16", True), ("fp8_e5m2", False), ("fp8_e5m2", True)]
)
def test_launcher_passes_what_the_kernel_takes(make_spec, default_schedule, gpu_binary, h100, kv, lse):
    """The argument list is in two places, the template's and the launcher's; they must not drift apart."""
    spec = make_spec(128, (32, 8), 16, "f16", kv, lse=lse)
    text = render(spec, h100, default_schedule(spec, h100)).text
    signature = text.split("def paged_decode(")[1].split("):")[0]
    kernel = [name.strip().removesuffix("_ptr") for name in signature.split(",") if name.strip()]
    launcher = parameters_in_launcher(assemble([gpu_binary(spec)], ALL).source)
    assert [n.replace("counters", "counter") for n in launcher] == [
        *kernel,
        "global_scratch",
        "profile_scratch",
    ]


@pytest.mark.parametrize(
    ("kv", "lse", "masks"), [("f16", False, {}), ("fp8_e5m2", True, {"sinks": True, "window": 100})]
)
def test_extend_launcher_passes_what_the_kernel_takes(
    make_spec, default_schedule, gpu_binary, h100, kv, lse, masks
):
    spec = make_spec(128, (32, 8), 16, "f16", kv, lse=lse, op="extend", **masks)
    text = render(spec, h100, default_schedule(spec, h100)).text
    signature = text.split("def paged_extend(")[1].split("):")[0]
    kernel = [name.strip().removesuffix("_ptr") for name in signature.split(",") if name.strip()]
    launcher = parameters_in_launcher(assemble([gpu_binary(spec)], ALL).source)
    assert launcher == [*kernel, "global_scratch", "profile_scratch"]


@pytest.mark.parametrize("kv", ["f16", "fp8_e4m3"])
@pytest.mark.parametrize("op", ["write_kv", "gather", "copy_blocks", "merge", "kv_scales"])
def test_launchers_of_moves_pass_what_the_kernel_takes(make_spec, default_schedule, gpu_binary, h100, op, kv):
    rope = {"rope": "neox"} if op == "write_kv" and kv != "f16" else {}
    if op == "kv_scales":
        rope, kv = {"block_size": 1}, "fp8_e4m3"
    more = {"block_size": 1, "kv": "f16", "sinks": kv != "f16"} if op == "merge" else {"kv": kv, **rope}
    if op in ("write_kv", "gather"):
        more["checked"] = kv != "f16"  # its launcher gives the record and the number of slots
    spec = make_spec(128, (8, 8), q=kv if op == "copy_blocks" else "f16", op=op, **more)
    text = render(spec, h100, default_schedule(spec, h100)).text
    signature = text.split(f"def paged_{op}(")[1].split("):")[0]
    kernel = [name.strip().removesuffix("_ptr") for name in signature.split(",") if name.strip()]
    source = assemble([gpu_binary(spec)], ALL).source
    given = source.split("void* parameters[] = {")[1].split("};")[0]
    given = "\n".join(line.split("//")[0] for line in given.splitlines())
    launcher = [
        name.strip().removeprefix("&").removeprefix("call.") for name in given.split(",") if name.strip()
    ]
    assert launcher == [*kernel, "global_scratch", "profile_scratch"]


def test_embedding(tmp_path, make_spec, gpu_binary):
    spec = make_spec()
    binary, bound = gpu_binary(spec), gpu_binary(spec, suffix="a")
    cubin = [name for name, _ in assemble([binary], ALL, embed="cubin").files]
    ptx = [name for name, _ in assemble([binary], ALL, embed="ptx").files]
    both = [name for name, _ in assemble([binary, bound], ALL).files]
    forced = [name for name, _ in assemble([bound], ALL, embed="ptx").files]
    assert (cubin, ptx, both, forced) == (["0.cubin"], ["0.ptx"], ["0.cubin", "0.ptx", "1.cubin"], ["0.ptx"])
    for embed in ("cubin", "ptx"):
        data = link([binary], ALL, tmp_path / f"{embed}.so", embed=embed).read_bytes()
        assert (binary.file("kernel.cubin") in data, binary.file("kernel.ptx") in data) == (
            embed == "cubin",
            embed == "ptx",
        )
    with pytest.raises(InvalidValue, match="embed = 'fatbin': allowed: both, cubin, ptx"):
        assemble([binary], ALL, embed="fatbin")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "portable"),
    [
        (b"//\n.version 8.7\n.target sm_80\n", True),
        (b".target sm_90a\n", False),
        (b".target sm_100f, debug\n", False),
        (b".target sm_120, debug\n", True),
        (b"no target", False),
    ],
)
def test_portable_ptx(text, portable):
    assert portable_ptx(text) is portable


def test_fifty_variants_in_one_library(tmp_path, make_spec, gpu_binary):
    spec = make_spec(128, (32, 8), 16, "f16", lse=True)
    binaries = [gpu_binary(spec, waves=1 + i % 8) for i in range(50)]
    library = Library(link(binaries, (), tmp_path / "many.so"))
    # 132 SMs x 8 waves over 8 KV heads are 132 partitions each; 4 rows of 128 + 1 floats; counters at the end
    slots = 8 * (132 + 3) * 4
    expected = sum(-(-n // 256) * 256 for n in (slots * 4, slots * 128 * 4, 8 * 3 * 4))
    if not torch.cuda.is_available():
        assert library.workspace_bytes(3) == expected
        with pytest.raises(DeviceMissing, match="driver"):
            library.prepare(0, 49)
    with pytest.raises(ArgumentError, match="variant = 50: -1 to 49 is allowed"):
        library.prepare(0, 50)


def test_a_group_of_more_than_128_heads_is_shared_by_programs(tmp_path, make_spec, gpu_binary):
    spec = make_spec(64, (160, 1), 16, "f16")
    library = Library(link([gpu_binary(spec, waves=2)], (), tmp_path / "mqa.so"))
    slots = 2 * (132 + 5) * 128  # two head blocks of 128 rows; 132 SMs x 2 waves over them
    expected = sum(-(-n // 256) * 256 for n in (slots * 4, slots * 64 * 4, 2 * 5 * 4))
    if not torch.cuda.is_available():
        assert library.workspace_bytes(5) == expected


def test_equal_shares_take_two_slots_each_whatever_the_batch(tmp_path, make_spec, gpu_binary):
    spec = make_spec(64, (8, 2), 16, "f16")
    library = Library(link([gpu_binary(spec, waves=2, split="even")], (), tmp_path / "even.so"))
    if torch.cuda.is_available():
        pytest.skip("workspace follows the GPU at hand")
    for num_seqs in (1, 1000):
        slots = 2 * (2 * 132) * 4  # 2 KV heads, each 132 shares of 2, 4 rows
        expected = sum(-(-n // 256) * 256 for n in (slots * 4, slots * 64 * 4, 2 * num_seqs * 4))
        assert library.workspace_bytes(num_seqs) == expected


def test_walking_takes_the_slots_of_the_pieces_it_finds(tmp_path, make_spec, gpu_binary):
    spec, sizes = make_spec(64, (8, 2), 16, "f16"), []
    for split in ("walk", "pieces"):
        library = Library(link([gpu_binary(spec, waves=2, split=split)], (), tmp_path / f"{split}.so"))
        sizes.append(library.workspace_bytes(7))
    assert sizes[0] == sizes[1]


def test_a_cluster_is_a_launch_s_and_leaves_other_launchers_alone(make_spec, gpu_binary):
    spec = make_spec()
    clusters = gpu_binary(spec, split="cluster", num_warps=2, tile=64, waves=1)
    source = assemble([gpu_binary(spec), clusters], ALL).source
    assert "{kClusterDimension, {static_cast<int>(variant.cluster), 1, 1}}" in source
    # a box of 16 warps' results: 4 rows of 16 columns, m and l; shared memory of both kinds is asked for
    assert f", 8, {16 * 4 * 18 * 4 // 1024 * 1024 + 1024}}}," in source
    assert source.count("variant.smem_bytes + variant.box_bytes") == 3
    assert "luster" not in assemble([gpu_binary(spec)], ALL).source


def test_fixed_splits_take_a_slot_for_every_part_of_every_sequence(tmp_path, make_spec, gpu_binary):
    spec = make_spec(64, (8, 2), 16, "f16", batch_invariant=True)
    library = Library(link([gpu_binary(spec, max_parts=parts) for parts in (16, 64)], (), tmp_path / "f.so"))
    if torch.cuda.is_available():
        pytest.skip("workspace follows the GPU at hand")
    for num_seqs in (1, 1000):
        slots = 2 * num_seqs * 64 * 4  # 2 KV heads, 64 parts at most, 4 rows
        expected = sum(-(-n // 256) * 256 for n in (slots * 4, slots * 64 * 4, 2 * num_seqs * 4))
        assert library.workspace_bytes(num_seqs) == expected


def test_what_cannot_be_linked(make_spec, gpu_binary, a100):
    spec = make_spec()
    one = gpu_binary(spec)
    with pytest.raises(InvalidValue, match=r"binaries = \(\): at least one is expected"):
        assemble([], ALL)
    with pytest.raises(InvalidValue, match=r"spec = .*one spec a library"):
        assemble([one, gpu_binary(make_spec(64))], ALL)
    with pytest.raises(InvalidValue, match="target = 'a100-80g': one target a library: h100-sxm"):
        assemble([one, gpu_binary(spec, a100)], ALL)
    invariant = gpu_binary(make_spec(batch_invariant=True))
    several = (Rule(4, 2**31 - 1, 0), Rule(2**31 - 1, 2**31 - 1, 1))
    with pytest.raises(
        InvalidValue, match=r"dispatch = \[0, 1\]: variants of one kernel are allowed: the batch must not"
    ):
        assemble([invariant, gpu_binary(make_spec(batch_invariant=True), max_parts=16)], several)
    assemble([invariant, gpu_binary(make_spec(batch_invariant=True), waves=6)], several)
    with pytest.raises(InvalidValue, match="variant = 1: 0 to 0 is allowed"):
        assemble([one], (Rule(1, 1, 1),))
    hip = Target("mi300x", "hip", "gfx942", 304)
    with pytest.raises(Unsupported, match="target kind hip"):
        assemble([replace(one, source=replace(one.source, target=hip))], ALL)


def test_cpu_variants_need_symbols_of_their_own(cpu_choice, make_spec):
    choice = cpu_choice(make_spec(64, (4, 2), 16, "f32"))
    with pytest.raises(InvalidValue, match="every variant of a library has a symbol of its own"):
        assemble([choice.binaries[0]] * 2, ALL)


def test_the_same_inputs_give_the_same_bytes(tmp_path, make_spec, gpu_binary):
    binary = gpu_binary(make_spec())
    one, other = (link([binary], ALL, tmp_path / name / "x.so").read_bytes() for name in ("a", "longer"))
    assert one == other


def test_what_a_library_needs_at_run_time(tmp_path, make_spec, gpu_binary, cpu_choice):
    choice = cpu_choice(make_spec(64, (4, 2), 16, "f32"))
    libraries = [
        link([gpu_binary(make_spec())], ALL, tmp_path / "gpu.so"),
        link(choice.binaries, choice.dispatch, tmp_path / "cpu.so"),
    ]
    for path in libraries:
        listed = subprocess.run(
            ["readelf", "-d", str(path)], capture_output=True, text=True, check=True
        ).stdout
        needed = {line.split("[")[1].rstrip("]") for line in listed.splitlines() if "(NEEDED)" in line}
        assert needed <= {"libtvm_ffi.so", "libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2"}
        assert "RPATH" not in listed and "RUNPATH" not in listed


def test_a_compiler_error_is_told_and_leaves_nothing(tmp_path):
    with pytest.raises(CompileError, match="nonsense"):
        compile_library(Assembly("nonsense here;\n", (), ()), tmp_path / "out" / "x.so")
    assert list((tmp_path / "out").iterdir()) == []


def test_no_compiler(compiler_search, tmp_path):
    compiler_search.delenv("CXX", raising=False)
    compiler_search.setenv("PATH", str(tmp_path))
    compiler_search.setattr(link_module, "find_spec", lambda name: None)
    with pytest.raises(HostCompilerMissing, match="install g\\+\\+ or clang, or run: pip install ziglang"):
        host_compiler()
    compiler_search.setattr(link_module, "find_spec", lambda name: object())
    host_compiler.cache_clear()
    assert host_compiler() == (sys.executable, "-m", "ziglang", "c++")


def test_named_compiler(compiler_search):
    compiler_search.setenv("CXX", "no-such-compiler -O3")
    with pytest.raises(HostCompilerMissing, match="CXX = 'no-such-compiler -O3': no such program"):
        host_compiler()
    compiler_search.setenv("CXX", "c++ -pipe")
    assert host_compiler() == ("c++", "-pipe")


def test_a_compiler_that_hangs(compiler_search, tmp_path):
    script = tmp_path / "slow"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    compiler_search.setenv("CXX", str(script))
    compiler_search.setattr(link_module, "TIMEOUT_S", 0.2)
    with pytest.raises(CompileError, match="did not finish within"):
        compile_library(Assembly("", (), ()), tmp_path / "x.so")


def test_links_of_one_path_at_a_time_by_many(tmp_path, make_spec, gpu_binary):
    binary, out = gpu_binary(make_spec()), tmp_path / "x.so"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: link([binary], ALL, out), range(4)))
    assert [p.name for p in tmp_path.iterdir()] == ["x.so"]
    assert Library(out).workspace_bytes(1) > 0


def test_what_is_no_library(tmp_path):
    text = tmp_path / "text.so"
    text.write_text("not an ELF file")
    with pytest.raises(PackForeign, match="does not load here"):
        Library(text)
    with pytest.raises(PackForeign, match="does not load here"):
        Library(tmp_path / "absent.so")
    empty = compile_library(Assembly("extern int x; int x;\n", (), ()), tmp_path / "empty.so")
    with pytest.raises(PackDamaged, match="decode"):
        Library(empty)


def test_threads_are_a_matter_of_cpu_libraries(tmp_path, make_spec, gpu_binary):
    library = Library(link([gpu_binary(make_spec())], ALL, tmp_path / "x.so"))
    with pytest.raises(InvalidValue, match=r"num_threads = 2: .* runs on a GPU"):
        library.set_num_threads(2)
