"""The families there are, and which one serves a spec on a target."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from functools import cache
from pathlib import Path

from pagedgen.errors import Unsupported
from pagedgen.templates.family import Family
from pagedgen.values.spec import KernelSpec, Op
from pagedgen.values.target import Target

# (target kind, op) -> the module whose FAMILY renders it. HIP targets share CUDA's Triton templates.
MODULES = {
    ("cuda", Op.DECODE): "pagedgen.templates.triton.decode",
    ("hip", Op.DECODE): "pagedgen.templates.triton.decode",
    ("cpu", Op.DECODE): "pagedgen.templates.tvm.decode",
}


def family_for(spec: KernelSpec, target: Target) -> Family:
    """The family that renders ``spec`` for ``target``.

    Raises:
        Unsupported: no template covers the spec on this target; says which field.
    """
    module = MODULES.get((target.kind, spec.op))
    if module is None:
        raise Unsupported(f"op {spec.op} on target kind {target.kind}: no template")
    family: Family = importlib.import_module(module).FAMILY
    family.check(spec, target)
    return family


@cache
def template_hash(family: Family) -> str:
    """First 12 hex digits of the SHA-256 over the family's sources; records are stamped with it.

    The family's module counts, since it decides what is rendered in: an edit there may change the kernel.
    """
    digest = hashlib.sha256()
    for path in (family.source, *family.shared, Path(inspect.getfile(type(family)))):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
