"""Configuring: a build directory, told what to build with, once for each change of what that
depends on.

Every configure is a first one, so that nothing but its inputs counts; only objects stay. What it
writes again with the same content keeps its time, for ninja would compile it again.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from glob import glob
from pathlib import Path

from workspace.compile import cmake_inputs, externals, ninja, project, tree_files
from workspace.compile.cmake_inputs import Inputs, folder, listfiles
from workspace.compile.project import Project
from workspace.compile.tree_files import State
from workspace.core import process
from workspace.core.errors import BuildError
from workspace.core.files import read_regular, write_atomic
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine import interpreter, toolchain

# Where a linker and CMake's FindCUDAToolkit look for the driver's library, below a toolkit and in
# the system.
_TOOLKIT_LIBRARIES = (
    "lib64",
    "lib64/stubs",
    "lib",
    "lib/stubs",
    "targets/*/lib",
    "targets/*/lib/stubs",
    "compat",
)
# A declaration in cuda.h, once its renamings (cuMemFree is cuMemFree_v2) were carried out.
_FUNCTION = re.compile(r"^\s*CUresult\s+(cu[A-Z]\w*)\s*\(", re.MULTILINE)
_SYSTEM_LIBRARIES = (
    "/usr/lib/*",
    "/usr/lib64",
    "/usr/lib/*/nvidia/current",
    "/usr/local/lib",
    "/lib/*",
)


def toolkit_arguments(
    layout: Layout, settings: Settings, build: Path, *, run_log: RunLog
) -> tuple[str, ...]:
    """Return arguments for CMake that name what the toolkit lacks. On a machine without a driver a
    stub of its library is made in `build`.
    """
    toolkit = toolchain.find_toolkit(settings)
    if toolkit is None:
        return ()
    wheels = [
        folder
        for top in interpreter.site_packages(layout)
        for folder in sorted((top / "nvidia").glob("*"))
        if folder.is_dir()
    ]
    found: list[str] = []
    include = next(
        (folder / "include" for folder in wheels if (folder / "include" / "cublas_v2.h").is_file()),
        None,
    )
    if include and not any(
        (toolkit.home / place / "cublas_v2.h").is_file()
        for place in ("include", "targets/x86_64-linux/include", "targets/sbsa-linux/include")
    ):
        # Behind the toolkit's own; CMake adds them after all others.
        found += [
            f"-DCMAKE_{language}_STANDARD_INCLUDE_DIRECTORIES={include}"
            for language in ("CXX", "CUDA")
        ]
    runtime = next(
        (path for folder in wheels for path in sorted((folder / "lib").glob("libnvrtc.so*"))), None
    )
    if runtime and not any(_libraries(toolkit.home, "libnvrtc.so")):
        found.append(f"-DCUDA_nvrtc_LIBRARY={runtime}")
    if not any(_libraries(toolkit.home, "libcuda.so")) and not any(_system("libcuda.so")):
        found.append(
            f"-DCUDA_cuda_driver_LIBRARY={_stub(settings, toolkit.home, build, run_log=run_log)}"
        )
    return tuple(found)


def _libraries(home: Path, name: str) -> Iterator[Path]:
    return (path for place in _TOOLKIT_LIBRARIES for path in home.glob(f"{place}/{name}"))


def _system(name: str) -> Iterator[Path]:
    return (path for place in _SYSTEM_LIBRARIES for path in Path("/").glob(f"{place[1:]}/{name}"))


def _stub(settings: Settings, home: Path, build: Path, *, run_log: RunLog) -> Path:
    """A library of the driver's name to link against, with the functions of the toolkit's cuda.h:
    the real one comes with the driver.

    With none of them a linker that keeps only what is used (--as-needed) would leave it out, and
    what was linked would load nowhere.
    """
    stub = build / "stub" / "libcuda.so"
    source = stub.with_suffix(".c")
    if not stub.is_file():
        stub.parent.mkdir(parents=True, exist_ok=True)
        environment = settings.child_environment("build")
        said = process.capture(["cc", "-E", "-P", home / "include" / "cuda.h"], env=environment)
        names = sorted(set(_FUNCTION.findall(said.stdout)))
        write_atomic(
            source, "".join(f"int {name}(void) {{ return 999; }}\n" for name in names).encode()
        )
        process.run(
            ["cc", "-shared", "-fPIC", "-nostdlib", "-Wl,-soname,libcuda.so.1", "-o", stub, source],
            env=environment,
            run_log=run_log,
        )
    return stub


SCHEMA = 1
# Each try finds at least one more file of a placeholder missing; the tree's own words have named
# most of them before.
MOST_TRIES = 12
NINJA_FILE = "build.ninja"
# As it says of kernels, then of external projects.
_NOT_BUILT = re.compile(
    r"^(?:-- )?(Not building .*|\S+ will not compile\b.*|\[\w+\] Skipping build\b.*)$"
)
_FAULT = re.compile(r"^CMake Error(?: at (\S+?:\d+)(?: \(\w+\))?)?:", re.MULTILINE)
_IN_TREE = re.compile(r"\$\{CMAKE_(?:CURRENT_)?SOURCE_DIR\}/(vllm/[\w./-]+)")


@dataclass(frozen=True)
class Record:
    """What a configure was made from, what it wrote into the tree and what it said."""

    inputs: Mapping[str, str]
    sources: Mapping[str, str]
    # Below the tree where they lie there: CMake files, patches and generators that a configure
    # reads.
    read: Mapping[str, State]
    written: Mapping[str, State]
    globs: Mapping[str, Sequence[str]]
    ninja: State
    not_built: Sequence[str]


def due(build: Path, inputs: Inputs, sources: Mapping[str, str]) -> str | None:
    """Say why `build` has to be configured, None where nothing that a configure depends on changed.
    It touches nothing.
    """
    record = _recorded(build)
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
            f"{path}, which a configure wrote, is another or gone"
            for path, was in record.written.items()
            if not tree_files.is_as(tree, path, was)
        ),
        *(
            f"{pattern} finds other files"
            for pattern, names in record.globs.items()
            if _found(tree, pattern) != list(names)
        ),
    ]
    if not reasons and not tree_files.is_as(build, NINJA_FILE, record.ninja):
        reasons.append(f"{NINJA_FILE} is not as a configure left it")
    return (
        reasons[0] + (f" and {len(reasons) - 1} more" if len(reasons) > 1 else "")
        if reasons
        else None
    )


def configure(
    layout: Layout,
    settings: Settings,
    inputs: Inputs,
    sources: Mapping[str, str],
    *,
    ticket: Path,
    run_log: RunLog,
) -> Project:
    """Return what CMake would build of the tree at `inputs.place`, having configured where that is
    due.

    Raises BuildError with CMake's own sentence; objects that are there stay, and there is no record
    then.
    """
    build, tree = folder(layout, inputs), Path(inputs.place)
    reason = due(build, inputs, sources)
    if reason is None and (known := project.read(build, tree)):
        return known
    run_log.write(f"configure: {reason or 'what CMake said of it cannot be read'}")
    former = _recorded(build)
    _begin(build)
    folders, scratch = (
        _written_to(tree, inputs.device),
        layout.builds / "kept" / hashlib.sha256(str(tree).encode()).hexdigest()[:12],
    )
    tree_files.bring_back(tree, folders, scratch)
    tree_files.keep(tree, folders, scratch)
    read = tree_files.states(tree, _read_of(tree))
    before, own = (
        tree_files.states(tree, tree_files.sources(tree)),
        tree_files.states(build, tree_files.headers(build)),
    )
    try:
        said = _run(layout, settings, inputs, sources, build, ticket=ticket, run_log=run_log)
    finally:
        tree_files.give_back_times(
            build, tree_files.states(build, tree_files.headers(build)), [own]
        )
        renewed = tree_files.renewed(before, tree_files.states(tree, tree_files.sources(tree)))
        renewed = tree_files.give_back_times(
            tree, renewed, [former.written if former else {}, before]
        )
        tree_files.bring_back(tree, folders, scratch)
    below = (_below(tree, path) for path in project.files(build) if not path.is_relative_to(build))
    record = Record(
        inputs=inputs.named,
        sources=dict(sources),
        read=tree_files.states(tree, below) | read,
        written=renewed,
        globs={pattern: _found(tree, pattern) for pattern in _globs(tree, inputs.device)},
        ninja=tree_files.states(build, [NINJA_FILE])[NINJA_FILE],
        not_built=[found[1] for line in said.splitlines() if (found := _NOT_BUILT.match(line))],
    )
    write_atomic(build / project.RECORD, json.dumps({"schema": SCHEMA, **asdict(record)}).encode())
    made = project.read(build, tree)
    if made is None:
        (build / project.RECORD).unlink()
        raise BuildError(
            f"CMake configured {layout.relative(build)} and does not say what it would build",
            hint="./scripts/inv doctor    shows the CMake of .vllm",
        )
    return made


def arguments(
    layout: Layout,
    settings: Settings,
    inputs: Inputs,
    sources: Mapping[str, str],
    *,
    build: Path,
    ticket: Path,
) -> tuple[str, ...]:
    """Return what CMake is called with, as setup.py's cmake_build_ext.configure would; the job
    pools are missing, for the tickets bound compilers.
    """
    defined = {
        "CMAKE_BUILD_TYPE": inputs.build_type,
        "VLLM_TARGET_DEVICE": inputs.device,
        "VLLM_PYTHON_EXECUTABLE": str(layout.environment_python),
        "VLLM_PYTHON_PATH": ":".join(str(path) for path in interpreter.site_packages(layout)),
        "FETCHCONTENT_BASE_DIR": str(build / "_deps"),
        **ninja.launchers(settings, ticket),
        # Sources and CMake files are looked at before; ninja would run CMake by itself for one that
        # was only touched.
        "CMAKE_SUPPRESS_REGENERATION": "ON",
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
        **{name: place for name, place in sources.items() if name.startswith("FETCHCONTENT_")},
    }
    defined |= dict(_spared(Path(inputs.place), inputs.device, sources))
    if settings.child_environment("build").get("VERBOSE", "0") not in ("", "0"):
        defined["CMAKE_VERBOSE_MAKEFILE"] = "ON"
    if inputs.device == "cuda":
        defined["NVCC_THREADS"] = inputs.configure["NVCC_THREADS"]
        if toolkit := toolchain.find_toolkit(settings):
            # The toolkit's own folder, whatever script or link to nvcc comes first on PATH.
            defined |= {
                "CMAKE_CUDA_COMPILER": str(toolkit.nvcc),
                "CUDA_TOOLKIT_ROOT_DIR": str(toolkit.home),
            }
    return ("-G", "Ninja", *(f"-D{name}={text}" for name, text in defined.items()))


def _run(
    layout: Layout,
    settings: Settings,
    inputs: Inputs,
    sources: Mapping[str, str],
    build: Path,
    *,
    ticket: Path,
    run_log: RunLog,
) -> str:
    """Configure, with what placeholders turn out to lack made as it shows; return what CMake
    said.
    """
    words = [*arguments(layout, settings, inputs, sources, build=build, ticket=ticket)]
    words += (
        toolkit_arguments(layout, settings, build, run_log=run_log)
        if inputs.device == "cuda"
        else ()
    )
    path = os.pathsep.join(
        [str(layout.environment / "bin"), settings.child_environment("build").get("PATH", "")]
    )
    overrides = {name: place for name, place in sources.items() if name.isidentifier()}
    environment = settings.child_environment(
        "build", {"PATH": path, "VLLM_TARGET_DEVICE": inputs.device, **overrides}
    )
    # The user's own words come last and win, as setup.py has it.
    argv: list[process.Argument] = [
        "cmake",
        "-S",
        inputs.place,
        "-B",
        build,
        *words,
        *settings.text("CMAKE_ARGS").split(),
    ]
    for number in range(1, MOST_TRIES + 1):
        said: list[str] = []
        try:
            process.run(argv, env=environment, run_log=run_log, on_line=said.append)
            return "\n".join(said)
        except BuildError as exc:
            text = "\n".join(said)
            absent = externals.complete_placeholder(layout.builds / externals.PLACEHOLDERS, text)
            if not absent or number == MOST_TRIES:
                raise BuildError(
                    f"the tree cannot be configured: {_sentence(text) or exc.message}",
                    hint=_hint(text),
                    details=exc.details,
                ) from exc
            run_log.write(f"made for placeholders: {', '.join(map(str, absent))}")
    raise AssertionError


def _sentence(said: str) -> str | None:
    """CMake's first error in one line, with its place: the text follows the heading, indented, up
    to two empty lines or a call stack.
    """
    found = _FAULT.search(said)
    if found is None:
        return None
    lines: list[str] = []
    for line in said[found.end() :].splitlines():
        if lines and ((line and not line.startswith(" ")) or line.startswith("Call Stack")):
            break
        if line.strip():
            lines.append(line.strip())
    return " ".join(lines)[:400] + (f" ({found[1]})" if found[1] else "")


def _hint(said: str) -> str:
    if re.search(r"CMAKE_\w+_COMPILER|nvcc|GCC|g\+\+", said):
        return "./scripts/inv doctor    shows compilers and toolkit"
    return "look at the place that it names; patches and edits of CMake files count"


def _begin(build: Path) -> None:
    """Leave nothing of a former configure but objects: a cache, compiler checks or answers that are
    half written would be believed.
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
        # As cmGeneratedFileStream names what it has not finished.
        if re.fullmatch(r"\.tmp[0-9a-f]{5}", begun.suffix) and begun.is_file():
            begun.unlink()
    project.ask(build)


def _recorded(build: Path) -> Record | None:
    try:
        raw = json.loads(read_regular(build / project.RECORD))
        if raw["schema"] != SCHEMA:
            return None
        read, wrote = (
            {str(path): _state(was) for path, was in raw[name].items()}
            for name in ("read", "written")
        )
        inputs, sources = (
            {str(key): str(text) for key, text in raw[name].items()}
            for name in ("inputs", "sources")
        )
        globs = {
            str(pattern): [str(name) for name in names] for pattern, names in raw["globs"].items()
        }
        return Record(
            inputs,
            sources,
            read,
            wrote,
            globs,
            _state(raw["ninja"]),
            [str(line) for line in raw["not_built"]],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _state(was: Sequence[object]) -> State:
    size, time_ns, digest = was
    if isinstance(size, int) and isinstance(time_ns, int) and isinstance(digest, str):
        return size, time_ns, digest
    raise ValueError(was)


def _moved(name: str, recorded: Mapping[str, str], sources: Mapping[str, str]) -> str:
    was, is_now = (externals.placeholder_named(side.get(name)) for side in (recorded, sources))
    return f"{name} {was} → {is_now}"


def _changed(tree: Path, read: Mapping[str, State]) -> Iterator[str]:
    for path in dict.fromkeys((*read, *_read_of(tree))):
        if not tree_files.is_as(tree, path, read.get(path)):
            yield f"{path} {'changed' if path in read else 'is new'}"


def _read_of(tree: Path) -> Iterator[str]:
    """CMake files, patches and generators of the tree. A generator may import others, so every
    Python file beside sources counts.
    """
    yield from (str(path.relative_to(tree)) for path in listfiles(tree))
    yield from sorted(
        path
        for path in tree_files.sources(tree)
        if path.endswith((".py", ".cmake", ".in", ".jinja", ".j2", "/CMakeLists.txt"))
    )


def _written_to(tree: Path, device: str) -> tuple[str, ...]:
    """Folders of the Python package that CMake files of the tree name: a configure may write there
    what a precompiled wheel has brought.
    """
    steps = cmake_inputs.walk(tree, device)
    named = (
        found[1] for step in steps for word in step.command.words if (found := _IN_TREE.match(word))
    )
    return tuple(
        dict.fromkeys(path for path in named if ".." not in path and not Path(path).suffix)
    )


def _spared(tree: Path, device: str, sources: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Generators that import something of a placeholder, by the variable in which the tree's files
    remember that they ran: nothing needs their outcome.

    Machete's needs CUTLASS's Python part.
    """
    absent = [
        f"${{{Path(place).parent.name}_".lower()
        for place in sources.values()
        if externals.PLACEHOLDERS in Path(place).parts
    ]
    scripts: dict[str, tuple[str, str]] = {}
    for step in cmake_inputs.walk(tree, device) if absent else ():
        words = step.command.words
        if step.command.name == "file" and len(words) == 3 and words[0] == "MD5":
            scripts[words[1]] = words[2], _within(step.resolved(words[1]))
        if step.command.name == "execute_process" and any(
            name in word.lower() for word in words for name in absent
        ):
            for remembered, script in (scripts[word] for word in words if word in scripts):
                yield (
                    remembered,
                    hashlib.md5(read_regular(tree / script), usedforsecurity=False).hexdigest(),
                )


def _within(path: str) -> str:
    return re.sub(r"^\$\{CMAKE_(CURRENT_)?(SOURCE|LIST)_DIR\}/", "", path)


def _globs(tree: Path, device: str) -> Iterator[str]:
    """Patterns below the tree by which its CMake files find sources; ninja is not let to look for
    itself.
    """
    for step in cmake_inputs.walk(tree, device):
        words = step.command.words
        if step.command.name == "file" and len(words) > 2 and words[0] in ("GLOB", "GLOB_RECURSE"):
            for word in words[2:]:
                pattern = _within(step.resolved(word))
                if "$" not in pattern and not pattern.startswith("/") and "/" in pattern:
                    folder_of, _, name = pattern.rpartition("/")
                    yield f"{folder_of}/**/{name}" if words[0] == "GLOB_RECURSE" else pattern


def _found(tree: Path, pattern: str) -> list[str]:
    return sorted(glob(pattern, root_dir=tree, recursive=True))


def _below(tree: Path, path: Path) -> str:
    return str(path.relative_to(tree)) if path.is_relative_to(tree) else str(path)
