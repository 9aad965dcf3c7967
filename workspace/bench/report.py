"""The report as one HTML file: sections of figures and tables, no script, nothing that is fetched.
Pure but for the drawing.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from workspace.bench import compare, metrics, plots, results, subject
from workspace.bench.plots import Plot, Reference
from workspace.bench.results import Record
from workspace.core.console import Console
from workspace.core.errors import SettingsError
from workspace.core.files import write_atomic
from workspace.core.paths import Layout

# Of what a server's sweep measures, the highest load stands for all in the history.
SHOWN_HISTORIES = 6
PERCENTILE_METRICS = ("ttft", "itl")
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; max-width: 72rem;
  padding: 0 1rem 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid #ccc; padding-top: 1rem; } h3 { font-size: 1rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; display: block; } figcaption { font-size: .85rem; color: #444; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; min-width: 62rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid #e3e3e3; overflow-wrap: normal; }
td.flags { min-width: 10rem; max-width: 22rem; overflow-wrap: anywhere; }
.pass { color: #006b3c; } .fail { color: #b00020; font-weight: 600; } .inconclusive { color: #7a5200; } ul { padding-left: 1.2rem; }
"""


@dataclass(frozen=True)
class Page:
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
    """Lay the page out. `pair` are the records to compare, without them in each section the newest
    one and the newest that it may be compared with.
    """
    drawn: list[Plot] = []
    parts = [
        (
            f"<h1>Benchmarks of the built vLLM</h1><p>{len(records)} records; written"
            f" {escape(written)}.</p>"
        )
    ]
    if problems:
        parts.append(
            "<h2>Left"
            f" out</h2><ul>{''.join(f'<li>{escape(problem)}</li>' for problem in problems)}</ul>"
        )
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for one in sorted(records, key=lambda one: results.instant(one.time)):
        if one.metrics:
            groups.setdefault((one.machine.name, one.kind, one.model), []).append(one)
    # What was measured last comes first.
    for (machine, kind, model), group in reversed(groups.items()):
        section = _Section(
            re.sub(r"[^a-z0-9.]+", "-", f"{kind}-{model}-{machine}".lower()), group, drawn
        )
        own = [one for one in references if one.model == model and one.points]
        parts.append(
            f"<h2>{escape(kind)} · {escape(model)} ·"
            f" {escape(machine)}</h2>{section.histories()}{section.table()}{section.pair(pair)}{section.sweeps(own)}"
        )
    if references:
        parts.append(_published(references, drawn))
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    )
    head += f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    body = "\n".join(parts)
    html = (
        "<!doctype html>\n<html"
        f' lang="en"><head>{head}<title>Benchmarks</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )
    return Page(html, tuple(drawn))


@dataclass(frozen=True)
class _Section:
    """The records of one kind, model and machine, oldest first; what is drawn is added to
    `drawn`.
    """

    name: str
    group: Sequence[Record]
    drawn: list[Plot]

    def histories(self) -> str:
        shown = [
            metric
            for metric in self.group[-1].metrics
            if metrics.concurrency(metric) in (None, self._top)
        ][:SHOWN_HISTORIES]
        plots_ = [
            plots.history(
                f"{self.name}-history-{metric}",
                metric,
                [one for one in self.group if metric in one.metrics],
            )
            for metric in shown
        ]
        return self._figures("History", plots_)

    def table(self) -> str:
        """What stands behind each number in the history."""
        rows = [_row(number, one) for number, one in enumerate(self.group, 1)]
        names = (
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
        return _table(names, rows)

    def pair(self, options: tuple[Record, Record] | None) -> str:
        pair = self._pair(options)
        if pair is None:
            newest = self.group[-1]
            return self._figures(
                "",
                self._percentiles(
                    [
                        name
                        for name in newest.metrics
                        if metrics.concurrency(name) in (None, self._top)
                    ],
                    [(newest.stem, newest)],
                ),
            )
        first, second = pair
        try:
            rows = compare.judged(first, second, factor=compare.FACTOR)
        except SettingsError:
            return ""
        said = "".join(
            f'<li class="{row.judgement.verdict}">{escape(row.metric)}:'
            f" {escape(compare.sentence(row))}</li>"
            for row in rows
        )
        top = max((metrics.concurrency(row.metric) or 0 for row in rows), default=0)
        shown = [row.metric for row in rows if metrics.concurrency(row.metric) in (None, top)]
        figures = [
            plots.distributions(f"{self.name}-ab-{metric}", metric, first, second)
            for metric in shown[:SHOWN_HISTORIES]
        ]
        figures += self._percentiles(shown, [("A", first), ("B", second)])
        differing = compare.differences(first, second)
        note = "".join(
            f"<li>{escape(name)} differs: {escape(text)}</li>" for name, text in differing.items()
        )
        title = f"B {second.stem} against A {first.stem}"
        return f"<h3>{escape(title)}</h3><ul>{said}{note}</ul>{self._figures('', figures)}"

    def sweeps(self, references: Sequence[Reference]) -> str:
        swept = [
            (f"{number}: {one.stem}", one)
            for number, one in enumerate(self.group, 1)
            if any(metrics.concurrency(metric) for metric in one.metrics)
        ]
        if not swept:
            return ""
        return self._figures(
            "Throughput against concurrency",
            [
                plots.throughput(
                    f"{self.name}-concurrency", swept[-len(plots.COLOURS) :], references
                )
            ],
        )

    @property
    def _top(self) -> int:
        """The highest load of the newest record, 0 where it has none."""
        return max((metrics.concurrency(name) or 0 for name in self.group[-1].metrics), default=0)

    def _percentiles(
        self, names: Sequence[str], records: Sequence[tuple[str, Record]]
    ) -> list[Plot]:
        return [
            plots.percentiles(f"{self.name}-percentiles-{name}", name, records)
            for name in names
            if name.partition("@")[0] in PERCENTILE_METRICS
        ]

    def _pair(self, options: tuple[Record, Record] | None) -> tuple[Record, Record] | None:
        if options:
            return options if options[1] in self.group else None
        second = self.group[-1]
        return next(
            (
                (one, second)
                for one in reversed(self.group[:-1])
                if not compare.differences(one, second)
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


def _row(number: int, one: Record) -> tuple[str, ...]:
    source, software = one.source, one.software
    starts = f"{len(one.starts)}" if one.is_complete else f"{len(one.starts)} of {one.repeat}"
    patches = "; ".join(source.patches) or "no patches"
    edited = f"; edited ({source.dirty[:12]})" if source.dirty else ""
    loads = [start.before.load for start in one.starts]
    held = sorted(
        {
            clocks.throttled_by
            for start in one.starts
            for clocks in (*start.before.clocks, *start.after.clocks)
            if clocks.throttled_by
        }
    )
    conditions = f"load {min(loads):.1f} to {max(loads):.1f}" + (
        f"; clocks held back by {', '.join(held)}" if held and held != ["nothing"] else ""
    )
    said = (
        f"vLLM {software.vllm}, torch {software.torch}, triton {software.triton}, CUDA"
        f" {software.cuda}"
    )
    return (
        str(number),
        one.stem,
        one.time[:16].replace("T", " "),
        starts,
        f"{source.pin}: {patches}{edited}; kernels {source.kernels}",
        " ".join(one.flags),
        said,
        "; ".join(one.backends) or "not said",
        conditions,
    )


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr>{''.join(_cell(name, text) for name, text in zip(names, row, strict=True))}</tr>"
        for row in rows
    )
    return (
        "<div"
        f' class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cell(name: str, text: str) -> str:
    kind = ' class="flags"' if name == "flags" else ""
    return f"<td{kind}>{escape(text)}</td>"


def _published(references: Sequence[Reference], drawn: list[Plot]) -> str:
    parts = [
        (
            "<h2>Published figures</h2><p>Of others, on one Spark each; without their commits, flags"
            " and backends they say where to look, not who is faster.</p>"
        )
    ]
    for model in dict.fromkeys(one.model for one in references):
        own = [one for one in references if one.model == model]
        parts.append(f"<h3>{escape(model)}</h3>")
        if pointed := [one for one in own if one.points]:
            plot = plots.throughput(
                "published-" + re.sub(r"[^a-z0-9.]+", "-", model.lower()), (), pointed
            )
            drawn.append(plot)
            parts.append(f'<div class="plots">{_figure(plot)}</div>')
        parts.append(
            _table(("what", "figure", "source"), [(one.what, one.value, one.source) for one in own])
        )
    return "".join(parts)


def write(layout: Layout, first: str, second: str, *, console: Console) -> None:
    """Write results/report.html and results/report/*.png, and print the page's path. With two words
    it compares these records.

    Raises SettingsError where there is nothing to show, or one of two words is missing.
    """
    if bool(first) != bool(second):
        raise SettingsError(
            "two records are compared, or none is named",
            hint="./scripts/inv bench.report --first A --second B",
        )
    pair = (_found(layout, first), _found(layout, second)) if first else None
    entries = results.entries(layout)
    records = [entry.record for entry in entries if entry.record]
    if pair:
        records += [one for one in pair if one not in records]
    problems = [entry.problem for entry in entries if not entry.record]
    published = plots.published_figures(layout)
    if not records and not published:
        raise SettingsError(
            "there is nothing to show: no record, and no recipe with published figures",
            hint="./scripts/nox -s bench",
        )
    composed = compose(
        records, published, pair=pair, problems=problems, written=subject.subject_now()
    )
    path, folder = layout.results / "report.html", layout.results / "report"
    for old in folder.glob("*.png"):
        old.unlink()
    for plot in composed.plots:
        write_atomic(folder / f"{plot.name}.png", plot.png)
    write_atomic(path, composed.html.encode())
    for problem in problems:
        console.warn(problem)
    console.info(
        f"{len(records)} records, {len(composed.plots)} plots, {path.stat().st_size / 1024:.0f}"
        f" KiB; the plots as PNG: {layout.relative(folder)}"
    )
    console.data(str(path))


def _found(layout: Layout, word: str) -> Record:
    found = results.find(layout, word).record
    assert found is not None
    return found
