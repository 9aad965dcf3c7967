"""What a person would type instead of `inv bootstrap`, made ready to be timed beside it.

Everything happens in copies: neither the user's tree nor the built environment is written to.
"""

import contextlib
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from workspace.build import donor
from workspace.build.donor import Kernels
from workspace.build.plan import Observation
from workspace.core import lock, process
from workspace.core.errors import SourceError, ToolchainError
from workspace.core.layout import Layout
from workspace.environment import interpreter, requirements, torch
from workspace.perf.ground import Ground
from workspace.perf.measure import Command
from workspace.source import index
from workspace.source.git import Git

SCRIPT = Path(__file__).with_name("by_hand.sh")
# What a fresh clone holds and a bootstrap reads. Uncommitted work counts, so it is copied and not cloned.
CLONED = (
    *("workspace", "scripts", "requirements", "recipes", "patches", "tasks.py", "noxfile.py", "pyproject.toml"),
    *(".env", ".env.example", ".gitignore", "vendor/pins.toml"),
)
# One that does not exist, as in a bootstrap: without it a machine with Rust would build vLLM's optional frontend on one side only.
_NO_CARGO = "/nonexistent/cargo"


@contextlib.contextmanager
def installed_again(ground: Ground) -> Iterator[tuple[Command, Command]]:
    """`inv bootstrap` in this clone, which has nothing to do, and uv's editable install of a copy of the tree, which was done before."""
    observed, layout = ground.built, ground.layout
    tree, environment = ground.folder / "vllm", ground.folder / "environment"
    _copy(layout.vllm, tree, ground)
    if (tree / ".git").is_file():
        # It leads to the git directory of the user's tree, which knows nothing of a second one.
        (tree / ".git").unlink()
    uv = interpreter.uv(layout)
    _do((uv, "venv", "--quiet", "--no-project", "--python", layout.environment_python, environment), ground)
    for packages in environment.glob("lib/python3.*/site-packages"):
        # Build tools and torch are the built environment's; what is installed goes into this one.
        (packages / "built.pth").write_text("".join(f"{place}\n" for place in interpreter.site_packages(layout)), encoding="utf-8")
    argv = (uv, "pip", "install", "--python", environment / "bin" / "python", "--no-build-isolation", "--no-deps", "--editable", tree)
    hand = Command(argv, ground.folder, ground.settings.child_environment("build", _build_variables(ground, observed)))
    # With the lock held here, a bootstrap that finds something to do after all stops instead of doing it.
    with lock.hold(layout.lock, verb="nox -s perf"):
        yield ground.inv("bootstrap"), hand


@contextlib.contextmanager
def from_warm_caches(ground: Ground) -> Iterator[tuple[Command, Command]]:
    """`inv bootstrap` in a fresh clone, and by_hand.sh in an empty folder: the same archive, wheel, requirements and proof."""
    observed = ground.built
    archive = observed.pin.archive
    if archive is None:
        raise SourceError(f"vendor/pins.toml has no release archive of {observed.pin.name}, from which both sides start", hint="git diff vendor/pins.toml")
    packed = index.fetch(observed.pin.name, archive.filename, archive.sha256, settings=ground.settings)
    clone, hand = ground.folder / "clone", ground.folder / "hand"
    same = {
        # The Python that the built environment has: looking for another one, online, is no part of this.
        "PYTHON_VERSION": ".".join(observed.python.version.split(".")[:2]) if observed.python else "",
        "USE_EXISTING_TORCH": "0",
        "ALLOW_PRERELEASE": "0",
    }
    argv = (clone / "scripts" / "inv", "bootstrap", "--device", observed.device, "--source", "release", "--kernels", "donor")
    measured = Command(argv, clone, ground.environment | same, before=lambda: _make_clone(ground, clone))
    variables = _build_variables(ground, observed) | {
        "UV": str(interpreter.uv(ground.layout)),
        "PYTHON": str(ground.layout.environment_python),
        "ARCHIVE": str(packed),
        "TAG": observed.pin.tag,
        "PROBE": str(ground.layout.probes / "verify.py"),
        "VLLM_NO_USAGE_STATS": "1",
    }
    # The built environment's tools are not this one's.
    variables["PATH"] = os.pathsep.join([str(hand / ".venv" / "bin"), ground.environment.get("PATH", "")])
    wanted = _requirements(ground, observed)
    source = torch.plan(wanted.torch, device=observed.device, settings=ground.settings)
    against = Command(
        ("/bin/sh", SCRIPT, *source.arguments, source.requirement),
        hand,
        ground.settings.child_environment("build", variables),
        before=lambda: _make_hand(ground, hand, wanted),
    )
    yield measured, against


def _build_variables(ground: Ground, observed: Observation) -> dict[str, str]:
    """What vLLM's setup.py is told, on either side. Natively compiled kernels would take hours again: here they come from a wheel."""
    kernels = observed.kernels_wanted if observed.kernels_wanted.kind != "native" else Kernels("donor", "donor")
    wheel = donor.fetch(kernels, observed.pin, observed.device, ground.settings, on_progress=lambda done, total: None)
    return {
        "VLLM_TARGET_DEVICE": observed.device,
        "VLLM_VERSION_OVERRIDE": observed.version,
        "VLLM_USE_PRECOMPILED": "1",
        "VLLM_PRECOMPILED_WHEEL_LOCATION": str(wheel),
        "CARGO": _NO_CARGO,
        "PATH": os.pathsep.join([str(ground.layout.environment / "bin"), ground.environment.get("PATH", "")]),
    }


def _requirements(ground: Ground, observed: Observation) -> requirements.Requirements:
    return requirements.read(
        ground.layout.vllm,
        device=observed.device,
        machine=platform.machine(),
        python_version=observed.python.version if observed.python else "",
        use_existing_torch=False,
        settings=ground.settings,
    )


def _make_clone(ground: Ground, clone: Path) -> None:
    """A clone as git leaves it, with the tool environment of this one."""
    shutil.rmtree(clone, ignore_errors=True)
    clone.mkdir()
    for name in CLONED:
        origin, copy = ground.layout.root / name, clone / name
        copy.parent.mkdir(exist_ok=True)
        if origin.is_dir():
            shutil.copytree(origin, copy, ignore=shutil.ignore_patterns("__pycache__"))
        elif origin.exists():
            shutil.copy2(origin, copy)
    Layout(clone).vllm.mkdir()
    repository = Git(clone)
    repository.init()
    repository.commit_everything("The workspace", date="2000-01-01T00:00:00+0000")
    Layout(clone).state.mkdir()
    _copy(ground.layout.tools, Layout(clone).tools, ground)


def _make_hand(ground: Ground, hand: Path, wanted: requirements.Requirements) -> None:
    """An empty folder with the lists that uv is given, as a person would have them in a project."""
    shutil.rmtree(hand, ignore_errors=True)
    hand.mkdir()
    shutil.copytree(ground.layout.patches("vllm"), hand / "patches")
    with_torch = wanted.companions if "torchvision" in interpreter.installed(ground.layout) else ()
    lists = {
        "requirements": dict.fromkeys((*wanted.build, *wanted.runtime)),
        "companions": with_torch,
        "accelerators": wanted.accelerators,
        "constraints": torch.constraints(ground.layout),
        "overrides": wanted.overrides,
    }
    for name, lines in lists.items():
        (hand / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _copy(origin: Path, target: Path, ground: Ground) -> None:
    """cp keeps times, so that bytecode stays valid, and is quick where the file system can share blocks."""
    _do(("cp", "-a", "--reflink=auto", origin, target), ground)


def _do(argv: tuple[process.Argument, ...], ground: Ground) -> None:
    done = process.capture(argv, env=ground.environment, cwd=ground.layout.root)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [process.describe_status(done.returncode)])[-1]
        raise ToolchainError(f"what is to be measured could not be made ready: {last}", hint=f"df -h {ground.layout.root}")
