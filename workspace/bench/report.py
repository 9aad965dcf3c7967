"""The report of all records as one HTML file, and a PNG for each plot.

The page has no script and fetches nothing. Only `write` reads and writes files.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from workspace.bench import compare, plots, results, subject
from workspace.bench.plots import Plot, Reference
from workspace.bench.results import Record
from workspace.core import hints
from workspace.core.console import Console
from workspace.core.errors import SettingsError, counted
from workspace.core.files import write_atomic
from workspace.core.paths import Layout

SHOWN_HISTORIES = 6
PERCENTILE_METRICS = ("ttft", "itl")
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto;
  max-width: 72rem; padding: 0 1rem 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid #ccc; padding-top: 1rem; }
h3 { font-size: 1rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr));
  gap: 1rem; }
figure { margin: 0; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; color: #444; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; min-width: 62rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0;
  border-bottom: 1px solid #e3e3e3; overflow-wrap: normal; }
td.flags { min-width: 10rem; max-width: 22rem; overflow-wrap: anywhere; }
.pass { color: #006b3c; } .fail { color: #b00020; font-weight: 600; }
.inconclusive { color: #7a5200; } ul { padding-left: 1.2rem; }
"""
_HEAD = (
    '<meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta http-equiv="Content-Security-Policy"'
    " content=\"default-src 'none'; style-src 'unsafe-inline'\">"
)
_COLUMNS = (
    "",
    "record",
    "time",
    "starts",
    "pin and patches",
    "flags",
    "software",
    "backends",
    "conditions",
)


@dataclass(frozen=True)
class Page:
    """The HTML of the report, and the plots in it."""

    html: str
    plots: tuple[Plot, ...]


def compose(
    records: Sequence[Record],
    references: Sequence[Reference],
    *,
    pair: tuple[Record, Record] | None,
    problems: Sequence[str],
    written: str,
) -> Page:
    """Compose the page.

    `pair` are the records to compare. Without them each section compares its newest record with
    the newest other one that is comparable.
    """
    drawn: list[Plot] = []
    parts = [
        (
            f"<h1>Benchmarks of the built vLLM</h1><p>{len(records)} records; written"
            f" {escape(written)}.</p>"
        )
    ]
    if problems:
        rows = "".join(f"<li>{escape(problem)}</li>" for problem in problems)
        parts.append(f"<h2>Records that cannot be read</h2><ul>{rows}</ul>")
    # The section of the newest record comes first.
    for (machine, kind, model), group in reversed(_groups(records).items()):
        name = re.sub(r"[^a-z0-9.]+", "-", f"{kind}-{model}-{machine}".lower())
        section = _Section(name, group, drawn)
        own = [figure for figure in references if figure.model == model and figure.points]
        parts.append(
            f"<h2>{escape(kind)} · {escape(model)} · {escape(machine)}</h2>"
            f"{section.histories()}{section.table()}{section.pair(pair)}{section.sweeps(own)}"
        )
    if references:
        parts.append(_published(references, drawn))
    body = "\n".join(parts)
    html = (
        f'<!doctype html>\n<html lang="en"><head>{_HEAD}<title>Benchmarks</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
    return Page(html, tuple(drawn))


def _groups(records: Sequence[Record]) -> dict[tuple[str, str, str], list[Record]]:
    """Group the records with metrics by machine, kind and model, each group oldest first."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in sorted(records, key=lambda record: results.instant(record.time)):
        if record.metrics:
            key = (record.machine.name, record.kind, record.model)
            groups.setdefault(key, []).append(record)
    return groups


@dataclass(frozen=True)
class _Section:
    """The records of one kind, model and machine, oldest first. Plots are added to `drawn`."""

    name: str
    group: Sequence[Record]
    drawn: list[Plot]

    def histories(self) -> str:
        figures = [
            plots.history(
                f"{self.name}-history-{metric}",
                metric,
                [record for record in self.group if metric in record.metrics],
            )
            for metric in self._shown(self.group[-1].metrics)[:SHOWN_HISTORIES]
        ]
        return self._figures("History", figures)

    def table(self) -> str:
        """Describe the record behind each number in the history."""
        return _table(
            _COLUMNS, [_row(number, record) for number, record in enumerate(self.group, 1)]
        )

    def pair(self, requested: tuple[Record, Record] | None) -> str:
        pair = self._pair(requested)
        if pair is None:
            newest = self.group[-1]
            shown = self._shown(newest.metrics)
            return self._figures("", self._percentiles(shown, [(newest.stem, newest)]))
        first, second = pair
        try:
            rows = compare.judge_records(first, second, factor=compare.FACTOR)
        except SettingsError:
            return ""
        verdicts = "".join(
            f'<li class="{row.judgement.verdict}">{escape(row.metric)}:'
            f" {escape(compare.sentence(row))}</li>"
            for row in rows
        )
        note = "".join(
            f"<li>{escape(name)} differs: {escape(text)}</li>"
            for name, text in compare.differences(first, second).items()
        )
        title = escape(f"B {second.stem} against A {first.stem}")
        figures = self._pair_figures([row.metric for row in rows], first, second)
        return f"<h3>{title}</h3><ul>{verdicts}{note}</ul>{self._figures('', figures)}"

    def _pair_figures(self, names: Sequence[str], first: Record, second: Record) -> list[Plot]:
        top = max((results.concurrency(name) or 0 for name in names), default=0)
        shown = [name for name in names if results.concurrency(name) in (None, top)]
        figures = [
            plots.distributions(f"{self.name}-ab-{metric}", metric, first, second)
            for metric in shown[:SHOWN_HISTORIES]
        ]
        return [*figures, *self._percentiles(shown, [("A", first), ("B", second)])]

    def sweeps(self, references: Sequence[Reference]) -> str:
        swept = [
            (f"{number}: {record.stem}", record)
            for number, record in enumerate(self.group, 1)
            if any(results.concurrency(metric) for metric in record.metrics)
        ]
        if not swept:
            return ""
        newest = swept[-len(plots.COLOURS) :]
        plot = plots.throughput(f"{self.name}-concurrency", newest, references)
        return self._figures("Throughput against concurrency", [plot])

    def _shown(self, names: Sequence[str]) -> list[str]:
        """Return the metrics to plot: of a sweep only those at the highest load."""
        top = max((results.concurrency(name) or 0 for name in self.group[-1].metrics), default=0)
        return [name for name in names if results.concurrency(name) in (None, top)]

    def _percentiles(
        self, names: Sequence[str], records: Sequence[tuple[str, Record]]
    ) -> list[Plot]:
        return [
            plots.percentiles(f"{self.name}-percentiles-{name}", name, records)
            for name in names
            if name.partition("@")[0] in PERCENTILE_METRICS
        ]

    def _pair(self, requested: tuple[Record, Record] | None) -> tuple[Record, Record] | None:
        if requested:
            return requested if requested[1] in self.group else None
        second = self.group[-1]
        return next(
            (
                (first, second)
                for first in reversed(self.group[:-1])
                if not compare.differences(first, second)
            ),
            None,
        )

    def _figures(self, title: str, figures: Iterable[Plot]) -> str:
        new = list(figures)
        self.drawn.extend(new)
        heading = f"<h3>{escape(title)}</h3>" if title else ""
        return f'{heading}<div class="plots">{"".join(map(_figure, new))}</div>'


def _figure(plot: Plot) -> str:
    return f"<figure>{plot.svg}<figcaption>{escape(plot.title)}</figcaption></figure>"


def _row(number: int, record: Record) -> tuple[str, ...]:
    source, software = record.source, record.software
    count = len(record.starts)
    patches = "; ".join(source.patches) or "no patches"
    edited = f"; edited ({source.dirty[:12]})" if source.dirty else ""
    return (
        str(number),
        record.stem,
        record.time[:16].replace("T", " "),
        f"{count}" if record.is_complete else f"{count} of {record.repeat}",
        f"{source.pin}: {patches}{edited}; kernels {source.kernels}",
        " ".join(record.flags),
        (
            f"vLLM {software.vllm}, torch {software.torch}, triton {software.triton}, CUDA"
            f" {software.cuda}"
        ),
        "; ".join(record.backends) or "not in the log",
        _conditions(record),
    )


def _conditions(record: Record) -> str:
    """Return the load, and the reasons why a driver limited the clocks."""
    loads = [start.before.load for start in record.starts]
    reasons = sorted(
        {
            clocks.throttled_by
            for start in record.starts
            for clocks in (*start.before.clocks, *start.after.clocks)
            if clocks.throttled_by
        }
    )
    return f"load {min(loads):.1f} to {max(loads):.1f}" + (
        f"; clocks limited by {', '.join(reasons)}" if reasons and reasons != ["nothing"] else ""
    )


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr>{''.join(_cell(name, text) for name, text in zip(names, row, strict=True))}</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _cell(name: str, text: str) -> str:
    kind = ' class="flags"' if name == "flags" else ""
    return f"<td{kind}>{escape(text)}</td>"


def _published(references: Sequence[Reference], drawn: list[Plot]) -> str:
    parts = [
        (
            "<h2>Published figures</h2><p>Measured by others, on one Spark each, without their"
            " commits, flags and backends: use them for orientation, not as a ranking.</p>"
        )
    ]
    for model in dict.fromkeys(figure.model for figure in references):
        own = [figure for figure in references if figure.model == model]
        parts.append(f"<h3>{escape(model)}</h3>")
        if pointed := [figure for figure in own if figure.points]:
            name = "published-" + re.sub(r"[^a-z0-9.]+", "-", model.lower())
            plot = plots.throughput(name, (), pointed)
            drawn.append(plot)
            parts.append(f'<div class="plots">{_figure(plot)}</div>')
        rows = [(figure.description, figure.value, figure.source) for figure in own]
        parts.append(_table(("measurement", "figure", "source"), rows))
    return "".join(parts)


def write(layout: Layout, first: str, second: str, *, console: Console) -> None:
    """Write results/report.html and results/report/*.png, and print the page's path.

    Two names compare these records. Raises SettingsError for one name without the other, and where
    there is nothing to show.
    """
    if bool(first) != bool(second):
        raise SettingsError(
            "a comparison needs two records",
            hint=hints.text("bench.report_of_two"),
        )
    pair = (_found(layout, first), _found(layout, second)) if first else None
    entries = results.entries(layout)
    records = [entry.record for entry in entries if entry.record]
    if pair:
        records += [record for record in pair if record not in records]
    problems = [entry.problem for entry in entries if not entry.record]
    published = plots.published_figures(layout)
    if not records and not published:
        raise SettingsError(
            "there is nothing to show: no record, and no recipe with published figures",
            hint=hints.text("nox.bench"),
        )
    page = compose(records, published, pair=pair, problems=problems, written=subject.utc_now())
    path, folder = layout.results / "report.html", layout.results / "report"
    for old in folder.glob("*.png"):
        old.unlink()
    for plot in page.plots:
        write_atomic(folder / f"{plot.name}.png", plot.png)
    write_atomic(path, page.html.encode())
    for problem in problems:
        console.warn(problem)
    console.info(
        f"{counted(len(records), 'record')}, {counted(len(page.plots), 'plot')},"
        f" {path.stat().st_size / 1024:.0f} KiB; the plots as PNG: {layout.relative(folder)}"
    )
    console.data(str(path))


def _found(layout: Layout, name: str) -> Record:
    record = results.find(layout, name).record
    assert record is not None
    return record
