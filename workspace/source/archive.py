"""A checkout made from a release archive: one commit that is the same for everyone, so that patches have a base without any history.

What the archive has beyond the repository is left out; the egg-info would shadow the installed metadata of the tree's own package.
"""

import os
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from workspace.core.errors import SourceError
from workspace.source import scratch
from workspace.source.git import Git
from workspace.source.pins import Pin

# The commit must not depend on when it is made.
DATE = "2000-01-01T00:00:00+0000"
# What `python -m build --sdist` writes into the archive, at its top.
_GENERATED = {"PKG-INFO", "setup.cfg"}


def make(source: Path, destination: Path, pin: Pin, *, on_progress: Callable[[int, int | None], None] | None = None) -> None:
    """Make the checkout of `pin` at `destination`, which is missing or an empty folder, from the archive file `source`.

    `on_progress` gets bytes read and in all. It appears whole or not at all.
    Raises SourceError for an archive that is damaged, would write elsewhere, or gives another commit than pinned.
    """
    archive = pin.archive
    if archive is None:
        raise SourceError(f"{pin.name} has no release archive in vendor/pins.toml", hint="./scripts/inv bootstrap --source git")
    with scratch.beside(destination) as folder:
        tree = folder / "tree"
        commit, found = build(source, tree, pin, on_progress=on_progress)
        if (commit, found) != (archive.commit, archive.tree):
            raise SourceError(
                f"{archive.filename} gives commit {commit} with tree {found}, pinned are {archive.commit} and {archive.tree}",
                hint="git diff vendor/pins.toml    shows whether the pins were changed by hand",
            )
        scratch.put_in_place(tree, destination)


def build(source: Path, folder: Path, pin: Pin, *, on_progress: Callable[[int, int | None], None] | None = None) -> tuple[str, str]:
    """Unpack an archive into the new folder `folder`, commit and tag it. Return commit and tree OID."""
    folder.mkdir()
    try:
        _unpack(source, folder, pin, on_progress or (lambda done, total: None))
    except (tarfile.TarError, EOFError, zlib.error) as exc:
        raise SourceError(f"{source.name} is damaged: {exc}", hint=f"rm {source}    and run the command again") from exc
    git = Git(folder, failure=SourceError)
    git.init()
    commit = git.commit_everything(f"{pin.name} {pin.version}, as in its release archive {source.name}", date=DATE)
    git.set_ref(f"refs/tags/{pin.tag}", commit)
    return commit, git.tree(commit)


def _unpack(source: Path, folder: Path, pin: Pin, on_progress: Callable[[int, int | None], None]) -> None:
    """Write the archive's files below its one top folder, without owners and times, and with git's two modes.

    Every path is checked here: tarfile's filters are missing from Python 3.11 before 3.11.4.
    """
    total = source.stat().st_size
    links: list[tuple[Path, str]] = []
    with source.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:gz") as archive:
        top: str | None = None
        for member in archive:
            on_progress(raw.tell(), total)
            parts = _parts(member, source)
            top = top or parts[0]
            if parts[0] != top:
                raise _refused(source, member.name, f"lies beside its folder {top}")
            if len(parts) == 1 or member.isdir() or _is_generated(parts[1:], pin):
                continue
            path = folder.joinpath(*parts[1:])
            path.parent.mkdir(parents=True, exist_ok=True)
            if member.issym():
                links.append((path, member.linkname))
            else:
                _write(archive, member, path, source)
    # Last, so that no file is ever written through one.
    for path, target in links:
        try:
            path.symlink_to(target)
        except FileExistsError:
            raise _refused(source, path.relative_to(folder), "stands in it twice") from None
    for path, _ in links:
        if not path.resolve().is_relative_to(folder.resolve()) or ".git" in path.resolve().relative_to(folder.resolve()).parts:
            raise _refused(source, path.relative_to(folder), "is a link that leads out of it")


def _parts(member: tarfile.TarInfo, source: Path) -> tuple[str, ...]:
    path = PurePosixPath(member.name)
    # A .git in the archive would configure the repository that is made around it.
    if path.is_absolute() or not path.parts or ".." in path.parts or any(part.lower() == ".git" for part in path.parts):
        raise _refused(source, member.name, "leads out of it")
    return path.parts


def _is_generated(parts: tuple[str, ...], pin: Pin) -> bool:
    return (len(parts) == 1 and parts[0] in _GENERATED) or parts[0].endswith(".egg-info") or parts == (pin.name, "_version.py")


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path, source: Path) -> None:
    # A hard link's content is that of the member it names: extractfile follows it inside the archive only.
    content = archive.extractfile(member) if member.isreg() or member.islnk() else None
    if content is None:
        raise _refused(source, member.name, "is neither file, folder nor link")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o755 if member.mode & 0o100 else 0o644)
    except FileExistsError:
        raise _refused(source, member.name, "stands in it twice") from None
    with os.fdopen(descriptor, "wb") as file:
        while chunk := content.read(1 << 20):
            file.write(chunk)


def _refused(source: Path, member: object, why: str) -> SourceError:
    return SourceError(
        f"{source.name}: {str(member)!r} {why}, so the archive was not used", hint="a release archive has one folder of plain files; see vendor/pins.toml"
    )
