"""The families there are, and which one serves a spec on a target."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from functools import cache
from pathlib import Path

from pagedgen.errors import Unsupported
from pagedgen.templates.family import TEMPLATES, Family
from pagedgen.values.spec import KernelSpec, Op
from pagedgen.values.target import Target

HERE = Path(__file__).parent

# (target kind, op) -> the module whose FAMILY renders it. HIP targets share CUDA's Triton templates.
MODULES = {
    ("cuda", Op.DECODE): "pagedgen.templates.triton.decode",
    ("cuda", Op.EXTEND): "pagedgen.templates.triton.extend",
    ("cuda", Op.VERIFY): "pagedgen.templates.triton.verify",
    ("cuda", Op.WRITE_KV): "pagedgen.templates.triton.write_kv",
    ("cuda", Op.COPY_BLOCKS): "pagedgen.templates.triton.copy_blocks",
    ("cuda", Op.KV_SCALES): "pagedgen.templates.triton.kv_scales",
    ("hip", Op.KV_SCALES): "pagedgen.templates.triton.kv_scales",
    ("cuda", Op.MERGE): "pagedgen.templates.triton.merge",
    ("hip", Op.MERGE): "pagedgen.templates.triton.merge",
    ("cuda", Op.GATHER): "pagedgen.templates.triton.gather",
    ("hip", Op.WRITE_KV): "pagedgen.templates.triton.write_kv",
    ("hip", Op.COPY_BLOCKS): "pagedgen.templates.triton.copy_blocks",
    ("hip", Op.GATHER): "pagedgen.templates.triton.gather",
    ("hip", Op.DECODE): "pagedgen.templates.triton.decode",
    ("hip", Op.EXTEND): "pagedgen.templates.triton.extend",
    ("hip", Op.VERIFY): "pagedgen.templates.triton.verify",
    ("cpu", Op.DECODE): "pagedgen.templates.tvm.decode",
    ("cpu", Op.EXTEND): "pagedgen.templates.tvm.extend",
    ("cpu", Op.VERIFY): "pagedgen.templates.tvm.verify",
    ("cpu", Op.WRITE_KV): "pagedgen.templates.tvm.write_kv",
}


# Beside its own files, what decides about kernels of a family, by its kind: how they are compiled, what is
# refused of that (a kernel kept from before a check was changed is looked through again), and the launcher.
BESIDE = {
    "cuda": (HERE / "triton.py", HERE / "sass.py", TEMPLATES / "launcher" / "gpu.cc.j2"),
    "cpu": (HERE / "tvm.py", TEMPLATES / "launcher" / "cpu.cc.j2"),
}


def family_for(spec: KernelSpec, target: Target) -> Family:
    """The family that renders ``spec`` for ``target``.

    Raises:
        Unsupported: no template covers the spec on this target; says which field.
    """
    module = MODULES.get((target.kind, spec.op))
    if module is None:
        by_torch = (Op.GATHER, Op.COPY_BLOCKS, Op.MERGE, Op.KV_SCALES)
        instead = "; the runtime has torch do it" if spec.op in by_torch else ""
        raise Unsupported(f"op {spec.op} on target kind {target.kind}: no template{instead}")
    family: Family = importlib.import_module(module).FAMILY
    for mask in spec.masks:
        if mask not in family.masks:
            value = getattr(spec, mask)
            raise Unsupported(
                f"{mask} = {value}: {family.name} covers {', '.join(family.masks) or 'no such feature'}"
            )
    if spec.head_dim_v is not None and not family.v_dims:
        raise Unsupported(
            f"head_dim_v = {spec.head_dim_v}: {family.name} covers head_dim_v = head_dim ({spec.head_dim})"
        )
    if spec.batch_invariant and not family.invariant:
        raise Unsupported(f"batch_invariant = True: the bits of {family.name} follow from the batch")
    family.check(spec, target)
    return family


@cache
def template_hash(family: Family) -> str:
    """First 12 hex digits of the SHA-256 over all that makes a kernel of the family what it is.

    The workers of a shared study agree on it and compiled kernels are kept under it: both are strict, since
    an edit costs no more than compiling again. The family's module counts, since it decides what is rendered
    in; so do the compiler's options and the launcher, which on a CPU shares out the work. Records say which
    kernel they are of by ``kernel_hash`` instead.
    """
    digest = hashlib.sha256()
    module = Path(inspect.getfile(type(family)))
    for path in (family.source, *family.shared, module, *BESIDE[family.kind]):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
