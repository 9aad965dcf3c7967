"""The faults that stop inv fix-triton before any download or compilation.

tests/proof/triton has the tests of the build itself.
"""

import io
from pathlib import Path

import pytest

from tests.small import tritons
from tests.small.materials import git
from tests.small.world import World
from workspace.core.console import Console
from workspace.core.errors import SettingsError
from workspace.core.paths import Layout
from workspace.core.settings import load
from workspace.install.triton_fix import FixOptions, run


def test_edits_of_the_users_in_vendor_are_kept_and_refused_with_the_next_commands(
    built: World, tmp_path: Path
) -> None:
    upstream = tritons.make(built, tmp_path)
    git(upstream.tree, "clone", "--quiet", upstream.tree.as_uri(), str(built.layout.triton))
    git(built.layout.triton, "checkout", "--quiet", "--detach", upstream.pinned)
    mine = built.layout.triton / "src" / "answer.c"
    mine.write_text("mine\n")
    ended = built.run("fix-triton", "--from-source")
    assert "has local edits (src/answer.c)" in ended.error(3)
    assert "patch.export --project triton" in ended.err
    assert mine.read_text() == "mine\n"
    assert tritons.builds(built) == []


@pytest.mark.parametrize(
    ("options", "sentence", "flags"),
    [
        (FixOptions(check=True, from_source=True), "--check builds nothing", "--check"),
        (FixOptions(ref="main"), "work only with --from-source", "--from-source"),
        (FixOptions(jobs="2"), "work only with --from-source", "--from-source"),
        (
            FixOptions(from_source=True, jobs="many"),
            "--jobs: 'many' is neither auto nor",
            "--from-source --jobs auto",
        ),
    ],
)
def test_contradictory_flags_are_refused_before_the_diagnosis(
    tmp_path: Path, options: FixOptions, sentence: str, flags: str
) -> None:
    layout = Layout(tmp_path / "nowhere")
    with pytest.raises(SettingsError, match=sentence) as failure:
        run(
            layout,
            load(layout, environ={"PATH": ""}),
            options,
            console=Console(out=io.StringIO(), err=io.StringIO()),
            provide=lambda: None,
        )
    assert (failure.value.hint or "").startswith(f"./scripts/inv fix-triton {flags}")


def test_without_an_environment_the_diagnosis_is_refused(world: World) -> None:
    assert "there is no environment" in world.run("fix-triton").error(7)
