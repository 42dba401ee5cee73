"""``Trace``: prompt and output lengths of real requests, and the decode batches that follow from them.

Formats are recognised by content, whatever the file is called:

- CSV with a header that names the columns: ``ContextTokens,GeneratedTokens`` (Azure's public traces, with
  ``TIMESTAMP``), ``num_prefill_tokens,num_decode_tokens``, ``prompt_tokens,output_tokens`` and the like; a
  column ``timestamp``, ``arrival_time`` or ``arrived_at`` holds dates and times, or seconds;
- CSV without a header: prompt and output length, two integers a line;
- JSON lines with ``input_length`` and ``output_length`` (Mooncake's public traces), with ``timestamp`` in
  milliseconds and ``hash_ids``, one for each 512 tokens of the prompt: equal ids, equal content;
- JSON with histograms, ``{family: {"input_tokens": {length: share}, "output_tokens": {…}}}``, from which
  requests are drawn; ``FILE#FAMILY`` names one of several families.

Lines that begin with ``#`` are comments in the CSV formats.
"""

from __future__ import annotations

import csv
import json
import math
import random
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from pagedgen.errors import InvalidValue, MalformedFile
from pagedgen.values.workload import Workload

SAMPLE = Path(__file__).with_name("sample_trace.csv")
PROMPT_COLUMNS = (
    "contexttokens",
    "num_prefill_tokens",
    "prompt_tokens",
    "input_tokens",
    "input_length",
    "prompt",
)
OUTPUT_COLUMNS = (
    "generatedtokens",
    "num_decode_tokens",
    "output_tokens",
    "completion_tokens",
    "output_length",
    "output",
)
TIME_COLUMNS = ("timestamp", "arrival_time", "arrived_at")
PREFIX_TOKENS = 512  # of a prompt that one of its hash ids stands for
HISTOGRAM_REQUESTS = 4096  # drawn from a histogram
LONGEST = 1 << 24  # tokens; more than any context, so a larger number is a damaged line


@dataclass(frozen=True, order=True, slots=True)
class Request:
    """Lengths of one request, in tokens, and what else the file says of it.

    ``arrival`` is in seconds after the first request; ``prefix`` names the content of the prompt, one id for
    each ``PREFIX_TOKENS`` tokens (the last id may stand for fewer), or is empty where nothing is known;
    ``line`` is where the request stands in its file, 0 for one that was drawn.
    """

    prompt: int
    output: int
    arrival: float = 0.0
    prefix: tuple[int, ...] = ()
    line: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of the file; in that of their arrival where it has times.

    ``source`` is the file that they were read from.

    Raises:
        InvalidValue: there are none, or one arrives before its predecessor.
    """

    name: str
    requests: tuple[Request, ...]
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.requests:
            raise InvalidValue("requests", (), "at least one request is expected")
        for before, after in pairwise(self.requests):
            if after.arrival < before.arrival:
                raise InvalidValue("arrival", after.arrival, f"at least {before.arrival}, as the one before")

    @property
    def has_times(self) -> bool:
        """Whether requests arrive at different times."""
        return self.requests[-1].arrival > 0

    @property
    def has_prefixes(self) -> bool:
        """Whether any prompt's content is known."""
        return any(request.prefix for request in self.requests)

    def batch(self, num_seqs: int, seed: int = 0, *, max_seq_len: int = 0) -> Workload:
        """A snapshot of ``num_seqs`` sequences that decode at the same time.

        A request is drawn with a chance in proportion to its output, because that is for how many steps it
        is in the batch; it has its prompt and a uniformly drawn part of its output in the cache. Lengths are
        cut at ``max_seq_len`` where that is not 0.

        Raises:
            InvalidValue: ``num_seqs`` is not positive, or no request has any output.
        """
        if num_seqs < 1:
            raise InvalidValue("num_seqs", num_seqs, "at least 1 is allowed")
        steps = list(accumulate(request.output for request in self.requests))
        if steps[-1] == 0:
            raise InvalidValue("output", 0, f"{self.name}: at least one request must have output tokens")
        draw = random.Random(f"{seed} {num_seqs}")
        lengths = []
        for _ in range(num_seqs):
            request = self.requests[bisect(steps, draw.random() * steps[-1])]
            length = max(1, request.prompt + draw.randint(1, request.output))
            lengths.append(min(length, max_seq_len) if max_seq_len else length)
        return Workload(f"{self.name}-{num_seqs}", tuple(lengths))

    def step(self, num_tokens: int, num_decodes: int = 0, seed: int = 0) -> Workload:
        """A snapshot of chunked prefill: ``num_tokens`` tokens of prompts, and sequences that decode beside.

        Prompts are taken in one after the other, and a step is a piece of that stream from anywhere in it:
        the rest of one prompt, whole ones, and the begin of another. What decodes beside is drawn as by
        :meth:`batch`.

        Raises:
            InvalidValue: ``num_tokens`` is not positive, or no request has a prompt (with decodes, output).
        """
        if num_tokens < 1:
            raise InvalidValue("num_tokens", num_tokens, "at least 1 is allowed")
        prompts = [request.prompt for request in self.requests if request.prompt]
        if not prompts:
            raise InvalidValue("prompt", 0, f"{self.name}: at least one request must have a prompt")
        draw = random.Random(f"{seed} {num_tokens} tokens")
        (prompt,) = draw.choices(prompts, prompts)
        cached, left = draw.randrange(prompt), num_tokens
        seqs: list[int] = []
        queries: list[int] = []
        while left:
            queries.append(min(left, prompt - cached))
            seqs.append(cached + queries[-1])
            left -= queries[-1]
            prompt, cached = draw.choice(prompts), 0
        name = f"{self.name}-{num_tokens}tokens"
        if num_decodes:
            beside = self.batch(num_decodes, seed)
            seqs, queries = [*seqs, *beside.seq_lens], [*queries, *beside.lens_of_queries]
            name += f"+{num_decodes}"
        return Workload(name, tuple(seqs), tuple(queries))


def decode_workloads(
    trace: Trace, sizes: Sequence[int] = (1, 4, 16, 64), seed: int = 0, *, max_seq_len: int = 0
) -> tuple[Workload, ...]:
    """One batch of each size, see :meth:`Trace.batch`; the batches that ``tune --trace`` times."""
    return tuple(trace.batch(size, seed, max_seq_len=max_seq_len) for size in sizes)


def sample_trace() -> Trace:
    """The conversation traffic that ships with the package; its header says how it was made."""
    return read_trace(SAMPLE)


def read_trace(path: str | Path, seed: int = 0) -> Trace:
    """Read a trace; ``seed`` is for the formats that requests are drawn from.

    Raises:
        MalformedFile: not one of the formats; names the line.
        InvalidValue: a histogram of several families, and none is named.
    """
    file, _, family = str(path).partition("#")
    where = Path(file).expanduser()
    try:
        text = where.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise MalformedFile(where, "file", error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise MalformedFile(where, f"byte {error.start}", "text in UTF-8 is expected") from error
    name = where.stem.replace("_", "-")
    if not text.lstrip().startswith("{"):
        requests = _read_csv(where, text)
    elif _is_one_object(text):
        family, histogram = _pick(where, text, family)
        name = f"{name}-{family.rsplit('/', 1)[-1]}"
        requests = _draw(where, histogram, seed)
    else:
        requests = _read_jsonl(where, text)
    if not requests:
        raise MalformedFile(where, "line 1", "no request in the file")
    return Trace(name, _in_order(requests), str(where))


def _in_order(requests: Sequence[Request]) -> tuple[Request, ...]:
    """By arrival, the first at 0; where times are equal or absent, as in the file."""
    first = min(request.arrival for request in requests)
    if first:
        requests = [replace(request, arrival=request.arrival - first) for request in requests]
    return tuple(sorted(requests, key=lambda request: request.arrival))


def _seconds(path: Path, line: int, name: str, text: str) -> float:
    """A time from a cell: a number of seconds, or a date and a time (without a zone, UTC)."""
    try:
        value = float(text)
    except ValueError:
        try:
            at = datetime.fromisoformat(text)
            value = (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
        except ValueError:
            value = math.nan
    if not math.isfinite(value):
        raise MalformedFile(path, f"line {line}", f"{name} = {text!r}: a date and time, or seconds, expected")
    return value


def _length(path: Path, line: int, name: str, text: object) -> int:
    """A length from a cell; ``918.0`` is one too."""
    try:
        value = float(str(text))
    except ValueError:
        value = math.nan
    if not (value.is_integer() and 0 <= value <= LONGEST):
        raise MalformedFile(path, f"line {line}", f"{name} = {str(text)!r}: tokens, 0 or more, are expected")
    return int(value)


def _read_csv(path: Path, text: str) -> list[Request]:
    requests = []
    columns: tuple[int, ...] | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        cells = [cell.strip() for cell in next(csv.reader([line]))]
        if columns is None:
            header = _columns(path, number, cells)
            columns = header or (0, 1)
            if header:
                continue
        if len(cells) <= max(columns):
            raise MalformedFile(
                path, f"line {number}", f"{len(cells)} columns: {max(columns) + 1} are expected"
            )
        prompt, output = (
            _length(path, number, name, cells[column])
            for name, column in zip(("prompt", "output"), columns[:2], strict=True)
        )
        arrival = _seconds(path, number, "arrival", cells[columns[2]]) if len(columns) > 2 else 0.0
        requests.append(Request(prompt, output, arrival, line=number))
    return requests


def _columns(path: Path, number: int, cells: list[str]) -> tuple[int, ...] | None:
    """Where prompt, output and, if it is there, the time stand; None when the line is data already."""
    lower = [cell.lower() for cell in cells]
    prompt = next((lower.index(name) for name in PROMPT_COLUMNS if name in lower), None)
    output = next((lower.index(name) for name in OUTPUT_COLUMNS if name in lower), None)
    if prompt is not None and output is not None:
        return prompt, output, *(lower.index(name) for name in TIME_COLUMNS if name in lower)
    if len(cells) == 2 and all(cell.replace(".", "", 1).isdigit() for cell in cells):
        return None
    raise MalformedFile(
        path,
        f"line {number}",
        f"{','.join(cells)[:80]!r}: a header with one of {', '.join(PROMPT_COLUMNS)} and one of "
        f"{', '.join(OUTPUT_COLUMNS)}, or two integers, are expected",
    )


def _read_jsonl(path: Path, text: str) -> list[Request]:
    requests = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise MalformedFile(path, f"line {number}", f"JSON: {error}") from error
        lengths = []
        for name in ("input_length", "output_length"):
            if not isinstance(row, dict) or name not in row:
                raise MalformedFile(path, f"line {number}", f"an object with {name} is expected")
            lengths.append(_length(path, number, name, row[name]))
        arrival = _seconds(path, number, "timestamp", str(row.get("timestamp", 0))) / 1000
        prompt, output = lengths
        requests.append(Request(prompt, output, arrival, _prefix(path, number, prompt, row), number))
    return requests


def _prefix(path: Path, number: int, prompt: int, row: Mapping[str, Any]) -> tuple[int, ...]:
    """The hash ids of a line: as many as the prompt has (begun) pieces, or none."""
    ids = row.get("hash_ids", [])
    if not isinstance(ids, list) or any(type(item) is not int or not 0 <= item < 1 << 31 for item in ids):
        problem = f"hash_ids = {str(ids)[:40]!r}: a list of integers from 0 to 2147483647 is expected"
        raise MalformedFile(path, f"line {number}", problem)
    pieces = -(-prompt // PREFIX_TOKENS)
    if ids and len(ids) != pieces:
        problem = f"{len(ids)} hash_ids for {prompt} tokens: {pieces}, one for each {PREFIX_TOKENS}"
        raise MalformedFile(path, f"line {number}", problem)
    return tuple(ids)


def _is_one_object(text: str) -> bool:
    """Whether the whole text is one object that holds objects, and not a line a request."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError:
        return False
    return all(isinstance(value, dict) for value in data.values())


def _pick(path: Path, text: str, family: str) -> tuple[str, Mapping[str, Any]]:
    data = json.loads(text)
    complete = {
        name: value
        for name, value in data.items()
        if value.get("input_tokens") and value.get("output_tokens")
    }
    if not complete:
        raise MalformedFile(path, "line 1", "no family with input_tokens and output_tokens")
    if not family and len(complete) == 1:
        family = next(iter(complete))
    if family not in complete:
        raise InvalidValue("family", family, f"name one as FILE#FAMILY: {', '.join(complete)}")
    return family, complete[family]


def _draw(path: Path, histogram: Mapping[str, Any], seed: int) -> list[Request]:
    """Requests from two histograms, drawn independently: they do not say how lengths go together."""
    draw = random.Random(seed)
    sides = []
    for side in ("input_tokens", "output_tokens"):
        try:
            lengths = [int(length) for length in histogram[side]]
            shares = [float(share) for share in histogram[side].values()]
            if min(lengths) < 0 or min(shares) < 0 or not 0 < sum(shares) < math.inf:
                raise ValueError("lengths and shares are 0 or more")
        except (TypeError, ValueError, AttributeError) as error:
            raise MalformedFile(path, side, f"a histogram is {{length: share}}: {error}") from error
        sides.append(draw.choices(lengths, shares, k=HISTOGRAM_REQUESTS))
    return [Request(prompt, output) for prompt, output in zip(*sides, strict=True)]
