"""The switches of the real setup.py: target, version, precompiled libraries, the extensions that
CMake makes.
"""

import importlib.util
import os
import platform
import zipfile
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools_scm import get_version

ROOT_DIR = Path(__file__).parent


def load_module_from_path(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


envs = load_module_from_path("envs", ROOT_DIR / "vllm" / "envs.py")
TARGET = envs.VLLM_TARGET_DEVICE
if TARGET == "cuda" and torch.version.cuda is None:
    TARGET = "cpu"


class CMakeExtension(Extension):
    def __init__(self, name, cmake_lists_dir=".", **kwa):
        super().__init__(name, sources=[], **kwa)
        self.cmake_lists_dir = os.path.abspath(cmake_lists_dir)


class cmake_build_ext(build_ext):
    """The real one configures, compiles and installs in a new folder each time."""

    def run(self):
        raise SystemExit(
            "compiling in pip's temporary folder is what the workspace is there to avoid"
        )


class precompiled_build_ext(build_ext):
    """Disables extension building when using precompiled libraries."""

    def run(self):
        print("Skipping build_ext: using precompiled extensions.")


class precompiled_wheel_utils:
    @staticmethod
    def extract(wheel_path, *, extract_extensions):
        if not os.path.isfile(wheel_path):
            raise ValueError(f"no wheel at {wheel_path}")
        with zipfile.ZipFile(wheel_path) as wheel:
            exact_members = set()
            if extract_extensions:
                exact_members.update(
                    {
                        "vllm/_C.abi3.so",
                        "vllm/_C_stable_libtorch.abi3.so",
                        "vllm/spinloop.abi3.so",
                    }
                )
            for member in wheel.filelist:
                if member.filename in exact_members:
                    print(f"[extract] {member.filename}")
                    wheel.extract(member, ROOT_DIR)


def get_vllm_version():
    if override := os.getenv("VLLM_VERSION_OVERRIDE"):
        os.environ["SETUPTOOLS_SCM_PRETEND_VERSION"] = override
        return get_version(write_to="vllm/_version.py")
    version = get_version(write_to="vllm/_version.py")
    sep = "." if "+" in version else "+"
    return (
        version
        + sep
        + ("cpu" if TARGET == "cpu" else "precompiled" if envs.VLLM_USE_PRECOMPILED else "cu130")
    )


def get_requirements():
    def read(name):
        for line in (ROOT_DIR / "requirements" / name).read_text().splitlines():
            if line.startswith("-r "):
                yield from read(line.split()[1])
            elif line.strip() and not line.startswith(("#", "--")):
                yield line.split(" #")[0].strip()

    return list(read("cpu.txt" if TARGET == "cpu" else "cuda.txt"))


if envs.VLLM_USE_PRECOMPILED:
    precompiled_wheel_utils.extract(
        os.environ["VLLM_PRECOMPILED_WHEEL_LOCATION"], extract_extensions=True
    )

ext_modules = [CMakeExtension(name="vllm.spinloop")]
if platform.machine() in ("x86_64", "AMD64"):
    ext_modules.append(CMakeExtension(name="vllm._C"))
    ext_modules.append(CMakeExtension(name="vllm._C_AVX512"))
    ext_modules.append(CMakeExtension(name="vllm._C_AVX2"))
else:
    ext_modules.append(CMakeExtension(name="vllm._C"))

setup(
    name="vllm",
    version=get_vllm_version(),
    install_requires=get_requirements(),
    ext_modules=ext_modules,
    cmdclass={"build_ext": precompiled_build_ext if envs.VLLM_USE_PRECOMPILED else cmake_build_ext},
)
