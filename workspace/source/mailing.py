"""Commits as mails from which git reads the same commits again, and the reasons why some cannot be."""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from workspace.core.errors import PatchDrift
from workspace.source import mail
from workspace.source.git import Git
from workspace.source.git import mail as mails
from workspace.source.git.mail import Commit
from workspace.source.stack import BASE_REF

Patches = tuple[tuple[str, bytes], ...]
# What series.read takes for a name.
_LONGEST_NAME = 200
_SLUG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


class Unfit(PatchDrift):
    """A commit that cannot be a patch as it is."""


def patches_of(git: Git, base: str, stack: Sequence[Commit], *, shown: str) -> Patches:
    """Return file name and mail of each commit of a stack on `base`, oldest first.

    Raises Unfit, with the way to mend it in the checkout `shown`, where a commit cannot be a patch.
    """
    refuse(git, base, shown, [(commit, why) for commit in stack if (why := _fault(commit))])
    if not stack:
        return ()
    raw = mails.mails(git, base, stack)
    if len(raw) != len(stack):
        trees = [git.tree(base), *(commit.tree for commit in stack)]
        empty = [commit for number, commit in enumerate(stack) if trees[number] == trees[number + 1]]
        refuse(git, base, shown, [(commit, "it changes no file; drop it") for commit in empty] or [(stack[-1], "git does not make one mail of it")])
    slugs, carried = _carried(git, base, shown, stack, raw)
    refuse(git, base, shown, [(commit, why) for number, commit in enumerate(stack) if (why := _nameless(slugs[number], slugs[:number]))])
    return tuple((f"{slug}.patch", content) for slug, content in zip(slugs, carried, strict=True))


def _carried(git: Git, base: str, shown: str, stack: Sequence[Commit], raw: Sequence[bytes]) -> tuple[list[str], list[bytes]]:
    """Slugs and mails. git itself reads what is not plain; where it reads the same but for blanks, all is as git would write that."""
    slugs, carried = [commit.slug for commit in stack], list(raw)
    odd = [number for number, commit in enumerate(stack) if not mail.is_plain(commit.message, commit.author, commit.date)]
    if not odd:
        return slugs, carried
    heads = [raw[number].partition(b"\ndiff --git ")[0] + b"\n" for number in odd]
    with tempfile.TemporaryDirectory(prefix="workspace-mail-") as folder:
        read, written = mails.reread(heads, folder=Path(folder))
    faults = [(stack[number], why) for number, again in zip(odd, read, strict=False) if (why := _misread(stack[number], again))]
    if len(read) != len(odd) and not faults:
        faults = [(stack[odd[min(len(read), len(odd) - 1)]], "git cannot read its message back from a mail")]
    refuse(git, base, shown, faults)
    for number, head, again, text in zip(odd, heads, read, written, strict=True):
        slugs[number], carried[number] = again.slug, text + raw[number][len(head) - 1 :]
    return slugs, carried


def _misread(commit: Commit, again: Commit) -> str | None:
    """What git reads otherwise than it was committed, blanks aside."""
    for what, before, after in (("author", commit.author, again.author), ("date", commit.date, again.date), ("message", commit.message, again.message)):
        old, new = (mail.tidy(text).split() if what == "message" else text.split() for text in (before, after))
        if old != new:
            changed = next((f"{one!r} becomes {other!r}" for one, other in zip(old, new, strict=False) if one != other), "a part is lost")
            return f"git would not read its {what} back from a mail: {changed}"
    return None


def _fault(commit: Commit) -> str | None:
    """Why a commit cannot be a patch, as far as its own words tell."""
    if len(commit.parents) > 1:
        return "it is a merge; rebase what it brings: git rebase makes a line of commits of it"
    if why := mail.unfit(commit.message):
        return why
    status = mail.status_of(commit.message)
    if status is None:
        return f"its message lacks the line `{mail.TRAILER}: Pending`, or what else is true of: {mail.VOCABULARY}"
    return None if mail.is_status(status) else f"its line `{mail.TRAILER}: {status}` is none of: {mail.VOCABULARY}"


def _nameless(slug: str, taken: Sequence[str]) -> str | None:
    """Why a subject gives no name for a file of the series."""
    if not _SLUG.fullmatch(slug):
        return f"its subject gives the file name {slug + '.patch'!r}; it needs one that begins with a letter or digit of ASCII"
    if len(slug) + len(".patch") > _LONGEST_NAME:
        return f"its subject is too long for a file name of {_LONGEST_NAME} letters"
    return f"another patch is called {slug}.patch already; it needs a better subject" if slug in taken else None


def refuse(git: Git, base: str, shown: str, faults: Sequence[tuple[Commit, str]]) -> None:
    """Raise Unfit for commits that cannot be patches, each with the reason why not."""
    if not faults:
        return
    sentences = [f"commit {commit.oid[:12]} ({commit.message.split(chr(10))[0][:60]}) cannot be a patch: {why}" for commit, why in faults]
    more = f"; {len(faults) - 1} more" if len(faults) > 1 else ""
    start = BASE_REF if git.resolve(BASE_REF) == base else base[:12]
    merge = any(len(commit.parents) > 1 for commit, _ in faults)
    hint = f"git -C {shown} rebase {start}" if merge else f"git -C {shown} rebase -i {start}    and `reword`, `edit` or `drop` there"
    raise Unfit(f"{sentences[0]}{more}; nothing was written", hint=f"{hint}, then ./scripts/inv patch.export", details=tuple(sentences[1:10]))
