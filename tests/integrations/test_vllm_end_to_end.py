"""How vllm_end_to_end.py tells rounding from an error."""

from __future__ import annotations

from typing import Any

import pytest
import vllm_end_to_end

STOCK: dict[str, Any] = {
    "tokens": [[5, 6, 7]],
    "logprobs": [[{"5": -0.1, "8": -3.0}, {"6": -0.70, "9": -0.74}, {"7": -0.2, "5": -2.0}]],
}


def ours(tokens: list[int], first: float = -0.1) -> dict[str, Any]:
    """A run with pagedgen: its tokens, and the log-probability that it gave token 5 in the first place."""
    tops = [{"5": first, "8": -3.0}, {"6": -0.72, "9": -0.71}, {"7": -0.2, "5": -2.0}]
    return {"tokens": [tokens], "logprobs": [tops]}


@pytest.mark.parametrize(
    ("tokens", "close", "outcome"),
    [
        ([5, 6, 7], 0.05, "same"),
        ([5, 9, 3], 0.05, "chosen_by_rounding"),  # 0.04 apart, and what follows follows from that
        ([5, 9, 3], 0.03, "wrong"),
        ([5, 8, 7], 0.05, "wrong"),  # 8 is none of vLLM's two
        ([8, 6, 7], 0.05, "wrong"),  # 2.9 apart
    ],
)
def test_where_tokens_part(tokens: list[int], close: float, outcome: str) -> None:
    counts = vllm_end_to_end.parted(STOCK, ours(tokens), close)
    expected = dict.fromkeys(("same", "chosen_by_rounding", "wrong"), 0) | {outcome: 1}
    assert {name: counts[name] for name in expected} == expected


def test_log_probabilities_are_compared_up_to_there() -> None:
    assert vllm_end_to_end.parted(STOCK, ours([5, 6, 7], first=-0.4), 0.05)["apart"] == pytest.approx(0.3)
    assert vllm_end_to_end.parted(STOCK, ours([8, 6, 7], first=-0.4), 0.05)["apart"] == 0


def test_without_log_probabilities_tokens_are_the_same_or_wrong() -> None:
    counts = vllm_end_to_end.parted({"tokens": [[5, 6], [7]]}, {"tokens": [[5, 9], [7]]}, 0.05)
    assert (counts["same"], counts["chosen_by_rounding"], counts["wrong"]) == (1, 0, 1)
