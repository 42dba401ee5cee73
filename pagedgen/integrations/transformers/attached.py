"""``Attached``: what a model was attached to, a pack and which of its kernels serve each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pagedgen.errors import InvalidValue, SpecNotInPack
from pagedgen.integrations.serving_pack import LayerKernels, ServingPack
from pagedgen.integrations.transformers.layers import layers_of
from pagedgen.integrations.transformers.step import Step
from pagedgen.values.spec import KInner

if TYPE_CHECKING:
    from pagedgen.integrations.transformers.paged_cache import PagedCache


@dataclass(frozen=True, slots=True)
class Chosen:
    """Kernels of every layer over pools of one block size; ``page_size`` is that of transformers' cache."""

    block_size: int
    page_size: int
    kernels: dict[torch.nn.Module, LayerKernels]


class Attached:
    """A model's layers on the kernels of a pack.

    Raises:
        Unsupported: the model has what no kernel computes; names it.
        SpecNotInPack: the pack does not serve one of the layers.
    """

    def __init__(self, model: Any, pack: ServingPack) -> None:
        self.pack, self.layers = pack, layers_of(model)
        for layer in self.layers.values():
            pack.check(layer)
        self.before: str = model.config._attn_implementation
        self.first = next(iter(self.layers))
        self.batching: Chosen | None = None  # for the manager of continuous batches
        self.generating: PagedCache | None = None  # from a layer's update of it to that layer's attention
        self._step: Step | None = None
        # K and V of each layer as pools, of one cache of transformers'.
        self._cache: object = None
        self._pools: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def choose(self, page_size: int | None = None) -> Chosen:
        """The kernels of the largest block size that serves every layer, and divides a page if there are any.

        Raises:
            InvalidValue: no block size divides a page; says which pages there are kernels for.
            SpecNotInPack: no block size serves all layers.
        """
        sizes = [size for size in self.pack.block_sizes() if self._serves(size)]
        if not sizes:
            held = ", ".join(map(str, self.pack.block_sizes()))
            raise SpecNotInPack(f"{self.pack.pack.path}: none of its block sizes, {held}, serves every layer")
        fits = [size for size in sizes if page_size is None or page_size % size == 0]
        if not fits:
            allowed = f"a multiple of {' or '.join(map(str, sizes))} is allowed with {self.pack.pack.path}"
            raise InvalidValue("page_size", page_size, allowed)
        kernels = {module: self.pack.kernels(layer, fits[-1]) for module, layer in self.layers.items()}
        return Chosen(fits[-1], page_size or fits[-1], kernels)

    def _serves(self, block_size: int) -> bool:
        try:
            for layer in self.layers.values():
                self.pack.kernels(layer, block_size)
        except SpecNotInPack:
            return False
        return True

    def step(self, module: torch.nn.Module, asked: dict[str, Any], trash: int, chosen: Chosen) -> Step:
        """The step that a layer is in; made anew in the first layer: a captured graph makes its own."""
        if module is self.first or self._step is None:
            self._step = Step.of(asked, chosen.block_size, chosen.page_size, trash)
        return self._step

    def pools(self, layer: int, cache: Any, chosen: Chosen) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer, ``[num_blocks, block_size, num_kv_heads, head_dim]``, of the cache."""
        if cache is not self._cache:
            self._cache, self._pools = cache, {}
        found = self._pools.get(layer)
        if found is None:
            pages = cache.layer_to_allocator[layer].get_cache_for_block_table(layer)
            k, v = (pool.flatten(0, 1).unflatten(0, (-1, chosen.block_size)) for pool in pages)
            if self.pack.k_inner is KInner.TOKEN:  # only these kernels read it: a block lies as they like it
                blocks, size, heads, dim = k.shape
                k = k.view(blocks, heads, dim, size).permute(0, 3, 1, 2)
            found = self._pools[layer] = (k, v)
        return found
