"""Files from the package index: found by name, proven by hash, kept in the user's cache for all clones."""

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from workspace.core import files, lock
from workspace.core.errors import SourceError, ToolchainError
from workspace.core.settings import Settings

if TYPE_CHECKING:
    from pypi_simple import ProjectPage

READ_TIMEOUT_S = 30.0
_OFFLINE_HINT = "check the network and run the same command again; UV_DEFAULT_INDEX or PIP_INDEX_URL names another index"


def fetch(project: str, filename: str, sha256: str, *, settings: Settings, on_progress: Callable[[int, int | None], None] | None = None) -> Path:
    """Return the file with this hash, from the cache where it is there and whole, else from the package index.

    `on_progress` gets bytes so far and in all. A transfer that broke off is resumed by the next call.
    Raises SourceError where the index cannot be reached, lacks the file or serves another one, ToolchainError where the cache cannot be written.
    """
    destination = settings.cache / "files" / sha256 / filename
    if _is_whole(destination, sha256):
        return destination
    try:
        # Another clone may be fetching the same file: two writers of one part would spoil it.
        with lock.hold(destination.parent / "lock", verb="fetch", wait=True):
            if not _is_whole(destination, sha256):
                url = _find(project, filename, sha256, settings)
                if url.startswith("file://"):
                    _copy(_local(url), destination, sha256)
                else:
                    files.download(url, destination, expected_sha256=sha256, timeout_s=READ_TIMEOUT_S, on_progress=on_progress)
    except SourceError as exc:
        raise SourceError(_without_user(exc.message), hint=exc.hint, details=exc.details) from exc
    except OSError as exc:
        raise ToolchainError(f"{destination.parent} cannot be written: {exc.strerror}", hint="WORKSPACE_CACHE_DIR names another folder") from exc
    return destination


def _is_whole(path: Path, sha256: str) -> bool:
    return path.is_file() and files.sha256(path) == sha256


def _find(project: str, filename: str, sha256: str, settings: Settings) -> str:
    """The address of the file on the index."""
    found = page(project, settings)
    package = next((package for package in found.packages if package.filename == filename), None)
    if package is None:
        raise SourceError(
            f"the package index has no {filename} ({project} {_version(filename)})", hint="UV_DEFAULT_INDEX or PIP_INDEX_URL names an index that has it"
        )
    served = package.digests.get("sha256", sha256)
    if served != sha256:
        raise SourceError(
            f"the package index serves {filename} ({project} {_version(filename)}) with sha256 {served}, pinned is {sha256}: it was not fetched",
            hint="UV_DEFAULT_INDEX or PIP_INDEX_URL names another index; if the file is right, vendor/pins.toml is wrong",
        )
    return package.url


def page(project: str, settings: Settings) -> "ProjectPage":
    """Return what the package index lists for a project. Raises SourceError where it cannot be reached, or has no such project."""
    import requests
    from bs4.exceptions import ParserRejectedMarkup
    from packaging.utils import canonicalize_name
    from pypi_simple import PYPI_SIMPLE_ENDPOINT, NoSuchProjectError, ProjectPage, PyPISimple, UnsupportedContentTypeError, UnsupportedRepoVersionError

    endpoint = settings.index_url or PYPI_SIMPLE_ENDPOINT
    if endpoint.startswith("file://"):
        # requests knows no file addresses; a folder that serves as an index holds plain HTML (PEP 503).
        file = _local(endpoint) / canonicalize_name(project) / "index.html"
        if not file.is_file():
            raise SourceError(f"the package index has no project {project}: {file} is missing", hint=_OFFLINE_HINT)
        try:
            return ProjectPage.from_html(project, file.read_bytes(), base_url=file.as_uri())
        except (ParserRejectedMarkup, ValueError) as exc:
            raise SourceError(f"{file} is no index page: {exc}", hint=_OFFLINE_HINT) from exc
    connect_timeout_s = float(settings.count("CONNECT_TIMEOUT_S") or READ_TIMEOUT_S)
    try:
        with PyPISimple(endpoint) as client:
            return client.get_project_page(project, timeout=(connect_timeout_s, READ_TIMEOUT_S))
    except NoSuchProjectError as exc:
        raise SourceError(f"the package index has no project {project}", hint=_OFFLINE_HINT) from exc
    except requests.HTTPError as exc:
        raise SourceError(f"the package index answered {exc.response.status_code} for {project}", hint=_OFFLINE_HINT) from exc
    except requests.RequestException as exc:
        raise SourceError(f"the package index cannot be reached for {project}: {_innermost(exc)}", hint=_OFFLINE_HINT) from exc
    except (UnsupportedContentTypeError, UnsupportedRepoVersionError, ParserRejectedMarkup, ValueError) as exc:
        raise SourceError(f"the package index answered for {project} with something else than an index page", hint=_OFFLINE_HINT) from exc


def _copy(source: Path, destination: Path, sha256: str) -> None:
    """Copy from an index that is a folder, as download() does from one that is a server: whole and right, or not at all."""
    if not source.is_file():
        raise SourceError(f"{destination.name} is listed by the package index but missing: {source}", hint=_OFFLINE_HINT)
    with tempfile.NamedTemporaryFile(dir=destination.parent, prefix=f".{destination.name}.") as part:
        with source.open("rb") as content:
            shutil.copyfileobj(content, part)
        part.flush()
        found = files.sha256(Path(part.name))
        if found != sha256:
            raise SourceError(f"{destination.name} has sha256 {found}, pinned is {sha256}: it was not used", hint=_OFFLINE_HINT)
        destination.unlink(missing_ok=True)
        destination.hardlink_to(part.name)


def _local(url: str) -> Path:
    try:
        return Path(unquote(urlsplit(url).path))
    except ValueError as exc:
        raise SourceError(f"the package index is or names {_without_user(url)}, which is no address: {exc}", hint=_OFFLINE_HINT) from exc


def _version(filename: str) -> str:
    from pypi_simple import UnparsableFilenameError, parse_filename

    try:
        return parse_filename(filename)[1]
    except UnparsableFilenameError:
        return "of unknown version"


def _innermost(exc: BaseException) -> str:
    while exc.__context__ is not None:
        exc = exc.__context__
    return str(exc) or type(exc).__name__


def _without_user(text: str) -> str:
    """Addresses without name and password."""
    return re.sub(r"(?<=://)[^/@\s]*@", "", text)
