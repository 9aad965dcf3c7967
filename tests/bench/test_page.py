"""The page: one file, nothing fetched, and no text of a record becomes markup."""

import io
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.bench.materials import record
from workspace.bench import plots, report
from workspace.bench.results import Record
from workspace.core.console import Console
from workspace.core.errors import SettingsError
from workspace.core.paths import Layout

ROOT = Path(__file__).resolve().parents[2]
VOID = ("meta", "br", "hr", "img", "link")


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
        records, plots.published_figures(Layout(ROOT)), pair=None, problems=(), written="2026-11-20"
    )


def at(day: int, made: Record, **parts: object) -> Record:
    return replace(made, time=f"2026-11-{day}T10:00:00+00:00", **parts)  # type: ignore[arg-type]


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


def test_report_without_records_hints_how_to_measure(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is nothing to show") as caught:
        report.write(
            Layout(tmp_path), "", "", console=Console(out=io.StringIO(), err=io.StringIO())
        )
    assert caught.value.hint == "./scripts/nox -s bench"


@pytest.mark.parametrize(
    ("description", "value", "points"),
    [
        ("one request at a time, marlin", "57 to 60 tok/s", ((1, 57.0, 60.0),)),
        (
            "1, 4 and 16 requests at once",
            "57.5, 107.9 and 218.5 tok/s",
            ((1, 57.5, 57.5), (4, 107.9, 107.9), (16, 218.5, 218.5)),
        ),
        ("1 and 4 requests at once", "57.5 tok/s", ()),
        ("0 requests at once", "57.5 tok/s", ()),
        ("a full build", "32 min", ()),
        ("", "", ()),
    ],
)
def test_published_figures_become_points_where_their_description_allows(
    description: str, value: str, points: tuple[tuple[int, float, float], ...]
) -> None:
    assert plots.points(description, value) == points


def test_all_figures_of_the_recipe_for_one_spark_become_points() -> None:
    own = [
        figure
        for figure in plots.published_figures(Layout(ROOT))
        if figure.model == "openai/gpt-oss-120b"
    ]
    assert len(own) >= 4
    assert all(figure.points and figure.source for figure in own)
