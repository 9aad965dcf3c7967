"""The report of all records as one HTML file (report.html), and a PNG for each plot.

The page has no script and fetches nothing. Only `write` reads records and writes files.
"""

import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from workspace.bench import compare, plots, results
from workspace.bench.plots import Plot
from workspace.bench.results import Record
from workspace.core import hints
from workspace.core.console import Console
from workspace.core.errors import SettingsError, counted
from workspace.core.files import write_atomic
from workspace.core.paths import Layout
from workspace.core.records import utc_now
from workspace.server import recipes

SHOWN_METRICS = 6
# Characters of a cell that gets a wider column.
LONG_CELL = 60
# A plot with more rows, or a table, is no page for a colleague; each record keeps its file.
SHOWN_RECORDS = 20
TEMPLATE = Path(__file__).with_name("report.html")
# Metrics with the worst verdict first.
_VERDICTS: Sequence[compare.Verdict] = ("fail", "inconclusive", "pass")


# The keys of a recipe's figure, in the order of Reference.
_FIGURE = ("what", "value", "source")


@dataclass(frozen=True)
class Reference:
    """A published figure of a model."""

    model: str
    description: str
    value: str
    source: str


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
    """Compose the page: a summary with the verdicts, then a section for each benchmark.

    `pair` are the records to compare. Without them each section compares its newest record with
    the newest other one that is comparable. Of `references`, those of measured models are shown.
    """
    drawn: list[Plot] = []
    # The section of the newest record comes first.
    sections = [
        _Section(key, group, pair, drawn) for key, group in reversed(_groups(records).items())
    ]
    title = "Benchmarks of the built vLLM"
    head = f"{counted(len(records), 'record')}, written {escape(written)}"
    cards = "".join(section.card() for section in sections)
    parts = [f"<h1>{title}</h1><p class='soft'>{head}</p><div class='cards'>{cards}</div>"]
    parts += [section.html() for section in sections]
    measured = {section.model for section in sections}
    if shown := [figure for figure in references if figure.model in measured]:
        parts.append(_published(shown))
    if problems:
        rows = "".join(f"<li>{escape(problem)}</li>" for problem in problems)
        parts.append(f"<h2>Records that cannot be read</h2><ul>{rows}</ul>")
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return Page(template.substitute(body="\n".join(parts)), tuple(drawn))


def _groups(records: Sequence[Record]) -> dict[tuple[str, str, str], list[Record]]:
    """Group the records with metrics by machine, kind and model, each group oldest first."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in sorted(records, key=lambda record: results.instant(record.time)):
        if record.metrics:
            key = (record.machine.name, record.kind, record.model)
            groups.setdefault(key, []).append(record)
    return groups


class _Section:
    """The records of one machine, kind and model, oldest first. Plots are added to `drawn`."""

    def __init__(
        self,
        key: tuple[str, str, str],
        group: Sequence[Record],
        pair: tuple[Record, Record] | None,
        drawn: list[Plot],
    ) -> None:
        machine, kind, self.model = key
        self._title = f"{kind} of {self.model}"
        self._name = re.sub(r"[^a-z0-9.]+", "-", f"{kind}-{self.model}-{machine}".lower())
        self._group, self._drawn = group, drawn
        self._pair = self._chosen(pair)
        labels = [record.label for record in group]
        self._labels = {
            id(record): record.label
            if labels.count(record.label) == 1
            else f"{record.label} {record.source.tree[:7]}"
            for record in group
        }
        self._shown = group[-1].shown_metrics[:SHOWN_METRICS]
        self._verdicts = self._judged()

    def _label(self, record: Record) -> str:
        return self._labels.get(id(record), record.label)

    def _chosen(self, requested: tuple[Record, Record] | None) -> tuple[Record, Record] | None:
        if requested:
            return requested if requested[1] in self._group else None
        second = self._group[-1]
        return next(
            (
                (first, second)
                for first in reversed(self._group[:-1])
                if not compare.differences(first, second)
            ),
            None,
        )

    def _judged(self) -> list[compare.MetricDifference]:
        """Return the verdicts, the worst first; none without a pair that shares a metric."""
        if self._pair is None:
            return []
        try:
            found = compare.judge_records(*self._pair, factor=compare.FACTOR)
        except SettingsError:
            return []
        return sorted(found, key=lambda row: _VERDICTS.index(row.judgement.verdict))

    def card(self) -> str:
        """Return the summary: the newest value of the first metric, and the worst verdict."""
        newest, name = self._group[-1], self._shown[0]
        unit, label = results.known(name).unit, escape(self._label(newest))
        parts = [
            f"<p>{escape(self._title)}: {escape(name)} of {label}</p>",
            f"<div class='value'>{_measured(newest, name, unit)}</div>",
        ]
        if self._pair and self._verdicts:
            row, first = self._verdicts[0], self._label(self._pair[0])
            parts.append(
                f"<p class='{row.judgement.verdict}'>{escape(_headline(row))} against"
                f" {escape(first)}</p>"
            )
        else:
            parts.append("<p class='soft'>no record to compare with</p>")
        return f"<div class='card'>{''.join(parts)}</div>"

    def html(self) -> str:
        newest = self._group[-1].machine
        gpus = "".join(f"{gpu.name}, driver {gpu.driver or 'unknown'}; " for gpu in newest.gpus)
        machine = (
            f"{newest.name}: {gpus}{newest.processor}, {counted(newest.cores, 'core')},"
            f" {newest.memory_gib:.0f} GiB"
        )
        return (
            f"<h2>{escape(self._title)}</h2><p class='soft'>{escape(machine)}</p>"
            f"{self._comparison()}{self._table()}{self._histories()}{self._distributions()}"
            f"{self._sweeps()}{self._details()}"
        )

    def _comparison(self) -> str:
        if self._pair is None or not self._verdicts:
            return ""
        first, second = self._pair
        near = [row for row in self._verdicts if row.metric in self._shown]
        far = [row for row in self._verdicts if row.metric not in self._shown]
        differing = "".join(
            f"<li>{escape(name)} differs: {escape(text)}</li>"
            for name, text in compare.differences(first, second).items()
        )
        title = escape(f"{self._label(second)} against {self._label(first)}")
        more = f"<summary>{counted(len(far), 'other metric')}</summary><ul>{_verdicts(far)}</ul>"
        return (
            f"<h3>{title}</h3><ul>{_verdicts(near)}{differing}</ul>"
            f"{f'<details>{more}</details>' if far else ''}"
        )

    def _table(self) -> str:
        """Return the measured values, the newest record first."""
        names = [f"{name}, {results.known(name).unit}" for name in self._shown]
        rows = [
            (
                f"{escape(self._label(record))}<small>{record.source.tree[:12]}</small>",
                *(
                    _measured(record, name) if name in record.metrics else ""
                    for name in self._shown
                ),
                f"{len(record.starts)}"
                + ("" if record.is_complete else f" of {record.repeat}, interrupted"),
                escape(record.time[:16].replace("T", " ")),
                escape(_conditions(record)),
            )
            for record in reversed(self._group[-SHOWN_RECORDS:])
        ]
        return _table(("record", *names, "starts", "time", "conditions"), rows)

    def _histories(self) -> str:
        if len(self._group) < 2:
            return ""
        figures = []
        for metric in self._shown:
            named = [
                (self._label(record) + (" ~" if record.is_noisy(metric) else ""), record)
                for record in self._group[-SHOWN_RECORDS:]
                if metric in record.metrics
            ]
            figures.append(plots.history(f"{self._name}-history-{metric}", metric, named))
        return self._figures("History", figures)

    def _details(self) -> str:
        """Describe what was measured: what all records share once, then what differs."""
        group = self._group[-SHOWN_RECORDS:]
        facts = [_facts(record) for record in group]
        shared = {
            name: text
            for name, text in facts[-1].items()
            if all(one[name] == text for one in facts)
        }
        listed = "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in shared.items()
        )
        names = [name for name in facts[-1] if name not in shared]
        rows = [
            (escape(self._label(record)), *(escape(own[name]) for name in names))
            for record, own in zip(reversed(group), reversed(facts), strict=True)
        ]
        differing = _table(("record", *names), rows) if names else ""
        inside = f"<dl>{listed}</dl>{differing}"
        return f"<details open><summary>What was measured</summary>{inside}</details>"

    def _distributions(self) -> str:
        if self._pair is None or not self._verdicts:
            return ""
        named = [(self._label(record), record) for record in self._pair]
        shared = [row.metric for row in self._verdicts]
        figures = [
            plots.distributions(f"{self._name}-ab-{metric}", metric, *named)
            for metric in self._shown
            if metric in shared
        ]
        return self._figures("Samples", figures)

    def _sweeps(self) -> str:
        swept = [
            (self._label(record), record)
            for record in self._group
            if any(results.concurrency(metric) for metric in record.metrics)
        ]
        if not swept:
            return ""
        newest = swept[-len(plots.COLOURS) :]
        plot = plots.throughput(f"{self._name}-concurrency", newest)
        return self._figures("Throughput against concurrency", [plot])

    def _figures(self, title: str, figures: Iterable[Plot]) -> str:
        new = list(figures)
        self._drawn.extend(new)
        heading = f"<h3>{escape(title)}</h3>" if title and new else ""
        return f"{heading}{''.join(map(_figure, new))}"


def _figure(plot: Plot) -> str:
    return (
        f"<figure><div class='wide'>{plot.svg}</div><div class='narrow'>{plot.narrow}</div>"
        f"<figcaption>{escape(plot.title)}</figcaption></figure>"
    )


def _verdicts(rows: Sequence[compare.MetricDifference]) -> str:
    return "".join(
        f'<li class="{row.judgement.verdict}">{escape(row.metric)}:'
        f" {escape(compare.sentence(row))}</li>"
        for row in rows
    )


def _measured(record: Record, name: str, unit: str = "") -> str:
    """Return the median of the starts, and below it their variation."""
    values = record.values(name)
    median = escape(f"{statistics.median(values):.4g} {unit}".rstrip())
    if len(values) == 1:
        return f"{median}<small>one start</small>"
    spread = f"± {results.variation(values):.1%}"
    if record.is_noisy(name):
        return f"{median}<small class='noisy'>{spread}, noisy</small>"
    return f"{median}<small>{spread}</small>"


def _headline(row: compare.MetricDifference) -> str:
    """Return a verdict in short, such as `slower: latency +13.3% (+10.7% to +16.6%)`."""
    judgement = row.judgement
    found = judgement.reason if judgement.verdict != "inconclusive" else "no verdict"
    change = f"{compare.percent(judgement.ratio)}{compare.interval_text(judgement)}"
    return f"{found}: {row.metric} {change}"


def _facts(record: Record) -> dict[str, str]:
    """Return what was measured and with what, in the order of interest."""
    source, software = record.source, record.software
    return {
        "pin": source.pin,
        "patches": "; ".join(source.patches) or "none",
        "edits": f"digest {source.dirty[:12]}" if source.dirty else "none",
        "kernels": source.kernels,
        "flags": " ".join(record.flags) or "none",
        "software": (
            f"vLLM {software.vllm}, torch {software.torch}, triton {software.triton}, CUDA"
            f" {software.cuda}, Python {software.python}"
        ),
        "backends": "; ".join(record.backends) or "not in the log",
    }


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
    """Return a table of cells that are HTML."""
    # A long name such as output_throughput@32 is cut where it has a joint.
    heads = (escape(name).replace("_", "_<wbr>").replace("@", "<wbr>@") for name in names)
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="table">{table}</div>'


def _cell(html: str) -> str:
    kind = ' class="long"' if len(html) > LONG_CELL else ""
    return f"<td{kind}>{html}</td>"


def _published(references: Sequence[Reference]) -> str:
    parts = [
        (
            "<h2>Published figures</h2><p>Measured by others, on one Spark each, without their"
            " commits, flags and backends: use them for orientation, not as a ranking.</p>"
        )
    ]
    for model in dict.fromkeys(figure.model for figure in references):
        own = [figure for figure in references if figure.model == model]
        parts.append(f"<h3>{escape(model)}</h3>")
        rows = [
            tuple(map(escape, (figure.description, figure.value, figure.source))) for figure in own
        ]
        parts.append(_table(("measurement", "figure", "source"), rows))
    return "".join(parts)


def published_figures(layout: Layout) -> tuple[Reference, ...]:
    """Read the published figures of all recipes.

    Raises SettingsError for a recipe that cannot be read; `inv serve.list` reports other faults.
    """
    found = []
    for path in sorted((layout.root / "recipes").glob("*.toml")):
        table = recipes.read_table(path, place=layout.relative(path))
        model, rows = str(table.get("model", path.stem)), table.get("figures", [])
        for row in rows if isinstance(rows, list) else []:
            if isinstance(row, dict):
                found.append(Reference(model, *(str(row.get(key, "")) for key in _FIGURE)))
    return tuple(found)


def write(layout: Layout, first: str, second: str, *, console: Console) -> None:
    """Write results/report.html and results/report/*.png, and print the page's path.

    Two names compare these records. Raises SettingsError for one name without the other, and where
    no record can be read.
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
    if not records:
        raise SettingsError(
            "there is nothing to show: no record of a benchmark can be read",
            hint=hints.text("nox.bench"),
        )
    path, folder = layout.results / "report.html", layout.results / "report"
    with console.step("report") as view:
        view.line("drawing the plots")
        page = compose(
            records,
            published_figures(layout),
            pair=pair,
            problems=problems,
            written=f"{utc_now()[:16].replace('T', ' ')} UTC",
        )
        for old in folder.glob("*.png"):
            old.unlink()
        for plot in page.plots:
            write_atomic(folder / f"{plot.name}.png", plot.png)
        write_atomic(path, page.html.encode())
        view.reason = (
            f"{counted(len(records), 'record')}, {counted(len(page.plots), 'plot')},"
            f" {path.stat().st_size / 1024:.0f} KiB; as PNG: {layout.relative(folder)}"
        )
    for problem in problems:
        console.warn(problem)
    console.data(str(path))


def _found(layout: Layout, name: str) -> Record:
    record = results.find(layout, name).record
    assert record is not None
    return record
