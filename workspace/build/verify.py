"""Is what was installed what was asked for? Asked of the built interpreter itself, from two working directories."""

import json
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from workspace.build.plan import Observation
from workspace.build.stamp import Library
from workspace.core import process
from workspace.core.errors import BuildError
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.environment import machine
from workspace.environment.torch import TorchBuild

# Importing vLLM takes 10 s on two cores; with a cold page cache and CUDA libraries of 800 MB it has taken a minute.
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Verdict:
    """What the built interpreter said of itself."""

    version: str
    platform: str
    torch: TorchBuild
    libraries: tuple[Library, ...]
    undriven: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """What was proven, in a sentence."""
        count = len(self.libraries) - len(self.undriven)
        loaded = f"{count} {'library loads' if count == 1 else 'libraries load'} with all symbols bound"
        if not self.platform:
            return f"{loaded}; on which platform it runs no GPU is here to tell" + (f", and {len(self.undriven)} wait for its driver" if self.undriven else "")
        return f"on {self.platform}, {loaded}"


@dataclass(frozen=True)
class _Said:
    """The document of probes/verify.py. `broken` are sentences on libraries that do not load, `undriven` those that lack the GPU's driver only."""

    error: str | None
    file: Path | None
    version: str
    platform: str
    torch: TorchBuild
    libraries: tuple[Library, ...]
    broken: tuple[str, ...]
    undriven: tuple[str, ...]


def check(layout: Layout, settings: Settings, observed: Observation) -> Verdict:
    """Import vLLM from a neutral folder and from inside the tree, and load every library with all symbols bound.

    Raises BuildError naming each thing that is not as it should be.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-workspace-") as neutral:
        said, inside = _ask(layout, settings, Path(neutral))
    # vLLM asks the driver which platform it is on: built for a GPU that is elsewhere, it finds none.
    platforms = {observed.device, ""} if observed.device == "cuda" and not machine.observe(settings).gpus else {observed.device}
    wrong = [f"from a neutral folder: {sentence}" for sentence in _judge(said, layout, observed, platforms)]
    wrong += [f"from inside vendor/vllm: {sentence}" for sentence in _judge(inside, layout, observed, platforms)]
    wrong += said.broken
    if not said.libraries:
        wrong.append("the tree holds no compiled library")
    if wrong:
        more = f" (and {len(wrong) - 1} more, above)" if len(wrong) > 1 else ""
        raise BuildError(
            f"the installed vLLM is not what was asked for: {wrong[0]}{more}",
            hint="./scripts/inv bootstrap installs it anew; if the kernels do not fit this torch: ./scripts/inv rebuild --kernels native",
            details=tuple(wrong),
        )
    return Verdict(said.version, said.platform, said.torch, said.libraries, said.undriven)


def _judge(said: _Said, layout: Layout, observed: Observation, platforms: Collection[str]) -> list[str]:
    if said.error:
        return [said.error]
    wrong = []
    if said.file is None or not said.file.is_relative_to(layout.vllm.resolve()):
        wrong.append(f"vllm was imported from {said.file}, not from vendor/vllm")
    if said.version != observed.version:
        wrong.append(f"vllm calls itself {said.version}, asked for was {observed.version}")
    if said.platform not in platforms:
        wrong.append(f"vllm found the platform {said.platform or 'none'}, built for was {observed.device}")
    if observed.torch and said.torch.version != observed.torch.version:
        wrong.append(f"torch calls itself {said.torch.version}, installed was {observed.torch.version}")
    return wrong


def _ask(layout: Layout, settings: Settings, folder: Path) -> tuple[_Said, _Said]:
    """What the built interpreter says from `folder` and from inside the tree."""
    argv: list[process.Argument] = [layout.environment_python, layout.probes / "verify.py", layout.vllm, "--inside"]
    done = process.capture(argv, env=settings.child_environment("run", {"VLLM_NO_USAGE_STATS": "1"}), cwd=folder, timeout_s=TIMEOUT_S)
    last = tuple(done.stderr.strip().splitlines()[-15:])
    try:
        record = json.loads(done.stdout) if done.returncode == 0 else None
    except ValueError:
        record = None
    if not isinstance(record, dict):
        said = last[-1] if last else "no word"
        raise BuildError(f"the built interpreter {process.describe_status(done.returncode)} while it imported vllm: {said}", details=last)
    rows, torch = record["libraries"], record["torch"] or {"version": "none", "cuda": None}
    outside, inside = (
        _Said(
            error=reply["error"],
            file=Path(reply["file"]) if reply["file"] else None,
            version=str(reply["version"]),
            platform=str(reply["platform"] or ""),
            torch=TorchBuild(torch["version"], torch["cuda"]),
            libraries=tuple(Library(row["path"], row["size"], row["sha256"]) for row in rows),
            broken=tuple(f"{row['path']}: {row['error']}" for row in rows if row["verdict"] == "broken"),
            undriven=tuple(row["path"] for row in rows if row["verdict"] == "no driver"),
        )
        for reply in (record, record["inside"])
    )
    return outside, inside
