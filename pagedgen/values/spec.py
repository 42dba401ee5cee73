"""``KernelSpec``: WHAT a kernel computes, and the memory contract it computes it on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import total_ordering

from pagedgen.errors import InvalidValue
from pagedgen.values import codec


class Op(StrEnum):
    """The operator."""

    DECODE = "decode"  # one query token a sequence, ragged batch
    EXTEND = "extend"  # each sequence's last tokens as queries, causal: prompts, chunks, decodes mixed in
    VERIFY = "verify"  # a few queries a sequence, drafted tokens in a line or a tree, at the speed of decode
    WRITE_KV = "write_kv"  # new tokens' K and V to their slots in the pool, quantised where it is fp8
    COPY_BLOCKS = "copy_blocks"  # whole blocks, in the pools of all layers at once
    KV_SCALES = "kv_scales"  # scales of an fp8 pool that are not set yet, by the first tokens' K and V
    MERGE = "merge"  # attention over parts of a context to that over the whole, by the parts' LSEs
    GATHER = "gather"  # tokens' K and V from their slots, one after the other, dequantised or as stored


# Operators without queries: they compute no attention.
MOVES = (Op.WRITE_KV, Op.COPY_BLOCKS, Op.GATHER, Op.KV_SCALES)


class DType(StrEnum):
    """Element types of queries and of the KV cache."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    FP8_E4M3 = "fp8_e4m3"
    FP8_E5M2 = "fp8_e5m2"

    @property
    def size(self) -> int:
        """Bytes an element."""
        return {"f32": 4, "f16": 2, "bf16": 2}.get(self.value, 1)

    @property
    def is_fp8(self) -> bool:
        """Whether the type is one byte wide."""
        return self.size == 1

    @property
    def short(self) -> str:
        """The form used in names: ``fp8_e4m3`` is ``f8e4m3``."""
        return self.value.replace("fp8_", "f8")


class KVScale(StrEnum):
    """Granularity of the dequantisation scales of an FP8 KV cache."""

    NONE = "none"
    TENSOR = "tensor"  # k_scale, v_scale: float32 [1]
    HEAD = "head"  # k_scale, v_scale: float32 [num_kv_heads]


class KInner(StrEnum):
    """Which axis of K has stride 1. V always has head_dim innermost."""

    DIM = "dim"  # NHD, HND, packed K|V and token-slot pools
    TOKEN = "token"  # K stored [.., head_dim, block_size]: fastest on CPUs


class Causality(StrEnum):
    """Whether a query sees the tokens behind its own."""

    CAUSAL = "causal"  # no
    FULL = "full"  # yes: encoders, and images that attend to themselves whole
    PER_SEQUENCE = "per_sequence"  # as the call's `causal` says: uint8 [num_seqs], 0 for full


class Rope(StrEnum):
    """Which elements of a row rotary position embedding turns with each other (Su et al., 2021)."""

    NONE = "none"
    NEOX = "neox"  # element i with element i + rotary_dim / 2: GPT-NeoX, Llama
    GPTJ = "gptj"  # element 2i with element 2i + 1: GPT-J, interleaved


LEAST_SCALE = 1e-30  # that kv_scales sets: a normal number, and so is its inverse
MAX_WINDOW = 1 << 30  # tokens, of a window or of an attention chunk; a longer one is none

DTYPE_ALIASES = {
    "fp32": DType.F32,
    "float32": DType.F32,
    "fp16": DType.F16,
    "float16": DType.F16,
    "half": DType.F16,
    "bfloat16": DType.BF16,
    "fp8": DType.FP8_E4M3,
    "e4m3": DType.FP8_E4M3,
    "e5m2": DType.FP8_E5M2,
    "float8_e4m3fn": DType.FP8_E4M3,
    "float8_e5m2": DType.FP8_E5M2,
}


def parse_dtype(text: str, field: str) -> DType:
    """A ``DType`` from its name or a usual alias (``fp16``, ``float8_e4m3fn``, …).

    Raises:
        InvalidValue: names ``field`` and what is allowed.
    """
    name = text.strip().lower()
    if name in DTYPE_ALIASES:
        return DTYPE_ALIASES[name]
    try:
        return DType(name)
    except ValueError:
        raise InvalidValue(field, text, f"allowed: {', '.join(DType)}") from None


@total_ordering
@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One attention operator over a paged KV cache: one value for every operator.

    Shapes that follow from it: q, out ``[num_tokens, num_q_heads, head_dim]`` in ``q_dtype``, where decode
    has one query token a sequence; k, v ``[num_blocks, block_size, num_kv_heads, head_dim]`` (logical order,
    any strides but the innermost) in ``kv_dtype``; lse ``[num_tokens, num_q_heads]`` float32, natural
    logarithm. With ``head_dim_v``, v and out have rows of ``head_dim_v`` (DeepSeek's 192/128); None, or
    ``head_dim`` itself, which becomes None: all have ``head_dim``.

    ``write_kv`` stores new K and V, ``[num_tokens, num_kv_heads, head_dim]`` in ``q_dtype``, and has no query
    heads: ``num_q_heads`` is ``num_kv_heads``, and masks and an LSE are refused. The same holds for
    ``gather``, its inverse, and ``copy_blocks``. Where they leave K and V as they are stored, fp8 included,
    ``q_dtype`` is ``kv_dtype`` and ``kv_scale`` none: always for ``copy_blocks``; for ``gather`` from an fp8
    pool the other choice is a wider ``q_dtype`` and a scale, which values are multiplied with.

    ``kv_scales`` reads what ``write_kv`` stores and sets scales by it: ``kv_dtype`` is fp8, ``block_size`` 1.

    With ``rope``, ``write_kv`` turns K by its tokens' positions before it is stored: the first ``rotary_dim``
    elements of a row (None, or ``head_dim`` itself, which becomes None: all of them).

    ``merge`` has outputs of attention for input and no pool: ``num_kv_heads`` is ``num_q_heads``,
    ``block_size`` 1 and ``kv_dtype`` the ``q_dtype``; of the modifiers it has ``sinks`` alone.

    Masks and modifiers, any of them together where nothing else is said:

    - ``causality``: a query sees no token behind its own, or all of its sequence; a decode's query is the
      last token, so that decode has nothing to choose;
    - ``window``: it sees tokens less than ``window`` away from its own (None: however far);
    - ``attention_chunk``: it sees tokens of its own chunk, ``t // attention_chunk == p // attention_chunk``
      (None: of all; Llama 4's chunked attention);
    - ``logits_soft_cap``: scores become ``logits_soft_cap * tanh(score / logits_soft_cap)`` (None: as they
      are);
    - ``alibi``: then ``- alibi_slopes[head] * |p - t|`` is added, float32 ``[num_q_heads]`` (Press et al.,
      2022);
    - ``sinks``: a learned score a query head, float32 ``[num_q_heads]``, is in the softmax's sum and has no
      value;
    - ``tree_mask``, of ``verify`` alone: int64 ``[num_tokens]``, bit j of a query's: whether it sees query j
      of its sequence, one of 64 at most (tree attention of SpecInfer, Miao et al., 2024); it sees itself and
      all tokens before the queries in any case. Without it ``verify`` is causal in the order of its queries.

    ``batch_invariant``: the bits of a query's output follow from its sequence's tokens alone: not from what
    else is in the batch, from padding, or from how a prompt was cut into chunks. One variant serves all
    calls.

    ``checked``, of ``write_kv`` and ``gather``: a debug build for GPUs, whose kernel leaves out tokens with
    slots behind the pool's last and records one of them, in captured graphs too. Without it such a slot is
    used as an address.

    Raises:
        InvalidValue: naming the field, the value and what is allowed.
    """

    op: Op
    head_dim: int
    num_q_heads: int
    num_kv_heads: int
    block_size: int
    q_dtype: DType
    kv_dtype: DType
    kv_scale: KVScale = KVScale.NONE
    k_inner: KInner = KInner.DIM
    return_lse: bool = False
    window: int | None = None
    logits_soft_cap: float | None = None
    sinks: bool = False
    # Fields from here on are left out of JSON where they hold their default: hashes of older specs stay.
    head_dim_v: int | None = field(default=None, metadata=codec.OMIT_DEFAULT)
    alibi: bool = field(default=False, metadata=codec.OMIT_DEFAULT)
    attention_chunk: int | None = field(default=None, metadata=codec.OMIT_DEFAULT)
    causality: Causality = field(default=Causality.CAUSAL, metadata=codec.OMIT_DEFAULT)
    tree_mask: bool = field(default=False, metadata=codec.OMIT_DEFAULT)
    batch_invariant: bool = field(default=False, metadata=codec.OMIT_DEFAULT)
    rope: Rope = field(default=Rope.NONE, metadata=codec.OMIT_DEFAULT)
    rotary_dim: int | None = field(default=None, metadata=codec.OMIT_DEFAULT)
    checked: bool = field(default=False, metadata=codec.OMIT_DEFAULT)

    def __post_init__(self) -> None:
        if self.rope is not Rope.NONE and self.rotary_dim == self.head_dim:
            object.__setattr__(self, "rotary_dim", None)
        if self.head_dim_v == self.head_dim:  # one value, one form
            object.__setattr__(self, "head_dim_v", None)
        for name in ("head_dim", "num_q_heads", "num_kv_heads", "block_size"):
            value = getattr(self, name)
            if type(value) is not int:
                raise InvalidValue(name, value, "an integer is expected")
        for name, dim in (("head_dim", self.head_dim), ("head_dim_v", self.v_dim)):
            if not (type(dim) is int and 32 <= dim <= 256 and dim % 8 == 0):
                raise InvalidValue(name, dim, "a multiple of 8 from 32 to 256 is allowed")
        if self.num_kv_heads < 1:
            raise InvalidValue("num_kv_heads", self.num_kv_heads, "at least 1 is allowed")
        if self.num_q_heads < 1 or self.num_q_heads % self.num_kv_heads:
            raise InvalidValue(
                "num_q_heads",
                self.num_q_heads,
                f"a multiple of num_kv_heads ({self.num_kv_heads}) is allowed",
            )
        if not 1 <= self.block_size <= 1 << 16:
            raise InvalidValue("block_size", self.block_size, "1 to 65536 tokens is allowed")
        self._check_types()
        for name, reach in (("window", self.window), ("attention_chunk", self.attention_chunk)):
            if reach is not None and not (type(reach) is int and 1 <= reach <= MAX_WINDOW):
                raise InvalidValue(name, reach, f"1 to {MAX_WINDOW} tokens, or None, is allowed")
        cap = self.logits_soft_cap
        if cap is not None and not (type(cap) is float and 0.01 <= cap <= 1000):
            raise InvalidValue("logits_soft_cap", cap, "a float from 0.01 to 1000, or None, is allowed")
        if self.op is Op.DECODE and self.causality is not Causality.CAUSAL:
            allowed = "causal is allowed: nothing comes after a decode's query"
            raise InvalidValue("causality", self.causality.value, allowed)

        if self.tree_mask and self.op is not Op.VERIFY:
            raise InvalidValue("tree_mask", True, f"False is allowed: {self.op.value} has no tree of queries")
        for name in ("window", "attention_chunk"):
            if self.tree_mask and getattr(self, name) is not None:
                allowed = "None is allowed with tree_mask: a tree's queries have no place in a line"
                raise InvalidValue(name, getattr(self, name), allowed)
        if self.tree_mask and self.causality is not Causality.CAUSAL:
            allowed = "causal is allowed with tree_mask, which says itself what a query sees"
            raise InvalidValue("causality", self.causality.value, allowed)

        self._check_rope()
        if self.checked and self.op not in (Op.WRITE_KV, Op.GATHER):
            raise InvalidValue("checked", True, f"False is allowed: {self.op.value} has no slots")
        if self.op in MOVES:
            self._refuse_attention()
        if self.op is Op.MERGE:
            self._refuse_pool()

    def _check_types(self) -> None:
        as_stored = self.q_dtype == self.kv_dtype and self.kv_scale is KVScale.NONE
        if self.op is Op.COPY_BLOCKS and not as_stored:
            if self.q_dtype != self.kv_dtype:
                allowed = f"kv_dtype ({self.kv_dtype}) is allowed: blocks are copied as they are"
                raise InvalidValue("q_dtype", self.q_dtype.value, allowed)
            allowed = "'none' is allowed: blocks are copied as they are"
            raise InvalidValue("kv_scale", self.kv_scale.value, allowed)
        if self.op is Op.KV_SCALES:
            for name, fits in (("block_size", self.block_size == 1), ("k_inner", self.k_inner is KInner.DIM)):
                if not fits:
                    allowed = f"{'1' if name == 'block_size' else 'dim'} is allowed: kv_scales has no pool"
                    raise InvalidValue(name, getattr(self, name), allowed)
            if not self.kv_dtype.is_fp8:
                allowed = "an fp8 type is allowed: others have no scales"
                raise InvalidValue("kv_dtype", self.kv_dtype.value, allowed)
        if self.op in (Op.COPY_BLOCKS, Op.GATHER) and as_stored:
            if self.op is Op.COPY_BLOCKS and self.k_inner is not KInner.DIM:
                allowed = "dim is allowed: blocks are copied as they are, whichever axis is innermost"
                raise InvalidValue("k_inner", self.k_inner.value, allowed)
            return
        if self.q_dtype.is_fp8:
            raise InvalidValue("q_dtype", self.q_dtype.value, "allowed: f32, f16, bf16")
        if not self.kv_dtype.is_fp8 and self.kv_dtype != self.q_dtype:
            allowed = f"q_dtype ({self.q_dtype}) or an fp8 type is allowed"
            raise InvalidValue("kv_dtype", self.kv_dtype.value, allowed)
        if self.kv_dtype.is_fp8 == (self.kv_scale is KVScale.NONE):
            allowed = "fp8 takes 'tensor' or 'head', other types take 'none'"
            raise InvalidValue("kv_scale", self.kv_scale.value, allowed)

    def _check_rope(self) -> None:
        if self.rope is not Rope.NONE and self.op is not Op.WRITE_KV:
            raise InvalidValue("rope", self.rope.value, "'none' is allowed: write_kv alone turns K")
        if self.rotary_dim is not None:
            if self.rope is Rope.NONE:
                raise InvalidValue("rotary_dim", self.rotary_dim, "None is allowed without rope")
            if not (type(self.rotary_dim) is int and 0 < self.rotary_dim < self.head_dim):
                allowed = f"2 to head_dim ({self.head_dim}) is allowed"
                raise InvalidValue("rotary_dim", self.rotary_dim, allowed)
            if self.rotary_dim % 2:
                allowed = "an even number is allowed: elements turn in pairs"
                raise InvalidValue("rotary_dim", self.rotary_dim, allowed)

    def _refuse_pool(self) -> None:
        """Refuse what only operators with K and V have."""
        wanted = {
            "num_kv_heads": self.num_q_heads,
            "block_size": 1,
            "kv_dtype": self.q_dtype,
            "k_inner": KInner.DIM,
            "head_dim_v": None,
            "return_lse": False,
            "batch_invariant": False,
            **{name: getattr(self, name) if name == "sinks" else None for name in self.masks},
        }
        for name, only in wanted.items():
            if (value := getattr(self, name)) != only:
                why = "it has an LSE in any case" if name == "return_lse" else "it has no K and V"
                allowed = "not allowed" if name in self.masks else f"{only} is allowed"
                raise InvalidValue(name, value, f"{allowed} for merge: {why}")

    def _refuse_attention(self) -> None:
        """Refuse what only operators with queries have."""
        if self.num_q_heads != self.num_kv_heads:
            allowed = f"{self.num_kv_heads}, num_kv_heads, is allowed: {self.op.value} has no query heads"
            raise InvalidValue("num_q_heads", self.num_q_heads, allowed)
        masks = [name for name in self.masks if name not in ("rope", "checked")]
        for name in (*masks, *(n for n in ("return_lse", "batch_invariant") if getattr(self, n))):
            raise InvalidValue(name, getattr(self, name), f"not allowed: {self.op.value} has no softmax")

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, KernelSpec):
            return NotImplemented
        return self._order < other._order

    @property
    def _order(self) -> tuple[object, ...]:
        """What specs are sorted by: their fields, with 0 for None, which no field allows."""
        values = (getattr(self, each.name) for each in fields(self))
        return tuple(0 if value is None else value for value in values)

    @property
    def masks(self) -> tuple[str, ...]:
        """The fields of masks and modifiers that this spec makes use of, by name."""
        used = {
            "window": self.window is not None,
            "logits_soft_cap": self.logits_soft_cap is not None,
            "sinks": self.sinks,
            "alibi": self.alibi,
            "attention_chunk": self.attention_chunk is not None,
            "causality": self.causality is not Causality.CAUSAL,
            "tree_mask": self.tree_mask,
            "rope": self.rope is not Rope.NONE,
            "checked": self.checked,
        }
        return tuple(name for name, is_used in used.items() if is_used)

    def visible(self, position: int, seq_len: int, *, causal: bool = True) -> range:
        """Positions that the query at ``position`` of a sequence of ``seq_len`` tokens sees: always a run.

        ``causal`` counts where :attr:`causality` is per sequence.
        """
        if self.causality is not Causality.PER_SEQUENCE:
            causal = self.causality is Causality.CAUSAL
        first, end = 0, position + 1 if causal else seq_len
        if self.window is not None:
            first, end = max(first, position - self.window + 1), min(end, position + self.window)
        if self.attention_chunk is not None:
            chunk = position // self.attention_chunk
            first = max(first, chunk * self.attention_chunk)
            end = min(end, (chunk + 1) * self.attention_chunk)
        return range(first, end)

    @property
    def v_dim(self) -> int:
        """Elements of a row of V, and of the output: ``head_dim_v`` where there is one, else ``head_dim``."""
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head (the GQA ratio)."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V together that one token occupies in one layer."""
        return self.num_kv_heads * (self.head_dim + self.v_dim) * self.kv_dtype.size

    @property
    def page_align(self) -> int:
        """Bytes, 16 at most, that the pages of a block are multiples of: K's, V's, and both together."""
        rows = self.block_size * self.num_kv_heads * self.kv_dtype.size
        return math.gcd(16, rows * self.head_dim, rows * self.v_dim)

    @property
    def name(self) -> str:
        """Readable and unique among specs: ``decode-h128-q32-kv8-b16-f16-kvf8e4m3``."""
        parts = [
            self.op.value,
            f"h{self.head_dim}" if self.head_dim_v is None else f"h{self.head_dim}v{self.head_dim_v}",
            *(() if self.op in MOVES else (f"q{self.num_q_heads}",)),
            *(() if self.op is Op.MERGE else (f"kv{self.num_kv_heads}", f"b{self.block_size}")),
            self.q_dtype.short,
        ]
        if self.kv_dtype != self.q_dtype:
            parts.append(f"kv{self.kv_dtype.short}")
        if self.kv_scale is KVScale.HEAD:
            parts.append("headscale")
        if self.k_inner is KInner.TOKEN:
            parts.append("ktoken")
        if self.return_lse:
            parts.append("lse")
        if self.window is not None:
            parts.append(f"window{self.window}")
        if self.logits_soft_cap is not None:
            parts.append(f"cap{self.logits_soft_cap!r}")
        if self.sinks:
            parts.append("sinks")
        if self.alibi:
            parts.append("alibi")
        if self.attention_chunk is not None:
            parts.append(f"chunk{self.attention_chunk}")
        if self.causality is Causality.FULL:
            parts.append("full")
        elif self.causality is Causality.PER_SEQUENCE:
            parts.append("percausal")
        if self.tree_mask:
            parts.append("tree")
        if self.batch_invariant:
            parts.append("invariant")
        if self.rope is not Rope.NONE:
            parts.append(f"{self.rope.value}{self.rotary_dim or ''}")
        if self.checked:
            parts.append("checked")
        return "-".join(parts)

    @property
    def hash(self) -> str:
        """Content hash, 16 hex digits."""
        return codec.content_hash(self)
