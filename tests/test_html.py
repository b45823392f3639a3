"""Reports as web pages: what they show is what was measured, nothing is loaded, and a browser finds no fault."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from llmquant import api, html
from llmquant.evaluation import Row
from llmquant.run import Report
from llmquant.sensitivity import Measured, Sensitivity, Unit

LINEARS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
VERSIONS = {"llmquant": "0.1.0", "torch": "2.9"}


class Page(HTMLParser):
    """A page as a list of elements (tag, attributes, text inside)."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self, source):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(source)
        assert not self._open, f"not closed: {self._open[-1].tag}"

    def handle_starttag(self, tag, attrs):
        element = SimpleNamespace(tag=tag, attrs=dict(attrs), text="", inside=[e.attrs.get("id") for e in self._open])
        self.elements.append(element)
        if tag not in self.VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop().tag == tag

    def handle_data(self, data):
        for element in self._open:
            element.text += data

    def all(self, tag, cls=None, inside=None):
        return [
            e
            for e in self.elements
            if e.tag == tag
            and (cls is None or cls in e.attrs.get("class", "").split())
            and (inside is None or inside in e.inside)
        ]

    def table(self, inside):
        """Return the texts of all rows in the element with this id."""
        rows, of_row = [], {"tr", "th", "td"}
        for element in self.elements:
            if inside in element.inside and element.tag in of_row:
                if element.tag == "tr":
                    rows.append([])
                else:
                    rows[-1].append(element.text.strip())
        return rows


def record(layer, error, bits=4.125):
    return {"layer": layer, "error": error, "bits_per_weight": bits, "seconds": 1.5, "tokens": 4096}


def report(layers=32, name="gptq-w4g128", **more):
    rng = np.random.default_rng(0)
    names = [(f"model.layers.{i}.{x}", i) for i in range(layers) for x in LINEARS]
    histogram = {
        "levels": [float(x) for x in range(16)],
        "low": -1.1,
        "high": 16.1,
        "weights": rng.integers(0, 4000, 86).tolist(),
        "codes": rng.integers(0, 4000, 16).tolist(),
    }
    told = {
        "model": "org/model",
        "recipe": {"name": name, "grid": {"name": "affine", "bits": 4}},
        "calibration": {"text": "a text", "sequences": 8, "length": 128, "bos": True, "sha256": "00" * 32},
        "linears": {x: record(i, float(10 ** rng.uniform(-4, -1)), float(rng.choice([4.5, 6.5625]))) for x, i in names},
        "notes": [],
        "bits_per_weight": 4.125,
        "command": f"llmquant quantize org/model {name} --out out",
        "machine": "a machine",
        "histograms": {x: histogram for x, _ in names[:4]},
        "costs": [{"part": i, "seconds": 20.0 + i, "peak_bytes": 10**9 + i} for i in range(layers)],
        "outputs": {"gptq": f"out/{name}"},
        "bytes": {"gptq": 4 * 10**9},
        "hashes": {"gptq": {f"model-{i:05}-of-00040.safetensors": "00" * 32 for i in range(40)}},
        "residual_errors": {"gptq": np.linspace(0.01, 0.2, layers).tolist()},
        "versions": VERSIONS,
    }
    return Report(**told | more)


def row(recipe="gptq-w4g128", bytes_=4 * 10**9, kld=0.02, perplexity=6.1, **more):
    told = {"format": "gptq", "path": f"out/{recipe}", "bpw": 4.25, "protocol": "a protocol", "perplexity_error": 0.1}
    told |= {"kld_error": 0.001, "kld_median": 0.01, "kld_p99": 0.2, "top1": 0.95, "perplexity_ratio": 1.0}
    told |= {"seconds": 100.0, "peak_rss_bytes": 10**9, "bytes": bytes_, "kld_mean": kld, "perplexity": perplexity}
    return Row(recipe=recipe, **told | more)


FLOAT = row("float", 16 * 10**9, 0.0, 6.0, path="org/model", format="bfloat16")


def sensitivity(layers=32, grids=("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")):
    units = [Unit(f"model.layers.{i}.{x}", i, (f"model.layers.{i}.{x}",), 100) for i in range(layers) for x in LINEARS]
    results = [Measured(u.name, g, 4.5, 1e-4 * (i + 1), 1e-5, 0.99) for i, u in enumerate(units) for g in grids]
    return Sensitivity("org/model", "a", "linear", "a text", tuple(units), tuple(results), {}, {"versions": VERSIONS})


def figures(rows=6):
    return [FLOAT, *(row(f"recipe-{i}", (3 + i) * 10**9, 0.3 / 2**i, 6.5 - i / 20) for i in range(rows))]


def comparison(rows):
    reports = [report(name=r.recipe) for r in rows[1:]]
    return html.compared(rows, reports, "model", "llmquant compare", {r.path: r.recipe for r in rows[1:]})


def test_every_linear_has_its_error_and_its_bits_in_a_table():
    told = report(layers=3)
    page = Page(html.quantized(told, [], "gptq"))
    for table, key, factor in (("errors", "error", 100), ("bits", "bits_per_weight", 1)):
        head, *rows = page.table(table)
        assert head == ["layer", *(x.rpartition(".")[2] for x in LINEARS)]
        for layer, cells in enumerate(rows):
            expected = [factor * told.linears[f"model.layers.{layer}.{x}"][key] for x in LINEARS]
            assert cells[0] == str(layer)
            assert [float(x) for x in cells[1:]] == pytest.approx(expected, rel=0.06)


def test_experts_are_told_by_their_mean_and_what_is_outside_of_layers_by_its_name():
    linears = {f"m.layers.0.mlp.experts.{e}.up": record(0, 0.1 * (e + 1)) for e in range(3)}
    linears |= {"m.layers.1.mlp.up": record(1, 0.5), "lm_head": record(None, 0.03)}
    told = report(1, histograms={}, linears=linears)
    page = Page(html.quantized(told, [], "gptq"))
    assert page.table("errors") == [
        ["layer", "mlp.experts.*.up", "mlp.up"],
        ["0", "20", ""],
        ["1", "", "50"],
        ["lm_head", "3.0"],
    ]


def test_a_point_is_where_the_axes_say_that_its_figures_are():
    rows = figures()
    page = Page(comparison(rows))
    for plot, key, log in (("divergence", "kld_mean", True), ("perplexity", "perplexity", False)):
        marks = page.all("circle", "mark", plot)
        assert len(marks) == len(rows) - 1
        for axis, place, expected, scale in (
            ("x", "cx", [r.bytes / 1e9 for r in rows[1:]], lambda v: v),
            ("y", "cy", [getattr(r, key) for r in rows[1:]], math.log if log else lambda v: v),
        ):
            ticks = page.all("text", axis, plot)
            assert len(ticks) >= 3
            known = [(float(t.attrs[axis]) - (4 if axis == "y" else 0), scale(float(t.text))) for t in ticks]
            slope, start = np.polyfit(*zip(*known, strict=True), 1)
            found = [slope * float(mark.attrs[place]) + start for mark in marks]
            wide = abs(slope) * 300  # of the axis
            assert found == pytest.approx([scale(v) for v in expected], abs=0.005 * wide)


def test_bars_and_stems_are_as_high_as_the_axes_say():
    told = report(layers=5)
    page = Page(html.quantized(told, [], "gptq"))

    def height(plot, y):
        known = [(float(t.attrs["y"]) - 4, float(t.text)) for t in page.all("text", "y", plot)]
        slope, start = np.polyfit(*zip(*known, strict=True), 1)
        return slope * y + start

    tops = [height("seconds", float(e.attrs["y"])) for e in page.all("rect", "bar", "seconds")]
    assert tops == pytest.approx([cost["seconds"] for cost in told.costs], abs=0.2)
    codes = np.array(next(iter(told.histograms.values()))["codes"])
    stems = [height("worst-1", float(e.attrs["cy"])) for e in page.all("circle", "dot", "worst-1")]
    assert stems == pytest.approx(100 * codes / codes.sum(), abs=0.1)


TRAINED = {
    "step": 400,
    "best": 0.0625,
    "losses": [[i, 0.5 * 0.99**i] for i in range(400)],
    "held_out": [[40 * i, 0.25 * 0.5 ** (i / 5)] for i in range(11)],
    "seconds": 60.0,
}


def test_a_training_is_told_by_what_it_gained_and_its_curves():
    page = Page(html.quantized(report(layers=2, training=TRAINED), [], "gptq"))
    assert (
        "Trained for 400 steps: KLD on held-out text 0.25000 before, 0.06250 at the best step" in page.elements[0].text
    )
    for plot, last in (("held-out", TRAINED["held_out"][-1]), ("losses", (397.5, 0.5 * 0.99**397.5))):
        (line,) = page.all("path", "line", plot)
        known = {axis: page.all("text", axis, plot) for axis in "xy"}
        for axis, value, at in zip("xy", last, line.attrs["d"].rpartition("L")[2].split(), strict=True):
            ticks = [(float(t.attrs[axis]) - (4 if axis == "y" else 0), float(t.text)) for t in known[axis]]
            slope, start = np.polyfit(*zip(*ticks, strict=True), 1)
            assert slope * float(at) + start == pytest.approx(value, abs=abs(slope))
    assert "Training" not in Page(html.quantized(report(layers=2), [], "gptq")).elements[0].text


HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>\x00\u202e{{ 7 * 7 }}'


def hostile_pages():
    linear = f"model.layers.0.{HOSTILE}"
    told = report(
        name=HOSTILE,
        model=f"</title>{HOSTILE}",
        linears={linear: record(0, 0.1)},
        histograms={linear: next(iter(report(1).histograms.values()))},
        notes=[HOSTILE],
        command=f"</pre>{HOSTILE}",
        versions={**VERSIONS, HOSTILE: HOSTILE},
        hashes={"gptq": {HOSTILE: HOSTILE}},
    )
    told.outputs = {"gptq": "out"}
    rows = [FLOAT, row(HOSTILE, protocol=HOSTILE, format=HOSTILE)]
    unit = Unit(linear, 0, (linear,), 1)
    found = Sensitivity(HOSTILE, HOSTILE, "linear", HOSTILE, (unit,), (), {}, {"versions": VERSIONS})
    found = Sensitivity(**vars(found) | {"results": (Measured(linear, HOSTILE, 4.0, 0.1, 0.1, 0.9),)})
    return {
        "quantized": html.quantized(told, rows, "gptq"),
        "compared": html.compared(rows, [told], HOSTILE, HOSTILE, {rows[1].path: f"javascript:{HOSTILE}"}),
        "sensitive": html.sensitive(found, HOSTILE),
    }


@pytest.mark.parametrize("kind", ["quantized", "compared", "sensitive"])
def test_names_from_outside_are_shown_and_nothing_else(kind):
    source = hostile_pages()[kind]
    page = Page(source)
    assert not {e.tag for e in page.elements} & {"script", "img", "iframe", "link", "object"}
    assert not [name for e in page.elements for name in e.attrs if name.startswith("on")]
    assert all(link.attrs["href"].startswith("./javascript%3A") for link in page.all("a"))
    assert "<script>alert(1)</script>" in page.elements[0].text
    assert "{{ 7 * 7 }}" in page.elements[0].text
    assert not [c for c in source if c != "\n" and not c.isprintable()]


def big_pages():
    return {
        "quantized": html.quantized(report(training=TRAINED), [FLOAT, row()], "gptq"),
        "compared": comparison(figures(12)),
        "sensitive": html.sensitive(sensitivity(), ""),
    }


@pytest.mark.parametrize("kind", ["quantized", "compared", "sensitive"])
def test_a_page_is_small_and_names_nothing_to_load(kind):
    source = big_pages()[kind]
    assert len(source.encode()) < 300_000
    page = Page(source)
    loaded = [e.attrs[key] for e in page.elements for key in ("src", "srcset", "data", "xlink:href") if key in e.attrs]
    assert not loaded
    assert all(link.attrs["href"].startswith("./") for link in page.all("a"))
    assert not re.search(r"url\(|@import|https?:", source)
    policy = next(e.attrs["content"] for e in page.all("meta") if "http-equiv" in e.attrs)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


@pytest.mark.parametrize("kind", ["quantized", "compared", "sensitive"])
def test_every_drawing_has_a_title_and_a_description_and_every_id_is_once(kind):
    page = Page(big_pages()[kind])
    ids = [e.attrs["id"] for e in page.elements if "id" in e.attrs]
    assert len(ids) == len(set(ids))
    for drawing in page.all("svg"):
        assert drawing.attrs["role"] == "img"
        for key in drawing.attrs["aria-labelledby"].split():
            assert next(e.text for e in page.elements if e.attrs.get("id") == key)
    assert all(e.attrs.get("scope") in ("row", "col") for e in page.all("th"))


def test_figures_that_are_missing_or_zero_leave_no_hole():
    bare = report(layers=1, calibration={}, costs=[], histograms={}, residual_errors={}, command="")
    for name in bare.linears:
        bare.linears[name] = record(0, 0.0)
    page = Page(html.quantized(bare, [], "gptq"))
    assert page.table("errors")[1][1:] == ["0"] * 7
    assert {e.attrs["id"] for e in page.all("svg")} == {"seconds"}  # of the linears
    same = [FLOAT, row(kld=0.0, perplexity=6.0)]
    page = Page(html.compared(same, [bare], "model", "", {"out/gptq-w4g128": "a"}))
    assert {e.attrs["id"] for e in page.all("svg")} == {"perplexity"}


@pytest.fixture(scope="module")
def written(llama, texts, tmp_path_factory):
    """A comparison and sensitivities, as the commands write them."""
    out = tmp_path_factory.mktemp("reports")
    changes = [f"calibration.path={texts / 'calibration.txt'}", "calibration.sequences=16", "calibration.length=128"]
    options = {"text": texts / "evaluation.txt", "max_tokens": 512, "command": "llmquant --typed"}
    changes += ["grid.group_size=32"]
    api.compare(llama, ["rtn-w4g128", "gptq-plain-w4g128"], out / "both", changes=changes, **options)
    api.sensitivity(llama, "rtn-w4g128", out / "alone", changes=changes[-1:], by="layer", grids="2,4", **options)
    return out


PLOTS = {
    "both/report.html": {"divergence", "perplexity"},
    "both/rtn-w4g128/report.html": {"errors", "worst-1", "worst-4", "seconds"},
    "both/gptq-plain-w4g128/report.html": {"errors", "worst-1", "worst-4", "seconds", "memory"},
    "alone/report.html": {"most"},
}


def opened(path, folder):
    """Return a page as a browser holds it, what it wrote to its console, and the addresses that the page asked for."""
    program = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("there is no browser here: install chromium")
    log = folder / "net.json"
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
    ]
    flags += [
        "--no-first-run",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--log-net-log={log}",
        "--enable-logging=stderr",
    ]
    done = subprocess.run(
        [program, *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    requests = []
    for line in log.read_text("utf-8").splitlines():
        found = re.search(r'"initiator":"(.*?)".*"url":"(.*?)"', line)
        if found and found[1] != "not an origin":  # the browser's own
            requests.append(found[2])
    return done.stdout, console, requests


@pytest.mark.parametrize("path", PLOTS)
def test_a_browser_shows_every_plot_without_a_fault_or_a_request(path, written, tmp_path):
    dom, console, requests = opened(written / path, tmp_path)
    assert (console, requests) == ([], [])
    page = Page(re.sub(r"<(meta|br)([^>]*?)/?>", r"<\1\2>", dom))
    assert PLOTS[path] <= {e.attrs.get("id") for e in page.elements}
    assert "llmquant --typed" in page.elements[0].text
    for link in page.all("a"):
        assert ((written / path).parent / link.attrs["href"]).is_file()


@pytest.mark.parametrize("kind", ["quantized", "compared", "sensitive"])
def test_a_browser_runs_nothing_that_a_name_holds(kind, tmp_path):
    (tmp_path / "page.html").write_text(hostile_pages()[kind], "utf-8")
    _, console, requests = opened(tmp_path / "page.html", tmp_path)
    assert (console, requests) == ([], [])


def test_the_browser_tells_of_faults_and_requests(tmp_path):
    page = '<!doctype html><title>x</title><img src="https://example.org/a.png"><script>console.error("oops")</script>'
    (tmp_path / "page.html").write_text(page, "utf-8")
    _, console, requests = opened(tmp_path / "page.html", tmp_path)
    assert "oops" in console[0]
    assert requests == ["https://example.org/a.png"]


def test_reports_are_told_in_markdown_and_json_too(written):
    both = json.loads((written / "both" / "report.json").read_text("utf-8"))
    assert both["command"] == "llmquant --typed"
    report = json.loads((written / "both" / "gptq-plain-w4g128" / "llmquant-report.json").read_text("utf-8"))
    assert report["command"] == both["command"]
    assert [cost["part"] for cost in report["costs"]] == [0, 1, 2]
    assert all(cost["seconds"] > 0 and cost["peak_bytes"] > 10**7 for cost in report["costs"])
    worst = sorted(report["linears"], key=lambda name: -report["linears"][name]["error"])[:4]
    assert list(report["histograms"]) == worst
    assert {"report.html", "README.md"} <= report["hashes"]["gptq"].keys()
