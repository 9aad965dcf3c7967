"""The stack on real checkouts of both kinds, under a hostile git configuration."""

import io
import os
import re
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
    export,
    sh_git,
    write,
)
from tests.repo.states import everything
from workspace.core.console import Console, RunLog
from workspace.core.errors import CheckoutError, PatchDrift
from workspace.core.paths import Layout
from workspace.repo import checkout, patches, pins
from workspace.repo.checkout import Checkout, Kind
from workspace.repo.patches import State

ROOT = Path(__file__).resolve().parents[2]


def test_series_is_applied_whole_and_kept_under_refs(
    checked_out: Workspace, upstream: Upstream
) -> None:
    before = checked_out.stack()
    assert before.state is State.UNAPPLIED
    after = checked_out.apply()
    assert after.state is State.APPLIED
    assert after.tree == before.expected_tree == sh_git(upstream.work, "rev-parse", "local^{tree}")
    vllm = checked_out.vllm
    assert (vllm / "vllm" / "lines.py").read_text() == PATCHED
    assert (vllm / "csrc" / "dos.h").read_bytes() == b"dos\r\nfixed\r\n"
    assert sh_git(vllm, "rev-parse", "refs/patches/base", "refs/patches/tip").split() == [
        after.base,
        after.head,
    ]
    assert sh_git(vllm, "status", "--porcelain", "--ignored") == ""
    assert not [*checked_out.layout.root.rglob("hook-ran")]


def test_commits_round_trip_to_the_same_bytes(applied: Workspace, upstream: Upstream) -> None:
    exported = [export(applied.vllm, f"HEAD~{1 - number}") for number in range(2)]
    assert exported == list(upstream.patches.values())


def test_commits_are_the_same_on_every_machine(
    release: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = release.apply().head
    sh_git(release.vllm, "checkout", "--quiet", "--detach", release.observe().base or "")
    sh_git(release.vllm, "update-ref", "-d", "refs/patches/tip")
    monkeypatch.setenv("GIT_COMMITTER_NAME", "someone else")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.delenv("GIT_CONFIG_GLOBAL")
    assert release.apply().head == first


def test_applied_stack_is_not_touched_again(either_applied: Workspace, snapshot: Snapshot) -> None:
    before = snapshot(either_applied.layout.root)
    assert either_applied.apply().state is State.APPLIED
    assert snapshot(either_applied.layout.root) == before


def test_patch_and_its_revert_leave_every_file_untouched(
    release: Workspace, upstream: Upstream, snapshot: Snapshot, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    sh_git(tmp_path, "clone", "--quiet", str(upstream.work), str(work))
    sh_git(work, "checkout", "--quiet", "v1.0.0")
    commit(work, "there", {"csrc/a.cu": "there\n"})
    commit(work, "and back", {"csrc/a.cu": "a\n"})
    release.series({"there.patch": export(work, "HEAD~1"), "and-back.patch": export(work, "HEAD")})
    before = snapshot(release.vllm)
    # The tree is that of the base, and yet the commits have to be there: an export would find the
    # patches lost.
    assert release.apply().state is State.APPLIED
    assert sh_git(release.vllm, "log", "-2", "--format=%f").split() == ["and-back", "there"]
    assert {
        name: entry for name, entry in snapshot(release.vllm).items() if "/.git" not in name
    } == {name: entry for name, entry in before.items() if "/.git" not in name}


def test_empty_series_is_applied_even_with_edits(release: Workspace) -> None:
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
    subprocess.run(
        stash,
        shell=True,
        cwd=release.layout.root,
        check=True,
        env={**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "EMAIL": "a@b"},
    )
    release.apply()
    subprocess.run(
        pop,
        shell=True,
        cwd=release.layout.root,
        check=True,
        env={**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "EMAIL": "a@b"},
    )
    assert (release.stack().state, release.stack().dirty) == (State.APPLIED, ("README",))


def test_new_file_of_the_user_where_a_patch_makes_one_is_kept(
    release: Workspace, snapshot: Snapshot
) -> None:
    write(release.vllm, {"vllm/new.py": "mine\n"})
    with pytest.raises(CheckoutError, match="is in the way"):
        release.apply()
    assert (release.vllm / "vllm" / "new.py").read_text() == "mine\n"
    assert (release.vllm / "vllm" / "lines.py").read_text() == LINES
    assert release.stack().state is State.UNAPPLIED


def test_unexported_commits_stop_apply_and_the_hint_keeps_them(release: Workspace) -> None:
    mine = commit(release.vllm, "mine", {"vllm/mine.py": "mine\n"})
    assert release.stack().state is State.UNEXPORTED
    with pytest.raises(PatchDrift, match="commits") as failure:
        release.apply()
    assert failure.value.hint
    commands = failure.value.hint.split(": ", 1)[1].removesuffix(" && ./scripts/inv bootstrap")
    subprocess.run(
        commands,
        shell=True,
        cwd=release.layout.root,
        check=True,
        capture_output=True,
        env={**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"},
    )
    assert release.apply().state is State.APPLIED
    assert sh_git(release.vllm, "rev-parse", f"mine-{mine[:12]}") == mine


def test_head_that_is_not_on_the_base_is_foreign(release: Workspace) -> None:
    sh_git(release.vllm, "checkout", "--quiet", "--orphan", "other")
    commit(release.vllm, "other", {"a": "a\n"})
    assert release.stack().state is State.FOREIGN
    with pytest.raises(CheckoutError, match="is not on"):
        release.apply()


def test_same_tree_on_another_history_is_foreign(release: Workspace) -> None:
    tree = release.apply().tree
    assert tree
    sh_git(
        release.vllm,
        "checkout",
        "--quiet",
        "--detach",
        sh_git(release.vllm, "commit-tree", "-m", "alone", tree),
    )
    assert release.stack().state is State.FOREIGN


def test_branch_of_the_user_at_the_base_moves_with_the_stack(release: Workspace) -> None:
    sh_git(release.vllm, "switch", "--quiet", "--create", "mine")
    assert release.apply().state is State.APPLIED
    assert sh_git(release.vllm, "symbolic-ref", "--short", "HEAD") == "mine"


def test_git_clone_applies_without_any_network(
    workspace: Workspace, upstream: Upstream, hostile: Path
) -> None:
    workspace.ensure("git")
    sh_git(
        hostile.parent,
        "config",
        "--file",
        str(hostile),
        "--remove-section",
        f"url.file://{upstream.bare}",
    )
    assert workspace.apply().state is State.APPLIED


def test_expected_tree_is_cached_and_the_cache_may_be_damaged(release: Workspace) -> None:
    expected = release.stack().expected_tree
    memory = release.layout.state / "expected-trees" / "vllm.json"
    for damage in ("", "[]", '{"base": 3}', "\0"):
        memory.write_text(damage)
        assert release.stack().expected_tree == expected
    memory.unlink()
    memory.mkdir()
    assert release.stack().expected_tree == expected


def test_looking_writes_nothing_into_the_checkout(
    checked_out: Workspace, snapshot: Snapshot
) -> None:
    before = snapshot(checked_out.vllm)
    checked_out.stack()
    assert snapshot(checked_out.vllm) == before


def test_missing_checkout_has_a_stack_of_names_only(
    workspace: Workspace, upstream: Upstream
) -> None:
    stack = workspace.stack()
    assert (stack.state, stack.names, stack.head) == (State.MISSING, tuple(upstream.patches), None)
    with pytest.raises(CheckoutError, match="does not exist"):
        workspace.apply()


def test_series_for_another_pin_is_drift(release: Workspace, upstream: Upstream) -> None:
    release.series(upstream.patches, base="f" * 40)
    with pytest.raises(PatchDrift, match="not for the pin"):
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
    with RunLog(
        Console(out=io.StringIO(), err=io.StringIO()), tmp_path / "logs", verb="test"
    ) as run_log:
        assert patches.apply(layout, "vllm", pin, found, run_log=run_log).state is State.APPLIED
    assert checkout.observe(layout, pin).kind is Kind.RELEASE
    assert sh_git(layout.vllm, "log", "-1", "--format=%f") + ".patch" == name
    text = (layout.vllm / "setup.py").read_text()
    assert text.count('"vllm/_C_AVX512.abi3.so"') == text.count('"vllm/_C_AVX2.abi3.so"') == 1
    # The index line names the whole file of the pin, which is not at hand here.
    without_index = re.compile(rb"^index .*$|^@@ .*$", re.MULTILINE)
    assert without_index.sub(b"", export(layout.vllm, "HEAD")) == without_index.sub(b"", content)


def test_patch_that_adds_a_file_twice_writes_nothing(release: Workspace) -> None:
    """git apply --cached --3way writes the file of an addition that both sides have."""
    made = commit(
        release.vllm, "[Core] One\n\nUpstream-Status: Pending", {"vllm/twice.py": "twice = 1\n"}
    )
    one = export(release.vllm, made)
    sh_git(release.vllm, "reset", "--quiet", "--hard", "HEAD~1")
    release.series({"Core-One.patch": one, "Core-Two.patch": one.replace(b"One", b"Two")})
    before = everything(release)
    release.stack()
    with pytest.raises(PatchDrift, match="Core-Two.patch changes nothing"):
        release.apply()
    assert everything(release) | {"refs": before["refs"]} == before
