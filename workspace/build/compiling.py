"""The steps of a rebuild that compiles: donor, configure, compile, install, verify. What is reached and what it costs is worked out in build/native."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from workspace.build import donor, install, stages, stamp, tickets, verify
from workspace.build import jobs as bounds
from workspace.build.admission import Bounds
from workspace.build.costs import Costs, History, read_table
from workspace.build.jobs import Jobs, Memory
from workspace.build.native import cmake, cubins, externals, forecast, guard, inputs, ninja, project, put, reach
from workspace.build.native.externals import External
from workspace.build.native.forecast import RebuildPlan
from workspace.build.native.inputs import Inputs
from workspace.build.native.project import Project
from workspace.build.native.reach import Reached
from workspace.core.console import Step
from workspace.core.errors import BuildError
from workspace.environment import machine, wholeness
from workspace.source import times
from workspace.source.git import Git, copy

# Which targets of a tree were compiled here: names with blanks between, in the stamp's outcome.
OWN = "compiled here"
TARGET_FLAG = "--target"


@dataclass
class Job:
    """One rebuild. `targets` are wanted beside what is reached; each step leaves to the next what it found."""

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
        self.inputs: Inputs = inputs.observe(self.run.layout, self.run.settings, device=observed.device, pin=observed.pin, torch=observed.torch)
        self.folder: Path = inputs.folder(self.run.layout, self.inputs)

    @property
    def setup(self) -> str:
        """What the costs of a unit depend on, beside the unit: figures of another setup are not used."""
        made = self.inputs
        return f"{made.device} {made.archs} CUDA {made.cuda or 'none'} {made.compiler} {made.build_type} threads {self.jobs.nvcc_threads}"

    def fetch_donor(self, view: Step) -> None:
        """Have the pin's wheel at hand, and decide whether it and what is compiled here go together."""
        run = self.run
        if self.is_native:
            view.skip("everything is compiled here")
            return
        observed = run.observed
        wheel = donor.fetch(observed.kernels_wanted, observed.pin, observed.device, run.settings, on_progress=stages.megabytes(view))
        self.why_native = guard.hybrid(run.layout, run.settings, wheel, device=observed.device, torch=self.inputs.torch, archs=self.inputs.archs)
        self.is_native = self.why_native is not None
        if self.why_native:
            view.reason = f"not used: {self.why_native}; everything is compiled here"
        else:
            run.outcome["wheel"] = str(wheel)
            view.reason = f"{wheel.name} gives what no change reaches"

    def configure(self, view: Step) -> None:
        """Ask CMake what there is to build, then find what the changes reach. Sources of other projects come only for what is compiled."""
        run = self.run
        for sentence in externals.leftover(run.layout.vllm):
            run.journal.console.warn(sentence)
        declared = externals.declared(run.layout.vllm, run.observed.device)
        wanted: set[str] = {*self.targets, *(own(run.observed.kernels.recorded) if not self.is_native else ())}
        while True:
            needed = [external for external in declared if self.is_native or wanted & set(external.targets)]
            self.project = self._configured(view, needed, [external for external in declared if external not in needed])
            self.reached = self._reach(view)
            names = {one.target for one in self.reached}
            if names <= wanted or not any(names & set(external.targets) for external in declared if external not in needed):
                break
            wanted |= names
        table, trouble = read_table()
        history = History(ninja.history_file(run.settings), setup=self.setup)
        for sentence in (*((trouble,) if trouble else ()), *history.warnings):
            run.journal.console.warn(sentence)
        limits = Bounds(self.jobs.count, self.memory.budget_gib)
        self.plan = forecast.work_out(self.reached, self.project, Costs(table, history.entries), limits, why_not_hybrid=self.why_native)
        view.reason = f"{run.layout.relative(self.folder)}: {len(self.project.targets)} targets, {len(self.reached)} reached"

    def _configured(self, view: Step, needed: Sequence[External], others: Sequence[External]) -> Project:
        run = self.run
        sources = externals.provide(run.layout, run.settings, needed, others, journal=run.journal, step=view)
        return cmake.configure(run.layout, run.settings, self.inputs, sources, ticket=tickets.install(self.folder / "tickets"), journal=run.journal)

    def _reach(self, view: Step) -> tuple[Reached, ...]:
        run, tree = self.run, self.run.layout.vllm
        base = run.observed.checkout.base
        if self.is_native:
            listed = {extension.target for extension in project.extensions(tree, run.observed.device)}
            names = [target.name for target in reach.final_targets(self.project) if target.name in listed]
            reason = TARGET_FLAG if self.targets else self.why_native or "--kernels native"
            return reach.asked(self.targets or names, reason, tree, self.project, build=self.folder)
        changed = reach.changed_files(Git(tree), base) if base and run.observed.kernels_wanted.kind == "hybrid" else ()
        pinned = self._pinned(view, base) if base and any(reach.is_cmake(path) for path in changed) else None
        found = reach.follow(tree, changed, self.project, build=self.folder, pinned=pinned)
        for sentence in found.idle:
            run.journal.write(sentence)
        more = reach.asked(self.targets, TARGET_FLAG, tree, self.project, build=self.folder) if self.targets else ()
        return reach.merged((found.targets, more))

    def _pinned(self, view: Step, base: str) -> Project:
        """What CMake makes of the pin's own tree, asked in a build directory of its own: a changed CMakeLists.txt then reaches only what it changes."""
        layout, settings, journal = self.run.layout, self.run.settings, self.run.journal
        tree = layout.builds / "pinned" / base[:12]
        if not (tree / "CMakeLists.txt").is_file():
            copy.write(Git(layout.vllm), base, tree)
        of_pin = replace(self.inputs, place=str(tree))
        sources = externals.provide(layout, settings, (), externals.declared(tree, of_pin.device), journal=journal, step=view)
        ticket = tickets.install(inputs.folder(layout, of_pin) / "tickets")
        return cmake.configure(layout, settings, of_pin, sources, ticket=ticket, journal=journal)

    def compile(self, view: Step) -> None:
        """Compile what ninja finds out of date in the reached targets. From here on no remembered time of a source counts."""
        run = self.run
        if not self.reached:
            view.skip("nothing is reached")
            return
        times.forget(run.layout, "vllm")
        for said in (self.jobs.sentence, self.memory.sentence):
            run.journal.console.say(said)
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
            journal=run.journal,
            step=view,
        )
        for sentence in made.summary:
            run.journal.console.say(sentence)
        run.outcome["jobs"], run.outcome["seconds"] = str(self.jobs.count), f"{made.seconds:.0f}"
        view.reason = f"{len(made.finished)} units, {', '.join(one.target for one in self.reached)}"

    @property
    def is_put_due(self) -> bool:
        """Whether the tree is to have what was compiled. A target that was only asked for is warmed ahead, and the tree's library of it stays."""
        observed = self.run.observed
        if self.is_native and self.targets:
            return False
        return observed.kernels.state != "ok" or observed.install.state != "ok"

    def install(self, view: Step) -> None:
        """Put what was compiled into the editable tree; from here until the stamp the build is unproven."""
        run, layout, observed = self.run, self.run.layout, self.run.observed
        placed = [one.target for one in self.reached if one.reason != TARGET_FLAG]
        recorded = observed.kernels.recorded
        is_same_ground = recorded is not None and not self.is_native and not (own(recorded) - set(placed)) and observed.install.state == "ok"
        only_compiled = set(observed.kernels.reasons) <= set(observed.for_compiler)
        stamp.withdraw(layout.stamp("vllm"))
        wholeness.mend(layout, run.settings, journal=run.journal, names=("vllm",))
        if not (is_same_ground and only_compiled):
            if self.is_native:
                install.alone(layout, run.settings, observed, build={"CARGO_BUILD_JOBS": str(self.jobs.count)}, journal=run.journal)
            else:
                wheel = Path(run.outcome["wheel"])
                install.from_wheel(layout, run.settings, observed, wheel, journal=run.journal)
                if run.is_arm:
                    donor.complete(wheel, layout.vllm)
                donor.check_taken(wheel, layout.vllm)
        placed_targets = [target for target in self.project.targets if target.name in placed]
        environment = run.settings.child_environment("build", ninja.environment(layout, run.settings, self.jobs, self.folder / "tickets" / "ticket"))
        files = put.put(self.folder, layout.vllm, placed_targets, journal=run.journal, env=environment, shared=run.settings.cache)
        run.outcome[OWN] = " ".join(sorted(placed))
        view.reason = f"vllm {observed.version}, editable; {len(files)} files of {len(placed_targets)} targets compiled here"

    def verify(self, view: Step) -> None:
        """The last step: the stamp is written once every library loads and has code for the GPU that is meant."""
        run = self.run
        observed = run.observe()
        verdict = verify.check(run.layout, run.settings, observed)
        held = self._judge([library.path for library in verdict.libraries]) if observed.device == "cuda" else ""
        stages.write_stamp(run, observed, verdict, kind="native" if self.is_native else observed.kernels_wanted.kind)
        view.reason = f"{verdict.version} from vendor/vllm, {verdict.said}{held}"

    def _judge(self, libraries: Sequence[str]) -> str:
        """Hold what the libraries have for a GPU against the one that is meant. Raises BuildError where one has nothing for it that it should have."""
        run, archs = self.run, self.inputs.archs
        capabilities = tuple(gpu.capability for gpu in machine.observe(run.settings).gpus if gpu.capability)
        listed = cubins.list_cubins(run.layout, run.settings, [run.layout.vllm / path for path in libraries])
        judged = cubins.judge(listed, capabilities=capabilities, archs=archs)
        left_out = cubins.judge_not_built(self.project.not_built, archs)
        for sentence in (*(f"{one.library}: {one.state}: {one.sentence}" for one in judged), *left_out.expected):
            run.journal.write(sentence)
        for sentence in (*left_out.unknown, *(left_out.failures if not self.is_native else ())):
            run.journal.console.warn(sentence)
        wrong = [f"{one.library} {one.sentence}" for one in judged if one.state == "wrong"] + list(left_out.failures if self.is_native else ())
        if wrong:
            meant = " and ".join(capabilities) or archs
            hint = "./scripts/inv doctor --offline    judges TORCH_CUDA_ARCH_LIST"
            raise BuildError(f"what was built does not serve {meant}: {wrong[0]}", hint=hint, details=tuple(wrong))
        count = sum(one.state == "ok" for one in judged)
        return f"; {count} {'has' if count == 1 else 'have'} code for {' and '.join(capabilities) or archs}"

    def show(self, *, as_json: bool) -> None:
        if self.plan is not None:
            forecast.show(self.plan, self.run.journal.console, as_json=as_json)


def job_of(run: stages.Run) -> Job:
    """The job of a run; where no verb has made one, that of the settings alone."""
    if not isinstance(run.job, Job):
        host = machine.observe(run.settings)
        run.job = made = Job(run, bounds.count(run.settings, cores=host.cores), bounds.memory(host))
        return made
    return run.job


# What leads to the plan, and what carries it out: the tree is touched by the last only.
PLAN: tuple[tuple[str, stages.Act], ...] = (
    ("donor", lambda run, view: job_of(run).fetch_donor(view)),
    ("configure", lambda run, view: job_of(run).configure(view)),
)
COMPILE: tuple[tuple[str, stages.Act], ...] = (("compile", lambda run, view: job_of(run).compile(view)),)
PUT: tuple[tuple[str, stages.Act], ...] = (
    ("install", lambda run, view: job_of(run).install(view)),
    ("verify", lambda run, view: job_of(run).verify(view)),
)


def own(recorded: stamp.Stamp | None) -> set[str]:
    """The targets whose libraries in the tree were compiled here, by the stamp."""
    return set(recorded.outcome.get(OWN, "").split()) if recorded else set()
