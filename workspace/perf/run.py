"""The door of perf: `python -m workspace.perf`, run by `nox -s perf` with the tool environment's Python."""

from collections.abc import Sequence
from pathlib import Path

from workspace.core.console import Console
from workspace.core.errors import BuildError, WorkspaceError
from workspace.core.files import write_atomic
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.perf import report
from workspace.perf.ground import Ground
from workspace.perf.measure import compare
from workspace.perf.report import Result
from workspace.perf.rows import Row

RECORD = "perf.json"


def perf(layout: Layout, settings: Settings, rows: Sequence[Row], *, console: Console, pairs: int | None = None, json_file: Path | None = None) -> None:
    """Measure rows, print table and record, keep the record. A missed aim is no failure: machines are noisy.

    Raises BuildError where a row could not be measured, after all others were.
    """
    from workspace.environment import machine
    from workspace.source import scratch

    with scratch.beside(layout.state / "perf") as folder:
        ground = Ground(layout, settings, folder)
        results = [_measure(row, ground, pairs or row.pairs, console) for row in rows]
    for line in report.table(results):
        console.say(line)
    text = report.encode(results, machine.observe(settings))
    for file in (layout.state / RECORD, *([json_file] if json_file else [])):
        write_atomic(file, f"{text}\n".encode())
    console.data(text)
    failed = [result for result in results if result.error]
    if failed and (first := failed[0].error):
        details = tuple(line for result in failed if result.error for line in (*result.error.details, f"{result.row.name}: {result.error}"))
        names = ", ".join(result.row.name for result in failed)
        raise BuildError(f"{len(failed)} of {len(results)} rows could not be measured: {names}: {first.message}", hint=first.hint, details=details)


def _measure(row: Row, ground: Ground, pairs: int, console: Console) -> Result:
    try:
        with console.step(row.name) as view, row.prepare(ground) as (measured, against):
            view.reason = f"{pairs} {'pair' if pairs == 1 else 'pairs'}"
            runs = compare(
                measured, against, pairs=pairs, warm_ups=row.warm_ups, on_run=lambda done, total: view.progress(done, total, f"{done} of {total} runs")
            )
    except WorkspaceError as exc:
        return Result(row, None, exc)
    return Result(row, runs)
