"""Apply, unapply and export with a patch of 5 MB; the fast tests use small patches."""

from pathlib import Path

from tests.repo.conftest import Workspace
from tests.repo.states import everything
from tests.repo.test_unapply import made_on_the_release
from workspace.repo import export
from workspace.repo.patches import State


def test_patch_of_5_mb_is_applied_unapplied_and_exported_unchanged(
    release: Workspace, tmp_path: Path
) -> None:
    name, content, tree = made_on_the_release(
        release, tmp_path, "Change it", "seq 700000 > five-megabytes.txt"
    )
    release.series({name: content})
    before = everything(release)
    assert (release.apply().state, release.stack().tree, release.stack().dirty) == (
        State.APPLIED,
        tree,
        (),
    )
    assert (
        export.run(
            release.layout, "vllm", release.pin, release.observe(), run_log=release.run_log
        ).written
        == ()
    )
    assert release.unapply().state is State.UNAPPLIED
    assert everything(release) | {"refs": ""} == before | {"refs": ""}
