"""``Request``: one request on its way through a server, and the tokens that stand for its content."""

from __future__ import annotations

import numpy as np

from pagedgen.runtime.arrays import I32
from pagedgen.values.trace import PREFIX_TOKENS
from pagedgen.values.trace import Request as Lengths

OWN = 1 << 30  # token ids from here on are a request's own; those below are a trace's hash ids


class Request:
    """A request of ``prompt`` and ``output`` tokens (at least one of each), and how far it is.

    Which tokens they are does not matter, only which prompts begin alike: a piece of a prompt begins with its
    hash id, or with an id of the request's own, and what the request generates is its own as well.

    ``produced`` counts the tokens it has been given; ``seq`` is its sequence while it has one (else -1);
    ``stored`` tokens have slots there. Times are seconds; None until they are known.
    """

    __slots__ = (
        "arrival",
        "end_step",
        "finish",
        "first_token",
        "host_blocks",
        "index",
        "output",
        "prefix",
        "produced",
        "prompt",
        "seq",
        "stored",
    )

    def __init__(self, index: int, lengths: Lengths, arrival: float = 0.0) -> None:
        self.index = index
        self.prompt, self.output = max(1, lengths.prompt), max(1, lengths.output)
        self.prefix = lengths.prefix
        self.arrival = arrival
        self.produced = self.stored = self.host_blocks = self.end_step = 0
        self.seq = -1
        self.first_token: float | None = None
        self.finish: float | None = None

    @property
    def own(self) -> int:
        """The token id of what it generates."""
        return OWN + self.index

    @property
    def num_tokens(self) -> int:
        """Prompt and what was generated: what has to be in the cache before the next token comes."""
        return self.prompt + self.produced

    @property
    def max_stored(self) -> int:
        """The most tokens that it ever has slots for: the last one generated needs none."""
        return self.prompt + self.output - 1

    def tokens(self) -> I32:
        """Token ids of the prompt and of what was generated, int32 ``[num_tokens]``."""
        ids = np.zeros(self.num_tokens, np.int32)
        if self.prefix:
            heads = ids[: self.prompt : PREFIX_TOKENS]
            heads[:] = self.prefix[: heads.size]
        else:
            ids[0] = self.own
        ids[self.prompt :] = self.own
        return ids
