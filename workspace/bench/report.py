"""`inv bench.report`: every record as one page, and each of its pictures as a PNG."""

from workspace.bench import page, references, store, subject
from workspace.bench.record import Record
from workspace.core.console import Console
from workspace.core.errors import SettingsError
from workspace.core.files import write_atomic
from workspace.core.layout import Layout


def write(layout: Layout, first: str, second: str, *, console: Console) -> None:
    """Write results/report.html and results/report/*.png, and print the page's path. With two words it compares these records.

    Raises SettingsError where there is nothing to show, or one of two words is missing.
    """
    if bool(first) != bool(second):
        raise SettingsError("two records are compared, or none is named", hint="./scripts/inv bench.report --first A --second B")
    pair = (_found(layout, first), _found(layout, second)) if first else None
    entries = store.entries(layout)
    records = [entry.record for entry in entries if entry.record]
    if pair:
        records += [one for one in pair if one not in records]
    problems = [entry.problem for entry in entries if not entry.record]
    published = references.load(layout)
    if not records and not published:
        raise SettingsError("there is nothing to show: no record, and no recipe with published figures", hint="./scripts/nox -s bench")
    composed = page.compose(records, published, pair=pair, problems=problems, written=subject.now())
    path, folder = layout.results / "report.html", layout.results / "report"
    for old in folder.glob("*.png"):
        old.unlink()
    for plot in composed.plots:
        write_atomic(folder / f"{plot.name}.png", plot.png)
    write_atomic(path, composed.html.encode())
    for problem in problems:
        console.warn(problem)
    console.say(f"{len(records)} records, {len(composed.plots)} plots, {path.stat().st_size / 1024:.0f} KiB; the plots as PNG: {layout.relative(folder)}")
    console.data(str(path))


def _found(layout: Layout, word: str) -> Record:
    found = store.find(layout, word).record
    assert found is not None
    return found
