"""The page and the terminal summary: complete, self-contained, escaped, deterministic."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from report_sample import sample_report
from rich.console import Console

from dm3d_deploy.errors import InternalError
from dm3d_deploy.reporting import charts
from dm3d_deploy.reporting.ap_section import NOTHING
from dm3d_deploy.reporting.facts import verdict_sentence
from dm3d_deploy.reporting.render import render_html
from dm3d_deploy.reporting.summary import summary_lines

ATTACK = '<script>alert("x")</script>&$\\frac$'
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Tags, ids, links and text of a page; refuses tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "action", "srcset") or name.startswith("on"):
                self.addresses.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module", name="html")
def _html() -> str:
    return render_html(sample_report())


def terminal(report: dict[str, Any], width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(summary_lines(report))
    return console.file.getvalue()


def _settings() -> dict[str, Any]:
    return {key: mpl.rcParams[key] for key in mpl.rcParams if key != "backend"}  # reading it would choose one


def test_equal_reports_give_equal_pages_whatever_the_settings_of_matplotlib(html: str) -> None:
    before = _settings()
    with mpl.rc_context({"font.size": 31, "axes.edgecolor": "red", "figure.dpi": 300, "axes.grid": True}):
        assert render_html(sample_report()) == html
    assert _settings() == before


def test_the_page_needs_nothing_from_outside(html: str) -> None:
    page = Page(html)
    assert {"script", "link", "iframe", "object"}.isdisjoint(page.tags)
    assert page.addresses
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\s\"'<)]+", html)) <= namespaces
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_ids_are_unique_and_every_reference_is_met(html: str) -> None:
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    targets = {address[1:] for address in page.addresses if address.startswith("#")}
    assert targets | set(re.findall(r"url\(#([^)]+)\)", html)) <= set(page.ids)


def test_sections_come_in_the_order_of_issue(html: str) -> None:
    sections = ["macs", "allocation", "distortion", "ap", "layers", "parity", "latency", "engines", "plan"]
    found = re.findall(r'<section id="(\w+)">', html)
    assert found == [*sections, "detections", "provenance"]


def test_the_verdict_is_the_first_and_the_last_thing(html: str) -> None:
    sentence, text = sample_report()["verdict"]["sentence"], Page(html).text
    assert text.count(sentence) == 2
    assert text.endswith(f"PASSED {sentence}")


def test_every_layer_comparison_engine_and_digest_is_on_the_page(html: str) -> None:
    report, text = sample_report(), Page(html).text
    names = [layer["name"] for layer in report["layers"]] + [comparison["worst"] for comparison in report["parity"]]
    names += [engine["path"] for engine in report["engines"]] + list(report["provenance"]["digests"].values())
    assert len(names) == 35 + 6 + 2 + 3
    assert [name for name in names if name not in text] == []
    assert "11 legal, 0 eligible, 0 chosen" in text
    assert "built, not run here" in text
    assert "5 input channels: too few to prune" in text


def test_numbers_say_how_they_are_known(html: str) -> None:
    text = Page(html).text
    assert "UNTRAINED. The weights are random weights, seed 0" in text
    assert "Simulated frames. Source: simulated city, seed 7" in text
    assert text.count("measured untrained simulated") >= 6
    assert "indicative" in text
    assert "unsteady" in text
    real = Page(render_html(sample_report(trained=True, simulated=False))).text
    assert not re.search("untrained|simulated frames", real, re.IGNORECASE)


def test_vulnerable_road_users_come_first_and_the_scenes_are_called_simulated(html: str) -> None:
    text = Page(html[html.index('<section id="ap">') : html.index('<section id="layers">')]).text
    assert "The scenes are simulated; no sensor recorded them." in text
    words = ("Mean, vulnerable road users", "Mean, all classes", "pedestrian 81", "car 280")
    places = [text.index(word) for word in words]
    assert places == sorted(places)
    assert "119 61.4 52.2 59.9 -1.5 -3.0 to -0.3" in text
    assert f"37.6→35.7 0 {NOTHING} " in text  # no bicycle beyond 30 m
    told = "AP on simulated scenes: vulnerable road users 59.9 % instead of 61.4 %, all classes 62.8 % instead"
    assert told in Page(html).text
    shown = " ".join(terminal(sample_report(), width=300).split())
    assert "vulnerable road users 61.4 → 59.9 % (-1.5, 95 % -3.0 to -0.3); all classes 64.0 → 62.8 %" in shown


def test_without_ap_the_reason_stands_in_its_place() -> None:
    report = sample_report()
    report["ap"] = {
        "none_because": "the weights are UNTRAINED.", "data": None, "measure": None, "means": [], "classes": [],
        "notes": [],
    }  # fmt: skip
    report["verdict"]["sentence"] = verdict_sentence(report)
    assert "AP on" not in report["verdict"]["sentence"]
    assert "No average precision: the weights are UNTRAINED." in Page(render_html(report)).text
    assert "none: the weights are UNTRAINED." in " ".join(terminal(report, width=200).split())


def test_estimates_are_called_estimates() -> None:
    report = sample_report()
    for entry in report["latency"]:
        entry["measured"] = False
    report["verdict"]["sentence"] = verdict_sentence(report)
    html = render_html(report)
    latency = html[html.index('<section id="latency">') : html.index('<section id="engines">')]
    assert ">estimated<" in latency
    assert ">measured<" not in latency
    assert "median, estimated for onnxruntime" in html
    assert "Estimated: onnxruntime" in " ".join(terminal(report).split())


def strings(value: Any, path: str = "") -> Any:
    """Put the attack into every free text, and keep what has a form."""
    if isinstance(value, dict):
        return {key: strings(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [strings(inner, f"{path}{index}") for index, inner in enumerate(value)]
    keep = ("part", "sha256", "picture", "model", "frames", "masks", "cost")
    return f"{value}{ATTACK}" if isinstance(value, str) and path not in keep else value


def test_untrusted_text_is_escaped_everywhere() -> None:
    report = strings(sample_report())
    report["provenance"]["tools"][ATTACK] = ATTACK
    html = render_html(report)
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert ATTACK in Page(html).text
    Page(render_html(report))


def test_untrusted_text_is_no_markup_in_the_terminal() -> None:
    report = sample_report()
    report["engines"][0]["path"] = "[red]engine[/red]"
    report["parity"][0].update(passed=False, output="[bold]x[/bold]", max_relative=None)
    report["verdict"]["passed"] = False
    text = terminal(report)
    assert "[red]engine[/red]" in text
    assert "FAIL [bold]x[/bold]: not finite, wanted relative <= 0.0001" in text


@pytest.mark.parametrize("accepted", [True, False])
def test_a_refit_that_was_foreseen_and_refused_is_named(accepted) -> None:
    report = sample_report()
    report["distortion"]["foresees_refit"] = True
    report["recovery"]["steps"][0]["accepted"] = accepted
    text = Page(render_html(report)).text
    assert ("--recover none allocates for the masks alone" in text) is not accepted
    assert "and foresees the refit of the kept weights" in text
    assert "predicted behind the refit" in text
    assert "predicted behind the refit 0.118" in terminal(report)


def test_an_empty_report_says_what_is_missing() -> None:
    report = sample_report()
    report.update(latency=[], engines=[], detections=None, recovery=None, parity=[], skipped=[], layers=[], warnings=[])
    report["distortion"].update(heldout=None, heldout_after_recovery=None, per_frame=[], baselines=[])
    report["budget"]["lower_bound_gap"] = None
    report["macs"]["by_part"] = {"head": {"dense": 0, "kept": 0, "executed": 0}}
    report["macs"].update(dense=0, kept=0, executed=0)
    report["verdict"].update(passed=False, sentence=verdict_sentence(report))
    text = Page(render_html(report)).text
    for words in (
        "NOT PASSED nothing was compared",
        "Nothing was compared, so nothing passed.",
        "No time was measured or estimated.",
        "No engine was built.",
        "No detections were compared.",
        "No recovery was run.",
        "No frame was held out: the prediction is not verified.",
        "No lower bound was computed.",
    ):
        assert words in text
    assert "0 of 0 within tolerance" in terminal(report)


def test_a_failed_comparison_is_marked_and_counted() -> None:
    report = sample_report()
    report["parity"][2].update(passed=False, max_relative=None, max_abs=None, cosine=None)
    report["verdict"].update(passed=False)
    report["verdict"]["sentence"] = verdict_sentence(report)
    html = render_html(report)
    assert html.count('<tr class="failed">') == 1
    assert "5 of 6 comparisons are within tolerance" in Page(html).text


def test_an_invalid_report_is_not_rendered() -> None:
    report = sample_report()
    report["verdict"]["sentence"] = "all is well"
    with pytest.raises(InternalError, match="UNTRAINED"):
        render_html(report)


def test_charts_use_no_colour_of_their_own() -> None:
    report = sample_report()
    drawn = [charts.macs_chart(report), charts.distortion_chart(report), charts.latency_chart(report["latency"], "0")]
    drawn += [charts.allocation_chart(report["layers"], part) for part in ("3d", "2d")]
    for svg in drawn:
        assert svg.startswith('<svg class="chart" viewBox=')
        assert re.findall(r"#[0-9a-fA-F]{6}\b", svg) == []
        assert "<metadata" not in svg
        assert "var(--" in svg


def test_the_allocation_chart_names_each_layer_share_and_pattern() -> None:
    layers = sample_report()["layers"]
    svg = charts.allocation_chart(layers, "2d")
    assert svg.count(">2:4<") == sum(layer["pattern"] == "2:4" and layer["part"] == "2d" for layer in layers) > 5
    own = [layer for layer in layers if layer["part"] == "2d"]
    assert all(f">{layer['name'].partition('.')[2]}<" in svg for layer in own)
    assert all(f">{100 * (1 - layer['ratio']):.0f} %<" in svg for layer in own)


def test_a_wide_spread_of_distortions_gets_a_logarithmic_axis_and_says_so() -> None:
    report = sample_report()
    assert "logarithmic" not in charts.distortion_chart(report)
    report["distortion"]["predicted"] = 1e-4
    assert "logarithmic" in charts.distortion_chart(report)


def test_the_terminal_shows_the_same_facts_in_80_columns() -> None:
    text = terminal(sample_report(), width=80)
    flat = " ".join(text.split())
    assert flat.startswith("PASSED UNTRAINED centerpoint keeps 33.1 %")
    assert max(map(len, text.splitlines())) <= 80
    for words in ("54.2 %", "6 of 6 within tolerance", "56.2 → 42.5", "24.4 % faster", "built, not run here"):
        assert words in flat
    assert "…" not in text


def test_importing_the_report_imports_nothing_heavy() -> None:
    code = (
        "import sys, dm3d_deploy.reporting.render, dm3d_deploy.reporting.summary; "
        "print([m for m in ('torch', 'matplotlib', 'jinja2', 'rich', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_rendering_leaves_pyplot_alone() -> None:
    code = (
        "import sys; sys.path.append(sys.argv[1]); from report_sample import sample_report; "
        "from dm3d_deploy.reporting.render import render_html; render_html(sample_report()); "
        "print([m for m in ('torch', 'matplotlib.pyplot') if m in sys.modules], 'matplotlib' in sys.modules)"
    )
    here = str(Path(__file__).resolve().parent)
    done = subprocess.run([sys.executable, "-c", code, here], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"
