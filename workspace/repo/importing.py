"""Patches from a file, a URL or a pull request become commits and patches: `inv patch.import`.

The commits are first made and proven outside of the checkout: an import that does not apply, or
cannot be a patch, is refused with nothing changed.
"""

import contextlib
import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from email.utils import format_datetime, localtime
from pathlib import Path

from workspace.core import hints
from workspace.core.errors import (
    CheckoutError,
    PatchConflict,
    PatchDrift,
    SettingsError,
    SourceError,
    WorkspaceError,
    counted,
)
from workspace.core.files import read_regular, write_atomic
from workspace.core.paths import typed
from workspace.core.settings import without_user
from workspace.repo import checkout as checkouts
from workspace.repo import export, mail, patches, series
from workspace.repo.git import AM_BY_HAND, Git, am, remotes, worktree
from workspace.repo.git.am import Commit
from workspace.repo.git.command import file_stems
from workspace.repo.patches import Session
from workspace.repo.series import TIP_REF, Stack, State

_GITHUB = re.compile(
    r"(?:https?://|ssh://)?(?:[^/@]*@)?github\.com[:/]([A-Za-z0-9_.-]+)/"
    r"([A-Za-z0-9_-][A-Za-z0-9_.-]*?)(?:\.git)?/?"
)
_ON_GITHUB = re.compile(
    r"(https?://github\.com/[^/]+/[^/]+)/"
    r"(?:pull/\d+/commits/([0-9a-f]{7,40})|(pull/\d+|commit/[0-9a-f]{7,40}))(?:[./?#].*)?"
)


# Messages of git about content that differs, not about a patch that it cannot read.
_UNFITTING = re.compile(
    r"^patch failed: |does not exist|already exists|does not match|No such file|does not apply"
)
# What `git show` and `git log -1 --patch` print before a diff.
_SHOWN = re.compile(
    rb"commit [0-9a-f]{40}.*\n(?:Merge: .*\n)?Author: +(.+)\n(?:Author)?Date: +(.+)\n(?:.*\n)??\n"
    rb"((?: {4}.*\n|\n)+)"
)


@dataclass(frozen=True)
class Origin:
    """Mails to import: their bytes, their name in messages, and their public URL if any."""

    raw: bytes
    name: str
    url: str | None


@dataclass(frozen=True)
class _Import:
    """An import: its origin, one file per mail, and what applies or checks it by hand.

    `by_hand` and `merging` are command lines, `check` a hint.
    """

    git: Git
    origin: Origin
    parts: Sequence[Path]
    by_hand: str
    check: str
    place: Path
    merging: str


def run(session: Session, source: str, *, stops: bool = False) -> export.Export:
    """Apply the commits of a mail to the stack and export all patches.

    `source` is a file, a URL, or the number of a pull request. Author and date stay; each message
    gets an Upstream-Status unless it has one. Raises CheckoutError where the checkout cannot take
    commits, SettingsError and SourceError for a source that is no mail or cannot be fetched,
    PatchConflict where it does not apply, PatchDrift where it is upstream already or cannot be a
    patch. Nothing is changed then, but `stops` leaves a conflict in the checkout.
    """
    layout, project, run_log = session.layout, session.project, session.run_log
    git = Git(checkouts.folder_of(layout, session.pin))
    shown = layout.relative(git.path)
    stack = patches.observe(layout, project, session.pin, session.checkout)
    if stack.head is None or not stack.has_patches or stack.dirty:
        verb = f"./scripts/inv patch.import {shlex.quote(source)}"
        raise _refusal(project, shown, git, stack, verb)
    origin = _origin(session, source)
    # The user may have to apply it by hand.
    kept = layout.state / "imported" / f"{origin.name}.patch"
    raw, notes = _as_mail(origin, git)
    write_atomic(kept, raw)
    file = f"../../{layout.relative(kept)}"
    by_hand = f"git -C {shown} {AM_BY_HAND} {shlex.quote(file)}"
    check = hints.text("repo.check_diff", shown=shown, path=file)
    with tempfile.TemporaryDirectory(prefix="workspace-import-") as folder:
        parts = _readable(am.split_mails(git, kept, Path(folder)), origin, git, notes)
        if (readable := b"".join(part.read_bytes() for part in parts)) != raw:
            write_atomic(kept, readable)
        place = layout.state / f"{project}-stack"
        again = patches.merging_command(source, project)
        work = _Import(git, origin, parts, by_hand, check, place, again)
        holder = session if stops else None
        tip = stack.head if _is_applied(work, stack) else _tip_on(work, stack.head, holder)
    try:
        prepared = export.prepare(layout, project, session.pin, replace(session.checkout, head=tip))
    except mail.Unfit as exc:
        at = stack.head[:12]
        hint = hints.text("repo.by_hand_reword", command=by_hand, shown=shown, commit=at)
        raise mail.Unfit(f"{origin.name}: {exc.message}", hint=hint, details=exc.details) from exc
    git.set_ref(TIP_REF, tip)
    worktree.move(layout, project, git, tip, run_log=run_log)
    done = export.finish(layout, prepared)
    for note in notes:
        run_log.console.info(note)
    export.show(done, console=run_log.console)
    return done


def _refusal(project: str, shown: str, git: Git, stack: Stack, verb: str) -> WorkspaceError:
    if stack.state is State.UNAPPLIED:
        return CheckoutError(
            f"{shown} is at the pin, without {counted(len(stack.names), 'patch', 'patches')} of"
            f" patches/{project}/series",
            hint=hints.text("inv.patch_apply"),
        )
    if stack.dirty and stack.has_patches:
        return series.edited_files(shown, stack.dirty, "commits would be imported", verb=verb)
    return series.refusal(shown, git, stack, verb=verb)


def _is_applied(work: _Import, stack: Stack) -> bool:
    """Return whether an interrupted run has put these commits on the stack, without an export.

    Made again, they have the same SHAs.
    """
    if stack.state is not State.UNEXPORTED or not stack.base or not stack.head:
        return False
    wanted = file_stems(mail.read_mail(part).slug for part in work.parts)
    below = work.git.resolve(f"{stack.head}~{len(wanted)}")
    if not below or work.git.slugs(below, stack.head) != wanted:
        return False
    with contextlib.suppress(PatchConflict, PatchDrift, SettingsError):
        return _tip_on(work, below) == stack.head
    return False


def _tip_on(work: _Import, head: str, session: Session | None = None) -> str:
    """Make the commits on `head`, each with an Upstream-Status, and return the last.

    With a session a conflict is left in its checkout.
    """
    try:
        made = _commits_on(work, head)
    except PatchConflict:
        if session is None:
            raise
        made = _commits_in_checkout(session, work, head)
    return _with_status(work.git, head, made, work.origin)


def _commits_in_checkout(session: Session, work: _Import, head: str) -> tuple[Commit, ...]:
    """Apply the mails in the checkout; leave the `am` that stops there and raise PatchConflict."""
    git, layout = work.git, session.layout
    done = am.start(git, work.parts, run_log=session.run_log)
    if done.tip is None:
        subject = mail.read_mail(work.parts[done.position - 1]).subject
        count, place = len(work.parts), layout.relative(git.path)
        raise series.sentence(git, done, count=count, patch=repr(subject), shown=place, base=head)
    return am.commits(git, head, done.tip)


def _commits_on(work: _Import, head: str) -> tuple[Commit, ...]:
    """Make the commits on `head` with their original messages; no file and no reference changes."""
    origin, by_hand = work.origin, work.by_hand
    done = am.applied(work.git, head, work.parts, place=work.place)
    subjects = [mail.read_mail(part).subject for part in work.parts]
    if done.tip is None:
        raise _not_applied(work, done, subjects)
    made = am.commits(work.git, head, done.tip)
    if len(made) != len(subjects):
        found = [" ".join(commit.message.split("\n\n")[0].split()) for commit in made]
        lost = [subject for subject in subjects if subject not in found] or subjects
        raise PatchDrift(
            f"{origin.name}: upstreamed: {', '.join(map(repr, lost))} changes nothing on"
            f" {head[:12]}; nothing was changed",
            hint=(
                hints.text("repo.other_patches", command=by_hand)
                if made
                else hints.text("repo.present_stack")
            ),
        )
    return made


def _not_applied(work: _Import, done: am.Applied, subjects: Sequence[str]) -> WorkspaceError:
    """Return the error for a patch that does not apply, or that git cannot read."""
    which = (
        f"{work.origin.name}: patch {done.position} of {len(subjects)},"
        f" {subjects[done.position - 1]!r},"
    )
    if not done.conflicted and not _UNFITTING.search(done.reason):
        return SettingsError(
            f"{which} is refused by git am: {done.reason}; nothing was changed",
            hint=work.check,
        )
    hint = hints.text("repo.by_hand_conflict", command=work.merging)
    if done.position > 1 and work.origin.url and public_of(work.origin.url):
        # A merge of main is in no mail, so the commits after it need not apply.
        url = f"{work.origin.url}.diff"
        hint = hints.text("repo.net_change", url=url, command=work.merging)
    return PatchConflict(
        f"{which} {done.cause}; nothing was changed", hint=hint, details=done.details
    )


def _with_status(git: Git, head: str, made: Sequence[Commit], origin: Origin) -> str:
    """Add the Upstream-Status that a commit lacks; return the last commit.

    A commit that has it, and whose parent is unchanged, stays the same.
    """
    status = f"{mail.TRAILER}: " + (f"Submitted [{origin.url}]" if origin.url else "Pending")
    tip = head
    for commit in made:
        known = mail.status_of(commit.message)
        message = (
            commit.message
            if known and mail.is_status(known)
            else mail.with_trailer(mail.without_status(commit.message), status)
        )
        tip = (
            commit.oid
            if (message, (tip,)) == (commit.message, commit.parents)
            else am.recommitted(git, commit, tip, message)
        )
    return tip


def _origin(session: Session, source: str) -> Origin:
    """Read or fetch the mails of a source. Raises SettingsError and SourceError."""
    if number := re.fullmatch(r"#?([1-9][0-9]{0,8})", source):
        return _pull_request(session, int(number[1]))
    if re.match(r"https?://", source):
        page = public_of(source)
        public = page or without_user(source)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", public.split("://", 1)[1].removesuffix(".patch"))[
            -80:
        ].strip("-.")
        # Its .diff is the net change, its .patch has a mail for each commit.
        suffix = ".diff" if source.endswith(".diff") else ".patch"
        raw = remotes.fetched(f"{page}{suffix}" if page else source, session.settings)
        return Origin(raw, name, public)
    path = typed(source)
    try:
        return Origin(read_regular(path), path.name.removesuffix(".patch"), None)
    except OSError as exc:
        raise SettingsError(
            f"{source} cannot be read: {exc.strerror}",
            hint=hints.text("repo.what_to_import"),
        ) from exc


def public_of(url: str) -> str | None:
    """Return the GitHub page of the pull request or commit of a URL, or None.

    GitHub serves its mails at that address with .patch appended.
    """
    found = _ON_GITHUB.fullmatch(url)
    return f"{found[1]}/{found[3] or 'commit/' + found[2]}" if found else None


def _pull_request(session: Session, number: int) -> Origin:
    """Fetch a pull request of the pinned project from a mirror on this disk, else from GitHub."""
    pin, settings = session.pin, session.settings
    found = _GITHUB.fullmatch(pin.url)
    public = f"https://github.com/{found[1]}/{found[2]}/pull/{number}" if found else None
    mirror = Path(checkouts.url_of(session.layout, pin, settings).removeprefix("file://"))
    if mirror.is_dir():
        raw = am.pull_request(Git(mirror, failure=SourceError), number)
        if raw:
            return Origin(raw, f"pull-{number}", public)
    if public is None:
        raise SourceError(
            f"pull request {number} of {without_user(pin.url)} cannot be fetched: only GitHub"
            f" serves one, or a mirror on this disk with refs/pull/{number}/head",
            hint=hints.text("repo.import_url"),
        )
    return Origin(remotes.fetched(f"{public}.patch", settings), f"pull-{number}", public)


def _as_mail(origin: Origin, git: Git) -> tuple[bytes, list[str]]:
    """Return the mails with git's line ends, made of a diff if need be, and notes on what is new.

    Raises SettingsError for other content, and for a diff where the user has no name in git.
    """
    raw = origin.raw
    head = raw.partition(b"\n\n")[0].partition(b"\r\n\r\n")[0]
    if head.partition(b"\n")[0].endswith(b"\r"):
        # A program has written such line ends in the whole mail.
        raw, head = raw.replace(b"\r\n", b"\n"), head.replace(b"\r\n", b"\n")
    has = {
        name
        for name in (b"From", b"Subject")
        if re.search(rb"^%b: " % name, head, re.MULTILINE | re.IGNORECASE)
    }
    if len(has) == 2:
        return raw, []
    if not mail.has_diff(raw) or raw.lstrip().startswith(b"<"):
        raise SettingsError(
            f"{origin.name} is neither a mail of git format-patch nor a diff",
            hint=hints.text("repo.github_patch"),
        )
    if found := _SHOWN.search(raw):
        author, date = (text.decode(errors="surrogateescape") for text in found.groups()[:2])
        message = re.sub(rb"^ {4}", b"", found[3], flags=re.MULTILINE).strip(b"\n")
        return mail.made(author, date, message, raw[found.end() :]), []
    name, email = patches.user(git)
    author = f"{name} <{email}>"
    if has:
        return b"From: " + author.encode() + b"\n" + raw, [f"{origin.name} has no author: {author}"]
    subject = re.sub(r"\.(diff|txt)$", "", origin.name)
    note = (
        f"{origin.name} is a diff without author and message: it is a commit of {author},"
        f" {subject!r}; another message: git -C vendor/vllm commit --amend &&"
        " ./scripts/inv patch.export"
    )
    return mail.made(author, format_datetime(localtime()), subject.encode(), raw), [note]


def _readable(
    parts: Sequence[Path], origin: Origin, git: Git, notes: list[str]
) -> tuple[Path, ...]:
    """Return the mails that have a diff, each with an author and prefixes that git can read.

    What is changed or left out is added to `notes`. Raises SettingsError where no diff is left.
    """
    kept = []
    for part in parts:
        raw = part.read_bytes()
        read = mail.parse(raw)
        if not (read.diff or mail.has_diff(raw) or b"base64" in raw.lower()):
            notes.append(f"{origin.name}: {read.subject!r} changes no file and is left out")
            continue
        changed = mail.with_prefixes(raw)
        if not re.search(r"<[^<>\s]+>|\S@\S", read.author):
            name = read.author.replace("<>", "").strip()
            author = f"{name} <unknown>" if name else "{} <{}>".format(*patches.user(git))
            changed = mail.with_author(changed, author)
            notes.append(f"{origin.name}: {read.author!r} has no address; the author is {author}")
        if changed != raw:
            part.write_bytes(changed)
        kept.append(part)
    if not kept:
        raise SettingsError(
            f"{origin.name} has no diff, so there is nothing to import",
            hint=hints.text("repo.github_patch"),
        )
    return tuple(kept)
