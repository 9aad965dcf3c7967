"""What mends a finding, cheapest first: a line of .env, folders moved out of the way, caches moved
aside, the wheel that torch pairs with.

Each says what it would do before it is done. Whether it has helped is for the next diagnosis to
say. The build from source is source.py's.
"""

import datetime
import shlex
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from workspace.core import settings
from workspace.core.errors import BuildError, ToolchainError
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import stamp
from workspace.install.triton_diagnosis import Diagnosis, brought
from workspace.machine import dotenv, interpreter, jit_caches, venv
from workspace.machine.case import Case, key
from workspace.machine.dotenv import Verdict

WHY = "changed by inv fix-triton on {day}"


@dataclass
class Context:
    """Where remedies work; `settings` are read again once .env has changed."""

    layout: Layout
    settings: Settings
    run_log: RunLog

    def reload(self) -> None:
        flags = {
            name: value.text
            for name, value in self.settings.values.items()
            if value.source == "flag"
        }
        self.settings = settings.load(self.layout, flags=flags, environ=self.settings.shell)


@dataclass(frozen=True)
class Fix:
    """`plan` says what it would do, nothing where it is not for what was found; `act` does it and
    says what was done.
    """

    name: str
    plan: Callable[[Context, Diagnosis], tuple[str, ...]]
    act: Callable[[Context, Diagnosis], str]


def assembler_changes(context: Context, found: Diagnosis) -> dict[str, str | None]:
    """Decide other values for Triton's variables: none where its own assembler serves, else the
    newest on this machine that does.

    Never one that is older than Triton's own: what that lacks today an older one lacks as well, or
    will with the next kernel. And none for a Triton that is the wrong one, and about to go.
    """
    changes: dict[str, str | None] = {}
    is_leaving = any(finding.name == "triton" for finding in found.bad)
    for verdict in found.verdicts:
        if verdict.assembler.is_used and (not verdict.is_good or verdict.is_ignored):
            value = None if is_leaving else _better(context, found, verdict)
            if value is not None or verdict.own is not None:
                changes[verdict.assembler.variable] = value
        elif verdict.is_refused or verdict.is_ignored:
            changes[verdict.assembler.variable] = None
    return changes


def _better(context: Context, found: Diagnosis, verdict: Verdict) -> str | None:
    case = Case(context.layout, context.settings, device=None, kernels="precompiled")
    own = dotenv.try_ptxas(verdict.assembler.bundled, found.capability, case.ask)
    if own and not own.complaint:
        return None
    least = key(own.release) if own else ()
    tried = (
        dotenv.try_ptxas(program, found.capability, case.ask)
        for program in _programs(context, case)
        if program != verdict.own
    )
    good = [
        trial for trial in tried if trial and not trial.complaint and key(trial.release) >= least
    ]
    best = max(good, key=lambda trial: key(trial.release), default=None)
    return str(best.program) if best else None


def _programs(context: Context, case: Case) -> Iterator[Path]:
    """Every ptxas of this machine that is worth a try: the toolkit's, the one on PATH, those of
    NVIDIA's packages in `.vllm`.
    """
    toolkit, on_path = case.toolkit(), case.which("ptxas")
    if toolkit:
        yield toolkit.home / "bin" / "ptxas"
    if on_path:
        yield Path(on_path)
    for folder in interpreter.site_packages(context.layout):
        yield from sorted(folder.glob("nvidia/*/bin/ptxas"))


def _plan_assembler(context: Context, found: Diagnosis) -> tuple[str, ...]:
    said = []
    for name, value in assembler_changes(context, found).items():
        if context.settings.source(name) == "shell":
            said.append(
                f"unset {name} in your shell, which outranks .env"
                + (f"; .env gets {name}={value}" if value else "")
            )
        else:
            said.append(
                f".env gets {name}={value}" if value else f"{name} becomes a remark in .env"
            )
    return tuple(said)


def _change_assembler(context: Context, found: Diagnosis) -> str:
    changes = assembler_changes(context, found)
    if in_shell := [name for name in changes if context.settings.source(name) == "shell"]:
        raise ToolchainError(
            f"{in_shell[0]} is set in the shell, where only you can change it",
            hint=f"unset {' '.join(in_shell)} && ./scripts/inv fix-triton",
        )
    for line in dotenv.change(
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
            f".env was changed, and {wrong[0]} is still {context.settings.text(wrong[0])}",
            hint="look at .env: the name stands there twice?",
        )
    return ", ".join(
        f"{name} {'is ' + value if value else 'no longer counts'}"
        for name, value in changes.items()
    )


def _plan_folders(context: Context, found: Diagnosis) -> tuple[str, ...]:
    place = context.layout.relative(context.layout.quarantine)
    said = [
        f"{context.layout.relative(one.place)}, which git does not track, goes to {place}"
        for one in found.stale
    ]
    return (
        *said,
        *(
            f"{context.layout.relative(folder)} goes to {place}"
            for folder in _shadows(context, found)
        ),
    )


def _shadows(context: Context, found: Diagnosis) -> tuple[Path, ...]:
    """The shadow and what describes it as a package, as far as they lie in `.vllm`; one that does
    not is its owner's.
    """
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
    scratch = layout.quarantine / datetime.datetime.now(tz=datetime.UTC).strftime(
        "%Y%m%d-%H%M%S-%f"
    )
    moved = [*(one.place for one in found.stale), *_shadows(context, found)]
    for place in moved:
        target = scratch / place.relative_to(layout.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        context.run_log.command(shlex.join(["mv", str(place), str(target)]))
        try:
            place.rename(target)
        except OSError as exc:
            raise ToolchainError(
                f"{layout.relative(place)} cannot be moved: {exc.strerror}",
                hint=f"ls -ld {place.parent}",
            ) from exc
    for one in found.stale:
        _bring_again(layout, one.place)
    return f"{len(moved)} moved to {layout.relative(scratch)}"


def _bring_again(layout: Layout, place: Path) -> None:
    """Put what the build's wheel has for a folder back into it: without it vLLM would have no
    kernels of Triton's there.
    """
    recorded = stamp.read(layout.stamp("vllm"))
    wheel = Path(recorded.outcome.get("wheel", "")) if recorded else Path()
    names = brought(wheel, str(place.relative_to(layout.vllm))) if wheel.is_file() else {}
    if names:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(layout.vllm, members=list(names))


def _plan_caches(_: Context, found: Diagnosis) -> tuple[str, ...]:
    return tuple(f"{one.cache.place} goes aside, to a name beside it" for one in found.foreign)


def _move_caches(context: Context, found: Diagnosis) -> str:
    said = []
    for one in found.foreign:
        place = jit_caches.put_aside(one)
        context.run_log.command(shlex.join(["mv", str(one.cache.place), str(place)]))
        said.append(place.name)
    return f"now {', '.join(said)}; a kernel that is needed is compiled again"


def _plan_wheel(context: Context, found: Diagnosis) -> tuple[str, ...]:
    if found.paired is None or found.can_compile:
        return ()
    there = found.installed
    if (
        there
        and there.is_meant
        and there.package is not None
        and not (found.kernel and found.kernel.error)
    ):
        return ()
    return (
        f"triton{found.paired} from the package index, which torch pairs with"
        + (f", instead of {there.version}" if there else ""),
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
        vouch(layout)
    return f"triton {interpreter.installed(layout).get('triton')}"


def vouch(layout: Layout) -> None:
    """Let the environment's stamp say which Triton is there now, which is this verb's doing:
    bootstrap would else take it for damage.
    """
    recorded = stamp.read(layout.stamp("environment"))
    version = interpreter.installed(layout).get("triton")
    if recorded and recorded.packages.get("triton") != version:
        packages = {name: text for name, text in recorded.packages.items() if name != "triton"} | (
            {"triton": version} if version else {}
        )
        stamp.write(layout.stamp("environment"), replace(recorded, packages=packages))


def put_back_former(context: Context) -> None:
    """Finish what a run that was killed between two Tritons has left; one that bootstrap has
    vouched for since then stays.
    """
    layout = context.layout
    if not venv.is_former_kept(layout):
        return
    one, version = venv.keep_former(layout), interpreter.installed(layout).get("triton")
    recorded = stamp.read(layout.stamp("environment"))
    if version is not None and version in (
        one.version,
        recorded.packages.get("triton") if recorded else None,
    ):
        venv.drop_former(one)
        return
    venv.put_former_back(layout, context.settings, one, run_log=context.run_log)
    vouch(layout)
    context.run_log.console.info(
        f"a run that was ended in the middle is taken back: triton {one.version or 'none'} is in"
        " .vllm again"
    )


FIXES = (
    Fix("assembler", _plan_assembler, _change_assembler),
    Fix("folders", _plan_folders, _move_folders),
    Fix("caches", _plan_caches, _move_caches),
    Fix("wheel", _plan_wheel, _install_wheel),
)
