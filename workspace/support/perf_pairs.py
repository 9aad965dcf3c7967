"""Pairs of a verb and the commands that a person would type instead, prepared for timing.

Everything runs in copies: the user's tree and the built environment are not changed.
"""

import contextlib
import dataclasses
import difflib
import functools
import io
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from workspace.core import hints, lock, process
from workspace.core.console import Console, RunLog
from workspace.core.errors import BuildError, SourceError, ToolchainError
from workspace.core.known_settings import KNOWN
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import precompiled, stages
from workspace.install.plan import Observation
from workspace.machine import interpreter, requirements, torch
from workspace.repo import checkout, export, index, patches, pins, series
from workspace.repo.checkout import Kind
from workspace.repo.git import Git
from workspace.repo.pins import Archive, Pin
from workspace.repo.upstream import Candidate

SCRIPT = Path(__file__).with_name("by_hand.sh")
# The files of a fresh clone that a bootstrap reads. They are copied and not cloned, because
# uncommitted work counts.
CLONED = (
    *(
        "workspace",
        "scripts",
        "requirements",
        "recipes",
        "patches",
        "tasks.py",
        "noxfile.py",
        "pyproject.toml",
    ),
    *(".env", ".env.example", ".gitignore", "vendor/pins.toml"),
)


@dataclass(frozen=True)
class Command:
    """A program to time; `before` runs untimed before each start.

    Only runs with an exit status in `statuses` count.
    """

    argv: tuple[process.Argument, ...]
    cwd: Path
    env: Mapping[str, str] = field(repr=False)
    before: Callable[[], None] | None = None
    statuses: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Call:
    """Work in this process, without the start of the command line; `before` runs untimed."""

    work: Callable[[], object]
    before: Callable[[], None] | None = None


_BARE = """from invoke import task


@task
def nothing(_):
    \"\"\"Do nothing.\"\"\"
"""


class Context:
    """The context of one run; `folder` is a temporary folder on the file system of the clone."""

    def __init__(self, layout: Layout, settings: Settings, folder: Path) -> None:
        self.layout = layout
        self.settings = settings
        self.folder = folder

    @functools.cached_property
    def environment(self) -> dict[str, str]:
        """The environment of both sides: that of a verb in the user's shell."""
        chosen = {
            name: self.settings.text(name)
            for name in KNOWN
            if self.settings.source(name) in ("shell", "flag")
        }
        return self.settings.child_environment("inv", chosen)

    @property
    def python(self) -> Path:
        """The Python of the tool environment, which scripts/nox has made."""
        return self.layout.tools / "bin" / "python"

    @functools.cached_property
    def built(self) -> Observation:
        """The state of this clone. Raises BuildError where a stage of bootstrap is due."""
        from workspace.install import bootstrap, plan

        observed = plan.observe(self.layout, self.settings)
        due = [
            f"{stage.steps[0][0]}: {stage.reason}"
            for stage in bootstrap.stages_of(observed)
            if stage.is_due
        ]
        if due:
            raise BuildError(
                f"the tree is not built, or is not up to date ({'; '.join(due)})",
                hint=hints.text("inv.bootstrap"),
            )
        return observed

    def inv(self, *args: str, statuses: tuple[int, ...] = (0,)) -> Command:
        """Return the command that scripts/inv runs in the end."""
        return self.tool("-Es", self.layout.root / "tasks.py", *args, statuses=statuses)

    def tool(self, *args: str | Path, statuses: tuple[int, ...] = (0,)) -> Command:
        return Command((self.python, *args), self.layout.root, self.environment, statuses=statuses)

    def bare(self) -> Command:
        """Return the command of invoke alone on a file with one empty task."""
        folder = self.folder / "bare"
        folder.mkdir(exist_ok=True)
        (folder / "tasks.py").write_text(_BARE, encoding="utf-8")
        return Command((self.python, "-Es", "-m", "invoke", "--list"), folder, self.environment)


@contextlib.contextmanager
def installed_again(context: Context) -> Iterator[tuple[Command, Command]]:
    """Yield `inv bootstrap` with nothing to do, and a repeated editable install by uv of a copy."""
    observed, layout = context.built, context.layout
    tree, environment = context.folder / "vllm", context.folder / "environment"
    _copy(layout.vllm, tree, context)
    if (tree / ".git").is_file():
        # It names the git directory of the user's tree, which has no second working tree.
        (tree / ".git").unlink()
    uv = interpreter.uv(layout)
    python = ("--python", layout.environment_python)
    venv = (uv, "venv", "--quiet", "--no-project", *python, environment)
    _run(Command(venv, layout.root, context.environment))
    for packages in environment.glob("lib/python3.*/site-packages"):
        # Build tools and torch come from the built environment; vLLM is installed into this one.
        (packages / "built.pth").write_text(
            "".join(f"{place}\n" for place in interpreter.site_packages(layout)), encoding="utf-8"
        )
    argv = (
        *(uv, "pip", "install", "--python", environment / "bin" / "python"),
        *("--no-build-isolation", "--no-deps", "--editable", tree),
    )
    hand = Command(
        argv,
        context.folder,
        context.settings.child_environment("by-hand", _build_variables(context, observed)),
    )
    # This process holds the lock, so that a bootstrap that finds work stops instead of doing it.
    with lock.hold(layout.lock, verb="nox -s perf"):
        yield context.inv("bootstrap"), hand


@contextlib.contextmanager
def from_warm_caches(context: Context) -> Iterator[tuple[Command, Command]]:
    """Yield `inv bootstrap` in a fresh clone, and by_hand.sh in an empty folder.

    Both use the same archive, wheel, requirements and verification.
    """
    observed = context.built
    packed = _fetch_archive(context, observed.pin)
    yield _bootstrap(context, observed), _by_hand(context, observed, packed)


def _archive(pin: Pin) -> Archive:
    """Return the pin's release archive. Raises SourceError where the pin has none."""
    if pin.archive is None:
        raise SourceError(
            f"vendor/pins.toml has no release archive of {pin.name}, from which both sides start",
            hint=hints.text("repo.pins_changed"),
        )
    return pin.archive


def _fetch_archive(context: Context, pin: Pin) -> Path:
    archive = _archive(pin)
    return index.fetch(pin.name, archive.filename, archive.sha256, settings=context.settings)


def _bootstrap(context: Context, observed: Observation) -> Command:
    clone = context.folder / "clone"
    settings = {
        # The Python of the built environment: an online search for another is not measured.
        "PYTHON_VERSION": (
            ".".join(observed.python.version.split(".")[:2]) if observed.python else ""
        ),
        "USE_EXISTING_TORCH": "0",
        "ALLOW_PRERELEASE": "0",
    }
    argv = (
        *(clone / "scripts" / "inv", "bootstrap", "--device", observed.device),
        # By hand no token is generated.
        *("--source", "release", "--kernels", "precompiled", "--no-first-token"),
    )
    return Command(
        argv, clone, context.environment | settings, before=lambda: _make_clone(context, clone)
    )


def _by_hand(context: Context, observed: Observation, packed: Path) -> Command:
    hand = context.folder / "hand"
    variables = _build_variables(context, observed) | {
        "UV": str(interpreter.uv(context.layout)),
        "PYTHON": str(context.layout.environment_python),
        "ARCHIVE": str(packed),
        "TAG": observed.pin.tag,
        "PROBE": str(context.layout.probes / "verify.py"),
    }
    # The tools of the built environment are not those of this environment.
    variables["PATH"] = os.pathsep.join(
        [str(hand / ".venv" / "bin"), context.environment.get("PATH", "")]
    )
    wanted = _requirements(context, observed)
    source = torch.plan(wanted.torch, device=observed.device, settings=context.settings)
    return Command(
        ("/bin/sh", SCRIPT, *source.arguments, source.requirement),
        hand,
        context.settings.child_environment("by-hand", variables),
        before=lambda: _make_hand(context, hand, wanted),
    )


def _build_variables(context: Context, observed: Observation) -> dict[str, str]:
    """Return the variables of vLLM's setup.py for both sides.

    The kernels come from a wheel: to compile them takes hours.
    """
    wheel = precompiled.fetch_wheel(
        observed.kernels_wanted,
        observed.pin,
        observed.device,
        context.settings,
        on_progress=lambda done, total: None,
    )
    return {
        "VLLM_TARGET_DEVICE": observed.device,
        "VLLM_VERSION_OVERRIDE": observed.version,
        "VLLM_USE_PRECOMPILED": "1",
        "VLLM_PRECOMPILED_WHEEL_LOCATION": str(wheel),
        # As in a bootstrap: otherwise a machine with Rust would build the optional frontend on
        # one side only.
        "CARGO": stages.NO_CARGO,
        "PATH": os.pathsep.join(
            [str(context.layout.environment / "bin"), context.environment.get("PATH", "")]
        ),
    }


def _requirements(context: Context, observed: Observation) -> requirements.Requirements:
    return requirements.read(
        context.layout.vllm,
        device=observed.device,
        machine=platform.machine(),
        python_version=observed.python.version if observed.python else "",
        use_existing_torch=False,
        settings=context.settings,
    )


def _make_clone(context: Context, clone: Path) -> None:
    """Make a fresh clone with the tool environment of this clone."""
    shutil.rmtree(clone, ignore_errors=True)
    clone.mkdir()
    for name in CLONED:
        origin, copy = context.layout.root / name, clone / name
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
    _copy(context.layout.tools, Layout(clone).tools, context)


def _make_hand(context: Context, hand: Path, wanted: requirements.Requirements) -> None:
    """Make a folder with patches and the requirement lists for uv, as in a person's project."""
    shutil.rmtree(hand, ignore_errors=True)
    hand.mkdir()
    shutil.copytree(context.layout.patches("vllm"), hand / "patches")
    with_torch = wanted.companions if "torchvision" in interpreter.installed(context.layout) else ()
    lists = {
        "requirements": dict.fromkeys((*wanted.build, *wanted.runtime)),
        "companions": with_torch,
        "accelerators": wanted.accelerators,
        "constraints": torch.constraints(context.layout),
        "overrides": wanted.overrides,
    }
    for name, lines in lists.items():
        (hand / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _copy(origin: Path, target: Path, context: Context) -> None:
    """Copy with cp: it keeps times, so that bytecode stays valid, and shares blocks if possible."""
    argv = ("cp", "-a", "--reflink=auto", origin, target)
    _run(Command(argv, context.layout.root, context.environment))


def _run(command: Command) -> None:
    done = process.capture(command.argv, env=command.env, cwd=command.cwd)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [process.describe_status(done.returncode)])[-1]
        raise ToolchainError(
            f"the measurement could not be prepared: {last}",
            hint=hints.text("core.disk_of", folder=command.cwd),
        )


Sides = tuple[Call, Command]
PATCHES = 100
_SCRIPT = Path(__file__).with_name("stack.sh")
_NEXT = "refs/perf/next"
# The output format of git format-patch (its manual page, DISCUSSION).
_MAIL = """From {zeros} Mon Sep 17 00:00:00 2001
From: A Developer <developer@example.org>
Date: Thu, 1 Jan 2026 00:00:00 +0000
Subject: Change number {number:03}

Upstream-Status: Pending
---

diff --git a/{path} b/{path}
--- a/{path}
+++ b/{path}
{hunk}"""


class _PatchStack:
    """A small workspace: the pinned release, patches, and a second commit that they apply to."""

    def __init__(self, context: Context) -> None:
        pin = pins.load(context.layout.pins).vllm
        self.context, self.pin, self.base = context, pin, _archive(pin).commit
        self.layout = Layout(context.folder / "stack")
        self.run_log = RunLog(
            Console(out=io.StringIO(), err=io.StringIO()), self.layout.logs, verb="perf"
        )
        self.git = Git(self.layout.vllm)
        if not self.layout.vllm.exists():
            packed = _fetch_archive(context, pin)
            self.layout.state.mkdir(parents=True)
            self.layout.vllm.parent.mkdir(parents=True)
            shutil.copyfile(context.layout.pins, self.layout.pins)
            pins.make_from_archive(packed, self.layout.vllm, pin)
            self._write_series()
            self._commit_next()

    def _write_series(self) -> None:
        folder = self.layout.patches(self.pin.name)
        folder.mkdir(parents=True)
        chosen = [
            path
            for path in sorted(self.layout.vllm.glob("vllm/**/*.py"))
            if path.stat().st_size > 1000
        ][:PATCHES]
        names = [f"Change-number-{position:03}.patch" for position in range(len(chosen))]
        for position, path in enumerate(chosen):
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            changed = [*lines[:10], f"# change number {position}\n", *lines[10:]]
            hunk = "".join(list(difflib.unified_diff(lines, changed))[2:])
            text = _MAIL.format(
                zeros="0" * 40, number=position, path=path.relative_to(self.layout.vllm), hunk=hunk
            )
            (folder / names[position]).write_text(text, encoding="utf-8")
        self.write_list(names)

    def _commit_next(self) -> None:
        (self.layout.vllm / "README.md").write_text("another release\n", encoding="utf-8")
        self.git.set_ref(
            _NEXT, self.git.commit_everything("The next release", date=pins.ARCHIVE_DATE)
        )
        self.run_command("reset")

    def write_list(self, names: list[str]) -> None:
        (self.layout.patches(self.pin.name) / series.SERIES_FILE).write_text(
            "\n".join([f"# base: {self.pin.commit}", *names, ""]), encoding="utf-8"
        )

    def observe(self) -> checkout.Checkout:
        return checkout.observe(self.layout, self.pin)

    def apply(self) -> patches.Stack:
        return patches.apply(
            self.layout, self.pin.name, self.pin, self.observe(), run_log=self.run_log
        )

    def command(self, verb: str, before: Callable[[], None] | None = None) -> Command:
        """Return the command of stack.sh that replaces a verb."""
        folders = {
            "PATCHES": str(self.layout.patches(self.pin.name)),
            "OUT": str(self.layout.state / "out"),
        }
        variables = folders | {"BASE": self.base, "NEXT": self.git.resolve(_NEXT) or ""}
        return Command(
            ("/bin/sh", _SCRIPT, verb),
            self.layout.vllm,
            self.context.environment | variables,
            before,
        )

    def run_command(self, verb: str) -> None:
        _run(self.command(verb))

    def unapply(self) -> None:
        """Return to the base and forget the expected trees."""
        self.run_command("reset")
        shutil.rmtree(self.layout.state / "expected-trees", ignore_errors=True)

    def ensure_applied(self) -> None:
        if self.observe().head == self.base:
            self.apply()


@contextlib.contextmanager
def applied(context: Context) -> Iterator[Sides]:
    world = _PatchStack(context)
    yield Call(world.apply, world.unapply), world.command("apply", world.unapply)


@contextlib.contextmanager
def exported(context: Context) -> Iterator[Sides]:
    """Yield an export and format-patch; both sides write all files again."""
    world = _PatchStack(context)
    world.ensure_applied()
    folder, name = world.layout.patches(world.pin.name), world.pin.name
    kept = world.layout.state / "kept"
    shutil.copytree(folder, kept)

    def empty() -> None:
        for patch in folder.glob("*.patch"):
            patch.unlink()
        world.write_list([])

    try:
        yield (
            Call(
                lambda: export.run(
                    world.layout, name, world.pin, world.observe(), run_log=world.run_log
                ),
                empty,
            ),
            world.command("export"),
        )
    finally:
        shutil.rmtree(folder)
        kept.rename(folder)


@contextlib.contextmanager
def forecast(context: Context) -> Iterator[Sides]:
    from workspace.bump import forecast as work

    world = _PatchStack(context)
    world.ensure_applied()
    found = Candidate(
        dataclasses.replace(world.pin, tag="v0", version="0"),
        world.git.resolve(_NEXT) or "",
        Kind.RELEASE,
        None,
        world.layout.vllm,
    )

    def forecast_once() -> object:
        observed = world.observe()
        stack = patches.observe(world.layout, world.pin.name, world.pin, observed)
        return work.work_out(world.layout, context.settings, found, observed, stack)

    yield Call(forecast_once), world.command("forecast")
