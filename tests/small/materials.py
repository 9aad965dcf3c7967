"""What all worlds of a session share: the upstream repository, the release archive, wheels, the
patch, uv and its cache.
"""

import functools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.small import index, wheels
from tests.small.processes import Warm

ROOT = Path(__file__).resolve().parents[2]
VERSION = "0.31.0"
TAG = f"v{VERSION}"
# In the archive and not in the checkout, as the design has it.
PACKAGED = ("PKG-INFO", "setup.cfg", "vllm.egg-info", "vllm/_version.py")
PATCH_MESSAGE = """Take the AVX2 and AVX-512 kernels out of a wheel

Without them a processor that lacks bfloat16 has no kernels.

Upstream-Status: Pending
"""


def _identity(name: str, email: str, date: str) -> dict[str, str]:
    return {
        f"GIT_{role}_{what}": text
        for role in ("AUTHOR", "COMMITTER")
        for what, text in (("NAME", name), ("EMAIL", email), ("DATE", date))
    }


UPSTREAM = _identity("Upstream", "upstream@invalid", "2026-01-01T00:00:00Z")
# Published pins name this commit: another identity or date would make every clone's checkout
# another one.
ARCHIVE_COMMIT = _identity("vLLM workspace", "workspace@invalid", "2000-01-01T00:00:00+0000")


@dataclass(frozen=True)
class Materials:
    """`commit` is what is pinned and tagged; upstream's main is one commit further."""

    folder: Path
    bin: Path
    upstream: Path
    commit: str
    archive: Path
    archive_commit: str
    archive_tree: str
    patch: Path
    index: index.Index
    warm: Warm

    @property
    def template(self) -> Path:
        """The clone that all others are copies of."""
        return self.warm.root

    @property
    def wheels(self) -> Path:
        return self.folder / "wheels"

    def precompiled_wheel(self, project: str, machine: str | None = None) -> Path:
        platform = f"manylinux_2_28_{machine or wheels.this_machine()}"
        name = f"{project.replace('-', '_')}-{VERSION}-cp38-abi3-{platform}.whl"
        return self.wheels / name


def prepare(folder: Path) -> Path:
    """Build everything that needs no server; returns the folder that the index serves."""
    served = folder / "wheels"
    wheels.write_all(served)
    tree = folder / "upstream"
    wheels.copy_tree(tree)
    wheels.write_archive(served, tree, VERSION)
    _link_programs(folder / "bin")
    return served


def gather(folder: Path, served: index.Index) -> Materials:
    """Put the upstream under git, and work out what the pins and the series must say."""
    tree = folder / "upstream"
    commit = _history(tree)
    patch = _patch(tree, folder / "patches", commit)
    archive = folder / "wheels" / f"vllm-{VERSION}.tar.gz"
    return Materials(
        folder,
        folder / "bin",
        tree,
        commit,
        archive,
        *_archive_checkout(archive, folder / "archive"),
        patch,
        served,
        Warm(folder / "template", folder),
    )


def git(folder: Path, *args: str, env: dict[str, str] | None = None) -> str:
    """Run git for the test itself, with no other configuration than the one here."""
    base = {
        "PATH": os.environ["PATH"],
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_CONFIG_NOSYSTEM": "1",
        "HOME": "/nonexistent",
    }
    argv = ["git", "-c", "init.defaultBranch=main", "-c", "protocol.file.allow=always", *args]
    done = subprocess.run(
        argv,
        cwd=folder,
        env=base | UPSTREAM | (env or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"git {' '.join(args)}: {done.stderr}")
    return done.stdout.strip()


def commit_superproject(root: Path, commit: str, url: str) -> None:
    """Commit the files of a folder as a clone without --recurse-submodules leaves a workspace: a
    gitlink to a commit in the index, an empty folder in its place.
    """
    (root / ".gitmodules").write_text(
        f'[submodule "vendor/vllm"]\n\tpath = vendor/vllm\n\turl = {url}\n'
    )
    (root / "vendor" / "vllm").mkdir(parents=True)
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "update-index", "--add", "--cacheinfo", f"160000,{commit},vendor/vllm")
    git(root, "commit", "--quiet", "-m", "The workspace")


@functools.cache
def find_uv() -> Path:
    """The uv that this interpreter's environment or PATH has; the small world runs nothing else in
    its place.
    """
    beside = Path(sys.executable).parent / "uv"
    found = (
        beside
        if beside.exists()
        else shutil.which("uv") or ROOT / ".workspace" / "uv" / "bin" / "uv"
    )
    if not Path(found).exists():
        raise RuntimeError("the small world needs uv: ./scripts/nox installs one")
    return Path(found).resolve()


def _link_programs(folder: Path) -> None:
    """A PATH of its own, so that shims and wrappers of this machine are not asked."""
    folder.mkdir()
    base = Path(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))
    # A CMake of the distribution may be older than what the trees demand; the tool environment's is
    # not.
    beside = {name: Path(sys.executable).parent / name for name in ("cmake", "ninja")}
    for name, target in {
        "uv": find_uv(),
        f"python{sys.version_info[0]}.{sys.version_info[1]}": base,
        "python3": base,
        **beside,
    }.items():
        (folder / name).symlink_to(target)


def _history(tree: Path) -> str:
    """One commit before the tagged one and one after it, so that the pin is neither the root nor
    the tip.
    """
    git(tree, "init", "--quiet")
    setup = (tree / "setup.py").read_text()
    (tree / "setup.py").write_text("# older\n" + setup)
    # By force: as in the real tree, .gitignore names build/, and requirements/build is tracked all
    # the same.
    git(tree, "add", "--all", "--force")
    git(tree, "commit", "--quiet", "-m", "An older release")
    git(tree, "tag", "v0.30.0")
    (tree / "setup.py").write_text(setup)
    git(tree, "commit", "--quiet", "--all", "-m", "The release")
    git(tree, "tag", "-a", TAG, "-m", TAG)
    commit = git(tree, "rev-parse", "HEAD")
    (tree / "later.txt").write_text("after the release\n")
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "-m", "After the release")
    for key in ("uploadpack.allowFilter", "uploadpack.allowAnySHA1InWant"):
        git(tree, "config", key, "true")
    return commit


def _patch(tree: Path, folder: Path, commit: str) -> Path:
    """The shipped patch in small: the same lines missing, the same lines added."""
    work = folder / "work"
    folder.mkdir()
    git(folder, "clone", "--quiet", str(tree), str(work))
    git(work, "checkout", "--quiet", commit)
    setup = work / "setup.py"
    line = '                        "vllm/_C.abi3.so",\n'
    text = setup.read_text()
    assert text.count(line) == 1
    setup.write_text(
        text.replace(line, line + line.replace("_C", "_C_AVX2") + line.replace("_C", "_C_AVX512"))
    )
    git(work, "commit", "--quiet", "--all", "-m", PATCH_MESSAGE)
    slug = git(work, "log", "-1", "--format=%f")
    made = folder / f"{slug}.patch"
    made.write_text(
        git(
            work,
            "format-patch",
            "--stdout",
            "--zero-commit",
            "--full-index",
            "--no-signature",
            "--keep-subject",
            "-1",
        )
        + "\n"
    )
    shutil.rmtree(work)
    return made


def _archive_checkout(archive: Path, folder: Path) -> tuple[str, str]:
    """Commit and tree that a checkout made from the archive must have, found without the
    workspace's own code.
    """
    folder.mkdir()
    # Python 3.11.2, which Debian 12 has, lacks tarfile's filters.
    subprocess.run(["tar", "-xzf", archive, "--no-same-owner", "-C", folder], check=True)
    tree = folder / f"vllm-{VERSION}"
    for name in PACKAGED:
        path = tree / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    git(tree, "init", "--quiet")
    git(tree, "add", "--all", "--force")
    oid = git(tree, "write-tree")
    commit = git(
        tree,
        "commit-tree",
        "-m",
        f"vllm {VERSION}, as in its release archive {archive.name}",
        oid,
        env=ARCHIVE_COMMIT,
    )
    return commit, oid
