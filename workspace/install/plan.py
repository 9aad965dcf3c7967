"""The state of the workspace: which layers exist, and which are stale and why.

Reads pins, checkout, environment and stamps and changes nothing. Bootstrap acts on the result,
status shows it, and smoke refuses a stale build.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workspace.core import errors, files, hints
from workspace.core.console import State
from workspace.core.errors import CheckoutError, SourceError
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import precompiled, stamp
from workspace.install.precompiled import Kernels, KernelSource
from workspace.machine import interpreter, torch
from workspace.machine.machine import Machine
from workspace.repo import checkout, patches, pins
from workspace.repo.git import Git, command
from workspace.repo.git.command import Entries
from workspace.repo.git.repository import changed_paths

Device = Literal["cpu", "cuda"]

# Sources of compiled libraries, below the tree (CMakeLists.txt, setup.py's cmake_build_ext).
COMPILED_SOURCES = ("csrc", "cmake", "CMakeLists.txt")
REQUIREMENT_FILES = ("requirements", "pyproject.toml")
# The key in a stamp's outcome: the digest of the sources of another clone's wheel.
PACKED_SOURCES = "packed sources"
METADATA_FILES = ("setup.py", "pyproject.toml", "requirements", "tools/build_rust.py")
# The inputs that are a digest over files.
DIGESTS = {
    "requirements": REQUIREMENT_FILES,
    "compiled sources": COMPILED_SOURCES,
    "metadata": METADATA_FILES,
}


@dataclass(frozen=True)
class RebuildOptions:
    """Options of `inv rebuild` as typed; None for an option that was not given."""

    jobs: str | None = None
    memory: str | None = None
    targets: tuple[str, ...] = ()
    clean: bool = False
    plan_only: bool = False
    as_json: bool = False


class Tree:
    """The inputs of a build in vendor/vllm at one moment: they are read once, when one is first
    needed.
    """

    def __init__(self, git: Git) -> None:
        self.git = git
        self._read: Entries | None = None

    def entries(self, paths: tuple[str, ...]) -> Entries:
        """Return `mode oid` by path of the files below `paths`, which are among DIGESTS."""
        if self._read is None:
            self._read = self.git.entries(sorted({*itertools.chain(*DIGESTS.values())}), None)
        below = tuple(f"{path}/" for path in paths)
        return {
            name: entry
            for name, entry in self._read.items()
            if name in paths or name.startswith(below)
        }

    def digest(self, paths: tuple[str, ...]) -> str:
        """Return one digest of the files below `paths`, as Git.digest does."""
        return command.digest(self.entries(paths))


@dataclass(frozen=True)
class Layer:
    """One layer of the built tree, with the reasons why it is not `ok`."""

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
    """The facts on which bootstrap, status and smoke decide; `stack` is None without checkout."""

    machine: Machine
    pin: pins.Pin
    device: Device
    kernels_wanted: Kernels
    checkout: checkout.Checkout
    tree: Tree | None
    stack: patches.Stack | None
    python: interpreter.PythonFacts | None
    torch: torch.TorchBuild | None
    environment: Layer
    kernels: Layer
    install: Layer
    # The reasons of staleness that only a compiler can remove.
    needs_compilation: tuple[str, ...] = ()

    def again(self) -> "Observation":
        """Observe the workspace again after a change; the machine itself is the same."""
        return observe_on(self.machine.reread())

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers in the order in which a build makes them."""
        return self.environment, self.kernels, self.install

    @property
    def version(self) -> str:
        """The version of the installed vLLM; `cpu` in it selects the platform (vllm/platforms)."""
        return version_of(self.pin, self.device, self.torch)


@dataclass(frozen=True)
class _Facts:
    """The facts that every layer is compared with."""

    machine: Machine
    pin: pins.Pin
    device: Device
    tree: Tree | None
    python: interpreter.PythonFacts | None
    torch: torch.TorchBuild | None

    @property
    def version(self) -> str:
        return version_of(self.pin, self.device, self.torch)


def observe(layout: Layout, settings: Settings) -> Observation:
    """Observe the whole workspace and change nothing. Raises SettingsError for broken pins."""
    return observe_on(Machine(layout, settings))


def observe_on(machine: Machine) -> Observation:
    """Observe the whole workspace on a machine that is known already."""
    layout, settings = machine.layout, machine.settings
    pin = pins.load(layout.pins).vllm
    environment_stamp = stamp.read(layout.stamp("environment"))
    build_stamp = stamp.read(layout.stamp("vllm"))
    device = _device(machine, environment_stamp)
    current = checkout.observe(layout, pin)
    is_usable = current.kind.is_pinned
    stack = patches.observe(layout, "vllm", pin, current) if is_usable else None
    python = machine.python()
    build = machine.torch() if python else None
    tree = _read_tree(layout) if is_usable else None
    facts = _Facts(machine, pin, device, tree, python, build)
    environment = _environment(facts, environment_stamp)
    changed_sources = _changed_sources(tree, pin, current)
    wanted = precompiled.choose(
        settings, pin, device, _kept(build_stamp), is_changed=bool(changed_sources)
    )
    if wanted.source.is_native or _are_packed(changed_sources, tree, wanted, build_stamp):
        changed_sources = ()
    kernels, needs_compilation = _kernels(facts, wanted, build_stamp, changed_sources)
    install = _install(facts, build_stamp)
    return Observation(
        machine,
        pin,
        device,
        wanted,
        current,
        tree,
        stack,
        python,
        build,
        environment,
        kernels,
        install,
        needs_compilation,
    )


def _read_tree(layout: Layout) -> Tree:
    """Return the tree with its requirements read: what is edited while `.vllm` is made for the
    first time is due again.
    """
    tree = Tree(Git(layout.vllm))
    tree.entries(REQUIREMENT_FILES)
    return tree


def edits_digest(layout: Layout, stack: patches.Stack | None) -> str | None:
    """Return one SHA-256 of the edited tracked files and their content, None without edits."""
    return Git(layout.vllm).digest(stack.dirty) if stack and stack.dirty else None


def version_of(pin: pins.Pin, device: Device, build: torch.TorchBuild | None) -> str:
    if device == "cpu":
        return f"{pin.version}+cpu"
    return f"{pin.version}+cu{(build.cuda if build and build.cuda else '13.0').replace('.', '')}"


def _device(machine: Machine, recorded: stamp.Stamp | None) -> Device:
    """Return the device of the flag or setting, else of the environment, else of the machine.

    The machine comes last: a query of the driver takes up to a second.
    """
    built = recorded.inputs.get("device") if recorded else None
    if machine.settings.text("DEVICE") == "auto" and built in ("cpu", "cuda"):
        return "cuda" if built == "cuda" else "cpu"
    return machine.device


def _kept(recorded: stamp.Stamp | None) -> Kernels | None:
    if recorded is None or recorded.kernels is None:
        return None
    wheel = recorded.outcome.get("wheel")
    return Kernels(recorded.kernels, Path(wheel) if wheel else None)


def _environment(facts: _Facts, recorded: stamp.Stamp | None) -> Layer:
    if facts.python is None:
        has_folder = facts.machine.layout.environment.exists()
        reason = ".vllm holds no working Python" if has_folder else "there is no .vllm"
        return Layer("environment", State.MISSING, (reason,))
    if facts.tree is None:
        return Layer(
            "environment", State.MISSING, ("there is no checkout to take requirements from",)
        )
    inputs = {
        "place": str(facts.machine.layout.environment),
        "python": facts.python.version,
        "device": facts.device,
        "requirements": facts.tree.digest(REQUIREMENT_FILES),
        "use existing torch": facts.machine.settings.text("USE_EXISTING_TORCH"),
        "pre-releases": facts.machine.settings.text("ALLOW_PRERELEASE"),
        "torch": _torch_input(facts.torch) if facts.torch else "none",
    }
    if recorded is None:
        return Layer("environment", State.MISSING, ("it was not finished",), inputs)
    installed = facts.machine.packages()
    reasons = _differences(facts.tree, recorded, inputs)
    reasons += tuple(
        f"{name} {old} → {installed.get(name, 'none')}"
        for name, old in recorded.packages.items()
        if installed.get(name) != old
    )
    return Layer("environment", State.STALE if reasons else State.OK, reasons, inputs, recorded)


def _torch_input(build: torch.TorchBuild) -> str:
    return f"{build.version} CUDA {build.cuda or 'none'}"


def _kernels(
    facts: _Facts,
    wanted: Kernels,
    recorded: stamp.Stamp | None,
    changed_sources: tuple[str, ...],
) -> tuple[Layer, tuple[str, ...]]:
    """Return the layer, and those of its reasons that only a compiler can remove."""
    tree, build = facts.tree, facts.torch
    if tree is None or build is None:
        reason = "there is no checkout" if tree is None else "there is no torch"
        return Layer("kernels", State.MISSING, (reason,)), ()
    source = wanted.source
    inputs = {"device": facts.device, "torch": _torch_input(build)}
    compiled = (
        compiled_inputs(facts.machine, tree, facts.pin, facts.device, build)
        if source.is_compiled
        else {}
    )
    sentence: tuple[str, ...] = ()
    if changed_sources:
        sentence = (changed_sources_sentence(changed_sources, facts.pin.base),)
    if recorded is None:
        return Layer(
            "kernels", State.MISSING, ("no build was finished",), inputs | compiled
        ), sentence
    was_hybrid = recorded.kernels is not None and recorded.kernels.is_hybrid
    if changed_sources and not (source.is_hybrid and was_hybrid):
        needs_compilation = sentence
        source = source.without_compiler()
    else:
        needs_compilation = _differences(tree, recorded, compiled)
    reasons = source.differences(recorded.kernels) + _differences(tree, recorded, inputs)
    reasons += tuple(
        f"{library.path} changed"
        for library in recorded.libraries
        if _size(facts.machine.layout.vllm / library.path) != library.size
    )
    reasons += needs_compilation
    state = State.STALE if reasons else State.OK
    layer = Layer("kernels", state, reasons, inputs | compiled, recorded)
    return layer, () if wanted.source.is_native else needs_compilation


def kernel_inputs(observed: Observation, source: KernelSource) -> dict[str, str]:
    """Return the inputs of kernels from this source if they are built from what was observed, as a
    stamp records them.

    Raises CheckoutError where there is no checkout or no torch.
    """
    tree, build = observed.tree, observed.torch
    if tree is None or build is None:
        raise CheckoutError(
            f"there is no {'torch' if tree else 'checkout'} to build kernels for",
            hint=hints.text("inv.bootstrap"),
        )
    inputs = {"device": observed.device, "torch": _torch_input(build)}
    if source.is_compiled:
        inputs |= compiled_inputs(observed.machine, tree, observed.pin, observed.device, build)
    return inputs


def compiled_inputs(
    machine: Machine, tree: Tree, pin: pins.Pin, device: Device, build: torch.TorchBuild
) -> dict[str, str]:
    """Return the inputs of a compilation besides torch and device.

    They are toolchain, architectures, build type, CMake arguments and the digest of the sources.
    """
    from workspace.compile import cmake_inputs

    observed = cmake_inputs.observe(machine, device=device, pin=pin, torch=build)
    return {
        "architectures": observed.archs,
        "cuda": observed.cuda,
        "compiler": observed.compiler,
        "build type": observed.build_type,
        "cmake arguments": machine.settings.text("CMAKE_ARGS"),
        "compiled sources": tree.digest(COMPILED_SOURCES),
    }


def _install(facts: _Facts, recorded: stamp.Stamp | None) -> Layer:
    tree, python = facts.tree, facts.python
    if tree is None or python is None:
        reason = "there is no checkout" if tree is None else "there is no environment"
        return Layer("install", State.MISSING, (reason,))
    inputs = {
        "place": str(facts.machine.layout.vllm),
        "metadata": tree.digest(METADATA_FILES),
        "version": facts.version,
        "interpreter": python.version,
    }
    if recorded is None:
        return Layer("install", State.MISSING, ("no build was finished",), inputs)
    reasons = _differences(tree, recorded, inputs)
    found = facts.machine.packages().get("vllm")
    if found != facts.version:
        reasons += (f"installed vllm {found or 'none'} → {facts.version}",)
    return Layer("install", State.STALE if reasons else State.OK, reasons, inputs, recorded)


def digested_files(tree: Tree | None, inputs: Mapping[str, str]) -> dict[str, Mapping[str, str]]:
    """Return `mode oid` by path for each input that is a digest over files, for the stamp.

    Left out are files that changed since the digest was made, and names that JSON cannot hold.
    """
    known = [name for name in DIGESTS if name in inputs]
    entries = {name: tree.entries(DIGESTS[name]) for name in known} if tree else {}
    return {
        name: of_input
        for name, of_input in entries.items()
        if command.digest(of_input) == inputs[name]
        and not re.search("[\ud800-\udfff]", "".join(of_input))
    }


def _differences(tree: Tree, recorded: stamp.Stamp, inputs: Mapping[str, str]) -> tuple[str, ...]:
    def changed_files(name: str) -> Sequence[str]:
        before = recorded.files.get(name)
        if before is None:
            return ()
        return changed_paths(before, tree.entries(DIGESTS[name]))

    return files.differences(recorded.inputs, inputs, changed_files)


def _are_packed(
    changed: tuple[str, ...], tree: Tree | None, wanted: Kernels, recorded: stamp.Stamp | None
) -> bool:
    """Return whether the wheel of `inv wheel` that is wanted was built from these sources."""
    return bool(
        changed
        and tree
        and wanted.source.is_wheel_file
        and _packed_sources(wanted, recorded) == tree.digest(COMPILED_SOURCES)
    )


def _packed_sources(wanted: Kernels, recorded: stamp.Stamp | None) -> str | None:
    """Return the digest of the sources of a wheel of `inv wheel`, None for any other wheel."""
    if recorded and recorded.kernels == wanted.source:
        return recorded.outcome.get(PACKED_SOURCES)
    try:
        packed = stamp.read_packed(wanted.file) if wanted.file else None
    except SourceError:
        # The step that takes the wheel raises the error.
        return None
    return packed.digest if packed else None


def _changed_sources(
    tree: Tree | None, pin: pins.Pin, current: checkout.Checkout
) -> tuple[str, ...]:
    if tree is None or current.base is None:
        return ()
    commit = precompiled.sources_commit(pin, current.base)
    # Without the commit every source counts as changed, until a bootstrap has fetched it.
    is_here = commit in tree.git.present((commit,))
    pinned = tree.git.entries(COMPILED_SOURCES, commit) if is_here else {}
    return changed_paths(pinned, tree.entries(COMPILED_SOURCES))


def changed_sources_sentence(changed: tuple[str, ...], base: pins.Base | None = None) -> str:
    origin = base.tag if base else "the pin"
    return (
        f"compiled from {origin}'s sources; {errors.listed(changed)}"
        f" {'differs' if len(changed) == 1 else 'differ'} from them"
    )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
