"""The folder of upstream's test requirements, with a real uv and a folder of tiny wheels."""

from pathlib import Path

import pytest

from tests.machine.conftest import built, house
from workspace.checks import upstream_trial
from workspace.checks.upstream_selection import Rules
from workspace.core.errors import SourceError

__all__ = ["built", "house"]

KNOWN = Rules({}, (), (), (), ("runner", "plugin"))


def install_needs(house, settings) -> tuple[Path, str]:
    with house.run_log(settings) as run_log:
        return upstream_trial.install_needs(
            house.layout, settings, KNOWN, device="cpu", run_log=run_log
        )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.dist-info")}


def test_requirements_have_the_trees_versions_and_omit_what_the_environment_has(
    house, built
) -> None:
    settings = built()
    for name, version, requires in (
        ("runner", "1.0", ("shared",)),
        ("runner", "2.0", ()),
        ("plugin", "1.0", ("runner",)),
        ("shared", "1.0", ()),
    ):
        house.wheel(name, version, requires=requires)
    listed = house.layout.vllm / "requirements" / "test" / "cuda.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("runner==1.0\n    # via x\nplugin[more]==3\n")
    site = next(house.layout.environment.glob("lib/python*/site-packages"))
    (site / "shared-9.0.dist-info").mkdir()
    (site / "shared-9.0.dist-info" / "METADATA").write_text("Name: shared\nVersion: 9.0\n")
    before = sorted(site.iterdir())
    # Leftovers of a killed install, and the folder of another environment.
    half_made, former = (
        upstream_trial.needs_folder(house.layout) / name
        for name in ("site-0123456789ab.new", "site-ba9876543210")
    )
    for folder in (half_made, former):
        (folder / "runner").mkdir(parents=True)
    made, output = install_needs(house, settings)
    assert names(made) == {"runner-1.0.dist-info", "plugin-1.0.dist-info"}
    assert "runner, plugin" in output
    assert sorted(site.iterdir()) == before
    assert list(upstream_trial.needs_folder(house.layout).iterdir()) == [made]
    # The folder works without any wheel.
    for wheel in house.links.iterdir():
        wheel.unlink()
    again, output = install_needs(house, settings)
    assert (again, output) == (made, "2 test requirements are installed")
    # Another environment gets another folder; the former stays until the new one exists.
    listed.write_text("runner==2.0\n")
    with pytest.raises(SourceError, match="could not be reached"):
        install_needs(house, settings)
    assert made.is_dir()
    listed.write_text("runner==1.0\n    # via x\nplugin[more]==3\n")
    assert install_needs(house, settings)[0] == made


def test_index_out_of_reach_is_a_source_error_and_leaves_no_folder_that_looks_complete(
    house, built
) -> None:
    built()
    settings = house.settings(
        UV_OFFLINE="0", UV_DEFAULT_INDEX="http://127.0.0.1:9/simple", UV_HTTP_RETRIES="0"
    )
    with pytest.raises(SourceError, match="could not be reached"):
        install_needs(house, settings)
    assert {path.suffix for path in upstream_trial.needs_folder(house.layout).iterdir()} == {".new"}
