"""The environment of the docs site: complete or absent, whatever uv does, and renewed on change."""

import os
import sys
from pathlib import Path

import pytest

from scripts import docs_site
from scripts.tools import Failure

ROOT = Path(__file__).resolve().parents[1]
# Notes its command, makes an environment whose Python succeeds, and fails where a test says so.
FAKE_UV = """#!/bin/sh
echo "$1" >> "$UV_LOG"
case $1 in
venv)
    for folder; do :; done
    mkdir -p "$folder/bin"
    printf '#!/bin/sh\\nexit ${PYTHON_STATUS:-0}\\n' > "$folder/bin/python"
    chmod +x "$folder/bin/python"
    ;;
pip) [ -z "$UV_FAILS" ] || { echo "no route to the index"; exit 2; } ;;
esac
"""


class Site:
    """A clone's state folder with a fake uv in its tools."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / ".workspace"
        self.venv = self.state / "docs"
        self.requirements = folder / "docs.txt"
        self.requirements.write_text("nothing==1\n")
        self.log = folder / "uv.log"
        uv = self.state / "tools" / "bin" / "uv"
        uv.parent.mkdir(parents=True)
        uv.write_text(FAKE_UV)
        uv.chmod(0o755)

    def prepare(self, **environment: str) -> None:
        docs_site.prepare({**os.environ, "UV_LOG": str(self.log), **environment}, [])

    def calls(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []

    def names(self) -> list[str]:
        return sorted(path.name for path in self.state.iterdir())


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site(tmp_path)
    monkeypatch.setattr(docs_site, "STATE", made.state)
    monkeypatch.setattr(docs_site, "VENV", made.venv)
    monkeypatch.setattr(docs_site, "TOOLS", str(made.state / "tools"))
    monkeypatch.setattr(docs_site, "REQUIREMENTS", made.requirements)
    return made


def test_environment_is_made_once_and_renewed_when_its_requirements_change(site: Site) -> None:
    site.prepare()
    site.prepare()
    assert site.calls() == ["venv", "pip"]
    (site.venv / "old").touch()
    site.requirements.write_text("nothing==2\n")
    site.prepare()
    assert site.calls() == ["venv", "pip"] * 2
    assert not (site.venv / "old").exists()
    assert site.names() == ["docs", "docs.lock", "tools"]


@pytest.mark.parametrize("fault", ["UV_FAILS", "PYTHON_STATUS"])
def test_failed_install_leaves_nothing_that_passes_for_complete(site: Site, fault: str) -> None:
    with pytest.raises(Failure):
        site.prepare(**{fault: "1"})
    assert site.names() == ["docs.lock", "tools"]
    site.prepare()
    assert docs_site.is_complete()


def test_failed_renewal_keeps_the_former_environment_and_does_not_use_it(site: Site) -> None:
    site.prepare()
    site.requirements.write_text("nothing==2\n")
    with pytest.raises(Failure) as caught:
        site.prepare(UV_FAILS="1")
    assert (caught.value.code, caught.value.details) == (11, ("no route to the index",))
    assert site.names() == ["docs", "docs.lock", "tools"]
    assert not docs_site.is_complete()


def test_leftovers_of_a_killed_run_are_removed(site: Site) -> None:
    for name in ("docs.new-1", "docs.old-1"):
        (site.state / name / "bin").mkdir(parents=True)
    (site.venv / "bin").mkdir(parents=True)
    (site.venv / "bin" / "python").symlink_to(sys.executable)
    site.prepare()
    assert site.names() == ["docs", "docs.lock", "tools"]
    assert docs_site.is_complete()


def test_every_form_and_workflow_has_a_schema() -> None:
    checked = {path for pattern in docs_site.SCHEMAS.values() for path in ROOT.glob(pattern)}
    assert checked == set((ROOT / ".github").rglob("*.yml"))


def test_pre_commit_runs_the_sessions_of_nox() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert "entry: ./scripts/nox -s lint\n" in hooks
    assert "entry: ./scripts/nox -s typecheck\n" in hooks
    assert "rev:" not in hooks
