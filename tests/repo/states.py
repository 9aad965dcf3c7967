"""The content of a checkout, compared before and after a verb."""

import os

from tests.repo.shell import sh_git
from tests.repo.workspaces import Workspace


def everything(workspace: Workspace) -> dict[str, str]:
    """Return all that must survive a refusal: references, HEAD, status and every file."""
    vllm = workspace.vllm
    files = {
        str(path): os.readlink(path) if path.is_symlink() else str(path.read_bytes())
        for path in vllm.rglob("*")
        if ".git" not in path.parts and not path.is_dir()
    }
    return files | {
        "refs": sh_git(vllm, "for-each-ref"),
        "HEAD": sh_git(vllm, "rev-parse", "HEAD"),
        "status": sh_git(vllm, "status", "--porcelain", "-uall"),
    }
