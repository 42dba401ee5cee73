"""The GPU launcher under a made-up driver: what it loads, launches and passes, with no GPU.

The driver (fake_cuda/driver.c) stands in for libcuda.so.1 in a process of its own and writes down every call.
That the kernels then compute attention is shown on real GPUs (tests/gpu).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pagedgen.compiler.link import host_compiler, link
from pagedgen.compiler.triton import signature_of
from pagedgen.errors import HostCompilerMissing
from pagedgen.values.manifest import Rule

HERE = Path(__file__).parent / "fake_cuda"
H100, A100, RTX4090, B200 = "90:132:232448", "80:108:166912", "89:128:101376", "100:148:232448"
RULES = (Rule(4, 2**31 - 1, 0), Rule(2**31 - 1, 2**31 - 1, 1))
NAMES = tuple(
    """
    q k v block_table seq_lens out lse k_scale v_scale partial partial_lse counter
    qk_scale num_seqs partitions q_stride_seq q_stride_head out_stride_seq out_stride_head
    k_stride_block k_stride_token k_stride_head v_stride_block v_stride_token v_stride_head
    block_table_stride global_scratch profile_scratch
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Run:
    """What came of the steps, and the driver's notes."""

    results: list[dict[str, object]]
    notes: list[str]

    @property
    def launches(self) -> list[dict[str, object]]:
        """Each launch: symbol, grid, block, smem, stream, context and the arguments by name."""
        found = []
        for note in (n for n in self.notes if n.startswith("launch ")):
            head, _, arguments = note.partition(" args ")
            words = head.split()
            found.append(
                {
                    "symbol": words[1],
                    "grid": tuple(map(int, words[3:6])),
                    "block": tuple(map(int, words[7:10])),
                    "smem": int(words[11]),
                    "context": words[15],
                    "arguments": [float(a) for a in arguments.split()],
                }
            )
        return found


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    """A folder with the made-up libcuda.so.1."""
    folder = tmp_path_factory.mktemp("driver")
    try:
        command = host_compiler()
    except HostCompilerMissing:
        pytest.skip("no compiler")
    line = [*command, "-x", "c", "-shared", "-fPIC", "-w", str(HERE / "driver.c"), "-o", "libcuda.so.1"]
    subprocess.run(line, cwd=folder, check=True)
    return folder


@pytest.fixture
def serve(driver, tmp_path):
    """Run steps on a library under the made-up driver."""

    def run(library: Path, steps, *, devices: str = H100, fail: str = "", types: str = "") -> Run:
        log = tmp_path / "log"
        log.write_text("")
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": f"{driver}:{os.environ.get('LD_LIBRARY_PATH', '')}",
            "FAKE_CUDA_LOG": str(log),
            "FAKE_CUDA_DEVICES": devices,
            "FAKE_CUDA_FAIL": fail,
            "FAKE_CUDA_TYPES": types,
        }
        done = subprocess.run(
            [sys.executable, str(HERE / "serve.py"), str(library)],
            input=json.dumps(steps),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return Run(json.loads(done.stdout), log.read_text().splitlines())

    return run


def made(address, kind, bits, shape, strides=None, device=0):
    """A made-up tensor, contiguous unless strides are given."""
    if strides is None:
        strides, step = [], 1
        for size in reversed(shape):
            strides.insert(0, step)
            step *= size
    return {
        "address": address,
        "kind": kind,
        "bits": bits,
        "shape": list(shape),
        "strides": list(strides),
        "device": device,
    }


def arguments_for(spec, num_seqs=3, *, variant=-1, device=0, workspace=1 << 26):
    """Arguments of decode: distinct addresses and strides, the K and V of a packed head-major pool."""
    heads, dim, block = spec.num_kv_heads, spec.head_dim, spec.block_size
    pool = (50, block, heads, dim)
    strides = (heads * block * 2 * dim, 2 * dim, block * 2 * dim, 1)
    kv = ("e4m3", 8) if spec.kv_dtype.is_fp8 else ("float", 16)
    row = (num_seqs, spec.num_q_heads, dim)
    scale = made(0x8000, "float", 32, (1,), device=device) if spec.kv_dtype.is_fp8 else None
    other = made(0x9000, "float", 32, (1,), device=device) if spec.kv_dtype.is_fp8 else None
    return [
        made(0x1000, "float", 16, row, (spec.num_q_heads * dim + 64, dim, 1), device),
        made(0x2000, *kv, pool, strides, device),
        made(0x3000, *kv, pool, strides, device),
        made(0x4000, "int", 32, (num_seqs, 10), (16, 1), device),
        made(0x5000, "int", 32, (num_seqs,), device=device),
        made(0x6000, "float", 16, row, (dim, num_seqs * dim, 1), device),
        made(0x7000, "float", 32, row[:2], device=device) if spec.return_lse else None,
        0.5,
        scale,
        other,
        made(0x100000, "uint", 8, (workspace,), device=device),
        100,
        variant,
    ]


def names_of(spec) -> list[str]:
    skip = set() if spec.return_lse else {"lse"}
    skip |= set() if spec.kv_dtype.is_fp8 else {"k_scale", "v_scale"}
    return [name for name in NAMES if name not in skip]


def types_of(spec) -> str:
    """How the driver reads each argument: as the kernel's signature says."""
    names = names_of(spec)
    as_kernel = {
        n: n if "stride" in n or n in ("qk_scale", "num_seqs", "partitions") else f"{n}_ptr" for n in names
    }
    types = signature_of(spec, list(as_kernel.values()))
    letters = {"i32": "i", "i64": "l", "fp32": "f"}
    return "".join(letters.get(types[as_kernel[name]], "p") for name in names)


@pytest.fixture(scope="module")
def library(tmp_path_factory, gpu_binary):
    """A library of two variants: 4 waves for up to 4 sequences, 2 waves for more."""
    folder = tmp_path_factory.mktemp("libraries")

    def make(spec, target=None, **options):
        more = (target,) if target else ()
        path = folder / f"{spec.name}-{'-'.join([t.name for t in more] + list(options.values()))}.so"
        if not path.exists():
            link([gpu_binary(spec, *more, waves=waves) for waves in (4, 2)], RULES, path, **options)
        return path

    return make


@pytest.mark.parametrize(
    ("kv", "lse"), [("f16", False), ("f16", True), ("fp8_e4m3", False), ("fp8_e4m3", True)]
)
def test_a_launch(serve, library, make_spec, kv, lse):
    spec = make_spec(128, (32, 8), 16, "f16", kv, lse=lse)
    workspace = 5_000_123
    steps = [["decode", arguments_for(spec, workspace=workspace)]]
    run = serve(library(spec), steps, types=types_of(spec))
    assert run.results == [{"result": None}]
    (launch,) = run.launches
    partitions = 132 * 4 // 8
    assert (launch["symbol"], launch["grid"]) == ("paged_decode", ((partitions + 3) * 8, 1, 1))
    assert (launch["block"], launch["smem"]) == ((128, 1, 1), 50_000)
    got = dict(zip(names_of(spec), launch["arguments"], strict=True))
    slots = 8 * (partitions + 3) * 4
    expected = {
        "q": 0x1000, "k": 0x2000, "v": 0x3000, "block_table": 0x4000, "seq_lens": 0x5000, "out": 0x6000,
        "partial_lse": 0x100000,
        "partial": 0x100000 + -(-slots * 4 // 256) * 256,
        "counter": 0x100000 + workspace // 256 * 256 - 256,
        "num_seqs": 3, "partitions": partitions,
        "q_stride_seq": 4160, "q_stride_head": 128, "out_stride_seq": 128, "out_stride_head": 384,
        "k_stride_block": 32768, "k_stride_token": 256, "k_stride_head": 4096,
        "v_stride_block": 32768, "v_stride_token": 256, "v_stride_head": 4096,
        "block_table_stride": 16, "global_scratch": 0, "profile_scratch": 0,
    }  # fmt: skip
    expected |= {"lse": 0x7000} if lse else {}
    expected |= {"k_scale": 0x8000, "v_scale": 0x9000} if kv != "f16" else {}
    assert got.pop("qk_scale") == pytest.approx(0.5 * 1.4426950408889634, rel=1e-6)
    assert got == expected
    # machine code for this architecture; shared memory above 48 KB is asked for
    assert [n for n in run.notes if n.startswith("load")] == ["load ELF made up  context c0"] * 2
    assert run.notes.count("attribute 8 = 50000") == 2


def test_the_table_picks_and_the_grid_follows(serve, library, make_spec):
    spec = make_spec(128, (32, 8), 16, "f16")
    steps = [["decode", arguments_for(spec, n, variant=v)] for n, v in [(4, -1), (5, -1), (4, 1), (1, 0)]]
    grids = [launch["grid"][0] for launch in serve(library(spec), steps, types=types_of(spec)).launches]
    assert grids == [8 * n for n in (66 + 4, 33 + 5, 33 + 4, 66 + 1)]


def test_a_launch_of_fixed_splits(serve, gpu_binary, make_spec, tmp_path):
    """Programs as for pieces; a slot for each part that a sequence may have."""
    spec = make_spec(128, (32, 8), 16, "f16", batch_invariant=True)
    out = link([gpu_binary(spec, waves=4, max_parts=16)], (), tmp_path / "fixed.so")
    run = serve(out, [["decode", arguments_for(spec, variant=0)]], types=types_of(spec))
    (launch,) = run.launches
    assert launch["grid"][0] == 132 * 4 + 3 * 8
    got = dict(zip(names_of(spec), launch["arguments"], strict=True))
    assert (got["num_seqs"], got["partitions"]) == (3, 132 * 4 // 8)
    assert got["partial"] == 0x100000 + 8 * 3 * 16 * 4 * 4


def test_programmatic_dependent_launch_is_asked_for_where_the_kernel_waits(
    serve, gpu_binary, make_spec, tmp_path
):
    spec = make_spec(128, (32, 8), 16, "f16")
    out = link([gpu_binary(spec, pdl=pdl) for pdl in (0, 1)], (), tmp_path / "pdl.so")
    steps = [["decode", arguments_for(spec, variant=variant)] for variant in (0, 1)]
    notes = [n for n in serve(out, steps, types=types_of(spec)).notes if n.startswith("launch")]
    assert ["attribute 6 = 1" in note for note in notes] == [False, True]


@pytest.mark.parametrize("variant", [0, 1])
def test_a_kernel_that_looks_ahead_is_told_the_sizes(serve, gpu_binary, make_spec, tmp_path, variant):
    """Of the pool and of the block table; one that does not finds its scratch pointers in their place."""
    spec = make_spec(128, (32, 8), 16, "f16")
    out = link([gpu_binary(spec, split="walk", pdl=pdl) for pdl in (1, 2)], (), tmp_path / "ahead.so")
    names, types = names_of(spec), types_of(spec)
    if variant == 1:
        names, types = [*names[:-2], "num_blocks", "max_blocks", *names[-2:]], types[:-2] + "ll" + types[-2:]
    run = serve(out, [["decode", arguments_for(spec, variant=variant)]], types=types)
    got = dict(zip(names, run.launches[0]["arguments"], strict=True))
    assert got["block_table_stride"] == 16
    assert (got.get("num_blocks", 50), got.get("max_blocks", 10)) == (50, 10)
    assert (got["global_scratch"], got["profile_scratch"]) == (0, 0)
    assert any(n.startswith("launch") and "attribute 6 = 1" in n for n in run.notes)


def test_a_named_variant_loads_itself_alone(serve, library, make_spec):
    """A library of a tuner's fifty candidates must not load fifty to time one."""
    spec = make_spec(128, (32, 8), 16, "f16")
    steps = [["decode", arguments_for(spec, variant=1)]] * 3
    run = serve(library(spec), steps, types=types_of(spec))
    assert len(run.launches) == 3
    assert len([n for n in run.notes if n.startswith("load")]) == 1


def test_no_sequences_no_launch(serve, library, make_spec):
    spec = make_spec(128, (32, 8), 16, "f16")
    run = serve(library(spec), [["decode", arguments_for(spec, 0)]], types=types_of(spec))
    assert run.results == [{"result": None}] and run.launches == []


def test_prepare_before_anything(serve, library, make_spec):
    spec = make_spec(128, (32, 8), 16, "f16")
    steps = [["prepare", [0, -1]], ["decode", arguments_for(spec)], ["prepare", [0, 1]]]
    run = serve(library(spec), steps, types=types_of(spec))
    assert [note.split()[0] for note in run.notes] == ["load", "attribute", "load", "attribute", "launch"]


def test_another_device_than_the_current_one(serve, library, make_spec):
    """Its context is current for the launch alone, and its own number of SMs sets the grid."""
    spec = make_spec(128, (32, 8), 16, "f16")
    steps = [["decode", arguments_for(spec, device=1, variant=0)]] * 2
    run = serve(library(spec), steps, devices=f"{H100},90:114:232448", types=types_of(spec))
    assert [launch["context"] for launch in run.launches] == ["c1", "c1"]
    assert run.launches[0]["grid"][0] == 114 * 4 + 3 * 8
    kinds = [note.split()[0] for note in run.notes]
    assert kinds == ["push", "load", "attribute", "pop", "push", "launch", "pop", "push", "launch", "pop"]


@pytest.mark.parametrize(
    ("devices", "embed", "loaded"),
    [
        (H100, "both", "ELF"),
        (H100, "ptx", ".version"),
        (B200, "both", ".version"),  # newer: the driver compiles the PTX
        (B200, "ptx", ".version"),
    ],
)
def test_what_is_loaded_where(serve, library, make_spec, devices, embed, loaded):
    spec = make_spec(128, (32, 8), 16, "f16")
    run = serve(
        library(spec, embed=embed), [["decode", arguments_for(spec)]], devices=devices, types=types_of(spec)
    )
    assert run.results == [{"result": None}]
    assert run.notes[0].startswith(f"load {loaded}")


@pytest.mark.parametrize(
    ("devices", "embed", "text"),
    [
        (A100, "both", "compute capability 8.0: this library holds machine code and PTX for sm_90"),
        (RTX4090, "ptx", "compute capability 8.9: this library holds PTX for sm_90"),
        (B200, "cubin", "compute capability 10.0: this library holds machine code for sm_90"),
        (
            "90:132:40000",
            "both",
            "variant 0 needs 50000 bytes of shared memory a block; this device has 40000",
        ),
    ],
)
def test_what_runs_nowhere_here(serve, library, make_spec, devices, embed, text):
    spec = make_spec(128, (32, 8), 16, "f16")
    steps = [["decode", arguments_for(spec)], ["prepare", [0, -1]]]
    run = serve(library(spec, embed=embed), steps, devices=devices, types=types_of(spec))
    for result in run.results:
        assert result["error"] == "PackForeign" and text in result["text"]
    assert run.launches == []


def test_sm_80_kernels_on_an_rtx_4090_are_machine_code(serve, library, make_spec, a100):
    spec = make_spec(128, (32, 8), 16, "f16")
    run = serve(library(spec, a100), [["decode", arguments_for(spec)]], devices=RTX4090, types=types_of(spec))
    assert run.notes[0].startswith("load ELF")
    assert run.launches[0]["grid"][0] == 128 * 4 + 3 * 8


@pytest.mark.parametrize(
    ("fail", "error", "text"),
    [
        ("cuInit:100", "DeviceMissing", "the CUDA driver does not start: made up"),
        ("cuDevicePrimaryCtxRetain:2", "LaunchError", "cuDevicePrimaryCtxRetain: CUDA_ERROR_OTHER (made up)"),
        (
            "cuModuleLoadDataEx:218",
            "LaunchError",
            "loading a kernel, variant 0: ptxas says no: CUDA_ERROR_OTHER",
        ),
        ("cuModuleGetFunction:500", "LaunchError", "looking up paged_decode, variant 0: CUDA_ERROR_OTHER"),
        ("cuFuncSetAttribute:1", "LaunchError", "reserving shared memory, variant 0: CUDA_ERROR_OTHER"),
        ("cuLaunchKernelEx:719", "LaunchError", "cuLaunchKernelEx: CUDA_ERROR_LAUNCH_FAILED (made up)"),
        ("cuCtxGetCurrent:201", "LaunchError", "cuCtxPushCurrent: CUDA_ERROR_OTHER"),
    ],
)
def test_a_driver_that_refuses(serve, library, make_spec, fail, error, text):
    spec = make_spec(128, (32, 8), 16, "f16")
    steps = [["decode", arguments_for(spec)]] * 2
    run = serve(library(spec), steps, fail=fail, types=types_of(spec))
    for result in run.results:
        assert result["error"] == error and text in result["text"]


def test_devices_that_are_not_there(serve, library, make_spec):
    spec = make_spec(128, (32, 8), 16, "f16")
    run = serve(library(spec), [["decode", arguments_for(spec, device=1)], ["prepare", [-1, 0]]])
    assert [r["error"] for r in run.results] == ["DeviceMissing"] * 2
    assert run.results[0]["text"] == "device = cuda:1: 0 to 0 is allowed"


def test_tensors_of_two_devices(serve, library, make_spec):
    spec = make_spec(128, (32, 8), 16, "f16")
    arguments, steps = arguments_for(spec), []
    for i, value in enumerate(arguments):
        if i and isinstance(value, dict):
            steps.append(["decode", [*arguments[:i], {**value, "device": 1}, *arguments[i + 1 :]]])
    run = serve(library(spec), steps, devices=f"{H100},{H100}", types=types_of(spec))
    names = ["k", "v", "block_table", "seq_lens", "out", "workspace"]
    assert [r["text"] for r in run.results] == [
        f"{name}.device = cuda:1: cuda:0 is expected, where q is" for name in names
    ]
    assert run.launches == []


def test_workspace_of_the_largest_device(serve, library, make_spec):
    """Whatever device a call is on, the workspace is enough; and one byte less than it needs is refused."""
    spec = make_spec(128, (32, 8), 16, "f16")
    path = library(spec)
    steps = [["workspace_bytes", [3]], ["workspace_bytes", [0]]]
    one = serve(path, steps, devices=H100).results
    two = serve(path, steps, devices=f"{H100},90:200:232448").results
    none = serve(path, steps, fail="cuInit:100").results
    assert none == one and two[0]["result"] > one[0]["result"] > one[1]["result"] > 0
    needed = one[0]["result"]
    calls = [["decode", arguments_for(spec, variant=0, workspace=size)] for size in (needed, needed - 1)]
    results = serve(path, calls, types=types_of(spec)).results
    assert results[0] == {"result": None}
    assert f"at least {needed} bytes are expected for 3 sequences" in results[1]["text"]


def test_counters_stay_clear_of_the_partials_of_other_calls(serve, library, make_spec):
    """For any two batch sizes on one workspace: partials of one end before the counters of the other."""
    spec = make_spec(128, (32, 8), 16, "f16")
    path = library(spec)
    size = serve(path, [["workspace_bytes", [100]]]).results[0]["result"]
    batches = (1, 2, 31, 64, 65, 99, 100)
    steps = [["decode", arguments_for(spec, n, variant=v, workspace=size)] for n in batches for v in (0, 1)]
    run = serve(path, steps, types=types_of(spec))
    spans = []
    for launch in run.launches:
        got = dict(zip(names_of(spec), launch["arguments"], strict=True))
        slots = 8 * (got["partitions"] + got["num_seqs"]) * 4
        spans.append(
            (got["partial"] + slots * 128 * 4, got["counter"], got["counter"] + 8 * got["num_seqs"] * 4)
        )
        assert got["partial_lse"] + slots * 4 <= got["partial"]
        assert got["partial"] % 256 == got["counter"] % 256 == 0
    assert len(spans) == len(steps)
    assert max(end for end, _, _ in spans) <= min(begin for _, begin, _ in spans)
    assert max(end for _, _, end in spans) <= 0x100000 + size


EXTEND_NAMES = tuple(
    """
    q k v block_table seq_lens cu_seqlens_q out lse k_scale v_scale sinks alibi_slopes causal qk_scale
    num_seqs q_stride_token q_stride_head out_stride_token out_stride_head k_stride_block k_stride_token
    k_stride_head v_stride_block v_stride_token v_stride_head block_table_stride
    """.split()  # noqa: SIM905
)


def extend_arguments(spec, num_tokens=300, num_seqs=3):
    """Arguments of extend: those of decode, with tokens for rows and where each sequence's begin."""
    arguments = arguments_for(spec, num_tokens)
    arguments[3] = made(0x4000, "int", 32, (num_seqs, 10), (16, 1))
    arguments[4] = made(0x5000, "int", 32, (num_seqs,))
    arguments[10] = made(0, "uint", 8, (0,))
    extras = [made(0xA000, "float", 32, (spec.num_q_heads,))] if spec.sinks else []
    extras += [made(0xA800, "float", 32, (spec.num_q_heads,))] if spec.alibi else []
    extras += [made(0xAC01, "uint", 8, (num_seqs,))] if spec.causality == "per_sequence" else []
    return [*arguments[:5], made(0x5800, "int", 32, (num_seqs + 1,)), *arguments[5:], *extras]


@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"sinks": True, "window": 64},
        {"alibi": True, "causality": "per_sequence", "attention_chunk": 64},
        {"sinks": True, "alibi": True, "causality": "full"},
    ],
)
def test_an_extend_launch(serve, make_spec, gpu_binary, tmp_path, masks):
    """As many programs as the tokens can make tiles of, whatever the lengths; no workspace."""
    spec = make_spec(128, (32, 8), 16, "f16", "fp8_e4m3", lse=True, op="extend", **masks)
    binary = gpu_binary(spec)
    path = link([binary], (Rule(2**31 - 1, 2**31 - 1, 0),), tmp_path / "extend.so")
    extras = {"sinks": 0xA000} if spec.sinks else {}
    extras |= {"alibi_slopes": 0xA800} if spec.alibi else {}
    extras |= {"causal": 0xAC01} if spec.causality == "per_sequence" else {}
    names = [
        name for name in EXTEND_NAMES if name in extras or name not in ("sinks", "alibi_slopes", "causal")
    ]
    keys = [n if "stride" in n or n in ("qk_scale", "num_seqs") else f"{n}_ptr" for n in names]
    letters = {"i32": "i", "i64": "l", "fp32": "f"}
    types = "".join(letters.get(kind, "p") for kind in signature_of(spec, keys).values())
    steps = [
        ["workspace_bytes", [3]],
        ["extend", extend_arguments(spec)],
        ["extend", extend_arguments(spec, num_tokens=0)],
        ["extend", extend_arguments(spec, num_seqs=0)],
    ]
    run = serve(path, steps, types=types)
    assert run.results == [{"result": 0}] + [{"result": None}] * 3
    (launch,) = run.launches
    tile_m = binary.source.schedule.int("tile_m")
    assert (launch["symbol"], launch["grid"]) == ("paged_extend", ((300 * 4 // tile_m + 3) * 8, 1, 1))
    got = dict(zip(names, launch["arguments"], strict=True))
    expected = {
        "q": 0x1000, "k": 0x2000, "v": 0x3000, "block_table": 0x4000, "seq_lens": 0x5000,
        "cu_seqlens_q": 0x5800, "out": 0x6000, "lse": 0x7000, "k_scale": 0x8000, "v_scale": 0x9000,
        "num_seqs": 3, "q_stride_token": 4160, "q_stride_head": 128, "out_stride_token": 128,
        "out_stride_head": 300 * 128, "k_stride_block": 32768, "k_stride_token": 256, "k_stride_head": 4096,
        "v_stride_block": 32768, "v_stride_token": 256, "v_stride_head": 4096, "block_table_stride": 16,
    }  # fmt: skip
    assert got.pop("qk_scale") == pytest.approx(0.5 * 1.4426950408889634, rel=1e-6)
    assert got == expected | extras


def test_rows_of_v_and_out_have_their_own_length(serve, make_spec, gpu_binary, tmp_path):
    """Partial results are as long as V's rows; ALiBi's slopes come behind the scales."""
    spec = make_spec(192, (32, 8), 16, "f16", head_dim_v=128, alibi=True)
    path = link([gpu_binary(spec, waves=4)], (Rule(2**31 - 1, 2**31 - 1, 0),), tmp_path / "v.so")
    pool, row = (50, 16, 8), (3, 32)
    right = [*arguments_for(spec), made(0xA800, "float", 32, (32,))]
    right[2], right[5] = made(0x3000, "float", 16, (*pool, 128)), made(0x6000, "float", 16, (*row, 128))
    wrong = [
        (0, made(0x1000, "float", 16, (*row, 128)), "q.shape = [3, 32, 128]: 192 is expected in axis 2"),
        (2, made(0x3000, "float", 16, (*pool, 192)), "v.shape = [50, 16, 8, 192]: 128 is expected in axis 3"),
        (
            5,
            made(0x6000, "float", 16, (*row, 192)),
            "out.shape = [3, 32, 192]: 128 is expected in axis 2 (head_dim_v)",
        ),
        (13, made(0xA800, "float", 32, (8,)), "alibi_slopes.shape = [8]: 32 is expected in axis 0"),
        (13, None, "alibi_slopes = None: a float32 tensor [num_q_heads] is expected"),
    ]
    steps = [["decode", right], *(["decode", [*right[:i], bad, *right[i + 1 :]]] for i, bad, _ in wrong)]
    names = [*names_of(spec)]
    names.insert(names.index("out") + 1, "alibi_slopes")
    letters = {"qk_scale": "f", "num_seqs": "i", "partitions": "i"}
    letters |= {f"{t}_stride_{axis}": "i" for t in "kv" for axis in ("block", "token")}
    types = "".join(letters.get(name, "l" if "stride" in name else "p") for name in names)
    run = serve(path, steps, types=types)
    for result, (_, _, message) in zip(run.results[1:], wrong, strict=True):
        assert result["error"] == "ArgumentError" and message in result["text"], result
    (launch,) = run.launches
    got = dict(zip(names, launch["arguments"], strict=True))
    slots = 8 * (132 * 4 // 8 + 3) * 4
    assert got["alibi_slopes"] == 0xA800
    assert got["partial"] == 0x100000 + -(-slots * 4 // 256) * 256
    (needed,) = serve(path, [["workspace_bytes", [3]]]).results
    assert needed["result"] == got["partial"] - 0x100000 + slots * 128 * 4 + 256


def test_a_verify_launch(serve, make_spec, gpu_binary, tmp_path):
    """Pieces for the SMs and one more a query tile; a workspace whose size does not depend on the batch."""
    spec = make_spec(128, (32, 8), 16, "f16", "fp8_e4m3", lse=True, op="verify", sinks=True, tree_mask=True)
    binaries = [gpu_binary(spec, tile_m=32, waves=4), gpu_binary(spec, tile_m=16, waves=6)]
    path = link(binaries, (Rule(2**31 - 1, 2**31 - 1, 0),), tmp_path / "verify.so")
    names = [name for name in EXTEND_NAMES if name not in ("alibi_slopes", "causal")]
    at = names.index("sinks") + 1
    names[at:at] = ["tree_mask", "partial", "partial_lse", "counter"]
    names.insert(names.index("num_seqs") + 1, "partitions")
    plain = ("qk_scale", "num_seqs", "partitions")
    keys = [n if "stride" in n or n in plain else f"{n}_ptr" for n in names]
    letters = {"i32": "i", "i64": "l", "fp32": "f"}
    types = "".join(letters.get(kind, "p") for kind in signature_of(spec, keys).values())
    partitions = [132 * waves // 8 for waves in (4, 6)]
    lse_bytes, out_bytes = (2 * 8 * partitions[0] * 32 * 4 * width for width in (1, 128))
    counters = -(-2 * 8 * partitions[1] * 4 // 256) * 256  # of the variant with the most, for both
    size = lse_bytes + out_bytes + counters
    workspace = made(0xC00000, "uint", 8, (size,))
    arguments = [*extend_arguments(spec), made(0xB000, "int", 64, (300,))]
    arguments[11] = workspace
    wrong = [*arguments[:-1], made(0xB000, "int", 64, (299,))]
    small = [*arguments[:11], made(0xC00000, "uint", 8, (size - 1,)), *arguments[12:]]
    steps = [["workspace_bytes", [n]] for n in (3, 4096)]
    steps += [["verify", given] for given in (arguments, wrong, small)]
    run = serve(path, steps, types=types)
    assert run.results[:3] == [{"result": size}, {"result": size}, {"result": None}]
    assert "tree_mask.shape = [299]: 300 is expected in axis 0 (num_tokens)" in run.results[3]["text"]
    assert f"at least {size} bytes are expected" in run.results[4]["text"]
    (launch,) = run.launches
    grid = (partitions[0] + 300 * 4 // 32 + 3) * 8
    assert (launch["symbol"], launch["grid"]) == ("paged_verify", (grid, 1, 1))
    got = dict(zip(names, launch["arguments"], strict=True))
    expected = {
        "cu_seqlens_q": 0x5800, "sinks": 0xA000, "tree_mask": 0xB000, "partial_lse": 0xC00000,
        "partial": 0xC00000 + lse_bytes, "counter": 0xC00000 + size - counters,
        "num_seqs": 3, "partitions": partitions[0], "q_stride_token": 4160, "block_table_stride": 16,
    }  # fmt: skip
    assert {name: got[name] for name in expected} == expected


def test_extend_arguments_are_refused_before_any_launch(serve, make_spec, gpu_binary, tmp_path):
    spec = make_spec(128, (32, 8), 16, "f16", op="extend", sinks=True, causality="per_sequence")
    path = link([gpu_binary(spec)], (Rule(2**31 - 1, 2**31 - 1, 0),), tmp_path / "extend.so")
    right = extend_arguments(spec)
    wrong = [
        (
            5,
            made(0x5800, "int", 32, (3,)),
            "cu_seqlens_q.shape = [3]: 4 is expected in axis 0 (num_seqs + 1)",
        ),
        (5, made(0x5800, "int", 64, (4,)), "cu_seqlens_q.dtype = int64: int32 is expected"),
        (5, None, "cu_seqlens_q = None: a int32 tensor [num_seqs + 1] is expected"),
        (5, made(0x5800, "int", 32, (4,), device=1), "cu_seqlens_q.device = cuda:1: cuda:0 is expected"),
        (4, made(0x5000, "int", 32, (4,)), "block_table.shape = [3, 10]: 4 is expected in axis 0 (num_seqs)"),
        (
            6,
            made(0x6000, "float", 16, (299, 32, 128)),
            "out.shape = [299, 32, 128]: 300 is expected in axis 0",
        ),
        (12, 161, "block_table.shape = [3, 10]: too narrow for max_seq_len = 161"),
        (14, made(0xA000, "float", 32, (8,)), "sinks.shape = [8]: 32 is expected in axis 0 (num_q_heads)"),
        (14, None, "sinks = None: a float32 tensor [num_q_heads] is expected"),
        (15, made(0xAC00, "uint", 8, (4,)), "causal.shape = [4]: 3 is expected in axis 0 (num_seqs)"),
        (15, made(0xAC00, "int", 32, (3,)), "causal.dtype = int32: uint8 is expected"),
    ]
    steps = [["extend", [*right[:i], value, *right[i + 1 :]]] for i, value, _ in wrong]
    steps.append(["extend", right[:-1]])
    run = serve(path, steps, devices=f"{H100},{H100}")
    messages = [message for *_, message in wrong] + ["extend: 15 arguments: 16 are expected"]
    for result, message in zip(run.results, messages, strict=True):
        assert result["error"] == "ArgumentError" and message in result["text"], result
    assert run.launches == []


WRITE_NAMES = (
    "new_k", "new_v", "slot_mapping", "k", "v", "k_scale", "v_scale", "num_tokens", "new_k_stride_token",
    "new_k_stride_head", "new_v_stride_token", "new_v_stride_head", "k_stride_block", "k_stride_token",
    "k_stride_head", "v_stride_block", "v_stride_token", "v_stride_head",
)  # fmt: skip


def write_arguments(spec, num_tokens=300):
    """Arguments of write_kv: new K and V cut from a fused projection, a packed head-major pool."""
    attention = arguments_for(spec, num_tokens)
    new, strides = (num_tokens, spec.num_kv_heads, 128), (48 * 128, 128, 1)
    return [
        made(0x1000, "float", 16, new, strides),
        made(0x1800, "float", 16, new, strides),
        made(0x5000, "int", 64, (num_tokens,)),
        *attention[1:3],
        *attention[8:10],
        -1,
    ]


@pytest.fixture
def writer(make_spec, gpu_binary, tmp_path):
    """A write_kv library for an fp8 pool."""
    binary = gpu_binary(make_spec(128, (8, 8), 16, "f16", "fp8_e4m3", op="write_kv"))
    return binary, link([binary], (Rule(2**31 - 1, 2**31 - 1, 0),), tmp_path / "write.so")


def test_a_write_kv_launch(serve, writer):
    binary, path = writer
    spec = binary.source.spec
    keys = [n if "stride" in n or n == "num_tokens" else f"{n}_ptr" for n in WRITE_NAMES]
    types = "".join({"i32": "i", "i64": "l"}.get(kind, "p") for kind in signature_of(spec, keys).values())
    steps = [
        ["workspace_bytes", [9]],
        ["write_kv", write_arguments(spec)],
        ["write_kv", write_arguments(spec, 0)],
    ]
    run = serve(path, steps, types=types)
    assert run.results == [{"result": 0}, {"result": None}, {"result": None}]
    (launch,) = run.launches
    tile_m = binary.source.schedule.int("tile_m")
    assert (launch["symbol"], launch["grid"]) == ("paged_write_kv", (300 * 8 // tile_m, 1, 1))
    assert dict(zip(WRITE_NAMES, launch["arguments"], strict=True)) == {
        "new_k": 0x1000, "new_v": 0x1800, "slot_mapping": 0x5000, "k": 0x2000, "v": 0x3000, "k_scale": 0x8000,
        "v_scale": 0x9000, "num_tokens": 300, "new_k_stride_token": 6144, "new_k_stride_head": 128,
        "new_v_stride_token": 6144, "new_v_stride_head": 128, "k_stride_block": 32768, "k_stride_token": 256,
        "k_stride_head": 4096, "v_stride_block": 32768, "v_stride_token": 256, "v_stride_head": 4096,
    }  # fmt: skip


def test_write_kv_arguments_are_refused_before_any_launch(serve, writer):
    binary, path = writer
    right = write_arguments(binary.source.spec)
    wrong = [
        (0, made(0x1000, "float", 32, (300, 8, 128)), "new_k.dtype = float32: float16 is expected"),
        (
            1,
            made(0x1800, "float", 16, (299, 8, 128)),
            "new_v.shape = [299, 8, 128]: 300 is expected in axis 0",
        ),
        (1, made(0x1800, "float", 16, (300, 4, 128)), "4, 128]: 8 is expected in axis 1 (num_kv_heads)"),
        (1, made(0x1802, "float", 16, (300, 8, 128)), "new_v: address 0x1802: a multiple of 16 bytes"),
        (2, made(0x5000, "int", 32, (300,)), "slot_mapping.dtype = int32: int64 is expected"),
        (
            2,
            made(0x5000, "int", 64, (301,)),
            "slot_mapping.shape = [301]: 300 is expected in axis 0 (num_tokens)",
        ),
        (
            3,
            made(0x2000, "float", 16, (50, 16, 8, 128)),
            "k.dtype = float16: float8_e4m3fn (or its bytes as uint8)",
        ),
        (5, None, "k_scale = None"),
        (7, 1, "variant = 1: 0 to 0, or -1 for the dispatch table's, is allowed"),
    ]
    steps = [["write_kv", [*right[:i], value, *right[i + 1 :]]] for i, value, _ in wrong]
    run = serve(path, steps)
    for result, (*_, message) in zip(run.results, wrong, strict=True):
        assert result["error"] == "ArgumentError" and message in result["text"], result
    assert run.launches == []


def test_a_merge_launch(serve, make_spec, gpu_binary, tmp_path):
    spec = make_spec(64, (4, 4), 1, op="merge", sinks=True)
    path = link([gpu_binary(spec, tile_m=8)], (Rule(2**31 - 1, 2**31 - 1, 0),), tmp_path / "merge.so")
    outs, lses = made(0x1000, "float", 16, (3, 5, 4, 64)), made(0x2000, "float", 32, (3, 5, 4))
    out, lse = made(0x3000, "float", 16, (5, 4, 64)), made(0x4000, "float", 32, (5, 4))
    sinks = made(0x5000, "float", 32, (4,))
    wrong = (
        (
            0,
            made(0x1000, "float", 16, (0, 5, 4, 64)),
            "outs.shape = [0, 5, 4, 64]: at least one part is expected",
        ),
        (
            0,
            made(0x1008, "float", 16, (3, 5, 4, 64)),
            "outs: address 0x1008: a multiple of 16 bytes is expected",
        ),
        (
            1,
            made(0x2000, "float", 32, (3, 6, 4)),
            "lses.shape = [3, 6, 4]: 5 is expected in axis 1 (num_tokens)",
        ),
        (1, made(0x2000, "float", 16, (3, 5, 4)), "lses.dtype = float16: float32 is expected"),
        (3, made(0x4000, "float", 32, (5, 4), (8, 1)), "lse.stride(0) = 8: 4 is expected (contiguous)"),
        (5, made(0x5000, "float", 32, (3,)), "sinks.shape = [3]: 4 is expected"),
    )
    good = [outs, lses, out, lse, -1, sinks]
    empty = [made(0x1000, "float", 16, (3, 0, 4, 64)), made(0x2000, "float", 32, (3, 0, 4)),
             made(0x3000, "float", 16, (0, 4, 64)), made(0x4000, "float", 32, (0, 4)), -1, sinks]  # fmt: skip
    steps = [["merge", good], ["merge", empty]]
    steps += [["merge", [*good[:i], value, *good[i + 1 :]]] for i, value, _ in wrong]
    run = serve(path, steps, types="pppppii" + "l" * 8)
    assert run.results[:2] == [{"result": None}] * 2
    expected = [text for _, _, text in wrong]
    for result, text in zip(run.results[2:], expected, strict=True):
        assert text in result["text"]
    (launch,) = run.launches
    assert (launch["symbol"], launch["grid"]) == ("paged_merge", (3, 1, 1))  # 20 rows, 8 a program
    strides = [5 * 4 * 64, 4 * 64, 64, 5 * 4, 4, 1, 4 * 64, 64]
    assert launch["arguments"][:15] == [0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 3, 5, *strides]


def test_a_copy_launch(serve, make_spec, gpu_binary, tmp_path):
    """A program for each tile of each page of each pair; what cannot be is refused before."""
    spec = make_spec(128, (8, 8), 16, op="copy_blocks")
    path = link([gpu_binary(spec, tile_m=512)], (Rule(2**31 - 1, 2**31 - 1, 0),), tmp_path / "copy.so")
    src, dst = made(0x1000, "int", 64, (5, 3)), made(0x2000, "int", 64, (5, 3))
    pairs = made(0x3000, "int", 64, (7, 2))
    good = [0x70, 0x90, src, dst, pairs, 20_000, -1]
    steps = [
        ["workspace_bytes", [3]],
        ["copy_blocks", good],
        ["copy_blocks", [0, 0, src, src, made(0x3000, "int", 64, (0, 2)), 20_000, -1]],
        ["copy_blocks", [0, 0, src, made(0x2000, "int", 64, (4, 3)), pairs, 20_000, -1]],
        ["copy_blocks", [0, 0, src, made(0x2000, "int", 64, (5, 3), device=1), pairs, 20_000, -1]],
        ["copy_blocks", [0, 0, src, dst, made(0x3000, "int", 64, (7, 2), (4, 2)), 20_000, -1]],
        ["copy_blocks", [0, 0, src, dst, made(0x3000, "int", 64, (7, 2), (4, 1)), 20_000, -1]],
        ["copy_blocks", [0, 0, src, dst, made(0x3000, "int", 64, (1 << 28, 2)), 20_000, -1]],
        ["copy_blocks", [0, 0, src, dst, pairs, -1, -1]],
        ["copy_blocks", [0, 0x108, src, dst, pairs, 20_000, -1]],
    ]
    run = serve(path, steps, types="pppppii")
    assert run.results[:3] == [{"result": 0}] + [{"result": None}] * 2
    texts = [result["text"] for result in run.results[3:]]
    assert texts == [
        "dst.shape = [4, 3]: 5 is expected in axis 0 (num_pools, as src has)",
        "dst.device = cuda:1: cuda:0 is expected, where src is",
        "pairs.stride(1) = 2: 1 is expected along a pair",
        "pairs.stride(0) = 4: 2 is expected (contiguous)",
        f"pairs.shape[0] = {1 << 28}: at most {(2**31 - 1) // 15} pairs are allowed in 5 pools",
        "page_bytes = -1: at least 0, the longest page, is allowed",
        "dst_origin: address 0x108: a multiple of 16 bytes is expected",
    ]
    (launch,) = run.launches
    chunks = -(-20_000 // (512 * 16))
    assert (launch["symbol"], launch["grid"]) == ("paged_copy_blocks", (7 * 5 * chunks, 1, 1))
    assert launch["arguments"][:7] == [0x70, 0x90, 0x1000, 0x2000, 0x3000, 5, chunks]
