"""inv fix-triton: diagnose Triton, apply the cheapest fix, and verify it.

The steps for each fix: observe, plan, show, act, verify. Triton is built from source only where no
fix helps, or on request. The caller passes `provide`, which moves vendor/triton to another ref.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from workspace.compile import jobs as bounds
from workspace.compile import triton_build
from workspace.compile.jobs import Jobs, Memory
from workspace.core import hints
from workspace.core.console import Console, Row, RunLog
from workspace.core.errors import BuildError, SettingsError, ToolchainError, counted
from workspace.core.files import sha256
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import stages, stamp, status, triton_fixes
from workspace.install.triton_diagnosis import Diagnosis, Kernel, diagnose, try_kernel
from workspace.install.triton_fixes import Context, Fix
from workspace.machine import doctor, hardware, interpreter, torch
from workspace.machine.machine import Case, Machine
from workspace.repo import pins

# GiB that a build adds: objects and libraries, and LLVM with NVIDIA's tools among the downloads
# (2.9 in a public note), rounded up.
NEEDED_GIB, NEEDED_CACHE_GIB = 6.0, 5.0
# Rounds over the fixes: the wheel comes last, and makes the cache of the former Triton foreign.
ROUNDS = 3


@dataclass(frozen=True)
class FixOptions:
    """Options of the command line as typed."""

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
    """Fix Triton until a test kernel compiles and, on a GPU, gives the right result.

    Raises ToolchainError where a fault remains or was only diagnosed, and the errors of the build
    from source.
    """
    _require_sense(options)
    machine = Machine(layout, settings)
    limits = _limits(machine, options) if options.from_source else None
    pins.require_settled(layout)
    found = diagnose(machine)
    screen = console.stdout if options.check else console
    screen.rows(found.findings)
    if options.check or (not found.bad and not options.from_source):
        hint = hints.text("install.fix_what_can", first=_in_shell(found, settings))
        _close(machine, found, screen, hint)
        return
    context, found = _fix(machine, console=console, wait=wait, is_from_source=options.from_source)
    if options.from_source or not (found.can_compile or found.paired is None):
        if not options.from_source:
            console.info(
                "no cheaper fix has helped: Triton is built from source now; ^C stops the build and"
                " keeps what is installed"
            )
        limits = limits or _limits(context.machine, options)
        found = _from_source(context, options, limits, provide=provide, wait=wait)
    hint = hints.text("install.build_triton", first=_in_shell(found, settings))
    _close(context.machine, found, console, hint)


def _fix(
    machine: Machine, *, console: Console, wait: bool, is_from_source: bool
) -> tuple[Context, Diagnosis]:
    """Apply the fixes under the lock."""
    layout, settings = machine.layout, machine.settings
    with stages.locked(
        layout, settings, "inv fix-triton", console=console, wait=wait, names_log=True
    ) as run_log:
        context = Context(machine, run_log)
        found = _apply_fixes(context, diagnose(context.reread()), is_from_source=is_from_source)
    return context, found


def _require_sense(options: FixOptions) -> None:
    if options.check and (options.from_source or options.ref or options.jobs):
        raise SettingsError(
            "--check builds nothing and takes no other option",
            hint=hints.text("install.check_triton"),
        )
    if (options.ref or options.jobs) and not options.from_source:
        raise SettingsError(
            "--ref and --jobs work only with --from-source",
            hint=hints.text("install.triton_source"),
        )


def _limits(machine: Machine, options: FixOptions) -> tuple[Jobs, Memory]:
    host = machine.host()
    return (
        bounds.count(
            machine.settings,
            cores=host.cores,
            flag=options.jobs,
            command=triton_build.FROM_SOURCE,
        ),
        bounds.memory(host),
    )


def _close(machine: Machine, found: Diagnosis, console: Console, hint: str) -> None:
    """Print the next command. Raises ToolchainError with `hint` where a fault remains."""
    if found.bad:
        first = found.bad[0]
        names = ", ".join(dict.fromkeys(finding.name for finding in found.bad))
        raise ToolchainError(
            f"Triton has faults: {names}; the first: {first.text}: {first.why}",
            hint=hint,
        )
    console.info("Triton has no fault")
    is_runnable = found.installed and not status.lacks_gpu(machine, Case(machine).device)
    console.hint(hints.text("nox.smoke") if is_runnable else hints.text("inv.status"))


def _in_shell(found: Diagnosis, settings: Settings) -> str:
    """Return the end of a hint: the variables that only the user can unset."""
    names = [
        verdict.assembler.variable
        for verdict in found.verdicts
        if verdict.own and (verdict.is_ignored or not verdict.is_good)
    ]
    in_shell = [name for name in names if settings.source(name) == "shell"]
    return f"; first: unset {' '.join(in_shell)}" if in_shell else ""


def _apply_fixes(context: Context, found: Diagnosis, *, is_from_source: bool) -> Diagnosis:
    """Apply the fixes in order, and again while a fix has a new plan, for at most ROUNDS rounds.

    A plan that has not helped against the same faults is not tried again. The wheel is not
    installed where a build from source follows.
    """
    fixes = [fix for fix in triton_fixes.FIXES if not (is_from_source and fix.name == "wheel")]
    tried: set[tuple[tuple[str, ...], tuple[Row, ...]]] = set()
    for _ in range(ROUNDS):
        before = found
        for fix in fixes:
            planned = fix.plan(context, found) if found.bad else ()
            if planned and (planned, found.bad) not in tried:
                tried.add((planned, found.bad))
                found = _apply(context, found, fix, planned)
        if found is before:
            break
    else:
        if found.bad:
            context.run_log.console.info(
                f"faults remain after {ROUNDS} rounds of fixes: another program may cause them"
            )
    if found.bad:
        context.run_log.console.rows(found.bad)
    return found


def _apply(context: Context, found: Diagnosis, fix: Fix, planned: tuple[str, ...]) -> Diagnosis:
    """Show the plan of a fix, run it, and diagnose again."""
    console = context.run_log.console
    for line in planned:
        console.info(f"{fix.name}: {line}")
    before = {finding.name for finding in found.bad}
    with (
        stages.step(context.run_log, fix.name) as view,
        torch.held(context.layout, step=fix.name),
    ):
        view.reason = fix.act(context, found)
    found = diagnose(context.reread())
    fixed = before - {finding.name for finding in found.bad}
    console.info(
        "diagnosed again:"
        f" {', '.join(sorted(fixed)) + ' fixed' if fixed else 'nothing has improved'}"
    )
    return found


def _from_source(
    context: Context,
    options: FixOptions,
    limits: tuple[Jobs, Memory],
    *,
    provide: Callable[[], None],
    wait: bool,
) -> Diagnosis:
    """Build the pinned Triton, or that of --ref, and keep it once its test kernel is right."""
    layout, settings, console = context.layout, context.settings, context.run_log.console
    _require_context(layout, settings)
    if options.ref:
        provide()
    verb = "inv fix-triton --from-source"
    with stages.locked(
        layout, settings, verb, console=console, wait=wait, names_log=True
    ) as run_log:
        context = Context(context.reread(), run_log)
        tree, wheel = _build(context.machine, limits, run_log)
        return _install(context, tree, wheel, jobs=limits[0].count)


def _build(
    machine: Machine, limits: tuple[Jobs, Memory], run_log: RunLog
) -> tuple[triton_build.Source, triton_build.Wheel]:
    """Fetch the sources and downloads, install the requirements, and compile the wheel."""
    layout, settings = machine.layout, machine.settings
    with stages.step(run_log, "source") as view:
        tree = triton_build.prepare_source(layout, settings, run_log=run_log, step=view)
    triton_build.require_local_folders(settings.child_environment("build"))
    with (
        stages.step(run_log, "requirements") as view,
        torch.held(layout, step="requirements"),
    ):
        view.reason = triton_build.install_requirements(layout, settings, tree, run_log=run_log)
    for limit in limits:
        run_log.console.info(limit.sentence)
    with stages.step(run_log, "compile") as view, torch.held(layout, step="compile"):
        wheel = triton_build.build_wheel(
            machine, tree, jobs=limits[0], memory=limits[1], run_log=run_log, step=view
        )
        view.reason = f"{wheel.units} units, {wheel.path.name}"
    run_log.console.table(wheel.summary, right=(1, 2))
    return tree, wheel


def _require_context(layout: Layout, settings: Settings) -> None:
    """Raise before any download where the built Triton could not be installed."""
    places = (layout.environment, *interpreter.site_packages(layout), layout.state)
    closed = next(
        (place for place in places if place.exists() and not os.access(place, os.W_OK)), None
    )
    if closed:
        raise ToolchainError(
            f"{layout.relative(closed)} cannot be written: a built Triton could not be installed",
            hint=hints.text("install.triton_mounts", folder=closed),
        )
    for place, need in (
        (layout.state, NEEDED_GIB),
        (triton_build.home_of(settings), NEEDED_CACHE_GIB),
    ):
        free = hardware.free_gib(place)
        if free < need:
            raise ToolchainError(
                f"{place} has {free:.1f} GiB left, a build of Triton needs {need:g} GiB",
                hint=hints.text("core.disk_of", folder=hardware.existing(place)),
            )


def _install(
    context: Context, tree: triton_build.Source, wheel: triton_build.Wheel, *, jobs: int
) -> Diagnosis:
    """Verify the wheel, then install it: a wheel whose test kernel fails replaces no Triton."""
    layout, settings, run_log = context.layout, context.settings, context.run_log
    with stages.step(run_log, "verify") as view:
        view.reason = _prove(context, wheel.path)
    stamp.withdraw(layout.stamp("triton"))
    try:
        with stages.step(run_log, "install") as view, torch.held(layout, step="install"):
            arguments = ["--no-deps", "--reinstall-package", "triton", str(wheel.path)]
            interpreter.install(layout, settings, arguments, run_log=run_log, failure=BuildError)
            view.reason = f"triton {interpreter.installed(layout).get('triton')}, torch unchanged"
    finally:
        triton_fixes.record_installed(layout)
    found = diagnose(context.reread())
    kernel = found.kernel or try_kernel(layout, settings, found.capability)
    _require_right(kernel)
    stamp.write(layout.stamp("triton"), _stamp(context, tree, wheel, kernel, jobs=jobs))
    return found


def _prove(context: Context, wheel: Path) -> str:
    """Compile the test kernel with a Triton beside the installed one, and return a summary.

    Raises BuildError where the kernel fails.
    """
    layout, settings = context.layout, context.settings
    with tempfile.TemporaryDirectory(dir=layout.state, prefix="triton-") as folder:
        arguments = ["--no-deps", "--target", folder, str(wheel)]
        interpreter.install(
            layout, settings, arguments, run_log=context.run_log, failure=BuildError
        )
        capability = doctor.capability_of(Case(context.machine))
        kernel = try_kernel(layout, settings, capability, packages=Path(folder))
    _require_right(kernel)
    return kernel.summary


def _require_right(kernel: Kernel) -> None:
    if kernel.error:
        raise BuildError(
            f"the built Triton is not used: the test kernel fails: {kernel.error}",
            hint=hints.text("install.triton_ref"),
        )


def _stamp(
    context: Context,
    tree: triton_build.Source,
    wheel: triton_build.Wheel,
    kernel: Kernel,
    *,
    jobs: int,
) -> stamp.Stamp:
    """Return the stamp of a verified Triton that was built here."""
    installed, build = context.machine.triton(), context.machine.torch()
    patched = counted(tree.patches, "patch", "patches") if tree.patches else ""
    return stamp.Stamp(
        inputs={
            "commit": tree.commit,
            "ref": tree.ref,
            "tree": tree.content,
            "patches": patched,
            "torch": build.version if build else "none",
        },
        outcome={
            "version": installed.version if installed else "",
            "wheel": str(wheel.path),
            "sha256": sha256(wheel.path),
            "seconds": f"{wheel.seconds:.0f}",
            "jobs": str(jobs),
            "kernel": kernel.summary,
            "run": kernel.run,
        },
    )
