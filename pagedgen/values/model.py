"""``Model``: the attention shape of a language model, from a preset or a Hugging Face ``config.json``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from pagedgen.errors import InvalidValue, MalformedFile, UnknownModel, Unsupported
from pagedgen.values import codec
from pagedgen.values.hf_config import attention_of
from pagedgen.values.spec import DType, KernelSpec, KInner, KVScale, Op


@dataclass(frozen=True, order=True, slots=True)
class Model:
    """What attention needs to know of a model; heads are those of one rank once :meth:`shard` was called.

    ``sliding_window`` is in tokens and holds for ``window_layers`` of the layers; ``logit_softcap`` is 0
    where scores are not capped; ``sinks`` says that every head has a learned sink, ``alibi`` that every head
    has a slope.

    Raises:
        InvalidValue: naming the field, the value and what is allowed.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: DType
    sliding_window: int = 0
    window_layers: int = 0
    logit_softcap: float = 0.0
    sinks: bool = False
    source: str = ""
    alibi: bool = field(default=False, metadata=codec.OMIT_DEFAULT)

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_q_heads", "num_kv_heads", "head_dim"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InvalidValue(name, value, "a positive integer is expected")
        if self.num_q_heads % self.num_kv_heads:
            allowed = f"a multiple of num_kv_heads ({self.num_kv_heads}) is allowed"
            raise InvalidValue("num_q_heads", self.num_q_heads, allowed)
        if not 0 <= self.window_layers <= self.num_layers:
            raise InvalidValue("window_layers", self.window_layers, f"0 to {self.num_layers} is allowed")

    def shard(self, tp: int) -> Model:
        """One rank of ``tp``-way tensor parallelism: heads divided, KV heads replicated once they run out.

        >>> preset("llama-3-70b").shard(8).num_q_heads
        8

        Raises:
            InvalidValue: heads do not divide; says which ``tp`` do.
        """
        fits = [n for n in range(1, self.num_q_heads + 1) if self._divides(n)]
        if tp not in fits:
            heads = f"{self.num_q_heads} query and {self.num_kv_heads} KV heads"
            raise InvalidValue("tp", tp, f"{', '.join(map(str, fits))} divide {heads}")
        name = self.name if tp == 1 else f"{self.name}-tp{tp}"
        return replace(
            self,
            name=name,
            num_q_heads=self.num_q_heads // tp,
            num_kv_heads=max(1, self.num_kv_heads // tp),
        )

    def _divides(self, tp: int) -> bool:
        if self.num_q_heads % tp:
            return False
        if tp <= self.num_kv_heads:
            return self.num_kv_heads % tp == 0
        # Replicated: the query heads of a rank must all belong to the rank's one KV head.
        return tp % self.num_kv_heads == 0

    def gaps(self) -> tuple[str, ...]:
        """What the model's layers need that specs without masks do not have, a sentence each."""
        said = []
        if self.window_layers:
            rest = self.num_layers - self.window_layers
            served = (
                f"the other {rest} layers" if rest else f"contexts up to {self.sliding_window} tokens only"
            )
            said.append(
                f"{self.window_layers} of {self.num_layers} layers attend to a window of "
                f"{self.sliding_window} tokens; specs without masks attend to the whole context, so they "
                f"serve {served}"
            )
        if self.logit_softcap:
            said.append(f"scores are capped at {self.logit_softcap:g}; specs without masks do not cap them")
        if self.sinks:
            said.append("heads have learned sinks; specs without masks have none")
        if self.alibi:
            said.append("heads have ALiBi slopes; specs without masks have none")
        if said:
            said.append("pagedgen build --model makes a pack with all of it")
        return tuple(f"{self.name}: {sentence}" for sentence in said)

    def serving_specs(self, shapes: Sequence[KernelSpec], ops: Sequence[Op]) -> tuple[KernelSpec, ...]:
        """What every layer of the model needs to be served: operators with the masks of each kind of layer.

        Args:
            shapes: decode specs without masks, for the shape, the types and the layout.
            ops: the operators.

        Returns:
            Each spec once, in the order of ``shapes`` and ``ops``; layers with a window before those without.
        """
        windows = [self.sliding_window] if self.window_layers else []
        if self.window_layers < self.num_layers:
            windows.append(0)
        found: dict[KernelSpec, None] = {}
        for shape, op in itertools.product(shapes, ops):
            if op is Op.WRITE_KV:
                found[replace(shape, op=op, num_q_heads=shape.num_kv_heads, return_lse=False)] = None
                continue
            for window in windows:
                cap = self.logit_softcap or None
                masks = {
                    "window": window or None,
                    "logits_soft_cap": cap,
                    "sinks": self.sinks,
                    "alibi": self.alibi,
                }
                found[replace(shape, op=op, **masks)] = None  # type: ignore[arg-type]
        return tuple(found)

    def specs(
        self,
        *,
        block_sizes: Sequence[int] = (16,),
        q_dtypes: Sequence[DType] = (),
        kv_dtypes: Sequence[DType] = (),
        kv_scale: KVScale = KVScale.TENSOR,
        k_inner: KInner = KInner.DIM,
        return_lse: bool = False,
    ) -> tuple[KernelSpec, ...]:
        """Decode specs of this model, one for each combination; see :func:`decode_specs`."""
        return decode_specs(
            [(self.head_dim, self.num_q_heads, self.num_kv_heads)],
            block_sizes=block_sizes,
            dtypes=dtype_pairs(q_dtypes, kv_dtypes, self.dtype),
            kv_scale=kv_scale,
            k_inner=k_inner,
            return_lse=return_lse,
        )


def dtype_pairs(
    q_dtypes: Sequence[DType], kv_dtypes: Sequence[DType], model_dtype: DType
) -> tuple[tuple[DType, DType], ...]:
    """(q_dtype, kv_dtype) combinations; what is not given follows from what is.

    No KV dtype: that of Q. No Q dtype: that of a KV cache of 16 or 32 bits, the model's for an FP8 one.
    """
    if not kv_dtypes:
        return tuple((q, q) for q in q_dtypes or (model_dtype,))
    if not q_dtypes:
        return tuple((model_dtype if kv.is_fp8 else kv, kv) for kv in kv_dtypes)
    return tuple(itertools.product(q_dtypes, kv_dtypes))


def decode_specs(
    shapes: Iterable[tuple[int, int, int]],
    *,
    block_sizes: Sequence[int],
    dtypes: Iterable[tuple[DType, DType]],
    kv_scale: KVScale = KVScale.TENSOR,
    k_inner: KInner = KInner.DIM,
    return_lse: bool = False,
) -> tuple[KernelSpec, ...]:
    """The product of shapes (head_dim, num_q_heads, num_kv_heads), block sizes and dtypes, each spec once.

    ``kv_scale`` counts for FP8 caches alone.

    Raises:
        InvalidValue: a combination is no legal spec.
    """
    found: dict[KernelSpec, None] = {}
    for (head_dim, q_heads, kv_heads), block_size, (q, kv) in itertools.product(shapes, block_sizes, dtypes):
        scale = kv_scale if kv.is_fp8 else KVScale.NONE
        spec = KernelSpec(
            Op.DECODE, head_dim, q_heads, kv_heads, block_size, q, kv, scale, k_inner, return_lse
        )
        found[spec] = None
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Preset:
    """A model by name, and its other names."""

    model: Model
    aliases: tuple[str, ...]


@cache
def presets() -> tuple[Preset, ...]:
    """The models known by name."""
    data = json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8"))
    return tuple(codec.decode(Preset, row, f"models.json[{i}]") for i, row in enumerate(data))


def preset(name: str) -> Model:
    """A model by name or alias; case, blanks and underscores don't matter.

    Raises:
        UnknownModel: lists the names.
    """
    wanted = name.strip().lower().replace("_", "-").replace(" ", "-")
    for row in presets():
        if wanted == row.model.name or wanted in row.aliases:
            return row.model
    raise UnknownModel(name, (row.model.name for row in presets()))


def find_model(name_or_path: str) -> Model:
    """A preset, or the model that a Hugging Face ``config.json`` (or the folder it is in) describes.

    Raises:
        UnknownModel: neither; lists the presets.
        MalformedFile: the file is no model config; names the field.
        Unsupported: attention of a kind that there are no kernels for.
    """
    try:
        return preset(name_or_path)
    except UnknownModel:
        path = Path(name_or_path).expanduser()
        if path.is_dir():
            path /= "config.json"
        if not path.is_file():
            raise
    return read_config(path)


def read_config(path: Path) -> Model:
    """The model of a Hugging Face ``config.json``; ``text_config`` of a multimodal one is looked into.

    Raises:
        MalformedFile: not JSON, or a field is missing or wrong; names it.
        Unsupported: attention of a kind that there are no kernels for.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MalformedFile(path, "JSON", str(error)) from error
    if not isinstance(data, dict):
        raise MalformedFile(path, "JSON", "an object is expected")
    folder = path.absolute().parent.name
    name = folder if path.name == "config.json" and folder else path.stem
    try:
        return codec.decode(Model, {"name": name, **attention_of(data), "source": str(path)})
    except Unsupported as error:
        raise Unsupported(f"{path}: {error}") from error
    except InvalidValue as error:
        raise MalformedFile(
            path, error.field.removeprefix("Model."), f"{error.value!r}: {error.allowed}"
        ) from error
