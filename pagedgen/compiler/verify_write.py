"""A case of write_kv's gate: every byte of the pool is what torch's clamp, cast and scatter leave there."""

from __future__ import annotations

from typing import Any

import torch

from pagedgen.compiler.verify import Pool, empty_pool
from pagedgen.compiler.verify_faults import Outside
from pagedgen.runtime.attention import TORCH_DTYPES
from pagedgen.values.spec import KernelSpec, KVScale, Rope


class WriteCase:
    """Arguments of one call, and what the pools must hold after it.

    New K and V are cut from one tensor, as a fused projection leaves them. Values reach from an FP8 type's
    subnormals past its largest, zeros of both signs and NaN included; pools hold other bytes before.

    K that rope turns is compared with float64's: a stored element is what some value within float32's error
    of that is rounded to, so it lies between what the two ends of the error are rounded to. Elements that are
    not turned are held bit for bit, a zero beside an infinity among them.
    """

    def __init__(self, spec: KernelSpec, count: int, pool: Pool, device: torch.device, seed: int) -> None:
        make = torch.Generator(device="cpu").manual_seed(seed)
        heads, dim, v_dim = spec.num_kv_heads, spec.head_dim, spec.v_dim
        num_blocks = -(-count // spec.block_size) + 3
        both = torch.randn(count, 3 * heads, max(dim, v_dim), generator=make)
        both *= torch.exp2(torch.randint(-14, 16, both.shape, generator=make).float())
        both[0, heads:, :4] = torch.tensor([0.0, -0.0, float("nan"), -1.0])
        both[0, heads:, dim - 2 : dim] = torch.tensor([-0.0, float("inf")])
        both = both.to(TORCH_DTYPES[spec.q_dtype]).to(device)
        self.new_k, self.new_v = both[:, heads : 2 * heads, :dim], both[:, 2 * heads :, :v_dim]
        slots = torch.randperm(num_blocks * spec.block_size, generator=make)[:count]
        if count > 1:
            slots[::5] = -1
        self.slots = slots.to(device)
        num_slots = num_blocks * spec.block_size
        self.outside = Outside(self.slots, num_slots) if spec.checked else None
        self.kept = (self.slots >= 0) & (self.slots < num_slots)
        k, v = empty_pool(spec, num_blocks, pool, device)
        scales: list[torch.Tensor | None] = [None, None]
        expected = []
        for i, (held, new) in enumerate(((k, self.new_k), (v, self.new_v))):
            bytes_ = torch.randint(0, 60, held.shape, generator=make, dtype=torch.int32)
            held.copy_(bytes_.to(device))
            if spec.kv_dtype.is_fp8:
                size = heads if spec.kv_scale is KVScale.HEAD else 1
                scale = torch.rand(size, generator=make) + 0.5
                # In eighths, many quotients lie exactly between two codes.
                scales[i] = (scale if pool == "nhd" else (8 * scale).round() / 8).to(device)
            ends = [new]
            if spec.rope is not Rope.NONE and i == 0:
                self.positions, self.cos_sin = self._angles(spec, count, make)
                turned, error = turn(new, self.positions, self.cos_sin, spec.rope)
                ends = [turned - error, turned + error]
            expected.append([self._expected(spec, held, end, scales[i]) for end in ends])
        self.expected = expected
        self.rotary_dim = spec.rotary_dim or dim
        self.turns: tuple[torch.Tensor, ...] = ()
        if spec.rope is not Rope.NONE:
            self.turns = (self.positions.to(device), self.cos_sin.to(device))
        kind = TORCH_DTYPES[spec.kv_dtype]
        self.k, self.v = (k.view(kind), v.view(kind)) if spec.kv_dtype.is_fp8 else (k, v)
        self.k_scale, self.v_scale = scales

    @staticmethod
    def _angles(spec: KernelSpec, count: int, make: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions out of order, and cosines and sines of the usual angles."""
        half = (spec.rotary_dim or spec.head_dim) // 2
        angles = torch.arange(4096)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        return torch.randint(0, 4096, (count,), generator=make), torch.cat((angles.cos(), angles.sin()), 1)

    def _expected(
        self, spec: KernelSpec, held: torch.Tensor, new: torch.Tensor, scale: torch.Tensor | None
    ) -> torch.Tensor:
        kept = self.kept
        if scale is not None:
            kind = TORCH_DTYPES[spec.kv_dtype]
            most = torch.finfo(kind).max
            new = (new.float() / scale[:, None]).clamp(-most, most).to(kind).view(torch.uint8)
        result = held.clone()
        blocks = self.slots[kept] // spec.block_size
        result[blocks, self.slots[kept] % spec.block_size] = new[kept].to(result.dtype)
        return result

    def call(self, callee: Any, variant: int) -> None:
        """Call the operator."""
        callee.write_kv(
            self.new_k, self.new_v, self.slots, self.k, self.v, self.k_scale, self.v_scale, variant,
            *self.turns, *([self.outside.record] if self.outside else []),
        )  # fmt: skip

    def judge(self) -> str:
        """Why the pools are wrong, or nothing."""
        for name, held, ends in (("k", self.k, self.expected[0]), ("v", self.v, self.expected[1])):
            got, wanted = (x.contiguous().view(torch.uint8).view(*x.shape, -1) for x in (held, ends[0]))
            same = (got == wanted).all(-1)
            if held.element_size() == 1:  # a code of NaN has either sign: casts differ in it
                same |= (got & 0x7F == 0x7F).all(-1) & (wanted & 0x7F == 0x7F).all(-1)
            if len(ends) == 2:
                stored, low, high = (x.view(held.dtype).double() for x in (held, *ends))
                turned = torch.arange(held.shape[-1], device=held.device) < self.rotary_dim
                same = torch.where(turned, (low <= stored) & (stored <= high), same)
                same |= stored.isnan() & low.isnan()
            if not bool(same.all()):
                block, place, head, dim = (~same).nonzero()[0].tolist()
                count = int((~same).sum())
                return f"{count} wrong elements of {name}, the first at [{block}, {place}, {head}, {dim}]"
        return self.outside.judge() if self.outside else ""


def turn(
    x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, rope: Rope
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding of rows in float64, and what float32 may differ from it by.

    Args:
        x: ``[num_tokens, num_heads, head_dim]``.
        positions: int64 ``[num_tokens]``.
        cos_sin: ``[max_position, rotary_dim]``, cosines and then sines.
    """
    x = x.double()
    half = cos_sin.shape[1] // 2
    cos, sin = cos_sin[positions].to(x.device).double()[:, None].tensor_split(2, dim=-1)
    result, size = x.clone(), torch.zeros_like(x)
    one, other = (slice(0, half), slice(half, 2 * half)) if rope is Rope.NEOX else (
        slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    )  # fmt: skip
    a, b = x[..., one], x[..., other]
    result[..., one], result[..., other] = a * cos - b * sin, b * cos + a * sin
    for part, p, q in ((one, a, b), (other, b, a)):
        size[..., part] = (p * cos).abs() + (q * sin).abs()
    return result, torch.where(size.isfinite(), 2.0**-22 * size, 0.0)
