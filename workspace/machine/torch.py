"""torch and Triton in `.vllm`: where torch comes from, which builds are installed, and the
constraints that hold them while other packages are installed.
"""

import ast
import contextlib
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from workspace.core import hints, process, records
from workspace.core.errors import BuildError, ToolchainError
from workspace.core.files import read_regular
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine import failures, interpreter
from workspace.machine.requirements import COMPANIONS

# uv's backend for CUDA 13 of a DGX Spark. Since torch 2.11 the plain index has CUDA 13 builds for
# Linux as well.
CUDA_MAJOR, CUDA_BACKEND = "13", "cu130"
IMPORT_S = 300.0
PIP_ANSWER_S = 60.0
_VERSION = re.compile(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", re.MULTILINE)
_CUDA = re.compile(r"^cuda(?:\s*:[^=]+)?\s*=\s*['\"]([^'\"]+)['\"]", re.MULTILINE)


@dataclass(frozen=True)
class TorchBuild:
    """A torch build: its version with the local part, and major.minor of CUDA, None without."""

    version: str
    cuda: str | None


@dataclass(frozen=True)
class Plan:
    """The source of torch.

    `arguments` are uv's, `alternatives` further arguments to try in order; `description` names the
    source in words.
    """

    requirement: str
    arguments: tuple[str, ...]
    alternatives: tuple[tuple[str, ...], ...]
    description: str


@dataclass(frozen=True)
class _Wheel:
    folder: Path
    version: str
    # Minor versions of Python, empty where any fits.
    pythons: frozenset[str]


def observe(layout: Layout, packages: Mapping[str, str]) -> TorchBuild | None:
    """Read which torch is among the packages of `.vllm`, without a start of Python.

    None where there is none, or where its files are missing.
    """
    version = packages.get("torch")
    if version is None:
        return None
    for folder in interpreter.site_packages(layout):
        for place in (folder / "torch", *_editable(folder / f"torch-{version}.dist-info")):
            with contextlib.suppress(OSError, ValueError):
                text = read_regular(place / "version.py").decode()
                own, cuda = _VERSION.search(text), _CUDA.search(text)
                return TorchBuild(own[1] if own else version, cuda[1] if cuda else None)
    return None


def load(layout: Layout, settings: Settings) -> TorchBuild:
    """Import torch with the built interpreter. Raises BuildError naming what fails."""
    try:
        done = process.capture(
            [layout.environment_python, "-I", layout.probes / "imports.py", "torch"],
            env=settings.child_environment("run"),
            timeout_s=IMPORT_S,
        )
    except process.NoAnswer:
        raise
    except ToolchainError as exc:
        raise BuildError(
            f"torch in .vllm cannot be imported: {exc.message}", hint=hints.text("inv.bootstrap")
        ) from exc
    process.require_not_killed(done, "the import of torch")
    if done.returncode != 0:
        reading = failures.judge(done.stderr.splitlines(), status=done.returncode)
        last = reading.tail[-1] if reading.tail else process.describe_status(done.returncode)
        raise BuildError(
            f"torch in .vllm cannot be imported: {reading.sentence or last.strip()}",
            hint=hints.text("machine.set_venv_aside"),
            details=reading.tail,
        )
    return records.decode(done.stdout.splitlines()[-1], TorchBuild)


def plan(
    required: str, *, device: str, settings: Settings, machine: str = platform.machine()
) -> Plan:
    """Decide the source of `required`, the tree's own pin, for this machine or another one.

    In this order: TORCH_INDEX_URL, a local wheel folder (CPU), PyTorch's index, the plain index
    (CUDA).
    """
    if url := settings.text("TORCH_INDEX_URL"):
        # In addition to the plain index, which has torch's dependencies; torch itself comes from
        # this index only (uv's first-index strategy).
        return Plan(required, ("--index", url), (), "from TORCH_INDEX_URL")
    if device == "cuda":
        return Plan(
            required,
            ("--torch-backend", CUDA_BACKEND),
            ((),),
            f"from PyTorch's {CUDA_BACKEND} index",
        )
    if wheels := _local_wheels(required, settings, machine):
        folder, version = wheels[0].folder, wheels[0].version
        return Plan(
            f"torch=={version}",
            ("--find-links", str(folder)),
            (("--torch-backend", "cpu"),),
            f"from {folder} (a folder in pip's configuration)",
        )
    return Plan(required, ("--torch-backend", "cpu"), (), "from PyTorch's cpu index")


def local_wheel_pythons(required: str, settings: Settings) -> frozenset[str] | None:
    """Return the minor versions of Python that local wheels of `required` fit.

    None where torch does not come from a local wheel, or where one fits every Python.
    """
    wheels = (
        []
        if settings.text("TORCH_INDEX_URL") or not required
        else _local_wheels(required, settings, platform.machine())
    )
    if not wheels or any(not wheel.pythons for wheel in wheels):
        return None
    return frozenset().union(*(wheel.pythons for wheel in wheels))


def companion_arguments(layout: Layout, wanted: Plan, *, device: str) -> tuple[str, ...] | None:
    """Return uv's arguments that take torchvision and friends from torch's source.

    None where no suitable build exists. The plain index's builds are linked against CUDA: beside a
    CPU torch they do not import.
    """
    if "--find-links" not in wanted.arguments:
        # PyTorch's index marks its builds with a local version; a torch without one came from the
        # plain index, and so do its companions.
        is_plain = (
            device == "cuda"
            and "--torch-backend" in wanted.arguments
            and "+" not in interpreter.installed(layout).get("torch", "+")
        )
        return () if is_plain else wanted.arguments
    folder = Path(wanted.arguments[wanted.arguments.index("--find-links") + 1])
    has_all = all(any(folder.glob(f"{name}-*.whl")) for name in COMPANIONS)
    return ("--no-index", "--find-links", str(folder)) if has_all else None


@contextlib.contextmanager
def held(layout: Layout, *, step: str) -> Iterator[None]:
    """Compare torch before and after the block, which may have changed it.

    Raises BuildError naming the step where torch changed, was added or was removed.
    """
    before = observe(layout, interpreter.installed(layout))
    yield
    after = observe(layout, interpreter.installed(layout))
    if before != after:
        raise BuildError(
            f"{step} changed torch from {_named(before)} to {_named(after)}",
            hint=hints.text("machine.restore_torch"),
        )


def constraints(layout: Layout) -> tuple[str, ...]:
    """Return the constraints that hold torch, and the packages paired with it, at their versions.

    uv keeps an installed package that no index offers as long as a constraint names exactly its
    version.
    """
    there = interpreter.installed(layout)
    if "torch" not in there:
        return ()
    lines = [f"torch=={there['torch']}"]
    of_torch = requirements_of(layout, "torch", there)
    for name in COMPANIONS:
        if (
            name in there
            and _is_met(requirements_of(layout, name, there).get("torch"), there["torch"])
            and _is_met(of_torch.get(name), there[name])
        ):
            lines.append(f"{name}=={there[name]}")
    # A Triton of a version that torch does not require is there on purpose, or for xgrammar: a
    # constraint would clash.
    if "triton" in there and "triton" in of_torch and _is_met(of_torch["triton"], there["triton"]):
        lines.append(f"triton=={there['triton']}")
    return tuple(lines)


def _named(build: TorchBuild | None) -> str:
    return f"{build.version} with CUDA {build.cuda or 'none'}" if build else "none"


def _is_met(specifier: str | None, version: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return specifier is None or SpecifierSet(specifier).contains(version, prereleases=True)


def requirements_of(layout: Layout, name: str, there: Mapping[str, str]) -> dict[str, str]:
    """Return what an installed package requires without extras: canonical name and specifier."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, str] = {}
    for folder in interpreter.site_packages(layout):
        with contextlib.suppress(OSError):
            head = (
                (folder / f"{name}-{there[name]}.dist-info" / "METADATA")
                .read_text(encoding="utf-8")
                .split("\n\n", 1)[0]
            )
            for line in re.findall(r"^Requires-Dist:\s*(.+)$", head, re.MULTILINE):
                with contextlib.suppress(InvalidRequirement):
                    requirement = Requirement(line)
                    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                        found[canonicalize_name(requirement.name)] = str(requirement.specifier)
    return found


def _editable(described: Path) -> Iterator[Path]:
    """Yield the package folder of a torch that is installed editable (PEP 610)."""
    origin, place = origin_of(described)
    if origin == "editable":
        yield Path(place) / "torch"


def _local_wheels(required: str, settings: Settings, machine: str) -> list[_Wheel]:
    """Return the local wheels that meet `required` on a machine, newest version first."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    specifier = Requirement(required).specifier
    wheels = [
        wheel
        for folder in _wheel_folders(settings)
        for path in sorted(folder.glob("torch-*.whl"))
        if (wheel := _wheel(path, machine))
    ]
    fitting = [wheel for wheel in wheels if specifier.contains(wheel.version, prereleases=True)]
    return sorted(fitting, key=lambda wheel: Version(wheel.version), reverse=True)


def _wheel(path: Path, machine: str) -> _Wheel | None:
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    try:
        _, version, _, tags = parse_wheel_filename(path.name)
    except InvalidWheelFilename:
        return None
    here = re.compile(rf"any|(many)?linux.*_{re.escape(machine)}")
    fitting = [tag for tag in tags if here.fullmatch(tag.platform) and not tag.abi.endswith("t")]
    if not fitting or re.search(r"cu\d|rocm|xpu", version.local or ""):
        return None
    if any(tag.interpreter.startswith("py") or tag.abi == "abi3" for tag in fitting):
        return _Wheel(path.parent, str(version), frozenset())
    pythons = [found[1] for tag in fitting if (found := re.fullmatch(r"cp3(\d+)", tag.interpreter))]
    return (
        _Wheel(path.parent, str(version), frozenset(f"3.{minor}" for minor in pythons))
        if pythons
        else None
    )


def _wheel_folders(settings: Settings) -> list[Path]:
    """Return the local wheel folders in the configuration of uv or pip; uv ignores pip's."""
    environment = settings.child_environment("plain")
    places = environment.get("UV_FIND_LINKS", "").split(",")
    if environment.get("PIP_FIND_LINKS"):
        places += environment["PIP_FIND_LINKS"].split()
    else:
        places += _pip_places(environment)
    folders = [
        Path(
            unquote(urlsplit(place).path)
            if place.startswith("file://")
            else os.path.expanduser(place)
        )
        for place in places
        if place
    ]
    return list(dict.fromkeys(folder.absolute() for folder in folders if folder.is_dir()))


def _pip_places(environment: Mapping[str, str]) -> list[str]:
    # A machine without pip has no such places; a pip that is only slow may have them.
    argv = ["python3", "-m", "pip", "config", "list"]
    answer = process.ask(argv, env=environment, limit_s=PIP_ANSWER_S)
    printed = process.certain(process.output_of(answer), "pip config list") or ""
    places: list[str] = []
    for value in re.findall(r"^(?:global|install)\.find-links=(.+)$", printed, re.MULTILINE):
        with contextlib.suppress(ValueError, SyntaxError):
            # pip prints the value as Python would; line ends or blanks separate several places.
            places += str(ast.literal_eval(value)).split()
    return places


# From an index; from a wheel file, as `inv fix-triton --from-source` installs it; from a source
# tree that remains its place.
Origin = Literal["index", "file", "editable"]


@dataclass(frozen=True)
class Installed:
    """A Triton.

    `place` is the file or tree that it came from, empty for an index; `package` is its folder
    `triton`, None where that is missing.
    """

    version: str
    origin: Origin
    place: str
    package: Path | None

    @property
    def is_meant(self) -> bool:
        """Return whether a person installed it on purpose; an index serves dependencies."""
        return self.origin != "index"

    @property
    def bin(self) -> Path | None:
        """Return the folder of its assemblers; None where it has none."""
        folder = self.package / "backends" / "nvidia" / "bin" if self.package else None
        return folder if folder and folder.is_dir() else None


def observe_triton(layout: Layout, packages: Mapping[str, str]) -> Installed | None:
    """Return the Triton among the packages of `.vllm`, None without one."""
    version = packages.get("triton")
    if version is None:
        return None
    for folder in interpreter.site_packages(layout):
        described = folder / f"triton-{version}.dist-info"
        if described.is_dir():
            origin, place = origin_of(described)
            # Triton's layouts: the package is below python/, or at the root of the tree.
            roots = (Path(place) / "python", Path(place)) if origin == "editable" else (folder,)
            package = next(
                (root / "triton" for root in roots if (root / "triton" / "__init__.py").is_file()),
                None,
            )
            return Installed(version, origin, place, package)
    return Installed(version, "index", "", None)


def paired_triton(layout: Layout, packages: Mapping[str, str]) -> str | None:
    """Return the versions of Triton that the installed torch requires, such as `==3.7.1`.

    Empty for any version; None where torch requires no Triton, as a CPU build.
    """
    if "torch" not in packages:
        return None
    return requirements_of(layout, "torch", packages).get("triton")


def kept_triton(layout: Layout) -> tuple[str, ...]:
    """Return the override that keeps a Triton installed on purpose, whatever torch requires.

    Nothing for a Triton from an index.
    """
    there = observe_triton(layout, interpreter.installed(layout))
    return (f"triton=={there.version}",) if there and there.is_meant else ()


@dataclass(frozen=True)
class _DirectUrl:
    """What is read here of direct_url.json."""

    url: str
    dir_info: Mapping[str, object] = field(default_factory=dict)


def origin_of(described: Path) -> tuple[Origin, str]:
    """Return the origin of a package from an installer's notes (PEP 610)."""
    with contextlib.suppress(ValueError):
        if noted := records.load(described / "direct_url.json", _DirectUrl):
            place = unquote(urlsplit(noted.url).path)
            return ("editable" if noted.dir_info.get("editable") else "file"), place
    return "index", ""
