"""inv rebuild: bring the compiled libraries up to date with the tree.

With nothing to do it imports none of the build, which takes longer to import than to ask.
"""

import shutil

from workspace.core import hints, lock
from workspace.core.console import Console
from workspace.core.errors import BuildError, CheckoutError, SettingsError
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import plan
from workspace.install.plan import RebuildOptions
from workspace.install.precompiled import text_of
from workspace.machine import check
from workspace.machine.machine import Machine
from workspace.repo import pins
from workspace.repo.patches import State


def run(
    layout: Layout,
    settings: Settings,
    options: RebuildOptions,
    *,
    console: Console,
    wait: bool = False,
    is_sandbox: bool = False,
) -> plan.Observation:
    """Bring the compiled libraries up to date with the tree, and return its state at the end: what
    was edited meanwhile is due next. Raises the error of a failed step.
    """
    pins.require_settled(layout)
    if options.as_json and not options.plan_only:
        raise SettingsError("--json works only with --plan", hint=hints.text("install.plan_json"))
    machine = Machine(layout, settings)
    if options.jobs is not None or options.memory is not None:
        from workspace.install import rebuild_job

        # A flag that is no number is refused before anything else.
        rebuild_job.bounds_of(machine, options)
    observed = plan.observe_on(machine)
    check.require(machine, console=console, device=observed.device)
    _require_context(observed, is_sandbox=is_sandbox)
    if options.clean and not options.plan_only:
        _clean(layout, console, wait=wait)
    if not options.targets and observed.kernels.state == observed.install.state == "ok":
        _report_nothing_due(observed, options, console)
        return observed
    from workspace.install import rebuild_job

    return rebuild_job.rebuild(observed, options, console=console, wait=wait, is_sandbox=is_sandbox)


def _report_nothing_due(
    observed: plan.Observation, options: RebuildOptions, console: Console
) -> None:
    """Print that all is up to date; a plan is printed on stdout, and as JSON if requested."""
    if options.as_json:
        from workspace.install import rebuild_job

        rebuild_job.show_empty(
            rebuild_job.bounds_of(observed.machine, options), console, as_json=True
        )
    recorded = observed.kernels.recorded
    is_talk = options.as_json or not options.plan_only
    (console if is_talk else console.stdout).info(
        f"nothing to do: the kernels of vllm {observed.version} are up to date"
        f" ({text_of(recorded.kernels if recorded else None)}); Python files are live"
    )


def _clean(layout: Layout, console: Console, *, wait: bool) -> None:
    """Remove all build directories of this clone; libraries that are installed in the tree stay."""
    with (
        lock.hold(layout.lock, verb="inv rebuild --clean", wait=wait, on_wait=console.info),
        console.step("clean") as view,
    ):
        if not layout.builds.exists():
            view.skip("there is no build directory")
            return
        from workspace.compile import project

        shutil.rmtree(layout.builds)
        project.link_database(layout, layout.builds)
        view.reason = f"{layout.relative(layout.builds)} is removed"


def _require_context(observed: plan.Observation, *, is_sandbox: bool) -> None:
    """Raise where there is nothing to compile, or nothing to compile for: other verbs fix that."""
    if observed.stack is None or observed.environment.state == "missing":
        raise BuildError("there is no vLLM to rebuild yet", hint=hints.text("inv.bootstrap"))
    if observed.environment.state != "ok":
        raise BuildError(
            f"the environment is stale: {observed.environment.why}",
            hint=hints.text("install.bootstrap_rebuild"),
        )
    stack, away = observed.stack, observed.stack.state is State.FOREIGN and not is_sandbox
    if stack.state is State.IN_PROGRESS or away:
        from workspace.install import status

        why = f"is in the middle of {stack.operation}" if stack.operation else "is not on the pin"
        raise CheckoutError(
            f"cannot rebuild: vendor/vllm {why}", hint=status.next_command(observed)
        )
