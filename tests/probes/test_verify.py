"""probes/verify.py on stand-in trees, without torch unless a test adds a stand-in for it."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from workspace.core.paths import here

PROBE = here().probes / "verify.py"
TORCH = '__version__ = "2.13.0+cpu"\nfrom torch import version\n'
PLATFORMS = (
    "import ctypes\nclass Platform:\n    device_type = 'cpu'\n    def import_kernels(self):\n      "
    "  {kernels}\ncurrent_platform = Platform()\n"
)


@dataclass(frozen=True)
class Tree:
    root: Path

    def library(self, name: str, source: str = "int answer(void) { return 42; }") -> Path:
        made = self.root / "vllm" / name
        made.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", made],
            input=source,
            text=True,
            check=True,
        )
        return made

    def package(self, kernels: str = "pass", top: str = "") -> None:
        """Add a vLLM and a torch that can be imported."""
        for name, text in (
            (
                "vllm/__init__.py",
                f"__version__ = '0.31.0+cpu'\nprint('INFO a greeting on stdout')\n{top}\n",
            ),
            ("vllm/platforms.py", PLATFORMS.format(kernels=kernels)),
            ("lib/torch/__init__.py", TORCH),
            ("lib/torch/version.py", "cuda = None\n"),
        ):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_text(text)

    def run(self, *args: str, cwd: Path | None = None) -> dict[str, Any]:
        environment = {"PYTHONPATH": f"{self.root / 'lib'}:{self.root}", "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            [sys.executable, "-B", PROBE, self.root, *args],
            cwd=cwd or "/",
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        record: dict[str, Any] = json.loads(done.stdout)
        return record

    def verdicts(self, *args: str) -> dict[str, tuple[str, str | None]]:
        return {
            Path(row["path"]).name: (row["verdict"], row["error"])
            for row in self.run(*args)["libraries"]
        }


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    (tmp_path / "vllm").mkdir()
    return Tree(tmp_path)


def test_each_damaged_library_gets_its_own_verdict_and_none_ends_the_probe(tree: Tree) -> None:
    tree.library("good.abi3.so")
    tree.library("libs/libversioned.so.1.2")
    tree.library(
        "unresolved.so", "int no_such_symbol(void); int answer(void) { return no_such_symbol(); }"
    )
    tree.library(
        "crash.so",
        "#include <signal.h>\n__attribute__((constructor)) void f(void) { raise(SIGSEGV); }",
    )
    whole = tree.library("cut.so").read_bytes()
    (tree.root / "vllm" / "cut.so").write_bytes(whole[: len(whole) // 2])
    # The table of sections is last and is not loaded: a library that is cut only there loads.
    (tree.root / "vllm" / "clipped.so").write_bytes(whole[:-8])
    (tree.root / "vllm" / "text.so").write_text(
        "not a library, although it has the name of one\n" * 10
    )
    (tree.root / "vllm" / "empty.so").touch()
    (tree.root / "vllm" / "notes.something").write_text("no library by its name")

    found = tree.verdicts("--no-import")

    assert {name for name, (verdict, _) in found.items() if verdict == "ok"} == {
        "good.abi3.so",
        "libversioned.so.1.2",
    }
    assert found["unresolved.so"] == ("broken", "undefined symbol: no_such_symbol")
    assert found["crash.so"] == ("broken", "killed by SIGSEGV")
    assert found["cut.so"][0] == "broken"
    assert "bytes are missing at its end" in (found["cut.so"][1] or "")
    assert found["clipped.so"] == ("broken", "8 bytes are missing at its end")
    assert found["text.so"] == ("broken", "invalid ELF header")
    assert found["empty.so"] == ("broken", "file too short")
    assert "notes.something" not in found


def test_two_libraries_that_cannot_share_a_process_both_load(tree: Tree) -> None:
    # vLLM's CPU libraries register the same operators; the second one in a process aborts it.
    registers = (
        '#include <stdlib.h>\n__attribute__((constructor)) void f(void) { if (getenv("TAKEN"))'
        ' abort(); setenv("TAKEN", "1", 1); }'
    )
    tree.library("_C.so", registers)
    tree.library("_C_AVX2.so", registers)
    assert {verdict for verdict, _ in tree.verdicts("--no-import").values()} == {"ok"}


def test_library_for_another_processor_is_no_fault_while_vllm_loads_another_one(tree: Tree) -> None:
    tree.library(
        "_C.so", "#include <signal.h>\n__attribute__((constructor)) void f(void) { raise(SIGILL); }"
    )
    own = tree.library("_C_AVX2.so")
    tree.package(kernels=f"ctypes.CDLL({str(own)!r})")
    for args in ((), ("--no-import",)):
        record = tree.run(*args)
        assert [row["verdict"] for row in record["libraries"]] == ["other cpu", "ok"]
        assert record["kernels"] == ["vllm/_C_AVX2.so"]
        assert record["error"] is None


def test_illegal_instruction_in_the_library_that_vllm_loads_is_a_fault(tree: Tree) -> None:
    own = tree.library(
        "_C.so", "#include <signal.h>\n__attribute__((constructor)) void f(void) { raise(SIGILL); }"
    )
    tree.package(kernels=f"ctypes.CDLL({str(own)!r})")
    record = tree.run()
    assert record["libraries"][0]["verdict"] == "broken"
    assert record["error"] == "vllm cannot be imported: killed by SIGILL"


def test_stdout_has_only_the_document_although_vllm_prints(tree: Tree) -> None:
    tree.package()
    record = tree.run()
    assert (record["version"], record["platform"], record["torch"]) == (
        "0.31.0+cpu",
        "cpu",
        {"version": "2.13.0+cpu", "cuda": None},
    )
    assert record["file"] == str(tree.root / "vllm" / "__init__.py")


def test_vllm_in_the_working_directory_is_imported_and_shows(tree: Tree, tmp_path: Path) -> None:
    tree.package()
    other = tmp_path / "elsewhere"
    (other / "vllm").mkdir(parents=True)
    (other / "vllm" / "__init__.py").write_text("__version__ = '9'\n")
    (other / "vllm" / "platforms.py").write_text(PLATFORMS.format(kernels="pass"))
    assert tree.run(cwd=other)["file"] == str(other / "vllm" / "__init__.py")


@pytest.mark.parametrize(
    ("top", "output"),
    [
        ("raise ImportError('no module of mine')", "ImportError: no module of mine"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGBUS)", "killed by SIGBUS"),
        ("import os; os._exit(3)", "exited with 3 without a message"),
        ("raise SystemExit(1)", "SystemExit: 1"),
    ],
)
def test_vllm_that_cannot_be_imported_is_an_error_in_one_sentence(
    tree: Tree, top: str, output: str
) -> None:
    tree.package(top=top)
    record = tree.run()
    assert record["error"] == f"vllm cannot be imported: {output}"
    assert record["file"] is None


def test_without_torch_libraries_are_judged_and_the_error_names_torch(tree: Tree) -> None:
    tree.library("good.so")
    record = tree.run("--no-import")
    assert (
        record["error"] == "torch cannot be imported: ModuleNotFoundError: No module named 'torch'"
    )
    assert record["torch"] is None
    assert [row["verdict"] for row in record["libraries"]] == ["ok"]


def test_folder_without_vllm_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, PROBE, tmp_path], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "holds no folder vllm" in done.stderr
    assert done.stdout == ""


def test_library_for_another_python_is_hashed_and_never_loaded(tree: Tree) -> None:
    other = "cpython-310-x86_64-linux-gnu.so"
    own = f"cpython-{sys.version_info.major}{sys.version_info.minor}-x86_64-linux-gnu.so"
    crashing = "__attribute__((constructor)) void crash(void) { __builtin_trap(); }"
    tree.library(f"_C.{other}", crashing)
    tree.library(f"_C.{own}", crashing)
    verdicts = tree.verdicts("--no-import")
    assert verdicts[f"_C.{other}"] == ("other python", None)
    assert verdicts[f"_C.{own}"][0] == "broken"


def test_tree_that_hides_the_installed_vllm_shows_from_inside_only(
    tree: Tree, tmp_path: Path
) -> None:
    tree.package()
    elsewhere = tmp_path / "other"
    (elsewhere / "vllm").mkdir(parents=True)
    (elsewhere / "vllm" / "__init__.py").write_text("raise ImportError('a half-made tree')\n")
    environment = {"PYTHONPATH": f"{tree.root / 'lib'}:{tree.root}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-B", PROBE, elsewhere, "--no-libraries", "--inside"],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    record = json.loads(done.stdout)
    assert (record["error"], record["version"]) == (None, "0.31.0+cpu")
    assert record["inside"]["error"] == "vllm cannot be imported: ImportError: a half-made tree"
