"""The pins in vendor/pins.toml, read and rewritten, and checkouts made from release archives."""

import contextlib
import os
import re
import reprlib
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from workspace.core import files, hints, records
from workspace.core.console import Step
from workspace.core.errors import CheckoutError, SettingsError, SourceError
from workspace.core.files import read_regular, write_atomic
from workspace.core.paths import Layout, typed
from workspace.core.settings import without_user
from workspace.repo.git import Git

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
_FILENAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")
_TOKEN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
# Tag names that git accepts (git-check-ref-format(1)), restricted to the usual letters.
_TAG = re.compile(
    r"(?!.*(?:\.\.|//|/\.|\.lock(?:/|$)))[A-Za-z0-9](?:[A-Za-z0-9._/+-]{0,98}[A-Za-z0-9_+-])?"
)
_ADDRESS = re.compile(r"(?!-)[!-~]{1,1000}")
# A user alone is a secret for a server of HTTP, which takes a token as one.
_SECRET = re.compile(r"https?://[^/]*@|[a-z+]+://[^/@]*:[^/@]*@")
REF = re.compile(r"(?!.*(?:\.\.|//|@\{))[A-Za-z0-9][A-Za-z0-9._/+-]{0,98}")
# A table right below a value.
_CROWDED = re.compile(r"^([^#\n].*\n)\[", re.MULTILINE)
# Old commits of the workspace and known-good states hold pins of the first edition.
_FORMER_HEADER = re.compile(rb"^(\s*\[\s*\w+\.)donors(\.[\w-]+\s*\])", re.MULTILINE)
PRECOMPILED_KEYS = ("cuda-x86_64", "cuda-aarch64", "cpu-x86_64", "cpu-aarch64")
# The form of each text of the file, by its key, and the same in words.
_FORMS: Mapping[str, tuple[re.Pattern[str], str]] = {
    "tag": (_TAG, "the name of a tag"),
    "ref": (REF, "a branch, tag or commit"),
    "version": (_TOKEN, "a name or version"),
    "project": (_TOKEN, "a name or version"),
    "commit": (COMMIT, "40 lower-case hex digits"),
    "tree": (COMMIT, "40 lower-case hex digits"),
    "sha256": (SHA256, "64 lower-case hex digits"),
    "filename": (_FILENAME, "a file name"),
    "url": (_ADDRESS, "an address"),
    "upstream": (_ADDRESS, "an address"),
}


@dataclass(frozen=True)
class Archive:
    """A release archive on the package index, and the one commit of a checkout made from it."""

    filename: str
    sha256: str
    commit: str
    tree: str


@dataclass(frozen=True)
class PrecompiledWheel:
    """A wheel on the package index whose compiled libraries are used."""

    project: str
    version: str
    filename: str
    sha256: str


@dataclass(frozen=True)
class Base:
    """The release whose precompiled wheels a pinned commit takes: none belongs to the commit."""

    tag: str
    version: str
    commit: str


@dataclass(frozen=True)
class Pin:
    """One upstream project at one commit: a release, or any commit of the project or of a fork.

    `precompiled` is keyed by device and machine, such as cpu-aarch64. A pin that is no release has
    a `ref`: the branch or tag that was named, such as refs/heads/main, or the commit. Its wheels
    are those of `base`, and `tag` is its short name. `upstream` is the address of the project
    where `url` is that of a fork.
    """

    name: str
    tag: str
    version: str
    commit: str
    url: str
    archive: Archive | None = None
    precompiled: Mapping[str, PrecompiledWheel] = field(default_factory=dict)
    ref: str | None = None
    upstream: str | None = None
    base: Base | None = None

    @property
    def of_upstream(self) -> "Pin":
        """The same pin with the address of the project itself: releases are there."""
        return replace(self, url=self.upstream, upstream=None) if self.upstream else self

    @property
    def release(self) -> str:
        """The version of the precompiled wheels."""
        return self.base.version if self.base else self.version

    @property
    def request(self) -> str:
        """What `inv pin.bump` takes to look for this pin again."""
        name = self.ref if self.ref and COMMIT.fullmatch(self.ref) else self.tag
        return f"{self.url}@{name}" if self.upstream else name

    @property
    def is_from_archive(self) -> bool:
        """Whether the commit is made from the release archive; upstream does not have it then."""
        return self.archive is not None and self.commit == self.archive.commit


@dataclass(frozen=True)
class Pins(records.Record):
    """The pins of both upstream projects."""

    vllm: Pin
    triton: Pin

    def of(self, project: str) -> Pin:
        """Return the pin of a known project, vllm or triton."""
        return self.triton if project == "triton" else self.vllm

    @classmethod
    def upgrade(cls, document: records.Document) -> records.Document:
        """Return the tables of the file, each with its name."""
        return {
            name: {**table, "name": name} if isinstance(table, dict) else table
            for name, table in document.items()
        }

    def validate(self) -> None:
        """Check the form of each text. Raises DecodeError."""
        for pin in (self.vllm, self.triton):
            _check(pin, pin.name)
            if pin.archive:
                _check(pin.archive, f"{pin.name}.archive")
            if pin.base:
                _check(pin.base, f"{pin.name}.base")
            for key, wheel in pin.precompiled.items():
                place = f"{pin.name}.precompiled.{key}"
                if key not in PRECOMPILED_KEYS:
                    keys = ", ".join(PRECOMPILED_KEYS)
                    raise records.DecodeError(f"{place} is unknown, expected one of {keys}")
                _check(wheel, place)


@dataclass(frozen=True)
class Wanted:
    """What a pin shall move to, as typed: a name of upstream's, or a name at the URL of a fork.

    `base` is the tag of the release whose precompiled wheels a commit takes, where --base names it.
    """

    text: str
    name: str
    url: str | None = None
    base: str | None = None

    @property
    def argv(self) -> list[str]:
        """The arguments of `inv pin.bump`."""
        return [self.text, *(["--base", self.base] if self.base else [])]

    @classmethod
    def read(cls, text: str, base: str = "") -> "Wanted":
        """Read `REF` or `URL@REF`; a folder on this disk counts as a URL.

        Raises SettingsError for another form, and for a URL that holds a password.
        """
        if _SECRET.match(text):
            raise SettingsError(
                f"{without_user(text)} was typed with a user or password, which vendor/pins.toml"
                " would show to everybody",
                hint=hints.text("repo.fork_example"),
            )
        url, _, name = text.rpartition("@")
        if not REF.fullmatch(name):
            example = (
                hints.text("repo.fork_example") if url else hints.text("repo.forecast_example")
            )
            raise SettingsError(
                f"{without_user(name)!r} is not the name of a tag, branch or commit", hint=example
            )
        if url and not re.match(r"[a-z+]+://|[^/]+:", url):
            url = str(typed(url).resolve())
        if url and not _ADDRESS.fullmatch(url):
            raise SettingsError(
                f"{url!r} is not an address of a git repository",
                hint=hints.text("repo.fork_example"),
            )
        tag = f"v{base.removeprefix('v')}" if base else None
        return cls(text, name, url or None, tag)


def short_name(ref: str) -> str:
    """Return a branch or tag without its folder, and a commit by 12 digits."""
    if COMMIT.fullmatch(ref):
        return ref[:12]
    return ref.removeprefix("refs/heads/").removeprefix("refs/tags/")


def _check(table: Pin | Archive | Base | PrecompiledWheel, name: str) -> None:
    """Check each text of a table. Raises DecodeError."""
    for key, (form, expected) in _FORMS.items():
        text = getattr(table, key, None)
        if text is not None and not form.fullmatch(text):
            shown = reprlib.repr(text)
            raise records.DecodeError(f"{name}.{key} is {shown}, expected {expected}")


def load(path: Path) -> Pins:
    """Read the pins. Raises SettingsError that names the missing or invalid key."""
    try:
        return parse(read_regular(path))
    except OSError as exc:
        raise SettingsError(
            f"vendor/pins.toml cannot be read: {exc.strerror}", hint=hints.text("core.restore_pins")
        ) from exc


def parse(content: bytes) -> Pins:
    """Read the content of a pins file. Raises SettingsError as `load` does."""
    try:
        return records.convert(records.parse_toml(_renamed_tables(content)), Pins)
    except records.DecodeError as exc:
        raise SettingsError(
            f"vendor/pins.toml: {exc}", hint=hints.text("core.restore_pins")
        ) from exc


def dump(content: bytes, pin: Pin) -> bytes:
    """Return the content of a pins file with another pin of `pin.name`; the rest stays the same.

    Comments and order stay, but a table that is dropped takes the lines below it along. Raises
    SettingsError as `load` does.
    """
    import tomlkit

    content = _renamed_tables(content)
    parse(content)
    document = tomlkit.parse(content)
    wanted = {key: value for key, value in asdict(pin).items() if value and key != "name"}
    _replace(document.item(pin.name), wanted)
    return _CROWDED.sub(r"\1\n[", tomlkit.dumps(document)).encode()


def _replace(table: Any, wanted: Mapping[str, Any]) -> None:
    """Give a table of tomlkit other values; what is the same keeps its spelling."""
    for key in [key for key in table if key not in wanted]:
        del table[key]
    for key, value in wanted.items():
        if isinstance(value, dict):
            _replace(table.setdefault(key, {}), value)
        elif table.get(key) != value:
            table[key] = value


def _renamed_tables(content: bytes) -> bytes:
    """Return a pins file with the tables `donors` of the first edition renamed to `precompiled`."""
    return _FORMER_HEADER.sub(rb"\1precompiled\2", content)


def save(path: Path, pin: Pin) -> None:
    """Write another pin of `pin.name` into the file. Raises SettingsError as load and dump do."""
    before = read_regular(path)
    if (made := dump(before, pin)) != before:
        write_atomic(path, made)


def require_settled(layout: Layout) -> None:
    """Raise CheckoutError where a move to another pin was begun and not finished.

    Then some parts are of one pin, others of another.
    """
    if following := half_moved(layout):
        raise CheckoutError(
            "a move to another pin was begun and not finished; nothing was changed", hint=following
        )


def half_moved(layout: Layout) -> str | None:
    """Return the command that finishes an interrupted promotion or rollback, or None."""
    if layout.promoting.exists():
        return hints.text("inv.patch_continue")
    return hints.text("inv.pin_rollback") if layout.returning.exists() else None


# The commit must not depend on the time of its creation.
ARCHIVE_DATE = "2000-01-01T00:00:00+0000"
# setuptools-scm's line in the archive's vllm/_version.py; `g` is the prefix of `git describe`.
_COMMIT_ID = re.compile(rb"commit_id = '?g([0-9a-f]{7,40})\b")
# Files that `python -m build --sdist` writes at the top of the archive.
_GENERATED = {"PKG-INFO", "setup.cfg"}


def require_archive(pin: Pin) -> Archive:
    """Return the pinned release archive. Raises SourceError where the pin has none."""
    if pin.archive is None:
        raise SourceError(
            f"{pin.name} has no release archive in vendor/pins.toml",
            hint=hints.text("repo.source_git"),
        )
    return pin.archive


def make_from_archive(
    source: Path,
    destination: Path,
    pin: Pin,
    *,
    step: Step | None = None,
) -> None:
    """Make the checkout of `pin` from the archive file `source`, complete or not at all.

    `destination` is missing or an empty folder. Raises SourceError for an archive that is damaged,
    would write elsewhere, or gives another commit than pinned.
    """
    archive = require_archive(pin)
    with files.folder_beside(destination) as folder:
        tree = folder / "tree"
        commit, found = build_archive(source, tree, pin, step=step)
        if (commit, found) != (archive.commit, archive.tree):
            raise SourceError(
                f"{archive.filename} gives commit {commit} with tree {found}, not the"
                f" pinned {archive.commit} with {archive.tree}",
                hint=hints.text("repo.pins_diff"),
            )
        files.put_in_place(tree, destination)


def build_archive(
    source: Path,
    folder: Path,
    pin: Pin,
    *,
    step: Step | None = None,
) -> tuple[str, str]:
    """Unpack an archive into the new folder `folder`, commit and tag it.

    Return the commit and its tree OID.
    """
    folder.mkdir()
    step = step or Step("unpack")
    try:
        _unpack(source, folder, pin, step)
    except (tarfile.TarError, EOFError, zlib.error) as exc:
        raise SourceError(
            f"{source.name} is damaged: {exc}",
            hint=hints.text("repo.delete_file_again", path=source),
        ) from exc
    # As long as the unpacking on a busy machine, and git prints nothing meanwhile.
    step.progress(0, None, f"committing the files of {source.name}")
    git = Git(folder, failure=SourceError)
    git.init()
    commit = git.commit_everything(
        f"{pin.name} {pin.version}, as in its release archive {source.name}", date=ARCHIVE_DATE
    )
    git.set_ref(f"refs/tags/{pin.tag}", commit)
    return commit, git.tree(commit)


def commit_id(file: Path, pin: Pin) -> str | None:
    """Return the first digits of the commit that an archive names as its source, or None.

    They are in vllm/_version.py, which is no part of the checkout.
    """
    with (
        contextlib.suppress(tarfile.TarError, OSError, EOFError, zlib.error),
        tarfile.open(file, mode="r:gz") as packed,
    ):
        for member in packed:
            if (
                member.isfile()
                and member.name.split("/")[1:] == [pin.name, "_version.py"]
                and (content := packed.extractfile(member))
            ):
                found = _COMMIT_ID.search(content.read(1 << 16))
                return found[1].decode() if found else None
    return None


def _unpack(source: Path, folder: Path, pin: Pin, step: Step) -> None:
    """Write the files of the archive without its top folder, owners and times.

    Files get one of git's two modes. Each path is checked here, because Python 3.11 before 3.11.4
    lacks tarfile's filters.
    """
    total = source.stat().st_size
    links: list[tuple[Path, str]] = []
    with source.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:gz") as archive:
        top: str | None = None
        for member in archive:
            step.progress(raw.tell(), total, f"unpacking {source.name}")
            parts = _parts(member, source)
            top = top or parts[0]
            if parts[0] != top:
                raise _refused(source, member.name, f"is outside of its folder {top}")
            if len(parts) == 1 or member.isdir() or _is_generated(parts[1:], pin):
                continue
            path = folder.joinpath(*parts[1:])
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise _refused(
                    source, member.name, "is below another entry, which is a file"
                ) from None
            if member.issym():
                links.append((path, member.linkname))
            else:
                _write(archive, member, path, source)
    # Links come last, so that no file is written through a link.
    for path, target in links:
        try:
            path.symlink_to(target)
        except FileExistsError:
            raise _refused(source, path.relative_to(folder), "is in the archive twice") from None
    for path, _ in links:
        if (
            not path.resolve().is_relative_to(folder.resolve())
            or ".git" in path.resolve().relative_to(folder.resolve()).parts
        ):
            raise _refused(
                source, path.relative_to(folder), "is a link to a path outside of the archive"
            )


def _parts(member: tarfile.TarInfo, source: Path) -> tuple[str, ...]:
    try:
        return files.inner_path(member.name).parts
    except ValueError as exc:
        reason = str(exc).removeprefix(f"{member.name!r} ")
        raise _refused(source, member.name, reason) from None


def _is_generated(parts: tuple[str, ...], pin: Pin) -> bool:
    return (
        (len(parts) == 1 and parts[0] in _GENERATED)
        or parts[0].endswith(".egg-info")
        or parts == (pin.name, "_version.py")
    )


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path, source: Path) -> None:
    # extractfile follows a hard link to another member, and only inside of the archive.
    content = archive.extractfile(member) if member.isreg() or member.islnk() else None
    if content is None:
        raise _refused(source, member.name, "is neither file, folder nor link")
    try:
        descriptor = os.open(
            path,
            os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW,
            0o755 if member.mode & 0o100 else 0o644,
        )
    except FileExistsError:
        raise _refused(source, member.name, "is in the archive twice") from None
    with os.fdopen(descriptor, "wb") as file:
        while chunk := content.read(1 << 20):
            file.write(chunk)


def _refused(source: Path, member: object, reason: str) -> SourceError:
    return SourceError(
        f"{source.name}: {str(member)!r} {reason}, so the archive was not used",
        hint=hints.text("repo.archive_layout"),
    )
