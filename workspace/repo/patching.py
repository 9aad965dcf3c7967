"""The verbs on a patch stack, each under the workspace's lock and with its own run log.

The work itself is in patches, export, importing and overview. A patch as a
branch, and what is read or fetched for an import, are here.
"""

import codecs
import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from workspace.core import hints, lock
from workspace.core.console import Console, RunLog, Step
from workspace.core.errors import (
    CheckoutError,
    PatchConflict,
    PatchDrift,
    SettingsError,
    SourceError,
    counted,
)
from workspace.core.files import read_regular
from workspace.core.paths import Layout, typed
from workspace.core.settings import Settings, without_user
from workspace.repo import checkout as checkouts
from workspace.repo import mail, patches, pins
from workspace.repo.git import AM_BY_HAND, Git, Remote, am, remotes, worktree
from workspace.repo.git.am import Commit
from workspace.repo.patches import ImportOptions, Origin, Session, Stack, State

if TYPE_CHECKING:
    from workspace.repo.export import Export

_GITHUB = re.compile(
    r"(?:https?://|ssh://)?(?:[^/@]*@)?github\.com[:/]([A-Za-z0-9_.-]+)/"
    r"([A-Za-z0-9_-][A-Za-z0-9_.-]*?)(?:\.git)?/?"
)
_ON_GITHUB = re.compile(
    r"(https?://github\.com/[^/]+/[^/]+)/"
    r"(?:pull/\d+/commits/([0-9a-f]{7,40})|(pull/\d+|commit/[0-9a-f]{7,40}))(?:[./?#].*)?"
)
# git, of a remote that answers and lacks the branch.
_NO_REF = "couldn't find remote ref"


def put_on_upstream(session: Session, name: str, patch: str) -> Path:
    """Make branch `name` with one patch on upstream's main, and return its working tree.

    The commit is signed off by the user and has no Upstream-Status. Raises SettingsError for a
    name, a patch or an identity that cannot be used; CheckoutError where the branch exists;
    SourceError where upstream's main cannot be fetched; PatchConflict and PatchDrift where the
    patch does not apply or is upstream. Nothing is left then.
    """
    layout, checkout, run_log = session.layout, session.checkout, session.run_log
    git = Git(checkouts.folder_of(layout, session.pin))
    shown, path = layout.relative(git.path), layout.state / "branches" / name
    if not checkout.kind.is_pinned:
        raise CheckoutError(
            f"{shown} is {checkout.detail}; a branch needs the checkout of {session.pin.tag}",
            hint=hints.text("inv.bootstrap"),
        )
    file = _patch(layout, session.project, patch)
    user = patches.user(git)
    _refuse_taken(layout, git, name, shown, patch)
    main = _main(session, git)
    try:
        with run_log.console.step("working tree") as view:
            remotes.add_worktree(git, path, main, _remote(session, view))
        commit = _on_main(layout, session.project, git, main, file)
        signed = am.recommitted(git, commit, main, _signed(commit, user), committer=user)
        remotes.create_branch(Git(path), name, signed, run_log=run_log)
    except BaseException:
        worktree.forget(git, path)
        raise
    _report_branch(session, name, path, shown)
    return path


def _remote(session: Session, step: Step) -> Remote:
    pin = session.pin.of_upstream
    return checkouts.remote(session.layout, pin, session.settings, session.run_log, step)


def _signed(commit: Commit, user: tuple[str, str]) -> str:
    """Return the commit's message without Upstream-Status, signed off by the user once."""
    message = mail.without_status(commit.message)
    signature = f"Signed-off-by: {user[0]} <{user[1]}>"
    is_signed = signature in message.split("\n")
    return message if is_signed else mail.with_trailer(message, signature)


def _patch(layout: Layout, project: str, patch: str) -> Path:
    folder = layout.patches(project)
    file = folder / f"{Path(patch).name.removesuffix('.patch')}.patch"
    if not file.is_file():
        known = ", ".join(sorted(path.name for path in folder.glob("*.patch")))
        raise SettingsError(
            f"{layout.relative(file)} does not exist",
            hint=hints.text("repo.one_of", folder=layout.relative(folder), patches=known)
            if known
            else hints.text("inv.patch_export"),
        )
    return file


def _refuse_taken(layout: Layout, git: Git, name: str, shown: str, patch: str) -> None:
    if not remotes.is_branch_name(git, name):
        raise SettingsError(
            f"{name!r} is not a valid branch name",
            hint=hints.text("repo.branch_name"),
        )
    folder = layout.state / "branches"

    def is_taken(name: str) -> bool:
        return bool(git.resolve(f"refs/heads/{name}")) or (folder / name).exists()

    if is_taken(name):
        free = next(other for n in itertools.count(2) if not is_taken(other := f"{name}-{n}"))
        where = (
            f"{shown} has a branch {name}"
            if git.resolve(f"refs/heads/{name}")
            else f"{layout.relative(folder / name)} exists"
        )
        raise CheckoutError(
            f"{where} already; it was not changed",
            hint=hints.text("repo.other_branch", branch=free, patch=patch),
        )


def _main(session: Session, git: Git) -> str:
    """Return the commit of upstream's main: fetched now, or offline the last fetched commit."""
    known = git.resolve(remotes.UPSTREAM)
    try:
        with session.run_log.console.step("main") as view:
            wanted = (f"+refs/heads/main:{remotes.UPSTREAM}",)
            git.fetch(_remote(session, view), wanted, whole=False)
    except SourceError as exc:
        if known is None:
            if _NO_REF in exc.message:
                url = _remote(session, view).url
                exc.hint = hints.text("repo.heads", url=without_user(url))
            raise
        session.run_log.console.warn(
            f"{exc.message}; using {remotes.UPSTREAM} as it was fetched last, {known[:12]}"
        )
        return known
    fetched = git.resolve(remotes.UPSTREAM)
    assert fetched, "git fails where the remote has no main"
    return fetched


def _on_main(layout: Layout, project: str, git: Git, main: str, file: Path) -> Commit:
    done = am.applied(git, main, [file], place=layout.state / f"{project}-stack")
    if done.tip is None:
        raise PatchConflict(
            f"{file.name} {done.cause} on upstream's main, {main[:12]}; nothing was left behind",
            hint=hints.text(
                "repo.am_by_hand", project=project, commit=main[:12], am=AM_BY_HAND, file=file
            ),
            details=done.details,
        )
    made = am.commits(git, main, done.tip)
    if len(made) != 1:
        raise PatchDrift(
            f"{file.name} is in upstream already: it changes nothing on upstream's main,"
            f" {main[:12]}",
            hint=hints.text("repo.newer_releases"),
        )
    return made[0]


def _report_branch(session: Session, name: str, path: Path, shown: str) -> None:
    place = session.layout.relative(path)
    repository = session.pin.of_upstream.url.rstrip("/").rpartition("/")[2].removesuffix(".git")
    console = session.run_log.console
    console.info(f"branch {name} is in {place}, signed off, one commit on upstream's main")
    console.hint(hints.text("repo.push_branch", folder=place, repository=repository, branch=name))
    console.info(
        f"to remove it: git -C {shown} worktree remove {path} && git -C {shown} branch -D {name}"
    )


def apply(
    layout: Layout, settings: Settings, project: str, *, console: Console, wait: bool
) -> None:
    """Apply the series to the pin; stop at the first conflict. Raises what patches.apply raises."""

    with _opened(layout, settings, project, "inv patch.apply", console, wait=wait) as session:
        before = session.checkout.head
        stack = patches.apply(
            layout,
            project,
            session.pin,
            session.checkout,
            run_log=session.run_log,
            stop_at_conflict=True,
        )
        checkouts.protect(layout)
        _report(console, stack, "nothing to do: " if stack.head == before else "")


def unapply(
    layout: Layout, settings: Settings, project: str, *, console: Console, wait: bool
) -> None:
    """Return to the pin; the commits stay under refs/patches. Raises as patches.unapply does."""

    with _opened(layout, settings, project, "inv patch.unapply", console, wait=wait) as session:
        before = session.checkout.head
        stack = patches.unapply(
            layout, project, session.pin, session.checkout, run_log=session.run_log
        )
        checkouts.protect(layout)
        _report(console, stack, "nothing to do: " if stack.head == before else "")


def export(
    layout: Layout,
    settings: Settings,
    project: str,
    *,
    console: Console,
    wait: bool,
    check: bool = False,
) -> "Export":
    """Write the commits on the pin as patches; with `check` only compare.

    Raises what export.run raises.
    """
    from workspace.repo import export as work

    with _opened(layout, settings, project, "inv patch.export", console, wait=wait) as session:
        done = work.run(
            layout, project, session.pin, session.checkout, run_log=session.run_log, check=check
        )
        work.show(done, console=console)
        _show_commit(layout, done, console)
        return done


def _show_commit(layout: Layout, done: "Export", console: Console) -> None:
    """Print the commit of the written patches; files that no patch has yet come first."""
    if (done.written or done.removed) and not done.untracked and checkouts.superproject(layout):
        console.hint(hints.text("repo.commit_patches", folder=done.folder))


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
    """Put one patch on upstream's main as a branch. Raises what put_on_upstream raises."""
    verb = "inv patch.export --branch"
    with _opened(layout, settings, project, verb, console, wait=wait) as session:
        put_on_upstream(session, name, patch)


def import_(
    layout: Layout,
    settings: Settings,
    project: str,
    options: ImportOptions,
    *,
    console: Console,
    wait: bool,
) -> None:
    """Import a file, a URL or a pull request by its number. Raises what `take` raises."""
    with _opened(layout, settings, project, "inv patch.import", console, wait=wait) as session:
        done = take(session, options)
        _show_commit(layout, done, console)


def take(session: Session, options: ImportOptions) -> "Export":
    """Import a file, a URL or a pull request by its number.

    Raises CheckoutError where the checkout cannot take commits, SettingsError and SourceError for a
    source that cannot be read or fetched, and what importing.run raises.
    """
    from workspace.repo import importing

    stack = importing.ready(session, options)
    return importing.run(session, options, _origin(session, options.source), stack)


def _origin(session: Session, source: str) -> Origin:
    """Read or fetch the mails of a source. Raises SettingsError and SourceError."""
    if number := re.fullmatch(r"#?([1-9][0-9]{0,8})", source):
        return _pull_request(session, int(number[1]))
    if re.match(r"https?://", source):
        page = public_of(source)
        if page and not source.endswith(".diff"):
            found = re.fullmatch(f"{re.escape(_home(session) or '')}/pull/([0-9]+)", page)
            if found:
                return _pull_request(session, int(found[1]))
        public = page or without_user(source)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", public.split("://", 1)[1].removesuffix(".patch"))[
            -80:
        ].strip("-.")
        # Its .diff is the net change, its .patch has a mail for each commit.
        url = f"{page}{'.diff' if source.endswith('.diff') else '.patch'}" if page else source
        raw = remotes.fetched(url, session.settings)
        if url.endswith(".patch"):
            return Origin(raw, name, public, _net_of(url.removesuffix(".patch"), session))
        return Origin(raw, name, public)
    path = typed(source)
    try:
        return Origin(_in_utf8(read_regular(path)), path.name.removesuffix(".patch"), None)
    except OSError as exc:
        raise SettingsError(
            f"{source or repr(source)} cannot be read: {exc.strerror}",
            hint=hints.text("repo.what_to_import"),
        ) from exc


def _in_utf8(raw: bytes) -> bytes:
    """Return a mail without the byte order mark of an editor, and in UTF-8 what `>` of PowerShell
    wrote in UTF-16.
    """
    raw = raw.removeprefix(codecs.BOM_UTF8)
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raw = raw.decode("utf-16", errors="replace").encode()
    return raw


def _net_of(page: str, session: Session) -> Callable[[], bytes]:
    """Return a function that fetches the net change of a request, which forges serve as a diff.

    It raises SourceError.
    """

    def net() -> bytes:
        raw = remotes.fetched(f"{page}.diff", session.settings)
        if raw.strip() and not mail.has_diff(raw):
            raise SourceError(
                f"{without_user(page)}.diff is no diff", hint=hints.text("repo.import_url")
            )
        return raw

    return net


def _home(session: Session) -> str | None:
    """Return the page at GitHub of the pinned project, or None."""
    found = _GITHUB.fullmatch(session.pin.of_upstream.url)
    return f"https://github.com/{found[1]}/{found[2]}" if found else None


def public_of(url: str) -> str | None:
    """Return the GitHub page of the pull request or commit of a URL, or None.

    GitHub serves its mails at that address with .patch appended.
    """
    found = _ON_GITHUB.fullmatch(url)
    return f"{found[1]}/{found[3] or 'commit/' + found[2]}" if found else None


def _pull_request(session: Session, number: int) -> Origin:
    """Fetch a pull request of the pinned project with git, else its mails from GitHub.

    Raises SourceError where neither is possible, and PatchDrift for a request without commits.
    """
    layout, pin, settings = session.layout, session.pin.of_upstream, session.settings
    git = Git(checkouts.folder_of(layout, pin))
    home, name = _home(session), f"pull-{number}"
    public = f"{home}/pull/{number}" if home else None
    try:
        with session.run_log.console.step("pull request") as view:
            remote = _remote(session, view)
            found = remotes.fetch_request(git, number, session.checkout.base or "HEAD", remote)
        if found.base != found.head:
            raw = am.mails_of_request(git, found.base, found.head)
            net = functools.partial(am.net_change, git, found.base, found.head)
            return Origin(raw, name, public, net, found.merges > 0)
        # git's answer is final: no mail is awaited from a page that may not be reachable.
        raise PatchDrift(
            f"all commits of pull request {number} are in main already, or it is empty",
            hint=hints.text("repo.merged_request", url=public)
            if public
            else hints.text("repo.newer_releases"),
        )
    except SourceError as exc:
        reason = exc.message
        if public is None:
            raise SourceError(
                f"pull request {number} of {without_user(pin.url)} cannot be fetched: {reason}",
                hint=hints.text("repo.import_url"),
            ) from exc
    try:
        raw = remotes.fetched(f"{public}.patch", settings)
    except SourceError as exc:
        raise SourceError(f"{exc.message}; with git: {reason}", hint=exc.hint) from exc
    note = f"{name}: the mails of {public} are taken, without merges: {reason}"
    return Origin(raw, name, public, _net_of(f"{public}", session), note=note)


def resume(
    layout: Layout,
    settings: Settings,
    project: str,
    how: Literal["continue", "skip", "abort"],
    *,
    console: Console,
    wait: bool,
) -> None:
    """Continue, skip or abort the git operation that waits in the checkout."""
    from workspace.repo import overview

    with _opened(layout, settings, project, "inv patch.continue", console, wait=wait) as session:
        _report(
            console,
            overview.resume(
                layout, project, session.pin, session.checkout, how=how, run_log=session.run_log
            ),
            "",
        )


@contextlib.contextmanager
def _opened(
    layout: Layout, settings: Settings, project: str, verb: str, console: Console, *, wait: bool
) -> Iterator[Session]:
    """Take the lock, open a run log, finish a killed move and yield the observed stack."""
    checkouts.require_project(project)
    pins.require_settled(layout)
    pin = pins.load(layout.pins).of(project)
    with (
        lock.hold(layout.lock, verb=verb, wait=wait, on_wait=console.info) as held,
        RunLog(
            console, layout.logs, verb=verb.split()[1], secrets=settings.secrets, held=held
        ) as run_log,
    ):
        if worktree.is_move_begun(layout, project):
            worktree.finish_move(
                layout, project, Git(checkouts.folder_of(layout, pin)), run_log=run_log
            )
        yield Session(layout, settings, project, pin, checkouts.observe(layout, pin), run_log)


def _report(console: Console, stack: Stack, prefix: str) -> None:
    count = counted(len(stack.names), "patch", "patches")
    messages = {
        State.APPLIED: (f"{count} applied, tree {(stack.tree or '')[:12]}", None),
        State.UNAPPLIED: (f"at the pin, {count} not applied", hints.text("inv.patch_apply")),
        State.UNEXPORTED: ("the commits differ from the series", hints.text("inv.patch_export")),
    }
    message, hint = messages.get(stack.state, (stack.state.value, hints.text("inv.patch")))
    console.info(f"{prefix}{message}")
    console.hint(hint)
