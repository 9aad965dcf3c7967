"""The door of upstream's tests: `python -m workspace.upstream`, run by `nox -s upstream` with the tool environment's Python."""

import time
from pathlib import Path

from workspace.core import lock
from workspace.core.console import Console
from workspace.core.errors import SmokeError
from workspace.core.files import write_atomic
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.upstream import suite

RECORD = "upstream.json"
_CHOOSE = "./scripts/nox -s upstream -- --all-of vllm/sampling_params.py    runs what a file, or a folder, would reach; --all-of tests/config runs these"


def upstream(layout: Layout, settings: Settings, asked: suite.Asked, *, console: Console, json_file: Path | None, is_list: bool) -> None:
    """Run vLLM's own tests that the change reaches; print and keep the record. Raises SmokeError where one fails, or nothing is built."""
    from workspace.build import plan
    from workspace.build.status import require_built
    from workspace.environment import check, machine
    from workspace.smoke import record as smoke_record
    from workspace.upstream import reach, record

    started, known = time.monotonic(), reach.rules()
    observed = plan.observe(layout, settings) if is_list else require_built(layout, settings)
    if not is_list:
        check.require(layout, settings, console=console, device=observed.device)
    selection = suite.select(layout, observed, asked, known)
    if not selection.chosen and not selection.reach.tests:
        console.say(f"vendor/vllm is as {observed.pin.tag} is: there is no change that a test could reach\n{_CHOOSE}")
        return
    if is_list:
        suite.show(selection, console)
        return
    for one in selection.reach.unreached:
        console.row("skipped", one.path.ljust(suite.NAME_WIDTH), f"reaches no test: {one.why}")
    if not selection.reach.tests:
        console.say(f"what was changed reaches none of upstream's tests; ./scripts/nox -s smoke judges what they do not\n{_CHOOSE}")
        return
    # What is judged must not change meanwhile.
    with lock.hold(layout.lock, verb="nox -s upstream") as held, Journal(console, layout.logs, verb="upstream", secrets=settings.secrets, held=held) as journal:
        tree = smoke_record.tree(layout, observed)
        result = suite.run(layout, settings, observed, selection, asked, known, journal=journal)
        if smoke_record.tree(layout, plan.observe(layout, settings)) != tree:
            raise SmokeError("vendor/vllm was changed while it was judged", hint="./scripts/nox -s upstream")
        seconds = time.monotonic() - started
        text = smoke_record.encode(record.compose(result, selection, observed, tree=tree, machine=machine.observe(settings), seconds=seconds))
        write_atomic(layout.state / RECORD, f"{text}\n".encode())
        console.data(text)
        if json_file:
            write_atomic(json_file, f"{text}\n".encode())
        suite.judge(result, log=layout.relative(journal.path) if journal.path else None)
    console.say(f"{result.said} in {time.monotonic() - started:.1f} s")
