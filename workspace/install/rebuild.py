"""inv rebuild: compile what differs from the pin, within cores and memory, and put it into the
editable tree.

Observe → plan → show → act → verify → stamp. In hybrid mode the precompiled wheel gives every
library that no change reaches; the stamp is written last.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from workspace.compile import (
    cmake,
    cmake_inputs,
    device_code,
    externals,
    forecast,
    job_server,
    jobs,
    ninja,
    project,
    targets,
    tree_files,
)
from workspace.compile import jobs as bounds
from workspace.compile.cmake_inputs import Inputs
from workspace.compile.costs import Costs, History, read_table
from workspace.compile.externals import External
from workspace.compile.forecast import RebuildPlan
from workspace.compile.jobs import Jobs, Memory
from workspace.compile.project import Project
from workspace.compile.scheduler import Bounds
from workspace.compile.targets import Reached
from workspace.core import lock
from workspace.core.console import Console, Step
from workspace.core.errors import BuildError, CheckoutError, SettingsError, ToolchainError
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import editable, plan, precompiled, stages, stamp, status
from workspace.machine import doctor, hardware, venv
from workspace.repo import moves, pins
from workspace.repo.git import Git, remotes
from workspace.repo.patches import State

# Which targets of a tree were compiled here: names with blanks between, in the stamp's outcome.
OWN = "compiled here"
TARGET_FLAG = "--target"


@dataclass
class Job:
    """One rebuild. `targets` are wanted beside what is reached; each step leaves to the next what
    it found.
    """

    run: stages.Run
    jobs: Jobs
    memory: Memory
    targets: tuple[str, ...] = ()
    why_native: str | None = None
    project: Project = field(default_factory=lambda: Project((), ()))
    reached: tuple[Reached, ...] = ()
    plan: RebuildPlan | None = None

    def __post_init__(self) -> None:
        observed = self.run.observed
        if observed.torch is None:
            raise BuildError("there is no torch to compile for", hint="./scripts/inv bootstrap")
        self.is_native = observed.kernels_wanted.kind == "native"
        self.inputs: Inputs = cmake_inputs.observe(
            self.run.layout,
            self.run.settings,
            device=observed.device,
            pin=observed.pin,
            torch=observed.torch,
        )
        self.folder: Path = cmake_inputs.folder(self.run.layout, self.inputs)

    @property
    def setup(self) -> str:
        """What the costs of a unit depend on, beside the unit: figures of another setup are not
        used.
        """
        made = self.inputs
        return (
            f"{made.device} {made.archs} CUDA {made.cuda or 'none'} {made.compiler}"
            f" {made.build_type} threads {self.jobs.nvcc_threads}"
        )

    def fetch_precompiled(self, view: Step) -> None:
        """Have the pin's wheel at hand, and decide whether it and what is compiled here go
        together.
        """
        run = self.run
        if self.is_native:
            view.skip("everything is compiled here")
            return
        observed = run.observed
        wheel = precompiled.fetch_wheel(
            observed.kernels_wanted,
            observed.pin,
            observed.device,
            run.settings,
            on_progress=stages.megabytes(view),
        )
        self.why_native = precompiled.why_not_hybrid(
            run.layout,
            run.settings,
            wheel,
            device=observed.device,
            torch=self.inputs.torch,
            archs=self.inputs.archs,
        )
        self.is_native = self.why_native is not None
        if self.why_native:
            view.reason = f"not used: {self.why_native}; everything is compiled here"
        else:
            run.outcome["wheel"] = str(wheel)
            view.reason = f"{wheel.name} gives what no change reaches"

    def configure(self, view: Step) -> None:
        """Ask CMake what there is to build, then find what the changes reach. Sources of other
        projects come only for what is compiled.
        """
        run = self.run
        for sentence in externals.leftover(run.layout.vllm):
            run.run_log.console.warn(sentence)
        declared = externals.declared(run.layout.vllm, run.observed.device)
        wanted: set[str] = {
            *self.targets,
            *(own(run.observed.kernels.recorded) if not self.is_native else ()),
        }
        while True:
            needed = [
                external
                for external in declared
                if self.is_native or wanted & set(external.targets)
            ]
            self.project = self._configured(
                view, needed, [external for external in declared if external not in needed]
            )
            self.reached = self._reach(view)
            names = {one.target for one in self.reached}
            if names <= wanted or not any(
                names & set(external.targets) for external in declared if external not in needed
            ):
                break
            wanted |= names
        table, trouble = read_table()
        history = History(ninja.history_file(run.settings), setup=self.setup)
        for sentence in (*((trouble,) if trouble else ()), *history.warnings):
            run.run_log.console.warn(sentence)
        limits = Bounds(self.jobs.count, self.memory.budget_gib)
        self.plan = forecast.work_out(
            self.reached,
            self.project,
            Costs(table, history.entries),
            limits,
            why_not_hybrid=self.why_native,
        )
        view.reason = (
            f"{run.layout.relative(self.folder)}: {len(self.project.targets)} targets,"
            f" {len(self.reached)} reached"
        )

    def _configured(
        self, view: Step, needed: Sequence[External], others: Sequence[External]
    ) -> Project:
        run = self.run
        sources = externals.provide(
            run.layout, run.settings, needed, others, run_log=run.run_log, step=view
        )
        return cmake.configure(
            run.layout,
            run.settings,
            self.inputs,
            sources,
            ticket=job_server.install(self.folder / "tickets"),
            run_log=run.run_log,
        )

    def _reach(self, view: Step) -> tuple[Reached, ...]:
        run, tree = self.run, self.run.layout.vllm
        base = run.observed.checkout.base
        if self.is_native:
            listed = {
                extension.target for extension in project.extensions(tree, run.observed.device)
            }
            names = [
                target.name
                for target in targets.final_targets(self.project)
                if target.name in listed
            ]
            reason = TARGET_FLAG if self.targets else self.why_native or "--kernels native"
            return targets.requested(
                self.targets or names, reason, tree, self.project, build=self.folder
            )
        changed = (
            targets.changed_files(Git(tree), base)
            if base and run.observed.kernels_wanted.kind == "hybrid"
            else ()
        )
        pinned = (
            self._pinned(view, base)
            if base and any(targets.is_cmake(path) for path in changed)
            else None
        )
        found = targets.follow(tree, changed, self.project, build=self.folder, pinned=pinned)
        for sentence in found.idle:
            run.run_log.write(sentence)
        more = (
            targets.requested(self.targets, TARGET_FLAG, tree, self.project, build=self.folder)
            if self.targets
            else ()
        )
        return targets.merged((found.targets, more))

    def _pinned(self, view: Step, base: str) -> Project:
        """What CMake makes of the pin's own tree, asked in a build directory of its own: a changed
        CMakeLists.txt then reaches only what it changes.
        """
        layout, settings, run_log = self.run.layout, self.run.settings, self.run.run_log
        tree = layout.builds / "pinned" / base[:12]
        if not (tree / "CMakeLists.txt").is_file():
            remotes.write_tree(Git(layout.vllm), base, tree)
        of_pin = replace(self.inputs, place=str(tree))
        sources = externals.provide(
            layout,
            settings,
            (),
            externals.declared(tree, of_pin.device),
            run_log=run_log,
            step=view,
        )
        ticket = job_server.install(cmake_inputs.folder(layout, of_pin) / "tickets")
        return cmake.configure(layout, settings, of_pin, sources, ticket=ticket, run_log=run_log)

    def compile(self, view: Step) -> None:
        """Compile what ninja finds out of date in the reached targets. From here on no remembered
        time of a source counts.
        """
        run = self.run
        if not self.reached:
            view.skip("nothing is reached")
            return
        moves.forget_times(run.layout, "vllm")
        for said in (self.jobs.sentence, self.memory.sentence):
            run.run_log.console.info(said)
        units = [unit for one in self.reached for unit in one.units]
        made = ninja.compile(
            run.layout,
            run.settings,
            self.folder,
            [one.target for one in self.reached],
            setup=self.setup,
            jobs=self.jobs,
            memory=self.memory,
            units=units,
            run_log=run.run_log,
            step=view,
        )
        for sentence in made.summary:
            run.run_log.console.info(sentence)
        run.outcome["jobs"], run.outcome["seconds"] = str(self.jobs.count), f"{made.seconds:.0f}"
        view.reason = f"{len(made.finished)} units, {', '.join(one.target for one in self.reached)}"

    @property
    def is_put_due(self) -> bool:
        """Whether the tree is to have what was compiled. A target that was only asked for is warmed
        ahead, and the tree's library of it stays.
        """
        observed = self.run.observed
        if self.is_native and self.targets:
            return False
        return observed.kernels.state != "ok" or observed.install.state != "ok"

    def install(self, view: Step) -> None:
        """Put what was compiled into the editable tree; from here until the stamp the build is
        unproven.
        """
        run, layout, observed = self.run, self.run.layout, self.run.observed
        placed = [one.target for one in self.reached if one.reason != TARGET_FLAG]
        recorded = observed.kernels.recorded
        is_same_context = (
            recorded is not None
            and not self.is_native
            and not (own(recorded) - set(placed))
            and observed.install.state == "ok"
        )
        only_compiled = set(observed.kernels.reasons) <= set(observed.for_compiler)
        stamp.withdraw(layout.stamp("vllm"))
        venv.repair(layout, run.settings, run_log=run.run_log, names=("vllm",))
        if not (is_same_context and only_compiled):
            if self.is_native:
                editable.install_alone(
                    layout,
                    run.settings,
                    observed,
                    build={"CARGO_BUILD_JOBS": str(self.jobs.count)},
                    run_log=run.run_log,
                )
            else:
                wheel = Path(run.outcome["wheel"])
                editable.install_with_wheel(
                    layout, run.settings, observed, wheel, run_log=run.run_log
                )
                if run.is_sandbox:
                    precompiled.complete(wheel, layout.vllm)
                precompiled.check_taken(wheel, layout.vllm)
        placed_targets = [target for target in self.project.targets if target.name in placed]
        environment = run.settings.child_environment(
            "build",
            ninja.environment(layout, run.settings, self.jobs, self.folder / "tickets" / "ticket"),
        )
        files = tree_files.install_targets(
            self.folder,
            layout.vllm,
            placed_targets,
            run_log=run.run_log,
            env=environment,
            shared=run.settings.cache,
        )
        run.outcome[OWN] = " ".join(sorted(placed))
        view.reason = (
            f"vllm {observed.version}, editable; {len(files)} files of {len(placed_targets)}"
            " targets compiled here"
        )

    def verify(self, view: Step) -> None:
        """The last step: the stamp is written once every library loads and has code for the GPU
        that is meant.
        """
        run = self.run
        observed = run.observe()
        verdict = editable.verify(run.layout, run.settings, observed)
        held = (
            self._judge([library.path for library in verdict.libraries])
            if observed.device == "cuda"
            else ""
        )
        stages.write_stamp(
            run,
            observed,
            verdict,
            kind="native" if self.is_native else observed.kernels_wanted.kind,
        )
        view.reason = f"{verdict.version} from vendor/vllm, {verdict.summary}{held}"

    def _judge(self, libraries: Sequence[str]) -> str:
        """Hold what the libraries have for a GPU against the one that is meant. Raises BuildError
        where one has nothing for it that it should have.
        """
        run, archs = self.run, self.inputs.archs
        capabilities = tuple(
            gpu.capability for gpu in hardware.observe(run.settings).gpus if gpu.capability
        )
        listed = device_code.list_cubins(
            run.layout, run.settings, [run.layout.vllm / path for path in libraries]
        )
        judged = device_code.judge(listed, capabilities=capabilities, archs=archs)
        left_out = device_code.judge_not_built(self.project.not_built, archs)
        for sentence in (
            *(f"{one.library}: {one.state}: {one.sentence}" for one in judged),
            *left_out.expected,
        ):
            run.run_log.write(sentence)
        for sentence in (*left_out.unknown, *(left_out.failures if not self.is_native else ())):
            run.run_log.console.warn(sentence)
        wrong = [f"{one.library} {one.sentence}" for one in judged if one.state == "wrong"] + list(
            left_out.failures if self.is_native else ()
        )
        if wrong:
            meant = " and ".join(capabilities) or archs
            hint = "./scripts/inv doctor --offline    judges TORCH_CUDA_ARCH_LIST"
            raise BuildError(
                f"what was built does not serve {meant}: {wrong[0]}",
                hint=hint,
                details=tuple(wrong),
            )
        count = sum(one.state == "ok" for one in judged)
        return (
            f"; {count} {'has' if count == 1 else 'have'} code for"
            f" {' and '.join(capabilities) or archs}"
        )

    def show(self, *, as_json: bool) -> None:
        if self.plan is not None:
            forecast.show(self.plan, self.run.run_log.console, as_json=as_json)


def job_of(run: stages.Run) -> Job:
    """The job of a run; where no verb has made one, that of the settings alone."""
    if not isinstance(run.job, Job):
        host = hardware.observe(run.settings)
        run.job = made = Job(run, bounds.count(run.settings, cores=host.cores), bounds.memory(host))
        return made
    return run.job


# What leads to the plan, and what carries it out: the tree is touched by the last only.
PLAN: tuple[tuple[str, stages.Act], ...] = (
    ("precompiled", lambda run, view: job_of(run).fetch_precompiled(view)),
    ("configure", lambda run, view: job_of(run).configure(view)),
)
COMPILE: tuple[tuple[str, stages.Act], ...] = (
    ("compile", lambda run, view: job_of(run).compile(view)),
)
PUT: tuple[tuple[str, stages.Act], ...] = (
    ("install", lambda run, view: job_of(run).install(view)),
    ("verify", lambda run, view: job_of(run).verify(view)),
)


def own(recorded: stamp.Stamp | None) -> set[str]:
    """The targets whose libraries in the tree were compiled here, by the stamp."""
    return set(recorded.outcome.get(OWN, "").split()) if recorded else set()


# GiB that a build directory of a whole CUDA build takes, objects and libraries (v0.24.0 for one
# architecture: 3.1), rounded up.
NEEDED_GIB = 6.0


@dataclass(frozen=True)
class RebuildOptions:
    """What the command line says, as it was typed; None where it says nothing."""

    jobs: str | None = None
    memory: str | None = None
    targets: tuple[str, ...] = ()
    clean: bool = False
    plan_only: bool = False
    as_json: bool = False


def run(
    layout: Layout,
    settings: Settings,
    options: RebuildOptions,
    *,
    console: Console,
    wait: bool = False,
    is_sandbox: bool = False,
) -> None:
    """Bring the compiled libraries up to what the tree says, and no further. Raises the
    WorkspaceError of the step that failed.
    """
    pins.require_settled(layout)
    if options.as_json and not options.plan_only:
        raise SettingsError("--json is of the plan", hint="./scripts/inv rebuild --plan --json")
    bounds = (
        _bounds(settings, options)
        if options.jobs is not None or options.memory is not None
        else None
    )
    observed = plan.observe(layout, settings)
    _require_context(observed, is_sandbox=is_sandbox)
    if options.clean and not options.plan_only:
        _clean(layout, console, wait=wait)
    if not options.targets and observed.kernels.state == observed.install.state == "ok":
        console.info(
            f"nothing to do: the kernels of vllm {observed.version} are up to date"
            f" ({_origin(observed)}); Python files are live"
        )
        return
    bounds = bounds or _bounds(settings, options)
    verb = "inv rebuild --plan" if options.plan_only else "inv rebuild"
    with lock.hold(layout.lock, verb=verb, wait=wait, on_wait=console.info) as held:
        is_compiled = bool(options.targets) or observed.kernels_wanted.kind in ("hybrid", "native")
        _preflight(layout, settings, observed, console, is_compiled=is_compiled)
        with RunLog(
            console, layout.logs, verb="rebuild", secrets=settings.secrets, held=held
        ) as run_log:
            run = stages.Run(
                layout, settings, run_log, plan.observe(layout, settings), is_sandbox=is_sandbox
            )
            _act(run, options, bounds, is_compiled=is_compiled)
            if run_log.path:
                console.info(f"log: {layout.relative(run_log.path)}")
    if not options.plan_only:
        console.info(
            f"vllm {observed.version} is rebuilt; next:"
            f" {status.next_command(plan.observe(layout, settings))}"
        )


def _clean(layout: Layout, console: Console, *, wait: bool) -> None:
    """Throw all build directories of this clone away; what was built and put into the tree
    stays.
    """
    with (
        lock.hold(layout.lock, verb="inv rebuild --clean", wait=wait, on_wait=console.info),
        console.step("clean") as view,
    ):
        if not layout.builds.exists():
            view.skip("there is no build directory")
            return
        shutil.rmtree(layout.builds)
        view.reason = f"{layout.relative(layout.builds)} is gone"


def _bounds(settings: Settings, options: RebuildOptions) -> tuple[Jobs, Memory]:
    host = hardware.observe(settings)
    return jobs.count(settings, cores=host.cores, flag=options.jobs), jobs.memory(
        host, flag=options.memory
    )


def _require_context(observed: plan.Observation, *, is_sandbox: bool) -> None:
    """Raise where there is nothing to compile, or nothing to compile for: those are other verbs'
    business.
    """
    if observed.stack is None or observed.environment.state == "missing":
        raise BuildError("there is no vLLM to rebuild yet", hint="./scripts/inv bootstrap")
    if observed.environment.state != "ok":
        raise BuildError(
            f"the environment is stale: {observed.environment.why}",
            hint="./scripts/inv bootstrap && ./scripts/inv rebuild",
        )
    if observed.stack.state is State.IN_PROGRESS or (
        observed.stack.state is State.FOREIGN and not is_sandbox
    ):
        raise CheckoutError(
            "vendor/vllm is in the middle of something, or not on the pin: it is not what is to be"
            " compiled",
            hint="./scripts/inv patch",
        )


def _origin(observed: plan.Observation) -> str:
    recorded = observed.kernels.recorded
    return " ".join(
        word
        for word in (recorded.inputs.get("origin", "") if recorded else "").split()
        if len(word) < 64
    )


def _preflight(
    layout: Layout,
    settings: Settings,
    observed: plan.Observation,
    console: Console,
    *,
    is_compiled: bool,
) -> None:
    need = {layout.builds: NEEDED_GIB if is_compiled else 1.0}
    kernels = "native" if is_compiled else "precompiled"
    rows = doctor.preflight(
        layout, settings, device=observed.device, kernels=kernels, need_gib=need
    )
    for row in rows:
        if row.state != "ok":
            console.row(
                row.state,
                row.name,
                f"{row.seen}: {row.why}" + (f"; {row.hint}" if row.hint else ""),
            )
    if bad := [row for row in rows if row.state == "FAIL"]:
        raise ToolchainError(
            "this machine cannot compile yet:"
            f" {', '.join(f'{row.name}: {row.seen}' for row in bad)}",
            hint=bad[0].hint,
        )


def _act(
    run: stages.Run, options: RebuildOptions, bounds: tuple[Jobs, Memory], *, is_compiled: bool
) -> None:
    """Do the steps in their order; each looks at what the one before it made."""
    if not is_compiled:
        stages.act(run, stages.VLLM)
        return
    run.job = job = Job(run, *bounds, targets=options.targets)
    stages.act(run, PLAN)
    job.show(as_json=options.as_json)
    if options.plan_only:
        return
    stages.act(run, COMPILE)
    if job.is_put_due:
        stages.act(run, PUT)
    else:
        run.run_log.console.info(
            f"{', '.join(options.targets)} stand ready in {run.layout.relative(job.folder)};"
            " nothing in the tree was due"
        )
