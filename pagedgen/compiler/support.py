"""What the templates cover, asked of the families themselves: the table of docs/kernels.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pagedgen.compiler.families import family_for
from pagedgen.errors import InvalidValue, Unsupported
from pagedgen.values.spec import MOVES, Causality, DType, KernelSpec, KInner, KVScale, Op, Rope
from pagedgen.values.target import Target

BASE = KernelSpec(Op.DECODE, 128, 32, 8, 16, DType.F16, DType.F16)
F8 = {"kv_dtype": DType.FP8_E4M3, "kv_scale": KVScale.TENSOR}
BF16 = {"q_dtype": DType.BF16, "kv_dtype": DType.BF16}
F32 = {"q_dtype": DType.F32, "kv_dtype": DType.F32}
FEATURES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("f16", {"q_dtype": DType.F16, "kv_dtype": DType.F16}),
    ("bf16", BF16),
    ("f32", F32),
    ("f16, KV fp8_e4m3", F8),
    ("bf16, KV fp8_e5m2, a scale a head", {**BF16, "kv_dtype": DType.FP8_E5M2, "kv_scale": KVScale.HEAD}),
    ("head_dim 32", {"head_dim": 32}),
    ("head_dim 80", {"head_dim": 80}),
    ("head_dim 256", {"head_dim": 256}),
    ("MHA", {"num_kv_heads": 32}),
    ("MQA, 71 heads", {"num_q_heads": 71, "num_kv_heads": 1}),
    ("block_size 1", {"block_size": 1}),
    ("block_size 544", {"block_size": 544}),
    ("K along tokens", {"k_inner": KInner.TOKEN}),
    ("LSE", {"return_lse": True}),
    ("window", {"window": 4096}),
    ("logits_soft_cap", {"logits_soft_cap": 50.0}),
    ("sinks", {"sinks": True}),
    ("head_dim 192, of V 128", {"head_dim": 192, "head_dim_v": 128}),
    ("alibi", {"alibi": True}),
    ("attention_chunk", {"attention_chunk": 8192}),
    ("causality full", {"causality": Causality.FULL}),
    ("causality per_sequence", {"causality": Causality.PER_SEQUENCE}),
    ("tree_mask", {"tree_mask": True}),
    ("batch_invariant", {"batch_invariant": True}),
    ("rope", {"rope": Rope.NEOX}),
    ("rope, interleaved, 64 elements", {"rope": Rope.GPTJ, "rotary_dim": 64}),
    ("checked, a debug build", {"checked": True}),
)


@dataclass(frozen=True, slots=True)
class Proof:
    """How far kernels for a target are proved, where the template covers a spec.

    ``tested`` are the specs whose kernels for the target pass the gate on a device in this project's tests;
    with None all that are covered do. A feature is tested where one of them has it.
    """

    target: Target
    column: str
    tested: tuple[KernelSpec, ...] | None = ()

    def covers(self, op: Op, changes: Mapping[str, Any]) -> bool:
        """Whether a tested spec of the operator has these values."""
        return self.tested is None or any(
            spec.op is op and all(getattr(spec, field) == value for field, value in changes.items())
            for spec in self.tested
        )


def _spec(op: Op, changes: dict[str, Any]) -> KernelSpec | None:
    """The base with changes for an operator; None where that is no legal spec."""
    fields = {field: getattr(BASE, field) for field in BASE.__dataclass_fields__} | {"op": op} | changes
    if op is Op.MERGE:  # which has no pool
        fields |= {"num_kv_heads": fields["num_q_heads"], "block_size": 1, **changes}
    if op is Op.KV_SCALES:  # which has no pool either, and fp8 alone
        fields |= {"block_size": 1, **F8, **changes}
    if op in MOVES:  # which have no query heads
        fields["num_q_heads"] = fields["num_kv_heads"]
    if op is Op.COPY_BLOCKS:  # which knows no other type than the pool's
        fields |= {"q_dtype": fields["kv_dtype"], "kv_scale": KVScale.NONE}
    try:
        return KernelSpec(**fields)
    except InvalidValue:
        return None


def cell(op: Op, changes: dict[str, Any], proof: Proof) -> str:
    """``tested``, ``compile-checked only``, ``refused: reason``, or a dash for what is no spec."""
    spec = _spec(op, changes)
    if spec is None:
        return "–"
    try:
        family_for(spec, proof.target)
    except Unsupported as error:
        return f"refused: {error}"
    return "tested" if proof.covers(op, changes) else "compile-checked only"


def tables(proofs: Sequence[Proof]) -> Iterator[str]:
    """Markdown: a table an operator, a row a feature, a column a target; reasons of refusals below each."""
    for op in Op:
        reasons: list[str] = []
        yield f"### {op.value}\n"
        yield f"| | {' | '.join(proof.column for proof in proofs)} |"
        yield f"| --- |{' --- |' * len(proofs)}"
        for name, changes in FEATURES:
            row = []
            for proof in proofs:
                text = cell(op, changes, proof)
                if text.startswith("refused"):
                    if text not in reasons:
                        reasons.append(text)
                    text = f"refused ({reasons.index(text) + 1})"
                row.append(text)
            yield f"| {name} | {' | '.join(row)} |"
        yield ""
        for number, reason in enumerate(reasons, 1):
            yield f"{number}. {reason}"
        yield ""
