"""`inv bench`: the records that are there, newest first."""

import json

from workspace.bench import metrics, store
from workspace.bench.record import Record
from workspace.core.console import Console
from workspace.core.layout import Layout


def show(layout: Layout, *, console: Console, as_json: bool) -> None:
    """Print one row a record: whole, interrupted or damaged, and what it measured first."""
    there = store.entries(layout)
    if as_json:
        console.data(json.dumps({"schema": 1, "records": [_document(layout, entry) for entry in there]}, indent=1))
        return
    for entry in there:
        if entry.record is None:
            console.row("FAIL", entry.path.stem, entry.problem)
        else:
            one = entry.record
            console.row("ok" if one.is_complete else "warn", one.stem, f" {described(one)}")
    if not there:
        console.say("no benchmark was recorded yet")
    console.say("next: " + ("./scripts/inv bench.compare A B" if sum(entry.record is not None for entry in there) > 1 else "./scripts/nox -s bench"))


def described(one: Record) -> str:
    """What a record is, in a line."""
    starts = f"{len(one.starts)} starts" if one.is_complete else f"{len(one.starts)} of {one.repeat} starts, interrupted"
    return "  ".join((one.kind, one.model, starts, *(measured(one, name) for name in one.metrics[:1]), one.time[:16].replace("T", " "), one.machine.name))


def measured(one: Record, name: str) -> str:
    """The median of a metric over the starts, with its unit and its variation."""
    values = one.values(name)
    spread = f" ± {metrics.variation(values):.1%}" if len(values) > 1 else ""
    return f"{name} {metrics.median(values):.4g} {metrics.known(name).unit}{spread}"


def _document(layout: Layout, entry: store.Entry) -> dict[str, object]:
    place, one = layout.relative(entry.path), entry.record
    if one is None:
        return {"path": place, "problem": entry.problem}
    medians = {name: metrics.median(one.values(name)) for name in one.metrics}
    said = {"path": place, "kind": one.kind, "label": one.label, "tree": one.source.tree, "time": one.time, "machine": one.machine.name, "model": one.model}
    return said | {"starts": len(one.starts), "repeat": one.repeat, "medians": medians}
