"""nox -s spark: acceptance of the workspace on a machine, part by part, with a page and an archive.

It asks once, runs the parts of spark_parts.py in a clone of its own below .workspace/spark, and
keeps a record below results/spark, from which the same command resumes. The user's own clone, build
and servers are not touched.
"""

import contextlib
import math
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from workspace.bench import report, results, subject
from workspace.compile import costs, jobs, ninja
from workspace.core import hints, lock, records
from workspace.core.console import Console, Row, State
from workspace.core.errors import (
    BuildError,
    SettingsError,
    ToolchainError,
    WorkspaceError,
    counted,
)
from workspace.core.files import write_atomic
from workspace.core.paths import Layout
from workspace.core.redaction import Redactor
from workspace.core.settings import Settings
from workspace.machine import hardware
from workspace.machine.machine import Machine
from workspace.repo import pins
from workspace.repo.git import Git
from workspace.support import bug_report, perf_pairs, spark_parts
from workspace.support.spark_parts import LEAST_AVAILABLE_GIB, Figures, Part, Trial, Unfit, Watch

VERB = "nox -s spark"
RECORD, PAGE = "record.json", "page.md"
# GiB that stay free on the disk.
SPARE_GIB = 1.0
_GB10 = "GB10"

Result = Literal["passed", "failed", "lacking"]


@dataclass(frozen=True)
class SparkOptions:
    """Options of the command line as typed."""

    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    memory: str | None = None
    model: str | None = None
    yes: bool = False
    plan_only: bool = False
    again: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a part found. `text` is why it did not pass; `lacking`: the machine lacks what it needs.

    `peak_gib` is the memory of its processes, `least_gib` the memory that the machine had left.
    """

    result: Result
    time: str
    seconds: float
    text: str
    hint: str | None
    figures: Mapping[str, str]
    peak_gib: float
    least_gib: float
    pressure_percent: float
    load: float
    commit: str = "none"


@dataclass(frozen=True)
class Record(records.Record, schema=1):
    """An acceptance of one pin on one machine, with the parts that have run."""

    machine: results.Machine
    pin: str
    device: str
    began: str
    bound_gib: float
    parts: Mapping[str, Outcome]

    def is_passed(self, part: Part) -> bool:
        return part.name in self.parts and self.parts[part.name].result == "passed"


@dataclass(frozen=True)
class Acceptance:
    """A run: its machine, its record so far, and the clone in which its parts work."""

    machine: Machine
    trial: Trial
    record: Record
    options: SparkOptions
    commit: str

    @property
    def due(self) -> tuple[Part, ...]:
        """The parts to run: those that have not passed, and the build that they need."""
        due = [part for part in self.wanted if not self.record.is_passed(part)]
        needs_build = any(part.needs_build for part in due) and not self.trial.is_built
        return tuple(
            part
            for part in spark_parts.PARTS
            if part in due or (needs_build and part.name == "bootstrap")
        )

    @property
    def wanted(self) -> tuple[Part, ...]:
        """The parts that the command line chooses."""
        chosen = set(self.options.only or spark_parts.NAMES) - set(self.options.without)
        return tuple(part for part in spark_parts.PARTS if part.name in chosen)

    def shortage(self, part: Part, available_gib: float = math.inf) -> str:
        """Return why the memory does not allow a part, empty if it does."""
        needed, most = part.need(self.trial.device).memory_gib, self.trial.bound_gib
        most = min(most, available_gib)
        return f"needs {needed:g} GiB of memory, {most:.1f} may be taken" if needed > most else ""


def run(layout: Layout, settings: Settings, options: SparkOptions, *, console: Console) -> None:
    """Run the parts that are due after a yes, and write page and archive.

    Raises SettingsError without a yes and for a record of another machine, ToolchainError where
    disk or memory are too small, BuildError at the end if a part failed.
    """
    machine = Machine(layout, settings)
    acceptance = _begin(machine, options)
    due = acceptance.due
    if "bootstrap" in options.without and any(part.name == "bootstrap" for part in due):
        raise SettingsError(
            "the parts run in a clone of their own, which the part bootstrap builds",
            hint=hints.text("support.spark_bootstrap"),
        )
    (console.stdout if options.plan_only else console).rows(_rows(acceptance, due))
    if text := _total(acceptance, due):
        console.sentence(text)
    if options.plan_only:
        return
    if due:
        _require_room(acceptance, due)
        if not (options.yes or console.is_confirmed("start?")):
            raise SettingsError(
                "nothing was started: it wants a yes, on a terminal or as --yes",
                hint=hints.text("support.spark_yes"),
            )
    folder = acceptance.trial.folder
    with (
        lock.hold(layout.state / "spark" / "lock", verb=VERB),
        _kept_reported(layout, folder, console),
    ):
        if options.again and (former := records.read(folder / RECORD, Record)):
            folder.rename(folder.with_name(f"{folder.name}.{former.began.replace(':', '')[:17]}"))
        records.write(folder / RECORD, acceptance.record)
        acceptance.trial.renew_clone()
        for part in due:
            acceptance = _ran(acceptance, part, console)
            if part.name == "bootstrap" and not acceptance.trial.is_built:
                break
        # Under the lock, because it may remove the clone.
        _finish(acceptance, console)


def _begin(machine: Machine, options: SparkOptions) -> Acceptance:
    """Return the run with the record of an earlier one, which it resumes."""
    layout, settings = machine.layout, machine.settings
    recorded = subject.recorded_machine(machine)
    folder = layout.results / "spark" / recorded.name
    memory = jobs.memory(machine.host(), flag=options.memory)
    fresh = Record(
        machine=recorded,
        pin=pins.load(layout.pins).vllm.tag,
        device=machine.device,
        began=records.utc_now(),
        bound_gib=round(memory.budget_gib, 2),
        parts={},
    )
    clone = Layout(layout.state / "spark" / "clone")
    trial = Trial(
        perf_pairs.Context(layout, settings, clone.root.parent),
        clone,
        folder,
        machine.device,
        fresh.bound_gib,
        is_unified=machine.device == "cuda" and not any(machine.driver.memories()),
        model=options.model or ("tiny" if machine.device == "cpu" else "smollm2"),
    )
    # The clone gets the workspace of this moment.
    commit = Git(layout.root).head() or "none"
    return Acceptance(machine, trial, _resumed(folder, fresh, options), options, commit)


def _resumed(folder: Path, fresh: Record, options: SparkOptions) -> Record:
    """Return the record to resume; with --again a new one.

    Raises SettingsError for a record of another machine, pin or device.
    """
    former = records.read(folder / RECORD, Record)
    if former is None or options.again:
        return fresh
    differing = {
        "machine": (former.machine.name, fresh.machine.name),
        "pin": (former.pin, fresh.pin),
        "device": (former.device, fresh.device),
    }
    for name, (there, here) in differing.items():
        if there != here:
            raise SettingsError(
                f"the record in results/spark/{folder.name} is of another {name}: {there}, not"
                f" {here}",
                hint=hints.text("support.spark_again"),
            )
    return replace(former, bound_gib=fresh.bound_gib)


def _rows(acceptance: Acceptance, due: Sequence[Part]) -> Iterator[Row]:
    """Yield a row for each part: what it takes, or why it does not run."""
    for part in spark_parts.PARTS:
        need = part.need(acceptance.trial.device)
        done = acceptance.record.parts.get(part.name)
        text = (
            f"{part.title}: about {jobs.duration(need.seconds)}, {need.disk_gib:g} GiB of disk,"
            f" {need.memory_gib:g} GiB of memory"
        )
        if part in due and (shortage := acceptance.shortage(part)):
            yield Row(State.WARN, part.name, f"{part.title}: {shortage}")
        elif part in due and done:
            yield Row(State.STALE, part.name, f"{text}; {done.result} at {done.time}: {done.text}")
        elif part in due:
            yield Row(State.MISSING, part.name, text)
        elif done:
            state = State.OK if done.result == "passed" else State.WARN
            yield Row(state, part.name, f"{part.title}: {done.result} at {done.time}")
        else:
            yield Row(State.SKIPPED, part.name, f"{part.title}: left out")


def _require_room(acceptance: Acceptance, due: Sequence[Part]) -> None:
    """Raise ToolchainError where the disk is too small for the parts, or the memory for each."""
    trial = acceptance.trial
    needed = sum(part.need(trial.device).disk_gib for part in due)
    free = hardware.free_gib(trial.clone.root) - SPARE_GIB
    if needed > free:
        largest = max(due, key=lambda part: part.need(trial.device).disk_gib)
        raise ToolchainError(
            f"the parts need {needed:.1f} GiB of disk, and {max(0.0, free):.1f} may be taken at"
            f" {hardware.existing(trial.clone.root)}",
            hint=hints.text("core.disk_of", folder=hardware.existing(trial.clone.root)),
            details=(f"the largest is {largest.name}",),
        )
    if all(acceptance.shortage(part) for part in due):
        part = due[0]
        raise ToolchainError(
            f"no part fits into the memory: {part.name} {acceptance.shortage(part)}",
            hint=hints.text("support.spark_plan"),
        )


def _total(acceptance: Acceptance, due: Sequence[Part]) -> str:
    """Return what the parts that will run take together, empty if none will."""
    needs = [part.need(acceptance.trial.device) for part in due if not acceptance.shortage(part)]
    if not needs:
        return ""
    return (
        f"{counted(len(needs), 'part')}: about {jobs.duration(sum(one.seconds for one in needs))},"
        f" {sum(one.disk_gib for one in needs):.1f} GiB of disk until the end, at most"
        f" {acceptance.trial.bound_gib:.1f} GiB of memory"
    )


@contextlib.contextmanager
def _kept_reported(layout: Layout, folder: Path, console: Console) -> Iterator[None]:
    """Name what an interrupted run has kept, and how to resume or remove it."""
    try:
        yield
    except WorkspaceError:
        raise
    except BaseException:
        console.info(f"kept: {layout.relative(folder)}, and .workspace/spark, which may be deleted")
        console.hint(hints.text("support.spark_resume"))
        raise


def _ran(acceptance: Acceptance, part: Part, console: Console) -> Acceptance:
    """Run a part, and write what it found into the record."""
    trial, began = acceptance.trial, records.utc_now()
    started = time.monotonic()
    try:
        with console.step(part.name) as view, Watch(trial) as watch:
            view.reason = part.title
            result, text, hint, figures = _judged(acceptance, part, watch)
            if result != "passed":
                view.state = State.FAIL if result == "failed" else State.SKIPPED
                view.reason = f"{result}: {text}"
    finally:
        # No watch may end the programs of this.
        with contextlib.suppress(WorkspaceError):
            trial.settle()
    outcome = Outcome(
        result,
        began,
        round(time.monotonic() - started, 1),
        text,
        hint,
        figures,
        round(watch.peak_gib, 2),
        round(watch.least_gib, 2),
        watch.pressure_percent,
        round(watch.load, 1),
        acceptance.commit,
    )
    record = replace(acceptance.record, parts={**acceptance.record.parts, part.name: outcome})
    records.write(trial.folder / RECORD, record)
    return replace(acceptance, record=record)


def _judged(
    acceptance: Acceptance, part: Part, watch: Watch
) -> tuple[Result, str, str | None, Figures]:
    """Run a part and return its result, why it did not pass, what to type, and its figures."""
    trial = acceptance.trial
    if shortage := acceptance.shortage(part, ninja.memory_status(0.0).available_gib):
        return "lacking", shortage, None, {}
    try:
        if not trial.clone.root.exists():
            trial.make_clone()
        trial.settle()
        return "passed", "", None, part.work(trial)
    except WorkspaceError as exc:
        if watch.breach:
            # A machine that others fill lacks the memory; the part is at fault for its own only.
            result: Result = "failed" if watch.is_over else "lacking"
            return result, f"ended: {watch.breach}", hints.text("support.spark_plan"), {}
        figures = exc.figures if isinstance(exc, Unfit) else {}
        is_lacking = isinstance(exc, ToolchainError)
        return "lacking" if is_lacking else "failed", exc.message, exc.hint, figures
    except records.DecodeError as exc:
        return "failed", f"a program printed something else: {exc}", None, {}


def _finish(acceptance: Acceptance, console: Console) -> None:
    """Write page and archive, remove the clone if all is done, and report what failed."""
    machine, trial = acceptance.machine, acceptance.trial
    layout, folder = machine.layout, trial.folder
    redactor = Redactor(hardware.private(layout, machine.settings))
    page = folder / PAGE
    write_atomic(page, redactor.text(_page(acceptance)).encode())
    archive = folder / f"spark-{acceptance.record.machine.name}.tar.gz"
    built = trial.clone if trial.is_built else layout
    bug_report.pack(
        Machine(built, machine.settings),
        {"spark": lambda _: _files(folder)},
        redactor,
        archive,
        console=console,
    )
    found = acceptance.record.parts
    chosen = [part.name for part in acceptance.wanted]
    failed = [name for name in chosen if name in found and found[name].result == "failed"]
    if not failed and not acceptance.options.only and trial.clone.root.exists():
        shutil.rmtree(trial.clone.root)
    console.info(f"read both before you share them: {layout.relative(page)}")
    console.data(str(archive))
    if failed:
        raise BuildError(
            f"{counted(len(failed), 'part')} failed: {', '.join(failed)}: {found[failed[0]].text}",
            hint=hints.text("support.spark_resume"),
        )


def _files(folder: Path) -> dict[str, str]:
    """Return what the archive has of this run."""
    names = sorted(path for path in folder.iterdir() if not path.name.endswith(".tar.gz"))
    return {f"spark/{path.name}": hardware.tail_of(path) for path in names if path.is_file()}


def _page(acceptance: Acceptance) -> str:
    """Return the page: what passed, what did not, what this machine has no part for, figures."""
    record = acceptance.record
    names = ("part", "result", "seconds", "held, GiB", "left, GiB", "pressure, %", "load")
    parts = [
        _head(acceptance),
        _table("Parts", names, map(partial(_part_cells, record), spark_parts.PARTS)),
    ]
    for name in spark_parts.NAMES:
        figures = record.parts[name].figures if name in record.parts else {}
        parts += [_table(name, ("what", "figure"), figures.items())] if figures else []
    return "\n".join([*parts, _published(acceptance), _costs(acceptance)])


def _head(acceptance: Acceptance) -> str:
    record, machine = acceptance.record, acceptance.machine
    own = record.machine
    gpus = ", ".join(f"{gpu.name} ({gpu.capability}), driver {gpu.driver}" for gpu in own.gpus)
    what = gpus or "no GPU"
    is_gb10 = any(_GB10 in gpu.name for gpu in own.gpus)
    title = what if is_gb10 else f"a machine that is not a GB10: {own.architecture}, {what}"
    commits = dict.fromkeys(one.commit[:12] for one in record.parts.values())
    text = (
        f"{record.began[:10]}. {own.processor}, {counted(own.cores, 'core')},"
        f" {own.memory_gib:.0f} GiB; {what}; kernel {platform.release()}. vLLM {record.pin} for"
        f" {record.device}; workspace at {', '.join(commits)}.\nThe parts may hold"
        f" {record.bound_gib:.1f} GiB together, and end where the machine has less than"
        f" {LEAST_AVAILABLE_GIB:g} GiB left."
    )
    if machine.gpus:
        residents = ", ".join(one.name for one in machine.driver.residents())
        text += f" Other programs on the GPU now: {residents or 'none'}."
    return f"# Acceptance on {title}\n\n{text}\n\nRepeat: `./scripts/{VERB} -- --again`.\n"


def _part_cells(record: Record, part: Part) -> Sequence[str]:
    """Return the row of a part, which may not have run."""
    title, one = f"{part.name}: {part.title}", record.parts.get(part.name)
    if one is None:
        return (title, "not run", *[""] * 5)
    found = {"passed": "passed", "failed": "**failed**", "lacking": "not on this machine"}
    result = f"{found[one.result]}: {one.text}" if one.text else found[one.result]
    memory = (f"{one.peak_gib:.1f}", f"{one.least_gib:.1f}", f"{one.pressure_percent:g}")
    return (title, result, f"{one.seconds:.0f}", *memory, f"{one.load:.1f}")


def _table(title: str, names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a section that is a table of Markdown."""
    cells = ([" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in rows)
    lines = (f"| {' | '.join(row)} |" for row in ([*names], ["---"] * len(names), *cells))
    return "\n".join([f"## {title}", "", *lines, ""])


def _published(acceptance: Acceptance) -> str:
    """Return what others have published for a Spark, beside what was measured here."""
    measured = {one.figures.get("model") for one in acceptance.record.parts.values()}
    rows = (
        (*astuple(figure), "above" if figure.model in measured else "not measured")
        for figure in report.published_figures(acceptance.machine.layout)
    )
    names = ("model", "what", "published", "source", "here")
    return _table("Beside published figures", names, rows)


def _costs(acceptance: Acceptance) -> str:
    table = acceptance.trial.folder / costs.own_table().name
    if not table.is_file():
        return "No cost table: nothing was compiled on this machine.\n"
    place = acceptance.machine.layout.relative(costs.own_table())
    return (
        f"The cost table {table.name} is in the archive. Put it at `{place}`: `inv rebuild` takes"
        " it there, on each machine of this kind.\n"
    )
