"""The call contract that all launchers share, in a probe library that checks arguments and runs nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import pagedgen
from pagedgen.compiler.link import Align, Assembly, compile_library
from pagedgen.compiler.render import environment
from pagedgen.errors import ArgumentError
from pagedgen.runtime.library import Library
from pagedgen.values.manifest import Rule
from pagedgen.values.spec import DType, KernelSpec, KInner, KVScale, Op
from pagedgen.values.target import Target

PROBE = """
PAGEDGEN_EXPORT(workspace_bytes) {
  int64_t num_seqs;
  if (int bad = take_num_seqs(args, num_args, &num_seqs)) return bad;
  return give_int(result, 100 * num_seqs);
}
PAGEDGEN_EXPORT(decode) {
  Call call;
  if (!take_call(args, num_args, &call) || !check_workspace(call, 100 * call.num_seqs)) return -1;
  int64_t facts[] = {call.variant, call.num_seqs, call.max_blocks, call.q_stride_head, call.k_stride_block,
                     call.k_stride_token, call.k_stride_head, call.k_stride_dim, call.block_table_stride};
  memcpy(call.workspace, facts, sizeof(facts));
  return give_int(result, call.variant);
}
"""
EXTEND_PROBE = """
PAGEDGEN_EXPORT(workspace_bytes) { return give_int(result, 0); }
PAGEDGEN_EXPORT(extend) {
  Call call;
  return take_call(args, num_args, &call) ? give_int(result, call.variant) : -1;
}
"""
RULES = (Rule(4, 512, 0), Rule(4, 2**31 - 1, 1), Rule(2**31 - 1, 2**31 - 1, 2))
SPEC = KernelSpec(
    Op.DECODE, 64, 8, 2, 16, DType.F16, DType.FP8_E4M3, KVScale.TENSOR, KInner.DIM, return_lse=True
)


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """Load a probe of a spec, with the alignment that GPU kernels ask for."""
    target = Target("cpu", "cpu", "x86_64-avx2", 2)
    folder = tmp_path_factory.mktemp("probes")

    def make(spec: KernelSpec, dispatch: tuple[Rule, ...] = RULES) -> Library:
        size = spec.kv_dtype.size
        align = Align(16, 16, 16, 16, 8, 8, 16 // size, 16 // size, 16)
        contract = (
            environment()
            .get_template("launcher/contract.h.j2")
            .render(
                version=pagedgen.__version__,
                spec=spec,
                target=target,
                dispatch=dispatch,
                num_variants=3,
                align=align,
                max_kv_stride="INT32_MAX",
            )
        )
        path = folder / f"{spec.name}-{len(dispatch)}.so"
        if not path.exists():
            functions = PROBE if spec.op is Op.DECODE else EXTEND_PROBE
            compile_library(Assembly(contract + functions, (), ()), path)
        return Library(path)

    return make


def arguments(spec: KernelSpec = SPEC, num_seqs: int = 3, num_blocks: int = 6, max_blocks: int = 2):
    """Arguments of a call that breaks nothing, by name and in order."""
    types = {
        DType.F32: torch.float32,
        DType.F16: torch.float16,
        DType.BF16: torch.bfloat16,
        DType.FP8_E4M3: torch.float8_e4m3fn,
        DType.FP8_E5M2: torch.float8_e5m2,
    }
    q = torch.zeros(num_seqs, spec.num_q_heads, spec.head_dim, dtype=types[spec.q_dtype])
    pool = (num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
    k, v = torch.zeros(pool, dtype=types[spec.kv_dtype]), torch.zeros(pool, dtype=types[spec.kv_dtype])
    if spec.k_inner is KInner.TOKEN:
        k = torch.zeros(pool[0], pool[2], pool[3], pool[1], dtype=k.dtype).permute(0, 3, 1, 2)
    scale = None
    if spec.kv_dtype.is_fp8:
        scale = torch.ones(spec.num_kv_heads if spec.kv_scale is KVScale.HEAD else 1)
    return {
        "q": q,
        "k": k,
        "v": v,
        "block_table": torch.zeros(num_seqs, max_blocks, dtype=torch.int32),
        "seq_lens": torch.zeros(num_seqs, dtype=torch.int32),
        "out": torch.zeros_like(q),
        "lse": torch.zeros(num_seqs, spec.num_q_heads) if spec.return_lse else None,
        "softmax_scale": 0.125,
        "k_scale": scale,
        "v_scale": scale,
        "workspace": torch.zeros(max(100 * num_seqs, 256), dtype=torch.uint8),
        "max_seq_len": max_blocks * spec.block_size,
        "variant": -1,
    }


def misaligned(like: torch.Tensor, elements: int = 1) -> torch.Tensor:
    """A copy whose address is off by some elements."""
    buffer = torch.zeros(
        like.numel() + elements, dtype=torch.uint8 if like.element_size() == 1 else like.dtype
    )
    return buffer[elements:].view(like.dtype).view(like.shape)


def strided(like: torch.Tensor, extra: int) -> torch.Tensor:
    """As ``like``, with its innermost rows ``extra`` elements further apart."""
    buffer = torch.zeros((*like.shape[:-1], like.shape[-1] + extra), dtype=torch.uint8)
    if like.element_size() != 1:
        buffer = buffer.to(like.dtype)
    return buffer.view(like.dtype)[..., : like.shape[-1]]


def test_a_right_call_passes(probe):
    call = arguments()
    assert probe(SPEC).decode(*call.values()) == 0
    facts = call["workspace"][:72].view(torch.int64).tolist()
    # variant, num_seqs, max_blocks, q_stride_head, K strides by block, token, head, dim, block_table stride
    assert facts == [0, 3, 2, 64, 16 * 2 * 64, 2 * 64, 64, 1, 2]


def test_fp8_passes_as_bytes_too(probe):
    call = arguments()
    call["k"], call["v"] = call["k"].view(torch.uint8), call["v"].view(torch.uint8)
    assert probe(SPEC).decode(*call.values()) == 0


@pytest.mark.parametrize(
    "spec",
    [
        replace(SPEC, kv_dtype=DType.FP8_E5M2, kv_scale=KVScale.HEAD, return_lse=False),
        replace(SPEC, q_dtype=DType.BF16, kv_dtype=DType.BF16, kv_scale=KVScale.NONE),
        replace(SPEC, q_dtype=DType.F32, kv_dtype=DType.F32, kv_scale=KVScale.NONE, k_inner=KInner.TOKEN),
        replace(SPEC, num_q_heads=1, num_kv_heads=1, block_size=1),
    ],
    ids=lambda spec: spec.name,
)
def test_right_calls_of_other_specs(probe, spec):
    assert probe(spec).decode(*arguments(spec).values()) == 0
    assert probe(spec).decode(*arguments(spec, num_seqs=0).values()) == 0
    assert probe(spec).decode(*arguments(spec, num_seqs=1, num_blocks=1, max_blocks=1).values()) == 0


@pytest.mark.parametrize(
    ("num_seqs", "max_seq_len", "variant"),
    [(1, 0, 0), (4, 512, 0), (4, 513, 1), (4, 1600, 1), (5, 16, 2), (50, 1600, 2)],
)
def test_the_first_row_that_fits_names_the_variant(probe, num_seqs, max_seq_len, variant):
    call = arguments(num_seqs=num_seqs, max_blocks=100)
    call["max_seq_len"] = max_seq_len
    assert probe(SPEC).decode(*call.values()) == variant


def test_a_named_variant_wins_over_the_table(probe):
    for variant in range(3):
        assert probe(SPEC).decode(*{**arguments(), "variant": variant}.values()) == variant


def test_the_table_of_extend_asks_for_the_queries_too(probe):
    any_number = 2**31 - 1
    rules = (
        Rule(2, any_number, 0, max_num_tokens=2),
        Rule(any_number, 16, 1, max_num_tokens=64),
        Rule(any_number, any_number, 2),
    )
    spec = replace(SPEC, op=Op.EXTEND)
    library = probe(spec, rules)

    def picked(num_seqs: int, num_tokens: int, max_seq_len: int, variant: int = -1) -> int:
        call = arguments(spec, num_seqs, max_blocks=8)
        rows = torch.zeros(num_tokens, *call["q"].shape[1:], dtype=call["q"].dtype)
        call |= {"q": rows, "out": rows, "lse": torch.zeros(num_tokens, spec.num_q_heads)}
        call |= {"max_seq_len": max_seq_len, "variant": variant}
        queries = torch.zeros(num_seqs + 1, dtype=torch.int32)
        return library.extend(*list(call.values())[:5], queries, *list(call.values())[5:])

    assert [picked(2, 2, 128), picked(2, 3, 128), picked(3, 2, 128)] == [0, 2, 2]
    assert [picked(3, 64, 16), picked(3, 65, 16), picked(3, 64, 17)] == [1, 2, 2]
    assert picked(2, 2, 128, variant=1) == 1


def test_without_a_table_the_variant_must_be_named(probe):
    library = probe(SPEC, ())
    assert library.decode(*{**arguments(), "variant": 1}.values()) == 1
    with pytest.raises(ArgumentError, match="variant = -1: this library has no dispatch table"):
        library.decode(*arguments().values())


def test_strides_of_axes_of_size_one_do_not_matter(probe):
    spec = replace(SPEC, num_q_heads=4, num_kv_heads=1)
    call = arguments(spec, num_seqs=1)
    call["k"] = torch.zeros(6, 16, 64, dtype=torch.uint8).as_strided((6, 16, 1, 64), (1024, 64, 3, 1))
    call["q"] = call["q"].as_strided((1, 4, 64), (5, 64, 1))
    assert probe(spec).decode(*call.values()) == 0
    assert call["workspace"][:72].view(torch.int64).tolist()[6] == 0  # k_stride_head


def test_a_scale_without_axis_is_one_number(probe):
    call = arguments()
    call["k_scale"] = torch.tensor(0.5)
    assert probe(SPEC).decode(*call.values()) == 0


F16, F32, I64 = torch.float16, torch.float32, torch.int64
WRONG = {
    "q dtype": ("q", lambda t: t.float(), "q.dtype = float32: float16 is expected"),
    "q rank": (
        "q",
        lambda t: t[0],
        "q.shape = [8, 64]: rank 3 is expected, [num_seqs, num_q_heads, head_dim]",
    ),
    "q heads": ("q", lambda t: t[:, :4], "q.shape = [3, 4, 64]: 8 is expected in axis 1 (num_q_heads)"),
    "q head_dim": ("q", lambda t: t[..., :32], "q.shape = [3, 8, 32]: 64 is expected in axis 2 (head_dim)"),
    "q inner stride": (
        "q",
        lambda t: torch.zeros(3, 8, 128, dtype=F16)[..., ::2],
        "q.stride(2) = 2: 1 is expected along head_dim",
    ),
    "q address": ("q", misaligned, ": a multiple of 16 bytes is expected"),
    "q stride": (
        "q",
        lambda t: strided(t, 4),
        "q.stride(1) = 68: a multiple of 8 elements",
    ),
    "k dtype": (
        "k",
        lambda t: t.view(torch.uint8).to(F16),
        "k.dtype = float16: float8_e4m3fn (or its bytes as uint8)",
    ),
    "k other fp8": ("k", lambda t: t.view(torch.float8_e5m2), "k.dtype = float8_e5m2: float8_e4m3fn"),
    "k int8": ("k", lambda t: t.view(torch.int8), "k.dtype = int8: float8_e4m3fn"),
    "k rank": ("k", lambda t: t[0], "k.shape = [16, 2, 64]: rank 4 is expected"),
    "k block_size": (
        "k",
        lambda t: t[:, :8],
        "k.shape = [6, 8, 2, 64]: 16 is expected in axis 1 (block_size)",
    ),
    "k heads": (
        "k",
        lambda t: t[:, :, :1],
        "k.shape = [6, 16, 1, 64]: 2 is expected in axis 2 (num_kv_heads)",
    ),
    "k head_dim": (
        "k",
        lambda t: t[..., :32],
        "k.shape = [6, 16, 2, 32]: 64 is expected in axis 3 (head_dim)",
    ),
    "k inner stride": (
        "k",
        lambda t: torch.zeros(6, 2, 64, 16, dtype=torch.uint8).permute(0, 3, 1, 2),
        "k.stride(3) = 16: 1 is expected along head_dim",
    ),
    "k address": ("k", lambda t: misaligned(t, 8), "a multiple of 16 bytes is expected"),
    "k head stride": (
        "k",
        lambda t: strided(t, 8),
        "k.stride(2) = 72: a multiple of 16 elements is expected",
    ),
    "k token stride": (
        "k",
        lambda t: torch.zeros(6 * 16 * 136, dtype=torch.uint8).as_strided(t.shape, (16 * 136, 136, 64, 1)),
        "k.stride(1) = 136: a multiple of 16 elements is expected",
    ),
    "k block stride": (
        "k",
        lambda t: torch.zeros(6 * 2056, dtype=torch.uint8).as_strided(t.shape, (2056, 128, 64, 1)),
        "k.stride(0) = 2056: a multiple of 16 elements is expected",
    ),
    "k token stride too far": (
        "k",
        lambda t: torch.empty(1, dtype=torch.uint8).as_strided((0, 16, 2, 64), (0, 2**31, 64, 1)),
        "k.stride(1) = 2147483648: 0 to 2147483647 elements is allowed",
    ),
    "v num_blocks": (
        "v",
        lambda t: t[:5],
        "v.shape = [5, 16, 2, 64]: 6 is expected in axis 0 (num_blocks, as k has)",
    ),
    "v dtype": ("v", lambda t: t.view(torch.float8_e5m2), "v.dtype = float8_e5m2: float8_e4m3fn"),
    "v missing": ("v", lambda t: None, "v = None: a float8_e4m3fn tensor [num_blocks, block_size"),
    "v stride": ("v", lambda t: strided(t, 8), "v.stride(2) = 72: a multiple of 16 elements is expected"),
    "v inner stride": (
        "v",
        lambda t: torch.zeros(6, 2, 64, 16, dtype=torch.uint8).permute(0, 3, 1, 2),
        "v.stride(3) = 16: 1 is expected along head_dim",
    ),
    "table dtype": ("block_table", lambda t: t.long(), "block_table.dtype = int64: int32 is expected"),
    "table rows": (
        "block_table",
        lambda t: t[:2],
        "block_table.shape = [2, 2]: 3 is expected in axis 0 (num_seqs)",
    ),
    "table rank": ("block_table", lambda t: t[0], "block_table.shape = [2]: rank 2 is expected"),
    "table narrow": (
        "block_table",
        lambda t: t[:, :1],
        "block_table.shape = [3, 1]: too narrow for max_seq_len = 32; 2 blocks of 16 tokens are needed",
    ),
    "table stride": (
        "block_table",
        lambda t: torch.zeros(3, 4, dtype=torch.int32)[:, ::2],
        "block_table.stride(1) = 2: 1 is expected",
    ),
    "lens dtype": ("seq_lens", lambda t: t.long(), "seq_lens.dtype = int64: int32 is expected"),
    "lens size": ("seq_lens", lambda t: t[:2], "seq_lens.shape = [2]: 3 is expected in axis 0 (num_seqs)"),
    "lens stride": (
        "seq_lens",
        lambda t: torch.zeros(6, dtype=torch.int32)[::2],
        "seq_lens.stride(0) = 2: 1 is expected",
    ),
    "out dtype": ("out", lambda t: t.float(), "out.dtype = float32: float16 is expected"),
    "out rows": ("out", lambda t: t[:2], "out.shape = [2, 8, 64]: 3 is expected in axis 0 (num_seqs)"),
    "out overlaps itself": (
        "out",
        lambda t: t[:1].expand(3, 8, 64),
        "out.stride(0) = 0: 64 to ",
    ),
    "lse missing": (
        "lse",
        lambda t: None,
        "lse = None: a float32 tensor [num_seqs, num_q_heads] is expected",
    ),
    "lse dtype": ("lse", lambda t: t.half(), "lse.dtype = float16: float32 is expected"),
    "lse shape": ("lse", lambda t: t[:, :4], "lse.shape = [3, 4]: 8 is expected in axis 1 (num_q_heads)"),
    "lse stride": (
        "lse",
        lambda t: torch.zeros(3, 16)[:, :8],
        "lse.stride(0) = 16: 8 is expected (contiguous)",
    ),
    "scale zero": ("softmax_scale", lambda x: 0.0, "softmax_scale = 0: a finite number above 0 is expected"),
    "scale nan": ("softmax_scale", lambda x: float("nan"), "softmax_scale = nan"),
    "scale infinite": ("softmax_scale", lambda x: float("inf"), "softmax_scale = inf"),
    "scale None": ("softmax_scale", lambda x: None, "softmax_scale: a number is expected"),
    "k_scale missing": ("k_scale", lambda t: None, "k_scale = None: a float32 tensor [1] is expected"),
    "k_scale dtype": ("k_scale", lambda t: t.half(), "k_scale.dtype = float16: float32 is expected"),
    "k_scale shape": ("k_scale", lambda t: torch.ones(2), "k_scale.shape = [2]: [1] is expected"),
    "v_scale shape": ("v_scale", lambda t: torch.ones(1, 1), "v_scale.shape = [1, 1]: [1] is expected"),
    "workspace small": (
        "workspace",
        lambda t: t[:299],
        "workspace.shape = [299]: at least 300 bytes are expected for 3",
    ),
    "workspace dtype": ("workspace", lambda t: t.float(), "workspace.dtype = float32: uint8 is expected"),
    "workspace address": (
        "workspace",
        lambda t: torch.zeros(999, dtype=torch.uint8)[1:],
        "a multiple of 16 bytes",
    ),
    "workspace stride": (
        "workspace",
        lambda t: torch.zeros(999, dtype=torch.uint8)[::2],
        "workspace.stride(0) = 2: 1 is expected",
    ),
    "bound negative": ("max_seq_len", lambda n: -1, "max_seq_len = -1: at least 0 is allowed"),
    "bound too large": ("max_seq_len", lambda n: 33, "too narrow for max_seq_len = 33; 3 blocks"),
    "bound not whole": ("max_seq_len", lambda n: 1.5, "max_seq_len: an integer is expected"),
    "variant too large": (
        "variant",
        lambda n: 3,
        "variant = 3: 0 to 2, or -1 for the dispatch table's, is allowed",
    ),
    "variant too small": ("variant", lambda n: -2, "variant = -2: 0 to 2"),
    "q a number": ("q", lambda t: 3, "q: not a tensor"),
}


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.replace(" ", "-"))
def test_a_wrong_argument_is_named_with_its_value_and_what_is_allowed(probe, case):
    name, spoil, message = WRONG[case]
    call = arguments()
    call[name] = spoil(call[name])
    with pytest.raises(ArgumentError) as caught:
        probe(SPEC).decode(*call.values())
    assert message in str(caught.value)
    if name != "block_table" and "bound too" not in case:
        assert str(caught.value).startswith(name)


def test_what_a_spec_does_not_have_must_not_be_given(probe):
    spec = replace(SPEC, kv_dtype=DType.F16, kv_scale=KVScale.NONE, return_lse=False)
    for name in ("lse", "k_scale", "v_scale"):
        with pytest.raises(ArgumentError, match=f"{name}: None is expected, since this kernel"):
            probe(spec).decode(*{**arguments(spec), name: torch.zeros(1)}.values())


def test_token_inner_keys(probe):
    spec = replace(SPEC, k_inner=KInner.TOKEN)
    call = arguments(spec)
    assert probe(spec).decode(*call.values()) == 0
    call["k"] = arguments(SPEC)["k"]
    with pytest.raises(
        ArgumentError, match=r"k\.stride\(1\) = 128: 1 is expected along the tokens of a block"
    ):
        probe(spec).decode(*call.values())


def test_wrong_number_of_arguments(probe):
    with pytest.raises(ArgumentError, match="decode: 2 arguments: 13 are expected"):
        probe(SPEC).decode(1, 2)


@pytest.mark.parametrize("num_seqs", [-1, 2**24 + 1, 1.5])
def test_workspace_bytes_of_no_number_of_sequences(probe, num_seqs):
    with pytest.raises(ArgumentError, match="num_seqs: an integer from 0 to 16777216 is expected"):
        probe(SPEC).workspace_bytes(num_seqs)
