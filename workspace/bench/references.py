"""Figures that others have published, from the recipes: points to hold one's own against, each with its source."""

import re
from dataclasses import dataclass

from workspace.core import tables
from workspace.core.layout import Layout

_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Reference:
    """One published figure of a model. `points` are requests at once with the lowest and the highest tok/s, where that can be told from its words."""

    model: str
    what: str
    value: str
    source: str
    points: tuple[tuple[int, float, float], ...]


def load(layout: Layout) -> tuple[Reference, ...]:
    """Read the figures of all recipes. Raises SettingsError for a recipe that cannot be read; what else is wrong with it is `serve.list`'s business."""
    found = []
    for path in sorted((layout.root / "recipes").glob("*.toml")):
        table = tables.read(path, place=layout.relative(path))
        rows = table.get("figures", [])
        for row in rows if isinstance(rows, list) else []:
            if isinstance(row, dict):
                what, value, source = (str(row.get(key, "")) for key in ("what", "value", "source"))
                found.append(Reference(str(table.get("model", path.stem)), what, value, source, points(what, value)))
    return tuple(found)


def points(what: str, value: str) -> tuple[tuple[int, float, float], ...]:
    """`1 and 4 requests at once` with `57.5 and 107.9 tok/s`, or `one request at a time …` with `57 to 60 tok/s`; nothing for other words."""
    if not value.endswith("tok/s"):
        return ()
    rates = [float(number) for number in _NUMBER.findall(value)]
    if what.startswith("one request at a time") and rates:
        return ((1, min(rates), max(rates)),)
    loads = [int(number) for number in _NUMBER.findall(what.partition(" requests at once")[0]) if number.isdigit()]
    if "requests at once" in what and len(loads) == len(rates) and all(loads):
        return tuple((load, rate, rate) for load, rate in zip(loads, rates, strict=True))
    return ()
