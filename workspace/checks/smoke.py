"""The smoke as a verb: run the checks on the built tree, print and keep the record.

It also has the pre-push gate of `inv hook`, which requires a passed smoke and, with --lint, vLLM's
own pre-commit.
"""

import functools
import hashlib
import io
import json
import math
import os
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from workspace.checks import registry, smoke_suite
from workspace.checks.registry import DIFFERS, REGISTRY, Check, Expected, verdict
from workspace.checks.smoke_suite import SmokeOptions
from workspace.core import hints, lock, process, records
from workspace.core.console import Console, Row, State
from workspace.core.errors import (
    CheckoutError,
    SettingsError,
    SmokeError,
    ToolchainError,
    WorkspaceError,
    counted,
    listed,
)
from workspace.core.files import write_atomic
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import plan, stages
from workspace.machine.machine import Machine
from workspace.repo.git import Git, repository

HOOK = "pre-push"
KEPT = "pre-push.before-workspace"
# Existing hooks are recognised by this line, so its text stays.
_MARKER_LINE = "# Put here by `inv hook`; `inv hook --remove` takes it out."
# git's own variables would make each program use the wrong repository.
_SCRIPT = f"""#!/bin/sh
{_MARKER_LINE}
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
exec ./scripts/inv hook --run{{flags}} </dev/null
"""

# The checks of upstream's own pull requests, and the states of those that found nothing.
LINT_CONFIG = ".pre-commit-config.yaml"
_FOUND_NOTHING = ("Passed", "Skipped")
# Where new files count as changes (repository.differing).
LINTED = ("vllm", "tests", "csrc", "cmake", "docs", "examples", "benchmarks", "tools")
SHOWN_LINES = 60

SCHEMA = 2
# The parts of the parity probe's document that are worth comparing between days; it omits the
# tokens.
_MEASURES = ("models", "consistency", "device", "gpu", "seconds", "compilation", "steps")


@dataclass(frozen=True)
class Tree:
    """The content of vendor/vllm: its git tree, and a digest of edits, None without edits.

    `built` is one digest of everything that was stamped.
    """

    pin: str
    commit: str | None
    oid: str | None
    dirty: str | None
    built: str | None = None


def expect(observed: plan.Observation) -> Expected:
    """Read from the stamp what `.vllm` has. Raises SmokeError if it lacks torch or a version."""
    stamped = observed.kernels.recorded
    version = stamped.outcome.get("version") if stamped else None
    if stamped is None or version is None or observed.torch is None:
        raise SmokeError("the stamp of the build is incomplete", hint=hints.text("inv.bootstrap"))
    torch, _, cuda = stamped.inputs.get(
        "torch", f"{observed.torch.version} CUDA {observed.torch.cuda or 'none'}"
    ).partition(" CUDA ")
    libraries = {library.path: (library.size, library.sha256) for library in stamped.libraries}
    return Expected(
        observed.machine.layout.vllm.resolve(),
        version,
        torch,
        observed.device,
        libraries,
        None if cuda in ("", "none") else cuda,
        # Any build of torch may bring it, also one of the user's own beside CPU kernels.
        observed.machine.packages().get("triton"),
    )


def smoke(
    layout: Layout,
    settings: Settings,
    options: SmokeOptions,
    *,
    console: Console,
    json_file: Path | None = None,
) -> None:
    """Run the checks on the built tree; print and keep the record.

    Raises SmokeError if a check fails or nothing is built, ToolchainError where it cannot run.
    """
    from workspace.install.status import require_runnable
    from workspace.machine import check

    started = time.monotonic()
    observed = require_runnable(Machine(layout, settings))
    check.require(observed.machine, console=console, device=observed.device)
    expected = expect(observed)
    look = functools.partial(_present_tree, layout, settings)
    # The tree must not change while the checks run.
    with stages.locked(layout, settings, "nox -s smoke", console=console) as run_log:
        tree = tree_of(layout, observed)
        checks, parity = smoke_suite.run(
            observed.machine, expected, options, run_log=run_log, look=look
        )
        document = compose(
            checks,
            level=options.level,
            tree=tree,
            machine=observed.machine.record(),
            parity=parity,
            seconds=time.monotonic() - started,
        )
        write_record(layout.smoke_record, document, console=console, json_file=json_file)
        if names := registry.unlisted(layout.vllm):
            text = f"checks/coverage.toml does not list {', '.join(names)}"
            console.rows([Row(State.WARN, "coverage", text)])
        require_passed(
            checks,
            log=layout.relative(run_log.path) if run_log.path else None,
            has_patches=bool(observed.stack and observed.stack.names),
        )
    console.info(f"smoke passed in {time.monotonic() - started:.1f} s")


def tree_of(layout: Layout, observed: plan.Observation) -> Tree:
    """Name the sources under test; edited files count with their present content."""
    stack = observed.stack
    return Tree(
        observed.pin.tag,
        stack.head if stack else None,
        stack.tree if stack else None,
        plan.edits_digest(layout, stack),
        _built(observed),
    )


def is_record_of(record: Mapping[str, object], now: Tree) -> bool:
    """Return whether a record is of a smoke that passed on this tree, edits and build."""
    return (
        record.get("verdict") == "pass"
        and now.oid is not None
        and all(
            record.get(name) == text
            for name, text in (("tree", now.oid), ("dirty", now.dirty), ("built", now.built))
        )
    )


def _built(observed: plan.Observation) -> str:
    stamps = [
        asdict(layer.recorded) if layer.recorded else None
        for layer in (observed.environment, observed.kernels)
    ]
    # Build time and number of jobs do not describe what was built.
    names = ("inputs", "kernels", "packages", "libraries")
    parts = [{name: stamp[name] for name in names} if stamp else None for stamp in stamps]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def compose(
    checks: Sequence[Check],
    *,
    level: str,
    tree: Tree,
    machine: Mapping[str, object],
    parity: Mapping[str, object],
    seconds: float,
) -> dict[str, object]:
    """Return the record as a document. Times are UTC, durations seconds, differences nats."""
    torch = parity.get("torch")
    vllm = parity.get("vllm")
    return {
        "schema": SCHEMA,
        "time": records.utc_now(),
        "verdict": verdict(checks),
        "level": level,
        "pin": tree.pin,
        "commit": tree.commit,
        "tree": tree.oid,
        "dirty": tree.dirty,
        "built": tree.built,
        "checks": [_row(check) for check in checks],
        "versions": {
            "vllm": vllm.get("version") if isinstance(vllm, dict) else None,
            "torch": torch.get("version") if isinstance(torch, dict) else None,
            "cuda": torch.get("cuda") if isinstance(torch, dict) else None,
            "triton": parity.get("triton"),
            "transformers": parity.get("transformers"),
            "python": parity.get("python"),
        },
        "parity": {name: _writable(parity[name]) for name in _MEASURES if name in parity},
        "seconds": round(seconds, 2),
        "machine": machine,
    }


def _writable(measured: object) -> object:
    """Replace numbers that JSON lacks, NaN and infinity, by null."""
    if isinstance(measured, dict):
        return {name: _writable(part) for name, part in measured.items()}
    return None if isinstance(measured, float) and not math.isfinite(measured) else measured


def _row(check: Check) -> dict[str, object]:
    row: dict[str, object] = {
        "id": check.identifier,
        "meaning": check.meaning,
        "verdict": check.verdict,
        "evidence": check.evidence,
        "seconds": round(check.seconds, 2),
    }
    return row | ({"problems": list(check.problems)} if check.problems else {})


def encode(record: Mapping[str, object]) -> str:
    """Return a record as JSON text."""
    return json.dumps(record, indent=1, allow_nan=False)


def write_record(
    path: Path, record: Mapping[str, object], *, console: Console, json_file: Path | None
) -> None:
    """Write a record to `path`, and to the file of the user, `-` for stdout."""
    text = encode(record)
    write_atomic(path, f"{text}\n".encode())
    console.record(text, json_file)


def last_record(layout: Layout) -> Mapping[str, object]:
    """Return the record of the last smoke, empty if there is none or it is unreadable."""
    return records.read(layout.smoke_record, dict[str, object]) or {}


def _present_tree(layout: Layout, settings: Settings) -> Tree:
    return tree_of(layout, plan.observe(layout, settings))


def require_passed(
    checks: tuple[Check, ...], *, log: str | None, has_patches: bool = False
) -> None:
    """Raise SmokeError with the failed checks, whose rows were printed, what they point to
    together, and the first one's hint.

    The registry lists causes before their effects.
    """
    failed = [check for check in checks if check.verdict == "fail"]
    if failed:
        first = next(name for name in REGISTRY if any(check.identifier == name for check in failed))
        entry = REGISTRY[first]
        found = registry.pattern(checks)
        is_installed = not any(check.identifier.startswith("provenance.") for check in failed)
        if has_patches and is_installed and entry.hint == DIFFERS:
            found += (f"./scripts/nox -s bisect -- --patches --run {first} finds the patch",)
        message = (
            f"{len(failed)} of {len(checks)} checks failed:"
            f" {', '.join(check.identifier for check in failed)}"
        )
        raise SmokeError(
            message,
            hint=hints.text(entry.hint),
            details=(*found, *((f"log: {log}",) if log else ())),
        )


def install_hook(
    layout: Layout, settings: Settings, *, console: Console, lints: bool = False
) -> None:
    """Install the gate in both repositories; a second call changes nothing.

    With `lints` the gate also runs vLLM's pre-commit. Raises SettingsError if git takes hooks from
    a folder that other repositories share.
    """
    for name, git in _repositories(layout, console):
        folder, is_own = repository.hooks_folder(git)
        if not is_own:
            raise SettingsError(
                f"git takes the hooks of {name} from {folder} (core.hooksPath), which other"
                " repositories may share; no hook was installed",
                hint=hints.text("checks.call_hook", hook=folder / HOOK, root=layout.root),
            )
        flags = " --lint" if lints else ""
        script = _SCRIPT.format(root=shlex.quote(str(layout.root)), flags=flags)
        console.row(*_install(name, folder, script, lints=lints))
    if lints and not _pre_commit(layout, settings):
        console.rows([_without_pre_commit()])


def remove_hook(layout: Layout, *, console: Console) -> None:
    """Remove the gate and restore the hook that was there before."""
    for name, git in _repositories(layout, console):
        hook, kept = (repository.hooks_folder(git)[0] / file for file in (HOOK, KEPT))
        if not _is_ours(hook):
            console.row(State.SKIPPED, name, "it has no gate")
        elif os.path.lexists(kept):
            kept.replace(hook)
            console.row(State.DONE, name, "the gate is removed, your former hook is restored")
        else:
            hook.unlink()
            console.row(State.DONE, name, "the gate is removed")


def run_hook(layout: Layout, settings: Settings, *, console: Console, lints: bool = False) -> None:
    """Let a push pass, or raise the reason against it: PatchDrift, SmokeError or an earlier error.

    With `lints` vLLM's pre-commit runs first. A smoke runs if none has passed on this tree and
    build.
    """
    from workspace.install.status import require_built
    from workspace.repo import export, patching

    for project, tree in (("vllm", layout.vllm), ("triton", layout.triton)):
        if project == "vllm" or (tree / ".git").exists():
            done = patching.export(
                layout,
                settings,
                project,
                console=Console(out=io.StringIO(), err=io.StringIO()),
                wait=False,
                check=True,
            )
            export.show_unpatched(done, console=console)
    observed = require_built(Machine(layout, settings))
    if lints and observed.checkout.base:
        lint(layout, settings, observed.checkout.base, console=console)
    if is_record_of(last_record(layout), tree_of(layout, observed)):
        console.info("the smoke has passed on this tree and build")
        return
    console.info("no smoke has passed on this tree and build yet; nox -s smoke runs now")
    smoke(layout, settings, SmokeOptions(), console=console)


def lint(layout: Layout, settings: Settings, base: str, *, console: Console) -> None:
    """Run vLLM's own pre-commit on the files of vendor/vllm that differ from `base`.

    Some of its checks correct the files. A row reports that pre-commit is not installed. Raises
    ToolchainError where pre-commit or a check of it cannot run, WorkspaceError where a check fails.
    """
    program = _pre_commit(layout, settings)
    if program is None:
        console.rows([_without_pre_commit()])
        return
    with (
        lock.hold(layout.lock, verb="inv hook --run --lint"),
        console.step("pre-commit") as view,
    ):
        differing = repository.differing(
            Git(layout.vllm), base, new_below=LINTED, is_wanted=lambda path: True
        )
        contents = {
            path: path.read_bytes()
            for path in map(layout.vllm.joinpath, differing)
            if path.is_file()
        }
        if not contents or not (layout.vllm / LINT_CONFIG).is_file():
            view.skip("no file differs from the pin" if not contents else f"no {LINT_CONFIG}")
            return
        names = [str(path.relative_to(layout.vllm)) for path in contents]
        _run_pre_commit(layout, settings, [program, "validate-config", LINT_CONFIG], broken=(1,))
        lines = _run_pre_commit(
            layout, settings, [program, "run", "--color=never", "--files", *names]
        )
        # pre-commit sees by git what its checks corrected, and git sees no new file.
        fixed = [
            name
            for name, path in zip(names, contents, strict=True)
            if not path.is_file() or path.read_bytes() != contents[path]
        ]
        if lines or fixed:
            more = f"; it changed {listed(fixed)}" if fixed else ""
            raise WorkspaceError(
                f"vLLM's pre-commit fails on {counted(len(names), 'file')} of the change{more}",
                hint=hints.text("checks.lint_again"),
                details=lines,
            )
        view.reason = f"{counted(len(names), 'file')} of the change"


def _run_pre_commit(
    layout: Layout, settings: Settings, argv: Sequence[str], *, broken: Sequence[int] = ()
) -> tuple[str, ...]:
    """Return what failed, none if it passed. Raises ToolchainError where pre-commit cannot run:
    its exit code is neither 0 nor 1, or one of `broken` (pre_commit/error_handler.py).
    """
    done = process.capture(argv, env=settings.child_environment("plain"), cwd=layout.vllm)
    if done.returncode == 0:
        return ()
    output = f"{done.stdout}\n{done.stderr}".splitlines()
    lines = [line for line in output if line.strip() and not line.endswith(_FOUND_NOTHING)]
    shown = tuple(lines[-SHOWN_LINES:])
    if done.returncode != 1 or done.returncode in broken:
        raise ToolchainError(
            f"vLLM's pre-commit cannot run: {argv[0]} {process.describe_status(done.returncode)}",
            hint=hints.text("checks.without_lint"),
            details=shown,
        )
    return shown or ("no message",)


def _pre_commit(layout: Layout, settings: Settings) -> str | None:
    """Return the program on the user's PATH, else that of the built environment, if any."""
    path = settings.child_environment("plain").get("PATH", "")
    return shutil.which("pre-commit", path=f"{path}{os.pathsep}{layout.environment / 'bin'}")


def _without_pre_commit() -> Row:
    text = "it is not installed, so a push is not checked by vLLM's own rules"
    return Row(State.WARN, "pre-commit", text, hint=hints.text("checks.install_pre_commit"))


def _repositories(layout: Layout, console: Console) -> list[tuple[str, Git]]:
    found = [
        (name, Git(path))
        for name, path in (("workspace", layout.root), ("vendor/vllm", layout.vllm))
        if (path / ".git").exists()
    ]
    if not found:
        raise CheckoutError(
            "neither this folder nor vendor/vllm is a git repository",
            hint=hints.text("checks.clone_first"),
        )
    if len(found) == 1:
        hint = hints.text("checks.bootstrap_then_hook")
        console.rows([Row(State.MISSING, "vendor/vllm", "there is no checkout yet", hint=hint)])
    return found


def _install(name: str, folder: Path, script: str, *, lints: bool) -> tuple[State, str, str]:
    hook, kept = folder / HOOK, folder / KEPT
    text = f"checks {'lint, ' if lints else ''}patches, build and smoke before each push"
    if _is_ours(hook):
        if hook.read_text(encoding="utf-8") == script and os.access(hook, os.X_OK):
            return State.OK, name, text
    elif os.path.lexists(hook):
        if os.path.lexists(kept):
            raise SettingsError(
                f"your hook cannot be kept as {kept}: that file exists",
                hint=hints.text("checks.compare_hooks", kept=kept, hook=hook),
            )
        # Link before replacing: the repository never lacks a hook.
        os.link(hook, kept, follow_symlinks=False)
        text = f"{text}; yours is {KEPT} and runs first"
    folder.mkdir(exist_ok=True)
    write_atomic(hook, script.encode(), mode=0o755)
    return State.DONE, name, text


def _is_ours(hook: Path) -> bool:
    """Return whether the file is a hook that `inv hook` wrote."""
    try:
        return (
            not hook.is_symlink()
            and _MARKER_LINE in hook.read_text(encoding="utf-8", errors="replace").splitlines()[:2]
        )
    except OSError:
        return False
