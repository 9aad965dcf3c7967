"""Exports from checkouts of both kinds, under a hostile git configuration."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.repo.conftest import Snapshot, Upstream, Workspace, commit, sh_git, write
from tests.repo.exporting import STATUS, files, order, run, series
from workspace.core.console import Console, RunLog
from workspace.core.errors import PatchDrift
from workspace.repo import export
from workspace.repo.git import Git
from workspace.repo.patches import State


def test_two_commits_become_patches_that_give_the_same_tree_elsewhere(
    either_applied: Workspace,
) -> None:
    commit(either_applied.vllm, "[Core] One more\n\nWhy." + STATUS, {"vllm/more.py": "more\n"})
    last = commit(
        either_applied.vllm, "Größer, and noch größer" + STATUS, {"csrc/größe.cu": "gg\n"}
    )
    done = run(either_applied)
    assert done.written == ("Core-One-more.patch", "Gr-er-and-noch-gr-er.patch")
    assert order(either_applied)[2:] == list(done.written)
    assert either_applied.stack().state is State.APPLIED
    assert sh_git(
        either_applied.vllm, "rev-parse", "refs/patches/tip", "refs/patches/base"
    ).split() == [last, either_applied.observe().base]
    base = either_applied.observe().base
    assert base
    sh_git(either_applied.vllm, "checkout", "--quiet", "--detach", base)
    assert either_applied.apply().tree == sh_git(
        either_applied.vllm, "rev-parse", f"{last}^{{tree}}"
    )
    exported = files(either_applied)
    run(either_applied)
    assert files(either_applied) == exported


def test_nothing_is_touched_where_nothing_changed(applied: Workspace, snapshot: Snapshot) -> None:
    before = snapshot(applied.layout.root)
    assert run(applied).written == ()
    assert run(applied, check=True).removed == ()
    assert snapshot(applied.layout.root) == before


def test_exports_are_the_bytes_that_plain_format_patch_gives(
    applied: Workspace, upstream: Upstream
) -> None:
    applied.series({})
    for name, content in upstream.patches.items():
        (applied.layout.patches("vllm") / name).unlink(missing_ok=True)
        assert content
    run(applied)
    assert {name: content for name, content in files(applied).items() if name != "series"} == dict(
        upstream.patches
    )


def test_configuration_of_the_checkout_itself_changes_no_byte(
    applied: Workspace, upstream: Upstream
) -> None:
    for name in upstream.patches:
        (applied.layout.patches("vllm") / name).unlink()
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
        sh_git(applied.vllm, "config", key, value)
    write(applied.vllm, {".git/info/attributes": "*.h -diff\n"})
    (applied.vllm / ".git/info/attributes").unlink()
    run(applied)
    assert {name: content for name, content in files(applied).items() if name != "series"} == dict(
        upstream.patches
    )
    assert not (applied.vllm / "elsewhere").exists()


def test_commit_that_is_dropped_takes_its_patch_along(
    applied: Workspace, upstream: Upstream
) -> None:
    first, second = upstream.patches
    sh_git(applied.vllm, "rebase", "--quiet", "--onto", "HEAD~2", "HEAD~1")
    done = run(applied)
    assert done.removed == (first,)
    assert order(applied) == [second]
    assert done.kept_copies == (), "the commit is still in refs/patches/tip's log"
    assert first not in files(applied)


def test_order_of_the_commits_is_the_order_of_the_series_and_comments_stay_with_their_patch(
    applied: Workspace, upstream: Upstream
) -> None:
    first, second = upstream.patches
    series(applied).write_text(
        f"# Ours\n# base: {applied.pin.commit}\n\n# why the first\n{first} # in a"
        f" hurry\n#left-out.patch\n{second}\n# at the end\n",
        encoding="utf-8",
    )
    before = series(applied).read_bytes()
    assert run(applied).written == ()
    assert series(applied).read_bytes() == before
    sh_git(applied.vllm, "reset", "--quiet", "--hard", "HEAD~2")
    sh_git(applied.vllm, "cherry-pick", "refs/patches/tip")
    commit(applied.vllm, "Between" + STATUS, {"vllm/between.py": "b\n"})
    sh_git(applied.vllm, "cherry-pick", "refs/patches/tip~1")
    run(applied)
    assert (
        series(applied).read_text()
        == f"# Ours\n# base: {applied.pin.commit}\n#left-out.patch\n{second}\n# at the"
        f" end\nBetween.patch\n\n# why the first\n{first} # in a hurry\n"
    )


def test_comment_of_a_removed_patch_stays_at_its_place(
    applied: Workspace, upstream: Upstream
) -> None:
    first, second = upstream.patches
    series(applied).write_text(
        f"# Ours\n# base: {applied.pin.commit}\n# why the first\n{first}\n# why the"
        f" second\n{second}\n",
        encoding="utf-8",
    )
    sh_git(applied.vllm, "reset", "--quiet", "--hard", "HEAD~1")
    run(applied)
    assert (
        series(applied).read_text()
        == f"# Ours\n# base: {applied.pin.commit}\n# why the first\n{first}\n# why the second\n"
    )


def test_series_that_is_missing_is_made(release: Workspace) -> None:
    release.series({})
    commit(release.vllm, "mine" + STATUS, {"vllm/mine.py": "mine\n"})
    series(release).unlink()
    assert run(release).names == ("mine.patch",)
    assert series(release).read_text().split("\n")[1:] == [
        f"# base: {release.pin.commit}",
        "mine.patch",
        "",
    ]
    assert release.stack().state is State.APPLIED


def test_series_for_another_base_or_with_a_line_that_is_no_name_is_refused(
    applied: Workspace, upstream: Upstream
) -> None:
    applied.series(dict(upstream.patches), base="1" * 40)
    with pytest.raises(PatchDrift, match="is for base 1111"):
        run(applied)
    applied.series(dict(upstream.patches))
    series(applied).write_bytes(series(applied).read_bytes() + b"../x.patch\n")
    with pytest.raises(PatchDrift, match="line 5"):
        run(applied)


CHURN: tuple[Callable[[bytes], bytes], ...] = (
    lambda raw: raw.replace(b"From " + b"0" * 40, b"From " + b"1" * 40),
    lambda raw: raw.replace(b"5 +0000", b"5 -0000").replace(b"2 Jan 2026", b"02 Jan 2026"),
    lambda raw: b"\n".join(
        b"index 1234567..89abcde" + line[86:] if line.startswith(b"index ") else line
        for line in raw.split(b"\n")
    ),
    lambda raw: b"\n".join(
        line + b" def function():" if line.startswith(b"@@") else line for line in raw.split(b"\n")
    ),
    lambda raw: raw.replace(b"Subject: ", b"Subject: [PATCH 2/7] ") + b"-- \n2.30.1\n\n",
    lambda raw: raw.replace(
        b"\n\ndiff --git", b"\n---\n vllm/lines.py | 2 +-\n 1 file changed\n\ndiff --git", 1
    ),
    lambda raw: re.sub(
        rb"Subject: =\?.*\?=",
        "Subject: [Bugfix]\n =?utf-8?b?R3LDtsOfZXI6?= twenty in words".encode(),
        raw,
    ),
)


@pytest.mark.parametrize("churn", CHURN)
def test_file_with_the_same_patch_in_another_spelling_is_not_rewritten(
    applied: Workspace, upstream: Upstream, churn: Callable[[bytes], bytes], snapshot: Snapshot
) -> None:
    for path in applied.layout.patches("vllm").glob("*.patch"):
        path.write_bytes(churn(path.read_bytes()))
    assert {
        name: content for name, content in files(applied).items() if name in upstream.patches
    } != dict(upstream.patches)
    before = snapshot(applied.layout.root / "patches")
    assert run(applied, check=True).written == ()
    assert run(applied).written == ()
    assert snapshot(applied.layout.root / "patches") == before
    # Also where another patch is written.
    commit(applied.vllm, "mine" + STATUS, {"vllm/mine.py": "mine\n"})
    assert run(applied).written == ("mine.patch",)
    assert applied.stack().state is State.APPLIED


def test_blanks_are_written_as_git_commit_would_have_them(applied: Workspace) -> None:
    write(applied.vllm, {"vllm/mine.py": "mine\n"})
    sh_git(applied.vllm, "add", "--all")
    sh_git(
        applied.vllm,
        "commit",
        "--quiet",
        "--cleanup=verbatim",
        "--message",
        "two  blanks\nand a line\n\nbody   \n\n\n\nmore" + STATUS + "\n\n\n",
    )
    run(applied)
    exported = files(applied)
    applied.unapply()
    applied.apply()
    assert run(applied).written == ()
    assert files(applied) == exported
    assert sh_git(
        applied.vllm, "log", "-1", "--format=%B"
    ) == "two blanks and a line\n\nbody\n\nmore\n\nUpstream-Status: Pending\n".rstrip("\n")


def test_check_prints_the_difference_and_writes_nothing(
    applied: Workspace, snapshot: Snapshot
) -> None:
    commit(applied.vllm, "mine" + STATUS, {"vllm/mine.py": b"mine \xff\r\n"})
    before = snapshot(applied.layout.root)
    out = io.StringIO()
    with (
        RunLog(Console(out=out, err=io.StringIO()), applied.layout.logs, verb="test") as run_log,
        pytest.raises(PatchDrift, match="mine.patch") as failure,
    ):
        export.run(
            applied.layout, "vllm", applied.pin, applied.observe(), run_log=run_log, check=True
        )
    assert failure.value.hint == "./scripts/inv patch.export"
    assert "+++ b/patches/vllm/mine.patch" in out.getvalue()
    assert "+mine.patch" in out.getvalue()
    out.getvalue().encode()
    assert snapshot(applied.layout.root) == before
    run(applied)
    sh_git(applied.vllm, "update-ref", "-d", "refs/patches/tip")
    assert run(applied, check=True).written == ()
    assert not sh_git(applied.vllm, "for-each-ref", "refs/patches/tip"), "not even a reference"


def commit_template(workspace: Workspace) -> str:
    return sh_git(workspace.vllm, "config", "--get", "commit.template", check=False)


def test_template_has_the_trailer_and_is_set_once(
    checked_out: Workspace, snapshot: Snapshot
) -> None:
    git = Git(checked_out.vllm)
    export.set_template(git, checked_out.run_log)
    assert "Upstream-Status: Pending\n" in Path(commit_template(checked_out)).read_text()
    before = snapshot(checked_out.layout.root)
    export.set_template(git, checked_out.run_log)
    assert snapshot(checked_out.layout.root) == before
    # As after a copy of the clone: the path leads elsewhere.
    sh_git(checked_out.vllm, "config", "commit.template", "/nowhere/workspace-commit-template")
    export.set_template(git, checked_out.run_log)
    assert Path(commit_template(checked_out)).exists()
    write(checked_out.vllm, {"vllm/mine.py": "mine\n"})
    sh_git(checked_out.vllm, "add", "vllm/mine.py")
    sh_git(checked_out.vllm, "commit", "--quiet", env={"GIT_EDITOR": "sed -i '1s/^/A subject/'"})
    checked_out.series({})
    assert run(checked_out).names == ("A-subject.patch",)


@pytest.mark.parametrize("where", ["--local", "--file"])
def test_template_of_the_user_stays(release: Workspace, hostile: Path, where: str) -> None:
    sh_git(
        release.vllm,
        "config",
        where,
        *([str(hostile)] if where == "--file" else []),
        "commit.template",
        "/mine",
    )
    export.set_template(Git(release.vllm), release.run_log)
    assert Git(release.vllm).look("config", "--get", "commit.template").out == "/mine\n"


def test_rewritten_base_line_and_removed_files_of_a_bump(
    tmp_path: Path, upstream: Upstream
) -> None:
    folder = tmp_path / "vllm"
    first, second = upstream.patches
    export.write(folder, base="1" * 40, patches=tuple(upstream.patches.items()))
    assert sorted(path.name for path in folder.iterdir()) == sorted([first, second, "series"])
    export.write(folder, base="2" * 40, patches=((second, upstream.patches[second]),))
    assert (folder / "series").read_text().split("\n")[1:] == ["# base: " + "2" * 40, second, ""]
    assert sorted(path.name for path in folder.iterdir()) == sorted([second, "series"])


def test_objects_of_the_stack_have_their_names_only_when_they_are_whole(applied: Workspace) -> None:
    """git takes an object file that a power cut emptied for complete, and never writes it again."""
    objects = applied.vllm / ".git" / "objects"
    assert not list(objects.glob("*/tmp_obj_*"))
    assert sh_git(applied.vllm, "fsck", "--connectivity-only") == ""
    head = applied.observe().head or ""
    assert (objects / head[:2] / head[2:]).stat().st_mode & 0o777 == 0o444
