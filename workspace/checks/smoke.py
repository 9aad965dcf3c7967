"""The door of the smoke: `python -m workspace.smoke`, run by `nox -s smoke` with the tool
environment's Python.
"""

import io
import os
import shlex
import time
from pathlib import Path

from workspace.checks.registry import REGISTRY, Check, Level
from workspace.core import lock
from workspace.core.console import Console, State
from workspace.core.errors import CheckoutError, SettingsError, SmokeError
from workspace.core.files import write_atomic
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.repo.git import Git, repository

# Warm on two cores: 4 s and 16 s. With a cold page cache and kernels compiled at the first start, a
# start alone has taken 123 s.
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
    """Judge the built tree, print table and record, keep the record. Raises SmokeError when a check
    failed or nothing is built.
    """
    from workspace.checks import registry, smoke_suite
    from workspace.install import plan
    from workspace.install.status import require_built
    from workspace.machine import check, hardware

    started = time.monotonic()
    observed = require_built(layout, settings)
    check.require(layout, settings, console=console, device=observed.device)
    expected = smoke_suite.expect(layout, observed)
    options = smoke_suite.SmokeOptions(level, model, timeout_s, is_fail_fast)
    # What is judged must not change meanwhile.
    with (
        lock.hold(layout.lock, verb="nox -s smoke") as held,
        RunLog(console, layout.logs, verb="smoke", secrets=settings.secrets, held=held) as run_log,
    ):
        tree = registry.tree_of(layout, observed)
        checks, parity = smoke_suite.run(
            layout,
            settings,
            expected,
            options,
            run_log=run_log,
            look=lambda: registry.tree_of(layout, plan.observe(layout, settings)),
        )
        document = registry.compose(
            checks,
            level=level,
            tree=tree,
            machine=hardware.observe(settings),
            parity=parity,
            seconds=time.monotonic() - started,
        )
        text = registry.encode(document)
        write_atomic(layout.smoke_record, f"{text}\n".encode())
        console.data(text)
        if json_file:
            write_atomic(json_file, f"{text}\n".encode())
        judge(checks, log=layout.relative(run_log.path) if run_log.path else None)
    console.info(f"smoke passed in {time.monotonic() - started:.1f} s")


def judge(checks: tuple[Check, ...], *, log: str | None) -> None:
    """Raise SmokeError with one line for each failed check, and the way on from the most telling
    one.
    """
    failed = [check for check in checks if check.verdict == "fail"]
    if failed:
        hint = next(
            entry.hint
            for name, entry in REGISTRY.items()
            if any(check.identifier == name for check in failed)
        )
        message = (
            f"{len(failed)} of {len(checks)} checks failed:"
            f" {', '.join(check.identifier for check in failed)}"
        )
        lines = tuple(f"{check.identifier}: {check.evidence}" for check in failed)
        raise SmokeError(message, hint=hint, details=(*lines, *((f"log: {log}",) if log else ())))


HOOK = "pre-push"
KEPT = "pre-push.before-workspace"
_MARK = "# Put here by `inv hook`; `inv hook --remove` takes it out."
# git's own variables would lead whatever looks at the other repository to this one.
_SCRIPT = f"""#!/bin/sh
{_MARK}
kept=$(dirname "$0")/{KEPT}
if [ -x "$kept" ]; then
    "$kept" "$@" || exit $?
fi
unset $(git rev-parse --local-env-vars)
if ! cd {{root}} 2>/dev/null; then
    echo "error: the workspace of this hook is no longer at "{{root}} >&2
    echo "hint: ./scripts/inv hook    in its new place, or: rm $0" >&2
    exit 1
fi
exec ./scripts/inv hook --run </dev/null
"""


def install_hook(layout: Layout, *, console: Console) -> None:
    """Put the gate into both repositories; twice is as good as once. Raises SettingsError where git
    takes hooks from a folder that others use too.
    """
    for name, git in _repositories(layout, console):
        folder, is_own = repository.hooks_folder(git)
        if not is_own:
            raise SettingsError(
                f"git takes the hooks of {name} from {folder} (core.hooksPath), which is not this"
                " repository's alone; nothing was put there",
                hint=(
                    f"call this from {folder / HOOK}: cd {shlex.quote(str(layout.root))} &&"
                    " ./scripts/inv hook --run"
                ),
            )
        console.row(*_put(name, folder, _SCRIPT.format(root=shlex.quote(str(layout.root)))))


def remove_hook(layout: Layout, *, console: Console) -> None:
    """Take the gate out, and let what was there before take its place again."""
    for name, git in _repositories(layout, console):
        hook, kept = (repository.hooks_folder(git)[0] / one for one in (HOOK, KEPT))
        if not _is_ours(hook):
            console.row("skipped", name, "it has no gate of ours")
        elif os.path.lexists(kept):
            kept.replace(hook)
            console.row("done", name, "the gate is gone, the hook from before is back")
        else:
            hook.unlink()
            console.row("done", name, "the gate is gone")


def run_hook(layout: Layout, settings: Settings, *, console: Console) -> None:
    """Let a push through, or raise what says why not: PatchDrift, SmokeError and what lies before
    them. A smoke runs where none has passed on this.
    """
    from workspace.checks import registry
    from workspace.install.status import require_built
    from workspace.repo import patching

    for project, tree in (("vllm", layout.vllm), ("triton", layout.triton)):
        if project == "vllm" or (tree / ".git").exists():
            patching.export(
                layout,
                settings,
                project,
                console=Console(out=io.StringIO(), err=io.StringIO()),
                wait=False,
                check=True,
            )
    observed = require_built(layout, settings)
    if registry.is_of(registry.last_record(layout), registry.tree_of(layout, observed)):
        console.info("the smoke has passed on this tree and build")
        return
    console.info("nothing has passed on this tree and build yet: nox -s smoke")
    smoke(layout, settings, console=Console(out=io.StringIO()), json_file=None, timeout_s=TIMEOUT_S)


def _repositories(layout: Layout, console: Console) -> list[tuple[str, Git]]:
    found = [
        (name, Git(path))
        for name, path in (("workspace", layout.root), ("vendor/vllm", layout.vllm))
        if (path / ".git").exists()
    ]
    if not found:
        raise CheckoutError(
            "neither this folder nor vendor/vllm is a git repository",
            hint="git clone gives one; then ./scripts/inv bootstrap",
        )
    if len(found) == 1:
        console.row(
            "missing",
            "vendor/vllm",
            "there is no checkout yet: ./scripts/inv bootstrap, then this again",
        )
    return found


def _put(name: str, folder: Path, script: str) -> tuple[State, str, str]:
    hook, kept = folder / HOOK, folder / KEPT
    said = "the gate stands before each push"
    if _is_ours(hook):
        if hook.read_text(encoding="utf-8") == script and os.access(hook, os.X_OK):
            return "ok", name, said
    elif os.path.lexists(hook):
        if os.path.lexists(kept):
            raise SettingsError(
                f"{kept} is in the way: a hook of yours would take its place",
                hint=f"mv {shlex.quote(str(kept))} elsewhere, and this again",
            )
        # A second name first: there is no moment without a hook.
        os.link(hook, kept, follow_symlinks=False)
        said = f"{said}; yours is {KEPT} and goes first"
    folder.mkdir(exist_ok=True)
    write_atomic(hook, script.encode(), mode=0o755)
    return "done", name, said


def _is_ours(hook: Path) -> bool:
    try:
        return (
            not hook.is_symlink()
            and _MARK in hook.read_text(encoding="utf-8", errors="replace").splitlines()[:2]
        )
    except OSError:
        return False
