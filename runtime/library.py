"""``Library``: one host library of a spec, loaded: the ABI of docs/architecture.md as Python calls.

Violations of the call contract arrive as :class:`pagedgen.errors.ArgumentError`, raised in the library before
any launch; a driver that refuses a kernel as :class:`pagedgen.errors.LaunchError`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tvm_ffi

from pagedgen import errors
from pagedgen.values.spec import Op

if TYPE_CHECKING:
    import torch

    Decode = Callable[
        [
            torch.Tensor,  # q
            torch.Tensor,  # k
            torch.Tensor,  # v
            torch.Tensor,  # block_table
            torch.Tensor,  # seq_lens
            torch.Tensor,  # out
            torch.Tensor | None,  # lse
            float,  # softmax_scale
            torch.Tensor | None,  # k_scale
            torch.Tensor | None,  # v_scale
            torch.Tensor,  # workspace
            int,  # max_seq_len
            int,  # variant
        ],
        None,
    ]
    # As Decode with cu_seqlens_q after seq_lens; a spec with sinks takes them as one more argument, the last,
    # and one with a tree mask takes that behind them.
    Extend = Callable[..., None]
    # new_k, new_v (of gather out_k, out_v), slot_mapping, k, v, k_scale, v_scale, variant, and with rope
    # positions and cos_sin
    WriteKV = Callable[..., None]
    CopyBlocks = Callable[
        [
            int,  # src_origin
            int,  # dst_origin
            torch.Tensor,  # src
            torch.Tensor,  # dst
            torch.Tensor,  # pairs
            int,  # page_bytes
            int,  # variant
        ],
        None,
    ]

# Error kinds that launchers raise (templates/launcher), as the exceptions they stand for.
for _error in (errors.ArgumentError, errors.LaunchError, errors.DeviceMissing, errors.PackForeign):
    tvm_ffi.register_error(f"pagedgen.{_error.__name__}", _error)


def _optional(module: Any, name: str) -> Any:
    try:
        return module.get_function(name)
    except AttributeError:
        return None


class Library:
    """A loaded library. It has the one function that is named after its spec's operator:

    - ``decode(q, k, v, block_table, seq_lens, out, lse, softmax_scale, k_scale, v_scale, workspace,
      max_seq_len, variant[, sinks])``
    - ``extend(q, k, v, block_table, seq_lens, cu_seqlens_q, out, lse, softmax_scale, k_scale, v_scale,
      workspace, max_seq_len, variant[, sinks])``
    - ``verify(…)``: as extend, with ``tree_mask`` as one more argument if the spec has one

    - ``write_kv(new_k, new_v, slot_mapping, k, v, k_scale, v_scale, variant[, positions, cos_sin]
      [, faults])``
    - ``gather(out_k, out_v, slot_mapping, k, v, k_scale, v_scale, variant[, faults])``
    - ``kv_scales(new_k, new_v, slot_mapping, k_scale, v_scale, variant)``
    - ``merge(outs, lses, out, lse, variant[, sinks])``
    - ``copy_blocks(src_origin, dst_origin, src, dst, pairs, page_bytes, variant)``

    which is the library's own, with nothing in between.

    Raises:
        PackForeign: the system cannot load the file (other processor, missing libtvm_ffi).
        PackDamaged: it loads but is no library of ours.
    """

    __slots__ = (
        "_prepare",
        "_set_num_threads",
        "_workspace_bytes",
        "copy_blocks",
        "decode",
        "extend",
        "gather",
        "kv_scales",
        "merge",
        "path",
        "verify",
        "write_kv",
    )

    decode: Decode
    extend: Extend
    verify: Extend
    write_kv: WriteKV
    gather: WriteKV
    kv_scales: WriteKV  # new_k, new_v, slot_mapping, k_scale, v_scale, variant
    copy_blocks: CopyBlocks
    merge: Extend  # outs, lses, out, lse, variant, and sinks where the spec has them

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            module = tvm_ffi.load_module(str(self.path))
        except Exception as error:  # tvm_ffi raises plain RuntimeErrors with the dynamic loader's text
            raise errors.PackForeign(f"{self.path} does not load here: {error}") from error
        for op in Op:
            if (function := _optional(module, op.value)) is not None:
                setattr(self, op.value, function)
                break
        else:
            raise errors.PackDamaged(f"{self.path}: it has no function named {' or '.join(Op)}")
        try:
            self._workspace_bytes: Callable[[int], int] = module.get_function("workspace_bytes")
        except AttributeError as error:
            raise errors.PackDamaged(f"{self.path}: {error}") from error
        # A GPU library has kernels to load, a CPU library threads to run on.
        self._prepare: Callable[[int, int], None] | None = _optional(module, "prepare")
        self._set_num_threads: Callable[[int], None] | None = _optional(module, "set_num_threads")

    def workspace_bytes(self, num_seqs: int) -> int:
        """Bytes of workspace that serve every variant for up to ``num_seqs`` sequences.

        One workspace serves one library, one call at a time; zero it once when it is made.
        """
        return self._workspace_bytes(num_seqs)

    def prepare(self, device: int = 0, variant: int = -1) -> None:
        """Load a variant's kernel onto a GPU, or with -1 all that the dispatch table can pick.

        The first call does it too; do it before measuring a first call or capturing a CUDA graph.
        """
        if self._prepare is not None:
            self._prepare(device, variant)

    def set_num_threads(self, num_threads: int) -> None:
        """How many threads calls of a CPU library use; it starts with as many cores as the process may use.

        Raises:
            ArgumentError: below 1, or more than it started with.
            InvalidValue: a GPU library.
        """
        if self._set_num_threads is None:
            raise errors.InvalidValue("num_threads", num_threads, f"{self.path} runs on a GPU")
        self._set_num_threads(num_threads)
