"""A patch as a mail: its parts, where it stands upstream, whether two differ in more than their
wrapping, and what no mail can carry.
"""

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from email import message_from_bytes
from email.header import decode_header
from email.utils import parsedate_to_datetime
from pathlib import Path

from workspace.core.errors import PatchDrift, SettingsError
from workspace.core.files import read_regular
from workspace.repo.git import Git
from workspace.repo.git import am as mails
from workspace.repo.git.am import Commit
from workspace.repo.series import BASE_REF

TRAILER = "Upstream-Status"
VOCABULARY = (
    "Pending | Submitted [URL] | Backport [commit or URL] | Denied [URL] | Inappropriate [reason] |"
    " Inactive-Upstream [date]"
)
_URL = r"https?://[^\s\]]+"
# Yocto's words,
# https://docs.yoctoproject.org/contributor-guide/recipe-style-guide.html#patch-upstream-status
_STATUS = re.compile(
    rf"Pending( \[.*\])?|(Submitted|Denied) \[{_URL}.*\]|Backport"
    rf" \[({_URL}|[0-9a-f]{{7,40}})\b.*\]|Inappropriate \[.*\S.*\]|Inactive-Upstream \[.*[0-9].*\]"
)
_TRAILER_LINE = re.compile(rf"^{TRAILER}:[ \t]*(.*?)[ \t]*$", re.MULTILINE | re.IGNORECASE)
# Where git mailinfo lets a message end (git-am(1), DISCUSSION).
_END = re.compile(rb"^(?:diff -|Index: |---[ \t\r\f\v]*$|--- \S)", re.MULTILINE)
# Compare is_from_line in git's mailsplit: the time of day and a year.
_NEXT = re.compile(r"From .*\d.\d\d:\d\d\s*(?:9[1-9]|[1-9]\d\d+)[^:]*")
_DIFF = re.compile(rb"^diff --git ", re.MULTILINE)
_HUNK = re.compile(rb"(@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@).*", re.DOTALL)
_INDEX = re.compile(rb"index [0-9a-f]+\.\.[0-9a-f]+")
# A message of which it is known that git reads from a mail what was written: no blanks that it
# would take out, nothing that it takes for more than text.
_PLAIN_SUBJECT = re.compile(
    r"(?!.*=\?)(?:\[(?![^]]*PATCH)[A-Za-z0-9 /_+-]+\] ?)*(?![Rr][Ee]:|\[|:)[^\s\x00-\x1f\x7f]+(?:"
    r" [^\s\x00-\x1f\x7f]+)*"
)
_PLAIN_LINE = re.compile(r"(?!From |>From |---|diff -|Index: )[^\x00-\x08\x0a-\x1f\x7f]*(?<!\s)")
_PLAIN_FIRST = re.compile(r"(?!(?:From|Date|Subject)\b|\[|\s)", re.IGNORECASE)
_PLAIN_AUTHOR = re.compile(
    r"(?=.{3,60} <)\w+(?:[ .'-]{1,2}(?<!  )\w+)*\.? <[A-Za-z0-9.+_-]+@[A-Za-z0-9.-]+>"
)
_PLAIN_DATE = re.compile(r"[1-3]?[0-9]{9} [+-](?:0[0-9]|1[0-3])[0-5][0-9]")


@dataclass(frozen=True)
class Mail:
    """One patch. `author` is `name <email>`, `date` as the mail has it, `message` what follows the
    subject, `status` the text of the trailer.
    """

    subject: str
    author: str
    date: str
    message: str
    status: str | None
    diff: bytes

    @property
    def slug(self) -> str:
        """The subject as git spells it in file names (`git log --format=%f`)."""
        return (
            re.sub(r"[^A-Za-z0-9._]+", "-", re.sub(r"\.{2,}", ".", self.subject))
            .lstrip("-")
            .rstrip(".-")
        )


def read_mail(path: Path) -> Mail:
    """Read a patch file. Raises SettingsError where it cannot be read; what is no mail has empty
    parts.
    """
    try:
        return parse(read_regular(path))
    except OSError as exc:
        raise SettingsError(
            f"{path.name} cannot be read: {exc.strerror}", hint=f"ls -l {path}"
        ) from exc


def parse(raw: bytes) -> Mail:
    """Take a mail apart: headers unfolded and decoded (RFC 2047), the message in its own encoding,
    the diff as it stands.
    """
    headers, body = _headers(raw)
    if headers.get("content-transfer-encoding", "").lower() in ("quoted-printable", "base64"):
        decoded = message_from_bytes(raw).get_payload(decode=True)
        body = decoded.replace(b"\r\n", b"\n") if isinstance(decoded, bytes) else body
    end = _END.search(body)
    start = _DIFF.search(body, end.start()) if end else None
    charset = re.search(r"charset=\"?([\w.-]+)", headers.get("content-type", ""), re.IGNORECASE)
    message = tidy(
        _decoded(body[: end.start()] if end else body, charset[1] if charset else "utf-8")
    )
    # As git am with --keep-non-patch.
    subject = re.sub(r"^(?:\[[^]]*PATCH[^]]*\]|[Rr][Ee]:|[\s:])+", "", headers.get("subject", ""))
    return Mail(
        subject,
        headers.get("from", ""),
        headers.get("date", ""),
        message,
        status_of(message),
        body[start.start() :] if start else b"",
    )


def status_of(message: str) -> str | None:
    """The text of the last Upstream-Status line of a message, or None where there is none."""
    found = _TRAILER_LINE.findall(message)
    return str(found[-1]) if found else None


def with_trailer(message: str, line: str) -> str:
    """A message, subject included, with one more line among its trailers."""
    message = tidy(message)
    last = message.rpartition("\n\n")[2] if "\n\n" in message else ""
    is_block = bool(last) and all(
        re.match(r"[A-Za-z][A-Za-z0-9-]*: |\(cherry picked from|\s", entry)
        for entry in last.split("\n")
    )
    return message + ("\n" if is_block else "\n\n") + line


def without_status(message: str) -> str:
    """A message, subject included, without its Upstream-Status lines."""
    return tidy("\n".join(line for line in message.split("\n") if not _TRAILER_LINE.match(line)))


def is_status(text: str) -> bool:
    """Whether a text is of VOCABULARY."""
    return bool(_STATUS.fullmatch(text))


def same_change(a: bytes, b: bytes, *, anywhere: bool = False) -> bool:
    """Whether two mails are the same patch: author, moment, message and every line of every hunk,
    with its place unless `anywhere`.

    What may differ: the first line, how headers are folded and encoded, diffstat and signature, the
    blobs of text files, and the function that git names beside a hunk.
    """
    one, other = parse(a), parse(b)
    return (one.subject, one.author, _moment(one), one.message) == (
        other.subject,
        other.author,
        _moment(other),
        other.message,
    ) and (_changes(one.diff, anywhere=anywhere) == _changes(other.diff, anywhere=anywhere))


def tidy(message: str) -> str:
    """A message as `git commit` cleans it: no blanks at the ends of lines, no blank lines at its
    ends or twice in a row.
    """
    lines = "\n".join(line.rstrip(" \t\r\f\v") for line in message.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip("\n")


def is_plain(message: str, author: str, date: str) -> bool:
    """Whether git surely reads from a mail the message, `name <email>` and `seconds zone` that were
    written into it.

    False means only that it has to be tried.
    """
    message = message.removesuffix("\n")
    subject, *lines = message.split("\n")
    if tidy(message) != message or not (
        _PLAIN_SUBJECT.fullmatch(subject)
        and _PLAIN_AUTHOR.fullmatch(author)
        and _PLAIN_DATE.fullmatch(date)
    ):
        return False
    if any("\ud800" <= letter <= "\udfff" for letter in message + author):
        return False
    return not lines or (
        lines[0] == ""
        and bool(_PLAIN_FIRST.match(lines[1]))
        and all(_PLAIN_LINE.fullmatch(line) for line in lines)
    )


def unfit(message: str) -> str | None:
    """Say why git could not read this message back from a mail, or None where it may."""
    subject, *lines = message.removesuffix("\n").split("\n")
    for line in lines:
        if _END.match(line.encode(errors="surrogateescape")):
            return f"its message has the line {line[:60]!r}, where git lets a message end"
        if _NEXT.fullmatch(line):
            return f"its message has the line {line[:60]!r}, at which git begins the next mail"
    first = next((line for line in lines if line.strip()), "")
    if re.match(r"(From|Date|Subject):|\[PATCH\]\s", first, re.IGNORECASE):
        return f"its message begins with {first[:60]!r}, which git takes for a header"
    if found := re.match(r"(?:\[[^]]*\]|[\s:])*?([Rr][Ee]:|:|\[[^]]*PATCH[^]]*\])", subject):
        return f"its subject has {found[1]!r}, which git takes off when it reads a mail"
    return None


def _headers(raw: bytes) -> tuple[dict[str, str], bytes]:
    """The headers by lower-case name, the first of each, and what follows them."""
    head, _, body = raw.partition(b"\n\n")
    lines = re.sub(rb"\r?\n[ \t]+", b" ", head).split(b"\n")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, text = line.partition(b":")
        if colon and b" " not in name:
            headers.setdefault(name.decode("ascii", errors="replace").lower(), _header(text))
    return headers, body


def _header(text: bytes) -> str:
    plain = text.decode(errors="surrogateescape")
    if "=?" in plain:
        parts = [
            part.decode(charset or "ascii", errors="replace") if isinstance(part, bytes) else part
            for part, charset in _words(plain)
        ]
        plain = "".join(parts)
    # A name in quotes is the same name (RFC 5322, 3.2.4).
    return re.sub(
        r'^"(.*)" <',
        lambda found: re.sub(r"\\(.)", r"\1", found[1]) + " <",
        " ".join(plain.split()),
    )


def _words(text: str) -> list[tuple[bytes | str, str | None]]:
    try:
        words = list(decode_header(text))
        for part, charset in words:
            if isinstance(part, bytes):
                part.decode(charset or "ascii", errors="replace")
    except (LookupError, ValueError):
        return [(text, None)]
    return words


def _decoded(text: bytes, charset: str) -> str:
    try:
        return text.decode(charset)
    except (LookupError, ValueError):
        return text.decode(errors="surrogateescape")


def _moment(mail: Mail) -> object:
    """The date with its zone, as far as it can be read."""
    try:
        date = parsedate_to_datetime(mail.date)
    except (TypeError, ValueError, OverflowError, IndexError):
        return mail.date
    return date.replace(tzinfo=None), date.utcoffset() or timedelta()


def _changes(diff: bytes, *, anywhere: bool) -> list[bytes]:
    """The lines of a diff that make the change. Only outside of hunks is there anything to leave
    out.
    """
    kept: list[bytes] = []
    old = new = index = 0
    blobs = b""
    for line in diff.split(b"\n"):
        if old > 0 or new > 0:
            old -= line[:1] in (b" ", b"-", b"")
            new -= line[:1] in (b" ", b"+", b"")
        elif found := _HUNK.match(line):
            old, new = (1 if count is None else int(count) for count in found.groups()[1:])
            line = b"@@" if anywhere else found[1]
        elif line == b"-- ":
            break
        elif line.startswith(b"index "):
            index, blobs, line = len(kept), line, _INDEX.sub(b"index", line)
        elif line == b"GIT binary patch":
            # git applies it to no other blob than the one that it names.
            kept[index] = blobs
        elif not line:
            continue
        kept.append(line)
    return kept


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
        empty = [
            commit for number, commit in enumerate(stack) if trees[number] == trees[number + 1]
        ]
        refuse(
            git,
            base,
            shown,
            [(commit, "it changes no file; drop it") for commit in empty]
            or [(stack[-1], "git does not make one mail of it")],
        )
    slugs, carried = _carried(git, base, shown, stack, raw)
    refuse(
        git,
        base,
        shown,
        [
            (commit, why)
            for number, commit in enumerate(stack)
            if (why := _nameless(slugs[number], slugs[:number]))
        ],
    )
    return tuple((f"{slug}.patch", content) for slug, content in zip(slugs, carried, strict=True))


def _carried(
    git: Git, base: str, shown: str, stack: Sequence[Commit], raw: Sequence[bytes]
) -> tuple[list[str], list[bytes]]:
    """Slugs and mails. git itself reads what is not plain; where it reads the same but for blanks,
    all is as git would write that.
    """
    slugs, carried = [commit.slug for commit in stack], list(raw)
    odd = [
        number
        for number, commit in enumerate(stack)
        if not is_plain(commit.message, commit.author, commit.date)
    ]
    if not odd:
        return slugs, carried
    heads = [raw[number].partition(b"\ndiff --git ")[0] + b"\n" for number in odd]
    with tempfile.TemporaryDirectory(prefix="workspace-mail-") as folder:
        read, written = mails.reread(heads, folder=Path(folder))
    faults = [
        (stack[number], why)
        for number, again in zip(odd, read, strict=False)
        if (why := _misread(stack[number], again))
    ]
    if len(read) != len(odd) and not faults:
        faults = [
            (
                stack[odd[min(len(read), len(odd) - 1)]],
                "git cannot read its message back from a mail",
            )
        ]
    refuse(git, base, shown, faults)
    for number, head, again, text in zip(odd, heads, read, written, strict=True):
        slugs[number], carried[number] = again.slug, text + raw[number][len(head) - 1 :]
    return slugs, carried


def _misread(commit: Commit, again: Commit) -> str | None:
    """What git reads otherwise than it was committed, blanks aside."""
    for what, before, after in (
        ("author", commit.author, again.author),
        ("date", commit.date, again.date),
        ("message", commit.message, again.message),
    ):
        old, new = (
            tidy(text).split() if what == "message" else text.split() for text in (before, after)
        )
        if old != new:
            changed = next(
                (
                    f"{one!r} becomes {other!r}"
                    for one, other in zip(old, new, strict=False)
                    if one != other
                ),
                "a part is lost",
            )
            return f"git would not read its {what} back from a mail: {changed}"
    return None


def _fault(commit: Commit) -> str | None:
    """Why a commit cannot be a patch, as far as its own words tell."""
    if len(commit.parents) > 1:
        return "it is a merge; rebase what it brings: git rebase makes a line of commits of it"
    if why := unfit(commit.message):
        return why
    status = status_of(commit.message)
    if status is None:
        return (
            f"its message lacks the line `{TRAILER}: Pending`, or what else is true of:"
            f" {VOCABULARY}"
        )
    return None if is_status(status) else f"its line `{TRAILER}: {status}` is none of: {VOCABULARY}"


def _nameless(slug: str, taken: Sequence[str]) -> str | None:
    """Why a subject gives no name for a file of the series."""
    if not _SLUG.fullmatch(slug):
        return (
            f"its subject gives the file name {slug + '.patch'!r}; it needs one that begins with a"
            " letter or digit of ASCII"
        )
    if len(slug) + len(".patch") > _LONGEST_NAME:
        return f"its subject is too long for a file name of {_LONGEST_NAME} letters"
    return (
        f"another patch is called {slug}.patch already; it needs a better subject"
        if slug in taken
        else None
    )


def refuse(git: Git, base: str, shown: str, faults: Sequence[tuple[Commit, str]]) -> None:
    """Raise Unfit for commits that cannot be patches, each with the reason why not."""
    if not faults:
        return
    sentences = [
        f"commit {commit.oid[:12]} ({commit.message.split(chr(10))[0][:60]}) cannot be a patch:"
        f" {why}"
        for commit, why in faults
    ]
    more = f"; {len(faults) - 1} more" if len(faults) > 1 else ""
    start = BASE_REF if git.resolve(BASE_REF) == base else base[:12]
    merge = any(len(commit.parents) > 1 for commit, _ in faults)
    hint = (
        f"git -C {shown} rebase {start}"
        if merge
        else f"git -C {shown} rebase -i {start}    and `reword`, `edit` or `drop` there"
    )
    raise Unfit(
        f"{sentences[0]}{more}; nothing was written",
        hint=f"{hint}, then ./scripts/inv patch.export",
        details=tuple(sentences[1:10]),
    )
