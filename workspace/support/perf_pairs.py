"""Pairs of a verb and the commands that a person would type instead, prepared for timing.

Everything runs in copies: the user's tree and the built environment are not changed.
"""

import dataclasses
import difflib
import functools
import io
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from workspace.core import hints, process
from workspace.core.console import Console, RunLog
from workspace.core.errors import BuildError, SourceError
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

# Runs one side of a row once, and returns its seconds. Raises WorkspaceError where it fails.
Side = Callable[[], float]
Sides = tuple[Side, Side]
PATCHES = 100
_BY_HAND, _STACK = (Path(__file__).with_name(name) for name in ("by_hand.sh", "stack.sh"))
_NEXT = "refs/perf/next"
# What a bootstrap in a fresh clone does not read. It is a copy, because uncommitted work counts.
_NOT_CLONED = (".git", ".workspace", ".vllm", "vendor", "results", "tests", "docs", "__pycache__")
_BARE = """from invoke import task


@task
def nothing(_):
    \"\"\"Do nothing.\"\"\"
"""
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


def call(work: Callable[[], object], before: Callable[[], None] = lambda: None) -> Side:
    """Return a side that is work in this process; `before` runs untimed ahead of each start."""

    def once() -> float:
        before()
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return once


def command(
    argv: Sequence[process.Argument],
    cwd: Path,
    env: Mapping[str, str],
    *,
    before: Callable[[], None] = lambda: None,
    statuses: tuple[int, ...] = (0,),
) -> Side:
    """Return a side that is a program; it fails with a status that is not among `statuses`."""

    def work() -> None:
        done = process.capture(argv, env=env, cwd=cwd)
        if done.returncode not in statuses:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("error: ")]
            message = next(reversed(errors or lines), "it printed nothing")
            # Without the arguments: one may be the address of an index with a password in it.
            name, status = Path(argv[0]).name, process.describe_status(done.returncode)
            raise BuildError(f"{name} {status}: {message}", details=tuple(lines[-8:]))

    return call(work, before)


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

    def inv(self, *args: str, statuses: tuple[int, ...] = (0,)) -> Side:
        """Return the command that scripts/inv runs in the end."""
        root = self.layout.root
        argv: list[process.Argument] = [self.python, "-Es", root / "tasks.py", *args]
        return command(argv, root, self.environment, statuses=statuses)

    def bare(self) -> Side:
        """Return the command of invoke alone on a file with one empty task."""
        folder = self.folder / "bare"
        folder.mkdir(exist_ok=True)
        (folder / "tasks.py").write_text(_BARE, encoding="utf-8")
        return command((self.python, "-Es", "-m", "invoke", "--list"), folder, self.environment)

    def run(self, *argv: process.Argument) -> None:
        """Run a program that prepares a row."""
        command(argv, self.layout.root, self.environment)()

    def copy(self, origin: Path, target: Path) -> None:
        """Copy with cp: it keeps times, so that bytecode stays valid, and shares blocks."""
        self.run("cp", "-a", "--reflink=auto", origin, target)


def listed(context: Context) -> Sides:
    return context.inv("--list"), context.bare()


def from_warm_caches(context: Context) -> Sides:
    """Return `inv bootstrap` in a fresh clone, and by_hand.sh in an empty folder.

    Both use the same archive, wheel, requirements and verification.
    """
    observed = context.built
    packed = _fetch_archive(context, observed.pin)
    return _bootstrap(context, observed), _by_hand(context, observed, packed)


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


def _bootstrap(context: Context, observed: Observation) -> Side:
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
    environment = context.environment | settings
    return command(argv, clone, environment, before=lambda: make_clone(context, clone))


def make_clone(context: Context, clone: Path) -> None:
    """Make a fresh clone with the tool environment of this clone."""
    shutil.rmtree(clone, ignore_errors=True)
    copy_workspace(context, clone)
    layout = Layout(clone)
    layout.vllm.mkdir(parents=True)
    shutil.copy2(context.layout.pins, layout.pins)
    repository = Git(clone)
    repository.init()
    repository.commit_everything("The workspace", date="2000-01-01T00:00:00+0000")
    layout.state.mkdir()
    context.copy(context.layout.tools, layout.tools)


def copy_workspace(context: Context, clone: Path) -> None:
    """Copy the workspace itself into a clone, over what is there; its tree and build stay."""
    ignored = shutil.ignore_patterns(*_NOT_CLONED)
    root = context.layout.root
    shutil.copytree(root, clone, ignore=ignored, symlinks=True, dirs_exist_ok=True)


def _by_hand(context: Context, observed: Observation, packed: Path) -> Side:
    hand, layout = context.folder / "hand", context.layout
    # The kernels come from a wheel: to compile them takes hours.
    wheel = precompiled.fetch_wheel(
        observed.kernels_wanted,
        observed.pin,
        observed.device,
        context.settings,
        on_progress=lambda done, total: None,
    )
    variables = {
        "VLLM_TARGET_DEVICE": observed.device,
        "VLLM_VERSION_OVERRIDE": observed.version,
        "VLLM_USE_PRECOMPILED": "1",
        "VLLM_PRECOMPILED_WHEEL_LOCATION": str(wheel),
        # As in a bootstrap: otherwise a machine with Rust would build the optional frontend on
        # one side only.
        "CARGO": stages.NO_CARGO,
        "UV": str(interpreter.uv(layout)),
        "PYTHON": str(layout.environment_python),
        "ARCHIVE": str(packed),
        "TAG": observed.pin.tag,
        "PROBE": str(layout.probes / "verify.py"),
        "PATH": os.pathsep.join([str(hand / ".venv/bin"), context.environment.get("PATH", "")]),
    }
    wanted = requirements.read(
        layout.vllm,
        device=observed.device,
        machine=platform.machine(),
        python_version=observed.python.version if observed.python else "",
        use_existing_torch=False,
        settings=context.settings,
    )
    source = torch.plan(wanted.torch, device=observed.device, settings=context.settings)
    return command(
        ("/bin/sh", _BY_HAND, *source.arguments, source.requirement),
        hand,
        context.settings.child_environment("by-hand", variables),
        before=lambda: _make_hand(context, hand, wanted),
    )


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


class _PatchStack:
    """A small workspace: the pinned release, patches, and a second commit that they apply to."""

    def __init__(self, context: Context) -> None:
        pin = pins.load(context.layout.pins).vllm
        self.context, self.pin, self.base = context, pin, _archive(pin).commit
        self.layout = Layout(context.folder / "stack")
        self.folder = self.layout.patches(pin.name)
        self.run_log = RunLog(
            Console(out=io.StringIO(), err=io.StringIO()), self.layout.logs, verb="perf"
        )
        self.git = Git(self.layout.vllm)
        if not self.layout.vllm.exists():
            self._make()

    def _make(self) -> None:
        """Unpack the release, write the patches, and commit the next release."""
        packed = _fetch_archive(self.context, self.pin)
        self.layout.state.mkdir(parents=True)
        self.layout.vllm.parent.mkdir(parents=True)
        shutil.copyfile(self.context.layout.pins, self.layout.pins)
        pins.make_from_archive(packed, self.layout.vllm, self.pin)
        self.folder.mkdir(parents=True)
        sources = sorted(self.layout.vllm.glob("vllm/**/*.py"))
        chosen = [path for path in sources if path.stat().st_size > 1000][:PATCHES]
        names = [self._write_patch(number, path) for number, path in enumerate(chosen)]
        self.write_list(names)
        (self.layout.vllm / "README.md").write_text("another release\n", encoding="utf-8")
        self.git.set_ref(
            _NEXT, self.git.commit_everything("The next release", date=pins.ARCHIVE_DATE)
        )
        self.by_hand("reset")()

    def _write_patch(self, number: int, path: Path) -> str:
        """Write a patch that adds a line to a source, and return its name."""
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        changed = [*lines[:10], f"# change number {number}\n", *lines[10:]]
        hunk = "".join(list(difflib.unified_diff(lines, changed))[2:])
        name, inner = f"Change-number-{number:03}.patch", path.relative_to(self.layout.vllm)
        text = _MAIL.format(zeros="0" * 40, number=number, path=inner, hunk=hunk)
        (self.folder / name).write_text(text, encoding="utf-8")
        return name

    def write_list(self, names: list[str]) -> None:
        text = "\n".join([f"# base: {self.pin.commit}", *names, ""])
        (self.folder / series.SERIES_FILE).write_text(text, encoding="utf-8")

    def observe(self) -> checkout.Checkout:
        return checkout.observe(self.layout, self.pin)

    def apply(self) -> None:
        patches.apply(self.layout, self.pin.name, self.pin, self.observe(), run_log=self.run_log)

    def by_hand(self, verb: str, before: Callable[[], None] = lambda: None) -> Side:
        """Return the command of stack.sh that replaces a verb."""
        variables = {
            "PATCHES": str(self.folder),
            "OUT": str(self.layout.state / "out"),
            "BASE": self.base,
            "NEXT": self.git.resolve(_NEXT) or "",
        }
        environment = self.context.environment | variables
        return command(("/bin/sh", _STACK, verb), self.layout.vllm, environment, before=before)

    def unapply(self) -> None:
        """Return to the base and forget the expected trees."""
        self.by_hand("reset")()
        shutil.rmtree(self.layout.state / "expected-trees", ignore_errors=True)

    def ensure_applied(self) -> None:
        if self.observe().head == self.base:
            self.apply()


def applied(context: Context) -> Sides:
    world = _PatchStack(context)
    return call(world.apply, world.unapply), world.by_hand("apply", world.unapply)


def exported(context: Context) -> Sides:
    """Return an export and format-patch; both sides write all files again."""
    world = _PatchStack(context)
    world.ensure_applied()

    def empty() -> None:
        for patch in world.folder.glob("*.patch"):
            patch.unlink()
        world.write_list([])

    def work() -> None:
        observed = world.observe()
        export.run(world.layout, world.pin.name, world.pin, observed, run_log=world.run_log)

    return call(work, empty), world.by_hand("export")


def forecast(context: Context) -> Sides:
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

    return call(forecast_once), world.by_hand("forecast")
