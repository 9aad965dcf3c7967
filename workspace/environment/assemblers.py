"""Triton's assemblers, tried on a few lines of PTX for the GPU: a version number proves nothing, and a version table is soon wrong.

Which of them Triton takes for a GPU, and what it makes of a variable that names another one, is as triton/knobs.py has it.
"""

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.core import process
from workspace.core.settings import Settings
from workspace.environment.doctor_case import key

# A Spark's, where no GPU tells another.
USUAL_CAPABILITY = "12.1"
# From this capability on Triton takes the second assembler (triton/backends/nvidia/compiler.py, get_ptxas; 90 since 3.9).
BLACKWELL_FROM = {True: (9, 0), False: (10, 0)}
# The PTX version that brought the architecture; an assembler that knows one knows the other.
PTX: dict[tuple[int, ...], str] = {(10, 0): "8.6", (10, 1): "8.6", (11, 0): "9.0", (12, 0): "8.7"}
_PROBE = ".version {ptx}\n.target {target}\n.address_size 64\n.visible .entry probe() {{ ret; }}\n"

# Runs a program that only looks; None where it does not run or gives no answer.
Ask = Callable[[Sequence[process.Argument]], process.Completed | None]


@dataclass(frozen=True)
class Assembler:
    """One of Triton's two: the variable that replaces it, and whether kernels for this GPU go through it."""

    name: str
    variable: str
    bundled: Path
    is_used: bool


@dataclass(frozen=True)
class Trial:
    """An assembler that ran: which, of what CUDA release, and its complaint, empty where it assembled."""

    program: Path
    release: str
    complaint: str


@dataclass(frozen=True)
class Verdict:
    """What Triton really does with one of its assemblers. `own` is what its variable names.

    `is_refused`: Triton stops at it; `is_ignored`: it is passed over in silence. `trial` is of the program that is taken, None where none runs.
    """

    assembler: Assembler
    own: Path | None
    is_refused: bool
    is_ignored: bool
    trial: Trial | None

    @property
    def is_good(self) -> bool:
        return not self.is_refused and self.trial is not None and not self.trial.complaint


def of_triton(folder: Path, version: str, capability: str) -> tuple[Assembler, ...]:
    """Return the assemblers in `folder`, triton/backends/nvidia/bin; the second came with 3.6 and is the one for newer GPUs."""
    is_second = (folder / "ptxas-blackwell").exists() and key(capability)[:2] >= BLACKWELL_FROM[key(version) >= (3, 9)]
    first = Assembler("ptxas", "TRITON_PTXAS_PATH", folder / "ptxas", not is_second)
    second = Assembler("ptxas-bw", "TRITON_PTXAS_BLACKWELL_PATH", folder / "ptxas-blackwell", is_second)
    return (first, second) if second.bundled.exists() else (first,)


def target_of(capability: str) -> tuple[str, str]:
    """Return target and PTX version for a capability (PTX ISA, release notes): Triton writes `sm_121a`, the suffix from 9.0 on."""
    parts = key(capability)[:2]
    ptx = PTX.get(parts, "8.8" if parts >= (10, 0) else "8.0")
    return f"sm_{''.join(str(part) for part in parts)}{'a' if parts >= (9, 0) else ''}", ptx


def judge(one: Assembler, settings: Settings, capability: str, ask: Ask) -> Verdict:
    """Try what Triton would take for a GPU of this capability."""
    own = settings.path(one.variable)
    if own and _is_refused(own):
        return Verdict(one, own, True, False, None)
    trial = attempt(own, capability, ask) if own else None
    return Verdict(one, own, False, own is not None and trial is None, trial or attempt(one.bundled, capability, ask))


def attempt(program: Path, capability: str, ask: Ask) -> Trial | None:
    """Let a program assemble for a GPU of this capability; None where it is no assembler."""
    said = ask([program, "--version"])
    release = re.search(r"release (\d+\.\d+)", said.stdout) if said and said.returncode == 0 else None
    if release is None:
        return None
    target, ptx = target_of(capability)
    with tempfile.TemporaryDirectory(prefix="ptxas-") as folder:
        source, cubin = Path(folder) / "probe.ptx", Path(folder) / "probe.cubin"
        source.write_text(_PROBE.format(ptx=ptx, target=target), encoding="ascii")
        done = ask([program, f"--gpu-name={target}", "-o", cubin, source])
        if done and done.returncode == 0 and cubin.is_file() and cubin.read_bytes()[:4] == b"\x7fELF":
            return Trial(program, release[1], "")
    lines = (done.stderr + done.stdout).strip().splitlines() if done else []
    return Trial(program, release[1], re.sub(r"^ptxas fatal *: *", "", lines[0]) if lines else "no cubin came out")


def _is_refused(program: Path) -> bool:
    """Whether the kernel will not start what is there: triton/knobs.py, NvidiaTool.from_path, catches a missing file and a failing program only."""
    if not program.exists():
        return False
    if program.is_dir() or not os.access(program, os.X_OK):
        return True
    with program.open("rb") as file:
        return not file.read(4).startswith((b"\x7fELF", b"#!"))
