"""The rows of `inv patch`, and the sentence after another program moved the checkout or the pin."""

import io
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.repo.conftest import (
    LINES,
    PATCHED,
    Snapshot,
    Upstream,
    Workspace,
    commit,
    copied,
    sh_git,
    write,
)
from workspace.core.console import Console, Row
from workspace.core.errors import PatchConflict, SettingsError
from workspace.repo import overview, patches


def table(workspace: Workspace) -> tuple[overview.Entry, ...]:
    return workspace.rows()


def moved(workspace: Workspace) -> Row | None:
    row = overview.moved(workspace.layout, workspace.pin, workspace.observe(), workspace.stack())
    assert row is None or row.text in table(workspace)[0].subject
    return row


def follow(workspace: Workspace, row: Row) -> None:
    """Run the hint of the row, up to a verb of the workspace."""
    command = (row.hint or "").replace(" && ./scripts/inv patch.apply", "")
    if command != "./scripts/inv patch.apply":
        argv = ["bash", "-ec", command]
        subprocess.run(
            argv,
            cwd=workspace.layout.root,
            check=True,
            capture_output=True,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin", "GIT_CONFIG_GLOBAL": "/dev/null"},
        )
    else:
        workspace.apply()


def states(workspace: Workspace) -> list[str]:
    return [row.state for row in table(workspace)]


def test_each_patch_is_pending_then_applied_with_subject_status_and_files(
    checked_out: Workspace, snapshot: Snapshot
) -> None:
    assert states(checked_out) == ["unapplied", "pending", "pending"]
    checked_out.apply()
    before = snapshot(checked_out.layout.root)
    stack, first, second = table(checked_out)
    assert snapshot(checked_out.layout.root) == before
    assert (stack.state, stack.name) == ("applied", "stack")
    assert (first.state, first.subject, first.status, first.files) == (
        "applied",
        "[Bugfix] Größer: twenty in words",
        "Pending",
        ("vllm/lines.py",),
    )
    assert (second.state, set(second.files)) == ("applied", {"csrc/dos.h", "vllm/new.py"})


def test_changed_patch_and_commit_without_a_file_have_different_states(applied: Workspace) -> None:
    commit(
        applied.vllm, "Mine\n\nUpstream-Status: Inappropriate [local]", {"vllm/mine.py": "mine\n"}
    )
    assert states(applied) == ["unexported", "applied", "applied", "unexported"]
    mine = table(applied)[-1]
    assert (mine.name, mine.subject, mine.status, mine.files) == (
        sh_git(applied.vllm, "rev-parse", "HEAD")[:12],
        "Mine",
        "Inappropriate [local]",
        ("vllm/mine.py",),
    )
    sh_git(applied.vllm, "reset", "--quiet", "--hard", "HEAD~1")
    write(applied.vllm, {"vllm/new.py": "other\n"})
    sh_git(applied.vllm, "commit", "--quiet", "--all", "--amend", "--no-edit")
    assert states(applied) == ["unexported", "applied", "changed"]
    sh_git(applied.vllm, "reset", "--quiet", "--hard", "HEAD~1")
    assert states(applied) == ["unexported", "applied", "pending"]


def test_commit_that_only_shifts_the_patches_after_it_changes_none_of_them(
    release: Workspace,
) -> None:
    vllm, base = release.vllm, release.observe().base or ""
    commit(vllm, "Above", {"vllm/lines.py": f"above\n{LINES}"})
    sh_git(
        vllm,
        "am",
        "--quiet",
        "--3way",
        "--keep-non-patch",
        "--keep-cr",
        *(str(release.layout.patches("vllm") / name) for name in release.stack().names),
    )
    assert sh_git(vllm, "show", "HEAD:vllm/lines.py") + "\n" == f"above\n{PATCHED}"
    assert sh_git(vllm, "rev-list", "--count", f"{base}..HEAD") == "3"
    assert states(release) == ["unexported", "applied", "applied", "unexported"]


def test_merge_in_the_stack_is_listed_and_no_traceback(applied: Workspace) -> None:
    sh_git(applied.vllm, "checkout", "--quiet", "-b", "side", "HEAD~1")
    commit(applied.vllm, "Side", {"vllm/side.py": "side\n"})
    sh_git(applied.vllm, "merge", "--quiet", "--no-edit", "refs/patches/tip")
    rows = table(applied)
    assert [row.state for row in rows] == [
        "unexported",
        "applied",
        "applied",
        "unexported",
        "unexported",
    ]
    assert {row.subject for row in rows[3:]} >= {"Side"}


def test_conflict_that_waits_is_in_the_row_of_the_stack(
    release: Workspace, upstream: Upstream
) -> None:
    name, content = next(iter(upstream.patches.items()))
    release.series({name: content.replace(b"-line 20", b"-line XX"), "second.patch": content})
    with pytest.raises(PatchConflict):
        release.apply(stop_at_conflict=True)
    assert states(release) == ["in progress", "pending", "pending"]
    assert "waits in the middle of git am" in table(release)[0].subject


def test_missing_checkout_shows_the_series(workspace: Workspace) -> None:
    assert states(workspace) == ["missing", "pending", "pending"]
    assert moved(workspace) is None


def test_own_verbs_are_not_reported_as_moves(release: Workspace) -> None:
    assert moved(release) is None
    release.apply()
    assert moved(release) is None
    commit(release.vllm, "Mine", {"vllm/mine.py": "mine\n"})
    assert moved(release) is None
    sh_git(release.vllm, "checkout", "--quiet", "--detach", "refs/patches/tip")
    release.unapply()
    assert moved(release) is None
    release.apply()
    # A run that was killed, and is finished by the next.
    release.begin_move(release.observe().base or "")
    write(release.vllm, {"vllm/lines.py": LINES})
    release.unapply()
    assert (release.observe().head, moved(release)) == (release.observe().base, None)


def test_submodule_update_that_detached_to_the_pin_is_reported_with_the_way_back(
    made: Path, tmp_path: Path, upstream: Upstream
) -> None:
    for workspace in copied(tmp_path, upstream, made / "git"):
        tip = workspace.apply().head
        sh_git(workspace.layout.root, "update-index", "--no-skip-worktree", "vendor/vllm")
        sh_git(workspace.layout.root, "submodule", "--quiet", "update", "--checkout", "vendor/vllm")
        assert workspace.observe().head == workspace.pin.commit
        row = moved(workspace)
        assert row
        assert row.text.startswith(
            f"another program moved vendor/vllm from the stack to {workspace.pin.commit[:12]}"
            f" (checkout: moving from {tip} "
        )
        assert row.hint == "./scripts/inv patch.apply"
        follow(workspace, row)
        assert (workspace.observe().head, moved(workspace)) == (tip, None)


def test_submodule_recurse_of_a_branch_switch_is_reported_too(
    made: Path, tmp_path: Path, upstream: Upstream
) -> None:
    for workspace in copied(tmp_path, upstream, made / "git"):
        root = workspace.layout.root
        tip = workspace.apply().head
        sh_git(root, "update-index", "--no-skip-worktree", "vendor/vllm")
        # The patched commit is what this branch has: going back to main moves the checkout.
        sh_git(root, "switch", "--quiet", "--create", "patched")
        sh_git(root, "commit", "--quiet", "--all", "--message", "patched")
        sh_git(root, "-c", "submodule.recurse=true", "switch", "--quiet", "main")
        assert workspace.observe().head == workspace.pin.commit
        row = moved(workspace)
        assert row
        assert "submodule.recurse" in row.text
        follow(workspace, row)
        assert workspace.observe().head == tip


def test_way_back_leads_to_commits_that_were_never_exported(
    applied: Workspace,
) -> None:
    mine = commit(applied.vllm, "Mine", {"vllm/mine.py": "mine\n"})
    sh_git(applied.vllm, "checkout", "--quiet", "--detach", applied.observe().base or "")
    row = moved(applied)
    assert row
    assert row.hint == f"git -C vendor/vllm checkout {mine[:12]}"
    follow(applied, row)
    assert (applied.observe().head, moved(applied)) == (mine, None)


def test_another_branch_of_the_user_is_reported_with_the_way_back(release: Workspace) -> None:
    tip = release.apply().head
    sh_git(release.vllm, "checkout", "--quiet", "--orphan", "other")
    commit(release.vllm, "other", {"a": "a\n"})
    sh_git(release.vllm, "checkout", "--quiet", "-b", "third")
    assert states(release)[0] == "foreign"
    row = moved(release)
    assert row
    assert row.hint == "git -C vendor/vllm checkout refs/patches/tip"
    follow(release, row)
    assert release.observe().head == tip


def test_gitlink_that_is_not_the_pin_is_reported(
    checked_out: Workspace, upstream: Upstream
) -> None:
    other = sh_git(upstream.work, "rev-parse", "drift")
    sh_git(checked_out.layout.root, "update-index", "--cacheinfo", f"160000,{other},vendor/vllm")
    row = moved(checked_out)
    assert row
    assert row.text == (
        f"the superproject's index has vendor/vllm at {other[:12]}, vendor/pins.toml at"
        f" {checked_out.pin.commit[:12]}"
    )
    assert row.hint
    assert row.hint.startswith("git log --oneline -3 -- vendor/pins.toml vendor/vllm ")


def test_pin_that_moved_under_a_stack_is_reported_with_the_way_to_follow(
    made: Path, tmp_path: Path, upstream: Upstream
) -> None:
    for workspace in copied(tmp_path, upstream, made / "git"):
        workspace.apply()
        drift = sh_git(upstream.work, "rev-parse", "drift")
        workspace.pin = replace(workspace.pin, commit=drift, url=str(upstream.work))
        workspace.series({}, base=drift)
        sh_git(workspace.layout.root, "update-index", "--cacheinfo", f"160000,{drift},vendor/vllm")
        row = moved(workspace)
        assert row
        assert "lacks v1.0.0: the pin moved" in row.text
        sh_git(workspace.vllm, "fetch", "--quiet", str(upstream.work), drift)
        row = moved(workspace)
        assert f"is based on {upstream.pin.commit[:12]}, the pin is {drift[:12]}" in (
            row.text if row else ""
        )
        follow(workspace, row)
        assert (workspace.observe().head, moved(workspace)) == (drift, None)


def write_pins(applied: Workspace) -> None:
    """Write pins.toml with the pin of the world, as `inv patch` reads it."""
    pin, archive = applied.pin, applied.pin.archive
    assert archive
    tables = (
        f'[vllm]\ntag = "{pin.tag}"\nversion = "{pin.version}"\ncommit = "{pin.commit}"\nurl ='
        f' "{pin.url}"\n'
    )
    tables += "[vllm.archive]\n" + "".join(
        f'{key} = "{getattr(archive, key)}"\n' for key in ("filename", "sha256", "commit", "tree")
    )
    tables += (
        f'[triton]\ntag = "main"\nversion = "main"\ncommit = "{pin.commit}"\nurl = "{pin.url}"\n'
    )
    write(applied.layout.root, {"vendor/pins.toml": tables})


def test_screen_has_state_first_and_next_command_last_and_json_the_same(applied: Workspace) -> None:
    write_pins(applied)
    err, out = io.StringIO(), io.StringIO()
    overview.show(applied.layout, "vllm", console=Console(out=out, err=err))
    lines = out.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["applied", "applied", "applied", "hint:"]
    assert lines[1] == "applied  [Bugfix] Größer: twenty in words  Pending  vllm/lines.py"
    out = io.StringIO()
    overview.show(applied.layout, "vllm", console=Console(out=out, err=err), as_json=True)
    record = json.loads(out.getvalue())
    assert [row["state"] for row in record["rows"]] == ["applied", "applied", "applied"]
    assert (
        record["next"]
        == "./scripts/inv patch.export    after commits in vendor/vllm; nothing is due now"
    )
    write(applied.vllm, {"README": "edited\n"})
    out = io.StringIO()
    overview.show(applied.layout, "vllm", console=Console(out=out, err=err))
    assert out.getvalue().splitlines()[0].endswith("  edits: README")
    assert err.getvalue() == ""


@pytest.mark.parametrize(
    ("messages", "way"),
    [
        (["mine"], "git -C vendor/vllm commit --amend --only --no-edit --trailer"),
        (["mine", "again"], "git -C vendor/vllm rebase -i "),
        (["mine\n\nUpstream-Status: Pending"], "./scripts/inv patch.export"),
    ],
)
def test_next_command_adds_the_trailer_without_which_the_export_refuses(
    applied: Workspace, messages: list[str], way: str
) -> None:
    write_pins(applied)
    for index, message in enumerate(messages):
        commit(applied.vllm, message, {f"vllm/mine{index}.py": "mine\n"})
    err = io.StringIO()
    console = Console(out=err, err=err)
    overview.show(applied.layout, "vllm", console=console)
    assert f"hint: {way}" in err.getvalue()


def test_unknown_project_is_a_wrong_flag_and_not_a_missing_series(workspace: Workspace) -> None:
    with pytest.raises(SettingsError, match="--project: 'nope' is not one of vllm, triton"):
        overview.show(workspace.layout, "nope", console=Console())


def test_next_command_for_a_folder_without_git_does_not_touch_the_clone_around_it(
    workspace: Workspace,
) -> None:
    workspace.vllm.mkdir(parents=True, exist_ok=True)
    (workspace.vllm / "mine.txt").write_text("mine")
    following = patches.next_command(workspace.layout, workspace.pin, workspace.stack())
    assert following.startswith("ls -lA vendor/vllm    shows what is there")
