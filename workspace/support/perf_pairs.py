"""What a person would type instead of `inv bootstrap`, made ready to be timed beside it.

Everything happens in copies: neither the user's tree nor the built environment is written to.
"""

import contextlib
import dataclasses
import difflib
import io
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from workspace.core import lock, process
from workspace.core.console import Console
from workspace.core.errors import SourceError, ToolchainError
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.install import precompiled
from workspace.install.plan import Observation
from workspace.install.precompiled import Kernels
from workspace.machine import interpreter, requirements, torch
from workspace.repo import checkout, export, index, overview, patches, pins, series
from workspace.repo.checkout import Kind
from workspace.repo.git import Git
from workspace.repo.upstream import Candidate
from workspace.support import perf_measure
from workspace.support.perf_measure import Call, Command, Context

SCRIPT = Path(__file__).with_name("by_hand.sh")
# What a fresh clone holds and a bootstrap reads. Uncommitted work counts, so it is copied and not
# cloned.
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
# One that does not exist, as in a bootstrap: without it a machine with Rust would build vLLM's
# optional frontend on one side only.
_NO_CARGO = "/nonexistent/cargo"


@contextlib.contextmanager
def installed_again(context: Context) -> Iterator[tuple[Command, Command]]:
    """`inv bootstrap` in this clone, which has nothing to do, and uv's editable install of a copy
    of the tree, which was done before.
    """
    observed, layout = context.built, context.layout
    tree, environment = context.folder / "vllm", context.folder / "environment"
    _copy(layout.vllm, tree, context)
    if (tree / ".git").is_file():
        # It leads to the git directory of the user's tree, which knows nothing of a second one.
        (tree / ".git").unlink()
    uv = interpreter.uv(layout)
    _do(
        (uv, "venv", "--quiet", "--no-project", "--python", layout.environment_python, environment),
        context,
    )
    for packages in environment.glob("lib/python3.*/site-packages"):
        # Build tools and torch are the built environment's; what is installed goes into this one.
        (packages / "built.pth").write_text(
            "".join(f"{place}\n" for place in interpreter.site_packages(layout)), encoding="utf-8"
        )
    argv = (
        uv,
        "pip",
        "install",
        "--python",
        environment / "bin" / "python",
        "--no-build-isolation",
        "--no-deps",
        "--editable",
        tree,
    )
    hand = Command(
        argv,
        context.folder,
        context.settings.child_environment("build", _build_variables(context, observed)),
    )
    # With the lock held here, a bootstrap that finds something to do after all stops instead of
    # doing it.
    with lock.hold(layout.lock, verb="nox -s perf"):
        yield context.inv("bootstrap"), hand


@contextlib.contextmanager
def from_warm_caches(context: Context) -> Iterator[tuple[Command, Command]]:
    """`inv bootstrap` in a fresh clone, and by_hand.sh in an empty folder: the same archive, wheel,
    requirements and proof.
    """
    observed = context.built
    archive = observed.pin.archive
    if archive is None:
        raise SourceError(
            f"vendor/pins.toml has no release archive of {observed.pin.name}, from which both sides"
            " start",
            hint="git diff vendor/pins.toml",
        )
    packed = index.fetch(
        observed.pin.name, archive.filename, archive.sha256, settings=context.settings
    )
    clone, hand = context.folder / "clone", context.folder / "hand"
    same = {
        # The Python that the built environment has: looking for another one, online, is no part of
        # this.
        "PYTHON_VERSION": (
            ".".join(observed.python.version.split(".")[:2]) if observed.python else ""
        ),
        "USE_EXISTING_TORCH": "0",
        "ALLOW_PRERELEASE": "0",
    }
    argv = (
        clone / "scripts" / "inv",
        "bootstrap",
        "--device",
        observed.device,
        "--source",
        "release",
        "--kernels",
        "precompiled",
    )
    measured = Command(
        argv, clone, context.environment | same, before=lambda: _make_clone(context, clone)
    )
    variables = _build_variables(context, observed) | {
        "UV": str(interpreter.uv(context.layout)),
        "PYTHON": str(context.layout.environment_python),
        "ARCHIVE": str(packed),
        "TAG": observed.pin.tag,
        "PROBE": str(context.layout.probes / "verify.py"),
        "VLLM_NO_USAGE_STATS": "1",
    }
    # The built environment's tools are not this one's.
    variables["PATH"] = os.pathsep.join(
        [str(hand / ".venv" / "bin"), context.environment.get("PATH", "")]
    )
    wanted = _requirements(context, observed)
    source = torch.plan(wanted.torch, device=observed.device, settings=context.settings)
    against = Command(
        ("/bin/sh", SCRIPT, *source.arguments, source.requirement),
        hand,
        context.settings.child_environment("build", variables),
        before=lambda: _make_hand(context, hand, wanted),
    )
    yield measured, against


def _build_variables(context: Context, observed: Observation) -> dict[str, str]:
    """What vLLM's setup.py is told, on either side. Natively compiled kernels would take hours
    again: here they come from a wheel.
    """
    kernels = (
        observed.kernels_wanted
        if observed.kernels_wanted.kind != "native"
        else Kernels("precompiled", "precompiled")
    )
    wheel = precompiled.fetch_wheel(
        kernels,
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
        "CARGO": _NO_CARGO,
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
    """A clone as git leaves it, with the tool environment of this one."""
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
    """An empty folder with the lists that uv is given, as a person would have them in a project."""
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
    """cp keeps times, so that bytecode stays valid, and is quick where the file system can share
    blocks.
    """
    _do(("cp", "-a", "--reflink=auto", origin, target), context)


def _do(argv: tuple[process.Argument, ...], context: Context) -> None:
    done = process.capture(argv, env=context.environment, cwd=context.layout.root)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [process.describe_status(done.returncode)])[-1]
        raise ToolchainError(
            f"what is to be measured could not be made ready: {last}",
            hint=f"df -h {context.layout.root}",
        )


Sides = tuple[Call, Command]
PATCHES = 100
_SCRIPT = Path(__file__).with_name("stack.sh")
_NEXT = "refs/perf/next"
# What git format-patch writes (its manual page, DISCUSSION).
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


class _House:
    """A workspace in small around a checkout of the pinned release, with patches and another commit
    that they apply to as well.
    """

    def __init__(self, context: Context) -> None:
        pin = pins.load(context.layout.pins).vllm
        if pin.archive is None:
            raise SourceError(
                "vendor/pins.toml has no release archive of vllm, from which both sides start",
                hint="git diff vendor/pins.toml",
            )
        self.context, self.pin, self.base = context, pin, pin.archive.commit
        self.layout = Layout(context.folder / "stack")
        self.run_log = RunLog(
            Console(out=io.StringIO(), err=io.StringIO()), self.layout.logs, verb="perf"
        )
        self.git = Git(self.layout.vllm)
        if not self.layout.vllm.exists():
            packed = index.fetch(
                pin.name, pin.archive.filename, pin.archive.sha256, settings=context.settings
            )
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
        names = [f"Change-number-{number:03}.patch" for number in range(len(chosen))]
        for number, path in enumerate(chosen):
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            changed = [*lines[:10], f"# change number {number}\n", *lines[10:]]
            hunk = "".join(list(difflib.unified_diff(lines, changed))[2:])
            text = _MAIL.format(
                zeros="0" * 40, number=number, path=path.relative_to(self.layout.vllm), hunk=hunk
            )
            (folder / names[number]).write_text(text, encoding="utf-8")
        self.write_list(names)

    def _commit_next(self) -> None:
        (self.layout.vllm / "README.md").write_text("another release\n", encoding="utf-8")
        self.git.set_ref(
            _NEXT, self.git.commit_everything("The next release", date=pins.ARCHIVE_DATE)
        )
        self.by_hand("reset")

    def write_list(self, names: list[str]) -> None:
        (self.layout.patches(self.pin.name) / series.SERIES_FILE).write_text(
            "\n".join([f"# base: {self.pin.commit}", *names, ""]), encoding="utf-8"
        )

    def there(self) -> checkout.Checkout:
        return checkout.observe(self.layout, self.pin)

    def apply(self) -> patches.Stack:
        return patches.apply(
            self.layout, self.pin.name, self.pin, self.there(), run_log=self.run_log
        )

    def typed(self, verb: str, before: Callable[[], None] | None = None) -> Command:
        """What stack.sh does for a verb."""
        places = {
            "PATCHES": str(self.layout.patches(self.pin.name)),
            "OUT": str(self.layout.state / "out"),
        }
        said = places | {"BASE": self.base, "NEXT": self.git.resolve(_NEXT) or ""}
        return Command(
            ("/bin/sh", _SCRIPT, verb), self.layout.vllm, self.context.environment | said, before
        )

    def by_hand(self, verb: str) -> None:
        perf_measure.run(self.typed(verb))

    def take_off(self) -> None:
        """Back to the base, nothing being remembered."""
        self.by_hand("reset")
        shutil.rmtree(self.layout.state / "expected-trees", ignore_errors=True)

    def put_on(self) -> None:
        if self.there().head == self.base:
            self.apply()


@contextlib.contextmanager
def applied(context: Context) -> Iterator[Sides]:
    house = _House(context)
    yield Call(house.apply, house.take_off), house.typed("apply", house.take_off)


@contextlib.contextmanager
def exported(context: Context) -> Iterator[Sides]:
    """All files are written anew by either side."""
    house = _House(context)
    house.put_on()
    folder, name = house.layout.patches(house.pin.name), house.pin.name
    kept = house.layout.state / "kept"
    shutil.copytree(folder, kept)

    def empty() -> None:
        for patch in folder.glob("*.patch"):
            patch.unlink()
        house.write_list([])

    try:
        yield (
            Call(
                lambda: export.run(
                    house.layout, name, house.pin, house.there(), run_log=house.run_log
                ),
                empty,
            ),
            house.typed("export"),
        )
    finally:
        shutil.rmtree(folder)
        kept.rename(folder)


@contextlib.contextmanager
def forecast(context: Context) -> Iterator[Sides]:
    from workspace.bump import forecast as work

    house = _House(context)
    house.put_on()
    found = Candidate(
        dataclasses.replace(house.pin, tag="v0", version="0"),
        house.git.resolve(_NEXT) or "",
        Kind.RELEASE,
        None,
        house.layout.vllm,
    )

    def work_out() -> object:
        there = house.there()
        stack = patches.observe(house.layout, house.pin.name, house.pin, there)
        return work.work_out(house.layout, context.settings, found, there, stack)

    yield Call(work_out), house.typed("forecast")


@contextlib.contextmanager
def applied_again(context: Context) -> Iterator[Sides]:
    house = _House(context)
    house.put_on()
    yield Call(house.apply), house.typed("status")


@contextlib.contextmanager
def looked_at(context: Context) -> Iterator[Sides]:
    house = _House(context)
    house.put_on()
    yield (
        Call(lambda: overview.rows(house.layout, house.pin.name, house.pin, house.there())),
        house.typed("status"),
    )
