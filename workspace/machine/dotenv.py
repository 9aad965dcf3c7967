"""The first .env, single changes to it, and Triton's two assemblers, whose paths are settings.

`write` creates .env only where none exists. In a user's file every changed line remains as a
comment: no line is lost.
"""

import difflib
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.core import hints, process
from workspace.core import settings as settings_module
from workspace.core.console import Console, Row, State
from workspace.core.errors import ToolchainError
from workspace.core.files import read_regular, write_atomic
from workspace.core.paths import Layout
from workspace.core.process import Answer, There
from workspace.core.settings import Settings
from workspace.machine.arch import (
    USUAL_CAPABILITY,
    key,
    known_capabilities,
    suggest_list,
    target_of,
)
from workspace.machine.machine import Case, Machine

KV_CACHE_SHARE = 1 / 6
_PLAIN = re.compile(r"[\w/.,:;+@%=-]*")


def write(machine: Machine, *, device: str) -> str:
    """Write `.env`, readable by its owner only, and return its lines as `NAME=value` pairs."""
    archs = machine.settings.text("TORCH_CUDA_ARCH_LIST")
    lines = suggest(machine, device=device, archs=archs)
    head = (
        "# Settings of this clone; .env.example explains every one. A variable in the shell goes"
        " before a line here.\n"
    )
    write_atomic(
        machine.layout.dotenv,
        (head + "".join(f"{name}={text}\n" for name, text in lines.items())).encode(),
        mode=0o600,
    )
    return (
        ", ".join(f"{name}={text}" for name, text in lines.items()) or "this machine needs no line"
    )


def suggest(machine: Machine, *, device: str, archs: str = "") -> dict[str, str]:
    """Decide the lines from the machine.

    `archs` is the architecture list of this run; it counts where no GPU reports its capability.
    """
    if device == "cpu":
        share_gib = machine.host().memory_gib * KV_CACHE_SHARE
        return {"VLLM_CPU_KVCACHE_SPACE": str(max(1, int(share_gib)))}
    lines: dict[str, str] = {}
    if device == "cuda":
        if toolkit := machine.toolkit():
            lines["CUDA_HOME"] = str(toolkit.home)
        capabilities = sorted(set(machine.capabilities))
        if wanted := suggest_list(capabilities) or archs:
            lines["TORCH_CUDA_ARCH_LIST"] = wanted
    return lines


def changed(text: str, changes: Mapping[str, str | None], *, why: str) -> str:
    """Return the text of a .env with other values; None removes a name.

    A line that no longer counts becomes a comment, with `why` above it.
    """
    lines = [f"{line}\n" for line in text.splitlines()]
    for name, value in changes.items():
        own = re.compile(rf"\s*(export\s+)?{re.escape(name)}\s*=")
        after: list[str] = []
        at = 0
        for line in lines:
            is_own = own.match(line) is not None
            after += [f"# {why}\n"] if is_own and not at else []
            after.append(f"# {line}" if is_own else line)
            at = len(after) if is_own else at
        if value is not None:
            after += [] if at else [f"# {why}\n"]
            after.insert(
                at or len(after),
                f"{name}={value if _PLAIN.fullmatch(value) else shlex.quote(value)}\n",
            )
        lines = after
    return "".join(lines)


def change(layout: Layout, changes: Mapping[str, str | None], *, why: str) -> tuple[str, ...]:
    """Write the text that `changed` returns, and return the difference as lines of diff(1).

    Raises OSError where .env cannot be written.
    """
    try:
        before, mode = read_regular(layout.dotenv).decode(), layout.dotenv.stat().st_mode & 0o777
    except FileNotFoundError:
        before, mode = "", 0o600
    after = changed(before, changes, why=why)
    # The user's file may be a link: its target is written.
    write_atomic(layout.dotenv.resolve(), after.encode(), mode=mode)
    return tuple(
        difflib.unified_diff(
            before.splitlines(), after.splitlines(), ".env", ".env", n=0, lineterm=""
        )
    )


WHY = "by inv env.init, for this machine"
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
            yield _row(case, verdict, there.version, capability)


def capability_of(case: Case) -> str:
    """Return the capability of the first GPU, or a Spark's where no GPU reports its own."""
    found = known_capabilities(case.machine.capabilities)
    return found[0] if found else USUAL_CAPABILITY


def _row(case: Case, verdict: Verdict, version: str, capability: str) -> Row:
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
            return Row(State.FAIL, assembler.name, seen, why, _hint(case, assembler, capability))
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
        hint = _hint(case, assembler, capability)
        return Row(State.FAIL, assembler.name, f"{seen}: {trial.complaint}", why, hint)
    if not assembler.is_used:
        seen += "; Triton uses the other assembler for this GPU"
        why = "Triton assembles kernels for older GPUs with it"
    if ignored:
        return Row(State.WARN, assembler.name, seen, why, _unset(case, assembler))
    return Row(State.OK, assembler.name, seen, why)


def _hint(case: Case, assembler: Assembler, capability: str) -> str:
    """Return the command for Triton's own assembler, or for the toolkit's where that works."""
    if case.settings.path(assembler.variable):
        return _unset(case, assembler)
    if program := _toolkits_ptxas(case, capability):
        return hints.text("machine.set_ptxas", variable=assembler.variable, path=program)
    return hints.text("machine.apt_ptxas", variable=assembler.variable)


def _toolkits_ptxas(case: Case, capability: str) -> Path | None:
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


def complete(machine: Machine, *, console: Console, replace: bool = False) -> None:
    """Write or complete .env and print the difference.

    `replace` also changes lines with other values; each old line remains as a comment beside the
    new line. Raises ToolchainError where .env cannot be written.
    """
    case, layout, settings = Case(machine), machine.layout, machine.settings
    if not layout.dotenv.exists():
        lines = write(machine, device=case.device)
        console.row(State.DONE, ".env", f"written for this machine: {lines}")
    written, wanted = settings_module.written(layout), propose(case)
    rows: list[Row] = []
    changes: dict[str, str | None] = {
        name: text for name, text in wanted.items() if name not in written
    }
    for name, text in wanted.items():
        present = written.get(name)
        if present == text:
            rows.append(Row(State.OK, name, text))
        elif present is not None and replace:
            changes[name] = text
        elif present is not None:
            seen = f"{present}; this machine suggests {text}"
            hint = hints.text("machine.replace_dotenv")
            rows.append(Row(State.KEPT, name, seen, hint=hint))
    console.rows(rows)
    if not changes:
        console.row(State.SKIPPED, ".env", "nothing to write")
        return
    try:
        difference = change(layout, changes, why=WHY)
    except OSError as exc:
        raise ToolchainError(
            f".env cannot be written: {exc.strerror}",
            hint=hints.text("core.list_folders", folders=[layout.dotenv, layout.root]),
        ) from exc
    for line in difference:
        console.data(settings.masked(line))


def propose(case: Case) -> dict[str, str]:
    """Decide the lines for this machine: those of bootstrap, and a ptxas.

    A ptxas is proposed where Triton's own fails for the GPU and the toolkit's works.
    """
    lines = suggest(case.machine, device=case.device)
    return lines | (_assembler(case) if case.device == "cuda" else {})


def _assembler(case: Case) -> dict[str, str]:
    there = case.triton()
    if there is None or there.bin is None or case.toolkit() is None:
        return {}
    capability = capability_of(case)
    assemblers = ptxas_of_triton(there.bin, there.version, capability)
    used = next(assembler for assembler in assemblers if assembler.is_used)
    if judge_ptxas(used, case.settings, capability, case.ask).is_good:
        return {}
    program = _toolkits_ptxas(case, capability)
    return {used.variable: str(program)} if program else {}
