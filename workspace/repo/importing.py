"""Mails of a file, a URL or a pull request become commits and patches: `inv patch.import`.

patching.py reads and fetches them. The commits are first made and proven outside of the checkout:
an import that does not apply, or cannot be a patch, is refused with nothing changed.
"""

import contextlib
import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from email.utils import format_datetime, localtime
from pathlib import Path

from workspace.core import hints
from workspace.core.errors import (
    CheckoutError,
    PatchConflict,
    PatchDrift,
    SettingsError,
    WorkspaceError,
    counted,
)
from workspace.core.files import write_atomic
from workspace.repo import checkout as checkouts
from workspace.repo import export, mail, patches, series
from workspace.repo.git import AM_BY_HAND, Git, am, worktree
from workspace.repo.git.am import Commit
from workspace.repo.patches import ImportOptions, Origin, Session
from workspace.repo.series import TIP_REF, Stack, State, file_stems

# Messages of git about content that differs, not about a patch that it cannot read.
_UNFITTING = re.compile(
    r"^patch failed: |does not exist|already exists|does not match|No such file|does not apply"
)
_CREDIT = re.compile(r"^(?:Co-authored-by|Signed-off-by): .*$", re.MULTILINE | re.IGNORECASE)
_BLOBS = re.compile(
    rb"^diff --git (.+)\n(?:(?!diff --git ).*\n){0,4}?index ([0-9a-f]{7,40})\.\.([0-9a-f]{7,40})",
    re.MULTILINE,
)
# As much as patch(1) demands: what a merge brought stands around the lines of a later commit.
_LITTLE_CONTEXT = ("-C1",)
# What `git show` and `git log -1 --patch` print before a diff.
_SHOWN = re.compile(
    rb"commit [0-9a-f]{40}.*\n(?:Merge: .*\n)?Author: +(.+)\n(?:Author)?Date: +(.+)\n(?:.*\n)??\n"
    rb"((?: {4}.*\n|\n)+)"
)


@dataclass(frozen=True)
class _Import:
    """An import on the commit `head`: its origin, and one file per mail in `folder`.

    `by_hand` is a command line, `check` a hint.
    """

    git: Git
    origin: Origin
    options: ImportOptions
    project: str
    head: str
    folder: Path
    parts: Sequence[Path]
    by_hand: str
    check: str
    place: Path
    notes: list[str] = field(default_factory=list)


def ready(session: Session, options: ImportOptions) -> Stack:
    """Return the stack that the import extends. Raises CheckoutError where it is in the way."""
    layout, project = session.layout, session.project
    git = Git(checkouts.folder_of(layout, session.pin))
    stack = patches.observe(layout, project, session.pin, session.checkout)
    if stack.head is None or not stack.has_patches or stack.dirty:
        again = f"./scripts/inv patch.import {shlex.quote(options.source)}"
        raise _refusal(project, layout.relative(git.path), git, stack, again)
    return stack


def run(session: Session, options: ImportOptions, origin: Origin, stack: Stack) -> export.Export:
    """Apply the commits of an origin to the stack and export all patches.

    Author and date stay; each message gets an Upstream-Status unless it has one. Raises
    SettingsError for content that is no mail, PatchConflict where it does not apply, PatchDrift
    where it is upstream already or cannot be a patch. Nothing is changed then, but `options.stops`
    leaves a conflict in the checkout.
    """
    layout, project, run_log = session.layout, session.project, session.run_log
    git = Git(checkouts.folder_of(layout, session.pin))
    shown = layout.relative(git.path)
    assert stack.head, "ready returns no other stack"
    notes = [origin.note] if origin.note else []
    # The user may have to apply it by hand.
    kept = layout.state / "imported" / f"{origin.name}.patch"
    write_atomic(kept, _as_mail(origin, git, options.subject, notes))
    file = f"../../{layout.relative(kept)}"
    by_hand = f"git -C {shown} {AM_BY_HAND} {shlex.quote(file)}"
    check = hints.text("repo.check_diff", shown=shown, path=file)
    with tempfile.TemporaryDirectory(prefix="workspace-import-") as folder:
        mails = Path(folder, "mails")
        mails.mkdir()
        parts = _readable(am.split_mails(git, kept, mails), origin, git, notes)
        place = layout.state / f"{project}-stack"
        work = _Import(
            git, origin, options, project, stack.head, Path(folder), parts, by_hand, check, place
        )
        work = _chosen(work, notes)
        readable = b"".join(part.read_bytes() for part in work.parts)
        if readable != kept.read_bytes():
            write_atomic(kept, readable)
        holder = session if options.stops else None
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
    for note in dict.fromkeys((*notes, *work.notes)):
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
    if not below or series.stems_of(work.git, below, stack.head) != wanted:
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
    for part in work.parts:
        part.write_bytes(mail.with_status(part.read_bytes(), _status_of(work.origin)))
    done = am.start(git, work.parts, run_log=session.run_log)
    if done.tip is None:
        subject = mail.read_mail(work.parts[done.position - 1]).subject
        count, place = len(work.parts), layout.relative(git.path)
        raise series.sentence(git, done, count=count, patch=repr(subject), shown=place, base=head)
    return am.commits(git, head, done.tip)


def _commits_on(work: _Import, head: str) -> tuple[Commit, ...]:
    """Make the commits on `head` with their original messages; no file and no reference changes."""
    done = am.applied(work.git, head, work.parts, place=work.place)
    if done.position > 1 and _lack_changes([part.read_bytes() for part in work.parts]):
        done = am.applied(work.git, head, work.parts, place=work.place, flags=_LITTLE_CONTEXT)
        if done.tip:
            work.notes.append(
                f"{work.origin.name}: main was merged between its commits, so fewer lines of"
                f" context placed them: look at git -C vendor/vllm log -p {head[:12]}.."
            )
    subjects = [mail.read_mail(part).subject for part in work.parts]
    if done.tip is None:
        raise _not_applied(work, done, subjects)
    made = am.commits(work.git, head, done.tip)
    if len(made) != len(subjects):
        found = [" ".join(commit.message.split("\n\n")[0].split()) for commit in made]
        lost = [subject for subject in subjects if subject not in found] or subjects
        raise PatchDrift(
            f"{work.origin.name}: upstreamed: {', '.join(map(repr, lost))} changes nothing on"
            f" {head[:12]}; nothing was changed",
            hint=(
                hints.text("repo.other_patches", command=work.by_hand)
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
            f"{which} is refused by git am: {done.reason}; nothing was changed", hint=work.check
        )
    cause = done.cause
    if done.paths and not work.git.entries(done.paths, work.head):
        cause += f"; vendor/{work.project} has none of its files: it may be of another project"
    merging = replace(work.options, stops=True)
    hint = hints.text("repo.by_hand_conflict", command=merging.command(work.project))
    if len(subjects) > 1 and (squash := _offer(work)):
        by_hand = merging.command(work.project)
        hint = hints.text("repo.squash", command=squash.command(work.project), by_hand=by_hand)
    return PatchConflict(f"{which} {cause}; nothing was changed", hint=hint, details=done.details)


def _offer(work: _Import) -> ImportOptions | None:
    """Return the options that take the net change of a request, or None where it is not known."""
    with contextlib.suppress(WorkspaceError):
        if not work.options.stops and (net := work.origin.net()):
            diff = work.folder / "net.diff"
            diff.write_bytes(_without_tests(work, [net])[0][0])
            stops = worktree.tree_after(work.git, work.head, [diff]) is None
            return replace(work.options, squash=True, stops=stops)
    return None


def _chosen(work: _Import, notes: list[str]) -> _Import:
    """Return the import with the mails that the options ask for, or that a merge of main needs.

    What is left out is added to `notes`. Raises what `_squashed` raises, and SettingsError for a
    subject where there are several patches.
    """
    name, options = work.origin.name, work.options
    raws, left_out = _without_tests(work, [part.read_bytes() for part in work.parts])
    notes += [f"{name}: {note}" for note in left_out]
    parts = []
    for part, raw in zip(work.parts, raws, strict=True):
        if raw != part.read_bytes():
            part.write_bytes(raw)
        if mail.has_diff(raw):
            parts.append(part)
    if not parts:
        raise SettingsError(
            f"{name} changes nothing but tests that are left out, so there is nothing to import",
            hint=hints.text("inv.patch"),
        )
    work = replace(work, parts=parts)
    if options.squash and (len(parts) > 1 or work.origin.has_merges):
        return _squashed(work)
    if options.subject and len(parts) > 1:
        command = replace(options, squash=True).command(work.project)
        raise SettingsError(
            f"--subject is for one patch, and {name} has {len(parts)}; nothing was changed",
            hint=hints.text("repo.squash_subject", command=command),
        )
    if options.subject:
        parts[0].write_bytes(mail.with_header(parts[0].read_bytes(), "Subject", options.subject))
    if not work.origin.has_merges:
        return work
    net = _squashed(work)
    wanted = worktree.tree_after(work.git, work.head, net.parts)
    with contextlib.suppress(PatchConflict, PatchDrift, SettingsError):
        tip = _commits_on(replace(work, options=net.options), work.head)[-1].oid
        if work.git.tree(tip) == wanted:
            return work
    notes.append(f"{name} merges main, so its net change is taken, as one patch")
    return net


def _lack_changes(parts: Sequence[bytes]) -> bool:
    """Return whether a mail was made from another content of a file than the mail before it left.

    So it is after a merge, which has no mail.
    """
    left: dict[bytes, bytes] = {}
    for part in parts:
        for path, before, after in _BLOBS.findall(part):
            known = left.get(path, before)
            if not (known.startswith(before) or before.startswith(known)):
                return True
            left[path] = after
    return False


def _without_tests(work: _Import, raws: Sequence[bytes]) -> tuple[list[bytes], list[str]]:
    """Return mails or diffs without some changes below tests/, and notes that name these.

    On request all are left out, else those of files that neither `head` has nor the request adds.
    """
    read = [mail.file_changes(raw) for raw in raws]
    tests = {
        path
        for _, changes in read
        for change in changes
        for path in (change.old, change.new)
        if path and path.startswith("tests/")
    }
    known = set(work.git.entries(sorted(tests), work.head)) if tests else set()
    left_out: dict[str, None] = {}
    kept_raws = []
    for raw, (text, changes) in zip(raws, read, strict=True):
        kept = [text]
        for change in changes:
            paths = {path for path in (change.old, change.new) if path}
            is_fitting = not work.options.without_tests and (
                change.old is None or change.old in known
            )
            if is_fitting or not paths <= tests:
                kept.append(change.text)
                known |= paths
            else:
                left_out |= dict.fromkeys(sorted(paths))
        is_whole = len(kept) == len(changes) + 1
        kept_raws.append(raw if is_whole else b"\n".join(kept).rstrip(b"\n") + b"\n")
    why = "on request" if work.options.without_tests else f"vendor/{work.project} has no such file"
    return kept_raws, [f"{path} is left out: {why}" for path in left_out]


def _squashed(work: _Import) -> _Import:
    """Return the import with one mail: the net change, by the authors of its commits.

    Where the net change is not known, it is that of the commits, which then have to apply. Raises
    PatchDrift where it is empty, and what `_commits_on` raises.
    """
    net = work.origin.net()
    if net is None:
        plain = ImportOptions(work.options.source, without_tests=work.options.without_tests)
        made = _commits_on(replace(work, options=plain), work.head)
        diff = am.net_change(work.git, work.head, made[-1].oid)
    else:
        diff = _without_tests(work, [net])[0][0]
    if not mail.has_diff(diff):
        raise PatchDrift(
            f"{work.origin.name}: its commits change nothing together; nothing was changed",
            hint=hints.text("repo.present_stack"),
        )
    mails = [mail.read_mail(part) for part in work.parts]
    message = _message_of(mails, work.options.subject, _status_of(work.origin))
    date = mails[-1].date or format_datetime(localtime())
    one = work.folder / "squashed.patch"
    one.write_bytes(
        mail.made(mails[0].author, date, message.encode(errors="surrogateescape"), diff)
    )
    return replace(work, parts=[one], options=replace(work.options, squash=True))


def _message_of(mails: Sequence[mail.Mail], subject: str, status: str) -> str:
    """Return the message of one commit for all: each message, then its authors as trailers.

    As a forge makes it when it squashes a pull request.
    """
    texts: list[str] = []
    trailers: dict[tuple[str, str], str] = {}
    for part in mails:
        message = mail.without_status(part.message)
        for line in (f"Co-authored-by: {part.author}", *_CREDIT.findall(message)):
            trailers.setdefault(_credit_of(line), line)
        text = _CREDIT.sub("", message).strip()
        texts.append(f"* {part.subject}" + (f"\n\n{text}" if text else ""))
    del trailers[_credit_of(f"Co-authored-by: {mails[0].author}")]
    known = [part.status for part in mails if part.status and mail.is_status(part.status)]
    message = "\n\n".join((subject or mails[0].subject, *texts))
    for line in (*trailers.values(), f"{mail.TRAILER}: {known[0]}" if known else status):
        message = mail.with_trailer(message, line)
    return message


def _credit_of(line: str) -> tuple[str, str]:
    """Return what identifies a trailer: its name and address, in lower case."""
    name, _, author = line.lower().partition(": ")
    found = re.search(r"<([^<>]+)>", author)
    return name, found[1] if found else author


def _status_of(origin: Origin) -> str:
    return f"{mail.TRAILER}: " + (f"Submitted [{origin.url}]" if origin.url else "Pending")


def _with_status(git: Git, head: str, made: Sequence[Commit], origin: Origin) -> str:
    """Add the Upstream-Status that a commit lacks; return the last commit.

    A commit that has it, and whose parent is unchanged, stays the same.
    """
    status, tip = _status_of(origin), head
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


def _as_mail(origin: Origin, git: Git, subject: str, notes: list[str]) -> bytes:
    """Return the mails with git's line ends, made of a diff if need be.

    What is new is added to `notes`; `subject` is that of a diff. Raises SettingsError for other
    content, and for a diff where the user has no name in git.
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
        return raw
    is_page = raw.lstrip().startswith(b"<")
    if not mail.has_diff(raw) or is_page:
        what = ": it is empty" if not raw.strip() else ": it is a web page" if is_page else ""
        raise SettingsError(
            f"{origin.name} is neither a mail of git format-patch nor a diff{what}",
            hint=hints.text("repo.github_patch"),
        )
    if found := _SHOWN.search(raw):
        author, date = (text.decode(errors="surrogateescape") for text in found.groups()[:2])
        message = re.sub(rb"^ {4}", b"", found[3], flags=re.MULTILINE).strip(b"\n")
        return mail.made(author, date, message, raw[found.end() :])
    name, email = patches.user(git)
    author = f"{name} <{email}>"
    if has:
        notes.append(f"{origin.name} has no author: {author}")
        return b"From: " + author.encode() + b"\n" + raw
    named = subject or re.sub(r"\.(diff|txt)$", "", origin.name)
    notes.append(
        f"{origin.name} is a diff without author and message: it is a commit of {author},"
        f" {named!r}"
        + ("" if subject else "; another subject: --subject, or git -C vendor/vllm commit --amend")
        + ("" if subject else " && ./scripts/inv patch.export")
    )
    return mail.made(author, format_datetime(localtime()), named.encode(), raw)


def _readable(
    parts: Sequence[Path], origin: Origin, git: Git, notes: list[str]
) -> tuple[Path, ...]:
    """Return the mails that have a diff, each with an author and prefixes that git can read.

    What is changed or left out is added to `notes`. Raises SettingsError where no diff is left.
    """
    kept = []
    for part in parts:
        raw = part.read_bytes()
        changed = mail.with_prefixes(mail.decoded(raw))
        read = mail.parse(changed)
        if not mail.has_diff(changed):
            notes.append(f"{origin.name}: {read.subject!r} changes no file and is left out")
            continue
        if not re.search(r"<[^<>\s]+>|\S@\S", read.author):
            name = read.author.replace("<>", "").strip()
            author = f"{name} <unknown>" if name else "{} <{}>".format(*patches.user(git))
            changed = mail.with_header(changed, "From", author)
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
