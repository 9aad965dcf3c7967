"""Files as git counts them: `mode oid` by path, read from git's machine listings and from the disk, and one digest over them."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

Entries = Mapping[str, str]


def split(listing: str) -> list[str]:
    """The entries of a listing that git ends with zero bytes."""
    return [entry for entry in listing.split("\0") if entry]


def tree_entries(listing: str) -> dict[str, str]:
    """Read `mode type oid<TAB>path` entries (git-ls-tree(1))."""
    entries = {}
    for entry in split(listing):
        meta, path = entry.split("\t", 1)
        mode, _, oid = meta.split(" ")
        entries[path] = f"{mode} {oid}"
    return entries


def index_entries(listing: str) -> dict[str, str]:
    """Read `mode oid stage<TAB>path` entries (git-ls-files(1))."""
    entries = {}
    for entry in split(listing):
        meta, path = entry.split("\t", 1)
        entries[path] = meta.rsplit(" ", 1)[0]
    return entries


def link_entries(root: Path, paths: Iterable[str]) -> dict[str, str]:
    """The entries of those paths that are symbolic links; git's own hashing would follow them."""
    entries = {}
    for path in paths:
        file = root / path
        if file.is_symlink():
            target = os.readlink(os.fsencode(file))
            entries[path] = "120000 " + hashlib.sha1(b"blob %d\0" % len(target) + target).hexdigest()
    return entries


def file_modes(root: Path, paths: Iterable[str]) -> dict[str, str]:
    """The modes of those paths that are regular files; what is gone, or is a repository of its own, is left out."""
    files = {path: root / path for path in paths}
    return {path: "100755" if file.stat().st_mode & 0o100 else "100644" for path, file in files.items() if file.is_file() and not file.is_symlink()}


def digest(entries: Entries) -> str:
    """The SHA-256 over sorted `mode oid path`."""
    text = "".join(f"{entries[path]} {path}\n" for path in sorted(entries))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def first_line(err: str) -> str:
    """The line of git's talk that says what went wrong."""
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith(("fatal:", "error:"))), lines[0] if lines else "")
    return re.sub(r"^(fatal|error): ", "", said)


def refusal_of_disk(err: str) -> str | None:
    """The line of git's talk that names a disk that is full or read-only: no patch's and no network's fault, whatever else follows."""
    return next((line.strip() for line in err.splitlines() if re.search(r"No space left|Out of diskspace|Read-only file system|quota exceeded", line)), None)
