"""Export on real checkouts of both kinds, under a hostile git configuration: what becomes a patch, what is refused, and what is never touched."""

import io
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.source.conftest import Snapshot, Upstream, Workspace, commit, sh_git, write
from workspace.core.console import Console
from workspace.core.errors import CheckoutError, PatchDrift
from workspace.core.journal import Journal
from workspace.source import export
from workspace.source.export import Export
from workspace.source.git import Git
from workspace.source.patches import State

STATUS = "\n\nUpstream-Status: Pending"


def run(workspace: Workspace, *, check: bool = False) -> Export:
    return export.run(workspace.layout, "vllm", workspace.pin, workspace.observe(), journal=workspace.journal, check=check)


def files(workspace: Workspace) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(workspace.layout.patches("vllm").iterdir())}


def order(workspace: Workspace) -> list[str]:
    return [line for line in (workspace.layout.patches("vllm") / "series").read_text().split("\n") if line and not line.startswith("#")]


def series(workspace: Workspace) -> Path:
    return workspace.layout.patches("vllm") / "series"


def refused(workspace: Workspace, match: str, snapshot: Snapshot) -> PatchDrift:
    """An export that is refused has written nothing."""
    before = snapshot(workspace.layout.root / "patches"), sh_git(workspace.vllm, "for-each-ref")
    with pytest.raises(PatchDrift, match=match) as failure:
        run(workspace)
    assert failure.value.exit_code == 5
    assert failure.value.hint
    assert (snapshot(workspace.layout.root / "patches"), sh_git(workspace.vllm, "for-each-ref")) == before
    return failure.value


def test_two_commits_become_patches_that_give_the_same_tree_elsewhere(checked_out: Workspace) -> None:
    checked_out.apply()
    commit(checked_out.vllm, "[Core] One more\n\nWhy." + STATUS, {"vllm/more.py": "more\n"})
    last = commit(checked_out.vllm, "Größer, and noch größer" + STATUS, {"csrc/größe.cu": "gg\n"})
    done = run(checked_out)
    assert done.written == ("Core-One-more.patch", "Gr-er-and-noch-gr-er.patch")
    assert order(checked_out)[2:] == list(done.written)
    assert checked_out.stack().state is State.APPLIED
    assert sh_git(checked_out.vllm, "rev-parse", "refs/patches/tip", "refs/patches/base").split() == [last, checked_out.observe().base]
    base = checked_out.observe().base
    assert base
    sh_git(checked_out.vllm, "checkout", "--quiet", "--detach", base)
    assert checked_out.apply().tree == sh_git(checked_out.vllm, "rev-parse", f"{last}^{{tree}}")
    exported = files(checked_out)
    run(checked_out)
    assert files(checked_out) == exported


def test_nothing_is_touched_where_nothing_changed(checked_out: Workspace, snapshot: Snapshot) -> None:
    checked_out.apply()
    before = snapshot(checked_out.layout.root)
    assert run(checked_out).written == ()
    assert run(checked_out, check=True).removed == ()
    assert snapshot(checked_out.layout.root) == before


def test_exports_are_the_bytes_that_plain_format_patch_gives(release: Workspace, upstream: Upstream) -> None:
    release.apply()
    release.series({})
    for name, content in upstream.patches.items():
        (release.layout.patches("vllm") / name).unlink(missing_ok=True)
        assert content
    run(release)
    assert {name: content for name, content in files(release).items() if name != "series"} == dict(upstream.patches)


def test_configuration_of_the_checkout_itself_changes_no_byte(release: Workspace, upstream: Upstream) -> None:
    release.apply()
    for name in upstream.patches:
        (release.layout.patches("vllm") / name).unlink()
    settings = {
        "format.headers": "X-Mine: yes",
        "format.signature": "me",
        "format.to": "list@example.invalid",
        "format.cc": "list@example.invalid",
        "format.from": "true",
        "format.attach": "true",
        "format.thread": "deep",
        "format.notes": "true",
        "format.coverLetter": "true",
        "format.encodeEmailHeaders": "false",
        "format.outputDirectory": "elsewhere",
        "format.subjectPrefix": "MINE",
        "diff.context": "7",
        "diff.interHunkContext": "40",
        "diff.suppressBlankEmpty": "true",
        "diff.algorithm": "patience",
        "diff.orderFile": "/nowhere",
        "diff.relative": "true",
        "diff.submodule": "log",
        "diff.ignoreSubmodules": "all",
        "diff.renames": "copies",
        "core.quotePath": "false",
        "core.abbrev": "5",
        "i18n.logOutputEncoding": "ISO-8859-1",
        "log.mailmap": "true",
        "log.date": "relative",
        "log.follow": "true",
    }
    for key, value in settings.items():
        sh_git(release.vllm, "config", key, value)
    write(release.vllm, {".git/info/attributes": "*.h -diff\n"})
    (release.vllm / ".git/info/attributes").unlink()
    run(release)
    assert {name: content for name, content in files(release).items() if name != "series"} == dict(upstream.patches)
    assert not (release.vllm / "elsewhere").exists()


def test_commit_that_is_dropped_takes_its_patch_along(checked_out: Workspace, upstream: Upstream) -> None:
    checked_out.apply()
    first, second = upstream.patches
    sh_git(checked_out.vllm, "rebase", "--quiet", "--onto", "HEAD~2", "HEAD~1")
    done = run(checked_out)
    assert done.removed == (first,)
    assert order(checked_out) == [second]
    assert done.aside == (), "the commit is still in refs/patches/tip's log"
    assert first not in files(checked_out)


def test_all_commits_dropped_is_not_taken_for_a_wish(checked_out: Workspace, snapshot: Snapshot) -> None:
    checked_out.apply()
    sh_git(checked_out.vllm, "checkout", "--quiet", "--detach", "HEAD~2")
    failure = refused(checked_out, "no commit in vendor/vllm is of it", snapshot)
    assert "./scripts/inv patch.apply" in (failure.hint or "")


def test_patch_that_came_with_a_pull_is_not_dropped_for_want_of_a_commit(checked_out: Workspace, upstream: Upstream, snapshot: Snapshot) -> None:
    first, second = upstream.patches
    checked_out.series({first: upstream.patches[first]})
    checked_out.apply()
    checked_out.series(dict(upstream.patches))
    failure = refused(checked_out, second, snapshot)
    assert failure.hint
    commands = failure.hint.split(": ", 1)[1].split("    or")[0].split(" && ")
    commit(checked_out.vllm, "mine" + STATUS, {"vllm/mine.py": "mine\n"})
    for command in commands:
        if command.endswith("patch.apply"):
            checked_out.apply()
        else:
            subprocess.run(command, shell=True, cwd=checked_out.layout.root, check=True, env={"PATH": "/usr/bin:/bin", "EMAIL": "a@b"})
    run(checked_out)
    assert order(checked_out) == [first, second, "mine.patch"]


def test_patch_that_was_changed_after_it_was_applied_is_not_written_over(checked_out: Workspace, upstream: Upstream, snapshot: Snapshot) -> None:
    checked_out.apply()
    first, _ = upstream.patches
    file = checked_out.layout.patches("vllm") / first
    file.write_bytes(file.read_bytes().replace(b"Upstream-Status: Pending", b"Upstream-Status: Submitted [https://example.invalid/1]"))
    commit(checked_out.vllm, "mine" + STATUS, {"vllm/mine.py": "mine\n"})
    failure = refused(checked_out, f"{first} was changed since it was applied", snapshot)
    assert "patch.unapply" in (failure.hint or "")
    # Taken into the commit, it is no difference any more.
    sh_git(checked_out.vllm, "reset", "--quiet", "--keep", "HEAD~1")
    checked_out.unapply()
    checked_out.apply()
    assert run(checked_out).written == ()
    assert "Submitted" in sh_git(checked_out.vllm, "log", "-1", "--format=%B", "HEAD~1")


def test_order_of_the_commits_is_the_order_of_the_series_and_remarks_stay_with_their_patch(release: Workspace, upstream: Upstream) -> None:
    release.apply()
    first, second = upstream.patches
    series(release).write_text(
        f"# Ours\n# base: {release.pin.commit}\n\n# why the first\n{first} # in a hurry\n#left-out.patch\n{second}\n# at the end\n", encoding="utf-8"
    )
    before = series(release).read_bytes()
    assert run(release).written == ()
    assert series(release).read_bytes() == before
    sh_git(release.vllm, "reset", "--quiet", "--hard", "HEAD~2")
    sh_git(release.vllm, "cherry-pick", "refs/patches/tip")
    commit(release.vllm, "Between" + STATUS, {"vllm/between.py": "b\n"})
    sh_git(release.vllm, "cherry-pick", "refs/patches/tip~1")
    run(release)
    assert series(release).read_text() == (
        f"# Ours\n# base: {release.pin.commit}\n#left-out.patch\n{second}\n# at the end\nBetween.patch\n\n# why the first\n{first} # in a hurry\n"
    )


def test_remark_of_a_patch_that_is_gone_stays_at_its_place(release: Workspace, upstream: Upstream) -> None:
    release.apply()
    first, second = upstream.patches
    series(release).write_text(f"# Ours\n# base: {release.pin.commit}\n# why the first\n{first}\n# why the second\n{second}\n", encoding="utf-8")
    sh_git(release.vllm, "reset", "--quiet", "--hard", "HEAD~1")
    run(release)
    assert series(release).read_text() == f"# Ours\n# base: {release.pin.commit}\n# why the first\n{first}\n# why the second\n"


def test_series_that_is_missing_is_made(release: Workspace) -> None:
    release.series({})
    commit(release.vllm, "mine" + STATUS, {"vllm/mine.py": "mine\n"})
    series(release).unlink()
    assert run(release).names == ("mine.patch",)
    assert series(release).read_text().split("\n")[1:] == [f"# base: {release.pin.commit}", "mine.patch", ""]
    assert release.stack().state is State.APPLIED


def test_series_for_another_base_or_with_a_line_that_is_no_name_is_refused(release: Workspace, upstream: Upstream) -> None:
    release.apply()
    release.series(dict(upstream.patches), base="1" * 40)
    with pytest.raises(PatchDrift, match="is for base 1111"):
        run(release)
    release.series(dict(upstream.patches))
    series(release).write_bytes(series(release).read_bytes() + b"../x.patch\n")
    with pytest.raises(PatchDrift, match="line 5"):
        run(release)


CHURN: tuple[Callable[[bytes], bytes], ...] = (
    lambda raw: raw.replace(b"From " + b"0" * 40, b"From " + b"1" * 40),
    lambda raw: raw.replace(b"5 +0000", b"5 -0000").replace(b"2 Jan 2026", b"02 Jan 2026"),
    lambda raw: b"\n".join(b"index 1234567..89abcde" + line[86:] if line.startswith(b"index ") else line for line in raw.split(b"\n")),
    lambda raw: b"\n".join(line + b" def function():" if line.startswith(b"@@") else line for line in raw.split(b"\n")),
    lambda raw: raw.replace(b"Subject: ", b"Subject: [PATCH 2/7] ") + b"-- \n2.30.1\n\n",
    lambda raw: raw.replace(b"\n\ndiff --git", b"\n---\n vllm/lines.py | 2 +-\n 1 file changed\n\ndiff --git", 1),
    lambda raw: re.sub(rb"Subject: =\?.*\?=", "Subject: [Bugfix]\n =?utf-8?b?R3LDtsOfZXI6?= twenty in words".encode(), raw),
)


@pytest.mark.parametrize("churn", CHURN)
def test_file_that_says_the_same_in_other_words_is_left_alone(
    release: Workspace, upstream: Upstream, churn: Callable[[bytes], bytes], snapshot: Snapshot
) -> None:
    release.apply()
    for path in release.layout.patches("vllm").glob("*.patch"):
        path.write_bytes(churn(path.read_bytes()))
    assert {name: content for name, content in files(release).items() if name in upstream.patches} != dict(upstream.patches)
    before = snapshot(release.layout.root / "patches")
    assert run(release, check=True).written == ()
    assert run(release).written == ()
    assert snapshot(release.layout.root / "patches") == before
    # Also where another patch is written.
    commit(release.vllm, "mine" + STATUS, {"vllm/mine.py": "mine\n"})
    assert run(release).written == ("mine.patch",)
    assert release.stack().state is State.APPLIED


UNFIT = (
    ("x\n\nbefore\n---\nafter" + STATUS, "'---', where git lets a message end"),
    ("x\n\n--- a/file" + STATUS, "where git lets a message end"),
    ("x\n\ndiff --git a/x b/x" + STATUS, "where git lets a message end"),
    ("x\n\nIndex: 7" + STATUS, "where git lets a message end"),
    ("x\n\nFrom: me\nhello" + STATUS, "begins with 'From: me'"),
    ("x\n\n[PATCH] me" + STATUS, "begins with '\\[PATCH\\] me'"),
    ("x\n\na\nFrom me Mon Sep 17 00:00:00 2001\nb" + STATUS, "begins the next mail"),
    ("Re: x" + STATUS, "'Re:'"),
    ("[PATCH 1/2] x" + STATUS, "PATCH 1/2"),
    ("[Bugfix] re: x" + STATUS, "'re:'"),
    ("x\n\nno trailer", "lacks the line `Upstream-Status: Pending`"),
    ("x\n\nUpstream-Status: Perhaps", "is none of: Pending"),
    ("x\n\nUpstream-Status: Submitted", "is none of: Pending"),
    ("ß" + STATUS, "letter or digit"),
    (".hidden" + STATUS, "letter or digit"),
    ("x" * 300 + STATUS, "too long"),
)


def test_messages_that_no_mail_can_carry_are_refused(release: Workspace, snapshot: Snapshot) -> None:
    release.apply()
    commit(release.vllm, "mine", {"vllm/mine.py": "mine\n"})
    for message, why in UNFIT:
        sh_git(release.vllm, "commit", "--quiet", "--amend", "--cleanup=verbatim", "--message", message)
        failure = refused(release, why, snapshot)
        assert "git -C vendor/vllm rebase -i refs/patches/base" in (failure.hint or "")


def test_author_that_git_reads_otherwise_is_refused(release: Workspace, snapshot: Snapshot) -> None:
    release.apply()
    write(release.vllm, {"vllm/mine.py": "mine\n"})
    sh_git(release.vllm, "add", "--all")
    sh_git(release.vllm, "commit", "--quiet", "--author", "a@b <a@b.c>", "--message", "x" + STATUS)
    refused(release, "git would not read its author back", snapshot)


def test_empty_commit_merge_and_second_of_a_name_are_refused(release: Workspace, snapshot: Snapshot) -> None:
    release.apply()
    sh_git(release.vllm, "commit", "--quiet", "--allow-empty", "--message", "nothing" + STATUS)
    refused(release, "nothing.*it changes no file", snapshot)
    sh_git(release.vllm, "reset", "--quiet", "--keep", "HEAD~1")
    commit(release.vllm, "same" + STATUS, {"vllm/mine.py": "mine\n"})
    commit(release.vllm, "same!" + STATUS, {"vllm/mine.py": "mine too\n"})
    refused(release, "another patch is called same.patch", snapshot)
    sh_git(release.vllm, "reset", "--quiet", "--keep", "HEAD~1")
    same = sh_git(release.vllm, "rev-parse", "HEAD")
    sh_git(release.vllm, "checkout", "--quiet", "-b", "side", "HEAD~1")
    commit(release.vllm, "side" + STATUS, {"vllm/side.py": "side\n"})
    sh_git(release.vllm, "merge", "--quiet", "--message", "merge" + STATUS, same)
    failure = refused(release, "it is a merge", snapshot)
    subprocess.run((failure.hint or "").split(", then")[0], shell=True, cwd=release.layout.root, check=True, env={"PATH": "/usr/bin:/bin", "EMAIL": "a@b"})
    assert set(run(release).written) == {"same.patch", "side.patch"}


def test_blanks_are_written_as_git_commit_would_have_them(release: Workspace) -> None:
    release.apply()
    write(release.vllm, {"vllm/mine.py": "mine\n"})
    sh_git(release.vllm, "add", "--all")
    sh_git(release.vllm, "commit", "--quiet", "--cleanup=verbatim", "--message", "two  blanks\nand a line\n\nbody   \n\n\n\nmore" + STATUS + "\n\n\n")
    run(release)
    exported = files(release)
    release.unapply()
    release.apply()
    assert run(release).written == ()
    assert files(release) == exported
    assert sh_git(release.vllm, "log", "-1", "--format=%B") == "two blanks and a line\n\nbody\n\nmore\n\nUpstream-Status: Pending\n".rstrip("\n")


def test_check_prints_the_difference_and_writes_nothing(release: Workspace, snapshot: Snapshot) -> None:
    release.apply()
    commit(release.vllm, "mine" + STATUS, {"vllm/mine.py": b"mine \xff\r\n"})
    before = snapshot(release.layout.root)
    out = io.StringIO()
    with Journal(Console(out=out, err=io.StringIO()), release.layout.logs, verb="test") as journal, pytest.raises(PatchDrift, match="mine.patch") as failure:
        export.run(release.layout, "vllm", release.pin, release.observe(), journal=journal, check=True)
    assert failure.value.hint == "./scripts/inv patch.export"
    assert "+++ b/patches/vllm/mine.patch" in out.getvalue()
    assert "+mine.patch" in out.getvalue()
    out.getvalue().encode()
    assert snapshot(release.layout.root) == before
    run(release)
    sh_git(release.vllm, "update-ref", "-d", "refs/patches/tip")
    assert run(release, check=True).written == ()
    assert not sh_git(release.vllm, "for-each-ref", "refs/patches/tip"), "not even a reference"


def test_export_that_was_killed_is_finished_by_the_next(release: Workspace, upstream: Upstream) -> None:
    release.apply()
    first, second = upstream.patches
    sh_git(release.vllm, "commit", "--quiet", "--amend", "--message", "Another name" + STATUS)
    sh_git(release.vllm, "rebase", "--quiet", "HEAD~2", "--exec", "git commit --quiet --amend --no-edit --date=2026-02-02T02:02:02")
    whole = export.series_of(Git(release.vllm), release.observe().base or "", "HEAD")
    # As after the first of the files.
    (release.layout.patches("vllm") / whole[0][0]).write_bytes(whole[0][1])
    assert run(release).removed == (second,)
    assert order(release) == [first, "Another-name.patch"]


def test_export_that_was_killed_at_its_last_file_leaves_nothing_behind(release: Workspace, upstream: Upstream) -> None:
    release.apply()
    first, second = upstream.patches
    sh_git(release.vllm, "reset", "--quiet", "--keep", "HEAD~1")
    folder = release.layout.patches("vllm")
    # All of it was put in place, and the folder that it was made in is still there; or only the removal was done.
    (folder.parent / ".vllm.making-abcdefgh").mkdir()
    (folder / second).unlink()
    assert run(release).names == (first,)
    assert sorted(path.name for path in folder.parent.rglob("*")) == sorted(["vllm", "series", first])


def test_edit_of_a_patch_that_is_nowhere_else_is_kept_aside(release: Workspace, upstream: Upstream) -> None:
    sh_git(release.layout.root, "add", "patches")
    sh_git(release.layout.root, "commit", "--quiet", "--message", "patches")
    release.apply()
    _, second = upstream.patches
    file = release.layout.patches("vllm") / second
    file.write_bytes(file.read_bytes().replace(b"Add a file", b"Now add a file"))
    edited = file.read_bytes()
    sh_git(release.vllm, "reset", "--quiet", "--keep", "HEAD~1")
    done = run(release)
    assert done.removed == (second,)
    assert [path.read_bytes() for path in done.aside] == [edited]
    export.show(done, console=release.journal.console)
    assert str(done.aside[0]) in release.err.getvalue()


def test_file_that_was_never_in_the_series_is_left_and_said(release: Workspace) -> None:
    release.apply()
    write(release.layout.patches("vllm"), {"mine.patch": "mine", "remarked.patch": "out"})
    series(release).write_text(series(release).read_text() + "# remarked.patch: later\n")
    done = run(release)
    assert done.unlisted == ("mine.patch",)
    export.show(done, console=release.journal.console)
    assert "patches/vllm/mine.patch is not in the series" in release.err.getvalue()


def test_edits_that_are_not_committed_are_said_to_be_in_no_patch(release: Workspace) -> None:
    release.apply()
    write(release.vllm, {"README": "edited\n"})
    done = run(release)
    assert done.edits == ("README",)
    export.show(done, console=release.journal.console)
    assert "edits that are not committed are in no patch: README" in release.err.getvalue()
    assert (release.vllm / "README").read_text() == "edited\n"


def test_what_is_under_way_or_elsewhere_is_not_exported(checked_out: Workspace, upstream: Upstream) -> None:
    checked_out.apply()
    before = files(checked_out)
    sh_git(checked_out.vllm, "fetch", "--quiet", str(upstream.bare), "drift")
    head = sh_git(checked_out.vllm, "rev-parse", "HEAD")
    sh_git(checked_out.vllm, "cherry-pick", "FETCH_HEAD", check=False)
    with pytest.raises(CheckoutError, match="in the middle of a git cherry-pick") as failure:
        run(checked_out)
    assert "patch.continue" in (failure.value.hint or "")
    sh_git(checked_out.vllm, "cherry-pick", "--abort")
    foreign = sh_git(checked_out.vllm, "commit-tree", "-m", "another root", "HEAD^{tree}")
    sh_git(checked_out.vllm, "checkout", "--quiet", "--detach", foreign)
    with pytest.raises(CheckoutError, match="which is not on") as failure:
        run(checked_out)
    commands = (failure.value.hint or "").split(": ", 1)[1]
    subprocess.run(commands, shell=True, cwd=checked_out.layout.root, check=True, env={"PATH": "/usr/bin:/bin", "EMAIL": "a@b"})
    assert sh_git(checked_out.vllm, "rev-parse", "HEAD") == head
    assert run(checked_out).written == ()
    assert files(checked_out) == before


def test_missing_checkout_says_how_to_get_one(workspace: Workspace) -> None:
    with pytest.raises(CheckoutError, match="is not there") as failure:
        run(workspace)
    assert failure.value.hint == "./scripts/inv bootstrap"


def commit_template(workspace: Workspace) -> str:
    return sh_git(workspace.vllm, "config", "--get", "commit.template", check=False)


def test_template_brings_the_trailer_and_is_set_once(checked_out: Workspace, snapshot: Snapshot) -> None:
    git = Git(checked_out.vllm)
    export.template(checked_out.layout, "vllm", git, checked_out.journal)
    assert "Upstream-Status: Pending\n" in Path(commit_template(checked_out)).read_text()
    before = snapshot(checked_out.layout.root)
    export.template(checked_out.layout, "vllm", git, checked_out.journal)
    assert snapshot(checked_out.layout.root) == before
    # As after a copy of the clone: the path leads elsewhere.
    sh_git(checked_out.vllm, "config", "commit.template", "/nowhere/workspace-commit-template")
    export.template(checked_out.layout, "vllm", git, checked_out.journal)
    assert Path(commit_template(checked_out)).exists()
    write(checked_out.vllm, {"vllm/mine.py": "mine\n"})
    sh_git(checked_out.vllm, "add", "vllm/mine.py")
    sh_git(checked_out.vllm, "commit", "--quiet", env={"GIT_EDITOR": "sed -i '1s/^/A subject/'"})
    checked_out.series({})
    assert run(checked_out).names == ("A-subject.patch",)


@pytest.mark.parametrize("where", ["--local", "--file"])
def test_template_of_the_user_stays(release: Workspace, hostile: Path, where: str) -> None:
    sh_git(release.vllm, "config", where, *([str(hostile)] if where == "--file" else []), "commit.template", "/mine")
    export.template(release.layout, "vllm", Git(release.vllm), release.journal)
    assert Git(release.vllm).look("config", "--get", "commit.template").out == "/mine\n"


def test_rewritten_base_line_and_removed_files_of_a_bump(tmp_path: Path, upstream: Upstream) -> None:
    folder = tmp_path / "vllm"
    first, second = upstream.patches
    assert export.write(folder, base="1" * 40, patches=tuple(upstream.patches.items())) == ((first, second, "series"), ())
    assert export.write(folder, base="2" * 40, patches=((second, upstream.patches[second]),)) == (("series",), (first,))
    assert (folder / "series").read_text().split("\n")[1:] == ["# base: " + "2" * 40, second, ""]
    assert sorted(path.name for path in folder.iterdir()) == sorted([second, "series"])


def test_objects_of_the_stack_have_their_names_only_when_they_are_whole(release: Workspace) -> None:
    """An object that a power cut has emptied counts as there for git, which would never write it again."""
    release.apply()
    objects = release.vllm / ".git" / "objects"
    assert not list(objects.glob("*/tmp_obj_*"))
    assert sh_git(release.vllm, "fsck", "--connectivity-only") == ""
    head = release.observe().head or ""
    assert (objects / head[:2] / head[2:]).stat().st_mode & 0o777 == 0o444


def test_broken_patch_file_is_to_be_taken_back_from_the_superproject_and_no_other_way_is_named_first(
    release: Workspace, upstream: Upstream, snapshot: Snapshot
) -> None:
    release.apply()
    first = next(iter(upstream.patches))
    file = release.layout.patches("vllm") / first
    file.write_bytes(file.read_bytes()[:-40])
    failure = refused(release, f"{first} is no patch that git can read", snapshot)
    assert (failure.hint or "").startswith(f"git checkout -- patches/vllm/{first}    ")
    file.write_bytes(upstream.patches[first])
    assert run(release).written == ()
