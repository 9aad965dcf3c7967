"""An upstream of the small Triton, and a folder that stands for the network from which its build
downloads.
"""

import io
import json
import os
import platform
import shutil
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tests.small.materials import git
from tests.small.world import World

HERE = Path(__file__).parent
SYSTEMS = ("ubuntu-arm64", "ubuntu-x64")
# The pin of a small world before there is a Triton in it.
UNPINNED = "1" * 40


@dataclass(frozen=True)
class Upstream:
    """`pinned` compiles a right kernel; the branch `broken` gives a wrong one, `dead` does not
    compile.
    """

    tree: Path
    pinned: str
    network: Path


def make(world: World, folder: Path, *, layout: str = "root") -> Upstream:
    """Make the upstream below `folder`, and let pins, mirror and downloads of this world be its
    own.
    """
    tree, network = folder / "triton-upstream", folder / "network"
    shutil.copytree(HERE / "triton", tree, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "gitignore").rename(tree / ".gitignore")
    if layout == "python":
        for name in ("setup.py", "pyproject.toml"):
            (tree / name).rename(tree / "python" / name)
    output = json.loads((tree / "cmake" / "llvm-info.json").read_text())
    for system in SYSTEMS:
        _pack_llvm(network, output, system)
    _pack_others(network)
    git(tree, "init", "--quiet")
    for key in ("uploadpack.allowFilter", "uploadpack.allowAnySHA1InWant"):
        git(tree, "config", key, "true")
    git(tree, "add", "--all", "--force")
    git(tree, "commit", "--quiet", "-m", "Small Triton")
    pinned = git(tree, "rev-parse", "HEAD")
    for branch, source, old, new in (
        ("broken", "answer.c", "+ 2", "+ 1"),
        ("dead", "first.cpp", "return 1", "return nothing"),
    ):
        git(tree, "checkout", "--quiet", "-b", branch, pinned)
        path = tree / "src" / source
        path.write_text(path.read_text().replace(old, new))
        git(tree, "commit", "--quiet", "--all", "-m", branch)
    git(tree, "checkout", "--quiet", "main")
    series = world.layout.patches("triton") / "series"
    series.parent.mkdir(parents=True, exist_ok=True)
    series.write_text(f"# patches on Triton, in order\n# base: {pinned}\n")
    pins = world.layout.pins
    pins.write_text(
        pins.read_text()
        .replace(UNPINNED, pinned)
        .replace('"v3.7.1"', '"main"')
        .replace('version = "3.7.1"', 'version = "main"')
    )
    world.env |= {"TRITON_MIRROR": tree.as_uri(), "TRITON_DOWNLOADS_MIRROR": str(network)}
    return Upstream(tree, pinned, network)


def _pack_llvm(network: Path, output: dict[str, object], system: str) -> None:
    name = f"llvm-{str(output['llvm_hash'])[:8]}-{system}-{output['build_number']}"
    path = network / "oaitriton.blob.core.windows.net" / "public" / "llvm-builds" / f"{name}.tar.gz"
    _pack(path, {f"{name}/include/llvm/small.h": b"#define SMALL_LLVM 40\n"})


def _pack_others(network: Path) -> None:
    """NVIDIA's tools and the JSON library."""
    base, machine = (
        network / "developer.download.nvidia.com" / "compute" / "cuda" / "redist",
        platform.machine(),
    )
    system = f"linux-{'sbsa' if machine == 'aarch64' else machine}"
    for component, version, member in (
        ("cuda_nvcc", "12.9.86", "bin/ptxas"),
        ("cuda_nvcc", "13.3.33", "bin/ptxas"),
        ("cuda_crt", "13.1.80", "include/crt/host.h"),
    ):
        name = f"{component}-{system}-{version}-archive"
        place = base / component / system / f"{name}.tar.xz"
        _pack(place, {f"{name}/{member}": b"#!/bin/sh\n"})
    archive = (
        network
        / "github.com"
        / "nlohmann"
        / "json"
        / "releases"
        / "download"
        / "v3.11.3"
        / "include.zip"
    )
    archive.parent.mkdir(parents=True)
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("include/nlohmann/json.hpp", "// small\n")


def _pack(path: Path, members: dict[str, bytes]) -> None:
    """Write an archive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(
        path, "w:xz" if path.suffix == ".xz" else "w", format=tarfile.PAX_FORMAT
    ) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755
            archive.addfile(entry, io.BytesIO(content))


def builds(world: World) -> list[Path]:
    return sorted(world.layout.builds.glob("triton-*"))


def install_former(world: World, version: str = "3.7.1") -> None:
    """The wheel of the index in the place where another one is to come."""
    world.uv("install", "--no-deps", f"triton=={version}")
    assert os.path.isdir(world.layout.environment)
