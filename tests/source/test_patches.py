"""The stack on real checkouts of both kinds, under a hostile git configuration."""

import io
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.source.conftest import LINES, PATCHED, Snapshot, Upstream, Workspace, commit, export, sh_git, write
from workspace.core.console import Console
from workspace.core.errors import CheckoutError, PatchConflict, PatchDrift, WorkspaceError
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.source import checkout, patches, pins
from workspace.source.checkout import Checkout, Kind
from workspace.source.patches import State

ROOT = Path(__file__).resolve().parents[2]


def test_series_is_applied_whole_and_kept_under_refs(checked_out: Workspace, upstream: Upstream) -> None:
    before = checked_out.stack()
    assert before.state is State.UNAPPLIED
    after = checked_out.apply()
    assert after.state is State.APPLIED
    assert after.tree == before.expected_tree == sh_git(upstream.work, "rev-parse", "local^{tree}")
    vllm = checked_out.vllm
    assert (vllm / "vllm" / "lines.py").read_text() == PATCHED
    assert (vllm / "csrc" / "dos.h").read_bytes() == b"dos\r\nmended\r\n"
    assert sh_git(vllm, "rev-parse", "refs/patches/base", "refs/patches/tip").split() == [after.base, after.head]
    assert sh_git(vllm, "status", "--porcelain", "--ignored") == ""
    assert not [*checked_out.layout.root.rglob("hook-ran")]


def test_commits_round_trip_to_the_same_bytes(checked_out: Workspace, upstream: Upstream) -> None:
    checked_out.apply()
    exported = [export(checked_out.vllm, f"HEAD~{1 - number}") for number in range(2)]
    assert exported == list(upstream.patches.values())


def test_commits_are_the_same_on_every_machine(release: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    first = release.apply().head
    sh_git(release.vllm, "checkout", "--quiet", "--detach", release.observe().base or "")
    sh_git(release.vllm, "update-ref", "-d", "refs/patches/tip")
    monkeypatch.setenv("GIT_COMMITTER_NAME", "someone else")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.delenv("GIT_CONFIG_GLOBAL")
    assert release.apply().head == first


def test_applied_stack_is_not_touched_again(checked_out: Workspace, snapshot: Snapshot) -> None:
    checked_out.apply()
    before = snapshot(checked_out.layout.root)
    assert checked_out.apply().state is State.APPLIED
    assert snapshot(checked_out.layout.root) == before


def test_files_that_no_patch_changes_keep_their_times(checked_out: Workspace, snapshot: Snapshot) -> None:
    before = snapshot(checked_out.vllm)
    checked_out.apply()
    after = snapshot(checked_out.vllm)
    touched = {name for name in before if after.get(name) != before[name] and "/.git" not in name and Path(name).is_file()}
    assert {Path(name).name for name in touched} == {"lines.py", "dos.h"}


def test_patch_and_its_revert_leave_every_file_untouched(release: Workspace, upstream: Upstream, snapshot: Snapshot, tmp_path: Path) -> None:
    work = tmp_path / "work"
    sh_git(tmp_path, "clone", "--quiet", str(upstream.work), str(work))
    sh_git(work, "checkout", "--quiet", "v1.0.0")
    commit(work, "there", {"csrc/a.cu": "there\n"})
    commit(work, "and back", {"csrc/a.cu": "a\n"})
    release.series({"there.patch": export(work, "HEAD~1"), "and-back.patch": export(work, "HEAD")})
    before = snapshot(release.vllm)
    # The tree is that of the base: nothing is to be done.
    assert release.apply().state is State.APPLIED
    assert {name: entry for name, entry in snapshot(release.vllm).items() if "/objects/" not in name} == {
        name: entry for name, entry in before.items() if "/objects/" not in name
    }


def test_empty_series_is_applied_as_it_stands_even_over_edits(release: Workspace) -> None:
    release.series({})
    write(release.vllm, {"README": "edited\n"})
    stack = release.apply()
    assert (stack.state, stack.dirty) == (State.APPLIED, ("README",))


def test_edits_in_the_way_stop_the_series_and_stay(release: Workspace) -> None:
    write(release.vllm, {"README": "edited\n"})
    assert release.stack().state is State.DIRTY
    with pytest.raises(CheckoutError, match=r"has edits \(README\)") as failure:
        release.apply()
    assert failure.value.hint
    assert (release.vllm / "README").read_text() == "edited\n"
    stash, _, pop = failure.value.hint.split(" && ")
    subprocess.run(stash, shell=True, cwd=release.layout.root, check=True, env={**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "EMAIL": "a@b"})
    release.apply()
    subprocess.run(pop, shell=True, cwd=release.layout.root, check=True, env={**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "EMAIL": "a@b"})
    assert (release.stack().state, release.stack().dirty) == (State.APPLIED, ("README",))


def test_new_file_of_the_user_where_a_patch_makes_one_is_kept(release: Workspace, snapshot: Snapshot) -> None:
    write(release.vllm, {"vllm/new.py": "mine\n"})
    with pytest.raises(CheckoutError, match="is in the way"):
        release.apply()
    assert (release.vllm / "vllm" / "new.py").read_text() == "mine\n"
    assert (release.vllm / "vllm" / "lines.py").read_text() == LINES
    assert release.stack().state is State.UNAPPLIED


def test_unexported_commits_stop_apply_and_the_hint_keeps_them(checked_out: Workspace) -> None:
    mine = commit(checked_out.vllm, "mine", {"vllm/mine.py": "mine\n"})
    assert checked_out.stack().state is State.UNEXPORTED
    with pytest.raises(PatchDrift, match="commits") as failure:
        checked_out.apply()
    assert failure.value.hint
    commands = failure.value.hint.split(": ", 1)[1].removesuffix(" && ./scripts/inv bootstrap")
    subprocess.run(commands, shell=True, cwd=checked_out.layout.root, check=True, capture_output=True, env={**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"})
    assert checked_out.apply().state is State.APPLIED
    assert sh_git(checked_out.vllm, "rev-parse", f"mine-{mine[:12]}") == mine


def test_commits_on_top_of_the_stack_are_unexported(release: Workspace) -> None:
    release.apply()
    commit(release.vllm, "mine", {"vllm/mine.py": "mine\n"})
    assert release.stack().state is State.UNEXPORTED


def test_head_that_is_not_on_the_base_is_foreign(release: Workspace) -> None:
    sh_git(release.vllm, "checkout", "--quiet", "--orphan", "other")
    commit(release.vllm, "other", {"a": "a\n"})
    assert release.stack().state is State.FOREIGN
    with pytest.raises(CheckoutError, match="is not on"):
        release.apply()


def test_same_tree_on_another_history_is_foreign(release: Workspace) -> None:
    tree = release.apply().tree
    assert tree
    sh_git(release.vllm, "checkout", "--quiet", "--detach", sh_git(release.vllm, "commit-tree", "-m", "alone", tree))
    assert release.stack().state is State.FOREIGN


@pytest.mark.parametrize("verb", ["am", "rebase", "merge", "cherry-pick", "revert"])
def test_operation_under_way_is_named_and_left(release: Workspace, upstream: Upstream, verb: str) -> None:
    vllm = release.vllm
    first, base = next(iter(upstream.patches)), release.observe().base or ""
    mine = commit(vllm, "mine", {"vllm/lines.py": LINES.replace("line 20\n", "mine\n")})
    side = sh_git(vllm, "rev-parse", base)
    sh_git(vllm, "checkout", "--quiet", "-b", "side", side)
    other = commit(vllm, "other", {"vllm/lines.py": LINES.replace("line 20\n", "other\n")})
    last = commit(vllm, "last", {"vllm/lines.py": LINES.replace("line 20\n", "last\n")})
    words = {
        "am": ("am", "--3way", str(release.layout.patches("vllm") / first)),
        "rebase": ("rebase", mine),
        "merge": ("merge", mine),
        "cherry-pick": ("cherry-pick", mine),
        "revert": ("revert", other),
    }
    sh_git(vllm, *words[verb], check=False)
    assert release.stack().state is State.IN_PROGRESS
    with pytest.raises(CheckoutError, match=f"in the middle of a git {verb}") as failure:
        release.apply()
    assert failure.value.hint
    assert failure.value.hint.startswith("./scripts/inv patch.continue    ")
    sh_git(vllm, verb, "--abort")
    assert sh_git(vllm, "rev-parse", "HEAD") == last


def conflicting(upstream: Upstream, tmp_path: Path) -> bytes:
    """A patch on other contents than the base has."""
    work = tmp_path / "work"
    sh_git(tmp_path, "clone", "--quiet", str(upstream.work), str(work))
    sh_git(work, "checkout", "--quiet", "origin/drift")
    commit(work, "XX to YY", {"vllm/lines.py": LINES.replace("line 20\n", "line YY\n")})
    return export(work, "HEAD")


def test_conflict_names_patch_place_and_paths_and_changes_nothing(checked_out: Workspace, upstream: Upstream, snapshot: Snapshot, tmp_path: Path) -> None:
    first, second = upstream.patches.items()
    checked_out.series({second[0]: second[1], "XX-to-YY.patch": conflicting(upstream, tmp_path), first[0]: first[1]})
    assert (checked_out.stack().state, checked_out.stack().expected_tree) == (State.UNAPPLIED, None)
    before = snapshot(checked_out.vllm)
    with pytest.raises(PatchConflict, match=r"patch 2 of 3, patches/vllm/XX-to-YY\.patch") as failure:
        checked_out.apply()
    assert failure.value.details == ("conflict in vllm/lines.py",)
    assert checked_out.stack().state is State.UNAPPLIED
    assert {name: entry for name, entry in snapshot(checked_out.vllm).items() if "/.git" not in name} == {
        name: entry for name, entry in before.items() if "/.git" not in name
    }
    assert not [*checked_out.layout.root.rglob("*.making-*")]


def test_conflicts_hint_leads_to_that_conflict(checked_out: Workspace, upstream: Upstream, tmp_path: Path) -> None:
    second = list(upstream.patches.items())[1]
    checked_out.series({second[0]: second[1], "XX-to-YY.patch": conflicting(upstream, tmp_path)})
    # With the contents of the other side at hand it is a conflict, without them a refusal.
    sh_git(checked_out.vllm, "fetch", "--quiet", str(upstream.work), "drift")
    with pytest.raises(PatchConflict) as failure:
        checked_out.apply()
    assert (failure.value.hint or "").startswith("./scripts/inv patch.apply    ")
    with pytest.raises(PatchConflict, match=r"patch 2 of 2, patches/vllm/XX-to-YY\.patch, .* vendor/vllm waits at the conflict") as stopped:
        checked_out.apply(stop_at_conflict=True)
    assert "git -C vendor/vllm add vllm/lines.py && ./scripts/inv patch.continue    " in (stopped.value.hint or "")
    assert "patch.continue --skip" in (stopped.value.hint or "")
    assert "patch.continue --abort" in (stopped.value.hint or "")
    assert stopped.value.details == ("conflict in vllm/lines.py",)
    assert checked_out.stack().state is State.IN_PROGRESS
    assert sh_git(checked_out.vllm, "log", "-1", "--format=%f") == second[0].removesuffix(".patch")
    assert "<<<<<<<" in (checked_out.vllm / "vllm" / "lines.py").read_text()


def test_three_way_merge_of_am_equals_the_expected_tree(workspace: Workspace, upstream: Upstream, tmp_path: Path) -> None:
    work = tmp_path / "work"
    sh_git(tmp_path, "clone", "--quiet", str(upstream.work), str(work))
    sh_git(work, "checkout", "--quiet", "v1.0.0~1")
    old = "".join(f"line {number}\n" for number in range(1, 31) if number != 22)
    commit(work, "older file", {"vllm/other.py": old})
    sh_git(work, "tag", "older")
    commit(work, "twenty", {"vllm/other.py": old.replace("line 20\n", "twenty\n")})
    patch = export(work, "HEAD")
    sh_git(work, "checkout", "--quiet", "older")
    base = commit(work, "line 22 is back", {"vllm/other.py": "".join(f"line {number}\n" for number in range(1, 31))})
    sh_git(work, "tag", "--force", "v1.0.0")
    workspace.pin = replace(workspace.pin, commit=base, url=str(work), archive=None)
    workspace.series({"twenty.patch": patch}, base=base)
    # A whole clone: it has the older contents that the merge needs.
    workspace.ensure("git")
    assert sh_git(workspace.vllm, "apply", "--numstat", "--check", str(workspace.layout.patches("vllm") / "twenty.patch"), check=False) == ""
    assert workspace.apply().state is State.APPLIED
    assert "twenty\nline 21\nline 22\n" in (workspace.vllm / "vllm" / "other.py").read_text()


def test_patch_that_the_pin_has_already_is_named(release: Workspace, upstream: Upstream, tmp_path: Path) -> None:
    work = tmp_path / "work"
    sh_git(tmp_path, "clone", "--quiet", str(upstream.work), str(work))
    sh_git(work, "checkout", "--quiet", "v1.0.0")
    commit(work, "backwards", {"csrc/a.cu": "old\n"})
    commit(work, "forwards", {"csrc/a.cu": "a\n"})
    first = next(iter(upstream.patches.items()))
    release.series({"forwards.patch": export(work, "HEAD"), first[0]: first[1]})
    # Without the contents it was made from, it cannot be told from a conflict.
    with pytest.raises(PatchConflict, match=r"forwards\.patch"):
        release.apply()
    sh_git(release.vllm, "fetch", "--quiet", str(work), "HEAD")
    with pytest.raises(PatchDrift, match=r"forwards\.patch changes nothing"):
        release.apply()
    assert release.stack().head == release.stack().base


def test_broken_patch_is_a_conflict_and_no_traceback(release: Workspace, upstream: Upstream) -> None:
    name, content = next(iter(upstream.patches.items()))
    release.series({name: re.sub(rb"@@ -\d+", b"@@ -x", content)})
    with pytest.raises(PatchConflict, match="patch 1 of 1"):
        release.apply()


def test_branch_of_the_user_at_the_base_moves_with_the_stack(release: Workspace) -> None:
    sh_git(release.vllm, "switch", "--quiet", "--create", "mine")
    assert release.apply().state is State.APPLIED
    assert sh_git(release.vllm, "symbolic-ref", "--short", "HEAD") == "mine"


def test_git_clone_applies_without_any_network(workspace: Workspace, upstream: Upstream, hostile: Path) -> None:
    workspace.ensure("git")
    sh_git(hostile.parent, "config", "--file", str(hostile), "--remove-section", f"url.file://{upstream.bare}")
    assert workspace.apply().state is State.APPLIED


def test_expected_tree_is_remembered_and_the_memory_may_be_damaged(release: Workspace) -> None:
    expected = release.stack().expected_tree
    memory = release.layout.state / "expected-trees" / "vllm.json"
    for damage in ("", "[]", '{"base": 3}', "\0"):
        memory.write_text(damage)
        assert release.stack().expected_tree == expected
    memory.unlink()
    memory.mkdir()
    assert release.stack().expected_tree == expected


def test_looking_writes_nothing_into_the_checkout(checked_out: Workspace, snapshot: Snapshot) -> None:
    before = snapshot(checked_out.vllm)
    checked_out.stack()
    assert snapshot(checked_out.vllm) == before


def test_missing_checkout_has_a_stack_of_names_only(workspace: Workspace, upstream: Upstream) -> None:
    stack = workspace.stack()
    assert (stack.state, stack.names, stack.head) == (State.MISSING, tuple(upstream.patches), None)
    with pytest.raises(CheckoutError, match="is not there"):
        workspace.apply()


def test_series_for_another_pin_is_drift(release: Workspace, upstream: Upstream) -> None:
    release.series(upstream.patches, base="f" * 40)
    with pytest.raises(PatchDrift, match="pinned is"):
        release.stack()


# Blob 67f192cdd393 of setup.py, as far as the shipped patch looks at it.
SETUP = """\
            with zipfile.ZipFile(wheel_path) as wheel:
                exact_members = set()
                if extract_extensions:
                    exact_members.update(
                        {
                            "vllm/_C.abi3.so",
                            "vllm/_C_stable_libtorch.abi3.so",
                            "vllm/_moe_C_stable_libtorch.abi3.so",
                            "vllm/_qutlass_C.abi3.so",
"""


def test_shipped_patch_makes_a_commit_of_its_name_and_round_trips(tmp_path: Path) -> None:
    pin = pins.load(ROOT / "vendor" / "pins.toml").vllm
    layout = Layout(tmp_path)
    layout.vllm.mkdir(parents=True)
    sh_git(layout.vllm, "init", "--quiet")
    base = commit(layout.vllm, "base", {"setup.py": "#\n" * 1011 + SETUP})
    (name,) = (path.name for path in (ROOT / "patches" / "vllm").glob("*.patch"))
    content = (ROOT / "patches" / "vllm" / name).read_bytes()
    write(layout.patches("vllm"), {name: content, "series": f"# base: {pin.commit}\n{name}\n"})
    found = Checkout(Kind.RELEASE, base, base, "a part of it")
    assert pin.archive
    pin = replace(pin, archive=replace(pin.archive, commit=base))
    with Journal(Console(out=io.StringIO(), err=io.StringIO()), tmp_path / "logs", verb="test") as journal:
        assert patches.apply(layout, "vllm", pin, found, journal=journal).state is State.APPLIED
    assert checkout.observe(layout, pin).kind is Kind.RELEASE
    assert sh_git(layout.vllm, "log", "-1", "--format=%f") + ".patch" == name
    text = (layout.vllm / "setup.py").read_text()
    assert text.count('"vllm/_C_AVX512.abi3.so"') == text.count('"vllm/_C_AVX2.abi3.so"') == 1
    # The index line names the whole file of the pin, which is not at hand here.
    without_index = re.compile(rb"^index .*$|^@@ .*$", re.MULTILINE)
    assert without_index.sub(b"", export(layout.vllm, "HEAD")) == without_index.sub(b"", content)


def everything(workspace: Workspace) -> dict[str, str]:
    """All that must survive a refusal: every reference, HEAD, the index against HEAD, and every file."""
    vllm = workspace.vllm
    files = {
        str(path): os.readlink(path) if path.is_symlink() else str(path.read_bytes())
        for path in vllm.rglob("*")
        if ".git" not in path.parts and not path.is_dir()
    }
    return files | {"refs": sh_git(vllm, "for-each-ref"), "HEAD": sh_git(vllm, "rev-parse", "HEAD"), "status": sh_git(vllm, "status", "--porcelain", "-uall")}


def test_unapply_goes_back_to_the_base_and_keeps_the_commits_under_refs(checked_out: Workspace) -> None:
    before = everything(checked_out)
    applied = checked_out.apply()
    after = checked_out.unapply()
    assert (after.state, after.head) == (State.UNAPPLIED, applied.base)
    assert sh_git(checked_out.vllm, "rev-parse", "refs/patches/base", "refs/patches/tip").split() == [applied.base, applied.head]
    assert everything(checked_out) | {"refs": ""} == before | {"refs": ""}
    assert checked_out.apply().head == applied.head


def test_unapply_with_nothing_applied_touches_nothing(release: Workspace, snapshot: Snapshot) -> None:
    release.stack()
    before = snapshot(release.layout.root)
    assert release.unapply().state is State.UNAPPLIED
    write(release.vllm, {"README": "edited\n"})
    assert release.unapply().state is State.DIRTY
    assert (release.vllm / "README").read_text() == "edited\n"
    sh_git(release.vllm, "checkout", "--quiet", "README")
    readme = str(release.vllm / "README")
    index = str(release.vllm / ".git" / "index")
    after = snapshot(release.layout.root)
    assert {name for name in after if after[name] != before.get(name)} <= {readme, index, str(release.vllm), str(release.vllm / ".git")}


@pytest.mark.parametrize(
    ("trouble", "error", "says", "hint"),
    [
        ("edit", CheckoutError, r"has edits \(csrc/a\.cu\)", "git -C vendor/vllm stash && ./scripts/inv patch.unapply && git -C vendor/vllm stash pop"),
        ("commit", PatchDrift, "commits on .* that are not what the series makes", "./scripts/inv patch.export    "),
        ("foreign", CheckoutError, "which is not on", "git -C vendor/vllm branch mine-"),
        ("merge", CheckoutError, "in the middle of a git merge", "./scripts/inv patch.continue --abort && ./scripts/inv patch.unapply"),
        ("missing", CheckoutError, "is not there", "./scripts/inv bootstrap"),
    ],
)
def test_unapply_refuses_what_it_could_lose(release: Workspace, trouble: str, error: type[Exception], says: str, hint: str) -> None:
    release.apply()
    vllm = release.vllm
    if trouble in ("edit", "merge"):
        write(vllm, {"csrc/a.cu": "mine\n"})
    if trouble in ("commit", "merge"):
        commit(vllm, "mine", {"csrc/a.cu": "mine\n"})
    if trouble == "merge":
        mine = sh_git(vllm, "rev-parse", "HEAD")
        sh_git(vllm, "checkout", "--quiet", "HEAD~1")
        commit(vllm, "theirs", {"csrc/a.cu": "theirs\n"})
        sh_git(vllm, "merge", mine, check=False)
    if trouble == "foreign":
        sh_git(vllm, "checkout", "--quiet", "--orphan", "other")
        commit(vllm, "other", {"a": "a\n"})
    if trouble == "missing":
        vllm.rename(vllm.with_name("elsewhere"))
        with pytest.raises(error, match=says) as failure:
            release.unapply()
    else:
        before = everything(release)
        with pytest.raises(error, match=says) as failure:
            release.unapply()
        assert everything(release) == before
    assert hint in (failure.value.hint or "")


def test_unexported_commits_are_off_and_safe_after_the_hint_of_unapply(release: Workspace) -> None:
    release.apply()
    mine = commit(release.vllm, "mine", {"vllm/mine.py": "mine\n"})
    with pytest.raises(PatchDrift) as failure:
        release.unapply()
    commands = (failure.value.hint or "").split(": ", 1)[1]
    subprocess.run(commands, shell=True, cwd=release.layout.root, check=True, capture_output=True, env={**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"})
    assert (release.stack().state, sh_git(release.vllm, "rev-parse", f"mine-{mine[:12]}")) == (State.UNAPPLIED, mine)


def test_unapply_that_was_killed_is_finished(release: Workspace) -> None:
    before = everything(release)
    head = release.apply().head
    # As read-tree leaves it when it is killed: the first files written, one begun, one gone, HEAD and index as they were.
    release.begin_move(release.observe().base or "")
    write(release.vllm, {"vllm/lines.py": LINES, "csrc/dos.h": b"dos\r\nli"})
    (release.vllm / "vllm" / "new.py").unlink()
    write(release.vllm, {".git/index.lock": ""})
    assert release.unapply().state is State.UNAPPLIED
    assert everything(release) | {"refs": ""} == before | {"refs": ""}
    assert sh_git(release.vllm, "rev-parse", "refs/patches/tip") == head


def test_apply_that_was_killed_after_its_new_files_is_finished(release: Workspace) -> None:
    tip = release.apply().head or ""
    release.unapply()
    release.begin_move(tip)
    # The file is nobody's edit: HEAD does not have it yet.
    (release.vllm / "vllm" / "new.py").write_text("new\n")
    assert release.apply().head == tip
    assert sh_git(release.vllm, "status", "--porcelain") == ""


def test_edits_that_look_like_a_killed_move_are_the_users_where_none_was_begun(checked_out: Workspace) -> None:
    checked_out.apply()
    checked_out.unapply()
    (checked_out.vllm / "README").unlink()
    (checked_out.vllm / "vllm" / "lines.py").write_text("line 1\n")
    with pytest.raises(CheckoutError, match="has edits"):
        checked_out.apply()
    assert not (checked_out.vllm / "README").exists()
    assert (checked_out.vllm / "vllm" / "lines.py").read_text() == "line 1\n"


def test_edit_of_a_file_that_a_killed_move_does_not_touch_stays(release: Workspace) -> None:
    tip = release.apply().head or ""
    release.unapply()
    release.begin_move(tip)
    (release.vllm / "vllm" / "lines.py").write_text("line 1\n")
    (release.vllm / "README").unlink()
    assert release.apply().head == tip
    assert sh_git(release.vllm, "status", "--porcelain") == " D README"
    assert (release.vllm / "vllm" / "lines.py").read_text() == PATCHED


def test_new_file_of_the_users_that_git_ignores_is_not_taken_for_one_of_a_killed_apply(release: Workspace) -> None:
    tip = release.apply().head or ""
    release.unapply()
    release.begin_move(tip)
    write(release.vllm, {".git/info/exclude": "new.py\n", "vllm/new.py": "mine\n"})
    with pytest.raises(CheckoutError, match="new.py in .* is in the way") as caught:
        release.apply()
    assert (caught.value.hint or "").startswith("mv ")
    assert (release.vllm / "vllm" / "new.py").read_text() == "mine\n"


def test_commits_that_something_else_left_behind_get_a_reference_before_apply_goes_on(checked_out: Workspace) -> None:
    base = checked_out.apply().base or ""
    commit(checked_out.vllm, "Mine\n\nUpstream-Status: Pending", {"vllm/mine.py": "mine\n"})
    mine = sh_git(checked_out.vllm, "rev-parse", "HEAD")
    sh_git(checked_out.vllm, "checkout", "--quiet", "--detach", base)
    checked_out.apply()
    assert sh_git(checked_out.vllm, "for-each-ref", "--format=%(refname)", "--contains", mine) == f"refs/patches/kept/{mine[:12]}"


def test_lock_that_a_killed_git_left_does_not_make_touched_files_look_edited(release: Workspace) -> None:
    os.utime(release.vllm / "vllm" / "lines.py", ns=(1, 1))
    write(release.vllm, {".git/index.lock": ""})
    assert release.apply().state is State.APPLIED


def made_on_the_release(workspace: Workspace, tmp_path: Path, message: str, change: str) -> tuple[str, bytes, str]:
    """A patch that `change`, a shell script, makes of the checkout's base: its name, its content, and the tree it gives."""
    work = tmp_path / "made"
    sh_git(tmp_path, "clone", "--quiet", str(workspace.vllm), str(work))
    subprocess.run(["bash", "-ec", change], cwd=work, check=True)
    commit(work, f"{message}\n\nUpstream-Status: Pending", {})
    return f"{sh_git(work, 'log', '-1', '--format=%f')}.patch", export(work, "HEAD"), sh_git(work, "rev-parse", "HEAD^{tree}")


@pytest.mark.parametrize(
    "change",
    [
        "printf 'dos\\r\\nother\\r\\n' > csrc/dos.h",
        "head -c 70000 /dev/urandom > binary.bin",
        "chmod 755 README; chmod 644 run.sh",
        "mv vllm/lines.py vllm/moved.py; echo more >> vllm/moved.py",
        "ln -sf README link; ln -s nowhere dangling",
        "printf '\\351t\\351\\n' > latin.txt; printf 'x' > $'n\\351\\n\"'",
        "rm README; mkdir README; echo now a folder > README/file",
        "seq 700000 > five-megabytes.txt",
        "printf 'no newline at the end' > README; printf '' > empty",
    ],
    ids=["crlf", "binary", "modes", "rename", "symlinks", "not-utf-8", "file-to-folder", "5-MB", "no-newline-and-empty"],
)
def test_patch_of_any_content_goes_on_and_off_without_a_trace(release: Workspace, tmp_path: Path, change: str) -> None:
    name, content, tree = made_on_the_release(release, tmp_path, "Change it", change)
    release.series({name: content})
    before = everything(release)
    assert (release.apply().state, release.stack().tree, release.stack().dirty) == (State.APPLIED, tree, ())
    assert release.unapply().state is State.UNAPPLIED
    assert everything(release) | {"refs": ""} == before | {"refs": ""}


@pytest.mark.parametrize(
    ("series", "code", "says"),
    [
        ("gone.patch\n", 5, r"gone\.patch is not there"),
        ("a.patch\na.patch\n", 5, "a second time"),
        ("mbox.patch\n", 5, "is not a mail"),
        ("../a.patch\n", 5, "not the name"),
        ("crlf.patch\n", 4, "patch 1 of 1"),
        ("cut.patch\n", 4, "patch 1 of 1"),
    ],
)
@pytest.mark.parametrize("stop_at_conflict", [False, True])
def test_bad_series_is_a_sentence_and_a_hint_and_every_file_stays(
    release: Workspace, upstream: Upstream, series: str, code: int, says: str, stop_at_conflict: bool
) -> None:
    good = next(iter(upstream.patches.values()))
    release.series({"a.patch": good, "mbox.patch": b"no mail\n", "crlf.patch": good.replace(b" line 19\n", b" line 19\r\n"), "cut.patch": good[:-40]})
    write(release.layout.patches("vllm"), {"series": f"# base: {release.pin.commit}\n{series}"})
    before = everything(release)
    with pytest.raises(WorkspaceError, match=says) as failure:
        release.apply(stop_at_conflict=stop_at_conflict)
    assert (failure.value.exit_code, bool(failure.value.hint)) == (code, True)
    if code == 4 and stop_at_conflict:
        assert release.go_on("abort").state is State.UNAPPLIED
    assert everything(release) | {"refs": ""} == before | {"refs": ""}


def test_shallow_clone_without_the_contents_of_a_merge_is_a_conflict(release: Workspace, upstream: Upstream, tmp_path: Path) -> None:
    shutil.rmtree(release.vllm)
    sh_git(tmp_path, "clone", "--quiet", "--depth=1", "--branch=v1.0.0", upstream.bare.as_uri(), str(release.vllm))
    release.series({"XX-to-YY.patch": conflicting(upstream, tmp_path)})
    before = everything(release)
    with pytest.raises(PatchConflict, match="patch 1 of 1"):
        release.apply()
    assert everything(release) == before
    release.series(upstream.patches)
    assert release.apply().state is State.APPLIED


FULL = """
mount -t tmpfs -o size=$2k none "$1/objects" && cp -a "$1/objects.kept/." "$1/objects/" && head -c 100m /dev/zero >"$1/objects/filler" 2>/dev/null
shift 2; exec "$@"
"""
VERB = """
import sys
from pathlib import Path
from workspace.core.console import Console
from workspace.core.errors import WorkspaceError
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.source import checkout, patches
from workspace.source.pins import Archive, Pin
layout, base = Layout(Path(sys.argv[1])), sys.argv[2]
pin = Pin("vllm", "v1.0.0", "1.0.0", sys.argv[3], "u", Archive("f", "0", base, "0"), {})
with Journal(Console(), layout.logs, verb="test") as journal:
    try:
        patches.apply(layout, "vllm", pin, checkout.observe(layout, pin), journal=journal, stop_at_conflict=True)
    except WorkspaceError as exc:
        journal.console.error(exc)
        sys.exit(exc.exit_code)
"""


def test_full_disk_is_said_and_nothing_is_lost(release: Workspace) -> None:
    namespace = ("unshare", "--user", "--map-root-user", "--mount")
    if (tried := subprocess.run([*namespace, "true"], capture_output=True, text=True)).returncode != 0:
        pytest.skip(f"no user namespaces here, so no full disk was tried: {tried.stderr.strip()}")
    git_dir = release.vllm / ".git"
    shutil.copytree(git_dir / "objects", git_dir / "objects.kept")
    before = everything(release)
    argv = [*namespace, "bash", "-c", FULL, "bash", str(git_dir), "400", sys.executable, "-c", VERB]
    argv += [str(release.layout.root), release.observe().base or "", release.pin.commit]
    done = subprocess.run(argv, env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}, capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr, "hint: df -h" in done.stderr) == (6, False, True), done.stderr
    assert everything(release) == before
    assert release.apply().state is State.APPLIED


def test_own_commits_that_apply_makes_anew_stay_in_a_reference(checked_out: Workspace) -> None:
    git = checked_out.vllm
    base = checked_out.apply().base or ""
    # As if they had been committed by hand before they were exported.
    sh_git(git, "rebase", "--quiet", "--force-rebase", base)
    own = sh_git(git, "rev-parse", "HEAD")
    for _ in range(2):
        checked_out.unapply()
        checked_out.apply()
    assert sh_git(git, "rev-parse", "HEAD") != own
    assert sh_git(git, "for-each-ref", "--format=%(refname)", "--contains", own) == f"refs/patches/kept/{own[:12]}"
    # Commits that am makes of patches are made again whenever they are wanted, and need no reference.
    assert len(sh_git(git, "for-each-ref", "--format=%(refname)", "refs/patches/kept").split()) == 1
