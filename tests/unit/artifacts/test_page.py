"""The report page is self-contained, and escapes text."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from support import builders
from tercet.artifacts.report import html

RECIPE = "name: made\n# a <comment> & more\n"
SVG = "{http://www.w3.org/2000/svg}"


class Tags(HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def page() -> str:
    return html(builders.report(), builders.LOG_HISTORY, RECIPE)


def charts(page: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r"<svg .*?</svg>", page, re.S)]


def test_nothing_comes_from_elsewhere(page: str) -> None:
    found = Tags(page)
    assert not {tag for tag, _ in found.tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    names = {name for _, attributes in found.tags for name in attributes}
    assert not names & {"src", "href", "srcset", "action", "data"}
    assert not [name for name in names if name.startswith("on")]
    assert "url(" not in page
    assert "@import" not in page
    assert "http" not in page


def test_what_a_reader_wants_is_on_it(page: str) -> None:
    text = Tags(page).text
    for part in ("ndcg@10 (test)", "0.5000", "0.7500", "+0.2500", "/store/runs/r/best", "1,105", "train loss"):
        assert part in text
    assert "is better than the baseline" in text
    assert RECIPE.strip() in text


def test_charts_are_whole_and_inside_their_frame(page: str) -> None:
    loss, metric = charts(page)
    for chart in (loss, metric):
        width, height = float(chart.attrib["width"]), float(chart.attrib["height"])
        for line in chart.iter("polyline"):
            for point in line.attrib["points"].split():
                x, y = map(float, point.split(","))
                assert 0 <= x <= width
                assert 0 <= y <= height
    assert len(list(loss.iter("polyline"))) == 2  # train and eval
    circles = [(circle.attrib["r"], circle.findtext("title")) for circle in metric.iter("circle")]
    assert circles == [("2.5", "step 0: 0.4000"), ("5", "step 10: 0.7000"), ("2.5", "step 20: 0.6000")]


def test_a_flat_line_and_a_single_point_can_be_drawn() -> None:
    flat = html(builders.report(), [{"step": 0, "loss": 0.0}], "")
    assert len(charts(flat)) == 2


def test_a_run_that_is_not_better_is_marked() -> None:
    worse = html(builders.report(metrics=builders.metrics(0.9, 0.8)), [], "")
    assert "<p class='verdict no'>" in worse
    assert "NOT better" in worse
    assert "<p class='verdict'>" in html(builders.report(), [], "")


def test_names_are_text() -> None:
    evil = "<script>alert('x')</script>&\""
    failed = builders.report(
        name=evil, run_id=evil, dataset=evil, status="failed", failed_stage=evil, error=evil, metrics=None, run_uri=evil
    )
    for report in (failed, builders.report(name=evil, run_id=evil, dataset=evil, best_uri=evil, seconds={evil: 1.0})):
        page = html(report, [], evil)
        assert "<script" not in page
        assert evil in Tags(page).text


def test_a_failed_run_has_a_page_too() -> None:
    page = html(builders.report(status="failed", failed_stage="train", error="out of memory", metrics=None), [], RECIPE)
    assert "Failed in stage <b>train</b>: out of memory" in page
    assert charts(page) == []


def test_how_fast_it_was_and_where_the_time_went() -> None:
    log = [{**entry, "tokens_per_second": 12_345.6} for entry in builders.LOG_HISTORY]
    page = html(builders.report(throughput=builders.throughput()), log, RECIPE)
    text = Tags(page).text
    for part in ("tokens/s", "of the peak of H100 SXM in bf16", "25.0 %", "waiting for data", "checkpoints", "20.0 %"):
        assert part in text
    assert len(charts(page)) == 3
    assert "Throughput" not in Tags(html(builders.report(), log, RECIPE)).text  # a run of an older tercet
