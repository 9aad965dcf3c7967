"""`inv hook`: the gate before a push, in the workspace and in vendor/vllm. Patches exported, build fresh, smoke passed on exactly what is there.

A hook of the user's is kept, goes first, and comes back with --remove.
"""

import io
import os
import shlex
from pathlib import Path

from workspace.core.console import Console, State
from workspace.core.errors import CheckoutError, SettingsError
from workspace.core.files import write_atomic
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.source.git import Git, hooks

NAME = "pre-push"
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


def install(layout: Layout, *, console: Console) -> None:
    """Put the gate into both repositories; twice is as good as once. Raises SettingsError where git takes hooks from a folder that others use too."""
    for name, git in _repositories(layout, console):
        folder, is_own = hooks.folder(git)
        if not is_own:
            raise SettingsError(
                f"git takes the hooks of {name} from {folder} (core.hooksPath), which is not this repository's alone; nothing was put there",
                hint=f"call this from {folder / NAME}: cd {shlex.quote(str(layout.root))} && ./scripts/inv hook --run",
            )
        console.row(*_put(name, folder, _SCRIPT.format(root=shlex.quote(str(layout.root)))))


def remove(layout: Layout, *, console: Console) -> None:
    """Take the gate out, and let what was there before take its place again."""
    for name, git in _repositories(layout, console):
        hook, kept = (hooks.folder(git)[0] / one for one in (NAME, KEPT))
        if not _is_ours(hook):
            console.row("skipped", name, "it has no gate of ours")
        elif os.path.lexists(kept):
            kept.replace(hook)
            console.row("done", name, "the gate is gone, the hook from before is back")
        else:
            hook.unlink()
            console.row("done", name, "the gate is gone")


def judge(layout: Layout, settings: Settings, *, console: Console) -> None:
    """Let a push through, or raise what says why not: PatchDrift, SmokeError and what lies before them. A smoke runs where none has passed on this."""
    from workspace.build.status import require_built
    from workspace.pin import patching
    from workspace.smoke import gate, record

    for project, tree in (("vllm", layout.vllm), ("triton", layout.triton)):
        if project == "vllm" or (tree / ".git").exists():
            patching.export(layout, settings, project, console=Console(out=io.StringIO(), err=io.StringIO()), wait=False, check=True)
    observed = require_built(layout, settings)
    if record.is_of(record.last(layout), record.tree(layout, observed)):
        console.say("the smoke has passed on this tree and build")
        return
    console.say("nothing has passed on this tree and build yet: nox -s smoke")
    gate.smoke(layout, settings, console=Console(out=io.StringIO()), json_file=None, timeout_s=gate.TIMEOUT_S)


def _repositories(layout: Layout, console: Console) -> list[tuple[str, Git]]:
    found = [(name, Git(path)) for name, path in (("workspace", layout.root), ("vendor/vllm", layout.vllm)) if (path / ".git").exists()]
    if not found:
        raise CheckoutError("neither this folder nor vendor/vllm is a git repository", hint="git clone gives one; then ./scripts/inv bootstrap")
    if len(found) == 1:
        console.row("missing", "vendor/vllm", "there is no checkout yet: ./scripts/inv bootstrap, then this again")
    return found


def _put(name: str, folder: Path, script: str) -> tuple[State, str, str]:
    hook, kept = folder / NAME, folder / KEPT
    said = "the gate stands before each push"
    if _is_ours(hook):
        if hook.read_text(encoding="utf-8") == script and os.access(hook, os.X_OK):
            return "ok", name, said
    elif os.path.lexists(hook):
        if os.path.lexists(kept):
            raise SettingsError(f"{kept} is in the way: a hook of yours would take its place", hint=f"mv {shlex.quote(str(kept))} elsewhere, and this again")
        # A second name first: there is no moment without a hook.
        os.link(hook, kept, follow_symlinks=False)
        said = f"{said}; yours is {KEPT} and goes first"
    folder.mkdir(exist_ok=True)
    write_atomic(hook, script.encode(), mode=0o755)
    return "done", name, said


def _is_ours(hook: Path) -> bool:
    try:
        return not hook.is_symlink() and _MARK in hook.read_text(encoding="utf-8", errors="replace").splitlines()[:2]
    except OSError:
        return False
