"""What is there, and what is stale and why.

Looks at pins, checkout, environment and stamps without changing anything; bootstrap acts on it,
status shows it, smoke refuses on it.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.core import files
from workspace.core.errors import CheckoutError, SettingsError, SourceError
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import precompiled, stamp
from workspace.install.precompiled import Kernels
from workspace.machine import doctor, hardware, interpreter, torch
from workspace.repo import checkout, patches, pins
from workspace.repo.git import Git

Device = Literal["cpu", "cuda"]
State = Literal["ok", "stale", "missing"]

# What a compiled library is made from, below the tree (CMakeLists.txt, setup.py's cmake_build_ext).
COMPILED_SOURCES = ("csrc", "cmake", "CMakeLists.txt")
REQUIREMENT_FILES = ("requirements", "pyproject.toml")
# In a stamp's outcome: what the wheel of another clone was compiled from.
PACKED_SOURCES = "packed sources"
METADATA_FILES = ("setup.py", "pyproject.toml", "requirements", "tools/build_rust.py")


@dataclass(frozen=True)
class Layer:
    """One layer of the built tree, and why it is not `ok`."""

    name: str
    state: State
    reasons: tuple[str, ...] = ()
    inputs: dict[str, str] | None = None
    recorded: stamp.Stamp | None = None

    @property
    def why(self) -> str:
        return "; ".join(self.reasons)


@dataclass(frozen=True)
class Observation:
    """Everything that bootstrap, status and smoke decide from. The layers are None while there is
    no checkout.
    """

    pin: pins.Pin
    device: Device
    kernels_wanted: Kernels
    checkout: checkout.Checkout
    stack: patches.Stack | None
    python: interpreter.PythonFacts | None
    torch: torch.TorchBuild | None
    environment: Layer
    kernels: Layer
    install: Layer
    # Compiled sources that differ from the pin while the kernels come from a wheel, and all else
    # that only a compiler can mend.
    changed_sources: tuple[str, ...] = ()
    for_compiler: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        """The version that the installed vLLM bears: the letters `cpu` in it select the platform
        (vllm/platforms/__init__.py).
        """
        return version_of(self.pin, self.device, self.torch)


def observe(layout: Layout, settings: Settings) -> Observation:
    """Look at the whole house. Raises SettingsError for broken pins; touches nothing."""
    pin = pins.load(layout.pins).vllm
    environment_stamp = stamp.read(layout.stamp("environment"))
    build_stamp = stamp.read(layout.stamp("vllm"))
    device = _device(settings, environment_stamp)
    there = checkout.observe(layout, pin)
    is_usable = there.kind in (checkout.Kind.GIT, checkout.Kind.RELEASE)
    stack = patches.observe(layout, "vllm", pin, there) if is_usable else None
    python = interpreter.describe(layout, settings)
    build = torch.observe(layout, settings) if python else None
    git = Git(layout.vllm) if is_usable else None
    environment = _environment(layout, settings, git, device, python, build, environment_stamp)
    changed_sources = _changed_sources(git, there)
    wanted = _kernels_wanted(settings, pin, device, build_stamp, is_changed=bool(changed_sources))
    if wanted.kind == "native" or (
        changed_sources
        and git
        and wanted.kind == "wheel"
        and _packed_sources(wanted, build_stamp) == git.digest(COMPILED_SOURCES)
    ):
        changed_sources = ()
    kernels, for_compiler = _kernels(
        layout, settings, git, pin, device, wanted, build, build_stamp, changed_sources
    )
    install = _install(layout, git, version_of(pin, device, build), python, build_stamp)
    return Observation(
        pin,
        device,
        wanted,
        there,
        stack,
        python,
        build,
        environment,
        kernels,
        install,
        changed_sources,
        for_compiler,
    )


def edits_digest(layout: Layout, stack: patches.Stack | None) -> str | None:
    """Return one SHA-256 over the edited tracked files of the tree and their content, None where
    nothing is edited.
    """
    return Git(layout.vllm).digest(stack.dirty) if stack and stack.dirty else None


def version_of(pin: pins.Pin, device: Device, build: torch.TorchBuild | None) -> str:
    if device == "cpu":
        return f"{pin.version}+cpu"
    return f"{pin.version}+cu{(build.cuda if build and build.cuda else '13.0').replace('.', '')}"


def _device(settings: Settings, recorded: stamp.Stamp | None) -> Device:
    """A flag or setting, else what the environment was made for, else what the machine has: asking
    the driver costs up to a second.
    """
    if (
        settings.text("DEVICE") == "auto"
        and recorded
        and recorded.inputs.get("device") in ("cpu", "cuda")
    ):
        return "cuda" if recorded.inputs["device"] == "cuda" else "cpu"
    if settings.text("DEVICE") == "auto":
        return doctor.device(settings, hardware.observe(settings))
    return "cuda" if settings.text("DEVICE") == "cuda" else "cpu"


def _kernels_wanted(
    settings: Settings,
    pin: pins.Pin,
    device: Device,
    recorded: stamp.Stamp | None,
    *,
    is_changed: bool,
) -> Kernels:
    choice = settings.text("KERNELS")
    # What the first edition called it.
    choice = "precompiled" if choice == "donor" else choice
    if (
        choice == "auto"
        and settings.source("KERNELS") != "flag"
        and recorded
        and recorded.inputs.get("origin", "").startswith(("native", "wheel"))
    ):
        # What was asked for once stays until something else is asked for.
        origin = recorded.inputs["origin"]
        kept = recorded.outcome.get("wheel")
        return (
            Kernels("native", origin)
            if origin == "native"
            else Kernels("wheel", origin, Path(kept) if kept else None)
        )
    import platform

    pinned = pin.precompiled.get(f"{device}-{platform.machine()}")
    if choice == "native" or (choice == "auto" and pinned is None):
        return Kernels("native", "native")
    if choice in ("auto", "precompiled"):
        origin = f"precompiled {pinned.filename} {pinned.sha256}" if pinned else "precompiled none"
        return (
            Kernels("hybrid", f"hybrid {origin}")
            if choice == "auto" and is_changed
            else Kernels("precompiled", origin)
        )
    wheel = None
    # A name that is too long, or a link that leads round and round, names no wheel either.
    with contextlib.suppress(OSError, RuntimeError):
        named = Path(choice).expanduser().resolve()
        wheel = named if named.suffix == ".whl" and named.is_file() else None
    if wheel is None:
        raise SettingsError(
            f"KERNELS={settings.presentable(choice)}: is neither auto nor precompiled nor native"
            " nor a wheel file that is there",
            hint="./scripts/inv rebuild --kernels auto",
        )
    from workspace.core.files import sha256

    return Kernels("wheel", f"wheel {wheel.name} {sha256(wheel)}", wheel)


def _environment(
    layout: Layout,
    settings: Settings,
    git: Git | None,
    device: Device,
    python: interpreter.PythonFacts | None,
    build: torch.TorchBuild | None,
    recorded: stamp.Stamp | None,
) -> Layer:
    if python is None:
        return Layer(
            "environment",
            "missing",
            (
                (
                    "there is no .vllm"
                    if not layout.environment.exists()
                    else ".vllm holds no working Python"
                ),
            ),
        )
    if git is None:
        return Layer("environment", "missing", ("there is no checkout to take requirements from",))
    inputs = {
        "place": str(layout.environment),
        "python": python.version,
        "device": device,
        "requirements": git.digest(REQUIREMENT_FILES),
        "use existing torch": settings.text("USE_EXISTING_TORCH"),
        "pre-releases": settings.text("ALLOW_PRERELEASE"),
        "torch": f"{build.version} CUDA {build.cuda or 'none'}" if build else "none",
    }
    if recorded is None:
        return Layer("environment", "missing", ("it was not finished",), inputs)
    installed = interpreter.installed(layout)
    reasons = files.differences(recorded.inputs, inputs)
    reasons += tuple(
        f"{name} {old} → {installed.get(name, 'none')}"
        for name, old in recorded.packages.items()
        if installed.get(name) != old
    )
    return Layer("environment", "stale" if reasons else "ok", reasons, inputs, recorded)


def _kernels(
    layout: Layout,
    settings: Settings,
    git: Git | None,
    pin: pins.Pin,
    device: Device,
    wanted: Kernels,
    build: torch.TorchBuild | None,
    recorded: stamp.Stamp | None,
    changed_sources: tuple[str, ...],
) -> tuple[Layer, tuple[str, ...]]:
    """The layer, and those of its reasons that only a compiler can mend."""
    if git is None or build is None:
        return (
            Layer(
                "kernels",
                "missing",
                ("there is no checkout" if git is None else "there is no torch",),
            ),
            (),
        )
    inputs = {
        "origin": wanted.origin,
        "device": device,
        "torch": f"{build.version} CUDA {build.cuda or 'none'}",
    }
    compiled = (
        compiled_inputs(layout, settings, git, pin, device, build)
        if wanted.kind in ("native", "hybrid")
        else {}
    )
    if recorded is None:
        sentence = (changed_sources_sentence(changed_sources),) if changed_sources else ()
        return Layer("kernels", "missing", ("no build was finished",), inputs | compiled), sentence
    was_hybrid = recorded.inputs.get("origin", "").startswith("hybrid ")
    for_compiler: tuple[str, ...] = ()
    if changed_sources and not (wanted.kind == "hybrid" and was_hybrid):
        for_compiler = (changed_sources_sentence(changed_sources),)
        inputs["origin"] = wanted.origin.removeprefix("hybrid ")
    else:
        for_compiler = files.differences(recorded.inputs, compiled)
    reasons = files.differences(recorded.inputs, inputs)
    reasons += tuple(
        f"{library.path} changed"
        for library in recorded.libraries
        if _size(layout.vllm / library.path) != library.size
    )
    is_native = wanted.kind == "native"
    layer = Layer(
        "kernels",
        "stale" if reasons or for_compiler else "ok",
        reasons + for_compiler,
        inputs | compiled,
        recorded,
    )
    return layer, () if is_native else for_compiler


def kernel_inputs(
    layout: Layout, settings: Settings, observed: Observation, *, kind: str
) -> dict[str, str]:
    """What kernels of this kind, made now, are made from: what a stamp says of them."""
    build = observed.torch
    if build is None:
        raise CheckoutError(
            "there is no torch that the kernels could be for", hint="./scripts/inv bootstrap"
        )
    of_wheel = observed.kernels_wanted.origin.removeprefix("hybrid ")
    origin = {"native": "native", "hybrid": f"hybrid {of_wheel}"}.get(kind, of_wheel)
    inputs = {
        "origin": origin,
        "device": observed.device,
        "torch": f"{build.version} CUDA {build.cuda or 'none'}",
    }
    if kind in ("native", "hybrid"):
        inputs |= compiled_inputs(
            layout, settings, Git(layout.vllm), observed.pin, observed.device, build
        )
    return inputs


def compiled_inputs(
    layout: Layout,
    settings: Settings,
    git: Git,
    pin: pins.Pin,
    device: Device,
    build: torch.TorchBuild,
) -> dict[str, str]:
    """What a compiler makes libraries from, besides torch and device: toolchain, architectures,
    build type and the sources' digest.
    """
    from workspace.compile import cmake_inputs

    made = cmake_inputs.observe(layout, settings, device=device, pin=pin, torch=build)
    return {
        "architectures": made.archs,
        "cuda": made.cuda,
        "compiler": made.compiler,
        "build type": made.build_type,
        "cmake arguments": settings.text("CMAKE_ARGS"),
        "compiled sources": git.digest(COMPILED_SOURCES),
    }


def _install(
    layout: Layout,
    git: Git | None,
    version: str,
    python: interpreter.PythonFacts | None,
    recorded: stamp.Stamp | None,
) -> Layer:
    if git is None or python is None:
        return Layer(
            "install",
            "missing",
            ("there is no checkout" if git is None else "there is no environment",),
        )
    inputs = {
        "place": str(layout.vllm),
        "metadata": git.digest(METADATA_FILES),
        "version": version,
        "interpreter": python.version,
    }
    if recorded is None:
        return Layer("install", "missing", ("no build was finished",), inputs)
    reasons = files.differences(recorded.inputs, inputs)
    found = interpreter.installed(layout).get("vllm")
    if found != version:
        reasons += (f"installed vllm {found or 'none'} → {version}",)
    return Layer("install", "stale" if reasons else "ok", reasons, inputs, recorded)


def _packed_sources(wanted: Kernels, recorded: stamp.Stamp | None) -> str | None:
    """The digest of the sources that a wheel of `inv wheel` was compiled from; None for any other
    wheel.
    """
    if recorded and recorded.inputs.get("origin") == wanted.origin:
        return recorded.outcome.get(PACKED_SOURCES)
    try:
        packed = precompiled.read_packed(wanted.wheel) if wanted.wheel else None
    except SourceError:
        # Whoever takes it will say so.
        return None
    return packed.digest if packed else None


def _changed_sources(git: Git | None, there: checkout.Checkout) -> tuple[str, ...]:
    if git is None or there.base is None:
        return ()
    return git.changed_files(there.base, COMPILED_SOURCES)


def changed_sources_sentence(changed: tuple[str, ...], limit: int = 3) -> str:
    names = ", ".join(changed[:limit]) + (
        f" and {len(changed) - limit} more" if len(changed) > limit else ""
    )
    return (
        f"compiled from the pin's sources, which {names}"
        f" {'differs' if len(changed) == 1 else 'differ'} from"
    )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
