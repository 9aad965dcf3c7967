"""The first .env: what this machine suggests, every other setting left to its default. And single
lines of it, changed before the user's eyes.

The whole is written only where there is none. Of a user's file no line is lost: one that is changed
stays as a remark.
"""

import difflib
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.core import process
from workspace.core import settings as settings_module
from workspace.core.console import Console
from workspace.core.errors import ToolchainError
from workspace.core.files import read_regular, write_atomic
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine import hardware, toolchain, torch
from workspace.machine.case import Case, Row, State, key

KV_CACHE_SHARE = 1 / 6
# The architecture of a GB10 must carry its suffix: its own instructions are not in plain 12.1.
_ARCH_WITH_SUFFIX = {"12.1": "12.1a"}
_PLAIN = re.compile(r"[\w/.,:;+@%=-]*")


def write(layout: Layout, settings: Settings, *, device: str) -> str:
    """Write `.env`, readable by its owner only, and return what was put into it as `NAME=value`
    pairs.
    """
    lines = suggest(
        hardware.observe(settings),
        toolchain.find_toolkit(settings),
        device=device,
        archs=settings.text("TORCH_CUDA_ARCH_LIST"),
    )
    head = (
        "# Settings of this clone; .env.example explains every one. A variable in the shell goes"
        " before a line here.\n"
    )
    write_atomic(
        layout.dotenv,
        (head + "".join(f"{name}={text}\n" for name, text in lines.items())).encode(),
        mode=0o600,
    )
    return ", ".join(f"{name}={text}" for name, text in lines.items()) or "no line is needed here"


def suggest(
    host: hardware.Machine, toolkit: toolchain.Toolkit | None, *, device: str, archs: str = ""
) -> dict[str, str]:
    """Decide the lines from what the machine has; `archs` is what this run was told to build for,
    where no GPU says it.
    """
    lines: dict[str, str] = {}
    if device == "cuda":
        if toolkit:
            lines["CUDA_HOME"] = str(toolkit.home)
        capabilities = sorted({gpu.capability for gpu in host.gpus if gpu.capability})
        if capabilities:
            lines["TORCH_CUDA_ARCH_LIST"] = ";".join(
                _ARCH_WITH_SUFFIX.get(capability, capability) for capability in capabilities
            )
        elif archs:
            lines["TORCH_CUDA_ARCH_LIST"] = archs
    if device == "cpu":
        lines["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, int(host.memory_gib * KV_CACHE_SHARE)))
    return lines


def changed(text: str, changes: Mapping[str, str | None], *, why: str) -> str:
    """Return the text of a .env with other values; None takes a name out. A line that no longer
    counts becomes a remark, with `why` above it.
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
    """Write `changed` and return the difference, line by line as diff(1) shows it. Raises OSError
    where .env cannot be written.
    """
    try:
        before, mode = read_regular(layout.dotenv).decode(), layout.dotenv.stat().st_mode & 0o777
    except FileNotFoundError:
        before, mode = "", 0o600
    after = changed(before, changes, why=why)
    # Through a link: the file that it leads to is the user's.
    write_atomic(layout.dotenv.resolve(), after.encode(), mode=mode)
    return tuple(
        difflib.unified_diff(
            before.splitlines(), after.splitlines(), ".env", ".env", n=0, lineterm=""
        )
    )


# A Spark's, where no GPU tells another.
USUAL_CAPABILITY = "12.1"
# From this capability on Triton takes the second assembler (triton/backends/nvidia/compiler.py,
# get_ptxas; 90 since 3.9).
BLACKWELL_FROM = {True: (9, 0), False: (10, 0)}
# The PTX version that brought the architecture; an assembler that knows one knows the other.
PTX: dict[tuple[int, ...], str] = {(10, 0): "8.6", (10, 1): "8.6", (11, 0): "9.0", (12, 0): "8.7"}
_PROBE = ".version {ptx}\n.target {target}\n.address_size 64\n.visible .entry probe() {{ ret; }}\n"

# Runs a program that only looks; None where it does not run or gives no answer.
Ask = Callable[[Sequence[process.Argument]], process.Completed | None]


@dataclass(frozen=True)
class Assembler:
    """One of Triton's two: the variable that replaces it, and whether kernels for this GPU go
    through it.
    """

    name: str
    variable: str
    bundled: Path
    is_used: bool


@dataclass(frozen=True)
class Trial:
    """An assembler that ran: which, of what CUDA release, and its complaint, empty where it
    assembled.
    """

    program: Path
    release: str
    complaint: str


@dataclass(frozen=True)
class Verdict:
    """What Triton really does with one of its assemblers. `own` is what its variable names.

    `is_refused`: Triton stops at it; `is_ignored`: it is passed over in silence. `trial` is of the
    program that is taken, None where none runs.
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
    """Return the assemblers in `folder`, triton/backends/nvidia/bin; the second came with 3.6 and
    is the one for newer GPUs.
    """
    is_second = (folder / "ptxas-blackwell").exists() and key(capability)[:2] >= BLACKWELL_FROM[
        key(version) >= (3, 9)
    ]
    first = Assembler("ptxas", "TRITON_PTXAS_PATH", folder / "ptxas", not is_second)
    second = Assembler(
        "ptxas-bw", "TRITON_PTXAS_BLACKWELL_PATH", folder / "ptxas-blackwell", is_second
    )
    return (first, second) if second.bundled.exists() else (first,)


def target_of(capability: str) -> tuple[str, str]:
    """Return target and PTX version for a capability (PTX ISA, release notes): Triton writes
    `sm_121a`, the suffix from 9.0 on.
    """
    parts = key(capability)[:2]
    ptx = PTX.get(parts, "8.8" if parts >= (10, 0) else "8.0")
    return f"sm_{''.join(str(part) for part in parts)}{'a' if parts >= (9, 0) else ''}", ptx


def judge_ptxas(one: Assembler, settings: Settings, capability: str, ask: Ask) -> Verdict:
    """Try what Triton would take for a GPU of this capability."""
    own = settings.path(one.variable)
    if own and _is_refused(own):
        return Verdict(one, own, True, False, None)
    trial = try_ptxas(own, capability, ask) if own else None
    return Verdict(
        one,
        own,
        False,
        own is not None and trial is None,
        trial or try_ptxas(one.bundled, capability, ask),
    )


def try_ptxas(program: Path, capability: str, ask: Ask) -> Trial | None:
    """Let a program assemble for a GPU of this capability; None where it is no assembler."""
    said = ask([program, "--version"])
    release = (
        re.search(r"release (\d+\.\d+)", said.stdout) if said and said.returncode == 0 else None
    )
    if release is None:
        return None
    target, ptx = target_of(capability)
    with tempfile.TemporaryDirectory(prefix="ptxas-") as folder:
        source, cubin = Path(folder) / "probe.ptx", Path(folder) / "probe.cubin"
        source.write_text(_PROBE.format(ptx=ptx, target=target), encoding="ascii")
        done = ask([program, f"--gpu-name={target}", "-o", cubin, source])
        if (
            done
            and done.returncode == 0
            and cubin.is_file()
            and cubin.read_bytes()[:4] == b"\x7fELF"
        ):
            return Trial(program, release[1], "")
    lines = (done.stderr + done.stdout).strip().splitlines() if done else []
    return Trial(
        program,
        release[1],
        re.sub(r"^ptxas fatal *: *", "", lines[0]) if lines else "no cubin came out",
    )


def _is_refused(program: Path) -> bool:
    """Whether the kernel will not start what is there: triton/knobs.py, NvidiaTool.from_path,
    catches a missing file and a failing program only.
    """
    if not program.exists():
        return False
    if program.is_dir() or not os.access(program, os.X_OK):
        return True
    with program.open("rb") as file:
        return not file.read(4).startswith((b"\x7fELF", b"#!"))


def ptxas(case: Case) -> Iterator[Row]:
    """Check both of Triton's assemblers by assembling for the GPU of this machine, or a Spark's
    where there is none.
    """
    there = torch.observe_triton(case.layout)
    if case.device == "cpu":
        yield Row(
            "ok",
            "ptxas",
            "not asked for: the device is cpu",
            "Triton assembles its kernels with it",
        )
    elif there is None:
        yield Row("ok", "ptxas", "no Triton in .vllm yet", "Triton assembles its kernels with it")
    elif there.bin is None:
        yield Row(
            "FAIL",
            "ptxas",
            f"Triton {there.version} without triton/backends/nvidia/bin",
            "Triton cannot assemble a kernel",
            "./scripts/inv fix-triton",
        )
    else:
        capability = capability_of(case)
        for one in ptxas_of_triton(there.bin, there.version, capability):
            yield _row(
                case,
                judge_ptxas(one, case.settings, capability, case.ask),
                there.version,
                capability,
            )


def capability_of(case: Case) -> str:
    """The capability that kernels are for: the first GPU's, or a Spark's where there is none."""
    return next(
        (gpu.capability for gpu in case.host().gpus if gpu.capability and key(gpu.capability)),
        USUAL_CAPABILITY,
    )


def _row(case: Case, verdict: Verdict, version: str, capability: str) -> Row:
    one, own, trial = verdict.assembler, verdict.own, verdict.trial
    target, _ = target_of(capability)
    why = f"Triton {version} assembles kernels for {target} with it"
    if verdict.is_refused:
        return Row(
            "FAIL",
            one.name,
            f"{one.variable}={own} is no program that may be run",
            "Triton stops there with a PermissionError",
            _unset(case, one),
        )
    ignored = (
        f"{one.variable}={own} does not run and is passed over; " if verdict.is_ignored else ""
    )
    if trial is None:
        state: State = "FAIL" if one.is_used else "warn"
        hint = (
            _hint(case, one, capability)
            if one.is_used
            else (
                f"{case.uv} pip install --python .vllm/bin/python --no-deps --reinstall"
                f" triton=={version}"
            )
        )
        return Row(
            state, one.name, f"{ignored}{case.layout.relative(one.bundled)} does not run", why, hint
        )
    place = "Triton's own" if trial.program == one.bundled else str(trial.program)
    seen = (
        f"{ignored}{place}, CUDA {trial.release}, {'fails on' if trial.complaint else 'assembles'}"
        f" {target}"
    )
    if trial.complaint and one.is_used:
        return Row(
            "FAIL", one.name, f"{seen}: {trial.complaint}", why, _hint(case, one, capability)
        )
    unused = "" if one.is_used else "; another one is used for this GPU"
    return Row(
        "warn" if ignored else "ok",
        one.name,
        seen + unused,
        why if one.is_used else "kernels for older GPUs are assembled with it",
        _unset(case, one) if ignored else None,
    )


def _hint(case: Case, one: Assembler, capability: str) -> str:
    """Triton's own in place of one that was set, else the toolkit's, where that can do better."""
    if case.settings.path(one.variable):
        return _unset(case, one)
    found = case.toolkit()
    trial = try_ptxas(found.home / "bin" / "ptxas", capability, case.ask) if found else None
    if found and trial and not trial.complaint:
        return f"echo {one.variable}={trial.program} >> .env"
    return (
        f"sudo apt install cuda-toolkit-13-0 && echo {one.variable}=/usr/local/cuda-13.0/bin/ptxas"
        " >> .env"
    )


def _unset(case: Case, one: Assembler) -> str:
    return (
        f"unset {one.variable}"
        if case.settings.source(one.variable) == "shell"
        else f"sed -i '/^{one.variable}=/d' .env"
    )


NAME_WIDTH = 28
WHY = "by inv env.init, from what this machine has"


def complete(
    layout: Layout, settings: Settings, *, console: Console, replace: bool = False
) -> None:
    """Write or complete .env and print the difference. `replace` changes lines that differ too; the
    old one stays beside it as a remark.

    Raises ToolchainError where .env cannot be written.
    """
    case = Case(layout, settings, device=None, kernels=settings.text("KERNELS"))
    if not layout.dotenv.exists():
        said = write(layout, settings, device=case.device)
        console.row("done", ".env", f"written for this machine: {said}")
    written = settings_module.written(layout)
    wanted = propose(case)
    new = {name: text for name, text in wanted.items() if name not in written}
    differing = {
        name: text for name, text in wanted.items() if name in written and written[name] != text
    }
    for name, text in wanted.items():
        if name in differing and not replace:
            console.row(
                "kept",
                f"{name:<{NAME_WIDTH}}",
                f"{written[name]}; this machine suggests {text}: ./scripts/inv env.init --replace",
            )
        elif name not in new and name not in differing:
            console.row("ok", f"{name:<{NAME_WIDTH}}", text)
    changes: Mapping[str, str | None] = new | (differing if replace else {})
    if changes:
        try:
            difference = change(layout, changes, why=WHY)
        except OSError as exc:
            raise ToolchainError(
                f".env cannot be written: {exc.strerror}",
                hint=f"ls -ld {layout.dotenv} {layout.root}",
            ) from exc
        for line in difference:
            console.data(settings.masked(line))
    else:
        console.row("skipped", ".env", "nothing to write")


def propose(case: Case) -> dict[str, str]:
    """Decide the lines for this machine: what bootstrap writes, and a ptxas where Triton's own does
    not know the GPU and the toolkit's does.
    """
    lines = suggest(case.host(), case.toolkit(), device=case.device)
    return lines | (_assembler(case) if case.device == "cuda" else {})


def _assembler(case: Case) -> dict[str, str]:
    there, found = torch.observe_triton(case.layout), case.toolkit()
    if there is None or there.bin is None or found is None:
        return {}
    capability, program = capability_of(case), found.home / "bin" / "ptxas"
    one = next(one for one in ptxas_of_triton(there.bin, there.version, capability) if one.is_used)
    if judge_ptxas(one, case.settings, capability, case.ask).is_good:
        return {}
    trial = try_ptxas(program, capability, case.ask)
    return {one.variable: str(program)} if trial and not trial.complaint else {}
