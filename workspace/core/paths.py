"""Every path of the workspace, defined here and nowhere else; and who can change a path."""

import os
import pwd
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PROJECTS = ("vllm", "triton")


@dataclass(frozen=True)
class Layout:
    """The paths below one clone of the workspace."""

    root: Path

    @property
    def vllm(self) -> Path:
        return self.root / "vendor" / "vllm"

    @property
    def triton(self) -> Path:
        return self.root / "vendor" / "triton"

    @property
    def pins(self) -> Path:
        return self.root / "vendor" / "pins.toml"

    def patches(self, project: str) -> Path:
        return self.root / "patches" / project

    def upstream(self, project: str) -> Path:
        """Bare repository of the workspace in which other releases than the pin are examined."""
        return self.state / "upstream" / f"{project}.git"

    def moving(self, project: str) -> Path:
        """Marker that exists while a checkout moves between commits, or after an interrupted
        move.
        """
        return self.state / "moving" / f"{project}.json"

    @property
    def bump_sandbox(self) -> Path:
        """Sandbox with its own tree and environment, in which a pin is moved first."""
        return self.state / "bump"

    @property
    def sandboxes(self) -> Path:
        """Sandboxes of an A/B or a bisect, one folder each; see install/sandbox.py."""
        return self.state / "sandboxes"

    @property
    def promoting(self) -> Path:
        """Redo log of the promotion of a bump; exists while one runs or was interrupted."""
        return self.bump_sandbox / "promoting.json"

    @property
    def bump_message(self) -> Path:
        """The prepared commit message of the last move of a pin."""
        return self.state / "bump-message.txt"

    @property
    def returning(self) -> Path:
        """Redo log of a rollback; exists while one runs or was interrupted."""
        return self.state / "back.json"

    @property
    def known_good_states(self) -> Path:
        """Known-good states for `inv pin.rollback`, one folder each."""
        return self.state / "good"

    @property
    def dotenv(self) -> Path:
        return self.root / ".env"

    @property
    def environment(self) -> Path:
        """The built environment, a virtual environment."""
        return self.root / ".vllm"

    @property
    def environment_python(self) -> Path:
        return self.environment / "bin" / "python"

    def stamp(self, name: str) -> Path:
        """Stamp of a layer, inside the environment it describes, so that both vanish together."""
        return self.environment / ".workspace" / f"{name}.json"

    @property
    def bytecode(self) -> Path:
        """Bytecode of the built interpreter, inside the environment: both vanish together."""
        return self.environment / ".workspace" / "bytecode"

    @property
    def probes(self) -> Path:
        return self.root / "workspace" / "probes"

    @property
    def state(self) -> Path:
        return self.root / ".workspace"

    @property
    def tools(self) -> Path:
        """The environment of `inv` and `nox` themselves."""
        return self.state / "tools"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def builds(self) -> Path:
        """Build directories, one for each set of inputs; see compile/cmake_inputs.py."""
        return self.state / "build"

    @property
    def compile_commands(self) -> Path:
        """Link to the compilation database of the last configured build, for clangd.

        clangd looks in every folder above a source. Here it finds the link, and git in vendor/vllm
        does not.
        """
        return self.root / "vendor" / "compile_commands.json"

    @property
    def jit(self) -> Path:
        """Kernels compiled at run time, one folder for each stack; see machine/jit_caches.py."""
        return self.state / "jit"

    @property
    def quarantine(self) -> Path:
        """Folders that were in the way and may hold work, below the time of their move."""
        return self.state / "quarantine"

    @property
    def bundles(self) -> Path:
        """What `inv bootstrap --from` made of bundles: index pages, and copies of own kernels."""
        return self.state / "bundles"

    @property
    def lock(self) -> Path:
        return self.state / "lock"

    @property
    def models(self) -> Path:
        return self.state / "models"

    @property
    def encodings(self) -> Path:
        """tiktoken vocabularies, where the pinned tree needs them as files."""
        return self.state / "encodings"

    @property
    def server(self) -> Path:
        """State and logs of the server that `inv serve` started; see server/lifecycle.py."""
        return self.state / "server"

    @property
    def servers(self) -> Path:
        """The same of each server with a name of its own, below that name."""
        return self.state / "servers"

    @property
    def smoke_record(self) -> Path:
        return self.state / "smoke.json"

    @property
    def results(self) -> Path:
        """Benchmark records, one folder for each machine."""
        return self.root / "results"

    def relative(self, path: Path) -> str:
        """Return the path as typed in the root of the clone."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)


def typed(text: str, folder: Path | None = None) -> Path:
    """Return the absolute path that a user means: `~` is the home folder, and a relative path
    counts from `folder`, by default the folder in which the command was typed.

    That is the working folder: scripts/inv leaves it alone, and noxfile.py starts the sessions
    there. Links and `..` stay as they are.
    """
    return (folder or Path.cwd()) / os.path.expanduser(text)


def here() -> Layout:
    """Return the layout of the clone that holds this package."""
    return Layout(Path(__file__).resolve().parents[2])


def user_name(uid: int) -> str:
    """Return the name of a user, or the number as sudo takes it where the system has no name."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"


def open_place(path: Path) -> Path | None:
    """Return where others can change or replace a path: itself, its target, or a folder above."""
    real = path.resolve()
    # A link of others on the way would point elsewhere later.
    places = (path, real, *path.parents, *real.parents)
    return next((place for place in places if _is_open(os.lstat(place).st_mode)), None)


def _is_open(mode: int) -> bool:
    # In a sticky folder such as /tmp, only the owner of a file replaces it; a link has no mode.
    is_sticky = stat.S_ISDIR(mode) and mode & stat.S_ISVTX
    return bool(mode & stat.S_IWOTH and not is_sticky and not stat.S_ISLNK(mode))


def cache_home(environment: Mapping[str, str]) -> Path:
    """Return the user's cache folder (XDG Base Directory Specification), or one of this clone where
    that cannot be written, as in a home folder that is read-only.

    Raises RuntimeError where there is no home folder.
    """
    base, home = environment.get("XDG_CACHE_HOME"), environment.get("HOME")
    usual = Path(base) if base else (Path(home) if home else Path.home()) / ".cache"
    existing = next(place for place in (usual, *usual.parents) if os.path.lexists(place))
    return usual if os.access(existing, os.W_OK | os.X_OK) else here().state / "cache"
