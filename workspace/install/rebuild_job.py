"""Compile what differs from the pin, within the limits of cores and memory.

The steps: observe, plan, show, compile, install into the editable tree, verify, stamp. In hybrid
mode the precompiled wheel provides every library that no change reaches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from workspace.compile import (
    cmake,
    cmake_inputs,
    externals,
    job_server,
    jobs,
    ninja,
    project,
    targets,
)
from workspace.compile.cmake_inputs import Inputs
from workspace.compile.costs import Costs, History, known_entries
from workspace.compile.externals import External
from workspace.compile.jobs import Jobs, Memory, RebuildPlan
from workspace.compile.project import Project
from workspace.compile.scheduler import Bounds
from workspace.compile.targets import Reached
from workspace.core import hints
from workspace.core.console import Console, Step
from workspace.core.errors import BuildError
from workspace.install import plan, precompiled, stages, stamp, status, verify
from workspace.install.plan import RebuildOptions
from workspace.install.precompiled import KernelSource
from workspace.machine import doctor, venv
from workspace.machine.machine import Machine
from workspace.repo.git import Git, remotes

# The key in the stamp's outcome: names of the targets that were compiled here, with blanks between.
COMPILED_HERE = "compiled here"
TARGET_FLAG = "--target"
# GiB that a build directory of a complete CUDA build takes, objects and libraries (v0.24.0 for one
# architecture: 3.1), rounded up.
NEEDED_GIB = 6.0


@dataclass
class Job:
    """One rebuild: each step leaves its results for the next; `targets` are always compiled."""

    run: stages.Run
    jobs: Jobs
    memory: Memory
    targets: tuple[str, ...] = ()
    why_native: str | None = None
    project: Project = field(default_factory=lambda: Project((), ()))
    reached: tuple[Reached, ...] = ()
    plan: RebuildPlan | None = None
    # Where nothing but libraries is installed.
    before: verify.Before | None = None

    def __post_init__(self) -> None:
        observed = self.run.observed
        if observed.torch is None:
            raise BuildError("there is no torch to compile for", hint=hints.text("inv.bootstrap"))
        self.source: KernelSource = observed.kernels_wanted.source
        self.inputs: Inputs = cmake_inputs.observe(
            observed.machine, device=observed.device, pin=observed.pin, torch=observed.torch
        )
        self.folder: Path = cmake_inputs.folder(self.run.layout, self.inputs)

    @property
    def is_native(self) -> bool:
        """Whether every library is compiled here, also because the wheel does not fit."""
        return self.source.is_native

    @property
    def setup(self) -> str:
        """What the costs of a unit depend on besides the unit: other setups have other costs."""
        inputs = self.inputs
        return (
            f"{inputs.device} {inputs.archs} CUDA {inputs.cuda or 'none'} {inputs.compiler}"
            f" {inputs.build_type} threads {self.jobs.nvcc_threads}"
        )

    def fetch_precompiled(self, view: Step) -> None:
        """Fetch the pin's wheel and decide whether its libraries may be mixed with local ones."""
        run = self.run
        if self.is_native:
            view.skip("everything is compiled here")
            return
        observed = run.observed
        wheel = stages.fetch_wheel(run, view)
        self.why_native = precompiled.why_not_hybrid(
            run.layout,
            run.settings,
            wheel,
            device=observed.device,
            torch=self.inputs.torch,
            archs=self.inputs.archs,
        )
        if self.why_native:
            self.source = precompiled.NATIVE
            view.reason = f"not used: {self.why_native}; everything is compiled here"
        else:
            run.outcome["wheel"] = str(wheel)
            view.reason = f"{wheel.name} provides the libraries that no change reaches"

    def configure(self, view: Step) -> None:
        """Configure with CMake, find what the changes reach, and forecast the build."""
        run = self.run
        self._find_reached(view)
        self.plan = self._forecast()
        view.reason = (
            f"{run.layout.relative(self.folder)}: {len(self.project.targets)} targets,"
            f" {len(self.reached)} reached"
        )

    def _find_reached(self, view: Step) -> None:
        """Configure until every reached target has its external sources; fetch no others."""
        run = self.run
        declared = externals.declared(run.layout.vllm, run.observed.device)
        wanted: set[str] = {
            *self.targets,
            *(compiled_here(run.observed.kernels.recorded) if not self.is_native else ()),
        }
        while True:
            needed = [
                external
                for external in declared
                if self.is_native or wanted & set(external.targets)
            ]
            others = [external for external in declared if external not in needed]
            self.project = self._configured(view, self.inputs, needed, others)
            self.reached = self._reach(view)
            names = {reached.target for reached in self.reached}
            if names <= wanted or not any(names & set(external.targets) for external in others):
                return
            wanted |= names

    def _forecast(self) -> RebuildPlan:
        """Forecast units, seconds and memory from the table of costs and this machine's history."""
        history = History(ninja.history_file(self.run.settings), setup=self.setup)
        for sentence in history.warnings:
            self.run.run_log.console.warn(sentence)
        return jobs.work_out(
            self.reached,
            self.project,
            Costs(known_entries(), history.entries),
            Bounds(self.jobs.count, self.memory.budget_gib),
            why_not_hybrid=self.why_native,
        )

    def _configured(
        self, view: Step, inputs: Inputs, needed: Sequence[External], others: Sequence[External]
    ) -> Project:
        """Configure with CMake in the build directory of `inputs`; fetch only `needed` sources."""
        layout, settings, run_log = self.run.layout, self.run.settings, self.run.run_log
        sources = cmake_inputs.provide(layout, settings, needed, others, run_log=run_log, step=view)
        launcher = job_server.install(cmake_inputs.folder(layout, inputs) / "tickets")
        return cmake.configure(
            self.run.observed.machine, inputs, sources, launcher=launcher, run_log=run_log
        )

    def _reach(self, view: Step) -> tuple[Reached, ...]:
        """Return the targets to compile: the requested ones, or those that the changes reach."""
        run, tree = self.run, self.run.layout.vllm
        if self.is_native:
            return self._reach_native()
        base = run.observed.checkout.base
        if base:
            base = precompiled.sources_commit(run.observed.pin, base)
        changed = (
            targets.changed_files(Git(tree), base)
            if base and run.observed.kernels_wanted.source.is_hybrid
            else ()
        )
        pinned = (
            self._pinned(view, base)
            if base and any(targets.is_cmake(path) for path in changed)
            else None
        )
        found = targets.follow(tree, changed, self.project, build=self.folder, pinned=pinned)
        for path in found.idle:
            run.run_log.write(f"{path} reaches no target")
        more = (
            targets.requested(self.targets, TARGET_FLAG, tree, self.project, build=self.folder)
            if self.targets
            else ()
        )
        return targets.merged((found.targets, more))

    def _reach_native(self) -> tuple[Reached, ...]:
        """Return the requested targets, or all targets of the tree's extensions."""
        tree = self.run.layout.vllm
        listed = project.extensions(tree)
        names = [
            target.name for target in targets.final_targets(self.project) if target.name in listed
        ]
        reason = TARGET_FLAG if self.targets else self.why_native or "--kernels native"
        return targets.requested(
            self.targets or names, reason, tree, self.project, build=self.folder
        )

    def _pinned(self, view: Step, base: str) -> Project:
        """Configure the pin's tree: compared with it, CMakeLists.txt reaches only its changes."""
        layout = self.run.layout
        tree = layout.builds / "pinned" / base[:12]
        if not (tree / "CMakeLists.txt").is_file():
            remotes.write_tree(Git(layout.vllm), base, tree)
        inputs = replace(self.inputs, place=str(tree))
        return self._configured(view, inputs, (), externals.declared(tree, inputs.device))

    def compile(self, view: Step) -> None:
        """Compile what ninja finds out of date."""
        run = self.run
        if not self.reached:
            view.skip("no target is reached")
            return
        if not run.is_sandbox and not project.link_database(run.layout, self.folder):
            run.run_log.write(f"{run.layout.relative(run.layout.compile_commands)} is kept")
        for sentence in (self.jobs.sentence, self.memory.sentence):
            run.run_log.console.info(sentence)
        names = [reached.target for reached in self.reached]
        units = (unit for reached in self.reached for unit in reached.units)
        work = ninja.Work.of_units(self.folder, self.setup, self.jobs, self.memory, units)
        built = ninja.compile(run.layout, run.settings, work, names, run_log=run.run_log, step=view)
        run.run_log.console.table(built.summary, right=(1, 2))
        run.outcome["jobs"], run.outcome["seconds"] = str(self.jobs.count), f"{built.seconds:.0f}"
        view.reason = f"{len(built.finished)} units, {', '.join(names)}"

    @property
    def is_install_due(self) -> bool:
        """Whether the tree is out of date; if not, requested targets are only compiled ahead."""
        observed = self.run.observed
        if self.is_native and self.targets:
            return False
        return observed.kernels.state != "ok" or observed.install.state != "ok"

    def install(self, view: Step) -> None:
        """Install what was compiled into the editable tree; until the stamp it is unverified."""
        run, layout, observed = self.run, self.run.layout, self.run.observed
        names = [reached.target for reached in self.reached if reached.reason != TARGET_FLAG]
        is_editable_current = self._is_editable_current(names)
        recorded = observed.kernels.recorded
        if is_editable_current and recorded:
            self.before = verify.before_install(layout, recorded)
        stamp.withdraw(layout.stamp("vllm"))
        venv.repair(layout, run.settings, run_log=run.run_log, names=("vllm",))
        if not is_editable_current:
            self._install_editable()
        installed = [target for target in self.project.targets if target.name in names]
        environment = run.settings.child_environment(
            "compile",
            ninja.environment(layout, run.settings, self.jobs, self.folder / "tickets" / "ticket"),
            layout=layout,
        )
        files = project.install_targets(
            self.folder,
            layout.vllm,
            installed,
            run_log=run.run_log,
            env=environment,
        )
        run.outcome[COMPILED_HERE] = " ".join(sorted(names))
        view.reason = (
            f"vllm {observed.version}, editable; {len(files)} files of {len(installed)}"
            " targets compiled here"
        )

    def _is_editable_current(self, names: Sequence[str]) -> bool:
        """Whether only the libraries of these targets differ from the editable install."""
        observed = self.run.observed
        recorded = observed.kernels.recorded
        return (
            recorded is not None
            and not self.is_native
            and not (compiled_here(recorded) - set(names))
            and observed.install.state == "ok"
            and set(observed.kernels.reasons) <= set(observed.needs_compilation)
        )

    def _install_editable(self) -> None:
        run = self.run
        if not self.is_native:
            stages.install_with_wheel(run)
            return
        stages.install_alone(
            run.observed,
            build={"CARGO_BUILD_JOBS": str(self.jobs.count)},
            run_log=run.run_log,
        )

    def verify(self, view: Step) -> None:
        """Write the stamp once every library loads and has code for the intended GPU."""
        run = self.run
        observed, verdict = run.observed, None
        if stages.note_python(run) and self.before:
            verdict = verify.verify_changed(observed.machine, self.before)
        verdict = verdict or verify.verify(observed)
        device_code = (
            stages.check_device_code(
                run,
                [library.path for library in verdict.libraries],
                archs=self.inputs.archs,
                not_built=self.project.not_built,
                is_native=self.is_native,
            )
            if observed.device == "cuda"
            else ""
        )
        stages.write_stamp(run, verdict, self.source)
        view.reason = f"{verdict.version} from vendor/vllm, {verdict.summary}{device_code}"

    def show(self, options: RebuildOptions) -> None:
        """Print the plan: on stdout only where it was asked for, with --plan."""
        if self.plan is not None:
            console = self.run.run_log.console
            place = console.stdout if options.plan_only else console
            jobs.show(self.plan, place, as_json=options.as_json)
            sentence = status.driver_sentence(self.run.observed.kernels.recorded)
            if sentence and not options.as_json:
                console.info(sentence)


def job_of(run: stages.Run) -> Job:
    """Return the job of a run; if the verb has made none, make one from the settings alone."""
    if not isinstance(run.job, Job):
        run.job = job = Job(run, *bounds_of(run.observed.machine, RebuildOptions()))
        return job
    return run.job


# The steps that lead to the plan, and those that carry it out: only INSTALL changes the tree.
PLAN: stages.Steps = (
    ("precompiled", lambda run, view: job_of(run).fetch_precompiled(view)),
    ("configure", lambda run, view: job_of(run).configure(view)),
)
COMPILE: stages.Steps = (("compile", lambda run, view: job_of(run).compile(view)),)
INSTALL: stages.Steps = (
    ("install", lambda run, view: job_of(run).install(view)),
    ("verify", lambda run, view: job_of(run).verify(view)),
)


def compiled_here(recorded: stamp.Stamp | None) -> set[str]:
    """Return the targets whose libraries in the tree were compiled here, as the stamp records."""
    return set(recorded.outcome.get(COMPILED_HERE, "").split()) if recorded else set()


def rebuild(
    observed: plan.Observation,
    options: RebuildOptions,
    *,
    console: Console,
    wait: bool = False,
    is_sandbox: bool = False,
) -> plan.Observation:
    """Compile and install what is due, or with `plan_only` only show it; return the tree's state
    at the end. Raises the error of a failed step.
    """
    machine = observed.machine
    layout, settings = machine.layout, machine.settings
    bounds = bounds_of(machine, options)
    is_compiled = bool(options.targets) or observed.kernels_wanted.source.is_compiled
    verb = "inv rebuild --plan" if options.plan_only else "inv rebuild"
    with stages.locked(
        layout, settings, verb, console=console, wait=wait, names_log=True
    ) as run_log:
        _preflight(observed, console, is_compiled=is_compiled)
        run = stages.Run(run_log, observed.again(), is_sandbox=is_sandbox)
        built = _act(run, options, bounds, is_compiled=is_compiled)
    if not options.plan_only:
        observed = observed.again()
        console.sentence(built)
        console.hint(status.next_command(observed))
    return observed


def show_empty(bounds: tuple[Jobs, Memory], console: Console, *, as_json: bool) -> None:
    """Print the plan where no unit is compiled: for a program, the same document as elsewhere."""
    within = Bounds(bounds[0].count, bounds[1].budget_gib)
    empty = jobs.work_out((), Project((), ()), Costs(()), within)
    jobs.show(empty, console.stdout, as_json=as_json)


def bounds_of(machine: Machine, options: RebuildOptions) -> tuple[Jobs, Memory]:
    """Return the limits of cores and memory. Raises SettingsError for a flag that is none."""
    host, settings = machine.host(), machine.settings
    return jobs.count(settings, cores=host.cores, flag=options.jobs), jobs.memory(
        host, flag=options.memory
    )


def _preflight(observed: plan.Observation, console: Console, *, is_compiled: bool) -> None:
    rows = doctor.preflight(
        observed.machine,
        device=observed.device,
        is_native=is_compiled,
        need_gib={observed.machine.layout.builds: NEEDED_GIB if is_compiled else 1.0},
    )
    stages.require_rows(rows, console, what="compile")


def _act(
    run: stages.Run, options: RebuildOptions, bounds: tuple[Jobs, Memory], *, is_compiled: bool
) -> str:
    """Run the steps in order; each reads what the step before it left. Return what was built."""
    rebuilt = f"vllm {run.observed.version} is rebuilt"
    if not is_compiled:
        if options.plan_only:
            show_empty(bounds, run.run_log.console, as_json=options.as_json)
            return "nothing was built"
        stages.act(run, stages.VLLM)
        return rebuilt
    run.job = job = Job(run, *bounds, targets=options.targets)
    stages.act(run, PLAN)
    job.show(options)
    if options.plan_only:
        return "nothing was built"
    stages.act(run, COMPILE)
    if job.is_install_due:
        stages.act(run, INSTALL)
        return rebuilt
    return (
        f"compiled {', '.join(options.targets)} in {run.layout.relative(job.folder)}; the rest of"
        f" vllm {run.observed.version} was not built, and no library in the tree was changed"
    )
