"""Inputs of a configure: the settings, compilers and versions that a build directory depends on;
the parts that a small toolkit lacks; and the sources of external projects, fetched once for all
clones or replaced by a placeholder.

A fetched project is in the cache as name/tag, complete or not at all. The tree's `.deps` is never
used: upstream's own files reuse one if a single file of it exists, whatever its tag
(vllm-project/vllm#51112).
"""

import hashlib
import json
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.compile import externals, ninja
from workspace.compile.externals import External
from workspace.compile.project import Device
from workspace.core import files, hints, lock, process
from workspace.core.console import RunLog, Step
from workspace.core.errors import SettingsError, SourceError
from workspace.core.files import write_atomic
from workspace.core.known_settings import is_secret
from workspace.core.paths import Layout, typed
from workspace.core.settings import Settings
from workspace.machine import interpreter
from workspace.machine.machine import Machine
from workspace.machine.torch import TorchBuild
from workspace.repo.git import remotes
from workspace.repo.pins import Pin

# The default of setup.py's cmake_build_ext.configure.
BUILD_TYPE = "RelWithDebInfo"
KEY_DIGITS = 12
_KEYED = ("device", "place", "pin", "archs", "torch", "cuda", "compiler")
# Compilers read these variables, and no command contains them, so ninja cannot compare them.
_READ_BY_COMPILERS = (
    "CPATH",
    "C_INCLUDE_PATH",
    "CPLUS_INCLUDE_PATH",
    "LIBRARY_PATH",
    "NVCC_PREPEND_FLAGS",
    "NVCC_APPEND_FLAGS",
    "CUDAHOSTCXX",
    "NVCC_CCBIN",
)
# cmake-env-variables(7): they become variables of the first configure.
_READ_BY_CMAKE = (
    "CC",
    "CXX",
    "CUDACXX",
    "CFLAGS",
    "CXXFLAGS",
    "CUDAFLAGS",
    "CUDAARCHS",
    "LDFLAGS",
    "CMAKE_PREFIX_PATH",
    "VERBOSE",
    "DEEPGEMM_PYTHON_INTERPRETERS",
)
_READ_BY_TREE = re.compile(r"\$?ENV\{(\w+)\}")
# The tree's files only extend these for a helper that they run; overrides of external projects are
# part of the sources.
_NOT_INPUTS = re.compile(
    r"PATH|HOME|PYTHONPATH|LD_LIBRARY_PATH|\w+_(SRC|ROOT)_DIR|FETCHCONTENT_\w+"
)


@dataclass(frozen=True)
class Inputs:
    """Inputs of a configure. `place` is the checkout; `archs` and `cuda` are empty for the CPU. The
    key does not include `configure`.
    """

    device: Device
    place: str
    pin: str
    archs: str
    torch: str
    cuda: str
    compiler: str
    build_type: str
    configure: Mapping[str, str]

    @property
    def key(self) -> str:
        values = [getattr(self, name) for name in (*_KEYED, "build_type")]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:KEY_DIGITS]

    @property
    def named(self) -> Mapping[str, str]:
        """All inputs by name, as a record keeps them."""
        own = {name: str(getattr(self, name)) for name in _KEYED}
        return {**own, "build type": self.build_type, **self.configure}

    def differences(self, recorded: Mapping[str, str]) -> tuple[str, ...]:
        """Return the differences to inputs recorded by `named`: `torch 2.13.0 → 2.14.0`."""
        return files.differences(recorded, {**dict.fromkeys(recorded, ""), **self.named})


def observe(machine: Machine, *, device: Device, pin: Pin, torch: TorchBuild) -> Inputs:
    """Return the inputs of a build for `device`. Starts the compilers, but no Python."""
    layout, settings = machine.layout, machine.settings
    environment = settings.child_environment("build")
    toolkit = machine.toolkit() if device == "cuda" else None
    unseen = [f"{name}={environment[name]}" for name in _READ_BY_COMPILERS if environment.get(name)]
    compiler = f"{_compiler(environment)} {machine.compiler_version() or 'none'}"
    of_cuda = {
        "NVCC_THREADS": settings.text("NVCC_THREADS") or "1",
        "CUDA_HOME": str(toolkit.home) if toolkit else "",
    }
    return Inputs(
        device=device,
        place=str(layout.vllm),
        pin=f"{pin.tag} {pin.commit[:12]}",
        archs=settings.text("TORCH_CUDA_ARCH_LIST") if device == "cuda" else "",
        torch=torch.version,
        cuda=(toolkit.version if toolkit else "none") if device == "cuda" else "",
        compiler=" ".join([compiler, *unseen]),
        build_type=settings.text("CMAKE_BUILD_TYPE") or BUILD_TYPE,
        configure=_configure_inputs(machine, environment, of_cuda if device == "cuda" else {}),
    )


def _configure_inputs(
    machine: Machine, environment: Mapping[str, str], of_cuda: Mapping[str, str]
) -> dict[str, str]:
    """Return the inputs that only a configure depends on, by name."""
    layout, settings, installed = machine.layout, machine.settings, machine.packages()
    # The folder of the launcher is in the build directory, and so no input.
    launchers = ninja.launchers(settings, Path("ticket"))
    variables = {
        *_READ_BY_CMAKE,
        *(name for name in _environment_variables(layout.vllm) if not _NOT_INPUTS.fullmatch(name)),
    }
    return {
        "CMAKE_ARGS": settings.text("CMAKE_ARGS"),
        "CMake": installed.get("cmake", "on PATH"),
        "ninja": installed.get("ninja", "on PATH"),
        "Python": " ".join(str(folder) for folder in interpreter.site_packages(layout)),
        "launchers": " ".join(f"{name}={command}" for name, command in launchers.items()),
        **of_cuda,
        **{
            name: environment[name]
            for name in sorted(variables)
            if environment.get(name) and not is_secret(name)
        },
    }


def folder(layout: Layout, inputs: Inputs) -> Path:
    """Return the build directory for these inputs; see Layout.builds."""
    return layout.builds / f"{inputs.device}-{inputs.key}"


def _compiler(environment: Mapping[str, str]) -> str:
    try:
        return Path(shlex.split(environment.get("CXX") or "g++")[0]).name
    except (ValueError, IndexError):
        return environment["CXX"]


def _environment_variables(tree: Path) -> frozenset[str]:
    """Return the environment variables that the tree's CMake files read."""
    texts = (
        path.read_text(encoding="utf-8", errors="replace")
        for path in externals.cmake_files(tree)
        if path.name == "CMakeLists.txt" or path.suffix == ".cmake"
    )
    return frozenset(name for text in texts for name in _READ_BY_TREE.findall(text))


PLACEHOLDERS = "placeholders"
# This text is in every file of a placeholder, and in files that a configure makes from one.
MARK = "stands in for a file of an external project that was not fetched"
# Libraries of a project that no target of the tree is named after.
_LIBRARIES = {"onednn": ("dnnl",)}
_ABSENT = (
    re.compile(r"Cannot find source file:\s+(?P<path>/\S+)"),
    re.compile(r"failed to open for reading \([^)]*\):\s+(?P<path>/\S+)"),
    re.compile(
        r"(?:given source|source directory|include path)\s+\"?(?P<path>/[^\s\"]+)\"? (?:which is"
        r" not an existing|which does not exist)"
    ),
)


def complete_placeholder(root: Path, output: str) -> tuple[Path, ...]:
    """Create the files below `root`, the folder of all placeholders, that the output of a configure
    names as missing, and return them.
    """
    missing = (
        Path(found["path"].rstrip(".")) for pattern in _ABSENT for found in pattern.finditer(output)
    )
    absent = tuple(
        dict.fromkeys(
            path
            for path in missing
            if path.is_relative_to(root) and ".." not in path.parts and not path.exists()
        )
    )
    for path in absent:
        _write(path, _refusal(path, "/".join(path.relative_to(root).parts[:2])))
    return absent


def shown_source(folder: str | None) -> str:
    """Return a folder of sources as shown to the user."""
    return (
        "nothing"
        if not folder
        else "a placeholder"
        if PLACEHOLDERS in Path(folder).parts
        else folder
    )


def _placeholder_cmake(external: External) -> str:
    name, tag, prefix = external.name, external.tag, external.name.upper()
    here = "${CMAKE_CURRENT_SOURCE_DIR}"
    places = {
        "DIR": here,
        "INCLUDE_DIR": f"{here}/include",
        "TOOLS_UTIL_INCLUDE_DIR": f"{here}/tools/util/include",
    }
    lines = [
        f"# Stands in for {name} {tag}: nothing that is built here needs it.",
        "cmake_minimum_required(VERSION 3.20)",
        "project(placeholder NONE)",
        "if(PROJECT_IS_TOP_LEVEL)",
        "  return()",
        "endif()",
        # Not into the cache, as the project itself does: a later configure would find them there.
        *(f'set({prefix}_{suffix} "{place}" PARENT_SCOPE)' for suffix, place in places.items()),
        *(f"add_library({library} INTERFACE)" for library in _LIBRARIES.get(name.lower(), ())),
    ]
    for target in external.defines:
        message = f"{target} needs {name} {tag}, which was not fetched"
        lines.append(
            f'add_custom_target({target} COMMAND "${{CMAKE_COMMAND}}" -E echo "{message}" COMMAND'
            ' "${CMAKE_COMMAND}" -E false VERBATIM)'
        )
    return "\n".join(lines) + "\n"


def _refusal(path: Path, of: str) -> str:
    if path.suffix in (".py", ".txt", ".cmake", ".md"):
        return f"# {of}: {MARK}\n"
    return f'#error "{of}: {MARK}"\n'


def _write(path: Path, text: str) -> None:
    try:
        if path.read_text(encoding="utf-8") == text:
            return
    except (OSError, ValueError):
        pass
    write_atomic(path, text.encode())


_COMMIT = re.compile(r"[0-9a-f]{40}")


def provide(
    layout: Layout,
    settings: Settings,
    wanted: Collection[External],
    others: Collection[External],
    *,
    run_log: RunLog,
    step: Step,
) -> Mapping[str, str]:
    """Provide the sources of all projects, and return a folder by variable for configure: the
    user's own, else fetched if `wanted`, else a placeholder.

    Raises SettingsError for an override without a folder, SourceError if a fetch fails; the cache
    then has no partial project.
    """
    given: dict[str, str] = {}
    for external in (*wanted, *others):
        own = _own(settings, external)
        if own:
            given |= own
        elif external in wanted:
            given[external.variable] = str(_fetched(settings, external, run_log=run_log, step=step))
        else:
            given[external.variable] = str(_placeholder(layout, external))
    return given


def _own(settings: Settings, external: External) -> Mapping[str, str]:
    """Return the user's own sources, from the environment, .env, or -D in CMAKE_ARGS."""
    environment = settings.child_environment("build")
    for name in dict.fromkeys((external.override, external.variable)):
        argument = re.findall(rf"-D{re.escape(name)}(?::\w+)?=(\S+)", settings.text("CMAKE_ARGS"))
        text = argument[-1] if argument else environment.get(name, "")
        if text:
            folder = typed(text)
            if not folder.is_dir():
                raise SettingsError(
                    f"{name}={settings.presentable(text)}: the folder does not exist",
                    hint=hints.text("compile.unset_override", variable=name, project=external.name),
                )
            return {name: str(folder)}
    return {}


def _fetched(settings: Settings, external: External, *, run_log: RunLog, step: Step) -> Path:
    place = settings.cache / "externals" / external.name.lower() / external.tag.replace("/", "_")
    if _is_fetched(place, external):
        return place
    # If two clones need it at once, one fetches and the other waits.
    with lock.hold(
        place.with_name(f".{place.name}.lock"),
        verb=f"fetching {external.name}",
        wait=True,
        on_wait=step.line,
    ):
        if place.exists() and not _is_fetched(place, external):
            message = (
                f"{place} is at {(_checked_out(place) or 'no commit')[:12]}, not at"
                f" {external.tag[:12]}: it is not used"
            )
            raise SourceError(message, hint=hints.text("compile.delete_external", folder=place))
        if not place.exists():
            with files.folder_beside(place) as made:
                commit = _clone(made, settings, external, run_log=run_log, step=step)
                if _COMMIT.fullmatch(external.tag) and commit != external.tag:
                    raise SourceError(
                        f"{external.name}: {external.repository} served {commit[:12]} instead of"
                        f" {external.tag[:12]}"
                    )
                files.put_in_place(made, place)
    return place


def _clone(
    made: Path, settings: Settings, external: External, *, run_log: RunLog, step: Step
) -> str:
    mirror = settings.text("EXTERNALS_MIRROR")
    try:
        return remotes.clone_shallow(
            made,
            external.repository,
            external.tag,
            submodules=external.submodules,
            mirror=mirror,
            settings=settings,
            run_log=run_log,
            on_line=lambda line: step.line(f"{external.name}: {line}"),
        )
    except SourceError as exc:
        place = f"{external.repository} in EXTERNALS_MIRROR" if mirror else external.repository
        hint = hints.text("compile.network_or_mirror", variable=external.override)
        raise SourceError(
            f"{external.name} {external.tag[:12]} could not be fetched from {place}: {exc.message}",
            hint=hint,
            details=exc.details,
        ) from exc


def _is_fetched(place: Path, external: External) -> bool:
    """Return whether the cache has the project; a tag that is a commit must be its HEAD."""
    there = _checked_out(place)
    return there is not None and (not _COMMIT.fullmatch(external.tag) or there == external.tag)


def _checked_out(folder: Path) -> str | None:
    """Return the commit of a detached HEAD, read without git: every build reads it for every
    project.
    """
    try:
        text = (folder / ".git" / "HEAD").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return text if _COMMIT.fullmatch(text) else None


def _placeholder(layout: Layout, external: External) -> Path:
    """Create the missing files of a placeholder; up-to-date files are not touched."""
    name, tag = external.name, external.tag
    place = layout.builds / PLACEHOLDERS / name.lower() / tag.replace("/", "_")
    _write(place / "CMakeLists.txt", _placeholder_cmake(external))
    for file in external.files:
        _write(place / file, _refusal(place / file, f"{name} {tag}"))
    return place


# Folders in which a linker and CMake's FindCUDAToolkit search the driver's library: below a toolkit
# and in the system.
_TOOLKIT_LIBRARIES = (
    "lib64",
    "lib64/stubs",
    "lib",
    "lib/stubs",
    "targets/*/lib",
    "targets/*/lib/stubs",
    "compat",
)
# A declaration in the preprocessed cuda.h, with the renamed functions (cuMemFree is cuMemFree_v2).
_FUNCTION = re.compile(r"^\s*CUresult\s+(cu[A-Z]\w*)\s*\(", re.MULTILINE)
_SYSTEM_LIBRARIES = (
    "/usr/lib/*",
    "/usr/lib64",
    "/usr/lib/*/nvidia/current",
    "/usr/local/lib",
    "/lib/*",
)


def toolkit_arguments(machine: Machine, build: Path, *, run_log: RunLog) -> tuple[str, ...]:
    """Return CMake arguments for the parts that the toolkit lacks. On a machine without a driver,
    build a stub of its library in `build`.
    """
    toolkit = machine.toolkit()
    if toolkit is None:
        return ()
    wheels = [
        folder
        for top in interpreter.site_packages(machine.layout)
        for folder in sorted((top / "nvidia").glob("*"))
        if folder.is_dir()
    ]
    found = [*_header_arguments(toolkit.home, wheels)]
    runtime = next(
        (path for folder in wheels for path in sorted((folder / "lib").glob("libnvrtc.so*"))), None
    )
    if runtime and not any(_libraries(toolkit.home, "libnvrtc.so")):
        found.append(f"-DCUDA_nvrtc_LIBRARY={runtime}")
    if not any(_libraries(toolkit.home, "libcuda.so")) and not any(_system("libcuda.so")):
        stub = _stub(machine.settings, toolkit.home, build, run_log=run_log)
        found.append(f"-DCUDA_cuda_driver_LIBRARY={stub}")
    return tuple(found)


def _header_arguments(home: Path, wheels: Sequence[Path]) -> Iterator[str]:
    """Yield arguments for the headers of a wheel if the toolkit at `home` has no cuBLAS."""
    include = next(
        (folder / "include" for folder in wheels if (folder / "include" / "cublas_v2.h").is_file()),
        None,
    )
    places = ("include", "targets/x86_64-linux/include", "targets/sbsa-linux/include")
    if include and not any((home / place / "cublas_v2.h").is_file() for place in places):
        # CMake adds these folders after all others, so the toolkit's own headers come first.
        for language in ("CXX", "CUDA"):
            yield f"-DCMAKE_{language}_STANDARD_INCLUDE_DIRECTORIES={include}"


def _libraries(home: Path, name: str) -> Iterator[Path]:
    return (path for place in _TOOLKIT_LIBRARIES for path in home.glob(f"{place}/{name}"))


def _system(name: str) -> Iterator[Path]:
    return (path for place in _SYSTEM_LIBRARIES for path in Path("/").glob(f"{place[1:]}/{name}"))


def _stub(settings: Settings, home: Path, build: Path, *, run_log: RunLog) -> Path:
    """Build a library with the driver's name and the functions of the toolkit's cuda.h, to link
    against: the real one comes with the driver.

    Without the functions, a linker with --as-needed would drop the library, and the result could
    not be loaded.
    """
    stub = build / "stub" / "libcuda.so"
    source = stub.with_suffix(".c")
    if not stub.is_file():
        stub.parent.mkdir(parents=True, exist_ok=True)
        environment = settings.child_environment("build")
        preprocessed = process.capture(
            ["cc", "-E", "-P", home / "include" / "cuda.h"], env=environment
        )
        names = sorted(set(_FUNCTION.findall(preprocessed.stdout)))
        write_atomic(
            source, "".join(f"int {name}(void) {{ return 999; }}\n" for name in names).encode()
        )
        process.run(
            ["cc", "-shared", "-fPIC", "-nostdlib", "-Wl,-soname,libcuda.so.1", "-o", stub, source],
            env=environment,
            run_log=run_log,
        )
    return stub
