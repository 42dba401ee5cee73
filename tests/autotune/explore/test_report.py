"""The explorer and its report: refusals before anything runs, equal bytes, the page and its plots."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pagedgen.autotune.database import Database
from pagedgen.autotune.explore import explorer, table
from pagedgen.autotune.explore.explorer import BLOCK_SIZES, Exploration, contiguous, explore
from pagedgen.autotune.explore.load import Arrivals, Load
from pagedgen.autotune.explore.report import Report
from pagedgen.autotune.explore.timings import KernelTimings
from pagedgen.errors import InvalidValue, MalformedFile
from pagedgen.values import codec
from pagedgen.values.model import preset
from pagedgen.values.spec import DType, Op
from pagedgen.values.target_table import target
from pagedgen.values.trace import Request, Trace, sample_trace
from pagedgen.values.weights import find_weights

SAMPLES = Path(__file__).resolve().parents[3] / "docs/benchmarks/block-sizes-gpu-h100.json"
CLOSED = Load(Arrivals.CLOSED, 32)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def exploration(**more: object) -> Exploration:
    fields = {
        "model": preset("llama-3-8b"),
        "weights": find_weights("llama-3-8b"),
        "target": target("h100"),
        "kv_dtype": DType.BF16,
        "block_sizes": (16, 128),
        "memory_bytes": 2 << 30,
        "max_num_seqs": 64,
        "records": Database(Path("nowhere"), Path("nowhere")),
        "command": "pagedgen explore",
        **more,
    }
    return Exploration(**fields)  # type: ignore[arg-type]


def some(count: int = 60) -> Trace:
    return replace(sample_trace(), requests=sample_trace().requests[:count])


def test_a_file_brings_decode_times_and_the_rate_of_prompts():
    what = exploration(timings=KernelTimings.load(SAMPLES))
    measured = explore(what, [(some(20), CLOSED, False)])
    predicted = explore(exploration(), [(some(20), CLOSED, False)])
    for ours, other in zip(measured.traces[0].outcomes, predicted.traces[0].outcomes, strict=True):
        spec = replace(what.spec(int(ours.name)), op=Op.EXTEND)
        share = what.timings.matmul_share(spec, what.target)
        assert 0.2 < share < 0.6
        assert ours.kernel_status == "measured" and other.kernel_status == "predicted"
        assert "block-sizes-gpu" in ours.kernel_origin
        assert ours.kernel_origin.endswith(f"prompts at {share:.0%} of the matrix rate")


@pytest.fixture(scope="module")
def report() -> Report:
    prefixed = Trace(
        '<two> & "prefixes"', tuple(Request(600 + i, 20, 0.1 * i, (i % 3, i + 3), i) for i in range(40))
    )
    what = exploration(adaptive=True, block_sizes=BLOCK_SIZES)
    return explore(what, [(some(), CLOSED, False), (prefixed, CLOSED, True)])


def test_a_report_holds_every_policy_and_goes_through_json(report):
    names = ["1", "8", "16", "32", "64", "128", "256", "adaptive", "bound"]
    for trace in report.traces:
        assert [o.name for o in trace.outcomes] == names
        assert trace.recommendation.policy in names[:7] and set(trace.pareto) <= set(names[:8])
        assert [v.policy for v in trace.verdicts] == ["adaptive", "bound", f"controller ({trace.controller})"]
        assert {s.policy for s in trace.contiguous} <= {"Orca (Max)", "Orca (Pow2)", "Orca (Oracle)", "paged"}
    assert report.predicted and report.origins == (f"predicted by the cost model ({', '.join(names)})",)
    assert report.traces[0].outcome("16").hit_share == 0 < report.traces[1].outcome("16").hit_share
    assert codec.decode(Report, json.loads(codec.dumps(report))) == report


def test_processes_change_nothing_and_progress_is_told(report):
    told = []
    what = exploration(adaptive=True, block_sizes=BLOCK_SIZES)
    again = explore(what, [(some(), CLOSED, False)], jobs=2, progress=lambda *row: told.append(row))
    assert codec.dumps(again.traces[0]) == codec.dumps(report.traces[0])
    assert told[-1] == ("sample-trace", 540, 540) and [t[1] for t in told] == sorted(t[1] for t in told)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model": preset("llama-3-70b"), "weights": find_weights("llama-3-70b")},
            "141.1 GB of weights do not fit",
        ),
        ({"memory_bytes": 60 << 30}, "memory = '60.0 GiB': at most 52.1 GiB is allowed"),
        ({"memory_bytes": -1}, "memory = "),
        ({"block_sizes": ()}, "block_sizes = "),
        ({"block_sizes": (16, 16)}, "block_sizes = "),
        ({"block_sizes": (0,)}, "block_size = 0"),
        ({"target": replace(target("h100"), bandwidth_gbs=0.0)}, "bandwidth_gbs = 0.0: h100-sxm: a target"),
    ],
)
def test_explorations_that_are_not(fields, message):
    with pytest.raises(InvalidValue) as error:
        exploration(**fields)
    assert message in str(error.value)


def test_everything_is_refused_before_the_first_simulation(monkeypatch):
    monkeypatch.setattr(explorer, "simulate", lambda *_: pytest.fail("it ran"))
    huge = Trace("huge", (Request(1, 1), Request(1 << 20, 1, line=9)), "huge.csv")
    with pytest.raises(MalformedFile, match=r"^huge.csv: line 9: "):
        explore(exploration(), [(some(), CLOSED, False), (huge, CLOSED, False)])
    with pytest.raises(InvalidValue, match="has no arrival times"):
        explore(exploration(), [(some(), Load(Arrivals.TRACE, 1), False)])


def test_memory_that_is_not_given_is_what_the_weights_leave():
    what = exploration(memory_bytes=0)
    assert what.pool_bytes + what.weights.num_bytes == pytest.approx(0.9 * what.target.memory_bytes)


def test_the_contiguous_policies_are_those_of_the_paper():
    pool, shares = contiguous(some(200), 100_000)
    assert pool == 65_536
    by_name = {share.policy: share.of_pool for share in shares}
    assert by_name["Orca (Max)"] < by_name["Orca (Oracle)"] < by_name["paged"]
    assert contiguous(Trace("long", (Request(70_000, 1),)), 100_000) == (65_536, ())


def test_tables_say_it_in_words(report):
    assert all(len(row) == len(table.COLUMNS) for row in table.rows(report.traces[0]))
    lines = table.remarks(report.traces[0])
    assert lines[0].startswith("Use blocks of ") and any(
        "Adaptive, adaptive: not kept" in line for line in lines
    )
    assert dict(table.facts(report))["KV pool"] == "2.15 GB, 16,384 tokens of bf16"
    assert [table.size(n) for n in (0, 1234, 2.5e6, 3e9)] == ["0", "1.23 kB", "2.5 MB", "3 GB"]


def test_the_document_is_made_from_reports(report, tmp_path, monkeypatch):
    """The script behind docs/block_sizes.md, on a copy: tables between their markers, data, pictures."""
    pytest.importorskip("matplotlib")
    script = Path(__file__).resolve().parents[3] / "docs" / "benchmarks" / "block_sizes.py"
    module = module_from_spec(spec := spec_from_file_location("block_sizes", script))
    spec.loader.exec_module(module)
    text = module.DOCUMENT.read_text(encoding="utf-8")
    (tmp_path / "document.md").write_text(text, encoding="utf-8")
    shutil.copy(SAMPLES, tmp_path)
    for name, place in (
        ("HERE", tmp_path),
        ("DOCUMENT", tmp_path / "document.md"),
        ("IMAGES", tmp_path / "images"),
    ):
        monkeypatch.setattr(module, name, place)
    (tmp_path / "report.json").write_text(codec.dumps(report), encoding="utf-8")
    module.main([str(tmp_path / "report.json")])
    made = (tmp_path / "document.md").read_text(encoding="utf-8")
    assert made.count("<!-- end -->") == text.count("<!-- end -->") == 7
    assert "| sample-trace; 2 GiB | " in made
    assert made.count("| decode, head_dim 128, 32/8 heads, fp8; h100-sxm | ") == 2  # block size, runs
    data = json.loads((tmp_path / "block-sizes.json").read_text(encoding="utf-8"))
    assert [len(entry["outcomes"]) for entry in data["entries"]] == [9, 9]
    assert all(len(row) == len(data["columns"]) for entry in data["entries"] for row in entry["outcomes"])
    assert data["entries"][0]["command"] == "pagedgen explore"
    assert len(list((tmp_path / "images").glob("*.png"))) == 5


class Images(HTMLParser):
    """Sources and texts of the images, and everything that would be fetched from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[tuple[str, str]] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "img":
            self.images.append((given["alt"], given["src"]))
        if tag in ("script", "link", "iframe"):
            self.outside.append(tag)
        for name in ("src", "href"):
            if not given.get(name, "#").startswith(("#", "data:")):
                self.outside.append(given[name])


@pytest.fixture(scope="module")
def html(report) -> str:
    pytest.importorskip("matplotlib")
    from pagedgen.autotune.explore.page import page

    return page(report)


def test_the_page_stands_alone_and_its_plots_decode(report, html):
    from pagedgen.autotune.explore.page import page
    from pagedgen.autotune.explore.plots import PLOTS

    parsed = Images()
    parsed.feed(html)
    assert parsed.outside == []
    captions = [f"{caption}, {trace.trace}" for trace in report.traces for caption, _ in PLOTS.values()]
    assert [alt for alt, _ in parsed.images] == captions
    for _, source in parsed.images:
        kind, data = source.split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        drawing = ElementTree.fromstring(base64.b64decode(data, validate=True))
        assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(drawing.findall(".//{http://www.w3.org/2000/svg}path")) > 20
    assert "&lt;two&gt; &amp; &quot;prefixes&quot;" in html and "<two>" not in html
    assert "Kernel times are predicted" in html
    assert page(report) == html  # byte for byte


def test_pictures_are_saved(report, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    from pagedgen.autotune.explore.plots import PLOTS, save_pngs

    one = replace(report, traces=report.traces[:1])
    paths = save_pngs(one, tmp_path / "plots")
    assert [path.name for path in paths] == [f"sample-trace-{name}.png" for name in PLOTS]
    for path in paths:
        pixels = imread(path)
        assert pixels.shape[0] > 300 and pixels.std() > 0.05  # something is drawn


def test_a_browser_shows_the_page(html, tmp_path):
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser is installed (looked for {', '.join(BROWSERS)})")
    probe = (
        "<script>addEventListener('load', () => { const seen = [...document.images].map(i => "
        "[i.complete, i.naturalWidth, Math.round(i.getBoundingClientRect().width)]);"
        "document.body.setAttribute('data-seen', JSON.stringify(seen)); })</script>"
    )
    path = tmp_path / "report.html"
    path.write_text(html.replace("</body>", probe + "</body>"), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    done = subprocess.run(
        [*command, "--window-size=1280,900", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r"data-seen=\"([^\"]*)\"", done.stdout)
    assert found, done.stderr[-2000:]
    seen = json.loads(found[1].replace("&quot;", '"'))
    assert len(seen) == 10
    assert all(complete and natural > 200 and shown > 300 for complete, natural, shown in seen), seen
