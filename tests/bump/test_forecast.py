"""Forecast of a series whose patches fare differently at the next release, on both checkouts."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from syrupy.assertion import SnapshotAssertion

from tests import screens
from tests.repo import two_releases as ladders
from tests.repo.conftest import commit, export, sh_git, write
from tests.repo.two_releases import Index, TwoReleases, lines
from tests.repo.workspaces import Workspace
from workspace.bump import forecast
from workspace.bump.forecast import Forecast, PatchForecast
from workspace.core.console import Console
from workspace.core.errors import CheckoutError, PatchConflict, SettingsError, SourceError
from workspace.repo.pins import Wanted

FATES = {
    "clean": "clean",
    "taken": "upstreamed",
    "conflict": "conflicts in vllm/conflict.py",
    "after": "conflicts in vllm/conflict.py after Local-conflict.patch",
    "moved": "clean, merged",
    "squashed": "upstreamed",
    "cherry": "conflicts in vllm/cherry.py",
    "new": "clean",
}


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> TwoReleases:
    return ladders.build(tmp_path_factory.mktemp("ladder"))


@pytest.fixture(scope="module")
def index(releases: TwoReleases) -> Iterator[Index]:
    with ladders.serve(releases) as served:
        yield served


@pytest.fixture(autouse=True)
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ladders.hostile(tmp_path / "gitconfig")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("PATH", compiler(tmp_path / "new", "13.1.0"))


def compiler(folder: Path, version: str) -> str:
    """Return a PATH on which g++ has this version."""
    folder.mkdir()
    (folder / "g++").write_text(f"#!/bin/sh\necho {version}\n")
    (folder / "g++").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, releases: TwoReleases, index: Index) -> Path:
    """A clone with a checkout of each kind, and everything that a forecast fetches."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")
        for kind in ("git", "release"):
            with ladders.cloned(root / kind, releases, index) as clone:
                clone.ensure(kind)  # type: ignore[arg-type]
                run(clone)
    return root


@pytest.fixture(params=["git", "release"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def clone(
    tmp_path: Path, made: Path, releases: TwoReleases, index: Index, kind: str
) -> Iterator[Workspace]:
    with ladders.cloned(tmp_path / "other", releases, index) as opened:
        shutil.rmtree(opened.layout.root)
        shutil.copytree(made / kind / "clone", opened.layout.root, symlinks=True)
        sh_git(opened.vllm, "update-index", "--refresh")
        yield opened


def run(clone: Workspace, ref: str = "v1.1.0", **more: str) -> Forecast:
    return forecast.run(
        clone.layout,
        clone.settings(**more),
        Wanted.read(ref),
        console=Console(out=clone.out, err=clone.err),
    )


def fate(patch: PatchForecast) -> str:
    text = patch.state + (", merged" if patch.merged else "")
    text += (
        f" in {', '.join(conflict.path for conflict in patch.conflicts)}" if patch.conflicts else ""
    )
    return text + (f" after {patch.depends_on}" if patch.depends_on else "")


def fates(made: Forecast) -> dict[str, str]:
    return {
        patch.name.removeprefix("Local-").removesuffix(".patch"): fate(patch)
        for patch in made.patches
    }


def contents(root: Path) -> dict[str, str]:
    """Return each file, link and folder below a folder, .git included, with content and time."""
    found = {}
    for path in [root, *root.rglob("*")]:
        if path.is_relative_to(root / ".workspace"):
            continue
        status = path.lstat()
        inside = (
            hashlib.sha256(path.read_bytes()).hexdigest()
            if path.is_file() and not path.is_symlink()
            else ""
        )
        found[str(path)] = (
            f"{status.st_mode} {status.st_mtime_ns if path != root else 0} {status.st_ino} {inside}"
        )
    return found


def test_every_fate_is_foreseen_and_nothing_is_touched(clone: Workspace, kind: str) -> None:
    before = contents(clone.layout.root)
    made = run(clone)
    assert fates(made) == FATES
    assert contents(clone.layout.root) == before
    assert made.tree is None
    assert clone.out.getvalue().splitlines()[-1].startswith("hint: ./scripts/inv pin.bump v1.1.0")


@pytest.mark.parametrize("kind", ["release"])
@pytest.mark.parametrize(("version", "is_blocked"), [("12.2.0", True), ("13.1.0", False)])
def test_verdict_is_first_and_judges_the_compiler_of_this_machine(
    clone: Workspace, tmp_path: Path, version: str, is_blocked: bool
) -> None:
    run(clone, PATH=compiler(tmp_path / "other g++", version), DEVICE="cpu")
    shown = clone.out.getvalue()
    rows = [line for line in shown.splitlines() if not line.startswith(("+", "done"))]
    assert rows[0].split()[:2] == ["FAIL" if is_blocked else "warn", "verdict"]
    assert (
        "g++ 12.2.0; v1.1.0 has no precompiled wheel, and needs 13 or newer" in shown
    ) == is_blocked
    assert ("inv pin.bump" in shown) != is_blocked, "a next command that cannot work"
    assert "more; --verbose lists them" in shown
    assert not any(line.startswith("ok       requirement") for line in rows)


@pytest.mark.parametrize(("version", "is_blocked"), [("12.2.0", True), ("13.1.0", False)])
def test_fork_whose_compiled_sources_differ_needs_a_compiler_before_anything_is_built(
    clone: Workspace, releases: TwoReleases, tmp_path: Path, version: str, is_blocked: bool
) -> None:
    fork = tmp_path / "fork"
    sh_git(tmp_path, "clone", "--quiet", "--no-tags", str(releases.bare), str(fork))
    sh_git(fork, "switch", "--quiet", "--create", "mine", releases.commits["1.0.0"])
    sh_git(fork, "config", "uploadpack.allowFilter", "true")
    path = compiler(tmp_path / "other g++", version)
    cmake = 'if(CMAKE_CXX_COMPILER_VERSION VERSION_LESS "13")\nendif()\n'
    for files, blocked in (({"vllm/mine.py": "1\n"}, False), ({"CMakeLists.txt": cmake}, True)):
        commit(fork, "Mine", files)
        run(clone, f"{fork.as_uri()}@mine", PATH=path, DEVICE="cpu")
        shown = clone.out.getvalue()
        sentence = "g++ 12.2.0; mine differs from its base in compiled sources, and needs 13 or"
        assert (sentence in shown) == (blocked and is_blocked), shown
        assert ("since v1.0.0: 1 file differs (CMakeLists.txt)" in shown) == blocked


def test_conflicts_name_the_upstream_commits_that_touched_the_file(
    clone: Workspace, releases: TwoReleases, kind: str
) -> None:
    by_name = {patch.name: patch for patch in run(clone).patches}
    commits = by_name["Local-conflict.patch"].conflicts[0].commits
    if kind == "git":
        # Not the one that drew the release branch, which touched README only.
        assert commits == (f"{releases.commits['conflict'][:12]} [Misc] Upstream's conflict (#3)",)
    else:
        assert commits is None
        assert any(
            "unknown" in line and "no history" in line for line in clone.out.getvalue().splitlines()
        )


@pytest.mark.parametrize("kind", ["git"])
def test_partial_clone_alone_has_what_a_merge_with_renames_reads(
    clone: Workspace, kind: str
) -> None:
    shutil.rmtree(clone.layout.upstream("vllm"))
    assert fates(run(clone, UV_DEFAULT_INDEX="http://127.0.0.1:1/simple")) == FATES


def test_forecast_is_what_am_then_does(clone: Workspace) -> None:
    made = run(clone)
    kept = [patch.name for patch in made.patches if patch.state == "clean"]
    again = {name: (clone.layout.patches("vllm") / name).read_bytes() for name in kept}
    clone.series(again)
    tree = run(clone).tree
    work = clone.layout.state / "by-hand"
    sh_git(
        clone.layout.state,
        "clone",
        "--quiet",
        "--shared",
        "--no-checkout",
        str(made.candidate.store),
        str(work),
    )
    # The store borrows, and a clone of it does not do so again.
    write(
        work,
        {
            ".git/objects/info/alternates": (
                f"{made.candidate.store}/objects\n{clone.vllm}/.git/objects\n"
            )
        },
    )
    sh_git(
        work,
        "fetch",
        "--quiet",
        str(made.candidate.store),
        f"{made.candidate.base}:refs/heads/new",
        check=False,
    )
    sh_git(
        work,
        "checkout",
        "--quiet",
        "--detach",
        made.candidate.base,
        env={"GIT_CONFIG_GLOBAL": "/dev/null"},
    )
    sh_git(
        work,
        "am",
        "--quiet",
        "--3way",
        *(str(clone.layout.patches("vllm") / name) for name in kept),
    )
    assert sh_git(work, "rev-parse", "HEAD^{tree}") == tree


@pytest.mark.parametrize("kind", ["git"])
def test_screen_begins_with_the_verdict_and_has_what_needs_a_look(
    clone: Workspace, snapshot: SnapshotAssertion, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = clone.settings(PATH=compiler(tmp_path / "a g++", "13.1.0"), DEVICE="cpu")
    monkeypatch.setenv("COLUMNS", str(screens.COLUMNS))
    monkeypatch.setenv("TERM", "xterm")
    terminal = screens.Terminal()
    forecast.run(
        clone.layout,
        settings,
        Wanted.read("v1.1.0"),
        console=Console(out=terminal, err=screens.Terminal()),
    )
    brief = screens.normalised(terminal.getvalue())
    assert brief == snapshot
    found, more = re.search(r"nothing to do for (\d+) more; --verbose", brief), screens.Terminal()
    console = Console(out=more, err=screens.Terminal())
    console.is_verbose = True
    made = forecast.run(clone.layout, settings, Wanted.read("v1.1.0"), console=console)
    assert found
    assert "--verbose" not in more.getvalue()
    for change in made.changes:
        assert change.name in more.getvalue()


@pytest.mark.parametrize("kind", ["git"])
def test_series_applied_in_the_checkout_gives_the_same_forecast(
    clone: Workspace, kind: str
) -> None:
    sh_git(
        clone.vllm,
        "am",
        "--quiet",
        "--keep-cr",
        *(str(clone.layout.patches("vllm") / name) for name in clone.stack().names),
    )
    assert fates(run(clone)) == FATES


@pytest.mark.parametrize("kind", ["git"])
def test_two_patches_of_one_file_are_taken_without_their_commits_in_any_repository(
    clone: Workspace, releases: TwoReleases, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    sh_git(tmp_path, "clone", "--quiet", str(releases.work), str(work))
    sh_git(work, "checkout", "--quiet", "v1.0.0")
    commit(work, "one", {"vllm/conflict.py": lines("conflict", l5="five")})
    commit(work, "two", {"vllm/conflict.py": lines("conflict", l5="five", l18="eighteen")})
    commit(work, "three", {"vllm/conflict.py": lines("conflict", l5="5", l18="eighteen")})
    clone.series({f"{number}.patch": export(work, f"HEAD~{3 - number}") for number in (1, 2, 3)})
    assert [fate(patch) for patch in run(clone).patches] == ["clean", "clean, merged", "clean"]


@pytest.mark.parametrize("kind", ["release"])
def test_empty_series_is_a_forecast_too(clone: Workspace) -> None:
    clone.series({})
    made = run(clone)
    assert made.patches == ()
    assert made.tree == sh_git(made.candidate.store, "rev-parse", f"{made.candidate.base}^{{tree}}")
    assert made.changes


@pytest.mark.parametrize("kind", ["git"])
def test_series_that_does_not_fit_its_own_base_is_named(
    clone: Workspace, releases: TwoReleases
) -> None:
    after = releases.series["Local-after.patch"]
    clone.series({"Local-after.patch": after})
    with pytest.raises(
        PatchConflict, match="Local-after.patch does not apply even to the present base"
    ):
        run(clone)


def test_json_has_the_same_forecast_and_nothing_is_fetched_again(
    clone: Workspace, index: Index, kind: str
) -> None:
    del index.asked[:]
    made = forecast.run(
        clone.layout,
        clone.settings(),
        Wanted.read("1.1.0"),
        console=Console(out=clone.out, err=clone.err),
        as_json=True,
    )
    record = json.loads(clone.out.getvalue())
    assert [patch["state"] for patch in record["patches"]] == [
        patch.state for patch in made.patches
    ]
    assert record["candidate"]["kind"] == kind
    assert record["candidate"]["pin"]["tag"] == "v1.1.0"
    assert len(record["changes"]) == len(made.changes)
    assert [path for path in index.asked if "/files/" in path] == []


def test_forecast_without_a_checkout_gives_the_command_for_one(
    tmp_path: Path, releases: TwoReleases, index: Index
) -> None:
    with (
        ladders.cloned(tmp_path / "bare", releases, index) as clone,
        pytest.raises(CheckoutError, match="vendor/vllm is missing") as failure,
    ):
        run(clone)
    assert failure.value.hint == "./scripts/inv bootstrap"


@pytest.mark.parametrize("kind", ["release"])
def test_invalid_name_is_a_sentence(clone: Workspace) -> None:
    for ref in ("-x", "a b", "../x", "", "v1.0.0..v1.1.0", "HEAD@{1}", "x" * 300):
        with pytest.raises(SettingsError, match="is not the name of"):
            run(clone, ref)


@pytest.mark.parametrize("kind", ["release"])
def test_tag_that_exists_nowhere_is_a_sentence_with_the_nearest(clone: Workspace) -> None:
    with pytest.raises(SourceError, match=r"nearest.* (v?1\.0\.0, v?1\.1\.0|1\.1\.0)"):
        run(clone, "v1.1.7")


@pytest.mark.parametrize("kind", ["release"])
def test_triton_without_a_checkout_is_a_sentence(clone: Workspace) -> None:
    with pytest.raises(CheckoutError, match="vendor/triton"):
        run(clone, "triton")


@pytest.mark.parametrize("kind", ["release"])
def test_no_name_or_value_of_the_user_is_shown(clone: Workspace) -> None:
    os.chmod(clone.layout.root, 0o755)
    write(
        clone.layout.root, {".env": "VLLM_OLD_BACKEND=hunter2secret\nSERVE=--swap-space 4 --kept\n"}
    )
    run(clone)
    shown = clone.err.getvalue() + clone.out.getvalue()
    assert "hunter2secret" not in shown
    assert "VLLM_OLD_BACKEND is not known there" in shown
    assert "--swap-space is not known there" in shown
