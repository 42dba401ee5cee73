"""``Workload``: the batch of sequence lengths that a kernel is timed on."""

from __future__ import annotations

from dataclasses import dataclass

from pagedgen.errors import InvalidValue
from pagedgen.values.spec import KernelSpec


@dataclass(frozen=True, order=True, slots=True)
class Workload:
    """One decode step: ``seq_lens[i]`` KV tokens of sequence i, already in the cache.

    Raises:
        InvalidValue: no sequence, or a negative length.
    """

    name: str
    seq_lens: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.seq_lens:
            raise InvalidValue("seq_lens", (), "at least one sequence is expected")
        for length in self.seq_lens:
            if type(length) is not int or length < 0:
                raise InvalidValue("seq_lens", length, "lengths are integers >= 0")

    @classmethod
    def uniform(cls, num_seqs: int, seq_len: int) -> Workload:
        """``num_seqs`` sequences of ``seq_len`` tokens, named ``32x8192``."""
        return cls(f"{num_seqs}x{seq_len}", (seq_len,) * num_seqs)

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
        """Bytes of K and V that one call has to read: the figure that GB/s are stated on."""
        return self.num_tokens * spec.kv_bytes_per_token
