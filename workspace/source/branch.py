"""One patch as a branch on upstream's main, ready to be pushed to the user's fork: `inv patch.export --branch NAME PATCH`."""

from pathlib import Path

from workspace.core.errors import CheckoutError, PatchConflict, PatchDrift, SettingsError, SourceError
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.source import checkout as checkouts
from workspace.source import mail
from workspace.source.checkout import Kind
from workspace.source.git import AM_BY_HAND, Git, am, branch, worktree
from workspace.source.git import mail as mails
from workspace.source.git.mail import Commit
from workspace.source.pins import Pin


def run(layout: Layout, project: str, pin: Pin, settings: Settings, name: str, patch: str, *, journal: Journal) -> Path:
    """Make branch `name` with one patch, signed off by the user and without Upstream-Status, and return its working tree.

    Raises SettingsError for a name, a patch or an identity that cannot be used; CheckoutError where the branch is there already;
    SourceError where upstream's main cannot be had; PatchConflict and PatchDrift where the patch does not apply or is upstream. Nothing is left then.
    """
    git = Git(checkouts.folder_of(layout, pin))
    shown, path = layout.relative(git.path), layout.state / "branches" / name
    found = checkouts.observe(layout, pin)
    if found.kind not in (Kind.GIT, Kind.RELEASE):
        raise CheckoutError(f"{shown} is {found.detail}; a branch needs the checkout of {pin.tag}", hint="./scripts/inv bootstrap")
    file = _patch(layout, project, patch)
    user = _user(git)
    _refuse_taken(layout, git, name, path, shown)
    main = _main(layout, pin, settings, git, journal)
    try:
        with journal.console.step("working tree") as view:
            branch.add_worktree(git, path, main, settings=settings, journal=journal, on_line=checkouts.shown(view))
        commit = _on_main(layout, project, git, main, file)
        message = mail.without_status(commit.message)
        signature = f"Signed-off-by: {user[0]} <{user[1]}>"
        message = message if signature in message.split("\n") else mail.with_trailer(message, signature)
        branch.begin(Git(path), name, mails.recommitted(git, commit, main, message, committer=user), journal=journal)
    except BaseException:
        worktree.forget(git, path)
        raise
    _say(layout, pin, name, path, shown, journal)
    return path


def _patch(layout: Layout, project: str, patch: str) -> Path:
    folder = layout.patches(project)
    file = folder / f"{Path(patch).name.removesuffix('.patch')}.patch"
    if not file.is_file():
        known = ", ".join(sorted(path.name for path in folder.glob("*.patch")))
        raise SettingsError(f"{layout.relative(file)} is not there", hint=f"one of: {known}" if known else "./scripts/inv patch.export")
    return file


def _user(git: Git) -> tuple[str, str]:
    """Name and address by the user's own configuration."""
    found = am.user(git)
    if not found:
        raise SettingsError(
            "git does not know your name and address, which a Signed-off-by needs",
            hint='git config --global user.name "Your Name" && git config --global user.email you@example.org',
        )
    return found["GIT_AUTHOR_NAME"], found["GIT_AUTHOR_EMAIL"]


def _refuse_taken(layout: Layout, git: Git, name: str, path: Path, shown: str) -> None:
    if not branch.is_name(git, name):
        raise SettingsError(f"{name!r} is no name for a branch", hint="letters, digits, - and / between words, as in fix/avx2-kernels")
    if git.resolve(f"refs/heads/{name}"):
        raise CheckoutError(f"{shown} has a branch {name} already; it was left as it is", hint=f"take another name, or: git -C {shown} branch -D {name}")
    if path.exists():
        raise CheckoutError(
            f"{layout.relative(path)} is there already; it was left as it is", hint=f"take another name, or: git -C {shown} worktree remove {path}"
        )


def _main(layout: Layout, pin: Pin, settings: Settings, git: Git, journal: Journal) -> str:
    """The commit of upstream's main: as it is now, or as it was fetched last."""
    url = checkouts.url_of(layout, pin, settings)
    known = git.resolve(branch.UPSTREAM)
    try:
        with journal.console.step("main") as view:
            branch.fetch_main(git, url, settings=settings, journal=journal, on_line=checkouts.shown(view))
    except SourceError as exc:
        if known is None:
            raise
        journal.console.warn(f"{exc.message}; going on from {branch.UPSTREAM} as it was fetched last, {known[:12]}")
        return known
    fetched = git.resolve(branch.UPSTREAM)
    if fetched is None:
        raise SourceError(f"upstream of {pin.name} has no branch main", hint="git ls-remote --heads " + pin.url)
    return fetched


def _on_main(layout: Layout, project: str, git: Git, main: str, file: Path) -> Commit:
    done = am.applied(git, main, [file], place=layout.state / f"{project}-stack")
    if done.tip is None:
        raise PatchConflict(
            f"{file.name} conflicts ({', '.join(done.conflicted)}) with upstream's main, {main[:12]}; nothing was left behind",
            hint=f"by hand: git -C vendor/{project} worktree add -b NAME FOLDER {main[:12]}, then there: git {AM_BY_HAND} {file}",
            details=tuple(f"conflict in {path}" for path in done.conflicted),
        )
    made = mails.commits(git, main, done.tip)
    if len(made) != 1:
        raise PatchDrift(f"{file.name} is upstreamed: it changes nothing on upstream's main, {main[:12]}", hint="inv pin.forecast main")
    return made[0]


def _say(layout: Layout, pin: Pin, name: str, path: Path, shown: str, journal: Journal) -> None:
    place = layout.relative(path)
    repository = pin.url.rstrip("/").rpartition("/")[2].removesuffix(".git")
    say = journal.console.say
    say(f"branch {name} stands in {place}, signed off, one commit on upstream's main")
    say(f"next: git -C {place} push git@github.com:YOUR-NAME/{repository}.git {name}    and open a pull request from there")
    say(f"when it is done with: git -C {shown} worktree remove {path} && git -C {shown} branch -D {name}")
