"""The pictures of the report, each as SVG for the page and as PNG: small enough to be read on a
phone, the same bytes for the same records.
"""

import io
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workspace.bench import metrics
from workspace.bench.results import Record
from workspace.core.paths import Layout
from workspace.server import recipes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Reference:
    """One published figure of a model. `points` are requests at once with the lowest and the
    highest tok/s, where that can be told from its words.
    """

    model: str
    what: str
    value: str
    source: str
    points: tuple[tuple[int, float, float], ...]


def published_figures(layout: Layout) -> tuple[Reference, ...]:
    """Read the figures of all recipes. Raises SettingsError for a recipe that cannot be read; what
    else is wrong with it is `serve.list`'s business.
    """
    found = []
    for path in sorted((layout.root / "recipes").glob("*.toml")):
        table = recipes.read_table(path, place=layout.relative(path))
        rows = table.get("figures", [])
        for row in rows if isinstance(rows, list) else []:
            if isinstance(row, dict):
                what, value, source = (str(row.get(key, "")) for key in ("what", "value", "source"))
                found.append(
                    Reference(
                        str(table.get("model", path.stem)), what, value, source, points(what, value)
                    )
                )
    return tuple(found)


def points(what: str, value: str) -> tuple[tuple[int, float, float], ...]:
    """`1 and 4 requests at once` with `57.5 and 107.9 tok/s`, or `one request at a time …` with `57
    to 60 tok/s`; nothing for other words.
    """
    if not value.endswith("tok/s"):
        return ()
    rates = [float(number) for number in _NUMBER.findall(value)]
    if what.startswith("one request at a time") and rates:
        return ((1, min(rates), max(rates)),)
    loads = [
        int(number)
        for number in _NUMBER.findall(what.partition(" requests at once")[0])
        if number.isdigit()
    ]
    if "requests at once" in what and len(loads) == len(rates) and all(loads):
        return tuple((load, rate, rate) for load, rate in zip(loads, rates, strict=True))
    return ()


WIDTH_IN, HEIGHT_IN = 4.2, 2.7
PNG_DPI = 200
# Told apart by colour-blind readers too (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
SHOWN_SAMPLES = 400
PERCENTILES = (50, 75, 90, 95, 99)
_RC: Mapping[str, Mapping[str, object]] = {
    "svg": {"fonttype": "none"},
    "font": {"family": ["sans-serif"], "size": 8},
    "axes": {"spines.top": False, "spines.right": False, "grid": True, "axisbelow": True},
    "grid": {"color": "#dddddd", "linewidth": 0.6},
    "legend": {"fontsize": 7, "frameon": False},
    # A dollar in a label is a dollar.
    "text": {"parse_math": False},
}
# Only these ids of matplotlib's are referred to; the others would be twice in one page.
_UNUSED_ID = re.compile(r' id="[A-Za-z0-9]+_[\w.]+"')


@dataclass(frozen=True)
class Plot:
    """`name` is that of its PNG; `title` says what is seen, for those who do not see it too."""

    name: str
    title: str
    svg: str
    png: bytes


def _drawn(
    name: str, title: str, draw: "Callable[[Axes], None]", *, height_in: float = HEIGHT_IN
) -> Plot:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Whatever a matplotlibrc of the user's says.
    with mpl.rc_context():
        mpl.rcdefaults()
        for group, said in (*_RC.items(), ("svg", {"hashsalt": name})):
            mpl.rc(group, **said)  # type: ignore[arg-type]
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.add_subplot())
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=PNG_DPI, metadata={"Software": None})
    text = svg.getvalue()
    text = _UNUSED_ID.sub("", text[text.index("<svg") :])
    # The page gives it its width, and the viewBox the rest.
    head, _, rest = text.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return Plot(
        name, title, f'{head} role="img" aria-label="{_attribute(title)}">{rest}', png.getvalue()
    )


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def history(name: str, metric: str, records: Sequence[Record]) -> Plot:
    """A metric over the records in the order of time: a dot a start, a line through the medians.
    Records have numbers, which the table explains.
    """
    of = metrics.known(metric)

    def draw(axes: "Axes") -> None:
        for number, one in enumerate(records, 1):
            values = one.values(metric)
            axes.plot(
                [number] * len(values), values, "o", color=COLOURS[0], alpha=0.35, markersize=3
            )
        medians = [metrics.median(one.values(metric)) for one in records]
        axes.plot(range(1, len(records) + 1), medians, "-", color=COLOURS[0], linewidth=1.2)
        axes.plot(
            range(1, len(records) + 1),
            medians,
            "_",
            color=COLOURS[0],
            markersize=10,
            markeredgewidth=2,
        )
        step = max(1, len(records) // 8)
        ticks = range(1, len(records) + 1, step)
        axes.set_xticks(
            ticks, [f"{number}\n{records[number - 1].source.tree[:7]}" for number in ticks]
        )
        axes.set_xlim(0.5, len(records) + 0.5)
        axes.set_ylabel(f"{metric}, {of.unit}")

    return _drawn(
        name,
        f"{metric} over {len(records)} {'record' if len(records) == 1 else 'records'}:"
        f" {of.meaning}; {of.better} is better",
        draw,
    )


def distributions(name: str, metric: str, first: Record, second: Record) -> Plot:
    """Every sample of two records, light, and the median of each start, dark."""
    of = metrics.known(metric)
    pair = (first, second)

    def draw(axes: "Axes") -> None:
        spread = random.Random(name)
        for row, one in enumerate(pair):
            every = [sample for start in one.starts for sample in start.samples[metric]]
            shown = every if len(every) <= SHOWN_SAMPLES else spread.sample(every, SHOWN_SAMPLES)
            axes.plot(
                shown,
                [1 - row - 0.12 + spread.uniform(-0.16, 0.16) for _ in shown],
                ".",
                color=COLOURS[row],
                alpha=0.25,
                markersize=3,
                markeredgewidth=0,
            )
            values = one.values(metric)
            axes.plot(
                values,
                [1 - row + 0.2] * len(values),
                "|",
                color=COLOURS[row],
                markersize=9,
                markeredgewidth=1.5,
            )
            axes.plot(
                [metrics.median(values)] * 2,
                [1 - row - 0.35, 1 - row + 0.35],
                "-",
                color=COLOURS[row],
                linewidth=1,
            )
        axes.set_yticks([1, 0], ["A", "B"])
        axes.set_ylim(-0.5, 1.5)
        axes.set_xlabel(f"{metric}, {of.unit}")

    return _drawn(
        name,
        f"{metric} of A ({first.stem}) and B ({second.stem}): dots are samples, ticks the starts",
        draw,
        height_in=1.9,
    )


def percentiles(name: str, metric: str, records: Sequence[tuple[str, Record]]) -> Plot:
    """Percentiles of all samples of a metric, a line a record."""
    of = metrics.known(metric)

    def draw(axes: "Axes") -> None:
        for number, (label, one) in enumerate(records):
            every = [sample for start in one.starts for sample in start.samples[metric]]
            curve = [metrics.percentile(every, percent) for percent in PERCENTILES]
            axes.plot(
                range(len(PERCENTILES)),
                curve,
                f"-{MARKERS[number % len(MARKERS)]}",
                color=COLOURS[number % len(COLOURS)],
                markersize=4,
                label=label,
            )
        axes.set_xticks(range(len(PERCENTILES)), [f"p{percent}" for percent in PERCENTILES])
        axes.set_ylim(bottom=0)
        axes.set_ylabel(f"{metric}, {of.unit}")
        axes.legend()

    return _drawn(name, f"percentiles of {metric}: {of.meaning}", draw)


def throughput(
    name: str, records: Sequence[tuple[str, Record]], references: Sequence[Reference]
) -> Plot:
    """Tokens a second against requests at once: sweeps as lines, published figures as hollow
    marks.
    """

    def draw(axes: "Axes") -> None:
        loads: set[int] = set()
        for number, (label, one) in enumerate(records):
            curve = sorted(
                (at, metrics.median(one.values(metric)))
                for metric in one.metrics
                if (at := metrics.concurrency(metric)) and metric.startswith("output_")
            )
            loads |= {at for at, _ in curve}
            axes.plot(
                *zip(*curve, strict=True),
                f"-{MARKERS[number % len(MARKERS)]}",
                color=COLOURS[number % len(COLOURS)],
                markersize=4,
                label=label,
            )
        for number, reference in enumerate(references):
            loads |= {at for at, _, _ in reference.points}
            middles = [((low + high) / 2) for _, low, high in reference.points]
            halves = [((high - low) / 2) for _, low, high in reference.points]
            at_once = [at for at, _, _ in reference.points]
            mark = MARKERS[number % len(MARKERS)]
            axes.errorbar(
                at_once,
                middles,
                yerr=halves,
                fmt=mark,
                color="#555555",
                mfc="white",
                markersize=5,
                linewidth=1,
                label=reference.source,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(loads), [str(at) for at in sorted(loads)])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("requests at once")
        axes.set_ylabel("output, tok/s")
        axes.legend()

    return _drawn(name, "output tokens per second against requests at once", draw)
