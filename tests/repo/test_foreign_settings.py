"""Bare repositories and variables of the shell, under the settings of conftest.hostile_home."""

from pathlib import Path

import pytest

from tests.repo.conftest import Workspace
from workspace.core import settings
from workspace.core.errors import SourceError
from workspace.core.paths import Layout
from workspace.repo.git import Git, remotes
from workspace.repo.patches import State


def test_store_of_commits_stays_the_same_one(workspace: Workspace) -> None:
    workspace.ensure("git")
    place = workspace.layout.upstream("vllm")
    store = remotes.open_store(place, workspace.vllm)
    store.set_ref("refs/tags/kept", workspace.pin.commit)
    again = remotes.open_store(place, workspace.vllm)
    assert again.resolve("refs/tags/kept") == workspace.pin.commit, "not made anew"
    again.talk(("count-objects",), workspace.settings(), workspace.run_log, lambda _: None)


def test_mirror_that_is_a_bare_repository_is_read(workspace: Workspace, upstream_url: str) -> None:
    bare = Git(Path(upstream_url.removeprefix("file://")), failure=SourceError)
    assert bare.resolve("refs/tags/v1.0.0") == workspace.pin.commit


@pytest.mark.parametrize(
    "name", ["GIT_DEFAULT_HASH", "GIT_GLOB_PATHSPECS", "GIT_CONFIG", "GIT_SHALLOW_FILE"]
)
def test_variable_of_the_shell_changes_no_verb(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    value = {"GIT_DEFAULT_HASH": "sha256", "GIT_GLOB_PATHSPECS": "1"}.get(name, "/nowhere")
    monkeypatch.setenv(name, value)
    settings.forget_outer_git()
    workspace.ensure("git")
    assert workspace.apply().state is State.APPLIED
    assert name not in settings.load(Layout(workspace.layout.root)).child_environment("git", {})
