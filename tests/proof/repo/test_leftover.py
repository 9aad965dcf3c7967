"""The next fetch removes an unfinished pack of a killed fetch, unless a process still writes it."""

import subprocess

import pytest

from tests.repo.conftest import Upstream, Workspace
from workspace.repo.git import Git, Remote, worktree


@pytest.mark.parametrize("is_local", [True, False], ids=["from a folder", "from a remote"])
def test_unfinished_pack_of_a_killed_fetch_is_removed_by_the_next(
    release: Workspace, upstream: Upstream, *, is_local: bool
) -> None:
    git, packs, ref = (
        Git(release.vllm),
        release.vllm / ".git" / "objects" / "pack",
        "refs/pins/v1.0.0",
    )
    (packs / "tmp_pack_abandoned").write_bytes(b"PACK")
    (packs / "pack-mine.keep").touch()
    with (
        (packs / "tmp_pack_held").open("wb") as file,
        subprocess.Popen(["sleep", "60"], stdout=file) as holder,
    ):
        try:
            if is_local:
                worktree.bring(
                    git, upstream.bare, upstream.pin.commit, ref, run_log=release.run_log
                )
            else:
                refspecs = (f"+{upstream.pin.commit}:{ref}",)
                remote = Remote(
                    upstream.bare.as_uri(), release.settings(), release.run_log, lambda line: None
                )
                git.fetch(remote, refspecs, whole=True)
        finally:
            holder.kill()
    assert git.resolve(ref) == upstream.pin.commit
    assert [path.name for path in packs.glob("tmp_*")] == ["tmp_pack_held"]
    assert (packs / "pack-mine.keep").exists()
