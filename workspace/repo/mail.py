"""Patches as mails: parsing, Upstream-Status, comparison, and commits that no mail can carry."""

import codecs
import itertools
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from email import message_from_bytes
from email.header import decode_header
from email.utils import parsedate_to_datetime
from pathlib import Path

from workspace.core import hints
from workspace.core.errors import PatchDrift, SettingsError
from workspace.core.files import read_regular
from workspace.repo.git import Git, am
from workspace.repo.git.am import SEPARATOR, Commit
from workspace.repo.series import BASE_REF, file_stems

TRAILER = "Upstream-Status"
VOCABULARY = (
    "Pending | Submitted [URL] | Backport [commit or URL] | Denied [URL] | Inappropriate [reason] |"
    " Inactive-Upstream [date]"
)
_URL = r"https?://[^\s\]]+"
# The vocabulary of Yocto:
# https://docs.yoctoproject.org/contributor-guide/recipe-style-guide.html#patch-upstream-status
_STATUS = re.compile(
    rf"Pending( \[.*\])?|(Submitted|Denied) \[{_URL}.*\]|Backport"
    rf" \[({_URL}|[0-9a-f]{{7,40}})\b.*\]|Inappropriate \[.*\S.*\]|Inactive-Upstream \[.*[0-9].*\]"
)
_TRAILER_LINE = re.compile(rf"^{TRAILER}:[ \t]*(.*?)[ \t]*$", re.MULTILINE | re.IGNORECASE)
# Where git mailinfo lets a message end (git-am(1), DISCUSSION).
_END = re.compile(rb"^(?:diff -|Index: |---[ \t\r\f\v]*$|--- \S)", re.MULTILINE)
_ENCODED = ("quoted-printable", "base64")
_DIFF = re.compile(rb"^diff --git ", re.MULTILINE)
_HAS_DIFF = re.compile(rb"^(?:diff --git |--- \S.*\n\+\+\+ \S)", re.MULTILINE)
_HUNK = re.compile(rb"(@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@).*", re.DOTALL)
_INDEX = re.compile(rb"index [0-9a-f]+\.\.[0-9a-f]+")


@dataclass(frozen=True)
class Mail:
    """A patch.

    `author` is `name <email>`, `date` as in the mail, `message` the text after the subject,
    `status` the text of the Upstream-Status trailer.
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
    """Read a patch file; content that is no mail gives empty parts.

    Raises SettingsError where the file cannot be read.
    """
    try:
        return parse(read_regular(path))
    except OSError as exc:
        raise SettingsError(
            f"{path.name} cannot be read: {exc.strerror}",
            hint=hints.text("core.list_file", path=path),
        ) from exc


def parse(raw: bytes) -> Mail:
    """Parse a mail: headers are unfolded and decoded (RFC 2047), the diff stays unchanged."""
    headers, body = _headers(raw := decoded(raw))
    end = _END.search(body)
    start = _DIFF.search(body, end.start()) if end else None
    charset = re.search(r"charset=\"?([\w.-]+)", headers.get("content-type", ""), re.IGNORECASE)
    message = tidy(
        _decoded(body[: end.start()] if end else body, charset[1] if charset else "utf-8")
    )
    # As `git am --keep-non-patch` does.
    subject = re.sub(r"^(?:\[[^]]*PATCH[^]]*\]|[Rr][Ee]:|[\s:])+", "", headers.get("subject", ""))
    return Mail(
        subject,
        headers.get("from", ""),
        headers.get("date", ""),
        message,
        status_of(message),
        body[start.start() :] if start else b"",
    )


def decoded(raw: bytes) -> bytes:
    """Return a mail without transfer encoding: quoted-printable or base64 (RFC 2045)."""
    if _headers(raw)[0].get("content-transfer-encoding", "").lower() not in _ENCODED:
        return raw
    body = message_from_bytes(raw).get_payload(decode=True)
    if not isinstance(body, bytes):
        return raw
    head = re.sub(rb"(?i)\nContent-Transfer-Encoding:.*", b"", raw.partition(b"\n\n")[0])
    return head + b"\n\n" + body.replace(b"\r\n", b"\n")


def status_of(message: str) -> str | None:
    """Return the text of the last Upstream-Status line of a message, or None."""
    found = _TRAILER_LINE.findall(message)
    return str(found[-1]) if found else None


def with_trailer(message: str, line: str) -> str:
    """Return a message, subject included, with one more trailer line."""
    message = tidy(message)
    last = message.rpartition("\n\n")[2] if "\n\n" in message else ""
    is_block = bool(last) and all(
        re.match(r"[A-Za-z][A-Za-z0-9-]*: |\(cherry picked from|\s", entry)
        for entry in last.split("\n")
    )
    return message + ("\n" if is_block else "\n\n") + line


def without_status(message: str) -> str:
    """Return a message, subject included, without its Upstream-Status lines."""
    return tidy("\n".join(line for line in message.split("\n") if not _TRAILER_LINE.match(line)))


def is_status(text: str) -> bool:
    """Return whether a text is a status of VOCABULARY."""
    return bool(_STATUS.fullmatch(text))


def same_change(a: bytes, b: bytes, *, anywhere: bool = False) -> bool:
    """Return whether two mails are the same patch: author, date, message and every changed line.

    The line numbers count unless `anywhere`. Not compared: the first line, the folding and encoding
    of headers, diffstat and signature, the blob OIDs of text files, and the function name that git
    prints beside a hunk.
    """
    first, second = parse(a), parse(b)
    return (first.subject, first.author, _moment(first), first.message) == (
        second.subject,
        second.author,
        _moment(second),
        second.message,
    ) and (_changes(first.diff, anywhere=anywhere) == _changes(second.diff, anywhere=anywhere))


def tidy(message: str) -> str:
    """Return a message as `git commit` cleans it.

    No blanks at the ends of lines; no blank lines at the start, at the end or twice in a row.
    """
    lines = "\n".join(line.rstrip(" \t\r\f\v") for line in message.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip("\n")


def has_diff(raw: bytes) -> bool:
    """Return whether a mail has a diff; a cover letter and an empty commit have none."""
    return bool(_HAS_DIFF.search(raw))


def made(author: str, date: str, message: bytes, diff: bytes) -> bytes:
    """Return a mail of a diff; the first paragraph of the message is the subject."""
    dated = f"Date: {date}\n" if date else ""
    head = f"From: {author}\n{dated}Subject: ".encode(errors="surrogateescape")
    subject, _, text = message.partition(b"\n\n")
    body = b" ".join(subject.split()) + b"\n\n" + text + b"\n---\n"
    return SEPARATOR + head + body + with_prefixes(diff)


def with_status(raw: bytes, line: str) -> bytes:
    """Return a mail with this last line of its message, unless it has a status."""
    _, body = _headers(raw := decoded(raw))
    read, end = parse(raw), _END.search(body)
    if end is None or (read.status and is_status(read.status)):
        return raw
    message = with_trailer(without_status(f"{read.subject}\n\n{read.message}"), line)
    text = message.encode(errors="surrogateescape")
    return made(read.author, read.date, text, body[end.start() :])


def with_header(raw: bytes, name: str, text: str) -> bytes:
    """Return a mail with another text of a header that it has."""
    header = f"{name}: {text}".encode(errors="surrogateescape")
    return re.sub(
        rb"^%b:.*(?:\n[ \t].*)*" % name.encode(),
        lambda _: header,
        raw,
        count=1,
        flags=re.MULTILINE | re.IGNORECASE,
    )


def with_prefixes(raw: bytes) -> bytes:
    """Return a mail or a diff with a/ and b/ before paths, as `git diff --no-prefix` omits them."""
    lines = raw.split(b"\n")
    is_bare = False
    for index, is_content in enumerate(tuple(_in_hunks(lines))):
        line = lines[index]
        if is_content:
            continue
        if line.startswith(b"diff --git "):
            pair = _bare_pair(lines[index : index + 5])
            is_bare = pair is not None
            lines[index] = b"diff --git a/%b b/%b" % pair if pair else line
        elif line.startswith(b"--- ") and lines[index + 1 : index + 2] == [b"+++ " + line[4:]]:
            is_bare = True
        if is_bare and line[:4] in (b"--- ", b"+++ ") and line[4:] != b"/dev/null":
            lines[index] = line[:4] + (b"a/" if line[:1] == b"-" else b"b/") + line[4:]
    return b"\n".join(lines)


@dataclass(frozen=True)
class FileChange:
    """The part of a mail that changes one file.

    `old` and `new` are its paths, None where the file is added or deleted.
    """

    old: str | None
    new: str | None
    text: bytes


def file_changes(raw: bytes) -> tuple[bytes, tuple[FileChange, ...]]:
    """Return the text before the first diff of a mail, and its diffs, one for each file.

    The diffs need prefixes (a/ and b/). Joined by line ends, they are the mail again.
    """
    lines = raw.split(b"\n")
    starts: list[int] = []
    is_begun = False
    for index, is_content in enumerate(_in_hunks(lines)):
        if is_content:
            continue
        if lines[index].startswith(b"diff --git "):
            starts.append(index)
            is_begun = True
        elif _HAS_DIFF.match(b"\n".join(lines[index : index + 2])):
            starts += [] if is_begun else [index]
            is_begun = False
    ends = [*starts, len(lines)]
    changes = tuple(_file_change(lines[i:j]) for i, j in itertools.pairwise(ends))
    return b"\n".join(lines[: ends[0]]), changes


def _file_change(lines: Sequence[bytes]) -> FileChange:
    paths = am.paths(lines[0])
    old = new = paths[0] if paths else None
    for line, is_content in zip(lines, _in_hunks(lines), strict=True):
        if is_content:
            break
        if found := re.match(rb"(?:(---|(?:rename|copy) from)|\+\+\+|(?:rename|copy) to) ", line):
            path = _path_of(line[found.end() :], has_prefix=line[:3] in (b"---", b"+++"))
            old, new = (path, new) if found[1] else (old, path)
        elif line.startswith(b"new file mode"):
            old = None
        elif line.startswith(b"deleted file mode"):
            new = None
    return FileChange(old, new, b"\n".join(lines))


def _path_of(text: bytes, *, has_prefix: bool) -> str | None:
    """Return the path of a line of a diff, which git may have quoted; None for /dev/null."""
    text = text.split(b"\t")[0].rstrip(b"\r")
    if text == b"/dev/null":
        return None
    if text.startswith(b'"'):
        text = codecs.escape_decode(text.strip(b'"'))[0]
    path = text.decode(errors="surrogateescape")
    return path.partition("/")[2] if has_prefix else path


def _bare_pair(head: Sequence[bytes]) -> tuple[bytes, bytes] | None:
    """Return the two paths that the head of a file's diff has without prefixes, or None."""
    text = head[0].removeprefix(b"diff --git ")
    names = {
        line.split(b" ", 2)[1]: line.split(b" ", 2)[2]
        for line in head[1:]
        if line.startswith((b"rename ", b"copy "))
    }
    path = text[: len(text) // 2]
    pair = (names[b"from"], names[b"to"]) if {b"from", b"to"} <= names.keys() else (path, path)
    return pair if text == b"%b %b" % pair else None


def _headers(raw: bytes) -> tuple[dict[str, str], bytes]:
    """Return the headers by lower-case name, the first of each, and the rest of the mail."""
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
            for part, charset in _encoded_parts(plain)
        ]
        plain = "".join(parts)
    # A name in quotes is the same name (RFC 5322, 3.2.4).
    return re.sub(
        r'^"(.*)" <',
        lambda found: re.sub(r"\\(.)", r"\1", found[1]) + " <",
        " ".join(plain.split()),
    )


def _encoded_parts(text: str) -> list[tuple[bytes | str, str | None]]:
    """Return the parts of a header with their charset (RFC 2047); undecodable text as one part."""
    try:
        parts = list(decode_header(text))
        for part, charset in parts:
            if isinstance(part, bytes):
                part.decode(charset or "ascii", errors="replace")
    except (LookupError, ValueError):
        return [(text, None)]
    return parts


def _decoded(text: bytes, charset: str) -> str:
    try:
        return text.decode(charset)
    except (LookupError, ValueError):
        return text.decode(errors="surrogateescape")


def _moment(mail: Mail) -> object:
    """Return the date with its zone, or its text where it cannot be parsed."""
    try:
        date = parsedate_to_datetime(mail.date)
    except (TypeError, ValueError, OverflowError, IndexError):
        return mail.date
    return date.replace(tzinfo=None), date.utcoffset() or timedelta()


def _changes(diff: bytes, *, anywhere: bool) -> list[bytes]:
    """Return the lines of a diff that make the change; only lines outside of hunks are left out."""
    kept: list[bytes] = []
    index = 0
    blobs = b""
    lines = diff.split(b"\n")
    for line, is_content in zip(lines, _in_hunks(lines), strict=True):
        if is_content:
            pass
        elif found := _HUNK.match(line):
            line = b"@@" if anywhere else found[1]
        elif line == b"-- ":
            break
        elif line.startswith(b"index "):
            index, blobs, line = len(kept), line, _INDEX.sub(b"index", line)
        elif line == b"GIT binary patch":
            # git applies a binary patch only to the blob that it names.
            kept[index] = blobs
        elif not line:
            continue
        kept.append(line)
    return kept


def _in_hunks(lines: Sequence[bytes]) -> Iterator[bool]:
    """Yield for each line of a diff whether it is the content of a hunk."""
    old = new = 0
    for line in lines:
        yield (is_content := old > 0 or new > 0)
        if is_content:
            old -= line[:1] in (b" ", b"-", b"")
            new -= line[:1] in (b" ", b"+", b"")
        elif found := _HUNK.match(line):
            old, new = (1 if count is None else int(count) for count in found.groups()[1:])


Patches = tuple[tuple[str, bytes], ...]


class Unfit(PatchDrift):
    """A commit that cannot be a patch in its present form."""


def patches_of(git: Git, base: str, stack: Sequence[Commit], *, shown: str) -> Patches:
    """Return file name and mail of each commit of a stack on `base`, oldest first.

    Raises Unfit for a commit that cannot be a patch, with the fix in the checkout `shown`.
    """
    faults = [(commit, reason) for commit in stack if (reason := _fault(commit))]
    refuse(git, base, shown, faults)
    if not stack:
        return ()
    raw = am.mails(git, base, stack)
    if len(raw) != len(stack):
        trees = [git.tree(base), *(commit.tree for commit in stack)]
        empty = [
            (commit, "it changes no file; drop it")
            for before, after, commit in zip(trees, trees[1:], stack, strict=False)
            if before == after
        ]
        refuse(git, base, shown, empty or [(stack[-1], "git does not make one mail of it")])
    names = [f"{stem}.patch" for stem in file_stems(commit.slug for commit in stack)]
    return tuple(zip(names, raw, strict=True))


def read_back(
    git: Git, base: str, stack: Sequence[Commit], patches: Patches, *, shown: str
) -> Patches:
    """Return the patches of a stack after `git am` has made its commits and tree of them again.

    A message that git reads with other blanks is written as git reads it. Raises Unfit.
    """
    if not stack:
        return ()
    with tempfile.TemporaryDirectory(prefix="workspace-mail-") as folder:
        files = [Path(folder, str(index)) for index in range(len(patches))]
        for file, (_, content) in zip(files, patches, strict=True):
            file.write_bytes(content)
        done = am.applied_directly(git, base, files, place=Path(folder, "am"))
    if done.tip is None:
        refuse(git, base, shown, [(stack[done.position - 1], f"git am of its mail: {done.reason}")])
    made = am.commits(git, base, done.tip or base)
    faults = [
        (commit, fault)
        for commit, again in zip(stack, made, strict=False)
        if (fault := _misread(commit, again))
    ]
    if not faults and len(made) != len(stack):
        faults = [(stack[min(len(made), len(stack) - 1)], "git am does not make one commit of it")]
    refuse(git, base, shown, faults)
    written = [content for _, content in patches]
    if [commit.message for commit in stack] != [again.message for again in made]:
        written = am.mails(git, base, made)
    stems = file_stems(again.slug for again in made)
    return tuple(
        (f"{stem}.patch", content if commit.message == again.message else text)
        for stem, commit, again, (_, content), text in zip(
            stems, stack, made, patches, written, strict=True
        )
    )


def _misread(commit: Commit, again: Commit) -> str | None:
    """Return the part that git reads back differently, blanks aside, or None."""
    for part in ("author", "date", "message", "tree"):
        before, after = getattr(commit, part), getattr(again, part)
        if before != after and tidy(before).split() != tidy(after).split():
            return f"git would not read its {part} back from a mail"
    return None


def _fault(commit: Commit) -> str | None:
    """Return why a commit cannot be a patch, judged by its parents and message, or None."""
    if len(commit.parents) > 1:
        return "it is a merge; git rebase turns it into a line of commits"
    status = status_of(commit.message)
    if status is None:
        return f"its message lacks the line `{TRAILER}: Pending`, or another of: {VOCABULARY}"
    return None if is_status(status) else f"its line `{TRAILER}: {status}` is none of: {VOCABULARY}"


def refuse(git: Git, base: str, shown: str, faults: Sequence[tuple[Commit, str]]) -> None:
    """Raise Unfit for commits that cannot be patches, each with its reason; return if none."""
    if not faults:
        return
    sentences = [
        f"commit {commit.oid[:12]} ({commit.message.split(chr(10))[0][:60]}) cannot be a patch:"
        f" {reason}"
        for commit, reason in faults
    ]
    more = f"; and {len(faults) - 1} more" if len(faults) > 1 else ""
    start = BASE_REF if git.resolve(BASE_REF) == base else base[:12]
    hint = hints.text("repo.rebase_interactive", shown=shown, start=start)
    if any(len(commit.parents) > 1 for commit, _ in faults):
        hint = hints.text("repo.rebase", shown=shown, start=start)
    elif [(commit.oid, status_of(commit.message)) for commit, _ in faults] == [(git.head(), None)]:
        hint = hints.text("repo.add_trailer", shown=shown)
    raise Unfit(
        f"{sentences[0]}{more}; nothing was written",
        hint=hint,
        details=tuple(sentences[1:10]),
    )
