"""The switches of the real setup.py: target, version, precompiled libraries, bound on compilers."""

import concurrent.futures
import importlib.util
import os
import platform
import subprocess
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


class compiled_build_ext(build_ext):
    """Compile each source, at most MAX_JOBS at once, and link them into the tree."""

    def run(self):
        jobs = int(envs.MAX_JOBS or os.cpu_count() or 1)
        compiler = os.environ.get("CC", "cc")
        for extension in self.extensions:
            work = ROOT_DIR / "build" / extension.name
            work.mkdir(parents=True, exist_ok=True)
            objects = [work / (Path(source).stem + ".o") for source in extension.sources]
            commands = [[compiler, "-O1", "-fPIC", "-c", source, "-o", str(made)] for source, made in zip(extension.sources, objects, strict=True)]
            total = len(commands) + 1
            print(f"compiling {extension.name} with at most {jobs} jobs", flush=True)
            with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
                for number, _ in enumerate(pool.map(lambda command: subprocess.run(command, cwd=ROOT_DIR, check=True), commands), 1):
                    print(f"[{number}/{total}] compiled", flush=True)
            library = ROOT_DIR / (extension.name.replace(".", "/") + ".abi3.so")
            subprocess.run([compiler, "-shared", "-o", str(library), *map(str, objects)], check=True)
            print(f"[{total}/{total}] linked {library.name}", flush=True)


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
    return version + sep + ("cpu" if TARGET == "cpu" else "precompiled" if envs.VLLM_USE_PRECOMPILED else "cu130")


def get_requirements():
    def read(name):
        for line in (ROOT_DIR / "requirements" / name).read_text().splitlines():
            if line.startswith("-r "):
                yield from read(line.split()[1])
            elif line.strip() and not line.startswith(("#", "--")):
                yield line.split(" #")[0].strip()

    return list(read("cpu.txt" if TARGET == "cpu" else "cuda.txt"))


if envs.VLLM_USE_PRECOMPILED:
    precompiled_wheel_utils.extract(os.environ["VLLM_PRECOMPILED_WHEEL_LOCATION"], extract_extensions=True)

names = ["vllm._C", *(["vllm._C_AVX2", "vllm._C_AVX512"] if platform.machine() == "x86_64" else [])]
setup(
    name="vllm",
    version=get_vllm_version(),
    install_requires=get_requirements(),
    ext_modules=[Extension(name, sorted(str(path.relative_to(ROOT_DIR)) for path in ROOT_DIR.glob("csrc/cpu/*.c"))) for name in names],
    cmdclass={"build_ext": precompiled_build_ext if envs.VLLM_USE_PRECOMPILED else compiled_build_ext},
)
