"""Diagnosis of Triton, one row for each finding, without any change.

The rows: the installed Triton, its assemblers, a compiled kernel, shadows, caches.
The fixes are in triton_fixes.py.
"""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workspace.core import hints, process, records
from workspace.core.console import Row, State, failed
from workspace.core.errors import BuildError, ToolchainError, WorkspaceError
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install.status import is_met, origin, pairing
from workspace.machine import arch, doctor, interpreter, jit_caches, torch
from workspace.machine.doctor import Verdict
from workspace.machine.machine import Case, Machine
from workspace.repo.git import Git

PROBE_S = 300.0
# The line of Triton's output that states the cause begins so.
_CAUSE = re.compile(
    r"^(ptxas fatal|ptxas .*error|LLVM ERROR|.*Error: (?!PTXAS error: Internal)).*$", re.MULTILINE
)


@dataclass(frozen=True)
class Kernel:
    """The result of the probe's kernel.

    `error` is empty where it compiled and, on a GPU, gave the right result; `run` is empty without
    a GPU.
    """

    error: str
    summary: str
    run: str
    shadow: Path | None


@dataclass(frozen=True)
class Diagnosis:
    """All rows, and the facts that the fixes work on."""

    findings: tuple[Row, ...]
    installed: torch.Installed | None
    paired: str | None
    capability: str
    verdicts: tuple[Verdict, ...]
    kernel: Kernel | None
    shadow: Path | None
    foreign: tuple[jit_caches.Foreign, ...]

    @property
    def bad(self) -> tuple[Row, ...]:
        return tuple(failed(self.findings))

    @property
    def can_compile(self) -> bool:
        return not any(finding.name in ("triton", "kernel") for finding in self.bad)


def diagnose(machine: Machine) -> Diagnosis:
    """Observe everything and judge it. Raises BuildError where there is no environment."""
    layout, settings = machine.layout, machine.settings
    if machine.python() is None:
        raise BuildError(
            "there is no environment in .vllm to diagnose",
            hint=hints.text("inv.bootstrap"),
        )
    case = Case(machine)
    installed, build = machine.triton(), machine.torch()
    is_gpu_torch = build is not None and build.cuda is not None
    paired, capability = machine.paired_triton(), doctor.capability_of(case)
    assemblers = (
        doctor.ptxas_of_triton(installed.bin, installed.version, capability)
        if installed and installed.bin
        else ()
    )
    verdicts = tuple(
        doctor.judge_ptxas(assembler, settings, capability, case.ask) for assembler in assemblers
    )
    kernel = try_kernel(layout, settings, capability) if installed else None
    tree, shadow = _tree(layout), shadowing(layout, kernel)
    stack = jit_caches.observe(machine, tree=tree)
    foreign = jit_caches.foreign(machine, stack)
    findings = (
        _installed(layout, installed, build, paired),
        *(_assembler(case, verdict, capability) for verdict in verdicts),
        *((_kernel(kernel, is_gpu_torch=is_gpu_torch),) if kernel else ()),
        _shadow(layout, shadow),
        *_caches(foreign),
    )
    return Diagnosis(findings, installed, paired, capability, verdicts, kernel, shadow, foreign)


def _fault(name: str, text: str, cause: str, fix: str, *, state: State = State.FAIL) -> Row:
    """Return the row of a fault; `fix` is what inv fix-triton does about it."""
    return Row(state, name, text, f"{cause}; fix: {fix}")


def _tree(layout: Layout) -> str:
    """Return the tree OID that caches are keyed by; other screens report a broken repository."""
    try:
        return Git(layout.vllm).tree("HEAD") if (layout.vllm / ".git").exists() else jit_caches.NONE
    except WorkspaceError:
        return jit_caches.NONE


def try_kernel(
    layout: Layout, settings: Settings, capability: str, *, packages: Path | None = None
) -> Kernel:
    """Compile a kernel for this capability with the installed Triton, without any cache, or with
    the one in the folder `packages`.

    On a GPU, also run it and compare the result with torch's. Raises NoAnswer where it takes longer
    than PROBE_S or is killed.
    """
    with tempfile.TemporaryDirectory(prefix="triton-probe-") as folder:
        given = {"PYTHONPATH": str(packages)} if packages else {}
        environment = settings.child_environment("run", {"TRITON_CACHE_DIR": folder, **given})
        argv: list[process.Argument] = [
            layout.environment_python,
            layout.probes / "triton_kernel.py",
            *("--capability", capability),
        ]
        try:
            done = process.capture(argv, env=environment, cwd=Path(folder), timeout_s=PROBE_S)
            process.require_not_killed(done, "the compilation of the test kernel")
            report = records.decode(done.stdout, dict[str, Any])
        except process.NoAnswer:
            # Nothing is known to be wrong with Triton: no fix may follow.
            raise
        except ToolchainError as exc:
            return Kernel(exc.message, "", "", None)
        except records.DecodeError:
            last = (done.stderr.strip().splitlines() or [""])[-1]
            status = process.describe_status(done.returncode)
            return Kernel(f"the compiler {status}: {last}", "", "", None)
    return _judged(report)


def _judged(report: dict[str, Any]) -> Kernel:
    """Return the result that the report of the probe means."""
    shadow = Path(report["triton_kernels"]) if report["triton_kernels"] else None
    if report["error"]:
        found = _CAUSE.search(report["error"])
        cause = found[0] if found else report["error"].splitlines()[0]
        return Kernel(cause.strip(), "", "", shadow)
    summary = (
        f"compiled for {report['ptx_target']}, PTX {report['ptx']}, {report['cubin_bytes']} bytes"
    )
    run = report["ran"]
    if not run:
        return Kernel("", summary, "", shadow)
    gpu, difference = run["gpu"], run["largest_difference"]
    wrong = f"the result on {gpu} is wrong: {difference:g} from torch's"
    return Kernel(
        "" if run["is_right"] else wrong,
        summary,
        f"run on {gpu}, {difference:.1g} from torch's result",
        shadow,
    )


def shadowing(layout: Layout, kernel: Kernel | None) -> Path | None:
    """Return the `triton_kernels` that Python imports instead of vLLM's own, or None.

    The rule is that of vllm/utils/import_utils.py.
    """
    if kernel is not None:
        # Triton's probe runs in an empty folder: vLLM would find the same package.
        return (
            kernel.shadow.parent
            if kernel.shadow and kernel.shadow.name == "__init__.py"
            else kernel.shadow
        )
    places = (folder / "triton_kernels" for folder in interpreter.site_packages(layout))
    return next((place for place in places if place.is_dir()), None)


def _installed(
    layout: Layout,
    installed: torch.Installed | None,
    build: torch.TorchBuild | None,
    paired: str | None,
) -> Row:
    beside = pairing(build, paired)
    fix = "install the wheel that torch pairs with"
    if installed is None:
        if build and build.cuda and paired is not None:
            cause = "torch compiles its kernels with Triton"
            return _fault("triton", f"none; {beside}", cause, fix)
        return Row(State.OK, "triton", f"none; {beside}")
    seen = f"{installed.version} {origin(layout, installed)}; {beside}"
    if installed.package is None:
        return _fault("triton", seen, "its files are missing", fix)
    if paired and not installed.is_meant and not is_met(paired, installed.version):
        cause = "torch requires another version, and this one was not installed on purpose"
        return _fault("triton", seen, cause, fix)
    return Row(State.OK, "triton", seen)


def _assembler(case: Case, verdict: Verdict, capability: str) -> Row:
    assembler, trial = verdict.assembler, verdict.trial
    name, variable = assembler.name, assembler.variable
    target, _ = arch.target_of(capability)
    broken = State.FAIL if assembler.is_used else State.WARN
    if verdict.is_refused:
        seen = f"{variable}={verdict.own} is not an executable program"
        cause = "Triton stops with an error instead of using its own assembler"
        return _fault(name, seen, cause, f"unset {variable}", state=broken)
    if verdict.is_ignored:
        seen = f"{variable}={verdict.own} does not run"
        cause = "Triton ignores it silently and uses its own assembler"
        return _fault(name, seen, cause, f"unset {variable}", state=broken)
    if trial is None:
        seen = f"{case.layout.relative(assembler.bundled)} does not run"
        cause = f"Triton cannot assemble for {target}"
        return _fault(name, seen, cause, "install the wheel again", state=broken)
    place = "its own" if trial.program == assembler.bundled else str(trial.program)
    if trial.complaint and assembler.is_used:
        seen = f"{place}, CUDA {trial.release}, fails on {target}"
        fix = f"set {variable} to another assembler, or install another Triton"
        return _fault(name, seen, trial.complaint, fix)
    use = f"assembles {target}" if assembler.is_used else f"not used for {target}"
    return Row(State.OK, name, f"{place}, CUDA {trial.release}, {use}")


def _kernel(kernel: Kernel, *, is_gpu_torch: bool) -> Row:
    if kernel.error:
        return _fault(
            "kernel",
            "the test kernel fails",
            kernel.error,
            "use an assembler that works, else install the paired wheel",
        )
    run = kernel.run or (
        "not run: there is no GPU" if is_gpu_torch else "not run: torch is for the CPU"
    )
    return Row(State.OK, "kernel", f"{kernel.summary}; {run}")


def _shadow(layout: Layout, shadow: Path | None) -> Row:
    if shadow is None:
        return Row(State.OK, "shadows", "no triton_kernels beside vLLM's own")
    is_own = shadow.is_relative_to(layout.environment)
    fix = (
        "move it out of .vllm"
        if is_own
        else "do it yourself: uv pip uninstall --python .vllm/bin/python triton_kernels"
    )
    return _fault(
        "shadows",
        f"{layout.relative(shadow)}",
        "vLLM imports it instead of its own triton_kernels",
        fix,
    )


def _caches(foreign: tuple[jit_caches.Foreign, ...]) -> tuple[Row, ...]:
    rows = tuple(
        _fault("caches", f"{entry.cache.kind}: {entry.cache.place}", entry.wrote, "rename it")
        for entry in foreign
    )
    return rows or (Row(State.OK, "caches", "the caches hold no kernels of another stack"),)
