"""The steps of a bootstrap, and the checks that bootstrap and rebuild share.

Bootstrap decides when a step is due; the modules called here do the work. The editable install uses
the tree's own setup.py, without build isolation and without dependency resolution: torch does not
change.
"""

import contextlib
import filecmp
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import cast

from workspace.core import hints, lock
from workspace.core.console import Console, Row, RunLog, State, Step, failed
from workspace.core.errors import BuildError, SourceError, ToolchainError
from workspace.core.files import read_regular
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import plan, precompiled, stamp, status, verify
from workspace.machine import check, interpreter, torch, venv
from workspace.machine.machine import Machine
from workspace.repo import checkout, export, patches
from workspace.repo.git import Git, worktree

# No program of this name exists: setuptools-rust then reports the optional frontend as not built,
# at once and without a network.
NO_CARGO = "/nonexistent/cargo"
_NINJA_PROGRESS = re.compile(r"^\[(\d+)/(\d+)\]")


@dataclass
class Run:
    """One bootstrap: what its steps share, and what an earlier step leaves for a later step.

    `observed` is the state at the beginning of the stage; a step that needs the result of another
    step of its stage calls `observe`. The tree of a sandbox may lack the patch that fixes the list
    of precompiled files in setup.py.
    """

    run_log: RunLog
    observed: plan.Observation
    outcome: dict[str, str] = field(default_factory=dict)
    # What the steps of a rebuild share (rebuild_job.Job).
    job: object | None = None
    is_sandbox: bool = False
    machine: Machine = field(init=False)

    def __post_init__(self) -> None:
        self.machine = self.observed.machine

    @property
    def layout(self) -> Layout:
        return self.observed.machine.layout

    @property
    def settings(self) -> Settings:
        return self.observed.machine.settings

    def reread(self) -> Machine:
        """Return the machine as an earlier step left it."""
        self.machine = self.machine.reread()
        return self.machine

    def observe(self) -> plan.Observation:
        return plan.observe_on(self.reread())


# The key in the stamp's outcome: the digest of the Python package that was verified.
PYTHON = "python package"


@contextlib.contextmanager
def locked(
    layout: Layout,
    settings: Settings,
    verb: str,
    *,
    console: Console,
    wait: bool = False,
    names_log: bool = False,
) -> Iterator[RunLog]:
    """Hold the workspace's lock and keep a log while the block runs; `verb` as it is typed.

    With `names_log` print the path of the log, if there is one, once the block has ended well.
    """
    name = verb.removeprefix("nox -s ").removeprefix("inv ").split()[0]
    with (
        lock.hold(layout.lock, verb=verb, wait=wait, on_wait=console.info) as held,
        RunLog(console, layout.logs, verb=name, secrets=settings.secrets, held=held) as run_log,
    ):
        yield run_log
        if names_log and run_log.path:
            console.info(f"log: {layout.relative(run_log.path)}")


@contextlib.contextmanager
def step(run_log: RunLog, name: str, reason: str = "") -> Iterator[Step]:
    """Show a step and log it as a phase while the block runs."""
    with run_log.console.step(name) as view:
        view.reason = reason
        run_log.phase(name, view)
        yield view
    run_log.step = None


Act = Callable[[Run, Step], None]
Steps = tuple[tuple[str, Act], ...]


def act(run: Run, steps: Steps, *, reason: str = "") -> None:
    """Run steps in order, each shown with its state and logged as a phase.

    Raises the WorkspaceError of a step, also where a step outside CHANGES_TORCH changed torch.
    """
    for name, do in steps:
        is_changed = name in CHANGES_TORCH
        held = contextlib.nullcontext() if is_changed else torch.held(run.layout, step=name)
        with step(run.run_log, name, reason) as view, held:
            do(run, view)


def write_dotenv(run: Run, view: Step) -> None:
    view.reason = (
        f"written for this machine: {check.write(run.observed.machine, device=run.observed.device)}"
    )


def make_source(run: Run, view: Step) -> None:
    choice = cast("checkout.Choice", run.settings.text("SOURCE"))
    view.reason = checkout.ensure(
        run.layout, run.observed.pin, run.settings, choice=choice, run_log=run.run_log, step=view
    ).detail
    checkout.protect(run.layout)
    # Only the checkout shows which variables this vLLM reads.
    observed = run.observed
    check.require(observed.machine, console=run.run_log.console, device=observed.device)


def apply_patches(run: Run, view: Step) -> None:
    observed = run.observed
    # Before the patches: once they are applied, no step is due that would write the template.
    export.set_template(Git(run.layout.vllm), run.run_log)
    stack = patches.apply(run.layout, "vllm", observed.pin, observed.checkout, run_log=run.run_log)
    view.reason = f"{len(stack.names)} applied, tree {(stack.tree or '')[:12]}"
    checkout.protect(run.layout)


def make_python(run: Run, view: Step) -> None:
    # uv trusts installed metadata: nothing that an unfinished run left may count as complete.
    if run.layout.environment.exists():
        venv.repair(run.layout, run.settings, run_log=run.run_log)
    stamp.withdraw(run.layout.stamp("environment"))
    view.reason = venv.make_python(run.reread(), device=run.observed.device, run_log=run.run_log)


def install_torch(run: Run, view: Step) -> None:
    view.reason = venv.install_torch(run.reread(), device=run.observed.device, run_log=run.run_log)


def install_requirements(run: Run, view: Step) -> None:
    view.reason = venv.install_requirements(
        run.reread(), device=run.observed.device, run_log=run.run_log
    )


def install_accelerators(run: Run, view: Step) -> None:
    """Install the accelerators, the last step of the environment, and write its stamp."""
    provided = venv.install_accelerators(
        run.reread(), device=run.observed.device, run_log=run.run_log
    )
    before, observed = run.observed.tree, run.observe()
    inputs = observed.environment.inputs
    if inputs is None or before is None:
        raise BuildError(
            "the environment is missing after its installation", hint=hints.text("inv.status")
        )
    # As in write_stamp, the files are those from before the installation.
    inputs = inputs | {"requirements": before.digest(plan.REQUIREMENT_FILES)}
    files = plan.digested_files(before, inputs)
    # A build for the CPU reports a driver that answers later: status.device_row.
    away = observed.device == "cpu" and not observed.machine.gpus
    outcome = {stamp.DRIVER: stamp.AWAY} if away else {}
    stamp.write(
        run.layout.stamp("environment"),
        stamp.Stamp(inputs=inputs, outcome=outcome, packages=provided.packages, files=files),
    )
    view.reason = provided.summary


def fetch_kernels(run: Run, view: Step) -> None:
    """Fetch the wheel; the tree is not changed yet."""
    wheel = fetch_wheel(run, view)
    members = verify.compiled_members(wheel)
    run.outcome["wheel"] = str(wheel)
    if run.observed.kernels_wanted.source.is_wheel_file and (packed := _fitting(run, wheel)):
        run.outcome[plan.PACKED_SOURCES] = packed
    view.reason = f"{len(members)} compiled files from {wheel.name}"


def fetch_wheel(run: Run, view: Step) -> Path:
    """Fetch the wheel of the wanted kernels and show the progress in MB."""
    observed = run.observed
    return precompiled.fetch_wheel(
        observed.kernels_wanted,
        observed.pin,
        observed.device,
        run.settings,
        on_progress=lambda done, total: view.progress(
            done / 1e6, total / 1e6 if total else None, "MB"
        ),
    )


def _fitting(run: Run, path: Path) -> str | None:
    """Return the digest of the sources of a wheel of `inv wheel`, None for any other wheel.

    Raises SourceError where the wheel does not fit this tree.
    """
    from workspace.compile import cmake_inputs
    from workspace.install import wheel

    packed, observed = stamp.read_packed(path), run.observed
    if packed is None or observed.torch is None or observed.python is None:
        return None
    inputs = cmake_inputs.observe(
        observed.machine, device=observed.device, pin=observed.pin, torch=observed.torch
    )
    capabilities = run.observed.machine.capabilities
    digest = Git(run.layout.vllm).digest(plan.COMPILED_SOURCES)
    version = ".".join(observed.python.version.split(".")[:2])
    if why := wheel.fits(packed, inputs, digest, python=version, capabilities=capabilities):
        raise SourceError(
            f"{path.name} does not fit: {why}",
            hint=hints.text("install.rebuild_differs"),
        )
    return packed.digest


def install_vllm(run: Run, view: Step) -> None:
    """Install editable; from here until the stamp the build is unverified."""
    stamp.withdraw(run.layout.stamp("vllm"))
    venv.repair(run.layout, run.settings, run_log=run.run_log, names=("vllm",))
    install_with_wheel(run)
    view.reason = f"vllm {run.observed.version}, editable"


def install_with_wheel(run: Run) -> None:
    """Install editable with the libraries of the fetched wheel, and check that all were taken."""
    wheel = Path(run.outcome["wheel"])
    extra = {
        "VLLM_USE_PRECOMPILED": "1",
        "VLLM_PRECOMPILED_WHEEL_LOCATION": str(wheel),
        "CARGO": NO_CARGO,
    }
    _install_editable(run.observed, extra, run_log=run.run_log)
    if run.is_sandbox:
        verify.complete(wheel, run.layout.vllm)
    verify.check_taken(wheel, run.layout.vllm)


def install_alone(observed: plan.Observation, *, build: Mapping[str, str], run_log: RunLog) -> None:
    """Install editable without libraries, which the caller compiles and installs afterwards.

    `build` are variables that limit cargo. The tree's setup.py compiles in a new temporary folder
    each time unless it gets a wheel; so it gets an empty one.
    """
    path = observed.machine.settings.child_environment("build").get("PATH", "")
    # The frontend in Rust is optional: setuptools-rust leaves it out where there is no cargo.
    cargo = {} if shutil.which("cargo", path=path) else {"CARGO": NO_CARGO}
    with tempfile.TemporaryDirectory(prefix="vllm-workspace-") as folder:
        wheel = Path(folder) / f"vllm-{observed.pin.version}-py3-none-any.whl"
        zipfile.ZipFile(wheel, "w").close()
        extra = {
            "VLLM_USE_PRECOMPILED": "1",
            "VLLM_PRECOMPILED_WHEEL_LOCATION": str(wheel),
            **build,
            **cargo,
        }
        _install_editable(observed, extra, run_log=run_log)


def install_built(observed: plan.Observation, *, run_log: RunLog) -> None:
    """Install editable a tree that has its libraries. Raises BuildError with the first error."""
    install_alone(observed, build={"CARGO": NO_CARGO}, run_log=run_log)


def _install_editable(
    observed: plan.Observation, extra: Mapping[str, str], *, run_log: RunLog
) -> None:
    layout, settings = observed.machine.layout, observed.machine.settings
    environment = {
        "VLLM_TARGET_DEVICE": observed.device,
        "VLLM_VERSION_OVERRIDE": observed.version,
        **extra,
    }
    # uv's cache of editable builds ignores these variables: always build again.
    arguments = [
        *("--no-build-isolation", "--no-deps", "--verbose"),
        *("--reinstall-package", "vllm", "--refresh-package", "vllm"),
        *("--editable", str(layout.vllm)),
    ]

    def show(line: str) -> None:
        found = _NINJA_PROGRESS.match(line.strip().removeprefix("DEBUG ").strip())
        if found and run_log.step:
            run_log.step.progress(int(found[1]), int(found[2]), f"{found[1]} of {found[2]} steps")

    interpreter.install(
        layout,
        settings,
        arguments,
        run_log=run_log,
        phase_env=environment,
        on_line=show,
        failure=BuildError,
    )


def verify_vllm(run: Run, view: Step) -> None:
    """Verify with the built interpreter, the last step, and write the stamp."""
    observed = run.observed
    note_python(run)
    verdict = verify.verify(observed)
    if observed.device == "cuda":
        libraries = [library.path for library in verdict.libraries]
        check_device_code(run, libraries, archs="", not_built=(), is_native=False)
    # Where compiled sources changed, the kernels are still those of the wheel.
    write_stamp(run, verdict, observed.kernels_wanted.source.without_compiler())
    view.reason = f"{verdict.version} from vendor/vllm, {verdict.summary}"


def note_python(run: Run) -> bool:
    """Note the content of the Python package for the stamp, and return whether the last
    verification imported the same. Noted before the import: a later edit counts as a change.
    """
    run.outcome[PYTHON] = digest = Git(run.layout.vllm).digest(("vllm",))
    recorded = run.observed.kernels.recorded
    return recorded is not None and recorded.outcome.get(PYTHON) == digest


def write_stamp(run: Run, verdict: verify.Verdict, source: precompiled.KernelSource) -> None:
    """Write the stamp of the verified build: libraries by hash, inputs of kernels and install.

    The inputs are those from before the build: what was edited meanwhile may not be in it.
    """
    observed = run.observed
    outcome = run.outcome | {
        "version": verdict.version,
        "platform": verdict.platform,
        "tree": Git(run.layout.vllm).tree("HEAD"),
    }
    inputs = plan.kernel_inputs(observed, source) | (observed.install.inputs or {})
    stamp.write(
        run.layout.stamp("vllm"),
        stamp.Stamp(
            inputs=inputs,
            outcome=outcome,
            libraries=verdict.libraries,
            kernels=source,
            files=plan.digested_files(observed.tree, inputs),
        ),
    )


ENVIRONMENT = (
    ("python", make_python),
    ("torch", install_torch),
    ("requirements", install_requirements),
    ("accelerators", install_accelerators),
)
VLLM = (("kernels", fetch_kernels), ("install", install_vllm), ("verify", verify_vllm))
# Steps before which torch may be missing, or after which another torch is legitimate.
CHANGES_TORCH = (".env", "source", "patches", "python", "torch")


def require_rows(rows: Sequence[Row], console: Console, *, what: str) -> None:
    """Show the rows of a preflight that are not ok. Raises ToolchainError where a row is FAIL.

    `what` is the work that needs them: bootstrap or compile.
    """
    console.rows([row for row in rows if row.state is not State.OK])
    if faults := failed(rows):
        named = (f"{row.name}: {row.text}" + (f" ({row.why})" if row.why else "") for row in faults)
        raise ToolchainError(
            f"cannot {what} on this machine: {', '.join(named)}", hint=faults[0].hint
        )


def check_device_code(
    run: Run,
    libraries: Sequence[str],
    *,
    archs: str,
    not_built: Sequence[str],
    is_native: bool,
) -> str:
    """Compare the code in the libraries with the GPUs of this machine, or with `archs`.

    `not_built` are CMake's messages on kernels that it left out. Returns the end of a sentence.
    Raises BuildError where a library lacks code that it needs.
    """
    from workspace.compile import device_code

    capabilities = run.observed.machine.capabilities
    listed = device_code.list_cubins(run.layout, [run.layout.vllm / path for path in libraries])
    judged = device_code.judge(listed, capabilities=capabilities, archs=archs)
    left_out = device_code.judge_not_built(not_built, archs)
    rows = (f"{row.library}: {row.state}: {row.sentence}" for row in judged)
    for sentence in (*rows, *left_out.expected):
        run.run_log.write(sentence)
    if capabilities:
        run.outcome[status.DRIVER_WORK] = device_code.driver_work(listed, capabilities)
    for sentence in (*left_out.unknown, *(left_out.failures if not is_native else ())):
        run.run_log.console.warn(sentence)
    wrong = [f"{row.library} {row.sentence}" for row in judged if row.state == "wrong"]
    wrong += left_out.failures if is_native else ()
    wanted = " and ".join(capabilities) or archs
    if wrong:
        raise BuildError(
            f"the built libraries lack code for {wanted}: {wrong[0]}",
            hint=(
                hints.text("install.judge_archs") if archs else hints.text("install.rebuild_native")
            ),
            details=tuple(wrong),
        )
    count = sum(row.state == "ok" for row in judged)
    return f"; {count} {'has' if count == 1 else 'have'} code for {wanted}"


def build_products(tree: Path) -> tuple[str, ...]:
    """Return the paths of the build products below a tree.

    Files that general rules ignore, such as logs and editor files, belong to the user.
    """
    ignore = tree / ".gitignore"
    text = read_regular(ignore).decode(errors="replace") if ignore.exists() else ""
    lines = (line.strip().removeprefix("/") for line in text.splitlines())
    named = [line.removesuffix("*").removesuffix("/") for line in lines if line.startswith("vllm/")]
    patterns = ("*.so", "vllm.egg-info/*", *named, *(f"{name}/*" for name in named))
    return tuple(
        path
        for path in worktree.products(Git(tree), "vllm", "vllm.egg-info")
        if any(fnmatchcase(path, pattern) for pattern in patterns)
    )


def take_products_away(
    layout: Layout, paths: Collection[str], *, ours: Collection[str], kept: Path | None, left: Path
) -> None:
    """Remove products from vendor/vllm: delete `ours` and copies of files in `kept`, move others.

    The others go to the folder `left`.
    """
    for path in paths:
        file = layout.vllm / path
        if not os.path.lexists(file):
            continue
        if path in ours or (kept and is_same(file, kept / path)):
            file.unlink()
        else:
            (left / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, left / path)
        _clear(file.parent, top=layout.vllm)


def is_same(file: Path, other: Path) -> bool:
    """Return whether both paths are files of the same content, or links to the same path."""
    if file.is_symlink() or other.is_symlink():
        return file.is_symlink() and other.is_symlink() and os.readlink(file) == os.readlink(other)
    return file.is_file() and other.is_file() and filecmp.cmp(file, other, shallow=False)


def _clear(folder: Path, *, top: Path) -> None:
    """Remove folders that hold only bytecode: Python would import them as empty packages."""
    while folder != top and {entry.name for entry in folder.iterdir()} <= {"__pycache__"}:
        shutil.rmtree(folder)
        folder = folder.parent
