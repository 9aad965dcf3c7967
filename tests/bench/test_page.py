"""The page: one file, nothing fetched, and no text of a record becomes markup."""

import io
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.bench.materials import arm, record, served
from workspace.bench import plots, report
from workspace.bench.results import Record
from workspace.core.console import Console
from workspace.core.errors import SettingsError
from workspace.core.paths import Layout

ROOT = Path(__file__).resolve().parents[2]
VOID = ("meta", "br", "hr", "img", "link", "wbr")


class Balanced(HTMLParser):
    """Fail where an element is closed that is not open; collect the addresses to fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [
            text
            for name, text in attrs
            if name in ("src", "href", "xlink:href") and text and not text.startswith("#")
        ]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def composed(*records: Record) -> report.Page:
    return report.compose(
        records,
        report.published_figures(Layout(ROOT)),
        pair=None,
        problems=(),
        written="2026-11-20",
    )


def at(day: int, made: Record, **parts: object) -> Record:
    return replace(made, time=f"2026-11-{day:02}T10:00:00+00:00", **parts)  # type: ignore[arg-type]


def test_markup_in_a_record_is_shown_as_text() -> None:
    hostile = "<script>alert(1)</script>&\"'$x^2$"
    plain = record()
    marked = replace(
        plain,
        model=hostile,
        flags=(hostile,),
        backends=(hostile,),
        source=replace(plain.source, patches=(hostile,)),
    )
    made = report.compose([marked], (), pair=None, problems=(hostile,), written=hostile)
    Balanced().feed(made.html)
    assert "<script" not in made.html
    assert "&lt;script&gt;" in made.html


def text_of(html: str) -> str:
    """Return the visible text of a page, without its plots."""
    without = re.sub(r"<(svg|style)\b.*?</\1>", "", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", without)))


def test_page_begins_with_value_and_verdict_and_its_table_has_what_was_measured() -> None:
    made = composed(
        at(1, record(arm(1, 6), label="before")),
        at(2, record(arm(2, 6, slow=0.2), label="after", tree="f" * 40)),
    )
    Balanced().feed(made.html)
    text = text_of(made.html)
    assert text.index("slower: latency +") < text.index("latency, s")
    assert re.search(r"after against before .* after ffffffffffff 1\.\d+ ± \d\.\d%", text)
    # What both records share is there once.
    assert text.count("0001-faster.patch") == 1
    assert "1 record," not in text


def test_headline_is_the_worst_verdict_of_a_sweep_and_the_list_begins_with_the_highest_load() -> (
    None
):
    made = composed(
        at(1, replace(served((1, 32), seed=1), label="before")),
        at(2, replace(served((1, 32), seed=2, slow=0.3, tree="f" * 40), label="after")),
    )
    text = text_of(made.html)
    assert re.search(r"output_throughput@32 of after .*? slower: ", text)
    assert "3 other metrics" in text
    assert {plot.name.rpartition("-")[2] for plot in made.plots} >= {"concurrency", "ttft@32"}


def test_noisy_record_is_marked_and_does_not_set_the_scale() -> None:
    quiet = record((1.0, 1.01, 0.99), label="quiet", repeat=3)
    shaky = record((0.9, 90.0), label="shaky", tree="f" * 40, repeat=2)
    assert plots._scale("latency", [quiet, shaky])[1] < 1.1
    assert plots._scale("latency", [shaky])[1] > 90
    made = composed(at(1, quiet), at(2, shaky))
    assert "± 138.6%, noisy" in text_of(made.html)
    (history,) = (plot for plot in made.plots if "history" in plot.name)
    for svg in (history.svg, history.narrow):
        assert "shaky ~" in svg
        assert "quiet ~" not in svg
        assert "80</text>" not in svg


def test_two_records_of_one_label_are_told_apart_by_their_trees() -> None:
    made = composed(at(1, record()), at(2, record(tree="f" * 40)))
    (history,) = (plot for plot in made.plots if "history" in plot.name)
    assert "latency aaaaaaa" in history.svg
    assert "latency fffffff" in history.svg


def test_plots_have_the_colours_of_the_page_and_a_png_its_own() -> None:
    made = composed(at(1, record(label="one")), at(2, record(label="two", tree="f" * 40)))
    for plot in made.plots:
        for svg in (plot.svg, plot.narrow):
            # Black is the default of an SVG and would be lost on a dark page.
            assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", svg)
            assert '<text style="' not in svg or "currentColor" in svg
    assert set(re.findall(r"var\((--\w+)\)", made.html)) <= set(
        re.findall(r"(--\w+): #", report.TEMPLATE.read_text())
    )


def test_published_figures_are_shown_for_measured_models_only() -> None:
    name = "openai/gpt-oss-120b"
    assert "Published figures" not in composed(record()).html
    shown = composed(replace(served((1, 4)), model=name)).html
    assert "Published figures" in shown
    assert shown.count(f"<h3>{name}</h3>") == 1


def test_equal_records_give_equal_pages() -> None:
    assert composed(record()) == composed(record())


def test_report_without_records_hints_how_to_measure(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is nothing to show") as caught:
        report.write(
            Layout(tmp_path), "", "", console=Console(out=io.StringIO(), err=io.StringIO())
        )
    assert caught.value.hint == "./scripts/nox -s bench"
