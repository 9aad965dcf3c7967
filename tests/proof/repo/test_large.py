"""What the fast tests show with small patches, with one of 5 MB."""

from pathlib import Path

from tests.repo.conftest import Workspace
from tests.repo.states import everything
from tests.repo.test_unapply import made_on_the_release
from workspace.repo import export
from workspace.repo.patches import State


def test_patch_of_5_mb_goes_on_and_off_without_a_trace_and_is_exported_as_it_was(
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
