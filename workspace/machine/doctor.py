"""The faults of this machine, each with the command that fixes it: `inv doctor`, and the preflight
of verbs that build; and Triton's assemblers, tried on a kernel.

A preflight selects from the one table of checks. Checks only read, and run in parallel.
"""

import contextlib
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.core import hints, process
from workspace.core.console import Console, Row, State, failed
from workspace.core.errors import ToolchainError, WorkspaceError
from workspace.core.process import Answer, There
from workspace.core.settings import Settings
from workspace.machine import (
    doctor_host,
    doctor_toolchain,
    run_environment,
    toolchain,
)
from workspace.machine.arch import (
    USUAL_CAPABILITY,
    key,
    known_capabilities,
    target_of,
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


_PROBE = ".version {ptx}\n.target {target}\n.address_size 64\n.visible .entry probe() {{ ret; }}\n"
# Run a program that only reads.
Ask = Callable[[Sequence[process.Argument]], Answer[process.Completed]]


@dataclass(frozen=True)
class Assembler:
    """One of Triton's two assemblers.

    `variable` replaces it; `is_used` means that kernels for this GPU go through it.
    """

    name: str
    variable: str
    bundled: Path
    is_used: bool


@dataclass(frozen=True)
class Trial:
    """An assembler that ran, its CUDA release, and its error message, empty on success."""

    program: Path
    release: str
    complaint: str


@dataclass(frozen=True)
class Verdict:
    """The behaviour of Triton with one of its assemblers. `own` is the path in the variable.

    `is_refused`: Triton stops at it; `is_ignored`: Triton skips it without a message. `trial` is of
    the program that Triton uses, None where none runs.
    """

    assembler: Assembler
    own: Path | None
    is_refused: bool
    is_ignored: bool
    trial: Trial | None

    @property
    def is_good(self) -> bool:
        return not self.is_refused and self.trial is not None and not self.trial.complaint


def ptxas_of_triton(folder: Path, version: str, capability: str) -> tuple[Assembler, ...]:
    """Return the assemblers in `folder`, triton/backends/nvidia/bin.

    The second assembler came with Triton 3.6 and is for newer GPUs: from capability 10.0 on, since
    Triton 3.9 from 9.0 on (triton/backends/nvidia/compiler.py, get_ptxas).
    """
    second = folder / "ptxas-blackwell"
    newer_from = (9, 0) if key(version) >= (3, 9) else (10, 0)
    is_second = second.exists() and key(capability)[:2] >= newer_from
    first = Assembler("ptxas", "TRITON_PTXAS_PATH", folder / "ptxas", not is_second)
    if not second.exists():
        return (first,)
    return (first, Assembler("ptxas-bw", "TRITON_PTXAS_BLACKWELL_PATH", second, is_second))


def judge_ptxas(assembler: Assembler, settings: Settings, capability: str, ask: Ask) -> Verdict:
    """Try the assembler that Triton uses for a GPU of this capability."""
    own = settings.path(assembler.variable)
    if own and _is_refused(own):
        return Verdict(assembler, own, is_refused=True, is_ignored=False, trial=None)
    trial = try_ptxas(own, capability, ask) if own else None
    return Verdict(
        assembler,
        own,
        is_refused=False,
        is_ignored=own is not None and trial is None,
        trial=trial or try_ptxas(assembler.bundled, capability, ask),
    )


def try_ptxas(program: Path, capability: str, ask: Ask) -> Trial | None:
    """Assemble a kernel for a GPU of this capability; None where the program is no assembler.

    Raises NoAnswer where it is slow or was killed: no other assembler takes its place then.
    """
    output = process.certain(process.output_of(ask([program, "--version"])), program)
    release = re.search(r"release (\d+\.\d+)", output or "")
    if release is None:
        return None
    target, ptx = target_of(capability)
    with tempfile.TemporaryDirectory(prefix="ptxas-") as folder:
        source, cubin = Path(folder) / "probe.ptx", Path(folder) / "probe.cubin"
        source.write_text(_PROBE.format(ptx=ptx, target=target), encoding="ascii")
        answer = ask([program, f"--gpu-name={target}", "-o", cubin, source])
        is_assembled = process.certain(process.output_of(answer), program) is not None
        if is_assembled and cubin.is_file() and cubin.read_bytes()[:4] == b"\x7fELF":
            return Trial(program, release[1], "")
    done = answer.value if isinstance(answer, There) else None
    lines = (done.stderr + done.stdout).strip().splitlines() if done else []
    complaint = re.sub(r"^ptxas fatal *: *", "", lines[0]) if lines else "it wrote no cubin"
    return Trial(program, release[1], complaint)


def _is_refused(program: Path) -> bool:
    """Return whether the kernel refuses to start a program.

    triton/knobs.py, NvidiaTool.from_path, catches a missing file and a failing program only.
    """
    if not program.exists():
        return False
    if program.is_dir() or not os.access(program, os.X_OK):
        return True
    with program.open("rb") as file:
        return not file.read(4).startswith((b"\x7fELF", b"#!"))


def ptxas(case: Case) -> Iterator[Row]:
    """Check Triton's assemblers on a kernel for this machine's GPU, else for a Spark's."""
    why = "Triton assembles its kernels with it"
    if case.device == "cpu":
        yield Row(State.SKIPPED, "ptxas", "not needed: the device is cpu", why)
        return
    there = case.triton()
    if there is None:
        yield Row(State.OK, "ptxas", "no Triton in .vllm yet", why)
    elif there.bin is None:
        seen = f"Triton {there.version} without triton/backends/nvidia/bin"
        hint = hints.text("install.fix_triton")
        yield Row(State.FAIL, "ptxas", seen, "Triton cannot assemble a kernel", hint)
    else:
        capability = capability_of(case)
        for assembler in ptxas_of_triton(there.bin, there.version, capability):
            verdict = judge_ptxas(assembler, case.settings, capability, case.ask)
            yield _ptxas_row(case, verdict, there.version, capability)


def capability_of(case: Case) -> str:
    """Return the capability of the first GPU, or a Spark's where no GPU reports its own."""
    found = known_capabilities(case.machine.capabilities)
    return found[0] if found else USUAL_CAPABILITY


def _ptxas_row(case: Case, verdict: Verdict, version: str, capability: str) -> Row:
    assembler, own, trial = verdict.assembler, verdict.own, verdict.trial
    if verdict.is_refused:
        seen = f"{assembler.variable}={own} cannot be executed"
        why = "Triton stops there with a PermissionError"
        return Row(State.FAIL, assembler.name, seen, why, _unset(case, assembler))
    ignored = f"{assembler.variable}={own} does not run, and Triton skips it; "
    ignored = ignored if verdict.is_ignored else ""
    target, _ = target_of(capability)
    why = f"Triton {version} assembles kernels for {target} with it"
    if trial is None:
        seen = f"{ignored}{case.layout.relative(assembler.bundled)} does not run"
        if assembler.is_used:
            return Row(
                State.FAIL, assembler.name, seen, why, _ptxas_hint(case, assembler, capability)
            )
        return Row(
            State.WARN,
            assembler.name,
            seen,
            why,
            hints.text("machine.pip_triton", uv=case.uv, version=version),
        )
    place = "Triton's own" if trial.program == assembler.bundled else str(trial.program)
    result = "fails on" if trial.complaint else "assembles"
    seen = f"{ignored}{place}, CUDA {trial.release}, {result} {target}"
    if trial.complaint and assembler.is_used:
        hint = _ptxas_hint(case, assembler, capability)
        return Row(State.FAIL, assembler.name, f"{seen}: {trial.complaint}", why, hint)
    if not assembler.is_used:
        seen += "; Triton uses the other assembler for this GPU"
        why = "Triton assembles kernels for older GPUs with it"
    if ignored:
        return Row(State.WARN, assembler.name, seen, why, _unset(case, assembler))
    return Row(State.OK, assembler.name, seen, why)


def _ptxas_hint(case: Case, assembler: Assembler, capability: str) -> str:
    """Return the command for Triton's own assembler, or for the toolkit's where that works."""
    if case.settings.path(assembler.variable):
        return _unset(case, assembler)
    if program := toolkits_ptxas(case, capability):
        return hints.text("machine.set_ptxas", variable=assembler.variable, path=program)
    return hints.text("machine.apt_ptxas", variable=assembler.variable)


def toolkits_ptxas(case: Case, capability: str) -> Path | None:
    """Return the toolkit's ptxas where it assembles for a GPU of this capability."""
    found = case.toolkit()
    trial = try_ptxas(found.home / "bin" / "ptxas", capability, case.ask) if found else None
    return trial.program if trial and not trial.complaint else None


def _unset(case: Case, assembler: Assembler) -> str:
    return (
        hints.text("machine.unset", name=assembler.variable)
        if case.settings.source(assembler.variable) == "shell"
        else hints.text("machine.drop_from_dotenv", name=assembler.variable)
    )


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
    _check(ptxas),
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
