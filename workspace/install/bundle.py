"""inv bundle: all that a bootstrap needs, in one folder; and the bootstrap from that folder.

A bundle has `manifest.json`, with size and SHA-256 of each file, and its files side by side in
`files/`. It may be for another architecture, Python and device than those of this machine. A
bootstrap from it writes index pages for these files, and asks no package index and no git remote.
"""

import contextlib
import io
import os
import platform
import re
import shutil
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

from workspace.core import files, hints, records
from workspace.core.console import Console, RunLog, Step
from workspace.core.errors import SettingsError, SourceError, ToolchainError, counted, listed
from workspace.core.paths import Layout, typed
from workspace.core.settings import Settings
from workspace.install import plan, stages, wheel
from workspace.machine import requirements, torch
from workspace.machine.requirements import Package, Platform, Request
from workspace.repo import checkout, index, pins
from workspace.repo.git import Git

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

MANIFEST, FILES = "manifest.json", "files"
WORKSPACE, SOURCE = "workspace.bundle", "vllm.bundle"
# DGX OS 7 is Ubuntu 24.04. uv knows no C library after the second (--python-platform).
GLIBC_ELSEWHERE, NEWEST_GLIBC = 39, 40
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+!-]*")
_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9}
Use = Literal["tools", "vllm", "kernels", "git"]


@dataclass(frozen=True)
class Item:
    """A file of a bundle; `uses` are the steps of a bootstrap that read it."""

    name: str
    size: int
    sha256: str
    uses: tuple[Use, ...]


@dataclass(frozen=True)
class Manifest(records.Record, schema=1):
    """The content of manifest.json; `source` is what a checkout of the pin is made from."""

    target: Platform
    device: str
    tag: str
    commit: str
    source: Literal["git", "release"]
    items: tuple[Item, ...]

    def validate(self) -> None:
        versions = f"{self.target.python} {self.target.glibc}"
        if not re.fullmatch(r"3\.[0-9]{1,2} 2\.[0-9]{1,4}", versions):
            raise records.DecodeError(f"{versions!r} are no versions of Python and glibc")
        for item in self.items:
            if not _NAME.fullmatch(item.name) or item.size < 0:
                raise records.DecodeError(f"{item.name!r} is not the name of a file in {FILES}/")
            if not pins.SHA256.fullmatch(item.sha256):
                raise records.DecodeError(f"{item.name} has no SHA-256")

    @property
    def machine(self) -> str:
        return f"{self.target.machine}, Python {self.target.python}, {self.device}"


@dataclass(frozen=True)
class BundleOptions:
    """Options of `inv bundle`: a folder or a new file *.tar, and the machine that it is for."""

    place: str
    machine: str | None = None
    python: str | None = None
    device: str | None = None
    split: str | None = None
    plan_only: bool = False


@dataclass(frozen=True)
class Part:
    """A file to fetch: its item, and the address that it comes from."""

    item: Item
    url: str


def make(
    layout: Layout, settings: Settings, options: BundleOptions, *, console: Console, wait: bool
) -> None:
    """Collect a bundle; print its sizes first, and keep the files of it that are there.

    Raises SettingsError for a place that cannot be used, SourceError for a file that cannot be
    fetched, ToolchainError where the disk has no room.
    """
    place, piece = _place(layout, options)
    pins.require_settled(layout)
    folder = place.with_name(f"{place.name}.parts") if place.suffix == ".tar" else place
    observed = plan.observe(layout, settings)
    manifest = _manifest(observed, options)
    with console.step("resolve") as view:
        parts = _parts(observed, manifest, console)
        view.reason = f"for {manifest.machine}"
    missing = tuple(part for part in parts if _fault(folder / FILES, part.item))
    total, left = (sum(part.item.size for part in some) / 1e6 for some in (parts, missing))
    console.sentence(
        f"{counted(len(parts), 'file')}, {total:.0f} MB; to fetch:"
        f" {counted(len(missing), 'file')}, {left:.0f} MB"
    )
    if options.plan_only:
        for part in parts:
            console.data(f"{part.item.size:>12}  {part.item.sha256}  {part.item.name}")
        return
    _require_room(folder, missing)
    with stages.locked(layout, settings, "inv bundle", console=console, wait=wait) as run_log:
        (folder / FILES).mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        with stages.step(run_log, "fetch") as view:
            _fetch(folder / FILES, missing, view)
        with stages.step(run_log, "git") as view:
            made = tuple(_made(observed, manifest, folder / FILES, run_log))
            view.reason = ", ".join(item.name for item in made)
        fetched = (_item(folder / FILES / part.item.name, *part.item.uses) for part in parts)
        manifest = replace(manifest, items=(*fetched, *made))
        records.write(folder / MANIFEST, manifest)
        if folder != place:
            with stages.step(run_log, "pack") as view:
                view.reason = counted(_pack(manifest, folder, place, piece), "file")
            shutil.rmtree(folder)
    console.info(f"{place}: vLLM {manifest.tag} for {manifest.machine}")
    console.hint(hints.text("install.bootstrap_from", folder=place))


def _place(layout: Layout, options: BundleOptions) -> tuple[Path, int | None]:
    """Return the absolute place, and the bytes of a piece. Raises SettingsError."""
    place, piece = typed(options.place), None
    place = place.parent.resolve() / place.name
    real, is_tar = place.resolve(), place.suffix == ".tar"
    if real.is_relative_to(layout.root) or layout.root.is_relative_to(real):
        raise SettingsError(
            f"{place} is this clone, inside it or above it",
            hint=hints.text("install.bundle_beside"),
        )
    if options.split is not None:
        found = re.fullmatch("([1-9][0-9]{0,5})([KMG])", options.split)
        if found is None or not is_tar:
            raise SettingsError(
                f"--split {options.split}: it takes a size such as 60M, and a place *.tar",
                hint=hints.text("install.bundle_split"),
            )
        piece = int(found[1]) * _UNITS[found[2]]
    taken = [path for path in (place, _piece(place, 0)) if os.path.lexists(path)]
    if taken and (is_tar or not place.is_dir()):
        raise SettingsError(
            f"{taken[0]} exists and stays as it is",
            hint=hints.text("core.what_it_is", path=taken[0]),
        )
    if place.is_dir() and (others := {path.name for path in place.iterdir()} - {MANIFEST, FILES}):
        raise SettingsError(
            f"{place} holds other files: {listed(sorted(others))}",
            hint=hints.text("core.list_names", folder=place),
        )
    return place, piece


def _manifest(observed: plan.Observation, options: BundleOptions) -> Manifest:
    """Return a manifest without files; what no option names is as in this clone."""
    pin, settings = observed.pin, observed.machine.settings
    if observed.tree is None:
        raise SourceError(
            "there is no checkout to take requirements from", hint=hints.text("inv.bootstrap")
        )
    built = observed.python.version if observed.python else settings.text("PYTHON_VERSION")
    machine, python = options.machine or platform.machine(), options.python or _minor(built)
    device = options.device or observed.device
    given = (("for", machine, "aarch64|x86_64"), ("device", device, "cpu|cuda"))
    for flag, text, allowed in (*given, ("python", python, r"3\.[0-9]{1,2}")):
        if not re.fullmatch(allowed, text):
            raise SettingsError(
                f"--{flag}: {text!r} is not of the form {allowed}",
                hint=hints.text("install.bundle_beside"),
            )
    own = (os.confstr("CS_GNU_LIBC_VERSION") or "").removeprefix("glibc 2.")
    is_known = machine == platform.machine() and own.isdecimal()
    glibc = min(int(own), NEWEST_GLIBC) if is_known else GLIBC_ELSEWHERE
    # A partial clone would first fetch every old file of upstream's history.
    git = Git(observed.machine.layout.vllm)
    is_git = observed.checkout.kind is checkout.Kind.GIT and not git.is_partial
    source: Literal["git", "release"] = "git" if is_git or pin.archive is None else "release"
    target = Platform(machine, python, f"2.{glibc}")
    return Manifest(target, device, pin.tag, pin.commit, source, ())


def _parts(observed: plan.Observation, manifest: Manifest, console: Console) -> tuple[Part, ...]:
    """Return each file that comes from an index, and its address."""
    layout, settings, pin = observed.machine.layout, observed.machine.settings, observed.pin
    lock = (layout.root / "requirements" / "tools.txt").read_text()
    tools = requirements.resolve(
        Request((lock,)), manifest.target, layout=layout, settings=settings
    )
    found = [_part(package, manifest.target, "tools", locked=lock) for package in tools]
    closure = _closure(observed, manifest, console)
    found += [_part(package, manifest.target, "vllm") for package in closure]
    pinned = []
    if manifest.source == "release":
        archive = pins.require_archive(pin)
        pinned.append((pin.name, archive.filename, archive.sha256))
    key = f"{manifest.device}-{manifest.target.machine}"
    if precompiled := pin.precompiled.get(key):
        pinned.append((precompiled.project, precompiled.filename, precompiled.sha256))
    else:
        console.warn(f"vendor/pins.toml names no precompiled wheel for {key}")
    for project, name, sha256 in pinned:
        url, size = index.locate(project, name, sha256, settings=settings)
        found.append(Part(Item(name, size or 0, sha256, ("vllm",)), url))
    parts: dict[str, Part] = {}
    for part in found:
        # The tools come first: their hashes are locked.
        same = parts.get(part.item.name, part)
        uses = tuple(dict.fromkeys((*same.item.uses, *part.item.uses)))
        parts[part.item.name] = replace(same, item=replace(same.item, uses=uses))
    return tuple(parts.values())


def _part(package: Package, target: Platform, use: Use, *, locked: str = "") -> Part:
    best = requirements.best_wheel(package, target, locked=locked)
    size = best.size or 0
    if best.url.startswith("file://"):
        size = index.local_path(best.url).stat().st_size
    return Part(Item(best.filename, size, best.hashes["sha256"], (use,)), best.url)


def _closure(
    observed: plan.Observation, manifest: Manifest, console: Console
) -> tuple[Package, ...]:
    """Return every package that a bootstrap for the target installs in `.vllm`.

    Where this clone is such a machine, the versions are those of its own `.vllm`.
    """
    layout, settings, target = observed.machine.layout, observed.machine.settings, manifest.target
    needs = requirements.read(
        layout.vllm,
        device=manifest.device,
        machine=target.machine,
        python_version=f"{target.python}.0",
        use_existing_torch=False,
        settings=settings,
    )
    own = _own_packages(observed, manifest)
    wanted = torch.plan(
        needs.torch, device=manifest.device, settings=settings, machine=target.machine
    )
    lines = (wanted.requirement, *needs.build, *needs.runtime, *needs.accelerators)
    request = Request(lines, overrides=needs.overrides, constraints=own)
    attempts = (wanted.arguments, *wanted.alternatives)
    for number, arguments in enumerate(attempts, 1):
        given = ("--prerelease", "allow") if settings.switch("ALLOW_PRERELEASE") else ()
        request = replace(request, arguments=(*arguments, *given))
        try:
            found = requirements.resolve(request, target, layout=layout, settings=settings)
            break
        except SourceError as exc:
            if number == len(attempts):
                raise
            console.info(f"{exc.message}; tried now: {' '.join(attempts[number]) or 'the index'}")
    companions = tuple(
        line for line in needs.companions if not own or re.split("[^a-z]", line)[0] in str(own)
    )
    # A local folder of wheels has a torch for CPUs: bootstrap installs no companions then.
    if not companions or "--find-links" in request.arguments:
        return found
    held = tuple(f"{package.name}=={package.version}" for package in found)
    request = replace(request, lines=companions, overrides=(), constraints=held)
    with contextlib.suppress(requirements.Unsolved):
        found += requirements.resolve(request, target, layout=layout, settings=settings)
    return found


def _own_packages(observed: plan.Observation, manifest: Manifest) -> tuple[str, ...]:
    """Return the recorded packages of `.vllm` as constraints, if it is one of the target."""
    recorded, python = observed.environment.recorded, observed.python
    is_same = (
        manifest.target.machine == platform.machine()
        and manifest.device == observed.device
        and python is not None
        and _minor(python.version) == manifest.target.python
        and observed.environment.state == "ok"
    )
    packages = recorded.packages if recorded and is_same else {}
    return tuple(f"{name}=={version}" for name, version in packages.items())


def _require_room(folder: Path, missing: Sequence[Part]) -> None:
    above = next(path for path in (folder, *folder.parents) if path.is_dir())
    need, free = sum(part.item.size for part in missing), shutil.disk_usage(above).free
    if need > free:
        raise ToolchainError(
            f"{above} has {free / 1e6:.0f} MB free, and {need / 1e6:.0f} MB are to be fetched",
            hint=hints.text("core.disk_of", folder=above),
        )


def _fetch(folder: Path, missing: Sequence[Part], view: Step) -> None:
    total, done = sum(part.item.size for part in missing), 0
    for part in missing:
        item, before = part.item, done

        def show(now: int, _: int | None, before: int = before) -> None:
            view.progress((before + now) / 1e6, total / 1e6, "MB")

        # What a run that was killed left is resumed; a file that differs is replaced.
        try:
            index.fetch_url(part.url, folder / item.name, item.sha256, on_progress=show)
        except OSError as exc:
            raise ToolchainError(
                f"{folder / item.name} cannot be written: {exc.strerror}",
                hint=hints.text("core.disk_of", folder=folder),
            ) from exc
        done += item.size
    view.reason = counted(len(missing), "file")


def _made(
    observed: plan.Observation, manifest: Manifest, folder: Path, run_log: RunLog
) -> Iterator[Item]:
    """Write what no index has: the workspace, the pin from git, and kernels compiled here."""
    layout, own = observed.machine.layout, observed.kernels.recorded
    outer = checkout.superproject(layout)
    if outer is None:
        run_log.console.warn("this clone is no git repository: the workspace is not in the bundle")
    elif edited := [path for path in outer.edits() if path != "vendor/vllm"]:
        run_log.console.warn(f"not committed, so not in the bundle: {listed(edited)}")
    if outer is not None:
        path = str(folder / WORKSPACE)
        outer.write("bundle", "create", "--quiet", path, "HEAD", "--branches", run_log=run_log)
        yield _item(folder / WORKSPACE, "git")
    if manifest.source == "git":
        with files.folder_beside(folder) as scratch:
            # A bundle does not say which commit an annotated tag names: it gets a branch.
            (scratch / "tree").mkdir()
            copy = Git(scratch / "tree")
            copy.init()
            copy.fetch_from(layout.vllm, "+HEAD:refs/heads/all", run_log=run_log)
            copy.set_ref("refs/heads/pin", manifest.commit)
            path = str(folder / SOURCE)
            copy.write("bundle", "create", "--quiet", path, "refs/heads/pin", run_log=run_log)
        yield _item(folder / SOURCE, "git")
    is_own = own and own.kernels and (own.kernels.is_compiled or own.kernels.is_wheel_file)
    if is_own and _own_packages(observed, manifest):
        yield _item(wheel.pack(layout, observed, folder).path, "kernels")


def _item(path: Path, *uses: Use) -> Item:
    return Item(path.name, path.stat().st_size, files.sha256(path), uses)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _fault(folder: Path, item: Item) -> str | None:
    """Return how a file differs from its item, None where it is right."""
    path = folder / item.name
    if path.is_symlink() or not path.is_file():
        return f"{item.name} is missing"
    size, found = path.stat().st_size, files.sha256(path)
    if found == item.sha256:
        return None
    cut = f"{size} bytes instead of {item.size}, and " if item.size not in (0, size) else ""
    return f"{item.name} has {cut}sha256 {found} instead of {item.sha256}"


def read(folder: Path) -> Manifest:
    """Return the manifest of a bundle. Raises SettingsError where there is none, SourceError for a
    damaged one.
    """
    if folder.is_file():
        raise SettingsError(
            f"{folder} is a file, not the folder of a bundle",
            hint=hints.text("install.unpack_bundle", file=folder, folder=folder.with_suffix("")),
        )
    try:
        manifest = records.load(folder / MANIFEST, Manifest)
    except records.DecodeError as exc:
        raise SourceError(
            f"{folder / MANIFEST} is damaged: {exc}",
            hint=hints.text("core.what_it_is", path=folder / MANIFEST),
        ) from exc
    if manifest is None:
        raise SettingsError(
            f"{folder} holds no finished bundle: there is no {MANIFEST}",
            hint=hints.text("core.list_folder", folder=folder),
        )
    return manifest


def require_complete(manifest: Manifest, folder: Path) -> None:
    """Raise SourceError, naming each file of a bundle that is missing, cut or changed."""
    faults = [fault for item in manifest.items if (fault := _fault(folder / FILES, item))]
    if faults:
        raise SourceError(
            f"the bundle is not as its manifest: {listed(faults)}",
            hint=anew(manifest, folder),
        )


def write_pages(manifest: Manifest, folder: Path, pages: Path) -> None:
    """Write an index (PEP 503) of the files of a bundle that `.vllm` and the checkout need."""
    from packaging.utils import canonicalize_name

    links: dict[str, list[str]] = {}
    for item in manifest.items:
        if "vllm" in item.uses:
            project = canonicalize_name(item.name.partition("-")[0])
            url = f"{(folder / item.name).as_uri()}#sha256={item.sha256}"
            links.setdefault(project, []).append(f'<a href="{url}">{quote(item.name)}</a>')
    with files.folder_beside(pages) as scratch:
        for name, lines in links.items():
            (scratch / "made" / name).mkdir(parents=True)
            (scratch / "made" / name / "index.html").write_text("<br>".join(lines))
        files.put_in_place(scratch / "made", pages)


def forget_remote(layout: Layout, mirror: str, url: str) -> None:
    """Name the project's own address where git has recorded the file of a bundle as the remote."""
    name = layout.relative(layout.vllm)
    places = (
        (Git(layout.vllm), "remote.origin.url"),
        (checkout.superproject(layout), f"submodule.{name}.url"),
    )
    for git, setting in places:
        if git and git.setting(setting) == mirror:
            git.set_setting(setting, url)


def anew(manifest: Manifest, folder: Path) -> str:
    """Return the hint that makes this bundle again, or for another machine."""
    target = manifest.target
    return hints.text(
        "install.bundle_anew",
        folder=folder,
        machine=target.machine,
        python=target.python,
        device=manifest.device,
    )


def _piece(place: Path, number: int) -> Path:
    return place.with_name(f"{place.name}.{number:03}")


class _Pieces(io.BufferedIOBase):
    """A file for tarfile that begins the next piece after `most` bytes."""

    def __init__(self, place: Path, most: int) -> None:
        self.place, self.most, self.size = place, most, 0

    def write(self, content: "Buffer") -> int:
        rest = memoryview(content)
        while rest:
            number, within = divmod(self.size, self.most)
            now = rest[: self.most - within]
            with _piece(self.place, number).open("ab") as file:
                file.write(now)
            self.size, rest = self.size + len(now), rest[len(now) :]
        return len(memoryview(content))


def _pack(manifest: Manifest, folder: Path, place: Path, most: int | None) -> int:
    """Write a bundle as one file or as pieces, which appear once all are written."""
    names = (MANIFEST, *(f"{FILES}/{item.name}" for item in manifest.items))
    with files.folder_beside(place) as scratch:
        pieces = _Pieces(scratch / place.name, most or sys.maxsize)
        with tarfile.open(mode="w|", fileobj=pieces) as archive:
            for name in names:
                archive.add(folder / name, arcname=name)
        packed = sorted(scratch.iterdir())
        for path in packed:
            path.replace(place.with_name(path.name) if most else place)
    return len(packed)
