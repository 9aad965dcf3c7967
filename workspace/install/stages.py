"""The steps of a bootstrap, each as one act. When one is due is bootstrap's business; how it is
done is that of the modules called here.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from workspace.core.console import Step
from workspace.core.errors import BuildError, SourceError
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import editable, plan, precompiled, stamp
from workspace.machine import check, dotenv, hardware, torch, venv
from workspace.repo import checkout, export, patches
from workspace.repo.git import Git


@dataclass
class Run:
    """One bootstrap: what its steps share, and what an earlier step leaves for a later one.

    `observed` is what was there when the stage began; a step that needs what another step of its
    stage made looks again. An arm may lack the patch that mends what the tree's setup.py leaves out
    of a wheel.
    """

    layout: Layout
    settings: Settings
    run_log: RunLog
    observed: plan.Observation
    outcome: dict[str, str] = field(default_factory=dict)
    # What the steps of a rebuild share (compiling.Job).
    job: object | None = None
    is_sandbox: bool = False

    def observe(self) -> plan.Observation:
        return plan.observe(self.layout, self.settings)


Act = Callable[[Run, Step], None]


def act(run: Run, steps: Iterable[tuple[str, Act]], *, reason: str = "") -> None:
    """Do steps in their order, each shown with its state and written into the log as a phase; torch
    stays what it is in all but its own.
    """
    for name, do in steps:
        with run.run_log.console.step(name) as view:
            view.reason = reason
            run.run_log.phase(name, view)
            with (
                contextlib.nullcontext()
                if name in CHANGES_TORCH
                else torch.held(run.layout, run.settings, step=name)
            ):
                do(run, view)
        run.run_log.step = None


def write_dotenv(run: Run, view: Step) -> None:
    view.reason = (
        "written for this machine:"
        f" {dotenv.write(run.layout, run.settings, device=run.observed.device)}"
    )


def make_source(run: Run, view: Step) -> None:
    choice = cast("checkout.Choice", run.settings.text("SOURCE"))
    view.reason = checkout.ensure(
        run.layout, run.observed.pin, run.settings, choice=choice, run_log=run.run_log, step=view
    ).detail
    checkout.protect(run.layout)
    # Only now it is known which variables this vLLM reads.
    check.require(run.layout, run.settings, console=run.run_log.console, device=run.observed.device)


def apply_patches(run: Run, view: Step) -> None:
    observed = run.observed
    # First: once the patches are on, nothing is due that would bring it.
    export.template(run.layout, "vllm", Git(run.layout.vllm), run.run_log)
    stack = patches.apply(run.layout, "vllm", observed.pin, observed.checkout, run_log=run.run_log)
    view.reason = f"{len(stack.names)} applied, tree {(stack.tree or '')[:12]}"
    checkout.protect(run.layout)


def make_python(run: Run, view: Step) -> None:
    # uv believes what lies there: nothing that an unfinished run left may be taken for whole.
    if run.layout.environment.exists():
        is_interrupted = stamp.read(run.layout.stamp("environment")) is None
        venv.repair(run.layout, run.settings, run_log=run.run_log, with_cache=is_interrupted)
        if is_interrupted:
            venv.drop_bytecode(run.layout, since=run.layout.stamp("environment"))
    stamp.withdraw(run.layout.stamp("environment"))
    view.reason = venv.make_python(
        run.layout, run.settings, device=run.observed.device, run_log=run.run_log
    )


def put_torch(run: Run, view: Step) -> None:
    view.reason = venv.put_torch(
        run.layout, run.settings, device=run.observed.device, run_log=run.run_log
    )


def put_requirements(run: Run, view: Step) -> None:
    view.reason = venv.put_requirements(
        run.layout, run.settings, device=run.observed.device, run_log=run.run_log
    )


def put_accelerators(run: Run, view: Step) -> None:
    """The last step of the environment: its stamp follows."""
    provided = venv.put_accelerators(
        run.layout, run.settings, device=run.observed.device, run_log=run.run_log
    )
    inputs = run.observe().environment.inputs
    if inputs is None:
        raise BuildError(
            "the environment is not there after it was made", hint="./scripts/inv status"
        )
    stamp.write(
        run.layout.stamp("environment"), stamp.Stamp(inputs=inputs, packages=provided.packages)
    )
    view.reason = provided.summary


def get_kernels(run: Run, view: Step) -> None:
    """Have the wheel at hand; nothing in the tree is touched yet."""
    observed = run.observed
    wheel = precompiled.fetch_wheel(
        observed.kernels_wanted,
        observed.pin,
        observed.device,
        run.settings,
        on_progress=megabytes(view),
    )
    members = precompiled.compiled_members(wheel)
    run.outcome["wheel"] = str(wheel)
    if observed.kernels_wanted.kind == "wheel" and (packed := _fitting(run, wheel)):
        run.outcome[plan.PACKED_SOURCES] = packed
    view.reason = f"{len(members)} compiled files from {wheel.name}"


def _fitting(run: Run, path: Path) -> str | None:
    """The digest of what a wheel of `inv wheel` was compiled from, None for anybody else's. Raises
    SourceError where it is not for this tree.
    """
    from workspace.compile import cmake_inputs
    from workspace.install import wheel

    packed, observed = precompiled.read_packed(path), run.observed
    if packed is None or observed.torch is None or observed.python is None:
        return None
    made = cmake_inputs.observe(
        run.layout, run.settings, device=observed.device, pin=observed.pin, torch=observed.torch
    )
    capabilities = tuple(
        gpu.capability for gpu in hardware.observe(run.settings).gpus if gpu.capability
    )
    digest = Git(run.layout.vllm).digest(plan.COMPILED_SOURCES)
    version = ".".join(observed.python.version.split(".")[:2])
    if why := wheel.fits(packed, made, digest, python=version, capabilities=capabilities):
        raise SourceError(
            f"{path.name} does not fit: {why}",
            hint="./scripts/inv rebuild --kernels auto    compiles what differs from the pin",
        )
    return packed.digest


def put_vllm(run: Run, view: Step) -> None:
    """Install editable; from here until the stamp the build is unproven."""
    if stamp.read(run.layout.stamp("vllm")) is None:
        venv.drop_bytecode(run.layout, since=run.layout.stamp("environment"))
    stamp.withdraw(run.layout.stamp("vllm"))
    venv.repair(run.layout, run.settings, run_log=run.run_log, names=("vllm",))
    observed = run.observed
    wheel = Path(run.outcome["wheel"])
    editable.install_with_wheel(run.layout, run.settings, observed, wheel, run_log=run.run_log)
    if run.is_sandbox:
        precompiled.complete(wheel, run.layout.vllm)
    precompiled.check_taken(wheel, run.layout.vllm)
    view.reason = f"vllm {observed.version}, editable"


def verify_vllm(run: Run, view: Step) -> None:
    """The last step: the stamp is written once the built interpreter has said that all is as asked
    for.
    """
    observed = run.observe()
    verdict = editable.verify(run.layout, run.settings, observed)
    # A precompiled wheel's kernels that the sources have outrun are still the precompiled wheel's:
    # only inv rebuild makes them hybrid.
    kind = (
        "precompiled" if observed.kernels_wanted.kind == "hybrid" else observed.kernels_wanted.kind
    )
    write_stamp(run, observed, verdict, kind=kind)
    view.reason = f"{verdict.version} from vendor/vllm, {verdict.summary}"


def write_stamp(
    run: Run, observed: plan.Observation, verdict: editable.Verdict, *, kind: str
) -> None:
    """Claim what was verified: libraries by hash, and what they and the install were made from."""
    outcome = run.outcome | {
        "version": verdict.version,
        "platform": verdict.platform,
        "tree": Git(run.layout.vllm).tree("HEAD"),
    }
    inputs = plan.kernel_inputs(run.layout, run.settings, observed, kind=kind) | (
        observed.install.inputs or {}
    )
    stamp.write(
        run.layout.stamp("vllm"),
        stamp.Stamp(inputs=inputs, outcome=outcome, libraries=verdict.libraries),
    )


ENVIRONMENT = (
    ("python", make_python),
    ("torch", put_torch),
    ("requirements", put_requirements),
    ("accelerators", put_accelerators),
)
VLLM = (("kernels", get_kernels), ("install", put_vllm), ("verify", verify_vllm))
# Steps before which there may be no torch, or after which it may rightly be another one.
CHANGES_TORCH = (".env", "source", "patches", "python", "torch")


def megabytes(view: Step) -> Callable[[int, int | None], None]:
    return lambda done, total: view.progress(done / 1e6, total / 1e6 if total else None, "MB")
