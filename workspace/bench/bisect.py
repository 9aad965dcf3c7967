"""The flow of a bisect: it begins or goes on, tries commit after commit in an arm, and ends with
the one that is to blame, or with who may be.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from workspace.bench import bisect_log, bisect_predicate, compare
from workspace.bench.bisect_log import (
    ABORT,
    BisectLog,
    BisectOptions,
    Field,
    Ground,
    Role,
    Standing,
    Try,
    Verdict,
)
from workspace.bench.bisect_predicate import Bounds, Predicate, Said
from workspace.core import lock
from workspace.core.console import Console, State
from workspace.core.errors import BuildError, SettingsError, WorkspaceError
from workspace.core.files import write_atomic
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import plan, sandbox
from workspace.install import sandbox as sandboxes
from workspace.repo.git import Git, history
from workspace.repo.pins import Pin

ARM = "bisect"
VERB = "nox -s bisect"
# So many running that cannot be tried, and somebody should look.
MOST_SKIPS = 12
SHOWN = 8
_STATES: Mapping[Verdict, State] = {"good": "ok", "bad": "FAIL", "skip": "warn"}

Attempt = Callable[[str, Role, BisectLog], Said]


def run(
    layout: Layout,
    settings: Settings,
    options: BisectOptions,
    *,
    folder: Path,
    json_file: Path | None,
    console: Console,
) -> None:
    """Search to the end, or as far as it gets; the same call goes on. `folder` is where relative
    paths of a command are counted from.

    Raises SettingsError for misuse, for an end that is not what it has to be, and while another
    bisect is under way; WorkspaceError where it stays inconclusive.
    """
    asking, factor = (
        bisect_predicate.parse(options.run, folder=folder),
        compare.parsed_factor(options.factor),
    )
    with (
        lock.hold(layout.lock, verb=VERB) as held,
        RunLog(
            console, layout.logs / ARM, verb=ARM, secrets=settings.secrets, held=held
        ) as run_log,
    ):
        observed = plan.observe(layout, settings)
        ground = bisect_log.bisect_context(layout, observed)
        there = begin(layout, ground, options, console=console)
        searched = bisect_log.open_range(
            layout, ground, there.good, there.bad, is_patches=options.is_patches
        )
        wanted = sandbox.as_built(settings, observed)
        trial = _Trial(
            layout,
            wanted,
            observed.pin,
            ground.base,
            searched,
            asking,
            Bounds(options.timeout_s, factor),
            run_log,
        )
        with _kept(layout, console):
            there, standing = search_on(
                searched,
                there,
                attempt=trial.attempt,
                keep=lambda one: bisect_log.write_log(layout, one),
                console=console,
            )
        document = described(layout, searched, there, standing)
        if json_file:
            write_atomic(
                json_file, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()
            )
        try:
            conclude(searched, there, standing, document, console=console)
        finally:
            if standing.contradiction is None:
                _clear(layout, console)


def abort(layout: Layout, *, console: Console) -> None:
    """Give up the bisect that is under way, whatever state it is in."""
    with lock.hold(layout.lock, verb=VERB):
        is_there = bisect_log.log_path(layout).exists() or (layout.sandboxes / ARM).exists()
        _clear(layout, console)
        console.info("the bisect is given up" if is_there else "no bisect is under way")


def begin(layout: Layout, ground: Ground, options: BisectOptions, *, console: Console) -> BisectLog:
    """Return the course to go on with: the one that is there where it is of the same command, else
    a fresh one. Raises SettingsError as `run` does.
    """
    former, digest = (
        bisect_log.read_log(layout),
        bisect_log.context_digest(ground.base, ground.patches),
    )
    if former and former.options == options:
        if former.ground != digest:
            raise SettingsError(
                "the pin or its patches are no longer those that this bisect began with",
                hint=f"bring them back, or {ABORT}",
            )
        console.info(f"going on: {_tries(former)}")
        return former
    if former and not is_over(layout, ground, former):
        raise SettingsError(
            f"another bisect is under way, {_tries(former)}: {former.options.command}; asked for is"
            f" {options.command}",
            hint=f"the former command goes on with it; {ABORT}    gives it up",
        )
    good, bad = bisect_log.range_ends(layout, ground, options)
    fresh = BisectLog(options, good, bad, digest)
    fresh = fresh.inheriting(former) if former else fresh
    bisect_log.write_log(layout, fresh)
    return fresh


def is_over(layout: Layout, ground: Ground, former: BisectLog) -> bool:
    """Whether a course came to an end that is not what it has to be: what it found out is of use to
    the next one.
    """
    with contextlib.suppress(WorkspaceError, ValueError):
        searched = bisect_log.open_range(
            layout, ground, former.good, former.bad, is_patches=former.options.is_patches
        )
        return bisect_log.search_state(searched.suspects, former.verdicts).contradiction is not None
    return False


def search_on(
    searched: Field,
    there: BisectLog,
    *,
    attempt: Attempt,
    keep: Callable[[BisectLog], None],
    console: Console,
) -> tuple[BisectLog, Standing]:
    """Try until nothing is left to try; each try is kept before the next one. Raises WorkspaceError
    where an end, or a dozen running, cannot be tried.
    """
    skips = 0
    while (standing := bisect_log.search_state(searched.suspects, there.verdicts)).following:
        commit, role = standing.following, standing.role
        console.info(_progress(searched, there, standing))
        started = time.monotonic()
        said = attempt(commit, role, there)
        if said.verdict == "skip" and role in ("good", "bad"):
            hint = (
                "--patches is of the pin itself: mend that first"
                if there.options.is_patches
                else f"--{role} another one; {ABORT}    first"
            )
            raise WorkspaceError(
                f"the {role} end, {searched.called(commit)}, cannot be tried: {said.evidence}",
                hint=hint,
            )
        there = there.after(
            Try(
                commit,
                said.verdict,
                said.evidence,
                round(time.monotonic() - started, 1),
                said.values,
            )
        )
        keep(there)
        skips = skips + 1 if said.verdict == "skip" else 0
        if skips == MOST_SKIPS:
            raise WorkspaceError(
                f"inconclusive so far: {skips} running could not be tried, the last because"
                f" {said.evidence}",
                hint=f"the same command tries {skips} more; {ABORT}    gives it up",
                details=tuple(
                    searched.called(one)
                    for one in _shown(
                        bisect_log.search_state(searched.suspects, there.verdicts).left
                    )
                ),
            )
    return there, standing


class _Trial:
    """Tries a commit: its tree in an arm, built as far as compiled inputs ask for, and the question
    put to it.
    """

    def __init__(
        self,
        layout: Layout,
        settings: Settings,
        pin: Pin,
        base: str,
        searched: Field,
        asking: Predicate,
        bounds: Bounds,
        run_log: RunLog,
    ) -> None:
        self._layout, self._settings, self._pin, self._base, self._field = (
            layout,
            settings,
            pin,
            base,
            searched,
        )
        self._asking, self._bounds, self._run_log = asking, bounds, run_log

    def attempt(self, commit: str, role: Role, there: BisectLog) -> Said:
        console, git = self._run_log.console, Git(self._layout.vllm)
        self._run_log.phase(self._field.called(commit))
        history.complete_range(git, self._base, commit, self._settings, run_log=self._run_log)
        carried = history.carried(git, commit, self._field.carried)
        if carried.tip is None:
            return self._shown(Said("skip", f"patches/vllm/{carried.failing} does not apply there"))
        if carried.left_out:
            console.info(f"  left out, because it is there: {', '.join(carried.left_out)}")
        arm = sandboxes.make(
            self._layout,
            ARM,
            pin=self._pin,
            patches=None,
            tip=carried.tip,
            settings=self._settings,
            run_log=self._run_log,
        )
        try:
            sandboxes.build_sandbox(arm, self._settings, console=console)
        except BuildError as exc:
            return self._shown(Said("skip", f"it cannot be built: {exc.message}"))
        first = there.of(there.good)
        reference = first.values if first and role != "good" else ()
        with console.step(self._asking.name) as view:
            self._run_log.phase(self._asking.name, view)
            said = bisect_predicate.ask(
                self._asking,
                arm,
                self._settings,
                self._bounds,
                reference=reference,
                run_log=self._run_log,
                view=view,
            )
            view.state, view.reason = _STATES[said.verdict], f"{said.verdict}: {said.evidence}"
        self._run_log.step = None
        return said

    def _shown(self, said: Said) -> Said:
        self._run_log.console.row(_STATES[said.verdict], said.verdict, said.evidence)
        return said


def conclude(
    searched: Field,
    there: BisectLog,
    standing: Standing,
    document: Mapping[str, object],
    *,
    console: Console,
) -> None:
    """Say what came out. Raises SettingsError where an end is not what it has to be, WorkspaceError
    where it is inconclusive.
    """
    if standing.contradiction:
        raise _contradiction(searched, there, standing)
    took = f"{_tries(there)}"
    if standing.culprit is None:
        untried = [
            f"{searched.called(one)}: {found.evidence}"
            for one in standing.left[:-1]
            if (found := there.of(one))
        ]
        raise WorkspaceError(
            f"inconclusive after {took}: it is one of {len(standing.left)}, the last of which is"
            " bad and the others cannot be tried",
            hint=(
                "git -C vendor/vllm log --oneline"
                f" {standing.left[0][:12]}^..{standing.left[-1][:12]}"
            ),
            details=(*untried, searched.called(standing.left[-1])),
        )
    found = there.of(standing.culprit)
    assert found is not None
    console.info(f"the first bad one is {searched.called(standing.culprit)}", style="bold")
    for line in _deed_lines(document):
        console.info(f"  {line}")
    console.info(f"  {found.evidence}")
    console.info(f"{took}; to look at it: git -C vendor/vllm show {standing.culprit[:12]}")
    console.data(searched.names.get(standing.culprit, standing.culprit))


def described(
    layout: Layout, searched: Field, there: BisectLog, standing: Standing
) -> dict[str, object]:
    """The whole of a bisect for a program to read."""
    culprit: dict[str, object] | None = None
    if standing.culprit:
        deed = history.deed(Git(layout.vllm), standing.culprit)
        changes = {path: list(counts) for path, counts in deed.changes.items()}
        culprit = {
            **asdict(deed),
            "changes": changes,
            "patch": searched.names.get(standing.culprit),
        }
    return {
        "schema": bisect_log.SCHEMA,
        "verdict": (
            "found" if culprit else "contradiction" if standing.contradiction else "inconclusive"
        ),
        "asked": asdict(there.options),
        "good": there.good,
        "bad": there.bad,
        "culprit": culprit,
        "suspects": list(standing.left),
        "tries": [asdict(one) for one in there.tries],
        "steps": len(there.tries),
        "minutes": round(there.seconds / 60, 2),
    }


def _deed_lines(document: Mapping[str, object]) -> Iterator[str]:
    culprit = document["culprit"]
    assert isinstance(culprit, dict)
    yield f"{culprit['author']}, {culprit['date']}: {culprit['subject']}"
    changes = culprit["changes"]
    for path, (added, removed) in list(changes.items())[:SHOWN]:
        yield f"{path}  +{added} -{removed}" if added is not None else path
    if len(changes) > SHOWN:
        yield f"and {len(changes) - SHOWN} files more"


def _contradiction(searched: Field, there: BisectLog, standing: Standing) -> SettingsError:
    commit = standing.contradiction
    found = there.of(commit) if commit else None
    assert found is not None
    called = searched.called(found.commit)
    if standing.role == "good":
        hint = (
            "an older --good"
            if not there.options.is_patches
            else "./scripts/nox -s bisect -- --run …    searches upstream's commits"
        )
        return SettingsError(
            f"the good end, {called}, is bad: {found.evidence}",
            hint=f"{hint}; {ABORT}    takes the arm away",
        )
    if standing.role == "fork":
        sentence = (
            f"{called}, where {searched.called(there.good)} and the bad end parted, is bad:"
            f" {found.evidence}; the good end has what mends it"
        )
        return SettingsError(
            sentence,
            hint=(
                f"git -C vendor/vllm log --oneline {found.commit[:12]}..{there.good[:12]}    is"
                f" where to look; {ABORT}"
            ),
        )
    return SettingsError(
        f"the bad end, {called}, is good: {found.evidence}",
        hint=f"a --bad, or a --run, that shows the fault; {ABORT}    takes the arm away",
    )


def _progress(searched: Field, there: BisectLog, standing: Standing) -> str:
    called, minutes = (
        searched.called(standing.following or ""),
        f"{there.seconds / 60:.1f} min so far",
    )
    if standing.role != "suspect":
        what = {"good": "the good end", "bad": "the bad end", "fork": "where good and bad parted"}[
            standing.role
        ]
        return f"{what}: {called}; {len(standing.left)} suspects, {minutes}"
    return f"{len(standing.left)} suspects left, about {standing.steps} steps, {minutes}: {called}"


def _tries(there: BisectLog) -> str:
    return (
        f"{len(there.tries)} {'step' if len(there.tries) == 1 else 'steps'},"
        f" {there.seconds / 60:.1f} min"
    )


def _shown(commits: tuple[str, ...]) -> tuple[str, ...]:
    return commits if len(commits) <= SHOWN else (*commits[: SHOWN - 1], commits[-1])


@contextlib.contextmanager
def _kept(layout: Layout, console: Console) -> Iterator[None]:
    """Say, however the search is ended, what there is to go on from."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(WorkspaceError, OSError):
            if there := bisect_log.read_log(layout):
                console.info(f"{_tries(there)} are kept; the same command goes on from there")
        raise


def _clear(layout: Layout, console: Console) -> None:
    """Take the arm away, then the course, so that a run that is killed here is finished by the next
    one.
    """
    root = layout.sandboxes / ARM
    there = sandboxes.find(layout, ARM) or (
        sandboxes.Sandbox(ARM, layout, Layout(root), "0" * 40) if root.exists() else None
    )
    if there and (kept := sandboxes.remove(there)):
        console.info(f"what was done in {there.shown} is kept in vendor/vllm as {kept}")
    bisect_log.log_path(layout).unlink(missing_ok=True)
