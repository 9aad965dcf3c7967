"""Configure step: run CMake in a build directory, once for each change of its inputs.

Every configure starts without a cache, so that only its inputs count; only objects stay. A file
that it writes again with the same content keeps its time, because ninja would compile it again.
"""

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from workspace.compile import cmake_inputs, externals, ninja, project
from workspace.compile.cmake_inputs import MARK, Inputs, folder
from workspace.compile.project import Project
from workspace.core import hints, process, records
from workspace.core.console import RunLog
from workspace.core.errors import BuildError
from workspace.core.files import LARGEST_FILE, read_regular, write_atomic
from workspace.machine import interpreter
from workspace.machine.machine import Machine

# Size, time of the last change in ns, SHA-256.
State = tuple[int, int, str]
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
            if not is_unchanged(tree, path, was)
        ),
        *(
            f"{pattern} matches other files"
            for pattern, names in record.globs.items()
            if matches(tree, pattern) != list(names)
        ),
    ]
    if not reasons and not is_unchanged(build, NINJA_FILE, record.ninja):
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
    read = states(tree, configure_files(tree))
    output, written = _run_and_restore(setup, former, run_log)
    below = (_below(tree, path) for path in project.files(build) if not path.is_relative_to(build))
    patterns = externals.glob_patterns(tree, inputs.device)
    record = Record(
        inputs=inputs.named,
        sources=dict(sources),
        read=states(tree, below) | read,
        written=written,
        globs={pattern: matches(tree, pattern) for pattern in patterns},
        ninja=states(build, [NINJA_FILE])[NINJA_FILE],
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
    folders = externals.package_folders(tree, setup.inputs.device)
    scratch = (
        setup.machine.layout.builds / "kept" / hashlib.sha256(str(tree).encode()).hexdigest()[:12]
    )
    bring_back(tree, folders, scratch)
    keep(tree, folders, scratch)
    before = states(tree, sources(tree))
    before_headers = states(build, headers(build))
    try:
        output = _run(setup, run_log)
    finally:
        give_back_times(build, states(build, headers(build)), [before_headers])
        after = states(tree, sources(tree))
        written = give_back_times(
            tree, renewed(before, after), [former.written if former else {}, before]
        )
        bring_back(tree, folders, scratch)
    return output, written


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
        argv += cmake_inputs.toolkit_arguments(setup.machine, setup.build, run_log=run_log)
    # The user's own arguments come last and win, as in setup.py.
    argv += settings.text("CMAKE_ARGS").split()
    for count in range(1, MOST_TRIES + 1):
        lines: list[str] = []
        try:
            process.run(argv, env=environment, run_log=run_log, on_line=lines.append)
            return "\n".join(lines)
        except BuildError as exc:
            output = "\n".join(lines)
            placeholders = layout.builds / cmake_inputs.PLACEHOLDERS
            absent = cmake_inputs.complete_placeholder(placeholders, output)
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
            elif cmake_inputs.PLACEHOLDERS in Path(folder).parts:
                hint = hints.text(
                    "compile.override_external", variable=external.override, project=project
                )
            else:
                hint = hints.text(
                    "compile.unset_external", variable=variable, project=project, folder=folder
                )
            place = cmake_inputs.shown_source(folder)
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
    was, is_now = (cmake_inputs.shown_source(side.get(name)) for side in (recorded, sources))
    return f"{name} {was} → {is_now}"


def _changed(tree: Path, read: Mapping[str, State]) -> Iterator[str]:
    for path in dict.fromkeys((*read, *configure_files(tree))):
        if not is_unchanged(tree, path, read.get(path)):
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
        if cmake_inputs.PLACEHOLDERS in Path(place).parts
    ]
    scripts: dict[str, tuple[str, str]] = {}
    for step in externals.walk(tree, device) if absent else ():
        args = step.command.args
        if step.command.name == "file" and len(args) == 3 and args[0] == "MD5":
            scripts[args[1]] = args[2], externals.without_top(step.resolved(args[1]))
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


_HEADERS = (".h", ".hh", ".hpp", ".cuh", ".inc", ".c", ".cc", ".cpp", ".cu")


def states(root: Path, paths: Iterable[str]) -> dict[str, State]:
    """Return the states of these paths below `root`; paths that are no files are left out."""
    found = {}
    for path in paths:
        if (state := _state(root / path)) is not None:
            found[path] = state
    return found


def is_unchanged(root: Path, path: str, was: State | None) -> bool:
    """Return whether a file has its recorded state, or is absent as recorded. A touched file is
    hashed.
    """
    try:
        there = (root / path).stat()
    except OSError:
        return was is None
    if was is None or there.st_size != was[0]:
        return False
    return there.st_mtime_ns == was[1] or _digest(root / path) == was[2]


def headers(build: Path) -> Iterator[str]:
    """Yield the headers and sources that a configure writes into the build directory."""
    for top, folders, names in os.walk(build):
        folders[:] = [name for name in folders if name not in ("CMakeFiles", ".cmake", "_deps")]
        yield from (
            os.path.relpath(os.path.join(top, name), build)
            for name in names
            if name.endswith(_HEADERS)
        )


def renewed(before: Mapping[str, State], after: Mapping[str, State]) -> dict[str, State]:
    """Return the files that were written in between, with the same content or not."""
    return {path: state for path, state in after.items() if before.get(path) != state}


def give_back_times(
    root: Path, now: Mapping[str, State], former: Sequence[Mapping[str, State]]
) -> dict[str, State]:
    """Restore the former time of each file with its former content, so that objects compiled from
    it stay up to date. Return the new states.
    """
    result = dict(now)
    for path, state in now.items():
        time_ns = next(
            (known[path][1] for known in former if path in known and known[path][2] == state[2]),
            state[1],
        )
        if time_ns != state[1]:
            os.utime(root / path, ns=(time_ns, time_ns))
            result[path] = (state[0], time_ns, state[2])
    return result


def keep(tree: Path, folders: Iterable[str], scratch: Path) -> None:
    """Copy the files in these folders of the tree to `scratch`, from where `bring_back` restores
    them, if need be in a later run.
    """
    for place in folders:
        for path in sorted((tree / place).rglob("*")):
            if path.is_file() and not path.is_symlink() and MARK.encode() not in _content(path):
                write_atomic(scratch / path.relative_to(tree), path.read_bytes())
                shutil.copystat(path, scratch / path.relative_to(tree))


def bring_back(tree: Path, folders: Iterable[str], scratch: Path) -> None:
    """Undo what a configure wrote from placeholders into these folders of the tree."""
    for place in folders:
        for path in sorted((tree / place).rglob("*")):
            if path.is_file() and not path.is_symlink() and MARK.encode() in _content(path):
                former = scratch / path.relative_to(tree)
                if former.is_file():
                    write_atomic(path, former.read_bytes())
                    shutil.copystat(former, path)
                else:
                    path.unlink()
                    with contextlib.suppress(OSError):
                        path.parent.rmdir()
    shutil.rmtree(scratch, ignore_errors=True)


def _content(path: Path) -> bytes:
    return read_regular(path, most_bytes=LARGEST_FILE)


def _state(path: Path) -> State | None:
    try:
        there = path.stat()
        return (there.st_size, there.st_mtime_ns, _digest(path))
    except OSError:
        return None


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(_content(path)).hexdigest()
    except OSError:
        return ""


def configure_files(tree: Path) -> Iterator[str]:
    """Yield the files of the tree that a configure reads: CMake files, patches and generators. A
    generator may import others, so every Python file beside sources counts.
    """
    yield from (str(path.relative_to(tree)) for path in externals.cmake_files(tree))
    yield from sorted(
        path
        for path in sources(tree)
        if path.endswith((".py", ".cmake", ".in", ".jinja", ".j2", "/CMakeLists.txt"))
    )


def matches(tree: Path, pattern: str) -> list[str]:
    """Return the files of the tree that match a pattern, sorted."""
    return sorted(glob(pattern, root_dir=tree, recursive=True))


def sources(tree: Path) -> Iterator[str]:
    """Yield every file below csrc, where a configure writes generated sources."""
    for top, folders, names in os.walk(tree / "csrc"):
        folders[:] = [name for name in folders if name != "__pycache__"]
        yield from (os.path.relpath(os.path.join(top, name), tree) for name in names)
