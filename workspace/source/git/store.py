"""A bare repository of the workspace's own that borrows a checkout's objects: what is fetched for a look lands here, and nothing in the checkout."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from workspace.core.errors import SourceError
from workspace.core.files import write_atomic
from workspace.core.journal import Journal
from workspace.core.settings import Settings
from workspace.source.git import history
from workspace.source.git.command import OnLine
from workspace.source.git.repository import Git

_PLAIN = ("--no-tags", "--no-write-fetch-head", "--recurse-submodules=no")
# As git itself asks for what a partial clone lacks (promisor-remote.c); what it is stands in a file, a command line would be too long to be read.
_MISSING = ("-c", "fetch.negotiationAlgorithm=noop", "fetch", *_PLAIN, "--filter=blob:none", "wanted")
_WHOLE = ("fetch", "--progress", "--refetch", "--no-filter", *_PLAIN, "origin")


def opened(path: Path, checkout: Path) -> Git:
    """Return the store at `path`, made where it is missing, with the objects of `checkout` in it. Raises SourceError."""
    objects = Git(checkout).path_of("objects")
    path.mkdir(parents=True, exist_ok=True)
    store = Git(path, failure=SourceError)
    found = store.look("rev-parse", "--absolute-git-dir", check=False).out.rstrip("\n")
    if os.path.realpath(found) != os.path.realpath(path):
        # What a power cut has left of it git takes for no repository, and would look, and write, in the one that the folder lies in.
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(exist_ok=True)
        store.write("-c", "init.defaultBranch=main", "init", "--quiet", "--bare", "--template=", str(path))
        os.sync()
    borrowed = path / "objects" / "info" / "alternates"
    line = f"{objects}\n".encode(errors="surrogateescape")
    if not borrowed.is_file() or borrowed.read_bytes() != line:
        write_atomic(borrowed, line)
    return store


def take_in(store: Git, repository: Path, ref: str) -> None:
    """Take the commit that is HEAD of a repository on this disk, with all of its content, as the reference `ref`."""
    words = ("fetch", "--quiet", "--no-tags", "--no-write-fetch-head", "--recurse-submodules=no", str(repository), f"+HEAD:{ref}")
    # The protocol of a path is switched off with all others.
    store.write(*words, env={"GIT_ALLOW_PROTOCOL": "file"})


def fetch(store: Git, url: str, refspecs: Sequence[str], *, settings: Settings, journal: Journal, on_line: OnLine) -> None:
    """Fetch history without file contents; everything where the remote refuses filters. Raises SourceError."""
    store.set_setting("remote.origin.url", url)
    store.fetch(url, refspecs, whole=False, settings=settings, journal=journal, on_line=on_line)


def complete(store: Git, wanted: Sequence[str], url: str, refspecs: Sequence[str], *, settings: Settings, journal: Journal, on_line: OnLine) -> None:
    """Fetch these blobs of a partial store in one call, or all of `refspecs` where the remote gives no single objects. Raises SourceError."""
    for remote in ("origin", "wanted"):
        store.set_setting(f"remote.{remote}.url", url)
    store.set_setting("include.path", "wanted")
    listed = store.path / "wanted"
    write_atomic(listed, ('[remote "wanted"]\n' + "".join(f"\tfetch = {oid}\n" for oid in wanted)).encode())
    try:
        store.talk(_MISSING, settings, journal, on_line)
        if not history.absent(store, wanted):
            return
    except SourceError:
        journal.write("the remote gives no single objects; asking for all of them")
    finally:
        write_atomic(listed, b"")
    store.talk((*_WHOLE, *refspecs), settings, journal, on_line)
