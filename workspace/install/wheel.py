"""inv wheel: pack a verified build, with the package files of the tree, as a wheel.

It installs as any wheel does and provides its libraries to another clone or a second Spark
(`--kernels PATH`); `workspace.json` in it records their inputs. The same build gives the same bytes
everywhere: the wheel contains no times and no paths of this machine.
"""

import base64
import hashlib
import os
import platform
import re
import stat
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from workspace.compile import device_code, project
from workspace.compile.cmake_inputs import Inputs
from workspace.core import files, hints, lock, records
from workspace.core.console import Console, Step
from workspace.core.errors import BuildError
from workspace.core.files import CHUNK_BYTES, sha256
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import plan, stamp
from workspace.install.stamp import RECORD, Packed
from workspace.machine import interpreter
from workspace.repo import pins
from workspace.repo.git import Git, command, worktree

# FA4's Python files: with the user's folder of sources CMake links to them (vllm_flash_attn.cmake),
# else it copies them with other imports.
_LINKED = "vllm/vllm_flash_attn/cute"
_IMPORTS = (b"flash_attn.cute", b"vllm.vllm_flash_attn.cute")
# Ignored files that a build writes into the package; the others come from editors and runs.
_BUILT = re.compile(
    r"vllm/(_version\.py|vllm-rs|vllm_flash_attn/.+|third_party/.+|.+\.so(\.\d+)*)$"
)
# The installed metadata that goes into the wheel; the rest is specific to this machine.
_METADATA = re.compile(r"(METADATA|entry_points\.txt|top_level\.txt|licenses/.+)$")
_FOR_PYTHON = re.compile(r"(.+)\.cpython-3(\d+)[a-z]*-.+\.so$")
# The earliest time that zip can store.
_WHEN = (1980, 1, 1, 0, 0, 0)
_OWN_INPUTS = ("place", "interpreter")


@dataclass(frozen=True)
class Written:
    """A packed wheel: path, bytes, SHA-256."""

    path: Path
    size: int
    sha256: str


def run(layout: Layout, settings: Settings, *, console: Console, wait: bool = False) -> None:
    """Pack the verified build into dist/, and print its SHA-256 and path as sha256sum does."""
    pins.require_settled(layout)
    with lock.hold(layout.lock, verb="inv wheel", wait=wait, on_wait=console.info):
        observed = plan.observe(layout, settings)
        with console.step("wheel") as view:
            packed = pack(layout, observed, layout.root / "dist", step=view)
            view.reason = f"{packed.path.name}, {packed.size / 1e6:.1f} MB"
    console.data(f"{packed.sha256}  {layout.relative(packed.path)}")
    if ".dirty" in packed.path.name:
        console.warn("vendor/vllm has uncommitted edits: the name of the wheel has their digest")
    console.hint(hints.text("install.use_wheel", wheel=packed.path))


def pack(
    layout: Layout,
    observed: plan.Observation,
    folder: Path,
    *,
    step: Step | None = None,
) -> Written:
    """Pack the verified build into `folder` and replace a wheel of the same name.

    The caller holds the workspace's lock. Raises BuildError where the build is not verified or has
    changed since, ToolchainError where `folder` cannot be written.
    """
    recorded = _verified(observed)
    git = Git(layout.vllm)
    packed = _describe(layout, git, observed, recorded)
    members = _members(layout, git, observed, packed)
    known = {library.path: library.sha256 for library in recorded.libraries}
    if strange := sorted(name for name in members if name.endswith(".so") and name not in known):
        raise BuildError(
            f"{strange[0]} is not part of the verified build", hint=hints.text("inv.rebuild")
        )
    tag = f"cp{packed.python.replace('.', '')}" if packed.python else "cp38"
    name = (
        f"vllm-{packed.version}-{tag}-{tag if packed.python else 'abi3'}-linux_{packed.machine}.whl"
    )
    members[f"vllm-{packed.version}.dist-info/WHEEL"] = _wheel_file(name)
    with files.folder_beside(folder / name) as scratch:
        for path, found in _write(
            scratch / name, members, f"vllm-{packed.version}.dist-info/RECORD", step
        ):
            if known.get(path, found) != found:
                raise BuildError(
                    f"{path} changed since the build was verified", hint=hints.text("inv.bootstrap")
                )
        (scratch / name).replace(folder / name)
    return Written(folder / name, (folder / name).stat().st_size, sha256(folder / name))


def fits(
    packed: Packed, inputs: Inputs, digest: str, *, python: str, capabilities: tuple[str, ...] = ()
) -> str | None:
    """Return why the libraries of a wheel differ from a build with these inputs, or None.

    `digest` is that of the tree's compiled sources, `python` the environment's version as in 3.12,
    `capabilities` are those of this machine's GPUs.
    """
    pin = f"{packed.tag} {packed.commit[:12]}"
    compared = (
        ("pin", pin, inputs.pin),
        ("device", packed.device, inputs.device),
        ("machine", packed.machine, platform.machine()),
        ("torch", packed.torch, inputs.torch),
        ("Python", packed.python or python, python),
    )
    for name, theirs, ours in compared:
        if theirs != ours:
            return f"it was built for {name} {theirs}, here it is {ours}"
    if packed.digest != digest:
        return (
            "it was compiled from other sources than this tree's"
            f" ({', '.join(plan.COMPILED_SOURCES)}): those of tree {packed.tree[:12]}"
            + (" with edits" if packed.dirty else "")
        )
    if packed.device == "cuda":
        found = [device_code.Cubins(name, archs) for name, archs in packed.cubins.items()]
        for judgement in device_code.judge(found, capabilities=capabilities, archs=inputs.archs):
            if judgement.state == "wrong":
                return f"{judgement.library} {judgement.sentence}"
    return None


def _verified(observed: plan.Observation) -> stamp.Stamp:
    for layer in (observed.kernels, observed.install):
        if layer.state != "ok" or layer.recorded is None:
            verb = "rebuild" if observed.needs_compilation else "bootstrap"
            raise BuildError(
                f"there is no verified build to pack: {layer.name} {layer.state}: {layer.why}",
                hint=hints.text("install.verb", verb=verb),
            )
        recorded = layer.recorded
    return recorded


def _describe(
    layout: Layout, git: Git, observed: plan.Observation, recorded: stamp.Stamp
) -> Packed:
    tree, paths = git.tree("HEAD"), ("vllm", *plan.COMPILED_SOURCES)
    now = git.entries(paths, None)
    dirty = command.digest(now)[:8] if now != git.entries(paths, "HEAD") else ""
    libraries = [layout.vllm / library.path for library in recorded.libraries]
    held = device_code.list_cubins(layout, libraries) if observed.device == "cuda" else ()
    return Packed(
        version=f"{observed.version}.t{tree[:12]}" + (f".dirty{dirty}" if dirty else ""),
        tag=observed.pin.tag,
        commit=observed.pin.commit,
        tree=tree,
        dirty=dirty,
        device=observed.device,
        machine=platform.machine(),
        python=_python(recorded),
        torch=recorded.inputs["torch"].partition(" CUDA ")[0],
        digest=git.digest(plan.COMPILED_SOURCES),
        inputs=_inputs(recorded),
        libraries=recorded.libraries,
        cubins={library.library: library.archs for library in held},
    )


def _inputs(recorded: stamp.Stamp) -> dict[str, str]:
    """Return the inputs of the build that are not specific to this machine, all as text."""
    source = asdict(recorded.kernels) if recorded.kernels else {}
    return {name: text for name, text in recorded.inputs.items() if name not in _OWN_INPUTS} | {
        f"kernels {name}": text for name, text in source.items() if text
    }


def _python(recorded: stamp.Stamp) -> str:
    """Return the only Python version of a library, empty where each exists for several versions.

    Releases contain DeepGEMM for each Python version, a local build for one.
    """
    versions: dict[str, set[str]] = {}
    for library in recorded.libraries:
        if found := _FOR_PYTHON.match(library.path):
            versions.setdefault(found[1], set()).add(f"3.{found[2]}")
    return next((next(iter(found)) for found in versions.values() if len(found) == 1), "")


# A member of the wheel: a file of this machine, or bytes.
_Member = Path | bytes


def _members(
    layout: Layout, git: Git, observed: plan.Observation, packed: Packed
) -> dict[str, _Member]:
    """Map the names in the wheel to the files of the package in the tree, and to the metadata."""
    return (
        _package(layout, git)
        | _metadata(layout, observed, packed)
        | {
            "vllm/_version.py": _renamed(
                (layout.vllm / project.PACKAGE / "_version.py").read_text(encoding="utf-8"),
                observed.version,
                packed.version,
            ).encode()
        }
    )


def _package(layout: Layout, git: Git) -> dict[str, _Member]:
    """Map names to the tracked files of the package and those that a build writes."""
    built = [name for name in worktree.products(git, project.PACKAGE) if _BUILT.match(name)]
    members: dict[str, _Member] = {}
    for name in (*git.entries((project.PACKAGE,), None), *built):
        path = layout.vllm / name
        if path.is_file():
            members[name] = path
        elif name == _LINKED and path.is_dir():
            files = {file: file.relative_to(path) for file in path.rglob("*.py")}
            members |= {
                f"{name}/{below}": file.read_bytes().replace(*_IMPORTS)
                for file, below in files.items()
            }
    return members


def _metadata(layout: Layout, observed: plan.Observation, packed: Packed) -> dict[str, _Member]:
    """Map names to the installed metadata, with the version of the wheel, and workspace.json."""
    name = f"vllm-{observed.version}.dist-info"
    folders = (folder / name for folder in interpreter.site_packages(layout))
    installed = next((folder for folder in folders if folder.is_dir()), None)
    if installed is None:
        raise BuildError(f"{name} is not in .vllm", hint=hints.text("inv.bootstrap"))
    info = f"vllm-{packed.version}.dist-info"
    members: dict[str, _Member] = {
        f"{info}/{below}": path
        for path in installed.rglob("*")
        if path.is_file() and _METADATA.match(below := str(path.relative_to(installed)))
    }
    metadata = (installed / "METADATA").read_bytes()
    members[f"{info}/METADATA"] = metadata.replace(
        f"\nVersion: {observed.version}\n".encode(), f"\nVersion: {packed.version}\n".encode(), 1
    )
    members[f"{info}/{RECORD}"] = records.encode(packed)
    return members


def _renamed(text: str, old: str, new: str) -> str:
    """Return setuptools-scm's _version.py for a version that differs only in the local label."""
    return text.replace(f"'{old}'", f"'{new}'").replace(
        f"'{old.partition('+')[2]}')", f"'{new.partition('+')[2]}')"
    )


def _wheel_file(name: str) -> bytes:
    tag = "-".join(PurePosixPath(name).stem.split("-")[2:])
    lines = (
        "Wheel-Version: 1.0",
        "Generator: vllm-workspace",
        "Root-Is-Purelib: false",
        f"Tag: {tag}",
    )
    return "".join(f"{line}\n" for line in lines).encode()


def _write(
    path: Path, members: Mapping[str, _Member], record: str, step: Step | None
) -> Iterator[tuple[str, str]]:
    """Write the sorted members, then metadata (PEP 427) and RECORD; yield names and SHA-256 hashes.

    Each name is yielded once its member is written.
    """
    lines, done = [], 0
    total = sum(
        len(member) if isinstance(member, bytes) else member.stat().st_size
        for member in members.values()
    )
    with path.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in sorted(members, key=lambda name: (".dist-info/" in name, name)):
                size, digest = _add(archive, name, members[name])
                encoded = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
                lines.append(f"{_quoted(name)},sha256={encoded},{size}\n")
                done += size
                if step:
                    step.progress(done / 1e6, total / 1e6, "MB")
                yield name, digest.hex()
            _add(archive, record, ("".join(lines) + f"{record},,\n").encode())
        file.flush()
        os.fsync(file.fileno())


def _add(archive: zipfile.ZipFile, name: str, member: _Member) -> tuple[int, bytes]:
    """Add one member and return its bytes and SHA-256."""
    item = zipfile.ZipInfo(name, _WHEN)
    item.compress_type = zipfile.ZIP_DEFLATED
    is_program = name.endswith(".so") or (
        isinstance(member, Path) and bool(member.stat().st_mode & 0o111)
    )
    item.external_attr = (stat.S_IFREG | (0o755 if is_program else 0o644)) << 16
    digest = hashlib.sha256()
    if isinstance(member, bytes):
        archive.writestr(item, member)
        digest.update(member)
        return len(member), digest.digest()
    size = item.file_size = member.stat().st_size
    with member.open("rb") as source, archive.open(item, "w") as target:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
            target.write(chunk)
    return size, digest.digest()


def _quoted(name: str) -> str:
    """Quote a name for RECORD, which is comma-separated (PEP 376)."""
    return '"' + name.replace('"', '""') + '"' if "," in name or '"' in name else name
