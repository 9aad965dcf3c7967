"""inv rebuild: compile what differs from the pin, within cores and memory, and put it into the editable tree.

Observe → plan → show → act → verify → stamp. In hybrid mode the donor wheel gives every library that no change reaches; the stamp is written last.
"""

import shutil
from dataclasses import dataclass

from workspace.build import compiling, jobs, plan, stages, status
from workspace.build.jobs import Jobs, Memory
from workspace.core import lock
from workspace.core.console import Console
from workspace.core.errors import BuildError, CheckoutError, SettingsError, ToolchainError
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.environment import doctor, machine
from workspace.source import pins
from workspace.source.patches import State

# GiB that a build directory of a whole CUDA build takes, objects and libraries (v0.24.0 for one architecture: 3.1), rounded up.
NEEDED_GIB = 6.0


@dataclass(frozen=True)
class Asked:
    """What the command line says, as it was typed; None where it says nothing."""

    jobs: str | None = None
    memory: str | None = None
    targets: tuple[str, ...] = ()
    clean: bool = False
    plan_only: bool = False
    as_json: bool = False


def run(layout: Layout, settings: Settings, asked: Asked, *, console: Console, wait: bool = False, is_arm: bool = False) -> None:
    """Bring the compiled libraries up to what the tree says, and no further. Raises the WorkspaceError of the step that failed."""
    pins.require_settled(layout)
    if asked.as_json and not asked.plan_only:
        raise SettingsError("--json is of the plan", hint="./scripts/inv rebuild --plan --json")
    bounds = _bounds(settings, asked) if asked.jobs is not None or asked.memory is not None else None
    observed = plan.observe(layout, settings)
    _require_ground(observed, is_arm=is_arm)
    if asked.clean and not asked.plan_only:
        _clean(layout, console, wait=wait)
    if not asked.targets and observed.kernels.state == observed.install.state == "ok":
        console.say(f"nothing to do: the kernels of vllm {observed.version} are up to date ({_origin(observed)}); Python files are live")
        return
    bounds = bounds or _bounds(settings, asked)
    verb = "inv rebuild --plan" if asked.plan_only else "inv rebuild"
    with lock.hold(layout.lock, verb=verb, wait=wait, on_wait=console.say) as held:
        is_compiled = bool(asked.targets) or observed.kernels_wanted.kind in ("hybrid", "native")
        _preflight(layout, settings, observed, console, is_compiled=is_compiled)
        with Journal(console, layout.logs, verb="rebuild", secrets=settings.secrets, held=held) as journal:
            run = stages.Run(layout, settings, journal, plan.observe(layout, settings), is_arm=is_arm)
            _act(run, asked, bounds, is_compiled=is_compiled)
            if journal.path:
                console.say(f"log: {layout.relative(journal.path)}")
    if not asked.plan_only:
        console.say(f"vllm {observed.version} is rebuilt; next: {status.next_command(plan.observe(layout, settings))}")


def _clean(layout: Layout, console: Console, *, wait: bool) -> None:
    """Throw all build directories of this clone away; what was built and put into the tree stays."""
    with lock.hold(layout.lock, verb="inv rebuild --clean", wait=wait, on_wait=console.say), console.step("clean") as view:
        if not layout.builds.exists():
            view.skip("there is no build directory")
            return
        shutil.rmtree(layout.builds)
        view.reason = f"{layout.relative(layout.builds)} is gone"


def _bounds(settings: Settings, asked: Asked) -> tuple[Jobs, Memory]:
    host = machine.observe(settings)
    return jobs.count(settings, cores=host.cores, flag=asked.jobs), jobs.memory(host, flag=asked.memory)


def _require_ground(observed: plan.Observation, *, is_arm: bool) -> None:
    """Raise where there is nothing to compile, or nothing to compile for: those are other verbs' business."""
    if observed.stack is None or observed.environment.state == "missing":
        raise BuildError("there is no vLLM to rebuild yet", hint="./scripts/inv bootstrap")
    if observed.environment.state != "ok":
        raise BuildError(f"the environment is stale: {observed.environment.why}", hint="./scripts/inv bootstrap && ./scripts/inv rebuild")
    if observed.stack.state is State.IN_PROGRESS or (observed.stack.state is State.FOREIGN and not is_arm):
        raise CheckoutError("vendor/vllm is in the middle of something, or not on the pin: it is not what is to be compiled", hint="./scripts/inv patch")


def _origin(observed: plan.Observation) -> str:
    recorded = observed.kernels.recorded
    return " ".join(word for word in (recorded.inputs.get("origin", "") if recorded else "").split() if len(word) < 64)


def _preflight(layout: Layout, settings: Settings, observed: plan.Observation, console: Console, *, is_compiled: bool) -> None:
    need = {layout.builds: NEEDED_GIB if is_compiled else 1.0}
    kernels = "native" if is_compiled else "donor"
    rows = doctor.preflight(layout, settings, device=observed.device, kernels=kernels, need_gib=need)
    for row in rows:
        if row.state != "ok":
            console.row(row.state, row.name, f"{row.seen}: {row.why}" + (f"; {row.cure}" if row.cure else ""))
    if bad := [row for row in rows if row.state == "FAIL"]:
        raise ToolchainError(f"this machine cannot compile yet: {', '.join(f'{row.name}: {row.seen}' for row in bad)}", hint=bad[0].cure)


def _act(run: stages.Run, asked: Asked, bounds: tuple[Jobs, Memory], *, is_compiled: bool) -> None:
    """Do the steps in their order; each looks at what the one before it made."""
    if not is_compiled:
        stages.act(run, stages.VLLM)
        return
    run.job = job = compiling.Job(run, *bounds, targets=asked.targets)
    stages.act(run, compiling.PLAN)
    job.show(as_json=asked.as_json)
    if asked.plan_only:
        return
    stages.act(run, compiling.COMPILE)
    if job.is_put_due:
        stages.act(run, compiling.PUT)
    else:
        run.journal.console.say(f"{', '.join(asked.targets)} stand ready in {run.layout.relative(job.folder)}; nothing in the tree was due")
