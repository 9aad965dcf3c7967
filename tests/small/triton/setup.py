"""The switches of the real setup.py: CMake in a folder that stays, jobs, what is passed on to
CMake, and where a former layout had it.
"""

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent if HERE.name == "python" else HERE
PASSED_ON = (
    "LLVM_SYSPATH",
    "JSON_SYSPATH",
    "TRITON_OFFLINE_BUILD",
    "TRITON_PARALLEL_LINK_JOBS",
    "TRITON_PTXAS_PATH",
    "TRITON_PTXAS_BLACKWELL_PATH",
)


class CMakeBuild(build_ext):
    def run(self):
        base = Path(os.environ.get("TRITON_BUILD_DIR", ROOT / "build"))
        folder = base if HERE != ROOT else base / f"cmake.{sysconfig.get_platform()}"
        folder.mkdir(parents=True, exist_ok=True)
        args = [
            *("-G", "Ninja", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"),
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={Path(self.build_lib).resolve() / 'triton' / '_C'}",
            f"-DTRITON_CACHE_PATH={Path(os.environ.get('TRITON_HOME') or Path.home()) / '.triton'}",
            *(f"-D{name}={os.environ[name]}" for name in PASSED_ON if name in os.environ),
            *shlex.split(os.environ.get("TRITON_APPEND_CMAKE_ARGS", "")),
        ]
        subprocess.check_call(["cmake", str(ROOT), *args], cwd=folder)
        subprocess.check_call(
            ["cmake", "--build", ".", f"-j{os.environ.get('MAX_JOBS', 2 * os.cpu_count())}"],
            cwd=folder,
        )


def version():
    output = subprocess.run(
        ["git", "rev-parse", "--short=8", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return f"3.9.0+git{output.stdout.strip()}"


setup(
    name="triton",
    version=version(),
    package_dir={"": str((ROOT / "python").relative_to(HERE)) if HERE == ROOT else "."},
    packages=["triton", "triton.backends", "triton.compiler"],
    ext_modules=[Extension("triton", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    install_requires=[],
)
