"""Exports in tests, and the files that they write."""

from pathlib import Path

import pytest

from tests.repo.conftest import Snapshot
from tests.repo.shell import sh_git
from tests.repo.workspaces import Workspace
from workspace.core.errors import PatchDrift
from workspace.repo import export
from workspace.repo.export import Export

STATUS = "\n\nUpstream-Status: Pending"


def run(workspace: Workspace, *, check: bool = False) -> Export:
    return export.run(
        workspace.layout,
        "vllm",
        workspace.pin,
        workspace.observe(),
        run_log=workspace.run_log,
        check=check,
    )


def files(workspace: Workspace) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in sorted(workspace.layout.patches("vllm").iterdir())
    }


def order(workspace: Workspace) -> list[str]:
    return [
        line
        for line in (workspace.layout.patches("vllm") / "series").read_text().split("\n")
        if line and not line.startswith("#")
    ]


def series(workspace: Workspace) -> Path:
    return workspace.layout.patches("vllm") / "series"


def refused(workspace: Workspace, match: str, snapshot: Snapshot) -> PatchDrift:
    """Return the error of a refused export, after a check that it wrote nothing."""
    before = snapshot(workspace.layout.root / "patches"), sh_git(workspace.vllm, "for-each-ref")
    with pytest.raises(PatchDrift, match=match) as failure:
        run(workspace)
    assert failure.value.exit_code == 5
    assert failure.value.hint
    assert (
        snapshot(workspace.layout.root / "patches"),
        sh_git(workspace.vllm, "for-each-ref"),
    ) == before
    return failure.value
