"""Is what was installed what was asked for? Asked of the built interpreter itself, from two working directories."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from workspace.build.plan import Observation
from workspace.build.stamp import Library
from workspace.core import process
from workspace.core.errors import BuildError
from workspace.core.layout import Layout
from workspace.core.settings import Settings
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


def check(layout: Layout, settings: Settings, observed: Observation) -> Verdict:
    """Import vLLM from a neutral folder and from inside the tree, and load every library with all symbols bound.

    Raises BuildError naming each thing that is not as it should be.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-workspace-") as neutral:
        said = _ask(layout, settings, Path(neutral), libraries=True)
    inside = _ask(layout, settings, layout.vllm, libraries=False)
    wrong: list[str] = []
    for record, place in ((said, "a neutral folder"), (inside, "inside vendor/vllm")):
        wrong += [f"from {place}: {sentence}" for sentence in _judge(record, layout, observed)]
    wrong += [f"{item['path']}: {item['error']}" for item in said["libraries"] if item["verdict"] == "broken"]
    if not said["libraries"]:
        wrong.append("the tree holds no compiled library")
    if wrong:
        raise BuildError(
            f"the installed vLLM is not what was asked for: {wrong[0]}" + (f" (and {len(wrong) - 1} more, above)" if len(wrong) > 1 else ""),
            hint="./scripts/inv bootstrap installs it anew; if the kernels do not fit this torch: ./scripts/inv bootstrap --kernels native --jobs 4",
            details=tuple(wrong),
        )
    libraries = tuple(Library(item["path"], item["size"], item["sha256"]) for item in said["libraries"])
    return Verdict(said["version"], said["platform"], TorchBuild(said["torch"]["version"], said["torch"]["cuda"]), libraries)


def _judge(record: dict, layout: Layout, observed: Observation) -> list[str]:  # type: ignore[type-arg]
    wrong = []
    if record.get("error"):
        return [record["error"]]
    if not Path(record["file"]).is_relative_to(layout.vllm):
        wrong.append(f"vllm was imported from {record['file']}, not from vendor/vllm")
    if record["version"] != observed.version:
        wrong.append(f"vllm calls itself {record['version']}, asked for was {observed.version}")
    if record["platform"] != observed.device:
        wrong.append(f"vllm found the platform {record['platform'] or 'none'}, built for was {observed.device}")
    if observed.torch and record["torch"]["version"] != observed.torch.version:
        wrong.append(f"torch calls itself {record['torch']['version']}, installed was {observed.torch.version}")
    return wrong


def _ask(layout: Layout, settings: Settings, folder: Path, *, libraries: bool) -> dict:  # type: ignore[type-arg]
    argv: list[process.Argument] = [layout.environment_python, layout.probes / "verify.py", layout.vllm, *([] if libraries else ["--no-libraries"])]
    done = process.capture(argv, env=settings.child_environment("run", {"VLLM_NO_USAGE_STATS": "1"}), cwd=folder, timeout_s=TIMEOUT_S)
    try:
        record = json.loads(done.stdout)
    except ValueError:
        record = None
    if done.returncode != 0 or not isinstance(record, dict):
        last = done.stderr.strip().splitlines()[-15:]
        raise BuildError(
            f"the built interpreter {process.describe_status(done.returncode)} while it imported vllm: {last[-1] if last else 'no word'}", details=tuple(last)
        )
    return record
