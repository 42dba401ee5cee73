"""``Weights``: how many parameters a language model has, and how many a step reads and multiplies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from pagedgen.errors import InvalidValue, MalformedFile, UnknownModel
from pagedgen.values import codec
from pagedgen.values.hf_config import TEXT_CONFIGS
from pagedgen.values.model import Model, find_model, preset

PLAIN_MLP = ("phi", "falcon", "starcoder2", "gpt2", "gpt_neox", "gptj", "opt", "bloom", "gpt_bigcode", "mpt")
SPELLINGS = {
    "intermediate_size": ("intermediate_size", "ffn_hidden_size", "n_inner"),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "experts_per_token": ("num_experts_per_tok", "experts_per_token"),
}


@dataclass(frozen=True, slots=True)
class FeedForward:
    """The sizes of a model that attention does not need; a row of ``weights.json``.

    ``matrices`` is 3 for gated MLPs and 2 for plain ones; ``num_experts`` is 0 for a dense model, and
    ``intermediate_size`` is that of one expert otherwise.

    Raises:
        InvalidValue: naming the field, the value and what is allowed.
    """

    name: str
    intermediate_size: int
    vocab_size: int
    tied: bool = False  # the embedding is the output head
    matrices: int = 3
    num_experts: int = 0
    experts_per_token: int = 0

    def __post_init__(self) -> None:
        for field in ("intermediate_size", "vocab_size"):
            if getattr(self, field) < 1:
                raise InvalidValue(field, getattr(self, field), "a positive integer is expected")
        if not 0 <= self.experts_per_token <= self.num_experts or bool(self.num_experts) != bool(
            self.experts_per_token
        ):
            allowed = f"1 to num_experts ({self.num_experts}) is allowed, 0 without experts"
            raise InvalidValue("experts_per_token", self.experts_per_token, allowed)


@dataclass(frozen=True, slots=True)
class Weights:
    """Parameters of one rank. Norms, biases and routers (below 0.1%) are left out.

    ``dense`` are multiplied by every token, ``expert`` are those of one expert in all layers, ``head`` turn
    the last hidden state into logits, ``embedding`` are looked up (0 where the head is the embedding).
    """

    dense: int
    head: int
    embedding: int
    bytes_per_param: int
    expert: int = 0
    num_experts: int = 0
    experts_per_token: int = 0

    @property
    def num_params(self) -> int:
        """All parameters."""
        return self.dense + self.num_experts * self.expert + self.head + self.embedding

    @property
    def num_bytes(self) -> int:
        """Bytes that they occupy."""
        return self.num_params * self.bytes_per_param

    def bytes_read(self, tokens: int) -> float:
        """Bytes that a step of ``tokens`` tokens reads: every matrix once, of the experts those that some
        token is sent to, if all are equally likely."""
        experts = 0.0
        if self.num_experts:
            missed = (1 - self.experts_per_token / self.num_experts) ** tokens
            experts = self.num_experts * (1 - missed) * self.expert
        return (self.dense + experts + self.head) * self.bytes_per_param

    def flops(self, tokens: int, logits: int) -> float:
        """FLOPs of the matrix products of ``tokens`` tokens, of which ``logits`` go on to the head."""
        active = self.dense + self.experts_per_token * self.expert
        return 2.0 * (active * tokens + self.head * logits)

    def shard(self, tp: int) -> Weights:
        """One rank of ``tp``-way tensor parallelism: every matrix divided."""
        parts = {field: -(-getattr(self, field) // tp) for field in ("dense", "head", "embedding", "expert")}
        return replace(self, **parts)


def weights_of(model: Model, sizes: FeedForward) -> Weights:
    """The parameters of a whole model (not sharded), from its attention shape and the rest of its sizes."""
    hidden, layers = model.hidden_size, model.num_layers
    attention = hidden * model.head_dim * (2 * model.num_q_heads + 2 * model.num_kv_heads)
    mlp = sizes.matrices * hidden * sizes.intermediate_size
    table = hidden * sizes.vocab_size
    return Weights(
        dense=layers * (attention + (0 if sizes.num_experts else mlp)),
        head=table,
        embedding=0 if sizes.tied else table,
        bytes_per_param=model.dtype.size,
        expert=layers * mlp if sizes.num_experts else 0,
        num_experts=sizes.num_experts,
        experts_per_token=sizes.experts_per_token,
    )


@cache
def table() -> Mapping[str, FeedForward]:
    """The sizes of every preset, by its name."""
    data = json.loads(Path(__file__).with_name("weights.json").read_text(encoding="utf-8"))
    rows = [codec.decode(FeedForward, row, f"weights.json[{i}]") for i, row in enumerate(data)]
    return {row.name: row for row in rows}


def find_weights(name_or_path: str, tp: int = 1) -> Weights:
    """Weights of one rank of what :func:`pagedgen.values.model.find_model` finds.

    Raises:
        UnknownModel: neither a preset nor a config; lists the presets.
        MalformedFile: a config without the sizes; names the field.
        Unsupported: see :func:`pagedgen.values.model.find_model`.
    """
    try:
        model = preset(name_or_path)
    except UnknownModel:
        model = find_model(name_or_path)
        return weights_of(model, _read_sizes(Path(model.source), model.hidden_size)).shard(tp)
    return weights_of(model, table()[model.name]).shard(tp)


def _read_sizes(path: Path, hidden_size: int) -> FeedForward:
    """The sizes in a Hugging Face ``config.json`` that was read as a model already."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for nested in TEXT_CONFIGS:
        if isinstance(data.get(nested), Mapping):
            data = {**data, **data[nested]}
            break

    def find(name: str, default: int | None = None) -> Any:
        found = [data[s] for s in SPELLINGS.get(name, (name,)) if data.get(s) is not None]
        return found[0] if found else default

    experts = find("num_experts", 0)
    plain = data.get("model_type") in PLAIN_MLP
    size = find("intermediate_size", 4 * hidden_size if plain else None)
    if experts and data.get("moe_intermediate_size") is not None:
        size = data["moe_intermediate_size"]
    row = {
        "name": path.parent.name,
        "intermediate_size": size,
        "vocab_size": find("vocab_size"),
        "tied": data.get("tie_word_embeddings", False),
        "matrices": 2 if plain else 3,
        "num_experts": experts,
        "experts_per_token": find("experts_per_token", 0) if experts else 0,
    }
    try:
        return codec.decode(FeedForward, row, "config")
    except InvalidValue as error:
        field = error.field.removeprefix("config.")
        raise MalformedFile(path, field, f"{error.value!r}: {error.allowed}") from error
