"""The grid of decode specs that is proved on real GPUs: head dims, ratios, block sizes and formats."""

from __future__ import annotations

from pagedgen.values.spec import DType, KernelSpec, KVScale, Op


def spec(
    head_dim: int,
    heads: tuple[int, int],
    block_size: int,
    q: str,
    kv: str,
    scale: str = "tensor",
    lse: bool = False,
) -> KernelSpec:
    kv_dtype = DType(kv)
    kv_scale = KVScale(scale) if kv_dtype.is_fp8 else KVScale.NONE
    return KernelSpec(Op.DECODE, head_dim, *heads, block_size, DType(q), kv_dtype, kv_scale, return_lse=lse)


def grid() -> tuple[KernelSpec, ...]:
    """At least 60 specs: every value of every axis, crossed where axes meet in a kernel."""
    specs = []
    formats = [
        ("f16", "f16"),
        ("bf16", "bf16"),
        ("f16", "fp8_e4m3"),
        ("bf16", "fp8_e4m3"),
        ("bf16", "fp8_e5m2"),
    ]
    for q, kv in formats:  # the shape of Llama 3 8B, at every block size
        for block_size in (1, 8, 16, 32, 64, 128, 256, 544):
            if q == kv or block_size in (1, 16, 64, 544):
                specs.append(spec(128, (32, 8), block_size, q, kv))
    for head_dim in (32, 40, 64, 72, 80, 96, 112, 160, 192, 256):
        specs.append(spec(head_dim, (32, 8), 16, "f16", "f16", lse=head_dim in (80, 160)))
        specs.append(spec(head_dim, (32, 8), 16, "bf16", "fp8_e4m3", "head", lse=head_dim == 96))
    for heads in ((8, 8), (16, 8), (40, 8), (28, 4), (64, 8), (64, 4), (32, 1), (71, 1)):
        specs.append(spec(128 if heads[0] != 71 else 64, heads, 16, "bf16", "bf16"))
        specs.append(spec(128 if heads[0] != 71 else 64, heads, 64, "f16", "fp8_e4m3", lse=heads == (28, 4)))
    specs.append(spec(96, (32, 32), 16, "f16", "f16"))  # Phi 3 mini
    specs.append(spec(80, (32, 32), 32, "f16", "fp8_e5m2", "head"))  # Phi 2
    return tuple(dict.fromkeys(specs))
