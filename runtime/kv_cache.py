"""``KVCache``: the bytes behind the blocks, for all layers, and the batched operations on them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from pagedgen.errors import InvalidPool
from pagedgen.runtime.arrays import I32, I64
from pagedgen.runtime.attention import TORCH_DTYPES, Attention
from pagedgen.runtime.block_pools import BlockPools, upload
from pagedgen.runtime.huge_pages import use_huge_pages
from pagedgen.runtime.kv_layout import KVLayout
from pagedgen.runtime.kv_scales import set_scales
from pagedgen.values.spec import DType, KernelSpec, KVScale, Op, Rope

STAGING_BYTES = 64 << 20  # of device memory for blocks on their way to or from the host


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token's K and V look like, in all layers.

    Raises:
        InvalidPool: a number below 1, or a scale that does not fit the type.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 16
    dtype: DType = DType.F16
    kv_scale: KVScale = KVScale.NONE
    layout: KVLayout = KVLayout.NHD

    def __post_init__(self) -> None:
        for field in ("num_layers", "num_kv_heads", "head_dim", "block_size"):
            value = getattr(self, field)
            if type(value) is not int or value < 1:
                raise InvalidPool(field, value, "an integer from 1 is allowed")
        if self.dtype.is_fp8 == (self.kv_scale is KVScale.NONE):
            allowed = "fp8 takes 'tensor' or 'head', other types take 'none'"
            raise InvalidPool("kv_scale", self.kv_scale.value, allowed)

    @property
    def page_bytes(self) -> int:
        """Bytes of one block in one plane of one layer."""
        elements = self.block_size * self.num_kv_heads * self.head_dim
        return elements * self.dtype.size * 2 // self.layout.planes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers, K and V."""
        return self.page_bytes * self.layout.planes * self.num_layers

    def num_blocks(self, budget_bytes: int) -> int:
        """Blocks that a memory budget holds, the spare block of :class:`KVCache` paid.

        Raises:
            InvalidPool: not even one.
        """
        blocks = budget_bytes // self.block_bytes - 1
        if blocks < 1:
            allowed = f"at least two blocks of {self.block_bytes} bytes are allowed"
            raise InvalidPool("budget_bytes", budget_bytes, allowed)
        return int(blocks)

    def num_blocks_of_free(self, fraction: float, device: torch.device) -> int:
        """Blocks that a fraction of the device's free memory holds.

        Raises:
            InvalidPool: a fraction outside 0 to 1, or not even one block.
        """
        if not 0 < fraction <= 1:
            raise InvalidPool("fraction", fraction, "above 0 and up to 1 is allowed")
        return self.num_blocks(int(free_memory(device) * fraction))


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on a device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123 - not a real file
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise InvalidPool("device", device, "the free memory of this system cannot be read: state a budget")


class KVCache:
    """Pools of K and V for all layers.

    Storage is one tensor ``[num_layers, planes, num_blocks + 1, page]``, so that one gather and one scatter
    move any number of blocks in all layers at once. The block behind the last is a spare that takes what is
    written to slot -1 (padding), which spares captured graphs a branch.

    Args:
        shape: see :class:`KVShape`.
        num_blocks: blocks of the pool, as many as the block manager has.
        device: where the pool is.
        num_host_blocks: blocks of host memory (pinned for a GPU) to swap to.
        k_scale, v_scale: float32 ``[num_layers, 1]`` or ``[num_layers, num_kv_heads]`` for an fp8 pool: what
            stored values are multiplied with. Ones if not given.
        attention: a pack whose write_kv, copy_blocks and gather kernels are used where they fit the shape;
            torch's operators are elsewhere, and give the same bytes.
        dynamic_scales: scales that are 0, which they then are if not given, are set by the first tokens that
            are written to their layer: see :func:`pagedgen.runtime.kv_scales.set_scales`. For an fp8 pool.
    """

    def __init__(
        self,
        shape: KVShape,
        num_blocks: int,
        device: torch.device | str = "cpu",
        *,
        num_host_blocks: int = 0,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        attention: Attention | None = None,
        dynamic_scales: bool = False,
    ) -> None:
        if type(num_blocks) is not int or num_blocks < 1:
            raise InvalidPool("num_blocks", num_blocks, "an integer from 1 is allowed")
        self.shape, self.num_blocks, self.device = shape, num_blocks, torch.device(device)
        planes = shape.layout.planes
        # Zeros, not what was there: a masked key times a NaN of old memory would be NaN.
        self.storage = torch.empty(
            (shape.num_layers, planes, num_blocks + 1, shape.page_bytes),
            dtype=torch.uint8,
            device=self.device,
        )
        use_huge_pages(self.storage)
        self.storage.zero_()
        pin = self.device.type == "cuda"
        self.host = torch.empty(
            (num_host_blocks, shape.num_layers, planes, shape.page_bytes), dtype=torch.uint8, pin_memory=pin
        )
        dtype = TORCH_DTYPES[shape.dtype]
        # Index and copy operations know no fp8: bytes are bytes.
        self.fp8_type = dtype if shape.dtype.is_fp8 else None
        writable = torch.uint8 if shape.dtype.is_fp8 else dtype
        typed = self.storage.view(dtype)
        geometry = (shape.block_size, shape.num_kv_heads, shape.head_dim)
        layers = [shape.layout.views(layer, *geometry) for layer in typed]
        self.k = [
            k[:num_blocks] for k, _ in layers
        ]  # a layer: [num_blocks, block_size, num_kv_heads, head_dim]
        self.v = [v[:num_blocks] for _, v in layers]
        raw = [shape.layout.views(layer, *geometry) for layer in self.storage.view(writable)]
        self._raw = raw  # with the spare block
        self.attention = attention
        self._writers = {} if attention is None else kernels_for(Op.WRITE_KV, attention, shape)
        self._gatherers = {} if attention is None else kernels_for(Op.GATHER, attention, shape)
        if dynamic_scales and not shape.dtype.is_fp8:
            raise InvalidPool("dynamic_scales", True, f"False is allowed for {shape.dtype.value}: no scales")
        self.dynamic_scales = dynamic_scales
        self.k_scale = self._scale("k_scale", k_scale)
        self.v_scale = self._scale("v_scale", v_scale)
        self._scalers = {} if attention is None else kernels_for(Op.KV_SCALES, attention, shape)
        # Eight bytes at a time where the page allows it: a gather of single bytes is slow.
        wide = torch.int64 if shape.page_bytes % 8 == 0 else torch.uint8
        self.blocks = self.storage.view(wide).flatten(0, 1)  # [layers * planes, num_blocks + 1, page]
        self._host_blocks = self.host.view(wide).flatten(1, 2)  # [num_host_blocks, layers * planes, page]
        self.pools = BlockPools.stacked(self.blocks)
        copier = None if attention is None else attention.copier(self.pools.align)
        self.copier = None if copier is None else copier.spec
        self._side = torch.cuda.Stream(self.device) if pin else None  # type: ignore[no-untyped-call]

    def slots(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer as token slots ``[num_blocks * block_size, num_kv_heads, head_dim]``.

        Raises:
            InvalidPool: only the NHD layout can be read so.
        """
        if self.shape.layout is not KVLayout.NHD:
            raise InvalidPool("layout", self.shape.layout.value, "token slots are a view of 'nhd'")
        return self.k[layer].flatten(0, 1), self.v[layer].flatten(0, 1)

    def write_kv(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """Store K and V of new tokens, converted to the pool's type.

        Args:
            k, v: ``[num_tokens, num_kv_heads, head_dim]``, any float type.
            slots: int64 ``[num_tokens]``, block * block_size + offset, on the pool's device; -1: padding.
        """
        if self.dynamic_scales:
            self.set_scales(layer, k, v, slots)
        spec = self.writer(k, v)
        if spec is not None:
            assert self.attention is not None
            k_scale = None if self.k_scale is None else self.k_scale[layer]
            v_scale = None if self.v_scale is None else self.v_scale[layer]
            self.attention.write_kv(
                k, v, slots, self.k[layer], self.v[layer], k_scale=k_scale, v_scale=v_scale, spec=spec
            )
            return
        for pool, new, scale in zip(self._raw[layer], (k, v), (self.k_scale, self.v_scale), strict=True):
            store(pool, new, slots, None if scale is None else scale[layer], self.fp8_type)

    def writer(self, k: torch.Tensor, v: torch.Tensor) -> KernelSpec | None:
        """The kernel that stores K and V of new tokens of these types here; None: torch's operators do."""
        return self._writers.get(k.dtype) if k.dtype == v.dtype else None

    def set_scales(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """Set those of a layer's scales that are 0 by new K and V, as :meth:`write_kv` does if dynamic.

        A captured graph need not hold it: once every layer was written to, nothing is left to set.
        """
        assert self.k_scale is not None and self.v_scale is not None and self.fp8_type is not None
        k_scale, v_scale = self.k_scale[layer], self.v_scale[layer]
        spec = self.scaler(k, v)
        if spec is not None:
            assert self.attention is not None
            self.attention.kv_scales(k, v, slots, k_scale, v_scale, spec=spec)
            return
        for new, scale in ((k, k_scale), (v, v_scale)):
            set_scales(new, slots, scale, self.fp8_type)

    def scaler(self, k: torch.Tensor, v: torch.Tensor) -> KernelSpec | None:
        """The kernel that sets scales by K and V of these types; None: torch's operators do."""
        return self._scalers.get(k.dtype) if k.dtype == v.dtype else None

    def raw(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer with the spare block, fp8 as bytes: what :func:`store` writes to."""
        return self._raw[layer]

    def token_slots(self, blocks: I32, num_tokens: int) -> torch.Tensor:
        """Slots of the first tokens of a sequence, int64 ``[num_tokens]`` on the device, from its blocks.

        Raises:
            InvalidPool: the blocks hold fewer tokens.
        """
        size = self.shape.block_size
        if not 0 <= num_tokens <= len(blocks) * size:
            raise InvalidPool("num_tokens", num_tokens, f"0 to {len(blocks) * size}, which the blocks hold")
        slots = blocks.astype(np.int64)[:, None] * size + np.arange(size)
        return upload(slots.reshape(-1)[:num_tokens], self.device)

    def gather(
        self, layer: int, slots: torch.Tensor, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of tokens in one piece, ``[num_tokens, num_kv_heads, head_dim]`` each, to send or look at.

        Args:
            slots: int64 ``[num_tokens]``, block * block_size + offset, on the pool's device; see
                :meth:`token_slots`.
            dtype: a float type that an fp8 pool is dequantised to. As they are stored if not given.

        Raises:
            InvalidPool: another type than the pool's, which is not fp8.
        """
        held = TORCH_DTYPES[self.shape.dtype]
        dtype = dtype or held
        if dtype != held and not (self.shape.dtype.is_fp8 and dtype.is_floating_point and dtype.itemsize > 1):
            allowed = f"{held}, or a wider float type for an fp8 pool, is allowed"
            raise InvalidPool("dtype", dtype, allowed)
        scales = [None if s is None or dtype == held else s[layer] for s in (self.k_scale, self.v_scale)]
        spec = self._gatherers.get(dtype)
        if spec is not None:
            assert self.attention is not None
            shape = (len(slots), self.shape.num_kv_heads, self.shape.head_dim)
            k, v = (torch.empty(shape, dtype=dtype, device=self.device) for _ in range(2))
            self.attention.gather(
                slots, self.k[layer], self.v[layer], k, v, k_scale=scales[0], v_scale=scales[1], spec=spec
            )
            return k, v
        blocks = torch.div(slots, self.shape.block_size, rounding_mode="floor")
        places = slots - blocks * self.shape.block_size
        found = []
        for pool, scale in zip(self._raw[layer], scales, strict=True):
            rows = pool[blocks, places].view(held)
            found.append(rows if scale is None else (rows.float() * scale[:, None]).to(dtype))
        return found[0], found[1]

    def copy_blocks(self, pairs: I32) -> None:
        """Copy whole blocks, ``[n, 2]`` of (source, destination), in all layers at once.

        All is read before anything is written. One launch with a pack's kernel, whatever ``n``; one gather
        and one scatter without, or where a block is both read and written.
        """
        if not pairs.size:
            return
        index = self._index(pairs)
        if self.copier is not None and not np.isin(pairs[:, 1], pairs[:, 0]).any():
            assert self.attention is not None
            self.attention.copy_blocks(self.pools, index, spec=self.copier)
        else:
            copy_by_torch(self.blocks, index)

    def move_blocks(self, pairs: I32, batch: int | None = None) -> None:
        """As :meth:`copy_blocks`, in batches of bounded memory; for moves whose batches do not overlap."""
        batch = batch or self._batch
        for i in range(0, len(pairs), batch):
            self.copy_blocks(pairs[i : i + batch])

    def swap_out(self, pairs: I32) -> None:
        """Copy blocks to the host, ``[n, 2]`` of (block, host block).

        On a GPU the blocks are gathered on the current stream, so that they may be overwritten by what is
        launched next, and travel on a stream of their own beside it.
        """
        for i in range(0, len(pairs), self._batch):
            part = pairs[i : i + self._batch]
            gathered = self._gathered(part[:, 0])
            if self._side is None:
                self._host_blocks[torch.from_numpy(part[:, 1].astype(np.int64))] = gathered
                continue
            self._side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._side):
                for first, last in runs(part[:, 1]):
                    start = int(part[first, 1])
                    self._host_blocks[start : start + last - first].copy_(
                        gathered[first:last], non_blocking=True
                    )
            gathered.record_stream(self._side)

    def swap_in(self, pairs: I32) -> None:
        """Copy blocks from the host, ``[n, 2]`` of (host block, block); the current stream waits for them."""
        for i in range(0, len(pairs), self._batch):
            part = pairs[i : i + self._batch]
            if self._side is None:
                landed = self._host_blocks[torch.from_numpy(part[:, 0].astype(np.int64))]
            else:
                shape = (len(part), *self._host_blocks.shape[1:])
                landed = torch.empty(shape, dtype=self.blocks.dtype, device=self.device)
                self._side.wait_stream(torch.cuda.current_stream(self.device))
                with torch.cuda.stream(self._side):  # behind swap-outs of the same host blocks
                    for first, last in runs(part[:, 0]):
                        start = int(part[first, 0])
                        host = self._host_blocks[start : start + last - first]
                        landed[first:last].copy_(host, non_blocking=True)
                landed.record_stream(self._side)
                torch.cuda.current_stream(self.device).wait_stream(self._side)
            self._scatter(landed, part[:, 1])

    def _gathered(self, blocks: I32) -> torch.Tensor:
        """Blocks side by side, ``[n, layers * planes, page]``."""
        if self.copier is None:
            return self.blocks.index_select(1, self._index(blocks)).transpose(0, 1).contiguous()
        assert self.attention is not None
        shape = (len(blocks), self.blocks.shape[0], self.blocks.shape[2])
        gathered = torch.empty(shape, dtype=self.blocks.dtype, device=self.device)
        pairs = self._index(blocks, np.arange(len(blocks)))
        into = BlockPools.stacked(gathered.transpose(0, 1))
        self.attention.copy_blocks(self.pools, pairs, into=into, spec=self.copier)
        return gathered

    def _scatter(self, landed: torch.Tensor, blocks: I32) -> None:
        """The way back from what :meth:`_gathered` gives."""
        if self.copier is None:
            self.blocks.index_copy_(1, self._index(blocks), landed.transpose(0, 1))
            return
        assert self.attention is not None
        pairs = self._index(np.arange(len(blocks)), blocks)
        landed_pools = BlockPools.stacked(landed.transpose(0, 1))
        self.attention.copy_blocks(landed_pools, pairs, into=self.pools, spec=self.copier)

    @property
    def _batch(self) -> int:
        return max(1, STAGING_BYTES // self.shape.block_bytes)

    def _index(self, *columns: I32 | I64) -> torch.Tensor:
        """Block numbers on the device, int64 ``[n]``, or ``[n, 2]`` for two columns or rows of two."""
        index: I64 = (
            np.column_stack(columns).astype(np.int64) if len(columns) > 1 else columns[0].astype(np.int64)
        )
        return upload(index, self.device)

    def _scale(self, name: str, scale: torch.Tensor | None) -> torch.Tensor | None:
        shape = self.shape
        if shape.kv_scale is KVScale.NONE:
            if scale is not None:
                raise InvalidPool(name, tuple(scale.shape), f"no scale is allowed for {shape.dtype.value}")
            return None
        wanted = (shape.num_layers, shape.num_kv_heads if shape.kv_scale is KVScale.HEAD else 1)
        if scale is None and self.dynamic_scales:
            return torch.zeros(wanted, dtype=torch.float32, device=self.device)
        if scale is None:
            return torch.ones(wanted, dtype=torch.float32, device=self.device)
        if tuple(scale.shape) != wanted or scale.dtype != torch.float32:
            raise InvalidPool(name, (tuple(scale.shape), scale.dtype), f"float32 {list(wanted)} is allowed")
        return scale.to(self.device)


def kernels_for(op: Op, attention: Attention, shape: KVShape) -> dict[torch.dtype, KernelSpec]:
    """A pack's kernels of an operator for pools of a shape, by the type outside the pool; none with rope."""
    found = {}
    for spec in attention.specs:
        block_size = 1 if op is Op.KV_SCALES else shape.block_size
        wanted = (op, shape.num_kv_heads, shape.head_dim, block_size, shape.dtype)
        held = (spec.op, spec.num_kv_heads, spec.head_dim, spec.block_size, spec.kv_dtype)
        as_stored = op is Op.GATHER and spec.q_dtype == spec.kv_dtype
        fits = held == wanted and spec.head_dim_v is None and spec.rope is Rope.NONE
        fits = fits and (op is Op.KV_SCALES or spec.k_inner is shape.layout.k_inner)
        if fits and (as_stored or spec.kv_scale is shape.kv_scale):
            found[TORCH_DTYPES[spec.q_dtype]] = spec
    return found


def copy_by_torch(blocks: torch.Tensor, pairs: torch.Tensor) -> None:
    """Copy blocks of ``[planes, num_blocks, page]`` by int64 ``[n, 2]`` pairs; all is read, then written.

    On a CPU one copy a pair, where none is both read and written: each byte is read and written once, not
    twice, which is 2.5 times as fast for 64 blocks of 2 MiB (5 GB/s both ways of a plain copy's 13).
    """
    if blocks.device.type == "cpu":
        listed = pairs.tolist()
        if not {source for source, _ in listed} & {into for _, into in listed}:
            for source, into in listed:
                blocks[:, into].copy_(blocks[:, source])
            return
    blocks.index_copy_(1, pairs[:, 1], blocks.index_select(1, pairs[:, 0]))


def store(
    pool: torch.Tensor,
    new: torch.Tensor,
    slots: torch.Tensor,
    scale: torch.Tensor | None,
    fp8_type: torch.dtype | None,
) -> None:
    """Write ``new`` ``[num_tokens, num_kv_heads, head_dim]`` to ``slots`` of one pool.

    Args:
        pool: ``[num_blocks + 1, block_size, num_kv_heads, head_dim]``, any strides; uint8 for fp8.
        slots: int64 ``[num_tokens]``; -1 goes to the spare block at the pool's end.
        scale: float32 ``[1]`` or ``[num_kv_heads]``, with ``fp8_type``; None without.
    """
    if fp8_type is None or scale is None:
        new = new.to(pool.dtype)
    else:
        most = torch.finfo(fp8_type).max
        scaled = (new.float() / scale[:, None]).clamp(-most, most)  # saturate: the cast alone gives NaN
        new = scaled.to(fp8_type).view(torch.uint8)
    # Slot -1 floors to block -1: the spare one, by Python's and torch's indexing alike.
    blocks = torch.div(slots, pool.shape[1], rounding_mode="floor")
    pool.index_put_((blocks, slots - blocks * pool.shape[1]), new)


def runs(numbers: I32 | I64) -> list[tuple[int, int]]:
    """Index ranges (first, last + 1) in which ``numbers`` count up by one."""
    if not len(numbers):
        return []
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    edges = [0, *cuts.tolist(), len(numbers)]
    return list(pairwise(edges))
