"""The picture of the house, enforced: who may import whom, and the single doors.

Each rule is a function from a module's source to complaints, and is also shown a source that breaks it.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = {"core", "source", "environment", "engine", "build"}
# Which packages of workspace/ a package may import, itself aside.
MAY_IMPORT = {
    "core": set(),
    "source": {"core"},
    "environment": {"core"},
    "engine": {"core", "source", "environment"},
    "build": {"core", "source", "environment"},
    "smoke": WORKFLOWS,
    "perf": WORKFLOWS | {"pin"},
    "bench": WORKFLOWS | {"smoke"},
    "serve": WORKFLOWS,
    "upstream": WORKFLOWS | {"smoke"},
    "pin": WORKFLOWS | {"smoke", "bench", "serve"},
    "door": {"core"},
    "verbs": WORKFLOWS | {"pin", "smoke", "bench", "serve", "door"},
    "probes": set(),
}
# A package that only one module, one package, or nobody, may import.
SINGLE_DOORS = {
    "subprocess": "workspace/core/process.py",
    "multiprocessing": None,
    "pty": None,
    "dotenv": "workspace/core/settings.py",
    "git": "workspace/source/git/",
    "invoke": "workspace/verbs/",
    "nox": "noxfile.py",
}
STARTS_A_PROGRAM = re.compile(r"os\.(system|popen|fork|forkpty|exec\w+|spawn\w+|posix_spawn\w*)$")
# The seam, the program it puts between itself and what it starts, the one that a build puts before each compiler, and the one above a server.
STARTS_PROGRAMS = {"workspace/core/process.py", "workspace/core/guard.py", "workspace/build/launcher.py", "workspace/engine/keeper.py"}
READS_THE_ENVIRONMENT = re.compile(r"os\.(environ|environb|getenv|getenvb|putenv|unsetenv)$")
HEAVY = {"requests", "git", "psutil", "rich", "pypi_simple", "torch", "vllm"}
# What the built environment is sure to have: vLLM's own requirements, and what those require; gguf comes with the model that needs it.
PROBES_MAY_IMPORT = {"torch", "triton", "vllm", "transformers", "tokenizers", "safetensors", "numpy", "huggingface_hub", "httpx", "gguf"}
LONGEST_MODULE = 400


def library() -> list[Path]:
    return sorted((ROOT / "workspace").rglob("*.py"))


def imports(tree: ast.AST, path: str) -> Iterator[str]:
    """Every module that is imported anywhere in the tree, by its full name."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def attributes(tree: ast.AST) -> Iterator[str]:
    """Every `os.name`, also where it came by `from os import name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (f"os.{alias.name}" for alias in node.names)


def wrong_arrows(source: str, path: str) -> list[str]:
    own = Path(path).with_suffix("").parts[1]
    complaints = []
    for name in imports(ast.parse(source), path):
        parts = name.split(".")
        if parts[0] in ("tasks", "noxfile", "tests"):
            complaints.append(f"{path} imports {name}")
        if parts[0] != "workspace" or len(parts) == 1:
            continue
        if parts[1] == "door" and path.endswith("/__main__.py"):
            continue
        if parts[1] != own and own in MAY_IMPORT and parts[1] not in MAY_IMPORT[own]:
            complaints.append(f"{path} imports {name}")
    return complaints


def wrong_doors(source: str, path: str) -> list[str]:
    tree = ast.parse(source)
    if path.startswith("workspace/probes/"):
        # A program of its own in another environment: it can use none of our doors.
        return []
    complaints = [f"{path} imports {name}" for name in imports(tree, path) if not _is_door(name.split(".")[0], path)]
    for name in attributes(tree):
        starts = STARTS_A_PROGRAM.match(name) and path not in STARTS_PROGRAMS
        if starts or (READS_THE_ENVIRONMENT.match(name) and path != "workspace/core/settings.py"):
            complaints.append(f"{path} uses {name}")
    return complaints


def _is_door(package: str, path: str) -> bool:
    door = SINGLE_DOORS.get(package, path)
    return door is not None and (path == door or (door.endswith("/") and path.startswith(door)))


def wrong_probe(source: str, path: str) -> list[str]:
    names = {name.split(".")[0] for name in imports(ast.parse(source), path)}
    return [f"{path} imports {name}" for name in sorted(names - PROBES_MAY_IMPORT - set(sys.stdlib_module_names))]


def heavy_at_the_top(source: str, path: str) -> list[str]:
    tree = ast.parse(source)
    at_import = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom | ast.Try | ast.With)]
    return [f"{path} imports {name} when it is loaded" for node in at_import for name in imports(node, path) if name.split(".")[0] in HEAVY]


def untidy(source: str, path: str) -> list[str]:
    complaints = [f"{path} has {source.count(chr(10))} lines"] if source.count("\n") > LONGEST_MODULE else []
    complaints += [f"{path}: {match.group()}" for match in re.finditer(r"\b(TODO|FIXME|XXX)\b.*", source)]
    return complaints + ([] if ast.get_docstring(ast.parse(source)) else [f"{path} has no docstring"])


def complaints_of(rule, paths: list[Path]) -> list[str]:
    return [complaint for path in paths for complaint in rule(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))]


def test_every_package_is_in_the_picture() -> None:
    there = {path.relative_to(ROOT / "workspace").parts[0].removesuffix(".py") for path in library()}
    assert there - {"__init__"} <= set(MAY_IMPORT)


def test_arrows_point_down_only() -> None:
    assert complaints_of(wrong_arrows, library()) == []


def test_single_doors_are_the_only_doors() -> None:
    assert complaints_of(wrong_doors, library()) == []


def test_probes_know_nothing_of_ours_and_nobody_imports_them() -> None:
    probes = [path for path in library() if path.is_relative_to(ROOT / "workspace" / "probes")]
    assert complaints_of(wrong_probe, probes) == []


def test_nothing_heavy_is_imported_before_a_verb_needs_it() -> None:
    paths = [path for path in library() if "probes" not in path.parts]
    assert complaints_of(heavy_at_the_top, [*paths, ROOT / "tasks.py"]) == []


def test_modules_are_short_documented_and_finished() -> None:
    assert complaints_of(untidy, [*library(), ROOT / "tasks.py", ROOT / "noxfile.py", ROOT / "scripts" / "tools.py"]) == []


def test_noxfile_imports_nothing_of_ours() -> None:
    names = {name.split(".")[0] for name in imports(ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8")), "noxfile.py")}
    assert not names & {"workspace", "tasks", "tests"}


@pytest.mark.parametrize("name", ["tasks.py", "noxfile.py", "scripts/tools.py"])
def test_doors_parse_in_an_old_python_so_that_they_can_hand_over(name: str) -> None:
    ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 7))


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (wrong_arrows, "workspace/source/a.py", "from workspace.environment import machine"),
        (wrong_arrows, "workspace/environment/a.py", "def f():\n    import workspace.source.git"),
        (wrong_arrows, "workspace/engine/a.py", "from workspace import build"),
        (wrong_arrows, "workspace/core/a.py", "from ..build import plan"),
        (wrong_arrows, "workspace/core/a.py", "from workspace import door"),
        (wrong_arrows, "workspace/smoke/report.py", "from workspace.probes import parity"),
        (wrong_arrows, "workspace/build/a.py", "import tasks"),
        (wrong_doors, "workspace/build/a.py", "import subprocess"),
        (wrong_doors, "workspace/build/a.py", "from subprocess import run"),
        (wrong_doors, "workspace/build/a.py", "import os\nos.system('true')"),
        (wrong_doors, "workspace/build/a.py", "from os import environ"),
        (wrong_doors, "workspace/build/a.py", "import os\nprint(os.getenv('HOME'))"),
        (wrong_doors, "workspace/source/patches.py", "from git import Repo"),
        (wrong_doors, "workspace/core/a.py", "import invoke"),
        (wrong_probe, "workspace/probes/a.py", "from workspace.core import files"),
        (wrong_probe, "workspace/probes/a.py", "import requests"),
        (heavy_at_the_top, "workspace/build/a.py", "import rich.console"),
        (untidy, "workspace/build/a.py", '"""Doc."""\n# TODO later'),
        (untidy, "workspace/build/a.py", '"""Doc."""\n' + "x = 1\n" * LONGEST_MODULE),
        (untidy, "workspace/build/a.py", "x = 1"),
    ],
)
def test_each_rule_sees_what_breaks_it(rule, path: str, source: str) -> None:
    assert len(rule(source, path)) == 1


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (wrong_arrows, "workspace/smoke/__main__.py", "from workspace import door"),
        (wrong_arrows, "workspace/source/a.py", "from .series import read"),
        (heavy_at_the_top, "workspace/build/a.py", "if TYPE_CHECKING:\n    import rich\ndef f():\n    import git"),
        (wrong_doors, "workspace/core/settings.py", "import os\nos.environ"),
    ],
)
def test_no_rule_sees_what_is_allowed(rule, path: str, source: str) -> None:
    assert rule(source, path) == []
