"""Where a repository keeps its hooks (githooks(5))."""

from pathlib import Path

from workspace.source.git.repository import Git


def folder(git: Git) -> tuple[Path, bool]:
    """Return the folder from which git takes hooks, and whether it is this repository's alone: core.hooksPath may name one that others use too."""
    hooks, common = git.look("rev-parse", "--path-format=absolute", "--git-path", "hooks", "--git-common-dir").out.splitlines()
    return Path(hooks), Path(hooks).resolve().is_relative_to(Path(common).resolve())
