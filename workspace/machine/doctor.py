"""The faults of this machine, each with the command that fixes it: `inv doctor`, and the preflight
of verbs that build.

A preflight selects from the one table of checks. Checks only read, and run in parallel.
"""

import contextlib
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.core import hints
from workspace.core.console import Console, Row, State, failed
from workspace.core.errors import ToolchainError, WorkspaceError
from workspace.core.process import There
from workspace.machine import (
    doctor_host,
    doctor_toolchain,
    dotenv,
    run_environment,
    toolchain,
)
from workspace.machine.doctor_toolchain import required_compiler
from workspace.machine.machine import Case, Machine, Place, unanswered

__all__ = ["CHECKS", "examine", "preflight", "required_compiler", "show"]

# The purpose of a check: a bootstrap for a device, compiling kernels. `inv doctor` runs all checks,
# `network` only without --offline.
Purpose = Literal["cpu", "cuda", "native", "network"]
SCHEMA = 1
# The start-up file of a shell, and the line in it that evaluates what `inv completion` prints.
_START_UP = {
    "bash": (".bashrc", 'eval "$({} completion bash)"'),
    "zsh": (".zshrc", 'eval "$({} completion zsh)"'),
    "fish": (".config/fish/config.fish", "{} completion fish | source"),
}


def ccache(case: Case) -> Iterator[Row]:
    """Check that the compiler cache of a build runs, and show the limit of its size."""
    program = toolchain.find_ccache(case.settings)
    why = "a build takes objects of former builds from it"
    if program is None:
        state = State.WARN if case.is_native else State.OK
        why = "without it every build from an empty folder compiles everything again"
        yield Row(state, "ccache", "none", why, hints.text("machine.apt_ccache"))
        return
    version, place = case.first_line([program, "--version"]), case.layout.relative(program)
    if not isinstance(version, There):
        look = hints.text("machine.ccache_config", program=program)
        yield unanswered(Row(State.WARN, "ccache", place, why, look), version, look=look)
        return
    limit = case.first_line([program, "--get-config", "max_size"])
    shown = f", limit {limit.value}" if isinstance(limit, There) else ""
    yield Row(State.OK, "ccache", f"{version.value}, {place}{shown}", why)


def completion(case: Case) -> Iterator[Row]:
    """Check whether a start-up file of the user's shell names `inv completion`.

    The file may name another clone: the completion of one works in all.
    """
    name = Path(case.settings.shell.get("SHELL", "")).name
    if name not in _START_UP:
        return
    file, line = _START_UP[name]
    place = case.home / file
    with contextlib.suppress(OSError):
        if re.search(rf"inv\S* completion {name}\b", place.read_text(errors="replace")):
            yield Row(State.OK, "completion", f"{name} completes inv, by {place}")
            return
    line = line.format(shlex.quote(str(case.layout.root / "scripts" / "inv")))
    hint = hints.text("machine.completion", line=line, path=place)
    yield Row(State.OK, "completion", f"{name} does not complete verbs and values", hint=hint)


@dataclass(frozen=True)
class Check:
    """A check and the purposes for which a preflight runs it."""

    look: Callable[[Case], Iterator[Row]]
    purposes: frozenset[Purpose]


def _check(look: Callable[[Case], Iterator[Row]], *purposes: Purpose) -> Check:
    return Check(look, frozenset(purposes))


CHECKS: tuple[Check, ...] = (
    _check(doctor_host.disk, "cpu", "cuda", "native"),
    _check(doctor_host.folders, "cpu", "cuda", "native"),
    _check(doctor_host.owner),
    _check(doctor_host.rights),
    _check(doctor_host.architecture),
    _check(doctor_host.cores, "native"),
    _check(doctor_host.memory, "native"),
    _check(doctor_host.oom_daemon, "native"),
    _check(doctor_toolchain.git, "cpu", "cuda", "native"),
    _check(doctor_toolchain.git_identity),
    _check(doctor_toolchain.uv, "cpu", "cuda", "native"),
    _check(doctor_toolchain.headers, "cpu", "cuda", "native"),
    _check(doctor_toolchain.compiler, "cuda", "native"),
    _check(doctor_toolchain.cmake, "native"),
    _check(doctor_toolchain.ninja, "native"),
    _check(doctor_toolchain.patch, "native"),
    _check(ccache, "native"),
    _check(doctor_toolchain.driver, "cuda"),
    _check(doctor_toolchain.toolkit, "cuda", "native"),
    _check(doctor_toolchain.agreement, "cuda", "native"),
    _check(doctor_toolchain.archs, "native"),
    _check(dotenv.ptxas),
    _check(run_environment.library_path, "native"),
    _check(run_environment.numa_library, "cpu"),
    _check(doctor_toolchain.running_programs, "native"),
    _check(doctor_host.token),
    _check(doctor_host.settings),
    _check(completion),
    _check(doctor_host.proxy, "network"),
    _check(doctor_host.vllm, "network"),
    _check(doctor_host.index, "network"),
)


def preflight(
    machine: Machine,
    *,
    device: str,
    is_native: bool,
    need_gib: Mapping[Path, float],
    is_environment_due: bool = False,
) -> tuple[Row, ...]:
    """Check what a bootstrap or a rebuild needs, disk first.

    With `is_native` the verb compiles; with `is_environment_due` it installs what `.vllm` lacks.
    `need_gib` maps folders to GiB.
    """
    wanted: set[Purpose] = {"cuda" if device == "cuda" else "cpu"}
    wanted |= {"native"} if is_native else set()
    case = Case(
        machine,
        device=device,
        is_native=is_native,
        places=tuple(Place("", path, need) for path, need in need_gib.items()),
        is_environment_due=is_environment_due,
    )
    return examine(case, [check for check in CHECKS if check.purposes & wanted])


def examine(case: Case, checks: Sequence[Check]) -> tuple[Row, ...]:
    """Run checks in parallel and return their rows in the order of the checks."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(max_workers=max(1, len(checks))) as pool:
        return tuple(
            row for rows in pool.map(lambda check: _rows(check, case), checks) for row in rows
        )


def _rows(check: Check, case: Case) -> tuple[Row, ...]:
    """Run one check; an unreadable file or an unknown output becomes a row, not an exception."""
    name = check.look.__name__.replace("_", " ")
    try:
        return tuple(check.look(case))
    except WorkspaceError as exc:
        return (Row(State.WARN, name, exc.message, "the check did not finish", exc.hint),)
    except (OSError, ValueError) as exc:
        why = "the machine's output is in an unknown form, or unreadable"
        return (Row(State.WARN, name, f"the check did not finish: {exc}", why),)


def show(
    machine: Machine,
    *,
    console: Console,
    as_json: bool = False,
    offline: bool = False,
    is_native: bool = False,
    more: Sequence[Row] = (),
) -> None:
    """Print every row, `more` of the built tree last, or one JSON document.

    With `is_native` the settings request compiled kernels, and a missing build tool is a failure.

    Raises ToolchainError where a row is FAIL.
    """
    case = Case(machine, is_native=is_native)
    checks = [check for check in CHECKS if not (offline and "network" in check.purposes)]
    rows = (*examine(case, checks), *more)
    if as_json:
        judged = [row.state for row in rows if row.state is not State.SKIPPED]
        verdict = max(judged, key=lambda state: state.gravity)
        records = [_record(row) for row in rows]
        console.document({"schema": SCHEMA, "rows": records, "verdict": verdict})
    else:
        console.stdout.rows(rows)
        states = [row.state for row in rows]
        counted = [State.OK, State.WARN, State.FAIL]
        counted += [State.SKIPPED] if State.SKIPPED in states else []
        console.stdout.info(", ".join(f"{states.count(state)} {state}" for state in counted))
    if faults := failed(rows):
        names = ", ".join(dict.fromkeys(row.name for row in faults))
        raise ToolchainError(f"checks of this machine fail: {names}", hint=faults[0].hint)


def _record(row: Row) -> dict[str, object]:
    names = {"state": "state", "name": "name", "seen": "text", "why": "why", "hint": "hint"}
    return {key: getattr(row, name) for key, name in names.items()}
