"""``Workload``: the batch of sequence lengths that a kernel is timed on."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pagedgen.errors import InvalidValue
from pagedgen.values.spec import Causality, KernelSpec, Op

Lens = tuple[tuple[int, ...], tuple[int, ...]]  # of a batch: tokens in the cache, and queries, by sequence


def visible_pairs(spec: KernelSpec, q_len: int, seq_len: int) -> int:
    """(query, key) pairs of one sequence that a spec takes into account, the queries its last tokens.

    Where causality is per sequence, those of a causal one.
    """
    first = seq_len - q_len
    if spec.causality is Causality.FULL:
        if spec.window is None and spec.attention_chunk is None:
            return q_len * seq_len
        return sum(len(spec.visible(position, seq_len)) for position in range(first, seq_len))
    chunk = spec.attention_chunk or max(seq_len, 1)
    pairs = 0
    for begin in range(first // chunk * chunk, seq_len, chunk):
        end = min(begin + chunk, seq_len)
        pairs += kv_pairs(end - max(first, begin), end - begin, spec.window)
    return pairs


def kv_pairs(q_len: int, seq_len: int, window: int | None) -> int:
    """(query, key) pairs of one sequence that causal attention takes into account."""
    first = seq_len - q_len
    whole = q_len * first + q_len * (q_len + 1) // 2
    if window is None or window >= seq_len:
        return whole
    # A query at position p sees min(p + 1, window): those up to the window's length see all before them.
    growing = max(0, min(window, seq_len) - first)
    return growing * first + growing * (growing + 1) // 2 + (q_len - growing) * window


@dataclass(frozen=True, order=True, slots=True)
class Workload:
    """One step: ``seq_lens[i]`` KV tokens of sequence i, in the cache, ``query_lens[i]`` of them queries.

    Queries are a sequence's last tokens. Without ``query_lens`` it is a decode step: one query for every
    sequence that has tokens.

    Raises:
        InvalidValue: no sequence, a negative length, or query lengths that do not fit.
    """

    name: str
    seq_lens: tuple[int, ...]
    query_lens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.seq_lens:
            raise InvalidValue("seq_lens", (), "at least one sequence is expected")
        for length in self.seq_lens:
            if type(length) is not int or length < 0:
                raise InvalidValue("seq_lens", length, "lengths are integers >= 0")
        if not self.query_lens:
            return
        if len(self.query_lens) != len(self.seq_lens):
            allowed = f"{len(self.seq_lens)} lengths are expected, one a sequence"
            raise InvalidValue("query_lens", self.query_lens, allowed)
        for query_len, seq_len in zip(self.query_lens, self.seq_lens, strict=True):
            if type(query_len) is not int or not 0 <= query_len <= seq_len:
                raise InvalidValue("query_lens", query_len, f"0 to {seq_len}, its seq_len, is allowed")

    @classmethod
    def uniform(cls, num_seqs: int, seq_len: int) -> Workload:
        """``num_seqs`` sequences of ``seq_len`` tokens, named ``32x8192``."""
        return cls(f"{num_seqs}x{seq_len}", (seq_len,) * num_seqs)

    @classmethod
    def chunks(cls, num_seqs: int, query_len: int, seq_len: int) -> Workload:
        """``num_seqs`` sequences whose last ``query_len`` tokens are queries, named ``4x512of8192``."""
        whole = query_len == seq_len
        name = f"{num_seqs}x{query_len}" if whole else f"{num_seqs}x{query_len}of{seq_len}"
        return cls(name, (seq_len,) * num_seqs, (query_len,) * num_seqs)

    @classmethod
    def parse(cls, text: str, op: Op) -> Workload:
        """Batches as they are spelled: ``2x1024of4096+62x1of2048`` are 2 sequences of 4096 tokens whose last
        1024 are queries, and 62 of 2048 with one query each.

        ``16x1024`` are 16 prompts of 1024 tokens, all queries; for decode 16 sequences of 1024 tokens.

        Raises:
            InvalidValue: not of that form, or query lengths for decode.
        """
        allowed = "32x8192" if op is Op.DECODE else "4x512of8192"
        allowed = f"sequences x tokens of each, like {allowed}, parts joined by +, is expected"
        seqs: list[int] = []
        queries: list[int] = []
        for part in text.strip().split("+"):
            found = re.fullmatch(r"(\d+)x(\d+)(?:of(\d+))?", part)
            if not found or not int(found[1]) or (op is Op.DECODE and found[3]):
                raise InvalidValue("workload", text, allowed)
            seqs += [int(found[3] or found[2])] * int(found[1])
            queries += [int(found[2])] * int(found[1])
        return cls(text.strip(), tuple(seqs), () if op is Op.DECODE else tuple(queries))

    @property
    def lens_of_queries(self) -> tuple[int, ...]:
        """Query tokens of each sequence."""
        return self.query_lens or tuple(min(1, length) for length in self.seq_lens)

    @property
    def lens(self) -> Lens:
        """``(seq_lens, lens_of_queries)``: which batch it is, whatever it is called."""
        return self.seq_lens, self.lens_of_queries

    @property
    def num_queries(self) -> int:
        """Query tokens of all sequences."""
        return sum(self.lens_of_queries)

    @property
    def num_seqs(self) -> int:
        """Sequences in the batch."""
        return len(self.seq_lens)

    @property
    def num_tokens(self) -> int:
        """KV tokens of all sequences."""
        return sum(self.seq_lens)

    @property
    def max_seq_len(self) -> int:
        """The longest sequence, in tokens."""
        return max(self.seq_lens)

    def kv_bytes(self, spec: KernelSpec) -> int:
        """Bytes of K and V that one call has to read, those that some query sees: what GB/s are stated on."""
        tokens = 0
        for q_len, seq_len in zip(self.lens_of_queries, self.seq_lens, strict=True):
            if q_len:
                tokens += seq_len - spec.visible(seq_len - q_len, seq_len).start
        return tokens * spec.kv_bytes_per_token

    def cache_bytes(self, spec: KernelSpec) -> int:
        """Bytes of K and V that all tokens occupy, seen or not."""
        return self.num_tokens * spec.kv_bytes_per_token

    def flops(self, spec: KernelSpec) -> int:
        """Of both matrix products, for the keys that each query sees: what TFLOP/s are stated on."""
        lens = zip(self.lens_of_queries, self.seq_lens, strict=True)
        pairs = sum(visible_pairs(spec, q, kv) for q, kv in lens)
        return 2 * (spec.head_dim + spec.v_dim) * spec.num_q_heads * pairs

    def floor_us(self, spec: KernelSpec, gbs: float, tflops: float = 0.0) -> float:
        """The roofline: microseconds below which no call is where memory is read at ``gbs`` and both products
        are made at ``tflops``, 0 where those bound nothing."""
        reading = self.kv_bytes(spec) / gbs / 1e3
        return max(reading, self.flops(spec) / tflops / 1e6) if tflops else reading
