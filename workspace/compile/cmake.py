"""Configure step: run CMake in a build directory, once for each change of its inputs.

Every configure starts without a cache, so that only its inputs count; only objects stay. A file
that it writes again with the same content keeps its time, because ninja would compile it again.
"""

import contextlib
import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace.compile import cmake_inputs, externals, ninja, project, tree_files
from workspace.compile.cmake_inputs import Inputs, folder
from workspace.compile.project import Project
from workspace.compile.tree_files import State
from workspace.core import hints, process, records
from workspace.core.console import RunLog
from workspace.core.errors import BuildError
from workspace.core.files import read_regular, write_atomic
from workspace.core.settings import Settings
from workspace.machine import interpreter
from workspace.machine.machine import Machine

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


# Each try finds at least one more missing file of a placeholder; the tree's CMake files name most
# of them before.
MOST_TRIES = 12
# Of CMake's error in a message.
LONGEST = 400
NINJA_FILE = "build.ninja"
# CMake's messages about kernels, then about external projects, that it does not build.
_NOT_BUILT = re.compile(
    r"^(?:-- )?(Not building .*|\S+ will not compile\b.*|\[\w+\] Skipping build\b.*)$"
)
# vLLM's CMakeLists.txt names so the output of its generators of sources.
_LOG_OF_GENERATOR = re.compile(r"Check the log for details: (\S+)")
_ERROR = re.compile(r"^CMake Error(?: at (\S+?:\d+)(?: \(\w+\))?)?:", re.MULTILINE)


@dataclass(frozen=True)
class Record(records.Record, schema=1):
    """Record of a configure: its inputs, the sources it wrote into the tree, and its messages."""

    inputs: Mapping[str, str]
    sources: Mapping[str, str]
    # Files that a configure reads: CMake files, patches and generators; relative to the tree if
    # they are in it.
    read: Mapping[str, State]
    written: Mapping[str, State]
    globs: Mapping[str, Sequence[str]]
    ninja: State
    not_built: Sequence[str]


def due(build: Path, inputs: Inputs, sources: Mapping[str, str]) -> str | None:
    """Return why `build` has to be configured, or None if no input of a configure has changed.
    Writes no file.
    """
    record = records.read(build / project.RECORD, Record)
    if record is None:
        return (
            "its record cannot be read"
            if (build / project.RECORD).exists()
            else "it is not configured yet"
        )
    tree = Path(inputs.place)
    reasons = [
        *inputs.differences(record.inputs),
        *(
            _moved(name, record.sources, sources)
            for name in sorted({*record.sources, *sources})
            if record.sources.get(name) != sources.get(name)
        ),
        *_changed(tree, record.read),
        *(
            f"{path}, which a configure wrote, was changed or deleted"
            for path, was in record.written.items()
            if not tree_files.is_unchanged(tree, path, was)
        ),
        *(
            f"{pattern} matches other files"
            for pattern, names in record.globs.items()
            if tree_files.matches(tree, pattern) != list(names)
        ),
    ]
    if not reasons and not tree_files.is_unchanged(build, NINJA_FILE, record.ninja):
        reasons.append(f"{NINJA_FILE} was changed after the configure")
    if not reasons:
        return None
    return reasons[0] + (f" and {len(reasons) - 1} more" if len(reasons) > 1 else "")


def configure(
    machine: Machine,
    inputs: Inputs,
    sources: Mapping[str, str],
    *,
    launcher: Path,
    run_log: RunLog,
) -> Project:
    """Return what CMake would build of the tree at `inputs.place`; configure it first if it is due.

    Raises BuildError with CMake's first error; then existing objects stay, and there is no record.
    """
    layout = machine.layout
    setup = _Setup(machine, inputs, sources, folder(layout, inputs), launcher)
    build, tree = setup.build, setup.tree
    reason = due(build, inputs, sources)
    if reason is None and (known := project.read(build, tree)):
        return known
    run_log.write(f"configure: {reason or 'the reply of CMake cannot be read'}")
    former = records.read(build / project.RECORD, Record)
    _begin(build)
    read = tree_files.states(tree, tree_files.configure_files(tree))
    output, renewed = _run_and_restore(setup, former, run_log)
    below = (_below(tree, path) for path in project.files(build) if not path.is_relative_to(build))
    patterns = tree_files.glob_patterns(tree, inputs.device)
    record = Record(
        inputs=inputs.named,
        sources=dict(sources),
        read=tree_files.states(tree, below) | read,
        written=renewed,
        globs={pattern: tree_files.matches(tree, pattern) for pattern in patterns},
        ninja=tree_files.states(build, [NINJA_FILE])[NINJA_FILE],
        not_built=[found[1] for line in output.splitlines() if (found := _NOT_BUILT.match(line))],
    )
    records.write(build / project.RECORD, record, indent=None)
    made = project.read(build, tree)
    if made is None:
        (build / project.RECORD).unlink()
        raise BuildError(
            f"CMake configured {layout.relative(build)}, but its reply about the targets cannot be"
            " read",
            hint=hints.text("compile.doctor_cmake"),
        )
    return made


@dataclass(frozen=True)
class _Setup:
    """Setup of a configure: machine, inputs, sources, build directory and compiler launcher."""

    machine: Machine
    inputs: Inputs
    sources: Mapping[str, str]
    build: Path
    launcher: Path

    @property
    def tree(self) -> Path:
        return Path(self.inputs.place)


def _run_and_restore(
    setup: _Setup, former: Record | None, run_log: RunLog
) -> tuple[str, dict[str, State]]:
    """Run CMake; then restore the times of files with the same content, and the files of the
    package that come from placeholders. Return CMake's output and the sources that it wrote.
    """
    build, tree = setup.build, setup.tree
    folders = tree_files.package_folders(tree, setup.inputs.device)
    scratch = (
        setup.machine.layout.builds / "kept" / hashlib.sha256(str(tree).encode()).hexdigest()[:12]
    )
    tree_files.bring_back(tree, folders, scratch)
    tree_files.keep(tree, folders, scratch)
    before = tree_files.states(tree, tree_files.sources(tree))
    headers = tree_files.states(build, tree_files.headers(build))
    try:
        output = _run(setup, run_log)
    finally:
        tree_files.give_back_times(
            build, tree_files.states(build, tree_files.headers(build)), [headers]
        )
        renewed = tree_files.renewed(before, tree_files.states(tree, tree_files.sources(tree)))
        renewed = tree_files.give_back_times(
            tree, renewed, [former.written if former else {}, before]
        )
        tree_files.bring_back(tree, folders, scratch)
    return output, renewed


def _arguments(setup: _Setup) -> tuple[str, ...]:
    """Return CMake's arguments, as in setup.py's cmake_build_ext.configure, but without job pools:
    the job server bounds the compilers.
    """
    layout, settings, inputs = setup.machine.layout, setup.machine.settings, setup.inputs
    defined = {
        "CMAKE_BUILD_TYPE": inputs.build_type,
        "VLLM_TARGET_DEVICE": inputs.device,
        "VLLM_PYTHON_EXECUTABLE": str(layout.environment_python),
        "VLLM_PYTHON_PATH": ":".join(str(path) for path in interpreter.site_packages(layout)),
        "FETCHCONTENT_BASE_DIR": str(setup.build / "_deps"),
        **ninja.launchers(settings, setup.launcher),
        # `due` compares sources and CMake files; ninja would run CMake for a file that was only
        # touched.
        "CMAKE_SUPPRESS_REGENERATION": "ON",
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
        **{name: text for name, text in setup.sources.items() if name.startswith("FETCHCONTENT_")},
    }
    defined |= dict(_skipped_generators(setup.tree, inputs.device, setup.sources))
    if settings.child_environment("build").get("VERBOSE", "0") not in ("", "0"):
        defined["CMAKE_VERBOSE_MAKEFILE"] = "ON"
    if inputs.device == "cuda":
        defined["NVCC_THREADS"] = inputs.configure["NVCC_THREADS"]
        if toolkit := setup.machine.toolkit():
            # The toolkit's own folder, whichever script or link to nvcc is first on PATH.
            defined |= {
                "CMAKE_CUDA_COMPILER": str(toolkit.nvcc),
                "CUDA_TOOLKIT_ROOT_DIR": str(toolkit.home),
            }
    return ("-G", "Ninja", *(f"-D{name}={text}" for name, text in defined.items()))


def _run(setup: _Setup, run_log: RunLog) -> str:
    """Run CMake, again with each missing placeholder file that it names; return its output."""
    layout, settings, inputs = setup.machine.layout, setup.machine.settings, setup.inputs
    overrides = {name: place for name, place in setup.sources.items() if name.isidentifier()}
    environment = settings.child_environment(
        "configure", {"VLLM_TARGET_DEVICE": inputs.device, **overrides}, layout=layout
    )
    argv: list[process.Argument] = ["cmake", "-S", inputs.place, "-B", setup.build]
    argv += _arguments(setup)
    if inputs.device == "cuda":
        argv += toolkit_arguments(setup.machine, setup.build, run_log=run_log)
    # The user's own arguments come last and win, as in setup.py.
    argv += settings.text("CMAKE_ARGS").split()
    for count in range(1, MOST_TRIES + 1):
        lines: list[str] = []
        try:
            process.run(argv, env=environment, run_log=run_log, on_line=lines.append)
            return "\n".join(lines)
        except BuildError as exc:
            output = "\n".join(lines)
            absent = externals.complete_placeholder(layout.builds / externals.PLACEHOLDERS, output)
            if not absent or count == MOST_TRIES:
                error = _first_error(output)
                about = _external_error(setup, error) if error else None
                shown = error[:LONGEST] if error else exc.message
                message, hint = about or ("the tree cannot be configured", _hint(output))
                raise BuildError(f"{message}: {shown}", hint=hint, details=exc.details) from exc
            run_log.write(f"created in placeholders: {', '.join(map(str, absent))}")
    raise AssertionError


def _first_error(output: str) -> str | None:
    """Return CMake's first error in one line, with its place: the text follows the heading,
    indented, up to two empty lines or a call stack. The error of a generator of sources stands in
    the log that the text names, and comes first.
    """
    found = _ERROR.search(output)
    if found is None:
        return None
    lines: list[str] = []
    for line in output[found.end() :].splitlines():
        if lines and ((line and not line.startswith(" ")) or line.startswith("Call Stack")):
            break
        if line.strip():
            lines.append(line.strip())
    error = " ".join(lines) + (f" ({found[1]})" if found[1] else "")
    if log := _LOG_OF_GENERATOR.search(error):
        with contextlib.suppress(OSError):
            last = read_regular(Path(log[1])).decode(errors="replace").strip().rpartition("\n")[2]
            error = f"{last}; {error}" if last else error
    return error


def _external_error(setup: _Setup, error: str) -> tuple[str, str] | None:
    """Return a message that names the external project whose folder CMake's error is about, with
    the variable that sets another folder, and a hint; None for any other error. It is about the
    folder that it names, or that lacks a Python module with the project's name.
    """
    without = re.search(r"No module named '([^']+)'", error)
    for external in externals.declared(setup.tree, setup.inputs.device):
        for variable in dict.fromkeys((external.override, external.variable)):
            folder = setup.sources.get(variable)
            is_lacking = without is not None and external.name.lower() in without[1].lower()
            if not folder or not (
                is_lacking or re.search(rf"{re.escape(folder)}(?![\w.-])", error)
            ):
                continue
            project = f"{external.name} {external.tag[:12]}"
            if Path(folder).is_relative_to(setup.machine.settings.cache / "externals"):
                hint = hints.text("compile.delete_external", folder=folder)
            elif externals.PLACEHOLDERS in Path(folder).parts:
                hint = hints.text(
                    "compile.override_external", variable=external.override, project=project
                )
            else:
                hint = hints.text(
                    "compile.unset_external", variable=variable, project=project, folder=folder
                )
            place = externals.shown_source(folder)
            return f"cannot configure with {external.name} from {place} ({external.override})", hint
    return None


def _hint(output: str) -> str:
    if re.search(r"CMAKE_\w+_COMPILER|nvcc|GCC|g\+\+", output):
        return hints.text("compile.doctor_compilers")
    return hints.text("compile.check_place")


def _begin(build: Path) -> None:
    """Remove all results of an earlier configure except objects: CMake would trust a half-written
    cache, compiler check or reply.
    """
    build.mkdir(parents=True, exist_ok=True)
    (build / project.RECORD).unlink(missing_ok=True)
    (build / "CMakeCache.txt").unlink(missing_ok=True)
    for old in (build / "CMakeFiles").glob("*"):
        if old.is_dir() and not old.is_symlink():
            if old.suffix != ".dir":
                shutil.rmtree(old)
        else:
            old.unlink()
    shutil.rmtree(build / ".cmake", ignore_errors=True)
    for begun in build.rglob("*.tmp*"):
        # cmGeneratedFileStream names unfinished files so.
        if re.fullmatch(r"\.tmp[0-9a-f]{5}", begun.suffix) and begun.is_file():
            begun.unlink()
    project.write_query(build)


def _moved(name: str, recorded: Mapping[str, str], sources: Mapping[str, str]) -> str:
    was, is_now = (externals.shown_source(side.get(name)) for side in (recorded, sources))
    return f"{name} {was} → {is_now}"


def _changed(tree: Path, read: Mapping[str, State]) -> Iterator[str]:
    for path in dict.fromkeys((*read, *tree_files.configure_files(tree))):
        if not tree_files.is_unchanged(tree, path, read.get(path)):
            yield f"{path} {'changed' if path in read else 'is new'}"


def _skipped_generators(
    tree: Path, device: str, sources: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Yield the variable and the hash by which the tree's files skip a generator that has run, for
    each generator that imports a file of a placeholder: no unit needs its output.

    Machete's needs CUTLASS's Python part.
    """
    absent = [
        f"${{{Path(place).parent.name}_".lower()
        for place in sources.values()
        if externals.PLACEHOLDERS in Path(place).parts
    ]
    scripts: dict[str, tuple[str, str]] = {}
    for step in cmake_inputs.walk(tree, device) if absent else ():
        args = step.command.args
        if step.command.name == "file" and len(args) == 3 and args[0] == "MD5":
            scripts[args[1]] = args[2], cmake_inputs.without_top(step.resolved(args[1]))
        if step.command.name == "execute_process" and any(
            name in argument.lower() for argument in args for name in absent
        ):
            for variable, script in (scripts[argument] for argument in args if argument in scripts):
                yield (
                    variable,
                    hashlib.md5(read_regular(tree / script), usedforsecurity=False).hexdigest(),
                )


def _below(tree: Path, path: Path) -> str:
    return str(path.relative_to(tree)) if path.is_relative_to(tree) else str(path)
