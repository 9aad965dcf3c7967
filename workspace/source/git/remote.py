"""What a remote is asked without a repository, and how its address is shown."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from workspace.core import process
from workspace.core.errors import SourceError, ToolchainError
from workspace.core.settings import Settings
from workspace.source import hardening
from workspace.source.content import first_line
from workspace.source.git.command import executable


def advertised(url: str, names: Sequence[str], *, cwd: Path, settings: Settings, timeout_s: float) -> Mapping[str, str]:
    """Ask a remote for references: name to OID, an annotated tag's commit under `NAME^{}`.

    git itself has no connect time-out: a probe that does not answer within `timeout_s` seconds is ended with all its children.
    Raises SourceError where the remote cannot be reached.
    """
    argv = [executable().GIT_PYTHON_GIT_EXECUTABLE or "git", "ls-remote", "--", url, *names]
    environment = settings.child_environment("plain", hardening.environment(offline=False))
    hint = "check the network, or set VLLM_MIRROR (TRITON_MIRROR for Triton) to a copy that can be reached"
    try:
        reply = process.capture(argv, cwd=cwd, env=environment, timeout_s=timeout_s)
    except ToolchainError:
        raise SourceError(f"{without_user(url)} gave no answer in {timeout_s:g} s (CONNECT_TIMEOUT_S)", hint=hint) from None
    if reply.returncode != 0:
        raise SourceError(f"{without_user(url)} cannot be read: {first_line(reply.stderr) or process.describe_status(reply.returncode)}", hint=hint)
    return {name: oid for oid, name in (line.split("\t", 1) for line in reply.stdout.splitlines() if "\t" in line)}


def without_user(url: str) -> str:
    """A URL as it may be shown: without name and password."""
    return re.sub(r"(?<=://)[^/@]*@", "", url)
