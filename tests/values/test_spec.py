"""Specs: every impossible one is refused by name, every possible one survives its JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedgen.errors import InvalidValue, MalformedFile
from pagedgen.values import codec
from pagedgen.values.spec import MOVES, Causality, DType, KernelSpec, KInner, KVScale, Op, Rope, parse_dtype

GOOD = {
    "op": Op.DECODE,
    "head_dim": 128,
    "num_q_heads": 32,
    "num_kv_heads": 8,
    "block_size": 16,
    "q_dtype": DType.BF16,
    "kv_dtype": DType.BF16,
}


@st.composite
def specs(draw) -> KernelSpec:
    q_dtype = draw(st.sampled_from([DType.F32, DType.F16, DType.BF16]))
    kv_dtype = draw(st.sampled_from([q_dtype, DType.FP8_E4M3, DType.FP8_E5M2]))
    kv_heads, op = draw(st.integers(1, 64)), draw(st.sampled_from(list(Op)))
    if op is Op.MERGE:
        dim, heads, sinks = draw(st.integers(4, 32)) * 8, draw(st.integers(1, 64)), draw(st.booleans())
        return KernelSpec(op, dim, heads, heads, 1, q_dtype, q_dtype, sinks=sinks)
    if op is Op.KV_SCALES:
        heads, kv_dtype = draw(st.integers(1, 64)), draw(st.sampled_from([DType.FP8_E4M3, DType.FP8_E5M2]))
        return KernelSpec(op, 64, heads, heads, 1, q_dtype, kv_dtype, KVScale.HEAD)
    scales = [KVScale.TENSOR, KVScale.HEAD] if kv_dtype.is_fp8 else [KVScale.NONE]
    as_stored = op is Op.COPY_BLOCKS or (op is Op.GATHER and draw(st.booleans()))
    if as_stored:
        q_dtype, scales = kv_dtype, [KVScale.NONE]
    return KernelSpec(
        op,
        draw(st.integers(4, 32)) * 8,
        kv_heads * (1 if op in MOVES else draw(st.integers(1, 32))),
        kv_heads,
        draw(st.integers(1, 65536)),
        q_dtype,
        kv_dtype,
        draw(st.sampled_from(scales)),
        KInner.DIM if op is Op.COPY_BLOCKS else draw(st.sampled_from(list(KInner))),
        *(
            ()
            if op in MOVES
            else (
                draw(st.booleans()),
                draw(st.none() | st.integers(1, 1 << 30)),
                draw(st.none() | st.floats(0.01, 1000)),
                draw(st.booleans()),
            )
        ),
        head_dim_v=draw(st.none() | st.integers(4, 32).map(lambda n: 8 * n)),
        alibi=op not in MOVES and draw(st.booleans()),
        attention_chunk=None if op in MOVES else draw(st.none() | st.integers(1, 1 << 30)),
        causality=draw(st.sampled_from(list(Causality))) if op is Op.EXTEND else Causality.CAUSAL,
        batch_invariant=op not in MOVES and draw(st.booleans()),
    )


@given(specs())
def test_specs_round_trip_through_json(spec):
    again = codec.decode(KernelSpec, json.loads(codec.dumps(spec)))
    assert again == spec and again.hash == spec.hash and again.name == spec.name


@given(specs(), specs())
def test_names_and_hashes_tell_specs_apart(a, b):
    assert (a == b) == (a.name == b.name) == (a.hash == b.hash)
    assert (a < b) or (b < a) or a == b


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_q_heads": 24, "num_kv_heads": 5}, r"num_q_heads = 24: a multiple of num_kv_heads \(5\)"),
        ({"num_q_heads": 0}, "num_q_heads = 0"),
        ({"num_kv_heads": 0}, "num_kv_heads = 0: at least 1"),
        ({"head_dim": 100}, "head_dim = 100: a multiple of 8 from 32 to 256"),
        ({"head_dim": 24}, "head_dim = 24"),
        ({"head_dim": 264}, "head_dim = 264"),
        ({"head_dim": 128.0}, "head_dim = 128.0: an integer"),
        ({"block_size": 0}, "block_size = 0: 1 to 65536"),
        ({"block_size": -16}, "block_size = -16"),
        ({"block_size": 65537}, "block_size = 65537"),
        ({"block_size": True}, "block_size = True: an integer"),
        ({"q_dtype": DType.FP8_E4M3}, "q_dtype = 'fp8_e4m3': allowed: f32, f16, bf16"),
        ({"kv_dtype": DType.F16}, r"kv_dtype = 'f16': q_dtype \(bf16\) or an fp8 type"),
        ({"kv_dtype": DType.FP8_E4M3}, "kv_scale = 'none': fp8 takes 'tensor' or 'head'"),
        ({"kv_scale": KVScale.HEAD}, "kv_scale = 'head'"),
        ({"window": 0}, "window = 0: 1 to 1073741824 tokens, or None, is allowed"),
        ({"window": -1}, "window = -1: 1 to"),
        ({"window": True}, "window = True: 1 to"),
        ({"logits_soft_cap": 0.0}, "logits_soft_cap = 0.0: a float from 0.01 to 1000, or None, is allowed"),
        ({"logits_soft_cap": float("nan")}, "logits_soft_cap = nan"),
        ({"logits_soft_cap": 50}, "logits_soft_cap = 50: a float"),
        ({"attention_chunk": 0}, "attention_chunk = 0: 1 to 1073741824 tokens, or None, is allowed"),
        ({"head_dim_v": 100}, "head_dim_v = 100: a multiple of 8 from 32 to 256 is allowed"),
        ({"head_dim_v": True}, "head_dim_v = True: a multiple of 8"),
        ({"causality": Causality.FULL}, "causality = 'full': causal is allowed: nothing comes after a"),
    ],
)
def test_impossible_specs_name_field_value_and_what_is_allowed(change, message):
    with pytest.raises(InvalidValue, match=message):
        KernelSpec(**{**GOOD, **change})


def test_specs_of_before_keep_their_json_and_their_hash():
    """Records that ship were written without the later fields."""
    spec = KernelSpec(**GOOD)
    assert list(codec.encode(spec)) == [
        "op", "head_dim", "num_q_heads", "num_kv_heads", "block_size", "q_dtype", "kv_dtype", "kv_scale",
        "k_inner", "return_lse", "window", "logits_soft_cap", "sinks",
    ]  # fmt: skip
    assert spec.hash == "7d75a076c55971ec"


def test_later_fields_are_in_the_name_and_the_json():
    changes = {"head_dim_v": 64, "alibi": True, "attention_chunk": 8192, "causality": Causality.PER_SEQUENCE}
    changes["batch_invariant"] = True
    spec = KernelSpec(**{**GOOD, "op": Op.EXTEND, **changes})
    assert spec.name == "extend-h128v64-q32-kv8-b16-bf16-alibi-chunk8192-percausal-invariant"
    assert spec.masks == ("alibi", "attention_chunk", "causality")
    assert codec.encode(spec)["head_dim_v"] == 64 and codec.decode(KernelSpec, codec.encode(spec)) == spec
    assert spec.kv_bytes_per_token == 8 * (128 + 64) * 2


def test_one_value_has_one_form():
    assert KernelSpec(**GOOD, head_dim_v=128) == KernelSpec(**GOOD)


@pytest.mark.parametrize("text", ["fp4", "int8", "", "nvfp4"])
def test_unknown_dtypes(text):
    with pytest.raises(InvalidValue, match=r"kv_dtype = .*allowed: f32, f16, bf16, fp8_e4m3, fp8_e5m2"):
        parse_dtype(text, "kv_dtype")


@pytest.mark.parametrize(
    ("text", "dtype"), [("FP8", DType.FP8_E4M3), ("half", DType.F16), (" bf16 ", DType.BF16)]
)
def test_usual_names_of_dtypes(text, dtype):
    assert parse_dtype(text, "kv_dtype") is dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": "128"}, r"KernelSpec\.head_dim = '128': int is expected"),
        ({"head_dim": 100}, "head_dim = 100"),
        ({"kv_dtype": "fp4"}, r"KernelSpec\.kv_dtype = 'fp4': allowed: f32"),
        ({"colour": 1}, r"KernelSpec\.colour = 1: no such field"),
        ({"return_lse": 1}, r"return_lse = 1: bool is expected"),
    ],
)
def test_json_is_read_strictly(change, message):
    with pytest.raises(InvalidValue, match=message):
        codec.decode(KernelSpec, {**codec.encode(KernelSpec(**GOOD)), **change})


def test_a_missing_field_is_named():
    data = codec.encode(KernelSpec(**GOOD))
    del data["block_size"]
    with pytest.raises(InvalidValue, match=r"KernelSpec\.block_size = None: the field is missing"):
        codec.decode(KernelSpec, data)


def test_files_name_the_path_and_the_place(tmp_path):
    path = tmp_path / "spec.json"
    path.write_text(codec.dumps(KernelSpec(**GOOD)), encoding="utf-8")
    assert codec.load_file(KernelSpec, path) == KernelSpec(**GOOD)
    path.write_text(path.read_text(encoding="utf-8").replace("128", "100"), encoding="utf-8")
    with pytest.raises(MalformedFile, match=rf"{path}: head_dim: 100"):
        codec.load_file(KernelSpec, path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(MalformedFile, match="JSON"):
        codec.load_file(KernelSpec, path)


def test_names_say_what_is_masked():
    spec = KernelSpec(**{**GOOD, "op": Op.EXTEND, "window": 4096, "logits_soft_cap": 50.0, "sinks": True})
    assert spec.name == "extend-h128-q32-kv8-b16-bf16-window4096-cap50.0-sinks"
    assert spec.masks == ("window", "logits_soft_cap", "sinks")
    assert KernelSpec(**GOOD).masks == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_q_heads": 32}, "num_q_heads = 32: 8, num_kv_heads, is allowed: write_kv has no query heads"),
        ({"return_lse": True}, "return_lse = True: not allowed: write_kv has no softmax"),
        ({"window": 5}, "window = 5: not allowed"),
        ({"logits_soft_cap": 5.0}, "logits_soft_cap = 5.0: not allowed"),
        ({"sinks": True}, "sinks = True: not allowed"),
        ({"alibi": True}, "alibi = True: not allowed"),
        ({"attention_chunk": 9}, "attention_chunk = 9: not allowed"),
        ({"causality": Causality.PER_SEQUENCE}, "causality = .*: not allowed"),
        ({"batch_invariant": True}, "batch_invariant = True: not allowed"),
    ],
)
def test_fields_that_an_operator_has_no_use_for_are_refused(change, message):
    right = {**GOOD, "op": Op.WRITE_KV, "num_q_heads": 8}
    assert KernelSpec(**right).name == "write_kv-h128-kv8-b16-bf16"
    with pytest.raises(InvalidValue, match=message):
        KernelSpec(**{**right, **change})


def test_moves_that_leave_kv_as_it_is_stored():
    """fp8 without a scale, and no other type; a gather may dequantise instead."""
    pool = {**GOOD, "num_q_heads": 8, "q_dtype": DType.FP8_E4M3, "kv_dtype": DType.FP8_E4M3}
    names = [KernelSpec(**{**pool, "op": op}).name for op in (Op.COPY_BLOCKS, Op.GATHER)]
    assert names == ["copy_blocks-h128-kv8-b16-f8e4m3", "gather-h128-kv8-b16-f8e4m3"]
    wider = KernelSpec(**{**pool, "op": Op.GATHER, "q_dtype": DType.F16, "kv_scale": KVScale.HEAD})
    assert wider.name == "gather-h128-kv8-b16-f16-kvf8e4m3-headscale"
    for op, change, message in (
        (Op.COPY_BLOCKS, {"q_dtype": DType.F16}, r"q_dtype = 'f16': kv_dtype \(fp8_e4m3\) is allowed"),
        (Op.COPY_BLOCKS, {"kv_scale": KVScale.TENSOR}, "kv_scale = 'tensor': 'none' is allowed"),
        (Op.COPY_BLOCKS, {"k_inner": KInner.TOKEN}, "k_inner = 'token': dim is allowed"),
        (Op.COPY_BLOCKS, {"num_q_heads": 16}, "copy_blocks has no query heads"),
        (Op.GATHER, {"kv_scale": KVScale.TENSOR}, "q_dtype = 'fp8_e4m3': allowed: f32, f16, bf16"),
        (Op.GATHER, {"q_dtype": DType.F16}, "kv_scale = 'none': fp8 takes 'tensor' or 'head'"),
        (Op.WRITE_KV, {}, "q_dtype = 'fp8_e4m3': allowed: f32, f16, bf16"),
    ):
        with pytest.raises(InvalidValue, match=message):
            KernelSpec(**{**pool, "op": op, **change})


def test_rope_is_for_write_kv():
    right = {**GOOD, "op": Op.WRITE_KV, "num_q_heads": 8, "rope": Rope.GPTJ}
    assert KernelSpec(**right, rotary_dim=64).name == "write_kv-h128-kv8-b16-bf16-gptj64"
    assert KernelSpec(**right, rotary_dim=128) == KernelSpec(**right)
    for change, message in (
        ({"op": Op.GATHER}, "rope = 'gptj': 'none' is allowed: write_kv alone turns K"),
        ({"op": Op.DECODE}, "rope = 'gptj': 'none' is allowed"),
        ({"rope": Rope.NONE, "rotary_dim": 64}, "rotary_dim = 64: None is allowed without rope"),
        ({"rotary_dim": 130}, r"rotary_dim = 130: 2 to head_dim \(128\) is allowed"),
        ({"rotary_dim": 63}, "rotary_dim = 63: an even number is allowed"),
    ):
        with pytest.raises(InvalidValue, match=message):
            KernelSpec(**{**right, **change})


def test_a_debug_build_is_of_operators_with_slots():
    right = {**GOOD, "op": Op.GATHER, "num_q_heads": 8, "checked": True}
    assert KernelSpec(**right).name == "gather-h128-kv8-b16-bf16-checked"
    assert KernelSpec(**right).hash != KernelSpec(**{**right, "checked": False}).hash
    for op in (Op.DECODE, Op.COPY_BLOCKS):
        with pytest.raises(InvalidValue, match=f"checked = True: False is allowed: {op} has no slots"):
            KernelSpec(**{**right, "op": op})


def test_scales_are_set_for_fp8_pools_alone():
    right = {**GOOD, "op": Op.KV_SCALES, "num_q_heads": 8, "block_size": 1}
    right |= {"kv_dtype": DType.FP8_E5M2, "kv_scale": KVScale.HEAD}
    assert KernelSpec(**right).name == "kv_scales-h128-kv8-b1-bf16-kvf8e5m2-headscale"
    for change, message in (
        ({"block_size": 16}, "block_size = 16: 1 is allowed: kv_scales has no pool"),
        ({"k_inner": KInner.TOKEN}, "k_inner = .*: dim is allowed: kv_scales has no pool"),
        ({"kv_dtype": DType.BF16, "kv_scale": KVScale.NONE}, "kv_dtype = 'bf16': an fp8 type is allowed"),
    ):
        with pytest.raises(InvalidValue, match=message):
            KernelSpec(**{**right, **change})


def test_merge_has_no_pool():
    right = {**GOOD, "op": Op.MERGE, "num_kv_heads": 32, "block_size": 1}
    assert KernelSpec(**right).name == "merge-h128-q32-bf16"
    assert KernelSpec(**right, sinks=True).name == "merge-h128-q32-bf16-sinks"
    for change, message in (
        ({"num_kv_heads": 8}, "num_kv_heads = 8: 32 is allowed for merge: it has no K and V"),
        ({"block_size": 16}, "block_size = 16: 1 is allowed for merge"),
        (
            {"kv_dtype": DType.FP8_E4M3, "kv_scale": KVScale.TENSOR},
            "kv_dtype = .*: bf16 is allowed for merge",
        ),
        ({"k_inner": KInner.TOKEN}, "k_inner = .*: dim is allowed for merge"),
        ({"head_dim_v": 64}, "head_dim_v = 64: None is allowed for merge"),
        ({"return_lse": True}, "return_lse = True: False is allowed for merge: it has an LSE in any case"),
        ({"window": 9}, "window = 9: not allowed for merge: it has no K and V"),
        ({"alibi": True}, "alibi = True: not allowed for merge"),
    ):
        with pytest.raises(InvalidValue, match=message):
            KernelSpec(**{**right, **change})


def test_a_tree_mask_is_for_verify_alone_and_without_a_window():
    spec = KernelSpec(**{**GOOD, "op": Op.VERIFY, "tree_mask": True, "sinks": True})
    assert spec.name.startswith("verify-") and spec.name.endswith("-sinks-tree")
    assert spec.masks == ("sinks", "tree_mask")
    for op in (Op.DECODE, Op.EXTEND, Op.WRITE_KV):
        with pytest.raises(InvalidValue, match=f"tree_mask = True: False is allowed: {op.value} has no tree"):
            KernelSpec(**{**GOOD, "op": op, "tree_mask": True})
    with pytest.raises(InvalidValue, match="window = 64: None is allowed with tree_mask"):
        KernelSpec(**{**GOOD, "op": Op.VERIFY, "tree_mask": True, "window": 64})


def test_fields_that_came_later_leave_older_specs_as_they_were():
    """Hashes and files of specs from before: a default is left out, anything else is written."""
    plain = KernelSpec(**GOOD)
    assert "tree_mask" not in codec.encode(plain)
    tree = KernelSpec(**{**GOOD, "op": Op.VERIFY, "tree_mask": True})
    assert codec.encode(tree)["tree_mask"] is True
