"""inv fix-triton: diagnose, mend with what is cheapest, prove it, and only then, or when asked,
build Triton from its source.

Observe → plan → show → act → verify, once for each remedy. `provide` moves vendor/triton to another
ref; it is the pin's work, and comes from the door.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

from workspace.compile import jobs as bounds
from workspace.compile import triton_build, triton_sources
from workspace.compile.jobs import Jobs, Memory
from workspace.core import lock
from workspace.core.console import NAME_WIDTH, STATE_WIDTH, Console
from workspace.core.errors import BuildError, SettingsError, ToolchainError
from workspace.core.files import sha256
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import stamp, triton_fixes
from workspace.install.triton_diagnosis import Diagnosis, Finding, diagnose, try_kernel
from workspace.install.triton_fixes import Context
from workspace.machine import hardware, interpreter, torch, venv
from workspace.repo import pins

VERB = "./scripts/inv fix-triton"
# GiB that a build adds: objects and libraries, and LLVM with NVIDIA's tools among the downloads
# (2.9 in a public note), rounded up.
NEEDED_GIB, NEEDED_CACHE_GIB = 6.0, 5.0


@dataclass(frozen=True)
class FixOptions:
    """What the command line says, as it was typed."""

    check: bool = False
    from_source: bool = False
    ref: str | None = None
    jobs: str | None = None


def run(
    layout: Layout,
    settings: Settings,
    options: FixOptions,
    *,
    console: Console,
    provide: Callable[[], None],
    wait: bool = False,
) -> None:
    """Bring Triton to where a kernel compiles, and runs where there is a GPU.

    Raises ToolchainError where something is wrong and was only looked at, or cannot be mended here,
    and what the build from source raises.
    """
    _require_sense(options)
    limits = _limits(settings, options) if options.from_source else None
    pins.require_settled(layout)
    found = diagnose(layout, settings)
    _show(found.findings, console)
    if options.check or (not found.bad and not options.from_source):
        _close(found, console, f"{VERB}    mends what it can{_in_shell(found, settings)}")
        return
    with (
        lock.hold(layout.lock, verb="inv fix-triton", wait=wait, on_wait=console.info) as held,
        RunLog(
            console, layout.logs, verb="fix-triton", secrets=settings.secrets, held=held
        ) as run_log,
    ):
        context = Context(layout, settings, run_log)
        triton_fixes.put_back_former(context)
        found = _mended(
            context, diagnose(layout, context.settings), is_source_asked=options.from_source
        )
        if run_log.path:
            console.info(f"log: {layout.relative(run_log.path)}")
    if options.from_source or not (found.can_compile or found.paired is None):
        if not options.from_source:
            console.info(
                "nothing cheaper has helped: Triton is built from its source now; ^C stops it, and"
                " what is there stays"
            )
        found = _from_source(
            context,
            options,
            limits or _limits(settings, options),
            console=console,
            provide=provide,
            wait=wait,
        )
    _close(
        found,
        console,
        f"{triton_sources.FROM_SOURCE}    builds one here; rm -rf .vllm && ./scripts/inv bootstrap "
        f"   makes all anew{_in_shell(found, settings)}",
    )


def _require_sense(options: FixOptions) -> None:
    if options.check and (options.from_source or options.ref or options.jobs):
        raise SettingsError("--check builds nothing: it stands alone", hint=f"{VERB} --check")
    if (options.ref or options.jobs) and not options.from_source:
        raise SettingsError(
            "--ref and --jobs are of a build: they go with --from-source",
            hint=f"{VERB} --from-source",
        )


def _limits(settings: Settings, options: FixOptions) -> tuple[Jobs, Memory]:
    host = hardware.observe(settings)
    return bounds.count(settings, cores=host.cores, flag=options.jobs), bounds.memory(host)


def _show(findings: tuple[Finding, ...], console: Console) -> None:
    """What is well on one line; of the rest what was seen, the cause and the remedy."""
    indent = " " * (STATE_WIDTH + NAME_WIDTH)
    for finding in findings:
        console.row(finding.state, finding.name, finding.seen)
        if finding.state != "ok":
            console.info(f"{indent}cause: {finding.cause}")
            console.info(f"{indent}remedy: {finding.fix}")


def _close(found: Diagnosis, console: Console, way_on: str) -> None:
    if found.bad:
        first = found.bad[0]
        names = ", ".join(dict.fromkeys(finding.name for finding in found.bad))
        raise ToolchainError(
            f"something is wrong with Triton here: {names}; first: {first.seen}: {first.cause}",
            hint=way_on,
        )
    console.info(
        "nothing is wrong with Triton here; next:"
        f" {'./scripts/nox -s smoke' if found.installed else './scripts/inv status'}"
    )


def _in_shell(found: Diagnosis, settings: Settings) -> str:
    """What only the person can change, as the end of a hint."""
    names = [
        verdict.assembler.variable
        for verdict in found.verdicts
        if verdict.own and (verdict.is_ignored or not verdict.is_good)
    ]
    in_shell = [name for name in names if settings.source(name) == "shell"]
    return f"; first: unset {' '.join(in_shell)}" if in_shell else ""


def _mended(context: Context, found: Diagnosis, *, is_source_asked: bool) -> Diagnosis:
    """Take remedy by remedy, each shown before, done, and judged by a new diagnosis. The wheel is
    left alone where another Triton is to come.
    """
    console = context.run_log.console
    for fix in triton_fixes.FIXES:
        planned = (
            fix.plan(context, found)
            if found.bad and not (is_source_asked and fix.name == "wheel")
            else ()
        )
        if not planned:
            continue
        for line in planned:
            console.info(f"{fix.name}: {line}")
        before = {finding.name for finding in found.bad}
        with console.step(fix.name) as view:
            context.run_log.phase(fix.name, view)
            with torch.held(context.layout, context.settings, step=fix.name):
                view.reason = fix.act(context, found)
        context.run_log.step = None
        found = diagnose(context.layout, context.settings)
        cured = before - {finding.name for finding in found.bad}
        console.info(
            "looked again:"
            f" {', '.join(sorted(cured)) + ' mended' if cured else 'nothing is better for it'}"
        )
    if found.bad:
        _show(found.bad, console)
    return found


def _from_source(
    context: Context,
    options: FixOptions,
    limits: tuple[Jobs, Memory],
    *,
    console: Console,
    provide: Callable[[], None],
    wait: bool,
) -> Diagnosis:
    """Build the pinned Triton, or the one of --ref, and put it in the place of the installed one
    once its kernel is right.
    """
    layout, settings = context.layout, context.settings
    _require_context(layout, settings)
    if options.ref:
        provide()
    with (
        lock.hold(
            layout.lock, verb="inv fix-triton --from-source", wait=wait, on_wait=console.info
        ) as held,
        RunLog(
            console, layout.logs, verb="fix-triton", secrets=settings.secrets, held=held
        ) as run_log,
    ):
        with console.step("source") as view:
            run_log.phase("source", view)
            tree = triton_sources.prepare_source(layout, settings, run_log=run_log, step=view)
        with console.step("downloads") as view:
            run_log.phase("downloads", view)
            home, told = (
                triton_sources.home_of(settings),
                triton_build.environment(
                    layout, settings, limits[0], triton_build.folder(layout, settings)
                ),
            )
            view.reason = triton_sources.provide_downloads(
                tree, home, settings, told, run_log=run_log, step=view
            )
        with (
            console.step("requirements") as view,
            torch.held(layout, settings, step="requirements"),
        ):
            run_log.phase("requirements", view)
            view.reason = triton_build.put_requirements(layout, settings, tree, run_log=run_log)
        for line in (limit.sentence for limit in limits):
            console.info(line)
        with console.step("compile") as view, torch.held(layout, settings, step="compile"):
            run_log.phase("compile", view)
            wheel = triton_build.build_wheel(
                layout, settings, tree, jobs=limits[0], memory=limits[1], run_log=run_log, step=view
            )
            view.reason = f"{wheel.units} units, {wheel.path.name}"
        for line in wheel.summary:
            console.info(line)
        found = _put(Context(layout, settings, run_log), tree, wheel, jobs=limits[0].count)
        if run_log.path:
            console.info(f"log: {layout.relative(run_log.path)}")
    return found


def _require_context(layout: Layout, settings: Settings) -> None:
    """Raise before anything is fetched or compiled where the result could not be put in its
    place.
    """
    places = (layout.environment, *interpreter.site_packages(layout), layout.state)
    closed = next(
        (place for place in places if place.exists() and not os.access(place, os.W_OK)), None
    )
    if closed:
        raise ToolchainError(
            f"{layout.relative(closed)} cannot be written: a built Triton would have no place",
            hint=f"ls -ld {closed}; mount | grep vllm",
        )
    for place, need in (
        (layout.state, NEEDED_GIB),
        (triton_sources.home_of(settings), NEEDED_CACHE_GIB),
    ):
        free = hardware.free_gib(place)
        if free < need:
            raise ToolchainError(
                f"{place} has {free:.1f} GiB left, a build of Triton needs {need:g} there",
                hint=f"df -h {hardware.existing(place)}",
            )


def _put(
    context: Context, tree: triton_sources.Source, wheel: triton_build.Wheel, *, jobs: int
) -> Diagnosis:
    """Install the wheel, let it compile the kernel, and go back to the former Triton where it does
    not.
    """
    layout, settings, run_log = context.layout, context.settings, context.run_log
    before, recorded = venv.keep_former(layout), stamp.read(layout.stamp("triton"))
    stamp.withdraw(layout.stamp("triton"))
    try:
        with run_log.console.step("install") as view, torch.held(layout, settings, step="install"):
            run_log.phase("install", view)
            arguments = ["--no-deps", "--reinstall-package", "triton", str(wheel.path)]
            interpreter.install(layout, settings, arguments, run_log=run_log, failure=BuildError)
            view.reason = f"triton {interpreter.installed(layout).get('triton')}, torch stays"
        with run_log.console.step("verify") as view:
            run_log.phase("verify", view)
            found = _verified(context)
            view.reason = found.kernel.summary if found.kernel else ""
    except BaseException as exc:
        venv.put_former_back(layout, settings, before, run_log=run_log)
        triton_fixes.vouch(layout)
        if recorded:
            stamp.write(layout.stamp("triton"), recorded)
        if isinstance(exc, BuildError):
            back = (
                f"triton {before.version} is back in .vllm"
                if before.version
                else "there was no Triton before, and there is none now"
            )
            raise BuildError(
                f"the built Triton was not kept: {exc.message}; {back}",
                hint=exc.hint,
                details=exc.details,
            ) from exc
        raise
    venv.drop_former(before)
    there = torch.observe_triton(layout)
    outcome = {
        "version": there.version if there else "",
        "wheel": str(wheel.path),
        "sha256": sha256(wheel.path),
        "seconds": f"{wheel.seconds:.0f}",
        "jobs": str(jobs),
        "kernel": found.kernel.summary if found.kernel else "",
        "run": found.kernel.run if found.kernel else "",
    }
    patched = (
        f"{tree.patches} {'patch' if tree.patches == 1 else 'patches'}" if tree.patches else ""
    )
    build = torch.observe(layout, settings)
    inputs = {
        "commit": tree.commit,
        "ref": tree.ref,
        "tree": tree.content,
        "patches": patched,
        "torch": build.version if build else "none",
    }
    stamp.write(layout.stamp("triton"), stamp.Stamp(inputs=inputs, outcome=outcome))
    triton_fixes.vouch(layout)
    return diagnose(layout, settings)


def _verified(context: Context) -> Diagnosis:
    """Raise BuildError where the kernel of the diagnosis does not come out right with what was
    installed.
    """
    found = diagnose(context.layout, context.settings)
    kernel = found.kernel or try_kernel(context.layout, context.settings, found.capability)
    if kernel.error:
        raise BuildError(
            f"a small kernel does not come out right: {kernel.error}",
            hint=f"{VERB} --check; {triton_sources.FROM_SOURCE} --ref v3.7.1    builds another one",
        )
    return found
