"""What is wrong with Triton here, a row a thing: which one is installed, its assemblers, a compiled
kernel, shadows and leftovers, caches.

It looks and changes nothing. What mends a finding is remedies.py's.
"""

import json
import re
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.core import process
from workspace.core.errors import BuildError, ToolchainError, WorkspaceError
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import stamp
from workspace.install.status import is_met, origin, pairing
from workspace.machine import dotenv, interpreter, jit_caches, torch, venv
from workspace.machine.case import Case
from workspace.machine.dotenv import Verdict
from workspace.repo.git import Git, repository

State = Literal["ok", "warn", "FAIL"]
PROBE_S = 300.0
# Where generations of vLLM have had their copy of Triton's kernels, below the tree; the last is
# today's.
KERNEL_FOLDERS = ("vllm/triton_kernels", "vllm/third_party/triton_kernels")
# With these words Triton's errors begin the line that matters.
_CAUSE = re.compile(
    r"^(ptxas fatal|ptxas .*error|LLVM ERROR|.*Error: (?!PTXAS error: Internal)).*$", re.MULTILINE
)


@dataclass(frozen=True)
class Finding:
    """One row: what was looked at, what was seen, why it is wrong, and what mends it; the last two
    are empty where all is well.
    """

    state: State
    name: str
    seen: str
    cause: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Kernel:
    """What the probe said. `error` is empty where it compiled, and ran rightly where there is a
    GPU; `run` is empty without one.
    """

    error: str
    summary: str
    run: str
    shadow: Path | None


@dataclass(frozen=True)
class Stale:
    """A folder of Triton's kernels in the tree that no build of this clone has put there, and why
    that is known.
    """

    place: Path
    why: str


@dataclass(frozen=True)
class Diagnosis:
    """All rows, and what the remedies work on."""

    findings: tuple[Finding, ...]
    installed: torch.Installed | None
    paired: str | None
    capability: str
    verdicts: tuple[Verdict, ...]
    kernel: Kernel | None
    shadow: Path | None
    stale: tuple[Stale, ...]
    foreign: tuple[jit_caches.Foreign, ...]

    @property
    def bad(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.state == "FAIL")

    @property
    def can_compile(self) -> bool:
        return not any(finding.name in ("triton", "kernel") for finding in self.bad)


def diagnose(layout: Layout, settings: Settings) -> Diagnosis:
    """Look at everything. Raises BuildError where there is no environment to look at."""
    if interpreter.describe(layout, settings) is None:
        raise BuildError(
            "there is no environment in .vllm whose Triton could be looked at",
            hint="./scripts/inv bootstrap",
        )
    case = Case(layout, settings, device=None, kernels="precompiled")
    there, build = torch.observe_triton(layout), torch.observe(layout, settings)
    is_gpu_torch = build is not None and build.cuda is not None
    paired, capability = torch.paired_triton(layout), dotenv.capability_of(case)
    verdicts = tuple(
        dotenv.judge_ptxas(one, settings, capability, case.ask)
        for one in (
            dotenv.ptxas_of_triton(there.bin, there.version, capability)
            if there and there.bin
            else ()
        )
    )
    kernel = try_kernel(layout, settings, capability) if there else None
    tree = _tree(layout)
    shadow, stale = (
        shadowing(layout, kernel),
        (stale_folders(layout) if tree != jit_caches.NONE else ()),
    )
    capabilities = (
        tuple(gpu.capability for gpu in case.host().gpus if gpu.capability) if is_gpu_torch else ()
    )
    stack = jit_caches.observe(layout, settings, tree=tree, capabilities=capabilities)
    foreign = jit_caches.foreign(layout, settings, stack)
    findings = [_installed(layout, there, build, paired)]
    if venv.is_former_kept(layout):
        findings.append(
            Finding(
                "FAIL",
                "unfinished",
                "a build's installation",
                "it was ended between two Tritons",
                "the former one comes back",
            )
        )
    findings += [_assembler(case, verdict, capability) for verdict in verdicts]
    if kernel:
        findings.append(_kernel(kernel, is_gpu_torch=is_gpu_torch))
    findings += [_shadow(layout, shadow), *_stale(layout, stale), *_caches(foreign)]
    return Diagnosis(
        tuple(findings), there, paired, capability, verdicts, kernel, shadow, stale, foreign
    )


def _tree(layout: Layout) -> str:
    """The tree OID that caches are keyed by; a repository that is broken is what other screens
    complain of.
    """
    try:
        return Git(layout.vllm).tree("HEAD") if (layout.vllm / ".git").exists() else jit_caches.NONE
    except WorkspaceError:
        return jit_caches.NONE


def try_kernel(layout: Layout, settings: Settings, capability: str) -> Kernel:
    """Let the installed Triton compile a kernel for this capability, and run it where there is a
    GPU; no cache answers for it.
    """
    with tempfile.TemporaryDirectory(prefix="triton-probe-") as folder:
        environment = settings.child_environment("run", {"TRITON_CACHE_DIR": folder})
        words: list[process.Argument] = [
            layout.environment_python,
            layout.probes / "triton_kernel.py",
            "--capability",
            capability,
        ]
        try:
            done = process.capture(words, env=environment, cwd=Path(folder), timeout_s=PROBE_S)
            said = json.loads(done.stdout)
        except ToolchainError as exc:
            return Kernel(exc.message, "", "", None)
        except ValueError:
            lines = done.stderr.strip().splitlines() or [""]
            return Kernel(
                f"the compiler {process.describe_status(done.returncode)}: {lines[-1]}",
                "",
                "",
                None,
            )
    shadow = Path(said["triton_kernels"]) if said["triton_kernels"] else None
    if said["error"]:
        found = _CAUSE.search(said["error"])
        return Kernel(
            (found[0] if found else said["error"].splitlines()[0]).strip(), "", "", shadow
        )
    run, wrong = said["ran"], ""
    if run:
        wrong = (
            ""
            if run["is_right"]
            else f"the result on {run['gpu']} is wrong: {run['largest_difference']:g} from torch's"
        )
    text = f"compiled for {said['ptx_target']}, PTX {said['ptx']}, {said['cubin_bytes']} bytes"
    return Kernel(
        wrong,
        text,
        f"run on {run['gpu']}, {run['largest_difference']:.1g} from torch's result" if run else "",
        shadow,
    )


def shadowing(layout: Layout, kernel: Kernel | None) -> Path | None:
    """Return the `triton_kernels` that would be imported instead of vLLM's own, as the interpreter
    finds it (vllm/utils/import_utils.py).
    """
    if kernel is not None:
        # Triton's probe runs in an empty folder: what it finds, a vLLM would find too.
        return (
            kernel.shadow.parent
            if kernel.shadow and kernel.shadow.name == "__init__.py"
            else kernel.shadow
        )
    places = (folder / "triton_kernels" for folder in interpreter.site_packages(layout))
    return next((place for place in places if place.is_dir()), None)


def stale_folders(layout: Layout) -> tuple[Stale, ...]:
    """Return folders of Triton's kernels in the tree that no build has put there as they are; what
    git tracks is the tree's own.
    """
    if not (layout.vllm / ".git").exists():
        return ()
    found = []
    recorded = stamp.read(layout.stamp("vllm"))
    for name in KERNEL_FOLDERS:
        place = layout.vllm / name
        if (
            place.is_dir()
            and any(place.rglob("*.py"))
            and not repository.is_tracked(Git(layout.vllm), name)
        ):
            why = (
                "vLLM has none there any more"
                if name != KERNEL_FOLDERS[-1]
                else _foreign_to_build(layout, name, recorded)
            )
            found += [Stale(place, why)] if why else []
    return tuple(found)


def brought(wheel: Path, name: str) -> dict[str, int]:
    """Return the Python files that a wheel has below a folder, with their CRC-32; nothing for one
    that cannot be read.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            return {
                item.filename: item.CRC
                for item in archive.infolist()
                if item.filename.startswith(f"{name}/") and item.filename.endswith(".py")
            }
    except (OSError, zipfile.BadZipFile):
        return {}


def _foreign_to_build(layout: Layout, name: str, recorded: stamp.Stamp | None) -> str:
    """Why the files below `name` cannot be of the build that the stamp vouches for; empty where
    they are, or where that cannot be told.
    """
    if recorded is None:
        return ""
    wheel = Path(recorded.outcome.get("wheel", ""))
    if recorded.inputs.get("device") == "cpu":
        return "the CPU build has none"
    if recorded.inputs.get("origin") == "native" or not wheel.is_file():
        return ""
    theirs = brought(wheel, name)
    ours = {
        str(path.relative_to(layout.vllm)): zlib.crc32(path.read_bytes())
        for path in (layout.vllm / name).rglob("*.py")
    }
    other = [path for path, crc in ours.items() if theirs.get(path) != crc]
    return f"{len(other)} of {len(ours)} files are not those of {wheel.name}" if other else ""


def _installed(
    layout: Layout,
    there: torch.Installed | None,
    build: torch.TorchBuild | None,
    paired: str | None,
) -> Finding:
    beside = pairing(build, paired)
    if there is None:
        if build and build.cuda and paired is not None:
            return Finding(
                "FAIL",
                "triton",
                f"none; {beside}",
                "torch compiles its kernels with it",
                "the wheel that torch pairs with",
            )
        return Finding("ok", "triton", f"none; {beside}")
    seen = f"{there.version} {origin(layout, there)}; {beside}"
    if there.package is None:
        return Finding(
            "FAIL", "triton", seen, "its files are not there", "the wheel that torch pairs with"
        )
    if paired and not there.is_meant and not is_met(paired, there.version):
        return Finding(
            "FAIL",
            "triton",
            seen,
            "torch asks for another one, and nobody has put this one here on purpose",
            "the wheel that torch pairs with",
        )
    return Finding("ok", "triton", seen)


def _assembler(case: Case, verdict: Verdict, capability: str) -> Finding:
    one, trial = verdict.assembler, verdict.trial
    target, _ = dotenv.target_of(capability)
    broken: State = "FAIL" if one.is_used else "warn"
    if verdict.is_refused:
        seen = f"{one.variable}={verdict.own} is no program that may be run"
        return Finding(
            broken,
            one.name,
            seen,
            "Triton stops there instead of taking its own",
            f"{one.variable} without it",
        )
    if verdict.is_ignored:
        seen = f"{one.variable}={verdict.own} does not run"
        return Finding(
            broken,
            one.name,
            seen,
            "Triton passes over it in silence and takes its own",
            f"{one.variable} without it",
        )
    if trial is None:
        return Finding(
            broken,
            one.name,
            f"{case.layout.relative(one.bundled)} does not run",
            f"Triton cannot assemble for {target}",
            "the wheel again",
        )
    place = "its own" if trial.program == one.bundled else str(trial.program)
    if trial.complaint and one.is_used:
        seen = f"{place}, CUDA {trial.release}, fails on {target}"
        return Finding(
            "FAIL",
            one.name,
            seen,
            trial.complaint,
            f"another assembler by {one.variable}, or another Triton",
        )
    does = f"assembles {target}" if one.is_used else f"not used for {target}"
    return Finding("ok", one.name, f"{place}, CUDA {trial.release}, {does}")


def _kernel(kernel: Kernel, *, is_gpu_torch: bool) -> Finding:
    if kernel.error:
        return Finding(
            "FAIL",
            "kernel",
            "a small kernel does not come out right",
            kernel.error,
            "an assembler that can, else the paired wheel",
        )
    run = kernel.run or (
        "not run: there is no GPU here" if is_gpu_torch else "not run: torch is for the CPU"
    )
    return Finding("ok", "kernel", f"{kernel.summary}; {run}")


def _shadow(layout: Layout, shadow: Path | None) -> Finding:
    if shadow is None:
        return Finding("ok", "shadows", "no triton_kernels beside vLLM's own")
    is_own = shadow.is_relative_to(layout.environment)
    fix = (
        "moved out of .vllm"
        if is_own
        else "only you can: uv pip uninstall --python .vllm/bin/python triton_kernels"
    )
    return Finding(
        "FAIL",
        "shadows",
        f"{layout.relative(shadow)}",
        "vLLM imports it instead of its own triton_kernels",
        fix,
    )


def _stale(layout: Layout, stale: tuple[Stale, ...]) -> tuple[Finding, ...]:
    rows = tuple(
        Finding("FAIL", "leftovers", layout.relative(one.place), one.why, "moved out of the tree")
        for one in stale
    )
    return rows or (
        Finding("ok", "leftovers", "no generated triton_kernels of another build in the tree"),
    )


def _caches(foreign: tuple[jit_caches.Foreign, ...]) -> tuple[Finding, ...]:
    rows = tuple(
        Finding("FAIL", "caches", f"{one.cache.kind}: {one.cache.place}", one.wrote, "moved aside")
        for one in foreign
    )
    return rows or (
        Finding("ok", "caches", "nothing of another stack where kernels are loaded from"),
    )
