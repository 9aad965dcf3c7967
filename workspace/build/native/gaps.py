"""What CMake looks for in a CUDA toolkit and does not find in a small one: taken from the CUDA wheels that torch came with.

A full toolkit, such as a DGX Spark's, lacks nothing, and then nothing is added.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from workspace.core import process
from workspace.core.files import write_atomic
from workspace.core.journal import Journal
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.environment import interpreter, toolchain

# Where a linker and CMake's FindCUDAToolkit look for the driver's library, below a toolkit and in the system.
_TOOLKIT_LIBRARIES = ("lib64", "lib64/stubs", "lib", "lib/stubs", "targets/*/lib", "targets/*/lib/stubs", "compat")
# A declaration in cuda.h, once its renamings (cuMemFree is cuMemFree_v2) were carried out.
_FUNCTION = re.compile(r"^\s*CUresult\s+(cu[A-Z]\w*)\s*\(", re.MULTILINE)
_SYSTEM_LIBRARIES = ("/usr/lib/*", "/usr/lib64", "/usr/lib/*/nvidia/current", "/usr/local/lib", "/lib/*")


def arguments(layout: Layout, settings: Settings, build: Path, *, journal: Journal) -> tuple[str, ...]:
    """Return arguments for CMake that name what the toolkit lacks. On a machine without a driver a stub of its library is made in `build`."""
    toolkit = toolchain.find_toolkit(settings)
    if toolkit is None:
        return ()
    wheels = [folder for top in interpreter.site_packages(layout) for folder in sorted((top / "nvidia").glob("*")) if folder.is_dir()]
    found: list[str] = []
    include = next((folder / "include" for folder in wheels if (folder / "include" / "cublas_v2.h").is_file()), None)
    if include and not any(
        (toolkit.home / place / "cublas_v2.h").is_file() for place in ("include", "targets/x86_64-linux/include", "targets/sbsa-linux/include")
    ):
        # Behind the toolkit's own; CMake adds them after all others.
        found += [f"-DCMAKE_{language}_STANDARD_INCLUDE_DIRECTORIES={include}" for language in ("CXX", "CUDA")]
    runtime = next((path for folder in wheels for path in sorted((folder / "lib").glob("libnvrtc.so*"))), None)
    if runtime and not any(_libraries(toolkit.home, "libnvrtc.so")):
        found.append(f"-DCUDA_nvrtc_LIBRARY={runtime}")
    if not any(_libraries(toolkit.home, "libcuda.so")) and not any(_system("libcuda.so")):
        found.append(f"-DCUDA_cuda_driver_LIBRARY={_stub(settings, toolkit.home, build, journal=journal)}")
    return tuple(found)


def _libraries(home: Path, name: str) -> Iterator[Path]:
    return (path for place in _TOOLKIT_LIBRARIES for path in home.glob(f"{place}/{name}"))


def _system(name: str) -> Iterator[Path]:
    return (path for place in _SYSTEM_LIBRARIES for path in Path("/").glob(f"{place[1:]}/{name}"))


def _stub(settings: Settings, home: Path, build: Path, *, journal: Journal) -> Path:
    """A library of the driver's name to link against, with the functions of the toolkit's cuda.h: the real one comes with the driver.

    With none of them a linker that keeps only what is used (--as-needed) would leave it out, and what was linked would load nowhere.
    """
    stub = build / "stub" / "libcuda.so"
    source = stub.with_suffix(".c")
    if not stub.is_file():
        stub.parent.mkdir(parents=True, exist_ok=True)
        environment = settings.child_environment("build")
        said = process.capture(["cc", "-E", "-P", home / "include" / "cuda.h"], env=environment)
        names = sorted(set(_FUNCTION.findall(said.stdout)))
        write_atomic(source, "".join(f"int {name}(void) {{ return 999; }}\n" for name in names).encode())
        process.run(["cc", "-shared", "-fPIC", "-nostdlib", "-Wl,-soname,libcuda.so.1", "-o", stub, source], env=environment, journal=journal)
    return stub
