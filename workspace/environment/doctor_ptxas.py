"""The doctor's check of Triton's assemblers: each is given a few lines of PTX for the GPU, since a version number proves nothing."""

import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from workspace.environment import interpreter
from workspace.environment.doctor_case import Case, Row, State, key

# A Spark's, where no GPU tells another.
USUAL_CAPABILITY = "12.1"
# From this capability on Triton takes the second assembler (triton/backends/nvidia/compiler.py, get_ptxas; 90 since 3.9).
BLACKWELL_FROM = {True: (9, 0), False: (10, 0)}
# The PTX version that brought the architecture; an assembler that knows one knows the other.
PTX: dict[tuple[int, ...], str] = {(10, 0): "8.6", (10, 1): "8.6", (11, 0): "9.0", (12, 0): "8.7"}
_PROBE = ".version {ptx}\n.target {target}\n.address_size 64\n.visible .entry probe() {{ ret; }}\n"


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


def ptxas(case: Case) -> Iterator[Row]:
    """Check both of Triton's assemblers by assembling for the GPU of this machine, or a Spark's where there is none."""
    version = case.packages().get("triton")
    if case.device == "cpu":
        yield Row("ok", "ptxas", "not asked for: the device is cpu", "Triton assembles its kernels with it")
    elif version is None:
        yield Row("ok", "ptxas", "no Triton in .vllm yet", "Triton assembles its kernels with it")
    else:
        capability = next((gpu.capability for gpu in case.host().gpus if gpu.capability and key(gpu.capability)), USUAL_CAPABILITY)
        folder = _folder(case)
        if folder is None:
            yield Row("FAIL", "ptxas", f"Triton {version} without triton/backends/nvidia/bin", "Triton cannot assemble a kernel", "./scripts/inv fix-triton")
            return
        for one in assemblers(folder, version, capability):
            yield _row(case, one, version, capability)


def assemblers(folder: Path, version: str, capability: str) -> tuple[Assembler, ...]:
    """Return Triton's assemblers; the second came with 3.6 and is the one for newer GPUs."""
    is_second = (folder / "ptxas-blackwell").exists() and key(capability)[:2] >= BLACKWELL_FROM[key(version) >= (3, 9)]
    first = Assembler("ptxas", "TRITON_PTXAS_PATH", folder / "ptxas", not is_second)
    second = Assembler("ptxas-bw", "TRITON_PTXAS_BLACKWELL_PATH", folder / "ptxas-blackwell", is_second)
    return (first, second) if second.bundled.exists() else (first,)


def target_of(capability: str) -> tuple[str, str]:
    """Return target and PTX version for a capability (PTX ISA, release notes): Triton writes `sm_121a`, the suffix from 9.0 on."""
    number = key(capability)[:2]
    ptx = PTX.get(number, "8.8" if number >= (10, 0) else "8.0")
    return f"sm_{''.join(str(part) for part in number)}{'a' if number >= (9, 0) else ''}", ptx


def _row(case: Case, one: Assembler, version: str, capability: str) -> Row:
    target, ptx = target_of(capability)
    own, why = case.settings.path(one.variable), f"Triton {version} assembles kernels for {target} with it"
    if own and own.exists() and (own.is_dir() or not os.access(own, os.X_OK)):
        # triton/knobs.py, NvidiaTool.from_path, catches FileNotFoundError only.
        return Row("FAIL", one.name, f"{one.variable}={own} is no program that may be run", "Triton stops there with a PermissionError", _unset(case, one))
    trial = _try(case, own, target, ptx) if own else None
    ignored = f"{one.variable}={own} does not run and is passed over; " if own and trial is None else ""
    trial = trial or _try(case, one.bundled, target, ptx)
    if trial is None:
        state: State = "FAIL" if one.is_used else "warn"
        cure = _cure(case, one, target, ptx) if one.is_used else f"{case.uv} pip install --python .vllm/bin/python --no-deps --reinstall triton=={version}"
        return Row(state, one.name, f"{ignored}{case.layout.relative(one.bundled)} does not run", why, cure)
    place = "Triton's own" if trial.program == one.bundled else str(trial.program)
    seen = f"{ignored}{place}, CUDA {trial.release}, {'fails on' if trial.complaint else 'assembles'} {target}"
    if trial.complaint and one.is_used:
        return Row("FAIL", one.name, f"{seen}: {trial.complaint}", why, _cure(case, one, target, ptx))
    unused = "" if one.is_used else "; another one is used for this GPU"
    return Row(
        "warn" if ignored else "ok",
        one.name,
        seen + unused,
        why if one.is_used else "kernels for older GPUs are assembled with it",
        _unset(case, one) if ignored else None,
    )


def _try(case: Case, program: Path, target: str, ptx: str) -> Trial | None:
    """Let a program assemble; None where it is none."""
    said = case.ask([program, "--version"])
    release = re.search(r"release (\d+\.\d+)", said.stdout) if said and said.returncode == 0 else None
    if release is None:
        return None
    with tempfile.TemporaryDirectory(prefix="ptxas-") as folder:
        source, cubin = Path(folder) / "probe.ptx", Path(folder) / "probe.cubin"
        source.write_text(_PROBE.format(ptx=ptx, target=target), encoding="ascii")
        done = case.ask([program, f"--gpu-name={target}", "-o", cubin, source])
        if done and done.returncode == 0 and cubin.is_file() and cubin.read_bytes()[:4] == b"\x7fELF":
            return Trial(program, release[1], "")
    lines = (done.stderr + done.stdout).strip().splitlines() if done else []
    return Trial(program, release[1], re.sub(r"^ptxas fatal *: *", "", lines[0]) if lines else "no cubin came out")


def _cure(case: Case, one: Assembler, target: str, ptx: str) -> str:
    """Triton's own in place of one that was set, else the toolkit's, where that can do better."""
    if case.settings.path(one.variable):
        return _unset(case, one)
    found = case.toolkit()
    trial = _try(case, found.home / "bin" / "ptxas", target, ptx) if found else None
    if found and trial and not trial.complaint:
        return f"echo {one.variable}={trial.program} >> .env"
    return f"sudo apt install cuda-toolkit-13-0 && echo {one.variable}=/usr/local/cuda-13.0/bin/ptxas >> .env"


def _unset(case: Case, one: Assembler) -> str:
    return f"unset {one.variable}" if case.settings.source(one.variable) == "shell" else f"sed -i '/^{one.variable}=/d' .env"


def _folder(case: Case) -> Path | None:
    # The last is that of an editable Triton, built from the clone in vendor/.
    roots = (*interpreter.site_packages(case.layout), case.layout.triton / "python")
    places = (root / "triton" / "backends" / "nvidia" / "bin" for root in roots)
    return next((place for place in places if place.is_dir()), None)
