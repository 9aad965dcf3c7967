"""The editable install of the tree, with compiled libraries from a wheel or with none.

It uses the tree's own setup.py, without build isolation and without dependency resolution: torch
does not change. What setup.py took of a wheel (VLLM_USE_PRECOMPILED) is compared with the wheel.
"""

import filecmp
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from workspace.core import hints
from workspace.core.console import RunLog
from workspace.core.errors import BuildError, SourceError
from workspace.core.files import check_zip, read_regular, write_atomic
from workspace.core.paths import Layout
from workspace.install.plan import Observation
from workspace.machine import interpreter
from workspace.repo.git import Git, worktree

# No program of this name exists: setuptools-rust then reports the optional frontend as not built,
# at once and without a network.
_NO_CARGO = "/nonexistent/cargo"
# The programs of the package that are compiled; a wheel has them beside the libraries.
_BINARIES = ("vllm/vllm-rs",)
_NINJA_PROGRESS = re.compile(r"^\[(\d+)/(\d+)\]")


def install_with_wheel(observed: Observation, wheel: Path, *, run_log: RunLog) -> None:
    """Install editable with the libraries of `wheel`. Raises BuildError with the first error."""
    extra = {
        "VLLM_USE_PRECOMPILED": "1",
        "VLLM_PRECOMPILED_WHEEL_LOCATION": str(wheel),
        "CARGO": _NO_CARGO,
    }
    _install(observed, extra, run_log=run_log)


def install_alone(observed: Observation, *, build: Mapping[str, str], run_log: RunLog) -> None:
    """Install editable without libraries, which the caller compiles and installs afterwards.

    `build` are variables that limit cargo. The tree's setup.py compiles in a new temporary folder
    each time unless it gets a wheel; so it gets an empty one.
    """
    path = observed.machine.settings.child_environment("build").get("PATH", "")
    # The frontend in Rust is optional: setuptools-rust leaves it out where there is no cargo.
    cargo = {} if shutil.which("cargo", path=path) else {"CARGO": _NO_CARGO}
    with tempfile.TemporaryDirectory(prefix="vllm-workspace-") as folder:
        wheel = Path(folder) / f"vllm-{observed.pin.version}-py3-none-any.whl"
        zipfile.ZipFile(wheel, "w").close()
        extra = {
            "VLLM_USE_PRECOMPILED": "1",
            "VLLM_PRECOMPILED_WHEEL_LOCATION": str(wheel),
            **build,
            **cargo,
        }
        _install(observed, extra, run_log=run_log)


def install_built(observed: Observation, *, run_log: RunLog) -> None:
    """Install editable a tree that has its libraries. Raises BuildError with the first error."""
    install_alone(observed, build={"CARGO": _NO_CARGO}, run_log=run_log)


def _install(observed: Observation, extra: Mapping[str, str], *, run_log: RunLog) -> None:
    layout, settings = observed.machine.layout, observed.machine.settings
    environment = {
        "VLLM_TARGET_DEVICE": observed.device,
        "VLLM_VERSION_OVERRIDE": observed.version,
        **extra,
    }
    # uv's cache of editable builds ignores these variables: always build again.
    arguments = [
        *("--no-build-isolation", "--no-deps", "--verbose"),
        *("--reinstall-package", "vllm", "--refresh-package", "vllm"),
        *("--editable", str(layout.vllm)),
    ]

    def show(line: str) -> None:
        found = _NINJA_PROGRESS.match(line.strip().removeprefix("DEBUG ").strip())
        if found and run_log.step:
            run_log.step.progress(int(found[1]), int(found[2]), f"{found[1]} of {found[2]} steps")

    interpreter.install(
        layout,
        settings,
        arguments,
        run_log=run_log,
        phase_env=environment,
        on_line=show,
        failure=BuildError,
    )


def compiled_members(wheel: Path) -> dict[str, tuple[int, int]]:
    """Map each compiled file of the wheel to its bytes and CRC-32.

    Raises SourceError for a file that is not a wheel of vLLM.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            # The tree's setup.py writes members where their names lead.
            check_zip(archive)
            members = {
                item.filename: (item.file_size, item.CRC)
                for item in archive.infolist()
                if item.filename.startswith("vllm/")
            }
    except (zipfile.BadZipFile, ValueError, OSError) as exc:
        raise SourceError(
            f"{wheel.name} cannot be used as a wheel: {exc}",
            hint=hints.text("install.precompiled"),
        ) from exc
    compiled = {
        name: fact for name, fact in members.items() if name.endswith(".so") or name in _BINARIES
    }
    if not compiled:
        raise SourceError(
            f"{wheel.name} holds no compiled library of vLLM",
            hint=hints.text("install.precompiled"),
        )
    return compiled


def complete(wheel: Path, tree: Path) -> None:
    """Extract the compiled files that the tree's setup.py left in the wheel.

    The setup.py of a release without the fix in patches/vllm leaves some.
    """
    left = [
        name
        for name, (size, crc) in compiled_members(wheel).items()
        if not _has_content(tree / name, size, crc)
    ]
    with zipfile.ZipFile(wheel) as archive:
        for name in left:
            folder = (tree / name).parent
            if not folder.resolve().is_relative_to(tree.resolve()):
                raise SourceError(
                    f"{folder} is a link to a folder outside of {tree}: {wheel.name} was not used",
                    hint=hints.text("core.list_folder", folder=folder),
                )
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(tree / name, archive.read(name), mode=0o755)


def check_taken(wheel: Path, tree: Path) -> None:
    """Compare every library in the tree with the wheel, by size and CRC-32.

    Raises BuildError with the names of the libraries that differ or are missing.
    """
    wrong = [
        name
        for name, (size, crc) in compiled_members(wheel).items()
        if not _has_content(tree / name, size, crc)
    ]
    if wrong:
        raise BuildError(
            f"the tree's setup.py did not take {', '.join(wrong)} out of {wheel.name}",
            hint=hints.text("install.members_lack"),
        )


def _has_content(path: Path, size: int, crc: int) -> bool:
    try:
        if path.stat().st_size != size:
            return False
        found = 0
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                found = zlib.crc32(chunk, found)
    except OSError:
        return False
    return found == crc


def build_products(tree: Path) -> tuple[str, ...]:
    """Return the paths of the build products below a tree.

    Files that general rules ignore, such as logs and editor files, belong to the user.
    """
    ignore = tree / ".gitignore"
    text = read_regular(ignore).decode(errors="replace") if ignore.exists() else ""
    lines = (line.strip().removeprefix("/") for line in text.splitlines())
    named = [line.removesuffix("*").removesuffix("/") for line in lines if line.startswith("vllm/")]
    patterns = ("*.so", "vllm.egg-info/*", *named, *(f"{name}/*" for name in named))
    return tuple(
        path
        for path in worktree.products(Git(tree), "vllm", "vllm.egg-info")
        if any(fnmatchcase(path, pattern) for pattern in patterns)
    )


def take_products_away(
    layout: Layout, paths: Collection[str], *, ours: Collection[str], kept: Path | None, left: Path
) -> None:
    """Remove products from vendor/vllm: delete `ours` and copies of files in `kept`, move others.

    The others go to the folder `left`.
    """
    for path in paths:
        file = layout.vllm / path
        if not os.path.lexists(file):
            continue
        if path in ours or (kept and _is_same(file, kept / path)):
            file.unlink()
        else:
            (left / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, left / path)
        _clear(file.parent, top=layout.vllm)


def _is_same(file: Path, other: Path) -> bool:
    if file.is_symlink() or other.is_symlink():
        return file.is_symlink() and other.is_symlink() and os.readlink(file) == os.readlink(other)
    return other.is_file() and filecmp.cmp(file, other, shallow=False)


def _clear(folder: Path, *, top: Path) -> None:
    """Remove folders that hold only bytecode: Python would import them as empty packages."""
    while folder != top and {entry.name for entry in folder.iterdir()} <= {"__pycache__"}:
        shutil.rmtree(folder)
        folder = folder.parent
