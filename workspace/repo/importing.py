"""A patch from elsewhere becomes commits on the stack and files of the series: `inv patch.import`.

The commits are made and proven aside first: what does not apply, or cannot be a patch, is refused
and nothing was changed.
"""

import contextlib
import re
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from workspace.core.errors import (
    CheckoutError,
    PatchConflict,
    PatchDrift,
    SettingsError,
    SourceError,
    WorkspaceError,
)
from workspace.core.files import read_regular, write_atomic
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.repo import checkout as checkouts
from workspace.repo import export, mail, moves, patches, series
from workspace.repo.checkout import Checkout
from workspace.repo.git import AM_BY_HAND, Git, am, without_user
from workspace.repo.git import am as mails
from workspace.repo.git.am import Commit
from workspace.repo.pins import Pin
from workspace.repo.series import TIP_REF, Stack, State

if TYPE_CHECKING:
    import requests

# A patch of 5 MB is a large one; what is larger is a release, or a mistake.
LARGEST_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 16
_GITHUB = re.compile(
    r"(?:https?://|ssh://)?(?:[^/@]*@)?github\.com[:/]([A-Za-z0-9_.-]+)/([A-Za-z0-9_-][A-Za-z0-9_.-]*?)(?:\.git)?/?"
)
_ON_GITHUB = re.compile(
    r"(https?://github\.com/[^/]+/[^/]+)/(?:pull/\d+/commits/([0-9a-f]{7,40})|(pull/\d+|commit/[0-9a-f]{7,40}))(?:[./?#].*)?"
)


@dataclass(frozen=True)
class Origin:
    """What is imported: mails, the name they are called by, and where they are public, if
    anywhere.
    """

    raw: bytes
    name: str
    url: str | None


def run(
    layout: Layout,
    project: str,
    pin: Pin,
    checkout: Checkout,
    settings: Settings,
    source: str,
    *,
    run_log: RunLog,
) -> export.Export:
    """Put the commits of a mail on top of the stack and export all: `source` is a file, a URL, or
    the number of a pull request.

    Author and date stay; each message gets an Upstream-Status unless it has one. Raises
    CheckoutError where the checkout cannot take commits, SettingsError and SourceError for a source
    that is no mail or cannot be had, PatchConflict where it does not apply, PatchDrift where it is
    upstream already or cannot be a patch. Nothing is changed then.
    """
    git = Git(checkouts.folder_of(layout, pin))
    shown = layout.relative(git.path)
    stack = patches.observe(layout, project, pin, checkout)
    if stack.head is None or stack.state not in (State.APPLIED, State.UNEXPORTED) or stack.dirty:
        raise _refusal(
            layout, project, shown, git, stack, f"./scripts/inv patch.import {shlex.quote(source)}"
        )
    origin = _origin(layout, pin, settings, source)
    # A person may have to put it on by hand.
    kept = layout.state / "imported" / f"{origin.name}.patch"
    write_atomic(kept, _as_mail(origin))
    by_hand = f"git -C {shown} {AM_BY_HAND} ../../{layout.relative(kept)}"
    with tempfile.TemporaryDirectory(prefix="workspace-import-") as folder:
        parts = mails.split_mails(git, kept, Path(folder))

        def put_on(head: str) -> str:
            return _with_status(
                git, head, _made(layout, project, git, head, parts, origin, by_hand), origin
            )

        tip = stack.head if _is_on(git, stack, parts, put_on) else put_on(stack.head)
    try:
        prepared = export.prepare(layout, project, pin, replace(checkout, head=tip))
    except mail.Unfit as exc:
        hint = (
            f"{by_hand}    then reword: git -C {shown} rebase -i {stack.head[:12]} && ./scripts/inv"
            " patch.export"
        )
        raise mail.Unfit(f"{origin.name}: {exc.message}", hint=hint, details=exc.details) from exc
    git.set_ref(TIP_REF, tip)
    moves.move(layout, project, git, tip, run_log=run_log)
    done = export.finish(layout, prepared)
    export.show(done, console=run_log.console)
    return done


def _refusal(
    layout: Layout, project: str, shown: str, git: Git, stack: Stack, verb: str
) -> WorkspaceError:
    if stack.state is State.UNAPPLIED:
        return CheckoutError(
            f"{shown} is at the pin, without the {len(stack.names)} patches of"
            f" patches/{project}/series",
            hint="./scripts/inv patch.apply",
        )
    if stack.dirty and stack.state in (State.APPLIED, State.UNEXPORTED):
        return series.edited_files(shown, stack.dirty, "commits are to be imported", verb=verb)
    return series.refusal(shown, git, stack, verb=verb)


def _is_on(git: Git, stack: Stack, parts: Sequence[Path], put_on: Callable[[str], str]) -> bool:
    """Whether a run that was ended has put these very commits on the stack, and not exported them:
    made again, they are the same.
    """
    if stack.state is not State.UNEXPORTED or not stack.base or not stack.head:
        return False
    slugs, wanted = (
        git.slugs(stack.base, stack.head),
        tuple(mail.read_mail(part).slug for part in parts),
    )
    below = git.resolve(f"{stack.head}~{len(wanted)}")
    if not below or slugs[-len(wanted) :] != wanted:
        return False
    with contextlib.suppress(PatchConflict, PatchDrift):
        return put_on(below) == stack.head
    return False


def _made(
    layout: Layout,
    project: str,
    git: Git,
    head: str,
    parts: Sequence[Path],
    origin: Origin,
    by_hand: str,
) -> tuple[Commit, ...]:
    """Make the commits on `head`, with all messages as they came. No file and no reference is
    touched.
    """
    done = am.applied(git, head, parts, place=layout.state / f"{project}-stack")
    subjects = [mail.read_mail(part).subject for part in parts]
    if done.tip is None:
        where = (
            f"conflicts ({', '.join(done.conflicted)})"
            if done.conflicted
            else "is no patch that git can read"
        )
        raise PatchConflict(
            f"{origin.name}: patch {done.position} of {len(subjects)},"
            f" {subjects[done.position - 1]!r}, {where}; nothing was changed",
            hint=(
                f"{by_hand}    stops at the conflict; then ./scripts/inv patch.continue and"
                " ./scripts/inv patch.export"
            ),
            details=tuple(f"conflict in {path}" for path in done.conflicted),
        )
    made = mails.commits(git, head, done.tip)
    if len(made) != len(subjects):
        there = [" ".join(commit.message.split("\n\n")[0].split()) for commit in made]
        lost = [subject for subject in subjects if subject not in there] or subjects
        raise PatchDrift(
            f"{origin.name}: upstreamed: {', '.join(map(repr, lost))} changes nothing on"
            f" {head[:12]}; nothing was changed",
            hint=(
                f"to take the others of it: {by_hand} && ./scripts/inv patch.export"
                if made
                else (
                    "./scripts/inv patch    shows what is there; what is no patch yet becomes one"
                    " with ./scripts/inv patch.export"
                )
            ),
        )
    return made


def _with_status(git: Git, head: str, made: Sequence[Commit], origin: Origin) -> str:
    """Give each commit the trailer that it lacks. A commit that has it, and its parents too, stays
    the one it is.
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
            else mails.recommitted(git, commit, tip, message)
        )
    return tip


def _origin(layout: Layout, pin: Pin, settings: Settings, source: str) -> Origin:
    if number := re.fullmatch(r"#?([1-9][0-9]{0,8})", source):
        return _pull_request(layout, pin, settings, int(number[1]))
    if re.match(r"https?://", source):
        page = public_of(source)
        public = page or without_user(source)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", public.split("://", 1)[1].removesuffix(".patch"))[
            -80:
        ].strip("-.")
        return Origin(_fetched(f"{page}.patch" if page else source, settings), name, public)
    path = Path(source).expanduser()
    try:
        return Origin(read_regular(path), path.name.removesuffix(".patch"), None)
    except OSError as exc:
        raise SettingsError(
            f"{source} cannot be read: {exc.strerror}",
            hint=(
                "name a file with a mail of git format-patch, a URL, or the number of a pull"
                " request"
            ),
        ) from exc


def public_of(url: str) -> str | None:
    """The page on GitHub of the pull request or commit that an address leads to: it gives the mails
    with .patch behind it.
    """
    found = _ON_GITHUB.fullmatch(url)
    return f"{found[1]}/{found[3] or 'commit/' + found[2]}" if found else None


def _pull_request(layout: Layout, pin: Pin, settings: Settings, number: int) -> Origin:
    """A pull request of the pinned project: from a mirror on this disk that has it, else from
    GitHub.
    """
    found = _GITHUB.fullmatch(pin.url)
    public = f"https://github.com/{found[1]}/{found[2]}/pull/{number}" if found else None
    mirror = Path(checkouts.url_of(layout, pin, settings).removeprefix("file://"))
    if mirror.is_dir():
        raw = mails.pull_request(Git(mirror, failure=SourceError), number)
        if raw:
            return Origin(raw, f"pull-{number}", public)
    if public is None:
        raise SourceError(
            f"pull request {number} of {without_user(pin.url)}: only GitHub's have one, or a mirror"
            f" on this disk with refs/pull/{number}/head",
            hint="./scripts/inv patch.import URL    takes a patch from any address",
        )
    return Origin(_fetched(f"{public}.patch", settings), f"pull-{number}", public)


def _fetched(url: str, settings: Settings) -> bytes:
    """Get what lies at an address, without credentials of anybody. Raises SourceError."""
    import requests

    shown = without_user(url)
    hint = "check the address and the network; or save the mail as a file and import that"
    try:
        with requests.Session() as session:
            # Without this, requests would send what ~/.netrc has for the host.
            session.auth = _nobody
            with session.get(
                url, stream=True, timeout=float(settings.count("CONNECT_TIMEOUT_S") or 5)
            ) as reply:
                reply.raise_for_status()
                raw = b""
                for chunk in reply.iter_content(_CHUNK_BYTES):
                    raw += chunk
                    if len(raw) > LARGEST_BYTES:
                        raise SourceError(
                            f"{shown} is larger than {LARGEST_BYTES >> 20} MiB, which no patch is",
                            hint=hint,
                        )
                return raw
    except requests.HTTPError as exc:
        raise SourceError(
            f"{shown}: the server answers {exc.response.status_code} {exc.response.reason}",
            hint=hint,
        ) from exc
    except (requests.RequestException, ValueError) as exc:
        raise SourceError(f"{shown} could not be fetched: {_reason(exc)}", hint=hint) from exc


def _nobody(request: "requests.PreparedRequest") -> "requests.PreparedRequest":
    return request


def _reason(exc: BaseException) -> str:
    """The innermost cause, whose words are not made of the address."""
    while exc.__context__ is not None:
        exc = exc.__context__
    return without_user(str(exc)) or type(exc).__name__


def _as_mail(origin: Origin) -> bytes:
    """The mails with git's line ends. Raises SettingsError for what is none."""
    raw = origin.raw
    head = raw.partition(b"\n\n")[0].partition(b"\r\n\r\n")[0]
    if head.partition(b"\n")[0].endswith(b"\r"):
        # All of it went through a program that writes such line ends.
        raw, head = raw.replace(b"\r\n", b"\n"), head.replace(b"\r\n", b"\n")
    if all(
        re.search(rb"^%b: " % name, head, re.MULTILINE | re.IGNORECASE)
        for name in (b"From", b"Subject")
    ):
        return raw
    if re.search(rb"^(diff --git |--- \S)", raw, re.MULTILINE) and not raw.lstrip().startswith(
        b"<"
    ):
        raise SettingsError(
            f"{origin.name} is a diff without author and message, expected a mail of git"
            " format-patch",
            hint=(
                "apply it and commit it yourself: git -C vendor/vllm apply FILE && git -C"
                " vendor/vllm commit --all && ./scripts/inv patch.export"
            ),
        )
    raise SettingsError(
        f"{origin.name} is no mail of git format-patch",
        hint="on GitHub, a pull request or a commit has one at its address with .patch behind it",
    )
