"""Mails parsed as git parses them, and the comparison of two patches."""

from pathlib import Path

import pytest

from tests.repo.conftest import Upstream, sh_git
from workspace.core.errors import SettingsError
from workspace.repo import mail


def test_exported_mail_is_parsed_into_its_parts(tmp_path: Path, upstream: Upstream) -> None:
    (name, content), _ = upstream.patches.items()
    (tmp_path / name).write_bytes(content)
    read = mail.read_mail(tmp_path / name)
    assert (read.subject, read.author, read.status) == (
        "[Bugfix] Größer: twenty in words",
        "Ünal <u@example.invalid>",
        "Pending",
    )
    assert read.message == "Why, in Füße.\n\nUpstream-Status: Pending"
    assert f"{read.slug}.patch" == name
    assert read.diff.startswith(b"diff --git a/vllm/lines.py")
    with pytest.raises(SettingsError, match="cannot be read"):
        mail.read_mail(tmp_path / "nothing.patch")


@pytest.mark.parametrize(
    ("head", "subject", "author", "message"),
    [
        (b"Subject: a very\n long one\nFrom: A <a@b>\n\nm\n", "a very long one", "A <a@b>", "m"),
        (
            (
                b"subject: =?UTF-8?q?a=20=C3=B6?=\n =?UTF-8?q?=C3=9F?=\nFrom: =?iso-8859-1?q?=D6?="
                b" <a@b>\n\n"
            ),
            "a öß",
            "Ö <a@b>",
            "",
        ),
        (
            b'Subject: [PATCH v2 3/7] [X] x\nFrom: "J. Doe, \\"Jr\\"" <a@b>\n\nm\n',
            "[X] x",
            'J. Doe, "Jr" <a@b>',
            "m",
        ),
        (
            b"Subject: x\nFrom: A <a@b>\nContent-Type: text/plain; charset=iso-8859-1\n\n\xf6\n",
            "x",
            "A <a@b>",
            "ö",
        ),
        (
            (
                b"Subject: x\nFrom: A <a@b>\nContent-Transfer-Encoding: quoted-printable\n\n=C3=B6"
                b" a=\nb\n"
            ),
            "x",
            "A <a@b>",
            "ö ab",
        ),
        (
            (
                b"Subject: =?nosuch?q?x?=\nFrom: A <a@b>\nContent-Type: text/plain;"
                b" charset=nosuch\n\n\xff\n"
            ),
            "=?nosuch?q?x?=",
            "A <a@b>",
            "\udcff",
        ),
        (b"no mail at all", "", "", ""),
    ],
)
def test_headers_and_message_are_decoded(
    head: bytes, subject: str, author: str, message: str
) -> None:
    read = mail.parse(b"From x Mon Sep 17 00:00:00 2001\n" + head)
    assert (read.subject, read.author, read.message) == (subject, author, message)


SUBJECTS = (
    "[Bugfix][CPU] Extract it",
    "a..b",
    ".a.",
    "-x-",
    "x_y: z (#12)",
    "ß",
    "äöü x",
    "a" * 90,
    "50% / more!",
)


def test_slug_is_what_git_makes_of_the_subject(tmp_path: Path) -> None:
    sh_git(tmp_path, "init", "--quiet")
    for subject in SUBJECTS:
        sh_git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", subject)
    assert [mail.Mail(subject, "", "", "", None, b"").slug for subject in SUBJECTS] == sh_git(
        tmp_path, "log", "--reverse", "--format=%f"
    ).split("\n")


@pytest.mark.parametrize(
    "status",
    [
        "Pending",
        "Pending [waits for a review]",
        "Submitted [https://github.com/vllm-project/vllm/pull/1]",
        "Backport [0123456789abcdef0123456789abcdef01234567]",
        "Backport [https://github.com/vllm-project/vllm/commit/0123456]",
        "Denied [https://example.invalid/1 they want it otherwise]",
        "Inactive-Upstream [2026-01-02]",
        "Inappropriate [for GB10 only]",
    ],
)
def test_vocabulary_of_the_status(status: str) -> None:
    assert mail.is_status(status)
    assert (
        mail.status_of(f"x\n\nbody\n\nUpstream-Status: {status}\nSigned-off-by: a <a@b>\n")
        == status
    )


@pytest.mark.parametrize(
    "status",
    [
        "",
        "pending",
        "Pending soon",
        "Submitted",
        "Submitted []",
        "Submitted [later]",
        "Backport [main]",
        "Inappropriate",
        "Done",
    ],
)
def test_texts_that_are_no_status(status: str) -> None:
    assert not mail.is_status(status)


def change(content: bytes, old: bytes, new: bytes) -> bytes:
    assert old in content
    return content.replace(old, new)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"+line twenty", b"+line 20!"),
        (b" line 19", b" line nineteen"),
        (b"@@ -17,7 +17,7 @@", b"@@ -18,7 +18,7 @@"),
        ("Füße".encode(), b"feet"),
        (b"Status: Pending", b"Status: Submitted [https://x.invalid/1]"),
        (b"u@example.invalid", b"v@example.invalid"),
        (b"2026 03:04:05 +0000", b"2026 03:04:06 +0000"),
        (b"2026 03:04:05 +0000", b"2026 04:04:05 +0100"),
        (b" 100644\n", b" 100755\n"),
    ],
)
def test_changed_content_is_another_patch(upstream: Upstream, old: bytes, new: bytes) -> None:
    content = next(iter(upstream.patches.values()))
    assert mail.same_change(content, content)
    assert not mail.same_change(content, change(content, old, new))


def test_lines_that_look_like_headers_are_content_within_a_hunk() -> None:
    head = (
        b"From: A <a@b>\nSubject: x\n\nm\n\ndiff --git a/x b/x\nindex 1..2 100644\n--- a/x\n+++"
        b" b/x\n@@ -1,2 +1,3 @@ f\n"
    )
    one = head + b" \n+index 3333333..4444444 100644\n-- \n+@@ -1 +1 @@ a\n"
    assert not mail.same_change(one, one.replace(b"3333333", b"5555555"))
    assert not mail.same_change(one, one.replace(b"@@ a", b"@@ b"))
    assert mail.same_change(
        one, one.replace(b"index 1..2", b"index 7..8").replace(b"@@ f", b"@@ g")
    )
    binary = (
        b"From: A <a@b>\nSubject: x\n\nm\n\ndiff --git a/x b/x\nindex 1..2 100644\nGIT binary"
        b" patch\nliteral 1\nIcmZPo000310RR91\n\n"
    )
    assert not mail.same_change(binary, binary.replace(b"index 1..2", b"index 7..2")), (
        "git applies it to no other blob"
    )


def test_trailer_joins_the_trailers() -> None:
    line = "Upstream-Status: Pending"
    assert mail.with_trailer("x", line) == f"x\n\n{line}"
    assert (
        mail.with_trailer("x\n\nbody: text and\nmore", line)
        == f"x\n\nbody: text and\nmore\n\n{line}"
    )
    assert (
        mail.with_trailer("x\n\nbody\n\nSigned-off-by: a <b>\n", line)
        == f"x\n\nbody\n\nSigned-off-by: a <b>\n{line}"
    )
    assert mail.without_status(mail.with_trailer("x\n\nbody", line)) == "x\n\nbody"
