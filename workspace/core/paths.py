"""Where things live. Every path of the workspace is spelled here and nowhere else."""

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
        """A bare repository of the workspace's own, in which other releases than the pinned one are
        looked at.
        """
        return self.state / "upstream" / f"{project}.git"

    def times(self, project: str) -> Path:
        """When the files of a checkout were written last with which content; see repo/moves.py."""
        return self.state / "times" / f"{project}.json"

    def moving(self, project: str) -> Path:
        """Is there while a checkout moves from one commit to another, or a run that did so was
        ended.
        """
        return self.state / "moving" / f"{project}.json"

    @property
    def bump_sandbox(self) -> Path:
        """A clone in small, with a tree and an environment of its own, in which a pin is moved
        before anything else is.
        """
        return self.state / "bump"

    @property
    def sandboxes(self) -> Path:
        """Clones in small that trees are compared or searched in, a folder each; see
        install/sandbox.py.
        """
        return self.state / "sandboxes"

    @property
    def promoting(self) -> Path:
        """Is there while what the sandbox of a bump made takes the place of the working state, or a
        run that did so was ended.
        """
        return self.bump_sandbox / "promoting.json"

    @property
    def returning(self) -> Path:
        """The same of a return to a good state."""
        return self.state / "back.json"

    @property
    def known_good_states(self) -> Path:
        """What `inv pin.rollback` returns to, a folder each."""
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
        """A stamp lives inside the environment that it describes, so that both vanish together."""
        return self.environment / ".workspace" / f"{name}.json"

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
        """Build directories, one for each set of inputs; see build/native/inputs.py."""
        return self.state / "build"

    @property
    def jit(self) -> Path:
        """Kernels that were compiled while vLLM ran, a folder for each stack; see
        environment/jit_caches.py.
        """
        return self.state / "jit"

    @property
    def quarantine(self) -> Path:
        """Folders that stood in the way and may be somebody's, each below the time at which it was
        moved here.
        """
        return self.state / "quarantine"

    @property
    def lock(self) -> Path:
        return self.state / "lock"

    @property
    def models(self) -> Path:
        return self.state / "models"

    @property
    def encodings(self) -> Path:
        """Vocabularies of tiktoken, where the pinned tree needs files of them."""
        return self.state / "encodings"

    @property
    def server(self) -> Path:
        """What is known of the server that `inv serve` started, with its logs; see
        engine/server.py.
        """
        return self.state / "server"

    @property
    def smoke_record(self) -> Path:
        return self.state / "smoke.json"

    @property
    def results(self) -> Path:
        """Records of benchmarks, a folder for each machine."""
        return self.root / "results"

    def relative(self, path: Path) -> str:
        """The path as a person would type it in the root of the clone."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)


def here() -> Layout:
    """The layout of the clone that this package lies in."""
    return Layout(Path(__file__).resolve().parents[2])
