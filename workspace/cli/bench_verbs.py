"""The verbs of `inv` on records of benchmarks; `nox -s bench` makes them."""

from invoke.context import Context

from workspace.cli import main
from workspace.cli.main import JSON
from workspace.cli.verbs import task
from workspace.core import paths


@task(default=True, name="list", help={"json": JSON})
def bench_list(_: Context, json: bool = False) -> None:
    """List the benchmark records, newest first."""
    from workspace.bench import results

    results.show_records(paths.here(), console=main.console(), as_json=json)


@task(
    name="label",
    positional=["record", "text"],
    help={
        "record": "a record: its label, its file name, or a path",
        "text": "the new label",
    },
)
def bench_label(_: Context, record: str, text: str) -> None:
    """Give a record another label."""
    from workspace.bench import results

    results.relabel(paths.here(), record, text, console=main.console())


@task(
    name="compare",
    positional=["first", "second"],
    iterable=["across"],
    help={
        "first": "a record: its label, its file name, or a path",
        "second": "the record that may be slower",
        "factor": "ignore a change of up to this many percent",
        "across": "compare although this field differs; may be repeated",
        "json": JSON,
    },
)
def bench_compare(
    _: Context,
    first: str,
    second: str,
    factor: str = "5",
    across: list[str] | None = None,
    json: bool = False,
) -> None:
    """Compare two records; fail if the second is slower."""
    from workspace.bench import compare

    console, fields = main.console(), across or ()
    compare.show(
        paths.here(), first, second, factor=factor, across=fields, console=console, as_json=json
    )


@task(
    name="report",
    help={
        "first": "a record to compare with (default: the newest two)",
        "second": "the record that may be slower",
    },
)
def bench_report(_: Context, first: str = "", second: str = "") -> None:
    """Draw all records: one HTML page and PNG plots."""
    from workspace.bench import report as verb

    verb.write(paths.here(), first, second, console=main.console())
