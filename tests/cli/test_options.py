"""Option texts → values."""

from __future__ import annotations

import pytest

from pagedgen.cli.options import Job, integers, seconds
from pagedgen.errors import InvalidValue
from pagedgen.values.spec import DType, KInner, KVScale


def job(**changes) -> Job:
    options = {
        "gpu": "h100",
        "cpu": False,
        "model": None,
        "tp": 1,
        "head_dim": None,
        "num_q_heads": None,
        "num_kv_heads": None,
        "block_size": "16",
        "q_dtype": None,
        "kv_dtype": None,
        "kv_scale": "tensor",
        "k_inner": None,
        "lse": False,
    }
    return Job.of(**{**options, **changes})


@pytest.mark.parametrize(
    ("text", "value"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2H", 7200), (" 10 m ", 600)]
)
def test_budgets(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "0", "-5", "soon", "10 days", "1e3"])
def test_budgets_that_are_not(text):
    with pytest.raises(InvalidValue, match=r"budget = .*like 90s, 10m or 2h"):
        seconds(text)


def test_lists_and_workloads():
    assert integers("block_size", "16, 64,128") == [16, 64, 128]


def test_the_default_is_llama_3_8b():
    (spec,) = job().specs
    assert (spec.head_dim, spec.num_q_heads, spec.num_kv_heads, spec.q_dtype) == (128, 32, 8, DType.BF16)
    assert job().label == "llama-3-8b"


def test_lists_make_a_product():
    specs = job(block_size="16,64", kv_dtype="f16,fp8_e4m3", kv_scale="head").specs
    assert [(s.block_size, s.q_dtype, s.kv_dtype, s.kv_scale) for s in specs] == [
        (16, DType.F16, DType.F16, KVScale.NONE),
        (16, DType.BF16, DType.FP8_E4M3, KVScale.HEAD),
        (64, DType.F16, DType.F16, KVScale.NONE),
        (64, DType.BF16, DType.FP8_E4M3, KVScale.HEAD),
    ]


def test_explicit_shapes_replace_the_models():
    made = job(head_dim="80", num_q_heads="32", num_kv_heads="32")
    assert made.label == "h80-q32-kv32" and made.only.head_dim == 80
    assert job(model="llama-3-8b", head_dim="64").only.head_dim == 64


def test_cpus_read_k_along_tokens():
    assert job(gpu=None, cpu=True).only.k_inner is KInner.TOKEN
    assert job().only.k_inner is KInner.DIM
    assert job(gpu=None, cpu=True, k_inner="dim").only.k_inner is KInner.DIM
    with pytest.raises(InvalidValue, match="k_inner = 'head': allowed: dim, token"):
        job(k_inner="head")


def test_tensor_parallelism_and_gaps_come_with_the_model():
    made = job(model="gpt-oss-20b", tp=4)
    assert (made.only.num_q_heads, made.only.num_kv_heads) == (16, 2)
    assert made.label == "gpt-oss-20b-tp4" and len(made.warnings) == 3


def test_a_debug_build_is_of_what_has_slots():
    serving = job(gpu="h100", ops="decode,write_kv")
    assert [spec.op.value for spec in serving.checked().specs if spec.checked] == ["write_kv"]
    assert len(serving.checked().specs) == len(serving.specs) and not any(s.checked for s in serving.specs)
    on_cpu = job(gpu=None, cpu=True, ops="write_kv")
    assert on_cpu.checked() == on_cpu  # its launcher refuses them in any case
    with pytest.raises(InvalidValue, match=r"debug = True: write_kv among the operators \(--ops\)"):
        job(gpu="h100").checked()
