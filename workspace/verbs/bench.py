"""Verbs of the records of benchmarks; `nox -s bench` makes them."""

from invoke.context import Context
from invoke.tasks import task

from workspace import door
from workspace.core import layout
from workspace.verbs.words import JSON


@task(default=True, name="list", help={"json": JSON})
def bench_list(_: Context, json: bool = False) -> None:
    """Show the records of benchmarks, newest first."""
    here = layout.here()
    from workspace.bench import listing

    listing.show(here, console=door.console(), as_json=json)


@task(
    name="compare",
    positional=["first", "second"],
    iterable=["across"],
    help={
        "first": "a record: its label, the name of its file, or a path",
        "second": "the record that may be slower",
        "factor": "a change up to so many per cent does not count",
        "across": "compare although this field differs; may be given again",
        "json": JSON,
    },
)
def bench_compare(_: Context, first: str, second: str, factor: str = "5", across: list[str] | None = None, json: bool = False) -> None:
    """Is the second record slower? A verdict on each metric."""
    here = layout.here()
    from workspace.bench import compare

    compare.show(here, first, second, factor=factor, across=across or (), console=door.console(), as_json=json)


@task(name="report", help={"first": "a record to compare with; without it the newest two", "second": "the record that may be slower"})
def bench_report(_: Context, first: str = "", second: str = "") -> None:
    """Draw all records: one HTML page, and a PNG a plot."""
    here = layout.here()
    from workspace.bench import report as verb

    verb.write(here, first, second, console=door.console())
