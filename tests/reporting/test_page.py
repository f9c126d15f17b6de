"""`optin report`: one page that loads nothing, says what the files say, escapes them, and draws inside its charts."""

from __future__ import annotations

import csv
import fnmatch
import html
import io
import json
import math
import os
import re
import shutil
import subprocess
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from optin_deploy.common.formatting import figures, milliseconds, si, size
from optin_deploy.errors import BadInput
from optin_deploy.jobs.sweep import HEADER
from optin_deploy.planning.plan import NetworkPlan
from optin_deploy.reporting.charts import LEFT, RIGHT, latency_chart, ratio_chart, sweep_chart, units_chart
from optin_deploy.reporting.findings import SweepRow, read_findings
from optin_deploy.reporting.latency_rows import LatencyRow, StoredLatency, StoredSamples
from optin_deploy.reporting.page import render
from support.project import ROOT
from support.tiny_checkpoint import Shell, copy_of, snapshot, temporary_files

VOID = {"meta", "br", "hr", "img", "link", "input"}
"""Elements of HTML without an end tag."""
LOADING = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background", "style"}
HOSTILE = "</title><script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
SWEEP = [(0.9, 0.95), (0.6, 0.94), (0.3, 0.8)]


@dataclass(eq=False)
class Element:
    """One element of a page."""

    tag: str
    attributes: dict[str, str]
    parent: Element | None
    parts: list[Element | str] = field(default_factory=list)
    """Elements and texts inside, in their order."""

    @property
    def children(self) -> list[Element]:
        return [part for part in self.parts if isinstance(part, Element)]

    def all(self, tag: str, of: str | None = None) -> list[Element]:
        """Descendants with a tag, and a class."""
        return [x for x in self.walk() if x.tag == tag and of in (None, *x.attributes.get("class", "").split())]

    def walk(self) -> Iterator[Element]:
        for child in self.children:
            yield child
            yield from child.walk()

    @property
    def text(self) -> str:
        return " ".join("".join(self._texts()).split())

    def _texts(self) -> Iterator[str]:
        for part in self.parts:
            if isinstance(part, str):
                yield part
            else:
                yield from part._texts()

    def number(self, name: str) -> float:
        return float(self.attributes[name])

    def rows(self) -> list[list[str]]:
        """Cells of a table."""
        return [[cell.text for cell in row.children] for row in self.all("tr")]


class Tree(HTMLParser):
    """Builds elements; refuses a page in which a tag is not closed, or closed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.root = self.at = Element("", {}, None)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        child = Element(tag, {name: value or "" for name, value in attrs}, self.at)
        self.at.parts.append(child)
        if tag not in VOID:
            self.at = child

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.at.tag == tag, f"</{tag}> inside <{self.at.tag}>"
        assert self.at.parent is not None
        self.at = self.at.parent

    def handle_data(self, data: str) -> None:
        self.at.parts.append(data)


def parsed(html: str) -> Element:
    tree = Tree()
    tree.feed(html)
    tree.close()
    assert tree.at is tree.root, f"<{tree.at.tag}> is not closed"
    return tree.root


def page_of(folder: Path) -> Element:
    return parsed(render(read_findings(folder)))


def stored(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return data


def change(folder: Path, **fields: Any) -> None:
    """Other values in report.json; `a__b` is b inside a."""
    data = stored(folder)
    for path, value in fields.items():
        *outer, last = path.split("__")
        inside: Any = data
        for key in outer:
            inside = inside[int(key) if key.isdigit() else key]
        inside[last] = value
    (folder / "report.json").write_text(json.dumps(data))


def add_sweep(folder: Path, rows: list[tuple[float, float]] = SWEEP) -> None:
    text = io.StringIO()
    figures = [
        (share, share - 0.004, int(1e6 * share), "accuracy", 0.96, value, 96 - 100 * value) for share, value in rows
    ]
    csv.writer(text, lineterminator="\n").writerows([HEADER, *figures])
    (folder / "sweep.csv").write_text(text.getvalue())


def add_bench(folder: Path) -> None:
    row = stored(folder)["latency"][0] | {"batch": 7}
    facts = {"date": "later", "cpu_model": "another CPU", "cores_logical": 3}
    (folder / "measurements.json").write_text(json.dumps({"schema_version": 1, "latency": [row], "environment": facts}))


# the command


def test_the_command_writes_one_page_and_nothing_else(shell: Shell, finished: Path) -> None:
    before = snapshot(finished)
    ran = shell("optin", "report", finished)
    assert ran.code == 0, ran.err
    assert f"Wrote {finished / 'report.html'}" in ran.out
    after = snapshot(finished)
    assert after.keys() - before.keys() == {"report.html"}
    assert {name: after[name] for name in before} == before
    assert temporary_files(finished) == []
    first = (finished / "report.html").read_bytes()
    assert first.startswith(b"<!doctype html>\n")
    assert shell("optin", "report", finished).code == 0
    assert (finished / "report.html").read_bytes() == first, "the same folder gives the same bytes"


def test_another_file_is_chosen_with_out(shell: Shell, finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    assert shell("optin", "report", finished, "--out", path).code == 0
    assert path.is_file()
    assert not (finished / "report.html").exists()


@pytest.mark.parametrize("name", ["report.json", "folder.html", "report"])
def test_out_never_replaces_what_is_no_page(shell: Shell, finished: Path, name: str) -> None:
    (finished / "folder.html").mkdir()
    before = snapshot(finished)
    ran = shell("optin", "report", finished, "--out", finished / name)
    assert ran.code == 2
    assert ".html" in ran.err
    assert snapshot(finished) == before


def test_a_dry_run_writes_nothing_but_checks(shell: Shell, finished: Path) -> None:
    before = snapshot(finished)
    ran = shell("optin", "report", finished, "--dry-run")
    assert ran.code == 0, ran.err
    assert f"would write {finished / 'report.html'}" in ran.out
    assert snapshot(finished) == before
    (finished / "report.json").unlink()
    assert shell("optin", "report", finished, "--dry-run").code == 2


def test_another_model_takes_the_page_away(shell: Shell, finished: Path) -> None:
    assert shell("optin", "report", finished).code == 0
    assert shell("optin", "plan", finished, "--flops", 0.5, "--align", 8, "--allocation", "uniform").code == 0
    assert shell("optin", "report", finished).code == 0, "the plan is newer, but model and report belong together"
    assert shell("optin", "rewrite", finished).code == 0
    assert not (finished / "report.html").exists()
    ran = shell("optin", "report", finished)
    assert ran.code == 2
    assert f"optin-export MODEL --out {finished}" in ran.err


# what stands there


def test_the_page_is_well_formed_and_loads_nothing(finished: Path) -> None:
    add_sweep(finished)
    add_bench(finished)
    html = render(read_findings(finished))
    page = parsed(html)
    assert [x.tag for x in page.children] == ["html"]
    assert {x.tag for x in page.walk()} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
    } == set()
    for element in page.walk():
        assert not LOADING & element.attributes.keys(), element.tag
        assert not [name for name in element.attributes if name.startswith("on")]
    style = page.all("style")[0].text
    assert not re.search(r"url\(|@import|@font-face", style)
    assert "http" not in html.replace('http-equiv="Content-Security-Policy"', "")
    policy = next(x for x in page.all("meta") if "http-equiv" in x.attributes).attributes["content"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_a_reader_who_does_not_see_charts_is_told_of_them(finished: Path) -> None:
    add_sweep(finished)
    page = page_of(finished)
    charts = [x for x in page.all("svg") if x.attributes.get("role") == "img"]
    assert len(charts) == 2 + 2 + 2 + 1  # bars, places, a point's latencies and ratios, the sweep
    assert all(len(x.attributes["aria-label"]) > 20 and x.all("title")[0].text for x in charts)
    row = stored(finished)["latency"][0]
    assert milliseconds(row["dense"]["p95_ms"]) in charts[4].attributes["aria-label"]
    for table in page.all("table"):
        assert {cell.attributes["scope"] for cell in table.all("thead")[0].all("th")} == {"col"}
        assert table.all("tbody")[0].all("tr")[0].children[0].tag == "th"
        assert table.parent
        assert table.parent.attributes["class"] == "scroll", "a wide table scrolls inside its box"
        assert table.parent.attributes["tabindex"] == "0", "also by keyboard"
    ids = [x.attributes["id"] for x in page.walk() if "id" in x.attributes]
    assert len(ids) == len(set(ids))
    assert {x.attributes["aria-labelledby"] for x in page.all("section")} <= set(ids)
    assert page.all("html")[0].attributes["lang"] == "en"


def test_the_result_is_that_of_the_report(finished: Path) -> None:
    data, page = stored(finished), page_of(finished)
    (row,) = data["latency"]
    quality, speed = [x.text for x in page.all("p", "result")]
    assert quality == (finished / "report.md").read_text().split("\n\n")[1]
    assert speed.startswith(f"{row['speedup']:.2f}x the speed of the dense model")
    assert f"95% CI {row['ci95'][0]:.2f} to {row['ci95'][1]:.2f}" in speed
    assert f"{milliseconds(row['dense']['p50_ms'])} to {milliseconds(row['pruned']['p50_ms'])}" in speed
    assert page.all("title")[0].text == "Pruning report: classifier"


def kept_in(report: Path) -> list[str]:
    """Lines of the table of what stays."""
    head, _, *rows = report.read_text().partition("| where |")[1:][1].partition("\n\n")[0].splitlines()
    return [f"| where |{head}", *rows]


def test_the_tables_are_those_of_the_report(finished: Path) -> None:
    data, page = stored(finished), page_of(finished)
    sizes, kept, latency = (table.rows() for table in page.all("table"))
    assert kept == [[cell.strip() for cell in line.split("|")[1:3]] for line in kept_in(finished / "report.md")]
    params, macs, files = data["params"], data["macs"], data["size_bytes"]
    assert sizes[1:] == [
        ["parameters", si(params["dense"]), si(params["pruned"]), f"{params['pruned'] / params['dense']:.1%}"],
        ["MACs a sample", si(macs["dense"]), si(macs["pruned"]), f"{macs['kept']:.1%}"],
        ["file", size(files["dense"]), size(files["pruned"]), f"{files['pruned'] / files['dense']:.1%}"],
    ]
    (row,) = data["latency"]
    found = dict(zip(latency[0], latency[1], strict=True))
    for name in ("dense", "pruned"):
        for percent in (50, 95):
            told = found[f"{name} p{percent}"]
            assert told.endswith(" ms")
            assert float(told.split()[0]) == pytest.approx(row[name][f"p{percent}_ms"], rel=5e-3)
    assert found["speed-up [95% CI]"] == f"{row['speedup']:.2f}x [{row['ci95'][0]:.2f}, {row['ci95'][1]:.2f}]"
    assert found["time saved of ideal"] == f"{row['realised']:.0%} of {row['ideal']:.2f}x"
    assert found["engine"] == "onnx fp32, 1 thread"
    assert found["point"] == "batch 1, 16 tokens"
    assert f"{macs['prunable_kept']:.1%} of the MACs stay" in page.text


def test_settings_environment_and_hashes_are_folded_away(finished: Path) -> None:
    data, page = stored(finished), page_of(finished)
    folded = {x.all("summary")[0].text.split()[0].rstrip(":"): x for x in page.all("details")}
    assert list(folded) == ["Settings", "Environment", "Seconds", "Bytes", "Parity", "Hashes"]
    assert not any("open" in x.attributes for x in folded.values())

    def facts(name: str) -> dict[str, str]:
        names, values = ([x.text for x in folded[name].all(tag)] for tag in ("dt", "dd"))
        return dict(zip(names, values, strict=True))

    assert list(facts("Hashes").values()) == list(data["hashes"].values())
    assert facts("Settings")["model"] == "classifier"
    assert facts("Settings")["compensation"] == "yes"
    assert facts("Environment")["versions torch"] == data["environment"]["versions"]["torch"]
    assert [float(x) for x in facts("Parity").values()] == pytest.approx(list(data["parity"].values()), rel=1e-3)
    assert [float(x) for x in facts("Seconds").values()] == pytest.approx(list(data["seconds"].values()), rel=1e-3)


def groups_of(finished: Path, kind: str) -> list[tuple[str, str]]:
    """Name of each group of a kind, and which of its units stay, as a mask."""
    keep = json.loads((finished / "plan.json").read_text())["keep"]
    return [
        (
            each["name"],
            "".join("01"[unit in keep.get(each["name"], range(each["units"]))] for unit in range(each["units"])),
        )
        for each in stored(finished)["groups"]
        if each["kind"] == kind
    ]


def test_bars_and_cells_are_those_of_the_plan(finished: Path) -> None:
    page = page_of(finished)
    for kind, chart in zip(("heads", "neurons"), page.all("svg", "bars"), strict=True):
        masks = [mask for _, mask in groups_of(finished, kind)]
        units, stay = [len(mask) for mask in masks], [mask.count("1") for mask in masks]
        full, kept = ([x.number("width") for x in chart.all("rect", of)] for of in ("full", "bar"))
        assert len(full) == len(kept) == len(units)
        assert full == pytest.approx([width * max(full) / max(units) for width in units], abs=0.01)
        shares = [a / b for a, b in zip(kept, full, strict=True)]
        assert shares == pytest.approx([n / of for n, of in zip(stay, units, strict=True)], abs=1e-3)
        assert [x.text for x in chart.all("text")][1::2] == [f"{n} of {of}" for n, of in zip(stay, units, strict=True)]
        assert [x.all("title")[0].text for x in chart.all("g")] == [name for name, _ in groups_of(finished, kind)]
    heads, neurons = page.all("svg", "places")
    for row, (name, bits) in zip(heads.all("g"), groups_of(finished, "heads"), strict=True):
        cells = row.all("rect")
        assert "".join("1" if x.attributes["class"] == "kept" else "0" for x in cells) == bits
        assert [x.number("x") for x in cells] == sorted(x.number("x") for x in cells)
        assert row.all("title")[0].text.startswith(f"{name}: ")
    for strip, (_, bits) in zip(neurons.all("svg", "strip"), groups_of(finished, "neurons"), strict=True):
        assert strip.attributes["viewbox"] == f"0 0 {len(bits)} 2"
        assert units_of(strip.all("path")[0].attributes["d"], len(bits)) == bits


def test_kinds_of_which_nothing_was_cut_are_told_and_not_drawn(finished: Path) -> None:
    page, groups = page_of(finished), stored(finished)["groups"]
    whole = Counter(each["kind"] for each in groups if each["kept"] == each["units"])
    assert len(page.all("svg", "places")) == len({each["kind"] for each in groups if each["kept"] < each["units"]}) == 2
    told = ", ".join(f"{many} of {kind}" for kind, many in whole.items())
    assert f"Nothing was cut in {whole.total()} of {len(groups)} groups: {told}." in page.text
    with_nothing_cut = json.loads((finished / "plan.json").read_text()) | {"keep": {}}
    (finished / "plan.json").write_text(json.dumps(with_nothing_cut))
    report = stored(finished)
    report["groups"] = [each | {"kept": each["units"]} for each in report["groups"]]
    report["hashes"]["plan"] = NetworkPlan.read(finished / "plan.json").hash
    (finished / "report.json").write_text(json.dumps(report))
    page = page_of(finished)
    assert len(page.all("svg", "places")) == 4, "of all kinds, where there is nothing else"


def units_of(path: str, units: int) -> str:
    """What a strip's path covers, as a mask; each unit at most once."""
    bits, x = ["0"] * units, 0
    for command, number in re.findall(r"([Mmh])(\d+)", path):
        start, x = x, int(number) if command == "M" else x + int(number)
        if command == "h":
            assert set(bits[start:x]) <= {"0"}
            bits[start:x] = "1" * (x - start)
    return "".join(bits)


def test_all_coordinates_are_finite_and_inside_their_view(finished: Path) -> None:
    add_sweep(finished)
    add_bench(finished)
    seen = 0
    for element in page_of(finished).walk():
        if element.tag in ("line", "rect", "circle", "text", "polyline", "svg", "path"):
            view = next((x for x in ancestors(element) if x.tag == "svg"), None)
            if view is not None:
                left, top, width, height = map(float, view.attributes["viewbox"].split())
                for x, y in corners(element):
                    assert left <= x <= left + width, (element.tag, element.attributes)
                    assert top <= y <= top + height, (element.tag, element.attributes)
                    seen += 1
    assert seen > 500


def ancestors(element: Element) -> Iterator[Element]:
    while element.parent is not None:
        element = element.parent
        yield element


def corners(element: Element) -> list[tuple[float, float]]:
    """Points that an element must have in view."""
    has = element.attributes
    if "points" in has:
        points = [tuple(map(float, pair.split(","))) for pair in has["points"].split()]
        return [(x, y) for x, y in points]
    if "cx" in has:
        x, y, r = (element.number(name) for name in ("cx", "cy", "r"))
        return [(x - r, y - r), (x + r, y + r)]
    if "x1" in has:
        return [(element.number(f"x{i}"), element.number(f"y{i}")) for i in (1, 2)]
    if "d" in has:
        x, numbers = 0, [int(number) for number in re.findall(r"[Mmh](\d+)", has["d"])]
        return [(x := x + number, 1) for number in numbers]
    x, y = element.number("x"), element.number("y")
    return [(x, y), (x + float(has.get("width", 0)), y + float(has.get("height", 0)))]


def test_curves_pass_through_the_stated_percentiles(finished: Path) -> None:
    (row,) = stored(finished)["latency"]
    chart = page_of(finished).all("svg", "plot")[0]
    p50, p95 = [x.number("y1") for x in chart.all("line", "rule")]
    below = [x for x in chart.all("text") if x.attributes.get("text-anchor") == "middle"]
    ticks = [(x.number("x"), float(x.text)) for x in below if x.text != "milliseconds"]
    (left, low), (right, high) = ticks[0], ticks[-1]
    for name in ("dense", "pruned"):
        points = corners(chart.all("polyline", name)[0])
        assert all(a[0] <= b[0] and a[1] > b[1] for a, b in pairwise(points)), "it rises"
        for height, stated in ((p50, row[name]["p50_ms"]), (p95, row[name]["p95_ms"])):
            x = next(x for x, y in points if y == pytest.approx(height, abs=0.02))
            assert low + (x - left) / (right - left) * (high - low) == pytest.approx(stated, rel=1e-2)


def test_every_block_is_a_dot_and_the_interval_is_marked(finished: Path) -> None:
    (row,) = stored(finished)["latency"]
    chart = page_of(finished).all("svg", "plot")[1]
    dots = [x.number("cx") for x in chart.all("circle")]
    samples = row["samples_ms"]
    ratios = [np.median(a) / np.median(b) for a, b in zip(samples["dense"], samples["pruned"], strict=True)]
    (span,) = chart.all("line", "span")
    one, ideal = [x.number("x1") for x in chart.all("line", "rule")]
    per_x = (row["ideal"] - 1) / (ideal - one)
    assert [1 + (x - one) * per_x for x in dots] == pytest.approx(ratios, rel=1e-3)
    ends = [1 + (span.number(name) - one) * per_x for name in ("x1", "x2")]
    assert ends == pytest.approx(row["ci95"], rel=1e-3)


def test_an_interval_around_one_is_called_no_difference(finished: Path) -> None:
    change(finished, latency__0__speedup=1.2, latency__0__ci95=[1.1, 1.3])  # not what a busy machine measured
    assert "no difference" not in page_of(finished).text
    change(finished, latency__0__speedup=1.01, latency__0__ci95=[0.98, 1.04])
    assert "The interval holds 1: no difference is shown." in page_of(finished).all("p", "result")[1].text


def test_a_machine_that_differs_from_itself_is_told(finished: Path) -> None:
    change(finished, latency__0__unstable=False)  # a busy machine may have been
    assert "Unstable" not in page_of(finished).text
    change(finished, latency__0__unstable=True, latency__0__same_ci95=[1.05, 1.09])
    assert "differ by a factor of 1.05 to 1.09" in page_of(finished).all("p", "warning")[-1].text


def test_low_agreement_is_warned_of_and_notes_are_told(finished: Path) -> None:
    change(finished, latency__0__unstable=False)  # a busy machine may have been
    assert page_of(finished).all("p", "warning") == []
    quality = {"metric": "cosine_to_dense", "dense": 1.0, "pruned": 0.9, "samples": 5}
    change(finished, quality=quality, notes=["Use `--calibration FILE`, please."])
    page = page_of(finished)
    assert "expect some loss" in page.all("p", "warning")[0].text
    assert "--calibration FILE" in [x.text for x in page.all("code")]


def test_without_latency_the_page_says_so(finished: Path) -> None:
    change(finished, latency=[], size_bytes={"pruned": 1})
    page = page_of(finished)
    assert "Latency was not measured" in page.text
    assert page.all("svg", "plot") == []
    assert page.all("table")[0].rows()[-1] == ["file", "", "1.00 bytes", ""]


def test_a_page_of_a_later_report_is_the_same_but_for_its_hash(finished: Path) -> None:
    before = render(read_findings(finished))
    (row,) = stored(finished)["latency"]
    more = {"again": {"speedup": 1.0}, "load_ms": {"dense": [1.0], "pruned": [1.0]}}
    row |= more | {name: row[name] | {"p99_ms": 3.0} for name in ("dense", "pruned")}
    change(finished, schema_version=2, latency=[row], verdict="new")
    after = render(read_findings(finished))
    assert re.sub("[0-9a-f]{64}", "", before) == re.sub("[0-9a-f]{64}", "", after)


def test_what_bench_measured_stands_there_too(finished: Path) -> None:
    add_bench(finished)
    page = page_of(finished)
    assert [x.text for x in page.all("h3")] == ["Measured again with optin bench"]
    assert [table.rows()[1][0] for table in page.all("table")[2:]] == ["batch 1, 16 tokens", "batch 7, 16 tokens"]
    assert "another CPU, 3 cores" in page.text
    assert len(page.all("svg", "plot")) == 4


def test_the_curve_of_a_sweep_is_drawn(finished: Path) -> None:
    assert "Quality and cost" not in page_of(finished).text
    add_sweep(finished)
    page = page_of(finished)
    chart, rows = page.all("svg", "plot")[-1], page.all("table")[-1].rows()
    assert rows[0][:2] == ["budget", "accuracy"]
    assert [row[:4] for row in rows[1:]] == [
        ["90%", "0.9500", "1.00", "89.6%"],
        ["60%", "0.9400", "2.00", "59.6%"],
        ["30%", "0.8000", "16.00", "29.6%"],
    ]
    dots = [(x.number("cx"), x.number("cy")) for x in chart.all("circle")]
    assert dots == corners(chart.all("polyline")[0])
    (x0, y0), (x1, y1), (x2, y2) = dots
    assert (x1 - x0) / (x2 - x0) == pytest.approx(0.5, abs=1e-3)
    assert (y0 - y1) / (y0 - y2) == pytest.approx(0.14 / 0.15, abs=1e-3)
    dense, this = chart.all("line", "rule")
    assert (y1 - dense.number("y1")) / (y0 - y1) == pytest.approx(0.02 / 0.14, abs=2e-3)
    kept = stored(finished)["macs"]["kept"]
    assert (this.number("x1") - x0) / (x2 - x0) == pytest.approx((kept - 0.296) / 0.6, abs=2e-3)


@pytest.mark.parametrize(("metric", "dense"), [("perplexity", 162.4), ("relative_error", 0.0)])
def test_a_figure_that_has_no_bound_is_drawn(finished: Path, metric: str, dense: float) -> None:
    rows = [f"{share},{share},900,{metric},{dense},{dense + 2},1.23\n" for share in (0.9, 0.5)]
    (finished / "sweep.csv").write_text("".join([",".join(HEADER), "\n", *rows]))
    page = page_of(finished)
    heading, first, _ = page.all("table")[-1].rows()
    assert first[:3] == ["90%", f"{dense + 2:.4f}", "1.23"]
    assert heading[2] == ("percent lost" if metric == "perplexity" else "points lost")
    assert len(page.all("svg", "plot")[-1].all("circle")) == 2


@pytest.mark.parametrize("row", ["accuracy,1.5,0.9", "accuracy,0.9,-1.5", "mrr,0.9,2", "perplexity,inf,9"])
def test_figures_that_cannot_be_are_refused(finished: Path, row: str) -> None:
    (finished / "sweep.csv").write_text(f"{','.join(HEADER)}\n0.9,0.9,900,{row},1.0\n")
    with pytest.raises(BadInput, match=r"sweep\.csv: not of this version.*Make it again with `optin sweep"):
        read_findings(finished)


# what comes from files is text


def test_hostile_names_are_text(finished: Path) -> None:
    plain = [(x.tag, sorted(x.attributes)) for x in page_of(finished).walk()]
    (row,) = stored(finished)["latency"]
    environment = stored(finished)["environment"] | {"cpu_model": HOSTILE}
    asked = stored(finished)["settings"] | {"model": HOSTILE}
    change(finished, settings=asked, environment=environment, latency=[row | {"engine": HOSTILE}])
    assert [(x.tag, sorted(x.attributes)) for x in page_of(finished).walk()] == plain
    asked |= {HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}}
    hashes = stored(finished)["hashes"] | {HOSTILE: HOSTILE}
    change(finished, settings=asked, notes=[f"`{HOSTILE}` {HOSTILE}"], hashes=hashes)
    add_sweep(finished)
    table = (finished / "sweep.csv").read_text().replace("accuracy", HOSTILE.replace('"', ""))
    (finished / "sweep.csv").write_text(table)
    html = render(read_findings(finished))
    page = parsed(html)
    assert "<script" not in html
    assert "<img" not in html
    assert page.all("bdi")[0].text == HOSTILE
    assert page.text.count("alert(1)") > 8
    assert not [x for x in page.walk() if any(name.startswith("on") for name in x.attributes)]


@pytest.mark.parametrize("root", ["/home/jane doe/secret", "C:\\Users\\jane\\secret"])
def test_the_page_names_files_but_none_of_their_folders(finished: Path, root: str) -> None:
    mark = "\\" if "\\" in root else "/"
    files = {name: f"{root}{mark}{name}.jsonl" for name in ("calibration", "evaluation")}
    asked = (
        stored(finished)["settings"]
        | files
        | {"model": f"{root}{mark}my-bert", "nested": {"inner": [f"{root}{mark}x"]}}
    )
    note = f"Copy `{root.replace(' ', '-')}{mark}work` to the target; see https://example.org/a/b and model/plan.json."
    change(finished, settings=asked, notes=[note])
    page = page_of(finished)
    assert not re.search("jane|secret|home|Users", render(read_findings(finished)))
    line = page.all("bdi")[0].parent
    assert line is not None
    assert line.text == f"my-bert, network {stored(finished)['hashes']['network'][:12]}"
    assert page.all("title")[0].text == "Pruning report: my-bert"
    assert "calibration.jsonl" in page.text
    assert "Copy work to the target; see https://example.org/a/b and model/plan.json." in page.text


@pytest.mark.parametrize("name", ["a/b", "", ".", "/", "x\x00y", "\u202egnp.exe", "x" * 10_000])
def test_any_model_name_gives_a_page(finished: Path, name: str) -> None:
    change(finished, settings__model=name)
    assert page_of(finished).all("h1")[0].text == "Pruning report"


# what is missing or broken


def test_a_folder_that_is_not_finished_is_refused_with_the_next_step(shell: Shell, finished: Path) -> None:
    (finished / "report.json").unlink()
    for folder in (finished, finished / "nowhere"):
        ran = shell("optin", "report", folder)
        assert (ran.code, ran.out) == (2, "")
        assert f"{folder / 'report.json'} does not exist" in ran.err
        assert f"optin-export MODEL --out {folder}" in ran.err
    assert not (finished / "report.html").exists()
    assert not (finished / "nowhere").exists()


BROKEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "a later version": lambda data: data.update(schema_version=3),
    "no version": lambda data: data.pop("schema_version"),
    "no quality": lambda data: data.pop("quality"),
    "unknown metric": lambda data: data["quality"].update(metric="magic"),
    "quality NaN": lambda data: data["quality"].update(pruned=math.nan),
    "parameters as text": lambda data: data["params"].update(dense="1"),
    "no parameters": lambda data: data["params"].update(dense=0),
    "too many": lambda data: data["macs"].update(dense=10**400),
    "kept more than all": lambda data: data["macs"].update(kept=1.5),
    "latency of zero": lambda data: data["latency"][0]["samples_ms"]["dense"][0].__setitem__(0, 0.0),
    "latency infinite": lambda data: data["latency"][0]["dense"].update(p50_ms=math.inf),
    "no samples": lambda data: data["latency"][0].pop("samples_ms"),
    "an empty block": lambda data: data["latency"][0]["samples_ms"]["pruned"].__setitem__(0, []),
    "unequal blocks": lambda data: data["latency"][0]["samples_ms"]["pruned"].append([1.0]),
    "one end of an interval": lambda data: data["latency"][0].update(ci95=[1.0]),
    "a row that is none": lambda data: data["latency"].append(None),
    "text out of range": lambda data: data["settings"].update(model="\ud800"),
    "another plan": lambda data: data["hashes"].update(plan="0" * 64),
    "no plan": lambda data: data["hashes"].pop("plan"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_report_that_makes_no_sense_is_refused(shell: Shell, finished: Path, damage: str) -> None:
    data = stored(finished)
    BROKEN[damage](data)
    (finished / "report.json").write_text(json.dumps(data))
    ran = shell("optin", "report", finished)
    assert (ran.code, ran.out) == (2, ""), ran.out
    assert "report.json" in ran.err
    assert "optin-export MODEL" in ran.err
    assert not (finished / "report.html").exists()


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
@pytest.mark.parametrize(
    ("name", "next_step"),
    [
        ("report.json", "optin-export MODEL"),
        ("measurements.json", "optin bench"),
        ("plan.json", "optin plan"),
        ("sweep.csv", "optin sweep"),
    ],
)
def test_a_damaged_file_is_named_with_the_next_step(
    shell: Shell, finished: Path, name: str, next_step: str, text: bytes
) -> None:
    (finished / name).write_bytes(text)
    ran = shell("optin", "report", finished)
    assert (ran.code, ran.out) == (2, "")
    assert str(finished / name) in ran.err
    assert next_step in ran.err
    assert not (finished / "report.html").exists()


@pytest.mark.parametrize(
    ("good", "bad"), [("0.95", "nan"), ("0.95", "x"), ("0.95", ""), ("0.95", "1e308"), ("kept", "keep"), (",", ";")]
)
def test_a_table_of_a_sweep_that_makes_no_sense_is_refused(shell: Shell, finished: Path, good: str, bad: str) -> None:
    add_sweep(finished)
    path = finished / "sweep.csv"
    path.write_text(path.read_text().replace(good, bad))
    ran = shell("optin", "report", finished)
    assert ran.code == 2
    assert str(path) in ran.err
    assert f"optin sweep {finished}" in ran.err


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_error_while_writing_keeps_the_old_page(
    shell: Shell, finished: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    (finished / "report.html").write_text("old")

    def fails(descriptor: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fails)
    assert shell("optin", "report", finished).code in (2, 130)
    assert (finished / "report.html").read_text() == "old"
    assert temporary_files(finished) == []


# charts of anything


def a_row(dense: list[list[float]], pruned: list[list[float]], **fields: Any) -> LatencyRow:
    sides = [
        StoredLatency(float(np.median(np.concatenate(x))), float(np.percentile(np.concatenate(x), 95)), 1.0)
        for x in (dense, pruned)
    ]
    samples = StoredSamples(*(tuple(map(tuple, x)) for x in (dense, pruned)))
    known = {"speedup": 1.5, "ci95": (1.4, 1.6), "ideal": 2.0} | fields
    return LatencyRow("onnx", "fp32", 1, 16, 0, *sides, realised=1.0, samples_ms=samples, **known)


def inside(points: list[tuple[float, float]]) -> bool:
    return all(LEFT <= x <= RIGHT and 0 <= y <= 210 for x, y in points)


times = st.lists(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=8), min_size=2, max_size=2)
ratios = st.floats(1e-9, 1e9)


@settings(deadline=None, derandomize=True)
@given(dense=times, pruned=times, speedup=ratios, low=ratios, high=ratios, ideal=ratios)
def test_any_latencies_are_drawn_inside(
    dense: list[list[float]], pruned: list[list[float]], speedup: float, low: float, high: float, ideal: float
) -> None:
    row = a_row(dense, pruned, speedup=speedup, ci95=(low, high), ideal=ideal)
    curves, blocks = latency_chart(row), ratio_chart(row)
    for _, points in curves.lines:
        assert inside([tuple(map(float, pair.split(","))) for pair in points.split()])  # type: ignore[misc]
    assert blocks.span is not None
    left, right, centre, y = blocks.span
    assert inside([*blocks.dots, (left, y), (right, y), (centre, y)])
    assert len(blocks.dots) == 2
    for chart in (curves, blocks):
        assert len(chart.x_ticks) <= 8
        assert all(LEFT <= at <= RIGHT for at, _ in chart.x_ticks)


shares = st.floats(0, 1)


@example(points=[(0.0, 5e-324)], kept=0.0, dense=5e-324)
@settings(deadline=None, derandomize=True)
@given(
    points=st.lists(st.tuples(shares, st.floats(-1, 1)), min_size=1, max_size=9), kept=shares, dense=st.floats(-1, 1)
)
def test_any_sweep_is_drawn_inside(points: list[tuple[float, float]], kept: float, dense: float) -> None:
    rows = [SweepRow(share, share, 1, "accuracy", dense, value, 0.0) for share, value in points]
    chart = sweep_chart(rows, kept)
    assert inside(list(chart.dots))
    assert [x for x, _ in chart.dots] == sorted(x for x, _ in chart.dots)
    assert all(math.isfinite(rule.at) for rule in chart.rules)


@settings(deadline=None, derandomize=True)
@given(layers=st.lists(st.lists(st.booleans(), min_size=1, max_size=70), min_size=1, max_size=5), cells=st.booleans())
def test_any_masks_are_drawn_as_they_are(layers: list[list[bool]], cells: bool) -> None:
    names = [f"layer {index}" for index in range(len(layers))]
    chart = units_chart("heads", tuple(map(tuple, layers)), names, cells=cells)
    assert (chart.kept, chart.units) == (sum(map(sum, layers)), sum(map(len, layers)))
    for row, keep in zip(chart.rows, layers, strict=True):
        assert units_of(row.runs, len(keep)) == "".join("01"[stays] for stays in keep)
        assert [stays for _, stays in row.cells] == (keep if cells else [])
        assert all(x + chart.cell_width <= 360 for x, _ in row.cells)
        assert all(b - a > chart.cell_width for (a, _), (b, _) in pairwise(row.cells)), "cells do not touch"
        assert row.kept_width == pytest.approx(row.full_width * sum(keep) / len(keep), abs=0.01)
        assert row.full_width == pytest.approx(chart.rows[0].full_width * len(keep) / len(layers[0]), rel=0.01)


def test_the_slowest_runs_do_not_squeeze_the_others() -> None:
    block = [1.0 + i / 1000 for i in range(500)]
    x = {
        name: [float(pair.split(",")[0]) for pair in latency_chart(row).lines[0][1].split()]
        for name, row in (
            ("even", a_row([block, block], [block, block])),
            ("late", a_row([block, [*block, 900.0]], [block] * 2)),
        )
    }
    assert np.ptp(x["late"]) == pytest.approx(np.ptp(x["even"]), rel=0.02)


# numbers


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (milliseconds, 0.09123, "0.0912 ms"),
        (milliseconds, 20.274, "20.3 ms"),
        (milliseconds, 9.999, "10.0 ms"),
        (milliseconds, 155.2, "155 ms"),
        (milliseconds, 1234.5, "1,230 ms"),
        (milliseconds, 1.5e-7, "1.50e-07 ms"),
        (figures, 0.0, "0.00"),
        (figures, -2.5, "-2.50"),
        (si, 22_570_000, "22.6 M"),
        (si, 999, "999"),
        (si, 999_600, "1.00 M"),
        (si, 1.43e9, "1.43 G"),
        (si, 3e20, "300,000 P"),
        (size, 90_300_000, "86.1 MiB"),
        (size, 1, "1.00 bytes"),
        (size, 1023.9 * 1024, "1,020 KiB"),
    ],
)
def test_numbers_have_three_digits_and_a_unit(write: Callable[[float], str], value: float, text: str) -> None:
    assert write(value) == text


@settings(deadline=None, derandomize=True)
@given(st.floats(1e-12, 1e15))
def test_a_number_is_right_to_half_its_last_digit(value: float) -> None:
    assert float(figures(value).replace(",", "")) == pytest.approx(value, rel=5.1e-3)


# colours, packaging, a browser


def test_text_and_marks_stand_out_in_light_and_in_dark(finished: Path) -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    def contrast(one: str, other: str) -> float:
        light, dark = sorted((luminance(one), luminance(other)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    style = page_of(finished).all("style")[0].text
    themes = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in re.findall(r":root \{([^}]*)\}", style)
    ]
    assert len(themes) == 2
    assert "prefers-color-scheme: dark" in style
    for theme in themes:
        assert min(contrast(theme[name], theme["paper"]) for name in ("ink", "muted")) > 4.5, "WCAG AA, text"
        assert contrast(theme["warn-ink"], theme["warn-paper"]) > 4.5
        assert min(contrast(theme[name], theme["paper"]) for name in ("dense", "pruned")) > 3, "WCAG AA, graphics"
        assert contrast(theme["pruned"], theme["cut"]) > 3


def test_the_wheel_carries_every_data_file() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "optin_deploy"
    ]
    folder = ROOT / "optin_deploy"
    files = [str(path.relative_to(folder)) for path in folder.rglob("*.*") if path.suffix not in (".py", ".pyc")]
    assert {"reporting/report.html", "data/calibration.txt"} <= {*files}
    assert [name for name in files if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)] == []


PHONE = """<!doctype html><body style="margin: 0">
<iframe style="width: {width}px; height: 2000px; border: 0" srcdoc="{page}"></iframe><pre></pre>
<script>onload = () => {{
  const page = document.querySelector("iframe").contentDocument;
  const box = node => {{ const b = node.getBoundingClientRect(); return [b.left, b.right, b.height]; }};
  document.querySelector("pre").textContent = JSON.stringify({{
    width: page.documentElement.scrollWidth,
    hidden: [...page.querySelectorAll("#size ~ .scroll, #latency ~ .scroll")].map(
      table => table.scrollWidth - table.clientWidth),
    charts: [...page.querySelectorAll("svg[role=img]")].map(box),
    letters: [...page.querySelectorAll("svg text")].map(text => text.getBoundingClientRect().height),
  }});
}}</script>"""
"""A frame of a phone's width, as no browser's window is so narrow, and below it what the browser laid out."""


@pytest.mark.parametrize("width", [400, 1100])
def test_a_browser_shows_the_page_at_the_width_of_a_phone_and_of_a_window(
    finished: Path, tmp_path: Path, width: int
) -> None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    browser = next(filter(None, map(shutil.which, names)), None) or pytest.skip("no Chromium: run `make browser`")
    add_sweep(finished)
    (row,) = stored(finished)["latency"]
    slow = {name: row[name] | {"p50_ms": 1234.5, "p95_ms": 1345.6} for name in ("dense", "pruned")}
    change(finished, latency=[row | slow | {"engine": "openvino", "batch": 32, "seq_len": 512, "threads": 16}])
    text = render(read_findings(copy_of(finished, tmp_path / "shown")))
    page, picture = tmp_path / "phone.html", tmp_path / "page.png"
    page.write_text(PHONE.format(page=html.escape(text), width=width), encoding="utf-8")
    flags = ["--headless", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to start as root otherwise
    flags += ["--enable-logging=stderr", "--hide-scrollbars", f"--window-size={width},2000"]

    def browse(what: str) -> str:
        command = [browser, *flags, what, page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
        return done.stdout

    browse(f"--screenshot={picture}")
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape[1] == width
    assert np.ptp(pixels) > 100, "something is drawn"
    found = re.search(r"<pre>(.*)</pre>", browse("--dump-dom"))
    assert found is not None
    laid_out = json.loads(found[1])
    assert laid_out["width"] <= width, "nothing is wider than the window"
    of_sizes, of_latency = laid_out["hidden"]
    assert of_sizes == 0, "the table of sizes needs no scrolling"
    assert of_latency == 0 or width == 400, "nor that of latency, but on a phone"
    assert len(laid_out["charts"]) == text.count('role="img"') > 4
    for left, right, height in laid_out["charts"]:
        assert 0 <= left < right <= width
        assert height > 20
    assert min(laid_out["letters"]) >= 9, "they can be read"
