"""inv bootstrap: from a fresh clone to a vLLM that generates text.

Each stage first observes and acts only where something is due, so a second run changes nothing.
After an interruption, the next run resumes from the verified layers.
"""

from dataclasses import dataclass

from workspace.core import lock
from workspace.core.console import Console, RunLog, State
from workspace.core.errors import BuildError
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import plan, stages, status
from workspace.machine import check, doctor
from workspace.repo import checkout, moves, patches, pins

# GiB that a bootstrap adds, measured on 0.31.0 and rounded up: checkout 0.2, CPU environment 3.1
# and libraries 0.5, CUDA environment 10 and libraries 0.8; in the cache the release archive and the
# precompiled wheel.
NEEDED_GIB = {"cpu": 5.0, "cuda": 14.0}
NEEDED_CACHE_GIB = 1.0


@dataclass(frozen=True)
class Stage:
    """Steps of which all are due or none is; `reason` is why, or why not."""

    is_due: bool
    reason: str
    steps: stages.Steps


def run(
    layout: Layout,
    settings: Settings,
    *,
    console: Console,
    wait: bool = False,
    is_part: bool = False,
    is_sandbox: bool = False,
) -> None:
    """Bring the workspace to a verified, stamped vLLM.

    With `is_part`, the calling verb prints the next command. With `is_sandbox`, the source stays as
    it is, whatever pins and series require. Raises the WorkspaceError of the step that failed.
    """
    pins.require_settled(layout)
    observed = plan.observe(layout, settings)
    check.require(observed.machine, console=console, device=observed.device)
    due = stages_of(observed, is_sandbox=is_sandbox)
    if not any(stage.is_due for stage in due):
        if is_part:
            console.row(State.SKIPPED, "build", f"vllm {observed.version} is already built")
            return
        for stage in due:
            _show_skipped(stage, console)
        _close(observed, console, "nothing to do: ")
        return
    console.info(
        f"{observed.pin.name} {observed.pin.tag} for {observed.device}; due:"
        f" {', '.join(name for stage in due if stage.is_due for name, _ in stage.steps)}"
    )
    with lock.hold(layout.lock, verb="inv bootstrap", wait=wait, on_wait=console.info) as held:
        _preflight(observed, console)
        with RunLog(
            console, layout.logs, verb="bootstrap", secrets=settings.secrets, held=held
        ) as run_log:
            observed = _act(stages.Run(run_log, observed, is_sandbox=is_sandbox))
            if run_log.path:
                console.info(f"log: {layout.relative(run_log.path)}")
    if not is_part:
        _close(observed, console, "")


def stages_of(observed: plan.Observation, *, is_sandbox: bool = False) -> tuple[Stage, ...]:
    """Decide for each stage, in their order, whether it is due and why."""
    layout, settings = observed.machine.layout, observed.machine.settings
    is_written = layout.dotenv.exists()
    environment = observed.environment
    build = tuple(
        reason
        for reason in dict.fromkeys((*observed.kernels.reasons, *observed.install.reasons))
        if reason not in observed.needs_compilation
    )
    steps: stages.Steps = stages.VLLM
    if observed.kernels_wanted.source.is_native:
        from workspace.install import rebuild

        steps = (*rebuild.PLAN, *rebuild.COMPILE, *rebuild.INSTALL)
    source = (
        Stage(*_source(settings, observed), (("source", stages.make_source),)),
        Stage(*_patches(layout, observed), (("patches", stages.apply_patches),)),
    )
    return (
        Stage(
            not is_written,
            "exists" if is_written else "does not exist",
            ((".env", stages.write_dotenv),),
        ),
        *(() if is_sandbox else source),
        Stage(environment.state != "ok", environment.why or "up to date", stages.ENVIRONMENT),
        Stage(bool(build), "; ".join(build) or "up to date", steps),
    )


def _source(settings: Settings, observed: plan.Observation) -> tuple[bool, str]:
    current, choice = observed.checkout, settings.text("SOURCE")
    exists = current.kind in (checkout.Kind.GIT, checkout.Kind.RELEASE)
    return not exists or choice not in ("auto", current.kind.name.lower()), current.detail


def _patches(layout: Layout, observed: plan.Observation) -> tuple[bool, str]:
    stack = observed.stack
    if stack is None:
        return True, "there is no checkout yet"
    if moves.is_begun(layout, "vllm"):
        return True, "a move was interrupted"
    if stack.state is patches.State.APPLIED:
        return False, f"{len(stack.names)} applied"
    if stack.state is patches.State.UNAPPLIED and not stack.names:
        return False, "the series is empty"
    if stack.state is patches.State.UNEXPORTED:
        return False, "vendor/vllm has commits of yours; they are kept as they are"
    return True, f"{len(stack.names)} to apply"


def _act(run: stages.Run) -> plan.Observation:
    """Act on the first stage that is due and observe again, until none is due.

    A stage may make another stage due, or complete it.
    """
    checkout.sweep(run.layout, run.observed.pin)
    acted: list[tuple[str, stages.Act]] = []
    shown = 0
    while True:
        observed = run.observed = run.observe()
        due = stages_of(observed, is_sandbox=run.is_sandbox)
        first = next((index for index, stage in enumerate(due) if stage.is_due), len(due))
        for stage in due[shown:first]:
            if stage.steps[0] not in acted:
                _show_skipped(stage, run.run_log.console)
        shown = max(shown, first)
        if first == len(due):
            # Again: a full disk may have ended the step that did so first.
            checkout.protect(run.layout)
            return observed
        stage = due[first]
        if stage.steps[0] in acted:
            raise BuildError(
                f"{stage.steps[0][0]} is still due after it was done: {stage.reason}",
                hint=(
                    "a defect of the workspace, or another program changes this clone:"
                    " ./scripts/inv status"
                ),
            )
        acted.append(stage.steps[0])
        stages.act(run, stage.steps, reason=stage.reason)


def _preflight(observed: plan.Observation, console: Console) -> None:
    """Stop before any change where the machine lacks what this bootstrap needs."""
    has_environment = observed.environment.state == "ok"
    machine = observed.machine
    need = {
        machine.layout.root: 1.0 if has_environment else NEEDED_GIB[observed.device],
        machine.settings.cache: NEEDED_CACHE_GIB,
    }
    with console.step("preflight") as view:
        rows = doctor.preflight(
            machine,
            device=observed.device,
            kernels=observed.kernels_wanted.source.kind,
            need_gib=need,
        )
        view.reason = f"{sum(row.state == 'ok' for row in rows)} of {len(rows)} checks ok"
    stages.require_rows(rows, console, what="bootstrap")


def _show_skipped(stage: Stage, console: Console) -> None:
    for name, _ in stage.steps:
        console.row(State.SKIPPED, name, stage.reason)


def _close(observed: plan.Observation, console: Console, prefix: str) -> None:
    if observed.needs_compilation:
        console.warn(f"the kernels are stale: {'; '.join(observed.needs_compilation)}")
    if observed.stack and observed.stack.dirty:
        console.info(f"{len(observed.stack.dirty)} edited in vendor/vllm: live, not changed")
    console.info(f"{prefix}vllm {observed.version} is in .vllm")
    console.hint(status.next_command(observed))
