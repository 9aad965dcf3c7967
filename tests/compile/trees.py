"""A small tree with vLLM's shapes: targets by component, generated sources, an external project, a
file that configure writes into the package.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from workspace.compile import cmake, cmake_inputs, externals
from workspace.compile.cmake_inputs import Inputs
from workspace.compile.externals import External
from workspace.compile.project import Project
from workspace.core import settings as settings_module
from workspace.core.console import Console, RunLog, Step
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.machine.machine import Machine

TAG = "1" * 40
LAUNCHER = Path("/usr/bin/env")
TOP = """\
cmake_minimum_required(VERSION 3.26)
project(small LANGUAGES C)
set(VLLM_TARGET_DEVICE "cuda" CACHE STRING "Target device")
include(${CMAKE_CURRENT_LIST_DIR}/cmake/utils.cmake)
set(GENERATOR ${CMAKE_CURRENT_SOURCE_DIR}/csrc/generate.py)
execute_process(
  COMMAND ${VLLM_PYTHON_EXECUTABLE} ${GENERATOR} ${CMAKE_CURRENT_SOURCE_DIR} "$ENV{KERNELS_OF}"
  COMMAND_ERROR_IS_FATAL ANY)
file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/patched/patched.h "#define PATCHED 1\\n")
include_directories(${CMAKE_CURRENT_BINARY_DIR}/patched)
file(GLOB KERNELS "csrc/generated/kernel_*.c")
define_extension_target(_C csrc/c.c ${KERNELS})
target_compile_definitions(_C PRIVATE WIDE=1)
target_include_directories(_C PRIVATE csrc/include)
define_extension_target(spinloop csrc/spinloop.c)
message(STATUS
  "Not building Machete kernels as no compatible archs found in CUDA target architectures")
if(VLLM_TARGET_DEVICE STREQUAL "rocm")
  message(FATAL_ERROR "no")
endif()
include(cmake/external_projects/flashy.cmake)
set(SPARED ${CMAKE_CURRENT_SOURCE_DIR}/csrc/spared.py)
file(MD5 ${SPARED} SPARED_HASH)
if(NOT DEFINED CACHE{SPARED_HASH} OR NOT $CACHE{SPARED_HASH} STREQUAL ${SPARED_HASH})
  execute_process(
    COMMAND ${CMAKE_COMMAND} -E env PYTHONPATH=${flashy_SOURCE_DIR}/python
      ${VLLM_PYTHON_EXECUTABLE} ${SPARED}
    RESULT_VARIABLE generated
    OUTPUT_FILE ${CMAKE_CURRENT_BINARY_DIR}/machete_generation.log
    ERROR_FILE ${CMAKE_CURRENT_BINARY_DIR}/machete_generation.log)
  if(NOT generated EQUAL 0)
    message(FATAL_ERROR "Machete generation failed. Result: \"${generated}\""
      "\nCheck the log for details: ${CMAKE_CURRENT_BINARY_DIR}/machete_generation.log")
  endif()
endif()
add_dependencies(_C _flashy_C)
"""
UTILS = """\
function(define_extension_target NAME)
  add_library(${NAME} MODULE ${ARGN})
  set_target_properties(${NAME} PROPERTIES PREFIX "" SUFFIX ".abi3.so")
  install(TARGETS ${NAME} LIBRARY DESTINATION vllm COMPONENT ${NAME})
endfunction()
"""
FLASHY = f"""\
include(FetchContent)
if (DEFINED ENV{{FLASHY_SRC_DIR}})
  set(FLASHY_SRC_DIR $ENV{{FLASHY_SRC_DIR}})
endif()
if(FLASHY_SRC_DIR)
  FetchContent_Declare(flashy SOURCE_DIR ${{FLASHY_SRC_DIR}})
else()
  FetchContent_Declare(
    flashy
    GIT_REPOSITORY https://github.com/vllm-project/flashy.git
    GIT_TAG {TAG}
    GIT_PROGRESS TRUE
  )
endif()
FetchContent_MakeAvailable(flashy)
set(FLASHY_VENDOR_DIR "${{CMAKE_SOURCE_DIR}}/vllm/third_party/flashy")
file(READ "${{flashy_SOURCE_DIR}}/flashy/interface.py" INTERFACE)
file(WRITE "${{FLASHY_VENDOR_DIR}}/interface.py" "import vllm\\n${{INTERFACE}}")
install(FILES "${{flashy_SOURCE_DIR}}/flashy/only_installed.py"
  DESTINATION vllm/third_party/flashy COMPONENT _flashy_C)
set(HIDDEN ${{flashy_SOURCE_DIR}}/csrc)
define_extension_target(_flashy_C ${{flashy_SOURCE_DIR}}/csrc/api.c ${{HIDDEN}}/hidden.c)
add_custom_target(flashy_py)
foreach(COMPONENT _flashy_fa2_C)
  install(FILES "${{flashy_SOURCE_DIR}}/x.py" DESTINATION vllm/flashy COMPONENT ${{COMPONENT}})
endforeach()
"""
GENERATOR = """\
import sys
from pathlib import Path
out = Path(sys.argv[1]) / "csrc" / "generated"
out.mkdir(exist_ok=True)
for old in out.glob("kernel_*.c"):
    old.unlink()
for name in (sys.argv[2] or "a b").split():
    text = f"int kernel_{name}(void) {{ return {len(sys.argv[2])}; }}\\n"
    (out / f"kernel_{name}.c").write_text(text)
"""
FILES = {
    "CMakeLists.txt": TOP,
    "cmake/utils.cmake": UTILS,
    "cmake/external_projects/flashy.cmake": FLASHY,
    "csrc/generate.py": GENERATOR,
    "csrc/spared.py": "import of_flashy\n",
    "csrc/include/wide.h": "#define WIDTH 8\n",
    "csrc/c.c": (
        '#include "wide.h"\n#include "patched.h"\nint c(void) { return WIDTH + WIDE + PATCHED; }\n'
    ),
    "csrc/spinloop.c": "int spin(void) { return 1; }\n",
    "vllm/__init__.py": "",
}


def put(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@contextmanager
def written(path: Path, text: str | None) -> Iterator[None]:
    """Let a file hold `text`, or be deleted, while the block is entered."""
    former = path.read_bytes() if path.exists() else None
    path.unlink() if text is None else path.write_text(text)
    try:
        yield
    finally:
        path.unlink(missing_ok=True) if former is None else path.write_bytes(former)


@dataclass
class Site:
    """A small clone: the tree, an interpreter, and the tools' CMake and ninja on PATH."""

    root: Path
    shell: dict[str, str] = field(default_factory=dict)

    @classmethod
    def again(cls, root: Path) -> "Site":
        """Return the site that `make` has made, in another process."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return cls(
            root, {"PATH": path, "WORKSPACE_CACHE_DIR": str(root / "cache"), "HOME": str(root)}
        )

    @classmethod
    def make(cls, root: Path) -> "Site":
        site = cls.again(root)
        put(site.layout.vllm, FILES)
        (site.layout.environment / "bin").mkdir(parents=True)
        site.layout.environment_python.symlink_to(sys.executable)
        return site

    @property
    def layout(self) -> Layout:
        return Layout(self.root)

    @property
    def tree(self) -> Path:
        return self.layout.vllm

    def settings(self, **more: str) -> Settings:
        return settings_module.load(self.layout, environ={**self.shell, **more})

    def inputs(
        self,
        *,
        pin: str = "v1",
        archs: str = "",
        torch: str = "2.13.0",
        configure: Mapping[str, str] | None = None,
    ) -> Inputs:
        return Inputs(
            "cpu",
            str(self.tree),
            pin,
            archs,
            torch,
            "",
            "gcc 12",
            "Release",
            {"CMAKE_ARGS": ""} if configure is None else configure,
        )

    def run_log(self) -> RunLog:
        return RunLog(Console(), self.layout.logs, verb="rebuild")

    def provide(
        self,
        wanted: tuple[External, ...] = (),
        others: tuple[External, ...] | None = None,
        **more: str,
    ) -> Mapping[str, str]:
        others = externals.declared(self.tree, "cpu") if others is None else others
        with self.run_log() as run_log:
            return cmake_inputs.provide(
                self.layout,
                self.settings(**more),
                wanted,
                others,
                run_log=run_log,
                step=Step("externals"),
            )

    def configure(
        self, inputs: Inputs | None = None, sources: Mapping[str, str] | None = None, **more: str
    ) -> Project:
        inputs, sources = inputs or self.inputs(), self.provide() if sources is None else sources
        with self.run_log() as run_log:
            return cmake.configure(
                Machine(self.layout, self.settings(**more)),
                inputs,
                sources,
                launcher=LAUNCHER,
                run_log=run_log,
            )

    def ninja(self, build: Path, *args: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["ninja", "-C", str(build), *args], env=self.shell, capture_output=True, text=True
        )


def after_typing(hint: str | None, **variables: str) -> dict[str, str]:
    """Type the command of a hint into a shell; return the variables that the shell then has."""
    assert hint
    command = hint.partition("    ")[0]
    done = subprocess.run(
        ["/bin/bash", "-c", f"{command} && /usr/bin/env"],
        env=variables,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    return {name: text for name, text in found.items() if name.endswith("_DIR")}
