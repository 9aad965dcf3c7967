"""One commit of a foreign repository, with its submodules and without its history, in an empty folder."""

import re
from collections.abc import Sequence
from pathlib import Path

from workspace.core.errors import SourceError
from workspace.core.files import write_atomic
from workspace.core.journal import Journal
from workspace.core.settings import Settings
from workspace.source.git.command import OnLine
from workspace.source.git.repository import Git

_REF = "refs/external/wanted"
_PLAIN = ("--progress", "--no-tags", "--no-write-fetch-head", "--recurse-submodules=no")
_ALL = ("+refs/heads/*:refs/external/heads/*", "+refs/tags/*:refs/external/tags/*")
_HOST = "https://github.com/"
# What servers say that give away branches and tags only, or nothing without its history.
_GIVES_NO_SINGLE = re.compile(r"not our ref|unadvertised object|does not support shallow")


def clone(
    folder: Path, url: str, revision: str, *, submodules: Sequence[str] | None, mirror: str, settings: Settings, journal: Journal, on_line: OnLine
) -> str:
    """Check `revision`, a commit, tag or branch, out into `folder`, which is empty, and return the commit. `submodules`: their paths, None for all.

    `mirror`, a URL or a folder, stands for https://github.com/ where it is not empty, also in the addresses of submodules. Raises SourceError.
    """
    git = Git(folder, failure=SourceError)
    git.init()
    # In a file: a password in the mirror's address belongs neither on a command line nor into a log.
    instead = git.path_of("mirror")
    write_atomic(instead, _instead(mirror).encode(), mode=0o600)
    included = ("-c", f"include.path={instead}")
    try:
        try:
            git.talk((*included, "fetch", *_PLAIN, "--depth=1", url, f"+{revision}:{_REF}"), settings, journal, on_line)
            commit = git.resolve(_REF)
        except SourceError as exc:
            if not any(_GIVES_NO_SINGLE.search(line) for line in exc.details):
                raise
            git.talk((*included, "fetch", *_PLAIN, url, *_ALL), settings, journal, on_line)
            commit = git.resolve(revision)
        if commit is None:
            raise SourceError(f"{url} did not serve {revision}")
        git.write("checkout", "--quiet", "--detach", commit)
        # Without .gitmodules it does nothing.
        words = ("submodule", "update", "--init", "--recursive", "--depth=1", "--progress", *(("--", *submodules) if submodules else ()))
        if submodules is None or submodules:
            git.talk((*included, *words), settings, journal, on_line)
    finally:
        instead.unlink(missing_ok=True)
    return commit


def _instead(mirror: str) -> str:
    if not mirror:
        return ""
    place = mirror if "://" in mirror or not Path(mirror).expanduser().is_absolute() else str(Path(mirror).expanduser())
    lines = f'[url "{_quoted(place.rstrip("/"))}/"]\n\tinsteadOf = {_HOST}\n'
    # Git refuses submodules from a folder unless it is told (CVE-2022-39253); whoever names a folder as the mirror trusts it.
    is_local = place.startswith(("/", "file://"))
    return lines + ('[protocol "file"]\n\tallow = always\n' if is_local else "")


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
