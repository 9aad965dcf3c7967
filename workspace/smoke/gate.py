"""The door of the smoke: `python -m workspace.smoke`, run by `nox -s smoke` with the tool environment's Python."""

import time
from pathlib import Path

from workspace.core import lock
from workspace.core.console import Console
from workspace.core.errors import SmokeError
from workspace.core.files import write_atomic
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.smoke.catalogue import CATALOGUE, Level
from workspace.smoke.checks import Check

# Warm on two cores: 4 s and 16 s. With a cold page cache and kernels compiled at the first start, a start alone has taken 123 s.
TIMEOUT_S = 600.0


def smoke(
    layout: Layout,
    settings: Settings,
    *,
    console: Console,
    json_file: Path | None,
    timeout_s: float,
    level: Level = "quick",
    model: str = "tiny",
    is_fail_fast: bool = False,
) -> None:
    """Judge the built tree, print table and record, keep the record. Raises SmokeError when a check failed or nothing is built."""
    from workspace.build import plan
    from workspace.build.status import require_built
    from workspace.environment import check, machine
    from workspace.smoke import record, suite

    started = time.monotonic()
    observed = require_built(layout, settings)
    check.require(layout, settings, console=console, device=observed.device)
    expected = suite.expect(layout, observed)
    asked = suite.Asked(level, model, timeout_s, is_fail_fast)
    # What is judged must not change meanwhile.
    with lock.hold(layout.lock, verb="nox -s smoke") as held, Journal(console, layout.logs, verb="smoke", secrets=settings.secrets, held=held) as journal:
        tree = record.tree(layout, observed)
        checks, parity = suite.run(layout, settings, expected, asked, journal=journal, look=lambda: record.tree(layout, plan.observe(layout, settings)))
        document = record.compose(
            checks,
            level=level,
            tree=tree,
            machine=machine.observe(settings),
            parity=parity,
            seconds=time.monotonic() - started,
        )
        text = record.encode(document)
        write_atomic(layout.smoke_record, f"{text}\n".encode())
        console.data(text)
        if json_file:
            write_atomic(json_file, f"{text}\n".encode())
        judge(checks, log=layout.relative(journal.path) if journal.path else None)
    console.say(f"smoke passed in {time.monotonic() - started:.1f} s")


def judge(checks: tuple[Check, ...], *, log: str | None) -> None:
    """Raise SmokeError with one line for each failed check, and the way on from the most telling one."""
    failed = [check for check in checks if check.verdict == "fail"]
    if failed:
        hint = next(entry.cure for name, entry in CATALOGUE.items() if any(check.identifier == name for check in failed))
        message = f"{len(failed)} of {len(checks)} checks failed: {', '.join(check.identifier for check in failed)}"
        lines = tuple(f"{check.identifier}: {check.evidence}" for check in failed)
        raise SmokeError(message, hint=hint, details=(*lines, *((f"log: {log}",) if log else ())))
