"""Rendered Triton source → cubin and PTX for any named architecture, with no GPU present."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from pagedgen.compiler.binary import Binary, Source
from pagedgen.compiler.sass import lost_descriptors
from pagedgen.errors import CompileError, ToolMissing
from pagedgen.templates.triton.decode import box_bytes, kv_align
from pagedgen.values.record import Resources
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import DType, KernelSpec

# FP8 is handled as bytes.
POINTER_TYPES = {
    DType.F16: "*fp16",
    DType.BF16: "*bf16",
    DType.F32: "*fp32",
    DType.FP8_E4M3: "*u8",
    DType.FP8_E5M2: "*u8",
}
ALIGNED_POINTERS = (
    *("q_ptr", "outs_ptr", "out_ptr", "partial_ptr", "partial_lse_ptr"),
    *("new_k_ptr", "new_v_ptr", "out_k_ptr", "out_v_ptr", "src_origin_ptr", "dst_origin_ptr"),
)


def signature_of(spec: KernelSpec, names: list[str]) -> dict[str, str]:
    """Triton types of the kernel's arguments, by name."""
    kv = POINTER_TYPES[spec.kv_dtype]
    known = {
        "q_ptr": POINTER_TYPES[spec.q_dtype],
        "out_ptr": POINTER_TYPES[spec.q_dtype],
        "k_ptr": kv,
        "v_ptr": kv,
        "block_table_ptr": "*i32",
        "seq_lens_ptr": "*i32",
        "cu_seqlens_q_ptr": "*i32",
        "outs_ptr": POINTER_TYPES[spec.q_dtype],
        "num_parts": "i32",
        "new_k_ptr": POINTER_TYPES[spec.q_dtype],
        "new_v_ptr": POINTER_TYPES[spec.q_dtype],
        "out_k_ptr": POINTER_TYPES[spec.q_dtype],
        "out_v_ptr": POINTER_TYPES[spec.q_dtype],
        "slot_mapping_ptr": "*i64",
        "positions_ptr": "*i64",
        "faults_ptr": "*i64",
        "src_origin_ptr": "*i32",
        "dst_origin_ptr": "*i32",
        "src_ptr": "*i64",
        "dst_ptr": "*i64",
        "pairs_ptr": "*i64",
        "num_pools": "i32",
        "chunks": "i32",
        "tree_mask_ptr": "*i64",
        "causal_ptr": "*u8",
        "num_tokens": "i32",
        "counter_ptr": "*i32",
        "qk_scale": "fp32",
        "num_seqs": "i32",
        "partitions": "i32",
        "k_stride_block": "i32",
        "v_stride_block": "i32",
        "k_stride_token": "i32",
        "v_stride_token": "i32",
    }
    return {n: known.get(n, "*fp32" if n.endswith("_ptr") else "i64") for n in names}


def alignment_of(spec: KernelSpec, name: str) -> int:
    """What an argument is known to be a multiple of: bytes for pointers, elements for strides; 1 if nothing.

    The launcher checks exactly this before a launch.
    """
    if name in ("k_ptr", "v_ptr"):
        return kv_align(spec)
    if name.startswith(("k_stride", "v_stride")):
        return kv_align(spec) // spec.kv_dtype.size
    if name.startswith(
        (
            "q_stride",
            "outs_stride",
            "out_stride",
            "new_k_stride",
            "new_v_stride",
            "out_k_stride",
            "out_v_stride",
        )
    ):
        return 8  # head_dim is a multiple of 8
    if name in ALIGNED_POINTERS:
        return 16
    if name == "cos_sin_ptr":
        return (
            16 if (spec.rotary_dim or spec.head_dim) % 8 == 0 else 4
        )  # so are the sines, half a row further on
    return 1


def options_of(schedule: Schedule) -> dict[str, int]:
    """Triton's options for a schedule."""
    options = {"num_warps": schedule.int("num_warps"), "num_stages": schedule.int("num_stages")}
    if max_regs := dict(schedule.choices).get("max_regs"):
        options["maxnreg"] = int(max_regs)
    return options


def load_source(text: str, folder: Path) -> ModuleType:
    """Import rendered source from a file, which Triton reads back through ``inspect``."""
    name = "pagedgen_kernel_" + hashlib.sha256(text.encode()).hexdigest()[:16]
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec and module_spec.loader
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def compile_triton(source: Source) -> Binary:
    """Compile for ``source.target.arch`` and read back what the binary uses.

    Raises:
        CompileError: Triton or ptxas refused it, or ptxas compiled it wrong (:mod:`pagedgen.compiler.sass`).
        ToolMissing: Triton is not installed.
    """
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise ToolMissing("triton", "tune") from error
    os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")  # line tables double a cubin's size
    target, spec, schedule = source.target, source.spec, source.schedule
    with tempfile.TemporaryDirectory(prefix="pagedgen-") as folder:
        function = getattr(load_source(source.text, Path(folder)), f"paged_{spec.op}")
        names = list(function.arg_names)
        attributes: dict[tuple[int, ...], Any] = {}
        for i, name in enumerate(names):
            if (multiple := alignment_of(spec, name)) > 1:
                attributes[(i,)] = [["tt.divisibility", multiple]]
        gpu = (
            GPUTarget("hip", target.arch, 64)
            if target.kind == "hip"
            else GPUTarget("cuda", target.capability, 32)
        )
        try:
            kernel = triton.compile(
                ASTSource(fn=function, signature=signature_of(spec, names), constexprs={}, attrs=attributes),
                target=gpu,
                options=options_of(schedule),
            )
        except Exception as error:  # Triton raises many kinds, all meaning "not this candidate"
            raise CompileError(f"{schedule.name}: {_last_lines(str(error))}") from error
    metadata = kernel.metadata
    if target.kind == "hip":
        files: tuple[tuple[str, bytes], ...] = (("kernel.hsaco", kernel.asm["hsaco"]),)
        resources = Resources(smem_bytes=metadata.shared, code_bytes=len(kernel.asm["hsaco"]))
    else:
        cubin = kernel.asm["cubin"]
        files = (("kernel.cubin", cubin), ("kernel.ptx", kernel.asm["ptx"].encode()))
        resources = read_resources(cubin, metadata.shared)
        if "wgmma.mma_async" in kernel.asm["ptx"] and (lost := lost_descriptors(cuobjdump(cubin, "-sass"))):
            raise CompileError(
                f"{schedule.name}: ptxas lost the address of {len(lost)} matrix operands: {lost[0]}"
            )
    box = box_bytes(spec, schedule) if schedule.template == "triton-decode" else 0  # static, beside Triton's
    if metadata.shared + box > target.smem_per_block:
        raise CompileError(
            f"{schedule.name}: needs {metadata.shared + box} B of shared memory; "
            f"{target.name} has {target.smem_per_block}"
        )
    return Binary(source, metadata.name, files, resources, f"triton {triton.__version__}", metadata.num_warps)


def read_resources(cubin: bytes, dynamic_smem: int) -> Resources:
    """Registers, spills and shared memory of a cubin, as ``cuobjdump`` reads them.

    Raises:
        CompileError: the tool is missing or its output is not understood.
    """
    printed = cuobjdump(cubin, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", printed)
    if not found:
        raise CompileError(f"cuobjdump gave no resource line: {_last_lines(printed)}")
    registers, stack, _, local = map(int, found.groups())
    # Triton's shared memory is all dynamic; SHARED is the 1 KB of every block that sm_90 reserves.
    return Resources(registers, stack + local, dynamic_smem, len(cubin))


def cuobjdump(cubin: bytes, what: str) -> str:
    """What Triton's own ``cuobjdump`` prints of a cubin, errors included."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([str(tool), what, file.name], capture_output=True, text=True, check=False)
    return run.stdout + run.stderr


def _last_lines(text: str, count: int = 4) -> str:
    return " / ".join(line.strip() for line in text.strip().splitlines()[-count:])
