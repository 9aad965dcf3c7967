"""Pull requests, mails and diffs as people pass them on: imported, or refused with git's words."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.repo.conftest import Workspace, commit, sh_git, write
from tests.repo.test_importing import take
from workspace.core.errors import PatchConflict, SettingsError
from workspace.repo.patches import State

NEW = (
    "diff --git a/vllm/new_note.py b/vllm/new_note.py\nnew file mode 100644\n--- /dev/null\n"
    "+++ b/vllm/new_note.py\n@@ -0,0 +1,2 @@\n+x = 1\n+y = 2\n"
)
EDIT = "--- a/csrc/a.cu\n+++ b/csrc/a.cu\n@@ -1 +1 @@\n-a\n+edited\n"
STATUS = "\n\nUpstream-Status: Pending"


def mail_of(*headers: str, diff: str = NEW) -> str:
    return "\n".join((*headers, "Subject: A note", "", "why", "---", "", diff))


@pytest.fixture
def named(applied: Workspace, hostile: Path) -> Workspace:
    """A workspace whose user has a name in git."""
    for key, value in (("user.name", "Ann Ö"), ("user.email", "ann@example.org")):
        sh_git(applied.vllm, "config", "--file", str(hostile), key, value)
    return applied


def file(workspace: Workspace, content: str | bytes, name: str = "it.patch") -> Path:
    write(workspace.layout.root, {name: content})
    return workspace.layout.root / name


def author(workspace: Workspace) -> str:
    return sh_git(workspace.vllm, "log", "-1", "--format=%an <%ae>")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("From: someone", "someone <unknown>"),
        ("From: Name <>", "Name <unknown>"),
        ("From: someone at example.org", "someone at example.org <unknown>"),
        ("From: <>", "Ann Ö <ann@example.org>"),
        ("X-Nobody: x", "Ann Ö <ann@example.org>"),
    ],
)
def test_author_without_an_address_conflicts_with_nothing(
    named: Workspace, line: str, expected: str
) -> None:
    assert take(named, file(named, mail_of(line))).written == ("A-note.patch",)
    assert author(named) == expected
    assert expected in named.err.getvalue(), "it is said"
    head = named.stack().head
    named.unapply()
    assert named.apply().head == head


@pytest.mark.parametrize(
    "headers",
    [
        ("From: ann@example.org",),
        ("From: A <a@b.c>", "Date: Wed, 1 Jan 2025 00:00:00 +0000"),
    ],
)
def test_headers_that_git_completes_are_taken(applied: Workspace, headers: tuple[str, ...]) -> None:
    assert take(applied, file(applied, mail_of(*headers))).written == ("A-note.patch",)


@pytest.mark.parametrize(
    ("diff", "reason"),
    [
        (NEW.replace("+1,2 @@", "+1,9 @@"), "corrupt patch at line "),
        (EDIT.replace("@@ -1 +1 @@\n", ""), "patch with only garbage|No valid patches"),
        (EDIT.replace("@@ -1 +1 @@", "@@ -1,2 +1,2 @@\n damaged").replace(" d", "d"), "corrupt"),
    ],
)
def test_patch_that_git_cannot_read_is_refused_with_its_words(
    applied: Workspace, diff: str, reason: str
) -> None:
    before = applied.stack()
    with pytest.raises(SettingsError, match=f"is refused by git am: ({reason})") as failure:
        take(applied, file(applied, mail_of("From: A <a@b.c>", diff=diff)))
    assert "onflict" not in failure.value.message
    assert applied.stack() == before
    shown = subprocess.run(
        (failure.value.hint or "").split("    ")[0],
        shell=True,
        cwd=applied.layout.root,
        capture_output=True,
        text=True,
    )
    assert shown.stderr, "git shows the line"
    assert applied.stack() == before, "and the hint leaves nothing under way"


def test_date_that_git_cannot_read_is_refused_with_its_words(applied: Workspace) -> None:
    mail = mail_of("From: A <a@b.c>", "Date: the other day")
    with pytest.raises(SettingsError, match="is refused by git am: invalid date format") as failure:
        take(applied, file(applied, mail))
    assert "Date line" in (failure.value.hint or "")


@pytest.mark.parametrize(
    ("diff", "reason"),
    [
        (EDIT.replace("-a\n", "-other\n"), "patch failed: csrc/a.cu:1"),
        (EDIT.replace("a.cu", "gone.cu"), "csrc/gone.cu: does not exist in index"),
    ],
)
def test_patch_that_does_not_fit_is_no_conflict_where_nothing_is_unmerged(
    applied: Workspace, diff: str, reason: str
) -> None:
    with pytest.raises(PatchConflict, match=f"does not apply .git: {reason}") as failure:
        take(applied, file(applied, mail_of("From: A <a@b.c>", "Date: 1 Jan 2025", diff=diff)))
    assert "onflict" not in str((failure.value.message, failure.value.hint, failure.value.details))


RENAME = (
    "diff --git {a}README {b}vllm/NEWS\nsimilarity index 50%\nrename from README\n"
    "rename to vllm/NEWS\n--- {a}README\n+++ {b}vllm/NEWS\n@@ -1 +1,2 @@\n two\n+more\n"
)


@pytest.mark.parametrize(
    ("diff", "expected"),
    [
        (NEW + EDIT, {"vllm/new_note.py", "csrc/a.cu"}),
        ((NEW + EDIT).replace(" a/", " ").replace(" b/", " "), {"vllm/new_note.py", "csrc/a.cu"}),
        (RENAME.format(a="a/", b="b/"), {"README", "vllm/NEWS"}),
        (RENAME.format(a="", b=""), {"README", "vllm/NEWS"}),
        (NEW.replace("vllm/new_note.py", "build/hidden.so"), {"build/hidden.so"}),
        (EDIT.replace("a/csrc", "vllm.orig/csrc").replace("b/csrc", "vllm/csrc"), {"csrc/a.cu"}),
        (
            "Some words of a forum.\n\n" + EDIT.replace("\n", "\r\n").replace("\r", ""),
            {"csrc/a.cu"},
        ),
    ],
    ids=["new file", "no prefix", "rename", "rename, no prefix", "ignored", "diff -ru", "words"],
)
def test_bare_diff_is_a_commit_of_the_user_with_all_of_its_files(
    named: Workspace, diff: str, expected: set[str]
) -> None:
    assert take(named, file(named, diff, "feature.diff")).written == ("feature.patch",)
    changed = sh_git(named.vllm, "show", "--no-renames", "--format=", "--name-only", "HEAD")
    assert set(changed.split()) == expected
    assert sh_git(named.vllm, "log", "-1", "--format=%s%n%b") == f"feature{STATUS[1:]}"
    assert author(named) == "Ann Ö <ann@example.org>"
    assert "commit --amend && ./scripts/inv patch.export" in named.err.getvalue()
    assert named.stack().state is State.APPLIED


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16"])
def test_mail_that_a_program_of_windows_wrote_is_read(applied: Workspace, coding: str) -> None:
    """Notepad writes a byte order mark, and `>` of PowerShell UTF-16."""
    text = mail_of("From: Zoë <zoe@example.org>").replace("\n", "\r\n")
    take(applied, str(file(applied, text.encode(coding))))
    assert author(applied).startswith("Zoë <zoe@example.org>")


def test_bare_diff_needs_a_name_and_says_how_to_set_it(applied: Workspace) -> None:
    with pytest.raises(SettingsError, match="are not set in git") as failure:
        take(applied, file(applied, NEW, "feature.diff"))
    assert "git config --global user.name" in (failure.value.hint or "")


def test_bare_diff_that_does_not_apply_is_refused_with_gits_words(named: Workspace) -> None:
    with pytest.raises(PatchConflict, match=r"does not apply \(git: patch failed: csrc/a.cu:1\)"):
        take(named, file(named, EDIT.replace("-a\n", "-other\n"), "feature.diff"))


def test_output_of_git_show_keeps_author_and_message(applied: Workspace) -> None:
    head = applied.stack().head
    commit(applied.vllm, "Über all\n\nWhy.\n\nAnd more.", {"vllm/mine.py": "mine\n"})
    shown = sh_git(applied.vllm, "show", "HEAD")
    sh_git(applied.vllm, "reset", "--quiet", "--hard", head or "")
    take(applied, file(applied, shown + "\n"))
    assert author(applied) == "Ünal <u@example.invalid>"
    assert sh_git(applied.vllm, "log", "-1", "--format=%B") == (
        "Über all\n\nWhy.\n\nAnd more." + STATUS
    )


def pull_request(workspace: Workspace, *subjects: str, flags: tuple[str, ...] = ()) -> Path:
    """Return the mails of commits with these subjects; `None` in them is an empty commit."""
    head = workspace.stack().head or ""
    for number, subject in enumerate(subjects):
        if subject == "trigger CI":
            sh_git(workspace.vllm, "commit", "--quiet", "--allow-empty", "--message", subject)
        else:
            commit(workspace.vllm, subject, {"vllm/mine.py": f"{number}\n"})
    written = sh_git(workspace.vllm, "format-patch", "--stdout", "--always", *flags, head)
    sh_git(workspace.vllm, "reset", "--quiet", "--hard", head)
    return file(workspace, written + "\n")


LONG = "[Bugfix][Kernel] " + "a subject that goes on " * 12


@pytest.mark.parametrize(
    ("subjects", "names"),
    [
        (
            ("[Misc] Say", "address comments", "address comments", "address comments"),
            ("Misc-Say", "address-comments", "address-comments-2", "address-comments-3"),
        ),
        (("x", "x", "x-2"), ("x", "x-2", "x-2-2")),
        (("日本語", "日本語 2"), ("patch", "2")),
        (("fixup! [Misc] Say", ".hidden"), ("fixup-Misc-Say", "hidden")),
        ((LONG + "1", LONG + "2"), None),
        (("a", "trigger CI", "b"), ("a", "b")),
    ],
    ids=["equal", "equal to a number", "not ASCII", "fixup", "long", "empty commit"],
)
def test_subjects_as_they_are_give_files_and_stay(
    applied: Workspace, subjects: tuple[str, ...], names: tuple[str, ...] | None
) -> None:
    before = applied.stack().names
    done = take(applied, pull_request(applied, *subjects))
    kept = [subject.strip() for subject in subjects if subject != "trigger CI"]
    assert names is None or done.names[len(before) :] == tuple(f"{name}.patch" for name in names)
    assert all(len(name) <= 200 for name in done.names)
    log = sh_git(applied.vllm, "log", "--reverse", "--format=%s", f"-{len(kept)}")
    assert log.split("\n") == kept
    head = applied.stack().head
    applied.unapply()
    assert (applied.apply().head, applied.stack().state) == (head, State.APPLIED)


def test_first_of_two_equal_subjects_can_be_dropped(applied: Workspace) -> None:
    take(applied, pull_request(applied, "same", "same"))
    sh_git(applied.vllm, "rebase", "--quiet", "--onto", "HEAD~2", "HEAD~1", check=False)
    write(applied.vllm, {"vllm/mine.py": "1\n"})
    sh_git(applied.vllm, "add", "--all")
    sh_git(applied.vllm, "-c", "core.editor=true", "rebase", "--continue")
    from workspace.repo import export

    done = export.run(
        applied.layout, "vllm", applied.pin, applied.observe(), run_log=applied.run_log
    )
    assert (done.written, done.removed) == (("same.patch",), ("same-2.patch",))


def test_cover_letter_is_left_out_and_named(applied: Workspace) -> None:
    path = pull_request(applied, "one", "two", flags=("--cover-letter",))
    assert take(applied, path).written == ("one.patch", "two.patch")
    assert "'*** SUBJECT HERE ***' changes no file and is left out" in applied.err.getvalue()


def after_a_merge(workspace: Workspace, again: str, merged: str) -> Path:
    """Return two mails; between their commits main was merged, whose content is nowhere here."""
    head = workspace.stack().head or ""
    made = workspace.layout.root / "made"
    sh_git(workspace.layout.root, "clone", "--quiet", str(workspace.vllm), str(made))
    sh_git(made, "checkout", "--quiet", head)
    commit(made, "Mine", {"csrc/a.cu": "mine\na\n"})
    first = sh_git(made, "format-patch", "--stdout", "-1")
    commit(made, "Merged", {"csrc/a.cu": merged})
    commit(made, "Again", {"csrc/a.cu": again + merged})
    return file(workspace, f"{first}\n{sh_git(made, 'format-patch', '--stdout', '-1')}\n")


def test_commits_after_a_merge_of_main_are_placed_and_it_is_said(applied: Workspace) -> None:
    path = after_a_merge(applied, "again\n", "mine\nmain moved\na\n")
    assert take(applied, path).written == ("Mine.patch", "Again.patch")
    assert (applied.vllm / "csrc/a.cu").read_text() == "again\nmine\na\n"
    assert "main was merged between its commits" in applied.err.getvalue()


def test_commits_after_a_merge_that_fit_nowhere_are_refused(applied: Workspace) -> None:
    head = applied.stack().head
    path = after_a_merge(applied, "again\n", "other\nmain moved\nb\n")
    with pytest.raises(PatchConflict, match=r"patch 2 of 2, 'Again', does not apply \(git: ") as no:
        take(applied, path)
    assert "onflict" not in no.value.message
    assert applied.stack().head == head


def test_patch_that_does_not_fit_is_not_placed_by_less_context(applied: Workspace) -> None:
    diff = EDIT.replace("@@ -1 +1 @@", "@@ -1,2 +1,2 @@\n other")
    with pytest.raises(PatchConflict, match="does not apply"):
        take(applied, file(applied, mail_of("From: A <a@b.c>", diff=diff)))


def test_file_for_a_conflict_by_hand_is_what_git_can_read(named: Workspace) -> None:
    diff = EDIT.replace("-a\n", "-other\n").replace(" a/", " ").replace(" b/", " ")
    with pytest.raises(PatchConflict, match="does not apply") as failure:
        take(named, file(named, diff, "my feature.diff"))
    assert "my feature.diff' --merge    stops there" in (failure.value.hint or "")
    kept = named.layout.state / "imported" / "my feature.diff.patch"
    by_hand = f"git -C vendor/vllm am --3way {shlex.quote(str(kept))}"
    environ = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"}
    environ |= {"GIT_COMMITTER_NAME": "A", "GIT_COMMITTER_EMAIL": "a@b.c", "LC_ALL": "C"}
    done = subprocess.run(
        by_hand, shell=True, cwd=named.layout.root, capture_output=True, text=True, env=environ
    )
    assert "csrc/a.cu" in done.stderr, "the mail with prefixes, which git reads"
    assert named.stack().state is State.IN_PROGRESS


def test_both_mails_of_a_file_stay_readable_by_hand(applied: Workspace) -> None:
    path = pull_request(applied, "one", "two", flags=("--cover-letter",))
    take(applied, path)
    kept = (applied.layout.state / "imported" / "it.patch").read_bytes()
    assert kept.count(b"\nSubject: ") == 2
