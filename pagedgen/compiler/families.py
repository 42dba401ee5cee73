"""The families there are, and which one serves a spec on a target."""

from __future__ import annotations

import hashlib
from functools import cache

from pagedgen.errors import Unsupported
from pagedgen.templates.family import Family
from pagedgen.values.spec import KernelSpec, Op
from pagedgen.values.target import Target


@cache
def families() -> dict[tuple[str, Op], Family]:
    """Families by (target kind, op). HIP targets use the CUDA kind's Triton templates."""
    from pagedgen.templates.triton.decode import FAMILY as TRITON_DECODE
    from pagedgen.templates.tvm.decode import FAMILY as TVM_DECODE

    return {
        ("cuda", Op.DECODE): TRITON_DECODE,
        ("hip", Op.DECODE): TRITON_DECODE,
        ("cpu", Op.DECODE): TVM_DECODE,
    }


def family_for(spec: KernelSpec, target: Target) -> Family:
    """The family that renders ``spec`` for ``target``.

    Raises:
        Unsupported: no template covers the spec on this target; says which field.
    """
    family = families().get((target.kind, spec.op))
    if family is None:
        raise Unsupported(f"op {spec.op} on target kind {target.kind}: no template")
    family.check(spec, target)
    return family


@cache
def template_hash(family: Family) -> str:
    """First 12 hex digits of the SHA-256 over the family's template sources; records are stamped with it."""
    digest = hashlib.sha256()
    for path in (family.source, *family.shared):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
