"""The page with all its plots, which takes seconds: every kind of plot, equal bytes, old files."""

import io
import re
import struct
from pathlib import Path

from tests.bench.materials import arm, record, served
from tests.bench.test_page import Balanced, at, composed
from tests.bench.test_record import kept
from workspace.bench import report
from workspace.core.console import Console


def test_page_is_complete_fetches_nothing_and_shows_every_kind_of_plot() -> None:
    slow = at(12, served((1, 8), seed=1, slow=0.3, tree="f" * 40))
    made = composed(at(11, served((1, 8))), slow, at(13, record(arm(1, 6))))
    parser = Balanced()
    parser.feed(made.html)
    assert (parser.open, parser.addresses) == ([], [])
    assert made.html.count("<svg") == 2 * len(made.plots) == 2 * made.html.count("<figure>")
    assert not re.search(r"<script|url\(http|@import", made.html)
    kinds = {
        kind
        for plot in made.plots
        for kind in ("history", "ab", "concurrency")
        if f"-{kind}" in f"-{plot.name}"
    }
    assert kinds == {"history", "ab", "concurrency"}
    assert "fail: " in made.html
    for plot in made.plots:
        assert plot.png.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", plot.png[16:24])
        assert (width >= 1900, height >= 200) == (True, True)


def test_only_comparable_records_are_compared_by_default() -> None:
    other = at(12, record(tree="f" * 40), flags=())
    assert " against " not in composed(at(11, record()), other).html
    same = composed(at(11, record(label="one")), at(12, record(label="two", tree="f" * 40)))
    assert "<h3>two against one</h3>" in same.html


def test_report_writes_page_and_pngs_and_removes_old_pngs(tmp_path: Path) -> None:
    layout = kept(tmp_path, record(), record(tree="f" * 40))
    (layout.results / "gb10-123456" / "half.json").write_text("{")
    (layout.results / "report").mkdir()
    (layout.results / "report" / "old.png").write_bytes(b"")
    out, err = io.StringIO(), io.StringIO()
    report.write(layout, "aaaa", "ffff", console=Console(out=out, err=err))
    assert out.getvalue() == f"{layout.results / 'report.html'}\n"
    assert "half.json is not a complete record" in (layout.results / "report.html").read_text()
    assert {path.suffix for path in (layout.results / "report").iterdir()} == {".png"}
    assert not (layout.results / "report" / "old.png").exists()
