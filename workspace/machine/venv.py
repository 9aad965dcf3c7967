"""The steps that fill `.vllm`, in order: the interpreter, torch, the tree's requirements, and the
accelerators' compilers; and the repair of partial packages.

Each step acts and returns a sentence on the result. Whether a step is due is decided elsewhere.
"""

import csv
import platform
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from workspace.core import hints, process, records
from workspace.core.console import RunLog
from workspace.core.errors import BuildError, SourceError
from workspace.core.files import write_atomic
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine import interpreter, requirements, toolchain, torch
from workspace.machine.machine import Machine
from workspace.machine.requirements import COMPANIONS

IMPORT_S = 600.0
_NEEDED = ("METADATA", "RECORD", "INSTALLER")
# uv's names for files that it has not renamed yet.
_UNFINISHED = ".tmp??????"


def repair(
    layout: Layout, settings: Settings, *, run_log: RunLog, names: Iterable[str] = ()
) -> None:
    """Remove the dist-info of partial packages, so that uv installs them again.

    A killed uv leaves such packages. `names` limits it to packages whose names begin so.
    """
    removed = []
    wanted = tuple(f"{name}-" for name in names)
    # This workspace cannot leave a user's own torch partial, and could not install it again.
    kept = ("torch-",) if settings.switch("USE_EXISTING_TORCH") else ()
    for folder in interpreter.site_packages(layout):
        for info in sorted(folder.glob("*.dist-info")):
            is_meant = not info.name.startswith(kept) and (
                not wanted or info.name.startswith(wanted)
            )
            if is_meant and not _is_complete(info):
                shutil.rmtree(info)
                removed.append(info.name.removesuffix(".dist-info"))
    for place in (layout.environment, *interpreter.site_packages(layout)):
        for left in place.glob(_UNFINISHED):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    if removed:
        run_log.write(f"partial, to be installed again: {', '.join(removed)}")


def _is_complete(info: Path) -> bool:
    try:
        with (info / "RECORD").open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
        # A truncated RECORD lacks its own row, or the end of another; one that uv has not yet
        # completed lacks the installer's.
        listed = {row[0] for row in rows}
        if any(len(row) != 3 for row in rows) or any(
            f"{info.name}/{name}" not in listed for name in _NEEDED
        ):
            return False
        return all(
            (info.parent / name).stat().st_size >= int(size) for name, _, size in rows if size
        )
    except (OSError, ValueError, csv.Error):
        return False


@dataclass(frozen=True)
class Provided:
    """The finished environment: a summary, and every package in it with its version."""

    summary: str
    packages: Mapping[str, str]


def make_python(machine: Machine, *, device: str, run_log: RunLog) -> str:
    """Make `.vllm`, or keep it where it works."""
    layout, settings, there = machine.layout, machine.settings, machine.python()
    needs = _needs(
        machine,
        device=device,
        python_version=there.version if there else settings.text("PYTHON_VERSION"),
    )
    if there and there.version in needs.python and interpreter.is_finished(layout):
        return f"Python {there.version} is installed"
    wheels = (
        torch.local_wheel_pythons(needs.torch, settings)
        if device == "cpu" and not settings.switch("USE_EXISTING_TORCH")
        else None
    )
    choice = interpreter.choose(layout, settings, supported=needs.python, wheel_pythons=wheels)
    interpreter.create(layout, settings, choice, run_log=run_log)
    return f"Python {choice.version}" + (f": {choice.reason}" if choice.reason else "")


def install_torch(machine: Machine, *, device: str, run_log: RunLog) -> str:
    """Install the pinned torch, or keep the present one under USE_EXISTING_TORCH=1.

    Raises BuildError where no torch can be kept, or where the installed one is for another device.
    """
    layout, settings = machine.layout, machine.settings
    there = torch.observe(layout, interpreter.installed(layout))
    if settings.switch("USE_EXISTING_TORCH"):
        return _keep_torch(layout, settings, there, device=device)
    needs = _needs(machine, device=device)
    wanted = torch.plan(needs.torch, device=device, settings=settings)
    # A CPU build satisfies `torch==2.13.0` for uv, and would stay when the device becomes cuda.
    is_replaced = there is not None and device == "cuda" and there.cuda is None
    again = ("--reinstall-package", "torch") if is_replaced else ()
    source = _install_from_sources(layout, settings, wanted, again, run_log=run_log)
    build = torch.load(layout, settings)
    if device == "cuda" and (build.cuda or "").split(".")[0] != torch.CUDA_MAJOR:
        raise BuildError(
            f"torch {build.version} is built for CUDA {build.cuda or 'none'}, but vLLM"
            f" needs CUDA {torch.CUDA_MAJOR}",
            hint=hints.text("machine.cuda_index"),
        )
    return f"{build.version}, CUDA {build.cuda or 'none'}; {source}"


def _keep_torch(
    layout: Layout, settings: Settings, there: torch.TorchBuild | None, *, device: str
) -> str:
    if there is None:
        # The plain index may have another device's build alone: for CPUs of aarch64, CUDA's.
        source = torch.plan("torch", device=device, settings=settings)
        raise BuildError(
            "USE_EXISTING_TORCH=1, and .vllm holds no torch",
            hint=hints.text("machine.pip_torch", source=[*source.arguments]),
        )
    build = torch.load(layout, settings)
    return f"{build.version} is kept (USE_EXISTING_TORCH=1)"


def _install_from_sources(
    layout: Layout,
    settings: Settings,
    wanted: torch.Plan,
    again: tuple[str, ...],
    *,
    run_log: RunLog,
) -> str:
    """Install torch from the first source that works, and return that source in words."""
    source, attempts = wanted.description, (wanted.arguments, *wanted.alternatives)
    for index, arguments in enumerate(attempts, 1):
        try:
            # Overrides go before torch's own metadata, which requires the Triton of its release.
            interpreter.install(
                layout,
                settings,
                [*again, *arguments, wanted.requirement],
                run_log=run_log,
                overrides=torch.kept_triton(layout),
            )
            break
        except SourceError as exc:
            if index == len(attempts):
                raise
            source = f"from {' '.join(attempts[index]) or 'the plain index'}"
            run_log.console.info(f"{exc.message}; tried now: {source}")
    return source


def install_requirements(machine: Machine, *, device: str, run_log: RunLog) -> str:
    """Install the requirements of build and run, with torch held, then torch's companions."""
    layout, settings = machine.layout, machine.settings
    needs = _needs(machine, device=device)
    listed = tuple(dict.fromkeys((*needs.build, *needs.runtime)))
    # A file keeps the command short. It remains, so that a person can copy the command into a
    # shell.
    written = layout.state / "requirements.txt"
    write_atomic(written, "".join(f"{line}\n" for line in listed).encode())
    interpreter.install(
        layout,
        settings,
        ["-r", str(written)],
        run_log=run_log,
        constraints=torch.constraints(layout),
        overrides=_overrides(layout, needs),
    )
    for requirement, why in needs.left_out:
        run_log.write(f"left out: {requirement}: {why}")
    left_out = f", {len(needs.left_out)} left out (see the log)" if needs.left_out else ""
    companions = _companions(machine, needs, device=device, run_log=run_log)
    return f"{len(listed)} from requirements/{left_out}{companions}"


def install_accelerators(machine: Machine, *, device: str, run_log: RunLog) -> Provided:
    """Install xgrammar, triton and FlashInfer as pinned."""
    layout, settings = machine.layout, machine.settings
    needs = _needs(machine, device=device)
    if needs.accelerators:
        arguments = ["--prerelease", "allow"] if settings.switch("ALLOW_PRERELEASE") else []
        interpreter.install(
            layout,
            settings,
            [*arguments, *needs.accelerators],
            run_log=run_log,
            constraints=torch.constraints(layout),
            overrides=_overrides(layout, needs),
        )
    packages = {
        name: version for name, version in interpreter.installed(layout).items() if name != "vllm"
    }
    own = " (installed on purpose, kept)" if torch.kept_triton(layout) else ""
    named = [
        f"{name} {packages[name]}{own if name == 'triton' else ''}"
        for name in ("xgrammar", "triton", "flashinfer-python")
        if name in packages
    ]
    return Provided(", ".join(named) or "none is needed here", packages)


def _overrides(layout: Layout, needs: requirements.Requirements) -> tuple[str, ...]:
    """Return the tree's exclusions, and the Triton that the user installed on purpose."""
    own = torch.kept_triton(layout)
    return (
        *(line for line in needs.overrides if not own or line.split(" ")[0] != "triton"),
        *own,
    )


def _needs(
    machine: Machine, *, device: str, python_version: str | None = None
) -> requirements.Requirements:
    if python_version is None:
        there = machine.python()
        if there is None:
            raise BuildError(".vllm holds no working Python", hint=hints.text("inv.bootstrap"))
        python_version = there.version
    return requirements.read(
        machine.layout.vllm,
        device=device,
        machine=platform.machine(),
        python_version=python_version,
        use_existing_torch=machine.settings.switch("USE_EXISTING_TORCH"),
        settings=machine.settings,
    )


def _companions(
    machine: Machine, needs: requirements.Requirements, *, device: str, run_log: RunLog
) -> str:
    """Install torchvision and friends from torch's source; remove those that fail to import.

    A broken companion breaks transformers. Returns the end of the step's sentence.
    """
    layout, settings = machine.layout, machine.settings
    if needs.torch and needs.companions:
        wanted = torch.plan(needs.torch, device=device, settings=settings)
        arguments = torch.companion_arguments(layout, wanted, device=device)
        if arguments is not None:
            _install_companions(layout, settings, [*arguments, *needs.companions], run_log=run_log)
    installed = interpreter.installed(layout)
    here = [name for name in COMPANIONS if name in installed]
    if not here:
        return f", no {', '.join(COMPANIONS)} beside this torch"
    broken = _broken_companions(layout, settings, here)
    if broken:
        uv = interpreter.uv(layout)
        process.run(
            [uv, "pip", "uninstall", "--python", layout.environment_python, *broken],
            env=settings.child_environment("plain"),
            run_log=run_log,
        )
        names = ", ".join(broken)
        run_log.console.info(f"{names} cannot be imported beside this torch and was removed again")
    working = ", ".join(name for name in here if name not in broken)
    return f", with {working}" if working else ""


def _install_companions(
    layout: Layout, settings: Settings, arguments: list[str], *, run_log: RunLog
) -> None:
    try:
        interpreter.install(
            layout,
            settings,
            arguments,
            run_log=run_log,
            constraints=torch.constraints(layout),
        )
    except (SourceError, BuildError) as exc:
        # A failed network, or a killed installer, does not show what fits: without an error here,
        # a companion that is left out now would stay out.
        if not isinstance(exc, toolchain.NotOffered) and not any(
            "No solution found" in line for line in exc.details
        ):
            raise
        names = f"{', '.join(COMPANIONS[:-1])} and {COMPANIONS[-1]}"
        run_log.console.info(f"{names} are left out: {exc.message}")


def _broken_companions(layout: Layout, settings: Settings, here: list[str]) -> list[str]:
    done = process.capture(
        [layout.environment_python, layout.probes / "imports.py", "companions"],
        env=settings.child_environment("run"),
        timeout_s=IMPORT_S,
    )
    process.require_not_killed(done, "the import of torch's companions")
    if done.returncode != 0:
        return here
    errors = records.decode(done.stdout, dict[str, str | None])
    return [name for name, error in errors.items() if error and name in here]
