"""Triton's tree, and the files that its build downloads while CMake configures: LLVM, NVIDIA's
tools, a JSON library. They are fetched beforehand, with resume, and checked against a hash.

Each file lands where Triton's own script (python/build_helpers.py) would put it, so the script
finds it and fetches nothing. The hash of LLVM is in the tree (cmake/llvm-info.json), those of the
tools in NVIDIA's list of a release; nobody publishes one for the JSON library.
"""

import contextlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from workspace.core import hints, records
from workspace.core.console import RunLog, Step
from workspace.core.errors import BuildError, CheckoutError, SettingsError, SourceError
from workspace.core.files import download, sha256, unpack
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.repo import checkout, patches, pins
from workspace.repo.git import Git

FROM_SOURCE = "./scripts/inv fix-triton --from-source"
# One CMake serves vLLM and Triton (vLLM's requirements/build, Triton's pyproject.toml).
CMAKE = "cmake>=3.26.1,<4"
# setup.py needs these by import or on PATH; a build without isolation must have them.
_ALWAYS = ("setuptools", "wheel", "ninja")


@dataclass(frozen=True)
class Source:
    """A tree to build. `project` is the folder with its setup.py, the root or python/; `content` is
    its tree OID, `patches` the number of applied patches.
    """

    tree: Path
    project: Path
    ref: str
    commit: str
    content: str
    patches: int


def prepare_source(layout: Layout, settings: Settings, *, run_log: RunLog, step: Step) -> Source:
    """Put vendor/triton at the pin with its patches, and clone it if it is missing.

    Raises CheckoutError if it has edits, commits that are no patches, or an unfinished operation;
    SourceError if it cannot be fetched.
    """
    pin = pins.load(layout.pins).triton
    there = checkout.ensure(layout, pin, settings, choice="git", run_log=run_log, step=step)
    stack = patches.apply(layout, "triton", pin, there, run_log=run_log)
    shown = layout.relative(layout.triton)
    if stack.dirty:
        raise CheckoutError(
            f"{shown} has local edits ({', '.join(stack.dirty[:3])}) that are in no patch; they are"
            " kept, and nothing is built",
            hint=hints.text("compile.triton_edits", shown=shown),
        )
    project = next(
        (
            folder
            for folder in (layout.triton, layout.triton / "python")
            if (folder / "setup.py").is_file()
        ),
        None,
    )
    if project is None:
        raise BuildError(
            f"{shown} has no setup.py, neither in its root nor in python/",
            hint=hints.text("compile.triton_origin", shown=shown),
        )
    content = Git(layout.triton).tree("HEAD")
    step.reason = f"{pin.tag} {pin.commit[:12]}" + (
        f", {len(stack.names)} patches" if stack.names else ""
    )
    return Source(layout.triton, project, pin.tag, pin.commit, content, len(stack.names))


def requirements(source: Source) -> tuple[str, ...]:
    """Return what the build needs in `.vllm`: the tree's pyproject.toml and
    python/requirements.txt, except for CMake, which vLLM needs too.
    """
    lines: list[str] = []
    try:
        project = records.parse_toml((source.project / "pyproject.toml").read_bytes())
        system = records.convert(project.get("build-system", {}), dict[str, Any])
        lines += records.convert(system.get("requires", []), list[str])
    except FileNotFoundError:
        pass
    except records.DecodeError as exc:
        raise BuildError(
            f"pyproject.toml of Triton cannot be read: {exc}",
            hint=hints.text("core.git_status", folder=source.tree),
        ) from exc
    listed = source.tree / "python" / "requirements.txt"
    if listed.is_file():
        lines += [
            line.strip()
            for line in listed.read_text(encoding="utf-8").splitlines()
            if re.match(r"\s*[A-Za-z]", line)
        ]
    named = {re.split(r"[^A-Za-z0-9_.-]", line)[0].lower(): line for line in (*_ALWAYS, *lines)}
    named["cmake"] = CMAKE
    return tuple(named[name] for name in sorted(named))


MIRROR = "TRITON_DOWNLOADS_MIRROR"
_LLVM = "https://oaitriton.blob.core.windows.net/public/llvm-builds"
_NVIDIA = "https://developer.download.nvidia.com/compute/cuda/redist"
_JSON = "https://github.com/nlohmann/json/releases/download"
# Triton's name of a tool's folder; NVIDIA's of the archive; the key in
# cmake/nvidia-toolchain-version.json; the variable that replaces the tool.
_TOOLS = (
    ("nvcc", "cuda_nvcc", "ptxas", "TRITON_PTXAS_PATH"),
    ("nvcc-blackwell", "cuda_nvcc", "ptxas-blackwell", "TRITON_PTXAS_BLACKWELL_PATH"),
    ("cuobjdump", "cuda_cuobjdump", "cuobjdump", "TRITON_CUOBJDUMP_PATH"),
    ("nvdisasm", "cuda_nvdisasm", "nvdisasm", "TRITON_NVDISASM_PATH"),
    ("nvcc-crt", "cuda_crt", "cudacrt", "TRITON_CUDACRT_PATH"),
    ("cudart", "cuda_cudart", "cudart", "TRITON_CUDART_PATH"),
    ("cupti", "cuda_cupti", "cupti", "TRITON_CUPTI_LIB_PATH"),
    ("cupti-blackwell", "cuda_cupti", "cupti-blackwell", "TRITON_CUPTI_LIB_BLACKWELL_PATH"),
)
# NVIDIA numbers releases and tools separately: the tools of 13.1.x are in one of these lists.
_MOST_UPDATES = 4
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Download:
    """Archive to download. `root` is the folder to unpack it in, `place` the unpacked folder;
    `setting` names the variable for a local copy instead.
    """

    name: str
    url: str
    sha256: str | None
    root: Path
    place: Path
    setting: str

    @property
    def is_there(self) -> bool:
        """Return whether Triton's script would accept the folder: by its note of the address; a
        tool's by existence.
        """
        note = self.place / "version.txt"
        return (
            self.place.is_dir()
            if self.setting.startswith("TRITON_")
            else note.is_file() and note.read_text(encoding="utf-8") == self.url
        )


def is_offline(environment: Mapping[str, str]) -> bool:
    """Return whether a build of Triton downloads nothing, as its setup.py reads the switch."""
    return environment.get("TRITON_OFFLINE_BUILD", "").lower() in ("1", "on", "yes", "true", "y")


def wanted(source: Source, home: Path, environment: Mapping[str, str]) -> tuple[Download, ...]:
    """Return all downloads of a build of this tree into `home`, its TRITON_HOME. Raises
    SettingsError if an offline build lacks a setting.
    """
    root = home / ".triton"
    found = [*_llvm(source, root, environment), *_json(source, root), *_tools(source, root)]
    found = [one for one in found if not environment.get(one.setting)]
    if is_offline(environment):
        missing = [one.setting for one in found if not one.setting.startswith("TRITON_")]
        if missing:
            raise SettingsError(
                "TRITON_OFFLINE_BUILD is on, but no local folder is set in"
                f" {' and '.join(missing)}",
                hint=hints.text("compile.set_folder", variable=missing[0]),
            )
        return ()
    return tuple({one.place: one for one in found}.values())


def provide_downloads(
    source: Source,
    home: Path,
    settings: Settings,
    environment: Mapping[str, str],
    *,
    run_log: RunLog,
    step: Step,
) -> str:
    """Fetch and unpack all missing downloads, and return a summary. Raises SourceError naming the
    setting for a local copy of each.
    """
    found = wanted(source, home, environment)
    missing = [one for one in found if not one.is_there]
    for one in missing:
        known = one.sha256 is not None or one.setting == "JSON_SYSPATH"
        run_log.console.info(
            f"  {one.name} from {_origin(one.url, settings)}; or {one.setting}=/a/folder in .env"
        )
        full = one if known else replace(one, sha256=_published(one, settings))
        try:
            archive = _fetched(full, settings, step)
        except SourceError as exc:
            raise SourceError(
                f"{one.name}: {exc.message}",
                hint=hints.text("compile.triton_mirror", setting=one.setting),
            ) from exc
        run_log.write(
            f"{archive.name} has sha256 {full.sha256}"
            if full.sha256
            else f"{archive.name}: sha256 {sha256(archive)}, of which no hash is published"
        )
        _unpack(full, archive)
        archive.unlink()
    _remove_other_tools(source, found)
    return (
        f"{len(found)} available" + (f", {len(missing)} of them fetched" if missing else "")
        if found
        else "none needed"
    )


def home_of(settings: Settings) -> Path:
    """Return TRITON_HOME of a build: the folder of the downloads of all clones."""
    named = settings.passed.get("TRITON_HOME")
    return Path(
        settings.shell.get("TRITON_HOME")
        or (named.text if named else "")
        or settings.cache / "triton"
    ).expanduser()


def _llvm(source: Source, root: Path, environment: Mapping[str, str]) -> Iterator[Download]:
    """Yield the LLVM of the commit that the tree names; older trees name no hash and no build
    number.
    """
    suffix = environment.get("TRITON_LLVM_SYSTEM_SUFFIX") or _system()
    if suffix is None:
        return
    info, plain = source.tree / "cmake" / "llvm-info.json", source.tree / "cmake" / "llvm-hash.txt"
    digest = None
    try:
        if info.is_file():
            named = records.decode(info.read_bytes(), dict[str, Any])
            name = f"llvm-{named['llvm_hash'][:8]}-{suffix}-{named['build_number']}"
            digest = named["sha256sum"][suffix]
        elif plain.is_file():
            name = f"llvm-{plain.read_text(encoding='ascii')[:8]}-{suffix}"
        else:
            return
    except (ValueError, KeyError, TypeError) as exc:
        raise BuildError(
            f"cmake/{info.name} of Triton does not name the LLVM for {suffix}: {exc}",
            hint=hints.text("compile.llvm_folder"),
        ) from exc
    yield Download(
        name, f"{_LLVM}/{name}.tar.gz", digest, root / "llvm", root / "llvm" / name, "LLVM_SYSPATH"
    )


def _json(source: Source, root: Path) -> Iterator[Download]:
    listed = source.tree / "cmake" / "json-version.txt"
    if listed.is_file():
        version = listed.read_text(encoding="ascii").strip()
        yield Download(
            f"json {version}",
            f"{_JSON}/{version}/include.zip",
            None,
            root / "json",
            root / "json",
            "JSON_SYSPATH",
        )


def _tools(source: Source, root: Path) -> Iterator[Download]:
    try:
        content = (source.tree / "cmake" / "nvidia-toolchain-version.json").read_bytes()
    except FileNotFoundError:
        return
    versions = records.decode(content, dict[str, str])
    platform_name = f"linux-{'sbsa' if platform.machine() == 'aarch64' else platform.machine()}"
    for folder, component, key, setting in _TOOLS:
        if key in versions:
            version = versions[key]
            # The runtime's headers were part of the compiler's archive until CUDA 13.
            own = (
                "cuda_nvcc"
                if component == "cuda_crt" and int(version.split(".")[0]) < 13
                else component
            )
            name = f"{own}-{platform_name}-{version}-archive"
            url = f"{_NVIDIA}/{own}/{platform_name}/{name}.tar.xz"
            yield Download(
                f"{key} {version}",
                url,
                None,
                root / "nvidia" / folder,
                root / "nvidia" / folder / name,
                setting,
            )


def _system() -> str | None:
    """Return the suffix of LLVM's name for this machine, as Triton's script chooses it; None if
    there is none.
    """
    arch = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine())
    with contextlib.suppress(OSError):
        if arch == "arm64" and 'ID="almalinux"' in Path("/etc/os-release").read_text(
            encoding="utf-8"
        ):
            return "almalinux-arm64"
    libc = tuple(int(part) for part in re.findall(r"\d+", platform.libc_ver()[1])[:2])
    return (
        None
        if arch is None
        else "almalinux-x64"
        if arch == "x64" and libc <= (2, 28)
        else f"ubuntu-{arch}"
    )


def _published(one: Download, settings: Settings) -> str | None:
    """Return the hash of a tool in NVIDIA's list of a release; None if no list that can be fetched
    names it.
    """
    archive = one.url.rpartition("/")[2]
    component, _, version = (
        archive.removesuffix("-archive.tar.xz").partition("-linux-")[0],
        "",
        one.name.rpartition(" ")[2],
    )
    release = ".".join(version.split(".")[:2])
    with tempfile.TemporaryDirectory(prefix="triton-lists-") as folder:
        for update in range(_MOST_UPDATES):
            listed = Path(folder) / f"redistrib_{release}.{update}.json"
            with contextlib.suppress(SourceError, ValueError, AttributeError, OSError):
                _fetch_file(f"{_NVIDIA}/{listed.name}", listed, None, settings, None)
                release_list = records.decode(listed.read_bytes(), dict[str, Any])
                platforms = release_list.get(component, {})
                for entry in platforms.values():
                    if isinstance(entry, dict) and str(entry.get("relative_path", "")).endswith(
                        archive
                    ):
                        return str(entry["sha256"])
    return None


def _fetched(one: Download, settings: Settings, step: Step) -> Path:
    archive = one.root.parent / "archives" / one.url.rpartition("/")[2]
    archive.parent.mkdir(parents=True, exist_ok=True)
    _fetch_file(one.url, archive, one.sha256, settings, step)
    return archive


def _fetch_file(
    url: str, target: Path, digest: str | None, settings: Settings, step: Step | None
) -> None:
    """Copy a file from a folder that replaces the network, or fetch it from the mirror or its own
    address.
    """
    place = _origin(url, settings)
    if not place.startswith(("http://", "https://")):
        file = Path(unquote(urlsplit(place).path) if place.startswith("file://") else place)
        flat = file.parents[len(urlsplit(url).path.strip("/").split("/"))] / file.name
        found = next((path for path in (file, flat) if path.is_file()), None)
        if found is None:
            raise SourceError(
                f"{file} does not exist",
                hint=hints.text("compile.mirror_folder", variable=MIRROR),
            )
        if digest is not None and sha256(found) != digest:
            raise SourceError(
                f"{found} has sha256 {sha256(found)}, but {digest} is expected: it is not used",
                hint=hints.text("compile.fetch_again", path=found),
            )
        shutil.copyfile(found, target)
        return

    def show(done: int, total: int | None) -> None:
        if step:
            step.progress(done / 1e6, total / 1e6 if total else None, f"MB of {target.name}")

    timeout_s = float(settings.count("CONNECT_TIMEOUT_S") or 5)
    download(
        place,
        target,
        expected_sha256=digest,
        timeout_s=max(timeout_s, TIMEOUT_S) if step else timeout_s,
        on_progress=show,
    )


def _origin(url: str, settings: Settings) -> str:
    mirror = settings.text(MIRROR)
    if not mirror:
        return url
    base = mirror if "://" in mirror else str(Path(mirror).expanduser())
    return f"{base.rstrip('/')}/{url.partition('://')[2]}"


def _unpack(one: Download, archive: Path) -> None:
    """Unpack into a scratch folder and rename, so that only complete folders reach their place; the
    note for Triton's script comes last.
    """
    one.root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=one.root.parent, prefix=".unpacking-"))
    try:
        unpack(archive, scratch)
        is_own = one.place == one.root
        if not is_own and not (scratch / one.place.name).is_dir():
            raise SourceError(
                f"{archive.name} holds no folder {one.place.name}",
                hint=hints.text("compile.other_archive", setting=one.setting),
            )
        shutil.rmtree(one.place, ignore_errors=True)
        os.replace(scratch if is_own else scratch / one.place.name, one.place)
        (one.place / "version.txt").write_text(one.url, encoding="utf-8")
    except SourceError as exc:
        exc.hint = hints.text("compile.delete_archive", path=archive)
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_other_tools(source: Source, found: tuple[Download, ...]) -> None:
    """Remove tools of other versions that an earlier build copied into the tree, ignored by git:
    Triton's script would fetch the right ones again.
    """
    folder = source.tree / "third_party" / "nvidia" / "backend" / "bin"
    names = {one.name.split(" ")[0] for one in found if one.setting.startswith("TRITON_")}
    for name in names & {"ptxas", "ptxas-blackwell", "cuobjdump", "nvdisasm"}:
        (folder / name).unlink(missing_ok=True)
