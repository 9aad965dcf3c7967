"""The fixes of inv fix-triton, cheapest first, each with its plan.

They change a line of .env, move folders away, rename caches, or install the wheel that torch pairs
with. The next diagnosis judges the result. The build from source is in triton_fix.py.
"""

import datetime
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from workspace.core import hints, settings
from workspace.core.console import RunLog
from workspace.core.errors import BuildError, ToolchainError
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import stamp
from workspace.install.triton_diagnosis import Diagnosis
from workspace.machine import check, doctor, interpreter, jit_caches
from workspace.machine.arch import key
from workspace.machine.doctor import Verdict
from workspace.machine.machine import Case, Machine

WHY = "changed by inv fix-triton on {day}"


@dataclass
class Context:
    """The workspace that fixes work in, as it is after the last of them."""

    machine: Machine
    run_log: RunLog

    @property
    def layout(self) -> Layout:
        return self.machine.layout

    @property
    def settings(self) -> Settings:
        return self.machine.settings

    def reread(self) -> Machine:
        """Return the machine after a fix."""
        self.machine = self.machine.reread()
        return self.machine

    def reload(self) -> None:
        """Read the settings again once .env has changed: the machine is another one with them."""
        flags = {
            name: value.text
            for name, value in self.settings.values.items()
            if value.source == "flag"
        }
        changed = settings.load(self.layout, flags=flags, environ=self.settings.shell)
        self.machine = Machine(self.layout, changed)


@dataclass(frozen=True)
class Fix:
    """One fix: `plan` lists what `act` would do, empty where the fix does not apply."""

    name: str
    plan: Callable[[Context, Diagnosis], tuple[str, ...]]
    act: Callable[[Context, Diagnosis], str]


def assembler_changes(context: Context, found: Diagnosis) -> dict[str, str | None]:
    """Decide new values for Triton's variables; None where its own assembler works.

    Otherwise choose the newest assembler on this machine that works. Never choose one older than
    Triton's own: it lacks the same features, today or with the next kernel. A wrong Triton, which
    is about to be replaced, gets no assembler.
    """
    changes: dict[str, str | None] = {}
    is_replaced = any(finding.name == "triton" for finding in found.bad)
    for verdict in found.verdicts:
        if verdict.assembler.is_used and (not verdict.is_good or verdict.is_ignored):
            value = None if is_replaced else _better(context, found, verdict)
            if value is not None or verdict.own is not None:
                changes[verdict.assembler.variable] = value
        elif verdict.is_refused or verdict.is_ignored:
            changes[verdict.assembler.variable] = None
    return changes


def _better(context: Context, found: Diagnosis, verdict: Verdict) -> str | None:
    case = Case(context.machine)
    own = doctor.try_ptxas(verdict.assembler.bundled, found.capability, case.ask)
    if own and not own.complaint:
        return None
    least = key(own.release) if own else ()
    tried = (
        doctor.try_ptxas(program, found.capability, case.ask)
        for program in _programs(context, case)
        if program != verdict.own
    )
    good = [
        trial for trial in tried if trial and not trial.complaint and key(trial.release) >= least
    ]
    best = max(good, key=lambda trial: key(trial.release), default=None)
    return str(best.program) if best else None


def _programs(context: Context, case: Case) -> Iterator[Path]:
    """Yield each ptxas of this machine: the toolkit's, that on PATH, those of NVIDIA's packages."""
    toolkit, on_path = case.toolkit(), case.which("ptxas")
    if toolkit:
        yield toolkit.home / "bin" / "ptxas"
    if on_path:
        yield Path(on_path)
    for folder in interpreter.site_packages(context.layout):
        yield from sorted(folder.glob("nvidia/*/bin/ptxas"))


def _plan_assembler(context: Context, found: Diagnosis) -> tuple[str, ...]:
    lines = []
    for name, value in assembler_changes(context, found).items():
        if context.settings.source(name) == "shell":
            lines.append(
                f"unset {name} in your shell, which outranks .env"
                + (f"; .env gets {name}={value}" if value else "")
            )
        else:
            lines.append(
                f".env gets {name}={value}" if value else f"{name} becomes a comment in .env"
            )
    return tuple(lines)


def _change_assembler(context: Context, found: Diagnosis) -> str:
    changes = assembler_changes(context, found)
    if in_shell := [name for name in changes if context.settings.source(name) == "shell"]:
        raise ToolchainError(
            f"{in_shell[0]} is set in the shell, where only you can change it",
            hint=hints.text("install.unset_then_fix", variables=in_shell),
        )
    for line in check.change(
        context.layout,
        changes,
        why=WHY.format(day=datetime.datetime.now(tz=datetime.UTC).date().isoformat()),
    ):
        context.run_log.console.info(f"  {line}")
        context.run_log.write(line)
    context.reload()
    wrong = [
        name for name, value in changes.items() if (context.settings.text(name) or None) != value
    ]
    if wrong:
        raise ToolchainError(
            f".env was changed, but {wrong[0]} is still {context.settings.text(wrong[0])}"
        )
    return ", ".join(
        f"{name} {'is ' + value if value else 'is not set any more'}"
        for name, value in changes.items()
    )


def _plan_folders(context: Context, found: Diagnosis) -> tuple[str, ...]:
    place = context.layout.relative(context.layout.quarantine)
    return tuple(
        f"move {context.layout.relative(folder)} to {place}" for folder in _shadows(context, found)
    )


def _shadows(context: Context, found: Diagnosis) -> tuple[Path, ...]:
    """Return the shadow and its metadata if they are in `.vllm`; elsewhere they are the user's."""
    if found.shadow is None:
        return ()
    packages = [
        folder
        for folder in interpreter.site_packages(context.layout)
        if found.shadow.is_relative_to(folder)
    ]
    described = [info for folder in packages for info in folder.glob("triton_kernels-*.dist-info")]
    return (found.shadow, *described) if packages else ()


def _move_folders(context: Context, found: Diagnosis) -> str:
    layout = context.layout
    now = datetime.datetime.now(tz=datetime.UTC)
    quarantine = layout.quarantine / now.strftime("%Y%m%d-%H%M%S-%f")
    moved = _shadows(context, found)
    for place in moved:
        target = quarantine / place.relative_to(layout.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        context.run_log.command(shlex.join(["mv", str(place), str(target)]))
        try:
            place.rename(target)
        except OSError as exc:
            raise ToolchainError(
                f"{layout.relative(place)} cannot be moved: {exc.strerror}",
                hint=hints.text("core.list_folder", folder=place.parent),
            ) from exc
    return f"{len(moved)} moved to {layout.relative(quarantine)}"


def _plan_caches(_: Context, found: Diagnosis) -> tuple[str, ...]:
    return tuple(f"rename {foreign.cache.place}" for foreign in found.foreign)


def _move_caches(context: Context, found: Diagnosis) -> str:
    names = []
    for foreign in found.foreign:
        place = jit_caches.rename_foreign(foreign)
        context.run_log.command(shlex.join(["mv", str(foreign.cache.place), str(place)]))
        names.append(place.name)
    return f"renamed to {', '.join(names)}; kernels are compiled again when needed"


def _plan_wheel(context: Context, found: Diagnosis) -> tuple[str, ...]:
    if found.paired is None or found.can_compile:
        return ()
    installed = found.installed
    if (
        installed
        and installed.is_meant
        and installed.package is not None
        and not (found.kernel and found.kernel.error)
    ):
        return ()
    return (
        f"install triton{found.paired}, which torch pairs with, from the package index"
        + (f", instead of {installed.version}" if installed else ""),
    )


def _install_wheel(context: Context, found: Diagnosis) -> str:
    layout = context.layout
    stamp.withdraw(layout.stamp("triton"))
    try:
        interpreter.install(
            layout,
            context.settings,
            ["--no-deps", "--reinstall-package", "triton", f"triton{found.paired}"],
            run_log=context.run_log,
            failure=BuildError,
        )
    finally:
        record_installed(layout)
    return f"triton {interpreter.installed(layout).get('triton')}"


def record_installed(layout: Layout) -> None:
    """Record the installed Triton in the environment's stamp: to bootstrap it is not damage."""
    recorded = stamp.read(layout.stamp("environment"))
    version = interpreter.installed(layout).get("triton")
    if recorded and recorded.packages.get("triton") != version:
        packages = {name: text for name, text in recorded.packages.items() if name != "triton"} | (
            {"triton": version} if version else {}
        )
        stamp.write(layout.stamp("environment"), replace(recorded, packages=packages))


FIXES = (
    Fix("assembler", _plan_assembler, _change_assembler),
    Fix("folders", _plan_folders, _move_folders),
    Fix("caches", _plan_caches, _move_caches),
    Fix("wheel", _plan_wheel, _install_wheel),
)
