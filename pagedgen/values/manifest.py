"""``Manifest``: what a pack holds. A pack is a folder with ``manifest.json`` and the files it lists.

Layout: ``manifest.json``; ``lib/<spec>.so``, the host library in the TVM-FFI ABI that is called;
``kernels/<spec>/…``, the compiled kernels it was linked from (cubin and PTX, or object files), and the
rendered source of each, for readers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pagedgen.errors import InvalidValue
from pagedgen.values import codec
from pagedgen.values.record import Record, Verdict
from pagedgen.values.schedule import Schedule
from pagedgen.values.spec import KernelSpec

FORMAT = 2  # bumped when an older loader could misread a pack
MANIFEST = "manifest.json"
ANY = 2**31 - 1  # a rule with this bound holds for every call


@dataclass(frozen=True, order=True, slots=True)
class FileEntry:
    """One file of the pack: path relative to it with forward slashes, size in bytes, SHA-256 in hex."""

    path: str
    size: int
    sha256: str

    def __post_init__(self) -> None:
        parts = self.path.split("/")
        if self.path.startswith("/") or "\\" in self.path or any(p in ("", ".", "..") for p in parts):
            raise InvalidValue("path", self.path, "a relative path inside the pack is allowed")


@dataclass(frozen=True, order=True, slots=True)
class Rule:
    """A row of a dispatch table; the first row that fits a call wins.

    A call fits when its num_seqs, its bound on seq_len and its query tokens (rows of q; of decode they are
    its num_seqs) are at most the row's. All are known on the host without a synchronisation.
    """

    max_num_seqs: int
    max_seq_len: int
    variant: int  # index into KernelEntry.variants
    max_num_tokens: int = field(default=ANY, metadata=codec.OMIT_DEFAULT)

    def fits(self, num_seqs: int, max_seq_len: int, num_tokens: int) -> bool:
        """Whether the row is for such a call."""
        within = num_seqs <= self.max_num_seqs and max_seq_len <= self.max_seq_len
        return within and num_tokens <= self.max_num_tokens


@dataclass(frozen=True, order=True, slots=True)
class KernelEntry:
    """The kernels of one spec: the variants linked into one library, and the table that picks one."""

    spec: KernelSpec
    library: str  # path of the host library in the pack
    variants: tuple[Schedule, ...]
    dispatch: tuple[Rule, ...]
    records: tuple[Record, ...]  # what each choice rests on; none: the family's default schedule
    # Of each variant where the pack was built beside such a device; the records have those of tuning.
    verdicts: tuple[Verdict, ...] = field(default=(), metadata=codec.OMIT_DEFAULT)

    def __post_init__(self) -> None:
        if self.verdicts and len(self.verdicts) != len(self.variants):
            raise InvalidValue("verdicts", len(self.verdicts), f"none, or {len(self.variants)}, are allowed")
        if not self.dispatch:
            raise InvalidValue("dispatch", (), "at least one row is expected")
        for rule in self.dispatch:
            if not 0 <= rule.variant < len(self.variants):
                raise InvalidValue("variant", rule.variant, f"0 to {len(self.variants) - 1} is allowed")


@dataclass(frozen=True, order=True, slots=True)
class Manifest:
    """The pack's table of contents."""

    format: int
    pagedgen: str  # version that built it; the loader wants the same major version
    target: str
    kind: str  # "cuda" or "cpu"
    arch: str  # the loader compares this with the machine
    host: str  # platform of the libraries: "linux-x86_64"
    kernels: tuple[KernelEntry, ...]
    files: tuple[FileEntry, ...]  # every file but the manifest itself
    digest: str = ""  # content_digest(): an altered manifest is noticed as well

    def content_digest(self) -> str:
        """Content hash of everything but ``digest``."""
        return codec.content_hash(replace(self, digest=""))
