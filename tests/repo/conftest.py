"""A small upstream in real git, its release archive, and workspaces that pin it.

The user's git configuration is hostile in all tests.
"""

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.repo.shell import add_member, commit, export, sh_git, write
from tests.repo.two_releases import Index, TwoReleases, build, serve
from tests.repo.workspaces import HOSTILE, Workspace, write_config
from tests.small.materials import commit_superproject
from workspace.core import lock
from workspace.core.console import Console, RunLog
from workspace.core.errors import PatchConflict
from workspace.core.files import sha256
from workspace.core.paths import Layout
from workspace.repo import pins
from workspace.repo.pins import Archive, Pin

URL = "https://upstream.invalid/vllm.git"
LINES = "".join(f"line {number}\n" for number in range(1, 41))
# Modification time of the files in a copied checkout.
OLD_NS = 1_600_000_000_123_456_789
RESOLVED = LINES.replace("line 20\n", "line both\n")
PATCHED = LINES.replace("line 20\n", "line twenty\n")
MESSAGE = "[Bugfix] Größer: twenty in words\n\nWhy, in Füße.\n\nUpstream-Status: Pending"


@dataclass(frozen=True)
class Upstream:
    """Repositories of a small upstream.

    `bare` serves tag v1.0.0; `work` has branches: main (the tag), local (two patches), drift
    (another line 20).
    """

    work: Path
    bare: Path
    pin: Pin
    archive: Path
    patches: Mapping[str, bytes]


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Upstream:
    root = tmp_path_factory.mktemp("upstream")
    work, bare = root / "work", root / "vllm.git"
    work.mkdir()
    sh_git(work, "init", "--quiet", "--initial-branch=main")
    commit(work, "first", {"README": "one\n", "old.txt": "gone later\n"})
    (work / "old.txt").unlink()
    files: dict[str, str | bytes] = {
        "README": "two\n",
        ".gitignore": "*.so\n/build/\nignored.txt\n",
        "vllm/__init__.py": "",
        "vllm/lines.py": LINES,
        "csrc/a.cu": "a\n",
        "csrc/dos.h": b"dos\r\nlines\r\n",
        "csrc/größe.cu": "g\n",
        "ignored.txt": "tracked although ignored\n",
    }
    write(work, files)
    (work / "run.sh").write_text("#!/bin/sh\n")
    (work / "run.sh").chmod(0o755)
    (work / "link").symlink_to("vllm/lines.py")
    base = commit(work, "release", {})
    sh_git(work, "tag", "--annotate", "--message", "v1.0.0", "v1.0.0")
    sh_git(work, "switch", "--quiet", "--create", "local")
    commit(work, MESSAGE, {"vllm/lines.py": PATCHED})
    commit(
        work,
        "Add a file and fix a DOS one\n\nUpstream-Status: Pending",
        {"vllm/new.py": "new\n", "csrc/dos.h": b"dos\r\nfixed\r\n"},
    )
    names = sh_git(work, "log", "--reverse", "--format=%f", "main..local").split()
    series = {
        f"{name}.patch": export(work, f"local~{1 - index}") for index, name in enumerate(names)
    }
    sh_git(work, "switch", "--quiet", "--create", "drift", "main")
    commit(work, "twenty otherwise", {"vllm/lines.py": LINES.replace("line 20\n", "line XX\n")})
    sh_git(work, "switch", "--quiet", "main")
    sh_git(root, "clone", "--quiet", "--bare", str(work), str(bare))
    sh_git(bare, "config", "uploadpack.allowFilter", "true")
    sdist = root / "vllm-1.0.0.tar.gz"
    make_archive(sdist, work)
    pin = Pin("vllm", "v1.0.0", "1.0.0", base, URL, None, {})
    made = pins.build_archive(sdist, root / "probe", pin)
    return Upstream(
        work, bare, replace(pin, archive=Archive(sdist.name, sha256(sdist), *made)), sdist, series
    )


def make_archive(path: Path, work: Path) -> None:
    """Write an sdist as setuptools makes it: tracked files and generated files in one folder."""
    with tarfile.open(path, "w:gz") as tar:
        for name in sh_git(work, "ls-files", "-z").split("\0"):
            if name:
                tar.add(work / name, f"vllm-1.0.0/{name}")
        for name in ("PKG-INFO", "setup.cfg", "vllm.egg-info/PKG-INFO", "vllm/_version.py"):
            add_member(tar, f"vllm-1.0.0/{name}", b"generated\n")


@pytest.fixture(scope="session")
def upstream_url(upstream: Upstream) -> str:
    return f"file://{upstream.bare}"


@pytest.fixture(scope="session")
def hostile_home(tmp_path_factory: pytest.TempPathFactory, upstream: Upstream) -> Path:
    """Return the home of a user whose configuration would change or break nearly everything.

    It also maps URL to the local upstream.
    """
    home = tmp_path_factory.mktemp("home")
    hook = "#!/bin/sh\ntouch hook-ran; exit 1\n"
    hooks = (
        "applypatch-msg",
        "pre-applypatch",
        "post-applypatch",
        "pre-commit",
        "commit-msg",
        "post-checkout",
        "post-index-change",
        "reference-transaction",
    )
    write(
        home,
        {f"hooks/{name}": hook for name in hooks}
        | {f"template/hooks/{name}": hook for name in hooks},
    )
    for path in home.rglob("hooks/*"):
        path.chmod(0o755)
    write(home, {"attributes": "* text eol=crlf filter=broken\n", "ignore": "*.py\n"})
    settings = HOSTILE | {
        "core.hooksPath": str(home / "hooks"),
        "core.attributesFile": str(home / "attributes"),
        "core.excludesFile": str(home / "ignore"),
        "init.templateDir": str(home / "template"),
        f"url.file://{upstream.bare}.insteadOf": URL,
    }
    write_config(home / "config", settings)
    return home


@pytest.fixture(autouse=True)
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hostile_home: Path) -> Path:
    """Run every test as that user; return the configuration file, a copy for this test alone."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    config = tmp_path / "gitconfig"
    shutil.copy(hostile_home / "config", config)
    monkeypatch.setenv("HOME", str(hostile_home))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    return config


@pytest.fixture(autouse=True)
def _brief_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for the locks of another git as briefly as a test can: here none works beside it."""
    monkeypatch.setattr(lock, "QUIET_S", 0.1)
    monkeypatch.setattr(lock, "WAIT_S", 0.4)


@pytest.fixture(scope="session")
def superproject(tmp_path_factory: pytest.TempPathFactory, upstream: Upstream) -> Path:
    root = tmp_path_factory.mktemp("superproject")
    write(root, {".gitignore": "/.workspace/\n", "vendor/pins.toml": "pins\n"})
    commit_superproject(root, upstream.pin.commit, URL)
    return root


@pytest.fixture
def workspace(tmp_path: Path, upstream: Upstream, superproject: Path) -> Iterator[Workspace]:
    shutil.copytree(superproject, tmp_path / "clone")
    yield from opened(tmp_path, upstream)


def opened(
    folder: Path, upstream: Upstream, series: Mapping[str, bytes] | None = None
) -> Iterator[Workspace]:
    err = io.StringIO()
    assert upstream.pin.archive
    write(
        folder,
        {
            f"cache/files/{upstream.pin.archive.sha256}/{upstream.archive.name}": (
                upstream.archive.read_bytes()
            )
        },
    )
    layout = Layout(folder / "clone")
    with RunLog(Console(out=io.StringIO(), err=err), layout.logs, verb="test") as run_log:
        made = Workspace(
            layout, upstream.pin, run_log, err, {"WORKSPACE_CACHE_DIR": str(folder / "cache")}
        )
        made.series(series or upstream.patches)
        yield made


@pytest.fixture(scope="session")
def made(
    tmp_path_factory: pytest.TempPathFactory,
    upstream: Upstream,
    superproject: Path,
    conflicting: dict[str, bytes],
    hostile_home: Path,
) -> Path:
    """Return clones to copy: a checkout of each kind, with and without the stack, and `stopped`.

    `stopped` waits at a conflict.
    """
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GIT_CONFIG_GLOBAL", str(hostile_home / "config"))
        for kind in ("git", "release"):
            shutil.copytree(superproject, root / kind / "clone")
            for workspace in opened(root / kind, upstream):
                workspace.ensure(kind)
                _age(workspace.vllm)
            for workspace in copied(root / f"{kind}-applied", upstream, root / kind):
                workspace.apply()
        for workspace in copied(root / "stopped", upstream, root / "release"):
            workspace.series(conflicting)
            sh_git(workspace.vllm, "fetch", "--quiet", str(upstream.work), "drift")
            with pytest.raises(PatchConflict):
                workspace.apply(stop_at_conflict=True)
    return root


@pytest.fixture(params=["git", "release"])
def checked_out(
    request: pytest.FixtureRequest, tmp_path: Path, upstream: Upstream, made: Path
) -> Iterator[Workspace]:
    """A workspace with a checkout of either kind."""
    yield from copied(tmp_path, upstream, made / request.param)


@pytest.fixture(params=["git", "release"])
def either_applied(
    request: pytest.FixtureRequest, tmp_path: Path, upstream: Upstream, made: Path
) -> Iterator[Workspace]:
    """A workspace with a checkout of either kind and the stack applied."""
    yield from copied(tmp_path, upstream, made / f"{request.param}-applied")


@pytest.fixture
def release(tmp_path: Path, upstream: Upstream, made: Path) -> Iterator[Workspace]:
    yield from copied(tmp_path, upstream, made / "release")


@pytest.fixture
def applied(tmp_path: Path, upstream: Upstream, made: Path) -> Iterator[Workspace]:
    yield from copied(tmp_path, upstream, made / "release-applied")


@pytest.fixture
def stopped(
    tmp_path: Path, upstream: Upstream, made: Path, conflicting: dict[str, bytes]
) -> Iterator[Workspace]:
    """A stack that waits at the conflict of its second patch."""
    yield from copied(tmp_path, upstream, made / "stopped", series=conflicting)


def _age(folder: Path) -> None:
    """Give all files an old modification time."""
    for path in folder.rglob("*"):
        if ".git" not in path.relative_to(folder).parts and not path.is_symlink():
            os.utime(path, ns=(OLD_NS, OLD_NS))
    sh_git(folder, "update-index", "-q", "--refresh")


def copied(
    folder: Path, upstream: Upstream, original: Path, series: Mapping[str, bytes] | None = None
) -> Iterator[Workspace]:
    shutil.copytree(original / "clone", folder / "clone", symlinks=True)
    # The files of a copy have other inodes than the index records.
    sh_git(folder / "clone" / "vendor" / "vllm", "update-index", "-q", "--refresh", check=False)
    yield from opened(folder, upstream, series)


Snapshot = Callable[[Path], dict[str, tuple[int, int]]]


@pytest.fixture
def snapshot() -> Snapshot:
    """Return a function that lists every file with mtime and inode.

    Equal lists mean that nothing was touched.
    """

    def take(root: Path) -> dict[str, tuple[int, int]]:
        found = {}
        for path in [root, *root.rglob("*")]:
            status = path.lstat()
            found[str(path)] = (status.st_mtime_ns, status.st_ino)
        return found

    return take


@pytest.fixture(scope="session")
def conflicting(tmp_path_factory: pytest.TempPathFactory, upstream: Upstream) -> dict[str, bytes]:
    """Return a series of three patches; the second is for another line 20.

    It is merged where its original contents are available.
    """
    work = tmp_path_factory.mktemp("conflicting") / "work"
    sh_git(work.parent, "clone", "--quiet", str(upstream.work), str(work))
    sh_git(work, "checkout", "--quiet", "origin/drift")
    commit(
        work,
        "XX to YY\n\nUpstream-Status: Pending",
        {"vllm/lines.py": LINES.replace("line 20\n", "line YY\n")},
    )
    second = export(work, "HEAD")
    sh_git(work, "checkout", "--quiet", "v1.0.0")
    commit(work, "Last\n\nUpstream-Status: Pending", {"csrc/a.cu": "last\n"})
    first = list(upstream.patches.items())[1]
    return {first[0]: first[1], "XX-to-YY.patch": second, "Last.patch": export(work, "HEAD")}


@pytest.fixture
def mergeable(release: Workspace, upstream: Upstream, conflicting: dict[str, bytes]) -> Workspace:
    """A workspace with that series, whose checkout has the contents for the merge."""
    release.series(conflicting)
    sh_git(release.vllm, "fetch", "--quiet", str(upstream.work), "drift")
    return release


def resolve(workspace: Workspace, content: str = RESOLVED) -> None:
    write(workspace.vllm, {"vllm/lines.py": content})
    environ = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"}
    subprocess.run(
        "git -C vendor/vllm add vllm/lines.py",
        shell=True,
        cwd=workspace.layout.root,
        check=True,
        env=environ,
    )


@pytest.fixture(scope="session")
def two_releases(tmp_path_factory: pytest.TempPathFactory) -> TwoReleases:
    return build(tmp_path_factory.mktemp("releases"))


@pytest.fixture
def index(two_releases: TwoReleases, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """Serve a package index with both releases."""
    monkeypatch.setenv("no_proxy", "*")
    with serve(two_releases) as served:
        yield served
