"""A tree of the repository written out elsewhere, with an index of its own: the repository, its index and its files stay as they are."""

import tempfile
from pathlib import Path

from workspace.source.git.repository import Git


def write(git: Git, commit: str, folder: Path) -> None:
    """Write all files of a commit below `folder`, which is made where it is not there. What lies there already is overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="workspace-index-") as aside:
        environment = {"GIT_INDEX_FILE": f"{aside}/index"}
        git.write("read-tree", commit, env=environment)
        git.write("checkout-index", "--all", "--force", "--quiet", f"--prefix={folder.absolute()}/", env=environment)
