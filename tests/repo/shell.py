"""git without any user configuration, as a fixed author, and files and archive members to write."""

import io
import os
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

_DATE = "2026-01-02T03:04:05+0000"
_PLAIN = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "Ünal",
    "GIT_AUTHOR_EMAIL": "u@example.invalid",
    "GIT_COMMITTER_NAME": "c",
    "GIT_COMMITTER_EMAIL": "c@example.invalid",
    "GIT_AUTHOR_DATE": _DATE,
    "GIT_COMMITTER_DATE": _DATE,
}
_EXPORT = (
    "--keep-subject --no-numbered --zero-commit --full-index --binary --no-signature --no-stat"
    " --no-renames --no-base --no-thread --no-attach --no-notes"
)
_EXPORT += " -U3 --diff-algorithm=myers --src-prefix=a/ --dst-prefix=b/ --encode-email-headers"


def sh_git(path: Path, *args: str, check: bool = True, env: Mapping[str, str] | None = None) -> str:
    """Run plain git without any configuration and return its output."""
    done = subprocess.run(
        ["git", "-C", str(path), *args],
        env={**os.environ, **_PLAIN, **(env or {})},
        capture_output=True,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().rstrip("\n")


def write(root: Path, files: Mapping[str, str | bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def add_member(tar: tarfile.TarFile, name: str, content: bytes = b"", **fields: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in fields.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def export(repository: Path, revision: str) -> bytes:
    """Return one commit as a patch file of the project."""
    args = [
        "git",
        "-C",
        str(repository),
        "format-patch",
        "--stdout",
        *_EXPORT.split(),
        "-1",
        revision,
    ]
    return subprocess.run(
        args, env={**os.environ, **_PLAIN}, capture_output=True, check=True
    ).stdout


def commit(repository: Path, message: str, files: Mapping[str, str | bytes]) -> str:
    write(repository, files)
    sh_git(repository, "add", "--all", "--force")
    sh_git(repository, "commit", "--quiet", "--message", message)
    return sh_git(repository, "rev-parse", "HEAD")
