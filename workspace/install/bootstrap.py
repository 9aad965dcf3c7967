"""inv bootstrap: from a fresh clone to a vLLM that generates text.

Each stage first observes and acts only where something is due, so a second run changes nothing.
After an interruption, the next run resumes from the verified layers.
"""

import contextlib
import hashlib
import os
import platform
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from workspace.core import files, hints, process, records
from workspace.core.console import Console, State, Step
from workspace.core.errors import BuildError, SettingsError, ToolchainError, counted
from workspace.core.paths import Layout
from workspace.core.settings import Settings, Value
from workspace.install import bundle, plan, precompiled, stages, stamp, status
from workspace.machine import check, doctor, interpreter, jit_caches, run_environment
from workspace.repo import checkout, patches, pins
from workspace.repo.git import Git, worktree

# GiB that a bootstrap adds, measured on 0.31.0 and rounded up: checkout 0.2, CPU environment 3.1
# and libraries 0.5, CUDA environment 10 and libraries 0.8; in the cache the release archive and the
# precompiled wheel.
NEEDED_GIB = {"cpu": 5.0, "cuda": 14.0}
NEEDED_CACHE_GIB = 1.0
# The record of the first token, among the stamps.
FIRST_TOKEN = "first-token"
# Time between two lines on the wait for it, through a pipe.
WAIT_LINE_S = 15.0
End = Literal["token", "command", "part"]
# The variables that lead uv and pip to other places than a bundle.
_PLACES = re.compile(r"UV_(.*INDEX.*|FIND_LINKS|CONFIG_FILE)|PIP_.*")


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
    end: End = "token",
    is_sandbox: bool = False,
) -> plan.Observation:
    """Bring the workspace to a verified, stamped vLLM, and return its state at the end.

    It ends with a first token, or without it with the next `command`; as a `part` of another verb
    with neither. With `is_sandbox`, the source stays as it is, whatever pins and series require.
    Raises the WorkspaceError of the step that failed.
    """
    pins.require_settled(layout)
    observed = plan.observe(layout, settings)
    check.require(observed.machine, console=console, device=observed.device)
    due = stages_of(observed, is_sandbox=is_sandbox)
    if end == "token":
        due = (*due, _first_token_stage(observed))
    if not any(stage.is_due for stage in due):
        _show_nothing_due(due, observed, console, end)
        return observed
    console.sentence(
        f"{observed.pin.name} {observed.pin.tag} for {observed.device}; due:"
        f" {', '.join(name for stage in due if stage.is_due for name, _ in stage.steps)}"
    )
    with stages.locked(
        layout, settings, "inv bootstrap", console=console, wait=wait, names_log=True
    ) as run_log:
        _preflight(observed, console)
        run = stages.Run(run_log, observed, is_sandbox=is_sandbox)
        observed = _act(run)
        if end == "token":
            _act_on_first_token(run)
    if end != "part":
        _close(observed, console, "")
    return observed


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
        from workspace.install import rebuild_job as job

        steps = (*job.PLAN, *job.COMPILE, *job.INSTALL)
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
    exists, base, tree = current.kind.is_pinned, observed.pin.base, observed.tree
    if base and tree and base.commit not in tree.git.present((base.commit,)):
        return True, f"vendor/vllm lacks {base.tag}, the base of the pin"
    return not exists or choice not in ("auto", current.kind.name.lower()), current.detail


def _patches(layout: Layout, observed: plan.Observation) -> tuple[bool, str]:
    stack = observed.stack
    if stack is None:
        return True, "there is no checkout yet"
    if worktree.is_move_begun(layout, "vllm"):
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

    A stage may make another stage due, or complete it. What was edited during a stage makes it due
    again, for another reason than before.
    """
    checkout.sweep(run.layout, run.observed.pin)
    acted: list[tuple[tuple[str, stages.Act], str]] = []
    shown = 0
    while True:
        observed = run.observed = run.observe()
        due = stages_of(observed, is_sandbox=run.is_sandbox)
        first = next((index for index, stage in enumerate(due) if stage.is_due), len(due))
        for stage in due[shown:first]:
            if stage.steps[0] not in dict(acted):
                _show_skipped(stage, run.run_log.console)
        shown = max(shown, first)
        if first == len(due):
            # Again: a full disk may have ended the step that did so first.
            checkout.protect(run.layout)
            return observed
        stage = due[first]
        if (stage.steps[0], stage.reason) in acted:
            raise BuildError(f"{stage.steps[0][0]} is still due after it was done: {stage.reason}")
        acted.append((stage.steps[0], stage.reason))
        stages.act(run, stage.steps, reason=stage.reason)


def _first_token_stage(observed: plan.Observation) -> Stage:
    """Decide whether this build still has to generate its first token on the device.

    Kernels that were compiled since do not count: after inv rebuild there is nothing to do.
    """
    wanted, recorded = (
        _first_token_inputs(observed),
        stamp.read(observed.machine.layout.stamp(FIRST_TOKEN)),
    )
    if recorded is not None and recorded.inputs == wanted:
        return Stage(False, f"was generated on {observed.device}", _FIRST_TOKEN_STEPS)
    if observed.device == "cuda" and not observed.machine.gpus:
        return Stage(False, "there is no GPU here", _FIRST_TOKEN_STEPS)
    return Stage(True, "this build has generated none yet", _FIRST_TOKEN_STEPS)


def _act_on_first_token(run: stages.Run) -> None:
    stage = _first_token_stage(run.observed)
    if stage.is_due:
        stages.act(run, stage.steps)
    else:
        _show_skipped(stage, run.run_log.console)


def _first_token_inputs(observed: plan.Observation) -> dict[str, str]:
    built = observed.kernels.recorded
    names = ("place", "version", "interpreter", "device", "torch")
    inputs = {name: built.inputs.get(name, "") for name in names if built}
    if built and built.kernels:
        inputs["kernels"] = built.kernels.without_compiler().text
    return inputs


def _generate(run: stages.Run, view: Step) -> None:
    """Generate one token on the device with a model of noise, and record it among the stamps.

    A GPU's driver, FlashInfer and Triton compile here what the first request would wait for. Raises
    BuildError where no token comes.
    """
    layout, observed = run.layout, run.observed
    stamp.withdraw(layout.stamp(FIRST_TOKEN))
    if sentence := status.driver_sentence(observed.kernels.recorded):
        run.run_log.console.info(sentence)
    stack = jit_caches.observe(observed.machine, tree=Git(layout.vllm).tree("HEAD"))
    jit_caches.record(layout, stack)
    environment = run_environment.built_environment(
        layout, run.settings, "first-token", stack=stack
    )
    wait = _Wait(run, view, environment)
    with tempfile.TemporaryDirectory(prefix="vllm-workspace-") as folder, wait.shown():
        argv: list[process.Argument] = [layout.environment_python, layout.probes / "real_model.py"]
        process.run(
            [*argv, folder, "--first-token", "--device", observed.device],
            env=environment,
            run_log=run.run_log,
            cwd=Path(folder),
            on_line=wait.read,
            hint=hints.text("install.no_first_token"),
        )
    if wait.error is not None:
        raise BuildError(
            f"vllm {observed.version} is installed and verified, but generates no token on"
            f" {observed.device}: {wait.error}",
            hint=hints.text("install.no_first_token"),
        )
    inputs = _first_token_inputs(observed)
    stamp.write(layout.stamp(FIRST_TOKEN), stamp.Stamp(inputs=inputs))
    view.reason = f"on {observed.device}"
    if written := wait.written():
        view.reason += f"; compiled: {written}"


@dataclass(frozen=True)
class _Document:
    """What is read here of the probe's document."""

    error: str | None


@dataclass
class _Wait:
    """The wait for the first token: the stage of the probe, and what is being compiled."""

    run: stages.Run
    view: Step
    environment: Mapping[str, str]
    stage: str = "starting"
    error: str | None = "the probe printed no document"
    started: float = field(default_factory=time.time)

    def read(self, line: str) -> None:
        """Read a line of the probe: `@ STAGE`, or its document."""
        if line.startswith("@ "):
            self.stage = line.removeprefix("@ ")
        elif line.startswith('{"schema"'):
            with contextlib.suppress(records.DecodeError):
                self.error = records.decode(line, _Document).error
        # The newest line of the log has taken its place.
        self.show()

    def show(self) -> None:
        """Show the sentence beside the spinner, if there is one."""
        self.view.progress(0, None, self.sentence())

    def written(self) -> str:
        return jit_caches.written_since(self.environment, self.started)

    def sentence(self) -> str:
        """Return the stage, its seconds, and what is compiled meanwhile."""
        text = f"{self.stage}, {time.time() - self.started:.0f} s"
        built = self.run.observed.kernels.recorded
        if work := built.outcome.get(status.DRIVER_WORK) if built else None:
            names = ", ".join(part.split(" ")[0] for part in work.split("), "))
            text += f"; the driver may be compiling {names}"
        written = self.written()
        return f"{text}; compiled so far: {written}" if written else text

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show the sentence while the block runs: each second on a terminal, else each 15 s."""
        ended, console = threading.Event(), self.run.run_log.console

        def show() -> None:
            is_terminal = console.width is not None
            while not ended.wait(1.0 if is_terminal else WAIT_LINE_S):
                if is_terminal:
                    self.show()
                else:
                    console.info(f"first token: {self.sentence()}")

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


_FIRST_TOKEN_STEPS: stages.Steps = (("first token", _generate),)


def _preflight(observed: plan.Observation, console: Console) -> None:
    """Stop before any change where the machine lacks what this bootstrap needs."""
    machine, is_due = observed.machine, observed.environment.state != "ok"
    # What an interrupted bootstrap has installed is there already.
    missing = NEEDED_GIB[observed.device] - _used_gib(machine.layout.environment)
    need = {
        machine.layout.root: max(1.0, missing) if is_due else 1.0,
        machine.settings.cache: NEEDED_CACHE_GIB,
    }
    with console.step("preflight") as view:
        rows = doctor.preflight(
            machine,
            device=observed.device,
            is_native=observed.kernels_wanted.source.is_native,
            need_gib=need,
            is_environment_due=is_due,
        )
        view.reason = f"{sum(row.state == 'ok' for row in rows)} of {len(rows)} checks ok"
    stages.require_rows(rows, console, what="bootstrap")


def _used_gib(folder: Path) -> float:
    """Return the GiB that the files below a folder occupy; 0 without the folder."""
    size = 0
    for top, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(top, name)).st_blocks * 512
    return size / 2**30


def _show_nothing_due(
    due: tuple[Stage, ...], observed: plan.Observation, console: Console, end: End
) -> None:
    if end == "part":
        console.row(State.SKIPPED, "build", f"vllm {observed.version} is already built")
        return
    for stage in due:
        _show_skipped(stage, console)
    _close(observed, console, "nothing to do: ")


def _show_skipped(stage: Stage, console: Console) -> None:
    for name, _ in stage.steps:
        console.row(State.SKIPPED, name, stage.reason)


def _close(observed: plan.Observation, console: Console, prefix: str) -> None:
    if observed.needs_compilation:
        console.warn(f"the kernels are stale: {'; '.join(observed.needs_compilation)}")
    if observed.stack and observed.stack.dirty:
        edited = counted(len(observed.stack.dirty), "edited file")
        console.info(f"vendor/vllm has {edited}: live, not changed")
    console.info(f"{prefix}vLLM {observed.version} is installed in .vllm")
    console.hint(status.next_command(observed))


def run_from(
    layout: Layout, settings: Settings, folder: Path, *, console: Console, wait: bool, end: End
) -> plan.Observation:
    """Bring the workspace to a verified vLLM with the files of a bundle, and with nothing else.

    Nothing refers to the bundle afterwards, so it may be deleted. Raises SettingsError for a bundle
    of another pin or machine, and for --source; SourceError for a damaged one, ToolchainError
    without its Python; nothing is changed then.
    """
    folder = folder.resolve()
    if settings.source("SOURCE") == "flag":
        raise SettingsError(
            f"--source {settings.text('SOURCE')} and --from exclude each other: a bundle has one"
            " source of vendor/vllm",
            hint=hints.text("install.bootstrap_from", folder=folder),
        )
    manifest = bundle.read(folder)
    # The pages of a bundle that has changed, or has moved, are others.
    named = f"{folder}\n{files.sha256(folder / bundle.MANIFEST)}"
    digest = hashlib.sha256(named.encode()).hexdigest()
    pages = layout.bundles / digest[:12]
    settings = _settings_for(manifest, folder, pages.as_uri(), settings)
    _require_fit(manifest, folder, plan.observe(layout, settings))
    with console.step("bundle") as view:
        bundle.require_complete(manifest, folder)
        view.reason = f"{counted(len(manifest.items), 'file')} as in its manifest"
    if not pages.exists():
        bundle.write_pages(manifest, folder / bundle.FILES, pages)
    settings = _with_kept_kernels(layout, manifest, folder / bundle.FILES, settings)
    observed = run(layout, settings, console=console, wait=wait, end=end)
    bundle.forget_remote(layout, settings.text("VLLM_MIRROR"), observed.pin.url)
    return observed


def _with_kept_kernels(
    layout: Layout, manifest: bundle.Manifest, folder: Path, settings: Settings
) -> Settings:
    """Copy the kernels of a bundle that are wanted into the clone, and name the copy instead.

    The stamp names the wheel from which a library that was lost is installed again.
    """
    for item in manifest.items:
        if precompiled.is_named(settings, folder / item.name):
            kept = layout.bundles / item.name
            if not kept.is_file() or files.sha256(kept) != item.sha256:
                with files.folder_beside(kept) as scratch:
                    shutil.copyfile(folder / item.name, scratch / item.name)
                    (scratch / item.name).replace(kept)
            values = {**settings.values, "KERNELS": Value(str(kept), "flag")}
            return replace(settings, values=values)
    return settings


def _settings_for(
    manifest: bundle.Manifest, folder: Path, pages: str, settings: Settings
) -> Settings:
    """Return settings that name the files of a bundle as the only index and remote.

    `pages` is the address of its index.
    """
    wanted = {
        "SOURCE": manifest.source,
        "TORCH_INDEX_URL": pages,
        "VLLM_MIRROR": str(folder / bundle.FILES / bundle.SOURCE),
    }
    if settings.source("PYTHON_VERSION") == "default":
        wanted["PYTHON_VERSION"] = manifest.target.python
    own = [item.name for item in manifest.items if "kernels" in item.uses]
    if own and settings.source("KERNELS") == "default":
        wanted["KERNELS"] = str(folder / bundle.FILES / own[0])
    shell = {name: text for name, text in settings.shell.items() if not _PLACES.fullmatch(name)}
    shell |= {
        "UV_DEFAULT_INDEX": pages,
        "UV_PYTHON_DOWNLOADS": "never",
        "UV_NO_CONFIG": "1",
        "PIP_CONFIG_FILE": os.devnull,
    }
    values = {name: Value(text, "flag") for name, text in wanted.items()}
    return replace(settings, values={**settings.values, **values}, shell=shell)


def _require_fit(manifest: bundle.Manifest, folder: Path, observed: plan.Observation) -> None:
    """Raise where a bundle is for another pin or another machine than this clone."""
    layout, settings, pin = observed.machine.layout, observed.machine.settings, observed.pin
    present, preferred = observed.python, settings.text("PYTHON_VERSION")
    python = manifest.target.python
    own = (os.confstr("CS_GNU_LIBC_VERSION") or "").removeprefix("glibc ")
    facts = (
        ("vLLM", f"{manifest.tag} {manifest.commit[:12]}", f"{pin.tag} {pin.commit[:12]}"),
        ("architecture", manifest.target.machine, platform.machine()),
        ("Python", python, ".".join((present.version if present else preferred).split(".")[:2])),
        ("device", manifest.device, observed.device),
    )
    wrong = [f"{name} {text}, not {here}" for name, text, here in facts if text != here]
    if not wrong and [*map(int, own.split("."))] < [*map(int, manifest.target.glibc.split("."))]:
        wrong = [f"glibc {manifest.target.glibc} or newer, not {own}"]
    if wrong:
        fitting = replace(
            manifest,
            target=replace(manifest.target, machine=platform.machine(), python=facts[2][2]),
            device=observed.device,
        )
        raise SettingsError(
            f"{folder} is a bundle for {'; '.join(wrong)}", hint=bundle.anew(fitting, folder)
        )
    from packaging.specifiers import SpecifierSet

    if present is None and not interpreter.foresee(
        layout, settings, supported=SpecifierSet(f"=={python}.*")
    ):
        raise ToolchainError(
            f"the bundle is for Python {python}, which is not installed here",
            hint=hints.text("machine.install_python", version=python),
        )
