"""The plots of the report, as SVG for the page and as PNG.

They can be read on a phone, and equal records give equal bytes.
"""

import functools
import io
import random
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workspace.bench import results
from workspace.bench.results import Record
from workspace.core.errors import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A plot as wide as the page, and one for a phone, whose text has the same size there.
WIDE_IN, NARROW_IN, HEIGHT_IN = 9.6, 3.6, 2.7
# The height of a row of a plot with a row for each record, and of all else in it.
ROW_IN, AROUND_IN = 0.28, 0.7
PNG_DPI = 200
# Colour-blind readers can distinguish these colours too (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, GRID, PAGE, GREY = "#1a1a1a", "#dddddd", "#fefefe", "#555555"
# The style of the page sets these for light and dark; a PNG has the colours above.
VARIABLES: Mapping[str, str] = {
    INK: "currentColor",
    GRID: "var(--grid)",
    PAGE: "var(--page)",
    GREY: "var(--grey)",
    **{colour.lower(): f"var(--c{number})" for number, colour in enumerate(COLOURS)},
}
SHOWN_SAMPLES = 400
SHOWN_LABEL = 18
_RC: Mapping[str, Mapping[str, object]] = {
    "svg": {"fonttype": "none"},
    "font": {"family": ["sans-serif"], "size": 8},
    "axes": {"spines.top": False, "spines.right": False, "grid": True, "axisbelow": True}
    | {"edgecolor": INK, "labelcolor": INK},
    "grid": {"color": GRID, "linewidth": 0.6},
    "xtick": {"color": INK},
    "ytick": {"color": INK},
    "legend": {"fontsize": 7, "frameon": False},
    # A dollar sign in a label is no formula.
    "text": {"parse_math": False, "color": INK},
}
# Ids of this form have no reference; in a page with several plots they would not be unique.
_UNUSED_ID = re.compile(r' id="[A-Za-z0-9]+_[\w.]+"')


@dataclass(frozen=True)
class Plot:
    """A plot; `name` is that of its PNG, `title` also serves readers who cannot see it.

    `svg` is as wide as the page, `narrow` as a phone.
    """

    name: str
    title: str
    svg: str
    narrow: str
    png: bytes


def _drawn(
    name: str, title: str, draw: "Callable[[Axes], None]", *, height_in: float = HEIGHT_IN
) -> Plot:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def saved(width_in: float, form: str, salt: str) -> bytes:
        # The defaults, whatever the user's matplotlibrc sets.
        with mpl.rc_context():
            mpl.rcdefaults()
            for group, values in (*_RC.items(), ("svg", {"hashsalt": salt})):
                mpl.rc(group, **values)  # type: ignore[arg-type]
            figure = Figure(figsize=(width_in, height_in), layout="constrained")
            FigureCanvasAgg(figure)
            draw(figure.add_subplot())
            file = io.BytesIO()
            if form == "png":
                figure.savefig(file, format=form, dpi=PNG_DPI, metadata={"Software": None})
            else:
                metadata = {"Date": None, "Creator": None}
                figure.savefig(file, format=form, transparent=True, metadata=metadata)
        return file.getvalue()

    wide = _inline(saved(WIDE_IN, "svg", name), title)
    narrow = _inline(saved(NARROW_IN, "svg", f"{name}-narrow"), title)
    return Plot(name, title, wide, narrow, saved(WIDE_IN, "png", name))


def _inline(svg: bytes, title: str) -> str:
    """Return an SVG for the page, which sets its width and its colours; the viewBox has the
    height.
    """
    text = svg.decode()
    text = _UNUSED_ID.sub("", text[text.index("<svg") :])
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    head, _, rest = text.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{_attribute(title)}">{rest}'


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def _all_samples(record: Record, metric: str) -> list[float]:
    return [sample for start in record.starts for sample in start.samples[metric]]


def history(name: str, metric: str, records: Sequence[tuple[str, Record]]) -> Plot:
    """Plot a metric of named records: a row for each, a dot for each start, a tick at the median.

    The records are in order of time, the newest in the highest row. Noisy records are hollow and do
    not set the scale: a value beyond it is an arrow at the edge.
    """
    known = results.known(metric)
    low, high = _scale(metric, [record for _, record in records])

    def draw(axes: "Axes") -> None:
        quiet = []
        for row, (_, record) in enumerate(records):
            values, is_noisy = record.values(metric), record.is_noisy(metric)
            _draw_starts(axes, row, values, (low, high), is_hollow=is_noisy)
            if not is_noisy:
                quiet.append((statistics.median(values), row))
        if quiet:
            axes.plot(*zip(*quiet, strict=True), "-", color=COLOURS[0], linewidth=0.8, alpha=0.5)
        axes.set_yticks(range(len(records)), [_short(label) for label, _ in records])
        axes.set_ylim(-0.6, len(records) - 0.4)
        axes.set_xlim(low, high)
        axes.set_xlabel(f"{metric}, {known.unit} ({known.better} is better)")

    return _drawn(
        name,
        f"{metric} over {counted(len(records), 'record')}: {known.meaning}; dots are starts, ticks"
        f" medians, ~ and hollow dots noisy records; {known.better} is better",
        draw,
        height_in=AROUND_IN + ROW_IN * len(records),
    )


def _scale(metric: str, records: Sequence[Record]) -> tuple[float, float]:
    """Return the limits of an axis for the starts of the records that are not noisy, if any."""
    quiet = [record for record in records if not record.is_noisy(metric)] or records
    values = [value for record in quiet for value in record.values(metric)]
    room = 0.08 * (max(values) - min(values)) or 0.05 * max(values)
    return min(values) - room, max(values) + room


def _draw_starts(
    axes: "Axes",
    row: int,
    values: Sequence[float],
    limits: tuple[float, float],
    *,
    is_hollow: bool,
) -> None:
    low, high = limits
    face = PAGE if is_hollow else COLOURS[0]
    # Above the axis and its frame: an arrow lies at the edge.
    drawn = functools.partial(
        axes.plot, color=COLOURS[0], mfc=face, linestyle="", clip_on=False, zorder=3
    )
    inside = [value for value in values if low <= value <= high]
    drawn(inside, [row] * len(inside), marker="o", markersize=3.5, alpha=0.6)
    for at, marker, is_beyond in (
        (low, "<", min(values) < low),
        (high, ">", max(values) > high),
    ):
        if is_beyond:
            drawn([at], [row], marker=marker, markersize=5)
    if low <= (median := statistics.median(values)) <= high:
        drawn([median], [row], marker="|", markersize=11, markeredgewidth=1.6)


def _short(label: str) -> str:
    return label if len(label) <= SHOWN_LABEL else f"{label[: SHOWN_LABEL - 1]}…"


def distributions(
    name: str, metric: str, first: tuple[str, Record], second: tuple[str, Record]
) -> Plot:
    """Plot every sample of two named records, light, and the median of each start, dark."""
    pair = [record for _, record in (first, second)]
    quiet = [record for record in pair if not record.is_noisy(metric)]

    def draw(axes: "Axes") -> None:
        spread = random.Random(name)
        for row, record in enumerate(pair):
            _draw_distribution(axes, row, _all_samples(record, metric), spread)
            _draw_medians(axes, row, record.values(metric))
        if len(quiet) == 1:
            # The noisy one is cut where it would hide the other.
            samples = [*_all_samples(quiet[0], metric), *map(_median_of(metric), pair)]
            room = 0.08 * (max(samples) - min(samples))
            axes.set_xlim(min(samples) - room, max(samples) + room)
        axes.set_yticks([1, 0], [_short(label) for label, _ in (first, second)])
        axes.set_ylim(-0.5, 1.5)
        axes.set_xlabel(f"{metric}, {results.known(metric).unit}")

    return _drawn(
        name,
        f"{metric} of {first[0]} and {second[0]}: dots are samples, ticks the starts",
        draw,
        height_in=1.9,
    )


def _median_of(metric: str) -> Callable[[Record], float]:
    return lambda record: statistics.median(record.values(metric))


def _draw_distribution(
    axes: "Axes", row: int, samples: Sequence[float], spread: random.Random
) -> None:
    shown = samples if len(samples) <= SHOWN_SAMPLES else spread.sample(samples, SHOWN_SAMPLES)
    axes.plot(
        shown,
        [1 - row - 0.12 + spread.uniform(-0.16, 0.16) for _ in shown],
        ".",
        color=COLOURS[row],
        alpha=0.4,
        markersize=4,
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


def throughput(name: str, records: Sequence[tuple[str, Record]]) -> Plot:
    """Plot tokens a second against requests at once, a line for each sweep."""

    def draw(axes: "Axes") -> None:
        loads: set[int] = set()
        for index, (label, record) in enumerate(records):
            loads |= _draw_sweep(axes, index, label, record)
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
