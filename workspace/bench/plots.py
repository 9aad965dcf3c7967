"""The plots of the report, as SVG for the page and as PNG, and the published figures in them.

They can be read on a phone, and equal records give equal bytes.
"""

import io
import random
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workspace.bench import results
from workspace.bench.results import Record
from workspace.core.paths import Layout
from workspace.server import recipes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NUMBER = re.compile(r"\d+(?:\.\d+)?")
WIDTH_IN, HEIGHT_IN = 4.2, 2.7
PNG_DPI = 200
# Colour-blind readers can distinguish these colours too (Okabe and Ito).
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
    # A dollar sign in a label is no formula.
    "text": {"parse_math": False},
}
# Ids of this form have no reference; in a page with several plots they would not be unique.
_UNUSED_ID = re.compile(r' id="[A-Za-z0-9]+_[\w.]+"')


@dataclass(frozen=True)
class Reference:
    """A published figure of a model.

    `points` are requests at once with the lowest and the highest tok/s, as far as the description
    has them.
    """

    model: str
    description: str
    value: str
    source: str
    points: tuple[tuple[int, float, float], ...]


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
                description, value, source = (
                    str(row.get(key, "")) for key in ("what", "value", "source")
                )
                found.append(
                    Reference(model, description, value, source, points(description, value))
                )
    return tuple(found)


def points(description: str, value: str) -> tuple[tuple[int, float, float], ...]:
    """Parse the points of a published figure, none for other descriptions.

    `1 and 4 requests at once` has a value such as `57.5 and 107.9 tok/s`, `one request at a time …`
    a value such as `57 to 60 tok/s`.
    """
    if not value.endswith("tok/s"):
        return ()
    rates = [float(number) for number in _NUMBER.findall(value)]
    if description.startswith("one request at a time") and rates:
        return ((1, min(rates), max(rates)),)
    loads = [
        int(number)
        for number in _NUMBER.findall(description.partition(" requests at once")[0])
        if number.isdigit()
    ]
    if "requests at once" in description and len(loads) == len(rates) and all(loads):
        return tuple((load, rate, rate) for load, rate in zip(loads, rates, strict=True))
    return ()


@dataclass(frozen=True)
class Plot:
    """A plot; `name` is that of its PNG, `title` also serves readers who cannot see it."""

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

    # The defaults, whatever the user's matplotlibrc sets.
    with mpl.rc_context():
        mpl.rcdefaults()
        for group, values in (*_RC.items(), ("svg", {"hashsalt": name})):
            mpl.rc(group, **values)  # type: ignore[arg-type]
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.add_subplot())
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=PNG_DPI, metadata={"Software": None})
    text = svg.getvalue()
    text = _UNUSED_ID.sub("", text[text.index("<svg") :])
    # The page sets the width, and the viewBox the height.
    head, _, rest = text.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return Plot(
        name, title, f'{head} role="img" aria-label="{_attribute(title)}">{rest}', png.getvalue()
    )


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def _all_samples(record: Record, metric: str) -> list[float]:
    return [sample for start in record.starts for sample in start.samples[metric]]


def history(name: str, metric: str, records: Sequence[Record]) -> Plot:
    """Plot a metric over time: a dot for each start, and a line through the medians.

    The records have numbers, which the table of the page explains.
    """
    known = results.known(metric)

    def draw(axes: "Axes") -> None:
        numbers = range(1, len(records) + 1)
        for number, record in enumerate(records, 1):
            values = record.values(metric)
            axes.plot(
                [number] * len(values), values, "o", color=COLOURS[0], alpha=0.35, markersize=3
            )
        medians = [statistics.median(record.values(metric)) for record in records]
        axes.plot(numbers, medians, "-", color=COLOURS[0], linewidth=1.2)
        axes.plot(numbers, medians, "_", color=COLOURS[0], markersize=10, markeredgewidth=2)
        step = max(1, len(records) // 8)
        ticks = range(1, len(records) + 1, step)
        axes.set_xticks(
            ticks, [f"{number}\n{records[number - 1].source.tree[:7]}" for number in ticks]
        )
        axes.set_xlim(0.5, len(records) + 0.5)
        axes.set_ylabel(f"{metric}, {known.unit}")

    return _drawn(
        name,
        f"{metric} over {len(records)} {'record' if len(records) == 1 else 'records'}:"
        f" {known.meaning}; {known.better} is better",
        draw,
    )


def distributions(name: str, metric: str, first: Record, second: Record) -> Plot:
    """Plot every sample of two records, light, and the median of each start, dark."""

    def draw(axes: "Axes") -> None:
        spread = random.Random(name)
        for row, record in enumerate((first, second)):
            _draw_distribution(axes, row, _all_samples(record, metric), spread)
            _draw_medians(axes, row, record.values(metric))
        axes.set_yticks([1, 0], ["A", "B"])
        axes.set_ylim(-0.5, 1.5)
        axes.set_xlabel(f"{metric}, {results.known(metric).unit}")

    return _drawn(
        name,
        f"{metric} of A ({first.stem}) and B ({second.stem}): dots are samples, ticks the starts",
        draw,
        height_in=1.9,
    )


def _draw_distribution(
    axes: "Axes", row: int, samples: Sequence[float], spread: random.Random
) -> None:
    shown = samples if len(samples) <= SHOWN_SAMPLES else spread.sample(samples, SHOWN_SAMPLES)
    axes.plot(
        shown,
        [1 - row - 0.12 + spread.uniform(-0.16, 0.16) for _ in shown],
        ".",
        color=COLOURS[row],
        alpha=0.25,
        markersize=3,
        markeredgewidth=0,
    )


def _draw_medians(axes: "Axes", row: int, values: Sequence[float]) -> None:
    axes.plot(
        values,
        [1 - row + 0.2] * len(values),
        "|",
        color=COLOURS[row],
        markersize=9,
        markeredgewidth=1.5,
    )
    axes.plot(
        [statistics.median(values)] * 2,
        [1 - row - 0.35, 1 - row + 0.35],
        "-",
        color=COLOURS[row],
        linewidth=1,
    )


def percentile(numbers: Sequence[float], percent: int) -> float:
    """Interpolate between the two nearest numbers, as numpy does by default."""
    if len(numbers) == 1:
        return numbers[0]
    return statistics.quantiles(numbers, n=100, method="inclusive")[percent - 1]


def percentiles(name: str, metric: str, records: Sequence[tuple[str, Record]]) -> Plot:
    """Plot percentiles of all samples of a metric, a line for each record."""
    known = results.known(metric)

    def draw(axes: "Axes") -> None:
        for index, (label, record) in enumerate(records):
            samples = _all_samples(record, metric)
            curve = [percentile(samples, percent) for percent in PERCENTILES]
            axes.plot(
                range(len(PERCENTILES)),
                curve,
                f"-{MARKERS[index % len(MARKERS)]}",
                color=COLOURS[index % len(COLOURS)],
                markersize=4,
                label=label,
            )
        axes.set_xticks(range(len(PERCENTILES)), [f"p{percent}" for percent in PERCENTILES])
        axes.set_ylim(bottom=0)
        axes.set_ylabel(f"{metric}, {known.unit}")
        axes.legend()

    return _drawn(name, f"percentiles of {metric}: {known.meaning}", draw)


def throughput(
    name: str, records: Sequence[tuple[str, Record]], references: Sequence[Reference]
) -> Plot:
    """Plot tokens a second against requests at once.

    Sweeps are lines, published figures are hollow markers.
    """

    def draw(axes: "Axes") -> None:
        loads: set[int] = set()
        for index, (label, record) in enumerate(records):
            loads |= _draw_sweep(axes, index, label, record)
        for index, reference in enumerate(references):
            loads |= _draw_reference(axes, index, reference)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(loads), [str(at) for at in sorted(loads)])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("requests at once")
        axes.set_ylabel("output, tok/s")
        axes.legend()

    return _drawn(name, "output tokens per second against requests at once", draw)


def _draw_sweep(axes: "Axes", index: int, label: str, record: Record) -> set[int]:
    """Draw the line of a sweep, and return its loads."""
    curve = sorted(
        (at, statistics.median(record.values(metric)))
        for metric in record.metrics
        if (at := results.concurrency(metric)) and metric.startswith("output_")
    )
    axes.plot(
        *zip(*curve, strict=True),
        f"-{MARKERS[index % len(MARKERS)]}",
        color=COLOURS[index % len(COLOURS)],
        markersize=4,
        label=label,
    )
    return {at for at, _ in curve}


def _draw_reference(axes: "Axes", index: int, reference: Reference) -> set[int]:
    """Draw the markers of a published figure, and return its loads."""
    loads = [at for at, _, _ in reference.points]
    axes.errorbar(
        loads,
        [((low + high) / 2) for _, low, high in reference.points],
        yerr=[((high - low) / 2) for _, low, high in reference.points],
        fmt=MARKERS[index % len(MARKERS)],
        color="#555555",
        mfc="white",
        markersize=5,
        linewidth=1,
        label=reference.source,
    )
    return set(loads)
