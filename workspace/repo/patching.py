"""The verbs on a patch stack, each under the workspace's lock and with a log of its own; the work
itself is below, in source/.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.core import lock
from workspace.core.console import Console
from workspace.core.errors import (
    CheckoutError,
    PatchConflict,
    PatchDrift,
    SettingsError,
    SourceError,
)
from workspace.core.log import RunLog
from workspace.core.paths import PROJECTS, Layout
from workspace.core.settings import Settings
from workspace.repo import checkout, mail, moves, pins
from workspace.repo import checkout as checkouts
from workspace.repo.checkout import Checkout, Kind
from workspace.repo.git import AM_BY_HAND, Git, am, remotes, worktree
from workspace.repo.git import am as mails
from workspace.repo.git.am import Commit
from workspace.repo.patches import Stack, State
from workspace.repo.pins import Pin


def put_on_upstream(
    layout: Layout,
    project: str,
    pin: Pin,
    settings: Settings,
    name: str,
    patch: str,
    *,
    run_log: RunLog,
) -> Path:
    """Make branch `name` with one patch, signed off by the user and without Upstream-Status, and
    return its working tree.

    Raises SettingsError for a name, a patch or an identity that cannot be used; CheckoutError where
    the branch is there already; SourceError where upstream's main cannot be had; PatchConflict and
    PatchDrift where the patch does not apply or is upstream. Nothing is left then.
    """
    git = Git(checkouts.folder_of(layout, pin))
    shown, path = layout.relative(git.path), layout.state / "branches" / name
    found = checkouts.observe(layout, pin)
    if found.kind not in (Kind.GIT, Kind.RELEASE):
        raise CheckoutError(
            f"{shown} is {found.detail}; a branch needs the checkout of {pin.tag}",
            hint="./scripts/inv bootstrap",
        )
    file = _patch(layout, project, patch)
    user = _user(git)
    _refuse_taken(layout, git, name, path, shown)
    main = _main(layout, pin, settings, git, run_log)
    try:
        with run_log.console.step("working tree") as view:
            url = checkouts.url_of(layout, pin, settings)
            source = remotes.Remote(url, settings, run_log, checkouts.shown(view))
            remotes.add_worktree(git, path, main, source)
        commit = _on_main(layout, project, git, main, file)
        message = mail.without_status(commit.message)
        signature = f"Signed-off-by: {user[0]} <{user[1]}>"
        message = (
            message if signature in message.split("\n") else mail.with_trailer(message, signature)
        )
        remotes.create_branch(
            Git(path),
            name,
            mails.recommitted(git, commit, main, message, committer=user),
            run_log=run_log,
        )
    except BaseException:
        worktree.forget(git, path)
        raise
    _report_branch(layout, pin, name, path, shown, run_log)
    return path


def _patch(layout: Layout, project: str, patch: str) -> Path:
    folder = layout.patches(project)
    file = folder / f"{Path(patch).name.removesuffix('.patch')}.patch"
    if not file.is_file():
        known = ", ".join(sorted(path.name for path in folder.glob("*.patch")))
        raise SettingsError(
            f"{layout.relative(file)} is not there",
            hint=f"one of: {known}" if known else "./scripts/inv patch.export",
        )
    return file


def _user(git: Git) -> tuple[str, str]:
    """Name and address by the user's own configuration."""
    found = am.user(git)
    if not found:
        raise SettingsError(
            "git does not know your name and address, which a Signed-off-by needs",
            hint=(
                'git config --global user.name "Your Name" && git config --global user.email'
                " you@example.org"
            ),
        )
    return found["GIT_AUTHOR_NAME"], found["GIT_AUTHOR_EMAIL"]


def _refuse_taken(layout: Layout, git: Git, name: str, path: Path, shown: str) -> None:
    if not remotes.is_branch_name(git, name):
        raise SettingsError(
            f"{name!r} is no name for a branch",
            hint="letters, digits, - and / between words, as in fix/avx2-kernels",
        )
    if git.resolve(f"refs/heads/{name}"):
        raise CheckoutError(
            f"{shown} has a branch {name} already; it was left as it is",
            hint=f"take another name, or: git -C {shown} branch -D {name}",
        )
    if path.exists():
        raise CheckoutError(
            f"{layout.relative(path)} is there already; it was left as it is",
            hint=f"take another name, or: git -C {shown} worktree remove {path}",
        )


def _main(layout: Layout, pin: Pin, settings: Settings, git: Git, run_log: RunLog) -> str:
    """The commit of upstream's main: as it is now, or as it was fetched last."""
    url = checkouts.url_of(layout, pin, settings)
    known = git.resolve(remotes.UPSTREAM)
    try:
        with run_log.console.step("main") as view:
            remotes.fetch_main(git, remotes.Remote(url, settings, run_log, checkouts.shown(view)))
    except SourceError as exc:
        if known is None:
            raise
        run_log.console.warn(
            f"{exc.message}; going on from {remotes.UPSTREAM} as it was fetched last, {known[:12]}"
        )
        return known
    fetched = git.resolve(remotes.UPSTREAM)
    if fetched is None:
        raise SourceError(
            f"upstream of {pin.name} has no branch main", hint="git ls-remote --heads " + pin.url
        )
    return fetched


def _on_main(layout: Layout, project: str, git: Git, main: str, file: Path) -> Commit:
    done = am.applied(git, main, [file], place=layout.state / f"{project}-stack")
    if done.tip is None:
        raise PatchConflict(
            f"{file.name} conflicts ({', '.join(done.conflicted)}) with upstream's main,"
            f" {main[:12]}; nothing was left behind",
            hint=(
                f"by hand: git -C vendor/{project} worktree add -b NAME FOLDER {main[:12]}, then"
                f" there: git {AM_BY_HAND} {file}"
            ),
            details=tuple(f"conflict in {path}" for path in done.conflicted),
        )
    made = mails.commits(git, main, done.tip)
    if len(made) != 1:
        raise PatchDrift(
            f"{file.name} is upstreamed: it changes nothing on upstream's main, {main[:12]}",
            hint="inv pin.forecast main",
        )
    return made[0]


def _report_branch(
    layout: Layout, pin: Pin, name: str, path: Path, shown: str, run_log: RunLog
) -> None:
    place = layout.relative(path)
    repository = pin.url.rstrip("/").rpartition("/")[2].removesuffix(".git")
    info = run_log.console.info
    info(f"branch {name} stands in {place}, signed off, one commit on upstream's main")
    info(
        f"next: git -C {place} push git@github.com:YOUR-NAME/{repository}.git {name}    and open a"
        " pull request from there"
    )
    info(
        f"when it is done with: git -C {shown} worktree remove {path} && git -C {shown} branch -D"
        f" {name}"
    )


@dataclass(frozen=True)
class Opened:
    """A stack that may be changed now."""

    pin: Pin
    checkout: Checkout
    run_log: RunLog


def apply(
    layout: Layout, settings: Settings, project: str, *, console: Console, wait: bool
) -> None:
    """Put the series on the pin; stop in the checkout at the first conflict. Raises what
    patches.apply raises.
    """
    from workspace.repo import patches

    with _opened(layout, settings, project, "inv patch.apply", console, wait=wait) as found:
        before = found.checkout.head
        stack = patches.apply(
            layout, project, found.pin, found.checkout, run_log=found.run_log, stop_at_conflict=True
        )
        checkout.protect(layout)
        _report(console, stack, "nothing to do: " if stack.head == before else "")


def unapply(
    layout: Layout, settings: Settings, project: str, *, console: Console, wait: bool
) -> None:
    """Go back to the pin; the commits stay under refs/patches. Raises what patches.unapply
    raises.
    """
    from workspace.repo import patches

    with _opened(layout, settings, project, "inv patch.unapply", console, wait=wait) as found:
        before = found.checkout.head
        stack = patches.unapply(layout, project, found.pin, found.checkout, run_log=found.run_log)
        checkout.protect(layout)
        _report(console, stack, "nothing to do: " if stack.head == before else "")


def export(
    layout: Layout,
    settings: Settings,
    project: str,
    *,
    console: Console,
    wait: bool,
    check: bool = False,
) -> None:
    """Write the commits on the pin as patches; with `check` only compare. Raises what export.run
    raises.
    """
    from workspace.repo import export as work

    with _opened(layout, settings, project, "inv patch.export", console, wait=wait) as found:
        work.show(
            work.run(
                layout, project, found.pin, found.checkout, run_log=found.run_log, check=check
            ),
            console=console,
        )


def make_branch(
    layout: Layout,
    settings: Settings,
    project: str,
    name: str,
    patch: str,
    *,
    console: Console,
    wait: bool,
) -> None:
    """Put one patch on upstream's main as a branch of its own. Raises what branch.run raises."""

    with _opened(
        layout, settings, project, "inv patch.export --branch", console, wait=wait
    ) as found:
        put_on_upstream(layout, project, found.pin, settings, name, patch, run_log=found.run_log)


def import_(
    layout: Layout, settings: Settings, project: str, origin: str, *, console: Console, wait: bool
) -> None:
    """Import a file, an address or the number of a pull request. Raises what importing.run
    raises.
    """
    from workspace.repo import importing

    with _opened(layout, settings, project, "inv patch.import", console, wait=wait) as found:
        importing.run(
            layout, project, found.pin, found.checkout, settings, origin, run_log=found.run_log
        )


def resume(
    layout: Layout,
    settings: Settings,
    project: str,
    how: Literal["continue", "skip", "abort"],
    *,
    console: Console,
    wait: bool,
) -> None:
    """Continue, skip or abort what git waits for in the checkout."""
    from workspace.repo import overview

    with _opened(layout, settings, project, "inv patch.continue", console, wait=wait) as found:
        _report(
            console,
            overview.resume(
                layout, project, found.pin, found.checkout, how=how, run_log=found.run_log
            ),
            "",
        )


@contextlib.contextmanager
def _opened(
    layout: Layout, settings: Settings, project: str, verb: str, console: Console, *, wait: bool
) -> Iterator[Opened]:
    if project not in PROJECTS:
        raise SettingsError(
            f"there is no project {project}, only {' and '.join(PROJECTS)}",
            hint="inv --help patch.apply",
        )
    pins.require_settled(layout)
    pinned = pins.load(layout.pins)
    pin = pinned.triton if project == "triton" else pinned.vllm
    with (
        lock.hold(layout.lock, verb=verb, wait=wait, on_wait=console.info) as held,
        RunLog(
            console, layout.logs, verb=verb.split()[1], secrets=settings.secrets, held=held
        ) as run_log,
    ):
        if moves.is_begun(layout, project):
            moves.finish(layout, project, Git(checkout.folder_of(layout, pin)), run_log=run_log)
        yield Opened(pin, checkout.observe(layout, pin), run_log)


def _report(console: Console, stack: Stack, prefix: str) -> None:
    count = f"{len(stack.names)} {'patch' if len(stack.names) == 1 else 'patches'}"
    words = {
        State.APPLIED: f"{count} applied, tree {(stack.tree or '')[:12]}",
        State.UNAPPLIED: f"at the pin, {count} not applied; next: ./scripts/inv patch.apply",
        State.UNEXPORTED: "the commits differ from the series; next: ./scripts/inv patch.export",
    }
    console.info(prefix + words.get(stack.state, f"{stack.state.value}; next: ./scripts/inv patch"))
